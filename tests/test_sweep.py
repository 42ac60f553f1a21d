"""The one sweep on small checkpoints: whole folders, same bytes, resume, memory, recipes."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from blocks import SITES
from conftest import SENTENCES as TEXT
from safetensors.numpy import load_file, save_file

import singlequant as sq
from singlequant.export.packed import outer_tensors
from singlequant.methods.solve import solve_layer
from singlequant.sweep.estimate import dry_run
from singlequant.sweep.layer import quantize_layer
from singlequant.sweep.measure import PeakMemory
from singlequant.sweep.sweep import Job, sweep


def config(**changes) -> sq.QuantConfig:
    return sq.QuantConfig(**{"bits": 4, "calibration_tokens": 64, **changes})


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w4a16"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_quantized_folder_runs(make_checkpoint, tmp_path, text, scheme, architecture):
    model = make_checkpoint(tmp_path / "source", architecture=architecture, tie=False)
    out = tmp_path / "out"
    summary = sq.quantize_folder(model, out, config(scheme=scheme), text)
    original, quantized = sq.load(model), sq.load(out)
    assert quantized.checkpoint.quantized
    result = sq.perplexity(quantized, TEXT, 32, reference=original)
    # random weights: only a sanity bound; the reference model's figures are held elsewhere
    assert result.kl_mean < {"w4a4": 0.2, "w4a8": 0.1, "w4a16": 0.1}[scheme]
    assert len(summary.sites) == 8
    assert summary.bytes_after > 0
    assert "Summary('out'" in repr(summary)


@pytest.mark.parametrize("method", ["singlequant", "paper", "art", "urt", "hadamard", "duquant",
                                    "none"])
@pytest.mark.parametrize("shape", [
    {"hidden": 64, "intermediate": 96},
    {"hidden": 60, "heads": 2, "kv_heads": 1, "head_dim": 22, "intermediate": 53},
])
def test_high_precision_activations_keep_the_function(make_checkpoint, tmp_path, text, method,
                                                      shape):
    model = make_checkpoint(tmp_path / "source", dtype="float32", bias=True, **shape)
    out = tmp_path / "out"
    sq.quantize_folder(model, out, config(method=method, scheme="w4a16", ignore=("*.down_proj",)),
                       text)
    result = sq.perplexity(sq.load(out), TEXT, 32, reference=sq.load(model))
    assert result.kl_mean < 0.3  # a wrong rotation gives several nats
    assert result.top1_agreement > 0.75


def test_same_input_gives_the_same_bytes_at_any_thread_count(model, tmp_path, text):
    for threads in (1, 2, 5):
        sq.set_num_threads(threads)
        sq.quantize_folder(model, tmp_path / f"out{threads}", config(), text)
    assert digests(tmp_path / "out1") == digests(tmp_path / "out2") == digests(tmp_path / "out5")


def test_stages_chained_by_hand_give_the_same_folder(model, tmp_path, text):
    sq.quantize_folder(model, tmp_path / "a", config(bits=4.85), text)
    checkpoint = sq.load_checkpoint(model)
    windows = sq.calibration_windows(checkpoint, config(), text)
    given, bits = sq.assign_bits(checkpoint, config(bits=4.85), windows)
    statistics = sq.calibrate(checkpoint, windows, bits=given.calibration_bits)
    layers = sq.quantize(checkpoint, sq.solve_rotations(statistics, given), given, bits)
    sq.save(layers, tmp_path / "b", checkpoint, given)
    a, b = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert {k: v for k, v in a.items() if k != "recipe.json"} == {
        k: v for k, v in b.items() if k != "recipe.json"
    }
    message = f"bits: config.bits is {given.bits:g}: expected what assign_bits"
    with pytest.raises(ValueError, match=message):
        sq.quantize(checkpoint, [], given)


def test_recipe_beside_the_result_makes_it_again(model, tmp_path, text):
    used = config(scheme="w4a8", group_size=32, seed=3, ignore=("*.q_proj",))
    sq.quantize_folder(model, tmp_path / "a", used, text)
    again = sq.QuantConfig.from_file(tmp_path / "a" / "recipe.json")
    assert again == used.settled(tied=True)
    sq.quantize_folder(model, tmp_path / "b", again, text)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_recipe_with_another_text_is_refused(make_checkpoint, model, tmp_path, text):
    sq.quantize_folder(model, tmp_path / "a", config(), text)
    recipe = tmp_path / "a" / "recipe.json"
    other = tmp_path / "other.txt"
    other.write_text("another text altogether, as long as it must be. " * 100)
    message = r"recipe\.json: it was made with another calibration text \(sha256 [0-9a-f]{64}\)"
    with pytest.raises(ValueError, match=message):
        sq.quantize_folder(model, tmp_path / "b", config(), other, recipe=recipe)
    assert not (tmp_path / "b").exists()
    sq.quantize_folder(model, tmp_path / "b", config(), text, recipe=recipe)
    # tokens chosen in another way, another model and options alone have no text to agree with
    sq.quantize_folder(model, tmp_path / "c", config(seed=1), other, recipe=recipe)
    fine_tuned = make_checkpoint(tmp_path / "fine-tuned", seed=1)
    sq.quantize_folder(fine_tuned, tmp_path / "d", config(), other, recipe=recipe)
    recipe.write_text(json.dumps(config().to_json()))
    sq.quantize_folder(model, tmp_path / "e", config(), other, recipe=recipe)


@pytest.mark.parametrize("tensor", [
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.mlp.down_proj.bias",
    "model.layers.1.self_attn.q_proj.bias",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_never_reach_out(make_checkpoint, tmp_path, text, tensor, value):
    model = make_checkpoint(tmp_path / "model", bias=True, tie=False)
    tensors = load_file(model / "model.safetensors")
    tensors[tensor].reshape(-1)[-1] = value
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match=f"^{re.escape(tensor.removesuffix('.weight'))}"):
        sq.quantize_folder(model, tmp_path / "out", config(ignore=("*.down_proj",)), text)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists() == ("layers.1" in tensor)  # layer 0 is finished


@pytest.mark.parametrize("run", [
    lambda model, out, *rest: sq.quantize_folder(model, out, *rest),
    lambda model, out, *rest: dry_run(model, *rest),
])
def test_what_cannot_be_made_is_refused_before_the_text_is_read(model, tmp_path, text, run):
    sq.quantize_folder(model, tmp_path / "packed", config(), text)
    missing, out = tmp_path / "no.txt", tmp_path / "out"
    with pytest.raises(ValueError, match=r"checkpoint: expected an unquantized model, .*/packed\)"):
        run(tmp_path / "packed", out, config(), missing)
    with pytest.raises(ValueError, match=r"ignore: 'no\*' matches no linear of the model"):
        run(model, out, config(ignore=("no*",)), missing)


def test_calibration_windows_fit_the_model(make_checkpoint, tmp_path, text):
    checkpoint = sq.load_checkpoint(make_checkpoint(tmp_path / "short"))
    limit = checkpoint.spec.max_position_embeddings
    assert limit < 512
    assert sq.calibration_windows(checkpoint, sq.QuantConfig(), text).shape[1] == limit


def test_ignored_linears_keep_their_bits(model, tmp_path, text):
    sq.quantize_folder(model, tmp_path / "out", config(ignore=("model.layers.1.*",)), text)
    before, after = sq.load_checkpoint(model), sq.load_checkpoint(tmp_path / "out")
    for role, linear in after.layer(1).linears.items():
        np.testing.assert_array_equal(linear.weight, before.layer(1).linears[role].weight)


def test_ignoring_the_head_by_name_changes_nothing(model, tmp_path, text):
    sq.quantize_folder(model, tmp_path / "out", config(ignore=("lm_head",)), text)
    layer = sq.load_checkpoint(tmp_path / "out").layer(0)
    assert all(isinstance(linear.weight, sq.PackedLinear) for linear in layer.linears.values())


def test_cancelling_keeps_the_finished_layers(model, tmp_path, text):
    def cancel(done, total):
        raise RuntimeError("cancelled")

    with pytest.raises(RuntimeError, match="cancelled; 1 finished layer is in .*--resume"):
        sq.quantize_folder(model, tmp_path / "out", config(), text, progress=cancel)
    assert not (tmp_path / "out").exists()
    resumed = sq.quantize_folder(model, tmp_path / "out", config(), text, resume=True)
    assert resumed.resumed_layers == 1


def test_resume_solves_the_rest_to_the_bytes_of_an_uninterrupted_run(
    model, tmp_path, text, monkeypatch
):
    def stop_after_one(done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sq.quantize_folder(model, tmp_path / "out", config(), text, progress=stop_after_one)
    assert not (tmp_path / "out").exists()
    first = (tmp_path / "out.partial" / "model-00002-of-00003.safetensors").stat().st_mtime_ns
    rotate, solved, seen = sys.modules["singlequant.methods.solve"], [], []
    solve = rotate.solve_site
    monkeypatch.setattr(rotate, "solve_site", lambda *a: solved.append(1) or solve(*a))
    summary = sq.quantize_folder(model, tmp_path / "out", config(), text, resume=True,
                                 progress=lambda *done: seen.append(done))
    assert len(solved) == len(SITES)  # one layer of two
    assert summary.resumed_layers == 1
    assert [(s.layer, s.site) for s in summary.sites] == [(1, site) for site in SITES]
    assert seen == [(1, 2), (2, 2)]
    written = (tmp_path / "out" / "model-00002-of-00003.safetensors").stat().st_mtime_ns
    assert written == first
    assert sq.quantize_folder(model, tmp_path / "whole", config(), text).resumed_layers == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_resume_with_another_text_is_refused(model, tmp_path, text):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sq.quantize_folder(model, tmp_path / "out", config(), text, progress=stop)
    text.write_text("another text altogether, as long as it must be. " * 100)
    with pytest.raises(ValueError, match="calibration"):
        sq.quantize_folder(model, tmp_path / "out", config(), text, resume=True)


@pytest.mark.slow
def test_killed_run_leaves_at_most_the_partial_folder(make_checkpoint, tmp_path, text):
    model = make_checkpoint(tmp_path / "big", hidden=512, intermediate=1024, layers=12)
    out = tmp_path / "out"
    run = subprocess.Popen(
        [sys.executable, "-m", "singlequant", "quantize", model, out, "--calibration", text,
         "--calibration-tokens", "64"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "out.partial" / "model-00002-of-00013.safetensors").exists():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not out.exists()
    sq.quantize_folder(model, out, sq.QuantConfig(calibration_tokens=64), text, resume=True)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["scheme"] == "w4a8"


def test_dry_run_writes_nothing_and_tells_the_size(model, tmp_path, text):
    before = set(tmp_path.iterdir())
    estimate = dry_run(model, config(), text)
    assert set(tmp_path.iterdir()) == before
    summary = sq.quantize_folder(model, tmp_path / "out", config(), text)
    assert abs(estimate.bytes_after - summary.bytes_after) <= 0.05 * summary.bytes_after
    assert estimate.bytes_before == summary.bytes_before
    assert estimate.seconds > 0


def test_dry_run_counts_embedding_and_head(model, text, monkeypatch):
    asked = []

    def slow(tensors, bits):
        asked.append(bits)
        time.sleep(1)
        return outer_tensors(tensors, bits)

    monkeypatch.setattr("singlequant.sweep.estimate.outer_tensors", slow)
    recipe = config(head_bits=6)
    assert dry_run(model, recipe, text).seconds > 1
    assert asked == [recipe.table_bits(sq.load_checkpoint(model).spec)]
    assert 6 in asked[0].values()


def test_peak_memory_sees_an_allocation():
    with PeakMemory() as memory:
        block = np.ones(20_000_000)
        memory.look()  # the watching thread may be late on a busy machine
        del block
    assert 120e6 < memory.peak - memory.start < 400e6


def test_peak_memory_watches_by_itself():
    with PeakMemory() as memory:
        block = np.ones(20_000_000)
        deadline = time.monotonic() + 60
        while memory.peak - memory.start < 120e6 and time.monotonic() < deadline:
            time.sleep(0.01)
        del block
    assert memory.peak - memory.start > 120e6


@pytest.mark.parametrize("options", [
    {}, {"method": "quarot"}, {"method": "smoothquant"}, {"method": "duquant"},
    {"ignore": ("*.down_proj", "*.up_proj")}, {"method": "none", "ignore": ("*.down_proj",)}])
def test_dry_run_foresees_the_size(tmp_path, options):
    config = sq.QuantConfig(weights="rtn", calibration_tokens=64, **options)
    made = sq.quantize_folder(sq.bundled_model(), tmp_path / "out", config)
    assert dry_run(sq.bundled_model(), config).bytes_after == pytest.approx(
        made.bytes_after, rel=0.03)


def test_spinquant_without_torch_says_what_to_install(model, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    config = sq.QuantConfig(method="spinquant", calibration_tokens=64)
    with pytest.raises(ImportError, match=r"pip install 'singlequant\[torch\]'"):
        sq.quantize_folder(model, tmp_path / "out", config, text)
    assert not list(tmp_path.glob("out*"))


# ---- jobs side by side ------------------------------------------------------------------------


def windows_of(model, text):
    checkpoint = sq.load_checkpoint(model)
    return checkpoint, sq.calibration_windows(checkpoint, config(), text)


def test_jobs_side_by_side_give_the_folders_of_one_by_one(model, tmp_path, text):
    checkpoint, windows = windows_of(model, text)
    configs = [config(method=m, weights=w) for m in ("none", "urt") for w in ("rtn", "gptq")]
    jobs = [Job(c, tmp_path / f"job{i}") for i, c in enumerate(configs)]
    outcomes = sweep(checkpoint, windows, jobs)
    for i, (outcome, alone) in enumerate(zip(outcomes, configs, strict=True)):
        sq.quantize_folder(model, tmp_path / f"alone{i}", alone, text)
        assert digests(tmp_path / f"job{i}") == digests(tmp_path / f"alone{i}")
        assert outcome.error is None
        assert min(outcome.seconds.values()) > 0
        assert outcome.peak_memory > 0


def test_job_takes_a_solver_a_rounding_and_an_observer(model, tmp_path, text):
    checkpoint, windows = windows_of(model, text)
    solved, rounded, seen = [], [], []

    def solver(statistics):
        solved.append(statistics.index)
        return solve_layer(statistics, "hadamard")

    def rounding(view, rotations, config):
        rounded.append(rotations.layer)
        return quantize_layer(view, rotations, config)

    def observer(statistics, layer):
        seen.append((statistics.index, layer.index))

    own = Job(config(method="none"), tmp_path / "own", solve=solver, quantize=rounding)
    sweep(checkpoint, windows, [own, Job(config(), solve=solver, observe=observer)])
    assert solved == [0, 1]  # once for both jobs
    assert rounded == [0, 1]
    assert seen == [(0, 0), (1, 1)]
    sq.quantize_folder(model, tmp_path / "hadamard", config(method="hadamard"), text)
    for name, found in digests(tmp_path / "hadamard").items():
        if name.endswith(".safetensors"):
            assert digests(tmp_path / "own")[name] == found
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "hadamard", "model", "own"]


def test_failure_ends_its_own_job(model, tmp_path, text):
    checkpoint, windows = windows_of(model, text)

    def broken(statistics):
        raise ArithmeticError("no rotation\nat all")

    jobs = [Job(config(), tmp_path / "bad", solve=broken), Job(config(), tmp_path / "good")]
    bad, good = sweep(checkpoint, windows, jobs, failures=(ArithmeticError,))
    assert bad.error == "no rotation at all"
    assert good.error is None
    assert (tmp_path / "good" / "recipe.json").is_file()
    assert not list(tmp_path.glob("bad*"))
    with pytest.raises(ArithmeticError, match="no rotation"):
        sweep(checkpoint, windows, jobs[:1])
    assert not list(tmp_path.glob("bad*"))


def test_sweep_of_some_layers_writes_no_folder(model, tmp_path, text):
    checkpoint, windows = windows_of(model, text)
    seen = []
    job = Job(config(), tmp_path / "out", observe=lambda _, layer: seen.append(layer.index))
    sweep(checkpoint, windows, [job], layers=1)
    assert seen == [0]
    assert not list(tmp_path.glob("out*"))


def test_old_name_of_calibration_windows_warns(model, text):
    checkpoint, windows = windows_of(model, text)
    with pytest.warns(DeprecationWarning, match="calibration_windows"):
        old = sq.calibration_tokens
    np.testing.assert_array_equal(old(checkpoint, config(), text), windows)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sq.nothing
