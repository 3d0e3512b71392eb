# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads Prometheus' text format (0.0.4), and takes nothing that the format does not allow."""
import re

NAME = r'[a-zA-Z_:][a-zA-Z0-9_:]*'
SAMPLE = re.compile(rf'({NAME})(?:\{{(.*)\}})? ([-+0-9.eE]+|NaN|[-+]?Inf)\n')
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(,|$)')
TYPES = ('counter', 'gauge', 'summary', 'histogram', 'untyped')
UNITS = ('seconds', 'bytes', 'ratio')


def labels(text):
    found, at = [], 0
    while at < len(text):
        m = LABEL.match(text, at)
        if not m:
            raise ValueError(f'labels {text!r}')
        value = re.sub(r'\\(.)', lambda e: '\n' if e[1] == 'n' else e[1], m[2])
        found.append((m[1], value))
        at = m.end()
    if len({k for k, _ in found}) < len(found):
        raise ValueError(f'a label twice: {text!r}')
    return tuple(sorted(found))


def parse(text, types=None):
    """{(name, (label, value)…): number}; types, if given, is filled: {name: type}."""
    numbers, helped, typed, ended, current = {}, set(), {} if types is None else types, set(), None
    if not text.endswith('\n'):
        raise ValueError('the last line does not end')
    for line in text.splitlines(keepends=True):
        words = line.rstrip('\n').split(' ', 3)
        if line.startswith('# HELP '):
            if words[2] in helped or not words[3]:
                raise ValueError(line)
            helped.add(words[2])
        elif line.startswith('# TYPE '):
            if words[2] in typed or words[3] not in TYPES or words[2] not in helped:
                raise ValueError(line)
            typed[words[2]] = words[3]
            ended.add(current)
            current = words[2]
            if current in ended:
                raise ValueError(f'{current} is not in one piece')
        else:
            m = SAMPLE.fullmatch(line)
            if not m:
                raise ValueError(f'not a sample: {line!r}')
            family = re.sub('_(sum|count)$', '', m[1]) if typed.get(current) == 'summary' else m[1]
            if family != current:
                raise ValueError(f'{m[1]} stands under {current}')
            key = (m[1], *labels(m[2] or ''))
            if key in numbers:
                raise ValueError(f'{key} twice')
            numbers[key] = float(m[3])
            if typed[current] == 'counter' and (not m[1].endswith('_total') or numbers[key] < 0):
                raise ValueError(f'a counter: {line!r}')
            if typed[current] != 'counter' and m[1].endswith('_total'):
                raise ValueError(f'no counter: {line!r}')
    return numbers
