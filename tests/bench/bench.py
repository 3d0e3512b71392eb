# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the parts of tests/bench/run share: interleaved rounds, rows with median and range, CPU of processes, clients.

A part is a file with main(argv) that takes --rounds N, --quick (tiny sizes, one round: only that it works) and
--json FILE. What it finds are rows:
  {"name": "CASE: METRIC", "unit": …, "a": median, "b": median, "ratio": median of b/a of each round, "low":, "high":}
and "better": "more" or "less", which of both is good. a is what qpull is compared with. A row with "missing" says in
words why it has no numbers; one with a = None is a number without a counterpart, and low and high are b's own."""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '../qemu'))

MIB, GIB = 1 << 20, 1 << 30
CPUCLOCK_SCHED = 2  # linux/posix-timers.h: a process's clock of all its threads, those that ended included


def parser(what, rounds):
    p = argparse.ArgumentParser(description=what)
    p.add_argument('--rounds', type=int)
    p.add_argument('--quick', action='store_true', help='tiny sizes, one round: shows only that it works')
    p.add_argument('--json', metavar='FILE')
    p.set_defaults(default_rounds=rounds)
    return p


def parse(p, argv):
    args = p.parse_args(argv)
    args.rounds = args.rounds or (1 if args.quick else args.default_rounds)
    return args


def work_folder(memory=False):
    """A temporary folder: on a disk's file system, or in memory."""
    base = '/dev/shm' if memory and os.path.isdir('/dev/shm') else '/var/tmp'
    return tempfile.TemporaryDirectory(prefix='qpull-bench-', dir=base)


# -- processes ---------------------------------------------------------------------------------------------------------

def cpu_clock(pid):
    """CPU seconds, user and system, that the process has used so far; exact to the nanosecond, unlike /proc."""
    return time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)


def tree(pid):
    """The process and all below it."""
    found = [pid]
    for parent in found:
        try:
            for task in os.listdir(f'/proc/{parent}/task'):
                with open(f'/proc/{parent}/task/{task}/children', encoding='ascii') as f:
                    found += map(int, f.read().split())
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def tree_cpu(pid):
    return sum(cpu_clock(p) for p in tree(pid))


def memory(pid):
    """{'Rss': bytes, 'Pss': …, 'Private_Dirty': …} of a process."""
    found = {}
    with open(f'/proc/{pid}/smaps_rollup', encoding='ascii') as f:
        for line in f.readlines()[1:]:
            words = line.split()
            found[words[0].rstrip(':')] = int(words[1]) * 1024
    return found


class Finished:
    """What a client took: seconds, and CPU seconds."""

    def __init__(self, seconds, cpu):
        self.seconds, self.cpu = seconds, cpu


def run_clients(commands, timeout=900):
    """Programs side by side to their end; one Finished for all."""
    began, words = time.monotonic(), tempfile.TemporaryFile()
    running = [subprocess.Popen(c, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=words) for c in commands]
    killer = threading.Timer(timeout, lambda: [p.send_signal(9) for p in running])
    killer.start()
    cpu, failed = 0, None
    for p, command in zip(running, commands):
        _, status, usage = os.wait4(p.pid, 0)
        p.returncode = os.waitstatus_to_exitcode(status)
        cpu += usage.ru_utime + usage.ru_stime
        if p.returncode:
            failed = failed or f'{" ".join(command)}: ended with {p.returncode}'
    took = time.monotonic() - began
    killer.cancel()
    if failed:
        words.seek(0)
        raise AssertionError(f'{failed}\n{words.read().decode(errors="replace")[-2000:]}')
    return Finished(took, cpu)


# -- rounds and rows ---------------------------------------------------------------------------------------------------

def rounds(variants, count, warm_up=True, patience=math.inf):
    """Runs the variants {name: function} in turn, A B A B …, count times each: {name: [what it returned]}. A first round
    that takes longer than patience (seconds) is the only one."""
    if warm_up:
        began = time.monotonic()
        found = {name: [f()] for name, f in variants.items()}
        if time.monotonic() - began > patience:
            return found
    found = {name: [] for name in variants}
    for _ in range(count):
        for name, f in variants.items():
            found[name].append(f())
    return found


def row(name, unit, a, b, better='more', **more):
    """One row of two lists of numbers, a[i] and b[i] of the same round."""
    ratios = [y / x for x, y in zip(a, b)] if a and all(x > 0 for x in a) else []
    spread = ratios or b
    return {'name': name, 'unit': unit, 'better': better, 'rounds': len(b),
            'a': statistics.median(a) if a else None, 'b': statistics.median(b),
            'ratio': statistics.median(ratios) if ratios else None,
            'low': min(spread), 'high': max(spread), **more}


def missing(name, why):
    return {'name': name, 'missing': why}


def verdict(r):
    """A claim only where no round says otherwise, and there is another one."""
    if r.get('ratio') is None:
        return ''
    if r.get('rounds') == 1 or r['low'] <= 1 <= r['high']:
        return 'no claim'
    return 'better' if (r['low'] > 1) == (r.get('better', 'more') == 'more') else 'worse'


def number(x):
    if x is None:
        return '-'
    return f'{x:.0f}' if abs(x) >= 100 else f'{x:.1f}' if abs(x) >= 10 else f'{x:.2f}' if abs(x) >= 1 else f'{x:.3f}'


def print_rows(rows):
    width = max([len(r['name']) for r in rows], default=0)
    for r in rows:
        if 'missing' in r:
            print(f'{r["name"]:{width}}  {r["missing"]}')
        elif r.get('ratio') is None:
            print(f'{r["name"]:{width}}  {number(r["a"]):>8} {number(r["b"]):>8} {r["unit"]:8}        '
                  f'({number(r["low"])}-{number(r["high"])})')
        else:
            print(f'{r["name"]:{width}}  {number(r["a"]):>8} {number(r["b"]):>8} {r["unit"]:8} '
                  f'{r["ratio"]:6.2f} ({r["low"]:.2f}-{r["high"]:.2f}) {verdict(r)}')
    sys.stdout.flush()


def finish(args, rows):
    if args.json:
        with open(args.json, 'w', encoding='utf-8') as f:
            json.dump(rows, f, indent=1)
    else:
        print_rows(rows)
