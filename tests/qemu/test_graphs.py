#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 1800
"""One table of what a disk's layers can look like, and what must come of each: the reason code, and where that is NONE
the exact map of what changed. Each row is a disk; a group of rows is one QEMU and one session."""
import sys

import harness
import nbdpull
from graphs import CHECKPOINT, SECTOR, SIZE, Builder, Layer, Machine, Row, check_writes, layers
from harness import MIB
from truth import covered, settle

LARGE = 8 * MIB + 3 * SECTOR
GROWN, SHRUNK = SIZE + MIB + SECTOR, SIZE - MIB + SECTOR
CONTEXT = nbdpull.dirty_context(CHECKPOINT)
MANY = 64  # layers above the record, of which the daemon can tell what they have allocated


def resize_live(size):
    def act(row, vm):
        vm.look('block_resize', {'node-name': row.nodes[-1], 'size': size})
        row.oracle.resize(size)
    return act


def resize_off(size):
    def act(row):
        harness.run(['qemu-img', 'resize', '-q', '--shrink', '-f', 'qcow2', row.paths[-1], str(size)])
        row.oracle.resize(size)
    return act


def graph(records, expect='NONE'):
    """The bottom first: P present, L begun later than its layer, - absent, X inconsistent, D not recording."""
    return Row(f'layers {records}', layers(records), expect)


# The deepest record's state decides; what is above it is merged or stood in for, what is below it does not matter.
PRESENT_OR_ABSENT = [
    graph('-', 'NO_SUCH_CHECKPOINT'), graph('P'),
    graph('--', 'NO_SUCH_CHECKPOINT'), graph('P-'), graph('-P'), graph('PP'),
    graph('---', 'NO_SUCH_CHECKPOINT'), graph('P--'), graph('-P-'), graph('--P'), graph('PP-'), graph('P-P'),
    graph('-PP'), graph('PPP'),
    graph('PL'), graph('PL-'), graph('P-L'), graph('-PL'), graph('PLP'), graph('PLL'),
]
BROKEN = [
    graph('X', 'INCONSISTENT'), graph('D', 'BUSY'),
    graph('XP', 'INCONSISTENT'), graph('X-', 'INCONSISTENT'), graph('PX'), graph('-X', 'INCONSISTENT'),
    graph('DP', 'BUSY'), graph('D-', 'BUSY'), graph('PD'), graph('-D', 'BUSY'),
    graph('XX', 'INCONSISTENT'), graph('XD', 'INCONSISTENT'), graph('DX', 'BUSY'),
    graph('PXP'), graph('XPP', 'INCONSISTENT'), graph('PPX'), graph('P-X'), graph('PX-'), graph('-XP', 'INCONSISTENT'),
    graph('PDP'), graph('DPP', 'BUSY'), graph('PXD'), graph('-DP', 'BUSY'), graph('--X', 'INCONSISTENT'),
]
DEEP = [
    graph('PPPP'), graph('P---'), graph('-P-P'), graph('P-XP'), graph('-PXD'), graph('XPPP', 'INCONSISTENT'),
    graph('--P-'), graph('PL-X'), graph('----', 'NO_SUCH_CHECKPOINT'), graph('D-PP', 'BUSY'),
    graph('PPPPP'), graph('P----'), graph('----P'), graph('-P---'), graph('P-P-P'), graph('PXDL-'), graph('-PLXD'),
    graph('X---P', 'INCONSISTENT'), graph('--X-P', 'INCONSISTENT'), graph('--D-P', 'BUSY'), graph('PXXXX'),
    graph('-----', 'NO_SUCH_CHECKPOINT'),
    Row('as many layers as can be told apart', layers('P' + '-' * MANY)),
    Row('one more', layers('P' + '-' * (MANY + 1)), 'GAP'),
]


def mixed(words, records, **each):
    """Layers whose properties differ: each is a tuple per property, the bottom first."""
    return Row(words, [Layer(r, **{k: v[i] for k, v in each.items()}) for i, r in enumerate(records)])


