# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real QEMU that seems to lack things: its answer to query-qmp-schema is edited on the way."""
import json

from qmpproxy import QmpProxy


class PoorQemu(QmpProxy):
    """A QEMU that seems to lack things: edit(schema) is called with query-qmp-schema's answer."""

    def __init__(self, folder, guest, edit, name='proxy'):
        self.edit, self.nasked = edit, 0
        super().__init__(folder, guest, name)

    def _command(self, client, qemu, line, fds):
        message = json.loads(line)
        if message.get('execute') != 'query-qmp-schema':
            return super()._command(client, qemu, line, fds)
        self.nasked += 1
        qemu.sendall(line)
        for answer in self._answer(qemu, message.get('id')).splitlines():
            document = json.loads(answer)
            if 'return' in document:
                self.edit(document['return'])
            client.sendall(json.dumps(document).encode() + b'\n')
        return True


def without(driver=None, members=(), commands=()):
    """Edits a schema: commands go, and members of that driver's options, or, where none are named, the driver."""
    def edit(schema):
        entries = {e['name']: e for e in schema}
        schema[:] = [e for e in schema if e['name'] not in commands]
        if driver:
            drivers = entries[entries['blockdev-add']['arg-type']]
            options = entries[next(v['type'] for v in drivers['variants'] if v['case'] == driver)]
            options['members'] = [m for m in options['members'] if m['name'] not in members]
            if not members:
                drivers['variants'] = [v for v in drivers['variants'] if v['case'] != driver]
    return edit
