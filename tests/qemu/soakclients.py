# SPDX-License-Identifier: LGPL-2.1-or-later
"""What clients do in one session of the soak (soakworld.py), and what they have of each disk when it is over. A client
never judges: it notes what it got, and whether it said goodbye."""
import random
import signal
import socket
import subprocess
import time

import harness
import nbd
import nbdpull
from harness import MIB

REQUESTS = (4096, 65536, 1 << 18, 1 << 20)
BATCH = MIB           # bytes that are asked for at once
PAUSE = 0.02          # seconds between two of them, at most: a session lasts long enough to be hit
BACK_IN = 0.3         # seconds after which a client that lost its network is back
DISK_TIMEOUT = 60     # of nbdcopy

# What ends a client's work when something breaks under it; whatever else comes is a flaw.
BROKEN = (nbd.Error, OSError, EOFError, TimeoutError)


class Inconstant(AssertionError):
    """What was read twice in one session was not the same."""


class Part:
    """What clients have of one disk."""

    def __init__(self, disk):
        self.disk = disk
        self.image, self.buffer = bytearray(disk.size), bytearray(disk.size)
        self.got = []          # (offset, length) that was read
        self.maps = {}         # context: extents
        self.opened = False
        self.bye = 'no'        # 'yes': the last one to leave said goodbye and no read had failed; 'maybe': who knows

    def put(self, offset, data):
        for at, length in self.got:
            begin, end = max(at, offset), min(at + length, offset + len(data))
            if begin < end and self.image[begin:end] != data[begin - offset:end - offset]:
                raise Inconstant(f'{self.disk.name}: {offset} is not what it was before')
        self.image[offset:offset + len(data)] = data
        self.got.append((offset, len(data)))

    def is_whole(self):
        at = 0
        for offset, length in sorted(self.got):
            if offset > at:
                return False
            at = max(at, offset + length)
        return at == self.disk.size


