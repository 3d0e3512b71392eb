# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMUs whose storage is slow to write back (slow_sync.c)."""
import contextlib
import os

import harness


@contextlib.contextmanager
def rate(folder, megabytes):
    """The QEMUs that are started within need a second to flush so many megabytes. 0: as fast as it goes."""
    if not megabytes:
        yield
        return
    library = f'{folder}/slow_sync.so'
    harness.run(['cc', '-O2', '-shared', '-fPIC', '-o', library, f'{harness.TOP}/tests/qemu/slow_sync.c'])
    os.environ.update(LD_PRELOAD=library, QPULL_SYNC_RATE=str(megabytes))
    try:
        yield
    finally:
        del os.environ['LD_PRELOAD'], os.environ['QPULL_SYNC_RATE']
