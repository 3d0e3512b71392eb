# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 300
"""Who has a good certificate or key, and what that does not open: the VM of somebody else, and by a ticket no more than
its disk, once, in its time. With stock clients."""
import json
import os
import re
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
import nbd
import nbdpull
import rawnbd
import tlsworld
from harness import MIB, Disk

os.environ['PATH'] = '/usr/bin:' + os.environ['PATH']  # nbdsh takes the first python3: libnbd belongs to the system's
SIZE = 4 * MIB
NO_EXPORT = 'has no export|no export named|Requested export not available'  # libnbd, QEMU
NBDSH = 'h.set_uri_allow_local_file(True)\nh.connect_uri("{uri}")\nprint(h.get_size(), h.pread(512, 0)[0])\nh.shutdown()\n'


class TwoVms(tlsworld.TlsCase):
    def world(self):
        self.pki = f'{self.folder}/pki'
        tlsworld.qpull('certs', 'init', self.pki, '--client=alice', '--client=bob')
        self.web, self.db = self.bare(Disk('vda', SIZE), name='web'), self.bare(Disk('vdb', SIZE), name='db')
        self.web.write('vda', 0, MIB, 7)
        self.db.write('vdb', 0, MIB, 8)
        self.before = self.web.state(), self.db.state()
        self.daemon = self.qpulld({'web': self.web, 'db': self.db}, linger=0, flags=[
            '--listen=tcp:127.0.0.1:0', '--tls=require', f'--tls-certs={self.pki}', '--allow=cn:alice=web',
            '--allow=cn:bob=db'])
        self.port = self.daemon.tcp_port()
        self.address = ('127.0.0.1', self.port)

    def refusal(self, who, export, option=rawnbd.OPT_GO):
        return rawnbd.refused(tlsworld.starttls(rawnbd.Raw(self.address), self.client(who)), export, option)

    def wait_both(self):
        for name in ('web', 'db'):
            self.daemon.wait_idle(name=name)

    def test_a_client_certificate_of_another_vm_is_as_good_as_none_for_this_one(self):
        self.world()
        out = f'{self.folder}/out'
        for who, mine, other, disk in (('alice', 'web/vda', 'db/vdb', self.web.disks['vda']),
                                       ('bob', 'db/vdb', 'web/vda', self.db.disks['vdb'])):
            folder, image = self.client(who), bytes(disk.model.image)
            qemu_img = ['qemu-img', 'convert', '--object', f'tls-creds-x509,id=t,endpoint=client,dir={folder}',
                        '--image-opts', f'driver=nbd,host=localhost,port={self.port},export=EXPORT,tls-creds=t', '-O',
                        'raw', out]
            commands = {'nbdcopy': ['nbdcopy', self.uri(folder, 'EXPORT'), out],
                        'nbdinfo': ['nbdinfo', '--map', self.uri(folder, 'EXPORT')], 'qemu-img': qemu_img,
                        'nbdsh': ['nbdsh', '-c', NBDSH.format(uri=self.uri(folder, 'EXPORT'))]}
            for name, words in commands.items():
                with self.subTest(f'{who}, {name}'):
                    harness.run([w.replace('EXPORT', mine) for w in words])
                    if name in ('nbdcopy', 'qemu-img'):
                        with open(out, 'rb') as f:
                            self.assertSame(f.read(), image, name)
                    done = harness.run([w.replace('EXPORT', other) for w in words], check=False)
                    self.assertNotEqual(done.returncode, 0)
                    self.assertRegex(done.stdout + done.stderr, NO_EXPORT)
                    self.wait_both()
            listed = harness.run(['nbdinfo', '--list', '--json', self.uri(folder, '')]).stdout
            self.assertEqual([e['export-name'] for e in json.loads(listed)['exports']], [mine])
            for option in (rawnbd.OPT_GO, rawnbd.OPT_INFO):  # in the same words as what is not there
                self.assertEqual(self.refusal(who, other, option), self.refusal(who, 'no/vdx', option))
        self.wait_both()
        for vm, before in zip((self.web, self.db), self.before):
            self.assertNothingLeft(vm, self.daemon, before)
        self.daemon.stop()


