# SPDX-License-Identifier: Apache-2.0
"""docs/families.md: a row for every golden folder, with the blocks that it uses now."""

import shutil

import numpy as np
import pytest

import singlequant as sq
from benchmarks import families
from singlequant.models.families import FAMILIES
from singlequant.runtime.model import Model


def cells():
    """The cells of the page's table."""
    lines = families.PAGE.read_text("utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("| ").split(" | ")]
            for line in lines if line.startswith("| `")]


def test_page_has_every_golden_folder_with_its_blocks():
    found = [row[:3] for row in cells()]
    expected = [[f"`{family}`", name, "; ".join(blocks)]
                for family, name, blocks, _ in families.rows_of(families.GOLDEN)]
    assert found == expected, "run python -m benchmarks.families"
    assert {row[0].strip("`") for row in found} == set(FAMILIES)


def test_pages_errors_are_small_and_its_costs_finite():
    for row in cells():
        error, *costs = map(float, row[3:])
        assert error < 1e-3
        assert len(costs) == len(families.COLUMNS)
        assert all(0 < cost < np.inf for cost in costs)


def test_generator_writes_a_row_of_each_folder(tmp_path):
    for name in ("llama-tied", "mixtral-tied"):
        shutil.copytree(families.GOLDEN / name, tmp_path / "golden" / name)
    families.main(["--from", str(tmp_path / "golden"), "--out", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    blocks = "RMSNorm; rotary; grouped queries; gated silu"
    assert f"| `LlamaForCausalLM` | llama-tied | {blocks} |" in text
    assert "| `MixtralForCausalLM` | mixtral-tied |" in text
    assert "<!--" not in text


def test_generator_names_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="families: .*none"):
        families.main(["--from", str(tmp_path / "none"), "--out", str(tmp_path / "page.md")])


@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied", "gemma2-tied", "qwen2-moe-shared",
                                  "deepseek-v3-latent"])
def test_twin_computes_the_same_with_larger_channels(name):
    source = sq.load_checkpoint(families.GOLDEN / name)
    twin = families.OutlierTwin(source)
    windows = np.random.default_rng(0).integers(2, 260, (2, 24))
    np.testing.assert_allclose(Model(twin).forward(windows), Model(source).forward(windows),
                               atol=families.TWIN_TOLERANCE, rtol=0)
    larger = 0
    layers = zip(sq.calibrate(twin, windows), sq.calibrate(source, windows), strict=True)
    for ours, theirs in layers:
        for site, statistics in ours.sites.items():
            ratio = np.abs(statistics.max) / np.maximum(np.abs(theirs.sites[site].max), 1e-6)
            larger += ratio.max() > families.LOW / 2
    assert larger >= 2 * source.spec.layers
