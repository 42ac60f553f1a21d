# SPDX-License-Identifier: Apache-2.0
"""The packed folder: what goes in comes out, it is whole or absent, and lies are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import pack_codes, random_factor, random_layer, write_json
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from singlequant import _C
from singlequant._C import FormatError
from singlequant.checkpoint.folder import Checkpoint, load_checkpoint
from singlequant.config import QuantConfig
from singlequant.export.writer import ModelWriter, estimate_size
from singlequant.rotations import Factor, SiteRotation
from singlequant.weights import PackedLinear

ORDERS = {"qkv": (8, 8), "o": (4, 16), "gate_up": (8, 8), "down": (12, 8)}
CONFIG = QuantConfig()
Q0 = "model.layers.0.self_attn.q_proj"
NORM = "model.layers.0.input_layernorm.weight"


def write(source: Checkpoint, out: Path, config: QuantConfig = CONFIG, **options: Any) -> list[Any]:
    """Writes random layers to out; returns (QuantizedLayer, codes) of each."""
    layers = [random_layer(source, config, i, **options) for i in range(source.spec.layers)]
    with ModelWriter(out, source, config) as writer:
        for layer, _ in layers:
            writer.write_layer(layer)
        assert writer.finish() == out
    return layers


@pytest.fixture
def source(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Checkpoint:
    return load_checkpoint(make_checkpoint(tmp_path / "model"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


# ---- round trip ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w4a16"])
def test_written_folder_reads_back(make_checkpoint, tmp_path, out, dtype, group_size, scheme):
    path = make_checkpoint(tmp_path / "model", dtype=dtype, tie=False, bias=True)
    source = load_checkpoint(path)
    config = QuantConfig(scheme=scheme, group_size=group_size, ignore=("model.layers.1.mlp.*",))
    clips = {"qkv": 0.75, "o": config.activation_clip}
    layers = write(source, out, config, orders=ORDERS, clips=clips)

    packed = load_checkpoint(out)
    assert packed.quantized
    assert packed.spec == source.spec
    assert packed.quant_config.activation_bits == config.activation_bits
    assert packed.quant_config.group_size == group_size
    assert packed.quant_config.ignore == config.ignore
    outer = [(c.embedding, c.head, c.final_norm.weight) for c in (packed, source)]
    for found, expected in zip(*outer, strict=True):
        assert found.tobytes() == expected.tobytes()
        assert found.dtype == expected.dtype
    for i, (layer, _) in enumerate(layers):
        found = packed.layer(i)
        for linear in found.linears.values():
            assert linear.bias.tobytes() == layer.dense[f"{linear.name}.bias"].tobytes()
            if linear.name in layer.packed:
                given = layer.packed[linear.name]
                np.testing.assert_array_equal(linear.weight.words, given.words)
                np.testing.assert_array_equal(linear.weight.scales, given.scales)
                assert (linear.weight.shape, linear.weight.group) == (given.shape, given.group)
            else:
                assert i == 1
                given = layer.dense[f"{linear.name}.weight"]
                assert linear.weight.tobytes() == given.tobytes()
        for site, rotation in layer.rotations.items():
            left, right = found.rotations[site].parts
            np.testing.assert_array_equal(left, rotation.left.runtime())
            np.testing.assert_array_equal(right, rotation.right.runtime())
            assert right.flags.c_contiguous
        assert found.clips["qkv"] == 0.75
        assert found.clips["down"] == config.activation_clip


def test_large_factors_come_back_as_chains(make_checkpoint, tmp_path, out):
    source = load_checkpoint(make_checkpoint(tmp_path / "model", intermediate=1042, layers=1))
    ((layer, _),) = write(source, out, orders={"down": (521, 2)})
    left, right = load_checkpoint(out).layer(0).rotations["down"].parts
    order, hadamard, pairs, angles = left
    assert (order, hadamard) == (521, True)
    np.testing.assert_array_equal(pairs, layer.rotations["down"].left.pairs)
    np.testing.assert_array_equal(angles, layer.rotations["down"].left.angles)
    assert right.shape == (2, 2)


def test_sites_without_a_rotation_have_none(source, out):
    config = QuantConfig(method="none")
    identity = SiteRotation(Factor.identity(8), Factor.identity(8))
    layer, _ = random_layer(source, config, 0)
    with_identity = type(layer)(0, layer.packed, layer.dense, {"qkv": identity})
    with ModelWriter(out, source, config) as writer:
        writer.write_layer(with_identity)
        writer.write_layer(random_layer(source, config, 1)[0])
        writer.finish()
    assert load_checkpoint(out).layer(0).rotations == {}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert not [name for name in index["weight_map"] if "rotations" in name]


@pytest.mark.parametrize("k", [90, 89])
def test_odd_widths_pad_the_last_word(make_checkpoint, tmp_path, out, k):
    source = load_checkpoint(make_checkpoint(tmp_path / "model", intermediate=k))
    layers = write(source, out)
    down = load_checkpoint(out).layer(0).linears["down"].weight
    assert down.words.shape == (64, 12)
    assert down.shape == (64, k)
    np.testing.assert_array_equal(
        down.words, pack_codes(layers[0][1]["model.layers.0.mlp.down_proj"])
    )


def test_same_input_gives_the_same_bytes(source, tmp_path):
    write(source, tmp_path / "a", orders=ORDERS)
    write(source, tmp_path / "b", orders=ORDERS)
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_folder_is_one_other_tools_can_read(source, out):
    """Shards open in the safetensors library, the index is complete, small files are copied."""
    write(source, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    total = 0
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(out / file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        assert set(tensors) == {n for n, f in index["weight_map"].items() if f == file}
        with safe_open(out / file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == total
    assert len(list(out.glob("model-*-of-00003.safetensors"))) == 3
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source.path / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["format_version"] == 2
    assert config == source.config
    recipe = json.loads((out / "recipe.json").read_text())
    assert QuantConfig.from_json(recipe["config"]) == CONFIG
    assert recipe["source_sha256"] == source.fingerprint


@pytest.mark.parametrize("config", [CONFIG, QuantConfig(group_size=32, ignore=("*.o_proj",))])
def test_estimated_size_is_the_size(make_checkpoint, tmp_path, out, config):
    source = load_checkpoint(
        make_checkpoint(tmp_path / "model", hidden=256, intermediate=512, tie=False)
    )
    sites = ("qkv", "o", "gate_up", "down")
    orders = {site: _C.factor_sizes(source.spec.layer(0).sites[site].k) for site in sites}
    write(source, out, config, orders=orders)
    size = sum(file.stat().st_size for file in out.iterdir())
    assert estimate_size(source, config) == pytest.approx(size, rel=0.03)


def test_factor_matrix_is_hadamard_then_chain():
    rng = np.random.default_rng(0)
    factor = random_factor(rng, 12)
    expected = _C.hadamard_matrix(12)
    for (i, j), angle in zip(factor.pairs, factor.angles, strict=True):
        c, s = np.cos(angle), np.sin(angle)
        expected[i], expected[j] = (
            c * expected[i] - s * expected[j],
            s * expected[i] + c * expected[j],
        )
    np.testing.assert_allclose(factor.matrix(), expected, atol=1e-13)
    np.testing.assert_allclose(factor.matrix() @ factor.matrix().T, np.eye(12), atol=1e-13)
    assert factor.runtime().dtype == np.float32
    assert random_factor(rng, 513).runtime()[0] == 513


@pytest.mark.parametrize(
    ("order", "pairs", "angles", "message"),
    [
        (4, [[0, 4]], [0.1], "expected indices from 0 to 3, found 0 to 4"),
        (4, [[-1, 2]], [0.1], "found -1 to 2"),
        (4, [[2, 2]], [0.1], "two different indices"),
        (4, [[0, 1]], [np.nan], "finite angles"),
        (4, [[0, 1]], [0.1, 0.2], r"expected pairs \[steps, 2\]"),
        (0, [], [], "order of at least 1"),
    ],
)
def test_factor_refuses_what_is_no_chain(order, pairs, angles, message):
    with pytest.raises(ValueError, match=message):
        Factor(order, False, np.array(pairs, np.int32), np.array(angles))


# ---- whole or absent ----------------------------------------------------------------------------


def test_existing_out_is_refused_and_untouched(source, out):
    out.mkdir()
    (out / "mine").write_text("keep")
    with (
        pytest.raises(FileExistsError, match="out already exists"),
        ModelWriter(out, source, CONFIG),
    ):
        pass
    assert [file.name for file in out.iterdir()] == ["mine"]
    assert not partial(out).exists()


def stop_after_layer_0(
    source: Checkpoint, out: Path, config: QuantConfig, error: BaseException, **options: Any
) -> None:
    with ModelWriter(out, source, config, **options) as writer:
        writer.write_layer(random_layer(source, config, 0)[0])
        assert writer.finished_layers() == {0}
        raise error


def test_exception_in_a_resumed_run_keeps_the_partial(source, out):
    interrupt(source, out)
    with (
        pytest.raises(RuntimeError, match="stop"),
        ModelWriter(out, source, CONFIG, resume=True),
    ):
        raise RuntimeError("stop")
    assert not out.exists()
    with ModelWriter(out, source, CONFIG, resume=True) as writer:
        assert writer.finished_layers() == {0}


def test_exception_leaves_nothing(source, out):
    with pytest.raises(RuntimeError, match="stop"):
        stop_after_layer_0(source, out, CONFIG, RuntimeError("stop"))
    assert not out.exists()
    assert not partial(out).exists()


def test_exception_removes_the_parents_it_made_and_no_others(source, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError, match="stop"):
        stop_after_layer_0(source, tmp_path / "mine/a/b/out", CONFIG, RuntimeError("stop"))
    assert list((tmp_path / "mine").iterdir()) == []
    write(source, tmp_path / "mine/a/b/out")
    with pytest.raises(RuntimeError, match="stop"):
        stop_after_layer_0(source, tmp_path / "mine/a/b/again", CONFIG, RuntimeError("stop"))
    assert [f.name for f in (tmp_path / "mine/a/b").iterdir()] == ["out"]


def test_parents_stay_for_an_interrupted_run(source, tmp_path):
    interrupt(source, tmp_path / "a" / "out")
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["out.partial"]


def test_symbolic_link_to_nothing_counts_as_existing(source, out):
    out.symlink_to("nowhere")
    with (
        pytest.raises(FileExistsError, match="out already exists"),
        ModelWriter(out, source, CONFIG),
    ):
        pass
    assert not partial(out).exists()
    out.unlink()
    with ModelWriter(out, source, CONFIG) as writer:
        for i in range(2):
            writer.write_layer(random_layer(source, CONFIG, i)[0])
        out.symlink_to("nowhere")
        with pytest.raises(FileExistsError, match="out already exists"):
            writer.finish()


@pytest.mark.parametrize("name", ["", ".", "/", "a/.."])
def test_out_without_a_name_is_refused(source, name):
    with pytest.raises(ValueError, match="OUT: expected the name of a new folder, found '"):
        ModelWriter(Path(name), source, CONFIG)


def test_out_inside_the_model_is_refused(source, tmp_path):
    (tmp_path / "link").symlink_to(source.path)
    for out in (source.path / "out", source.path / "a" / "out", tmp_path / "link" / "out"):
        with pytest.raises(ValueError, match=r"OUT: expected a folder outside of .*model, found"):
            ModelWriter(out, source, CONFIG)
    with (
        pytest.raises(FileExistsError, match="model already exists"),
        ModelWriter(source.path, source, CONFIG),
    ):
        pass


def test_finish_wants_all_layers(source, out):
    with ModelWriter(out, source, CONFIG) as writer:
        writer.write_layer(random_layer(source, CONFIG, 0)[0])
        with pytest.raises(ValueError, match=r"layers not written: 1 \(a generator gives"):
            writer.finish()
    assert not out.exists()
    assert not partial(out).exists()


def interrupt(source: Checkpoint, out: Path, config: QuantConfig = CONFIG, **options: Any) -> None:
    """A run that Ctrl-C ends after layer 0."""
    with pytest.raises(KeyboardInterrupt):
        stop_after_layer_0(source, out, config, KeyboardInterrupt(), **options)
    assert partial(out).exists()
    assert not out.exists()


def test_interrupted_run_resumes_to_the_same_bytes(source, tmp_path, out):
    interrupt(source, out)
    with ModelWriter(out, source, CONFIG, resume=True) as writer:
        assert writer.finished_layers() == {0}
        writer.write_layer(random_layer(source, CONFIG, 1)[0])
        writer.finish()
    write(source, tmp_path / "straight")
    for file in (tmp_path / "straight").iterdir():
        assert file.read_bytes() == (out / file.name).read_bytes()
    assert not partial(out).exists()


def test_truncated_layer_is_not_finished(source, out):
    interrupt(source, out)
    shard = partial(out) / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with ModelWriter(out, source, CONFIG, resume=True) as writer:
        assert writer.finished_layers() == set()


@pytest.mark.parametrize(
    ("config", "provenance", "message"),
    [
        (QuantConfig(seed=1), {}, "cannot resume: config.seed: expected 1, found 0"),
        (CONFIG, {"text": "b"}, "cannot resume: provenance.text: expected 'b', found 'a'"),
    ],
)
def test_resume_refuses_another_recipe(source, out, config, provenance, message):
    interrupt(source, out, provenance={"text": "a"})
    with (
        pytest.raises(ValueError, match=message),
        ModelWriter(out, source, config, resume=True, provenance={"text": "a", **provenance}),
    ):
        pass
    assert partial(out).exists()


def test_resume_refuses_another_model(make_checkpoint, tmp_path, source, out):
    interrupt(source, out)
    other = load_checkpoint(make_checkpoint(tmp_path / "other", seed=9))
    with (
        pytest.raises(ValueError, match="cannot resume: source_sha256"),
        ModelWriter(out, other, CONFIG, resume=True),
    ):
        pass


def test_stale_partial_is_started_again_without_resume(source, out):
    interrupt(source, out, QuantConfig(seed=1))
    with ModelWriter(out, source, CONFIG) as writer:
        assert writer.finished_layers() == set()
        assert not (partial(out) / "model-00002-of-00003.safetensors").exists()


def test_foreign_partial_is_never_removed(source, out):
    partial(out).mkdir()
    (partial(out) / "thesis.txt").write_text("years")
    with (
        pytest.raises(ValueError, match=r"found no recipe\.json: remove it yourself"),
        ModelWriter(out, source, CONFIG),
    ):
        pass
    assert (partial(out) / "thesis.txt").read_text() == "years"


def test_two_runs_do_not_share_a_partial(source, out):
    with ModelWriter(out, source, CONFIG) as writer:
        with (
            pytest.raises(ValueError, match="in use by another run"),
            ModelWriter(out, source, CONFIG),
        ):
            pass
        for i in range(2):
            writer.write_layer(random_layer(source, CONFIG, i)[0])
        writer.finish()
    assert load_checkpoint(out).quantized


CHILD = """
import os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import random_layer
from singlequant.config import QuantConfig
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.export.writer import ModelWriter
source, config = load_checkpoint({model!r}), QuantConfig()
layers = [random_layer(source, config, i)[0] for i in range(2)]
with ModelWriter({out!r}, source, config) as writer:
    writer.write_layer(layers[0])
    {act}
    writer.write_layer(layers[1])
    writer.finish()
