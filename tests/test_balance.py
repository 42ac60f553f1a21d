# SPDX-License-Identifier: Apache-2.0
"""The balance of channels: folded into what produces a site's input, it changes no result."""

from dataclasses import replace

import numpy as np
import pytest
from blocks import SITES
from safetensors.numpy import load_file, save_file

import singlequant as sq
from singlequant import _C
from singlequant.methods.registry import METHODS
from singlequant.methods.solve import solve_site
from singlequant.rotations import BlockRotation, Factor, LayerRotations, SiteRotation
from singlequant.rows import rotate_rows
from singlequant.sweep.calibrate import site_statistics
from singlequant.sweep.layer import producer_scales, quantize_layer

BALANCED = [name for name, method in METHODS.items() if method.balances and not method.aligns]
TOKENS = np.random.default_rng(5).integers(0, 320, (2, 20))
SITE_OF = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "gate_up", "up": "gate_up",
           "down": "down"}  # fmt: skip
MLP = ("gate", "up", "down")


@pytest.fixture(params=[(True, True), (False, False)], ids=["tied-bias", "untied"])
def folder(request, make_checkpoint, tmp_path):
    """A float32 model with grouped queries whose channels differ by powers of two up to 16."""
    tie, bias = request.param
    path = make_checkpoint(tmp_path / "model", intermediate=96, dtype="float32", tie=tie, bias=bias)
    scale_channels(path, np.random.default_rng(3))
    return path


