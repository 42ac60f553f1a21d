"""The forms of a layer beyond LLaMA's, each against the NumPy twin and bit for bit against itself.

Every form changes one thing of a plain layer; `test_form_is_seen` shows that the change matters, so
that agreement with the twin says something.
"""

import numpy as np
import pytest
from blocks import (
    SITES,
    TOLERANCE,
    assert_close,
    assert_equals_twin,
    frequencies,
    geometry,
    hiddens,
    llama,
    new_cache,
    run,
    shapes,
    site_widths,
    tokens,
)

from singlequant import _C, _reference as reference

HEAD = 16
A = geometry(64, 96, 4, 2, HEAD)
SINKS, SLOPES = np.array([-1.0, 0.5, 2.0, 3.0]), np.array([0.5, 0.25, 0.125, 0.0625])


def uniform(rng, n):
    return rng.uniform(0.5, 1.5, n).astype(np.float32)


def plain(rng):
    """A LLaMA-like layer of dense weights."""
    linears = {}
    for role, (n, k) in shapes(A).items():
        w = (rng.normal(size=(n, k)) / np.sqrt(k)).astype(np.float32)
        linears[role] = w, rng.normal(size=n).astype(np.float32) / 4
    norms = [uniform(rng, 64), uniform(rng, 64)]
    return llama(A, linears, norms, {site: (None, 16, 1.0) for site in SITES})


def round_weights(parts, twin):
    """Weights of the layer become packed ones, those of its twin what these stand for."""
    for block in ("attention", "mlp"):
        for role, value in twin[block].items():
            if isinstance(value, tuple) and len(value) == 3:
                site, w, bias = value
                codes, scales, _ = _C.quantize(w)
                packed = _C.PackedWeight(_C.pack(codes), scales, w.shape[1])
                parts[block][role] = site, packed, bias
                twin[block][role] = site, _C.dequantize(codes, scales), bias


def norm(rng, kind="rms", offset=0.0, bias=False, n=64):
    return kind, 1e-5, offset, uniform(rng, n), uniform(rng, n) if bias else None


def use_norms(parts, rng, **names):
    parts["norms"] = {name: norm(rng, **options) for name, options in names.items()}


def share_site(parts):
    """q, k, v, gate and up read one site."""
    for role in ("gate", "up"):
        if parts["mlp"][role] is not None:
            parts["mlp"][role] = ("qkv", *parts["mlp"][role][1:])
    del parts["sites"]["gate_up"], parts["norms"]["before_mlp"]
    parts["parallel"] = True


def activation(name, gated):
    def change(parts, rng):
        parts["mlp"]["activation"] = name
        if not gated:
            parts["mlp"]["gate"] = None

    return change


def head_norms(kind, bias, shape=lambda heads: HEAD):
    """shape: of the weights for so many heads."""

    def change(parts, rng):
        for name, heads in (("q_norm", "heads"), ("k_norm", "kv_heads")):
            n = shape(parts["attention"][heads])
            parts["attention"][name] = norm(rng, kind, 0.25, bias, n)

    return change


def attention(**changes):
    return lambda parts, rng: parts["attention"].update(changes)


def rotary(dim=HEAD, **changes):
    return attention(rotary={"inv_freq": frequencies(dim), **changes})


def latent(q_rank=24, kv_rank=20, rope=4, value_dim=10, norms=True, **changes):
    """Low ranks in place of k, v and, unless q_rank is 0, of q; rope 0: no rotary embedding."""

    def change(parts, rng):
        def linear(site, n, k, bias=False):
            w = (rng.normal(size=(n, k)) / np.sqrt(k)).astype(np.float32)
            return site, w, uniform(rng, n) / 2 if bias else None

        a, sites = parts["attention"], parts["sites"]
        roles = {"kv_a": linear("qkv", kv_rank + rope, 64, True),
                 "kv_b": linear("kv_rank", 4 * (HEAD - rope + value_dim), kv_rank),
                 "o": linear("o", 64, 4 * value_dim)}
        if q_rank:
            roles |= {"q_a": linear("qkv", q_rank, 64, True), "q_b": linear("q_rank", 64, q_rank)}
            sites["q_rank"] = q_rank, *sites["qkv"][1:]
        sites |= {"kv_rank": (kv_rank, *sites["qkv"][1:]), "o": (4 * value_dim, *sites["o"][1:])}
        kept = {role: a[role] for role in (() if q_rank else ("q",))}
        for role in "qkvo":
            del a[role]
        if norms:
            ranks = {"kv_a_norm": kv_rank} | ({"q_a_norm": q_rank} if q_rank else {})
            roles |= {name: norm(rng, n=n) for name, n in ranks.items()}
        turned = {"inv_freq": frequencies(rope), "interleaved": True} if rope else None
        a.update({"kv_heads": 4, "value_dim": value_dim, "rotary": turned} | roles | kept | changes)

    return change


