#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mode and group of the control and the NBD socket: by default, as said, after kill -9 and a new start, after SIGHUP;
under every umask. That they are never wider on the way there is in unit/listen."""
import grp
import os
import signal
import stat
import unittest

import harness


class Modes(harness.Case):
    @classmethod
    def setUpClass(cls):
        harness.bin_dir()

    def daemon(self, *flags, umask=0o022):
        before = os.umask(umask)
        try:
            return self.qpulld({'vm': f'{self.folder}/none.qmp'}, flags=list(flags))
        finally:
            os.umask(before)

    def modes(self, daemon):
        found = [os.stat(p) for p in (daemon.socket, daemon.control)]
        self.assertTrue(all(stat.S_ISSOCK(s.st_mode) for s in found))
        return {(oct(stat.S_IMODE(s.st_mode)), s.st_gid) for s in found}

    def test_the_default_is_the_owner_alone(self):
        for umask in (0, 0o777):
            daemon = self.daemon(umask=umask)
            self.assertEqual(self.modes(daemon), {('0o600', os.getegid())})
            daemon.stop()

    @unittest.skipIf(os.geteuid(), 'root can give files to any group')
    def test_mode_and_group_are_what_was_said_also_after_a_kill(self):
        group = next(g for g in grp.getgrall() if g.gr_gid not in (os.getegid(), 0))
        daemon = self.daemon('--socket-mode=0620', f'--socket-group={group.gr_name}', umask=0o777)
        self.assertEqual(self.modes(daemon), {('0o620', group.gr_gid)})
        daemon.kill()
        os.unlink(daemon.pidfile)
        daemon.start()
        self.assertEqual(self.modes(daemon), {('0o620', group.gr_gid)})
        daemon.stop()
        daemon = self.daemon(f'--socket-group={group.gr_name}')
        self.assertEqual(self.modes(daemon), {('0o660', group.gr_gid)})

    def test_sighup_lets_other_users_connect_when_rules_name_them_and_no_longer_than_that(self):
        path = f'{self.folder}/qpulld.conf'

        def write(text):
            with open(path, 'w', encoding='ascii') as f:
                f.write(text)
        write('[server]\n')
        daemon = self.daemon('--config', path)
        for rules, mode in (('[allow]\nuid:65534 = *\n', '0o666'), ('[allow]\nip:192.0.2.1 = *\n', '0o600')):
            write(rules)
            daemon.process.send_signal(signal.SIGHUP)
            harness.wait_until(lambda: self.modes(daemon) == {(mode, os.getegid())}, 10, mode)  # noqa: B023
        daemon.stop()

    def test_a_mode_that_was_said_stays_whatever_rules_say(self):
        daemon = self.daemon('--socket-mode=0600', '--allow=uid:65534=*')
        self.assertEqual(self.modes(daemon), {('0o600', os.getegid())})
        daemon.stop()


if __name__ == '__main__':
    harness.main()