"""


def run_child(source: Checkpoint, out: Path, act: str) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).resolve().parent
    code = CHILD.format(tests=str(tests), model=str(source.path), out=str(out), act=act)
    path = os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_full_disk_leaves_nothing(source, out):
    """A limit on the size of files makes write() fail as a full disk does."""
    done = run_child(source, out, "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))")
    assert done.returncode == 1
    shard = partial(out) / "model-00003-of-00003.safetensors"
    assert f"OSError: [Errno 27] File too large: '{shard}'" in done.stderr
    assert not out.exists()
    assert not partial(out).exists()


def test_killed_run_leaves_a_partial_that_resumes(source, out):
    done = run_child(source, out, "os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    with ModelWriter(out, source, CONFIG, resume=True) as writer:
        assert writer.finished_layers() == {0}
        writer.write_layer(random_layer(source, CONFIG, 1)[0])
        writer.finish()
    assert load_checkpoint(out).layer(1).linears["q"].weight.shape == (64, 64)


# ---- what the writer refuses --------------------------------------------------------------------


def test_group_size_that_divides_no_row_is_refused_before_any_work(source, out):
    config = QuantConfig(group_size=64)
    with pytest.raises(ValueError, match=r"divisor of model\.layers\.0\.mlp\.down_proj's 96"):
        ModelWriter(out, source, config)
    ModelWriter(out, source, QuantConfig(group_size=64, ignore=("*.down_proj",)))
    assert not partial(out).exists()


def test_pattern_that_matches_no_linear_is_refused_before_any_work(source, out):
    config = QuantConfig(ignore=("*.q_proj", "nomatch*"))
    with pytest.raises(ValueError, match=r"ignore: 'nomatch\*' matches no linear of the model"):
        ModelWriter(out, source, config)


def test_packed_model_is_not_packed_again(source, out, tmp_path):
    write(source, out)
    with pytest.raises(ValueError, match="expected an unquantized model"):
        ModelWriter(tmp_path / "again", load_checkpoint(out), CONFIG)


def test_layer_that_is_not_the_models_is_refused(source, out):
    layer, _ = random_layer(source, CONFIG, 0)
    make = type(layer)
    packed = {name: linear for name, linear in layer.packed.items() if name != Q0}
    short = PackedLinear(np.zeros((8, 8), np.int32), np.ones((8, 1), np.float32), (8, 64), 0)
    ids = layer.dense[NORM].astype(np.int32)
    wrong = SiteRotation(Factor.identity(8), random_factor(np.random.default_rng(0), 4))
    cases = [
        (make(0, packed, layer.dense, {}), rf"{Q0}: expected \(64, 64\), found none"),
        (make(0, {**packed, Q0: short}, layer.dense, {}), rf"{Q0}: .* found \(8, 64\)"),
        (make(0, layer.packed, {}, {}), "input_layernorm.weight: .* found none"),
        (make(0, layer.packed, {**layer.dense, NORM: ids}, {}), f"{NORM}: expected .* found int32"),
        (make(0, layer.packed, {**layer.dense, "x": np.ones(2)}, {}), "x: expected no such"),
        (make(0, layer.packed, layer.dense, {"o": wrong}), "o: expected a rotation of 64 inputs"),
        (make(2, layer.packed, layer.dense, {}), "layer: expected 0 to 1, found 2"),
        (make(0, layer.packed, layer.dense, {"qk": wrong}), "rotations: expected .* found 'qk'"),
    ]
    with ModelWriter(out, source, CONFIG) as writer:
        for bad, message in cases:
            with pytest.raises(ValueError, match=message):
                writer.write_layer(bad)


# ---- packed folders that lie --------------------------------------------------------------------


@pytest.fixture
def packed(source: Checkpoint, out: Path) -> Path:
    write(source, out, orders=ORDERS, clips={"qkv": 0.5})
    return out


def edit_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or removes tensors of layer 0's shard and its index."""
    shard = folder / "model-00002-of-00003.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = load_file(shard)
    for name, value in changes.items():
        tensors.pop(name, None)
        index["weight_map"].pop(name, None)
        if value is not None:
            tensors[name] = value
            index["weight_map"][name] = shard.name
    save_file(tensors, shard)
    write_json(folder / "model.safetensors.index.json", index)


