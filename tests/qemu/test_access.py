#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may see and do what: other users on the unix sockets, addresses, rights; what one may not see is not there."""
import json
import os
import signal
import socket
import subprocess
import unittest

import harness
import nbd
import nbdpull
import rawnbd
from harness import MIB, Disk
from qmpclient import Qmp, QmpError

NOBODY = 65534


def as_nobody(*argv):
    return subprocess.run(argv, user=NOBODY, group=NOBODY, extra_groups=[], text=True, timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


class Silent:
    """A client of the control socket that says nothing; of any user. .first is the first document that it hears."""

    def __init__(self, case, path, uid=NOBODY):
        self.sock = socket.socket(socket.AF_UNIX)
        case.addCleanup(self.sock.close)
        self.sock.settimeout(30)
        os.seteuid(uid)
        try:
            self.sock.connect(path)
        finally:
            os.seteuid(0)
        self.file = self.sock.makefile('r', encoding='utf-8')
        case.addCleanup(self.file.close)
        self.first = self.hear()

    def hear(self):
        """The next document; None: the end."""
        line = self.file.readline()
        return json.loads(line) if line else None

    def is_in(self):
        return 'QMP' in self.first

    def error(self):
        return self.first['error']['desc']


def names(uri):
    """What NBD_OPT_LIST tells."""
    h, found = nbd.NBD(), []
    h.set_opt_mode(True)
    h.connect_uri(uri)
    h.opt_list(lambda name, _: found.append(name) or 0)
    h.opt_abort()
    return sorted(found)


def refusal(daemon, export, option=rawnbd.OPT_GO):
    """As rawnbd.refused(), on TCP."""
    return rawnbd.refused(rawnbd.Raw(('127.0.0.1', daemon.tcp_port())), export, option)


class Access(harness.Case):
    def world(self, *rules, flags=()):
        """Two VMs; TCP without the rule that the harness has for it."""
        self.web = self.bare(Disk('vda', 8 * MIB), name='web')
        self.db = self.bare(Disk('vdb', 8 * MIB), name='db')
        for guest in (self.web, self.db):
            guest.write(next(iter(guest.disks)), 0, MIB, 1)
        daemon = self.qpulld({'web': self.web, 'db': self.db}, linger=0,
                             flags=['--listen=tcp:127.0.0.1:0'] + [f'--allow={r}' for r in rules] + list(flags))
        os.chmod(self.folder, 0o711)
        for vm in ('web', 'db'):
            daemon.wait_idle(name=vm)
        return daemon

    def rules(self, text):
        """Writes the configuration's file; the flag that names it."""
        path = f'{self.folder}/qpulld.conf'
        with open(path, 'w', encoding='ascii') as f:
            f.write(text)
        return f'--config={path}'

    def test_nobody_on_tcp_sees_or_gets_anything_until_it_is_allowed(self):
        daemon = self.world()
        uri = daemon.tcp_uri('')
        self.assertEqual(names(uri), [])
        self.assertEqual(refusal(daemon, ''), (rawnbd.ERR_UNKNOWN, 'there is no VM to export from'))
        for option in (rawnbd.OPT_GO, rawnbd.OPT_INFO):
            self.assertEqual(refusal(daemon, 'web/vda', option), refusal(daemon, 'xyz/vda', option))
        self.assertRegex(refusal(daemon, 'web/vda')[1], 'there is no export')
        self.assertEqual(names(daemon.uri('')), ['db/vdb', 'web/vda'], 'root, on the unix socket')
        self.assertEqual(daemon.vm('web')['session'], None)

    def test_what_a_rule_does_not_name_is_not_there(self):
        daemon = self.world('ip:127.0.0.0/8=web')
        self.assertEqual(names(daemon.tcp_uri('')), ['web/vda'])
        h = nbdpull.connect(daemon.tcp_uri(''))  # the empty name: the only disk that it sees
        self.assertEqual(h.pread(MIB, 0), b'\1' * MIB)
        h.shutdown()
        self.assertEqual(refusal(daemon, 'db/vdb'), refusal(daemon, 'xy/vda'))
        self.assertEqual(nbdpull.list_contexts(daemon.tcp_uri('web/vda'))[0], 'base:allocation')
        with self.assertRaises(nbd.Error):
            nbdpull.list_contexts(daemon.tcp_uri('db/vdb'))

    def test_each_right_gives_what_it_says_and_no_more(self):
        daemon = self.world('ip:127.0.0.1=web/list,db/pull')
        self.assertEqual(names(daemon.tcp_uri('')), ['web/vda'])
        self.assertRegex(refusal(daemon, 'web/vda')[1], 'ip:127.0.0.1 may not pull disks of VM "web"')
        self.assertRegex(refusal(daemon, 'db/vdb@monday')[1], 'may not make checkpoints')
        h = nbdpull.connect(daemon.tcp_uri('db/vdb'))
        self.assertEqual(h.pread(MIB, 0), b'\1' * MIB)
        h.shutdown()
        daemon.wait_idle(name='db')
        self.assertEqual(daemon.ask('query-checkpoints', {'vm': 'db'}), [])
        nbdpull.connect(daemon.uri('db/vdb@monday')).shutdown()

    @unittest.skipIf(os.geteuid(), 'only root can be another user')
    def test_another_user_cannot_connect_unless_a_rule_names_it(self):
        daemon = self.world()
        for path in (daemon.socket, daemon.control):
            self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        self.assertRegex(as_nobody('nbdinfo', '--list', daemon.uri('')).stdout, 'Permission denied')

    @unittest.skipIf(os.geteuid(), 'only root can be another user')
    def test_a_user_may_do_what_its_rules_say_with_their_vms_on_both_sockets(self):
        daemon = self.world(f'uid:{NOBODY}=web', 'user:nobody=db/checkpoint', f'gid:{NOBODY}=none-of-them/control')
        listed = as_nobody('nbdinfo', '--list', '--json', daemon.uri('')).stdout
        self.assertEqual([e['export-name'] for e in json.loads(listed)['exports']], ['web/vda'])
        done = as_nobody('nbdinfo', '--size', daemon.uri('web/vda'))
        self.assertEqual(done.stdout.strip(), str(8 * MIB))
        self.assertRegex(as_nobody('nbdcopy', daemon.uri('db/vdb'), 'null:').stdout, 'has no export named')

        qpull = [f'{os.path.dirname(daemon.program)}/qpull', '--control', daemon.control]
        vms = json.loads(as_nobody(*qpull, 'vms', '--json').stdout)
        self.assertEqual([v['name'] for v in vms], ['web'])
        self.assertEqual(as_nobody(*qpull, 'checkpoint', 'create', 'web', 'mine').returncode, 0)
        self.assertEqual(as_nobody(*qpull, 'checkpoint', 'create', 'db', 'mine').returncode, 0)
        self.assertRegex(as_nobody(*qpull, 'checkpoint', 'list', 'db').stdout, 'may not say query-checkpoints')
        self.assertRegex(as_nobody(*qpull, 'disks', 'xyz').stdout, 'There is no VM "xyz"')
        self.assertRegex(as_nobody(*qpull, 'doctor', 'web').stdout, 'may not say doctor')
        self.assertRegex(as_nobody(*qpull, 'status').stdout, 'may not say query-status')
        self.assertRegex(as_nobody(*qpull, 'metrics').stdout, 'may not say metrics')

    @unittest.skipIf(os.geteuid(), 'only root can be another user')
    def test_a_vm_one_may_do_nothing_with_is_as_one_that_is_not_there(self):
        daemon = self.world('user:nobody=web/list+control')
        qpull = [f'{os.path.dirname(daemon.program)}/qpull', '--control', daemon.control]
        for words in (('disks',), ('checkpoint', 'list'), ('doctor',)):
            there, missing = (as_nobody(*qpull, *words, vm) for vm in ('db', 'xy'))
            self.assertEqual(there.stdout.replace('db', ''), missing.stdout.replace('xy', ''))
            self.assertEqual(there.returncode, missing.returncode)
            self.assertRegex(there.stdout, 'There is no VM')
        self.assertEqual(as_nobody(*qpull, 'doctor', 'web').returncode, 0)

    @unittest.skipIf(os.geteuid(), 'only root can be another user')
    def test_events_are_told_to_those_who_see_the_vm(self):
        daemon = self.world('user:nobody=web/list')
        os.seteuid(NOBODY)
        try:
            control = Qmp(daemon.control)
        finally:
            os.seteuid(0)
        for vm in ('db', 'web'):
            daemon.ask('checkpoint-create', {'vm': vm, 'name': 'new'})
        self.assertEqual(control.wait_event('CHECKPOINT_CREATED')['data']['vm'], 'web')
        with self.assertRaisesRegex(QmpError, 'may not say checkpoint-delete'):
            control('checkpoint-delete', {'vm': 'web', 'name': 'new'})
        control.close()

    @unittest.skipIf(os.geteuid(), 'only root can be another user')
    def test_one_user_has_a_few_places_at_the_control_socket_and_shuts_nobody_out(self):
        daemon = self.world('user:nobody=web/list', 'uid:4711=web/list')
        crowd = [Silent(self, daemon.control) for _ in range(40)]
        self.assertEqual(daemon.ask('query-status')['stopping'], False, 'root')
        self.assertTrue(Silent(self, daemon.control, 4711).is_in(), 'another user')
        self.assertEqual([c.is_in() for c in crowd], [True] * 8 + [False] * 32)
        for one in crowd[8:]:
            self.assertEqual(one.error(), f'user {NOBODY} has 8 connections to this socket already, the most that one '
                                          'may have; close some')
            self.assertIsNone(one.hear())
        qpull = [f'{os.path.dirname(daemon.program)}/qpull', '--control', daemon.control]
        self.assertRegex(as_nobody(*qpull, 'vms').stdout, 'turns us away: user .* has 8 connections to this socket')
        self.assertLess(daemon.log().count('is turned away'), 10, 'the log is not filled')
        self.assertRegex(daemon.log(), r'control client \d+ \(process \d+\) is turned away: user')
        crowd[0].sock.shutdown(socket.SHUT_RDWR)
        harness.wait_until(lambda: Silent(self, daemon.control).is_in(), 10, 'the place')

    @unittest.skipIf(os.geteuid(), 'only root can be another user')
    def test_many_users_leave_root_its_places_at_the_control_socket(self):
        daemon = self.world('any=web/list')
        users = [Silent(self, daemon.control, 5000 + i // 8) for i in range(32)]
        self.assertEqual([c.is_in() for c in users], [True] * 24 + [False] * 8)
        self.assertRegex(users[-1].error(), 'the 24 places that users other than root may have')
        ours = [Silent(self, daemon.control, 0) for _ in range(9)]
        self.assertEqual([c.is_in() for c in ours], [True] * 8 + [False])
        self.assertRegex(ours[-1].error(), 'all 32 places at this socket are taken')

    def test_who_does_not_negotiate_at_the_control_socket_is_let_go(self):
        daemon = self.world(flags=['--handshake-timeout=1'])
        stays, silent = Qmp(daemon.control), Silent(self, daemon.control, os.geteuid())
        self.assertTrue(silent.is_in())
        self.assertEqual(silent.hear()['error']['desc'],
                         '"qmp_capabilities" was not said within 1 seconds (--handshake-timeout)')
        self.assertIsNone(silent.hear())
        self.assertEqual(len(stays('query-vms')), 2)
        stays.close()

    @unittest.skipIf(os.geteuid(), 'only root can be another user')
    def test_sighup_closes_the_control_socket_to_whom_no_rule_names_any_more(self):
        daemon = self.world(flags=[self.rules('[allow]\nuser:nobody = web\nuid:4711 = web\n')])
        out, stays, root = (Silent(self, daemon.control, uid) for uid in (NOBODY, 4711, 0))
        self.assertEqual([c.is_in() for c in (out, stays, root)], [True] * 3)
        self.rules('[allow]\nuid:4711 = web/list\n')
        daemon.process.send_signal(signal.SIGHUP)
        self.assertEqual(out.hear()['error']['desc'], f'user {NOBODY} may not use this socket (--allow)')
        self.assertIsNone(out.hear())
        self.assertEqual(Silent(self, daemon.control).error(), f'user {NOBODY} may not use this socket (--allow)')
        for one in (stays, root):
            one.sock.sendall(b'{"execute": "qmp_capabilities"}')
            self.assertEqual(one.hear(), {'return': {}})

    def test_sighup_brings_new_rules_and_leaves_those_who_are_in_alone(self):
        daemon = self.world(flags=[self.rules('[allow]\nip:127.0.0.1 = web, db/list\n')])
        self.assertEqual(names(daemon.tcp_uri('')), ['db/vdb', 'web/vda'])
        h = nbdpull.connect(daemon.tcp_uri('web/vda'))
        self.rules('[allow]\nany = db\n')
        daemon.process.send_signal(signal.SIGHUP)
        harness.wait_until(lambda: names(daemon.tcp_uri('')) == ['db/vdb'], 10, 'the new rules')
        self.assertEqual(h.pread(MIB, 0), b'\1' * MIB)
        h.shutdown()
        self.assertRegex(refusal(daemon, 'web/vda')[1], 'there is no export')
        self.rules('[allow]\nalice = *\n')
        daemon.process.send_signal(signal.SIGHUP)
        harness.wait_until(lambda: 'nothing was changed' in daemon.log(), 10, 'the complaint')
        self.assertRegex(daemon.log(), rf'{self.folder}/qpulld.conf:2: "alice" is none of user:NAME')
        self.assertEqual(names(daemon.tcp_uri('')), ['db/vdb'])


if __name__ == '__main__':
    harness.main()
