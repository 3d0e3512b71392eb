#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon still can do once it serves, what QEMU needs to be allowed, and what is told of secrets: nothing."""
import glob
import os
import pwd
import re
import signal
import stat
import unittest

import harness
import nbdpull
import tlsworld
from harness import MIB, Disk

os.environ['ASAN_OPTIONS'] = 'detect_leaks=0'  # LeakSanitizer is a debugger, which is what all this keeps out
NOBODY = pwd.getpwnam('nobody')


def status(pid, task=None):
    """/proc/PID/status of a process or of one thread."""
    with open(f'/proc/{pid}/task/{task}/status' if task else f'/proc/{pid}/status', encoding='ascii') as f:
        return dict(line.rstrip('\n').split(':\t', 1) for line in f if ':\t' in line)


def threads(daemon):
    return [status(daemon.process.pid, task) for task in os.listdir(f'/proc/{daemon.process.pid}/task')]


class LeastPrivilege(harness.Case):
    def own_folders(self, uid, gid):
        """What the daemon of that user has to write to is its own; the folder can be entered."""
        os.chmod(self.folder, 0o711)
        for name in ('qpulld.scratch', 'qpulld.state', 'run'):
            os.mkdir(f'{self.folder}/{name}')
            os.chown(f'{self.folder}/{name}', uid, gid)
            os.chmod(f'{self.folder}/{name}', 0o700)

    def daemon_as(self, guest, *flags):
        """Its sockets and its pidfile are in a folder of its own."""
        run = f'{self.folder}/run'
        daemon = harness.Qpulld(self.folder, {'vm': guest}, start=False, linger=0, flags=flags)
        daemon.flags = [f.replace(f'{self.folder}/qpulld.{e}', f'{run}/qpulld.{e}')
                        for f in daemon.flags for e in ('nbd', 'control', 'pid') if f.endswith(f'qpulld.{e}')] + \
            [f for f in daemon.flags if not re.search(r'qpulld\.(nbd|control|pid)$', f)]
        daemon.socket, daemon.control, daemon.pidfile = f'{run}/qpulld.nbd', f'{run}/qpulld.control', f'{run}/qpulld.pid'
        self.things.append(daemon)
        daemon.start()
        return daemon

    @unittest.skipIf(os.geteuid(), 'only root can become another user')
    def test_root_becomes_another_user_for_good_and_qemu_needs_no_path(self):
        self.own_folders(NOBODY.pw_uid, NOBODY.pw_gid)
        # QEMU gives up root, too, and is a third user: it may not even enter the folders of the daemon.
        other = ['-run-with', 'user=daemon'] if harness.qemu_version() >= (9, 1, 0) else ['-runas', 'daemon']
        guest = self.bare(Disk('vda', 16 * MIB), extra=other)
        os.chmod(guest.qmp_path, 0o666)
        guest.write('vda', 0, MIB, 1)
        before = guest.state()
        daemon = self.daemon_as(guest, '--user=nobody', '--sandbox=auto')
        self.assertNotIn('stays root', daemon.log())
        daemon.wait_idle()
        h = nbdpull.connect(daemon.uri('vm/vda'))
        guest.write('vda', 0, MIB, 2)
        self.assertEqual(h.pread(MIB, 0), b'\1' * MIB)
        self.look_at_scratch(guest, NOBODY.pw_uid)
        for one in threads(daemon):
            for key in ('Uid', 'Gid'):
                self.assertEqual(set(one[key].split()), {str(NOBODY.pw_uid if key == 'Uid' else NOBODY.pw_gid)})
            self.assertEqual(one['Groups'].split(), [str(NOBODY.pw_gid)])
            for key in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb'):
                self.assertEqual(int(one[key], 16), 0, key)
            self.assertEqual(one['NoNewPrivs'], '1')
        for path in (daemon.socket, daemon.control):
            self.assertEqual((os.stat(path).st_uid, os.stat(path).st_gid), (NOBODY.pw_uid, NOBODY.pw_gid))
        h.shutdown()
        daemon.wait_idle()
        self.assertNothingLeft(guest, daemon, before)
        self.assertRegex(daemon.qpull('doctor').stdout, r'qemu access +QEMU \(process \d+: user \d+, .*needs no right to any path of ours')
        daemon.stop()

    def look_at_scratch(self, guest, uid):
        """The files that QEMU holds for a session: without a name, for the daemon's user alone."""
        scratch = []
        for path in glob.glob(f'/proc/{guest.process.pid}/fd/*'):
            try:
                if 'qpulld.scratch' in os.readlink(path):
                    scratch.append(os.stat(path))
            except FileNotFoundError:  # of something else, which QEMU has closed
                pass
        self.assertTrue(scratch)
        for st in scratch:
            self.assertEqual((stat.S_IMODE(st.st_mode), st.st_nlink, st.st_uid), (0o600, 0, uid))
        self.assertEqual(os.listdir(f'{self.folder}/qpulld.scratch'), [])

    @unittest.skipIf(os.geteuid(), 'only root can stay root')
    def test_root_that_stays_root_is_told(self):
        guest = self.bare(Disk('vda', 8 * MIB))
        daemon = self.qpulld(guest, linger=0)
        self.assertRegex(daemon.log(), 'warning: this is root and stays root: say --user')
        daemon.stop()

    def test_scratch_has_no_name_and_is_for_its_owner_only_whatever_the_umask(self):
        guest = self.bare(Disk('vda', 8 * MIB))
        before = os.umask(0)
        try:
            daemon = self.qpulld(guest, linger=0)
        finally:
            os.umask(before)
        h = nbdpull.connect(daemon.uri('vm/vda'))
        guest.write('vda', 0, MIB, 2)
        self.look_at_scratch(guest, os.geteuid())
        h.shutdown()
        daemon.wait_idle()
        daemon.stop()

    @unittest.skipIf(os.geteuid(), 'only root can become another user')
    def test_folders_that_the_user_may_not_use_are_named_before_anything_begins(self):
        self.own_folders(NOBODY.pw_uid, NOBODY.pw_gid)
        for flag, words in (('state', 'state directory'), ('scratch', 'scratch directory'), ('pidfile', 'pidfile')):
            folder = f'{self.folder}/{flag}.root'
            os.makedirs(folder, mode=0o755)
            values = {'state': f'{self.folder}/qpulld.state', 'scratch': f'{self.folder}/qpulld.scratch',
                      'pidfile': f'{self.folder}/run/pid'}
            values[flag] = folder if flag != 'pidfile' else f'{folder}/pid'
            done = harness.run([f'{harness.bin_dir()}/qpulld', '--user=nobody', f'--vm=vm={self.folder}/none',
                                f'--control={self.folder}/run/c', f'--listen=unix:{self.folder}/run/n',
                                *(f'--{k}={v}' for k, v in values.items())], check=False, timeout=20)
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertRegex(done.stderr, f'for the user nobody: the .*{words}.*Permission denied')
            self.assertEqual(os.listdir(f'{self.folder}/run'), [], 'no socket stays')

    def test_every_thread_has_the_filter_and_off_is_off(self):
        guest = self.bare(Disk('vda', 8 * MIB))
        keys = f'{self.folder}/keys'
        tlsworld.qpull('certs', 'init', keys, '--psk=alice')
        for mode, filters, words in (('auto', '2', 'sandbox: system calls are limited'),
                                     ('require', '2', 'sandbox: system calls are limited'), ('off', '0', 'sandbox: off')):
            daemon = self.qpulld(guest, linger=0, name=mode,
                                 flags=[f'--sandbox={mode}', '--tls=on', f'--tls-psk={keys}/keys.psk', '--threads=3'])
            daemon.wait_idle()
            h = nbdpull.connect(daemon.uri('vm/vda'))
            self.assertEqual(len(h.pread(MIB, 0)), MIB)
            h.shutdown()
            found = threads(daemon)
            self.assertGreater(len(found), 3)
            self.assertEqual({t['Seccomp'] for t in found}, {filters}, mode)
            self.assertIn(words, daemon.log())
            daemon.stop()

    def test_no_secret_is_told_in_log_status_or_command_line(self):
        guest = self.bare(Disk('vda', 8 * MIB))
        keys = f'{self.folder}/keys'
        tlsworld.qpull('certs', 'init', keys, '--psk=alice', '--psk=bob')
        with open(f'{keys}/keys.psk', encoding='ascii') as f:
            secrets = [line.split(':')[1] for line in f.read().split()]
        self.assertEqual(len(secrets), 2)
        daemon = self.qpulld(guest, linger=0, flags=['--listen=tcp:127.0.0.1:0', '--tls=require',
                                                     f'--tls-psk={keys}/keys.psk', '--allow=psk:alice=*'])
        daemon.wait_idle()
        uri = f'nbds://alice@127.0.0.1:{daemon.tcp_port()}/vm/vda?tls-psk-file={keys}/clients/alice/keys.psk'
        h = nbdpull.connect(uri)
        told = [daemon.qpull(*words, check=False).stdout for words in
                (['status', '--json'], ['status'], ['vms', '--json'], ['doctor', '--json'], ['metrics'])]
        h.shutdown()
        with open(f'{keys}/keys.psk', 'a', encoding='ascii') as f:  # a broken line, between the secrets
            f.write('carol:no-hex-' + secrets[0] + '\n')
        daemon.process.send_signal(signal.SIGHUP)
        harness.wait_until(lambda: 'of before stay in use' in daemon.log(), 10, 'the complaint')
        with open(f'/proc/{daemon.process.pid}/cmdline', 'rb') as f:
            told.append(f.read().decode())
        with open(f'/proc/{daemon.process.pid}/environ', 'rb') as f:
            told.append(f.read().decode(errors='replace'))
        with open(daemon.log_path, encoding='utf-8') as f:
            told.append(f.read())
        told += [open(p, encoding='utf-8', errors='replace').read()  # noqa: SIM115
                 for p in glob.glob(f'{daemon.state}/**', recursive=True) if os.path.isfile(p)]
        self.assertTrue(any('psk:alice' in text for text in told), 'who it is may be told')
        for text in told:
            for secret in secrets:
                self.assertNotIn(secret, text)
                self.assertNotIn(secret.upper(), text)

    @unittest.skipIf(os.geteuid(), 'root has to be kept out')
    def test_the_doctor_names_the_mode_that_keeps_it_from_qemu(self):
        self.own_folders(NOBODY.pw_uid, NOBODY.pw_gid)
        guest = self.bare(Disk('vda', 8 * MIB))
        os.chmod(guest.qmp_path, 0o750)
        daemon = self.daemon_as(guest, '--user=nobody')
        harness.wait_until(lambda: 'Permission denied' in daemon.log(), 10, 'the refusal')
        done = daemon.qpull('doctor', check=False)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, rf"qmp access +qpulld's user nobody \(\d+\) may not write to the socket "
                                      rf"'{guest.qmp_path}': owner root \(0\), group root \(0\), mode 0750")
        self.assertRegex(done.stdout, rf"-> setfacl -m u:{NOBODY.pw_uid}:rw '{guest.qmp_path}'")
        os.chmod(guest.qmp_path, 0o666)
        daemon.wait_idle()
        self.assertNotIn('qmp access', daemon.qpull('doctor', check=False).stdout)


if __name__ == '__main__':
    harness.main()
