#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""quiesce= and qga=: the guest's file systems are frozen for the moment of the freeze, and thawed whatever happens."""
import fakeagent
import harness
import nbdkitworld
from nbdkitworld import Nbdkit
from quiesceworld import Place

DISK = 'vm-a'


class Quiesce(harness.Case):
    def begin(self, place, *words):
        return Nbdkit(self, place.vm.qmp_path, f'disk={DISK}', 'linger=0', *words)

    def nothing_left(self, nbdkit, place):
        self.assertEqual(nbdkit.end(), 0)
        self.assertEqual(place.agent.frozen, 0)
        self.assertEqual(place.vm.state(), place.before)

    def test_qga_alone_means_try(self):
        place = Place(self)
        nbdkit = self.begin(place, f'qga={place.path}')
        self.assertIsNotNone(nbdkit.info(DISK))
        self.assertGreater(place.agent.ever_frozen, 0)
        self.nothing_left(nbdkit, place)
        place.agent.faults, place.agent.ever_frozen = {'freeze': 'refuses'}, 0
        nbdkit = self.begin(place, f'qga={place.path}')
        self.assertIsNotNone(nbdkit.info(DISK))
        self.assertRegex(nbdkit.log(), 'error: warning: .*agent')
        self.nothing_left(nbdkit, place)

    def test_off_asks_no_agent(self):
        place = Place(self)
        nbdkit = self.begin(place, f'qga={place.path}', 'quiesce=off')
        self.assertIsNotNone(nbdkit.info(DISK))
        self.assertEqual(place.agent.ever_frozen, 0)
        self.nothing_left(nbdkit, place)

    def test_require_freezes_no_disk_without_the_guest(self):
        place = Place(self)
        nbdkit = self.begin(place, f'qga={place.path}', 'quiesce=require')
        self.assertIsNotNone(nbdkit.info(DISK))
        self.assertGreater(place.agent.ever_frozen, 0)
        place.agent.faults = {'freeze': 'refuses'}
        self.assertIsNone(nbdkit.info(DISK))
        self.assertRegex(nbdkit.log(), r'error: .*(agent|file systems)')
        self.nothing_left(nbdkit, place)

    def test_a_killed_nbdkit_does_not_keep_the_guest_frozen(self):
        place = Place(self)
        for command in ('freeze', 'thaw'):
            nbdkit = self.begin(place, f'qga={place.path}', 'quiesce=require', 'checkpoint=never')
            place.agent.ever_frozen = 0

            def strike():
                place.agent.before.clear()
                nbdkit.kill()
            place.agent.before[command] = strike
            nbdkit.info(DISK)
            harness.wait_until(lambda: place.agent.ever_frozen and not place.agent.frozen, 60, 'the thaw')
            harness.wait_until(lambda: not fakeagent.watchdogs(nbdkit), 60, 'the end of the watchdog')
            nbdkit = self.begin(place, f'qga={place.path}')
            self.assertIsNotNone(nbdkit.info(DISK))
            self.nothing_left(nbdkit, place)


if __name__ == '__main__':
    nbdkitworld.require()
    harness.main()
