#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes the seeds of the fuzz targets that are not text: seeds.py FOLDER makes FOLDER/TARGET/NAME."""
import os
import struct
import sys

# -- nbd: what the client says, the decisions (fuzz_nbd.c), how many of those ------------------------------------------
TLS_ON, TLS_REQUIRED = 1, 2
SIMPLE, STRUCTURED, EXTENDED = 1 << 2, 2 << 2, 3 << 2
CONTEXTS, LATER = 16, 32
DF, REQ_ONE, PAYLOAD_LEN = 4, 8, 32
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)


def option(number, data=b""):
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def name(text):
    return struct.pack(">I", len(text)) + text


def info(number, export, *infos):
    return option(number, name(export) + struct.pack(f">H{len(infos)}H", len(infos), *infos))


def meta(number, export, *queries):
    return option(number, name(export) + struct.pack(">I", len(queries)) + b"".join(map(name, queries)))


def request(form, command, cookie, offset, length, flags=0):
    if form == EXTENDED:
        return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)


def nbd(says, *decisions):
    return says + bytes(decisions) + bytes([len(decisions)])


def requests(form):
    write_flags = PAYLOAD_LEN if form == EXTENDED else 0
    return b"".join([
        request(form, READ, 1, 0, 4096), request(form, READ, 2, 1 << 32, 65536), request(form, READ, 3, 512, 4096, DF),
        request(form, CACHE, 4, 0, 4096), request(form, BLOCK_STATUS, 5, 0, 1 << 31),
        request(form, BLOCK_STATUS, 6, 4096, 4096, REQ_ONE), request(form, WRITE, 7, 0, 5, write_flags) + b"bytes",
        request(form, TRIM, 8, 0, 512), request(form, FLUSH, 9, 0, 0), request(form, WRITE_ZEROES, 10, 0, 512),
        request(form, READ, 11, (1 << 33) - 1, 2), request(form, READ, 12, 0, 0), request(form, DISC, 13, 0, 0),
    ])


def nbd_seeds():
    flags = struct.pack(">I", 3)
    haggle = flags + option(8) + option(3) + option(4, b"data") + info(6, b"vm/vda", 0, 1, 2, 3)
    select = meta(9, b"vm/vda") + meta(9, b"vm/vda", b"base:", b"qemu:") + meta(10, b"vm/vda", b"base:allocation")
    yield "export_name", nbd(struct.pack(">I", 1) + option(1, b"vm/vda") + requests(SIMPLE))
    yield "abort", nbd(flags + option(2))
    yield "haggle", nbd(haggle + select + info(7, b"vm/vda", 3) + requests(STRUCTURED))
    yield "haggle_later", nbd(haggle + select + info(7, b"vm/vda", 3) + requests(STRUCTURED), LATER)
    yield "haggle_extended", nbd(flags + option(11) + select + info(7, b"vm/vdb", 3) + requests(EXTENDED))
    yield "tls", nbd(flags + option(5), TLS_ON, 0, 4)
    yield "tls_required", nbd(flags + option(3) + option(5), TLS_REQUIRED, 0, 4)
    yield "broken_lengths", nbd(flags + option(6, b"\0\0\0\5abc") + option(7, b"")
                                + option(10, b"\0\0\0\0\0\0\0\1\0\0\0\5a"))
    for form, label in (SIMPLE, "simple"), (STRUCTURED, "structured"), (EXTENDED, "extended"):
        yield f"requests_{label}", nbd(requests(form), form | CONTEXTS)
        yield f"requests_{label}_later", nbd(requests(form), form | CONTEXTS | LATER, 28, 2, 28, 2, 40, 0x12)
        many = b"".join(request(form, CACHE, i, 4096 * i, 4096) for i in range(70))  # more than may be in flight
        yield f"requests_{label}_many", nbd(many, form | LATER)
        yield f"requests_{label}_failing", nbd(requests(form), form | CONTEXTS, 0, 0x81, 1, 0x80, 0x82, 1)


