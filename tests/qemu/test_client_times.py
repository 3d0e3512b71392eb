# SPDX-License-Identifier: LGPL-2.1-or-later
"""--handshake-timeout, --idle-timeout, --session-timeout."""
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import clients
import harness
import rawnbd
from qmpclient import Qmp


class Times(clients.ClientCase):
    """Each limit ends what it names, not before its time, and nothing else."""

    def gone_after(self, raw, timeout=60):
        began = time.monotonic()
        raw.wait_hangup(timeout)
        raw.close()
        return time.monotonic() - began

    def log_of(self):
        with open(self.daemon.log_path, encoding='utf-8') as f:
            return f.read()

    def test_the_handshake_timeout_ends_negotiations_and_no_others(self):
        self.begin(flags=['--handshake-timeout=2'])
        working = rawnbd.Raw(self.daemon.socket)
        working.go('vm/vda')
        silent, talker = rawnbd.Raw(self.daemon.socket, handshake=False), rawnbd.Raw(self.daemon.socket)
        self.addCleanup(talker.close)
        began = time.monotonic()
        try:
            while True:  # busy, but to no end
                talker.option(rawnbd.OPT_LIST)
                time.sleep(0.2)
        except (EOFError, ConnectionError):
            pass
        self.assertGreater(time.monotonic() - began, 1.5)
        self.gone_after(silent)
        self.assertIn('did not finish negotiating within 2 seconds', self.log_of())
        self.assertEqual(working.read(0, 4096)[0], 0)
        working.disc()
        self.end()

    def test_the_idle_timeout_ends_clients_that_ask_for_nothing(self):
        self.begin(flags=['--idle-timeout=2'])
        working, idle, half = (rawnbd.Raw(self.daemon.socket) for _ in range(3))
        for raw in (working, idle, half):
            self.addCleanup(raw.close)
            raw.go('vm/vda')
        began = time.monotonic()
        request = b'\x25\x60\x95\x13' + bytes(23)
        ended = set()
        while len(ended) < 2:
            self.assertLess(time.monotonic() - began, 60)
            self.assertEqual(working.read(0, 4096)[0], 0)
            if half not in ended and request:
                try:
                    half.put(request[:1])  # never a whole request
                    request = request[1:]
                except ConnectionError:
                    pass
            for raw in {idle, half} - ended:
                raw.sock.setblocking(False)
                try:
                    if not raw.sock.recv(100):
                        ended.add(raw)
                except BlockingIOError:
                    pass
                except ConnectionError:
                    ended.add(raw)
                raw.sock.setblocking(True)
            time.sleep(0.25)
        self.assertGreater(time.monotonic() - began, 1.5)
        self.assertIn('asked for nothing for 2 seconds', self.log_of())
        working.disc()
        self.end()

    def test_the_session_timeout_gives_up_what_stands_too_long(self):
        self.begin(flags=['--session-timeout=5'])  # a good pull takes a part of one
        control = Qmp(self.daemon.control)
        self.addCleanup(control.close)
        raw = rawnbd.Raw(self.daemon.socket)
        began = time.monotonic()
        raw.go('vm/vda@never')
        try:
            while raw.read(0, 65536)[0] == 0:  # busy, and still
                self.assertLess(time.monotonic() - began, 60)
        except (EOFError, ConnectionError):
            pass
        raw.close()
        self.assertGreater(time.monotonic() - began, 4.5)
        lost = control.wait_event('SESSION_LOST', 20)['data']
        self.assertEqual((lost['reason'], lost['disk']), ('timeout', None))
        self.daemon.wait_idle()
        last = self.daemon.vm()['last-session']
        for word in ('--session-timeout', '5 seconds', "VM 'vm'", last['id']):
            self.assertIn(word, last['failure'])
        self.assertEqual((last['reason'], last['kept'], last['dropped']), ('timeout', [], ['vda']))
        self.assertEqual(self.metrics()['qpull_sessions_ended_total', ('reason', 'timeout'), ('vm', 'vm')], 1)
        self.good_pull()
        self.daemon.wait_idle()
        self.assertEqual(set(harness.bitmaps(self.vm.look)), set())
        self.end()


if __name__ == '__main__':
    harness.main()
