#!/usr/bin/env bash
# Builds the wheels of all Pythons that pyproject.toml lists, for this system and processor, into
# wheelhouse/, and runs README's demo from each (try_wheel.sh). Needs Docker on Linux, and PyPI.
# tools/check_wheel.sh does the same for one Python, without Docker.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools"
"$tools/bin/pip" install -q 'cibuildwheel>=4.1,<5'
"$tools/bin/cibuildwheel" --output-dir wheelhouse
