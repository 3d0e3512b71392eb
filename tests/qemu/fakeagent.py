# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest with a guest agent that can fail in each way a guest can: one client at a time, as on QEMU's channel."""
import json
import os
import re
import socket
import threading

COMMANDS = {'guest-sync-delimited': 'sync', 'guest-fsfreeze-freeze': 'freeze', 'guest-fsfreeze-thaw': 'thaw',
            'guest-fsfreeze-status': 'status'}
NFILESYSTEMS = 2


class FakeAgent:
    """.frozen: file systems; .faults: {'freeze': 'silent', …}, see _obey(); .before: {'thaw': function}, called in the
    agent's thread before the command is done; .heard: every command, in order."""

    def __init__(self, path):
        self.path = path
        self.frozen, self.faults, self.before, self.heard = 0, {}, {}, []
        self.ever_frozen = 0
        self.client, self.asleep, self.waiting = None, False, []
        self.lock = threading.RLock()
        self.listener = socket.socket(socket.AF_UNIX)
        if os.path.exists(path):
            os.unlink(path)
        self.listener.bind(path)
        self.listener.listen(2)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self):
        while True:
            try:
                self.client = self.listener.accept()[0]
            except OSError:
                return
            data = b''
            while True:
                try:
                    more = self.client.recv(4096)
                except OSError:
                    more = b''
                if not more:
                    break
                *lines, data = (data + more).split(b'\n')
                for line in lines:
                    command = json.loads(line[line.rfind(b'\xff') + 1:])
                    with self.lock:
                        self._obey(COMMANDS[command['execute']], command)
            self.client.close()

    def _say(self, data):
        try:
            self.client.sendall(data)
        except OSError:
            pass

    def _obey(self, name, command):
        """Faults: refuses (an error, no effect), deaf (nothing at all), silent (the effect, no answer), late (all that
        comes from now on is done by wake()), lies (the effect, another answer), rubbish (the effect, and no JSON),
        floods (no effect, megabytes), hangs-up (the effect, and the connection ends), self-thawed (an error, as Windows
        says that the file systems thawed by themselves)."""
        self.heard.append(name)
        fault = self.faults.get(name)
        if fault == 'late' or self.asleep:
            self.asleep = True
            self.waiting.append((name, command))
            return
        if name in self.before:
            self.before[name]()
        count = self.frozen
        if fault not in ('refuses', 'deaf', 'floods'):
            if name == 'freeze':
                self.frozen = self.ever_frozen = count = NFILESYSTEMS
            elif name == 'thaw':
                self.frozen = 0
        error = {'error': {'class': 'GenericError', 'desc': 'no\nthank \x1byou'}}
        value = {'sync': command.get('arguments', {}).get('id'), 'status': 'frozen' if self.frozen else 'thawed'}
        if fault in ('refuses', 'self-thawed'):
            self._say(json.dumps(error).encode() + b'\n')
        elif fault == 'lies':
            self._say(b'{"return": {"what": ["you", "like"]}}\n')
        elif fault == 'rubbish':
            self._say(b'{"return": ]\n')
        elif fault == 'floods':
            self._say(b'{"return": "' + b'x' * (4 << 20))
        elif fault == 'hangs-up':
            self.client.shutdown(socket.SHUT_RDWR)
        elif fault is None:
            self._say((b'\xff' if name == 'sync' else b'') + json.dumps({'return': value.get(name, count)}).encode() +
                      b'\n')

    def wake(self):
        with self.lock:
            self.asleep = False
            waiting, self.waiting = self.waiting, []
            for name, command in waiting:
                if self.faults.get(name) == 'late':
                    del self.faults[name]
                self._obey(name, command)

    def close(self):
        for end in (self.listener, self.client):
            if end:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                end.close()
        self.thread.join(10)


def watchdogs(daemon):
    """The thaw watchdogs of that daemon's VMs, zombies included: their pids."""
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/cmdline', 'rb') as f:
                words = f.read().split(b'\0')
            with open(f'/proc/{pid}/stat') as f:
                parent = int(re.search(r'\) \S (\d+)', f.read()).group(1))
        except (FileNotFoundError, ProcessLookupError):
            continue
        mine = len(words) > 2 and words[1] == b'--thaw-watchdog' and words[2].startswith(daemon.folder.encode())
        zombie = words == [b''] and daemon.process and parent == daemon.process.pid
        if mine or zombie:
            found.append(int(pid))
    return found
