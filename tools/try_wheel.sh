#!/usr/bin/env bash
# Installs a wheel in an empty virtual environment, from wheels alone, and runs README's demo there
# without a compiler: nothing but that environment is in PATH. PYTHON is the Python that makes the
# environment (python3). Needs PyPI.
set -euo pipefail
wheel=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --only-binary :all: "$wheel[plots]"
alone() { (cd "$work" && env -i PATH="$work/venv/bin" HOME="$work" MPLBACKEND=Agg "$@"); }
for compiler in cc gcc clang c++; do
    if alone "$BASH" -c "command -v $compiler"; then
        echo "$compiler: expected no compiler in PATH" >&2
        exit 1
    fi
done
alone python -c 'import sys; from singlequant import _C
print("testing", _C.__file__)
assert _C.__file__.startswith(sys.prefix), sys.prefix'
alone singlequant runtime
alone singlequant demo
[ -s "$work/singlequant-demo.png" ]
