#!/usr/bin/env bash
# The documentation as a site in the folder $1, each warning an error, a broken link among them. Needs the docs extra.
# NOTEBOOKS=off leaves the notebooks as they are stored.
set -euo pipefail
cd "$(dirname "$0")/.."
site=${1:?the folder of the site}
trees=$(mktemp -d)
trap 'rm -rf "$trees"' EXIT
export PYTHONDONTWRITEBYTECODE=1
"${VENV:-.venv}/bin/python" -m sphinx -W --keep-going -q -d "$trees" -c docs . "$site"
echo '<!DOCTYPE html><title>singlequant</title><meta http-equiv="refresh" content="0; url=docs/index.html">' \
    >"$site/index.html"
