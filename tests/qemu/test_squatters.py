#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What other users of the machine learn of a daemon by the names of its sockets, and what they can do by taking them."""
import os
import pwd
import re
import subprocess
import unittest

import harness
import nbdpull
from harness import MIB

NOBODY = pwd.getpwnam('nobody')
SQUATTER = '''
import os, socket, sys
os.setgroups([])
os.setresgid(*[int(sys.argv[2])] * 3)
os.setresuid(*[int(sys.argv[1])] * 3)
kept = []
for name in sys.argv[3:]:
    s = socket.socket(socket.AF_UNIX)
    s.bind('\\0' + name)
    s.listen(1)
    kept.append(s)
print('ready', flush=True)
sys.stdin.read()
'''
VM = 'a-name-that-is-nobodys-business'


def unix_sockets():
    """What everybody may read of the names of sockets."""
    with open('/proc/net/unix', encoding='utf-8', errors='replace') as f:
        return [line.split(maxsplit=7)[7].rstrip('\n') for line in f if line.count(' ') and len(line.split()) > 7]


@unittest.skipIf(os.geteuid(), 'only root can be another user, too')
class Squatters(harness.Case):
    def squat(self, *names):
        process = subprocess.Popen(['/usr/bin/python3', '-c', SQUATTER, str(NOBODY.pw_uid), str(NOBODY.pw_gid),
                                    *names], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.addCleanup(process.wait)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stdin.close)
        self.assertEqual(process.stdout.readline(), 'ready\n')
        return process

    def test_no_name_of_a_vm_is_told_to_all_users(self):
        guest = self.guest()
        daemon = self.qpulld({VM: guest.qmp_path}, linger=0)
        self.assertEqual([n for n in unix_sockets() if VM in n], [])
        h = nbdpull.connect(daemon.uri(f'{VM}/vda'))
        h.pread(MIB, 0)
        self.assertEqual([n for n in unix_sockets() if VM in n], [], 'while a session stands')
        h.shutdown()
        daemon.wait_idle(name=VM)
        daemon.stop()

    def test_nobody_keeps_a_daemon_from_starting(self):
        guest = self.guest()
        daemon = self.qpulld(guest, linger=0)
        st = os.stat(daemon.state)
        daemon.stop()
        self.squat(f'qpull/state/{st.st_dev:x}:{st.st_ino:x}/vm')
        daemon.start()
        h = nbdpull.connect(daemon.uri('vm/vda'))
        h.pread(MIB, 0)
        h.shutdown()
        daemon.wait_idle()
        daemon.stop()

    def test_who_passes_a_dead_session_off_as_a_living_one_is_named(self):
        guest = self.guest()
        first = self.qpulld(guest, linger=60)
        nbdpull.connect(first.uri('vm/vda'))
        ids = {node.split('-')[1] for node in self.nodes(guest)}
        words = [n[1:] for n in set(unix_sockets()) if n.startswith('@qpull/') and n[len('@qpull/'):] in ids]
        self.assertEqual(len(words), 1)
        first.kill()
        squatter = self.squat(*words)
        second = self.qpulld(guest, linger=0, name='second')
        words = f'process {squatter.pid}, user {NOBODY.pw_uid}\\) is at work in this QEMU'
        harness.wait_until(lambda: re.search(words, second.log()), 30, 'its name in the log')
        self.assertTrue(self.nodes(guest), 'what may be alive is not touched')
        second.stop()
        squatter.stdin.close()
        squatter.wait()
        second.start()
        harness.wait_until(lambda: not self.nodes(guest), 30, 'the dead session\'s end')
        h = nbdpull.connect(second.uri('vm/vda'))
        h.pread(MIB, 0)
        h.shutdown()
        second.wait_idle()
        second.stop()
        guest.check()

    def nodes(self, guest):
        return [n['node-name'] for n in guest.look('query-named-block-nodes') if n['node-name'].startswith('qpull-')]


if __name__ == '__main__':
    harness.main()
