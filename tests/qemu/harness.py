# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whole-system tests: a real QEMU with the guest of tests/guest, a real qpulld, NBD clients.

A test is a file test_*.py with classes derived from Case, ended by "harness.main()". Case gives every test a folder of
its own and removes everything behind it: processes, sockets, images. Nothing waits without a deadline. The environment:
  QPULL_BIN_DIR    where qpulld and qpull are (default: the first of build/release/bin, build/bin, build/dev/bin)
  QPULL_TEST_SEED  replays a run with the same random choices; every run prints its own
  QPULL_TEST_ENGINE  how the daemons freeze disks (--engine), where the test itself does not say
  QPULL_TEST_KEEP  set: the folders of failed tests are kept
"""
import atexit
import ctypes
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

import model
from qmpclient import Qmp, QmpError, bitmaps, graph_edges, graph_state  # noqa: F401 (offered to tests)

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SKIPPED = 77  # what ctest is told to take as "skipped"
MIB = 1 << 20
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
SANITIZER_WORDS = re.compile(r'(Address|Leak|Thread|UndefinedBehavior)Sanitizer|runtime error:')
MAX_SOCKET_PATH = 80  # of sockaddr_un's 107, with room for a name
BUSES = {'virtio-blk': ('virtio_blk',), 'virtio-scsi': ('virtio_scsi', 'sd_mod'), 'nvme': ('nvme',)}

POLLED = re.compile(r'debug: control client \d+: (qmp_capabilities|query-vms)$')  # lines that only wait_idle made

seed = int(os.environ.get('QPULL_TEST_SEED') or random.SystemRandom().randrange(1 << 32))
rng = random.Random(seed)
_children = []


def wait_until(condition, timeout=30, what='the condition', every=0.01):
    """Returns condition() as soon as it is true; TimeoutError with the words of `what` otherwise."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f'{what}: not within {timeout} s')
        time.sleep(every)


def _die_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def spawn(args, **kwargs):
    """A child process that does not outlive the test, however the test ends."""
    process = subprocess.Popen(args, preexec_fn=_die_with_parent, **kwargs)
    _children.append(process)
    return process


@atexit.register
def kill_children():
    for process in _children:
        if process.poll() is None:
            process.kill()
            process.wait()


def run(args, check=True, timeout=120, **kwargs):
    """A program to its end; its output is in the error where it fails."""
    done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=timeout,
                          preexec_fn=_die_with_parent, **kwargs)
    if check and done.returncode:
        raise AssertionError(f'{" ".join(map(str, args))}: exit status {done.returncode}\n{done.stdout}{done.stderr}')
    return done


def bin_dir():
    places = [os.environ.get('QPULL_BIN_DIR')] if os.environ.get('QPULL_BIN_DIR') else \
        [f'{TOP}/build/{b}bin' for b in ('release/', '', 'dev/')]
    for place in places:
        if os.path.exists(f'{place}/qpulld'):
            return place
    raise unittest.SkipTest(f'no qpulld in {" or ".join(places)}: build it first')


@functools.cache
def guest_parts():
    """{'kernel': path, 'initrd': path, 'pattern': path}"""
    if not shutil.which('qemu-system-x86_64') or not shutil.which('qemu-img'):
        raise unittest.SkipTest('missing: qemu-system-x86_64 or qemu-img (Debian: qemu-system-x86, qemu-utils)')
    done = run([f'{TOP}/tests/guest/build'], check=False, timeout=300)
    if done.returncode:
        raise unittest.SkipTest(f'the test guest cannot be built: {done.stderr.strip()}')
    return dict(line.split('=', 1) for line in done.stdout.splitlines())


@functools.cache
def library():
    return model.library(guest_parts()['pattern'])


@functools.cache
def qemu_version():
    words = run(['qemu-system-x86_64', '--version']).stdout
    return tuple(map(int, re.search(r'version (\d+)\.(\d+)\.(\d+)', words).groups()))


class GuestError(Exception):
    """The guest refused a command, or an operation of it failed."""


