#!/usr/bin/env bash
# Compiles the core for AArch64, all of it but sq_blas.c (which needs an OpenBLAS of that machine), and
# runs tools/check_tables.c in an emulator: on a CPU with the dot product instructions the neon table
# must be the active one, on a CPU without them the generic one. Needs aarch64-linux-gnu-gcc, its C
# library and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user).
set -euo pipefail
cd "$(dirname "$0")/.."
CC=${CC:-aarch64-linux-gnu-gcc}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

# COMMON_FLAGS and the neon row of KERNEL_FLAGS in setup.py, read from there.
flags() {
    "${PYTHON:-python3}" - "$1" <<'PYTHON'
import ast
import sys

for node in ast.parse(open("setup.py").read()).body:
    if isinstance(node, ast.Assign) and node.targets[0].id == sys.argv[1]:
        if sys.argv[1] == "COMMON_FLAGS":
            print(*ast.literal_eval(node.value))
        else:
            neon = {k.value: v for k, v in zip(node.value.keys, node.value.values)}["neon"]
            print(*ast.literal_eval(neon.elts[1]))
PYTHON
}
common=$(flags COMMON_FLAGS)
neon=$(flags KERNEL_FLAGS)
[ -n "$common" ] && [ -n "$neon" ]
compile() { $CC $common -Werror -O3 -DNDEBUG -DSQ_HAVE_NEON=1 "$@"; }

for source in csrc/*/sq_*.c csrc/kernels/kernels_generic.c csrc/kernels/kernels_neon.c; do
    own=
    case $source in
        */sq_blas.c) continue ;;
        */kernels_neon.c) own=$neon ;;
    esac
    compile $own -c "$source" -o "$build/$(basename "$source" .c).o"
done
ar rcs "$build/libcore.a" "$build"/*.o
compile -static tools/check_tables.c "$build/libcore.a" -lm -o "$build/check_tables"

echo 'CPU with the dot product:'
qemu-aarch64 -cpu max "$build/check_tables" neon
echo 'CPU without it:'
qemu-aarch64 -cpu cortex-a53 "$build/check_tables" generic
