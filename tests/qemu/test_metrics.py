# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qpull metrics`: what Prometheus can read, what docs/METRICS.md promises, and what has happened."""
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
import nbdpull
import prometheus
import rawnbd
from harness import MIB, Disk

NAME = 'we"ird one'  # a VM's; the quote has to be escaped


def documented():
    """{name: type} of the table."""
    found = {}
    with open(f'{harness.TOP}/docs/METRICS.md', encoding='utf-8') as f:
        for line in f:
            m = re.match(r'\| `(qpull_\w+)` \| (\w+) \|', line)
            if m:
                assert m[1] not in found, m[1]
                found[m[1]] = m[2]
    return found


class Metrics(harness.Case):
    def numbers(self):
        self.types = {}
        return prometheus.parse(self.daemon.qpull('metrics').stdout, self.types)

    def test_every_number_is_documented_well_formed_and_counts_what_happened(self):
        vm = self.bare(Disk('vda', 4 * MIB))
        vm.write('vda', 0, 4 * MIB, 7)
        before = vm.state()
        self.daemon = self.qpulld({NAME: vm}, linger=0)
        self.daemon.wait_idle(name=NAME)
        me = ('vm', NAME)
        first = self.numbers()
        self.assertEqual(self.types, documented())
        for name, *_ in first:
            self.assertTrue(name.startswith('qpull_'), name)
            self.assertNotRegex(name, r'_(ms|milliseconds|kb|mib|percent)(_|$)', 'base units only')
        self.assertEqual(first['qpull_vm_connected', me], 1)
        self.assertEqual(first['qpull_sweeps_total', me], 1)
        self.assertEqual(first['qpull_sessions_started_total', me], 0)

        h = nbdpull.connect(self.daemon.uri(f'{NAME}/vda@good'))
        nbdpull.read_all(h)
        during = self.numbers()
        self.assertEqual(during['qpull_session_connections', me], 1)
        self.assertEqual(during['qpull_connections',], 1)
        self.assertEqual(during['qpull_sessions_up_total', me], 1)
        self.assertEqual(during['qpull_client_bytes_total', me], 4 * MIB)
        self.assertEqual(during['qpull_qemu_bytes_total', me], 4 * MIB)
        self.assertGreater(during['qpull_session_setup_seconds', me], 0)
        self.assertGreater(during['qpull_session_pause_seconds', me], 0)
        self.assertGreaterEqual(during['qpull_session_longest_pause_seconds', me],
                                during['qpull_session_pause_seconds', me])
        self.assertGreater(during['qpull_process_open_fds',], first['qpull_process_open_fds',])
        h.shutdown()
        self.daemon.wait_idle(name=NAME)
        raw = rawnbd.Raw(self.daemon.socket)
        raw.go(f'{NAME}/vda@bad')
        raw.close()  # without a word
        self.daemon.wait_idle(name=NAME)
        last = self.numbers()
        ended = {key[1][1]: n for key, n in last.items() if key[0] == 'qpull_sessions_ended_total'}
        self.assertEqual({k: n for k, n in ended.items() if n}, {'done': 1, 'client': 1})
        self.assertEqual(last['qpull_checkpoints_kept_total', me], 1)
        self.assertEqual(last['qpull_checkpoints_dropped_total', me], 1)
        self.assertEqual(last['qpull_session_connections', me], 0)
        self.assertEqual(last['qpull_session_setups_seconds_count', me], 2)
        self.assertEqual(last['qpull_session_connections_total', me], 2)
        self.assertEqual(last['qpull_connections_total',], 2)
        self.assertEqual(last['qpull_buffer_bytes',], 0)
        for key, n in first.items():
            if self.types.get(key[0]) == 'counter':
                self.assertGreaterEqual(last[key], n, key)
        self.daemon.qpull('checkpoint', 'delete', NAME, 'good')
        self.assertNothingLeft(vm, self.daemon, before)

        # Another daemon finds what this one leaves when it is killed.
        raw = rawnbd.Raw(self.daemon.socket)
        raw.go(f'{NAME}/vda')
        self.daemon.kill()
        raw.close()
        self.daemon.start()
        self.daemon.wait_idle(name=NAME)
        again = self.numbers()
        self.assertEqual(again['qpull_sweep_leftovers_total', me], 1)
        self.assertEqual(again['qpull_sweep_problems_total', me], 0)
        self.daemon.stop()

    def test_a_vm_that_is_not_there_has_numbers_too(self):
        self.daemon = self.qpulld({'gone': f'{self.folder}/no.qmp'})
        numbers = self.numbers()
        self.assertEqual(numbers['qpull_vm_connected', ('vm', 'gone')], 0)
        self.assertEqual(numbers['qpull_sessions_started_total', ('vm', 'gone')], 0)


if __name__ == '__main__':
    harness.main()