LEFT = "model.layers.0.rotations.qkv.left"
CLIP = "model.layers.0.activations.qkv.clip"
HIGH = "model.layers.0.activations.qkv.high"
NAN = np.full((64, 1), np.nan, np.float32)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{Q0}.weight_packed", np.zeros((64, 8), np.int64), "expected dtype I32, found I64"),
        (f"{Q0}.weight_packed", np.zeros((64, 9), np.int32), r"\[64, 8\], found \[64, 9\]"),
        (f"{Q0}.weight_packed", None, "q_proj.weight: missing tensor"),
        (f"{Q0}.weight_scale", None, "q_proj.weight_scale: missing tensor"),
        (f"{Q0}.weight_scale", np.ones((64, 2), np.float32), r"shape \[64, 1\], found \[64, 2\]"),
        (f"{Q0}.weight_scale", NAN, "expected finite scales of at least 0"),
        (f"{Q0}.weight_scale", -np.ones((64, 1), np.float32), "expected finite scales"),
        (f"{Q0}.weight_shape", np.array([64, 63]), r"weight_shape: expected \[64, 64\]"),
        (f"{Q0}.weight", np.zeros((64, 64), np.float16), "weight or weight_packed, found both"),
        (LEFT, np.ones((8, 8), np.float32), "expected an orthogonal matrix"),
        (LEFT, np.full((8, 8), np.nan, np.float32), "expected an orthogonal matrix"),
        (LEFT, np.full((8, 8), 1e30, np.float32), "expected an orthogonal matrix"),
        (LEFT, np.eye(4, dtype=np.float32), "orders whose product is 64, found 4 x 8"),
        (LEFT, np.ones((8, 4), np.float32), r"expected shape \[8, 8\], found \[8, 4\]"),
        (LEFT, np.array(1, np.float32), r"left: expected shape \[1, 1\]"),
        (LEFT, np.eye(8), "expected dtype F32, found F64"),
        (LEFT, np.eye(513, dtype=np.float32), "an order of at most 512, found 513"),
        (LEFT, None, "rotations.qkv.right: unexpected tensor"),
        (LEFT.replace("left", "right"), None, "rotations.qkv.right: missing tensor"),
        (LEFT.replace("qkv", "kv"), np.eye(8, dtype=np.float32), "unexpected tensor"),
        (LEFT + "_chain", np.array([8, 1]), "left_pairs: missing tensor"),
        (CLIP, np.array([1.5], np.float32), r"clip: expected a number in \(0, 1\], found 1\.5"),
        (CLIP, np.array([np.nan], np.float32), "clip: expected a number"),
        (CLIP, np.ones(2, np.float32), r"expected shape \[1\], found \[2\]"),
        (HIGH, np.array([16]), "qkv.high: expected a multiple of 32 below 64, found 16"),
        (HIGH, np.array([64]), "qkv.high: expected a multiple of 32 below 64, found 64"),
        (HIGH, np.array([-32]), "qkv.high: expected a multiple of 32 below 64, found -32"),
        (HIGH, np.array([2**62]), "qkv.high: expected a multiple of 32 below 64"),
        (HIGH, np.array([32], np.int32), "qkv.high: expected dtype I64, found I32"),
        (HIGH, np.array([32.0]), "qkv.high: expected dtype I64, found F64"),
        (HIGH, np.array(32), r"expected shape \[1\], found \[\]"),
        (HIGH, np.array([32, 32]), r"expected shape \[1\], found \[2\]"),
        (HIGH, np.zeros(0, np.int64), r"expected shape \[1\], found \[0\]"),
        (HIGH.replace("qkv", "kv"), np.array([32]), "unexpected tensor"),
        (HIGH.replace("0.a", "2.a"), np.array([32]), "unexpected tensor"),
    ],
)
def test_packed_tensors_that_lie_are_refused(packed, name, value, message):
    edit_tensors(packed, **{name: value})
    with pytest.raises(FormatError, match=message):
        load_checkpoint(packed).layer(0)