class Session:
    """One session's clients. world: daemon, choices (a random.Random), known checkpoints; phase(name) is told when a
    phase of it begins: 'go', 'read', 'leave'."""

    def __init__(self, world, choices, name):
        self.world, self.rng = world, choices
        self.name = name            # of the checkpoint, or None
        self.parts = {}
        self.error = None           # what ended it before its time
        self.came_late = False
        self.handles = []           # (handle, part)
        self.since = {}             # disk: names whose maps were asked for
        self.stop_reading = None    # after so many batches the client is gone

    # -- what all of them do -------------------------------------------------------------------------------------------

    def part(self, disk):
        return self.parts.setdefault(disk.name, Part(disk))

    def export(self, disk):
        return f'vm/{disk.name}' + (f'@{self.name}' if self.name else '')

    def open(self, disk, contexts=()):
        h = nbdpull.connect(self.world.daemon.uri(self.export(disk)), contexts)
        part = self.part(disk)
        part.opened = True
        self.handles.append((h, part))
        return h

    def maps(self, h, part, contexts):
        for context in contexts:
            if not h.can_meta_context(context):
                raise AssertionError(f'{part.disk.name}: {context} is not offered')
            part.maps[context] = nbdpull.read_map(h, context)

    def batches(self, disk):
        """Everything, in an order of its own, and some of it twice."""
        whole = [(at, min(BATCH, disk.size - at)) for at in range(0, disk.size, BATCH)]
        twice = self.rng.sample(whole, min(2, len(whole)))
        if self.rng.random() < 0.5:
            self.rng.shuffle(whole)
        return whole + twice

    def read(self, handles, part, batches):
        """False: this client is gone in the middle."""
        for batch in batches:
            if self.stop_reading is not None:
                self.stop_reading -= 1
                if self.stop_reading < 0:
                    return False
            h = self.rng.choice(handles)
            nbdpull.read_ranges(h, [batch], part.buffer, self.rng.choice(REQUESTS), self.rng.choice((1, 4, 8)))
            part.put(batch[0], part.buffer[batch[0]:batch[0] + batch[1]])
            time.sleep(self.rng.random() * PAUSE)
        return True

    def leave(self):
        """In order: every handle says goodbye."""
        self.world.phase('leave')
        for h, part in self.handles:
            part.bye = 'maybe'
            h.shutdown()
        for _, part in self.handles:
            part.bye = 'yes'
        self.handles = []

    def drop(self):
        """All connections break; a goodbye that was not finished stays in doubt."""
        for h, part in self.handles:
            part.bye = part.bye if part.bye == 'maybe' else 'no'
            try:
                nbdpull.drop(h)
            except BROKEN:  # it has broken already
                pass
        self.handles = []

    def choose_disks(self):
        disks = list(self.world.vm.disks.values())
        return self.rng.sample(disks, self.rng.choice((1, 1, 2)))

    # -- the clients ---------------------------------------------------------------------------------------------------

    def one_after_the_other(self):
        """Full pulls of one disk or two, by one to four connections each."""
        disks = self.choose_disks()
        self.world.phase('go')
        for disk in disks:
            for _ in range(self.rng.choice((1, 2, 4))):
                self.open(disk, [nbdpull.ALLOCATION])
        self.world.is_open()
        self.world.phase('read')
        for disk in disks:
            part = self.part(disk)
            mine = [h for h, p in self.handles if p is part]
            self.maps(mine[0], part, [nbdpull.ALLOCATION])
            if not self.read(mine, part, self.batches(disk)):
                return self.drop()
        return self.leave()

    def incremental(self):
        """Maps of what changed since some checkpoints, and everything besides to compare."""
        disks = self.choose_disks()
        self.world.phase('go')
        for disk in disks:
            known = self.world.checkpoints[disk.name]
            self.since[disk.name] = self.rng.sample(sorted(known), min(len(known), self.rng.randrange(1, 4)))
            self.open(disk, [nbdpull.dirty_context(s) for s in self.since[disk.name]])
        self.world.is_open()
        self.world.phase('read')
        for h, part in list(self.handles):
            self.maps(h, part, [nbdpull.dirty_context(s) for s in self.since[part.disk.name]])
            if not self.read([h], part, self.batches(part.disk)):
                return self.drop()
        return self.leave()

    def network_lost(self):
        """It comes back within linger and goes on."""
        disk = self.choose_disks()[0]
        self.world.phase('go')
        h, part = self.open(disk), self.part(disk)
        self.world.is_open()
        session = self.world.session_id()
        self.world.phase('read')
        batches = self.batches(disk)
        cut = self.rng.randrange(len(batches) + 1)
        self.read([h], part, batches[:cut])
        self.drop()
        time.sleep(self.rng.random() * BACK_IN)
        h = self.open(disk)
        if self.world.session_id() != session or session is None:  # a busy machine: it lingers no more
            self.came_late = True
            return self.drop()
        self.read([h], part, batches[cut:])
        return self.leave()

    def looks_only(self):
        """Opens it and says goodbye: it had all the bytes that it wanted."""
        disk = self.choose_disks()[0]
        self.world.phase('go')
        self.open(disk)
        self.world.is_open()
        self.world.phase('read')
        time.sleep(self.rng.random() * 0.1)
        return self.leave()

    def nbdcopy(self):
        """The stock client, which may be killed."""
        disk = self.choose_disks()[0]
        path = f'{self.world.folder}/copied'
        self.world.phase('go')
        part = self.part(disk)
        part.bye = 'maybe'
        part.opened = True
        copy = harness.spawn(['nbdcopy', '--connections=4', self.world.daemon.uri(self.export(disk)), path],
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.world.phase('read')
        killed = self.stop_reading is not None
        if killed:
            time.sleep(self.rng.random() * 0.4)
            copy.kill()
        _, words = copy.communicate(timeout=DISK_TIMEOUT)
        self.world.is_open()
        self.world.phase('leave')
        if copy.returncode == 0:
            with open(path, 'rb') as f:
                part.put(0, f.read())
            part.bye = 'yes'
        elif copy.returncode != -signal.SIGKILL or not killed:
            raise OSError(f'nbdcopy: {words.decode().strip()}')


class Noise:
    """Clients that are no use to anybody, while the session goes on."""

    def __init__(self, daemon, choices):
        self.sockets = []
        for _ in range(choices.randrange(4)):
            what = random.Random(choices.randrange(1 << 30))
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(daemon.socket)
                sock.settimeout(5)
                if what.random() < 0.7:
                    sock.sendall(what.randbytes(what.randrange(200)))
            except OSError:
                sock.close()
                continue
            self.sockets.append(sock)

    def close(self):
        for sock in self.sockets:
            sock.close()
