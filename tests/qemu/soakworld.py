# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that never stops writing, a daemon, and one session after the other with a client and a fault that are drawn
at random. After each: every byte that a client got was on the disk at one instant; two disks show the same instant;
maps cover what changed; a checkpoint stands exactly where the pull ended well; QEMU's block layer is as before; nobody
holds a descriptor more than before; the guest saw no error and waited for no write longer than the bound.

A world's choices follow from its seed and the session's number; how far the guest is when something strikes does not.
"""
import collections
import ctypes
import gc
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time

import harness
import nbd
import nbdpull
import soakclients
import truth
from harness import MIB, Disk

SECTOR = 512
ORDER = 2 * MIB        # so much at the beginning of each disk is left to the numbered records
CHECKPOINTS_MAX = 4    # of one disk; then one is deleted
SCRATCH = (4 * MIB, 12 * MIB, 24 * MIB)  # of a daemon's life with little scratch
LINGER = 2             # seconds, of a life with one
LIFE = 12              # sessions of a daemon, at most, unless it is to live long
STALL = 3.0            # seconds that QEMU stands still, at most
LONG_STALL = 33.0      # … longer than a QMP command may take (VM_CALL_TIMEOUT_MS of server/config.h)
CRASHES = 0.3          # of all worlds end with QEMU being killed
NOTICE = 20            # seconds until that has ended a session
IDLE_TIMEOUT = 90      # seconds until the daemon has undone a session, on a busy machine
# A write waits for its copy to scratch until QEMU gives the snapshot up: VM_CBW_TIMEOUT_S of server/config.h. The rest
# is for a machine that runs other things.
BOUND_US = 25_000_000

CLIENTS = ('one_after_the_other', 'one_after_the_other', 'incremental', 'incremental', 'nbdcopy', 'network_lost',
           'looks_only')
FAULTS = ('none', 'none', 'gone', 'gone', 'daemon-killed', 'daemon-killed', 'daemon-ended', 'stall', 'paused')


def fds(pid):
    return len(os.listdir(f'/proc/{pid}/fd'))


def memory_kib(pid):
    with open(f'/proc/{pid}/status', encoding='ascii') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('VmRSS:'))


def may_mount():
    return os.geteuid() == 0


class Blow(threading.Thread):
    """Strikes once, some time after a phase of the session has begun; at the latest when it is over."""

    def __init__(self, phase, delay, strike):
        super().__init__(daemon=True)
        self.phase, self.delay, self.strike = phase, delay, strike
        self.begun = threading.Event()
        self.start()

    def run(self):
        self.begun.wait()
        time.sleep(self.delay)
        self.strike()


class World:
    """One guest, and the daemons that come and go beside it. stats counts what was done, for whoever asks."""

    def __init__(self, seed, clients=CLIENTS, faults=FAULTS, long_life=False, long_stalls=False):
        self.seed, self.clients, self.faults = seed, clients, faults
        self.long_life, self.long_stalls = long_life, long_stalls
        self.stats = collections.Counter()
        self.slowest = collections.Counter()  # us of a guest's write, by fault
        self.lives = []                       # (sessions, KiB at its first session's end, KiB at the last's)
        self.folder = tempfile.mkdtemp(prefix='qpull-soak-', dir='/tmp')
        self.number, self.names = 0, 0
        self.blow = self.vm = self.daemon = None
        self.stalled = 0.0
        self.mounted = False
        rng = random.Random(f'{seed}/world')
        odd, bus = rng.choice((0, 5)) * SECTOR, rng.choice(('virtio-blk', 'virtio-scsi'))
        self.disks = (Disk('vda', 24 * MIB + odd, bus=bus),
                      Disk('vdb', 12 * MIB, options=rng.choice(('cluster_size=4096', 'cluster_size=65536'))))
        self.checkpoints = {d.name: {} for d in self.disks}  # of each disk: name: what a client has restored
        self.vm = harness.Guest(self.folder, self.disks, smp=rng.choice((1, 2)), start=False)
        self.vm.start()
        for disk in self.disks:
            disk.model.known[:ORDER // SECTOR] = bytes(ORDER // SECTOR)  # QEMU's zeroes, then records
        self.before = self.picture()
        self.order_seed = rng.randrange(1 << 60)
        self.vm.order_start([d.name for d in self.disks], seed=self.order_seed)
        self.life = None
        self.qemu_fds = None

    # -- the daemon's lives --------------------------------------------------------------------------------------------

    def new_life(self, rng):
        """Ends the daemon in order and starts one that is configured differently."""
        if self.daemon:
            self.end_life()
        kind = 'plain' if self.long_life else \
            rng.choice(('plain', 'plain', 'plain', 'linger', 'linger', 'limit', 'full' if may_mount() else 'limit'))
        flags, linger = [], LINGER if kind == 'linger' or self.long_life else 0
        scratch = rng.choice(SCRATCH)
        if kind == 'limit':
            flags = [f'--scratch-limit={scratch}']
        elif kind == 'full':
            flags = ['--scratch-reserve=0']
            os.makedirs(f'{self.folder}/qpulld.scratch', exist_ok=True)
            subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={scratch}', 'none', f'{self.folder}/qpulld.scratch'],
                           check=True)
            self.mounted = True
        self.life, self.linger = kind, linger
        self.left = 1 << 30 if self.long_life else rng.randrange(1, LIFE)
        self.daemon = harness.Qpulld(self.folder, {'vm': self.vm}, flags=flags, linger=linger, start=False)
        self.start_daemon()

    def start_daemon(self):
        self.daemon.start()
        self.daemon.wait_idle(IDLE_TIMEOUT)
        self.daemon_fds = None
        self.lived = [0, 0, 0]

    def daemon_is_dead(self):
        self.note_life()
        self.daemon.check_log()

    def note_life(self):
        if self.lived[0]:
            self.lives.append(tuple(self.lived))
        self.lived = [0, 0, 0]

    def end_life(self):
        self.note_life()
        self.daemon.stop()
        if self.mounted:
            subprocess.run(['umount', '-l', f'{self.folder}/qpulld.scratch'], check=True)
            self.mounted = False

    # -- faults --------------------------------------------------------------------------------------------------------

    def strike_of(self, fault, rng):
        """What the blow does; None: the client itself is the fault, or there is none."""
        def stall():
            seconds = LONG_STALL if self.long_stalls and rng.random() < 0.05 else rng.random() * STALL
            self.stalled = seconds
            os.kill(self.vm.process.pid, signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(self.vm.process.pid, signal.SIGCONT)

        def paused():
            spare = harness.Qmp(self.vm.spare_qmp_path)
            spare('stop')
            time.sleep(rng.random() * STALL)
            spare('cont')
            spare.close()
        return {'daemon-killed': lambda: self.daemon.kill(), 'daemon-ended': lambda: self.daemon.process.terminate(),
                'stall': stall, 'paused': paused}.get(fault)

    def phase(self, name):
        if self.blow and self.blow.phase == name:
            self.blow.begun.set()

    def is_open(self):
        """GO was answered, of the first connection at least: the freeze is over."""
        self.frozen_by = {d.name: self.loads[d.name].status()['ops'] for d in self.disks}

    def session_id(self):
        return self.daemon.vm()['session']

    # -- one session ---------------------------------------------------------------------------------------------------

    def start_loads(self, rng):
        self.loads, self.oracles, self.since_ops = {}, {}, {}
        for disk in self.disks:
            self.oracles[disk.name] = disk.model.copy()
            self.loads[disk.name] = self.vm.load(
                disk.name, seed=rng.randrange(1 << 60), unit=rng.choice((512, 4096)),
                max=rng.choice((4096, 65536, 262144)), pause_us=rng.choice((500, 2000, 5000)),
                **{'from': ORDER})
        for disk in self.disks:  # the session meets guests that are at it
            harness.wait_until(lambda d=disk.name: self.loads[d].status()['ops'] > 3, 30, 'a guest that writes')

    def session(self):
        """Runs the next one and judges it. AssertionError: what this exists to find. Returns one line about it."""
        number, self.number = self.number, self.number + 1
        rng = random.Random(f'{self.seed}/{number}')
        if not self.daemon or self.left <= 0:
            self.new_life(rng)
        self.left -= 1
        client, fault = self.choose(rng)
        self.names += 1
        s = soakclients.Session(self, rng, f'ck{self.names}' if rng.random() < 0.8 else None)
        if fault == 'gone':
            s.stop_reading = rng.randrange(20)
        strike = self.strike_of(fault, rng)
        self.stalled, self.frozen_by = 0.0, {}
        phase, delay = rng.choice(('go', 'go', 'read', 'leave')), rng.random() ** 2 * 0.4
        self.blow = Blow(phase, delay, strike) if strike else None
        self.what = f'{self.life} daemon, {client}, {fault}'
        if strike:
            self.what += f' {delay * 1000:.0f} ms into {phase}'
        began = time.monotonic()
        self.start_loads(rng)
        noise = soakclients.Noise(self.daemon, rng)
        self.since_ops = {d.name: self.loads[d.name].status()['ops'] for d in self.disks}
        try:
            getattr(s, client)()
        except soakclients.BROKEN as e:
            s.error = f'{type(e).__name__}: {e}'  # the exception itself would keep connections open
            s.drop()
        if self.blow:
            self.blow.begun.set()
            self.blow.join()
        noise.close()
        self.recover(fault)
        self.judge(s, client, fault)
        gc.collect()  # images are large, and some hang in cycles
        self.stats[f'client {client}'] += 1
        self.stats[f'fault {fault}'] += 1
        self.stats[f'daemon {self.life}'] += 1
        return f'{self.what}: {self.outcome}, {time.monotonic() - began:.1f} s'

    def choose(self, rng):
        client = rng.choice(self.clients)
        if client == 'incremental' and not any(self.checkpoints.values()):
            client = 'one_after_the_other'
        if client == 'network_lost' and not self.linger:
            client = 'one_after_the_other'
        fault = rng.choice(self.faults)
        if fault == 'gone' and client in ('looks_only', 'network_lost'):
            fault = 'none'
        return client, fault

    def recover(self, fault):
        """What an administrator does: the daemon runs again."""
        if fault == 'daemon-killed':
            self.daemon_is_dead()
            self.start_daemon()
        elif fault == 'daemon-ended':
            status = self.daemon.process.wait(IDLE_TIMEOUT)
            self.daemon_is_dead()
            if status:
                raise AssertionError(f'qpulld ended with {status}:\n{self.daemon.log()}')
            self.start_daemon()
        self.daemon.wait_idle(IDLE_TIMEOUT)

    # -- the judge -----------------------------------------------------------------------------------------------------

    def judge(self, s, client, fault):
        may_fail = fault in ('daemon-killed', 'daemon-ended') or self.life in ('limit', 'full')
        if client == 'network_lost' and self.stalled >= LONG_STALL:
            may_fail = s.came_late = True  # QEMU's answer does not come in time
        if s.error and not may_fail:
            raise AssertionError(f'the client lost its session: {s.error}; the daemon says {self.daemon.vm()}')
        for part in s.parts.values():
            self.judge_data(part)
            self.judge_maps(s, part)
        whole = [p for p in s.parts.values() if p.is_whole()]
        if len(whole) == 2:
            harness.check_order([next(p.image for p in whole if p.disk is d) for d in self.disks], self.order_seed)
            self.stats['two disks of one instant'] += 1
        kept = self.judge_checkpoints(s, fault)
        self.judge_qemu()
        self.judge_daemon()
        self.judge_guest(fault)
        self.outcome = f'{len(whole)} of {len(s.parts)} disks read, {"kept" if kept else "not kept"}'
        if s.error:
            self.stats['sessions that broke'] += 1
            self.outcome += f' ({s.error.splitlines()[0][:80]})'

    def judge_data(self, part):
        """After some number of the guest's operations everything that was read was on the disk."""
        name = part.disk.name
        if not part.got:
            return
        oracle, load = self.oracles[name], self.loads[name]
        first, last = self.since_ops[name], self.frozen_by[name] + 1
        oracle.replay(load.plan, 0, first)
        least = None
        for n in range(first, last + 1):
            bad = sum(self.differing(oracle, part.image, *r) for r in part.got)
            least = bad if least is None else min(least, bad)
            if not bad:
                self.stats['bytes compared'] += sum(length for _, length in part.got)
                return
            oracle.replay(load.plan, n, n + 1)
        raise AssertionError(f'{name}: what was read was never on the disk between operations {first} and {last}: '
                             f'at least {least} sectors differ')

    @staticmethod
    def differing(oracle, image, offset, length):
        def address(data, at):
            return ctypes.addressof(ctypes.c_uint8.from_buffer(data, at))
        return oracle.lib.model_compare(address(oracle.image, offset), address(oracle.known, offset // SECTOR),
                                        address(image, offset), length, ctypes.byref(ctypes.c_uint64()))

    def judge_maps(self, s, part):
        if not part.is_whole():
            return
        for name in s.since.get(part.disk.name, ()):
            extents = part.maps[nbdpull.dirty_context(name)]
            restored = bytearray(self.checkpoints[part.disk.name][name])
            for offset, length in nbdpull.ranges_with(extents):
                restored[offset:offset + length] = part.image[offset:offset + length]
            if restored != part.image:
                bad = next(o for o in range(0, part.disk.size, SECTOR)
                           if restored[o:o + SECTOR] != part.image[o:o + SECTOR])
                raise AssertionError(f'{part.disk.name}: the map since {name} does not cover what changed at {bad}')
            self.stats['incrementals compared'] += 1
        for offset, length, flags in part.maps.get(nbdpull.ALLOCATION, ()):
            if flags & nbdpull.STATE_ZERO and any(part.image[offset:offset + length]):
                raise AssertionError(f'{part.disk.name}: {offset} is not zero, as base:allocation says')

    def judge_checkpoints(self, s, fault):
        """What stands is what is known, and of this session what ended well. Returns whether anything was kept."""
        standing = {(node, name) for node, name in harness.bitmaps(self.vm.look)}
        kept = False
        for disk in self.disks:
            mine, part = (disk.node, s.name), s.parts.get(disk.name)
            for name in self.checkpoints[disk.name]:
                if (disk.node, name) not in standing:
                    raise AssertionError(f'{disk.name}: checkpoint {name} is gone')
            known = {(disk.node, n) for n in self.checkpoints[disk.name]} | {mine}
            surplus = {b for b in standing if b[0] == disk.node} - known
            if surplus:
                raise AssertionError(f'{disk.name}: {surplus} stand there')
            bye = part.bye if part and part.opened and s.name else 'no'
            if bye == 'yes' and (fault in ('daemon-killed', 'daemon-ended') or self.life in ('limit', 'full')):
                bye = 'maybe'
            if s.came_late:
                bye = 'maybe'
            if mine in standing and bye == 'no':
                raise AssertionError(f'{disk.name}: checkpoint {s.name} is kept, but the pull did not end well')
            if mine not in standing and bye == 'yes':
                raise AssertionError(f'{disk.name}: checkpoint {s.name} is not kept, but the pull ended well: '
                                     f'{self.daemon.vm().get("last-session")}')
            if mine in standing:
                kept = True
                if part.is_whole():
                    self.checkpoints[disk.name][s.name] = bytes(part.image)
                    self.stats['checkpoints kept'] += 1
                else:
                    self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': s.name, 'disk': disk.name})
        self.forget_some(s)
        return kept

    def forget_some(self, s):
        for disk in self.disks:
            known = self.checkpoints[disk.name]
            while len(known) > CHECKPOINTS_MAX:
                name = s.rng.choice(sorted(known))
                self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': name, 'disk': disk.name})
                del known[name]

    def picture(self):
        """QEMU's block layer without the checkpoints, which judge_checkpoints() has looked at."""
        state = self.vm.state()
        for node in state['nodes'].values():
            node['bitmaps'] = [b for b in node['bitmaps'] if not (b['name'] or '').startswith('ck')]
        return state

    def judge_qemu(self):
        after = self.picture()
        if after != self.before:
            keys = [k for k in after if after[k] != self.before[k]]
            raise AssertionError(f'QEMU is not as before: {[(k, self.before[k], after[k]) for k in keys]}')
        left = self.vm.deleted_fds()
        if left:
            raise AssertionError(f'QEMU holds scratch: {left}')
        if self.qemu_fds is None:
            self.qemu_fds = fds(self.vm.process.pid)
        try:  # QEMU closes a dead connection when its loop comes to it
            harness.wait_until(lambda: fds(self.vm.process.pid) <= self.qemu_fds, 10, 'descriptors')
        except TimeoutError:
            raise AssertionError(f'QEMU has {fds(self.vm.process.pid)} descriptors, before it were {self.qemu_fds}: '
                                 f'{self.list_fds(self.vm.process.pid)}') from None

    @staticmethod
    def list_fds(pid):
        found = []
        for fd in os.listdir(f'/proc/{pid}/fd'):
            try:
                found.append(os.readlink(f'/proc/{pid}/fd/{fd}'))
            except FileNotFoundError:  # closed meanwhile
                pass
        return sorted(found)

    def judge_daemon(self):
        left, pid = self.daemon.files_left(), self.daemon.process.pid
        if left:
            raise AssertionError(f'files are left: {left}')
        if self.lived[0] == 1:  # its first session has opened what stays open
            self.daemon_fds = fds(pid)
        elif self.daemon_fds is not None:
            try:
                harness.wait_until(lambda: fds(pid) <= self.daemon_fds, 10, 'descriptors')
            except TimeoutError:
                raise AssertionError(f'the daemon has {fds(pid)} descriptors, before it were {self.daemon_fds}: '
                                     f'{self.list_fds(pid)}') from None
        held = [f for f in self.list_fds(pid) if f.endswith('(deleted)') and f.startswith(self.daemon.scratch)]
        if held:
            raise AssertionError(f'the daemon holds scratch: {held}')
        self.lived[0] += 1
        self.lived[1] = self.lived[1] or memory_kib(pid)
        self.lived[2] = memory_kib(pid)

    def judge_guest(self, fault):
        results = [load.stop() for load in self.loads.values()]
        for result in results:
            self.stats['operations of the guest'] += result['ops']
            self.slowest[fault] = max(self.slowest[fault], result['slowest-us'])
            if result['errors'] or result['bad']:
                raise AssertionError(f'the guest saw errors: {result}, {self.vm.errors()}')
            if result['slowest-us'] > BOUND_US + self.stalled * 1e6:
                raise AssertionError(f'a write of the guest took {result["slowest-us"]} us')
        self.vm.check()

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self):
        """The guest shuts down, or its QEMU is killed."""
        if random.Random(f'{self.seed}/end').random() < CRASHES:
            self.what = 'QEMU is killed under a pull'
            self.crash()
            self.stats['ends by a crash of QEMU'] += 1
        else:
            self.what = 'the guest shuts down'
            self.shut_down()
            self.stats['ends in order'] += 1

    def crash(self):
        """QEMU dies under a pull: the client is told, nothing stays on the host, and the next QEMU at that path is
        pulled as ever. (Checkpoints are lost with it, as QEMU stores them when it ends in order.)"""
        h = nbdpull.connect(self.daemon.uri('vm/vda@crash'))
        h.pread(SECTOR, 0)
        self.vm.kill()
        began = time.monotonic()
        try:
            while True:
                h.pread(SECTOR, 0)
        except nbd.Error:
            pass
        harness.wait_until(lambda: not self.daemon.vm()['connected'] and self.daemon.vm()['session'] is None,
                           NOTICE, 'the end of the session')
        if time.monotonic() - began > NOTICE:
            raise AssertionError(f'the client was told after {time.monotonic() - began:.0f} s only')
        left = self.daemon.files_left()
        if left:
            raise AssertionError(f'QEMU has died, and {left} are left')
        self.vm.start()
        self.daemon.wait_idle(IDLE_TIMEOUT)
        for disk in self.disks:
            data = nbdpull.pull(self.daemon.uri(f'vm/{disk.name}'))
            self.daemon.wait_idle(IDLE_TIMEOUT)
            if data != truth.own_copy(self.vm, disk.name):
                raise AssertionError(f'{disk.name}: the pull from the next QEMU is not what is on the disk')
        self.end_life()

    def shut_down(self):
        """All is quiet: what a client pulls is what the guest has, and so are the images once it has shut down."""
        order = self.vm.order_stop()
        if order['errors']:
            raise AssertionError(f'the records saw errors: {order}')
        self.new_life(random.Random(0))
        for disk in self.disks:
            self.compare(disk, nbdpull.pull(self.daemon.uri(f'vm/{disk.name}')), 'the last pull')
        self.daemon.wait_idle(IDLE_TIMEOUT)
        self.end_life()
        self.vm.poweroff()
        for disk in self.disks:
            path = f'{self.folder}/converted'
            harness.run(['qemu-img', 'convert', '-O', 'raw', disk.path, path])
            with open(path, 'rb') as f:
                self.compare(disk, f.read(), 'the image')
            harness.run(['qemu-img', 'check', '-q', disk.path])
            words = harness.run(['qemu-img', 'info', disk.path]).stdout
            if 'in-use' in words or 'name: qpull-' in words:
                raise AssertionError(f'{disk.name}: {words}')
            missing = [n for n in self.checkpoints[disk.name] if f'name: {n}\n' not in words]
            if missing:
                raise AssertionError(f'{disk.name}: checkpoints {missing} are not stored: {words}')

    @staticmethod
    def compare(disk, data, what):
        n, first = disk.model.compare(data)
        if n:
            raise AssertionError(f'{what} of {disk.name}: {n} sectors are not what the guest wrote, the first at '
                                 f'{first}')

    def close(self, keep=None):
        """Everything goes; keep: the logs go there."""
        for thing in (self.daemon, self.vm):
            if thing:
                thing.kill()
                if keep:
                    os.makedirs(keep, exist_ok=True)
                    for path in (thing.log_path, getattr(thing, 'console_path', None)):
                        if path and os.path.exists(path):
                            shutil.copy(path, keep)
        if self.mounted:
            subprocess.run(['umount', '-l', f'{self.folder}/qpulld.scratch'], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
