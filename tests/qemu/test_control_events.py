#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What clients of the control socket are told without asking: checkpoints that come, go and break; commits that begin
and end."""
import socket
import time

import harness
import nbdpull
from commits import Layers
from harness import MIB, Disk
from qmpclient import Qmp, QmpError


class Events(Layers):
    def listen(self):
        control = Qmp(self.daemon.control)
        self.addCleanup(control.close)
        return control

    def event(self, listener, kind, **expected):
        e = listener.wait_event(kind, 20)
        self.assertLess(abs(e['timestamp']['seconds'] + e['timestamp']['microseconds'] / 1e6 - time.time()), 60)
        self.assertEqual(e['data']['vm'], 'vm')
        self.assertEqual({k: e['data'].get(k) for k in expected}, expected)
        return e['data']

    def two_disks(self):
        self.vm = self.bare(Disk('vda', 4 * MIB), Disk('vdb', 4 * MIB))
        self.daemon = self.qpulld(self.vm, linger=0)
        self.daemon.wait_idle()

    def test_checkpoints_that_are_made_and_deleted_are_told_to_all(self):
        self.two_disks()
        a, b = self.listen(), self.listen()
        self.daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'c1'})
        self.daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'c2', 'disk': 'vdb'})
        self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'c1', 'disk': 'vda'})
        self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'nothing'})
        self.daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': 'c1'})
        for listener in (a, b):
            self.event(listener, 'CHECKPOINT_CREATED', name='c1', disks=['vda', 'vdb'])
            self.event(listener, 'CHECKPOINT_CREATED', name='c2', disks=['vdb'])
            self.event(listener, 'CHECKPOINT_DELETED', name='c1', disks=['vda'])
            self.event(listener, 'CHECKPOINT_DELETED', name='c1', disks=['vdb'])
            listener('query-version')
            self.assertEqual(listener.events, [])
        self.daemon.stop()

    def test_a_pull_tells_what_it_keeps_and_nothing_else(self):
        self.two_disks()
        a = self.listen()
        h = nbdpull.connect(self.daemon.uri('vm/vda@good'))
        up = self.event(a, 'SESSION_UP', checkpoint='good')
        a('query-version')
        self.assertEqual(a.events, [], 'it is provisional')
        h.shutdown()
        self.event(a, 'SESSION_DOWN', session=up['session'], reason='done', checkpoint='good', kept=['vda'], dropped=[],
                   problems=None)
        self.event(a, 'CHECKPOINT_CREATED', name='good', disks=['vda'])
        del h
        h = nbdpull.connect(self.daemon.uri('vm/vda@bad'))
        del h  # without a goodbye: it is dropped
        self.daemon.wait_idle()
        self.event(a, 'SESSION_UP', checkpoint='bad')
        self.event(a, 'SESSION_DOWN', reason='client', checkpoint='bad', kept=[], dropped=['vda'], problems=None)
        with self.assertRaises(QmpError):
            self.daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'good'})
        a('query-version')
        self.assertEqual(a.events, [])
        self.daemon.stop()

    def test_a_commit_and_what_others_break_is_told(self):
        self.begin()
        self.work()
        self.checkpoint('c1', 'c2')
        self.work()
        self.snapshot(['c1', 'c2'])
        self.work()
        self.serve()
        a = self.listen()
        self.commit('--base', self.nodes[0], '--active')
        job = self.event(a, 'JOB_STATUS_CHANGE', type='block-commit', disk='vda', status='running')['id']
        self.event(a, 'JOB_STATUS_CHANGE', id=job, status='concluded', error=None)
        self.reasons()
        self.vm.look('block-dirty-bitmap-clear', {'node': self.nodes[0], 'name': 'c1'})
        self.assertEqual(self.reasons(), {'c1': 'GAP', 'c2': 'NONE'})
        self.event(a, 'CHECKPOINT_BROKEN', name='c1', disk='vda', reason='GAP')
        self.reasons()
        self.assertEqual(a.events, [], 'once')
        self.daemon.stop()

    def test_a_commit_that_is_cancelled_is_told(self):
        self.begin()
        self.vm.write('vda', 0, 8 * MIB, 5)
        self.snapshot([])
        self.vm.write('vda', 0, 8 * MIB, 6)
        self.serve()
        a = self.listen()
        job = a('block-commit', {'vm': 'vm', 'disk': 'vda', 'active': True})['id']
        try:
            a('job-cancel', {'id': job})
        except QmpError:
            self.skipTest('the commit was faster')
        states = [e['data'] for e in a.events]
        while not states or states[-1]['status'] != 'concluded':
            states.append(a.wait_event('JOB_STATUS_CHANGE', 20)['data'])
        self.assertIn('running', [s['status'] for s in states])
        self.assertEqual({s['id'] for s in states}, {job})
        self.daemon.stop()

    def test_who_has_not_said_hello_is_told_nothing(self):
        self.two_disks()
        with socket.socket(socket.AF_UNIX) as silent:
            silent.settimeout(5)
            silent.connect(self.daemon.control)
            self.assertIn(b'QMP', silent.recv(1 << 16))
            self.daemon.ask('checkpoint-create', {'vm': 'vm', 'name': 'c1'})
            silent.settimeout(1)
            with self.assertRaises(TimeoutError):
                silent.recv(1 << 16)
        self.daemon.stop()


if __name__ == '__main__':
    harness.main()
