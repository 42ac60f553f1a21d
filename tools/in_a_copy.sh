# Sourced by the scripts that build a copy of the tree: goes there, and sets `python` to the one of the
# virtual environment that VENV names (.venv). The copy is removed at the end.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${VENV:-.venv}/bin/python
case $python in /*) ;; *) python=$PWD/$python ;; esac
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf - | tar xf - -C "$copy"
cd "$copy"
export PYTHONPATH=$copy PYTHONDONTWRITEBYTECODE=1 MPLBACKEND=Agg
