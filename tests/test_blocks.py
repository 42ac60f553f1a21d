"""The forms of a layer beyond LLaMA's, each against the NumPy twin and bit for bit against itself.

Every form changes one thing of a plain layer; `test_form_is_seen` shows that the change matters, so
that agreement with the twin says something.
"""

import numpy as np
import pytest
from blocks import SITES, frequencies, geometry, llama, new_cache, shapes, site_widths, tokens

from singlequant import _C, _reference as reference

HEAD = 16
A = geometry(64, 96, 4, 2, HEAD)
TOLERANCE = 2e-5  # of the largest value


def uniform(rng, n):
    return rng.uniform(0.5, 1.5, n).astype(np.float32)


def plain(rng, packed=False):
    """A LLaMA-like layer; packed: its twin, in place of itself, has the rounded weights."""
    linears, twins = {}, {}
    for role, (n, k) in shapes(A).items():
        w = (rng.normal(size=(n, k)) / np.sqrt(k)).astype(np.float32)
        bias = rng.normal(size=n).astype(np.float32) / 4
        codes, scales, _ = _C.quantize(w)
        linears[role] = (_C.PackedWeight(_C.pack(codes), scales, k), bias) if packed else (w, bias)
        twins[role] = (_C.dequantize(codes, scales), bias) if packed else (w, bias)
    norms = [uniform(rng, 64), uniform(rng, 64)]
    sites = {site: (None, 16, 1.0) for site in SITES}
    return llama(A, linears, norms, sites), llama(A, twins, norms, sites)


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


def head_norms(kind, bias):
    def change(parts, rng):
        for name in ("q_norm", "k_norm"):
            parts["attention"][name] = norm(rng, kind, bias=bias, n=HEAD)

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
    "no-norms": lambda p, r: use_norms(p, r),
    "head-norms": head_norms("rms", False),
    "head-layer-norms": head_norms("layer", True),
    "q-norm-alone": lambda p, r: p["attention"].update(q_norm=norm(r, n=HEAD)),
    "partial-rotary": lambda p, r: p["attention"].update(rotary=(frequencies(6), 1.25)),
    "no-rotary": lambda p, r: p["attention"].update(rotary=None),
    "own-scale": lambda p, r: p["attention"].update(scale=0.1),
    "window": lambda p, r: p["attention"].update(window=5),
    "parallel-two-norms": lambda p, r: p.update(parallel=True),
    "parallel-one-site": lambda p, r: share_site(p),
    "residual-scale": lambda p, r: p.update(residual_scale=0.22),
    "falcon": falcon,
    **{f"{name}-{'gated' if gated else 'plain'}": activation(name, gated)
       for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2") for gated in (True, False)
       if (name, gated) != ("silu", True)},
}  # fmt: skip


def formed(name, packed=False, bits=16):
    """(arguments of the layer, of its twin) in a form."""
    both = plain(np.random.default_rng(3), packed)
    for parts in both:
        FORMS[name](parts, np.random.default_rng(4))
        for site, (k, rotation, _, clip) in parts["sites"].items():
            parts["sites"][site] = k, rotation, bits, clip
    return both


def hiddens(m):
    return np.random.default_rng(7).normal(size=(m, 64)).astype(np.float32)


def run(parts, hidden, where, sequences=1, record=False):
    hidden = hidden.copy()
    recorded = _C.DecoderLayer(**parts).forward(
        hidden, *where, new_cache(_C, parts, sequences, 800), 0, record=record
    )
    return (hidden, recorded) if record else hidden


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_form_equals_twin(name, packed):
    parts, twin = formed(name, packed)
    where, hidden = tokens([9, 1, 20]), hiddens(30)
    expected = hidden.astype(np.float64)
    inputs = reference.DecoderLayer(**twin).forward(
        expected, *where, new_cache(reference, twin, 3), 0, record=True
    )
    got, recorded = run(parts, hidden, where, 3, record=True)
    assert_close(got, expected)
    assert list(recorded) == list(inputs) == list(parts["sites"])
    for site, value in recorded.items():
        assert_close(value, inputs[site])


@pytest.mark.parametrize("name", FORMS)
def test_form_is_seen(name):
    """The form's result is far from the plain layer's."""
    where, hidden = tokens([20]), hiddens(20)
    before = run(plain(np.random.default_rng(3))[0], hidden, where)
    after = run(formed(name)[0], hidden, where)
    assert np.abs(after - before).max() > 1000 * TOLERANCE


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
        for t, token in enumerate(own):
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


def test_activation_of_large_values_stays_finite_and_nan_stays():
    for name in ("silu", "gelu", "gelu_tanh", "relu"):
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
    parts, _ = plain(np.random.default_rng(3))
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
