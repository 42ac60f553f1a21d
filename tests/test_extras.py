# SPDX-License-Identifier: Apache-2.0
"""What pip installs beside the package, who names it when it is missing, how wheels are made."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from singlequant import bundled_model

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
FOR_DEVELOPERS = {"test", "docs"}
# Extra -> the module that is missing, and a command that asks for it.
ASKS = {
    "plots": ("matplotlib", ["inspect", str(bundled_model()), "--picture", "a.png"]),
    "evaluation": ("lm_eval", ["eval", str(bundled_model()), "--tasks", "stdlib_perplexity"]),
    "gguf": ("gguf", ["eval", "model.gguf", "--text", "text.txt"]),
    "torch": ("torch", ["quantize", str(bundled_model()), "out", "--method", "spinquant"]),
    "hub": ("huggingface_hub", ["push", "out", "owner/name"]),
}
BLOCKED = """
import sys
sys.modules[sys.argv.pop(1)] = None
from singlequant.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("extra", sorted(ASKS))
def test_missing_library_is_one_line_that_names_the_extra(extra, tmp_path):
    module, command = ASKS[extra]
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    (tmp_path / "text.txt").write_text("text")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, module, *command], capture_output=True, text=True,
        cwd=tmp_path, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])})
    assert done.returncode == 2, done.stderr
    assert f"singlequant[{extra}]" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_torch_modules_name_the_extra(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("singlequant.integrations")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("torch", "transformers"):
        with pytest.raises(ImportError, match=r"pip install 'singlequant\[torch\]'"):
            __import__(f"singlequant.integrations.{name}")


def test_every_extra_is_named_where_its_library_is_missing():
    named = set(re.findall(r"singlequant\[(\w+)\]", "".join(
        path.read_text() for path in (ROOT / "singlequant").rglob("*.py"))))
    assert {"plots", "evaluation", "torch", "gguf", "hub"} <= set(EXTRAS)
    assert named <= set(EXTRAS)
    assert set(EXTRAS) - FOR_DEVELOPERS <= named


def test_workflow_calls_scripts_of_the_repository_alone():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    runs = [step["run"] for step in steps if "run" in step]
    assert set(runs) == {".ci/run", "tools/build_wheels.sh"}
    for script in runs:
        assert os.access(ROOT / script, os.X_OK), script
    assert all(step["uses"].startswith("actions/") for step in steps if "uses" in step)


@pytest.mark.parametrize(("platform", "machine", "tag"), [
    ("linux", "x86_64", "manylinux_x86_64"), ("linux", "aarch64", "manylinux_aarch64"),
    ("macos", "arm64", "macosx_arm64"),
])
def test_wheels_are_built_of_every_python(platform, machine, tag):
    if shutil.which("cibuildwheel") is None:
        pytest.skip("cibuildwheel is not installed")
    done = subprocess.run(
        ["cibuildwheel", "--platform", platform, "--archs", machine, "--print-build-identifiers",
         str(ROOT)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        f"{python}-{tag}" for python in ("cp310", "cp311", "cp312", "cp313", "cp314", "cp314t")]
