# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs inside a system that systemd has booted, with qpull installed (tests/scripts/test_the_systemd_unit_*): what the
unit's sandbox leaves of qpulld, and what it must leave."""
import json
import os
import pwd
import shutil
import subprocess
import sys
import unittest

import agentguest
import harness
import nbdpull
from harness import MIB, Disk

CONFIG, DROP_IN = '/etc/qpull/qpulld.conf', '/etc/systemd/system/qpulld.service.d/group.conf'
CONTROL = '/run/qpull/control.sock'
GROUP = 'qemu-vms'  # who may write to QEMU's sockets
POWERED_OFF = '/var/lib/vms/off.qcow2'


def systemctl(*words, check=True):
    return harness.run(['systemctl', *words], check)


def journal():
    return harness.run(['journalctl', '-u', 'qpulld', '-o', 'cat', '--no-pager', '-n', '60']).stdout


class Installed(harness.Qpulld):
    """The daemon of the unit: what of harness.Qpulld does not start it or end it."""

    def __init__(self):
        self.control, self.socket = CONTROL, '/run/qpull/nbd.sock'

    def qpull(self, *args, check=True, timeout=60):
        return harness.run(['qpull', *args], check, timeout)

    @property
    def pid(self):
        return int(systemctl('show', '-P', 'MainPID', 'qpulld').stdout)


