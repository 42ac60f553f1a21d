"""QuaRot and SpinQuant by their definition: the rotated model is the same model."""

import json
from pathlib import Path

import numpy as np
import pytest

from singlequant import _C, _reference
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.checkpoint.views import (
    DenseRotation,
    RandomizedHadamard,
    ResidualCheckpoint,
)
from singlequant.config import QuantConfig
from singlequant.export.writer import estimate_size
from singlequant.files import folder_bytes
from singlequant.methods import quarot, spinquant
from singlequant.methods.quarot import quarot_checkpoint
from singlequant.methods.solve import solve_layer, solve_rotations
from singlequant.methods.spinquant import spinquant_checkpoint
from singlequant.rotations import LayerRotations
from singlequant.runtime.model import Model
from singlequant.runtime.open import load
from singlequant.study.evaluate import perplexity
from singlequant.sweep.calibrate import calibrate
from singlequant.sweep.layer import quantize
from singlequant.sweep.prepare import check_outer
from singlequant.sweep.run import save
from singlequant.sweep.texts import bundled_model, bundled_text

MODELS = {
    "gqa-tied": {"tie": True},
    "gqa-untied": {"tie": False},
    "mha-bias": {"tie": False, "bias": True, "kv_heads": 4},
    "gqa-bias-tied": {"bias": True},
    "one-kv-head": {"kv_heads": 1, "dtype": "float32"},
    "wide-heads": {"head_dim": 24, "dtype": "bfloat16"},
    "hidden-not-a-power": {"hidden": 72, "heads": 6, "intermediate": 100},
    "mistral": {"architecture": "MistralForCausalLM"},
    "qwen2": {"architecture": "Qwen2ForCausalLM"},
}


def random_orthogonal(order, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((order, order)))[0]


def tokens_of(checkpoint, count=2, length=40, seed=5):
    return np.random.default_rng(seed).integers(0, checkpoint.spec.vocab, (count, length))


def spinquant_of(checkpoint, seed=0):
    spec = checkpoint.spec
    r2 = np.stack([random_orthogonal(spec.attention.head_dim, i + 1)
                   for i in range(spec.layers)])
    return spinquant_checkpoint(checkpoint, random_orthogonal(spec.hidden, seed), r2)


VIEWS = {"quarot": quarot_checkpoint, "spinquant": spinquant_of}


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_rotated_model_equals_the_original(tmp_path, make_checkpoint, options, view):
    checkpoint = load_checkpoint(make_checkpoint(tmp_path / "m", **options))
    tokens = tokens_of(checkpoint)
    expected = Model(checkpoint).forward(tokens)
    assert relative(Model(VIEWS[view](checkpoint)).forward(tokens), expected) < 2e-5


def test_rotated_weights_are_not_the_originals(model):
    checkpoint = load_checkpoint(model)
    view, tokens = quarot_checkpoint(checkpoint), tokens_of(checkpoint)
    for role, linear in view.layer(1).linears.items():
        assert relative(linear.weight, checkpoint.layer(1).linears[role].weight) > 0.3, role
    # the test of equality can fail: one head's rotation left out of o's columns
    broken = ResidualCheckpoint(checkpoint, view.residual, view.values)
    linears = broken.layer(0).linears
    linears["o"] = ResidualCheckpoint(checkpoint, view.residual).layer(0).linears["o"]
    assert broken.layer(0).linears is linears
    found = Model(broken).forward(tokens)
    assert relative(found, Model(checkpoint).forward(tokens)) > 0.01


def test_rotated_weights_follow_the_formulas(tmp_path, make_checkpoint):
    checkpoint = load_checkpoint(make_checkpoint(tmp_path / "m", bias=True, dtype="float32"))
    attention = checkpoint.spec.attention
    view, q = spinquant_of(checkpoint), random_orthogonal(64)
    head = np.kron(np.eye(attention.kv_heads), random_orthogonal(16, 2))  # layer 1
    heads = np.kron(np.eye(attention.heads), random_orthogonal(16, 2))
    w = checkpoint.layer(1).linears
    g1, g2 = (norm.weight for norm in checkpoint.layer(1).norms.values())
    expected = {
        "q": ((w["q"].weight * g1) @ q, w["q"].bias),
        "v": (head.T @ (w["v"].weight * g1) @ q, w["v"].bias @ head),
        "o": (q.T @ w["o"].weight @ heads, w["o"].bias @ q),
        "up": ((w["up"].weight * g2) @ q, w["up"].bias),
        "down": (q.T @ w["down"].weight, w["down"].bias @ q),
    }
    for role, (weight, bias) in expected.items():
        found = view.layer(1).linears[role]
        np.testing.assert_allclose(found.weight, weight, atol=1e-6, err_msg=role)
        np.testing.assert_allclose(found.bias, bias, atol=1e-6, err_msg=role)
        assert found.name == w[role].name
    np.testing.assert_allclose(view.embedding, checkpoint.embedding @ q, atol=1e-6)
    np.testing.assert_allclose(view.head, (checkpoint.head * checkpoint.final_norm.weight) @ q,
                               atol=1e-6)
    assert all((norm.weight == 1).all()
               for norm in (*view.layer(1).norms.values(), view.final_norm))
    assert not view.embedding.flags.writeable