GRANULARITIES = [
    *[Row(f'one layer, granularity {g}', [Layer('P', granularity=g, size=LARGE)])
      for g in (512, 1024, 4096, 32768, 131072, MIB)],
    mixed('finer above', 'PP', granularity=(65536, 512)),
    mixed('coarser above', 'PP', granularity=(512, 65536)),
    mixed('from 512 up to 1 MiB', 'PPPPP', granularity=(512, 4096, 65536, 262144, MIB), size=(LARGE,) * 5),
    mixed('from 1 MiB down to 512', 'PPPPP', granularity=(MIB, 262144, 65536, 4096, 512), size=(LARGE,) * 5),
    mixed('the coarsest is inconsistent', 'PXP', granularity=(512, 262144, 4096), size=(LARGE,) * 3),
    mixed('fine record, layer without one', 'P-P', granularity=(512, 512, 512)),
]
CLUSTERS = [
    *[Row(f'one layer, clusters of {c}', [Layer('P', granularity=4096, cluster=c)]) for c in (512, 4096, 2 * MIB)],
    *[mixed(f'layer without a record, clusters of {c}', 'P-', cluster=(65536, c), granularity=(512, 512),
            size=(LARGE,) * 2) for c in (512, 1024, 4096, 16384, 262144, 2 * MIB)],
    mixed('small, large, small clusters', 'P--', cluster=(512, 262144, 512), granularity=(512,) * 3),
    mixed('large, small, large clusters', 'P-P', cluster=(262144, 512, 262144), granularity=(512,) * 3),
    mixed('five cluster sizes', 'P-L-X', cluster=(65536, 512, 4096, 262144, 1024), granularity=(4096,) * 5),
    mixed('subclusters below', 'PP', extended=(True, False)),
    mixed('subclusters above', 'P-', extended=(False, True), granularity=(512, 512)),
    mixed('subclusters of 512 above', 'P-', extended=(False, True), cluster=(65536, 16384), granularity=(512, 512)),
    mixed('subclusters of 4096 in all', 'P--', extended=(True,) * 3, cluster=(131072,) * 3, granularity=(512,) * 3),
    mixed('subclusters between', 'P-X', extended=(False, True, False), granularity=(512,) * 3),
    Row('one layer, compressed clusters', [Layer('P', compressed=True)]),
    mixed('compressed clusters above', 'P-', compressed=(False, True), granularity=(512, 512)),
    mixed('compressed clusters below', 'P-', compressed=(True, False)),
    mixed('compressed clusters in all', 'P-P', compressed=(True,) * 3, cluster=(4096, 65536, 16384)),
]
SIZES = [
    *[Row(f'a disk of {s} bytes', [Layer('P', granularity=65536, size=s), Layer('-', size=s)])
      for s in (65536, 65536 + SECTOR, MIB - SECTOR, 3 * MIB)],
    *[Row(f'a disk of {s} bytes, granularity 1 MiB', [Layer('P', granularity=MIB, size=s)])
      for s in (65536 + SECTOR, 2 * MIB + SECTOR)],
    Row('grown while it runs', layers('P'), 'RESIZED', live=resize_live(GROWN)),
    Row('shrunk while it runs', layers('P'), 'RESIZED', live=resize_live(SHRUNK)),
    Row('grown while it runs, above the record', layers('P-'), 'RESIZED', live=resize_live(GROWN)),
    Row('grown while off, nobody remembers', layers('P'), between=resize_off(GROWN)),
    Row('shrunk while off, nobody remembers', layers('P'), between=resize_off(SHRUNK)),
    mixed('a template shorter than the disk', '-P', size=(SHRUNK, SIZE)),
    mixed('a template longer than the disk', '-P', size=(GROWN, SIZE)),
    mixed('a template shorter than the disk, a layer without a record', '-P-', size=(SHRUNK, SIZE, SIZE)),
    Row('the layer above is longer', [Layer('P'), Layer('-', size=GROWN)], 'RESIZED'),
    Row('the layer above is longer and has a record', [Layer('P'), Layer('P', size=GROWN)], 'RESIZED'),
    Row('the layer above is shorter', [Layer('P'), Layer('-', size=SHRUNK)], 'RESIZED'),
    Row('the layer above is shorter and has a record', [Layer('P'), Layer('P', size=SHRUNK)], 'RESIZED'),
    Row('inconsistent, the layer above is longer', [Layer('X'), Layer('P', size=GROWN)], 'INCONSISTENT'),
    mixed('a shorter layer between', 'P-P', size=(SIZE, SHRUNK, SIZE)),
    mixed('a shorter layer between, with a record', 'PPP', size=(SIZE, SHRUNK, SIZE)),
    mixed('a shorter layer between, none has a record', 'P--', size=(SIZE, SHRUNK, SIZE)),
    mixed('a longer layer between', 'P-P', size=(SIZE, GROWN, SIZE)),
    mixed('a longer layer between, with a record', 'PPP', size=(SIZE, GROWN, SIZE)),
    mixed('a longer and a shorter layer between', 'PPP-P', size=(SIZE, GROWN, SHRUNK, GROWN, SIZE)),
]
FORMATS = [
    Row('raw', [Layer('-', fmt='raw')], 'NOT_TRACKED'),
    Row('qcow2 of version 2', [Layer('-', options='compat=0.10')], 'NOT_TRACKED'),
    Row('raw below', [Layer('-', fmt='raw'), Layer('P')]),
    Row('raw below, a layer without a record', [Layer('-', fmt='raw'), Layer('P'), Layer('-')]),
    Row('raw below, no record', [Layer('-', fmt='raw'), Layer('-')], 'NO_SUCH_CHECKPOINT'),
    Row('qcow2 of version 2 below', [Layer('-', options='compat=0.10'), Layer('P')]),
    Row('qcow2 of version 2 above', [Layer('P'), Layer('-', options='compat=0.10')]),
    Row('qcow2 of version 2 between', [Layer('P'), Layer('-', options='compat=0.10'), Layer('P')]),
    Row('a data file', [Layer('P', data_file='cooked')]),
    Row('a raw data file', [Layer('P', data_file='raw')]),
    Row('data files below', [Layer('P', data_file='cooked'), Layer('-')]),
    Row('a raw data file below', [Layer('P', data_file='raw'), Layer('-')]),
    Row('a data file above', [Layer('P'), Layer('-', data_file='cooked')]),
    Row('data files everywhere', [Layer('P', data_file='raw'), Layer('P', data_file='cooked'),
                                  Layer('-', data_file='cooked')]),
    Row('a data file, inconsistent', [Layer('X', data_file='cooked')], 'INCONSISTENT'),
    Row('lazy refcounts', layers('P-', options='lazy_refcounts=on')),
    Row('refcounts of one bit', layers('PP', options='refcount_bits=1')),
    Row('preallocated below', [Layer('P', options='preallocation=metadata'), Layer('-')]),
]
FILTERS = [
    Row('throttle above', [Layer('P', above='throttle')]),
    Row('throttle above a layer without a record', [Layer('P'), Layer('-', above='throttle')]),
    Row('throttle above three layers', [Layer('P'), Layer('-'), Layer('-', above='throttle')]),
    Row('throttle above, inconsistent', [Layer('X', above='throttle')], 'INCONSISTENT'),
    Row('throttle above raw', [Layer('-', fmt='raw', above='throttle')], 'NOT_TRACKED'),
    Row('copy-on-read above', [Layer('P', above='copy-on-read')]),
    Row('copy-on-read above a layer without a record', [Layer('P'), Layer('-', above='copy-on-read')],
        reads_allocate=True),
    Row('throttle below', [Layer('P', above='throttle'), Layer('-')]),
    Row('throttle between records', [Layer('P'), Layer('P', above='throttle'), Layer('P')]),
    Row('throttle between, the layer below it has none', [Layer('P'), Layer('-', above='throttle'), Layer('-')]),
]

