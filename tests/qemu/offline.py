# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of powered-off VMs share: images that a daemon serves, and what is in them."""
import json
import os
import time

import harness
import nbdpull

DIRTY = 'qemu:dirty-bitmap:'


def storage_daemons(daemon):
    """The pids of the qemu-storage-daemon processes that this qpulld has started and that are not gone."""
    return [int(pid) for pid in os.listdir('/proc') if pid.isdigit() and is_of(pid, daemon.process.pid)]


def is_of(pid, parent):
    try:
        with open(f'/proc/{pid}/stat', encoding='utf-8') as f:
            words = f.read().rpartition(')')
        return int(words[2].split()[1]) == parent and 'qemu-storage' in words[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_alive(pid):
    """Runs; a zombie does not."""
    try:
        with open(f'/proc/{pid}/stat', encoding='utf-8') as f:
            return f.read().rpartition(')')[2].split()[0] not in 'ZX'
    except (FileNotFoundError, ProcessLookupError):
        return False


def records(path):
    """{bitmap's name: its flags, as a set} as they stand in the file of an image that nobody holds."""
    info = json.loads(harness.run(['qemu-img', 'info', '--output=json', path]).stdout)
    found = info.get('format-specific', {}).get('data', {}).get('bitmaps', [])
    return {b['name']: set(b['flags']) for b in found}


def io(path, *commands, fmt='qcow2'):
    """qemu-io's commands on an image that nobody holds."""
    words = [w for c in commands for w in ('-c', c)]
    harness.run(['qemu-io', '-f', fmt, *words, path])


def content(path, fmt='qcow2', share=False):
    """The disk in an image, through qemu-img."""
    out = f'{path}.converted'
    harness.run(['qemu-img', 'convert', *(['-U'] if share else []), '-f', fmt, '-O', 'raw', path, out])
    with open(out, 'rb') as f:
        data = bytearray(f.read())
    os.unlink(out)
    return data


class OfflineCase(harness.Case):
    def serve(self, images, **options):
        """A daemon with nothing but these images: {disk: [FORMAT:]path}, of the VM "vm"."""
        flags = [f'--image=vm/{disk}={path}' for disk, path in images.items()]
        return self.qpulld({}, flags=flags + list(options.pop('flags', ())), **options)

    def wait_closed(self, daemon, timeout=15):
        """The images are let go: no session, no process, no socket."""
        def is_closed():
            nonlocal vm
            vm = daemon.vm()
            return vm['session'] is None and vm['state'] == 'closed'
        vm = None
        try:
            harness.wait_until(is_closed, timeout, 'the images\' end')
        except TimeoutError as e:
            raise TimeoutError(f'{e}; the daemon says {vm}') from None
        self.assertEqual(storage_daemons(daemon), [])
        self.assertEqual(daemon.files_left(), [])

    def offered(self, daemon, export='vm/vda'):
        found = nbdpull.list_contexts(daemon.uri(export), [DIRTY])
        return {name[len(DIRTY):] for name in found if name.startswith(DIRTY)}

    def reasons(self, daemon):
        return {(c['disk'], c['name']): c['reason'] for c in daemon.ask('query-checkpoints', {'vm': 'vm'})}

    def check(self, path):
        harness.run(['qemu-img', 'check', '-q', path])

    def the_process(self, daemon):
        pids = storage_daemons(daemon)
        self.assertEqual(len(pids), 1)
        return pids[0]

    @staticmethod
    def wait_gone(pid, timeout=15):
        began = time.monotonic()
        harness.wait_until(lambda: not is_alive(pid), timeout, f'the end of process {pid}')
        return time.monotonic() - began