@pytest.mark.parametrize(
    ("config", "high", "message"),
    [
        (QuantConfig(scheme="w4a8"), 32, "qkv.high: expected 0 with w4a8, found 32"),
        (QuantConfig(scheme="w4a16"), 32, "qkv.high: expected 0 with w4a16, found 32"),
        (QuantConfig(group_size=64), 32, "qkv.high: expected a multiple of 64 below 128, found 32"),
        (QuantConfig(group_size=64), 128, "qkv.high: expected a multiple of 64 below 128"),
    ],
)
def test_high_inputs_that_do_not_suit_the_scheme_are_refused(
    make_checkpoint, tmp_path, out, config, high, message
):
    source = load_checkpoint(make_checkpoint(tmp_path / "model", hidden=128, intermediate=128))
    write(source, out, config)
    edit_tensors(out, **{HIGH: np.array([high])})
    with pytest.raises(FormatError, match=message):
        load_checkpoint(out).layer(0)


def test_high_inputs_survive_writing_and_zero_takes_no_tensor(source, out):
    layers = [random_layer(source, CONFIG, i)[0] for i in range(2)]
    high = {"qkv": 32, "o": 0, "down": 64}
    with ModelWriter(out, source, CONFIG) as writer:
        writer.write_layer(dataclasses.replace(layers[0], int8_inputs=high))
        writer.write_layer(layers[1])
        writer.finish()
    packed = load_checkpoint(out)
    assert packed.layer(0).int8_inputs == {"qkv": 32, "o": 0, "gate_up": 0, "down": 64}
    assert packed.layer(1).int8_inputs == dict.fromkeys(("qkv", "o", "gate_up", "down"), 0)
    names = [name for name in packed.tensors if name.endswith(".high")]
    assert names == [HIGH.replace("qkv", "down"), HIGH]


