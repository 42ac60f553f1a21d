# SPDX-License-Identifier: Apache-2.0
"""Every family without torch: small folders and the logits that transformers gave for them.

tools/make_family_goldens.py writes data/families; tests/family_models.py says what they are.
"""

import json
import shutil
from pathlib import Path

import family_models as zoo
import numpy as np
import pytest
from conftest import SENTENCES
from safetensors.numpy import load_file, save_file

import singlequant as sq
from singlequant import _C, _reference
from singlequant.checkpoint.views import RandomizedHadamard, ResidualCheckpoint
from singlequant.cli.main import main
from singlequant.rows import rotate_rows
from singlequant.runtime.layers import flat_positions, layer_blocks
from singlequant.runtime.model import Model
from singlequant.runtime.outer import Outer
from singlequant.sweep.layer import _scaled_norm, producer_scales, transform_rows

FAMILIES = Path(__file__).resolve().parent / "data" / "families"
TOLERANCE = 1e-4  # absolute; logits are of order 1, and a wrong epsilon moves them by more
ALL = [f"{name}-{variant}" for name, variant in zoo.variants(golden=True)]
VARIANTS = {f"{name}-{variant}": zoo.FAMILIES[name].variants[variant]
            for name, variant in zoo.variants(golden=True)}
SHARES = {"w4a8": 0.1, "w4a4": 0.25}  # of the divergence of unrelated logits, at the most


@pytest.fixture(params=ALL)
def golden(request, tmp_path):
    """(folder with a tokenizer, tokens, transformers' logits of some of them, variant)."""
    source, folder = FAMILIES / request.param, tmp_path / request.param
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, folder / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(FAMILIES / name, folder / name)
    return (folder, np.load(source / "tokens.npy"), np.load(source / "logits.npy"),
            VARIANTS[request.param])


def fed(session, *tokens):
    """Logits of each token that is appended."""
    return session.model.logits(session.append(list(tokens)))


def agree(found, expected):
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


# ---- logits -------------------------------------------------------------------------------------


def test_golden_folders_are_those_of_the_table():
    assert {path.name for path in FAMILIES.iterdir() if path.is_dir()} == set(ALL)
    assert {name for name, _ in zoo.variants(golden=True)} == set(zoo.FAMILIES)


def test_prefill_gives_the_logits_of_transformers(golden):
    folder, tokens, expected, variant = golden
    agree(sq.load(folder).forward(tokens[None])[0, variant.positions], expected)


def test_token_by_token_gives_the_logits_of_transformers(golden):
    folder, tokens, expected, variant = golden
    session, prompt = sq.load(folder).new_session(1, len(tokens)), min(variant.shorter)
    logits = [fed(session, tokens[:prompt])]
    logits += [fed(session, tokens[i : i + 1]) for i in range(prompt, len(tokens))]
    agree(np.concatenate(logits)[variant.positions], expected)


def test_batch_of_unequal_lengths_gives_the_logits_of_transformers(golden):
    folder, tokens, expected, variant = golden
    lengths = [len(tokens), *variant.shorter]
    session = sq.load(folder).new_session(len(lengths), len(tokens))
    logits = fed(session, *(tokens[:length] for length in lengths))
    for length, part in zip(lengths, np.split(logits, np.cumsum(lengths)[:-1]), strict=True):
        kept = [i for i, p in enumerate(variant.positions) if p < length]
        agree(part[[variant.positions[i] for i in kept]], expected[kept])


@pytest.mark.parametrize("golden", ["mixtral-tied", "qwen3-moe-tied", "deepseek-v3-latent"],
                         indirect=True)
def test_stacked_experts_give_the_same_bits(golden):
    folder, tokens, _, _ = golden
    expected = sq.load(folder).forward(tokens[None])
    stack_experts(folder / "model.safetensors")
    np.testing.assert_array_equal(sq.load(folder).forward(tokens[None]), expected)


ROLES = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up",
         "down_proj": "down"}


def stack_experts(file):
    """Writes the tensors of the experts in the layout that transformers 5 has in memory."""
    tensors, experts = {}, {}
    for name, tensor in load_file(file).items():
        base, _, rest = name.replace(".block_sparse_moe.", ".mlp.").partition(".experts.")
        if not rest:
            tensors[base] = tensor
            continue
        number, linear, _ = rest.split(".")
        experts.setdefault(base, {}).setdefault(ROLES[linear], {})[int(number)] = tensor
    for base, roles in experts.items():
        gate, up, down = (np.stack([roles[role][e] for e in sorted(roles[role])])
                          for role in ("gate", "up", "down"))
        tensors[f"{base}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{base}.experts.down_proj"] = down
    save_file(tensors, file, {"format": "pt"})


# ---- rotations ----------------------------------------------------------------------------------