@pytest.mark.parametrize("order", [64, 72, 96, 30])
def test_randomized_hadamard_is_orthogonal_and_flat(order):
    q = RandomizedHadamard(order, seed=3).apply(np.eye(order))
    np.testing.assert_allclose(q @ q.T, np.eye(order), atol=1e-12)
    signs = RandomizedHadamard(order, seed=3).signs
    expected = np.diag(signs) @ _reference.hadamard_matrix(order).T
    np.testing.assert_allclose(q, expected, atol=1e-12)
    assert not np.array_equal(q, RandomizedHadamard(order, seed=4).apply(np.eye(order)))


def test_a_shape_or_matrix_that_does_not_fit_is_refused(model):
    checkpoint = load_checkpoint(model)
    with pytest.raises(ValueError, match="residual: expected a rotation of 64 channels, found 32"):
        ResidualCheckpoint(checkpoint, RandomizedHadamard(32))
    with pytest.raises(ValueError, match=r"values: expected \(2, 16, 16\), found \(2, 8, 8\)"):
        ResidualCheckpoint(checkpoint, RandomizedHadamard(64), np.stack([np.eye(8)] * 2))
    with pytest.raises(ValueError, match="r1: expected an orthogonal matrix"):
        spinquant_checkpoint(checkpoint, np.full((64, 64), np.nan), np.stack([np.eye(16)] * 2))
    with pytest.raises(ValueError, match=r"values\[1\]: expected an orthogonal matrix, found"):
        spinquant_checkpoint(checkpoint, np.eye(64), np.stack([np.eye(16), 2 * np.eye(16)]))
    with pytest.raises(ValueError, match="residual: expected a square matrix"):
        DenseRotation(np.eye(4)[:2])
    with pytest.raises(IndexError):
        quarot_checkpoint(checkpoint).layer(2)


def test_a_weight_that_is_not_finite_is_named(tmp_path, make_checkpoint):
    from safetensors.numpy import load_file, save_file

    for name in ("self_attn.o_proj.weight", "mlp.down_proj.bias", "input_layernorm.weight"):
        path = make_checkpoint(tmp_path / name, bias=True)
        tensors = load_file(path / "model.safetensors")
        tensors[f"model.layers.1.{name}"].flat[3] = np.inf
        save_file(tensors, path / "model.safetensors")
        view = quarot_checkpoint(load_checkpoint(path))
        with pytest.raises(ValueError, match=f"model.layers.1.{name}, rows 0 to"):
            view.layer(1)


def test_fingerprint_tells_rotations_apart(model):
    checkpoint = load_checkpoint(model)
    views = [quarot_checkpoint(checkpoint, s) for s in (0, 1)]
    views += [ResidualCheckpoint(checkpoint, RandomizedHadamard(64)), spinquant_of(checkpoint)]
    assert len({checkpoint.fingerprint, *(v.fingerprint for v in views)}) == 5
    assert views[0].fingerprint == quarot_checkpoint(checkpoint).fingerprint


ONLINE = {"quarot": quarot.online_rotations, "spinquant": spinquant.online_rotations}


@pytest.mark.parametrize("kind", ONLINE)
def test_statistics_give_the_same_online_rotations_as_the_spec(model, kind):
    view = quarot_checkpoint(load_checkpoint(model))
    layer = next(calibrate(view, tokens_of(view)))
    found, expected = solve_layer(layer, kind).sites, ONLINE[kind](view.spec, 0).sites
    assert list(found) == list(expected)
    for name, rotation in expected.items():
        assert found[name].sizes == rotation.sizes
        assert found[name].steps == rotation.steps
        for axis in ("left", "right"):
            factors = getattr(found[name], axis), getattr(rotation, axis)
            np.testing.assert_array_equal(*(factor.matrix() for factor in factors))


