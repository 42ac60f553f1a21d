"""Which files may know which: stages meet in artifacts, architectures and forward only."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "singlequant"
SHARED = {"_C", "artifacts", "architectures", "forward", "duquant", "files"}
STAGES = {
    "checkpoint", "calibrate", "rotate", "residual", "spinquant", "quantize", "pack", "runtime",
    "evaluate",
}  # fmt: skip
COMPOSERS = {"__init__", "__main__", "sweep", "compare", "outliers", "harness", "demo", "info",
             "bench"}


def relative_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports when it runs (not for type checkers alone)."""
    found = set()
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if ast.unparse(getattr(n, "test", n)) != "TYPE_CHECKING"]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                found |= {module.split(".")[0]} if module else {a.name for a in node.names}
            elif module.startswith("singlequant."):
                found.add(module.split(".")[1])
            elif module == "singlequant":
                found |= {a.name for a in node.names}
    return found


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stage_imports_only_shared_modules(stage):
    assert relative_imports(PACKAGE / f"{stage}.py") <= SHARED


def test_every_module_is_placed():
    modules = {p.stem for p in PACKAGE.glob("*.py")}
    assert modules <= STAGES | SHARED | COMPOSERS | {"arrays", "_reference"}


def test_shared_modules_import_no_stage():
    for name in SHARED - {"_C"}:
        assert relative_imports(PACKAGE / f"{name}.py") <= SHARED


@pytest.mark.parametrize("module", ["torch", "transformers", "psutil", "matplotlib", "lm_eval",
                                    "datasets", "yaml"])
def test_extras_are_never_imported_at_module_level(module):
    for path in PACKAGE.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                assert module not in {a.name.split(".")[0] for a in node.names}, path.name
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] != module, path.name


def test_python_stays_out_of_the_core():
    for path in (ROOT / "csrc").rglob("*.[ch]"):
        text = path.read_text()
        if not path.name.startswith("py_"):
            assert not re.search(r"#include\s*[<\"](Python\.h|numpy/)", text), path.name


def test_core_never_prints_or_aborts():
    for path in (ROOT / "csrc").rglob("*.[ch]"):
        if path.name == "amx_emulated.h":  # test builds only: it faults where the CPU would
            continue
        code = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
        assert not re.search(r"\b(printf|fprintf|puts|abort|exit|_exit)\s*\(", code), path.name


def test_only_sq_blas_knows_openblas():
    for path in (ROOT / "csrc").rglob("*.[ch]"):
        if path.name != "sq_blas.c":
            assert "cblas" not in path.read_text(), path.name


def test_c_file_names_are_unique():
    names = [p.name for p in (ROOT / "csrc").rglob("*.[ch]")]
    assert len(names) == len(set(names))


def test_every_source_file_opens_with_its_licence():
    for path in (ROOT / "csrc").rglob("*.[ch]"):
        assert path.read_text().startswith("/* SPDX-License-Identifier: Apache-2.0 */"), path.name
