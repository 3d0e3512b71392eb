# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's knowledge of what the guest wrote; the work is done by tests/guest/pattern.c, loaded as a library."""
import ctypes
import functools

SECTOR = 512
KINDS = ('write', 'zero', 'discard', 'read', 'flush')  # enum load_kind


class Plan(ctypes.Structure):
    """struct load_plan: with the number of operations done, everything about a load."""
    _fields_ = [('seed', ctypes.c_uint64), ('start', ctypes.c_uint64), ('size', ctypes.c_uint64),
                ('unit', ctypes.c_uint32), ('max', ctypes.c_uint32), ('kinds', ctypes.c_uint32)]


class Operation(ctypes.Structure):
    """struct load_op: one operation of a load; kind is an index of KINDS."""
    _fields_ = [('kind', ctypes.c_uint32), ('length', ctypes.c_uint32), ('offset', ctypes.c_uint64),
                ('seed', ctypes.c_uint64)]


@functools.cache
def library(path):
    lib = ctypes.CDLL(path)
    u64, p = ctypes.c_uint64, ctypes.c_void_p
    lib.pattern_fill.argtypes = [p, u64, u64, ctypes.c_size_t]
    lib.pattern_sum.argtypes = [p, ctypes.c_size_t, u64]
    lib.pattern_sum.restype = u64
    lib.load_op_at.argtypes = [p, u64, p]
    lib.load_op_at.restype = None
    lib.model_write.argtypes = [p, p, u64, u64, u64]
    lib.model_replay.argtypes = [p, p, p, u64, u64]
    lib.model_compare.argtypes = [p, p, p, u64, p]
    lib.model_compare.restype = u64
    lib.model_find_cut.argtypes = [p, p, p, u64, p, u64, u64, p]
    lib.model_find_cut.restype = ctypes.c_int64
    lib.order_scan.argtypes = [p, ctypes.c_size_t, ctypes.c_uint32, u64, ctypes.c_uint32]
    lib.order_scan.restype = ctypes.c_int64
    return lib


def _address(data, offset=0):
    """Address of a bytearray's bytes; valid while the caller keeps it and does not resize it."""
    return ctypes.addressof(ctypes.c_uint8.from_buffer(data, offset))


class Model:
    """What one disk must hold. Sectors whose content nobody promises (after a discard) are not compared."""

    def __init__(self, lib, size):
        self.lib = lib
        self.size = size
        self.image = bytearray(size)
        self.known = bytearray(b'\1') * (size // SECTOR)

    def copy(self):
        other = Model.__new__(Model)
        other.lib, other.size = self.lib, self.size
        other.image, other.known = bytearray(self.image), bytearray(self.known)
        return other

    def _check(self, offset, length):
        if offset % SECTOR or length % SECTOR or offset < 0 or offset + length > self.size:
            raise ValueError(f'{length} bytes at {offset} of {self.size}')

    def write(self, offset, length, seed):
        self._check(offset, length)
        if length:
            self.lib.model_write(_address(self.image), _address(self.known), offset, length, seed)

    def zero(self, offset, length):
        self._check(offset, length)
        self.image[offset:offset + length] = bytes(length)
        self.known[offset // SECTOR:(offset + length) // SECTOR] = b'\1' * (length // SECTOR)

    def discard(self, offset, length):
        self._check(offset, length)
        self.known[offset // SECTOR:(offset + length) // SECTOR] = bytes(length // SECTOR)

    def replay(self, plan, first, last):
        """Applies operations first … last - 1 of a load."""
        self.lib.model_replay(_address(self.image), _address(self.known), ctypes.byref(plan), first, last)

    def compare(self, other):
        """(number of known sectors that differ, offset of the first or None)."""
        if len(other) != self.size:
            raise ValueError(f'{len(other)} bytes against a model of {self.size}')
        first = ctypes.c_uint64()
        other = other if isinstance(other, bytearray) else bytearray(other)
        n = self.lib.model_compare(_address(self.image), _address(self.known), _address(other), self.size,
                                   ctypes.byref(first))
        return n, first.value if n else None

    def find_cut(self, other, plan, first, last):
        """After how many operations of the load (first … last; the model stands at first) is the model equal to other?
        The number, the model then standing there; or None. Also the fewest sectors that differed."""
        if len(other) != self.size:
            raise ValueError(f'{len(other)} bytes against a model of {self.size}')
        least = ctypes.c_uint64()
        other = other if isinstance(other, bytearray) else bytearray(other)
        n = self.lib.model_find_cut(_address(self.image), _address(self.known), _address(other), self.size,
                                    ctypes.byref(plan), first, last, ctypes.byref(least))
        return (None if n < 0 else n), least.value


def operations(lib, plan, first, last):
    """Operations first … last - 1 of a load."""
    for n in range(first, last):
        operation = Operation()
        lib.load_op_at(ctypes.byref(plan), n, ctypes.byref(operation))
        yield operation


def pattern(lib, seed, offset, length):
    data = bytearray(length)
    lib.pattern_fill(_address(data), seed, offset, length)
    return data


def pattern_sum(lib, data):
    data = bytearray(data)  # kept in a variable: an address alone keeps nothing alive
    return lib.pattern_sum(_address(data), len(data), 0)


def order_highest(lib, image, seed, disk_index, at=0, block=4096, ring=256):
    """The highest numbered record of a disk image; ValueError where a record is torn, stale or missing."""
    area = bytearray(image[at:at + block * ring])
    n = lib.order_scan(_address(area), block, ring, seed, disk_index)
    if n < 0:
        raise ValueError(f'disk {disk_index}: block {-n - 1} of the ring of records is torn, stale or missing')
    return n
