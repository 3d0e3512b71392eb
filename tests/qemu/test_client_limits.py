#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one client may have at once, and how fast a session is read: --max-…-per-client and --rate."""
import subprocess
import time

import harness
import nbd
import nbdpull
import rawnbd
from harness import MIB, Disk


class Limits(harness.Case):
    def world(self, *flags, nvms=1, size=8 * MIB):
        self.vms = {f'vm{i}': self.bare(Disk(f'vd{i}', size), name=f'vm{i}') for i in range(nvms)}
        for i, vm in enumerate(self.vms.values()):
            for at in range(0, size, MIB):
                vm.write(f'vd{i}', at, MIB, 1 + at // MIB)
        daemon = self.qpulld(self.vms, linger=0, flags=flags, tcp=True)
        for name in self.vms:
            daemon.wait_idle(name=name)
        return daemon

    def test_one_client_may_have_so_many_connections_and_another_one_is_not_held_up(self):
        daemon = self.world('--max-connections-per-client=3')
        several = [nbdpull.connect(daemon.uri('vm0/vd0')) for _ in range(3)]
        raw = rawnbd.Raw(daemon.socket)  # libnbd keeps the server's sentences to itself
        with self.assertRaisesRegex(rawnbd.Refused, r'uid:\d+ has 3 connections already.*--max-connections-per-client'):
            raw.go('vm0/vd0')
        raw.wait_hangup(30)
        self.assertRegex(daemon.log(), r'is refused: uid:\d+ has 3 connections already \(--max-connections-per-client\)')
        counts = daemon.ask('query-status')['connection-counts']
        self.assertEqual((counts['refused'], counts['limit-per-client']), (1, 3))
        several.pop().shutdown()
        harness.wait_until(lambda: daemon.ask('query-status')['connection-counts']['now'] == 2, 10, 'a free place')
        several.append(nbdpull.connect(daemon.uri('vm0/vd0')))
        for h in several:
            h.shutdown()

    def test_an_address_has_its_own_count(self):
        daemon = self.world('--max-connections-per-client=1', nvms=2)
        local = nbdpull.connect(daemon.uri('vm0/vd0'))
        remote = nbdpull.connect(daemon.tcp_uri('vm1/vd1'))
        for uri in (daemon.uri('vm0/vd0'), daemon.tcp_uri('vm1/vd1')):
            with self.assertRaises(nbd.Error):
                nbdpull.connect(uri)
        local.shutdown()
        remote.shutdown()

    def test_one_client_may_have_so_many_sessions_however_they_begin(self):
        daemon = self.world('--max-sessions-per-client=2', nvms=3)
        begun = daemon.json('begin', 'vm0')
        h = nbdpull.connect(daemon.uri('vm1/vd1'))
        done = daemon.qpull('begin', 'vm2', check=False)
        self.assertRegex(done.stderr, r'uid:\d+ has 2 sessions already.*--max-sessions-per-client')
        with self.assertRaises(nbd.Error):
            nbdpull.connect(daemon.uri('vm2/vd2'))
        self.assertRegex(daemon.log(), r'c\d+ refused: uid:\d+ has 2 sessions already')
        more = nbdpull.connect(daemon.uri('vm1/vd1'))  # to join is no new one
        remote = nbdpull.connect(daemon.tcp_uri('vm2/vd2'))  # another identity
        remote.shutdown()
        daemon.wait_idle(name='vm2')
        daemon.qpull('end', begun['session'])
        nbdpull.connect(daemon.uri('vm2/vd2')).shutdown()
        for one in (h, more):
            one.shutdown()

    def test_a_session_is_read_no_faster_than_its_rate_by_all_its_connections_and_rightly(self):
        rate = 4 * MIB
        daemon = self.world(f'--rate={rate}')
        wanted, out = bytes(self.vms['vm0'].disks['vd0'].model.image), f'{self.folder}/out.raw'
        begun = daemon.json('begin', 'vm0')
        self.assertEqual(daemon.ask('query-sessions')[0]['rate'], rate)
        before = time.monotonic()
        harness.run(['nbdcopy', '--connections=4', '--requests=16', '--request-size=262144', begun['disks'][0]['uris'][0],
                     out])
        # the first piece goes at once, and 100 ms of it may be there
        self.assertGreater(time.monotonic() - before, (8 * MIB - 2 * MIB) / rate)
        with open(out, 'rb') as f:
            self.assertSame(f.read(), wanted)
        daemon.qpull('end', begun['session'])
        self.assertRegex(daemon.qpull('begin', 'vm0', '--rate', '5M', check=False).stderr, 'no session more than')
        slower = daemon.json('begin', 'vm0', '--rate', '2M')
        self.assertEqual(daemon.ask('query-sessions')[0]['rate'], 2 * MIB)
        self.assertRegex(daemon.qpull('status').stdout, rf'(?m)^{slower["session"]} +vm0 +UP, begun .* 2 MiB/s$')
        handles = [nbdpull.connect(daemon.uri('vm0/vd0')) for _ in range(2)]
        self.assertEqual({c['rate'] for c in daemon.ask('query-status')['connections']}, {2 * MIB})
        before = time.monotonic()
        for h in handles:
            self.assertSame(bytes(h.pread(2 * MIB, MIB)), wanted[MIB:3 * MIB])
        self.assertGreater(time.monotonic() - before, (4 * MIB - MIB) / (2 * MIB))
        for h in handles:
            h.shutdown()
        daemon.qpull('end', slower['session'])

    def test_a_rate_or_a_limit_that_makes_no_sense_is_refused_at_the_start(self):
        daemon = self.world()
        for flag, sentence in (('--rate=1K', 'less than 64K a second'), ('--rate=x', 'is not a size'),
                               ('--max-sessions-per-client=0', 'not a number from 1'),
                               ('--max-connections-per-client=0', 'not a number from 1')):
            done = subprocess.run([daemon.program, *daemon.flags, flag], timeout=60, text=True, check=False,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn(sentence, done.stdout)


if __name__ == '__main__':
    harness.main()
