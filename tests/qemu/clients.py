# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VM, a daemon and clients that behave badly (badclients.py), for the tests about them."""
import subprocess
import time

import badclients
import harness
import nbdpull
import prometheus
from harness import MIB, Disk

ANSWER = 10  # seconds in which QEMU answers a command that drains; a client that it waited for would never let it


class ClientCase(harness.Case):
    def begin(self, flags=(), **options):
        self.vm = self.guest(Disk('vda', 32 * MIB), **options)
        self.vm.write('vda', 0, 32 * MIB, 1)
        self.before = self.vm.state()
        self.daemon = self.qpulld(self.vm, linger=1, flags=flags)
        self.frozen = bytes(self.vm.disks['vda'].model.image)

    def metrics(self):
        return prometheus.parse(self.daemon.qpull('metrics').stdout)

    def bad(self, kind, count):
        process = harness.spawn(['/usr/bin/python3', badclients.__file__, kind, self.daemon.socket, 'vm/vda',
                                 str(count)], stdout=subprocess.PIPE, text=True)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.assertEqual(process.stdout.readline(), 'ready\n', kind)
        return process

    def rss(self):
        with open(f'/proc/{self.daemon.process.pid}/status', encoding='ascii') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmRSS'))

    def good_pull(self):
        began = time.monotonic()
        data = nbdpull.pull(self.daemon.uri('vm/vda'))
        self.assertSame(data, self.frozen)
        return time.monotonic() - began

    def qemu_answers(self):
        """A transaction drains all disks; an unread reply of QEMU's to any client of its own would hold it up."""
        began = time.monotonic()
        self.vm.look('stop')
        self.vm.look('cont')
        self.vm.look('transaction', {'actions': [{'type': 'block-dirty-bitmap-add',
                                                  'data': {'node': 'node-vda', 'name': 'drained'}}]})
        self.vm.look('block-dirty-bitmap-remove', {'node': 'node-vda', 'name': 'drained'})
        self.assertLess(time.monotonic() - began, ANSWER)

    def end(self):
        self.daemon.wait_idle(60)
        self.assertNothingLeft(self.vm, self.daemon, self.before)
        self.vm.check()
        self.daemon.stop()
