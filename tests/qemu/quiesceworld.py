# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of --quiesce with a fake guest agent share."""
import fakeagent
import harness
import rawnbd
from harness import MIB, Disk

MARK = '-quiesce0'


class Place:
    """One QEMU with a fake guest."""

    def __init__(self, case, name='vm'):
        self.name = name
        self.vm = case.bare(Disk(f'{name}-a', 4 * MIB), Disk(f'{name}-b', 4 * MIB, fmt='raw'), name=name)
        self.before = self.vm.state()
        self.path = f'{case.folder}/{name}.qga'
        self.agent = fakeagent.FakeAgent(self.path)
        case.addCleanup(self.agent.close)

    def marks(self):
        return [n for n in self.vm.state()['nodes'] if n.endswith(MARK)]


def session(daemon, place):
    """What query-sessions says about a new one, or the words of its refusal."""
    raw = rawnbd.Raw(daemon.socket)
    try:
        raw.go(f'{place.name}/{place.name}-a')
        found = next(s for s in daemon.ask('query-sessions') if s['vm'] == place.name)
        raw.request(rawnbd.CMD_DISC)
        return found
    except rawnbd.Refused as e:
        return str(e)
    except (OSError, EOFError):
        return 'the connection ended'
    finally:
        raw.close()


class Case(harness.Case):
    def daemon(self, mode, *places, name='qpulld', monitor=None):
        flags = [f'--qga={p.name}={p.path}' for p in places] + [f'--quiesce={mode}']
        daemon = self.qpulld({p.name: monitor or p.vm for p in places}, linger=0, flags=flags, name=name)
        for place in places:
            daemon.wait_idle(name=place.name)
        return daemon

    def nothing_left(self, daemon, place):
        daemon.wait_idle(60, place.name)
        harness.wait_until(lambda: place.agent.frozen == 0, 60, 'the thaw')
        harness.wait_until(lambda: not place.marks(), 60, 'the end of the mark')
        daemon.wait_idle(60, place.name)
        self.assertEqual(place.vm.state(), place.before)
        self.assertEqual(place.vm.deleted_fds(), [])

    def no_watchdogs(self, daemon):
        harness.wait_until(lambda: not fakeagent.watchdogs(daemon), 20, 'the end of the watchdogs')

    def written(self, daemon):
        with open(daemon.log_path) as f:
            return f.read()
