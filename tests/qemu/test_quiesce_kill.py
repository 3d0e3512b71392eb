#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""A real guest whose file systems are frozen, and the blow comes at the cut: it works on, soon, whatever died."""
import os
import signal
import time

import agentguest
import fakeagent
import harness
import rawnbd
from qmpproxy import QmpProxy

CUT = 'blockdev-reopen'


class Kill(agentguest.Case):
    def setUp(self):
        self.vm = self.boot()
        self.proxy = QmpProxy(self.folder, self.vm)
        self.addCleanup(self.proxy.close)
        self.qpulld_under_test = self.daemon(self.vm, 'try', monitor=self.proxy)

    def strike(self, daemon, blow):
        """A session whose guest is frozen when the blow comes. True: it came up all the same, and is left in order."""
        struck = []

        def each(command):
            if command == CUT and not struck:
                struck.append(True)
                blow()
        self.proxy.at_each(each)
        raw = rawnbd.Raw(daemon.socket)
        up = False
        try:
            raw.go('vm/fs')
            up = True
            self.session = daemon.ask('query-sessions')[0]
            raw.request(rawnbd.CMD_DISC)
        except (OSError, EOFError, rawnbd.Refused):
            pass
        raw.close()
        self.proxy.at_each(None)
        self.assertTrue(struck)
        return up

    def marks(self):
        return [n for n in self.vm.state()['nodes'] if n.endswith('-quiesce0')]

    def works_again(self, daemon):
        harness.wait_until(lambda: not self.marks(), 150, 'the end of the mark')
        daemon.wait_idle()
        self.assertIs(self.pull(daemon)[1]['quiesced'], True)
        self.finish(self.vm, daemon)

    def test_the_daemon_is_killed_and_nobody_follows(self):
        daemon = self.qpulld_under_test
        self.strike(daemon, daemon.kill)
        began = time.monotonic()
        self.vm.assert_works_on()
        print(f'works again {time.monotonic() - began:.1f} s after the kill', flush=True)
        self.assertTrue(self.marks())
        harness.wait_until(lambda: not fakeagent.watchdogs(daemon), 20, 'the end of the watchdog')
        daemon.start()
        self.works_again(daemon)

    def test_the_daemon_and_the_watchdog_are_killed_and_a_successor_thaws(self):
        daemon = self.qpulld_under_test

        def blow():
            for pid in fakeagent.watchdogs(daemon):
                os.kill(pid, signal.SIGKILL)
            daemon.kill()
        self.strike(daemon, blow)
        harness.wait_until(lambda: self.vm.files()['idle-us'] > 1500000, 30, 'a guest that stands still')
        daemon.start()
        self.vm.assert_works_on()
        self.works_again(daemon)

    def test_the_agent_dies_and_another_is_started(self):
        daemon = self.qpulld_under_test
        self.strike(daemon, lambda: self.vm.agent('kill'))
        self.assertIs(self.session['quiesced'], False)
        self.vm.agent('start')
        self.vm.assert_works_on()
        self.works_again(daemon)

    def test_qemu_is_paused_meanwhile(self):
        daemon = self.qpulld_under_test
        self.strike(daemon, lambda: self.vm.look('stop'))
        self.assertIs(self.session['quiesced'], False)
        self.vm.look('cont')
        self.vm.assert_works_on()
        self.works_again(daemon)

    def test_the_guest_is_reset_meanwhile(self):
        daemon = self.qpulld_under_test
        self.strike(daemon, lambda: self.vm.look('system_reset'))
        self.vm.wait_ready()
        self.vm.agent('start')
        self.vm.work()
        self.works_again(daemon)

    def test_qemu_quits_meanwhile(self):
        daemon = self.qpulld_under_test
        self.strike(daemon, lambda: os.kill(self.vm.process.pid, signal.SIGKILL))
        self.vm.close()
        harness.wait_until(lambda: daemon.vm()['session'] is None, 60, 'the end of the session')
        harness.wait_until(lambda: not fakeagent.watchdogs(daemon), 60, 'the end of the watchdog')
        daemon.stop()


if __name__ == '__main__':
    harness.main()