class Unit(agentguest.Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        harness.run(['systemd-sysusers'])
        harness.run(['groupadd', '--system', GROUP])
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', POWERED_OFF, '16M'])
        harness.run(['qemu-io', '-c', 'write -q -P 9 1M 1M', POWERED_OFF])
        shutil.chown(POWERED_OFF, group=GROUP)
        os.chmod(POWERED_OFF, 0o640)

    def configure(self, *vms, allow=(), drop_in=f'SupplementaryGroups={GROUP}', more=()):
        lines = ['[server]', 'linger = 0', 'max-pause = 30', *more]
        lines += ['[allow]', *allow] * bool(allow)
        for vm in vms:
            lines += [f'[vm "{vm.name}"]', f'qmp = {vm.qmp_path}']
            os.chmod(self.folder, 0o755)
            for path in (vm.qmp_path, getattr(vm, 'qga_path', None)):
                if path:
                    shutil.chown(path, group=GROUP)
                    os.chmod(path, 0o660)
            if getattr(vm, 'qga_path', None):
                lines += [f'qga = {vm.qga_path}', 'quiesce = require']
        lines += ['[vm "off"]', f'image.vda = {POWERED_OFF}']
        os.makedirs(os.path.dirname(CONFIG), exist_ok=True)
        with open(CONFIG, 'w', encoding='utf-8') as f:
            f.write('\n'.join(lines) + '\n')
        os.makedirs(os.path.dirname(DROP_IN), exist_ok=True)
        with open(DROP_IN, 'w', encoding='utf-8') as f:
            f.write(f'[Service]\n{drop_in}\n')
        systemctl('daemon-reload')

    def begin(self, *vms, **how):
        self.configure(*vms, **how)
        self.addCleanup(systemctl, 'stop', 'qpulld', check=False)
        done = systemctl('restart', 'qpulld', check=False)
        self.assertEqual(done.returncode, 0, journal())
        daemon = Installed()
        for vm in vms:
            if GROUP in how.get('drop_in', GROUP):
                daemon.wait_idle(name=vm.name)
        return daemon

    def test_it_has_no_rights_and_needs_none(self):
        vm = self.bare(Disk('vda', 16 * MIB))
        daemon = self.begin(vm)
        with open(f'/proc/{daemon.pid}/status', encoding='ascii') as f:
            status = dict(line.rstrip('\n').split(':\t', 1) for line in f if ':\t' in line)
        self.assertEqual(set(status['Uid'].split()), {str(pwd.getpwnam('qpull').pw_uid)})
        self.assertEqual([int(status[s], 16) for s in ('CapEff', 'CapPrm', 'CapBnd', 'CapAmb')], [0] * 4)
        self.assertEqual((status['NoNewPrivs'], status['Seccomp']), ('1', '2'))
        self.assertGreater(int(status['Seccomp_filters']), 1, 'systemd\'s filter, and its own')
        self.assertEqual(daemon.qpull('doctor').returncode, 0)
        for path, mode in (('/run/qpull', 0o755), ('/var/lib/qpull', 0o700), (CONTROL, 0o600)):
            self.assertEqual(os.stat(path).st_mode & 0o777, mode, path)

    def test_without_the_group_the_doctor_says_so_and_with_it_all_is_well(self):
        vm = self.bare(Disk('vda', 16 * MIB))
        daemon = self.begin(vm, drop_in='')
        done = daemon.qpull('doctor', check=False)
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn(f'{self.folder}/vm.qmp', done.stdout)
        self.assertIn(GROUP, done.stdout)
        self.configure(vm)
        systemctl('restart', 'qpulld')
        daemon.wait_idle()
        self.assertEqual(daemon.qpull('doctor').returncode, 0)

    def test_full_and_increment_by_unix_and_tls(self):
        vm = self.bare(Disk('vda', 16 * MIB))
        tls = '/etc/qpull/tls'
        shutil.rmtree(tls, ignore_errors=True)
        harness.run(['qpull', 'certs', 'init', tls, '--host', 'localhost', '--client', 'backup'])
        for folder, _, files in os.walk(tls):
            for path in [folder] + [f'{folder}/{f}' for f in files]:
                shutil.chown(path, 'qpull')
        daemon = self.begin(vm, allow=['cn:backup = *'], more=[
            'listen = unix:/run/qpull/nbd.sock', 'listen = tcp:127.0.0.1:10809', 'tls = require', f'tls-certs = {tls}'])
        before = vm.state()
        vm.write('vda', MIB, MIB, 1)
        by_tls = f'nbds://localhost/vm/vda@first?tls-certificates={tls}/clients/backup'
        by_unix = f'nbds+unix:///vm/vda@second?socket=/run/qpull/nbd.sock&tls-certificates={tls}/clients/backup&tls-hostname=localhost'
        copied = f'{self.folder}/full'
        harness.run(['nbdcopy', by_tls, copied])
        with open(copied, 'rb') as f:
            self.assertSame(f.read(), vm.disks['vda'].model.image, 'the full copy')
        daemon.wait_idle()
        vm.write('vda', 5 * MIB, MIB, 2)
        rows = json.loads(harness.run(['nbdinfo', '--json', '--map=qemu:dirty-bitmap:first', by_unix]).stdout)
        self.assertEqual([(r['offset'], r['length']) for r in rows if r['type']], [(5 * MIB, MIB)])
        refused = harness.run(['nbdinfo', 'nbd://localhost/vm/vda'], check=False)
        self.assertNotEqual(refused.returncode, 0)
        daemon.wait_idle()
        self.assertEqual(list(vm.state()['nodes']), list(before['nodes']))

    def test_a_powered_off_vm(self):
        daemon = self.begin()
        image = nbdpull.pull(daemon.uri('off/vda'))
        self.assertEqual(image, bytes(MIB) + b'\t' * MIB + bytes(14 * MIB))

    def test_killed_it_comes_back_and_undoes_what_it_left(self):
        vm = self.bare(Disk('vda', 16 * MIB))
        daemon = self.begin(vm)
        before = vm.state()
        h = nbdpull.connect(daemon.uri('vm/vda'))
        self.assertNotEqual(vm.state()['nodes'], before['nodes'])
        killed = daemon.pid
        systemctl('kill', '--kill-whom=main', '-s', 'KILL', 'qpulld')
        harness.wait_until(lambda: daemon.pid not in (0, killed) and
                           systemctl('is-active', 'qpulld', check=False).returncode == 0, 30, 'another daemon')
        daemon.wait_idle()
        self.assertEqual(vm.state(), before)
        nbdpull.drop(h)
        vm.write('vda', 0, MIB, 3)
        self.assertSame(nbdpull.pull(daemon.uri('vm/vda')), vm.disks['vda'].model.image, 'the pull after it')

    def test_stopped_during_a_pull_it_leaves_nothing(self):
        vm = self.bare(Disk('vda', 16 * MIB))
        daemon = self.begin(vm)
        before = vm.state()
        h = nbdpull.connect(daemon.uri('vm/vda'))
        systemctl('stop', 'qpulld')
        self.assertEqual(systemctl('show', '-P', 'Result', 'qpulld').stdout.strip(), 'success', journal())
        self.assertEqual(vm.state(), before)
        self.assertEqual(os.path.exists(CONTROL), False)
        nbdpull.drop(h)

    def test_a_reload_reads_the_rules_anew(self):
        vm = self.bare(Disk('vda', 16 * MIB))
        daemon = self.begin(vm)
        as_nobody = ['setpriv', '--reuid=nobody', '--clear-groups', 'nbdinfo', '--size', daemon.uri('vm/vda')]
        self.assertNotEqual(harness.run(as_nobody, check=False).returncode, 0)
        pid = daemon.pid
        self.configure(vm, allow=['user:nobody = vm/list+pull'])
        systemctl('reload', 'qpulld')
        harness.wait_until(lambda: harness.run(as_nobody, check=False).returncode == 0, 10, 'a right for nobody')
        self.assertEqual(daemon.pid, pid)

    def test_a_frozen_guest_is_thawed_although_the_daemon_is_killed(self):
        vm = self.boot()
        # Its successor would thaw, too.
        daemon = self.begin(vm, drop_in=f'SupplementaryGroups={GROUP}\nRestart=no')
        struck = []

        def strike():
            if not struck and any(n.endswith('-quiesce0') for n in vm.state()['nodes']):
                systemctl('kill', '--kill-whom=main', '-s', 'KILL', 'qpulld')
                struck.append(True)
            return struck or ended.poll() is not None
        for _ in range(10):  # some tenths of a second, in which we may stand still
            ended = subprocess.Popen(['nbdinfo', '--size', daemon.uri('vm/fs')], stderr=subprocess.DEVNULL)
            harness.wait_until(strike, 60, 'a guest that is being frozen', every=0.001)
            ended.wait(60)
            if struck:
                break
            daemon.wait_idle()
        self.assertTrue(struck, 'the session was over before it could be struck')
        vm.assert_works_on()
        self.assertNotEqual(systemctl('is-active', 'qpulld', check=False).stdout.strip(), 'active')


if __name__ == '__main__':
    unittest.main(argv=[sys.argv[0], '-v', *sys.argv[1:]])
