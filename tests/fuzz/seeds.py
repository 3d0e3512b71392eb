#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes the seeds of the fuzz targets that are not text: seeds.py FOLDER makes FOLDER/TARGET/NAME, of what is below and
of what fuzzing has found before, corpus/TARGET.base64, a line each. seeds.py --pack FOLDER FILE makes such a file."""
import base64
import glob
import hashlib
import json
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


# -- config: the file, then flags, with 0 between (fuzz_config.c) -------------------------------------------------------
def config_seeds():
    whole = b"""; a comment
[server]
listen = unix:/run/qpull/nbd.sock
listen = tcp:[::1]:10809
control = /run/qpull/control.sock
scratch = /var/tmp
scratch-limit = 10G
scratch-total-limit=20480M
scratch-reserve=1K
cbw-timeout=30
give-back=read
shared-memory=64M
state=/var/lib/qpull
max-pause=0.5
linger=10
hold-shutdown=5
handshake-timeout=30
idle-timeout=0
max-connections=100
session-timeout=3600
keep-checkpoints=30
engine=auto
pidfile=/run/qpull.pid
log=debug
allow-plaintext=no
tls=require
tls-certs=/etc/pki/qpull
threads=4
quiesce=try
[allow]
user:root = web*/list+pull,db
cn:backup-*=*
ip:192.0.2.0/24=web/list
psk:alice=*/list+pull+checkpoint+control
dn:CN=alice\\,O=x=db
any=public
[vm "web"]
qmp=/run/web.qmp
qga=/run/web.qga
quiesce=require
disks=vda, vdb
  vdc
disk.root=virtio0
image.vda=qcow2:/images/web.qcow2
engine=backup-job
scratch={"driver": "qcow2",
  "file": {"driver": "nbd", "server": {"type": "unix", "path": "/x"}, "export": "{vm}"}}