def falcon(parts, rng):
    activation("gelu", False)(parts, rng)
    use_norms(parts, rng, before_attention={"kind": "layer", "bias": True}, before_mlp={})
    share_site(parts)


FORMS = {
    "layer-norm-bias": lambda p, r: use_norms(
        p, r, before_attention={"kind": "layer", "bias": True},
        before_mlp={"kind": "layer", "bias": True}),
    "layer-norm": lambda p, r: use_norms(p, r, before_attention={"kind": "layer"},
                                         before_mlp={"kind": "layer"}),
    "rms-offset": lambda p, r: use_norms(p, r, before_attention={"offset": 1.0},
                                         before_mlp={"offset": 1.0}),
    "rms-bias": lambda p, r: use_norms(p, r, before_attention={"bias": True}, before_mlp={}),
    "four-norms": lambda p, r: use_norms(p, r, before_attention={}, after_attention={},
                                         before_mlp={}, after_mlp={}),
    "norms-after": lambda p, r: use_norms(p, r, after_attention={}, after_mlp={"kind": "layer"}),
    "norm-sums": lambda p, r: (use_norms(p, r, after_attention={"kind": "layer", "bias": True},
                                         after_mlp={}), p.update(norm_sums=True)),
    "no-norms": lambda p, r: use_norms(p, r),
    "head-norms": head_norms("rms", False),
    "head-layer-norms": head_norms("layer", True),
    "q-norm-alone": lambda p, r: p["attention"].update(q_norm=norm(r, n=HEAD)),
    "head-norms-by-row": head_norms("rms", True, lambda heads: (heads, HEAD)),
    "head-layer-norms-by-row": head_norms("layer", False, lambda heads: (heads, HEAD)),
    "norms-of-all-heads": head_norms("rms", True, lambda heads: heads * HEAD),
    "layer-norms-of-all-heads": head_norms("layer", True, lambda heads: heads * HEAD),
    "partial-rotary": rotary(6, scale=1.25),
    "no-rotary": attention(rotary=None),
    "interleaved-rotary": rotary(interleaved=True),
    "interleaved-partial-rotary": rotary(6, interleaved=True),
    "long-rotary": rotary(long_inv_freq=frequencies(HEAD) / 4, original=8),
    "dynamic-rotary": rotary(dynamic=4.0, theta=10000.0, original=8),
    "dynamic-interleaved-rotary": rotary(8, dynamic=2.0, theta=1e4, original=3, interleaved=True),
    "latent": latent(),
    "latent-without-q-rank": latent(0),
    "latent-halves": latent(rotary={"inv_freq": frequencies(4), "scale": 1.25}),
    "latent-whole": latent(rope=HEAD, value_dim=HEAD, norms=False),
    "latent-unturned": latent(rope=0, norms=False),
    "latent-window-sinks": latent(window=5, sinks=SINKS, softcap=2.0, qkv_clip=0.9),
    "own-scale": attention(scale=0.1),
    "window": attention(window=5),
    "softcap": attention(softcap=1.5),
    "softcap-reached": attention(softcap=3.0, scale=8.0),
    "sinks": attention(sinks=SINKS),
    "slopes": attention(slopes=SLOPES),
    "query-growth": attention(query_growth=0.5, query_original=4),
    "slopes-bfloat16": attention(slopes=SLOPES, slopes_bfloat16=True),
    "steep-slopes": attention(slopes=8 * SLOPES),
    "slopes-alone": attention(slopes=SLOPES, rotary=None),
    "qkv-clip": attention(qkv_clip=0.6),
    "all-of-attention": attention(
        softcap=1.0, sinks=SINKS, slopes=SLOPES, qkv_clip=0.7, window=7, scale=0.5,
        q_norm=("rms", 1e-5, 0.0, np.linspace(0.5, 2, 64), None)),
    "parallel-two-norms": lambda p, r: p.update(parallel=True),
    "parallel-one-site": lambda p, r: share_site(p),
    "residual-scale": lambda p, r: p.update(residual_scale=0.22),
    "falcon": falcon,
    **{f"{name}-{'gated' if gated else 'plain'}": activation(name, gated)
       for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu")
       for gated in (True, False) if (name, gated) != ("silu", True)},
    "swiglu-clamped": lambda p, r: p["mlp"].update(activation="swiglu_clamped", limit=0.75),
}  # fmt: skip