class Tickets(tlsworld.TlsCase):
    def ticket(self, *words):
        """The session, and the ticket's name."""
        begun = self.daemon.json('begin', 'vm', '--ticket', *words)
        uri = next(u for u in begun['disks'][0]['uris'] if '+unix' not in u)
        self.assertTrue(uri.startswith('nbds://'), uri)
        return begun['session'], re.search(r'ticket-[0-9a-f]{64}', uri).group(0)

    def end_session(self, session):
        self.daemon.qpull('end', session)
        self.daemon.wait_idle()

    def expect_once(self, uri_of):
        """Each of the stock clients reads all by a ticket of its own, and nothing by the same one again."""
        image, out = bytes(self.vm.disks['vda'].model.image), f'{self.folder}/out'
        commands = {
            'nbdcopy': lambda uri: ['nbdcopy', '--connections=4', uri, out],
            'nbdinfo': lambda uri: ['nbdinfo', '--map', '--json', uri],
            'nbdsh': lambda uri: ['nbdsh', '-c', NBDSH.format(uri=uri)],
        }
        for name, command in commands.items():
            if not shutil.which(name):
                self.skipTest(f'missing: {name}')
            with self.subTest(name):
                session, ticket = self.ticket()
                done = harness.run(command(uri_of(ticket)))
                if name == 'nbdcopy':
                    with open(out, 'rb') as f:
                        self.assertSame(f.read(), image, name)
                elif name == 'nbdinfo':
                    self.assertEqual(sum(e['length'] for e in json.loads(done.stdout)), len(image))
                else:
                    self.assertEqual(done.stdout.strip(), f'{len(image)} 1')
                again = harness.run(command(uri_of(ticket)), check=False)
                self.assertNotEqual(again.returncode, 0)
                self.assertRegex(again.stdout + again.stderr, NO_EXPORT)
                self.end_session(session)

    def expect_end(self, uri_of):
        """After its ttl a ticket is worth nothing, also in the hand of who reads by it."""
        for ttl in (1, 5, 25):
            _, ticket = self.ticket('--ttl', str(ttl))
            try:
                h = nbdpull.connect(uri_of(ticket))
                break
            except nbd.Error:  # its time was up before the client could come
                self.daemon.wait_idle()
        self.daemon.wait_idle(60)
        with self.assertRaises(nbd.Error):
            h.pread(512, 0)
        for name in (ticket, 'ticket-' + '0' * 64):
            done = harness.run(['nbdinfo', '--map', uri_of(name)], check=False)
            self.assertNotEqual(done.returncode, 0)
            self.assertRegex(done.stdout + done.stderr, NO_EXPORT)
        return ticket

    def test_a_certificate_and_a_ticket_open_one_disk_once_and_in_its_time(self):
        self.begin('require', allow=(), size=SIZE)
        alice = self.client('alice')
        self.expect_once(lambda ticket: self.uri(alice, ticket))
        expired = self.expect_end(lambda ticket: self.uri(alice, ticket))
        said = []
        for name in (expired, 'ticket-' + '0' * 64):
            raw = tlsworld.starttls(rawnbd.Raw(self.address), alice)
            with self.assertRaises(rawnbd.Refused) as caught:
                raw.go(name)
            raw.close()
            said.append((caught.exception.error, caught.exception.sentence.replace(name, 'NAME')))
        self.assertEqual(said[0], said[1])
        # A ticket is no certificate: one of another authority, or none, does not get so far as to name it.
        other = f'{self.folder}/other'
        tlsworld.qpull('certs', 'init', other, '--client=alice')
        session, ticket = self.ticket()
        os.makedirs(f'{self.folder}/mixed')
        for name, place in (('ca-cert.pem', self.pki), ('client-cert.pem', f'{other}/clients/alice'),
                            ('client-key.pem', f'{other}/clients/alice')):
            os.symlink(f'{place}/{name}', f'{self.folder}/mixed/{name}')
        self.assertBad(self.uri(f'{self.folder}/mixed', ticket), 'certificate is refused')
        self.assertGood(self.uri(alice, ticket))  # and has not used it up
        self.end_session(session)
        self.end()

    def test_a_key_and_a_ticket_open_one_disk_once_and_in_its_time(self):
        self.begin('require', psk=True, allow=(), size=SIZE)
        self.expect_once(lambda ticket: self.psk_uri('alice', export=ticket))
        self.expect_end(lambda ticket: self.psk_uri('alice', export=ticket))
        # A ticket is no key; and it is the first one's who comes with it.
        session, ticket = self.ticket()
        wrong = f'{self.folder}/wrong'
        with open(wrong, 'w', encoding='utf-8') as f:
            f.write('alice:' + '00' * 32 + '\n')
        self.assertBad(self.psk_uri('alice', wrong, ticket), 'the TLS handshake failed', 'the client ended TLS')
        h = nbdpull.connect(self.psk_uri('alice', export=ticket))
        well, words = self.reads(self.psk_uri('bob', export=ticket))
        self.assertFalse(well)
        self.assertRegex(words, NO_EXPORT)
        self.assertEqual(h.pread(512, 0), b'\1' * 512)
        h.shutdown()
        self.end_session(session)
        text = self.log_text()
        self.assertNotIn(ticket[len('ticket-'):][:16], text)
        self.end()


if __name__ == '__main__':
    harness.main()