[vm "db"]
image.vda=/images/db.raw
"""
    yield "whole", whole
    yield "flags", b"\0--vm=web=/run/web.qmp\0--listen\0tcp:127.0.0.1:0\0--allow=any=*\0--image=db/vda=raw:/x\0" \
                   b"--qga=web=/y\0--tls=on\0--tls-psk=/z\0--threads=64\0--scratch={}\0--max-pause\x000.001\0--log=error"
    yield "both", whole[:200] + b"\0--listen=fd\0--scratch-limit=1T\0--linger=0.25\0--give-back=trim\0--engine=auto"
    yield "help", b"[nonsense\0--help"
    yield "bom", b"\xef\xbb\xbf[vm \"a\"]\r\nqmp=/a\r\n"
    for label, text in {"twice": b"[server]\nlinger=1\nlinger=2\n", "no_section": b"linger=1\n",
                        "unknown": b"[vm \"a\"]\ncolour=red\n", "no_end": b"[vm \"a\nqmp=/x\n",
                        "unfinished": b"[server]\nscratch={\"driver\": \"qcow2\",\n[vm \"a\"]\nqmp=/a\n",
                        "no_qmp": b"[vm \"a\"]\n", "long": b"[server]\nscratch=/" + b"x" * 300 + b"\n",
                        "rules": b"[allow]\nuid:0=*\ngid:4294967295=a?[b-c]*/pull\nnobody=x\nip:::1/128=*/any\n"}.items():
        yield label, text


# -- notes: what is done, then a note, or files and a word (fuzz_notes.c) ------------------------------------------------
def note(label, parent=None, vm="vm1", **more):
    doc = {"format": 1, "vm": vm, "name": label, "parent": parent, "created_ms": 1700000000000, "description": "words",
           "disks": [{"name": "vda", "size": 4096, "node": "#block1", "file": "/a.qcow2", "later": [1.1, {"k": None}]}],
           **more}
    return json.dumps(doc).encode()


def notes_seeds():
    broken = {"disk": "vda", "reason": "GAP", "text": "words", "more": 1}
    export = json.dumps({"format": 1, "vm": "vm1", "checkpoints": [json.loads(note("x")), json.loads(note("y", "x"))]})
    yield "one", b"\0" + note("a", broken=broken, colour="red")
    yield "newer", b"\0" + note("a").replace(b'"format": 1', b'"format": 2')
    yield "damaged", b"\0" + note("a")[:-30]
    yield "huge_numbers", b"\0" + note("a").replace(b"4096", b"18446744073709551616").replace(b"1700000000000", b"-1e99")
    yield "chain", b"\x3f" + b"\0".join([note("a"), note("b", "a"), note("c", "b"), note("mon day", "c"), b"x", b"new"])
    yield "cycle", b"\x22" + b"\0".join([note("a", "b"), note("b", "a"), note("c", "nowhere"), b"", b"?", b"a"])
    yield "of_others", b"\x28" + b"\0".join([note("a", vm="vm2"), note("z"), b"[]", b"{}", b"no", b"c"])
    yield "import", b"\x21" + b"\0".join([note("a"), note("y"), b"", b"", b"", export.encode()])


# -- lineage: what is done, then the memory (fuzz_lineage.c) ------------------------------------------------------------
def lineage_seeds():
    def image(file, dev, inode, **more):
        return {"file": file, "dev": dev, "ino": inode, "born-ns": 3, **more}

    def past(label, cause="none", absence="none", roots=1, **more):
        return {"name": label, "cause": cause, "absence": absence, "size": 8 << 20, "buried": False, "fill": False,
                "roots": [image("/a", 1, 2, granularity=65536, dirty=1 << 20, fill=True)] * roots, **more}

    disk = {"name": "vda", "restored": False, "images": [image("/a", 1, 2), image("/b", 1, 4), image("/c", 0, 0)],
            "retired": [image("/old", 1, 9)], "checkpoints": [past("m"), past("n", roots=2), past("gone", absence="removed")]}
    pasts = [past(f"c{i}", cause) for i, cause in enumerate(("resized", "layer-gone", "record-gone", "replaced", "shrank",
                                                             "remade", "returned", "restored", "later"))]
    for what in 0x80, 0x81, 0xff, 0x0b, 0x51:
        yield f"usual_{what:x}", bytes([what]) + json.dumps({"vm": "vm1", "format": 1, "disks": [disk]}).encode()
    yield "causes", b"\x03" + json.dumps({"format": 1, "disks": [{**disk, "checkpoints": pasts}]}).encode()
    yield "twice", b"\x5b" + json.dumps({"format": 1, "disks": [disk, disk]}).encode()
    yield "roots", b"\x01" + json.dumps({"format": 1, "disks": [{**disk, "checkpoints": [past("m", roots=17)]}]}).encode()
    yield "newer", b"\x80" + b'{"format": 2}'
    yield "other_types", b"\xff" + b'{"format": 1, "disks": [{"name": 7, "images": {}, "checkpoints": "x"}, []]}'
    yield "no_object", b"\x80" + b"[1, 2]"


# -- disks: three answers of QEMU (fuzz_disks.c) ------------------------------------------------------------------------
def disks_seeds():
    captures = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../unit/disks-7.2.json")
    with open(captures, encoding="utf-8") as file:
        for situation, answers in json.load(file).items():
            parts = [answers[k] for k in ("query-block", "query-named-block-nodes", "x-debug-query-block-graph")]
            text = json.dumps(parts, separators=(",", ":")).encode()
            if len(text) < 8192:  # as long as inputs get
                yield situation, text


# -- upstream: what is asked, then what the server says, piece by piece (fuzz_upstream.c) ------------------------------
ASK_READS, ASK_MAP, ASK_POKE, ASK_FLUSH, CLUSTER, ENDS = 0, 1, 2, 3, 64, 128
REP_ACK, REP_INFO, REP_CONTEXT, REP_UNSUP, REP_UNKNOWN = 1, 3, 4, 0x80000001, 0x80000006


def upstream_seeds():
    def reply(number, kind, data=b""):
        return struct.pack(">QIII", 0x3E889045565A9, number, kind, len(data)) + data

    def chunk(cookie, kind, data=b"", done=True):
        return struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, len(data)) + data

    def simple(cookie, error=0, data=b""):
        return struct.pack(">IIQ", 0x67446698, error, cookie) + data

    def seed(first, *pieces):
        return bytes([first]) + b"".join(struct.pack("<H", len(p)) + p for p in pieces)

    greeting = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
    size = 6 * 1024
    info = reply(7, REP_INFO, struct.pack(">HQH", 0, size, 0x8B)) + reply(7, REP_ACK)
    structured, plain = reply(8, REP_ACK), reply(8, REP_UNSUP)
    context = reply(10, REP_CONTEXT, struct.pack(">I", 1) + b"base:allocation") + reply(10, REP_ACK)
    data = bytes(1024)
    reads = [chunk(i, 1, struct.pack(">Q", (i % 6) * 1024) + data) for i in range(1, 5)]
    status = struct.pack(">IIIII", 1, 4096, 0, 2048, 3)

    yield "reads", seed(ASK_READS, greeting, structured + info, *reads)
    yield "reads_newer_libnbd", seed(ASK_READS, greeting, reply(11, REP_UNSUP) + structured + info, *reads)
    yield "reads_in_parts", seed(ASK_READS, greeting, structured + info, chunk(1, 1, struct.pack(">Q", 1024) + data[:512], False)
                                 + chunk(1, 2, struct.pack(">QI", 1536, 512)), chunk(2, 0x8001, struct.pack(">IH", 5, 2) + b"no"))
    yield "reads_simple", seed(ASK_READS | CLUSTER, greeting, plain + info, simple(1, 0, data), simple(2, 13), simple(3, 22))
    yield "reads_ended", seed(ASK_READS | ENDS, greeting, structured + info, reads[0])
    yield "stranger", seed(ASK_READS, greeting, structured + info, simple(99), chunk(77, 0))
    yield "too_much", seed(ASK_READS, greeting, structured + info, chunk(1, 1, struct.pack(">Q", 0) + bytes(4096)))
    yield "map", seed(ASK_MAP, greeting, structured + context + info, chunk(1, 5, status))
    yield "map_in_steps", seed(ASK_MAP, greeting, structured + context + info, chunk(1, 5, status[:12]), chunk(2, 5, status))
    yield "map_newer_libnbd", seed(ASK_MAP, greeting, reply(11, REP_ACK) + context + info,
                                   struct.pack(">IHHQQQ", 0x6E8A278C, 1, 6, 1, 0, 24) + struct.pack(">IIQQ", 1, 1, size, 3))
    yield "map_of_nothing", seed(ASK_MAP, greeting, structured + context + info, chunk(1, 5, struct.pack(">III", 1, 0, 0)))
    yield "map_refused", seed(ASK_MAP, greeting, structured + reply(10, REP_UNKNOWN, b"no such export") + reply(7, REP_UNKNOWN))
    yield "poke", seed(ASK_POKE, greeting, structured + info, simple(1), chunk(1, 0))
    yield "flush", seed(ASK_FLUSH, greeting, structured + info, chunk(1, 0))
    yield "oldstyle", seed(ASK_READS, b"NBDMAGIC" + struct.pack(">QQI", 0x00420281861253, size, 1) + bytes(124))
    yield "refused", seed(ASK_READS, greeting, structured + reply(7, REP_UNKNOWN, b"there is none"))
    yield "rubbish", seed(ASK_FLUSH, b"HTTP/1.1 400 Bad Request\r\n\r\n")


# -- tls: credentials and version, then operations (fuzz_tls.c) ---------------------------------------------------------
REQUIRED, X509, WRONG, OLD, NEW, BEGUN = 1, 2, 4, 8, 16, 32
SAY, SHAKE, SEALED, MANGLE, CUT, BYE, REKEY, ALERT = range(8)


def tls_seeds():
    def say(data, how=SAY):
        return bytes([how | 0x80]) + struct.pack("<H", len(data)) + data

    flags = struct.pack(">I", 3)
    shake, starttls = bytes([SHAKE]), say(flags + option(5))
    list_them = option(3) + option(6, name(b"web/vda") + b"\0\0")
    pull = option(8) + info(7, b"web/vda") + request(STRUCTURED, READ, 1, 0, 4096) + request(STRUCTURED, BLOCK_STATUS, 2, 0, 4096)
    disc = request(STRUCTURED, DISC, 3, 0, 0)
    for label, first in ("psk", 0), ("x509", X509):
        for label2, version in ("", 0), ("_old", OLD), ("_new", NEW):
            yield f"good_{label}{label2}", bytes([first | REQUIRED | BEGUN | version]) + shake + say(list_them + pull, SEALED) + \
                say(disc, SEALED) + bytes([BYE])
        yield f"wrong_{label}", bytes([first | REQUIRED | WRONG | BEGUN]) + shake + say(list_them, SEALED)
        yield f"rekeys_{label}", bytes([first | BEGUN]) + shake + bytes([REKEY]) + say(pull, SEALED) + bytes([REKEY | 0x80]) + say(disc, SEALED)
        yield f"renegotiates_{label}", bytes([first | BEGUN | OLD]) + shake + bytes([REKEY]) + say(pull, SEALED)
        yield f"alerts_{label}", bytes([first | BEGUN]) + shake + bytes([ALERT | 16 * 8]) + say(pull, SEALED)
        yield f"mangled_{label}", bytes([first | BEGUN | REQUIRED, MANGLE, 40, 255]) + shake + say(pull, SEALED)
        yield f"mangled_later_{label}", bytes([first | BEGUN]) + shake + bytes([MANGLE, 9, 1]) + say(pull, SEALED)
        yield f"cut_{label}", bytes([first | BEGUN | REQUIRED, CUT, 30]) + shake
        yield f"leaves_{label}", bytes([first | BEGUN | REQUIRED, SHAKE | 8, BYE | 0x80])
    yield "clear", bytes([REQUIRED]) + say(flags + list_them + option(5))
    yield "clear_allowed", bytes([0]) + say(flags + list_them + pull)
    yield "by_hand", bytes([REQUIRED]) + starttls + shake + say(list_them, SEALED)
    yield "injected", bytes([REQUIRED]) + say(flags + option(5) + list_them) + shake + say(pull, SEALED)
    yield "garbage", bytes([REQUIRED | BEGUN]) + say(b"\x16\x03\x01\x00\x40" + bytes(64))
    yield "garbage_later", bytes([BEGUN]) + shake + say(b"\x17\x03\x03\x00\x40" + bytes(64))
    yield "long_record", bytes([BEGUN]) + say(b"\x16\x03\x03\xff\xff" + bytes(300))
    yield "twice", bytes([BEGUN]) + shake + say(option(5) + list_them, SEALED)


# -- control: how the client behaves, then what it says (fuzz_control.c) ------------------------------------------------
SILENT, LEAVES, PIECES = 1, 2, 4


def control_seeds():
    def command(execute, **arguments):
        doc = {"execute": execute, "id": 7}
        if arguments:
            doc["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        return json.dumps(doc).encode()

    vm = {"vm": "web"}
    document = {"format": 1, "vm": "web", "checkpoints": [json.loads(note("x", vm="web")), json.loads(note("y", "x", vm="web"))]}
    asks = [command("query-version"), command("query-commands"), command("query-status"), command("query-vms"),
            command("query-sessions"), command("query-jobs"), command("metrics"), command("doctor", **vm)]
    yield "asks", b"\0" + b"".join(asks)
    for situation in range(4):
        yield f"disks_{situation}", bytes([situation << 4]) + b"\n".join([
            command("query-disks", **vm), command("query-checkpoints", **vm), command("query-checkpoints", disk="vda", **vm),
            command("can-increment", name="mon", **vm), command("can-increment", name="off", disk="vda", **vm)])
    yield "create", b"\x10" + command("checkpoint-create", name="new", disk=["vda"], description="words", parent="mon", **vm) + \
        command("checkpoint-create", name="new2", disk="vda", **vm) + command("checkpoint-delete", name="mon", what="itself", **vm)
    yield "adopt", b"\x10" + command("checkpoint-adopt", name="mon", description="d", parent="", created_ms=5, **vm) + \
        command("checkpoint-adopt", **vm) + command("checkpoint-adopt", name="mon", accept=True, **vm)
    yield "invalidate", b"\x10" + command("checkpoint-invalidate", disk="vda", **vm)
    yield "import", b"\0" + command("checkpoint-import", document=document, **vm) + command("checkpoint-export", **vm) + \
        command("checkpoint-delete", name="x", what="with-descendants", **vm)
    yield "rename", b"\0" + command("checkpoint-rename-vm", **{"from": "old", **vm})
    yield "commit", b"\x20" + command("block-commit", disk="vda", top="a", base="b", shallow=True, active=False, delete=True,
                                     force=True, **vm) + command("job-cancel", id="x")
    yield "pieces", b"\x04" + asks[0] + asks[3]
    yield "leaves", b"\x02" + b"".join(asks)
    yield "not_negotiated", b"\x01" + asks[0]
    yield "wrong", b"\0" + b'{"execute": 7}{"exec": "x"}{"execute": "query-vms", "arguments": []}{"execute": "nothing"}' + \
        command("query-disks") + command("query-disks", vm=7) + command("query-disks", x=1, **vm) + command("query-disks", vm="no")
    yield "nowhere", b"\0" + b"".join(command(name, vm="no", **more) for name, more in {
        "query-disks": {"disk": "vda"}, "query-checkpoints": {"disk": "vda"}, "can-increment": {"name": "mon", "disk": "vda"},
        "checkpoint-create": {"name": "new", "disk": ["vda"]}, "checkpoint-delete": {"name": "mon", "what": "itself"},
        "checkpoint-adopt": {"name": "mon"}, "checkpoint-invalidate": {"disk": "vda"}, "checkpoint-export": {},
        "checkpoint-import": {"document": document}, "checkpoint-rename-vm": {"from": "old"}, "doctor": {},
        "block-commit": {"disk": "vda"}, "session-begin": {"disk": ["vda"], "checkpoint": "new"}}.items())
    yield "broken", b"\0" + asks[0] + b"]"


SEEDS = {"nbd": nbd_seeds, "stream": stream_seeds, "agent": agent_seeds, "vhost": vhost_seeds,
         "config": config_seeds, "notes": notes_seeds, "lineage": lineage_seeds, "disks": disks_seeds,
         "upstream": upstream_seeds, "tls": tls_seeds, "control": control_seeds}


def unpack(path):
    with open(path, encoding="ascii") as lines:
        for line in lines:
            data = base64.b64decode(line)
            yield hashlib.sha1(data).hexdigest(), data


def pack(folder, path):
    found = []
    for each in glob.glob(f"{glob.escape(folder)}/*"):
        with open(each, "rb") as file:
            found.append(file.read())
    with open(path, "w", encoding="ascii") as lines:
        lines.writelines(base64.b64encode(data).decode() + "\n" for data in sorted(found, key=lambda d: (len(d), d)))


def main():
    if sys.argv[1] == "--pack":
        pack(*sys.argv[2:])
        return
    here = os.path.dirname(os.path.abspath(__file__))
    for target, seeds in SEEDS.items():
        folder, kept = os.path.join(sys.argv[1], target), f"{here}/corpus/{target}.base64"
        os.makedirs(folder, exist_ok=True)
        for label, data in [*seeds(), *(unpack(kept) if os.path.exists(kept) else [])]:
            with open(os.path.join(folder, label), "wb") as file:
                file.write(data)


if __name__ == "__main__":
    main()
