#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sessions that are begun and ended on the control socket: they stand without a client, and who ends them decides."""
import json
import os
import re
import subprocess
import unittest

import harness
import nbd
import nbdpull
from harness import MIB, Disk
from qmpclient import Qmp, QmpError

NOBODY = 65534


class Begin(harness.Case):
    def world(self, flags=(), **options):
        self.vm = self.bare(Disk('vda', 8 * MIB), Disk('vdb', 4 * MIB))
        for disk in self.vm.disks:
            self.vm.write(disk, 0, MIB, 7)
        self.before = self.vm.state()
        options.setdefault('linger', 0)
        self.daemon = self.qpulld(self.vm, flags=flags, **options)
        self.daemon.wait_idle()
        return self.daemon

    def begin(self, *words):
        return self.daemon.json('begin', 'vm', *words)

    def read_in_time(self, begin, export):
        """(what begin(n) has begun, a client in it), which another try is needed for if its time was up before."""
        for n in range(4):
            begun = begin(n)
            h = nbdpull.connect(self.daemon.uri(export.format(n)))
            found = self.session()  # once: it may end between two questions
            if found and found['id'] == begun['session'] and found['begun']:
                return begun, h
            h.shutdown()
            self.daemon.wait_idle()
        self.fail('its time is always up before a client can come')

    def session(self):
        found = self.daemon.ask('query-sessions')
        return found[0] if found else None

    def checkpoints(self):
        return sorted((c['name'], c['disk']) for c in self.daemon.ask('query-checkpoints', {'vm': 'vm'}))

    def test_its_uris_read_one_instant_without_a_client_in_between_and_end_leaves_nothing(self):
        daemon = self.world()
        done = daemon.qpull('begin', 'vm')
        uris = done.stdout.split()
        self.assertEqual(uris, [daemon.uri('vm/vda'), daemon.uri('vm/vdb')])
        session = re.match(r'session ([0-9a-f]{8}) of VM vm; until `qpull end \1`, or 3600 s without a client$',
                           done.stderr.strip()).group(1)
        frozen = bytes(self.vm.disks['vda'].model.image)
        for round_ in range(2):  # linger is 0: a session of a client would be gone in between
            self.vm.write('vda', 0, MIB, 8 + round_)
            out = f'{self.folder}/{round_}.raw'
            harness.run(['nbdcopy', uris[0], out])
            with open(out, 'rb') as f:
                self.assertSame(f.read(), frozen, 'what nbdcopy has read')
        self.assertEqual(self.session()['id'], session)
        self.assertEqual(self.session()['begun']['tickets'], 0)
        self.assertEqual(daemon.qpull('end', session).stdout, '')
        self.assertIsNone(self.session())
        self.assertNothingLeft(self.vm, daemon, self.before)
        again = daemon.qpull('end', session, check=False)
        self.assertEqual(again.returncode, 1)
        self.assertRegex(again.stderr, f'There is no session "{session}" here')

    def test_commit_keeps_the_checkpoint_on_its_disks_rollback_on_none_and_neither_where_a_pull_ended_well(self):
        daemon = self.world()
        for name, words, pulled, kept in (
                ('all', ['--commit'], [], [('all', 'vda'), ('all', 'vdb')]),
                ('none', ['--rollback'], ['vda'], []),
                ('well', [], ['vdb'], [('well', 'vdb')])):
            with self.subTest(name):
                begun = self.begin('--checkpoint', name)
                for disk in pulled:
                    nbdpull.pull(daemon.uri(f'vm/{disk}@{name}'))
                done = daemon.qpull('end', begun['session'], *words)
                self.assertEqual([c for c in self.checkpoints() if c[0] == name], kept)
                self.assertEqual(done.stdout.count('is kept on'), len(kept))
        one = self.begin('--checkpoint', 'one', '--disk', 'vda')
        self.assertEqual([d['disk'] for d in one['disks']], ['vda'])
        ended = daemon.json('end', one['session'], '--commit')
        self.assertEqual((ended['kept'], ended['dropped'], ended['problems']), (['vda'], [], None))
        self.assertEqual([c for c in self.checkpoints() if c[0] == 'one'], [('one', 'vda')])

    def test_a_checkpoint_that_was_committed_can_carry_an_increment(self):
        daemon = self.world()
        first = self.begin('--checkpoint', 'one')
        base = nbdpull.pull(daemon.uri('vm/vda@one'))
        self.vm.write('vda', 2 * MIB, MIB, 9)
        daemon.qpull('end', first['session'], '--commit')
        second = self.begin('--checkpoint', 'two')
        wanted = bytes(self.vm.disks['vda'].model.image)
        self.vm.write('vda', 5 * MIB, MIB, 10)  # after the freeze: the map must not have it
        data, extents = nbdpull.pull_changes(daemon.uri('vm/vda@two'), 'one', base)
        self.assertSame(data, wanted)
        self.assertEqual(nbdpull.ranges_with(extents), [(2 * MIB, MIB)], 'exact, although it is asked for late')
        daemon.qpull('end', second['session'], '--commit')

    def test_a_client_that_still_reads_is_told_when_the_session_is_ended(self):
        daemon = self.world()
        begun = self.begin()
        h = nbdpull.connect(daemon.uri('vm/vda'))
        self.assertEqual(h.pread(512, 0), b'\7' * 512)
        daemon.qpull('end', begun['session'])
        with self.assertRaises(nbd.Error):
            h.pread(512, 0)
        self.assertIn(f'session {begun["session"]} was ended over the control socket', daemon.log())
        daemon.wait_idle()
        self.assertNothingLeft(self.vm, daemon, self.before)

    def test_nobody_who_reads_it_for_too_long_ends_it_and_keep_forbids_that(self):
        daemon = self.world(flags=['--begin-timeout=1'])
        self.begin('--checkpoint', 'lost')
        daemon.wait_idle()
        self.assertRegex(daemon.vm()['last-session']['failure'], 'for --begin-timeout: 1 seconds')
        self.assertEqual(daemon.vm()['last-session']['reason'], 'timeout')
        self.assertEqual(self.checkpoints(), [])
        kept = self.begin('--keep')
        self.assertIsNone(kept['begin-timeout'])
        self.assertIsNone(self.session()['begun']['idle-left'])
        daemon.qpull('end', kept['session'])
        # one that is being read does not count as idle
        busy, h = self.read_in_time(lambda _: self.begin(), 'vm/vda')
        self.assertIsNone(self.session()['begun']['idle-left'])
        h.shutdown()
        daemon.wait_idle()
        self.assertEqual(daemon.vm()['last-session']['id'], busy['session'])
        self.assertNothingLeft(self.vm, daemon, self.before)

    def test_its_ttl_ends_it_whoever_reads(self):
        daemon = self.world()
        _, h = self.read_in_time(lambda n: self.begin('--ttl', f'{4 ** n}s', '--keep', '--checkpoint', f'late{n}'),
                                 'vm/vda@late{}')
        daemon.wait_idle(100)
        with self.assertRaises(nbd.Error):
            h.pread(512, 0)
        self.assertRegex(daemon.vm()['last-session']['failure'], r'begun with a --ttl of \d+ seconds')
        self.assertEqual(self.checkpoints(), [])

    def test_what_cannot_be_begun_or_ended_is_said_in_words(self):
        daemon = self.world()
        for words, sentence in (
                (('begin', 'xyz'), 'There is no VM "xyz" here'),
                (('begin', 'vm', '--disk', 'vdz'), "VM 'vm' has no disk 'vdz'"),
                (('begin', 'vm', '--checkpoint', 'a/b'), "a checkpoint's name has no '/'"),
                (('begin', 'vm', '--rate', '1K'), 'is less than 64K'),
                (('end', '00000000'), 'There is no session "00000000" here')):
            done = daemon.qpull(*words, check=False)
            self.assertEqual(done.returncode, 1, words)
            self.assertIn(sentence, done.stderr)
        for words in (('begin', 'vm', '--ttl', '2w'), ('begin', 'vm', '--ttl', '0'), ('begin', 'vm', '--rate', 'x'),
                      ('end', 'x', '--commit', '--rollback'), ('begin',), ('end',)):
            self.assertEqual(daemon.qpull(*words, check=False).returncode, 2, words)
        begun = self.begin()
        self.assertRegex(daemon.qpull('begin', 'vm', check=False).stderr, f'is in session {begun["session"]}')
        self.assertRegex(daemon.qpull('end', begun['session'], '--commit', check=False).stderr,
                         'begun without a checkpoint: there is nothing to keep')
        for arguments in ({'ttl': -1}, {'ttl': 1 << 40}, {'rate': 0}, {'ttl': 'soon'}, {'nonsense': 1}):
            with self.assertRaises(QmpError):
                daemon.ask('session-begin', {'vm': 'vm', **arguments})
        with self.assertRaises(QmpError):
            daemon.ask('session-end', {'session': begun['session'], 'checkpoint': 'perhaps'})
        daemon.qpull('end', begun['session'], '--rollback')
        self.assertNothingLeft(self.vm, daemon, self.before)

    def test_where_no_listener_would_know_who_begins_nothing_is_frozen(self):
        daemon = self.world()
        daemon.stop()
        daemon.flags = [f for f in daemon.flags if not f.startswith('--listen=')] + ['--listen=tcp:127.0.0.1:0']
        daemon.start()
        daemon.wait_idle()
        done = daemon.qpull('begin', 'vm', check=False)
        self.assertEqual((done.returncode, done.stdout), (1, ''))
        self.assertRegex(done.stderr, r'no unix socket, where it would know uid:\d+.*begin with --ticket')
        self.assertNothingLeft(self.vm, daemon, self.before)
        daemon.qpull('begin', 'vm', '--ticket')

    def test_who_leaves_before_it_is_up_or_a_daemon_that_ends_leaves_nothing(self):
        daemon = self.world()
        for _ in range(5):
            control = Qmp(daemon.control)
            control.sock.sendall(json.dumps({'execute': 'session-begin', 'arguments': {'vm': 'vm'}}).encode())
            control.close()
        daemon.wait_idle()
        self.assertNothingLeft(self.vm, daemon, self.before)
        self.begin('--checkpoint', 'x')
        daemon.stop()
        self.assertEqual(self.vm.state(), self.before)
        daemon.start()
        daemon.wait_idle()
        self.assertEqual(self.checkpoints(), [])
        self.begin('--checkpoint', 'x')
        daemon.kill()
        daemon.start()
        daemon.wait_idle()
        self.assertNothingLeft(self.vm, daemon, self.before)

    @unittest.skipIf(os.geteuid(), 'only root can be another user')
    def test_who_may_pull_may_begin_and_end_his_own_and_not_those_of_others(self):
        daemon = self.world(flags=['--allow=user:nobody=vm/list+pull'])
        os.chmod(self.folder, 0o711)
        qpull = [f'{os.path.dirname(daemon.program)}/qpull', '--control', daemon.control]

        def nobody(*words):
            return subprocess.run([*qpull, *words], user=NOBODY, group=NOBODY, extra_groups=[], text=True, timeout=60,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        self.assertRegex(nobody('begin', 'vm', '--checkpoint', 'x').stderr, 'may not make checkpoints')
        self.assertRegex(nobody('begin', 'vm', '--ticket').stderr, 'need the right "control"')
        own = json.loads(nobody('begin', 'vm', '--json').stdout)
        self.assertEqual(self.session()['identity'], f'uid:{NOBODY}')
        with self.assertRaises(nbd.Error):  # root is another client
            nbdpull.connect(daemon.uri('vm/vda'))
        self.assertEqual(nobody('end', own['session']).returncode, 0)
        roots = self.begin()
        self.assertRegex(nobody('end', roots['session']).stderr, 'There is no session')
        daemon.qpull('end', roots['session'])


if __name__ == '__main__':
    harness.main()
