#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: alone
"""Broken, rude or hostile clients cost bounded memory, are told what is wrong, and never disturb anybody else."""
import json
import os
import socket
import struct
import subprocess
import time

import harness
import nbdpull
import rawnbd
from harness import MIB, Disk

RSS_GROWTH_MAX = 160  # MiB: 64 of buffers, sockets, and what ASan keeps of freed memory in a quarantine (limited below)
SLOWEST_US = 5_000_000  # a guest's slowest operation, on a busy machine without KVM; a frozen guest has 20 s and more
LOOK_S = 1  # how often the daemon looks whether a session's frozen view still stands
os.environ['ASAN_OPTIONS'] = f'{os.environ.get("ASAN_OPTIONS", "")}:quarantine_size_mb=16'


def rss(process):
    """MiB of memory that a process has in RAM."""
    with open(f'/proc/{process.pid}/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') >> 20


class BadInput(harness.Case):
    def refused(self, raw, option, data=b'', length=None):
        with self.assertRaises(rawnbd.Refused) as caught:
            raw.option(option, data, length)
        return caught.exception

    def still_serves(self, guest, daemon):
        self.assertModel(guest.disks['vda'].model, nbdpull.pull(daemon.uri('vm/vda')), 'another client')

    def test_what_a_hasty_client_sent_behind_go_is_answered_before_its_end_is_heard(self):
        guest = self.bare()
        daemon = self.qpulld(guest, linger=0)
        # Another process: beside it this one gets turns.
        other = harness.spawn(['/usr/bin/python3', '-c', 'import socket, sys\ns = socket.socket(socket.AF_UNIX)\n'
                               's.connect(sys.argv[1])\ns.recv(18)\nprint("here", flush=True)\nsys.stdin.read()',
                               daemon.socket], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.assertEqual(other.stdout.readline(), 'here\n')
        for _ in range(10):
            raw = rawnbd.Raw(daemon.socket)
            requests = [(rawnbd.CMD_READ, i, i * 4096, 4096) for i in range(30)] + [(rawnbd.CMD_DISC, 0, 0, 0)]
            name = rawnbd.string('vm/vda') + b'\0\0'
            raw.put(struct.pack('>QII', rawnbd.OPTION_MAGIC, rawnbd.OPT_GO, len(name)) + name + b''.join(
                struct.pack('>IHHQQI', rawnbd.REQUEST_MAGIC, 0, *what) for what in requests))
            while raw.take_reply()[1] != rawnbd.REP_ACK:
                pass
            raw.sock.shutdown(socket.SHUT_WR)
            self.assertEqual(len(raw.wait_hangup(30)), 30 * (16 + 4096))
            raw.close()
            daemon.wait_idle()
        with open(daemon.log_path, encoding='utf-8') as f:
            self.assertEqual(f.read().count('leaves vm/vda: done'), 10)
        other.stdin.close()
        other.wait()
        other.stdout.close()
        daemon.stop()

    def test_options_that_make_no_sense_are_answered_and_the_negotiation_goes_on(self):
        guest = self.bare()
        daemon = self.qpulld(guest, linger=0)
        before = guest.state()
        raw = rawnbd.Raw(daemon.socket)
        for export, words in (('nowhere/vda', 'VM/DISK'), ('vm/nowhere', 'no disk "nowhere"'), ('vm', 'VM/DISK'),
                              ('vm/', 'no disk'), ('/', 'VM/DISK'), ('vm/vda/x', 'no disk'), ('\x01\x02', 'VM/DISK')):
            for option in (rawnbd.OPT_GO, rawnbd.OPT_INFO):
                answer = self.refused(raw, option, rawnbd.string(export) + b'\0\0')
                self.assertEqual(answer.error, rawnbd.ERR_UNKNOWN, export)
                self.assertRegex(answer.sentence, words)
        for option, data in ((rawnbd.OPT_GO, b''), (rawnbd.OPT_GO, b'\0'), (rawnbd.OPT_GO, rawnbd.string('vm/vda')),
                             (rawnbd.OPT_GO, struct.pack('>I', 1 << 31) + b'vm/vda\0\0'),
                             (rawnbd.OPT_GO, rawnbd.string('vm/vda') + b'\0\7'),
                             (rawnbd.OPT_INFO, rawnbd.string('vm/vda') + b'\0\0trailing'),
                             (rawnbd.OPT_GO, rawnbd.string('vm/v\0da') + b'\0\0'),
                             (rawnbd.OPT_LIST, b'data'), (rawnbd.OPT_STRUCTURED, b'x'),
                             (rawnbd.OPT_SET_META_CONTEXT, rawnbd.string('vm/vda') + struct.pack('>I', 1 << 30)),
                             (rawnbd.OPT_LIST_META_CONTEXT, b'\xff' * 8)):
            answer = self.refused(raw, option, data)
            self.assertIn(answer.error, (rawnbd.ERR_INVALID, rawnbd.ERR_TOO_BIG, rawnbd.ERR_UNKNOWN), (option, data))
            self.assertTrue(answer.sentence, (option, data))
        for option in (4, 77, 0xffffffff):
            self.assertEqual(self.refused(raw, option, b'whatever').error, rawnbd.ERR_UNSUP)
        answer = self.refused(raw, rawnbd.OPT_GO, rawnbd.string('vm/' + 'x' * 4090) + b'\0\0')
        self.assertIn(answer.error, (rawnbd.ERR_UNKNOWN, rawnbd.ERR_TOO_BIG, rawnbd.ERR_INVALID))
        answer = self.refused(raw, rawnbd.OPT_GO, rawnbd.string('x' * 100000) + b'\0\0')
        self.assertIn(answer.error, (rawnbd.ERR_TOO_BIG, rawnbd.ERR_INVALID))
        self.assertEqual(daemon.ask('query-sessions'), [])
        self.assertEqual(guest.state(), before)
        self.assertEqual(raw.go('vm/vda'), guest.disks['vda'].size)  # the same connection, after all that
        raw.disc()

    def test_requests_that_make_no_sense_get_an_error_and_the_next_one_its_answer(self):
        guest = self.bare()
        guest.write('vda', 0, 4096, 9)
        daemon = self.qpulld(guest, linger=0)
        raw = rawnbd.Raw(daemon.socket)
        size = raw.go('vm/vda')
        read, write = rawnbd.CMD_READ, rawnbd.CMD_WRITE
        for command, offset, length in ((read, size, 1), (read, size - 1, 2), (read, 1 << 63, 512),
                                        (read, (1 << 64) - 1, 1),
                                        (read, 0, (32 << 20) + 1), (read, 0, 0xffffffff), (77, 0, 0),
                                        (rawnbd.CMD_BLOCK_STATUS, 0, 512)):
            self.assertNotEqual(raw.error_of(command, offset, length), 0, (command, offset, length))
        self.assertNotEqual(raw.error_of(read, 0, 512, flags=0x8000), 0)  # an unknown flag
        raw.request(write, 0, 512)
        raw.put(b'w' * 512)
        self.assertEqual(struct.unpack('>IIQ', raw.take(16))[1], rawnbd.EPERM)
        self.assertEqual(raw.read(0, 4096), (0, b'\x09' * 4096))
        raw.request(read, 0, 512, magic=0x12345678)
        raw.wait_hangup(5)
        raw.close()
        self.assertEqual(harness.run(['nbdinfo', '--size', daemon.uri('vm/vda')]).stdout.strip(), str(size))

    def test_silent_connections_are_closed_in_time(self):
        guest = self.bare()
        daemon = self.qpulld(guest, flags=['--handshake-timeout=1'], linger=0)
        quiet = rawnbd.Raw(daemon.socket, handshake=False)
        half = rawnbd.Raw(daemon.socket)
        half.put(struct.pack('>QI', rawnbd.OPTION_MAGIC, rawnbd.OPT_GO))
        slow = rawnbd.Raw(daemon.socket)
        began = time.monotonic()
        slow.send_option(rawnbd.OPT_GO, b'\0', length=100)
        try:
            while time.monotonic() - began < 10:  # a byte now and then does not help
                slow.put(b'\0')
                time.sleep(0.1)
                slow.sock.settimeout(0.001)
                try:
                    if slow.sock.recv(1 << 16) == b'':
                        break
                except TimeoutError:
                    pass
        except OSError:
            pass
        self.assertLess(time.monotonic() - began, 5)
        for raw in (quiet, half):
            raw.wait_hangup(5)
        for raw in (quiet, half, slow):
            raw.close()
        kept = nbdpull.connect(daemon.uri('vm/vda'))  # whoever is through may be silent
        time.sleep(2.5)
        kept.pread(512, 0)
        kept.shutdown()

    def test_five_hundred_silent_connections_do_not_shut_others_out(self):
        guest = self.bare()
        # One user's connections are bounded far below that; here he stands for many.
        daemon = self.qpulld(guest, linger=0, flags=['--max-connections-per-client=1024'])
        working = nbdpull.connect(daemon.uri('vm/vda'))
        first = rss(daemon.process)
        crowd = []
        for _ in range(500):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(daemon.socket)  # waits where the backlog is full
            crowd.append(sock)
        began = time.monotonic()
        self.still_serves(guest, daemon)
        self.assertLess(time.monotonic() - began, 10)
        working.pread(512, 0)
        status = daemon.ask('query-status')
        grown = rss(daemon.process) - first
        print(f'500 silent connections: {grown} MiB more (of {first}); {status["connection-counts"]}', flush=True)
        self.assertLessEqual(status['connection-counts']['now'], status['connection-counts']['limit'])
        self.assertLess(grown, 40)
        for sock in crowd:
            sock.close()
        working.shutdown()
        daemon.wait_idle()
        daemon.stop()

    def test_noise_is_answered_by_hanging_up(self):
        guest = self.bare()
        daemon = self.qpulld(guest, linger=0)
        before = guest.state()
        for i in range(150):
            raw = rawnbd.Raw(daemon.socket, handshake=i % 3 > 0)
            noise = harness.rng.randbytes(harness.rng.randrange(1, 3000))
            try:
                if i % 3 == 2:
                    raw.go('vm/vda')
                    noise = struct.pack('>I', rawnbd.REQUEST_MAGIC) * harness.rng.randrange(2) + noise
                raw.put(noise)
                raw.sock.shutdown(socket.SHUT_WR)
                raw.wait_hangup(10)
            except (BrokenPipeError, ConnectionResetError):
                pass
            raw.close()
        self.still_serves(guest, daemon)
        daemon.wait_idle()
        self.assertNothingLeft(guest, daemon, before)
        daemon.stop()

    def test_noise_on_the_control_socket_does_no_harm(self):
        guest = self.bare()
        daemon = self.qpulld(guest, linger=0)

        def talk(data, timeout=3):
            """What comes back; the greeting first."""
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(daemon.control)
                sock.settimeout(timeout)
                answer = b''
                try:
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                    while part := sock.recv(1 << 16):
                        answer += part
                except (ConnectionResetError, BrokenPipeError, TimeoutError):
                    pass  # it reads no more commands from somebody who does not take the answers
                return answer
        hello = b'{"execute": "qmp_capabilities"}\n'
        for line, words in ((b'{"execute": "nonsense"}', 'nonsense'), (b'{"execute": 5}', ''), (b'[]', ''), (b'{}', ''),
                            (b'{"execute": "query-disks"}', 'vm'),
                            (b'{"execute": "query-disks", "arguments": {"vm": 5}}', ''),
                            (b'{"execute": "query-disks", "arguments": {"vm": "nowhere"}}', 'nowhere'),
                            (b'{"execute": "query-status", "arguments": {"x": 1}}', 'x'),
                            (b'{"execute": "query-status", "arguments": []}', '')):
            answers = [json.loads(x) for x in talk(hello + line + b'\n').splitlines()]
            self.assertIn('error', answers[-1], line)
            self.assertIn(words, answers[-1]['error']['desc'], line)
        for data in (b'', b'\0' * 100000, b'{' * 100000, b'"' + b'x' * 1000000, b'}' * 10, b'\xff\xfe' * 1000,
                     hello + b'{"execute": "query-status"}' * 20000, harness.rng.randbytes(100000),
                     hello + b'[' * 10000 + b']' * 10000):
            talk(data)
        lines = [socket.socket(socket.AF_UNIX) for _ in range(60)]
        for sock in lines:
            sock.connect(daemon.control)
        for sock in lines:
            sock.close()

        def answers():
            try:
                return daemon.ask('query-version')['package'].startswith('qpull')
            except ConnectionError:  # the crowd is not gone yet
                return False
        harness.wait_until(answers, 10, 'an answer')
        self.still_serves(guest, daemon)
        daemon.stop()


class Rude(harness.Case):
    def test_a_client_that_reads_nothing_disturbs_neither_guest_nor_others(self):
        disk = Disk('vda', 256 * MIB, fmt='raw')
        disk.create(self.folder)
        harness.run(['qemu-io', '-f', 'raw', '-c', f'write -q -P 7 0 {disk.size}', disk.path])
        guest = self.guest(disk)
        daemon = self.qpulld(guest, linger=0)
        before = guest.state()
        load = guest.load('vda', ('write', 'read'), pause_us=1000)
        harness.wait_until(lambda: load.status()['ops'] > 20, 60, 'a busy guest')
        stuck = rawnbd.Raw(daemon.socket, receive_buffer=4096)
        stuck.go('vm/vda')
        first = rss(daemon.process)
        for i in range(64):
            stuck.request(rawnbd.CMD_READ, (i % 8) * 32 * MIB, 32 * MIB, cookie=i)
        time.sleep(1)
        began = time.monotonic()
        harness.run(['nbdcopy', daemon.uri('vm/vda'), 'null:'])
        took = time.monotonic() - began
        grown = rss(daemon.process) - first
        ops = load.status()['ops']
        harness.wait_until(lambda: load.status()['ops'] > ops + 10, SLOWEST_US / 1e6, 'a guest that is not frozen')
        # Nothing of QEMU hangs on the stuck client: the session can be ended, the guest be paused and go on.
        guest.look('stop', timeout=5)
        guest.look('cont', timeout=5)
        buffers = daemon.ask('query-status')['buffers']
        stuck.close()
        daemon.wait_idle(20)
        result = load.stop()
        print(f'a stuck client with 2 GiB asked for: {grown} MiB more, buffers {buffers}; the other\'s 256 MiB in '
              f'{took:.1f} s; the guest\'s slowest of {result["ops"]} operations {result["slowest-us"] / 1000:.0f} ms',
              flush=True)
        self.assertEqual((result['errors'], result['bad']), (0, 0))
        self.assertLess(result['slowest-us'], SLOWEST_US)
        self.assertLess(grown, RSS_GROWTH_MAX)
        self.assertLessEqual(buffers['most'], 68 * MIB)
        guest.check()
        self.assertNothingLeft(guest, daemon, before)

    def test_a_full_scratch_costs_the_session_and_never_the_guest(self):
        if os.geteuid() != 0:
            self.skipTest('root mounts a small file system for the scratch')
        small = f'{self.folder}/qpulld.scratch'
        os.mkdir(small)
        if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', small], check=False).returncode:
            self.skipTest('cannot mount a tmpfs')
        self.addCleanup(subprocess.run, ['umount', '-l', small], check=True)
        guest = self.guest(Disk('vda', 32 * MIB))
        guest.write('vda', 0, 16 * MIB, 1)
        before = guest.state()
        daemon = self.qpulld(guest, linger=1, flags=['--scratch-reserve=0'])
        raw, began = rawnbd.Raw(daemon.socket), time.monotonic()
        raw.go('vm/vda@never')
        session = daemon.vm()['session']
        self.assertEqual(raw.read(0, 65536)[0], 0)
        guest.write('vda', 0, 16 * MIB, 2)
        guest.flush('vda')
        guest.check()
        error, ended = 0, False
        try:
            for _ in range(200):
                error = raw.read(8 * MIB, 65536)[0]
                if error:
                    raw.wait_hangup(10)
                    ended = True
                    break
        except (EOFError, ConnectionError):
            ended = True
        self.assertTrue(ended)
        if error or time.monotonic() - began < LOOK_S:  # else the daemon may have found out by itself, and hung up
            self.assertEqual(error, rawnbd.EIO)
        raw.close()
        daemon.wait_idle()
        last = daemon.vm()['last-session']
        self.assertEqual(last['id'], session)
        self.assertRegex(last['failure'] or '', '(?i)scratch|frozen view|snapshot')
        self.assertIn(last['failure'], daemon.qpull('status').stdout)
        print(f'the words of the failure: {last["failure"]}', flush=True)
        self.assertNothingLeft(guest, daemon, before)  # no checkpoint either
        guest.check()
        # A client that reads nothing after the loss, and says goodbye, must not get a checkpoint.
        raw = rawnbd.Raw(daemon.socket)
        raw.go('vm/vda@never')
        guest.write('vda', 0, 16 * MIB, 3)
        try:
            raw.disc()
        except ConnectionError:  # it was told before
            raw.close()
        daemon.wait_idle()
        self.assertNothingLeft(guest, daemon, before)
        guest.check()
        guest.poweroff()
        self.assertModel(guest.disks['vda'].model, self.raw(guest.disks['vda']), 'the image')


if __name__ == '__main__':
    harness.main()