def formed(name, packed=False, bits=16):
    """(arguments of the layer, of its twin) in a form."""
    both = plain(np.random.default_rng(3)), plain(np.random.default_rng(3))
    for parts in both:
        FORMS[name](parts, np.random.default_rng(4))
        for site, (k, rotation, _, clip) in parts["sites"].items():
            parts["sites"][site] = k, rotation, bits, clip
    if packed:
        round_weights(*both)
    return both


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_form_equals_twin(name, packed):
    assert_equals_twin(*formed(name, packed))


@pytest.mark.parametrize("name", FORMS)
def test_form_is_seen(name):
    """The form's result is far from the plain layer's."""
    where, hidden = tokens([20]), hiddens(20)
    before = run(plain(np.random.default_rng(3)), hidden, where)
    after = run(formed(name)[0], hidden, where)
    assert np.abs(after - before).max() > 1000 * TOLERANCE


# The keys of a longer call are turned by other frequencies: steps are not the prompt.
BY_LENGTH = {"long-rotary", "dynamic-rotary", "dynamic-interleaved-rotary"}


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("name", FORMS)
def test_prompt_batch_and_steps_give_the_same_bits(name, bits):
    parts, _ = formed(name, packed=True, bits=bits)
    lengths = [7, 1, 12]
    hidden = hiddens(sum(lengths))
    together = np.split(run(parts, hidden, tokens(lengths), 3), np.cumsum(lengths)[:-1])
    layer = _C.DecoderLayer(**parts)
    for own, whole in zip(np.split(hidden, np.cumsum(lengths)[:-1]), together, strict=True):
        np.testing.assert_array_equal(run(parts, own, tokens([len(own)])), whole)
        cache = new_cache(_C, parts)
        for t, token in enumerate(own[:0] if name in BY_LENGTH else own):
            step = token[None].copy()
            layer.forward(step, [0], [t], cache, 0)
            np.testing.assert_array_equal(step[0], whole[t])


@pytest.mark.parametrize("name", FORMS)
def test_threads_do_not_change_bits(name):
    """More tokens than are worked on at a time."""
    parts, _ = formed(name, packed=True, bits=8)
    hidden, seen = hiddens(600), set()
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        got, recorded = run(parts, hidden, tokens([600]), record=True)
        seen.add((got.tobytes(), *(x.tobytes() for x in recorded.values())))
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["latent", "latent-without-q-rank", "all-of-attention", "falcon",
                                  "norm-sums", "query-growth", "slopes-bfloat16"])
def test_cuts_of_a_long_prompt_do_not_change_bits(name):
    """Tokens are worked on 512 at a time, wherever the prompt is cut."""
    parts, _ = formed(name, packed=True, bits=8)
    hidden = hiddens(700)
    whole = run(parts, hidden, tokens([700]))
    layer, cache = _C.DecoderLayer(**parts), new_cache(_C, parts, capacity=800)
    for first, last in ((0, 3), (3, 516), (516, 700)):
        part = hidden[first:last].copy()
        layer.forward(part, np.zeros(len(part), np.int64), np.arange(first, last), cache, 0)
        np.testing.assert_array_equal(part, whole[first:last])


