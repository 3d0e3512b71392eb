#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 300
"""The benchmarks work: every row is there and has numbers, or says why not. What the numbers are is nobody's concern here."""
import json
import math
import subprocess

import harness

ROWS = {
    'pull': [f'{transport} {cache} {client}: {metric}' for transport in ('unix', 'tcp') for cache in ('cached', 'O_DIRECT')
             for client in ('nbdcopy', 'nbdcopy tuned', 'qemu-img convert', 'one at a time')
             for metric in ('throughput', 'CPU of QEMU', 'CPU of all')],
    'one': [f'{transport} {kib} KiB: throughput' for transport in ('unix', 'tcp') for kib in (64, 128, 2048)],
    'maps': ['1 M extents, nbdinfo --map against QEMU: time', '1 M extents, nbdinfo --map against a bare socket: time',
             '1 M extents, memory of the session: memory'],
    'freeze': ['1 disk: GO to first byte', '1 disk: pause'],
    'guest': [f'{scene} against {other}: {metric}' for scene, other in (
        ('idle session', 'none'), ('idle session', 'libvirt\'s'), ('full-speed pull', 'libvirt\'s'),
        ('stalled client', 'libvirt\'s'), ('stalled client', 'idle session')) for metric in ('p50', 'p99', 'writes')],
    'plugin': [f'against {other}: {metric}' for other in ('nbdkit nbd', 'qpulld') for metric in ('throughput', 'CPU of all')],
    'many': [f'{vms}: {metric}' for vms in ('1 VM', '3 VMs') for metric in ('throughput', 'CPU of QEMU')],
}


class Bench(harness.Case):
    def test_a_quick_run_has_all_rows_with_finite_ratios(self):
        path = f'{self.folder}/rows.json'
        done = subprocess.run([f'{harness.TOP}/tests/bench/run', '--quick', '--json', path, *ROWS], capture_output=True,
                              text=True, timeout=280, check=False)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        with open(path, encoding='utf-8') as f:
            parts = json.load(f)['parts']
        for part, names in ROWS.items():
            rows = {r['name']: r for r in parts[part]['rows']}
            self.assertEqual([n for n in names if n not in rows], [], f'missing in {part}')
            for r in rows.values():
                self.assertTrue(r.get('missing') or math.isfinite(r['b']), r)
                self.assertTrue(r.get('missing') or r['a'] is None or math.isfinite(r['ratio']), r)

    def test_the_page_has_the_tables_of_its_json(self):
        done = harness.run([f'{harness.TOP}/tests/bench/tables', '--check'], check=False)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)


if __name__ == '__main__':
    harness.main()
