#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sessions with a guest agent that fails in every way at every command: nobody is left frozen, no process is left over,
and the session says what is true. The agent is a fake; tests/qemu/test_quiesce.py has a real one."""
import os
import signal
import time

import fakeagent
import harness
import rawnbd
from harness import MIB, Disk

FAULTS = ('refuses', 'deaf', 'silent', 'lies', 'rubbish', 'floods', 'hangs-up')
MARK = '-quiesce0'


class Faults(harness.Case):
    def setUp(self):
        self.vm = self.bare(Disk('vda', 4 * MIB), Disk('vdb', 4 * MIB, fmt='raw'))
        self.before = self.vm.state()
        self.path = f'{self.folder}/vm.qga'
        self.agent = fakeagent.FakeAgent(self.path)
        self.addCleanup(lambda: self.agent.close())

    def daemon(self, mode, **options):
        return self.qpulld(self.vm, linger=0, flags=[f'--qga=vm={self.path}', f'--quiesce={mode}'], **options)

    def marks(self):
        return [n for n in self.vm.state()['nodes'] if n.endswith(MARK)]

    def session(self, daemon):
        """What query-sessions says about one, or the words of its refusal."""
        raw = rawnbd.Raw(daemon.socket)
        try:
            raw.go('vm/vda')
            session = daemon.ask('query-sessions')[0]
            raw.request(rawnbd.CMD_DISC)
            return session
        except rawnbd.Refused as e:
            return str(e)
        finally:
            raw.close()

    def nothing_left(self, daemon):
        daemon.wait_idle(60)
        harness.wait_until(lambda: self.agent.frozen == 0, 60, 'the thaw')
        harness.wait_until(lambda: not self.marks(), 60, 'the end of the mark')
        daemon.wait_idle(60)
        self.assertNothingLeft(self.vm, daemon, self.before)
        harness.wait_until(lambda: not fakeagent.watchdogs(daemon), 20, 'the end of the watchdogs')

    def written(self, daemon):
        with open(daemon.log_path) as f:
            return f.read()

    def test_a_session_is_quiesced_and_says_so(self):
        daemon = self.daemon('require')
        daemon.wait_idle()
        marked = []
        self.agent.before['freeze'] = lambda: marked.append(len(fakeagent.watchdogs(daemon)))
        session = self.session(daemon)
        self.assertEqual((session['quiesced'], session['not-quiesced']), (True, None))
        self.assertEqual(marked, [1])
        self.assertIn('guest quiesced for', self.written(daemon))
        self.assertEqual(self.agent.heard[-4:], ['sync', 'freeze', 'sync', 'thaw'])
        self.nothing_left(daemon)
        daemon.stop()

    def test_off_asks_nobody(self):
        daemon = self.daemon('off')
        self.assertIsNone(self.session(daemon)['quiesced'])
        self.assertEqual(self.agent.heard, [])
        self.nothing_left(daemon)

    def test_every_fault_at_every_command(self):
        for mode in ('try', 'require'):
            daemon = self.daemon(mode, name=f'qpulld-{mode}')
            daemon.wait_idle()
            for command in ('sync', 'status', 'freeze', 'thaw'):
                for fault in FAULTS:
                    what = f'{mode}: {command} {fault}'
                    # Each way of failing costs its deadline: the slow ones are tried with one mode only.
                    if mode == 'require' and fault in ('deaf', 'silent'):
                        continue
                    self.agent.faults = {command: fault}
                    if command == 'thaw' and fault != 'refuses':  # the next one works
                        self.agent.before['thaw'] = self.agent.faults.clear
                    session = self.session(daemon)
                    self.agent.faults = {}
                    self.agent.before = {}
                    self.judge(mode, what, session)
                    self.nothing_left(daemon)
            daemon.stop()

    def judge(self, mode, what, session):
        if mode == 'require':
            self.assertIn('quiesce', session, what)
        else:
            self.assertIs(session['quiesced'], False, f'{what}: {session}')
            self.assertTrue(session['not-quiesced'].isprintable(), what)


if __name__ == '__main__':
    harness.main()
