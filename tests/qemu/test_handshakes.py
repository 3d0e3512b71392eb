#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""10,000 random and mutated handshakes: nobody gets a byte, or a name, that he may not have.

  QPULL_TEST_SEED        the seed; a failing handshake is said again exactly
  QPULL_TEST_HANDSHAKES  how many (default 10,000)
  QPULL_TEST_ONLY        only that number
"""
import os
import ssl
import struct
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import handshakes
import harness
import rawnbd
import tlsworld
from harness import MIB, Disk

COUNT = int(os.environ.get('QPULL_TEST_HANDSHAKES', 10000))
ONLY = os.environ.get('QPULL_TEST_ONLY')
WEB, DB = 'web', 'accounts'
WEB_DISK, DB_DISK, DB_CHECKPOINT = 'vda', 'ledger', 'yearend'
WEB_SIZE, DB_SIZE = 8 * MIB, 9 * MIB + 7 * 512
KNOWN, STRANGER = ('127.0.0.1', 0), ('127.0.0.2', 0)  # the rules name the first
CLEAR_OF_TLS = {struct.pack('>I', rawnbd.ERROR | n) for n in (1, 3, 5, 6, 9)}


class Handshakes(tlsworld.TlsCase):
    def world(self, *flags):
        self.web = self.bare(Disk(WEB_DISK, WEB_SIZE), name=WEB)
        self.db = self.bare(Disk(DB_DISK, DB_SIZE), name=DB)
        self.web.write(WEB_DISK, 0, WEB_SIZE, 1)
        self.db.write(DB_DISK, 0, 9 * MIB, 2)
        self.daemon = self.qpulld({WEB: self.web, DB: self.db}, linger=10, flags=['--listen=tcp:127.0.0.1:0', *flags])
        self.daemon.qpull('checkpoint', 'create', DB, DB_CHECKPOINT)
        self.daemon.wait_idle(name=WEB)
        self.before = [vm.state() for vm in (self.web, self.db)]
        self.address = ('127.0.0.1', self.daemon.tcp_port())

    def secrets(self, *vms):
        """Names, which count unless the client has said them itself, and what it cannot have said: sizes and sectors."""
        names, others = [], []
        for vm, disk, size in ((self.web, WEB_DISK, WEB_SIZE), (self.db, DB_DISK, DB_SIZE)):
            if vm not in vms:
                continue
            image = vm.disks[disk].model.image
            names += [vm.name.encode(), disk.encode()]
            others += [struct.pack('>Q', size), *(bytes(image[at:at + 16]) for at in range(0, MIB, 64 << 10))]
        if self.db in vms:
            names.append(DB_CHECKPOINT.encode())
        return names, others

    def guesses(self):
        """Names that a client may say: of what is there, and of what is not."""
        known = f'{WEB}/{WEB_DISK}', f'{DB}/{DB_DISK}', f'{DB}/{DB_DISK}@{DB_CHECKPOINT}', WEB, DB, DB_DISK
        strange = 'no/such', '', '/', '*', f'{WEB}/', f'../{DB}/{DB_DISK}', f'{WEB}/{WEB_DISK}@new', f'{DB}/*', 'a' * 4096
        return [n.encode() for n in known + strange] + [b'\xff\xfe/\0', f'{WEB}/{WEB_DISK}\0'.encode()]

    def numbers(self, first, n):
        """A share of all, by number."""
        numbers = range(first, first + n * COUNT // 10000)
        return [i for i in numbers if ONLY is None or i == int(ONLY)]

    def wrong(self, number, said, heard, what):
        self.fail(f'handshake {number} (QPULL_TEST_SEED={harness.seed} QPULL_TEST_ONLY={number}): {what}\n'
                  f'it said {said!r}\nand heard {heard[:4096]!r}')

    def check(self, number, said, heard, names, others):
        for word in names:
            if word in heard and word not in said:
                self.wrong(number, said, heard, f'it was told {word!r}')
        for data in others:
            if data in heard:
                self.wrong(number, said, heard, f'it got {data!r}')

    def shout(self, first, n, source, *hidden):
        """What so many handshakes get; none has anything of what is hidden. All answers together."""
        names, others = self.secrets(*hidden)
        guesses, total = self.guesses(), bytearray()
        said = ((i, handshakes.handshake(harness.seed, i, guesses)) for i in self.numbers(first, n))
        for number, words, heard in handshakes.crowd(self.address, said, source):
            self.check(number, words, heard, names, others)
            total += heard[18:4096]
        return bytes(total)

    def end(self):
        for vm, before in zip((self.web, self.db), self.before):
            self.daemon.wait_idle(name=vm.name)
            self.assertNothingLeft(vm, self.daemon, before)
        self.daemon.stop()

    def test_a_client_that_no_rule_names_gets_nothing_at_all(self):
        self.world(f'--allow=ip:127.0.0.1={WEB}/list+pull')
        self.shout(0, 3000, STRANGER, self.web, self.db)
        self.end()

    def test_a_client_that_may_see_one_vm_gets_nothing_of_the_other(self):
        self.world(f'--allow=ip:127.0.0.1={WEB}/list+pull')
        total = self.shout(3000, 4000, KNOWN, self.db)
        if ONLY is None:  # else this test could not fail: they get what they may have
            self.assertIn(f'{WEB}/{WEB_DISK}'.encode(), total)
            self.assertIn(struct.pack('>Q', WEB_SIZE), total)
        self.end()

    def test_what_one_may_not_see_answers_like_what_is_not_there(self):
        self.world(f'--allow=ip:127.0.0.1={WEB}/list+pull')
        name, other = f'{DB}/{DB_DISK}'.encode(), b'n0thing/at-all7'
        self.assertEqual(len(name), len(other))
        said = [(i, handshakes.handshake(harness.seed, i, [name, f'{WEB}/{WEB_DISK}'.encode()]))
                for i in self.numbers(20000, 600)]
        said = [(i, words) for i, words in said if name in words]
        # A client that shuts its end while the daemon asks QEMU for it is gone. On a busy machine a second is not long.
        for hold in (1, 4, 16):
            answers = {i: heard for i, _, heard in handshakes.crowd(self.address, said, KNOWN, hold)}
            others = handshakes.crowd(self.address, [(i, words.replace(name, other)) for i, words in said], KNOWN, hold)
            unlike = [(i, words, heard) for i, words, heard in others if heard.replace(other, name) != answers[i]]
            numbers = {i for i, _, _ in unlike}
            said = [(i, words) for i, words in said if i in numbers]
        for number, words, heard in unlike:
            self.wrong(number, words, heard, f'where {name!r} is said it hears {answers[number][:4096]!r}')
        self.end()

    def require(self):
        self.pki = f'{self.folder}/pki'
        tlsworld.qpull('certs', 'init', self.pki, '--client=alice')
        self.world('--tls=require', f'--tls-certs={self.pki}', f'--allow=cn:alice={WEB}/list+pull',
                   f'--allow=ip:127.0.0.1=*')

    def test_in_clear_nobody_is_told_a_thing_where_tls_is_required(self):
        self.require()
        self.shout(7000, 2700, KNOWN, self.web, self.db)
        self.end()

    def test_inside_tls_a_certificate_sees_what_its_rule_names(self):
        self.pki = f'{self.folder}/pki'
        tlsworld.qpull('certs', 'init', self.pki, '--client=alice')
        self.world('--tls=require', f'--tls-certs={self.pki}', f'--allow=cn:alice={WEB}/list+pull')
        names, others = self.secrets(self.db)
        for number in self.numbers(9700, 300):
            said = handshakes.handshake(harness.seed, number, self.guesses())
            raw = tlsworld.starttls(rawnbd.Raw(self.address), self.client('alice'))
            heard = bytearray()
            try:
                raw.sock.sendall(said[4:] + handshakes.say_option(2))  # its flags were said before
                raw.sock.shutdown(1)
                while data := raw.sock.recv(1 << 16):
                    heard += data
            except (ssl.SSLError, OSError):
                pass
            raw.sock.close()
            self.check(number, said, bytes(heard), names, others)
        self.end()


if __name__ == '__main__':
    harness.main()