def test_one_site_of_all_inputs_is_prepared_alike_for_all():
    """Sites that are equal and read one value give the bits of one site."""
    parts, _ = formed("parallel-one-site", packed=True, bits=4)
    split = parts | {"sites": parts["sites"] | {"other": parts["sites"]["qkv"]}}
    split["mlp"] = parts["mlp"] | {
        role: ("other", *parts["mlp"][role][1:]) for role in ("gate", "up")
    }
    hidden = hiddens(20)
    one, recorded = run(parts, hidden, tokens([20]), record=True)
    two, apart = run(split, hidden, tokens([20]), record=True)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(apart["other"], recorded["qkv"])


def test_site_that_is_read_again_is_recorded_once():
    """More tokens than are worked on at a time; q, then k at another site, then v at the first."""
    parts = plain(np.random.default_rng(3))
    where, hidden = tokens([600]), hiddens(600)
    _, expected = run(parts, hidden, where, record=True)
    parts["sites"]["other"] = parts["sites"]["qkv"]
    parts["attention"]["k"] = ("other", *parts["attention"]["k"][1:])
    _, recorded = run(parts, hidden, where, record=True)
    for site, value in (expected | {"other": expected["qkv"]}).items():
        np.testing.assert_array_equal(recorded[site], value)


def test_activation_of_large_values_stays_finite_and_nan_stays():
    for name in ("silu", "gelu", "gelu_tanh", "relu", "quick_gelu"):
        parts, _ = formed(f"{name}-plain")
        parts["attention"]["o"] = ("o", np.zeros((64, 64), np.float32), None)
        assert np.isfinite(run(parts, hiddens(3) * 1e30, tokens([3]))).all()
        parts["norms"] = {}
        bad = hiddens(3)
        bad[2, 0] = np.nan
        got = run(parts, bad, tokens([3]))
        assert np.isfinite(got[:2]).all()
        assert np.isnan(got[2]).all()


# ---- a decoder: all layers in one call ----------------------------------------------------------


def decoder_parts(count=4):
    """Layers of unlike forms, and so of unlike workspaces and rotary tables."""
    names = ["partial-rotary", "no-rotary", "falcon", "partial-rotary"][:count]
    return [formed(name, packed=True, bits=8)[0] for name in names]


def test_decoder_equals_its_layers_one_by_one():
    parts = decoder_parts()
    layers = [_C.DecoderLayer(**p) for p in [*parts, parts[1], parts[3]]]
    caches = [new_cache(_C, parts[0], 3, 64, len(layers)) for _ in range(2)]
    decoder, where = _C.Decoder(layers), tokens([5, 1, 30])
    assert "6 x DecoderLayer" in repr(decoder)
    for position in (0, 30):
        where = where[0], where[1] + position
        one, other = hiddens(36), hiddens(36)
        assert decoder.forward(one, *where, caches[0]) is None
        for index, layer in enumerate(layers):
            layer.forward(other, *where, caches[1], index)
        np.testing.assert_array_equal(one, other)
    for index in range(len(layers)):
        for read in zip(*(c.read(index, 2, 60) for c in caches), strict=True):
            np.testing.assert_array_equal(*read)


def test_decoder_does_not_take_a_rotary_table_of_other_frequencies():
    """inv_freq and scale are the same in all of them."""
    names = ["window", "long-rotary", "dynamic-rotary", "own-scale", "interleaved-rotary"]
    parts = [formed(name)[0] for name in names]
    changed = dict(parts[2]["attention"]["rotary"], original=12)
    parts.append(parts[2] | {"attention": parts[2]["attention"] | {"rotary": changed}})
    layers = [_C.DecoderLayer(**p) for p in parts]
    caches = [new_cache(_C, parts[0], 3, 64, len(layers)) for _ in range(2)]
    where, one, other = tokens([20, 1, 9]), hiddens(30), hiddens(30)
    _C.Decoder(layers).forward(one, *where, caches[0])
    for index, layer in enumerate(layers):
        layer.forward(other, *where, caches[1], index)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", sorted(BY_LENGTH))
