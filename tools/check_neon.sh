#!/usr/bin/env bash
# Compiles the core for AArch64, all of it but sq_blas.c (which needs an OpenBLAS of that machine), and
# runs tools/check_tables.c in an emulator: on a CPU with the dot product instructions the neon table
# must be the active one, on a CPU without them the generic one. Needs aarch64-linux-gnu-gcc, its C
# library and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user).
set -euo pipefail
CC=${CC:-aarch64-linux-gnu-gcc}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
core_flags=(-O3 -DNDEBUG)
. "$(dirname "$0")/core_library.sh"
build_core "$build" neon
compile -static tools/check_tables.c "$build/libcore.a" -lm -o "$build/check_tables"

echo 'CPU with the dot product:'
qemu-aarch64 -cpu max "$build/check_tables" neon
echo 'CPU without it:'
qemu-aarch64 -cpu cortex-a53 "$build/check_tables" generic