@pytest.mark.parametrize("kind", ONLINE)
def test_online_rotations_act_as_published(model, kind):
    spec = load_checkpoint(model).spec
    sites = ONLINE[kind](spec, 1).sites
    assert set(sites) == ({"o", "down"} if kind == "quarot" else {"down"})
    down = np.kron(sites["down"].left.matrix(), sites["down"].right.matrix())
    np.testing.assert_allclose(down @ down.T, np.eye(96), atol=1e-12)
    np.testing.assert_allclose(np.abs(down), 96**-0.5, atol=0.06)  # order 12 is not +-1
    if kind == "quarot":  # with the fused Hadamard of each head: the Hadamard of all 4 * 16 inputs
        online = np.kron(sites["o"].left.matrix(), sites["o"].right.matrix())
        fused = np.kron(np.eye(4), quarot_checkpoint(load_checkpoint(model)).values[0].T)
        np.testing.assert_allclose(online @ fused, _C.hadamard_matrix(64), atol=1e-12)


def test_view_passes_through_calibration_and_files(tmp_path, model):
    view = quarot_checkpoint(load_checkpoint(model))
    check_outer(view)
    config = QuantConfig("w4a4", bits=4, method="hadamard", weights="rtn", clip=1.0, head_bits=16,
                         embedding_bits=16)
    layers = list(solve_rotations(calibrate(view, tokens_of(view)), "hadamard"))
    out = save(quantize(view, layers, config), tmp_path / "out", view, config)
    written = json.loads((out / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert written["torch_dtype"] == "float32"
    reloaded = load(out)
    np.testing.assert_array_equal(reloaded.checkpoint.head, view.head)
    np.testing.assert_array_equal(reloaded.checkpoint.embedding, view.embedding)
    assert relative(folder_bytes(out), estimate_size(view, config)) < 0.1


def test_quarot_beats_plain_rounding_on_the_bundled_model(tmp_path):
    checkpoint, reference = load_checkpoint(bundled_model()), load(bundled_model())
    text = bundled_text("heldout")[:12000]
    config = QuantConfig("w4a4", bits=4, method="none", weights="rtn", clip=1.0)

    def score(name, source, layers):
        out = save(quantize(source, layers, config), tmp_path / name, source, config)
        return perplexity(load(out), text, 512, reference)

    indices, view = range(checkpoint.spec.layers), quarot_checkpoint(checkpoint)
    plain = score("none", checkpoint, [LayerRotations(i, {}) for i in indices])
    online = [quarot.online_rotations(view.spec, i) for i in indices]
    rotated = score("quarot", view, online)
    assert np.isfinite(rotated.perplexity)
    assert rotated.kl_mean < 0.5 * plain.kl_mean
    fused_alone = score("fused", view, [LayerRotations(i, {}) for i in indices])
    assert rotated.kl_mean < fused_alone.kl_mean  # what is done online is of use


@pytest.mark.slow
@pytest.mark.parametrize("view", VIEWS)
def test_rotated_reference_model_equals_the_original(reference_model, view):
    checkpoint = load_checkpoint(reference_model)
    tokens = tokens_of(checkpoint, 1, 256)
    expected = Model(checkpoint).forward(tokens)
    assert relative(Model(VIEWS[view](checkpoint)).forward(tokens), expected) < 2e-5


GOLDEN = Path(__file__).parent / "data" / "families"


@pytest.mark.parametrize("name", ["gemma-tied", "gpt-oss-tied", "granitemoeshared-shared",
                                  "phi3-longrope", "qwen2-moe-shared", "qwen3-tied"])
def test_families_of_rms_norms_compute_the_same_rotated(name):
    """Norms of 1 + w, q/k norms, fused tensors, routers and shared experts."""
    checkpoint, tokens = load_checkpoint(GOLDEN / name), np.load(GOLDEN / name / "tokens.npy")
    found = Model(quarot_checkpoint(checkpoint)).forward(tokens[None])
    np.testing.assert_allclose(found, Model(checkpoint).forward(tokens[None]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["bloom-power-of-two", "gemma2-tied", "deepseek-v2-latent",
                                  "opt-350m", "olmo2-tied"])
def test_families_whose_norms_do_not_commute_are_refused(name):
    with pytest.raises(ValueError, match="checkpoint: expected RMSNorms in front of attention"):
        quarot_checkpoint(load_checkpoint(GOLDEN / name))
