# SPDX-License-Identifier: LGPL-2.1-or-later
"""NBD byte by byte, for what libnbd hides (the server's sentences) or would never send (nonsense)."""
import socket
import struct
import time

INIT_MAGIC, OPTION_MAGIC, REPLY_MAGIC = 0x4e42444d41474943, 0x49484156454F5054, 0x3e889045565a9
REQUEST_MAGIC, SIMPLE_MAGIC, CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668e33ef
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO, OPT_STRUCTURED = 1, 2, 3, 5, 6, 7, 8
OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT = 9, 10
REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
ERROR = 1 << 31
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = (ERROR | n for n in (1, 2, 3, 6, 9))
CMD_READ, CMD_WRITE, CMD_DISC, CMD_BLOCK_STATUS = 0, 1, 2, 7
CHUNK_DONE, CHUNK_NONE, CHUNK_DATA, CHUNK_ERROR = 1, 0, 1, 1 << 15
EIO, EINVAL, ENOTSUP, EPERM = 5, 22, 95, 1


class Refused(Exception):
    """An option was answered with an error: .error is its number, .sentence the server's words."""

    def __init__(self, error, sentence):
        super().__init__(f'{error & ~ERROR}: {sentence}')
        self.error, self.sentence = error, sentence


def string(text):
    data = text.encode() if isinstance(text, str) else text
    return struct.pack('>I', len(data)) + data


class Raw:
    """address: the path of a unix socket, or (host, port). Every wait ends after `timeout` seconds."""

    def __init__(self, address, timeout=30, handshake=True, receive_buffer=None):
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect(address)
        self.sock.settimeout(timeout)
        if handshake:
            magic, option_magic, flags = struct.unpack('>QQH', self.take(18))
            if (magic, option_magic) != (INIT_MAGIC, OPTION_MAGIC) or not flags & FIXED_NEWSTYLE:
                raise ValueError('not a newstyle NBD server')
            self.put(struct.pack('>I', FIXED_NEWSTYLE | NO_ZEROES))

    def put(self, data):
        self.sock.sendall(data)

    def take(self, length):
        """Exactly so many bytes; EOFError if the server hangs up before."""
        data = bytearray()
        while len(data) < length:
            part = self.sock.recv(length - len(data))
            if not part:
                raise EOFError(f'the server hung up, {len(data)} of {length} bytes came')
            data += part
        return bytes(data)

    def send_option(self, option, data=b'', length=None):
        self.put(struct.pack('>QII', OPTION_MAGIC, option, len(data) if length is None else length) + data)

    def take_reply(self):
        magic, option, kind, length = struct.unpack('>QIII', self.take(20))
        if magic != REPLY_MAGIC:
            raise ValueError(f'reply magic {magic:#x}')
        return option, kind, self.take(length)

    def option(self, option, data=b'', length=None):
        """Sends it and collects its replies before the ACK; Refused where it is."""
        self.send_option(option, data, length)
        replies = []
        while True:
            answered, kind, payload = self.take_reply()
            if answered != option:
                raise ValueError(f'answer to option {answered}')
            if kind & ERROR:
                raise Refused(kind, payload.decode())
            if kind == REP_ACK:
                return replies
            replies.append((kind, payload))

    def go(self, export, option=OPT_GO, contexts=()):
        """Opens an export; its size. The ids of contexts are in .contexts then."""
        if contexts:
            self.option(OPT_STRUCTURED)
            found = self.option(OPT_SET_META_CONTEXT, string(export) + struct.pack('>I', len(contexts)) +
                                b''.join(map(string, contexts)))
            self.contexts = {payload[4:].decode(): struct.unpack('>I', payload[:4])[0] for _, payload in found}
        for _, payload in self.option(option, string(export) + struct.pack('>H', 0)):
            if payload[:2] == b'\0\0':
                size, self.flags = struct.unpack('>QH', payload[2:12])
        return size

    def request(self, command, offset=0, length=0, cookie=1, flags=0, magic=REQUEST_MAGIC):
        self.put(struct.pack('>IHHQQI', magic, flags, command, cookie, offset, length))

    def read(self, offset, length):
        """A simple READ: (error, bytes)."""
        self.request(CMD_READ, offset, length)
        magic, error, _ = struct.unpack('>IIQ', self.take(16))
        if magic != SIMPLE_MAGIC:
            raise ValueError(f'reply magic {magic:#x}')
        return error, self.take(length) if not error else b''

    def error_of(self, command, offset, length, flags=0):
        """The error of a request that has no payload in its answer."""
        self.request(command, offset, length, flags=flags)
        return struct.unpack('>IIQ', self.take(16))[1]

    def wait_hangup(self, timeout):
        """Bytes until the server hangs up; TimeoutError if it does not."""
        deadline, data = time.monotonic() + timeout, bytearray()
        while True:
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                part = self.sock.recv(1 << 16)
            except ConnectionResetError:
                return bytes(data)
            if not part:
                return bytes(data)
            data += part

    def disc(self):
        self.request(CMD_DISC)
        self.close()

    def close(self):
        self.sock.close()


def pull_a_little(address, export, context):
    """A session from its beginning to its good end; the first error ends it."""
    try:
        raw = Raw(address)
        try:
            raw.go(export, contexts=[context])
            raw.request(CMD_DISC)
        finally:
            raw.close()
    except (OSError, EOFError, Refused):
        pass


def refused(raw, export, option=OPT_GO):
    """(error, sentence) of an option about an export; its name is cut out of the sentence. raw is closed."""
    try:
        raw.go(export, option)
    except Refused as e:
        return e.error, e.sentence.replace(export or '-', 'NAME')
    finally:
        raw.close()
    raise AssertionError(f'{export} was opened')


def refusal(address, export):
    """The words with which GO is refused, or None if it is not."""
    raw = Raw(address)
    try:
        raw.go(export)
    except Refused as refused:
        return refused.sentence
    finally:
        raw.close()
    return None
