# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of block commits share: a disk of several layers whose checkpoints' contents are remembered, and the
question whether each checkpoint is right, or refused."""
import harness
import nbdpull
import offline
from harness import MIB, Disk
from truth import random_range, replay, settle

SIZE = 8 * MIB + 3 * 512
PIECES = (512, 4096, 4096, 65536, 131072)


class Layers(harness.Case):
    """.vm runs no guest; .disk; .files: the images' paths, the deepest first; .names: by checkpoint, what the disk held
    when it began."""

    proxy = None

    def begin(self, proxy=None, size=SIZE, options='', fmt='qcow2', kind=Disk):
        self.names, self.count = {}, 0
        self.life = getattr(self, 'life', 0) + 1
        self.disk = kind('vda', size, options=options, fmt=fmt)
        self.vm = self.bare(self.disk)
        self.nodes = [self.disk.node]
        self.files = [self.disk.path]
        if proxy and not self.proxy:
            self.proxy = proxy(self.folder, self.vm)
            self.addCleanup(self.proxy.close)

    def serve(self, **options):
        # Another disk under an old name is another life: what is remembered of the one before would be held against it.
        state = f'{self.folder}/state{self.life}'
        self.daemon = self.qpulld({'vm': self.proxy or self.vm}, linger=0, state=state, **options)
        self.daemon.wait_idle()

    def work(self, operations=6):
        """Writes at random places; flushed, so that QEMU's death takes nothing away."""
        for _ in range(operations):
            offset, length = random_range(self.disk.size, PIECES)
            self.vm.write('vda', offset, length, harness.rng.randrange(256))
        self.flush()

    def flush(self):
        path = next(d['qdev'] for d in self.vm.look('query-block') if '/vda/' in f'/{d.get("qdev")}/')
        self.vm.hmp(f'qemu-io -d {path} "flush"')

    def checkpoint(self, *names, **options):
        """Begins on the live layer, now."""
        for name in names:
            self.vm.look('block-dirty-bitmap-add', {'node': self.nodes[-1], 'name': name, 'persistent': True, **options})
            self.names[name] = bytes(self.disk.model.image)

    def snapshot(self, names=(), size=None, options=''):
        """A layer on top; these names' records are made in it in the same instant, as careful tools do."""
        self.count += 1
        path, node = f'{self.folder}/layer{self.count}.qcow2', f'layer-{self.count}'
        options = ['-o', options] if options else []
        harness.run(['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', self.files[-1], '-F', self.disk.fmt
                     if len(self.files) == 1 else 'qcow2', *options, path, str(size or self.disk.size)])
        self.vm.look('blockdev-add', {'driver': 'qcow2', 'node-name': node, 'backing': None, 'discard': 'unmap',
                                      'file': {'driver': 'file', 'filename': path, 'discard': 'unmap'}})
        actions = [{'type': 'blockdev-snapshot', 'data': {'node': self.nodes[-1], 'overlay': node}}]
        actions += [{'type': 'block-dirty-bitmap-add', 'data': {'node': node, 'name': name, 'persistent': True}}
                    for name in names]
        self.vm.look('transaction', {'actions': actions})
        self.nodes.append(node)
        self.files.append(path)

    def all_names(self, layers):
        """Every way in which a checkpoint's records may be spread over so many layers, one name each: '0110' has one in
        the second and the third layer from below, and began in the second."""
        return [f'{n:0{layers}b}'[::-1] for n in range(1, 1 << layers)]

    def build(self, layers):
        """So many layers, with work in each before and after its checkpoints begin."""
        names = self.all_names(layers)
        for layer in range(layers):
            if layer:
                self.snapshot([n for n in names if n[layer] == '1' and '1' in n[:layer]])
            self.work()
            self.checkpoint(*(n for n in names if n.find('1') == layer))
            self.work()

    def restart(self, path=None):
        """QEMU ends and starts again on the live image, the images below it opened by QEMU itself."""
        self.vm.quit()
        self.boot(path or self.files[-1])

    def boot(self, path):
        self.disk.path, self.disk.fmt = path, 'qcow2' if path.endswith('.qcow2') else 'raw'
        self.vm.start()
        self.nodes = [self.disk.node]

    def commit(self, *args, check=True, **options):
        return self.daemon.qpull('commit', 'vm/vda', *args, check=check, **options)

    def job(self):
        return next((j for j in self.daemon.ask('query-jobs') if j['vm'] == 'vm'), None)

    def states(self):
        return {c['name']: c['state'] for c in self.job()['checkpoints']}

    def wait_job(self, timeout=60):
        harness.wait_until(lambda: self.job()['status'] == 'concluded', timeout, 'the end of the commit', every=0.05)
        return self.job()

    def reasons(self):
        return {c['name']: c['reason'] for c in self.daemon.ask('query-checkpoints', {'vm': 'vm', 'disk': 'vda'})}

    def offered(self):
        found = nbdpull.list_contexts(self.daemon.uri('vm/vda'), ['qemu:dirty-bitmap:'])
        return {name.split(':', 2)[2] for name in found} & set(self.names)

    def check(self, usable=None, when='now'):
        """The disk is what was written; every checkpoint that is offered reproduces it; and those in `usable` are. The
        bytes that each incremental reads, by name."""
        offered = self.offered()
        if usable is not None:
            self.assertEqual(offered, set(usable), f'{when}: {self.reasons()}')
        uri, read = self.daemon.uri('vm/vda'), {}
        h = nbdpull.connect(uri, [nbdpull.dirty_context(name) for name in offered])
        full = nbdpull.connect(uri)
        truth = nbdpull.read_all(full)
        self.assertSame(truth, self.disk.model.image, f'{when}: the disk')
        for name in sorted(offered):
            former = self.names[name][:len(truth)].ljust(len(truth), b'\0')
            restored, extents = replay(h, name, former)
            self.assertSame(restored, truth, f'{when}: restored over {name}')
            read[name] = sum(length for _, length in nbdpull.ranges_with(extents))
        full.shutdown()
        h.shutdown()
        self.rest()
        return read

    def rest(self):
        settle(self.vm)
        self.daemon.wait_idle()

    def assertNoJobs(self):
        self.assertEqual(self.vm.look('query-jobs'), [])
        drivers = {n['drv'] for n in self.vm.look('query-named-block-nodes', {'flat': True})}
        self.assertLessEqual(drivers, {'qcow2', 'file', 'raw'})


class OfflineLayers(Layers, offline.OfflineCase):
    """The same disk, whose VM is powered off and on: .is_off. The daemon has its QMP socket and its image."""

    is_off = False

    def serve(self, **options):
        state = f'{self.folder}/state{self.life}'
        self.daemon = self.qpulld({'vm': self.vm}, linger=0, state=state,
                                  flags=[f'--image=vm/vda={self.files[-1]}', *options.pop('flags', ())], **options)
        self.await_turn()

    def await_turn(self):
        if self.is_off:
            harness.wait_until(lambda: self.daemon.vm()['powered-off'], 20, 'the images\' turn')
        else:
            self.daemon.wait_idle()

    def power_off(self):
        self.vm.quit()
        self.is_off = True

    def power_on(self, path=None):
        self.rest()
        self.is_off = False
        self.boot(path or self.files[-1])

    def rest(self):
        if self.is_off:
            self.wait_closed(self.daemon, 30)
        else:
            super().rest()

    def check_images(self, *files):
        """No image is damaged, or has a cluster that nobody refers to."""
        for path in files or self.files:
            self.check_image(path)

    def check_image(self, path):
        if path.endswith('.qcow2'):
            harness.run(['qemu-img', 'check', '-q', path])