# -- stream: how long the pieces are, then what QEMU says (fuzz_stream.c) ----------------------------------------------
def stream_seeds():
    greeting = b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, ' \
               b'"capabilities": ["oob"]}}\r\n'
    reply = b'{"return": [{"name": "a\\u00e9\\"\\\\", "size": 18446744073709551615, ' \
            b'"on": true, "x": null, "f": -1.5e3}], "id": 7}\r\n'
    event = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}\r\n'
    yield "talk", b"\0" + greeting + reply + event
    yield "talk_in_pieces", b"\x06" + greeting + reply + event
    yield "error", b"\x01" + b'{"error": {"class": "GenericError", "desc": "no"}, "id": 1}\n{"a": {}}{"b": []}'
    yield "nested", b"\x03" + b'{"a":' * 60 + b"1" + b"}" * 60
    yield "no_document", b"\x02" + b"[1, 2]\n" + greeting
    yield "broken", b"\x02" + b'{"return": {]}\n'
    yield "cut_off", b"\x02" + greeting[:-20]
    yield "too_long", b"\x20" + b'{"a": "' + b"x" * 5000 + b'"}'


# -- agent: how long the pieces are, then what the guest says; its sync is number 7 (fuzz_agent.c) ---------------------
def agent_seeds():
    sync, stale = b'\xff{"return": 7}\n', b'\xff{"return": 6}\n{"return": 2}\n'
    yield "talk", b"\x00" + sync + b'{"return": 2}\n' + sync + b'{"return": "thawed"}\n'
    yield "whole", b"\xff" + sync + b'{"return": 2}\n' + sync + b'{"return": "frozen", "id": 3}\n'
    yield "stale", b"\x05" + b'turn": 3}\n' + stale + b"\xff\xff" + sync + b'{"return": {}}\n'
    yield "error", b"\x02" + sync + b'{"error": {"class": "CommandNotFound", "desc": "a\\u0000\\n\xfe"}}'
    yield "torn", b"\x09" + b'\xff{"ret' + sync + b'{"return": [' + sync + b'{"return": 1}'
    yield "rubbish", b"\x03" + sync + b'{"return": ]}' + sync


# -- vhost: how much the back end says, in which pieces, what, and what it writes to shared memory (fuzz_vhost.c) -------
def vhost_seeds():
    def message(number, payload, flags=5):  # version 1, a reply
        return struct.pack("<III", number, flags, len(payload)) + payload

    features = message(1, struct.pack("<Q", 1 << 30 | 1 << 32 | 1 << 29))
    protocol = message(15, struct.pack("<Q", 1 << 3 | 1 << 9))
    config = message(24, struct.pack("<IIIQ", 0, 8, 0, 4096))
    ready = message(18, struct.pack("<Q", 0))
    good = features + protocol + config + ready
    answers = b"".join(struct.pack("<BHBBB", 0, i % 16, 1, i % 3, 0) for i in range(40))

    def seed(says, piece, writes=b""):
        return bytes([len(says), piece]) + says + writes

    yield "good", seed(good, 255, answers)
    yield "pieces", seed(good, 0, answers)
    yield "refuses", seed(features + protocol + config + message(18, struct.pack("<Q", 1)), 30)
    yield "few_features", seed(message(1, bytes(8)) + protocol, 5)
    yield "huge", seed(features + protocol + message(24, struct.pack("<IIIQ", 0, 8, 0, (1 << 64) - 1)), 9)
    yield "long", seed(struct.pack("<III", 1, 5, 1 << 31), 3)
    yield "out_of_order", seed(protocol + features, 99)
    yield "answers_what_was_not_asked", seed(good, 1, answers[:30] + answers[:30] * 3)
    yield "ends_too_many", seed(good, 2, struct.pack("<BHBBB", 2, 65535, 0, 0, 0) + answers)
    yield "writes_anywhere", seed(good, 3, b"".join(struct.pack("<BHBBB", 1, i * 977 % 65536, i % 256, 0, 0)
                                                    for i in range(200)) + answers)


SEEDS = {"nbd": nbd_seeds, "stream": stream_seeds, "agent": agent_seeds, "vhost": vhost_seeds}


def main():
    for target, seeds in SEEDS.items():
        folder = os.path.join(sys.argv[1], target)
        os.makedirs(folder, exist_ok=True)
        for label, data in seeds():
            with open(os.path.join(folder, label), "wb") as file:
                file.write(data)


if __name__ == "__main__":
    main()