class Disk:
    """One disk of a guest. Its node is called node-NAME, its device (qdev id and serial number) NAME."""

    def __init__(self, name, size=64 * MIB, fmt='qcow2', bus='virtio-blk', path=None, backing=None, options='',
                 device='', cache='', iothread=None):
        self.name, self.size, self.fmt, self.bus = name, size, fmt, bus
        self.path = path          # None: made in the guest's folder
        self.backing = backing    # path of a qcow2 below
        self.options = options    # of qemu-img create -o
        self.device = device      # more properties of the device, ",…"
        self.cache = cache        # JSON object for the nodes' "cache", as a dict
        self.iothread = iothread  # id of an iothread object given in the guest's extra arguments
        self.node = f'node-{name}'
        self.model = None

    def create(self, folder):
        if self.path:
            return
        self.path = f'{folder}/{self.name}.{self.fmt}'
        args = ['qemu-img', 'create', '-q', '-f', self.fmt]
        if self.options:
            args += ['-o', self.options]
        if self.backing:
            args += ['-b', self.backing, '-F', 'qcow2']
        run(args + [self.path, str(self.size)])

    def arguments(self):
        common = {'discard': 'unmap'}
        if self.cache:
            common['cache'] = self.cache
        node = {'driver': self.fmt, 'node-name': self.node, **common,
                'file': {'driver': 'file', 'filename': self.path, **common}}
        device = {'virtio-blk': 'virtio-blk-pci', 'virtio-scsi': 'scsi-hd', 'nvme': 'nvme'}[self.bus]
        words = f'{device},id={self.name},drive={self.node},serial={self.name}{self.device}'
        if self.iothread:
            words += f',iothread={self.iothread}'
        return ['-blockdev', json.dumps(node), '-device', words]


class Load:
    """Background work of the guest on one disk; the plan and the number of operations tell what is on the disk."""

    def __init__(self, guest, disk, kinds, **options):
        self.guest, self.disk = guest, disk
        words = ' '.join(f'{k.replace("_", "-")}={v}' for k, v in options.items())
        answer = guest.numbers(f'load start {disk} {" ".join(kinds)} {words}')
        self.plan = model.Plan(options.get('seed', 0), answer['from'], answer['size'], options.get('unit', 4096),
                               options.get('max', 65536), sum(1 << model.KINDS.index(k) for k in kinds))

    def status(self):
        """{'ops': finished ones, 'errors': …, 'bad': sectors read back wrong, 'slowest-us': …, 'p50-us': …,
        'p99-us': …, 'ended': …}"""
        return self.guest.numbers(f'load status {self.disk}')

    def stop(self):
        """Stops it and brings the guest's model of the disk up to date."""
        return self._end('stop')

    def wait(self):
        """The same after limit= operations."""
        return self._end('wait')

    def _end(self, how):
        result = self.guest.numbers(f'load {how} {self.disk}', timeout=300)
        self.guest.disks[self.disk].model.replay(self.plan, 0, result['ops'])
        return result


