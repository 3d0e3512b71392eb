#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""Sessions with a guest agent that fails in every way at every command: nobody is left frozen, no process is left over,
and the session says what is true. The agent is a fake; tests/qemu/test_quiesce.py has a real one."""
import concurrent.futures
import os

import fakeagent
import harness
import quiesceworld
from quiesceworld import Place, session

FAULTS = ('refuses', 'deaf', 'silent', 'lies', 'rubbish', 'floods', 'hangs-up')


class Faults(quiesceworld.Case):
    def test_a_session_is_quiesced_and_says_so(self):
        place = Place(self)
        daemon = self.daemon('require', place)
        seen = []

        def look():
            for pid in fakeagent.watchdogs(daemon):
                folder = f'/proc/{pid}/fd'
                seen.append(sorted(os.readlink(f'{folder}/{fd}').split(':')[0] for fd in os.listdir(folder)))
        place.agent.before['freeze'] = look
        found = session(daemon, place)
        self.assertEqual((found['quiesced'], found['not-quiesced']), (True, None))
        # One watchdog; the pipe to the daemon and the agent's connection are sockets, the rest is its loop's and stderr.
        self.assertEqual(len(seen), 1)
        self.assertEqual(seen[0].count('socket'), 2)
        self.assertLessEqual(set(seen[0]), {'socket', 'pipe', 'anon_inode', '/dev/null', daemon.log_path})
        self.assertIn('guest quiesced for', self.written(daemon))
        self.assertEqual(place.agent.heard[-4:], ['sync', 'freeze', 'sync', 'thaw'])
        self.nothing_left(daemon, place)
        self.no_watchdogs(daemon)
        daemon.stop()

    def test_off_asks_nobody(self):
        place = Place(self)
        daemon = self.daemon('off', place)
        self.assertIsNone(session(daemon, place)['quiesced'])
        self.assertEqual(place.agent.heard, [])
        self.nothing_left(daemon, place)

    def test_nobody_at_the_socket(self):
        place = Place(self)
        place.agent.close()
        os.unlink(place.path)
        for mode in 'try', 'require':
            daemon = self.daemon(mode, place, name=mode)
            self.judge(mode, 'nobody', session(daemon, place))
            self.nothing_left(daemon, place)
            self.assertIn('nobody listens there', self.written(daemon))
            daemon.stop()

    def test_what_others_have_frozen_stays_so(self):
        place = Place(self)
        place.agent.frozen = 1
        daemon = self.daemon('require', place)
        self.assertIn('somebody else has frozen', session(daemon, place))
        daemon.wait_idle()
        self.assertEqual(place.agent.frozen, 1)
        self.assertNotIn('thaw', place.agent.heard)
        place.agent.frozen = 0
        self.nothing_left(daemon, place)

    def judge(self, mode, what, found):
        if mode == 'require':
            self.assertIn('quiesce', found, what)
        else:
            self.assertIs(found['quiesced'], False, f'{what}: {found}')
            self.assertTrue(found['not-quiesced'].isprintable(), what)

    def all_faults_of(self, mode, daemon, place):
        command = place.name
        for fault in FAULTS:
            # Silence costs its deadline each time, and looks the same to both modes.
            if fault in ('deaf', 'silent') and mode == 'require':
                continue
            place.agent.faults = {command: fault}
            if command == 'thaw' and fault != 'refuses':  # the next one works
                place.agent.before['thaw'] = place.agent.faults.clear
            found = session(daemon, place)
            place.agent.faults = {}
            place.agent.before = {}
            self.judge(mode, f'{mode}: {command} {fault}', found)
            self.nothing_left(daemon, place)

    def test_every_fault_at_every_command(self):
        places = [Place(self, command) for command in ('sync', 'status', 'freeze', 'thaw')]
        for mode in 'try', 'require':
            daemon = self.daemon(mode, *places, name=f'qpulld-{mode}')
            with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
                for done in [pool.submit(self.all_faults_of, mode, daemon, place) for place in places]:
                    done.result()
            self.no_watchdogs(daemon)
            daemon.stop()

    def test_a_guest_that_thaws_by_itself_is_not_quiesced(self):
        place = Place(self)
        for mode in 'try', 'require':
            daemon = self.daemon(mode, place, name=mode)
            place.agent.faults = {'thaw': 'self-thawed'}  # as Windows says it

            def thaws():
                place.agent.frozen = 0
            place.agent.before = {'thaw': thaws}
            self.judge(mode, 'an error', session(daemon, place))
            place.agent.faults = {}  # and as Linux does: nothing was left to thaw
            self.judge(mode, 'zero', session(daemon, place))
            self.assertIn('thaws them', self.written(daemon))
            self.nothing_left(daemon, place)
            self.no_watchdogs(daemon)
            daemon.stop()

    def test_an_agent_that_wakes_up_late_thaws_what_it_freezes_late(self):
        place = Place(self)
        daemon = self.daemon('try', place)
        place.agent.faults = {'freeze': 'late'}
        found = session(daemon, place)
        self.assertIn("did not answer 'guest-fsfreeze-freeze'", found['not-quiesced'])
        self.assertEqual(place.agent.ever_frozen, 0)
        place.agent.wake()
        self.assertGreater(place.agent.ever_frozen, 0)
        self.nothing_left(daemon, place)
        self.no_watchdogs(daemon)


if __name__ == '__main__':
    harness.main()
