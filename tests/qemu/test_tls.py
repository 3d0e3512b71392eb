# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 300
"""TLS with stock clients: who gets in, with what, and that what they get is right."""
import os
import pwd
import shutil
import signal
import ssl
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness
import nbdpull
import rawnbd
import tlsworld

THEIR_END = 'the client ended TLS', 'left in its middle', 'the connection broke'  # where it is the client that refuses
IMAGE = 'driver=nbd,host=localhost,port={},export=vm/vda,tls-creds=t'


class Certificates(tlsworld.TlsCase):
    def test_stock_clients_copy_the_disk_and_are_known_by_their_certificate(self):
        self.begin()
        image = bytes(self.vm.disks['vda'].model.image)
        alice = self.client('alice')
        for unix in (False, True):
            self.assertSame(self.copied(self.uri(alice, unix=unix)), image, 'nbdcopy')
        out = f'{self.folder}/converted'
        harness.run(['qemu-img', 'convert', '--object', f'tls-creds-x509,id=t,endpoint=client,dir={alice}',
                     '--image-opts', IMAGE.format(self.port), '-O', 'raw', out])
        with open(out, 'rb') as f:
            self.assertSame(f.read(), image, 'qemu-img')
        words = harness.run(['nbdinfo', '--list', self.uri(alice, export='')]).stdout
        self.assertIn('vm/vda', words)
        h = nbdpull.connect(self.uri(alice), [nbdpull.ALLOCATION])
        self.assertTrue(h.get_tls_negotiated())
        self.assertSame(nbdpull.read_all(h), image, 'libnbd')
        self.assertTrue(nbdpull.read_map(h, nbdpull.ALLOCATION))
        known = self.daemon.ask('query-status')['connections'][0]
        self.assertEqual((known['client'], known['origin']), ('x509:CN=alice', 'ip:127.0.0.1'))
        self.assertIn('TLS1.3', known['tls']['session'])
        self.assertIn('AES-128-GCM', known['tls']['session'])
        # One client is one session, whatever it comes by; another certificate is another client.
        second = nbdpull.connect(self.uri(alice, unix=True))
        second.shutdown()
        self.assertBad(self.uri(self.client('bob')), 'in session')
        h.shutdown()
        self.daemon.wait_idle()
        self.assertGood(self.uri(self.client('bob')))
        self.end()

    def test_who_has_no_good_certificate_gets_nothing(self):
        self.begin()
        other = f'{self.folder}/other'
        tlsworld.qpull('certs', 'init', other, '--client=alice')
        make = lambda name, words: tlsworld.make_client(self.pki, name, words)  # noqa: E731
        self.assertGood(self.uri(make('made', 'tls_www_client')))
        for folder, *reasons in (
                (make('expired', 'tls_www_client\nactivation_date = "2020-01-01"\nexpiration_date = "2021-01-01"'),
                 'expired'),
                (make('early', 'tls_www_client\nactivation_date = "2100-01-01"\nexpiration_date = "2101-01-01"'),
                 'not yet valid'),
                (make('wrong-use', 'tls_www_server'), 'purpose', 'is NOT trusted')):
            self.assertBad(self.uri(folder), *(f'certificate is refused: {w}' for w in ('', *reasons)))
            self.assertTrue(any(w in self.log_text() for w in reasons), reasons)
        # Of another authority: ours must be told of by hand, else the client itself ends it.
        mixed = f'{self.folder}/mixed'
        os.makedirs(mixed)
        for name, place in (('ca-cert.pem', self.pki), ('client-cert.pem', f'{other}/clients/alice'),
                            ('client-key.pem', f'{other}/clients/alice')):
            os.symlink(f'{place}/{name}', f'{mixed}/{name}')
        self.assertBad(self.uri(mixed), 'certificate is refused')
        self.assertBad(self.uri(f'{other}/clients/alice'), *THEIR_END)
        only_ca = f'{self.folder}/only-ca'
        os.makedirs(only_ca)
        os.symlink(f'{self.pki}/ca-cert.pem', f'{only_ca}/ca-cert.pem')
        self.assertBad(self.uri(only_ca), 'Certificate is required')
        self.assertEqual(self.daemon.ask('query-status')['tls']['failed'], 6)
        self.end()

    def test_rules_know_clients_by_subject_and_names(self):
        rules = ('cn:alice=vm', 'dn:CN=of-dn*=vm/list', 'san:*.backup.example=vm', 'san:spiffe://x/*=vm')
        self.begin(allow=rules)
        self.assertGood(self.uri(self.client('alice')))
        self.daemon.wait_idle()
        self.assertBad(self.uri(self.client('bob')), 'c2 refused: ')
        for name, words, well in (('h', 'dns_name = "h.backup.example"', True), ('u', 'uri = "spiffe://x/y"', True),
                                  ('e', 'dns_name = "h.backup.example.org"', False),
                                  ('alice2', 'cn = "alice"', False),  # which of the two?
                                  ('of-dn', '', False)):
            folder = tlsworld.make_client(self.pki, name, f'tls_www_client\n{words}')
            (self.assertGood if well else lambda u: self.assertBad(u, ' refused: '))(self.uri(folder))
            self.daemon.wait_idle()
        self.assertIn('vm/vda', harness.run(['nbdinfo', '--list', self.uri(f'{self.pki}/of-dn', export='')]).stdout)
        self.assertNotIn('vda', harness.run(['nbdinfo', '--list', self.uri(self.client('bob'), export='')],
                                            check=False).stdout)
        self.end()

    def test_reload_takes_new_lists_and_certificates_and_leaves_sessions_alone(self):
        self.begin()
        alice, bob = self.client('alice'), self.client('bob')
        stays = nbdpull.connect(self.uri(alice))
        image = nbdpull.read_all(stays)
        reload = lambda: self.daemon.process.send_signal(signal.SIGHUP)  # noqa: E731
        tlsworld.revoke(self.pki, bob)
        self.assertBad(self.uri(bob), 'in session')  # nobody looked yet: refused for another reason only
        reload()
        self.logged('with a revocation list')
        self.assertBad(self.uri(bob), 'revoked')
        self.assertSame(nbdpull.read_all(stays), image, 'the session of before')
        stays.shutdown()
        self.daemon.wait_idle()
        self.assertGood(self.uri(alice))
        # A reload that fails changes nothing.
        os.rename(f'{self.pki}/server-key.pem', f'{self.folder}/kept-key')
        reload()
        self.logged('stay in use')
        self.assertGood(self.uri(alice))
        os.rename(f'{self.folder}/kept-key', f'{self.pki}/server-key.pem')
        # Another authority altogether, while somebody reads.
        stays = nbdpull.connect(self.uri(alice))
        new = f'{self.folder}/new'
        tlsworld.qpull('certs', 'init', new, '--client=carol')
        tlsworld.revoke(new)
        for name in ('ca-cert.pem', 'ca-crl.pem', 'server-cert.pem', 'server-key.pem'):
            os.replace(f'{new}/{name}', f'{self.pki}/{name}')
        reload()
        reload()
        harness.wait_until(lambda: self.log_text().count('info: TLS: ') >= 3, 20, 'another reload')  # of two signals
        self.assertSame(nbdpull.read_all(stays), image, 'the session of before')
        stays.shutdown()
        self.daemon.wait_idle()
        self.assertBad(self.uri(alice), *THEIR_END)
        self.assertGood(self.uri(f'{new}/clients/carol'))
        self.end()

    def test_a_list_that_is_gone_for_a_moment_lets_no_revoked_one_in(self):
        self.begin()
        bob = self.client('bob')
        self.daemon.stop()
        tlsworld.revoke(self.pki, bob)
        self.daemon.start()
        self.daemon.wait_idle()
        self.port = self.daemon.tcp_port()
        self.assertBad(self.uri(bob), 'revoked')
        os.rename(f'{self.pki}/ca-crl.pem', f'{self.folder}/kept-list')
        before = len(self.log_text())
        self.daemon.process.send_signal(signal.SIGHUP)
        harness.wait_until(lambda: 'TLS: ' in self.log_text()[before:] or 'SIGHUP: ' in self.log_text()[before:], 20,
                           'the reload')
        self.assertBad(self.uri(bob), 'revoked')
        self.assertRegex(self.log_text()[before:], r'error: SIGHUP: the revocation list .*/pki/ca-crl\.pem is gone '
                                                   r'\(.*restart qpulld.*\); the certificates .* stay in use')
        self.assertGood(self.uri(self.client('alice')))
        os.rename(f'{self.folder}/kept-list', f'{self.pki}/ca-crl.pem')
        before = len(self.log_text())
        self.daemon.process.send_signal(signal.SIGHUP)
        harness.wait_until(lambda: 'with a revocation list' in self.log_text()[before:], 20, 'the reload')
        self.assertBad(self.uri(bob), 'revoked')
        # Who wants none any more says so by a restart.
        os.unlink(f'{self.pki}/ca-crl.pem')
        self.daemon.stop()
        self.daemon.start()
        self.daemon.wait_idle()
        self.port = self.daemon.tcp_port()
        self.assertGood(self.uri(bob))
        self.end()

    def refused_start(self, *flags):
        """What a daemon says that does not begin."""
        made = [f'--{k}={self.folder}/run/{k}' for k in ('state', 'scratch', 'control', 'pidfile')]
        done = harness.run([f'{harness.bin_dir()}/qpulld', f'--vm=vm={self.folder}/none', *made, '--tls=on',
                            f'--listen=unix:{self.folder}/run/nbd', f'--tls-certs={self.pki}', *flags],
                           check=False, timeout=20)
        self.assertEqual(done.returncode, 1, done.stderr)
        return done.stderr

    def own_folders(self, uid):
        for name in ('run', 'run/state', 'run/scratch'):
            os.mkdir(f'{self.folder}/{name}')
            os.chown(f'{self.folder}/{name}', uid, -1)

    def test_a_list_that_cannot_be_read_is_not_taken_for_none(self):
        self.pki = f'{self.folder}/pki'
        tlsworld.qpull('certs', 'init', self.pki, '--client=bob')
        self.own_folders(-1)
        crl = f'{self.pki}/ca-crl.pem'
        os.symlink(f'{self.folder}/nowhere', crl)
        self.assertRegex(self.refused_start(), f'cannot read the revocation list {crl}: No such file')
        os.unlink(crl)
        for text in ('', 'no list\n'):
            with open(crl, 'w', encoding='ascii') as f:
                f.write(text)
            self.assertRegex(self.refused_start(), f'{crl}: ')
        os.unlink(crl)
        os.mkdir(crl)
        self.assertRegex(self.refused_start(), f'{crl}: ')

    @unittest.skipIf(os.geteuid(), 'only root can become another user')
    def test_a_list_in_a_folder_that_the_user_may_not_enter_is_not_taken_for_none(self):
        nobody = pwd.getpwnam('nobody').pw_uid
        self.pki = f'{self.folder}/pki'
        tlsworld.qpull('certs', 'init', self.pki, '--client=bob')
        tlsworld.revoke(self.pki, self.client('bob'))
        os.chmod(self.folder, 0o711)
        self.own_folders(nobody)
        os.chmod(self.pki, 0o755)
        self.assertRegex(self.refused_start('--user=nobody'),  # as certs init leaves it
                         f'server-key.pem: Permission denied; this is user {nobody}: give it to that user')
        os.chown(f'{self.pki}/server-key.pem', nobody, -1)
        os.mkdir(f'{self.folder}/root', mode=0o700)
        os.rename(f'{self.pki}/ca-crl.pem', f'{self.folder}/root/ca-crl.pem')
        os.symlink(f'{self.folder}/root/ca-crl.pem', f'{self.pki}/ca-crl.pem')
        self.assertRegex(self.refused_start('--user=nobody'),
                         f'cannot read the revocation list {self.pki}/ca-crl.pem: Permission denied')

    def test_old_versions_are_not_spoken(self):
        self.begin()
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            raw = tlsworld.starttls(rawnbd.Raw(self.address), self.client('alice'), version)
            raw.go('vm/vda')
            self.assertEqual(raw.read(0, 512), (0, bytes(self.vm.disks['vda'].model.image[:512])))
            raw.disc()
            self.daemon.wait_idle()
        door = tlsworld.Door(self, self.address)
        mine = [f'--x509{a}file={self.client("alice")}/client-{b}.pem' for a, b in (('cert', 'cert'), ('key', 'key'))]
        good = tlsworld.gnutls_cli(door.port, *mine)
        self.assertIn(b'Handshake was completed', good.stdout)
        for priority in ('NORMAL:-VERS-ALL:+VERS-TLS1.1', 'NORMAL:-VERS-ALL:+VERS-TLS1.0',
                         'NORMAL:-KX-ALL:+ANON-ECDH:-VERS-TLS1.3', 'NORMAL:-CIPHER-ALL:+NULL:-VERS-TLS1.3'):
            bad = tlsworld.gnutls_cli(door.port, *mine, f'--priority={priority}')
            self.assertNotIn(b'Handshake was completed', bad.stdout, priority)
            self.assertNotEqual(bad.returncode, 0)
        self.end()


