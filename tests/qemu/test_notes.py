#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is noted about checkpoints: written when one is made, gone when it is deleted, whole whatever dies, and never in
the way of the records, which are the truth."""
import json
import os
import time

import harness
import nbdpull
from harness import MIB, Disk


class Notes(harness.Case):
    def setUp(self):
        self.vm = self.bare(Disk('vda', 16 * MIB), Disk('vdb', 16 * MIB), Disk('vdr', MIB, fmt='raw'))

    def list(self, daemon):
        """{name: (parent, noted, current, {disk: reason})}, in the daemon's order."""
        found = {}
        for c in daemon.ask('query-checkpoints', {'vm': 'vm'}):
            entry = found.setdefault(c['name'], (c['parent'], c['noted'], c['current'], {}))
            self.assertEqual(entry[:3], (c['parent'], c['noted'], c['current']))
            entry[3][c['disk']] = c['reason']
        return found

    def create(self, daemon, name, **more):
        return daemon.ask('checkpoint-create', {'vm': 'vm', 'name': name, **more})

    def delete(self, daemon, name, **more):
        return daemon.ask('checkpoint-delete', {'vm': 'vm', 'name': name, **more})

    def files(self, daemon):
        folder = f'{daemon.state}/checkpoints/vm'
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []

    def pull(self, daemon, name, *disks):
        handles = [nbdpull.connect(daemon.uri(f'vm/{d}@{name}')) for d in disks]
        for h in handles:
            h.shutdown()
        daemon.wait_idle()

    def test_each_checkpoint_builds_on_the_one_before_and_survives_a_restart_of_the_daemon(self):
        daemon = self.qpulld(self.vm, linger=0)
        self.assertEqual(self.create(daemon, 'mon', description='before the upgrade'), {'records': 2})
        self.pull(daemon, 'tue', 'vda')
        self.create(daemon, 'wed', disk=['vdb'])
        self.create(daemon, 'side', parent='mon', disk='vda')
        expected = {'mon': (None, True, False, {'vda': 'NONE', 'vdb': 'NONE'}),
                    'tue': ('mon', True, False, {'vda': 'NONE'}),
                    'wed': ('tue', True, False, {'vdb': 'NONE'}),
                    'side': ('mon', True, True, {'vda': 'NONE'})}
        self.assertEqual(self.list(daemon), expected)
        self.assertEqual(list(self.list(daemon)), list(expected))
        self.assertEqual(self.files(daemon), ['mon.json', 'side.json', 'tue.json', 'wed.json'])
        daemon.kill()
        daemon.start()
        daemon.wait_idle()
        self.assertEqual(self.list(daemon), expected)
        shown = daemon.qpull('checkpoint', 'show', 'vm', 'mon').stdout
        self.assertRegex(shown, r'(?s)before the upgrade.*parent: +-.*children: +tue, side')
        self.assertRegex(daemon.qpull('checkpoint', 'show', 'vm').stdout, r'side \(the current one\)')
        self.assertEqual(daemon.qpull('checkpoint', 'list', 'vm', '--tree').stdout.splitlines(),
                         ['mon  vda usable, vdb usable', '  tue  vda usable', '    wed  vdb usable',
                          '  side *  vda usable'])

        def names(*args):
            return [c['name'] for c in daemon.json('checkpoint', 'list', 'vm', *args)]
        self.assertEqual(names('--roots'), ['mon', 'mon'])
        self.assertEqual(names('--leaves'), ['wed', 'side'])
        self.assertEqual(names('mon', '--children'), ['tue', 'side'])
        self.assertEqual(names('mon', '--descendants'), ['tue', 'wed', 'side'])
        self.assertEqual(names('tue'), ['tue'])
        self.assertEqual(names('--disk', 'vdb'), ['mon', 'wed'])
        self.assertEqual(names('--disk', 'vdb', '--disk', 'vda', '--leaves'), ['wed', 'side'])
        self.assertEqual(daemon.qpull('checkpoint', 'list', 'vm', 'never', check=False).returncode, 1)
        self.assertEqual(daemon.qpull('checkpoint', 'list', 'vm', '--children', check=False).returncode, 2)

    def test_deleting_takes_what_is_asked_for_and_children_move_up(self):
        daemon = self.qpulld(self.vm, linger=0)
        for name in 'abcdef':
            self.create(daemon, name)
        self.create(daemon, 'b2', parent='b')
        self.delete(daemon, 'c')
        self.assertEqual({n: e[0] for n, e in self.list(daemon).items()},
                         {'a': None, 'b': 'a', 'd': 'b', 'e': 'd', 'f': 'e', 'b2': 'b'})
        daemon.qpull('checkpoint', 'delete', 'vm', 'd', '--descendants')
        self.assertEqual(list(self.list(daemon)), ['a', 'b', 'd', 'b2'])
        daemon.qpull('checkpoint', 'delete', 'vm', 'a', '--disk', 'vdb')
        self.assertEqual(self.list(daemon)['a'][3], {'vda': 'NONE'})
        with open(f'{daemon.state}/checkpoints/vm/a.json') as f:
            self.assertEqual([d['name'] for d in json.load(f)['disks']], ['vda'])
        daemon.qpull('checkpoint', 'delete', 'vm', 'd', '--note-only')
        self.assertEqual(self.list(daemon)['d'], (None, False, False, {'vda': 'NONE', 'vdb': 'NONE'}))
        daemon.qpull('checkpoint', 'delete', 'vm', 'b', '--with-descendants')
        self.assertEqual(list(self.list(daemon)), ['a', 'd'])
        self.assertEqual(self.files(daemon), ['a.json'])
        self.assertEqual({b for _, b in harness.bitmaps(self.vm.look)}, {'a', 'd'})
        with self.assertRaisesRegex(harness.QmpError, 'has no note'):
            self.delete(daemon, 'd', what='descendants')
        with self.assertRaisesRegex(harness.QmpError, '"what" is'):
            self.delete(daemon, 'd', what='all')

    def test_a_note_without_its_record_is_broken_and_can_be_deleted_and_its_name_used_again(self):
        daemon = self.qpulld(self.vm, linger=0)
        self.create(daemon, 'mon')
        self.create(daemon, 'tue')
        self.vm.look('block-dirty-bitmap-remove', {'node': 'node-vda', 'name': 'mon'})
        for disk in ('vda', 'vdb'):
            self.vm.look('block-dirty-bitmap-remove', {'node': f'node-{disk}', 'name': 'tue'})
        self.assertEqual(self.list(daemon), {'mon': (None, True, False, {'vdb': 'NONE', 'vda': 'NO_SUCH_CHECKPOINT'}),
                                             'tue': ('mon', True, True, {'vda': 'NO_SUCH_CHECKPOINT',
                                                                         'vdb': 'NO_SUCH_CHECKPOINT'})})
        self.assertRegex(daemon.qpull('checkpoint', 'list', 'vm').stdout, 'NO_SUCH_CHECKPOINT: its record is not in')
        self.create(daemon, 'tue')
        self.assertEqual(self.list(daemon)['tue'][3], {'vda': 'NONE', 'vdb': 'NONE'})
        with self.assertRaisesRegex(harness.QmpError, "exists already on disk 'vdb'"):
            self.create(daemon, 'mon', disk=['vda'])
        self.assertEqual(self.delete(daemon, 'mon'), {'records': 1})
        self.assertEqual(list(self.list(daemon)), ['tue'])

    def test_records_without_notes_are_adopted(self):
        for name in ('theirs', 'also'):
            self.vm.look('block-dirty-bitmap-add', {'node': 'node-vda', 'name': name, 'persistent': True})
        self.vm.look('block-dirty-bitmap-add', {'node': 'node-vdb', 'name': 'stopped', 'persistent': True,
                                                'disabled': True})
        daemon = self.qpulld(self.vm, linger=0)
        self.assertEqual({n: e[1] for n, e in self.list(daemon).items()},
                         {'also': False, 'stopped': False, 'theirs': False})
        daemon.qpull('checkpoint', 'adopt', 'vm', 'theirs', '--description', 'by hand')
        daemon.qpull('checkpoint', 'adopt', 'vm')
        self.assertEqual({n: e[:3] for n, e in self.list(daemon).items()},
                         {'theirs': (None, True, False), 'also': ('theirs', True, True),
                          'stopped': (None, False, False)})
        daemon.qpull('checkpoint', 'adopt', 'vm', 'also', '--parent', '')
        self.assertEqual(self.list(daemon)['also'][0], None)
        for name, why in (('stopped', 'cannot be adopted'), ('never', 'cannot be adopted')):
            with self.assertRaisesRegex(harness.QmpError, why):
                daemon.ask('checkpoint-adopt', {'vm': 'vm', 'name': name})
        with self.assertRaisesRegex(harness.QmpError, 'nobody|nowhere|no note|parent'):
            daemon.ask('checkpoint-adopt', {'vm': 'vm', 'name': 'also', 'parent': 'nobody'})
        with self.assertRaisesRegex(harness.QmpError, 'own ancestor|cycle|itself|descend'):
            daemon.ask('checkpoint-adopt', {'vm': 'vm', 'name': 'also', 'parent': 'also'})

    def test_notes_move_to_another_host_and_another_name(self):
        daemon = self.qpulld(self.vm, linger=0)
        for name in ('mon', 'tue', 'wed'):
            self.create(daemon, name, description=f'the {name}')
        before = self.list(daemon)
        document = daemon.qpull('checkpoint', 'export', 'vm').stdout
        path = f'{self.folder}/notes'
        with open(path, 'w') as f:
            f.write(document)
        daemon.stop()
        there = self.qpulld({'vm': self.vm}, linger=0, name='there')
        self.assertEqual({e[1] for e in self.list(there).values()}, {False})
        self.assertRegex(there.qpull('checkpoint', 'import', 'vm', path).stdout, '3 notes written')
        self.assertEqual(self.list(there), before)
        for text, why in (('{"format": 1', 'too early'), ('[]', 'not a document'),
                          (document.replace('"tue"', '"a/b"'), '/'), (document.replace('"vm": "vm"', '"vm": "x"'), 'x')):
            with open(path, 'w') as f:
                f.write(text)
            done = there.qpull('checkpoint', 'import', 'vm', path, check=False)
            self.assertEqual(done.returncode, 1)
            self.assertIn(why, done.stderr)
        self.assertEqual(self.list(there), before)
        there.stop()
        renamed = self.qpulld({'new name': self.vm}, linger=0, state=there.state, name='renamed')
        renamed.wait_idle(name='new name')
        done = renamed.qpull('checkpoint', 'rename-vm', 'vm', 'new name')
        self.assertRegex(done.stdout, 'taken over')
        self.assertEqual({c['name'] for c in renamed.json('checkpoint', 'list', 'new name') if c['noted']}, set(before))
        again = renamed.qpull('checkpoint', 'rename-vm', 'vm', 'new name', check=False)
        self.assertRegex(again.stderr, 'has notes of its own already')

    def test_the_oldest_go_when_more_than_keep_checkpoints_are_there(self):
        self.vm.look('block-dirty-bitmap-add', {'node': 'node-vda', 'name': 'theirs', 'persistent': True})
        daemon = self.qpulld(self.vm, linger=0, flags=['--keep-checkpoints=2'])
        for i in range(5):
            if i % 2:
                self.create(daemon, f'c{i}')
            else:
                self.pull(daemon, f'c{i}', 'vda')
            harness.wait_until(lambda: len(self.list(daemon)) <= 3, 10, 'the oldest to go')
        self.assertEqual(list(self.list(daemon)), ['c3', 'c4', 'theirs'])  # what others made is theirs
        self.assertEqual({b for _, b in harness.bitmaps(self.vm.look)}, {'c3', 'c4', 'theirs'})
        harness.wait_until(lambda: self.files(daemon) == ['c3.json', 'c4.json'], 10, 'the files to go')

    def test_notes_that_cannot_be_written_spoil_no_checkpoint(self):
        daemon = self.qpulld(self.vm, linger=0)
        folder = f'{daemon.state}/checkpoints'
        self.create(daemon, 'mon')
        os.rename(folder, folder + '.away')
        with open(folder, 'w'):  # a file where the directory should be
            pass
        answer = self.create(daemon, 'tue')
        self.assertEqual(answer['records'], 2)
        self.assertRegex(answer['warning'], 'note could not be written')
        self.assertEqual(self.list(daemon)['tue'][3], {'vda': 'NONE', 'vdb': 'NONE'})
        os.unlink(folder)
        os.rename(folder + '.away', folder)
        self.create(daemon, 'wed')  # writes what could not be written before, too
        self.assertEqual(self.files(daemon), ['mon.json', 'tue.json', 'wed.json'])

    def test_damaged_notes_are_named_and_are_in_nobodys_way(self):
        daemon = self.qpulld(self.vm, linger=0)
        self.create(daemon, 'mon')
        self.create(daemon, 'tue')
        with open(f'{daemon.state}/checkpoints/vm/mon.json', 'w') as f:
            f.write('{"format": 1, "name"')
        daemon.kill()
        daemon.start()
        daemon.wait_idle()
        self.assertRegex(daemon.log(), r'warning: VM vm: .*mon\.json')
        self.assertEqual({n: e[:2] for n, e in self.list(daemon).items()}, {'tue': ('mon', True), 'mon': (None, False)})
        self.delete(daemon, 'mon')
        self.create(daemon, 'mon')
        self.assertEqual({n for n, e in self.list(daemon).items() if e[1]}, {'mon', 'tue'})

    def test_arguments_of_a_wrong_kind_are_refused_in_words(self):
        daemon = self.qpulld(self.vm, linger=0)
        for command, arguments, words in (
                ('checkpoint-create', {'name': 'a', 'disk': 7}, "'disk', expected: array of strings"),
                ('checkpoint-create', {'name': 'a', 'disk': ['vda', 7]}, "'disk', expected: array of strings"),
                ('checkpoint-create', {'name': 7}, "'name', expected: string"),
                ('checkpoint-create', {'name': 'a', 'colour': 'red'}, "'colour' is unexpected"),
                ('checkpoint-create', {}, "'name' is missing"),
                ('checkpoint-create', {'name': 'a', 'disk': ['vdr']}, 'NOT_TRACKED'),
                ('checkpoint-create', {'name': 'a', 'disk': ['nowhere']}, "no disk 'nowhere'"),
                ('checkpoint-create', {'name': 'qpull-a'}, 'temporary objects'),
                ('checkpoint-import', {'document': 'text'}, "'document', expected: object"),
                ('checkpoint-import', {'document': {}}, '"format" is missing'),
                ('checkpoint-create', {'name': 'a', 'parent': 'nobody'}, "no note of a checkpoint 'nobody'"),
                ('checkpoint-adopt', {'name': 'a', 'created-ms': 'now'}, "'created-ms', expected: integer"),
                ('checkpoint-adopt', {'parent': 'a'}, 'say its name'),
                ('checkpoint-delete', {'name': 'a', 'what': 'note', 'disk': 'vda'}, 'about all disks'),
                ('checkpoint-rename-vm', {'from': 'vm'}, "one of qpulld's")):
            with self.subTest(command=command, arguments=arguments):
                with self.assertRaisesRegex(harness.QmpError, words):
                    daemon.ask(command, {'vm': 'vm', **arguments})
        self.assertEqual(self.list(daemon), {})
        warned = self.create(daemon, 'a', description='x' * 5000)  # the records are made; the note has no place
        self.assertRegex(warned['warning'], 'description has 5000 bytes')
        self.assertEqual(self.list(daemon)['a'][1], False)

    def test_a_dry_run_gives_a_verdict_for_each_disk(self):
        daemon = self.qpulld(self.vm, linger=0)
        self.create(daemon, 'mon', disk=['vda'])
        self.vm.write('vda', MIB, 65536, 7)
        before = self.vm.state()
        found = {v['disk']: (v['verdict'], v['reason'], v['dirty-bytes'])
                 for v in daemon.ask('can-increment', {'vm': 'vm', 'name': 'mon'})}
        self.assertEqual(found, {'vda': ('incremental', 'NONE', 65536), 'vdb': ('full', 'NO_SUCH_CHECKPOINT', None),
                                 'vdr': ('full', 'NOT_TRACKED', None)})
        self.assertEqual(self.vm.state(), before)
        done = daemon.qpull('checkpoint', 'can-increment', 'vm', 'mon', check=False)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r'vda +incremental +64 KiB[\s\S]*vdb +full +- +NO_SUCH_CHECKPOINT')
        self.assertEqual(daemon.qpull('checkpoint', 'can-increment', 'vm', 'mon', '--disk', 'vda').returncode, 0)
        self.assertEqual(daemon.qpull('checkpoint', 'can-increment', 'vm', 'mon', '--disk', 'x', check=False).returncode, 1)

    def test_notes_are_whole_when_the_daemon_is_killed_as_they_are_written(self):
        daemon = self.qpulld(self.vm, linger=0)
        made = set()
        for i in range(20):
            name = f'c{i}'
            client = harness.spawn([f'{os.path.dirname(daemon.program)}/qpull', '--control', daemon.control,
                                    'checkpoint', 'create', 'vm', name], stdout=-3, stderr=-3)
            time.sleep(harness.rng.random() * 0.03)
            daemon.kill()
            if client.wait() == 0:
                made.add(name)
            daemon.start()
            daemon.wait_idle()
            self.assertNotIn('warning: VM vm: checkpoints', daemon.log())
            found = self.list(daemon)
            # Who was told "done" finds it noted; a record without a note is no worse.
            self.assertEqual(made - {n for n, e in found.items() if e[1]}, set())
            self.assertEqual({r for e in found.values() for r in e[3].values()} - {'NONE'}, set())


if __name__ == '__main__':
    harness.main()
