# SPDX-License-Identifier: LGPL-2.1-or-later
"""The two sides of a comparison: QEMUs that run no guest, and what exports their frozen disks.

Direct is QEMU's own NBD server on a frozen node that is built as qpulld builds it (copy-before-write filter under the
device, snapshot-access on top). Where both sides are up at once they are twins: two QEMUs with the same arguments and
the same image file, since a QEMU has but one NBD server and qpulld may need it; nobody writes."""
import os
import shutil
import socket
import subprocess
import urllib.parse

import bench
import harness
import nbd
from bench import MIB
from qmpclient import Qmp

TLS_NAME = 'localhost'
PSK_USER = 'bench'
ONE_AT_A_TIME, ONE_REQUEST = 'one at a time', 128 << 10


def make_image(path, size):
    """Random bytes, all of it allocated."""
    with open('/dev/urandom', 'rb') as random, open(path, 'wb') as f:
        for at in range(0, size, MIB):
            f.write(random.read(min(MIB, size - at)))
        f.flush()
        os.fsync(f.fileno())
    return path


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Vm:
    """A QEMU that runs nothing, with disks {name: image}. .qmp is ours, .qmp_path is for qpulld."""

    def __init__(self, folder, name, disks, o_direct=False, wait=True):
        self.folder, self.name, self.disks = folder, name, disks
        self.qmp_path, self.look_path = f'{folder}/{name}.qmp', f'{folder}/{name}.look'
        cache, words = f'cache.direct={"on" if o_direct else "off"}', []
        for disk, image in disks.items():  # locking=off: the twin has the same file
            words += ['-blockdev', f'raw,node-name=node-{disk},{cache},file.driver=file,file.filename={image},'
                                   f'file.{cache},file.locking=off',
                      '-device', f'virtio-blk-pci,drive=node-{disk},id={disk}']
        self.process = harness.spawn(
            ['qemu-system-x86_64', '-machine', 'pc,accel=tcg', '-m', '16', '-S', '-nodefaults', '-no-user-config',
             '-display', 'none', *words,
             '-qmp', f'unix:{self.qmp_path},server=on,wait=off', '-qmp', f'unix:{self.look_path},server=on,wait=off'])
        self.qmp = None
        if wait:
            self.wait()

    def wait(self):
        harness.wait_until(lambda: os.path.exists(self.look_path), 60, 'the monitor')
        self.qmp = Qmp(self.look_path)

    def cpu(self):
        return bench.cpu_clock(self.process.pid)

    def kill(self):
        self.process.kill()
        self.process.wait()


class Tls:
    """Keys for a server on localhost: certs (a folder as QEMU and libnbd want it) or a PSK file."""

    def __init__(self, folder, kind):
        self.kind, self.folder = kind, f'{folder}/{kind}'
        os.mkdir(self.folder)
        (self._psk if kind == 'psk' else self._x509)()

    def _psk(self):
        with open(f'{self.folder}/keys.psk', 'w', encoding='ascii') as f:
            f.write(f'{PSK_USER}:{os.urandom(32).hex()}\n')

    def _x509(self):
        def openssl(*args):
            harness.run(['openssl', *args], cwd=self.folder)

        key = ['-newkey', 'rsa:2048', '-nodes', '-days', '30']
        openssl('req', '-x509', *key, '-subj', '/CN=bench', '-keyout', 'ca-key.pem', '-out', 'ca-cert.pem')
        for who, usage in (('server', 'serverAuth'), ('client', 'clientAuth')):
            with open(f'{self.folder}/{who}.ext', 'w', encoding='ascii') as f:
                f.write(f'subjectAltName=DNS:{TLS_NAME},IP:127.0.0.1\nextendedKeyUsage={usage}\n'
                        'keyUsage=digitalSignature,keyEncipherment\n')
            openssl('req', *key[:3], '-subj', f'/CN={TLS_NAME}', '-keyout', f'{who}-key.pem', '-out', f'{who}.csr')
            openssl('x509', '-req', '-in', f'{who}.csr', '-CA', 'ca-cert.pem', '-CAkey', 'ca-key.pem',
                    '-CAcreateserial', '-days', '30', '-extfile', f'{who}.ext', '-out', f'{who}-cert.pem')

    def qemu_object(self, endpoint):
        """The properties of a tls-creds object, for object-add and --object."""
        words = {'id': 'tls0', 'endpoint': endpoint, 'dir': self.folder}
        if self.kind == 'psk':
            return {'qom-type': 'tls-creds-psk', **words, **({'username': PSK_USER} if endpoint == 'client' else {})}
        return {'qom-type': 'tls-creds-x509', **words, 'verify-peer': True}

    def qpulld_flags(self):
        return ['--tls=require', f'--tls-psk={self.folder}/keys.psk' if self.kind == 'psk'
                else f'--tls-certs={self.folder}']