def scale_channels(path, rng):
    """Channels of every producer times powers of two, the consumers' columns left as they are."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("layernorm.weight", "v_proj.weight", "v_proj.bias", "up_proj.weight",
                          "up_proj.bias")):
            factors = np.exp2(rng.integers(-2, 3, len(tensor))).astype(np.float32)
            tensors[name] = tensor * factors.reshape(-1, *[1] * (tensor.ndim - 1))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def solved(checkpoint, method):
    windows = np.random.default_rng(1).integers(0, 320, (4, 24))
    return list(sq.solve_rotations(sq.calibrate(checkpoint, windows), method))


def folded_by_hand(checkpoint, rotations):
    """Every weight of a layer with its balance, in float64, by the definition: x / s and W s."""
    layer, spec = checkpoint.layer(rotations.layer), checkpoint.spec.layer(0)
    s = {site: np.ones(spec.sites[site].k) for site in SITES}
    s |= {site: np.asarray(r.balance, float) for site, r in rotations.sites.items()
          if r.balance is not None}  # fmt: skip
    values = s["o"].reshape(spec.attention.kv_heads, -1, spec.attention.head_dim)[:, 0].reshape(-1)
    rows = {"v": values, "up": s["down"]}
    norms = [norm.weight.astype(float) / s[site] for norm, site in
             zip(layer.norms.values(), ("qkv", "gate_up"), strict=True)]  # fmt: skip
    weights, biases = {}, {}
    for role, linear in layer.linears.items():
        divisor = rows.get(role, np.ones(len(linear.weight)))
        weights[linear.name] = linear.weight * s[SITE_OF[role]] / divisor[:, None]
        if linear.bias is not None:
            biases[linear.name] = linear.bias / divisor
    return norms, weights, biases


@pytest.mark.parametrize("method", BALANCED)
def test_folding_leaves_the_function_as_it_is(folder, method):
    """The folding by hand, which the test below holds the package to, changes no logit."""
    checkpoint = sq.load_checkpoint(folder)
    original, tensors = sq.load(folder).forward(TOKENS), load_file(folder / "model.safetensors")
    for layer in solved(checkpoint, method):
        assert max(r.balance.max() for r in layer.sites.values() if r.balance is not None) > 2
        norms, weights, biases = folded_by_hand(checkpoint, layer)
        prefix = f"model.layers.{layer.layer}"
        folded = {f"{name}.weight": w for name, w in weights.items()}
        folded |= {f"{name}.bias": b for name, b in biases.items()}
        folded[f"{prefix}.input_layernorm.weight"] = norms[0]
        folded[f"{prefix}.post_attention_layernorm.weight"] = norms[1]
        tensors |= {name: np.asarray(array, np.float32) for name, array in folded.items()}
    del checkpoint
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = sq.load(folder).forward(TOKENS)
    assert (found != original).any()
    np.testing.assert_allclose(found, original, atol=1e-5 * np.abs(original).max(), rtol=0)


@pytest.mark.parametrize("method", BALANCED)
def test_a_site_that_is_ignored_whole_gets_no_balance(folder, method):
    checkpoint = sq.load_checkpoint(folder)
    config = sq.QuantConfig(method=method, ignore=("*_proj",))
    dense = quantize_layer(checkpoint, solved(checkpoint, method)[0], config).dense
    for name, array in dense.items():
        np.testing.assert_array_equal(array, checkpoint.tensor(name), err_msg=name)


@pytest.mark.parametrize("ignore", [("*.q_proj", "*.v_proj", "*.up_proj"), ("*.o_proj",),
                                    ("*.k_proj", "*.gate_proj", "*.down_proj"), ()])  # fmt: skip
@pytest.mark.parametrize("method", BALANCED)
def test_folding_reaches_packed_and_ignored_linears(folder, method, ignore):
    checkpoint = sq.load_checkpoint(folder)
    config = sq.QuantConfig(method=method, ignore=ignore, scheme="w4a16")
    rotations = solved(checkpoint, method)[0]
    layer = quantize_layer(checkpoint, rotations, config)
    treated = {site: r for site, r in rotations.sites.items() if not all(
        config.ignores(f"model.layers.0.{'mlp' if role in MLP else 'self_attn'}.{role}_proj")
        for role, of in SITE_OF.items() if of == site)}
    norms, weights, biases = folded_by_hand(checkpoint, replace(rotations, sites=treated))
    for name, expected in zip(("input_layernorm", "post_attention_layernorm"), norms, strict=True):
        found = layer.dense[f"model.layers.0.{name}.weight"]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    for name, expected in biases.items():
        np.testing.assert_allclose(layer.dense[f"{name}.bias"], expected, rtol=1e-6)
    for role, linear in checkpoint.layer(0).linears.items():
        expected = weights[linear.name]
        if config.ignores(linear.name):
            found = layer.dense[f"{linear.name}.weight"]
            np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=linear.name)
            continue
        packed, rotation = layer.packed[linear.name], rotations.sites.get(SITE_OF[role])
        n, k = packed.shape
        turned = (_C.unpack(packed.words, k) * packed.scales).astype(np.float64)
        if rotation is not None and not rotation.is_identity:
            turned = turned @ rotate_rows(np.eye(k, dtype=np.float32), rotation).T
        error = np.linalg.norm(turned - expected) / np.linalg.norm(expected)
        assert error < 0.2, linear.name  # 4 bits; other factors would be off by more
        if np.ptp(expected / linear.weight) > 1:
            assert np.linalg.norm(turned - linear.weight) / np.linalg.norm(linear.weight) > 0.3


def test_ignored_linears_without_a_balance_stay_the_files_bytes(model):
    checkpoint = sq.load_checkpoint(model)
    config = sq.QuantConfig(method="smoothquant", ignore=("*.o_proj", "*.down_proj"))
    layer = quantize_layer(checkpoint, solved(checkpoint, "smoothquant")[0], config)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        found = layer.dense[f"model.layers.0.{name}.weight"]
        assert found.dtype == np.float16
        assert found.tobytes() == checkpoint.tensor(f"model.layers.0.{name}.weight").tobytes()
    assert layer.dense["model.layers.0.input_layernorm.weight"].dtype == np.float32


def test_folding_leaves_the_checkpoint_as_it_is(folder):
    checkpoint = sq.load_checkpoint(folder)
    before = {name: checkpoint.tensor(name).tobytes() for name in checkpoint.tensors}
    rotations = solved(checkpoint, "balanced")[0]
    kept = {site: r.balance.copy() for site, r in rotations.sites.items()}
    quantize_layer(checkpoint, rotations, sq.QuantConfig(ignore=("*.up_proj",)))
    assert before == {name: checkpoint.tensor(name).tobytes() for name in checkpoint.tensors}
    for site, balance in kept.items():
        np.testing.assert_array_equal(rotations.sites[site].balance, balance)


# ---- value heads --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["duquant", "balanced"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_queries_of_a_value_head_share_their_factors(make_checkpoint, tmp_path, method, kv_heads):
    path = make_checkpoint(tmp_path / "m", kv_heads=kv_heads, dtype="float32")
    checkpoint = sq.load_checkpoint(path)
    rotations = solved(checkpoint, method)[0]
    heads = rotations.sites["o"].balance.reshape(kv_heads, 4 // kv_heads, 16)
    np.testing.assert_array_equal(heads, np.broadcast_to(heads[:, :1], heads.shape))
    assert np.ptp(heads) > 0
    np.testing.assert_array_equal(
        producer_scales(checkpoint.spec.layer(0), rotations)["v"], (1 / heads[:, 0]).reshape(-1)
    )


def test_factors_that_differ_inside_a_value_head_are_refused(model):
    checkpoint = sq.load_checkpoint(model)  # 4 heads of 16, 2 value heads
    config = sq.QuantConfig(weights="mse")
    balance = np.ones(64, np.float32)
    balance[16] = 2  # channel 0 of query head 1; head 0 shares its value head
    rotation = SiteRotation(Factor.identity(8), Factor.identity(8), balance=balance)
    with pytest.raises(ValueError, match="layer 1: o: balance: expected one factor per channel"):
        quantize_layer(checkpoint, LayerRotations(1, {"o": rotation}), config)
    balance[0] = 2
    rotation = replace(rotation, balance=balance)
    quantize_layer(checkpoint, LayerRotations(1, {"o": rotation}), config)


@pytest.mark.parametrize("balance", [
    np.ones(63), np.ones((8, 8)), np.zeros(64), -np.ones(64), np.full(64, np.nan),
    np.full(64, np.inf), np.full(64, 1e-60),
], ids=["short", "matrix", "zero", "negative", "nan", "inf", "underflow"])  # fmt: skip
def test_balance_that_cannot_be_divided_by_is_refused(balance):
    with pytest.raises(ValueError, match="balance: expected 64 positive numbers"):
        SiteRotation(Factor.identity(8), Factor.identity(8), balance=balance)
    blocks = np.tile(np.eye(8), (8, 1, 1))
    with pytest.raises(ValueError, match="balance: expected 64 positive numbers"):
        BlockRotation(blocks, np.arange(64), blocks, balance=balance)


# ---- formulas -----------------------------------------------------------------------------------


def geometric_mean(values):
    return np.exp(np.mean(np.log(np.asarray(values, float))))


def test_smoothquant_is_equation_4():
    """s_j = max|X_j|^0.5 / max|W_j|^0.5, here over its geometric mean."""
    x = np.array([[1, -16, 0.5, 4], [-4, 2, 0.25, 1]], np.float32)
    w = [np.array([[1, 0.25, -2, 1]], np.float32), np.array([[-0.25, 1, 1, 4]], np.float32)]
    s = np.sqrt(np.array([4, 16, 0.5, 4]) / np.array([1, 1, 2, 4]))
    balance = solve_site(site_statistics(x, w, reads="residual"), "smoothquant").balance
    np.testing.assert_allclose(balance, s / geometric_mean(s), rtol=1e-6)
    for reads in ("attention", "mlp"):  # as published: where a norm feeds the linears
        assert solve_site(site_statistics(x, w, reads=reads), "smoothquant").balance is None


@pytest.mark.parametrize("method", BALANCED)
def test_site_whose_producer_takes_no_balance_gets_none(method):
    x, w = np.random.default_rng(0).standard_normal((2, 40, 64)).astype(np.float32)
    site = site_statistics(x, [w], reads="residual", foldable=False)
    assert solve_site(site, method).balance is None


def test_duquant_balances_by_peaks_at_its_own_alpha():
    x = np.array([[1, -16, 0.5, 4], [-4, 2, 0.25, 1]], np.float32)
    w = [np.array([[1, 0.25, -2, 4]], np.float32)]
    s = np.array([4, 16, 0.5, 4]) ** 0.6 / np.array([1, 0.25, 2, 4]) ** 0.4
    balance = solve_site(site_statistics(x, w), "duquant").balance
    np.testing.assert_allclose(balance, s / geometric_mean(s), rtol=1e-6)


def test_balanced_gives_both_sides_the_same_rms_in_each_channel():
    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(0, 2, (2, 64)))
    x = (rng.standard_normal((50, 64)) * spread[0]).astype(np.float32)
    w = (rng.standard_normal((30, 64)) * spread[1]).astype(np.float32)
    balance = solve_site(site_statistics(x, [w[:20], w[20:]]), "balanced").balance.astype(float)
    ratio = np.sum((x / balance) ** 2, axis=0) / np.sum((w * balance) ** 2, axis=0)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert geometric_mean(balance) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("method", BALANCED)
def test_dead_channels_get_factor_one(method):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 40, 64)).astype(np.float32)
    x[:, 5] = 0
    w[:, 9] = 0
    x[:, 11] = w[:, 11] = 0
    x[:, 20] *= 50
    balance = solve_site(site_statistics(x, [w], reads="residual"), method).balance
    np.testing.assert_array_equal(balance[[5, 9, 11]], 1)
    live = np.delete(balance, [5, 9, 11])
    assert geometric_mean(live) == pytest.approx(1, rel=1e-5)
    assert balance[20] > 3


@pytest.mark.parametrize("method", BALANCED)
def test_site_without_a_live_channel_is_left_alone(method):
    zeros = site_statistics(np.zeros((8, 64), np.float32), [np.zeros((4, 64), np.float32)],
                            reads="residual")
    np.testing.assert_array_equal(solve_site(zeros, method).balance, 1)


@pytest.mark.parametrize("method", BALANCED)
def test_balance_of_extreme_channels_stays_within_float32(method):
    x, w = np.random.default_rng(0).standard_normal((2, 40, 64)).astype(np.float32)
    x[:, 0] *= 1e18
    x[:, 1] *= 1e-18
    w[:, 0] *= 1e-18
    w[:, 1] *= 1e18
    balance = solve_site(site_statistics(x, [w], reads="residual"), method).balance
    assert np.abs(np.log(balance)).max() <= 12.0001
    assert balance[0] > balance[2:].max()
    assert balance[1] < balance[2:].min()


# ---- an outlier twin ----------------------------------------------------------------------------


def twin(folder, path, rng, sites):
    """The same function with outlier channels at `sites`: what produces their inputs times d, their
    linears' columns over d. d are powers of 2: nothing is rounded, the logits are the same bits.
    """
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    t = load_file(folder / "model.safetensors")
    for i in range(2):
        a, m = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        norm = (f"model.layers.{i}.input_layernorm", f"model.layers.{i}.post_attention_layernorm")
        d = {n: np.exp2(rng.permutation(np.repeat([-3, 0, 0, 3], n // 4))).astype(np.float32)
             for n in (64, 32, 96)}  # fmt: skip
        value = d[32].reshape(2, 1, 16).repeat(2, axis=1).reshape(-1)  # two queries each
        edges = {
            "qkv": (norm[0], [f"{a}.{r}_proj" for r in "qkv"], d[64], d[64]),
            "gate_up": (norm[1], [f"{m}.gate_proj", f"{m}.up_proj"], d[64], d[64]),
            "o": (f"{a}.v_proj", [f"{a}.o_proj"], d[32], value),
            "down": (f"{m}.up_proj", [f"{m}.down_proj"], d[96], d[96]),
        }
        for producer, consumers, out, into in (edges[site] for site in sites):
            for part in ("weight", "bias"):
                if f"{producer}.{part}" in t:
                    tensor = t[f"{producer}.{part}"]
                    t[f"{producer}.{part}"] = tensor * out.reshape(-1, *[1] * (tensor.ndim - 1))
            for consumer in consumers:
                t[f"{consumer}.weight"] = t[f"{consumer}.weight"] / into
    save_file(t, path / "model.safetensors", {"format": "pt"})
    return path


# Larger rows of v and up weigh more in the columns of their own sites: one kind at a time.
@pytest.mark.parametrize("sites", [("qkv", "gate_up"), ("o", "down")], ids=["norms", "rows"])
def test_balanced_undoes_a_diagonal_twin(folder, tmp_path, sites):
    outliers = twin(folder, tmp_path / "twin", np.random.default_rng(2), sites)
    np.testing.assert_array_equal(
        sq.load(outliers).forward(TOKENS), sq.load(folder).forward(TOKENS)
    )
    windows = np.random.default_rng(1).integers(0, 320, (4, 24))
    both = [list(sq.calibrate(sq.load_checkpoint(p), windows)) for p in (folder, outliers)]
    for plain, spiky in zip(*both, strict=True):
        for name in sites:
            a, b = plain.sites[name], spiky.sites[name]
            assert not np.array_equal(np.abs(b.sample), np.abs(a.sample))
            first, second = (solve_site(s, "balanced") for s in (a, b))
            live = a.sample != 0
            ratio = (b.sample / second.balance)[live] / (a.sample / first.balance)[live]
            np.testing.assert_allclose(ratio, np.median(ratio), rtol=1e-5)
            for side in ("left", "right"):  # so that the rotations are the same as well
                np.testing.assert_allclose(getattr(second, side).matrix(),
                                           getattr(first, side).matrix(), atol=1e-3)
