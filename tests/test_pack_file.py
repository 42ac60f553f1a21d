# SPDX-License-Identifier: Apache-2.0
"""The packed folder: what goes in comes out, and it is whole or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import pack_codes, random_factor, random_layer
from packed_folders import CONFIG, ORDERS, partial, write
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from singlequant import _C
from singlequant.checkpoint.folder import Checkpoint, load_checkpoint
from singlequant.config import QuantConfig
from singlequant.export.writer import ModelWriter, _compare_recipes, estimate_size
from singlequant.rotations import Factor, SiteRotation

# ---- round trip ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w4a16"])
def test_written_folder_reads_back(make_checkpoint, tmp_path, out, dtype, group_size, scheme):
    path = make_checkpoint(tmp_path / "model", dtype=dtype, tie=False, bias=True)
    source = load_checkpoint(path)
    config = QuantConfig(bits=4, scheme=scheme, group_size=group_size,
                         ignore=("model.layers.1.mlp.*",), head_bits=16, embedding_bits=16)
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
    config = QuantConfig("w4a4", bits=4, method="none")
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
    assert not (out / config.pop("transformers_weights")).exists()  # transformers stops at it
    assert config == source.config
    recipe = json.loads((out / "recipe.json").read_text())
    assert QuantConfig.from_json(recipe["config"]) == CONFIG.settled(tied=True)
    assert recipe["source_sha256"] == source.fingerprint


@pytest.mark.parametrize("config", [CONFIG,
                                    QuantConfig(bits=4, group_size=32, ignore=("*.o_proj",)),
                                    QuantConfig(bits=4, head_bits=4, embedding_bits=16)])
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


def test_exception_before_a_layer_leaves_nothing(source, out):
    with (
        pytest.raises(RuntimeError, match="^stop$"),
        ModelWriter(out, source, CONFIG),
    ):
        raise RuntimeError("stop")
    assert not out.exists()
    assert not partial(out).exists()


def test_exception_leaves_nothing_of_what_cannot_be_resumed(source, out):
    with pytest.raises(RuntimeError, match="^stop$"):
        stop_after_layer_0(source, out, CONFIG, RuntimeError("stop"), resumable=False)
    assert not out.exists()
    assert not partial(out).exists()


ADVICE = r"1 finished layer is in .*out\.partial: the same run with resume \(--resume\) goes on"


@pytest.mark.parametrize(("error", "message"), [
    (RuntimeError("stop"), f"^stop; {ADVICE}$"),
    (MemoryError(), f"^{ADVICE}$"),
    (OSError(28, "No space left on device", "shard"),
     rf"^\[Errno 28\] No space left on device; {ADVICE}: 'shard'$"),
    (KeyboardInterrupt(), f"^{ADVICE}$"),
])
def test_exception_keeps_finished_layers_and_says_how_to_go_on(source, out, error, message):
    with pytest.raises(type(error), match=message):
        stop_after_layer_0(source, out, CONFIG, error)
    assert not out.exists()
    with ModelWriter(out, source, CONFIG, resume=True) as writer:
        assert writer.finished_layers() == {0}


def test_exception_removes_the_parents_it_made_and_no_others(source, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(RuntimeError, match="stop"):
        stop_after_layer_0(source, tmp_path / "mine/a/b/out", CONFIG, RuntimeError("stop"),
                           resumable=False)
    assert list((tmp_path / "mine").iterdir()) == []
    write(source, tmp_path / "mine/a/b/out")
    with pytest.raises(RuntimeError, match="stop"):
        stop_after_layer_0(source, tmp_path / "mine/a/b/again", CONFIG, RuntimeError("stop"),
                           resumable=False)
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
        (QuantConfig("w4a4", bits=4, seed=1), {},
         "cannot resume: config.seed: expected 1, found 0"),
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


def test_resume_names_what_the_bits_follow_from(tmp_path):
    path = tmp_path / "recipe.json"
    old = {"bits": {"a": 5}, "config": {"seed": 0}}
    with pytest.raises(ValueError, match="cannot resume: config.seed: expected 1, found 0"):
        _compare_recipes(path, old, {"bits": {"a": 6}, "config": {"seed": 1}})
    with pytest.raises(ValueError, match="cannot resume: bits.a: expected 6, found 5"):
        _compare_recipes(path, old, {"bits": {"a": 6}, "config": {"seed": 0}})


def test_resume_refuses_another_model(make_checkpoint, tmp_path, source, out):
    interrupt(source, out)
    other = load_checkpoint(make_checkpoint(tmp_path / "other", seed=9))
    with (
        pytest.raises(ValueError, match="cannot resume: source_sha256"),
        ModelWriter(out, other, CONFIG, resume=True),
    ):
        pass


@pytest.mark.parametrize(("tensor", "part"), [
    ("model.embed_tokens.weight", "what is outside the layers"),
    ("model.layers.0.mlp.down_proj.weight", "layer 0"),
    ("model.layers.0.input_layernorm.weight", "layer 0"),
    ("model.layers.1.mlp.down_proj.weight", "expected '"),  # of no layer that is finished
])
def test_resume_names_the_part_of_the_model_that_changed(source, out, tensor, part):
    with pytest.raises(KeyboardInterrupt):
        stop_after_layer_0(source, out, CONFIG, KeyboardInterrupt())
    path = source.path / "model.safetensors"
    tensors = {name: np.array(value) for name, value in load_file(path).items()}
    tensors[tensor].reshape(-1)[-1] += 1
    save_file(tensors, path)
    with (
        pytest.raises(ValueError, match=f"cannot resume: source_sha256: {part}"),
        ModelWriter(out, load_checkpoint(source.path), CONFIG, resume=True),
    ):
        pass


def test_links_in_a_circle_are_no_folder(source, tmp_path):
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(OSError, match="[Ll]evels of symbolic links|File exists"), \
            ModelWriter(circle / "out", source, CONFIG):
        pass


def test_stale_partial_is_started_again_without_resume(source, out):
    interrupt(source, out, QuantConfig("w4a4", bits=4, seed=1))
    with ModelWriter(out, source, CONFIG) as writer:
        assert writer.finished_layers() == set()
        assert not (partial(out) / "model-00002-of-00003.safetensors").exists()


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
source, config = load_checkpoint({model!r}), QuantConfig("w4a4", bits=4)
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


def test_full_disk_keeps_what_is_finished(source, out):
    """A limit on the size of files makes write() fail as a full disk does."""
    done = run_child(source, out, "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))")
    assert done.returncode == 1
    shard = partial(out) / "model-00003-of-00003.safetensors"
    assert "OSError: [Errno 27] File too large; 1 finished layer is in" in done.stderr
    assert f"goes on: '{shard}'" in done.stderr
    assert not out.exists()
    assert not shard.exists()
    with ModelWriter(out, source, CONFIG, resume=True) as writer:
        assert writer.finished_layers() == {0}


def test_killed_run_leaves_a_partial_that_resumes(source, out):
    done = run_child(source, out, "os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    with ModelWriter(out, source, CONFIG, resume=True) as writer:
        assert writer.finished_layers() == {0}
        writer.write_layer(random_layer(source, CONFIG, 1)[0])
        writer.finish()
    assert load_checkpoint(out).layer(1).linears["q"].weight.shape == (64, 64)
