"""A whole model in float32 with rotated inputs and rotated weights is the model itself."""

from dataclasses import replace

import numpy as np
import pytest

import singlequant as sq
from singlequant import _C, _reference
from singlequant.methods.registry import METHODS
from singlequant.runtime.layers import flat_positions, layer_blocks
from singlequant.sweep.layer import transform_inputs, transform_rows


def rotated_linear(weight, rotation):
    if rotation is None:
        return lambda x: _C.linear_dense(x.astype(np.float32), _C.to_float32(weight))
    plain = replace(rotation, balance=None)  # on both sides it cancels
    turned = transform_rows(_C.to_float32(weight), plain)
    return lambda x: _C.linear_dense(transform_inputs(x.astype(np.float32), plain), turned)


def rotated_logits(checkpoint, rotations, tokens):
    """Logits [m, vocab] of one sequence, every linear replaced by its rotated self."""
    spec = checkpoint.spec
    sequence, position = flat_positions([len(tokens)])
    hidden = _C.gather_rows(checkpoint.embedding, tokens).astype(np.float64)
    cache = _reference.KVCache(1, 1, spec.attention.kv_heads, spec.attention.head_dim,
                               len(tokens))
    for layer in rotations:
        weights = checkpoint.layer(layer.layer)
        linears = {
            role: (site.name,
                   rotated_linear(weights.linears[role].weight, layer.sites.get(site.name)), None)
            for site in spec.layer(0).sites.values()
            for role in site.roles
        }
        twin = _reference.DecoderLayer(
            **layer_blocks(spec.layer(0), weights.norms, linears, {})
        )
        twin.forward(hidden, sequence, position, cache, 0)
    final = _reference.rms_norm(hidden, checkpoint.final_norm.weight.astype(np.float64),
                                spec.final_norm.eps)
    return _C.linear_dense(final.astype(np.float32), checkpoint.head)


def check(folder, windows, tokens, method):
    checkpoint = sq.load_checkpoint(folder)
    rotations = sq.solve_rotations(sq.calibrate(checkpoint, windows), method)
    logits = rotated_logits(checkpoint, rotations, tokens)
    original = sq.load(folder).forward(tokens[None])[0]
    np.testing.assert_allclose(logits, original, atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", [m.name for m in METHODS.values() if not m.residual])
def test_rotated_model_gives_the_originals_logits(make_checkpoint, tmp_path, method):
    model = make_checkpoint(tmp_path / "model", intermediate=172, dtype="float32")
    rng = np.random.default_rng(0)
    check(model, rng.integers(0, 320, (2, 24)), rng.integers(0, 320, 20), method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["singlequant", "paper", "hadamard", "duquant"])
def test_rotated_reference_model_gives_the_originals_logits(reference_model, method):
    rng = np.random.default_rng(0)
    check(reference_model, rng.integers(0, 4096, (1, 128)), rng.integers(0, 4096, 48), method)
