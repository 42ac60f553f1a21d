# SPDX-License-Identifier: Apache-2.0
"""Sweeps over models with experts: size, time, `ignore`, resuming, saved statistics."""


import numpy as np
import pytest
from conftest import copy_golden

import singlequant as sq
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.sweep import estimate
from singlequant.sweep.calibrate import calibrate, load_statistics, save_statistics
from singlequant.sweep.estimate import dry_run

MODELS = ["qwen2-moe-shared", "deepseek-v3-latent", "gpt-oss-tied", "granitemoeshared-shared"]
TOKENS = np.arange(12).reshape(1, 12)


@pytest.fixture
def folder(request, tmp_path):
    return copy_golden(request.param, tmp_path)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"the river ran {i} miles over stones" for i in range(200)))
    return path


def config(**options):
    return sq.QuantConfig(**{"weights": "rtn", "calibration_tokens": 64, "group_size": 0} | options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("folder", MODELS, indirect=True)
@pytest.mark.parametrize("options", [{}, {"method": "none"}, {"method": "smoothquant"}])
def test_dry_run_foresees_the_size(folder, text, tmp_path, options):
    made = sq.quantize_folder(folder, tmp_path / "out", config(**options), text)
    foreseen = dry_run(folder, config(**options), text).bytes_after
    assert foreseen == pytest.approx(made.bytes_after, rel=0.07)  # headers weigh here
    assert np.isfinite(sq.load(made.out).forward(TOKENS)).all()


@pytest.mark.parametrize("folder", ["deepseek-v3-latent"], indirect=True)
def test_dry_run_goes_on_to_a_layer_with_experts(folder, text, monkeypatch):
    seen, usual = [], estimate.sweep

    def noted(*arguments, layers):
        seen.append(layers)
        return usual(*arguments, layers=layers)

    monkeypatch.setattr(estimate, "sweep", noted)
    dry_run(folder, config(), text)
    spec = load_checkpoint(folder).spec
    assert seen == [next(i for i in range(spec.layers) if spec.layer(i).experts) + 1] == [2]


@pytest.mark.parametrize("folder", ["qwen2-moe-shared"], indirect=True)
def test_ignored_expert_keeps_its_bits(folder, text, tmp_path):
    out = sq.quantize_folder(folder, tmp_path / "out", config(ignore=("*.experts.3.*",)), text).out
    source, packed = load_checkpoint(folder), load_checkpoint(out)
    for role, linear in packed.layer(1).linears.items():
        if role.endswith(".3"):
            np.testing.assert_array_equal(linear.weight, source.layer(1).linears[role].weight)
        else:
            assert isinstance(linear.weight, sq.weights.PackedLinear)


@pytest.mark.parametrize(("folder", "pattern"), [
    ("qwen2-moe-shared", "*.mlp.gate"), ("gpt-oss-tied", "*.router"),
    ("granitemoeshared-shared", "*router.layer")], indirect=["folder"])
def test_ignoring_the_router_by_name_changes_nothing(folder, text, tmp_path, pattern):
    made = [sq.quantize_folder(folder, tmp_path / name, config(ignore=ignore), text).out
            for name, ignore in (("usual", ()), ("ignored", (pattern,)))]
    usual, ignored = map(contents, made)
    shards = [name for name in usual if name.endswith(".safetensors")]
    assert [name for name in shards if usual[name] != ignored[name]] == []


@pytest.mark.parametrize("folder", ["gpt-oss-tied"], indirect=True)
def test_pattern_that_matches_nothing_shows_how_linears_are_named(folder, text, tmp_path):
    with pytest.raises(ValueError, match=r"'\*\.experts\.3\.\*' matches no linear of the model; .* "
                                         r"model\.layers\.\d\.mlp\.experts\.down_proj\.3\.down$"):
        sq.quantize_folder(folder, tmp_path / "out", config(ignore=("*.experts.3.*",)), text)


@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_resumed_run_gives_the_bytes_of_an_uninterrupted_one(folder, text, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sq.quantize_folder(folder, tmp_path / "out", config(), text, progress=stop)
    resumed = sq.quantize_folder(folder, tmp_path / "out", config(), text, resume=True)
    whole = sq.quantize_folder(folder, tmp_path / "whole", config(), text)
    assert resumed.resumed_layers == 1
    assert contents(resumed.out) == contents(whole.out)


@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_statistics_of_few_tokens_survive_saving(folder, tmp_path):
    """One token reaches `chosen` experts: the others take what these read."""
    checkpoint = load_checkpoint(folder)
    made = list(calibrate(checkpoint, TOKENS[:, :1], keep_inputs=False))
    save_statistics(made, tmp_path / "statistics")
    for layer, loaded in zip(made, load_statistics(tmp_path / "statistics"), strict=True):
        spec = checkpoint.spec.layer(layer.index)
        for name, site in spec.sites.items():
            one, other = layer.sites[name], loaded.sites[name]
            assert one.count == (1 if site.expert is None else spec.experts.chosen)
            assert one.borrowed == other.borrowed == (site.expert is not None)
            np.testing.assert_array_equal(one.sample, other.sample)
