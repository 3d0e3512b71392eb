#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long a dirty map of a huge, fragmented disk takes to reach a client, and what it costs in memory: qpulld against
QEMU's own export of the same bitmap, and against a bare socket that sends the very same bytes (A B C A B C …).

    tests/bench/maps.py [--rounds N] [--extents N] [--size TIB] [--client nbdinfo|libnbd] [--json FILE]

The client is nbdinfo --map --totals. The bare socket answers each question of that client with bytes that were recorded
from qpulld before: what no server can be faster than."""
import argparse
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '../qemu'))
import harness  # noqa: E402
import nbd  # noqa: E402
import nbdpull  # noqa: E402
import rawnbd  # noqa: E402
from harness import MIB, Disk, Qmp  # noqa: E402

KIB, TIB = 1 << 10, 1 << 40
CHECKPOINT, GRANULARITY = 'before', 64 * KIB
CONTEXT = nbdpull.dirty_context(CHECKPOINT)
IN_FLIGHT = 64
# NBD's extended headers, which libnbd asks for since 1.18
OPT_EXTENDED, EXTENDED_REQUEST_MAGIC, EXTENDED_CHUNK_MAGIC, CHUNK_STATUS_EXTENDED = 11, 0x21e41c71, 0x6e8a278c, 6
CHUNK_STATUS = 5


def make_disk(folder, size, nextents):
    """A qcow2 image whose persistent bitmap has so many extents; nothing is allocated in it."""
    disk = Disk('vda', size)
    disk.model = True  # nobody asks it, and it would hold all bytes
    disk.create(folder)
    qmp, sock = f'{folder}/make.qmp', f'{folder}/make.nbd'
    node = {'driver': 'qcow2', 'node-name': 'd', 'discard': 'unmap', 'file': {'driver': 'file', 'filename': disk.path}}
    daemon = harness.spawn(['qemu-storage-daemon', '--blockdev', json.dumps(node), '--nbd-server', f'addr.type=unix,addr.path={sock}',
                            '--export', 'type=nbd,id=e,node-name=d,name=d,writable=on',
                            '--chardev', f'socket,id=c,path={qmp},server=on,wait=off', '--monitor', 'chardev=c'])
    harness.wait_until(lambda: os.path.exists(qmp) and os.path.exists(sock), 20, 'the storage daemon')
    monitor = Qmp(qmp)
    monitor('block-dirty-bitmap-add', {'node': 'd', 'name': CHECKPOINT, 'persistent': True, 'granularity': GRANULARITY})
    h = nbd.NBD()
    h.connect_uri(nbdpull.unix_uri(sock, 'd'))
    stride = size // (nextents // 2) // GRANULARITY * GRANULARITY
    pending = 0
    for i in range(nextents // 2):
        h.aio_zero(GRANULARITY, i * stride)
        while h.aio_in_flight() >= IN_FLIGHT:
            h.poll(-1)
            while h.aio_peek_command_completed() > 0:
                h.aio_command_completed(h.aio_peek_command_completed())
    while h.aio_in_flight():
        h.poll(-1)
    h.shutdown()
    monitor('quit')
    daemon.wait()
    return disk


def export_directly(guest, folder):
    """What a tool would do without us: a disabled copy of the record, exported by QEMU."""
    path = f'{folder}/direct.nbd'
    q = guest.look
    q('block-dirty-bitmap-add', {'node': 'node-vda', 'name': 'copy', 'granularity': GRANULARITY, 'disabled': True})
    q('block-dirty-bitmap-merge', {'node': 'node-vda', 'target': 'copy', 'bitmaps': [CHECKPOINT]})
    q('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': path}}})
    q('block-export-add', {'type': 'nbd', 'id': 'direct', 'node-name': 'node-vda', 'name': 'd', 'bitmaps': ['copy']})
    return path


def bare_server(path, size, recorder, context):
    """Serves recorded BLOCK_STATUS answers."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(4)

    def take(c, n):
        data = b''
        while len(data) < n:
            part = c.recv(n - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def reply(c, option, kind, data=b''):
        c.sendall(struct.pack('>QIII', rawnbd.REPLY_MAGIC, option, kind, len(data)) + data)

    def serve(c):
        c.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MIB)
        c.sendall(struct.pack('>QQH', rawnbd.INIT_MAGIC, rawnbd.OPTION_MAGIC, 3))
        take(c, 4)
        while True:
            _, option, length = struct.unpack('>QII', take(c, 16))
            take(c, length)
            if option == rawnbd.OPT_STRUCTURED or (option == OPT_EXTENDED and recorder.extended):
                reply(c, option, rawnbd.REP_ACK)
            elif option in (rawnbd.OPT_SET_META_CONTEXT, rawnbd.OPT_LIST_META_CONTEXT):
                reply(c, option, rawnbd.REP_META_CONTEXT, struct.pack('>I', 1) + context.encode())
                reply(c, option, rawnbd.REP_ACK)
            elif option == rawnbd.OPT_GO:
                reply(c, option, rawnbd.REP_INFO, struct.pack('>HQH', 0, size, 3))
                for sizes in recorder.block_sizes[:1]:
                    reply(c, option, rawnbd.REP_INFO, sizes)
                reply(c, option, rawnbd.REP_ACK)
                break
            elif option == rawnbd.OPT_ABORT:
                return
            else:
                reply(c, option, rawnbd.ERR_UNSUP)
        while True:
            request = recorder.request
            _, _, kind, cookie, offset, length = request.unpack(take(c, request.size))
            if kind == rawnbd.CMD_DISC:
                return
            data = recorder.answers[offset, length]
            if recorder.extended:
                head = struct.pack('>IHHQQQ', EXTENDED_CHUNK_MAGIC, rawnbd.CHUNK_DONE, CHUNK_STATUS_EXTENDED, cookie, offset, len(data))
            else:
                head = struct.pack('>IHHQI', rawnbd.CHUNK_MAGIC, rawnbd.CHUNK_DONE, CHUNK_STATUS, cookie, len(data))
            c.sendall(head + data)

    def run():
        while True:
            c, _ = listener.accept()
            try:
                serve(c)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                pass
            c.close()

    threading.Thread(target=run, daemon=True).start()