@pytest.mark.parametrize(("high", "message"), [
    ({"qkv": 16}, "layer 0: qkv: int8_inputs: expected a multiple of 32 below 64, found 16"),
    ({"o": 64}, "layer 0: o: int8_inputs: expected a multiple of 32 below 64, found 64"),
    ({"kv": 32}, "layer 0: int8_inputs: expected keys among qkv, .* found 'kv'"),
])
def test_high_inputs_of_no_whole_block_are_not_written(source, out, high, message):
    layer = dataclasses.replace(random_layer(source, CONFIG, 0)[0], int8_inputs=high)
    with ModelWriter(out, source, CONFIG) as writer, pytest.raises(ValueError, match=message):
        writer.write_layer(layer)


CHAIN = "model.layers.0.rotations.down.left"


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("chain", np.array([512, 1]), r"\(order above 512, 0 or 1\), found \(512, 1\)"),
        ("chain", np.array([-521, 1]), "order above 512"),
        ("chain", np.array([521, 2]), r"found \(521, 2\)"),
        ("chain", np.array([2**62, 1]), "orders whose product is 1042"),
        ("chain", np.array([521, 1, 0]), r"expected shape \[2\], found \[3\]"),
        ("pairs", np.full((1042, 2), 521, np.int32), r"below 521, found \(521, 521\) at step 0"),
        ("pairs", np.zeros((1042, 2), np.int32), "two different indices"),
        ("pairs", np.zeros((1041, 2), np.int32), r"\[1042, 2\], found \[1041, 2\]"),
        ("angles", np.full(1042, np.inf), "expected finite angles"),
        ("angles", None, "left_pairs: expected shape"),
    ],
)
def test_chains_that_lie_are_refused(make_checkpoint, tmp_path, out, part, value, message):
    source = load_checkpoint(make_checkpoint(tmp_path / "model", intermediate=1042))
    write(source, out, orders={"down": (521, 2)})
    edit_tensors(out, **{f"{CHAIN}_{part}": value})
    with pytest.raises(FormatError, match=message):
        load_checkpoint(out).layer(0)


