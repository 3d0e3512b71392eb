#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""NBD clients that are slow, stuck, greedy or hostile, as a process of their own, so that they can be stopped and are
never in the way of the test that watches:

    badclients.py KIND ADDRESS EXPORT COUNT

ADDRESS is the path of a unix socket or HOST:PORT. "ready" is printed when they are at it; then they go on until the
process is killed, or for the kinds that have an end until "done NUMBER" is printed. What the server closes is opened
again."""
import os
import selectors
import socket
import struct
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import rawnbd  # noqa: E402

MIB = 1 << 20
LONG, DEEP = 32 * MIB, 64  # a greedy client's reads: as long, and as many in flight, as a server must bear
KINDS = {}


def kind(run):
    KINDS[run.__name__.replace('_', '-')] = run
    return run


def requests(command, offset, length, count, first=1, size=None):
    """So many of them as bytes; with size the offsets walk through the disk."""
    return b''.join(struct.pack('>IHHQQI', rawnbd.REQUEST_MAGIC, 0, command, first + i,
                                (offset + i * length) % (size - length + 1) if size else offset, length)
                    for i in range(count))


def open_all(address, export, count, contexts=(), **options):
    """[(client, size)]"""
    found = []
    for _ in range(count):
        raw = rawnbd.Raw(address, **options)
        found.append((raw, raw.go(export, contexts=contexts)))
    return found


def ready():
    print('ready', flush=True)


def stay():
    while True:
        time.sleep(3600)


def flood(raw, data):
    """As much as the sockets take, without an eye for answers."""
    raw.sock.setblocking(False)
    try:
        while data:
            data = data[raw.sock.send(data):]
    except (BlockingIOError, ConnectionError):
        pass


def ask_for_all(raw, size):
    length = min(LONG, size)
    flood(raw, requests(rawnbd.CMD_READ, 0, length, DEEP, size=size))


@kind
def never_reads(address, export, count):
    """Asks for 2 GiB and takes nothing."""
    for raw, size in (clients := open_all(address, export, count)):
        ask_for_all(raw, size)
    ready()
    stay()
    del clients


@kind
def reads_and_stops(address, export, count):
    """Asks for 2 GiB, takes 16 MiB as fast as they come, and then nothing."""
    clients = open_all(address, export, count)
    for raw, size in clients:
        ask_for_all(raw, size)
        raw.sock.setblocking(True)
        left = 16 * MIB
        while left > 0:
            left -= len(raw.sock.recv(MIB)) or left
    ready()
    stay()


@kind
def trickles(address, export, count):
    """Asks for 2 GiB and takes 16 KiB of it ten times a second."""
    clients = open_all(address, export, count)
    for raw, size in clients:
        ask_for_all(raw, size)
    ready()
    while True:
        time.sleep(0.1)
        for raw, _ in clients:
            try:
                raw.sock.recv(16384)
            except (BlockingIOError, ConnectionError):
                pass


def read_all(clients, refill):
    """Takes whatever comes; refill(client, bytes taken) may ask for more."""
    buffer = memoryview(bytearray(MIB))
    selector = selectors.DefaultSelector()
    for raw, _ in clients:
        raw.sock.setblocking(False)
        selector.register(raw.sock, selectors.EVENT_READ, raw)
    while selector.get_map():
        for key, _ in selector.select():
            try:
                n = key.fileobj.recv_into(buffer)
            except BlockingIOError:
                continue
            except ConnectionError:
                n = 0
            if n == 0:
                selector.unregister(key.fileobj)
            else:
                refill(key.data, n)


@kind
def greedy(address, export, count):
    """32 MiB reads, 64 in flight, always, and taken as fast as they come."""
    clients = open_all(address, export, count)
    got = {}

    def refill(raw, n):
        got[raw] = got.get(raw, 0) + n
        while got[raw] >= length:
            got[raw] -= length
            flood(raw, requests(rawnbd.CMD_READ, 0, length, 1))
    length = min(LONG, clients[0][1])
    for raw, size in clients:
        ask_for_all(raw, size)
    ready()
    read_all(clients, refill)


@kind
def idles(address, export, count):
    """Opens the disk and asks for nothing."""
    clients = open_all(address, export, count)
    ready()
    stay()
    del clients


@kind
def silent(address, export, count):
    """Connects and says nothing; half of them not even their flags."""
    def one(i):
        return rawnbd.Raw(address, handshake=i % 2 == 0)
    clients = [one(i) for i in range(count)]
    ready()
    while True:
        time.sleep(0.2)
        for i, raw in enumerate(clients):
            try:
                raw.sock.setblocking(False)
                while raw.sock.recv(4096):
                    pass
            except BlockingIOError:
                continue
            except ConnectionError:
                pass
            raw.close()
            try:
                clients[i] = one(i)
            except (OSError, EOFError):
                pass


@kind
def half_an_option(address, export, count):
    """Sends all but the last byte of the longest option that is read."""
    clients = []
    for _ in range(count):
        raw = rawnbd.Raw(address)
        raw.option(rawnbd.OPT_STRUCTURED)
        raw.send_option(rawnbd.OPT_SET_META_CONTEXT, bytes(65535), length=65536)
        clients.append(raw)
    ready()
    stay()


@kind
def comes_and_goes(address, export, count):
    """Connects and leaves; for the kinds of leaving there are. Has an end."""
    ready()
    for i in range(count):
        try:
            raw = rawnbd.Raw(address, handshake=i % 3 != 0)
            if i % 3 == 2:
                raw.send_option(rawnbd.OPT_ABORT)
            raw.close()
        except (OSError, EOFError):
            pass
    print(f'done {count}', flush=True)


@kind
def asks_for_info(address, export, count):
    """LIST, INFO and LIST_META_CONTEXT without end."""
    ready()
    while True:
        try:
            clients = [rawnbd.Raw(address) for _ in range(count)]
            for raw in clients:
                raw.option(rawnbd.OPT_STRUCTURED)
            for _ in range(300):
                for raw in clients:
                    raw.option(rawnbd.OPT_LIST)
                    raw.option(rawnbd.OPT_INFO, rawnbd.string(export) + struct.pack('>H', 0))
                    raw.option(rawnbd.OPT_LIST_META_CONTEXT, rawnbd.string(export) + struct.pack('>I', 0))
        except (OSError, EOFError, rawnbd.Refused):
            continue
        finally:
            for raw in clients:
                raw.close()


@kind
def asks_and_does_not_read(address, export, count):
    """LIST, a thousand times, and takes no answer."""
    clients = []
    for _ in range(count):
        raw = rawnbd.Raw(address, receive_buffer=4096)
        flood(raw, struct.pack('>QII', rawnbd.OPTION_MAGIC, rawnbd.OPT_LIST, 0) * 1000)
        clients.append(raw)
    ready()
    stay()


@kind
def asks_for_status(address, export, count):
    """BLOCK_STATUS of the whole disk, 64 in flight, and takes the answers."""
    clients = open_all(address, export, count, contexts=['base:allocation', 'qemu:allocation-depth'])
    length = {raw: min(size, (1 << 32) - 512) & ~511 for raw, size in clients}

    def refill(raw, n):
        flood(raw, requests(rawnbd.CMD_BLOCK_STATUS, 0, length[raw], 1))
    for raw, _ in clients:
        flood(raw, requests(rawnbd.CMD_BLOCK_STATUS, 0, length[raw], 64))
    ready()
    read_all(clients, refill)


@kind
def status_and_does_not_read(address, export, count):
    """BLOCK_STATUS of the whole disk, 100,000 times, and takes no answer."""
    clients = open_all(address, export, count, contexts=['base:allocation', 'qemu:allocation-depth'],
                       receive_buffer=4096)
    for raw, size in clients:
        flood(raw, requests(rawnbd.CMD_BLOCK_STATUS, 0, min(size, (1 << 32) - 512) & ~511, 100000))
    ready()
    stay()


@kind
def pipelines(address, export, count):
    """100,000 reads of 4 KiB each, sent as fast as they are taken. Has an end: how many were answered."""
    clients = open_all(address, export, count)
    total, left = 100000, {}
    todo = {raw: memoryview(requests(rawnbd.CMD_READ, 0, 4096, total, size=size)) for raw, size in clients}
    selector = selectors.DefaultSelector()
    buffer = memoryview(bytearray(MIB))
    for raw, _ in clients:
        raw.sock.setblocking(False)
        left[raw] = total * (16 + 4096)
        selector.register(raw.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, raw)
    ready()
    while selector.get_map():
        for key, events in selector.select():
            raw = key.data
            if events & selectors.EVENT_WRITE:
                todo[raw] = todo[raw][raw.sock.send(todo[raw][:65536]):]
                if not todo[raw]:
                    selector.modify(raw.sock, selectors.EVENT_READ, raw)
            if events & selectors.EVENT_READ:
                n = raw.sock.recv_into(buffer)
                left[raw] -= n
                if n == 0 or left[raw] <= 0:
                    selector.unregister(raw.sock)
    print(f'done {sum(n == 0 for n in left.values()) * total}', flush=True)


@kind
def writes_bytes(address, export, count):
    """Everything that it sends comes in segments of one byte: options and requests."""
    clients = []
    for _ in range(count):
        raw = rawnbd.Raw(address, handshake=False)
        raw.take(18)
        put, raw.put = raw.put, lambda data, put=raw.put: [put(data[i:i + 1]) for i in range(len(data))]
        raw.put(struct.pack('>I', rawnbd.FIXED_NEWSTYLE | rawnbd.NO_ZEROES))
        clients.append((raw, raw.go(export)))
        del put
    ready()
    while True:
        for raw, _ in clients:
            raw.read(0, 4096)


def main():
    name, address, export, count = sys.argv[1:]
    if not address.startswith('/'):
        host, port = address.rsplit(':', 1)
        address = (host, int(port))
    KINDS[name](address, export, int(count))


if __name__ == '__main__':
    main()
