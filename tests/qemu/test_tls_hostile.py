# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 300
"""Clients that talk in clear where they must not, inject, stop half-way, or never read: nobody gets a name, and memory
stays bounded."""
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
import nbdpull
import rawnbd
import tlsworld

KIB, MIB = 1 << 10, 1 << 20
TLS_REQUIRED = rawnbd.ERROR | 5
STUCK = 100
HELLOS = int(os.environ.get('QPULL_TEST_HELLOS', 60))  # broken ones; more by hand
AT_ONCE = 100
SEALED_TOTAL, PART, PART_SHORT = 8 * MIB, 256 * KIB, 64 * KIB  # TLS_… of server/config.h
SLACK = 24 * KIB  # of a box: TLS_INLINE and headers
SECRETS = b'vm/', b'vda', b'qcow2', b'qemu:', b'base:'


def client_hello():
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    tls = context.wrap_bio(incoming, outgoing)
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


class Hostile(tlsworld.TlsCase):
    def memory(self):
        with open(f'/proc/{self.daemon.process.pid}/status', encoding='utf-8') as f:
            return next(int(line.split()[1]) for line in f if line.startswith('VmRSS:')) * KIB

    def assertNoSecret(self, data):
        for word in SECRETS:
            self.assertNotIn(word, data)

    def test_in_clear_nothing_is_told_where_tls_is_required(self):
        self.begin()
        name = rawnbd.string('vm/vda')
        bodies = {rawnbd.OPT_LIST: b'', rawnbd.OPT_INFO: name + b'\0\0', rawnbd.OPT_GO: name + b'\0\0',
                  rawnbd.OPT_STRUCTURED: b'', rawnbd.OPT_LIST_META_CONTEXT: name + bytes(4),
                  rawnbd.OPT_SET_META_CONTEXT: name + bytes(4), 11: b'', 77: b'what'}
        for address in (self.daemon.socket, self.address):
            raw = rawnbd.Raw(address)
            for option, body in bodies.items():
                for wrong in (body, body + b'x', rawnbd.string('no/such')):
                    raw.send_option(option, wrong)
                    answered, kind, words = raw.take_reply()
                    self.assertEqual((answered, kind), (option, TLS_REQUIRED))
                    self.assertNoSecret(words)
            raw.send_option(rawnbd.OPT_EXPORT_NAME, b'vm/vda')
            self.assertEqual(raw.wait_hangup(20), b'')
            raw.close()
        self.assertIsNone(self.daemon.vm()['session'])
        self.assertGood(self.uri(self.client('alice')))
        self.end()

    def test_what_comes_behind_starttls_in_clear_is_never_answered(self):
        self.begin(mode='on')
        go = tlsworld.option(rawnbd.OPT_GO, rawnbd.string('vm/vda') + b'\0\0')
        for extra in (tlsworld.option(rawnbd.OPT_LIST), go, b'\0', go * 400, client_hello()):
            raw = rawnbd.Raw(self.address)
            raw.put(tlsworld.option(rawnbd.OPT_STARTTLS) + extra)
            self.assertEqual(raw.take_reply(), (rawnbd.OPT_STARTTLS, rawnbd.REP_ACK, b''))
            rest = raw.wait_hangup(20)
            self.assertEqual(rest, b'')
            raw.close()
        self.logged('without waiting for its answer')
        # An answer of ours is under way, and STARTTLS is sent meanwhile.
        raw = rawnbd.Raw(self.address)
        raw.put(tlsworld.option(rawnbd.OPT_LIST) + tlsworld.option(rawnbd.OPT_STARTTLS) + go)
        self.assertNotIn(struct.pack('>QII', rawnbd.REPLY_MAGIC, rawnbd.OPT_GO, rawnbd.REP_ACK), raw.wait_hangup(20))
        raw.close()
        # What was said in clear counts no more: contexts and structured replies have to be asked for again.
        raw = rawnbd.Raw(self.address)
        raw.option(rawnbd.OPT_STRUCTURED)
        tlsworld.starttls(raw, self.client('alice'))
        with self.assertRaisesRegex(rawnbd.Refused, 'structured replies'):
            raw.option(rawnbd.OPT_SET_META_CONTEXT, rawnbd.string('vm/vda') + bytes(4))
        with self.assertRaisesRegex(rawnbd.Refused, 'TLS is up already'):
            raw.option(rawnbd.OPT_STARTTLS)
        raw.go('vm/vda')
        self.assertEqual(raw.read(0, 4096), (0, bytes(self.vm.disks['vda'].model.image[:4096])))
        raw.disc()
        self.daemon.wait_idle()
        self.assertGood(f'nbd://localhost:{self.port}/vm/vda')  # in clear, from this machine
        self.daemon.wait_idle()
        self.end()

    def test_from_other_machines_tls_is_required_where_it_is_on(self):
        found = subprocess.run(['hostname', '-I'], stdout=subprocess.PIPE, text=True, check=False).stdout.split()
        host = next((h for h in found if ':' not in h), None)
        if not host:
            self.skipTest('no address beyond loopback')
        for flags, kind in (([], TLS_REQUIRED), (['--allow-plaintext'], None)):
            self.begin(mode='on', flags=['--listen=tcp:0.0.0.0:0', *flags])
            with open(self.daemon.log_path, encoding='utf-8') as f:
                port = next(line for line in f if 'listening on tcp:0.0.0.0:' in line).rstrip().rsplit(':', 1)[1]
            raw = rawnbd.Raw((host, int(port)))
            raw.send_option(rawnbd.OPT_LIST)
            answered = raw.take_reply()[1]
            self.assertEqual(answered, kind or rawnbd.REP_SERVER)
            raw.close()
            if not flags:
                raw = rawnbd.Raw(('127.0.0.1', int(port)))  # the same listener, from this machine
                self.assertEqual(len(raw.option(rawnbd.OPT_LIST)), 1)
                raw.close()
            self.end()
            self.vm.kill()
            os.unlink(self.daemon.log_path)
            os.unlink(self.vm.disks['vda'].path)

    def test_garbage_and_half_handshakes_end_and_hold_nobody_up(self):
        self.begin(flags=['--handshake-timeout=3'])
        hello = client_hello()
        rng = harness.rng
        pieces = [b'GET / HTTP/1.1\r\n\r\n', bytes(5000), b'\xff' * 20000, b'\x16\x03\x01\xff\xff' + bytes(70000),
                  b'\x15\x03\x03\x00\x02\x01\x00' * 3000, hello + hello, hello + b'\x14\x03\x03\x00\x01\x01' * 3000]
        for _ in range(HELLOS):  # a hello with some bytes changed, cut, or followed by something
            bad = bytearray(hello)
            for _ in range(rng.randrange(1, 8)):
                bad[rng.randrange(len(bad))] = rng.randrange(256)
            pieces.append(bytes(bad[:rng.randrange(1, len(bad) + 1)]) + rng.randbytes(rng.choice((0, 0, 30, 3000))))
        for at in range(0, len(pieces), AT_ONCE):
            stuck = []
            for piece in pieces[at:at + AT_ONCE]:
                raw = rawnbd.Raw(self.address)
                raw.option(rawnbd.OPT_STARTTLS)
                try:
                    raw.put(piece)
                except ConnectionError:
                    pass
                stuck.append(raw)
            self.assertGood(self.uri(self.client('alice')))
            for raw in stuck:
                data = raw.wait_hangup(60)
                self.assertNoSecret(data)
                raw.close()
        harness.wait_until(lambda: self.daemon.ask('query-status')['connection-counts']['now'] == 0, 30, 'their end')
        self.assertEqual(self.daemon.ask('query-status')['tls']['buffers'], 0)
        self.logged('did not finish negotiating within 3 seconds')
        self.assertGood(self.uri(self.client('alice')))
        self.end()

    def test_a_crowd_without_any_right_neither_shuts_its_own_address_out_nor_holds_many_sockets(self):
        self.begin(mode='on', allow=('cn:alice=*',))
        good, crowd = self.uri(self.client('alice')), []
        self.assertGood(good)

        def come(*said):
            raw = rawnbd.Raw(self.address)
            self.addCleanup(raw.close)
            crowd.append(raw)
            for data in said:
                raw.put(data)
            return raw

        for _ in range(200):
            come()  # says nothing
        self.assertGood(good)
        for _ in range(200):
            raw = come(tlsworld.option(rawnbd.OPT_GO, rawnbd.string('vm/vda') + b'\0\0'))
            self.assertTrue(raw.take_reply()[1] & rawnbd.ERROR)  # is told no, or that it is one too many, and stays
        self.assertGood(good)
        for _ in range(200):
            come(b'\xff' * 20).wait_hangup(20)  # broke the protocol, and does not close
        self.assertGood(good)
        self.assertLess(len(os.listdir(f'/proc/{self.daemon.process.pid}/fd')), 128 + 64 + 64)
        for raw in crowd:
            raw.close()
        self.end()

    def test_a_hundred_stuck_handshakes_cost_little(self):
        self.begin(flags=['--handshake-timeout=120'])
        self.assertGood(self.uri(self.client('alice')))
        before = self.memory()
        hello, stuck = client_hello(), []
        for _ in range(STUCK):
            raw = rawnbd.Raw(self.address)
            self.addCleanup(raw.close)
            raw.option(rawnbd.OPT_STARTTLS)
            raw.put(hello)
            stuck.append(raw)
        for raw in stuck:
            raw.take(5)  # our hello is here
        each = (self.memory() - before) / STUCK
        print(f'{each / KIB:.0f} KiB for each stuck handshake', file=sys.stderr, flush=True)
        with open(f'/proc/{self.daemon.process.pid}/maps', encoding='utf-8') as f:
            sanitized = re.search('lib[at]san', f.read())
        if not sanitized:
            self.assertLess(each, 160 * KIB)
        self.assertGood(self.uri(self.client('alice')))
        for raw in stuck:
            raw.close()
        self.end()

    def test_a_hundred_clients_that_never_read_hold_what_the_limits_say(self):
        self.begin(size=40 * MIB)
        alice, stuck = self.client('alice'), []
        for _ in range(STUCK):
            raw = rawnbd.Raw(self.address, receive_buffer=4096)
            self.addCleanup(raw.close)
            tlsworld.starttls(raw, alice)
            raw.go('vm/vda')
            stuck.append(raw)
        for raw in stuck:
            raw.put(b''.join(struct.pack('>IHHQQI', rawnbd.REQUEST_MAGIC, 0, rawnbd.CMD_READ, i, 0, 8 * MIB)
                             for i in range(40)))
        most, same = 0, 0
        deadline = time.monotonic() + 60
        while same < 10 and time.monotonic() < deadline:  # until nothing moves any more
            sealed = self.daemon.ask('query-status')['tls']['buffers']
            same = same + 1 if sealed == most > 0 else 0
            most = max(most, sealed)
            time.sleep(0.2)
        print(f'{most / MIB:.1f} MiB sealed, {self.memory() / MIB:.0f} MiB RSS', file=sys.stderr, flush=True)
        self.assertGreater(most, PART)
        self.assertLess(most, SEALED_TOTAL + 16 * (PART + SLACK) + STUCK * (PART_SHORT + SLACK))
        image = bytes(self.vm.disks['vda'].model.image)
        self.assertSame(self.copied(self.uri(alice)), image, 'a good client beside them')
        # One of them reads on after all, and gets what it asked for.
        raw = stuck[0]
        magic, error, _ = struct.unpack('>IIQ', raw.take(16))
        self.assertEqual((magic, error), (rawnbd.SIMPLE_MAGIC, 0))
        self.assertSame(raw.take(8 * MIB), image[:8 * MIB], 'a stuck client that goes on')
        for raw in stuck:
            raw.close()
        harness.wait_until(lambda: self.daemon.ask('query-status')['connection-counts']['now'] == 0, 60, 'their end')
        status = self.daemon.ask('query-status')
        self.assertEqual((status['tls']['buffers'], status['buffers']['used']), (0, 0))
        self.end()

    def test_a_client_that_takes_nothing_is_closed_in_time(self):
        self.begin(size=40 * MIB, flags=['--idle-timeout=2'])
        raw = tlsworld.starttls(rawnbd.Raw(self.address, receive_buffer=4096), self.client('alice'))
        self.addCleanup(raw.close)
        raw.go('vm/vda')
        raw.put(b''.join(struct.pack('>IHHQQI', rawnbd.REQUEST_MAGIC, 0, rawnbd.CMD_READ, i, 0, 32 * MIB)
                         for i in range(8)))
        self.logged('took no byte of its replies for 2 seconds')
        self.end()

    def test_a_client_killed_in_mid_transfer_leaves_nothing(self):
        self.begin(size=40 * MIB)
        alice = self.client('alice')
        for _ in range(6):
            reader = harness.spawn(['nbdcopy', self.uri(alice), 'null:'])
            harness.wait_until(lambda: self.daemon.ask('query-status')['connections'] or reader.poll() is not None, 20,
                               'a connection')
            time.sleep(harness.rng.uniform(0, 0.2))
            reader.send_signal(signal.SIGKILL)
            reader.wait()
            self.daemon.wait_idle()
        # In the middle of a record, and the other way round: we end in mid-transfer.
        raw = tlsworld.starttls(rawnbd.Raw(self.address), alice)
        raw.go('vm/vda')
        inner = raw.sock.detach()
        with socket.socket(fileno=inner) as bare:
            bare.sendall(b'\x17\x03\x03\x00\x40half')
        self.daemon.wait_idle()
        self.assertSame(self.copied(self.uri(alice)), bytes(self.vm.disks['vda'].model.image), 'afterwards')
        h = nbdpull.connect(self.uri(alice))
        h.aio_pread(__import__('nbd').Buffer(32 * MIB), 0)
        self.daemon.process.terminate()
        self.daemon.process.wait(60)
        self.daemon.check_log()
        self.assertEqual(self.vm.state(), self.before)

    def test_bytes_that_were_changed_on_the_way_end_the_connection(self):
        self.begin()
        raw = tlsworld.starttls(rawnbd.Raw(self.address), self.client('alice'))
        raw.go('vm/vda')
        with socket.socket(fileno=raw.sock.detach()) as bare:
            bare.sendall(b'\x17\x03\x03\x00\x40' + bytes(64))
            bare.settimeout(20)
            try:
                while bare.recv(4096):
                    pass
            except ConnectionError:
                pass
        self.logged('TLS failed')
        self.end()


if __name__ == '__main__':
    harness.main()
