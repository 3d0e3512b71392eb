#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A mistake in the flags or in the file: exit status 2, one sentence that says where and what; nothing is made."""
import os

import harness


class Mistakes(harness.Case):
    @classmethod
    def setUpClass(cls):
        harness.bin_dir()

    def start(self, *flags):
        done = harness.run([f'{harness.bin_dir()}/qpulld', *flags], check=False, timeout=20)
        return done.returncode, done.stderr

    def base(self):
        return (f'--control={self.folder}/control', f'--listen=unix:{self.folder}/nbd', f'--scratch={self.folder}',
                f'--state={self.folder}')

    def mistake(self, words, *flags):
        before = sorted(os.listdir(self.folder))
        status, text = self.start(*flags)
        self.assertEqual(status, 2, (flags, text))
        self.assertRegex(text, words, flags)
        self.assertEqual(text.count('\n'), 1, text)
        self.assertEqual(sorted(os.listdir(self.folder)), before)

    def failed(self, words, *flags):
        """What only shows when the files are loaded. No line of them is told: they are secret."""
        status, text = self.start(*flags)
        self.assertEqual(status, 1, (flags, text))
        self.assertRegex(text, words, flags)
        self.assertNotRegex(text, 'a1a1|xxxx|0011')
        self.assertFalse(os.path.exists(f'{self.folder}/nbd'))

    def test_flags(self):
        for words, *flags in (('--nonsense', '--nonsense'), ('--vm: .*NAME=QMP_SOCKET', '--vm=x'),
                              ('--vm: .*"/"', '--vm=a/b=/x'), ('--vm: .*empty', '--vm==/x'),
                              ('twice', '--vm=a=/x', '--vm=a=/y'),
                              ('--linger: "soon"', '--linger=soon'), ('--linger', '--linger=-1'),
                              ('--max-connections', '--max-connections=0'), ('--log: "loud"', '--log=loud'),
                              ('--listen: "udp:1"', '--listen=udp:1'), ('no port', '--listen=tcp:127.0.0.1'),
                              ('port', '--listen=tcp:127.0.0.1:70000'), ('wants a value', '--scratch'),
                              ('--scratch: .*no end', '--scratch={"driver":"nbd"'),
                              ('--scratch: .*keeps nothing', '--scratch={"driver":"null-co"}'),
                              ('--cbw-timeout: "0"', '--cbw-timeout=0'),
                              ('"stray"', 'stray'), ('--handshake-timeout', '--handshake-timeout=0')):
            self.mistake(words, *flags)

    def test_paths(self):
        for words, flag in (('scratch directory /nowhere/at/all', '--scratch=/nowhere/at/all'),
                            ('state directory /nowhere/at/all', '--state=/nowhere/at/all'),
                            ('control socket /nowhere/at', '--control=/nowhere/at/all'),
                            ('pidfile /nowhere/at', '--pidfile=/nowhere/at/all'),
                            ('listener /nowhere/at', '--listen=unix:/nowhere/at/all'),
                            ('longer than', f'--listen=unix:/tmp/{"x" * 120}'),
                            ('is not a socket', '--vm=x=/etc/passwd')):
            name = flag.split('=')[0]
            self.mistake(words, *(f for f in self.base() if not f.startswith(f'{name}=')), flag)

    def test_paths_of_the_file_are_named_with_its_line_unless_a_flag_has_the_last_word(self):
        path = f'{self.folder}/conf'
        for words, key, value in (('scratch directory /nowhere/at/all', 'scratch', '/nowhere/at/all'),
                                  ('state directory /nowhere/at/all', 'state', '/nowhere/at/all'),
                                  ('control socket /nowhere/at', 'control', '/nowhere/at/all'),
                                  ('pidfile /nowhere/at', 'pidfile', '/nowhere/at/all'),
                                  ('listener /nowhere/at', 'listen', 'unix:/nowhere/at/all'),
                                  ('clear text', 'listen', 'tcp:0.0.0.0:0')):
            with open(path, 'w', encoding='utf-8') as f:
                f.write(f'[server]\nlinger=5\n{key}={value}\n')
            others = [f for f in self.base() if not f.startswith(f'--{key}=')]
            self.mistake(f'conf:3: .*{words}', f'--config={path}', *others)
            self.mistake('^qpulld: the .* /elsewhere', f'--config={path}', *others,
                         f'--{key}={"unix:" if key == "listen" else ""}/elsewhere/x')
        with open(path, 'w', encoding='utf-8') as f:
            f.write('[server]\nlinger=5\n\n[vm "x"]\nqmp=/etc/passwd\n')
        self.mistake('conf:4: VM "x": /etc/passwd is not a socket', f'--config={path}', *self.base())
        with open(path, 'w', encoding='utf-8') as f:
            f.write(f'[server]\ntls=require\ntls-certs={self.folder}/certs\n')
        self.failed('conf:3: cannot read .*ca-cert.pem', f'--config={path}', *self.base())

    def test_one_place_is_never_for_two(self):
        base = [f for f in self.base() if not f.startswith('--scratch')]
        place = '--scratch={"driver":"nbd","export":"%d"}'
        self.mistake('2 VMs would write to one scratch place', *base, place, '--vm=a=/x', '--vm=b=/x')
        self.mistake('--scratch-limit.*need a directory', *base, place, '--vm=a=/x', '--scratch-limit=1G')
        path = f'{self.folder}/conf'
        with open(path, 'w', encoding='utf-8') as f:
            for name in 'ab':
                f.write(f'[vm "{name}"]\nqmp=/x\nscratch={{"driver":"nbd",\n "export":"%d"}}\n')
        self.mistake('VM "a" and VM "b" would write to one', f'--config={path}', *self.base())

    def test_clear_text_beyond_loopback_is_refused(self):
        for address in ('tcp:0.0.0.0:0', 'tcp:[::]:0'):
            flags = [f for f in self.base() if not f.startswith('--listen')]
            self.mistake('clear text.*--allow-plaintext', *flags, f'--listen={address}')

    def test_credentials_that_cannot_be_used_are_named(self):
        certs = f'{self.folder}/certs'
        flags = [*self.base(), '--tls=require']
        self.mistake('needs --tls-certs DIR or --tls-psk FILE', *flags)
        self.mistake('cannot both be used', *flags, '--tls-certs=/x', '--tls-psk=/x')
        self.failed('ca-cert.pem: No such file.*qpull certs init', *flags, f'--tls-certs={certs}')
        harness.run([f'{harness.bin_dir()}/qpull', 'certs', 'init', certs])
        with open(f'{certs}/server-key.pem', 'w', encoding='utf-8') as f:
            f.write('no key\n')
        self.failed('server-cert.pem, .*server-key.pem', *flags, f'--tls-certs={certs}')
        keys = f'{self.folder}/keys'
        for number, words, text in ((2, 'not USER:HEXKEY', '# comment\nalice\n'),
                                    (1, 'hexadecimal', 'alice:' + 'x' * 64 + '\n'),
                                    (1, '16 to 64 bytes', 'alice:0011\n'),
                                    (2, '"alice" is there twice', ('alice:' + 'a1' * 32 + '\n') * 2)):
            with open(keys, 'w', encoding='utf-8') as f:
                f.write(text)
            self.failed(f'{keys}:{number}: .*{words}', *flags, f'--tls-psk={keys}')
        with open(keys, 'w', encoding='utf-8') as f:
            f.write('# nobody\n')
        self.failed('holds no key', *flags, f'--tls-psk={keys}')

    def test_the_file_is_named_with_its_line(self):
        path = f'{self.folder}/conf'
        for number, words, text in ((3, 'unknown key "lingr"', '[server]\n# comment\nlingr=5\n'),
                                    (2, '"linger".*"soon"', '[server]\nlinger=soon\n'),
                                    (1, 'before any section', 'linger=5\n'),
                                    (2, 'unknown section', '\n[servr]\nlinger=5\n'),
                                    (3, 'unknown key "qpm"', '\n[vm "a"]\nqpm=/x\n'),
                                    (4, 'twice', '[vm "a"]\nqmp=/x\n\n[vm "a"]\n'),
                                    (1, 'has neither "qmp" nor', '[vm "a"]\ndisks=vda\n'),
                                    (2, 'neither a section nor', '[server]\nwhat\n'),
                                    (3, 'twice', '[server]\nlinger=1\nlinger=2\n'),
                                    (2, 'disk', '[vm "a"]\ndisks=\nqmp=/x\n'),
                                    (2, 'longer', '[server]\nscratch=' + 'x' * 10000 + '\n'),
                                    (3, '"scratch": .*not ours', '[server]\n#\nscratch={"driver":"raw","file":"x"}\n'),
                                    (3, '"scratch": .*no end', '[server]\nscratch={"driver":\n "nbd"\nlinger=1\n'),
                                    (4, '"scratch": .*no end', '[server]\nlinger=1\nscratch={"driver":\n "nbd"\n'),
                                    (3, 'may not go on', '[server]\nscratch=/x\n /y\n'),
                                    (3, '"scratch".*directory', '[vm "a"]\nqmp=/x\nscratch=/var/tmp\n'),
                                    (4, '"scratch" is there twice',
                                     '[vm "a"]\nqmp=/x\nscratch={"driver":"x"}\nscratch={"driver":"x"}\n'),
                                    (2, 'config', '[server]\nconfig=/x\n')):
            with open(path, 'w', encoding='utf-8') as f:
                f.write(text)
            self.mistake(f'{path}:{number}: .*{words}', f'--config={path}', *self.base())
        self.mistake(f'{self.folder}/missing: ', f'--config={self.folder}/missing')

    def test_help_and_version_help_in_any_case(self):
        self.assertEqual(self.start('--version')[0], 0)
        self.assertEqual(self.start('--config=/nowhere', '--help')[0], 0)


if __name__ == '__main__':
    harness.main()