def turned_layer(checkpoint, turn):
    """The twin of a layer in float64 whose sites are rotated and balanced, and nothing rounded."""
    weights, spec = checkpoint.layer(turn.layer), checkpoint.spec.layer(turn.layer)
    scales, linears = producer_scales(spec, turn), {}
    norms = {place: _scaled_norm(norm, spec.norms[place].offset, scales.get(place))
             for place, norm in weights.norms.items()}
    for site in spec.sites.values():
        rotation = turn.sites.get(site.name)
        for role in site.roles:
            linear, rows = weights.linears[role], scales.get(role)
            weight = transform_rows(_C.to_float32(linear.weight), rotation, rows)
            bias = None if linear.bias is None else _C.to_float32(linear.bias)
            linears[role] = (site.name, turned_linear(weight, rotation),
                             bias if bias is None or rows is None else bias * rows)
    blocks = layer_blocks(spec, norms, linears, {}, weights.dense)
    return _reference.DecoderLayer(**blocks)


def turned_linear(weight, rotation):
    """A linear that reads its rotated input; a balance is in what produces the input."""
    if rotation is None or rotation.is_identity:
        return lambda x: _C.linear_dense(x.astype(np.float32), weight)
    return lambda x: _C.linear_dense(rotate_rows(x.astype(np.float32), rotation), weight)


def turned_logits(checkpoint, rotations, tokens):
    """Logits [m, vocab] of one sequence."""
    a, outer = checkpoint.spec.attention, Outer(checkpoint)
    sequence, position = flat_positions([len(tokens)])
    cache = _reference.KVCache(1, 1, a.kv_heads, a.head_dim, len(tokens))
    hidden = outer.embed(tokens, position).astype(np.float64)
    for turn in rotations:
        turned_layer(checkpoint, turn).forward(hidden, sequence, position, cache, 0)
    return outer.logits(outer.finish(hidden.astype(np.float32)))


@pytest.mark.parametrize("method", ["balanced", "hadamard"])
def test_rotated_model_gives_the_logits_of_transformers(golden, method):
    folder, tokens, expected, variant = golden
    checkpoint = sq.load_checkpoint(folder)
    windows = np.random.default_rng(2).integers(2, zoo.VOCAB, (4, 32))
    rotations = list(sq.solve_rotations(sq.calibrate(checkpoint, windows), method))
    assert any(rotations[0].sites)
    agree(turned_logits(checkpoint, rotations, tokens)[variant.positions], expected)


def test_rotated_residual_stream_gives_the_logits_or_is_refused(golden):
    folder, tokens, expected, variant = golden
    checkpoint = sq.load_checkpoint(folder)
    rotation = RandomizedHadamard(checkpoint.spec.hidden, seed=1)
    if folder.name not in zoo.COMMUTING:
        with pytest.raises(ValueError, match="expected RMSNorms in front"):
            ResidualCheckpoint(checkpoint, rotation)
        return
    model = Model(ResidualCheckpoint(checkpoint, rotation))
    agree(model.forward(tokens[None])[0, variant.positions], expected)


# ---- commands -----------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    """A text file of some hundred tokens."""
    path = tmp_path / "text.txt"
    path.write_text(SENTENCES[:600])
    return path


@pytest.fixture
def calibration(text):
    return "--calibration", text, "--calibration-tokens", 128


def printed(capsys, *arguments):
    """What the command prints; it must succeed."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def unrelated(folder):
    """Divergence of the model's logits from those at other tokens, in nats per token."""
    logits = sq.load(folder).forward(zoo.random_tokens(64)[None])[0]
    return _C.kl_divergence(logits, np.roll(logits, 7, axis=0))[0].mean()


@pytest.mark.parametrize("scheme", ["w4a8", "w4a4"])
@pytest.mark.parametrize("method", ["balanced", "hadamard"])
def test_quantized_folder_is_near_and_generates(golden, scheme, method, tmp_path, text, calibration,
                                                capsys):
    folder, out = golden[0], tmp_path / "out"
    printed(capsys, "quantize", folder, out, "--scheme", scheme, "--method", method, *calibration)
    found = json.loads(printed(capsys, "eval", out, "--text", text, "--seq-len", 32, "--reference",
                               folder, "--json"))
    assert 0 < found["kl_mean"] < SHARES[scheme] * unrelated(folder)
    said = printed(capsys, "generate", out, "--prompt", "the quick", "--max-new-tokens", 4)
    assert said.startswith("the quick")


def test_inspect_and_compare_take_the_folder(golden, tmp_path, text, calibration, capsys):
    folder, rows = golden[0], tmp_path / "rows.json"
    found = json.loads(printed(capsys, "inspect", folder, "--json", *calibration))
    sites = sq.load_checkpoint(folder).spec.site_names()
    assert {row["site"] for row in found["rows"] if row["final"]} == set(sites)
    printed(capsys, "compare", folder, "--schemes", "w4a8", "--methods", "balanced,none", "--text",
            text, "--seq-len", 32, "--windows", 2, "--json", rows, *calibration)
    _, *found = json.loads(rows.read_text())["rows"]
    assert {row["method"] for row in found} >= {"balanced", "none"}
    for row in found:
        assert row["error"] is None
        assert 0 < row["results"][0]["kl_mean"] < SHARES["w4a4"] * unrelated(folder)
