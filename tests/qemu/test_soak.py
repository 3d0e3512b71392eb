#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""Some sessions with random clients and random faults on a guest that writes all the time (soakworld.py);
tests/soak/sessions runs as many as wanted."""
import unittest

import harness
import soakworld

SESSIONS = 10


class Soak(unittest.TestCase):
    def test_whatever_clients_and_faults_do_the_data_is_right_and_the_guest_notices_nothing(self):
        harness.guest_parts()
        harness.bin_dir()
        world = soakworld.World(harness.seed)
        self.addCleanup(world.close)
        for i in range(SESSIONS):
            try:
                print(f'{i}: {world.session()}', flush=True)
            except Exception:
                print(f'session {i}: {world.what}\n{world.daemon and world.daemon.log()}', flush=True)
                raise
        world.finish()
        print({what: f'{us // 1000} ms' for what, us in sorted(world.slowest.items())}, flush=True)


if __name__ == '__main__':
    harness.main()
