# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of a VM's life during a session share."""
import json

import harness
import nbdpull
from harness import MIB, Disk, QmpError
from qmpclient import Qmp

DISCARDED = (16 * MIB, 8 * MIB)  # offset, length
LEGACY = 16 * MIB
ACPI_POWEROFF = 'o /h 0x604 0x2000'  # PM1a control of the "pc" machine: sleep type 0, sleep enable
ACPI_SUSPEND = 'o /h 0x604 0x2400'  # likewise, sleep type 1
PANIC = 'o /b 0x505 1'  # -device pvpanic


def acpi(vm, line, done):
    """Says it to the machine until it has had its effect: the firmware makes that port work some time after the start."""
    def said():
        if done():
            return True
        try:
            vm.hmp(line)
        except ConnectionError:  # QEMU ends
            pass
        return done()
    harness.wait_until(said, 60, line, every=0.2)


def image_bitmaps(disk):
    info = json.loads(harness.run(['qemu-img', 'info', '--output=json', disk.path]).stdout)
    found = info['format-specific']['data'].get('bitmaps', [])
    return {b['name']: 'in-use' in b['flags'] for b in found}


class Case(harness.Case):
    def begin(self, **options):
        """vda and vdb by node name, vdo the old way (-drive), each with data; a session with checkpoint 'new'."""
        self.disks = [Disk('vda', 32 * MIB + 3 * 512), Disk('vdb', 24 * MIB)]
        path = f'{self.folder}/old.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, str(LEGACY)])
        self.vm = self.guest(*self.disks, extra=[
            '-drive', f'id=old,if=none,format=qcow2,discard=unmap,file={path}',
            '-device', 'virtio-blk-pci,id=vdo,drive=old,serial=vdo', '-device', 'ide-cd,id=cd0,bus=ide.0'], **options)
        self.vm.disks['vdo'] = Disk('vdo', LEGACY)
        self.vm.disks['vdo'].path, self.vm.disks['vdo'].model = path, harness.model.Model(harness.library(), LEGACY)
        for name in self.vm.disks:
            self.vm.write(name, 0, 4 * MIB, 7)
        self.vm.write('vda', *DISCARDED, 8)
        self.vm.flush('vda')
        self.tool = Qmp(self.vm.spare_qmp_path)
        self.addCleanup(self.tool.close)
        self.daemon = self.qpulld(self.vm, linger=0)
        self.daemon.wait_idle()
        self.before = self.vm.state()
        self.pulls = {name: nbdpull.connect(self.daemon.uri(f'vm/{name}@new')) for name in self.vm.disks}
        self.frozen = {name: bytes(d.model.image) for name, d in self.vm.disks.items()}

    def refused(self, words, command, arguments):
        with self.assertRaises(QmpError) as caught:
            self.tool(command, arguments)
        self.assertRegex(caught.exception.desc, words)

    def hmp(self, line):
        return self.tool('human-monitor-command', {'command-line': line})

    def image(self, name, size, fmt='qcow2', add=True):
        path = f'{self.folder}/{name}.{fmt}'
        harness.run(['qemu-img', 'create', '-q', '-f', fmt, path, str(size)])
        if add:
            self.tool('blockdev-add', {'driver': fmt, 'node-name': name, 'discard': 'unmap', 'backing': None,
                                       'file': {'driver': 'file', 'filename': path, 'discard': 'unmap'}})
        return path

    def check_frozen(self, names=None):
        for name in names or self.pulls:
            self.assertSame(nbdpull.read_all(self.pulls[name]), self.frozen[name], f'the frozen {name}')

    def check_alive(self):
        self.assertEqual(self.daemon.ask('query-sessions')[0]['status'], 'UP')
        self.vm.check()

    def end(self, problems=None):
        for h in self.pulls.values():
            h.shutdown()
        self.daemon.wait_idle()
        last = self.daemon.vm()['last-session']
        self.assertIsNone(last['failure'])
        self.assertEqual(last['problems'], problems)
        self.assertEqual(self.vm.deleted_fds(), [])
        self.assertEqual(self.daemon.files_left(), [])
        self.vm.check()

    def new_checkpoints(self, daemon=None):
        return {c['disk']: c['usable'] for c in self.daemon.ask('query-checkpoints', {'vm': 'vm'}) if c['name'] == 'new'}

    def bare_legacy(self, extra=()):
        path = f'{self.folder}/old.qcow2'
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', path, str(LEGACY)])
        self.vm = self.bare(Disk('vda', 4 * MIB), extra=[
            '-drive', f'id=old,if=none,format=qcow2,file={path}', '-device', 'virtio-blk-pci,id=vdo,drive=old', *extra])
        self.tool = Qmp(self.vm.spare_qmp_path)
        self.addCleanup(self.tool.close)
        self.daemon = self.qpulld(self.vm, linger=0)
        self.daemon.wait_idle()
        self.before = self.vm.state()
