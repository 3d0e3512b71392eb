#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""--quiesce with a real guest, its agent (Debian's qemu-ga) and a file system that is being worked on."""
import agentguest
import harness
import rawnbd


class Quiesce(agentguest.Case):
    def test_a_quiesced_copy_is_clean_and_another_is_not(self):
        guest = self.boot()
        daemon = self.daemon(guest, 'require')
        for _ in range(3):
            guest.files()
            path, session = self.pull(daemon)
            stalled = guest.files()
            self.assertIs(session['quiesced'], True)
            self.assertFalse(agentguest.needs_recovery(path))
            self.assertEqual(agentguest.fsck(path), 0)
            # The longest operation is one that waited: for the freeze, and perhaps for the host.
            self.assertLess(stalled['slowest-us'], session['quiesced-ms'] * 1000 + 5000000)
            print(f'quiesced for {session["quiesced-ms"]} ms, set up in {session["setup-ms"]} ms, the slowest operation '
                  f'took {stalled["slowest-us"] // 1000} ms', flush=True)
        status = daemon.qpull('status').stdout
        self.assertIn('no session', status)
        daemon.stop()
        daemon = self.daemon(guest, 'off', name='off')
        path, session = self.pull(daemon)
        self.assertIsNone(session['quiesced'])
        self.assertTrue(agentguest.needs_recovery(path))
        self.finish(guest, daemon)

    def test_a_guest_without_an_agent(self):
        guest = self.boot(agent=False)
        daemon = self.daemon(guest, 'try')
        path, session = self.pull(daemon)
        self.assertIs(session['quiesced'], False)
        self.assertIn('does not answer', session['not-quiesced'])
        self.assertIn('crash-consistent only', self.written(daemon))
        self.assertTrue(agentguest.needs_recovery(path))
        raw = rawnbd.Raw(daemon.socket)
        raw.go('vm/fs')
        shown = daemon.qpull('status').stdout
        self.assertIn('not quiesced: the guest agent at', shown)
        raw.request(rawnbd.CMD_DISC)
        raw.close()
        daemon.wait_idle()
        daemon.stop()
        daemon = self.daemon(guest, 'require', name='require')
        raw = rawnbd.Raw(daemon.socket)
        with self.assertRaises(rawnbd.Refused) as refused:
            raw.go('vm/fs')
        self.assertIn('--quiesce=require', str(refused.exception))
        raw.close()
        daemon.wait_idle()
        # What was asked of nobody is not found by an agent that starts later: it freezes nothing.
        guest.agent('start')
        guest.assert_works_on()
        _, session = self.pull(daemon)
        self.assertIs(session['quiesced'], True)
        self.finish(guest, daemon)

    def test_an_agent_that_hangs(self):
        guest = self.boot()
        daemon = self.daemon(guest, 'try')
        self.assertIs(self.pull(daemon)[1]['quiesced'], True)
        guest.agent('hang')
        self.assertIs(self.pull(daemon)[1]['quiesced'], False)
        guest.assert_works_on()
        guest.agent('wake')
        harness.wait_until(lambda: self.pull(daemon)[1]['quiesced'], 60, 'an agent that is awake')
        self.finish(guest, daemon)


if __name__ == '__main__':
    harness.main()
