# shellcheck shell=bash
# SPDX-License-Identifier: LGPL-2.1-or-later
# Sourced behind functions.sh by the tests that run nbdkit under valgrind: start_nbdkit and stop_nbdkit do so then, and
# fail where valgrind complains: of a wrong access anywhere, or of a lost block of the plugin's.
requires valgrind
if [ -n "$preload" ]; then
    echo "skipped: valgrind cannot run a program with sanitizers" >&2
    exit 77
fi

# Without dlclose() valgrind can still name the plugin's functions in the end.
cat >"$work/nbdkit.supp" <<'EOF'
{
   not ours: what libraries keep for their own life
   Memcheck:Leak
   ...
   fun:call_init*
}
{
   not ours: what nbdkit itself allocates (1.42 loses a few bytes of each export name)
   Memcheck:Leak
   fun:*alloc
   obj:*/nbdkit
}
{
   not ours: likewise, by a function of libc
   Memcheck:Leak
   fun:*alloc
   obj:*/libc.so.6
   obj:*/nbdkit
}
EOF
under=(valgrind -q --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite
    --error-exitcode=99 --child-silent-after-fork=no --suppressions="$here/../valgrind.supp"
    --suppressions="$work/nbdkit.supp" --log-file="$work/valgrind.%p")

# end_nbdkit [STATUS]: as stop_nbdkit, also where it has been told to end, or is to end with another status.
end_nbdkit()
{
    local status=0
    kill -TERM $nbdkit_pid 2>/dev/null || true
    wait $nbdkit_pid || status=$?
    cat "$work"/valgrind.* >&2
    if [ $status != "${1:-0}" ]; then
        echo "$0: nbdkit ended with $status" >&2
        return 1
    fi
    if grep -q . "$work"/valgrind.*; then
        return 1
    fi
}
