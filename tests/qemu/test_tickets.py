#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tickets: who has one reads that export, once, whatever the rules say; who has none, or a used one, finds nothing."""
import json
import os
import re
import shutil
import subprocess
import unittest

import harness
import nbd
import nbdpull
import rawnbd
import tlsworld
from harness import MIB, Disk

NOBODY = 65534
SIZE = 8 * MIB


def refusal(address, export, option=rawnbd.OPT_GO):
    return rawnbd.refused(rawnbd.Raw(address), export, option)


class Tickets(harness.Case):
    def world(self, flags=(), linger=0):
        """A VM and TCP without the rule that the harness has for it: nobody is allowed there."""
        self.vm = self.bare(Disk('vda', SIZE), Disk('vdb', SIZE))
        self.vm.write('vda', 0, MIB, 7)
        self.vm.write('vdb', MIB, MIB, 8)
        self.before = self.vm.state()
        self.daemon = self.qpulld(self.vm, linger=linger, flags=['--listen=tcp:127.0.0.1:0', *flags])
        self.daemon.wait_idle()
        return self.daemon

    def begin(self, *words):
        """The session, and {disk: {'unix' or 'tcp': URI}}."""
        begun = self.daemon.json('begin', 'vm', '--ticket', *words)
        self.uris = {d['disk']: {'unix' if '+unix' in u else 'tcp': u for u in d['uris']} for d in begun['disks']}
        return begun['session']

    def token(self, disk='vda'):
        return re.search(r'ticket-[0-9a-f]{64}', self.uris[disk]['tcp']).group(0)

    def tcp(self):
        return '127.0.0.1', self.daemon.tcp_port()

    def assertDead(self, name):
        """It is answered as a name that never was, by every option and on every socket."""
        never = 'ticket-' + '0' * 64
        for address in (self.tcp(), self.daemon.socket):
            for option in (rawnbd.OPT_GO, rawnbd.OPT_INFO):
                self.assertEqual(refusal(address, name, option), refusal(address, never, option))
                self.assertEqual(refusal(address, name, option), refusal(address, 'abc', option))
        self.assertEqual(refusal(self.tcp(), name)[0], rawnbd.ERR_UNKNOWN)

    def assertSecret(self, *names):
        """No name of a ticket, nor a part of one, is where somebody could read it."""
        told = self.daemon.log() + json.dumps(self.daemon.ask('query-status')) + \
            json.dumps(self.daemon.ask('query-sessions')) + json.dumps(self.daemon.ask('query-vms'))
        with open(self.daemon.log_path, encoding='utf-8', errors='replace') as f:
            told += f.read()
        for name in names:
            secret = name.removeprefix('ticket-')
            self.assertFalse(any(secret[i:i + 16] in told for i in range(0, 64, 16)), 'the secret is told')
        self.assertNotIn('ticket-0', told)

    def test_stock_clients_read_by_ticket_where_nobody_is_allowed_and_each_is_good_once(self):
        daemon, out = self.world(), f'{self.folder}/out.raw'
        wanted = {d: bytes(self.vm.disks[d].model.image) for d in self.vm.disks}
        commands = {
            'nbdcopy': lambda uri: ['nbdcopy', '--connections=4', '--requests=16', '--request-size=65536', uri, out],
            'qemu-img': lambda uri: ['qemu-img', 'convert', '-f', 'raw', '-O', 'raw', uri, out],
        }
        seen = []
        for way in ('tcp', 'unix'):
            for name, command in commands.items():
                with self.subTest(f'{name}, {way}'):
                    session = self.begin()
                    self.vm.write('vda', 4 * MIB, 4096, 33)
                    for disk in ('vda', 'vdb'):
                        harness.run(command(self.uris[disk][way]))
                        with open(out, 'rb') as f:
                            self.assertSame(f.read(), wanted[disk], disk)
                        self.assertDead(self.token(disk))
                        self.assertNotEqual(harness.run(command(self.uris[disk][way]), check=False).returncode, 0)
                        seen.append(self.token(disk))
                    self.assertEqual(daemon.ask('query-sessions')[0]['begun']['tickets'], 0)
                    daemon.qpull('end', session)
                    wanted = {d: bytes(self.vm.disks[d].model.image) for d in self.vm.disks}
        with open(daemon.log_path, encoding='utf-8') as f:
            self.assertRegex(f.read(), r'c\d+ open: vm/vda for \S+ by a ticket')
        self.assertSecret(*seen)
        self.assertNothingLeft(self.vm, daemon, self.before)

    def test_nbdinfo_knows_what_a_ticket_opens_but_not_whose_it_is(self):
        self.world()
        self.begin('--checkpoint', 'monday')
        told = harness.run(['nbdinfo', '--json', '--no-content', self.uris['vda']['tcp']]).stdout
        export = json.loads(told)['exports'][0]
        self.assertEqual(export['export-size'], SIZE)
        self.assertIn('base:allocation', export['contexts'])
        self.assertNotIn('vm/vda', told)
        self.assertNotIn('monday', told)
        maps = json.loads(harness.run(['nbdinfo', '--map', '--json', self.uris['vdb']['unix']]).stdout)
        self.assertEqual(sum(e['length'] for e in maps), SIZE)
        self.assertDead(self.token('vdb'))  # that opened it; the other one only asked
        self.assertSecret(self.token('vda'), self.token('vdb'))

    def test_looking_uses_nothing_up_and_lists_never_have_it(self):
        daemon = self.world(flags=['--allow=ip:127.0.0.1=vm/list'])
        self.begin()
        name = self.token()
        for _ in range(2):
            self.assertEqual(nbdpull.list_contexts(self.uris['vda']['tcp'])[0], 'base:allocation')
            raw = rawnbd.Raw(self.tcp())
            raw.go(name, rawnbd.OPT_INFO)
            raw.close()
        h, found = nbd.NBD(), []
        h.set_opt_mode(True)
        h.connect_uri(daemon.tcp_uri(''))
        h.opt_list(lambda export, _: found.append(export) or 0)
        h.opt_abort()
        self.assertEqual(sorted(found), ['vm/vda', 'vm/vdb'])
        with self.assertRaises(nbd.Error):  # the session's own name is not open to who has a ticket for it
            nbdpull.connect(daemon.tcp_uri('vm/vda'))
        nbdpull.connect(self.uris['vda']['tcp']).shutdown()
        self.assertSecret(name)

    def test_it_is_its_first_client_s_alone_who_may_have_several_connections_and_come_back(self):
        self.world(linger=2)
        self.begin()
        uri = self.uris['vda']['unix']
        several = [nbdpull.connect(uri) for _ in range(3)]
        for h in several:
            self.assertEqual(h.pread(512, 0), b'\7' * 512)
        other = harness.run(['nbdinfo', '--size', uri], check=False)
        self.assertNotEqual(other.returncode, 0, 'another process')
        with self.assertRaises(nbd.Error):  # the same process from elsewhere
            nbdpull.connect(self.uris['vda']['tcp'])
        for h in several:
            nbdpull.drop(h)
        again = nbdpull.connect(uri)  # its network broke, and came back within --linger
        self.assertEqual(again.pread(512, 0), b'\7' * 512)
        nbdpull.drop(again)
        harness.wait_until(lambda: self.daemon.ask('query-sessions')[0]['begun']['tickets'] == 1, 20, 'the linger')
        self.assertDead(self.token())
        with self.assertRaises(nbd.Error):
            nbdpull.connect(uri)

    def test_after_its_ttl_or_its_session_it_is_as_if_it_had_never_been(self):
        daemon = self.world()
        for ttl in (1, 5, 25):
            self.begin('--ttl', str(ttl))
            expired = self.token()
            try:
                h = nbdpull.connect(self.uris['vdb']['tcp'])
                break
            except nbd.Error:  # its time was up before the client could come
                daemon.wait_idle()
        daemon.wait_idle(60)
        self.assertDead(expired)
        with self.assertRaises(nbd.Error):
            h.pread(512, 0)
        session = self.begin()
        ended = self.token()
        daemon.qpull('end', session)
        self.assertDead(ended)
        # a later session of the same VM is not theirs
        self.begin()
        self.assertDead(expired)
        self.assertDead(ended)
        self.assertSecret(expired, ended, self.token())

    def test_guessing_finds_nothing_asks_qemu_nothing_and_is_not_logged(self):
        daemon = self.world()
        self.begin()
        name = self.token()
        asked = daemon.log().count('query-named-block-nodes')
        with open(daemon.log_path, encoding='utf-8') as f:
            before = len(f.read())
        never = refusal(self.tcp(), 'ticket-' + '0' * 64)
        guesses = [name[:-1], name + '0', name.upper(), 'ticket-', name[7:], '/' + name, name + '@x', 'vm/' + name]
        for i in range(7, len(name), 5):
            guesses.append(name[:i] + ('1' if name[i] == '0' else '0') + name[i + 1:])
        guesses += [f'ticket-{harness.rng.randrange(1 << 256):064x}' for _ in range(200)]
        for guess in guesses:
            self.assertEqual(refusal(self.tcp(), guess), never, guess)
        with open(daemon.log_path, encoding='utf-8') as f:
            log = f.read()[before:]
        self.assertEqual(daemon.log().count('query-named-block-nodes') - asked, 0)
        for guess in guesses:
            if guess.startswith('ticket-') and len(guess) > 20:
                self.assertNotIn(guess[7:], log)
        self.assertNotRegex(log, 'asks|query-')
        nbdpull.connect(self.uris['vda']['tcp']).shutdown()  # and it is still good
        self.assertDead(name)

    def test_an_increment_can_be_pulled_by_ticket_and_committed_by_who_began(self):
        daemon = self.world()
        first = self.begin('--checkpoint', 'one')
        base = nbdpull.pull(self.uris['vda']['tcp'])
        daemon.qpull('end', first, '--commit')
        self.vm.write('vda', 2 * MIB, MIB, 9)
        second = self.begin('--checkpoint', 'two', '--disk', 'vda')
        self.assertEqual(list(self.uris), ['vda'])
        wanted = bytes(self.vm.disks['vda'].model.image)
        data, extents = nbdpull.pull_changes(self.uris['vda']['tcp'], 'one', base)
        self.assertSame(data, wanted)
        self.assertEqual(nbdpull.ranges_with(extents), [(2 * MIB, MIB)])
        daemon.qpull('end', second, '--commit')
        found = {(c['name'], c['disk']) for c in daemon.ask('query-checkpoints', {'vm': 'vm'})}
        self.assertEqual(found, {('one', 'vda'), ('one', 'vdb'), ('two', 'vda')})

    @unittest.skipIf(os.geteuid(), 'only root can be another user')
    def test_another_user_may_come_by_ticket_where_he_can_reach_the_socket(self):
        daemon = self.world()
        self.begin()
        os.chmod(self.folder, 0o711)
        os.chmod(daemon.socket, 0o666)
        done = subprocess.run(['nbdcopy', self.uris['vda']['unix'], 'null:'], user=NOBODY, group=NOBODY,
                              extra_groups=[], text=True, timeout=60, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual((done.returncode, done.stdout), (0, ''))
        self.assertDead(self.token())


class TlsTickets(tlsworld.TlsCase):
    def test_where_tls_must_be_used_a_ticket_is_said_inside_it_only(self):
        if not shutil.which('nbdcopy'):
            self.skipTest('missing: nbdcopy')
        self.begin('require', allow=())
        out = f'{self.folder}/out.raw'
        begun = self.daemon.json('begin', 'vm', '--ticket')
        uri = next(u for u in begun['disks'][0]['uris'] if '+unix' not in u).replace('127.0.0.1', 'localhost')
        self.assertTrue(uri.startswith('nbds://'))
        name = re.search(r'ticket-[0-9a-f]{64}', uri).group(0)
        raw = rawnbd.Raw(('127.0.0.1', self.daemon.tcp_port()))
        with self.assertRaises(rawnbd.Refused) as caught:
            raw.go(name)
        raw.close()
        self.assertEqual(caught.exception.error, rawnbd.ERROR | 5)  # TLS_REQD
        alice = f'{uri}?tls-certificates={self.pki}/clients/alice'
        harness.run(['nbdcopy', '--connections=4', '--requests=4', '--request-size=65536', alice, out])
        with open(out, 'rb') as f:
            self.assertSame(f.read(), bytes(self.vm.disks['vda'].model.image))
        self.assertNotEqual(harness.run(['nbdcopy', alice, out], check=False).returncode, 0)
        begun2 = self.daemon.json('end', begun['session'])
        self.assertIsNone(begun2['problems'])
        # another certificate cannot go on where alice reads
        begun = self.daemon.json('begin', 'vm', '--ticket')
        uri = next(u for u in begun['disks'][0]['uris'] if '+unix' not in u).replace('127.0.0.1', 'localhost')
        h = nbdpull.connect(f'{uri}?tls-certificates={self.pki}/clients/alice')
        with self.assertRaises(nbd.Error):
            nbdpull.connect(f'{uri}?tls-certificates={self.pki}/clients/bob')
        self.assertEqual(h.pread(512, 0), b'\1' * 512)
        h.shutdown()


if __name__ == '__main__':
    harness.main()