class Keys(tlsworld.TlsCase):
    def test_stock_clients_copy_the_disk_and_are_known_by_their_key(self):
        self.begin(psk=True)
        image = bytes(self.vm.disks['vda'].model.image)
        self.assertSame(self.copied(self.psk_uri('alice')), image, 'nbdcopy')
        out = f'{self.folder}/converted'
        harness.run(['qemu-img', 'convert', '--object',
                     f'tls-creds-psk,id=t,endpoint=client,username=bob,dir={self.keys}/clients/bob',
                     '--image-opts', IMAGE.format(self.port), '-O', 'raw', out])
        with open(out, 'rb') as f:
            self.assertSame(f.read(), image, 'qemu-img')
        h = nbdpull.connect(self.psk_uri('alice'))
        self.assertEqual(self.daemon.ask('query-status')['connections'][0]['client'], 'psk:alice')
        h.shutdown()
        self.daemon.wait_idle()
        self.end()

    def test_wrong_keys_and_unknown_users_look_alike_and_get_nothing(self):
        self.begin(psk=True)
        wrong = f'{self.folder}/wrong'
        with open(wrong, 'w', encoding='utf-8') as f:
            f.write('alice:' + '00' * 32 + '\nmallory:' + '00' * 32 + '\n')
        said = []
        for user in ('alice', 'mallory'):
            self.assertBad(self.psk_uri(user, wrong), 'the TLS handshake failed', 'the client ended TLS')
            said.append(self.reads(self.psk_uri(user, wrong))[1])
        self.assertEqual(said[0], said[1].replace('mallory', 'alice'))
        # A certificate is no key.
        self.assertBad(self.uri(self.client('alice')), 'the TLS handshake failed', 'the client ended TLS')
        # Only exchanges that keep old traffic secret when a key is lost.
        door = tlsworld.Door(self, self.address)
        with open(f'{self.keys}/clients/alice/keys.psk', encoding='utf-8') as f:
            mine = ['--pskusername=alice', f'--pskkey={f.read().strip().split(":")[1]}']
        for priority, well in (('ECDHE-PSK:-VERS-TLS1.3', True), ('DHE-PSK:-VERS-TLS1.3', True),
                               ('PSK:-VERS-TLS1.3', False), ('RSA-PSK:-VERS-TLS1.3', False),
                               ('ECDHE-PSK:-VERS-ALL:+VERS-TLS1.3', True), ('PSK:-VERS-ALL:+VERS-TLS1.3', False)):
            before = len(self.log_text())
            tlsworld.gnutls_cli(door.port, *mine, f'--priority=NORMAL:-KX-ALL:+{priority}')
            verdict = 'is psk:alice' if well else 'the TLS handshake failed'  # gnutls-cli 3.7 crashes after some
            harness.wait_until(lambda: verdict in self.log_text()[before:], 20, f'{priority}: {verdict}')
        # A key that is taken away counts no more after a reload.
        self.assertGood(self.psk_uri('alice'))
        with open(f'{self.keys}/keys.psk', encoding='utf-8') as f:
            rest = [line for line in f if not line.startswith('alice:')]
        with open(f'{self.keys}/keys.psk', 'w', encoding='utf-8') as f:
            f.writelines(rest)
        self.daemon.process.send_signal(signal.SIGHUP)
        self.logged('1 pre-shared key in')
        self.assertBad(self.psk_uri('alice'), 'the TLS handshake failed', 'the client ended TLS')
        self.assertGood(self.psk_uri('bob'))
        self.end()


