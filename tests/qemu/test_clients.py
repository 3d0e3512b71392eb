# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""Slow, stuck, greedy and hostile clients: they cost bounded memory, others go on, and neither the guest nor QEMU ever
waits for one of them. Nothing here is a measurement: tests/bench/greedy.py is."""
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import clients
import harness
import rawnbd
from harness import MIB

BUDGET = 64 * MIB  # RSS of the daemon at COUNT clients, as docs/decisions/0015-clients.md has it
COUNT = 100
SLOWEST_US = 5_000_000  # a guest's write, on a machine that runs other things, too


def is_sanitized(program):
    with open(program, 'rb') as f:
        return b'__asan_init' in f.read()


class Clients(clients.ClientCase):
    def beside(self, *kinds):
        """A good client, the guest and QEMU beside each kind of bad clients, in one session."""
        self.begin()
        holder = rawnbd.Raw(self.daemon.socket)
        holder.go('vm/vda')
        load = self.vm.load('vda', ('write', 'read', 'flush'), pause_us=2000)
        sanitized = is_sanitized(self.daemon.program)
        for kind in kinds:
            bad = self.bad(kind, COUNT)
            time.sleep(1.5)  # they have what they can get
            took, rss = self.good_pull(), self.rss()
            self.qemu_answers()
            bad.kill()
            bad.wait()
            harness.wait_until(lambda: len(self.daemon.ask('query-status')['connections']) == 1, 60, 'their end')
            most = self.daemon.ask('query-status')['buffers']
            print(f'{kind}: a pull beside them {took:.1f} s, RSS {rss / MIB:.0f} MiB, buffers at most '
                  f'{most["most"] / MIB:.1f} of {most["limit"] / MIB:.0f} MiB', flush=True)
            self.assertLess(most['most'], most['limit'] + (COUNT + 2) * 65536)
            self.assertEqual(self.metrics()['qpull_reply_bytes',], 0)
            if not sanitized:
                self.assertLess(rss, BUDGET)
        result = load.stop()
        self.assertEqual((result['errors'], result['bad']), (0, 0))
        self.assertLess(result['slowest-us'], SLOWEST_US)
        print(f'the guest: {result["ops"]} operations, the slowest {result["slowest-us"] / 1000:.0f} ms', flush=True)
        holder.disc()
        self.end()

    def test_clients_that_do_not_read_hold_up_nobody(self):
        self.beside('never-reads', 'reads-and-stops', 'status-and-does-not-read', 'asks-and-does-not-read')

    def test_slow_and_greedy_clients_leave_others_their_share(self):
        self.beside('trickles', 'greedy')

    def test_clients_that_only_negotiate_hold_up_nobody(self):
        self.beside('silent', 'half-an-option', 'asks-for-info')

    def test_clients_that_send_byte_by_byte_or_ask_for_maps_without_end_are_served_like_others(self):
        self.beside('writes-bytes', 'asks-for-status')

    def test_ten_thousand_connections_that_come_and_go_leave_nothing(self):
        self.begin()
        self.good_pull()
        self.daemon.wait_idle()
        fds = self.metrics()['qpull_process_open_fds',]
        bad = self.bad('comes-and-goes', 10000)
        self.good_pull()
        self.assertEqual(bad.stdout.readline(), 'done 10000\n')
        self.good_pull()
        self.daemon.wait_idle()
        harness.wait_until(lambda: self.metrics()['qpull_process_open_fds',] <= fds, 30, 'the descriptors')
        numbers = self.metrics()
        self.assertGreaterEqual(numbers['qpull_connections_total',], 10003)
        self.assertEqual(numbers['qpull_connections',], 0)
        self.end()

    def test_a_hundred_thousand_requests_sent_at_once_are_all_answered(self):
        self.begin()
        bad = self.bad('pipelines', 1)
        self.good_pull()
        self.assertEqual(bad.stdout.readline(), 'done 100000\n')
        bad.wait(10)
        self.end()


if __name__ == '__main__':
    harness.main()
