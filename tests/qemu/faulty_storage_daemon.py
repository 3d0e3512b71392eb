#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A qemu-storage-daemon whose monitor fails once. Started by qpulld in its place (--storage-daemon): passes QMP on to a
real one, and does to one command what QPULL_FAULT_PLAN, a file, says: "KIND NUMBER" with NUMBER counted over all
processes, or the command's name, and KIND one of
  refuse  the command is answered with an error and not passed on
  before  the real daemon is killed (-9) instead of getting it
  after   likewise as soon as it has answered; the answer is lost
  slow    NUMBER is the speed of a block commit, in bytes a second
  parent-before, parent-after  qpulld itself is killed (-9) then, and the real daemon ends as it always does without one
The commands that came are added to QPULL_FAULT_SEEN, one line each. Its parent's death (SIGTERM) goes on to the real one.
"""
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile

NBD_FD, QMP_FD = 4, 3
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def die_with_parent():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main():
    with open(os.environ['QPULL_FAULT_PLAN'], encoding='utf-8') as f:
        kind, number = f.read().split()
    folder = tempfile.mkdtemp(prefix='qpull-faulty-')
    path = f'{folder}/qmp'
    real_side = socket.socket(socket.AF_UNIX)
    real_side.bind(path)
    real_side.listen(1)
    real_side.setblocking(False)  # see make_listener() in server/images.c
    arguments = [a.replace('fd=3', f'fd={real_side.fileno()}') for a in sys.argv[1:]]
    real = subprocess.Popen(['qemu-storage-daemon', *arguments], pass_fds=(real_side.fileno(), NBD_FD),
                            preexec_fn=die_with_parent)
    os.close(NBD_FD)  # the real one has it: when that is gone nobody listens
    real_side.close()
    signal.signal(signal.SIGTERM, lambda *_: real.terminate())
    listener = socket.socket(fileno=QMP_FD)
    listener.setblocking(True)
    client, _ = listener.accept()
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    os.unlink(path)
    os.rmdir(folder)
    try:
        talk(client.makefile('rwb', buffering=0), server.makefile('rwb', buffering=0), real, kind, number)
    except (BrokenPipeError, ConnectionResetError):
        pass
    status = real.wait()
    if status < 0 and status != -signal.SIGTERM:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(0)


def answer_of(server, client, wanted):
    """Passes documents on until this one has been answered; returns the answer."""
    while True:
        line = server.readline()
        if not line:
            raise BrokenPipeError
        if json.loads(line).get('id') == wanted:
            return line
        client.write(line)


def count(command):
    with open(os.environ['QPULL_FAULT_SEEN'], 'a+', encoding='utf-8') as f:
        f.write(f'{command}\n')
        f.seek(0)
        return len(f.readlines())


def stop():
    raise BrokenPipeError


def next_command(client, server):
    """Passes events on meanwhile. Neither side sends a document in pieces while the other is waited for."""
    while True:
        ready, _, _ = select.select([client, server], [], [])
        if client in ready:
            return client.readline()
        client.write(server.readline() or stop())


def talk(client, server, real, kind, number):
    client.write(server.readline() or stop())
    while True:
        line = next_command(client, server)
        if not line:
            return
        message = json.loads(line)
        if kind == 'slow' and message['execute'] == 'block-commit':
            message['arguments']['speed'] = int(number)
            line = json.dumps(message).encode() + b'\n'
        mine = number in (str(count(message['execute'])), message['execute']) and kind != 'slow'
        if mine and kind == 'refuse':
            error = {'class': 'GenericError', 'desc': 'refused by the test'}
            client.write(json.dumps({'error': error, 'id': message.get('id')}).encode() + b'\r\n')
            continue
        if mine and kind == 'parent-before':
            os.kill(os.getppid(), signal.SIGKILL)
            return
        if mine and kind == 'before':
            real.kill()
            return
        server.write(line)
        answer = answer_of(server, client, message.get('id'))
        if mine and kind == 'parent-after':
            os.kill(os.getppid(), signal.SIGKILL)
            return
        if mine and kind == 'after':
            real.kill()
            return
        client.write(answer)
        if message['execute'] == 'quit':
            return


if __name__ == '__main__':
    main()
