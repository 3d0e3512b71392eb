#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who takes part in which session, how long it lasts, and that nothing is left of it."""
import re
import signal
import threading
import time

import harness
import nbd
import nbdpull
import rawnbd
from harness import MIB, Disk
from qmpproxy import QmpProxy


def lines(log, pattern):
    return re.findall(pattern, log, re.MULTILINE)


class Sessions(harness.Case):
    def written(self, daemon):
        with open(daemon.log_path) as f:
            return f.read()

    def test_eight_connections_of_two_clients_see_one_instant_of_both_disks(self):
        disks = (Disk('vda', 48 * MIB + 3 * 512), Disk('vdb', 32 * MIB, fmt='raw'))
        guest = self.guest(*disks)
        daemon = self.qpulld(guest, linger=3)
        before = guest.state()
        models = {d.name: d.model.copy() for d in disks}
        loads = {d.name: guest.load(d.name, pause_us=500) for d in disks}
        harness.wait_until(lambda: all(load.status()['ops'] > 100 for load in loads.values()), 60, 'a busy guest')
        files = {d.name: f'{self.folder}/{d.name}.copy' for d in disks}
        knobs = ('--connections=4', '--threads=4', '--requests=16')
        copies = [harness.spawn(['nbdcopy', *knobs, daemon.uri(f'vm/{name}'), path]) for name, path in files.items()]
        for copy in copies:
            self.assertEqual(copy.wait(120), 0)
        # Within linger: the same session, the same bytes, whatever the guest did meanwhile.
        for name, path in files.items():
            with open(path, 'rb') as f:
                copied = bytearray(f.read())
            self.assertSame(nbdpull.pull(daemon.uri(f'vm/{name}')), copied, f'{name}, read again')
            n, least = models[name].find_cut(copied, loads[name].plan, 0, loads[name].status()['ops'] + 10)
            self.assertIsNotNone(n, f'{name}: no instant of the load; at least {least} sectors differ')
        text = self.written(daemon)
        self.assertEqual(len(set(lines(text, r'open: vm/\w+ for \S+, session (\w+)'))), 1)
        self.assertEqual(len(lines(text, r'open: vm/vda for')), 4 + 1)
        self.assertEqual(len(lines(text, r'open: vm/vdb for')), 4 + 1)
        daemon.wait_idle()
        for load in loads.values():
            self.assertEqual(load.stop()['errors'], 0)
        self.assertNothingLeft(guest, daemon, before)
        guest.check()
        daemon.stop()
        self.assertEqual(guest.state(), before)

    def test_asking_about_an_export_freezes_nothing(self):
        guest = self.bare(Disk('vda', 16 * MIB), Disk('vdb', 16 * MIB))
        guest.look('block-dirty-bitmap-add', {'node': 'node-vda', 'name': 'old', 'persistent': True})
        daemon = self.qpulld(guest, linger=0)
        before = guest.state()
        h = nbd.NBD()
        h.set_opt_mode(True)
        h.set_full_info(True)
        h.connect_uri(daemon.uri('vm/vda@new'))
        found, contexts = [], []
        h.opt_list(lambda name, description: found.append(name) or 0)
        self.assertEqual(found, ['vm/vda', 'vm/vdb'])
        h.opt_info()
        self.assertEqual(h.get_size(), 16 * MIB)
        h.add_meta_context('qemu:')
        h.opt_list_meta_context(lambda name: contexts.append(name) or 0)
        self.assertEqual(sorted(contexts), ['qemu:allocation-depth', 'qemu:dirty-bitmap:old'])
        self.assertEqual(daemon.ask('query-sessions'), [])
        self.assertEqual(guest.state(), before)
        h.opt_abort()
        harness.run(['nbdinfo', '--list', daemon.uri('')])
        daemon.wait_idle()
        self.assertIsNone(daemon.vm()['last-session'])
        self.assertEqual(guest.state(), before)

    def test_qemu_is_asked_once_for_a_client_that_opens_and_anew_for_whoever_comes_after_a_change(self):
        guest = self.bare(Disk('vda', 16 * MIB))
        proxy = QmpProxy(self.folder, guest)
        self.addCleanup(proxy.close)
        daemon = self.qpulld(proxy, linger=0)
        commands = []
        nbdpull.drop(nbdpull.connect(daemon.uri('vm/vda'), [nbdpull.ALLOCATION]))  # the self-test, and what comes once
        daemon.wait_idle()
        proxy.at_each(commands.append)

        def is_asked_once():
            commands.clear()
            h = nbdpull.connect(daemon.uri('vm/vda'), [nbdpull.ALLOCATION])
            self.assertEqual(h.pread(512, 0), bytes(512))
            questions = commands[:commands.index('add-fd')].count('query-block-jobs')
            nbdpull.drop(h)
            daemon.wait_idle()
            return questions == 1
        # An answer is good for VM_RECENT_MS, and a busy machine may need longer from a client's maps to its GO.
        harness.wait_until(is_asked_once, 20, 'a client for whom QEMU is asked once')
        proxy.at_each(None)

        # Nothing tells of a bitmap that somebody makes: only the question does.
        for n in range(20):
            context = f'qemu:dirty-bitmap:new{n}'
            self.assertEqual(nbdpull.list_contexts(daemon.uri('vm/vda'), [context]), [])
            guest.look('block-dirty-bitmap-add', {'node': 'node-vda', 'name': f'new{n}', 'persistent': True})
            self.assertEqual(nbdpull.list_contexts(daemon.uri('vm/vda'), [context]), [context], 'asked before it was there')

        # Nor is one that stays told of old times.
        h, found = nbd.NBD(), []
        h.set_opt_mode(True)
        h.connect_uri(daemon.uri('vm/vda'))
        h.add_meta_context('qemu:dirty-bitmap:late')
        h.opt_list_meta_context(lambda name: found.append(name) or 0)
        self.assertEqual(found, [])
        guest.look('block-dirty-bitmap-add', {'node': 'node-vda', 'name': 'late', 'persistent': True})
        time.sleep(0.1)  # twice VM_RECENT_MS
        h.opt_list_meta_context(lambda name: found.append(name) or 0)
        self.assertEqual(found, ['qemu:dirty-bitmap:late'])
        h.opt_abort()

    def test_a_client_that_comes_back_within_linger_goes_on_with_the_same_frozen_data(self):
        guest = self.bare()
        guest.write('vda', 0, MIB, 1)
        before = guest.state()
        daemon = self.qpulld(guest, linger=2)
        h = nbdpull.connect(daemon.uri('vm/vda@c'))
        session = daemon.vm()['session']
        half = bytes(h.pread(MIB // 2, 0))
        guest.write('vda', 0, MIB, 2)
        nbdpull.drop(h)  # the network went away: no goodbye
        time.sleep(1)
        h = nbdpull.connect(daemon.uri('vm/vda@c'))
        self.assertEqual(daemon.vm()['session'], session)
        self.assertEqual(half + bytes(h.pread(MIB // 2, MIB // 2)), b'\1' * MIB)
        time.sleep(2.5)  # longer than linger: nothing ends while somebody is there
        self.assertEqual(bytes(h.pread(MIB, 0)), b'\1' * MIB)
        h.shutdown()
        daemon.wait_idle()
        # It said goodbye in the end, so it has the data, and the checkpoint stands.
        self.assertEqual([c['name'] for c in daemon.ask('query-checkpoints', {'vm': 'vm'})], ['c'])
        guest.look('block-dirty-bitmap-remove', {'node': 'node-vda', 'name': 'c'})
        self.assertNothingLeft(guest, daemon, before)
        self.assertSame(nbdpull.pull(daemon.uri('vm/vda'))[:MIB], b'\2' * MIB, 'a later session')

    def test_a_client_that_comes_back_while_qemu_stands_still_keeps_its_session(self):
        guest = self.bare()
        guest.write('vda', 0, MIB, 1)
        daemon = self.qpulld(guest, linger=1)
        h = nbdpull.connect(daemon.uri('vm/vda'))
        session = daemon.vm()['session']
        guest.write('vda', 0, MIB, 2)
        nbdpull.drop(h)
        guest.process.send_signal(signal.SIGSTOP)
        back = rawnbd.Raw(daemon.socket)
        go_on = threading.Timer(3, guest.process.send_signal, [signal.SIGCONT])  # long after the linger
        go_on.start()
        try:
            back.go('vm/vda')
        finally:
            go_on.join()
        self.assertEqual(daemon.vm()['session'], session)
        self.assertEqual(back.read(0, MIB), (0, b'\1' * MIB))
        back.disc()
        daemon.wait_idle()

    def test_a_lingering_session_makes_way_at_once_for_another_wish_of_its_client(self):
        guest = self.bare()
        daemon = self.qpulld(guest, linger=600)
        nbdpull.pull(daemon.uri('vm/vda@one'))
        first = daemon.vm()['session']
        self.assertIsNotNone(first)
        guest.write('vda', 0, MIB, 9)
        began = time.monotonic()
        data = nbdpull.pull(daemon.uri('vm/vda@two'))
        self.assertLess(time.monotonic() - began, 20)
        self.assertNotEqual(daemon.vm()['session'], first)
        self.assertSame(data[:MIB], b'\x09' * MIB, 'the new session')
        data = nbdpull.pull(daemon.uri('vm/vda'))  # without a name: another wish again
        self.assertEqual([c['name'] for c in daemon.ask('query-checkpoints', {'vm': 'vm'})], ['one', 'two'])
        daemon.stop()

    def test_another_client_is_refused_while_the_first_is_there_and_waits_while_it_lingers(self):
        guest = self.bare()
        daemon = self.qpulld(guest, linger=3, tcp=True)
        tcp = ('127.0.0.1', daemon.tcp_port())
        h = nbdpull.connect(daemon.uri('vm/vda'))
        self.assertRegex(rawnbd.refusal(tcp, 'vm/vda'), f'session {daemon.vm()["session"]}.*try again')
        self.assertRegex(rawnbd.refusal(daemon.socket, 'vm/vda@other'), 'another checkpoint name')
        self.assertEqual(bytes(h.pread(512, 0)), bytes(512))
        guest.write('vda', 0, 512, 7)
        first = daemon.vm()['session']
        h.shutdown()
        began = time.monotonic()
        other = rawnbd.Raw(tcp)
        other.go('vm/vda')
        waited = time.monotonic() - began
        self.assertTrue(2 < waited < 20, f'waited {waited} s for the first client\'s linger of 3 s')
        self.assertEqual(other.read(0, 512), (0, b'\7' * 512))
        session = daemon.ask('query-sessions')[0]
        self.assertEqual(session['identity'], 'ip:127.0.0.1')
        self.assertNotEqual(session['id'], first)
        other.disc()

    def test_a_client_that_leaves_before_the_freeze_stands_leaves_nothing(self):
        guest = self.bare()
        daemon = self.qpulld(guest, linger=600)
        before = guest.state()
        for pause in (0, 0.001, 0.003, 0.01, 0.03):
            raw = rawnbd.Raw(daemon.socket)
            raw.send_option(rawnbd.OPT_GO, rawnbd.string('vm/vda@never') + b'\0\0')
            time.sleep(pause)
            raw.close()
            if pause < 0.03:
                continue
        # It may have come up before the client left, and lingers then; the end of the daemon ends it.
        daemon.stop()
        self.assertNothingLeft(guest, daemon, before)

    def test_the_daemon_tears_down_on_sigterm_under_a_pull(self):
        guest = self.bare(Disk('vda', 64 * MIB))
        guest.write('vda', 0, 64 * MIB, 1)
        before = guest.state()
        daemon = self.qpulld(guest)
        copy = harness.spawn(['nbdcopy', daemon.uri('vm/vda@never'), 'null:'], stderr=-3)
        _stuck = nbdpull.connect(daemon.uri('vm/vda@never'))
        harness.wait_until(lambda: daemon.ask('query-sessions'), 20, 'a session')
        daemon.stop()
        copy.wait(20)
        self.assertEqual(guest.state(), before)
        self.assertEqual(guest.deleted_fds(), [])
        self.assertEqual(daemon.files_left(), [])

    def test_a_paused_guest_can_be_pulled_and_stays_paused(self):
        guest = self.bare()
        before = guest.state()
        guest.look('stop')
        daemon = self.qpulld(guest, linger=0)
        nbdpull.pull(daemon.uri('vm/vda'))
        daemon.wait_idle()
        state = guest.state()
        self.assertEqual(state['status'], 'paused')
        for what in ('nodes', 'devices', 'edges', 'exports', 'jobs'):
            self.assertEqual(state[what], before[what])
        # QEMU 7.2 closes descriptors only while the guest runs.
        guest.look('cont')
        harness.wait_until(lambda: guest.deleted_fds() == [] and guest.look('query-fdsets') == [], 10,
                           'the end of the descriptors')
        self.assertNothingLeft(guest, daemon, before)


if __name__ == '__main__':
    harness.main()
