#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGHUP: VMs that come, go and change while the daemon runs, and the sessions that it leaves alone."""
import signal
import threading
import time

import harness
import nbd
import nbdpull
from harness import MIB, Disk, rng
from qmpclient import QmpError
from qmpproxy import QmpProxy

SIZE = 4 * MIB


class Reload(harness.Case):
    def world(self, *names, linger=0, **options):
        """Three QEMUs without a guest's system, "a" with disk "da" full of 1s and so on; a daemon that serves names of them."""
        self.vms, self.data = {}, {}
        for i, name in enumerate('abc', 1):
            self.vms[name] = self.bare(Disk(f'd{name}', SIZE), name=name)
            self.data[name] = bytearray(bytes([i]) * SIZE)
            self.write(name, 0, SIZE, i)
        self.say({name: '' for name in names})
        self.daemon = self.qpulld({}, flags=[f'--config={self.folder}/qpulld.conf', *options.pop('flags', ())],
                                  linger=linger, **options)
        for name in names:
            self.wait_ready(name)
        self.before = {name: vm.state() for name, vm in self.vms.items()}

    def write(self, name, offset, length, byte):
        self.vms[name].write(f'd{name}', offset, length, byte)
        self.data[name][offset:offset + length] = bytes([byte]) * length

    def say(self, vms):
        """{name: further lines of its section}"""
        with open(f'{self.folder}/qpulld.conf', 'w', encoding='utf-8') as f:
            for name, lines in vms.items():
                f.write(f'[vm "{name}"]\nqmp = {self.vms[name].qmp_path}\n{lines}\n')

    def text(self):
        with open(self.daemon.log_path, encoding='utf-8', errors='replace') as f:
            return f.read()

    def reload(self, vms):
        """What the log says in the end."""
        before = len(self.text())
        self.say(vms)
        self.daemon.process.send_signal(signal.SIGHUP)
        return harness.wait_until(lambda: [line for line in self.text()[before:].splitlines() if 'SIGHUP: ' in line],
                                  20, 'the reload')[0]

    def assertReload(self, vms, new=0, changed=0, gone=0):
        self.assertIn(f'SIGHUP: {new} VMs are new, {changed} configured anew, {gone} gone', self.reload(vms))

    def served(self):
        return [vm['name'] for vm in self.daemon.ask('query-vms')]

    def disks(self, name):
        """None: it cannot be asked now."""
        try:
            return [d['name'] for d in self.daemon.ask('query-disks', {'vm': name})]
        except QmpError:
            return None

    def wait_served(self, *names):
        harness.wait_until(lambda: self.served() == list(names), 20, f'{names} to be served')

    def wait_ready(self, name):
        harness.wait_until(lambda: name in self.served(), 20, f'VM {name}')
        self.daemon.wait_idle(name=name)

    def assertPulled(self, name, disk=None):
        self.assertSame(nbdpull.pull(self.daemon.uri(f'{name}/{disk or "d" + name}')), self.data[name], name)

    def refusal(self, export):
        """The daemon's words."""
        before = len(self.text())
        h = nbd.NBD()
        h.set_opt_mode(True)
        h.connect_uri(self.daemon.uri(''))
        h.set_export_name(export)
        with self.assertRaises(nbd.Error):
            h.opt_go()
        h.opt_abort()
        return self.text()[before:]

    def assertLeft(self, names='abc'):
        for name in names:
            self.assertNothingLeft(self.vms[name], self.daemon, self.before[name])

    def test_vms_come_and_go(self):
        self.world('a')
        self.assertReload({'a': '', 'b': ''}, new=1)
        self.wait_ready('b')
        self.assertPulled('b')
        self.assertPulled('a')
        self.daemon.wait_idle(name='a')
        self.assertReload({'b': ''}, gone=1)
        self.wait_served('b')
        self.assertIn('there is no export "a/da"', self.refusal('a/da'))
        with self.assertRaisesRegex(QmpError, '"a"'):
            self.daemon.ask('query-disks', {'vm': 'a'})
        self.assertReload({'c': ''}, new=1, gone=1)
        self.wait_served('c')
        self.wait_ready('c')
        self.assertPulled('c')
        self.daemon.wait_idle(name='c')
        self.assertReload({}, gone=1)
        self.wait_served()
        self.assertReload({'b': '', 'a': '', 'c': ''}, new=3)
        self.wait_served('b', 'a', 'c')
        for name in 'abc':
            self.wait_ready(name)
            self.assertPulled(name)
            self.daemon.wait_idle(name=name)
        self.assertReload({'a': '', 'b': '', 'c': ''})
        self.assertLeft()
        self.daemon.stop()

    def test_a_vm_that_is_gone_stays_while_its_session_stands(self):
        self.world('a', 'b')
        h = nbdpull.connect(self.daemon.uri('a/da'))
        frozen = bytes(self.data['a'])
        self.write('a', 0, MIB, 9)
        self.assertReload({'b': ''}, gone=1)
        self.assertReload({'b': ''})
        self.assertIn('VM a: is not served any more, as soon as nobody uses it', self.text())
        self.assertSame(nbdpull.read_all(h), frozen, 'the session')
        more = nbdpull.connect(self.daemon.uri('a/da'))  # as nbdcopy opens one connection after the other
        self.assertSame(nbdpull.read_all(more), frozen, 'a connection that has joined it')
        more.shutdown()
        self.assertEqual(self.served(), ['a', 'b'])
        h.shutdown()
        self.wait_served('b')
        self.assertIn('there is no export "a/da"', self.refusal('a/da'))
        self.assertLeft('ab')
        self.daemon.stop()

    def test_a_vm_is_configured_anew_when_its_session_has_ended(self):
        self.world('a', 'b')
        h = nbdpull.connect(self.daemon.uri('a/da@one'))
        self.assertReload({'a': 'disk.root = node-da', 'b': ''}, changed=1)
        self.assertReload({'a': 'disk.system = node-da', 'b': ''}, changed=1)  # thought better of it
        self.assertReload({'a': 'disk.system = node-da', 'b': ''})
        self.assertSame(nbdpull.read_all(h), self.data['a'], 'the session')
        self.assertEqual(self.disks('a'), ['da'])
        h.shutdown()
        harness.wait_until(lambda: self.text().count('VM a: connected to QEMU') == 2, 20, 'the new VM')
        self.wait_served('a', 'b')
        self.wait_ready('a')
        self.assertEqual(self.disks('a'), ['system'])
        # Its checkpoints are those of before.
        self.write('a', MIB, MIB, 7)
        context = nbdpull.dirty_context('one')
        h = nbdpull.connect(self.daemon.uri('a/system'), [context])
        self.assertEqual(nbdpull.ranges_with(nbdpull.read_map(h, context)), [(MIB, MIB)])
        h.shutdown()
        self.wait_ready('a')
        self.daemon.stop()

    def test_who_thinks_better_of_it_in_time_keeps_the_vm(self):
        self.world('a')
        h = nbdpull.connect(self.daemon.uri('a/da'))
        self.assertReload({}, gone=1)
        self.assertReload({'a': ''})
        self.assertIn('VM a: stays as it is', self.text())
        self.assertReload({'a': 'disk.root = node-da'}, changed=1)
        self.assertReload({'a': ''})
        h.shutdown()
        self.wait_ready('a')
        self.assertPulled('a')
        self.wait_ready('a')
        self.assertEqual(self.text().count('connected to QEMU'), 1)
        self.assertLeft('a')
        self.daemon.stop()

    def test_a_session_that_would_begin_after_it_is_refused_in_words(self):
        """A new wish of the same client ends the session that lingers, and would begin the next one."""
        self.world('a', linger=60)
        h = nbdpull.connect(self.daemon.uri('a/da@one'))
        self.assertReload({}, gone=1)
        self.assertIn("VM 'a' is in session", self.refusal('a/da@two'))
        h.shutdown()
        self.assertIn("VM 'a' is not served any more (SIGHUP)", self.refusal('a/da@two'))
        self.wait_served()
        self.assertNotIn('starts for', self.text().split('gone; ', 1)[1])
        self.daemon.stop()

    def test_who_asks_without_end_keeps_no_vm(self):
        """Eight clients, and a QEMU that takes its time: there is always one that waits."""
        self.world('a')
        self.vms['a'] = proxy = QmpProxy(self.folder, self.vms['a'])
        self.addCleanup(proxy.close)
        self.assertReload({'a': ''}, changed=1)
        harness.wait_until(lambda: self.text().count('VM a: connected to QEMU') == 2, 20, 'the new VM')
        self.wait_ready('a')
        proxy.at_each(lambda command: time.sleep(0.05))
        stop, words = threading.Event(), set()

        def ask():
            while not stop.is_set():
                try:
                    self.daemon.ask('query-disks', {'vm': 'a'})
                except QmpError as e:
                    words.add(str(e))
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        try:
            time.sleep(0.5)
            self.assertReload({}, gone=1)
            self.wait_served()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        self.assertIn("VM 'a' is not served any more (SIGHUP)", ' '.join(words))
        self.daemon.stop()

    def test_a_lease_keeps_its_vm(self):
        self.world('a')
        uri = self.daemon.qpull('begin', 'a').stdout.split()[-1]
        session = self.daemon.ask('query-sessions')[0]['id']
        self.assertReload({}, gone=1)
        self.assertSame(nbdpull.pull(uri), self.data['a'], 'the lease')
        self.assertEqual(self.served(), ['a'])
        self.daemon.qpull('end', session)
        self.wait_served()
        self.daemon.stop()

    def test_a_vm_that_is_being_stopped_keeps_its_notes(self):
        """It cannot be asked any more, and QEMU takes its time for the last answer."""
        self.world('b')
        goes_on = threading.Event()
        self.vms['a'] = proxy = QmpProxy(self.folder, self.vms['a'])
        self.addCleanup(proxy.close)
        self.addCleanup(goes_on.set)
        proxy.at_each(lambda command: command == 'qmp_capabilities' or goes_on.wait(30))
        self.assertReload({'a': '', 'b': ''}, new=1)
        harness.wait_until(lambda: 'VM a: connected to QEMU' in self.text(), 20, 'the sweep')
        self.assertReload({'b': ''}, gone=1)
        self.assertEqual(self.served(), ['b'])
        with self.assertRaisesRegex(QmpError, '"a" is one of qpulld\'s'):
            self.daemon.ask('checkpoint-rename-vm', {'vm': 'b', 'from': 'a'})
        self.assertReload({'a': '', 'b': ''}, changed=1)
        self.assertReload({'b': ''}, gone=1)
        goes_on.set()
        harness.wait_until(lambda: len(self.daemon.ask('query-status')['vms']) == 1, 20, 'the end of VM a')
        self.daemon.ask('checkpoint-rename-vm', {'vm': 'b', 'from': 'a'})
        self.daemon.stop()

    def test_two_vms_never_write_to_one_scratch_place(self):
        """No configuration has it so; but one VM is still in its session when another one has its place."""
        place = f'scratch = {{"driver": "file", "filename": "{self.folder}/scratch"}}'
        with open(f'{self.folder}/scratch', 'wb') as f:
            f.truncate(SIZE)
        self.world('c')
        self.assertReload({'a': place}, new=1, gone=1)
        self.wait_ready('a')
        h = nbdpull.connect(self.daemon.uri('a/da'))
        self.assertReload({'b': place}, new=1, gone=1)
        self.wait_ready('b')
        self.assertIn("VM 'a', which is to go or was configured anew, still writes to this scratch place",
                      self.refusal('b/db'))
        self.assertSame(nbdpull.read_all(h), self.data['a'], 'the session')
        h.shutdown()
        self.wait_served('b')
        self.assertPulled('b')
        self.wait_ready('b')
        self.assertLeft('ab')
        self.daemon.stop()

    def test_who_waits_for_a_commit_learns_its_end(self):
        """As qpull commit does: it asks four times a second. The VM is to go before the commit ends."""
        self.world('a')
        self.vms['a'].look('blockdev-snapshot-sync', {'node-name': 'node-da', 'snapshot-file': f'{self.folder}/top.qcow2',
                                                     'snapshot-node-name': 'top', 'format': 'qcow2'})
        job = self.daemon.ask('block-commit', {'vm': 'a', 'disk': 'da', 'active': True})['id']
        self.assertReload({}, gone=1)
        status = None
        while status != 'concluded':
            time.sleep(0.25)
            status = {j['id']: j['status'] for j in self.daemon.ask('query-jobs')}[job]
        self.wait_served()
        self.daemon.stop()

    def test_what_is_wrong_changes_nothing(self):
        self.world('a', 'b')
        self.assertIn(f'nothing was changed: {self.folder}/qpulld.conf:3: ', self.reload({'a': 'colour = blue'}))
        self.assertRegex(self.reload({'a': 'quiesce = require'}), r'nothing was changed: .*quiesce=require needs its guest agent')
        self.assertEqual(self.served(), ['a', 'b'])
        self.assertPulled('a')
        self.daemon.wait_idle(name='a')
        self.assertLeft('ab')
        self.daemon.stop()

    def test_a_vm_that_another_daemon_has_is_left_out(self):
        self.world('a')
        other = harness.Qpulld(self.folder, {'b': self.vms['b']}, name='other', state=self.daemon.state, start=False)
        self.things.append(other)
        other.start()
        self.assertReload({'a': '', 'b': '', 'c': ''}, new=1)
        self.assertIn('it is not served: mend it and send SIGHUP again', self.text())
        self.wait_served('a', 'c')
        other.process.terminate()
        self.assertEqual(other.process.wait(60), 0)
        self.assertReload({'a': '', 'b': '', 'c': ''}, new=1)
        self.wait_served('a', 'c', 'b')
        self.wait_ready('b')
        self.assertPulled('b')
        self.daemon.wait_idle(name='b')
        self.daemon.stop()

    def test_the_daemon_ends_while_a_vm_leaves(self):
        self.world('a', 'b', 'c')
        h = nbdpull.connect(self.daemon.uri('a/da'))
        self.assertReload({'a': 'disk.root = node-da', 'b': 'disk.root = node-db'}, changed=2, gone=1)
        self.daemon.process.terminate()
        self.assertEqual(self.daemon.process.wait(60), 0)
        self.daemon.check_log()
        nbdpull.drop(h)
        self.assertLeft()

    def test_a_sandbox_has_room_for_what_was_there_at_the_start(self):
        self.world('a', flags=['--sandbox=auto'])
        path = f'{self.folder}/off.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, '1M'])
        self.assertRegex(self.reload({'a': f'image.off = {path}'}), 'nothing was changed: a VM has images now.*restart')
        self.assertRegex(self.reload({'a': f'qga = {self.folder}/qga'}), 'nothing was changed: a VM has a guest agent now')
        self.assertReload({'a': '', 'b': ''}, new=1)
        self.wait_ready('b')
        self.assertPulled('b')

    def test_whatever_comes_and_goes_what_is_read_is_right(self):
        """Random configurations, one after the other, under clients that never rest."""
        self.world('a', 'b', 'c')
        stop, pulled, wrong = threading.Event(), dict.fromkeys('abc', 0), []

        def read(name):
            while not stop.is_set():
                try:
                    h = nbdpull.connect(self.daemon.uri(f'{name}/{rng.choice(["d" + name, "root"])}'))
                except nbd.Error:
                    continue  # it is not there, or not by this name
                try:
                    if nbdpull.read_all(h) != self.data[name]:
                        wrong.append(name)
                except nbd.Error as e:
                    wrong.append(f'{name}: {e}')
                h.shutdown()
                pulled[name] += 1

        def ask():
            while not stop.is_set():
                try:
                    h = nbdpull.connect(self.daemon.uri(''))  # the only disk there is, if there is one
                    if nbdpull.read_all(h) not in self.data.values():
                        wrong.append('the only one')
                    h.shutdown()
                except nbd.Error:
                    pass
                for command in ('query-vms', 'query-sessions', 'query-status', 'doctor'):
                    self.daemon.ask(command)
        threads = [threading.Thread(target=read, args=(name,)) for name in 'aabbcc'] + [threading.Thread(target=ask)]
        for thread in threads:
            thread.start()
        for _ in range(40):
            names = rng.sample('abc', rng.randrange(4))
            self.assertNotIn('nothing was changed',
                             self.reload({name: rng.choice(['', f'disk.root = node-d{name}']) for name in names}))
            time.sleep(rng.random() / 4)
        self.reload({name: '' for name in 'abc'})
        harness.wait_until(lambda: all(pulled.values()), 60, 'pulls of all VMs')
        stop.set()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])
        for name in 'abc':
            harness.wait_until(lambda name=name: self.disks(name) == [f'd{name}'], 20, f'VM {name} as it was said last')
            self.assertPulled(name)
            self.daemon.wait_idle(name=name)
        self.assertLeft()
        self.daemon.stop()


if __name__ == '__main__':
    harness.main()
