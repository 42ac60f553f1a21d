#!/usr/bin/env bash
# Builds a copy of the tree whose AMX table runs on tiles in plain C and tests its kernels, so that
# they are proved on CPUs without AMX; AVX512-VNNI, on which the table is built, it takes. Arguments
# go to pytest. VENV names the virtual environment (.venv), which needs the packages of the `test`
# extra, numpy, scipy-openblas32 and setuptools.
set -euo pipefail
. "$(dirname "$0")/in_a_copy.sh"
SINGLEQUANT_EMULATE_AMX=1 SINGLEQUANT_WERROR=1 "$python" setup.py -q build_ext --inplace
state=$("$python" - "$copy" <<'PYTHON'
import sys

from singlequant import _C

assert _C.__file__.startswith(sys.argv[1]), f"not the copy's build: {_C.__file__}"
assert "amx" in _C.kernels()["compiled"], "the amx table was not compiled"
missing = _C.kernels()["missing"].get("amx")
print(f"lacks {', '.join(missing)}" if missing else "runs")
PYTHON
)
if [ "$state" != runs ]; then
    echo "SKIPPED: this CPU or OS $state"
    exit 0
fi
"$python" -m pytest -q -p no:cacheprovider --rootdir "$copy" tests/test_amx.py tests/test_linear.py \
    tests/test_mixed_width.py tests/test_weight_bits.py tests/test_kernels.py tests/test_decoder.py \
    tests/test_dense.py tests/test_blocks.py "$@"