class Place:
    """Where an export is found: by libnbd (.uri) and by qemu-img (.image_opts(), .objects())."""

    def __init__(self, export, path, port, tls=None):
        self.export, self.path, self.port, self.tls = export, path, port, tls
        name = urllib.parse.quote(export)
        if path:
            self.uri = f'nbd+unix:///{name}?socket={path}'
        elif not tls:
            self.uri = f'nbd://127.0.0.1:{port}/{name}'
        elif tls.kind == 'psk':
            self.uri = f'nbds://{PSK_USER}@{TLS_NAME}:{port}/{name}?tls-psk-file={tls.folder}/keys.psk'
        else:
            self.uri = f'nbds://{TLS_NAME}:{port}/{name}?tls-certificates={tls.folder}'

    def image_opts(self):
        where = f'server.type=unix,server.path={self.path}' if self.path else \
            f'server.type=inet,server.host={TLS_NAME if self.tls else "127.0.0.1"},server.port={self.port}'
        return f'driver=nbd,{where},export={self.export}' + (',tls-creds=tls0' if self.tls else '')

    def objects(self):
        if not self.tls:
            return []
        words = self.tls.qemu_object('client')
        words = {k: 'on' if v is True else v for k, v in words.items()}
        return ['--object', ','.join([words.pop('qom-type')] + [f'{k}={v}' for k, v in words.items()])]


class Direct:
    """QEMU exports its frozen disks itself, .places[disk]. Goes away with stop(), so that the QEMU is as it was."""

    def __init__(self, vm, transport='unix', tls=None):
        self.vm, q = vm, vm.qmp
        for disk, image in vm.disks.items():
            self._freeze(disk, image)
        path, port = (f'{vm.folder}/{vm.name}.nbd', None) if transport == 'unix' else (None, free_port())
        address = {'type': 'unix', 'data': {'path': path}} if path else \
            {'type': 'inet', 'data': {'host': '127.0.0.1', 'port': str(port)}}
        if tls:
            q('object-add', tls.qemu_object('server'))
        q('nbd-server-start', {'addr': address, **({'tls-creds': 'tls0'} if tls else {})})
        for disk in vm.disks:
            q('block-export-add', {'type': 'nbd', 'id': f'export-{disk}', 'node-name': f'frozen-{disk}', 'name': disk})
        self.places = {disk: Place(disk, path, port, tls) for disk in vm.disks}

    def _freeze(self, disk, image):
        q, scratch = self.vm.qmp, f'{self.vm.folder}/{self.vm.name}.{disk}.scratch'
        with open(scratch, 'wb') as f:
            f.truncate(os.path.getsize(image))
        q('blockdev-add', {'driver': 'file', 'node-name': f'scratch-{disk}', 'filename': scratch, 'locking': 'off'})
        q('blockdev-add', {'driver': 'copy-before-write', 'node-name': f'cbw-{disk}', 'file': f'node-{disk}',
                           'target': f'scratch-{disk}', 'on-cbw-error': 'break-snapshot', 'cbw-timeout': 10,
                           'discard': 'unmap'})
        self._plug(disk, f'cbw-{disk}')
        q('blockdev-add', {'driver': 'snapshot-access', 'node-name': f'frozen-{disk}', 'file': f'cbw-{disk}'})
        os.unlink(scratch)

    def _plug(self, disk, node):
        self.vm.qmp('qom-set', {'path': f'/machine/peripheral/{disk}', 'property': 'drive', 'value': node})

    def stop(self):
        q = self.vm.qmp
        q('nbd-server-stop')
        harness.wait_until(lambda: not q('query-block-exports'), 30, 'the end of the exports')
        for disk in self.vm.disks:
            q('blockdev-del', {'node-name': f'frozen-{disk}'})
            self._plug(disk, f'node-{disk}')
            for kind in ('cbw', 'scratch'):
                q('blockdev-del', {'node-name': f'{kind}-{disk}'})


def connect(place):
    """A libnbd handle on it, that may read the keys which the URI names."""
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.connect_uri(place.uri)
    return h


def why_no_tls():
    """What is missing for TLS, or None."""
    words = subprocess.run([f'{harness.bin_dir()}/qpulld', '--help'], capture_output=True, text=True, check=True).stdout
    if '--tls-certs' not in words:
        return 'TLS is not built into this qpulld'
    return None if shutil.which('openssl') else 'openssl is not installed (tools/setup.sh bench)'


class Daemon(harness.Qpulld):
    """qpulld on one transport; .place(export) is where. It says less in its log than in tests."""

    def __init__(self, folder, vms, transport='unix', tls=None, name='qpulld', flags=(), linger=60):
        self.transport, self.tls = transport, tls
        super().__init__(folder, vms, tcp=transport != 'unix', linger=linger, name=name, start=False,
                         flags=[*flags, *(tls.qpulld_flags() if tls else [])])
        self.flags = [f for f in self.flags if f != '--log=debug'] + ['--log=info']
        self.start()
        harness.wait_until(lambda: all(v['state'] == 'ready' for v in self.ask('query-vms')), 120, 'all VMs', every=0.05)

    def place(self, export):
        if self.transport == 'unix':
            return Place(export, self.socket, None)
        return Place(export, None, self.tcp_port(), self.tls)

    def cpu(self):
        return bench.tree_cpu(self.process.pid)


# -- clients: {name: function(place) -> command line} ------------------------------------------------------------------

CLIENTS = {
    'nbdcopy': lambda p: ['nbdcopy', p.uri, 'null:'],
    'nbdcopy one connection': lambda p: ['nbdcopy', '--connections=1', p.uri, 'null:'],
    'nbdcopy tuned': lambda p: ['nbdcopy', '--connections=1', '--requests=16', '--request-size=262144', p.uri, 'null:'],
    'qemu-img convert': lambda p: ['qemu-img', 'convert', '-n', *p.objects(), '--image-opts', p.image_opts(),
                                   '--target-image-opts', 'driver=null-co,size=1T'],
    ONE_AT_A_TIME: lambda p: ['nbdcopy', '--synchronous', '--connections=1', f'--request-size={ONE_REQUEST}', p.uri,
                                'null:'],
}
