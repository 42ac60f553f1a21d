"""Layers of LLaMA's form for tests, from a short description."""

import numpy as np

from singlequant import _C, _reference as reference

TOLERANCE = 2e-5  # of the largest value
SITES = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
PLAIN = (None, 16, 1.0)  # rotation, bits, clip of a site that nothing packed reads


def frequencies(dim, base=10000.0):
    return (base ** (-np.arange(dim // 2) * 2 / dim)).astype(np.float32)


def geometry(hidden, intermediate, heads, kv_heads, head_dim, window=0, **changes):
    """Sizes of a layer; changes replace entries."""
    return {
        "hidden": hidden, "intermediate": intermediate, "heads": heads, "kv_heads": kv_heads,
        "head_dim": head_dim, "window": window, "eps": 1e-5, "scale": 1 / np.sqrt(head_dim),
        "rotary": {"inv_freq": frequencies(head_dim)}, **changes,
    }  # fmt: skip


def shapes(a):
    """(n, k) of each linear by role."""
    q, kv, h, i = (a["heads"] * a["head_dim"], a["kv_heads"] * a["head_dim"], a["hidden"],
                   a["intermediate"])
    return {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q), "gate": (i, h), "up": (i, h),
            "down": (h, i)}


def site_widths(a):
    return {site: shapes(a)[roles[0]][1] for site, roles in SITES.items()}


def llama(a, linears, norms=None, sites=None):
    """Arguments of DecoderLayer. linears: (weight, bias) by role; norms: weights before attention
    and before the MLP, ones by default; sites: (rotation, bits, clip) by name, PLAIN by default."""
    sites = sites or {}
    site_of = {role: site for site, roles in SITES.items() for role in roles}
    linears = {role: (site_of[role], *linear) for role, linear in linears.items()}
    norms = [np.ones(a["hidden"], np.float32)] * 2 if norms is None else norms
    return {
        "hidden": a["hidden"],
        "sites": {site: (k, *sites.get(site, PLAIN)) for site, k in site_widths(a).items()},
        "attention": {key: a[key] for key in ("heads", "kv_heads", "head_dim", "window", "scale",
                                              "rotary")}
        | {role: linears[role] for role in "qkvo"},
        "mlp": {"activation": "silu", **{role: linears[role] for role in ("gate", "up", "down")}},
        "norms": {name: ("rms", a["eps"], 0.0, weight, None)
                  for name, weight in zip(("before_attention", "before_mlp"), norms, strict=True)},
    }  # fmt: skip


def tokens(lengths):
    """(sequence, position) of sequences of these lengths, one after the other."""
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    return sequence, np.concatenate([np.arange(n) for n in lengths])


def new_cache(kind, arguments, sequences=1, capacity=64, layers=1, **options):
    """A cache of `kind` (_C or _reference) for layers of these DecoderLayer arguments."""
    a = arguments["attention"]
    return kind.KVCache(layers, sequences, a["kv_heads"], a["head_dim"], capacity, **options)


def hiddens(m, width=64):
    return np.random.default_rng(7).normal(size=(m, width)).astype(np.float32)


def run(parts, hidden, where, sequences=1, record=False):
    """Hidden states behind the core's layer; with record, the sites' inputs as well."""
    hidden = hidden.copy()
    cache = new_cache(_C, parts, sequences, 1200)
    recorded = _C.DecoderLayer(**parts).forward(hidden, *where, cache, 0, record=record)
    return (hidden, recorded) if record else hidden


def assert_close(got, expected):
    assert got.shape == expected.shape
    largest = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE * largest, rtol=0)


def assert_equals_twin(parts, twin):
    """Outputs and the inputs of every site, for three sequences of unequal lengths."""
    where, hidden = tokens([9, 1, 20]), hiddens(30)
    expected = hidden.astype(np.float64)
    inputs = reference.DecoderLayer(**twin).forward(
        expected, *where, new_cache(reference, twin, 3), 0, record=True
    )
    got, recorded = run(parts, hidden, where, 3, record=True)
    assert_close(got, expected)
    assert list(recorded) == list(inputs) == list(parts["sites"])
    for site, value in recorded.items():
        assert value.dtype == np.float32
        assert_close(value, inputs[site])
