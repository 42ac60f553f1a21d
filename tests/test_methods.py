"""The registry: every place that names methods reads it, and a new method is a file and a row."""

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import singlequant as sq
from singlequant import QuantConfig
from singlequant.cli.main import parser
from singlequant.export.writer import estimate_size
from singlequant.methods.registry import METHODS, Method, find_method, methods_table
from singlequant.methods.solve import solve_site
from singlequant.study.compare import default_methods
from singlequant.sweep.calibrate import site_statistics
from singlequant.sweep.run import folder_bytes

ROOT = Path(__file__).resolve().parents[1]
SOURCE = """
    from singlequant.methods.axes import factor_bytes as online_bytes
    from singlequant.methods.balance import rms_balance as balance

    def build(site, axis):
        site.set_hadamard(axis)
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A method of one file and one row: a Hadamard on the second axis, behind a balance."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "made_up_method.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.syspath_prepend(folder)
    row = Method("made-up", "H on one axis", "made_up_method", {"axis": 1},
                 balances=("residual", "mlp"))
    monkeypatch.setitem(METHODS, row.name, row)
    yield row
    sys.modules.pop("made_up_method", None)


@pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)
def test_each_row_has_the_functions_that_it_promises(row):
    assert row.name in METHODS
    if row.module is None:
        assert not row.rotates
        assert not row.folds
        return
    module = row.implementation()
    for name, needed in (("build", row.rotates), ("online_bytes", row.rotates),
                         ("balance", row.balances), ("align", row.aligns),
                         ("align_bytes", row.aligns), ("prepare", row.residual)):
        assert hasattr(module, name) or not needed, name


def test_unknown_method_is_named():
    for name in ("magic", None, 3):
        with pytest.raises(ValueError, match=f"method: expected one of balanced, .* {name!r}"):
            find_method(name)


def test_table_of_the_documentation_is_the_registrys():
    assert methods_table() in (ROOT / "docs" / "rotations.md").read_text()


def test_made_up_method_is_known_to_recipes_and_commands(made_up):
    assert QuantConfig(method="made-up").method == "made-up"
    assert "made-up" in default_methods()
    for command in ("quantize", "inspect"):
        names = ["model", "out"] if command == "quantize" else ["model"]
        assert parser().parse_args([command, *names, "--method", "made-up"])


def test_made_up_method_quantizes(made_up, model, text, tmp_path):
    config = QuantConfig(method="made-up", calibration_tokens=64, weights="rtn")
    summary = sq.quantize_folder(model, tmp_path / "out", config, text)
    balanced = {site.site: site.balanced for site in summary.sites}
    assert balanced == {"qkv": True, "o": False, "gate_up": True, "down": True}
    tokens = sq.load(model).encode("the quick brown fox")[None]
    assert sq.load(tmp_path / "out").forward(tokens).shape == sq.load(model).forward(tokens).shape
    size = estimate_size(sq.load_checkpoint(model), config)
    assert size == pytest.approx(folder_bytes(tmp_path / "out"), rel=0.1)
    with pytest.raises(ValueError, match="its method, made-up, folds a balance into the weights"):
        sq.inspect_model(tmp_path / "out", original=model, calibration=text)


def test_made_up_method_compares(made_up, model, text):
    found = sq.compare(model, methods=["none", "made-up"], schemes=["w4a4"], texts=[text],
                       seq_len=32, windows=2, calibration_tokens=64)
    assert [row.error for row in found.rows if row.config] == [None] * (len(found.rows) - 1)
    assert "made-up" in found.table()


def test_made_up_method_is_inspected(made_up, model, text):
    found = sq.inspect_model(model, ["made-up"], calibration=text,
                             config=QuantConfig(calibration_tokens=64))
    steps = {row.site: [r.name for r in found.select(site=row.site, layer=0)]
             for row in found.rows}
    assert steps["o"] == ["original", "Hadamard, axis 2"]
    assert steps["qkv"] == ["original", "balance", "Hadamard, axis 2"]


@pytest.mark.parametrize("row", [m for m in METHODS.values() if not m.looks], ids=lambda m: m.name)
def test_methods_that_do_not_look_solve_the_same_from_zeros(row):
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((40, 96)).astype(np.float32)
    weight = rng.standard_normal((8, 96)).astype(np.float32)
    found = [solve_site(site_statistics(x, [w], foldable=False), row.name)
             for x, w in ((inputs, weight), (np.zeros_like(inputs[:1]), np.zeros_like(weight)))]
    for part in ("left", "right"):
        np.testing.assert_array_equal(*(getattr(r, part).matrix() for r in found))