FILTERS_BETWEEN = [
    Row('throttle between, two layers without a record below it',
        [Layer('P'), Layer('-'), Layer('-', above='throttle'), Layer('-')]),
]

GROUPS = (PRESENT_OR_ABSENT, BROKEN, DEEP, GRANULARITIES, CLUSTERS, SIZES, FORMATS, FILTERS, FILTERS_BETWEEN)


class Graphs(harness.Case):
    @classmethod
    def setUpClass(cls):
        pass  # no guest

    def build(self, rows):
        """The images, with all that was ever written to them but the last."""
        builder = Builder(self.folder)
        self.things.append(builder)
        builder.start()
        for i, row in enumerate(rows):
            row.prepare(self.folder, i)
            row.build(builder.look)
        builder.quit()
        check_writes(builder)
        for row in rows:
            row.spoil()

    def run_rows(self, rows):
        self.build(rows)
        vm = Machine(self.folder, rows)
        self.things.append(vm)
        vm.start()
        before = vm.state()
        daemon = self.qpulld(vm, linger=0)
        daemon.wait_idle()
        self.verdicts(daemon)  # the daemon has seen all disks
        for row in rows:
            row.work(lambda words, row=row: vm.io(row, words))
            if row.live:
                row.live(row, vm)
                before = None
        self.check_verdicts(daemon, rows)
        for late in (False, True):
            self.check_session(daemon, rows, late)
            settle(vm)
            daemon.wait_idle()
        if before:
            self.assertNothingLeft(vm, daemon, before)
        vm.quit()
        check_writes(vm)
        daemon.stop()
        unread = [sum(not s for s in row.oracle.expected()) / (len(row.oracle.image) // SECTOR)
                  for row in rows if row.usable]
        print(f'{len(rows)} rows, {len(unread)} usable; {100 * sum(unread) / len(unread):.0f} % not to be read',
              file=sys.stderr)

    def verdicts(self, daemon):
        return {v['disk']: v for v in daemon.ask('can-increment', {'vm': 'vm', 'name': CHECKPOINT})}

    def check_verdicts(self, daemon, rows):
        verdicts = self.verdicts(daemon)
        for row in rows:
            with self.subTest(row.words):
                verdict = verdicts[row.name]
                self.assertEqual((verdict['reason'], verdict['verdict']),
                                 (row.expect, 'incremental' if row.usable else 'full'))
                self.assertTrue(verdict['text'])
                if row.usable:
                    self.assertEqual(bool(verdict['dirty-bytes']), bool(row.oracle.dirty_bytes()))
                if row.usable and not any(layer.record == 'X' for layer in row.layers):
                    self.assertEqual(verdict['dirty-bytes'], row.oracle.dirty_bytes())
                offered = nbdpull.list_contexts(daemon.uri(f'vm/{row.name}'), ['qemu:dirty-bitmap:'])
                self.assertEqual(CONTEXT in offered, row.usable)

    def check_session(self, daemon, rows, late):
        """All rows in one session. late: the maps are asked for when it stands, not with its first client."""
        first = nbdpull.connect(daemon.uri(f'vm/{rows[0].name}'), [] if late else [CONTEXT])
        for row in rows:
            with self.subTest(row.words, late=late):
                self.check_row(daemon, row, late)
        first.shutdown()

    def check_row(self, daemon, row, late):
        h = nbdpull.connect(daemon.uri(f'vm/{row.name}'), [CONTEXT])
        try:
            self.assertEqual(h.can_meta_context(CONTEXT), row.usable)
            if row.usable:
                self.check_increment(h, row, exact=not row.reads_allocate)
            self.assertSame(nbdpull.read_all(h), row.oracle.image, 'the full')
        finally:
            h.shutdown()

    def check_increment(self, h, row, exact):
        extents = nbdpull.read_map(h, CONTEXT)
        found, expected = covered(extents), row.oracle.expected()
        missed = [i for i, (f, e) in enumerate(zip(found, expected)) if e and not f]
        beyond = [i for i, (f, e) in enumerate(zip(found, expected)) if f and not e]
        if missed:
            self.fail(f'{len(missed)} sectors should be in the map, {missed[0]} to {missed[-1]}')
        if exact and beyond:
            self.fail(f'{len(beyond)} sectors are in the map and should not be, {beyond[0]} to {beyond[-1]}')
        self.assertEqual(sum(length for _, length, _ in extents), len(row.oracle.image))
        restored = nbdpull.read_ranges(h, nbdpull.ranges_with(extents), bytearray(row.oracle.client_image()))
        self.assertSame(restored, row.oracle.image, 'restored over the checkpoint\'s image')

    def test_the_table_names_each_row_once(self):
        words = [row.words for rows in GROUPS for row in rows]
        self.assertEqual(len(words), len(set(words)))

    def test_records_present_and_absent_in_up_to_three_layers(self):
        self.run_rows(PRESENT_OR_ABSENT)

    def test_records_that_are_inconsistent_or_do_not_record(self):
        self.run_rows(BROKEN)

    def test_records_in_four_and_more_layers(self):
        self.run_rows(DEEP)

    def test_a_filter_between_layers_without_a_record(self):
        self.run_rows(FILTERS_BETWEEN)

    def test_granularities(self):
        self.run_rows(GRANULARITIES)

    def test_clusters_subclusters_and_compressed_ones(self):
        self.run_rows(CLUSTERS)

    def test_sizes_that_are_odd_and_sizes_that_changed(self):
        self.run_rows(SIZES)

    def test_formats_and_data_files(self):
        self.run_rows(FORMATS)

    def test_filters_of_others(self):
        self.run_rows(FILTERS)


if __name__ == '__main__':
    harness.main()
