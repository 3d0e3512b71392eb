# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of TLS share: certificates and keys by "qpull certs init", bad ones by certtool, and clients."""
import os
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import unittest

import harness
import rawnbd

MIB = 1 << 20


def qpull(*words, check=True):
    return harness.run([f'{harness.bin_dir()}/qpull', *words], check)


def certtool(*words):
    if not shutil.which('certtool'):
        raise unittest.SkipTest('missing: certtool (Debian: gnutls-bin)')
    return harness.run(['certtool', *words])


def make_client(folder, name, template, ca=None):
    """A client's folder with a certificate of that template (certtool's words), by the authority in folder `ca`."""
    path, ca = f'{folder}/{name}', ca or folder
    os.makedirs(path)
    with open(f'{path}/template', 'w', encoding='utf-8') as f:
        f.write(f'cn = "{name}"\nsigning_key\n{template}\n')
    certtool('--generate-privkey', '--key-type=ecdsa', f'--outfile={path}/client-key.pem')
    certtool('--generate-certificate', f'--load-privkey={path}/client-key.pem', f'--template={path}/template',
             f'--load-ca-certificate={ca}/ca-cert.pem', f'--load-ca-privkey={ca}/ca-key.pem',
             f'--outfile={path}/client-cert.pem')
    shutil.copy(f'{ca}/ca-cert.pem', path)
    return path


def revoke(folder, *clients):
    """The authority's list of those that count no more. Replaced in one step."""
    new = f'{folder}/crl.new'
    with open(f'{folder}/crl.certs', 'wb') as f:
        for client in clients:
            with open(f'{client}/client-cert.pem', 'rb') as cert:
                f.write(cert.read())
    with open(f'{folder}/crl.template', 'w', encoding='utf-8') as f:
        f.write('crl_next_update = 365\ncrl_number = 1\n')
    words = [f'--load-certificate={folder}/crl.certs'] if clients else []
    certtool('--generate-crl', f'--load-ca-certificate={folder}/ca-cert.pem', f'--load-ca-privkey={folder}/ca-key.pem',
             f'--template={folder}/crl.template', f'--outfile={new}', *words)
    os.rename(new, f'{folder}/ca-crl.pem')


class Door:
    """A listening port that says NBD_OPT_STARTTLS to the daemon for each client and passes bytes then: for TLS clients
    that do not know NBD."""

    def __init__(self, case, address):
        self.address = address
        self.sockets = [socket.create_server(('127.0.0.1', 0))]
        self.listener = self.sockets[0]
        self.port = self.listener.getsockname()[1]
        case.addCleanup(lambda: [s.close() for s in self.sockets])
        case.addCleanup(self.listener.shutdown, socket.SHUT_RDWR)
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            raw = rawnbd.Raw(self.address)
            self.sockets += [client, raw.sock]
            raw.option(rawnbd.OPT_STARTTLS)
            for a, b in ((client, raw.sock), (raw.sock, client)):
                threading.Thread(target=self.carry, args=(a, b), daemon=True).start()

    @staticmethod
    def carry(a, b):
        try:
            while data := a.recv(1 << 16):
                b.sendall(data)
        except OSError:
            pass
        try:
            b.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def starttls(raw, folder=None, version=None):
    """Goes on with the raw NBD client in TLS, by another library (OpenSSL): a folder of a client's certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if folder:
        context.load_cert_chain(f'{folder}/client-cert.pem', f'{folder}/client-key.pem')
    if version:
        context.minimum_version = context.maximum_version = version
    raw.option(rawnbd.OPT_STARTTLS)
    raw.sock = context.wrap_socket(raw.sock, server_hostname='localhost')
    return raw


class TlsCase(harness.Case):
    """begin() makes a QEMU with a disk of known bytes, certificates, and a daemon."""

    def begin(self, mode='require', flags=(), size=16 * MIB + 512, psk=False, allow=('any=*',), **options):
        self.pki, self.keys = f'{self.folder}/pki', f'{self.folder}/psk'
        qpull('certs', 'init', self.pki, '--client=alice', '--client=bob')
        qpull('certs', 'init', self.keys, '--psk=alice', '--psk=bob')
        self.vm = self.bare(harness.Disk('vda', size))
        for i in range(size // (2 * MIB)):
            self.vm.write('vda', i * 2 * MIB, MIB, 1 + i)
        self.before = self.vm.state()
        creds = f'--tls-psk={self.keys}/keys.psk' if psk else f'--tls-certs={self.pki}'
        self.daemon = self.qpulld(self.vm, linger=0, **options, flags=[
            '--listen=tcp:127.0.0.1:0', f'--tls={mode}', creds, *(f'--allow={a}' for a in allow), *flags])
        self.port = self.daemon.tcp_port()
        self.address = ('127.0.0.1', self.port)

    def client(self, name):
        return f'{self.pki}/clients/{name}'

    def uri(self, folder, export='vm/vda', unix=False):
        if unix:
            return f'nbds+unix:///{export}?socket={self.daemon.socket}&tls-certificates={folder}'
        return f'nbds://localhost:{self.port}/{export}?tls-certificates={folder}'

    def psk_uri(self, user, path=None, export='vm/vda'):
        path = path or f'{self.keys}/clients/{user}/keys.psk'
        return f'nbds://{user}@127.0.0.1:{self.port}/{export}?tls-psk-file={path}'

    def log_text(self):
        with open(self.daemon.log_path, encoding='utf-8', errors='replace') as f:
            return f.read()

    def logged(self, words, timeout=30):
        harness.wait_until(lambda: words in self.log_text(), timeout, f'"{words}" in the log')

    def reads(self, uri):
        """(well, what was said)"""
        done = harness.run(['nbdinfo', '--map', uri], check=False, timeout=60)  # says GO, in every version
        return done.returncode == 0, done.stderr

    def assertGood(self, uri):
        well, words = self.reads(uri)
        self.assertTrue(well, f'{uri}: {words}')

    def assertBad(self, uri, *reasons):
        """It is refused, and for one of these reasons in the log."""
        before = len(self.log_text())
        well, words = self.reads(uri)
        self.assertFalse(well, uri)
        harness.wait_until(lambda: any(r in self.log_text()[before:] for r in reasons), 20,
                           f'one of {reasons} in the log; the client said {words}')

    def copied(self, uri):
        path = f'{self.folder}/copy'
        harness.run(['nbdcopy', uri, path])
        with open(path, 'rb') as f:
            return f.read()

    def end(self):
        """All is as it was, and no name was ever sent in clear."""
        self.daemon.wait_idle()
        self.assertNothingLeft(self.vm, self.daemon, self.before)
        self.daemon.stop()


def gnutls_cli(port, *words, timeout=30):
    """The finished process of a TLS client that asks for the list of exports if it gets so far."""
    if not shutil.which('gnutls-cli'):
        raise unittest.SkipTest('missing: gnutls-cli (Debian: gnutls-bin)')
    return subprocess.run(['gnutls-cli', '--insecure', f'--port={port}', *words, '127.0.0.1'],
                          input=option(rawnbd.OPT_LIST), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False)


def option(number, data=b''):
    return struct.pack('>QII', rawnbd.OPTION_MAGIC, number, len(data)) + data
