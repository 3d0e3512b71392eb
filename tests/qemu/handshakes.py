# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random and mutated NBD handshakes, each a pure function of (seed, number), and a crowd of clients that say them."""
import random
import selectors
import socket
import struct
import time

import rawnbd

KIB = 1 << 10
OPTIONS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 1 << 31, 0xffffffff]
CONTEXTS = [b'base:allocation', b'qemu:dirty-bitmap:', b'qemu:', b'base:', b'', b'x:y', b'qemu:allocation-depth']
NUMBERS = [0, 1, 3, 7, 255, 4096, 4097, 65536, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff]
AT_ONCE = 48
PATIENCE = 60  # seconds for all that are under way together to move at all
HEARD_MAX = 64 << 20  # bytes of one answer: no disk here is so long


def say_option(number, data=b'', length=None):
    return struct.pack('>QII', rawnbd.OPTION_MAGIC, number, len(data) if length is None else length) + data


def one_option(r, names):
    """An option in due form, for a name that may be there or not."""
    number = r.choice(OPTIONS)
    name = r.choice(names)
    if number in (6, 7):
        infos = [r.randrange(5) for _ in range(r.randrange(4))]
        data = rawnbd.string(name) + struct.pack(f'>H{len(infos)}H', len(infos), *infos)
    elif number in (9, 10):
        queries = [r.choice(CONTEXTS) for _ in range(r.randrange(4))]
        data = rawnbd.string(name) + struct.pack('>I', len(queries)) + b''.join(map(rawnbd.string, queries))
    elif number == 1:
        data = name
    else:
        data = r.choice([b'', b'', b'', name, bytes(r.randrange(16))])
    return say_option(number, data, r.choice(NUMBERS) if r.random() < 0.04 else None)


def one_request(r):
    command = r.choice([0, 0, 0, 7, 7, 1, 2, 3, 4, 5, 6, 9])
    offset = r.choice([0, 0, 512, 1 << 20, (8 << 20) - 512, 8 << 20, 1 << 40, r.randrange(8 << 20)])
    head = struct.pack('>IHHQQI', rawnbd.REQUEST_MAGIC, r.choice([0, 0, 0, 4, 8, 0xffff]), command, r.getrandbits(64),
                       offset, r.choice([0, 1, 512, 4096, 64 * KIB]))
    return head + (b'x' * 512 if command == 1 else b'')


def mutate(r, data):
    data = bytearray(data)
    for _ in range(r.choice([1, 1, 1, 2, 4, 16])):
        at = r.randrange(len(data) + 1)
        way = r.randrange(7)
        if way == 0 and at < len(data):
            data[at] ^= 1 << r.randrange(8)
        elif way == 1:
            data[at:at] = r.randbytes(r.choice([1, 2, 4, 64]))
        elif way == 2:
            del data[at:at + r.choice([1, 2, 4, 16])]
        elif way == 3:
            data[at:at] = data[at:at + r.randrange(64)]
        elif way == 4:
            del data[at:]
        elif way == 5:
            data[at:at + 4] = struct.pack('>I', r.choice(NUMBERS))
        else:
            data[at:at + 8] = struct.pack('>Q', rawnbd.OPTION_MAGIC)
    return bytes(data)


def handshake(seed, number, names):
    """All that this client says before it shuts its end."""
    r = random.Random(f'{seed}:{number}')
    if r.random() < 0.03:
        return r.randbytes(r.randrange(300))
    said = struct.pack('>I', r.choice([3, 3, 3, 3, 3, 1, 2, 0]))
    if r.random() < 0.5:
        said += say_option(8)
    said += b''.join(one_option(r, names) for _ in range(r.randrange(1, 7)))
    if r.random() < 0.5:
        said += say_option(7, rawnbd.string(r.choice(names)) + b'\0\0')
        said += b''.join(one_request(r) for _ in range(r.randrange(4)))
    return mutate(r, said) if r.random() < 0.6 else said


class Client:
    def __init__(self, address, source, hold, number, said):
        self.number, self.said, self.heard, self.at = number, said, bytearray(), 0
        self.hold, self.moved, self.shut = hold, time.monotonic(), False
        self.sock = socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX)
        if source:
            self.sock.bind(source)
        self.sock.connect(address)
        self.sock.setblocking(False)

    def end(self):
        """Shuts its end when all is said, and nothing was heard for so long."""
        if self.at == len(self.said) and not self.shut and time.monotonic() - self.moved >= self.hold:
            self.shut = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the daemon was faster

    def move(self):
        """Says and hears what it can; True: the daemon has hung up."""
        self.moved = time.monotonic()
        try:
            while self.at < len(self.said):
                self.at += self.sock.send(self.said[self.at:])
        except BlockingIOError:
            pass
        except OSError:
            self.at = len(self.said)  # it hears no more
        self.end()
        try:
            while len(self.heard) < HEARD_MAX:
                data = self.sock.recv(1 << 16)
                if not data:
                    return True
                self.heard += data
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True


def crowd(address, said, source=None, hold=0):
    """Each of (number, bytes) is said by a client of its own, many at a time: (number, bytes, answer) as they end.

    A client shuts its end when it has said all and then heard nothing for `hold` seconds. With 0 the daemon may find it
    gone before it is answered.
    """
    waiting, selector, open_now = iter(said), selectors.DefaultSelector(), set()
    deadline = time.monotonic() + PATIENCE
    try:
        while True:
            while len(open_now) < AT_ONCE and (item := next(waiting, None)):
                client = Client(address, source, hold, *item)
                client.end()
                open_now.add(client)
                selector.register(client.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, client)
            if not open_now:
                return
            for key, _ in selector.select(min(hold, 1) / 4 or 1):
                client = key.data
                deadline = time.monotonic() + PATIENCE
                if client.move():
                    selector.unregister(client.sock)
                    client.sock.close()
                    open_now.discard(client)
                    yield client.number, client.said, bytes(client.heard)
                elif client.at == len(client.said):
                    selector.modify(client.sock, selectors.EVENT_READ, client)
            for client in open_now if hold else ():
                client.end()
            if time.monotonic() > deadline:
                raise TimeoutError(f'no answer and no end for {sorted(c.number for c in open_now)}')
    finally:
        for client in open_now:
            client.sock.close()
        selector.close()
