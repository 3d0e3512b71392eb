# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stands between qpulld and QEMU's monitor, counts the commands, and lets a test act at exactly one of them."""
import array
import json
import os
import select
import socket
import threading

MAX_FDS = 8
REPLY_WAIT_S = 5


class QmpProxy:
    """Listens at .qmp_path (which makes it fit for harness.Qpulld) for one client at a time.

    at(n, before=…) or at(n, after=…) arms it: `before` is called when command number n (from 0) has come but QEMU
    does not have it yet, `after` when QEMU has answered it but the client does not know. Only commands that a client
    sends after at() count. A command that `before` returns False for is never sent, the client's connection is closed
    instead; likewise an answer that `after` returns False for. at() and off() wait for one that is being called.
    told: a function of what QEMU says, whole lines, that returns what the client gets instead.
    asked: a function of a client's command, the whole object, that returns what QEMU gets instead.
    at_each(f): f is called with the name of every command that comes, before anything else; at_each(None) waits likewise."""

    def __init__(self, folder, guest, name='proxy', listener=None):
        self.qmp_path, self.qemu_path, self.name = f'{folder}/{name}.qmp', guest.qmp_path, guest.name
        self.commands = []  # names, since at()
        self.number, self.before, self.after, self.each = None, None, None, None
        self.told = self.asked = None
        self.lock = threading.RLock()
        self.listener = listener  # on qmp_path, by somebody else
        if not listener:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(self.qmp_path)
            self.listener.listen(8)
        self.stopping = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def at(self, number, before=None, after=None):
        with self.lock:
            self.commands = []
            self.number, self.before, self.after = number, before, after

    def at_each(self, each):
        with self.lock:
            self.each = each

    def off(self):
        self.at(None)

    def close(self):
        self.stopping = True
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join(10)
        self.listener.close()

    def _run(self):
        while not self.stopping:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            with client, socket.socket(socket.AF_UNIX) as qemu:
                try:
                    qemu.connect(self.qemu_path)
                    self._serve(client, qemu)
                except OSError:
                    pass  # one of the two is gone; the next client comes

    def _serve(self, client, qemu):
        from_client = b''
        while not self.stopping:
            ready, _, _ = select.select([client, qemu], [], [], 0.2)
            if qemu in ready:
                data = qemu.recv(1 << 16)
                if not data:
                    return
                while self.told and not data.endswith(b'\n'):
                    data += qemu.recv(1 << 16)
                client.sendall(self.told(data) if self.told else data)
            if client in ready:
                data, ancillary, _, _ = client.recvmsg(1 << 16, socket.CMSG_SPACE(MAX_FDS * 4))
                fds = array.array('i')
                for level, kind, content in ancillary:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        fds.frombytes(content[:len(content) - len(content) % fds.itemsize])
                try:
                    if not data:
                        return
                    *lines, from_client = (from_client + data).split(b'\n')
                    for i, line in enumerate(lines):
                        # Data with descriptors is never received together with what follows it.
                        last = fds if i == len(lines) - 1 and not from_client else ()
                        if not self._command(client, qemu, line + b'\n', last):
                            return
                finally:
                    for fd in fds:
                        os.close(fd)

    def _command(self, client, qemu, line, fds):
        message = json.loads(line)
        with self.lock:
            if self.each:
                self.each(message.get('execute'))
            mine = self.number is not None and len(self.commands) == self.number
            self.commands.append(message.get('execute'))
            if mine and self.before and self.before() is False:
                return False
            if self.asked:
                line = json.dumps(self.asked(message)).encode() + b'\n'
            qemu.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', fds))] if fds else [])
            if not mine or not self.after:
                return True
            answer = self._answer(qemu, message.get('id'))
            if self.after() is False:
                return False
        client.sendall(answer)
        return True

    @staticmethod
    def _answer(qemu, command_id):
        """Everything up to the answer with that id."""
        data = b''
        qemu.settimeout(REPLY_WAIT_S)
        while True:
            part = qemu.recv(1 << 16)
            if not part:
                raise ConnectionError('QEMU is gone')
            data += part
            for line in data.split(b'\n')[:-1]:
                answer = json.loads(line)
                mine = ('return' in answer or 'error' in answer) and answer.get('id') == command_id
                if mine and data.endswith(b'\n'):
                    qemu.settimeout(None)
                    return data