def test_length_is_that_of_a_tokens_own_sequence(name):
    """Sequences of 8, 3 and 13 tokens, mixed and from other positions on."""
    parts, twin = formed(name)
    sequence, position = tokens([8, 3, 13])
    order = np.random.default_rng(5).permutation(24)
    sequence, position = 2 - sequence[order], position[order]
    hidden, offset = hiddens(24), np.array([0, 30, 0])
    for first in (0, 13):  # the sequence of 8 tokens ends below 8, then above
        at = sequence, position + first + offset[sequence]
        expected = hidden.astype(np.float64)
        reference.DecoderLayer(**twin).forward(
            expected, *at, new_cache(reference, twin, 3), 0)
        assert_close(run(parts, hidden, at, 3), expected)


def test_decoder_takes_all_pages_or_none():
    parts = decoder_parts()
    cache = new_cache(_C, parts[0], 1, 64, 4)
    cache = new_cache(_C, parts[0], 1, 64, 4, limit=3 * cache.page_bytes)
    hidden = hiddens(2)
    with pytest.raises(MemoryError, match="limit"):
        _C.Decoder([_C.DecoderLayer(**p) for p in parts]).forward(hidden, [0, 0], [0, 1], cache)
    assert cache.nbytes == 0
    np.testing.assert_array_equal(hidden, hiddens(2))


def test_decoder_refuses_what_does_not_fit():
    parts = decoder_parts(2)
    layers = [_C.DecoderLayer(**p) for p in parts]
    decoder, hidden = _C.Decoder(layers), hiddens(1)
    with pytest.raises(ValueError, match="layers: expected at least one"):
        _C.Decoder([])
    with pytest.raises(TypeError, match=r"layers\[1\]: expected a DecoderLayer, got int"):
        _C.Decoder([layers[0], 3])
    a = geometry(32, 24, 2, 1, 8)
    small = llama(a, {role: (np.zeros(s, np.float32), None) for role, s in shapes(a).items()})
    with pytest.raises(ValueError, match=r"layers\[1\]: .* = \(64, 2, 16\) as .*\(32, 1, 8\)"):
        _C.Decoder([layers[0], _C.DecoderLayer(**small)])
    with pytest.raises(ValueError, match="cache: expected at least 2 layers, got 1"):
        decoder.forward(hidden, [0], [0], new_cache(_C, parts[0]))
    with pytest.raises(ValueError, match=r"cache: expected \(kv_heads, head_dim\) = \(2, 16\)"):
        decoder.forward(hidden, [0], [0], new_cache(_C, small, layers=2))
    with pytest.raises(TypeError, match="hidden: expected a float32 array"):
        decoder.forward(np.ones((1, 64)), [0], [0], new_cache(_C, parts[0], layers=2))
    with pytest.raises(ValueError, match=r"position\[0\]: expected 0 to 63, got 64"):
        decoder.forward(hidden, [0], [64], new_cache(_C, parts[0], layers=2))


def test_sites_of_a_layer_are_its_own_names():
    assert site_widths(A) == {"qkv": 64, "o": 64, "gate_up": 64, "down": 96}
    parts = plain(np.random.default_rng(3))
    renamed = {"a": "qkv", "b": "o", "c": "gate_up", "d": "down"}
    back = {site: name for name, site in renamed.items()}
    other = parts | {
        "sites": {name: parts["sites"][site] for name, site in reversed(renamed.items())},
        **{block: {key: (back[v[0]], *v[1:]) if isinstance(v, tuple) and v[0] in back else v
                   for key, v in parts[block].items() if key != "rotary"}
           for block in ("attention", "mlp")},
    }  # fmt: skip
    other["attention"]["rotary"] = parts["attention"]["rotary"]
    one, recorded = run(parts, hiddens(3), tokens([3]), record=True)
    two, own = run(other, hiddens(3), tokens([3]), record=True)
    np.testing.assert_array_equal(one, two)
    assert list(own) == ["d", "c", "b", "a"]
    np.testing.assert_array_equal(own["c"], recorded["gate_up"])
