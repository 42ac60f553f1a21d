#!/usr/bin/env bash
# Builds a copy of the tree with the address and undefined-behaviour sanitizers and runs the quick
# tests on it. Arguments go to pytest. VENV names the virtual environment (.venv), which needs the
# packages of the `test` extra, numpy, scipy-openblas32 and setuptools.
set -euo pipefail
. "$(dirname "$0")/in_a_copy.sh"

# Two worlds in one process: the interpreter is not built for the sanitizers, so they come first
# (LD_PRELOAD), and what it keeps until its end is no leak (detect_leaks). Requests for more memory than
# there is must come back as NULL (allocator_may_return_null), and the crashes that tests want must
# stay crashes (handle_segv, handle_sigbus).
CC=gcc SINGLEQUANT_SANITIZE=1 SINGLEQUANT_WERROR=1 "$python" setup.py -q build_ext --inplace
export LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_segv=0:handle_sigbus=0 UBSAN_OPTIONS=print_stacktrace=1
"$python" - "$copy" <<'PYTHON'
import sys

import singlequant
from singlequant import _C

assert _C.__file__.startswith(sys.argv[1]), f"not the copy's build: {_C.__file__}"
assert "asan" in open("/proc/self/maps").read()
print("testing", _C.__file__)
PYTHON
# --capture=sys: a report goes to the process's stderr, which must not be swallowed.
"$python" -m pytest -q -p no:cacheprovider --capture=sys --rootdir "$copy" \
    --ignore tests/test_notebooks.py --ignore tests/test_readme.py "$@"
