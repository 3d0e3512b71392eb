# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a backup client does, with libnbd: read everything, read a map, carry over the changed ranges."""
import os
import socket
import time
import urllib.parse

import nbd

ALLOCATION = 'base:allocation'
DEPTH = 'qemu:allocation-depth'
DIRTY = 1  # flag of qemu:dirty-bitmap: contexts
STATE_HOLE, STATE_ZERO = 1, 2


def dirty_context(checkpoint):
    return f'qemu:dirty-bitmap:{checkpoint}'


def unix_uri(socket_path, export):
    return f'nbd+unix:///{urllib.parse.quote(export)}?socket={urllib.parse.quote(socket_path)}'


def connect(uri, contexts=()):
    """A connected handle. Leave it with h.shutdown() (says NBD_CMD_DISC) or with drop(h) (says nothing)."""
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)  # certificates and keys
    for context in contexts:
        h.add_meta_context(context)
    h.connect_uri(uri)
    return h


def list_contexts(uri, queries=()):
    """The metadata contexts that the server lists for an export (NBD_OPT_LIST_META_CONTEXT), without opening it."""
    h, found = nbd.NBD(), []
    h.set_opt_mode(True)
    for query in queries:
        h.add_meta_context(query)
    h.connect_uri(uri)
    h.opt_list_meta_context(lambda name: found.append(name) or 0)
    h.opt_abort()
    return found


def drop(h):
    """The connection breaks, as when the client dies: nothing is said."""
    with socket.socket(fileno=os.dup(h.aio_get_fd())) as sock:
        sock.shutdown(socket.SHUT_RDWR)


def read_ranges(h, ranges, into, request=1 << 18, in_flight=8, timeout=120):
    """Reads (offset, length) ranges into a bytearray, several requests at once."""
    pieces = ((at, min(request, offset + length - at))
              for offset, length in ranges for at in range(offset, offset + length, request))
    pending, more = [], True
    deadline = time.monotonic() + timeout
    while True:
        while more and len(pending) < in_flight:
            piece = next(pieces, None)
            if piece is None:
                more = False
                break
            buffer = nbd.Buffer(piece[1])
            pending.append((h.aio_pread(buffer, piece[0]), piece[0], piece[1], buffer))
        if not pending:
            return into
        if time.monotonic() > deadline:
            raise TimeoutError(f'{len(pending)} reads not answered')
        h.poll(1000)
        left = []
        for command in pending:
            cookie, offset, length, buffer = command
            if h.aio_command_completed(cookie):
                into[offset:offset + length] = buffer.to_bytearray()
            else:
                left.append(command)
        pending = left


def read_all(h, request=1 << 18, in_flight=8):
    size = h.get_size()
    return read_ranges(h, [(0, size)], bytearray(size), request, in_flight)


def read_map(h, context, size=None):
    """[(offset, length, flags)] of the whole disk, neighbours with equal flags joined."""
    size = h.get_size() if size is None else size
    found = []

    def extent(name, offset, entries, error):
        if name != context:
            return 0
        for length, flags in zip(entries[::2], entries[1::2]):
            length = min(length, size - offset)
            if found and found[-1][2] == flags:
                found[-1][1] += length
            elif length:
                found.append([offset, length, flags])
            offset += length
        return 0

    at = 0
    while at < size:
        h.block_status(min(size - at, 1 << 31), at, extent)
        end = found[-1][0] + found[-1][1] if found else 0
        if end <= at:
            raise ValueError(f'no extents of {context} at {at}')
        at = end
    return [tuple(e) for e in found]


def ranges_with(extents, flag=DIRTY):
    return [(offset, length) for offset, length, flags in extents if flags & flag]


def pull(uri, **how):
    """The whole disk of an export, ended well."""
    h = connect(uri)
    data = read_all(h, **how)
    h.shutdown()
    return data


def pull_changes(uri, checkpoint, onto, **how):
    """Carries what changed since a checkpoint over onto a copy of the disk as it was then: (bytes, the extents)."""
    h = connect(uri, [dirty_context(checkpoint)])
    if not h.can_meta_context(dirty_context(checkpoint)):
        drop(h)
        raise ValueError(f'{uri}: no record of changes since {checkpoint}')
    extents = read_map(h, dirty_context(checkpoint))
    data = read_ranges(h, ranges_with(extents), bytearray(onto), **how)
    h.shutdown()
    return data, extents
