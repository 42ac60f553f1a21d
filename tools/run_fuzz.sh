#!/usr/bin/env bash
# Fuzzes the core: run_fuzz.sh SECONDS [OPTIONS OF LIBFUZZER]. Compiles the core, without Python and
# with plain loops for OpenBLAS, with the fuzzer and the address and undefined behaviour sanitizers,
# and runs tools/fuzz_core.c for so many seconds. It starts from tests/data/fuzz. New inputs go to
# the folder that CORPUS names, or to one that is removed; an input that fails is left in FOUND (.).
# Needs clang with libFuzzer (Debian: libclang-rt-14-dev).
set -euo pipefail
seconds=${1:?usage: run_fuzz.sh SECONDS [OPTIONS OF LIBFUZZER]}
shift
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
found=$(realpath "${FOUND:-.}")
corpus=$(realpath -m "${CORPUS:-$build/corpus}")
CC=${CC:-clang}
core_flags=(-O1 -g -UNDEBUG -DSQ_DEBUG -Itools -fsanitize=fuzzer-no-link,address,undefined
    -fsanitize=float-cast-overflow -fno-sanitize-recover=all)
. "$(dirname "$0")/core_library.sh"

if ! echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' |
    $CC -fsanitize=fuzzer -xc -o "$build/probe" - 2>/dev/null; then
    echo "SKIPPED: $CC has no libFuzzer"
    exit 0
fi
kernel_flags=-fno-sanitize=undefined # inlined code of thousands of lines, which then takes a minute
sets=
if [ "$(uname -m)" = x86_64 ]; then sets=${SETS-'avx2 avxvnni avx512vnni'}; fi
build_core "$build" $sets
# Sizes that the fuzzer draws may overflow in its own sums: what is tested are the core's.
compile -fsanitize=fuzzer -fwrapv -fno-sanitize=signed-integer-overflow tools/fuzz_core.c \
    tools/fuzz_layer.c tools/plain_blas.c "$build/libcore.a" -lm -o "$build/fuzz_core"
mkdir -p "$corpus"
export ASAN_OPTIONS=allocator_may_return_null=1:detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1
"$build/fuzz_core" -max_total_time="$seconds" -rss_limit_mb=4096 -malloc_limit_mb=2048 \
    -max_len=512 -len_control=0 -timeout=20 -print_final_stats=1 -verbosity="${VERBOSITY:-0}" \
    -artifact_prefix="$found/" "$@" "$corpus" tests/data/fuzz
