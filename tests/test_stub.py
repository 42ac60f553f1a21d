"""The stub, the C module and its NumPy twins name the same things."""

import ast
import inspect
from pathlib import Path

import pytest

from singlequant import _C, _reference

STUB = ast.parse((Path(_C.__file__).parent / "_C.pyi").read_text())
FUNCTIONS = {n.name: n for n in STUB.body if isinstance(n, ast.FunctionDef)}
CLASSES = {n.name: n for n in STUB.body if isinstance(n, ast.ClassDef)}
CONSTANTS = {n.target.id for n in STUB.body if isinstance(n, ast.AnnAssign)}


def test_stub_lists_exactly_the_module():
    public = {name for name in dir(_C) if not name.startswith("_")}
    assert public == set(FUNCTIONS) | set(CLASSES) | CONSTANTS


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function_signature_equals_stub(name):
    parameters = inspect.signature(getattr(_C, name)).parameters
    arguments = FUNCTIONS[name].args
    assert list(parameters) == [a.arg for a in arguments.posonlyargs + arguments.args]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_constructor_signature_equals_stub(name):
    made = [n for n in CLASSES[name].body if getattr(n, "name", None) == "__init__"]
    if made:
        parameters = inspect.signature(getattr(_C, name)).parameters
        assert list(parameters) == [a.arg for a in made[0].args.args[1:]]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function_has_a_docstring(name):
    assert getattr(_C, name).__doc__.strip()


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_class_has_what_the_stub_says(name):
    for node in CLASSES[name].body:
        target = getattr(node, "name", None) or getattr(getattr(node, "target", None), "id", None)
        if target:
            assert hasattr(getattr(_C, name), target), target


def test_reference_twins_share_name_and_signature():
    twins = {
        name: f
        for name, f in inspect.getmembers(_reference, inspect.isfunction)
        if not name.startswith("_") and name in FUNCTIONS
    }
    assert len(twins) >= 15
    for name, twin in twins.items():
        assert list(inspect.signature(twin).parameters) == list(
            inspect.signature(getattr(_C, name)).parameters
        ), name