class Recorder:
    """Between nbdinfo and qpulld once: .answers is {(offset, length): the chunk's payload as it was sent}."""

    def __init__(self, path, target):
        self.answers, self.block_sizes, self.path = {}, [], path
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)
        self.thread = threading.Thread(target=self._run, args=(listener, target), daemon=True)
        self.thread.start()

    def _run(self, listener, target):
        client, _ = listener.accept()
        server = socket.socket(socket.AF_UNIX)
        server.connect(target)
        up, down = bytearray(), bytearray()

        def pump(a, b, log):
            while True:
                data = a.recv(1 << 16)
                if not data:
                    break
                log += data
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)

        back = threading.Thread(target=pump, args=(server, client, down), daemon=True)
        back.start()
        pump(client, server, up)
        back.join()
        self._parse(bytes(up), bytes(down))

    def _parse(self, up, down):
        self.extended = struct.pack('>QI', rawnbd.OPTION_MAGIC, OPT_EXTENDED) in up and \
            struct.pack('>I', EXTENDED_CHUNK_MAGIC) in down
        magic = EXTENDED_REQUEST_MAGIC if self.extended else rawnbd.REQUEST_MAGIC
        self.request = struct.Struct('>IHHQQQ' if self.extended else '>IHHQQI')
        at, asked = up.index(struct.pack('>I', magic)), {}
        while at + self.request.size <= len(up):
            _, _, kind, cookie, offset, length = self.request.unpack_from(up, at)
            at += self.request.size
            if kind == rawnbd.CMD_BLOCK_STATUS:
                asked[cookie] = (offset, length)
        head = struct.pack('>QIII', rawnbd.REPLY_MAGIC, rawnbd.OPT_GO, rawnbd.REP_INFO, 14)
        if head in down:  # NBD_INFO_BLOCK_SIZE: how far the client dares to ask at once depends on it
            self.block_sizes = [down[down.index(head) + 20:][:14]]
        chunk = struct.Struct('>IHHQQQ' if self.extended else '>IHHQI')
        at = down.index(struct.pack('>I', EXTENDED_CHUNK_MAGIC if self.extended else rawnbd.CHUNK_MAGIC))
        while at + chunk.size <= len(down):
            _, _, kind, cookie, *_, length = chunk.unpack_from(down, at)
            at += chunk.size
            if kind == (CHUNK_STATUS_EXTENDED if self.extended else CHUNK_STATUS):
                self.answers[asked[cookie]] = down[at:at + length]
            at += length


def ask(uri, context):
    begin = time.perf_counter()
    done = subprocess.run(['nbdinfo', f'--map={context}', '--totals', uri], capture_output=True, text=True, check=True)
    return (time.perf_counter() - begin) * 1000, done.stdout


