#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whole backups of one guest that libvirt runs, full and incremental, wall clock and CPU of everybody who takes part: a =
virtnbdbackup (through libvirtd), b = nbdcopy from qpulld into a qcow2 file (qemu-nbd), the increment into an overlay
by the few lines below that call libnbd. Both write to memory. b's files are compared with the disk.

    tests/bench/tool.py [--rounds N] [--mib N] [--json FILE] [--quick]

It needs root, for a libvirtd of its own in namespaces of its own: the libvirt of the machine is neither used nor seen."""
import os
import shutil
import sys
import time

import bench
import harness
import nbd
import nbdpull
import worlds
from bench import MIB
from qmpclient import Qmp

PROGRAMS = {'libvirtd': 'libvirt-daemon', 'virsh': 'libvirt-clients', 'virtnbdbackup': 'virtnbdbackup',
            'qemu-nbd': 'qemu-utils', 'nbdcopy': 'libnbd-bin', 'unshare': 'util-linux', 'mount': 'mount'}
PRIVATE = ('/etc/libvirt', '/run/libvirt', '/run/dbus', '/var/lib/libvirt', '/var/log/libvirt', '/var/cache/libvirt')
QEMU_USER, QEMU_ID = 'libvirt-qemu', 64055  # Debian's; libvirtd asks for its number even where it is told another
QEMU_CONF = """user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""
DOMAIN = """<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>bench</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type></os>
<devices><emulator>{qemu}</emulator><controller type='usb' model='none'/><memballoon model='none'/>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>
<target dev='vda' bus='virtio'/></disk></devices>
<qemu:commandline><qemu:arg value='-qmp'/><qemu:arg value='unix:{folder}/vm.qmp,server=on,wait=off'/>
<qemu:arg value='-qmp'/><qemu:arg value='unix:{folder}/vm.look,server=on,wait=off'/></qemu:commandline></domain>
"""
VIRSH, NAME, DISK = ['virsh', '-q', '-c', 'qemu:///system'], 'bench', 'virtio-disk0'
CASES = ('full', 'increment')
PIECE, IN_FLIGHT = 256 << 10, 16
CHANGE = 64 << 10  # the guest's writes between the backups, this long, on one part in CHANGED of the disk
CHANGED = 32


def why_not():
    if os.geteuid() != 0:
        return 'not root'
    lacking = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)})
    return f'not installed: {" ".join(lacking)} (tools/setup.sh bench)' if lacking else None


# -- the libvirt of our own, inside the namespaces ---------------------------------------------------------------------

def hide_the_machine(folder):
    """Empty folders instead of libvirt's and D-Bus's, and a user that libvirtd wants to exist."""
    for path in PRIVATE:
        if path == '/run/dbus' and not os.path.isdir(path):
            continue
        os.makedirs(path, exist_ok=True)
        harness.run(['mount', '-t', 'tmpfs', 'none', path])
    with open('/etc/libvirt/qemu.conf', 'w', encoding='ascii') as f:
        f.write(QEMU_CONF)
    for name, line in (('passwd', f'{QEMU_USER}:x:{QEMU_ID}:{QEMU_ID}::/nonexistent:/bin/false\n'),
                       ('group', f'{QEMU_USER}:x:{QEMU_ID}:\n')):
        with open(f'/etc/{name}', encoding='utf-8') as f:
            text = f.read()
        if QEMU_USER not in text:
            with open(f'{folder}/{name}', 'w', encoding='utf-8') as f:
                f.write(text + line)
            harness.run(['mount', '--bind', f'{folder}/{name}', f'/etc/{name}'])


class Guest:
    """A domain of libvirt's, paused: only its disk matters."""

    def __init__(self, folder, size):
        self.disk, self.size, self.qmp_path = f'{folder}/disk.qcow2', size, f'{folder}/vm.qmp'
        raw = worlds.make_image(f'{folder}/disk.raw', size)
        harness.run(['qemu-img', 'convert', '-O', 'qcow2', raw, self.disk])
        os.unlink(raw)
        with open(f'{folder}/libvirtd.log', 'wb') as log:
            self.libvirtd = harness.spawn(['libvirtd'], stdout=log, stderr=log)
        harness.wait_until(lambda: harness.run([*VIRSH, 'version'], check=False).returncode == 0, 60, 'libvirtd')
        with open(f'{folder}/domain.xml', 'w', encoding='utf-8') as f:
            f.write(DOMAIN.format(qemu=shutil.which('qemu-system-x86_64'), disk=self.disk, folder=folder))
        harness.run([*VIRSH, 'define', f'{folder}/domain.xml'])
        harness.run([*VIRSH, 'start', '--paused', NAME])
        with open(f'/run/libvirt/qemu/{NAME}.pid', encoding='ascii') as f:
            self.pid = int(f.read())
        self.qmp = Qmp(f'{folder}/vm.look')
        self.path = next(d['qdev'] for d in self.qmp('query-block') if f'/{DISK}/' in f'/{d.get("qdev")}/')

    def hmp(self, line):
        words = self.qmp('human-monitor-command', {'command-line': f'qemu-io -d {self.path} "{line}"'})
        if words.strip():
            raise AssertionError(f'{line}: {words}')

    def change(self, number):
        for at in range(number % CHANGED * CHANGE, self.size, CHANGED * CHANGE):
            self.hmp(f'write -q -P {number % 255 + 1} {at} {CHANGE}')
        self.hmp('flush')