class Guest:
    """One QEMU with the test guest. .qmp_path is for qpulld; .look is the test's own monitor; .disks by name.
    A further monitor for other tools is at .spare_qmp_path."""

    def __init__(self, folder, disks, smp=1, memory=192, machine='pc', extra=(), qemu='qemu-system-x86_64', name='vm',
                 start=True):
        self.folder, self.name = folder, name
        self.disks = {d.name: d for d in disks}
        self.qmp_path, self.spare_qmp_path = f'{folder}/{name}.qmp', f'{folder}/{name}.spare'
        self.log_path, self.console_path = f'{folder}/{name}.log', f'{folder}/{name}.console'
        self.smp, self.memory, self.machine, self.extra, self.qemu = smp, memory, machine, list(extra), qemu
        self.process = self.look = self.channel = None
        for disk in disks:
            disk.create(folder)
            disk.model = disk.model or model.Model(library(), disk.size)
        if start:
            self.start()

    def arguments(self):
        parts = guest_parts()
        modules = ['virtio_pci', 'virtio_console'] + sorted({m for d in self.disks.values() for m in BUSES[d.bus]})
        args = [self.qemu, '-accel', 'tcg', '-machine', self.machine, '-smp', str(self.smp), '-m', str(self.memory),
                '-nodefaults', '-no-user-config', '-display', 'none', '-name', self.name,
                '-kernel', parts['kernel'], '-initrd', parts['initrd'],
                '-append', f'console=ttyS0 quiet loglevel=4 panic=-1 no_timer_check qpull_modules={",".join(modules)}',
                '-chardev', f'file,id=console,path={self.console_path},append=on', '-serial', 'chardev:console',
                '-device', 'virtio-serial-pci', '-device', 'virtserialport,chardev=cmd,name=qpull.cmd',
                '-chardev', f'socket,id=cmd,path={self.folder}/{self.name}.cmd,server=on,wait=off']
        for i, path in enumerate((self.qmp_path, f'{self.folder}/{self.name}.look', self.spare_qmp_path)):
            args += ['-chardev', f'socket,id=qmp{i},path={path},server=on,wait=off',
                     '-mon', f'chardev=qmp{i},mode=control']
        if any(d.bus == 'virtio-scsi' for d in self.disks.values()):
            args += ['-device', 'virtio-scsi-pci']
        args += self.extra
        for disk in self.disks.values():
            args += disk.arguments()
        return args

    def start(self, timeout=60):
        """Boots; returns when the guest answers."""
        cmd, look = f'{self.folder}/{self.name}.cmd', f'{self.folder}/{self.name}.look'
        sockets = (cmd, look, self.qmp_path, self.spare_qmp_path)
        for path in filter(os.path.exists, sockets):  # of a QEMU that was killed
            os.unlink(path)
        with open(self.log_path, 'ab') as log:
            self.process = spawn(self.arguments(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(lambda: self._gone() or all(map(os.path.exists, sockets)), 20, 'QEMU\'s sockets')
        if self._gone():
            raise AssertionError(f'QEMU did not start:\n{self.log()}')
        self.look = Qmp(look)
        self.channel = socket.socket(socket.AF_UNIX)
        self.channel.connect(cmd)
        self.answers = b''
        self.wait_ready(timeout)

    def wait_ready(self, timeout=60):
        """The guest answers commands (after a boot, or a reset by somebody else)."""
        deadline = time.monotonic() + timeout
        while True:
            word = f'{rng.randrange(1 << 60)}'
            self._send(f'ping {word}')
            try:
                while self._answer(min(deadline, time.monotonic() + 10)) != f'ok {word}':
                    pass
                return
            except TimeoutError:  # the reset took the question with it
                if time.monotonic() > deadline:
                    raise TimeoutError(f'the guest does not answer\n{self.console()}') from None

    def _gone(self):
        return self.process.poll() is not None

    def _send(self, line):
        self.channel.settimeout(30)
        self.channel.sendall(line.encode() + b'\n')

    def _answer(self, deadline):
        while b'\n' not in self.answers:
            self.channel.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self.channel.recv(4096)
            except ConnectionResetError:
                data = b''
            if not data:
                raise ConnectionError(f'QEMU is gone:\n{self.log()}{self.console()}')
            self.answers += data
        line, self.answers = self.answers.split(b'\n', 1)
        return line.decode().strip()

    def cmd(self, line, timeout=60):
        """One command of tests/guest/init.c; the words of its answer."""
        self._send(line)
        status, _, words = self._answer(time.monotonic() + timeout).partition(' ')
        if status != 'ok':
            raise GuestError(f'{line}: {words}')
        return words

    def numbers(self, line, timeout=60):
        """A command that answers key=number …"""
        return {k: int(v) for k, v in (w.split('=') for w in self.cmd(line, timeout).split())}

    def write(self, disk, offset, length, pattern_seed):
        self.cmd(f'write {disk} {offset} {length} {pattern_seed}')
        self.disks[disk].model.write(offset, length, pattern_seed)

    def zero(self, disk, offset, length):
        self.cmd(f'zero {disk} {offset} {length}')
        self.disks[disk].model.zero(offset, length)

    def discard(self, disk, offset, length):
        self.cmd(f'discard {disk} {offset} {length}')
        self.disks[disk].model.discard(offset, length)

    def flush(self, disk):
        self.cmd(f'flush {disk}')

    def read_sum(self, disk, offset, length):
        return int(self.cmd(f'sum {disk} {offset} {length}'))

    def load(self, disk, kinds=('write', 'zero', 'discard', 'read', 'flush'), **options):
        """Starts a Load. Options: seed, from, size, unit, max, limit, pause_us; see init.c."""
        options.setdefault('seed', rng.randrange(1 << 60))
        return Load(self, disk, kinds, **options)

    def order_start(self, disks, **options):
        """Numbered records over disks (options seed, at, block, ring); judge a cut with check_order()."""
        words = ' '.join(f'{k}={v}' for k, v in options.items())
        self.cmd(f'order start {" ".join(disks)} {words}')

    def order_status(self):
        return self.numbers('order status')

    def order_stop(self):
        return self.numbers('order stop')

    def errors(self):
        """(how many operations failed since boot, the first one in words)"""
        count, _, first = self.cmd('errors').partition(' ')
        return int(count), first

    def check(self):
        """The guest saw no error, in its programs or in its kernel."""
        count, first = self.errors()
        if count:
            raise AssertionError(f'the guest saw {count} errors, the first: {first}')
        if re.search(r'I/O error|blk_update_request|timed out|Call Trace', self.console()):
            raise AssertionError(f'the guest\'s kernel complains:\n{self.console()}')

    def poweroff(self, timeout=60):
        """The guest shuts down by itself; QEMU must end with status 0."""
        self._send('poweroff')
        status = self.process.wait(timeout)
        self.close()
        if status:
            raise AssertionError(f'QEMU ended with {status}:\n{self.log()}')

    def quit(self, timeout=60):
        """QMP quit: QEMU ends cleanly under a running guest."""
        try:
            self.look('quit')
        except ConnectionError:
            pass
        self.process.wait(timeout)
        self.close()

    def kill(self):
        """kill -9, as a crash would."""
        if self.process and not self._gone():
            self.process.kill()
            self.process.wait()
        self.close()

    def close(self):
        for end in (self.look, self.channel):
            if end:
                end.close()
        self.look = self.channel = None

    def state(self):
        return graph_state(self.look)

    def deleted_fds(self):
        """Unlinked files that QEMU holds open: scratch files, if anything."""
        folder, found = f'/proc/{self.process.pid}/fd', []
        for fd in os.listdir(folder):
            try:
                target = os.readlink(f'{folder}/{fd}')
            except FileNotFoundError:
                continue
            # QEMU's own: memfd: and /dev/zero never carry a file's path under a folder
            if target.endswith(' (deleted)') and not target.startswith('/memfd:'):
                found.append(target)
        return found

    def log(self):
        return _tail(self.log_path)

    def console(self):
        return _tail(self.console_path)


class Bare(Guest):
    """A QEMU that runs no guest, where only its disks matter: up at once. Its disks are written through its monitor."""

    def arguments(self):
        args = super().arguments()
        for option in ('-kernel', '-initrd', '-append'):
            at = args.index(option)
            del args[at:at + 2]
        return args

    def wait_ready(self, timeout=60):
        pass

    def hmp(self, line):
        return self.look('human-monitor-command', {'command-line': line})

    def write(self, disk, offset, length, pattern_seed):
        """Fills with one byte; through the device, as a guest would."""
        path = next(d['qdev'] for d in self.look('query-block') if f'/{disk}/' in f'/{d.get("qdev")}/')
        words = self.hmp(f'qemu-io -d {path} "write -q -P {pattern_seed} {offset} {length}"')
        if words.strip():
            raise GuestError(f'write {disk} {offset} {length}: {words}')
        self.disks[disk].model.image[offset:offset + length] = bytes([pattern_seed]) * length

    def check(self):
        pass

    def poweroff(self, timeout=60):
        self.quit(timeout)


def _tail(path, length=6000):
    try:
        with open(path, encoding='utf-8', errors='replace') as f:
            return ''.join(line for line in f if not POLLED.search(line))[-length:]
    except FileNotFoundError:
        return ''


def check_order(images, order_seed, at=0, block=4096, ring=256):
    """Are these images (in the order given to order_start) a cut at one instant? The records' numbers; AssertionError
    if not: the number may not rise from one disk to the next, and not differ by more than one."""
    numbers = [model.order_highest(library(), image, order_seed, i, at, block, ring) for i, image in enumerate(images)]
    if any(a < b for a, b in zip(numbers, numbers[1:])) or numbers[0] - numbers[-1] > 1:
        raise AssertionError(f'not one instant: the disks hold records up to {numbers}')
    return numbers


class Qpulld:
    """A running daemon. vms: {name: Guest or QMP path}. .socket is its NBD socket, .control its control socket."""

    def __init__(self, folder, vms, flags=(), tcp=False, linger=None, program=None, start=True, name='qpulld',
                 state=None):
        self.folder, self.name = folder, name
        self.program = program or f'{bin_dir()}/qpulld'
        self.socket, self.control = f'{folder}/{name}.nbd', f'{folder}/{name}.control'
        self.pidfile, self.log_path = f'{folder}/{name}.pid', f'{folder}/{name}.log'
        self.scratch, self.state = f'{folder}/{name}.scratch', state or f'{folder}/{name}.state'
        self.flags = [f'--vm={n}={getattr(g, "qmp_path", g)}' for n, g in vms.items()]
        self.flags += [f'--listen=unix:{self.socket}', f'--control={self.control}', f'--scratch={self.scratch}',
                       f'--state={self.state}', f'--pidfile={self.pidfile}', '--log=debug']
        if tcp:
            self.flags += ['--listen=tcp:127.0.0.1:0', '--allow=ip:127.0.0.1=*']
        if linger is not None:
            self.flags += [f'--linger={linger}']
        if not any(f.startswith('--max-pause') for f in flags):
            self.flags += ['--max-pause=30']  # the machine that tests run on may have slow moments
        self.flags += list(flags)
        if os.environ.get('QPULL_TEST_ENGINE') and not any(f.startswith('--engine') for f in self.flags):
            self.flags += [f'--engine={os.environ["QPULL_TEST_ENGINE"]}']
        self.process = None
        if start:
            self.start()

    def start(self, timeout=30):
        """Returns when the daemon says it accepts clients: its pidfile is there."""
        for folder in (self.scratch, self.state):
            os.makedirs(folder, exist_ok=True)
        if os.path.exists(self.pidfile):
            os.unlink(self.pidfile)
        with open(self.log_path, 'ab') as log:
            self.process = spawn([self.program, *self.flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(lambda: self.process.poll() is not None or os.path.exists(self.pidfile), timeout, 'qpulld')
        if self.process.poll() is not None:
            raise AssertionError(f'qpulld ended with {self.process.returncode}:\n{self.log()}')

    def uri(self, export):
        from nbdpull import unix_uri
        return unix_uri(self.socket, export)

    def tcp_port(self):
        """The port that --listen tcp:127.0.0.1:0 got."""
        def find():
            with open(self.log_path, encoding='utf-8', errors='replace') as f:
                return re.findall(r'127\.0\.0\.1:([1-9]\d*)', f.read())
        return int(wait_until(find, 10, 'the port in the log')[-1])

    def tcp_uri(self, export):
        import urllib.parse
        return f'nbd://127.0.0.1:{self.tcp_port()}/{urllib.parse.quote(export)}'

    def qpull(self, *args, check=True, timeout=120):
        """The command-line tool against this daemon; the finished process."""
        return run([f'{os.path.dirname(self.program)}/qpull', '--control', self.control, *args], check, timeout)

    def json(self, *args):
        return json.loads(self.qpull(*args, '--json').stdout)

    def ask(self, command, arguments=None, timeout=30):
        """One command on the control socket; QmpError where it is refused."""
        control = Qmp(self.control, timeout)
        try:
            return control(command, arguments)
        finally:
            control.close()

    def vm(self, name='vm'):
        """What the daemon says about one VM."""
        return next(v for v in self.ask('query-vms') if v['name'] == name)

    def files_left(self):
        """What sessions must not leave in the folders. What is remembered of checkpoints, sessions and disks is
        meant to stay."""
        kept = ('checkpoints', 'history', 'lineage', 'locks')
        return os.listdir(self.scratch) + [f for f in os.listdir(self.state) if not f.startswith(kept)]

    def wait_idle(self, timeout=30, name='vm'):
        """No session is left of that VM, and it is ready for the next."""
        def idle():
            nonlocal vm
            vm = self.vm(name)
            return vm['session'] is None and vm['state'] == 'ready'
        vm = None
        try:
            wait_until(idle, timeout, 'the end of the session', every=0.05)
        except TimeoutError as e:
            raise TimeoutError(f'{e}; the daemon says {vm}') from None

    def stop(self, timeout=60):
        """SIGTERM; the daemon must tear down, end with status 0, leave no file and have nothing to hide."""
        self.process.terminate()
        status = self.process.wait(timeout)
        if status:
            raise AssertionError(f'qpulld ended with {status}:\n{self.log()}')
        self.check_log()
        left = os.listdir(self.scratch) + [p for p in (self.socket, self.control, self.pidfile) if os.path.exists(p)]
        if left:
            raise AssertionError(f'qpulld left files behind: {left}')

    def kill(self):
        """kill -9."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def check_log(self):
        with open(self.log_path, errors='replace') as f:
            text = f.read()
        found = SANITIZER_WORDS.search(text)
        if found:
            raise AssertionError(f'a sanitizer complains:\n{text[max(0, found.start() - 500):found.start() + 6000]}')

    def log(self):
        return _tail(self.log_path)


class Case(unittest.TestCase):
    """A test with a folder of its own; guest() and qpulld() make what goes away with it."""
    longMessage = True
    maxDiff = 4000

    @classmethod
    def setUpClass(cls):
        guest_parts()

    def run(self, result=None):
        problems = len(result.failures) + len(result.errors)
        base = tempfile.gettempdir()
        self.folder = tempfile.mkdtemp(prefix='qpull-test-', dir=base if len(base) < MAX_SOCKET_PATH - 24 else '/tmp')
        self.things = []
        try:
            return super().run(result)
        finally:
            failed = len(result.failures) + len(result.errors) > problems
            for thing in reversed(self.things):
                thing.kill()
                if failed:
                    for path in (thing.log_path, getattr(thing, 'console_path', None)):
                        if path and _tail(path):
                            print(f'--- end of {os.path.basename(path)}\n{_tail(path)}', file=sys.stderr)
            if failed and os.environ.get('QPULL_TEST_KEEP'):
                print(f'--- kept: {self.folder}', file=sys.stderr)
            else:
                shutil.rmtree(self.folder, ignore_errors=True)

    def guest(self, *disks, **options):
        """A booted Guest with these Disks (default: one of an odd size, called vda)."""
        guest = Guest(self.folder, disks or [Disk('vda', 64 * MIB + 3 * 512)], start=False, **options)
        self.things.append(guest)
        guest.start()
        return guest

    def bare(self, *disks, **options):
        """The same without a guest's operating system."""
        guest = Bare(self.folder, disks or [Disk('vda', 16 * MIB + 3 * 512)], start=False, **options)
        self.things.append(guest)
        guest.start()
        return guest

    def qpulld(self, vms, **options):
        """A running Qpulld; vms is one Guest or {name: Guest}."""
        daemon = Qpulld(self.folder, vms if isinstance(vms, dict) else {vms.name: vms}, start=False, **options)
        self.things.append(daemon)
        daemon.start()
        return daemon

    def raw(self, disk):
        """The content of an image that nobody writes to, through qemu-img."""
        path = f'{self.folder}/converted.raw'
        run(['qemu-img', 'convert', '-f', disk.fmt, '-O', 'raw', disk.path, path])
        with open(path, 'rb') as f:
            data = bytearray(f.read())
        os.unlink(path)
        return data

    def assertSame(self, data, expected, what='the data'):
        """Equal bytes; says where they are not (assertEqual would print megabytes)."""
        self.assertEqual(len(data), len(expected), f'{what}: size')
        if data == expected:
            return
        bad = [o for o in range(0, len(data), 512) if data[o:o + 512] != expected[o:o + 512]]
        self.fail(f'{what}: {len(bad)} sectors differ, the first at {bad[0]}, the last at {bad[-1]}')

    def assertNothingLeft(self, guest, daemon, before):
        """QEMU is as it was, and there is no file or descriptor of a session anywhere."""
        self.assertEqual(guest.state(), before)
        self.assertEqual(guest.deleted_fds(), [])
        self.assertEqual(daemon.files_left(), [])

    def assertModel(self, disk_model, data, what='the data'):
        n, first = disk_model.compare(data)
        if n:
            self.fail(f'{what}: {n} sectors are not what the guest wrote, the first at {first}')


def main():
    """Runs the calling file's tests; exit status 77 where none could run."""
    print(f'seed: QPULL_TEST_SEED={seed}', file=sys.stderr, flush=True)
    program = unittest.main(module='__main__', exit=False, verbosity=2)
    result = program.result
    if not result.wasSuccessful():
        print(f'replay with QPULL_TEST_SEED={seed}', file=sys.stderr)
        sys.exit(1)
    sys.exit(SKIPPED if result.skipped and len(result.skipped) >= result.testsRun else 0)