def memory_kib(pid):
    with open(f'/proc/{pid}/smaps_rollup', encoding='ascii') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('Pss:'))


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split('\n\n')[1].strip())
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--extents', type=int, default=1 << 20)
    parser.add_argument('--size', type=float, default=1)
    parser.add_argument('--json')
    o = parser.parse_args()
    size = int(o.size * TIB)
    with tempfile.TemporaryDirectory(prefix='qpull-bench-') as folder:
        guest = harness.Bare(folder, [make_disk(folder, size, o.extents)])
        daemon = harness.Qpulld(folder, {'vm': guest}, linger=0)
        nbdpull.connect(daemon.uri('vm/vda')).shutdown()  # the self-test of QEMU
        daemon.wait_idle()
        idle = memory_kib(daemon.process.pid)
        # The first question freezes: what it waits for the map is told apart from what a standing session takes.
        holder = nbdpull.connect(daemon.uri('vm/vda'), [CONTEXT])
        _, totals = ask(daemon.uri('vm/vda'), CONTEXT)
        session = memory_kib(daemon.process.pid)
        recorder = Recorder(f'{folder}/record.nbd', daemon.socket)
        ask(nbdpull.unix_uri(recorder.path, 'vm/vda'), CONTEXT)
        recorder.thread.join()
        nextents = sum(len(a) // 8 for a in recorder.answers.values())
        holder.shutdown()
        daemon.wait_idle()
        direct = export_directly(guest, folder)  # QEMU has but one NBD server: theirs waits until ours is gone
        guest.look('block-export-del', {'id': 'direct', 'mode': 'hard'})
        guest.look('nbd-server-stop')
        bare_server(f'{folder}/bare.nbd', size, recorder, CONTEXT)
        found = {w: [] for w in ('qpulld', 'qpulld-first', 'direct', 'bare')}
        context = {'direct': 'qemu:dirty-bitmap:copy'}
        for _ in range(o.rounds):
            found['qpulld-first'].append(ask(daemon.uri('vm/vda'), CONTEXT)[0])
            daemon.wait_idle()
            holder = nbdpull.connect(daemon.uri('vm/vda'), [CONTEXT])
            ask(daemon.uri('vm/vda'), CONTEXT)
            found['qpulld'].append(ask(daemon.uri('vm/vda'), CONTEXT)[0])
            found['bare'].append(ask(nbdpull.unix_uri(f'{folder}/bare.nbd', 'd'), CONTEXT)[0])
            holder.shutdown()
            daemon.wait_idle()
            os.path.exists(direct) and os.unlink(direct)
            guest.look('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': direct}}})
            guest.look('block-export-add', {'type': 'nbd', 'id': 'direct', 'node-name': 'node-vda', 'name': 'd',
                                                'bitmaps': ['copy']})
            took, said = ask(nbdpull.unix_uri(direct, 'd'), context['direct'])
            found['direct'].append(took)
            if said.split() != totals.split():
                raise AssertionError(f'qpulld says\n{totals}QEMU says\n{said}')
            guest.look('block-export-del', {'id': 'direct', 'mode': 'hard'})
            guest.look('nbd-server-stop')
        medians = {w: statistics.median(v) for w, v in found.items()}
        report = {'qemu': '.'.join(map(str, harness.qemu_version())), 'extents': nextents, 'size': size,
                  'requests': len(recorder.answers), 'memory-idle-kib': idle, 'memory-session-kib': session,
                  'ms': {w: {'median': medians[w], 'least': min(v), 'most': max(v)} for w, v in found.items()},
                  'to-direct': medians['qpulld'] / medians['direct'], 'to-bare': medians['qpulld'] / medians['bare']}
        for w, v in found.items():
            print(f'{w:13} {medians[w]:7.1f} ms ({min(v):.1f}-{max(v):.1f})', flush=True)
        print(f'{nextents} extents in {len(recorder.answers)} answers; to direct {report["to-direct"]:.2f}, to a bare '
              f'socket {report["to-bare"]:.2f}; qpulld holds {(session - idle) / 1024:.1f} MiB more in a session '
              f'(PSS {session / 1024:.1f})')
        daemon.stop()
        guest.kill()
    if o.json:
        with open(o.json, 'w', encoding='utf-8') as out:
            json.dump(report, out, indent=1)
            out.write('\n')


if __name__ == '__main__':
    main()