# -- the two ways ------------------------------------------------------------------------------------------------------

class Virtnbdbackup:
    def __init__(self, guest, folder):
        self.guest, self.to = guest, f'{folder}/virtnbdbackup'

    def servers_cpu(self):
        return bench.cpu_clock(self.guest.libvirtd.pid)

    def full(self, _):
        shutil.rmtree(self.to, ignore_errors=True)
        return [self._backup('full')]

    def increment(self, _):
        return [self._backup('inc')]

    def _backup(self, level):
        return ['virtnbdbackup', '-U', 'qemu:///system', '-d', NAME, '-l', level, '-o', self.to]

    def settle(self):
        pass


class Qpull:
    def __init__(self, guest, folder):
        self.guest, self.base, self.overlay = guest, f'{folder}/base.qcow2', f'{folder}/increment.qcow2'
        self.daemon = worlds.Daemon(folder, {'vm': guest}, linger=0)

    def servers_cpu(self):
        return self.daemon.cpu()

    def full(self, number):
        uri = self.daemon.uri(f'vm/{DISK}@full{number}')
        return [['qemu-img', 'create', '-q', '-f', 'qcow2', self.base, str(self.guest.size)],
                ['nbdcopy', uri, '--', '[', 'qemu-nbd', '-f', 'qcow2', self.base, ']']]

    def increment(self, number):
        uri = self.daemon.uri(f'vm/{DISK}@increment{number}')
        return [['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', self.base, '-F', 'qcow2', self.overlay],
                ['/usr/bin/python3', __file__, '--copy-changes', uri, f'full{number}', self.overlay]]

    def settle(self):
        self.daemon.wait_idle()


def copy_changes(uri, since, path):
    """What changed on the disk since a checkpoint, into an overlay. A client as anybody would write it."""
    source, target = nbdpull.connect(uri, [nbdpull.dirty_context(since)]), nbd.NBD()
    target.connect_systemd_socket_activation(['qemu-nbd', '-f', 'qcow2', path])
    pieces = [(at, min(PIECE, offset + length - at))
              for offset, length in nbdpull.ranges_with(nbdpull.read_map(source, nbdpull.dirty_context(since)))
              for at in range(offset, offset + length, PIECE)]
    for i in range(0, len(pieces), IN_FLIGHT):
        some = [(at, nbd.Buffer(length)) for at, length in pieces[i:i + IN_FLIGHT]]
        for handle, begin in ((source, 'aio_pread'), (target, 'aio_pwrite')):
            left = [getattr(handle, begin)(buffer, at) for at, buffer in some]
            while left:
                handle.poll(-1)
                left = [c for c in left if not handle.aio_command_completed(c)]
    source.shutdown()
    target.shutdown()


def backup(way, case, number):
    """Runs it, as one shell would: what it took."""
    guest = way.guest
    qemu, servers, began, cpu = bench.cpu_clock(guest.pid), way.servers_cpu(), time.monotonic(), 0
    for command in getattr(way, case)(number):
        cpu += bench.run_clients([command]).cpu
    took = time.monotonic() - began
    way.settle()
    qemu, servers = bench.cpu_clock(guest.pid) - qemu, way.servers_cpu() - servers
    return {'wall': took, 'qemu': qemu, 'all': qemu + servers + cpu}


def measure(folder, size, count):
    guest = Guest(folder, size)
    ways = {'a': Virtnbdbackup(guest, folder), 'b': Qpull(guest, folder)}
    found = {(case, name): [] for case in CASES for name in ways}
    for number in range(count + 1):  # the first is to warm up, and to be looked at
        for case in CASES:
            for name, way in ways.items():
                found[case, name].append(backup(way, case, number))
            if case == 'full':
                guest.change(number)
        if number == 0:
            harness.run(['qemu-img', 'compare', '-U', ways['b'].overlay, guest.disk])
    ways['b'].daemon.stop()
    rows = []
    for case in CASES:
        a, b = found[case, 'a'][1:], found[case, 'b'][1:]
        rows += [bench.row(f'{case}: {metric}', 's', [x[key] for x in a], [x[key] for x in b], 'less')
                 for metric, key in (('wall clock', 'wall'), ('CPU of QEMU', 'qemu'), ('CPU of all', 'all'))]
    return rows


def main(argv):
    if argv[:1] == ['--copy-changes']:
        copy_changes(*argv[1:])
        return
    p = bench.parser(__doc__, rounds=5)
    p.add_argument('--mib', type=int, help='size of the disk (default 2048)')
    p.add_argument('--inside', action='store_true', help='the namespaces are made')
    args = bench.parse(p, argv)
    why = why_not()
    if why:
        bench.finish(args, [bench.missing(case, why) for case in CASES])
        return
    if not args.inside:
        # The shell reaps what libvirtd leaves to process 1: it waits for these to be gone.
        os.execvp('unshare', ['unshare', '--mount', '--pid', '--fork', '--kill-child', '--mount-proc',
                              'bash', '-c', '"$@"; exit $?', 'bash',
                              '/usr/bin/python3', __file__, '--inside', *argv])
    try:
        with bench.work_folder(memory=True) as folder:
            hide_the_machine(folder)
            rows = measure(folder, (args.mib or (16 if args.quick else 2048)) * MIB, args.rounds)
    finally:
        harness.kill_children()
    bench.finish(args, rows)


if __name__ == '__main__':
    main(sys.argv[1:])
