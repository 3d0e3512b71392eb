#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every test that SECURITY.md names is there, under that name, and each row of its table but the last resort names one."""
import glob
import os
import re
import sys

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FILES = {'unit': ('test_{}.c',), 'qemu': ('test_{}.py',), 'scripts': ('test_{}.sh', 'test_{}.py'), 'fuzz': ('{}.c',)}
NAME = re.compile(r'`(unit|qemu|scripts|fuzz)/(\w+)(?:: (\w+))?`')
MENTIONS_AT_LEAST = 25  # the table is there, and is understood
PATTERNS = {'.c': r'(?:cmocka_unit_test\w*|TEST)\(\s*{}\b', '.py': r'\n    def {}\(self', '.sh': r'\b{}\b'}


def problem(kind, name, test):
    found = [path for form in FILES[kind] for path in glob.glob(f'{TOP}/tests/{kind}/{form.format(name)}')]
    if not found:
        return 'there is no such file'
    with open(found[0], encoding='utf-8') as f:
        if test and not re.search(PATTERNS[os.path.splitext(found[0])[1]].format(test), f.read()):
            return f'no such test in {os.path.relpath(found[0], TOP)}'
    return None


def main():
    with open(f'{TOP}/SECURITY.md', encoding='utf-8') as f:
        text = f.read()
    named = NAME.findall(text)
    bad = [f'{kind}/{name}{": " + test if test else ""}: {why}'
           for kind, name, test in named if (why := problem(kind, name, test))]
    for row in re.findall(r'^\| [^-\n].*\|$|^\|  ?\|.*\|$', text, re.M)[1:]:
        cells = [c.strip() for c in row.strip('|').split('|')]
        if not NAME.search(cells[-1]) and not cells[-2].startswith('nothing'):
            bad.append(f'no test for: {row[:80]}')
    if len(named) < MENTIONS_AT_LEAST:
        bad.append(f'only {len(named)} tests are named')
    print(*bad, sep='\n', file=sys.stderr)
    return bool(bad)


if __name__ == '__main__':
    sys.exit(main())
