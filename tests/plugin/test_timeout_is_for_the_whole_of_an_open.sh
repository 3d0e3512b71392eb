#!/usr/bin/env bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# timeout= is for all that a client waits for until its disk is open: with server= that are several connections, each of
# which is slow here, but none too slow; and others who open theirs at the same time.
. "$(dirname "$0")/functions.sh"

disk vda qcow2 16M
start_vm vm vda:qcow2
start_qpulld vm
slow=$work/slow.sock

# slow_down SECONDS: $slow leads to qpulld, each connection after so long.
slow_down()
{
    /usr/bin/python3 - "$slow" "$socket" "$1" <<'PYTHON' &
import asyncio
import sys

slow, fast, seconds = sys.argv[1:]


async def carry(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


async def serve(reader, writer):
    await asyncio.sleep(float(seconds))
    above, below = await asyncio.open_unix_connection(fast)
    await asyncio.gather(carry(reader, below), carry(above, writer), return_exceptions=True)


async def main():
    server = await asyncio.start_unix_server(serve, slow)
    await server.serve_forever()

asyncio.run(main())
PYTHON
    proxy=$!
    children+=($proxy)
    wait_for 20 test -S "$slow"
}

# Three connections of 2 s, in 5 s: the first two have been answered then.
slow_down 2
if run_nbdkit 'nbdinfo "$uri"' -- server=unix:"$slow" vm=vm disk=vda timeout=5 2>/dev/null; then
    exit 1
fi
expect "$(cat "$nbdkit_log")" "disk 'vda': qpulld at '$slow' has not given it within 5 s"
wait_idle vm
nothing_left vm

# In time, all is well.
run_nbdkit "nbdcopy --connections=1 \"\$uri\" $work/out.img" -- server=unix:"$slow" vm=vm disk=vda timeout=60
qemu-img compare -q -U -f raw -F qcow2 "$work/out.img" "$work/vda.img"
kill $proxy
rm "$slow"

# Nobody answers at all: four clients, one after another, would take 16 s, or more where each has to be told its disk's
# name before.
slow_down 1000
for words in disk=vda ""; do
    # The time of the clients alone: nbdkit's start and end take as long as they take.
    run_nbdkit "since=\$(date +%s); for i in 1 2 3 4; do qemu-io -r -f raw -c 'read 0 512' \"\$uri\" & done; wait
        echo \$((\$(date +%s) - since)) >$work/took" -- server=unix:"$slow" vm=vm $words timeout=4 >/dev/null 2>&1
    test "$(cat "$work/took")" -lt 12
done
stop_qpulld
check_nbdkit_log