class Init(tlsworld.TlsCase):
    def test_nbdkit_takes_the_same_files(self):
        if not shutil.which('nbdkit'):
            self.skipTest('missing: nbdkit')
        pki, keys = f'{self.folder}/pki', f'{self.folder}/psk'
        tlsworld.qpull('certs', 'init', pki, '--host=storage.example', '--host=192.0.2.1')  # a client called "client"
        tlsworld.qpull('certs', 'init', keys, '--psk=alice')
        for flags, uri in (([f'--tls-certificates={pki}', '--tls-verify-peer'],
                            f'nbds+unix:///?socket=$unixsocket&tls-certificates={pki}/clients/client'),
                           ([f'--tls-psk={keys}/keys.psk'],
                            f'nbds+unix://alice@/?socket=$unixsocket&tls-psk-file={keys}/clients/alice/keys.psk')):
            done = harness.run(['nbdkit', '--tls=require', *flags, '-U', '-', 'memory', '1M', '--run',
                                f'nbdinfo --size "{uri}"'])
            self.assertEqual(done.stdout.strip(), str(1 << 20))

    def test_nothing_is_made_anew_and_keys_are_for_their_owner_only(self):
        self.begin()
        paths = {}

        def look():
            return {os.path.join(d, n): (open(os.path.join(d, n), 'rb').read(), os.stat(os.path.join(d, n)).st_mode)
                    for d, _, names in os.walk(self.folder + '/pki') for n in names}
        paths = look()
        self.assertEqual(len(paths), 4 + 2 * 3)
        old = os.umask(0)
        try:
            tlsworld.qpull('certs', 'init', self.pki, '--client=alice', '--client=carol')
            tlsworld.qpull('certs', 'init', self.keys, '--psk=carol')
        finally:
            os.umask(old)
        now = look()
        self.assertEqual({p: now[p] for p in paths}, paths)
        self.assertEqual(len(now), len(paths) + 3)
        for path, (_, mode) in now.items():
            self.assertEqual(mode & 0o777, 0o600 if 'key' in os.path.basename(path) else 0o644, path)
        self.assertEqual(os.stat(f'{self.keys}/keys.psk').st_mode & 0o777, 0o600)
        with open(f'{self.keys}/keys.psk', encoding='utf-8') as f:
            self.assertEqual([line.split(':')[0] for line in f], ['alice', 'bob', 'carol'])
        self.assertGood(self.uri(self.client('carol')))  # no reload: the authority is the same
        for words in (['--client=../x'], ['--client='], ['--psk=a b'], ['--client=a', '--psk=b'], ['--host=other']):
            done = tlsworld.qpull('certs', 'init', self.pki, *words, check=False)
            self.assertNotEqual(done.returncode, 0, words)
            self.assertEqual(done.stderr.count('\n'), 1, done.stderr)
        self.assertEqual(look(), now)
        self.end()


if __name__ == '__main__':
    harness.main()
