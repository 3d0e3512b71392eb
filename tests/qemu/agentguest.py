# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest with Debian's guest agent and an ext4 file system on its disk "fs", on which it works."""
import os
import re
import unittest

import fakeagent
import harness
import nbdpull
from harness import MIB, Disk

MODULES = 'crc32c_generic,ext4'


def ext4_disk(folder, size=96 * MIB, fmt='raw'):
    """A Disk with an empty file system."""
    plain, path = f'{folder}/fs.plain', f'{folder}/fs.{fmt}'
    with open(plain, 'wb') as f:
        f.truncate(size)
    harness.run(['mkfs.ext4', '-q', '-F', '-O', '^64bit', plain])
    harness.run(['qemu-img', 'convert', '-f', 'raw', '-O', fmt, plain, path])
    os.unlink(plain)
    return Disk('fs', size, fmt=fmt, path=path)


class AgentGuest(harness.Guest):
    """.qga_path is for qpulld. The agent runs when agent('start') was said."""

    def __init__(self, folder, disks, **options):
        if not harness.guest_parts()['agent']:
            raise unittest.SkipTest('missing: qemu-ga (Debian: qemu-guest-agent)')
        self.qga_path = f'{folder}/vm.qga'
        super().__init__(folder, disks, **options)

    def arguments(self):
        if os.path.exists(self.qga_path):
            os.unlink(self.qga_path)
        args = super().arguments()
        args[args.index('-initrd') + 1] = harness.guest_parts()['agent']
        append = args.index('-append') + 1
        args[append] = re.sub(r'(qpull_modules=\S+)', rf'\1,{MODULES}', args[append])
        return args + ['-chardev', f'socket,id=qga,path={self.qga_path},server=on,wait=off',
                       '-device', 'virtserialport,chardev=qga,name=org.qemu.guest_agent.0']

    def agent(self, what):
        """start, hang, wake, kill."""
        self.cmd(f'agent {what}')

    def files(self):
        """{'ops', 'errors', 'slowest-us' since the last question, 'idle-us'} of the program that works with files."""
        return self.numbers('files status')

    def work(self):
        """Mounts "fs" and begins to work with files there."""
        self.cmd('mount fs')
        self.cmd('files start')
        harness.wait_until(lambda: self.files()['ops'] > 50, 60, 'a guest at work')

    def assert_works_on(self, timeout=30):
        ops = self.files()['ops']
        harness.wait_until(lambda: self.files()['ops'] > ops + 5, timeout, 'the guest\'s next operations')


def needs_recovery(path):
    """Whether that raw image's file system was not clean: its journal is to be replayed."""
    return 'needs_recovery' in harness.run(['dumpe2fs', '-h', path]).stdout


def fsck(path):
    """Exit status of a check that changes nothing."""
    return harness.run(['e2fsck', '-f', '-n', path], check=False).returncode


class Case(harness.Case):
    def boot(self, agent=True):
        guest = AgentGuest(self.folder, [ext4_disk(self.folder, fmt='qcow2')], start=False)
        self.things.append(guest)
        guest.start()
        if agent:
            guest.agent('start')
        guest.work()
        self.before = guest.state()
        return guest

    def daemon(self, guest, mode, monitor=None, **options):
        daemon = self.qpulld({'vm': monitor or guest}, linger=0, flags=[f'--qga=vm={guest.qga_path}', f'--quiesce={mode}'], **options)
        daemon.wait_idle()
        return daemon

    def pull(self, daemon):
        """Pulls the disk: (path of the copy, what the daemon said of the session)."""
        path = f'{self.folder}/copy'
        h = nbdpull.connect(daemon.uri('vm/fs'))
        session = daemon.ask('query-sessions')[0]
        with open(path, 'wb') as f:
            f.write(nbdpull.read_all(h))
        h.shutdown()
        daemon.wait_idle()
        return path, session

    def finish(self, guest, daemon):
        guest.assert_works_on()
        self.assertEqual(guest.files()['errors'], 0)
        guest.check()
        self.assertNothingLeft(guest, daemon, self.before)
        harness.wait_until(lambda: not fakeagent.watchdogs(daemon), 20, 'the end of the watchdogs')

    def written(self, daemon):
        with open(daemon.log_path) as f:
            return f.read()
