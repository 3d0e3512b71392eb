#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of the control socket that shuts its writing side (`echo … | socat - UNIX:…`) still gets the answers to all
that it asked, and then the end; one that closes the socket is forgotten."""
import json
import os
import signal
import socket
import time

import harness
from harness import MIB, Disk

HELLO = {'execute': 'qmp_capabilities', 'id': 'hello'}


class HalfClosed(harness.Case):
    def setUp(self):
        self.vm = self.bare(Disk('vda', MIB))
        self.daemon = self.qpulld(self.vm, linger=0)
        self.daemon.wait_idle()
        self.before = min(self.sockets() for _ in range(20) if not time.sleep(0.01))  # our last question's is closed late

    def sockets(self):
        """How many the daemon has open."""
        folder, n = f'/proc/{self.daemon.process.pid}/fd', 0
        for fd in os.listdir(folder):
            try:
                n += os.readlink(f'{folder}/{fd}').startswith('socket:')
            except FileNotFoundError:
                pass
        return n

    def connect(self, *commands):
        """Says all that, and no more."""
        sock = socket.socket(socket.AF_UNIX)
        self.addCleanup(sock.close)
        sock.settimeout(30)
        sock.connect(self.daemon.control)
        sock.sendall(b''.join(json.dumps(c).encode() + b'\n' for c in (HELLO, *commands)))
        sock.shutdown(socket.SHUT_WR)
        return sock

    def answers(self, sock):
        """{id: answer} up to the end that the daemon makes."""
        data = b''
        while part := sock.recv(1 << 16):
            data += part
        greeting, *answers = map(json.loads, data.splitlines())
        self.assertIn('QMP', greeting)
        return {a['id']: a for a in answers if 'event' not in a}

    def check_forgotten(self):
        harness.wait_until(lambda: self.sockets() <= self.before, 10, 'the daemon to close the socket')

    def test_all_that_was_asked_is_answered_and_then_comes_the_end(self):
        got = self.answers(self.connect(
            {'execute': 'query-disks', 'arguments': {'vm': 'vm'}, 'id': 1}, {'execute': 'nonsense', 'id': 2},
            {'execute': 'checkpoint-create', 'arguments': {'vm': 'vm', 'name': 'c1'}, 'id': 3},
            {'execute': 'query-checkpoints', 'arguments': {'vm': 'vm'}, 'id': 4}))
        self.assertEqual(set(got), {'hello', 1, 2, 3, 4})
        self.assertEqual(got[1]['return'][0]['name'], 'vda')
        self.assertEqual(got[2]['error']['class'], 'CommandNotFound')
        self.assertEqual(got[3]['return'], {'records': 1})
        self.check_forgotten()
        self.daemon.stop()

    def test_more_commands_than_go_at_once_are_answered_too(self):
        asked = [{'execute': 'query-disks', 'arguments': {'vm': 'vm'}, 'id': i} for i in range(500)]
        self.assertEqual(len(self.answers(self.connect(*asked))), 501)
        self.check_forgotten()
        self.daemon.stop()

    def test_answers_wait_for_a_slow_qemu(self):
        self.vm.process.send_signal(signal.SIGSTOP)
        sock = self.connect({'execute': 'query-disks', 'arguments': {'vm': 'vm'}, 'id': 1})
        sock.settimeout(2.5)  # longer than the daemon's own look at its clients
        data = b''
        with self.assertRaises(TimeoutError):
            while part := sock.recv(1 << 16):
                data += part
        self.assertEqual(len(data.splitlines()), 2, 'greeting and hello')
        self.vm.process.send_signal(signal.SIGCONT)
        sock.settimeout(30)
        self.assertIn(b'"vda"', sock.recv(1 << 16))
        self.assertEqual(sock.recv(1 << 16), b'')
        self.check_forgotten()
        self.daemon.stop()

    def test_a_client_that_is_gone_is_forgotten_whatever_it_asked(self):
        self.vm.process.send_signal(signal.SIGSTOP)
        for half_first in (False, True):
            with self.subTest(half_first=half_first):
                question = {'execute': 'query-disks', 'arguments': {'vm': 'vm'}, 'id': 1}
                sock = self.connect(question)
                if half_first:
                    sock.settimeout(2.5)
                    with self.assertRaises(TimeoutError):
                        while sock.recv(1 << 16):
                            pass
                sock.close()
                self.check_forgotten()
        self.vm.process.send_signal(signal.SIGCONT)
        self.daemon.wait_idle()
        self.daemon.stop()

    def test_who_says_nothing_gets_a_greeting_and_the_end(self):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(self.daemon.control)
            sock.shutdown(socket.SHUT_WR)
            self.assertEqual(self.answers(sock), {})
        self.check_forgotten()
        with socket.socket(socket.AF_UNIX) as sock:  # half a command is none
            sock.settimeout(30)
            sock.connect(self.daemon.control)
            sock.sendall(json.dumps(HELLO).encode() + b'\n{"execute": "query-')
            sock.shutdown(socket.SHUT_WR)
            self.assertEqual(set(self.answers(sock)), {'hello'})
        self.check_forgotten()
        self.daemon.stop()

    def test_a_daemon_that_is_told_to_end_does_so(self):
        self.vm.process.send_signal(signal.SIGSTOP)
        self.connect({'execute': 'query-disks', 'arguments': {'vm': 'vm'}, 'id': 1})
        self.daemon.process.terminate()
        self.vm.process.send_signal(signal.SIGCONT)
        self.assertEqual(self.daemon.process.wait(30), 0)
        self.daemon.check_log()

    def test_one_change_s_end_does_not_take_the_connection_from_the_next(self):
        """All wait for one look at the disks; the daemon is told to end just before, while or after it looks."""
        for round_ms in range(12):
            with self.subTest(round_ms=round_ms):
                names = [{'execute': f'checkpoint-{what}', 'arguments': {'vm': 'vm', 'name': name}, 'id': name}
                         for what, name in (('delete', 'none'), ('create', f'c{round_ms}'), ('delete', 'nobody'))]
                self.connect(*names)
                time.sleep(round_ms / 1000)
                self.daemon.process.terminate()
                self.assertEqual(self.daemon.process.wait(30), 0)
                self.daemon.check_log()
                self.daemon = self.qpulld(self.vm, linger=0)
                self.daemon.wait_idle()
        self.daemon.stop()


if __name__ == '__main__':
    harness.main()
