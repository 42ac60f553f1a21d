#!/usr/bin/env bash
# Runs the core's test programs, without Python, where a checker watches every access: check_threads
# under the thread sanitizer, then check_threads and the fuzzer's inputs (tests/data/fuzz) under
# valgrind. check_memory.sh [ROUNDS], of check_threads (100). From 400 rounds on check_tables runs
# under valgrind as well, which takes minutes.
# Needs gcc; valgrind's part is skipped aloud where there is none.
set -euo pipefail
rounds=${1:-100}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
CC=${CC:-gcc}
. "$(dirname "$0")/core_library.sh"
valgrind_() {
    valgrind --quiet --error-exitcode=9 --leak-check=full --show-leak-kinds=definite \
        --errors-for-leak-kinds=definite "$@"
}

core_flags=(-O1 -g -UNDEBUG -DSQ_DEBUG -fsanitize=thread)
build_core "$build"
compile tools/check_threads.c tools/plain_blas.c "$build/libcore.a" -lm -o "$build/watched"
echo 'check_threads under the thread sanitizer:'
# die_after_fork: children of check_threads start threads of their own. setarch: the sanitizer does
# not know all places to which a kernel that moves them far may move its libraries.
still=
if setarch "$(uname -m)" -R true 2>/dev/null; then still="setarch $(uname -m) -R"; fi
TSAN_OPTIONS=halt_on_error=1:die_after_fork=0 $still "$build/watched" "$rounds"

if ! command -v valgrind >/dev/null; then
    echo 'SKIPPED: valgrind is not installed'
    exit 0
fi
core_flags=(-O1 -g -UNDEBUG -DSQ_DEBUG -Itools)
table=generic sets=
if [ "$(uname -m)" = x86_64 ]; then table=avx2 sets=avx2; fi
build_core "$build" $sets
compile tools/check_threads.c tools/plain_blas.c "$build/libcore.a" -lm -o "$build/check_threads"
compile tools/fuzz_*.c tools/plain_blas.c "$build/libcore.a" -lm -o "$build/run_inputs"
echo 'check_threads under valgrind:'
valgrind_ "$build/check_threads" $((rounds / 10 + 1))
echo "the fuzzer's inputs under valgrind:"
valgrind_ "$build/run_inputs" tests/data/fuzz/*
if [ "$rounds" -lt 400 ]; then exit 0; fi
compile tools/check_tables.c "$build/libcore.a" -lm -o "$build/check_tables"
echo 'check_tables under valgrind:'
valgrind_ "$build/check_tables" "$table"