def test_tail_that_is_not_zero_is_refused(make_checkpoint, tmp_path, out):
    source = load_checkpoint(make_checkpoint(tmp_path / "model", intermediate=90))
    write(source, out)
    name = "model.layers.0.mlp.down_proj.weight_packed"
    words = load_checkpoint(out).tensor(name).copy()
    words[3, -1] ^= 1 << 8  # the first nibble behind column 89
    edit_tensors(out, **{name: words})
    with pytest.raises(FormatError, match="expected code 0 in the tail"):
        load_checkpoint(out).layer(0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 3, "format_version: expected 1 or 2, found 3"),
        ("format_version", "1", "format_version: expected 1 or 2, found '1'"),
        ("format_version", True, "format_version: expected 1 or 2, found True"),
        ("model", None, "quantization_config.model: expected an object, found None"),
        ("model", [], r"quantization_config.model: expected an object, found \[\]"),
        ("scheme", "w2a2", "scheme: expected one of"),
        ("method", 3, "method: expected one of"),
        ("weights", {"bits": 8}, "quantization_config: "),
        ("activations", None, "quantization_config: clip: expected a number"),
        ("ignore", 3, "ignore: expected a list of patterns, found 3"),
        ("ignore", "*", "ignore: expected a list"),
        ("kv_bits", 3, "kv_bits: expected one of 4, 8, 16, found 3"),
        ("kv_bits", 32, "kv_bits: expected one of 4, 8, 16, found 32"),
        ("kv_bits", True, "kv_bits: expected one of 4, 8, 16, found True"),
        ("kv_bits", None, "kv_bits: expected one of 4, 8, 16, found None"),
    ],
)
def test_quantization_config_that_lies_is_refused(packed, key, value, message):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"][key] = value
    write_json(packed / "config.json", config)
    with pytest.raises(FormatError, match=message):
        load_checkpoint(packed)


def test_unquantized_config_with_packed_weights_is_refused(packed):
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    write_json(packed / "config.json", config)
    with pytest.raises(FormatError, match=r"q_proj\.weight: missing tensor"):
        load_checkpoint(packed)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"],
)
def test_random_damage_is_a_format_error_or_harmless(packed, name):
    """Bytes of JSON and of headers are changed at random: nothing but FormatError may come."""
    rng = np.random.default_rng(0)
    raw = (packed / name).read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little") if name.endswith(".safetensors") else len(raw)
    refused = 0
    for _ in range(100):
        damaged = bytearray(raw)
        for at in rng.integers(0, header, rng.integers(1, 5)):
            damaged[at] = rng.choice(bytearray(b'0123456789-{}[]",:.eE \xff\x00'))
        (packed / name).write_bytes(damaged)
        try:
            load_checkpoint(packed).layer(0)
        except FormatError:
            refused += 1
    assert refused > 50
