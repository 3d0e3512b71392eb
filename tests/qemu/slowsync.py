# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMUs, and daemons, whose storage is slow to write back (slow_sync.c)."""
import contextlib
import os

import harness


@contextlib.contextmanager
def slow(folder, rate=0, ms=0):
    """What is started within needs a second to flush `rate` megabytes, and `ms` for each flush."""
    if not rate and not ms:
        yield
        return
    library = f'{folder}/slow_sync.so'
    harness.run(['cc', '-O2', '-D_GNU_SOURCE', '-shared', '-fPIC', '-o', library,
                 f'{harness.TOP}/tests/qemu/slow_sync.c'])
    more = {'LD_PRELOAD': library, 'QPULL_SYNC_RATE': str(rate), 'QPULL_SYNC_MS': str(ms),
            'QPULL_SYNC_FILE': f'{folder}/unwritten', 'ASAN_OPTIONS': 'verify_asan_link_order=0'}
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        for name in more:
            del os.environ[name]
        os.environ.update({k: before[k] for k in more if k in before})
