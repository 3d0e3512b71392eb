#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""Whoever dies between the freeze and the thaw of a guest's file systems: they are thawed, by the watchdog, or by a
successor where that died as well. The agent is a fake, so that the moment of each blow is exact."""
import os
import signal
import threading
import time

import fakeagent
import harness
import quiesceworld
import rawnbd
from qmpproxy import QmpProxy
from quiesceworld import Place, session

SOON = 20  # seconds; what takes milliseconds on a machine that has nothing else to do


class Deaths(quiesceworld.Case):
    def at(self, place, command, blow):
        """Once, before the agent does that command."""
        def strike():
            place.agent.before.pop(command)
            blow()
        place.agent.before[command] = strike

    def thawed_soon(self, place):
        harness.wait_until(lambda: place.agent.frozen == 0 and place.agent.heard[-1] == 'status', SOON, 'the thaw')

    def test_the_daemon_is_killed_at_each_command_and_nobody_follows(self):
        place = Place(self)
        daemon = self.daemon('try', place)
        for command in ('freeze', 'thaw'):
            self.at(place, command, daemon.kill)
            place.agent.ever_frozen = 0
            session(daemon, place)
            self.thawed_soon(place)
            self.assertGreater(place.agent.ever_frozen, 0)
            self.no_watchdogs(daemon)
            self.assertIn('the daemon is gone', self.written(daemon))
            self.assertTrue(place.marks())  # for a successor, which has nothing left to do but to remove it
            thaws = place.agent.heard.count('thaw')
            daemon.start()
            self.nothing_left(daemon, place)
            self.assertEqual(place.agent.heard.count('thaw'), thaws)
            self.assertIs(session(daemon, place)['quiesced'], True)
            self.nothing_left(daemon, place)

    def test_the_daemon_and_the_watchdog_are_killed_and_the_successor_thaws(self):
        place = Place(self)
        daemon = self.daemon('try', place)

        def blow():
            for pid in fakeagent.watchdogs(daemon):
                os.kill(pid, signal.SIGKILL)
            daemon.kill()
        place.agent.faults = {'thaw': 'deaf'}
        self.at(place, 'thaw', blow)
        session(daemon, place)
        self.no_watchdogs(daemon)
        place.agent.faults = {}
        self.assertGreater(place.agent.frozen, 0)
        daemon.start()
        self.nothing_left(daemon, place)
        self.assertIn('undid what 1 earlier session', self.written(daemon))

    def test_a_watchdog_that_dies_alone_leaves_the_thaw_to_the_daemon(self):
        place = Place(self)
        daemon = self.daemon('require', place)
        self.at(place, 'freeze', lambda: [os.kill(pid, signal.SIGKILL) for pid in fakeagent.watchdogs(daemon)])
        self.assertIs(session(daemon, place)['quiesced'], True)
        self.nothing_left(daemon, place)
        self.no_watchdogs(daemon)

    def test_a_successor_without_an_agent_says_what_is_frozen(self):
        place = Place(self)
        daemon = self.daemon('try', place)
        self.at(place, 'thaw', daemon.kill)
        session(daemon, place)
        self.thawed_soon(place)
        daemon.flags = [f for f in daemon.flags if not f.startswith(('--qga', '--quiesce'))]
        daemon.start()
        daemon.wait_idle()
        self.assertIn('no guest agent is named to thaw them', self.written(daemon))
        self.assertTrue(place.marks())
        daemon.stop()
        daemon.flags.append(f'--qga={place.name}={place.path}')  # --quiesce=off, and its agent known
        daemon.start()
        self.nothing_left(daemon, place)

    def test_a_daemon_that_is_stopped_does_not_keep_the_guest_frozen(self):
        place = Place(self)
        daemon = self.daemon('try', place)
        pid = daemon.process.pid
        place.agent.faults = {'thaw': 'deaf'}  # it stops before it could send it, say

        def blow():
            os.kill(pid, signal.SIGSTOP)
            place.agent.faults = {}
        self.at(place, 'thaw', blow)
        ended = threading.Thread(target=session, args=(daemon, place))
        ended.start()
        harness.wait_until(lambda: place.agent.ever_frozen and not place.agent.frozen, 60, 'the watchdog')
        self.assertIn('the daemon has not thawed in time', self.written(daemon))
        os.kill(pid, signal.SIGCONT)
        ended.join(60)
        self.nothing_left(daemon, place)
        self.no_watchdogs(daemon)

    def test_the_daemon_is_ended_in_order_and_its_whole_group_hears_of_it(self):
        place = Place(self)
        daemon = self.daemon('try', place)

        def blow():  # as systemd does it
            for pid in [*fakeagent.watchdogs(daemon), daemon.process.pid]:
                os.kill(pid, signal.SIGTERM)
        self.at(place, 'freeze', blow)
        session(daemon, place)
        daemon.stop()
        self.assertGreater(place.agent.ever_frozen, 0)
        self.assertEqual(place.agent.frozen, 0)
        self.no_watchdogs(daemon)
        self.assertEqual(place.vm.state(), place.before)

    def test_a_watchdog_that_hears_sigterm_thaws_first(self):
        place = Place(self)
        daemon = self.daemon('try', place)

        def blow():
            dogs = fakeagent.watchdogs(daemon)
            daemon.kill()
            for pid in dogs:
                os.kill(pid, signal.SIGTERM)
        place.agent.faults = {'thaw': 'deaf'}
        self.at(place, 'thaw', lambda: (blow(), place.agent.faults.clear()))
        session(daemon, place)
        self.thawed_soon(place)
        self.no_watchdogs(daemon)

    def test_the_daemon_is_ended_while_the_watchdog_thaws(self):
        place = Place(self)
        daemon = self.daemon('try', place)
        place.agent.faults = {'thaw': 'deaf'}
        self.assertIs(session(daemon, place)['quiesced'], False)
        daemon.stop()
        self.assertEqual(len(fakeagent.watchdogs(daemon)), 1)
        self.assertTrue(place.marks())
        place.agent.faults = {}
        self.thawed_soon(place)
        self.no_watchdogs(daemon)
        daemon.start()
        self.nothing_left(daemon, place)

    def cut(self, place, blow):
        """A session whose guest is frozen when the cut is to be made: blow() comes instead, once."""
        proxy = QmpProxy(self.folder, place.vm)
        self.addCleanup(proxy.close)
        daemon = self.daemon('try', place, monitor=proxy)

        def each(command):
            if command == 'blockdev-reopen' and not struck:
                struck.append(place.agent.frozen)
                blow()
        struck = []
        proxy.at_each(each)
        found = session(daemon, place)
        proxy.at_each(None)
        self.assertEqual(struck, [fakeagent.NFILESYSTEMS])
        return daemon, found

    def test_a_cut_that_takes_too_long_is_not_waited_for(self):
        place = Place(self)

        def blow():
            harness.wait_until(lambda: place.agent.frozen == 0, 60, 'the thaw before the cut')
        daemon, found = self.cut(place, blow)
        self.assertIn('were not cut in time', found['not-quiesced'])
        self.nothing_left(daemon, place)
        self.no_watchdogs(daemon)

    def test_a_monitor_that_is_lost_at_the_cut_does_not_delay_the_thaw(self):
        place = Place(self)

        def blow():
            raise OSError  # the proxy hangs up
        daemon, found = self.cut(place, blow)
        self.assertIn('closed the connection', found)
        self.thawed_at_once(place)
        self.nothing_left(daemon, place)
        self.no_watchdogs(daemon)

    def thawed_at_once(self, place):
        """Long before the deadline of the cut."""
        harness.wait_until(lambda: place.agent.frozen == 0, 4, 'the thaw')
        after = ' '.join(place.agent.heard).rsplit('freeze', 1)[1].split()
        self.assertEqual(after[:2], ['sync', 'thaw'])

    def test_qemu_dies_while_frozen(self):
        place = Place(self)
        daemon = self.daemon('try', place)

        def blow():
            place.vm.process.kill()
            place.agent.faults = {'thaw': 'deaf', 'freeze': 'deaf'}
            os.unlink(place.path)
            place.agent.listener.shutdown(2)
            place.agent.client.shutdown(2)
        self.at(place, 'thaw', blow)
        began = time.monotonic()
        session(daemon, place)
        harness.wait_until(lambda: daemon.vm()['session'] is None, 60, 'the end of the session')
        self.assertLess(time.monotonic() - began, 60)
        self.no_watchdogs(daemon)
        daemon.stop()

    def test_a_client_that_leaves_during_the_freeze_leaves_nothing_frozen(self):
        place = Place(self)
        daemon = self.daemon('require', place)
        raw = rawnbd.Raw(daemon.socket)
        self.at(place, 'freeze', lambda: (raw.sock.shutdown(2), time.sleep(0.05)))
        try:
            raw.go('vm/vm-a')
        except (OSError, EOFError, ValueError):
            pass
        raw.close()
        self.nothing_left(daemon, place)
        self.assertGreater(place.agent.ever_frozen, 0)
        self.no_watchdogs(daemon)


if __name__ == '__main__':
    harness.main()
