"""Which files may know which: the rules of CONTRIBUTING.md, word for word."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "singlequant"
PYTHON_RULE = """A folder of singlequant/ imports only itself, the modules beside the folders,
and folders that stand before it in this list: models, export, checkpoint, methods, runtime,
sweep, harness, study, integrations, cli. The table of methods, methods/registry.py, imports nothing
of the package, and every file may import it."""
C_RULE = """A folder of csrc/ includes only itself and folders that stand before it
in this list: core, kernels, transform, solve, quantize, runtime, python."""
PYTHON_FOLDERS = re.search(r"list: ([\w, ]+)\.", PYTHON_RULE.replace("\n", " "))[1].split(", ")
C_FOLDERS = C_RULE.replace("\n", " ").rpartition(": ")[2].rstrip(".").split(", ")
COMPOSERS = {"__init__", "__main__"}  # modules beside the folders that look into them
REGISTRY = "methods.registry"


def imported(path: Path) -> set[str]:
    """What a file imports of the package when it runs: folders and modules beside them."""
    found = set()
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if ast.unparse(getattr(n, "test", n)) != "TYPE_CHECKING"]
    parents = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parents[: len(parents) - node.level + 1]
            names = [node.module] if node.module else [a.name for a in node.names]
            whole = [".".join((*base, name)) for name in names]
            found |= {name.split(".")[0] for name in whole if name != REGISTRY}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("singlequant"):
            found.add((*node.module.split("."), node.names[0].name)[1])
    return found


def test_rules_stand_in_contributing():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert PYTHON_RULE in text
    assert C_RULE in text


def test_registry_of_methods_imports_nothing_of_the_package():
    assert not imported(PACKAGE / "methods" / "registry.py")


def test_every_folder_is_placed():
    folders = {p.parent.name for p in PACKAGE.glob("[!_]*/__init__.py")}
    assert folders == set(PYTHON_FOLDERS)
    assert {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()} == set(C_FOLDERS)


@pytest.mark.parametrize("folder", PYTHON_FOLDERS)
def test_folder_imports_itself_and_those_before_it(folder):
    later = set(PYTHON_FOLDERS[PYTHON_FOLDERS.index(folder) + 1 :])
    for path in (PACKAGE / folder).rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        wrong = imported(path) & later
        assert not wrong, f"{name} imports {wrong}"


def test_modules_beside_the_folders_import_none_of_them():
    for path in PACKAGE.glob("*.py"):
        if path.stem not in COMPOSERS:
            assert not imported(path) & set(PYTHON_FOLDERS), path.name


@pytest.mark.parametrize("folder", C_FOLDERS)
def test_c_folder_includes_itself_and_those_before_it(folder):
    later = C_FOLDERS[C_FOLDERS.index(folder) + 1 :]
    for path in (ROOT / "csrc" / folder).glob("*.[ch]"):
        included = set(re.findall(r'#include "(\w+)/', path.read_text()))
        assert not included & set(later), path.name


@pytest.mark.parametrize("module", ["torch", "transformers", "psutil", "matplotlib", "lm_eval",
                                    "datasets", "yaml", "distributed"])
def test_extras_are_never_imported_at_module_level(module):
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "integrations":  # who imports its files asks for the extra
            continue
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
        if path.name == "py_mapped.c":  # its handler of SIGBUS is the last thing that runs
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


def test_nothing_imports_the_integrations_at_module_level():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "integrations" and path.stem != "__init__":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                assert "integrations" not in (node.module or "").split("."), path.name
