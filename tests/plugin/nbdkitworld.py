# SPDX-License-Identifier: LGPL-2.1-or-later
"""nbdkit with the plugin of this build, for the tests in Python; functions.sh is the same for those in shell."""
import os
import re
import shutil
import subprocess
import sys

import harness

PLUGIN = os.path.join(harness.bin_dir(), 'nbdkit-qpull-plugin.so')


def require():
    for what in (PLUGIN, shutil.which('nbdkit'), shutil.which('nbdinfo')):
        if not what or not os.path.exists(what):
            print(f'skipped: no {what or "nbdkit or nbdinfo"}', file=sys.stderr)
            sys.exit(harness.SKIPPED)


def environment():
    """With the sanitizer's library, where the plugin has one (see wake_sanitizer.c)."""
    libraries = subprocess.run(['ldd', PLUGIN], stdout=subprocess.PIPE, text=True, check=True).stdout
    found = re.search(r'=> (/\S*/lib[at]san\.so\S*) ', libraries)
    waker = f'{os.path.dirname(PLUGIN)}/../tests/plugin/wake_sanitizer.so'
    preload = {'LD_PRELOAD': f'{found.group(1)}:{waker}'} if found else {}
    return {**os.environ, 'ASAN_OPTIONS': 'detect_leaks=0', **preload}


class Nbdkit:
    """One nbdkit at .socket, all of whose words are in .log(). words: the plugin's parameters."""

    def __init__(self, case, *words, name='nbdkit'):
        self.folder, self.name = f'{case.folder}/{name}.d', name
        for place in ('', '/scratch', '/state'):
            os.makedirs(self.folder + place, exist_ok=True)
        self.socket, self.log_path = f'{self.folder}/nbd.sock', f'{self.folder}/log'
        pidfile = f'{self.folder}/pid'
        for left in (pidfile, self.socket):
            if os.path.exists(left):
                os.unlink(left)
        own = [] if any(w.startswith('server=') for w in words) else \
            [f'scratch={self.folder}/scratch', f'state={self.folder}/state', 'max-pause=30']
        with open(self.log_path, 'ab') as out:
            self.process = harness.spawn(['nbdkit', '-f', '-v', '-U', self.socket, '--pidfile', pidfile, PLUGIN, *words,
                                          *own], stderr=out, env=environment())
        harness.wait_until(lambda: os.path.exists(pidfile), 30, 'nbdkit')
        case.addCleanup(self.end)

    def uri(self, disk='vda'):
        return f'nbd+unix:///{disk}?socket={self.socket}'

    def info(self, disk='vda'):
        """nbdinfo's words, or None where it was refused."""
        done = harness.run(['nbdinfo', self.uri(disk)], check=False)
        return None if done.returncode else done.stdout

    def log(self):
        with open(self.log_path, encoding='utf-8', errors='replace') as f:
            return f.read()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self):
        """In order; 0 is its exit status, and no sanitizer has complained."""
        if self.process.poll() is None:
            self.process.terminate()
        status = self.process.wait(90)
        assert not re.search('Sanitizer|runtime error', self.log()), self.log()
        return status
