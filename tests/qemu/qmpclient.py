# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small QMP client for tests, and what a test compares before and after: graph_state()."""
import json
import re
import socket
import time


class QmpError(Exception):
    """QEMU's answer was an error; .qmp_class and .desc tell which."""

    def __init__(self, command, error):
        super().__init__(f'{command}: {error.get("desc")}')
        self.qmp_class = error.get('class')
        self.desc = error.get('desc')


# QEMU 7.2 on a busy machine lets the very first command of a new process lie, once in some 5000 starts; whoever
# connects again is served at once. qpulld's client does the same.
HELLO_TIMEOUT = 5


class Qmp:
    """One monitor connection. Every call has a deadline; events are kept in .events until taken by wait_event()."""

    def __init__(self, path, timeout=30):
        self.timeout = timeout
        try:
            self._open(path, min(timeout, HELLO_TIMEOUT))
        except TimeoutError:
            self._open(path, timeout)

    def _open(self, path, timeout):
        self.events = []
        self.buffer = b''
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(timeout)
        try:
            self.sock.connect(path)
            self.greeting = self._document(time.monotonic() + timeout)
            self('qmp_capabilities', timeout=timeout)
        except BaseException:
            self.sock.close()
            raise

    def _document(self, deadline):
        while b'\n' not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError('no answer from the monitor')
            self.sock.settimeout(left)
            data = self.sock.recv(1 << 16)
            if not data:
                raise ConnectionError('the monitor hung up')
            self.buffer += data
        line, self.buffer = self.buffer.split(b'\n', 1)
        return json.loads(line)

    def __call__(self, command, arguments=None, timeout=None):
        message = {'execute': command}
        if arguments:
            message['arguments'] = arguments
        self.sock.sendall(json.dumps(message).encode() + b'\n')
        return self.wait_answer(command, timeout)

    def wait_answer(self, command, timeout=None):
        """The answer to a command that was sent."""
        deadline = time.monotonic() + (timeout or self.timeout)
        while True:
            answer = self._document(deadline)
            if 'return' in answer:
                return answer['return']
            if 'error' in answer:
                raise QmpError(command, answer['error'])
            if 'event' in answer:
                self.events.append(answer)

    def wait_event(self, name, timeout=None, where=lambda data: True):
        """The first event of that name (kept or to come) whose data satisfies where()."""
        deadline = time.monotonic() + (timeout or self.timeout)
        while True:
            for i, event in enumerate(self.events):
                if event['event'] == name and where(event.get('data', {})):
                    return self.events.pop(i)
            answer = self._document(deadline)
            if 'event' in answer:
                self.events.append(answer)

    def close(self):
        self.sock.close()


def _bitmap(b):
    # count changes whenever the guest writes
    return {k: b.get(k) for k in ('name', 'granularity', 'recording', 'busy', 'persistent', 'inconsistent')}


def bitmaps(qmp):
    """{(node, bitmap): its description} of every named bitmap, the count of dirty bytes included."""
    return {(n['node-name'], b['name']): b for n in qmp('query-named-block-nodes', {'flat': True})
            for b in n.get('dirty-bitmaps', []) if b.get('name')}


def graph_edges(qmp):
    """Every edge of QEMU's block graph as (parent, role, child). Unnamed parents are devices and exports."""
    graph = qmp('x-debug-query-block-graph')
    names = {n['id']: n['name'] or f'({n["type"]})' for n in graph['nodes']}
    # Automatic names count up for ever, so a node that went and came back would look new.
    names = {i: re.sub(r'^#block\d+$', '#block', n) for i, n in names.items()}
    return sorted((names[e['parent']], e['name'], names[e['child']]) for e in graph['edges'])


def graph_state(qmp):
    """What must be the same before a session and after it, in a form that assertEqual can show: nodes, bitmaps,
    devices, exports, jobs, file descriptors, run state. Left out is what the guest's own work changes (counts, sizes on
    disk, I/O status)."""
    nodes = {}
    for n in qmp('query-named-block-nodes', {'flat': True}):
        nodes.setdefault(n['node-name'], {
            'driver': n['drv'], 'ro': n['ro'], 'cache': n['cache'], 'detect-zeroes': n['detect_zeroes'],
            'file': n['file'], 'threshold': n['write_threshold'],
            'virtual-size': None if n['drv'] == 'file' else n['image']['virtual-size'],  # image files grow
            'bitmaps': sorted((_bitmap(b) for b in n.get('dirty-bitmaps', [])), key=str)})
    devices = {}
    for d in qmp('query-block'):
        devices[d['qdev'] if d.get('qdev') else d['device']] = {
            'device': d['device'], 'root': d.get('inserted', {}).get('node-name'), 'locked': d['locked']}
    return {
        'nodes': nodes,
        'devices': devices,
        'edges': graph_edges(qmp),
        'exports': sorted(qmp('query-block-exports'), key=str),
        'jobs': sorted((j['id'], j['type']) for j in qmp('query-jobs')),
        'fdsets': [[f.get('opaque') for f in s['fds']] for s in qmp('query-fdsets')],
        'status': qmp('query-status')['status'],
    }
