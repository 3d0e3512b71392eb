# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 300
"""TCP clients whose machine or network is gone without a word: no end of file ever comes, and still the session ends."""
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import badclients
import clients
import harness
import rawnbd

VANISHED = 60  # seconds (CONN_VANISHED_S of server/config.h)
LATE = 150  # until then, generously


def ip(*words, **kwargs):
    return harness.run(['ip', *words], **kwargs)


class Vanished(clients.ClientCase):
    def network(self):
        """Another network with one cable to it: (its name, our address); unplug() cuts the cable."""
        number = os.getpid() % 60000
        name, ours, theirs = f'qpull{number}', f'qpo{number}', f'qpt{number}'
        host = f'198.18.{number // 250}.{number % 250 + 1}'  # RFC 2544: for tests of networks, nobody's address
        if os.geteuid() != 0 or ip('netns', 'add', name, check=False).returncode:
            self.skipTest('root makes a network namespace')
        self.addCleanup(ip, 'netns', 'del', name)
        ip('link', 'add', ours, 'type', 'veth', 'peer', 'name', theirs, 'netns', name)
        ip('addr', 'add', f'{host}/32', 'dev', ours)
        ip('link', 'set', ours, 'up')
        ip('route', 'add', '198.19.255.1/32', 'dev', ours)
        ip('-n', name, 'addr', 'add', '198.19.255.1/32', 'dev', theirs)
        ip('-n', name, 'link', 'set', theirs, 'up')
        ip('-n', name, 'route', 'add', f'{host}/32', 'dev', theirs)
        self.unplug = lambda: ip('-n', name, 'link', 'set', theirs, 'down')
        return name, host

    def far(self, network, port, kind, host):
        process = harness.spawn(['ip', 'netns', 'exec', network, '/usr/bin/python3', badclients.__file__, kind,
                                 f'{host}:{port}', 'vm/vda', '1'], stdout=subprocess.PIPE, text=True)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.assertEqual(process.stdout.readline(), 'ready\n', kind)

    def test_they_are_given_up_and_their_session_ends(self):
        network, host = self.network()
        self.begin(flags=[f'--listen=tcp:{host}:0', '--allow-plaintext', '--allow=any=*', '--max-connections=8'])
        with open(self.daemon.log_path, encoding='utf-8') as f:
            port = next(line for line in f if f'listening on tcp:{host}:' in line).rstrip().rsplit(':', 1)[1]
        for kind in ('idles', 'never-reads', 'greedy'):
            self.far(network, port, kind, host)
        self.assertEqual(len(self.daemon.ask('query-status')['connections']), 3)
        load = self.vm.load('vda', ('write', 'flush'), pause_us=5000)
        time.sleep(1)
        self.unplug()
        began = time.monotonic()
        other = rawnbd.refusal(self.daemon.socket, 'vm/vda')  # the VM is theirs until then
        self.assertIn('in session', other)
        ended = {}
        while len(ended) < 3:
            left = {c['id'] for c in self.daemon.ask('query-status')['connections']}
            for number in {1, 2, 3} - left - set(ended):
                ended[number] = time.monotonic() - began
            self.assertLess(time.monotonic() - began, LATE)
            time.sleep(0.5)
        self.daemon.wait_idle()
        print(f'gone after {", ".join(f"{s:.0f}" for s in ended.values())} s', flush=True)
        self.assertGreater(min(ended.values()), VANISHED / 2)  # a short outage ends nobody
        self.qemu_answers()
        result = load.stop()
        self.assertEqual((result['errors'], result['bad']), (0, 0))
        self.frozen = bytes(self.vm.disks['vda'].model.image)
        self.good_pull()
        self.end()


if __name__ == '__main__':
    harness.main()
