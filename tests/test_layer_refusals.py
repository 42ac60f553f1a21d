"""What a decoder layer refuses: hostile dicts, shapes that do not agree, sites that lie."""

import numpy as np
import pytest
from blocks import geometry, llama, new_cache, shapes

from singlequant import _C

A = geometry(48, 40, 6, 2, 8)


def arguments(packed=()):
    """A good layer; the roles in packed have packed weights."""
    rng, linears = np.random.default_rng(0), {}
    for role, (n, k) in shapes(A).items():
        w = rng.normal(size=(n, k)).astype(np.float32)
        codes, scales, _ = _C.quantize(w)
        linears[role] = (_C.PackedWeight(_C.pack(codes), scales, k) if role in packed else w, None)
    return llama(A, linears)


def changed(path, value):
    """Good arguments with the entry at a path such as "attention.heads" replaced, or removed where
    value is `...`."""
    good = arguments()
    *parents, key = path.split(".")
    place = good
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return good


def linear(site, n, k, bias=None):
    return site, np.zeros((n, k), np.float32), bias


def rms(n, **changes):
    kind, eps, offset, weight, bias = "rms", 1e-5, 0.0, np.ones(n), None
    values = {"kind": kind, "eps": eps, "offset": offset, "weight": weight, "bias": bias} | changes
    return tuple(values.values())


def turning(half, **changes):
    return {"inv_freq": np.ones(half, np.float32), **changes}


TURN, NAN, INF = _C.Rotation(48, np.eye(6), np.eye(8)), float("nan"), float("inf")

VALUES = [
    ("hidden", -1, "hidden: expected 1 to 16777216, got -1"),
    ("hidden", 2**24 + 1, "norms.before_attention: weight: expected shape"),
    ("residual_scale", NAN, "residual_scale: expected a finite number"),
    # sites
    ("sites.qkv", (47, None, 16, 1.0), "site qkv: k: expected 48, as attention.q reads it, got 47"),
    ("sites.qkv", (0, None, 16, 1.0), "site qkv: k: expected 1 to 16777216, got 0"),
    ("sites.qkv", (2**24 + 1, None, 16, 1.0), "site qkv: k: expected 1 to 16777216, got 16777217"),
    ("sites.down", (48, None, 16, 1.0), "site down: k: expected 40, as mlp.down reads it, got 48"),
    ("sites.qkv", (48, TURN, 5, 1.0), "site qkv: bits: expected 4, 8 or 16, got 5"),
    ("sites.qkv", (48, None, 2**32 + 4, 1.0), "site qkv: bits: expected 4, 8 or 16, got 21474"),
    ("sites.o", (48, TURN, 4, 0.0), "site o: clip: expected more than 0"),
    ("sites.o", (48, TURN, 4, 1.1), "site o: clip: expected .* at most 1, got 1.1"),
    ("sites.o", (48, TURN, 4, NAN), "site o: clip: expected a finite number, got nan"),
    ("sites.down", (40, TURN, 4, 1.0), "site down: expected one of k = 40 inputs, got 48"),
    ("sites.spare", (48, None, 16, 1.0), "site spare: expected a linear that reads it, got none"),
    ("sites.qkv", ..., r"attention.q: expected one of the sites \('o', .*\), got 'qkv'"),
    # attention
    ("attention.heads", 5, "attention.heads: expected a multiple of kv_heads = 2, got 5"),
    ("attention.heads", 0, "attention.heads: expected 1 to 65536, got 0"),
    ("attention.heads", 2**17, "attention.heads: expected 1 to 65536, got 131072"),
    ("attention.heads", 2**70, "attention: heads: expected an integer of 64 bits, got 1180"),
    ("attention.kv_heads", -2, "attention.kv_heads: expected 1 to 65536, got -2"),
    ("attention.head_dim", 0, "attention.head_dim: expected 1 to 16777216, got 0"),
    ("attention.head_dim", 2**24, r"heads \* head_dim: expected 1 to 16777216, got"),
    ("attention.window", -1, "attention.window: expected 0 to 2147483647, got -1"),
    ("attention.scale", NAN, "attention: scale: expected a finite number, got nan"),
    ("attention.scale", 1e300, r"attention: scale: expected a finite number, got 1e\+300"),
    ("attention.rotary", turning(5), "at most head_dim / 2 = 4 frequencies, got 5"),
    ("attention.rotary", turning(0), "attention.rotary: inv_freq: expected frequencies, got none"),
    ("attention.rotary", turning(4, scale=-1.0), "attention.rotary: scale: expected at least 0"),
    ("attention.rotary", turning((2, 2)), "rotary: inv_freq: expected 1 dimensions, got 2"),
    ("attention.rotary", {}, "attention.rotary: 'inv_freq' is missing"),
    ("attention.rotary", turning(4, kind="yarn"), "attention.rotary: unknown key 'kind'"),
    ("attention.rotary", turning(4, interleaved=2), "interleaved: expected 0 to 1, got 2"),
    ("attention.rotary", turning(4, long_inv_freq=np.ones(3), original=8),
     r"attention.rotary: long_inv_freq: expected shape\[0\] = 4, got 3"),
    ("attention.rotary", turning(4, long_inv_freq=np.ones(4)),
     "attention.rotary: original: expected 1 to 2147483647, got 0"),
    ("attention.rotary", turning(4, dynamic=-1.0), "dynamic: expected at least 0, got -1"),
    ("attention.rotary", turning(4, dynamic=2.0, original=8), "theta: expected more than 0, got 0"),
    ("attention.rotary", turning(4, dynamic=2.0, theta=1e4), "original: expected 1 to"),
    ("attention.rotary", turning(1, dynamic=2.0, theta=1e4, original=8),
     "dynamic: expected at least 2 frequencies, got 1"),
    ("attention.rotary", turning(4, dynamic=2.0, theta=1e4, original=8, long_inv_freq=np.ones(4)),
     "attention.rotary: expected long_inv_freq or dynamic, got both"),
    ("attention.softcap", -1.0, "attention.softcap: expected at least 0, got -1"),
    ("attention.softcap", INF, "attention: softcap: expected a finite number, got inf"),
    ("attention.qkv_clip", -0.5, "attention.qkv_clip: expected at least 0, got -0.5"),
    ("attention.sinks", np.ones(5), r"attention.sinks: expected shape\[0\] = 6, got 5"),
    ("attention.sinks", np.full(6, NAN), "attention.sinks: expected finite numbers"),
    ("attention.slopes", np.ones((6, 1)), "attention.slopes: expected 1 dimensions, got 2"),
    ("attention.slopes", np.full(6, INF), "attention.slopes: expected finite numbers"),
    ("attention.slopes_bfloat16", True, "slopes_bfloat16: expected slopes beside it, got none"),
    ("attention.slopes_bfloat16", 2, "attention.slopes_bfloat16: expected 0 to 1, got 2"),
    ("attention.query_growth", 0.5, "query_original: expected 1 to 2147483647, got 0"),
    ("attention.query_growth", NAN, "attention: query_growth: expected a finite number, got nan"),
    ("attention.query_original", -1, "query_original: expected 0 to 2147483647, got -1"),
    ("attention.query_original", 2**31, "query_original: expected 0 to 2147483647, got 21474836"),
    ("attention.q", linear("qkv", 40, 48), r"attention.q: expected \(n, k\) = \(48, 48\), got"),
    ("attention.k", linear("qkv", 48, 48), r"attention.k: expected \(n, k\) = \(16, 48\), got"),
    ("attention.v", linear("qkv", 16, 40), r"attention.v: expected .*, got \(16, 40\)"),
    ("attention.o", linear("o", 48, 40), r"attention.o: expected \(n, k\) = \(48, 48\), got"),
    ("attention.k", linear("qkv", 16, 48, np.zeros(15)),
     r"attention.k: bias: expected shape\[0\] = 16, got 15"),
    ("attention.o", linear("nowhere", 48, 48), "attention.o: expected one of the sites .*'nowhere"),
    ("attention.o", linear("qkv", 48, 48),
     "site qkv: expected linears that read one value, got attention.o, which reads another"),
    ("attention.q_norm", rms(47), r"q_norm: weight: expected shape \(head_dim,\), .* with heads, "
     r"head_dim = 6, 8, got \(47,\)"),
    ("attention.k_norm", rms((6, 8)), r"k_norm: weight: .* head_dim = 2, 8, got \(6, 8\)"),
    ("attention.k_norm", rms((8, 2)), r"k_norm: weight: .* head_dim = 2, 8, got \(8, 2\)"),
    ("attention.k_norm", rms((2, 8), bias=np.ones(16)), "k_norm: bias: expected 2 dimensions"),
    ("attention.k_norm", rms(16, bias=np.ones(8)), r"k_norm: bias: expected shape\[0\] = 16, got"),
    ("attention.k_norm", rms(8, eps=-1.0), "attention.k_norm: eps: expected at least 0, got -1"),
    # mlp
    ("mlp.activation", "swish", "mlp: activation: expected 'silu', .*, got 'swish'"),
    ("mlp.activation", None, "mlp: activation: expected 'silu', .*, got None"),
    ("mlp.limit", 7.0, "mlp.limit: expected 0, as the activation has none, got 7"),
    ("mlp.limit", NAN, "mlp: limit: expected a finite number, got nan"),
    ("mlp.activation", "swiglu_clamped", "mlp.limit: expected more than 0, got 0"),
    ("mlp.gate", linear("gate_up", 39, 48), r"mlp.gate: expected \(n, k\) = \(40, 48\), got \(39"),
    ("mlp.up", linear("gate_up", 41, 48), r"mlp.gate: expected \(n, k\) = \(41, 48\), got \(40"),
    ("mlp.up", linear("gate_up", 40, 40), r"mlp.up: expected \(n, k\) = \(40, 48\), got \(40, 40"),
    ("mlp.up", linear("gate_up", 0, 48), "mlp.up: n: expected 1 to 16777216, got 0"),
    ("mlp.down", linear("down", 40, 40), r"mlp.down: expected \(n, k\) = \(48, 40\), got \(40, 40"),
    ("mlp.up", linear("qkv", 40, 48), "site qkv: expected linears that read one value, got mlp.up"),
    # norms
    ("norms.before_mlp", rms(47), r"norms.before_mlp: weight: expected shape\[0\] = 48, got 47"),
    ("norms.after_mlp", rms(48, bias=np.ones(3)), r"after_mlp: bias: expected shape\[0\] = 48"),
    ("norms.before_mlp", rms(48, kind="batch"), "before_mlp: kind: expected 'rms' or 'layer'"),
    ("norms.before_mlp", rms(48, eps=NAN), "norms.before_mlp: eps: expected a finite number"),
    ("norms.before_mlp", rms(48, eps=INF), "norms.before_mlp: eps: expected a finite number"),
]  # fmt: skip

# Changes of the attention of latent(): 6 heads of 5 + 3 * 2 channels, ranks of 12 and 10, values of
# 7.
LATENT = [
    ({"kv_a": None}, "attention: 'kv_a' is missing"),
    ({"kv_b": ...}, "attention: 'kv_b' is missing"),
    ({"q_b": None}, "attention: 'q_b' is missing"),
    ({"q_a": ...}, "attention: 'q_a' is missing"),
    ({"q_a": None, "q_b": None, "q_a_norm": None}, "attention: 'q' is missing"),
    ({"q": linear("qkv", 66, 48)}, "attention: q: expected none beside q_a, got one"),
    ({"v": linear("qkv", 66, 48)}, "attention: v: expected none beside kv_a, got one"),
    ({"k_norm": rms(11)}, "attention: k_norm: expected none beside kv_a, got one"),
    ({"value_dim": ...}, "attention.value_dim: expected 1 to 11, got 0"),
    ({"value_dim": 12}, "attention.value_dim: expected 1 to 11, got 12"),
    ({"value_dim": -1}, "attention.value_dim: expected 1 to 11, got -1"),
    ({"value_dim": 6}, r"attention.kv_b: expected \(n, k\) = \(66, 10\), got \(72, 10\)"),
    ({"kv_heads": 2}, "attention.kv_heads: expected heads = 6 in latent attention, got 2"),
    ({"rotary": None}, r"kv_a: expected \(n, k\) = \(10, 48\), got \(16, 48\)"),
    ({"rotary": turning(6)}, "attention.rotary: expected at most head_dim / 2 = 5 frequencies"),
    ({"q_a": linear("qkv", 13, 48)}, r"q_a_norm: weight: expected shape\[0\] = 13, got 12"),
    ({"q_a": linear("qkv", 13, 48), "q_a_norm": None},
     r"attention.q_b: expected \(n, k\) = \(66, 13\), got \(66, 12\)"),
    ({"q_a": linear("qkv", 0, 48), "q_a_norm": None}, "attention.q_a: expected at least 1 output"),
    ({"q_a": linear("qkv", 12, 47)}, r"q_a: expected \(n, k\) = \(12, 48\), got \(12, 47\)"),
    ({"q_b": linear("q_rank", 60, 12)}, r"q_b: expected \(n, k\) = \(66, 12\), got \(60, 12\)"),
    ({"kv_a": linear("qkv", 10, 48)}, r"kv_a: expected \(n, k\) = \(16, 48\), got \(10, 48\)"),
    ({"kv_a_norm": rms(16)}, r"attention.kv_a_norm: weight: expected shape\[0\] = 10, got 16"),
    ({"kv_b": linear("kv_rank", 72, 0), "kv_a_norm": None}, "attention.kv_b: k: expected 1 to"),
    ({"o": linear("o", 48, 66)}, r"attention.o: expected \(n, k\) = \(48, 42\), got \(48, 66\)"),
    ({"kv_b": linear("q_rank", 72, 10)}, "site q_rank: k: expected 10, as attention.kv_b reads"),
    ({"q_b": linear("qkv", 66, 12)}, "site qkv: k: expected 12, as attention.q_b reads it, got 48"),
]  # fmt: skip


def latent():
    """A good layer with latent attention."""
    good = arguments()
    good["sites"] |= {site: (k, None, 16, 1.0)
                      for site, k in (("q_rank", 12), ("kv_rank", 10), ("o", 42))}
    good["attention"] = {
        "heads": 6, "kv_heads": 6, "head_dim": 11, "value_dim": 7, "window": 0, "scale": 1.0,
        "rotary": turning(3), "q_a": linear("qkv", 12, 48), "q_b": linear("q_rank", 66, 12),
        "kv_a": linear("qkv", 16, 48), "kv_b": linear("kv_rank", 72, 10),
        "q_a_norm": rms(12), "kv_a_norm": rms(10), "o": linear("o", 48, 42),
    }
    return good


TYPES = [
    ("sites", [None] * 4, "sites: expected a dict, got list"),
    ("sites.qkv", None, r"site qkv: expected \(k, rotation or None, bits, clip\), got None"),
    ("sites.qkv", (48, None, 16), r"site qkv: expected \(k, rotation or None, bits, clip\), got"),
    ("sites.qkv", (48.0, None, 16, 1.0), "site qkv: k: expected an integer, got float"),
    ("sites.qkv", (48, None, "4", 1.0), "site qkv: bits: expected an integer, got str"),
    ("sites.qkv", (48, None, 4, None), "site qkv: clip: expected a number, got NoneType"),
    ("sites.qkv", (48, np.eye(8), 16, 1.0), "site qkv: expected a Rotation or None, got numpy.nd"),
    ("attention", None, "attention: expected a dict, got NoneType"),
    ("attention.heads", "six", "attention: heads: expected an integer, got str"),
    ("attention.heads", 6.0, "attention: heads: expected an integer, got float"),
    ("attention.scale", None, "attention: scale: expected a number, got NoneType"),
    ("attention.rotary", (np.ones(4), 1.0), "attention.rotary: expected a dict, got tuple"),
    ("attention.rotary", turning(4, original=None), "rotary: original: expected an integer, got"),
    ("attention.softcap", None, "attention: softcap: expected a number, got NoneType"),
    ("attention.sinks", "six", "attention.sinks: expected an array"),
    ("attention.q", np.zeros((48, 48)), r"attention.q: expected \(site, weight, bias or None\)"),
    ("attention.q", ("qkv", np.zeros((48, 48)), None), "attention.q: expected float32, float16 or"),
    ("mlp", [], "mlp: expected a dict, got list"),
    ("mlp.up", None, r"mlp.up: expected \(site, weight, bias or None\), got None"),
    ("norms", (np.ones(48),) * 2, "norms: expected a dict, got tuple"),
    ("norms.before_mlp", np.ones(48), r"norms.before_mlp: expected \(kind, eps, offset, weight"),
    ("norms.before_mlp", rms(48, eps="1"), "norms.before_mlp: eps: expected a number, got str"),
    ("norms.before_mlp", rms(48, offset=None), "norms.before_mlp: offset: expected a number, got"),
    ("attention.rotary", turning(4, scale=None), "rotary: scale: expected a number, got NoneType"),
    ("norms.before_mlp", rms(48, weight=None), "norms.before_mlp: weight: expected an array"),
]


@pytest.mark.parametrize(("path", "value", "message"), VALUES)
def test_layer_says_what_does_not_fit(path, value, message):
    with pytest.raises(ValueError, match=message):
        _C.DecoderLayer(**changed(path, value))


@pytest.mark.parametrize(("changes", "message"), LATENT)
def test_latent_attention_says_what_does_not_fit(changes, message):
    good = latent()
    for key, value in changes.items():
        good["attention"][key] = value
        if value is ...:
            del good["attention"][key]
    with pytest.raises(ValueError, match=message):
        _C.DecoderLayer(**good)


def test_latent_attention_reads_values_of_its_own():
    """q_b and kv_b read one value each: a site of equal width serves one of them."""
    good = latent()
    _C.DecoderLayer(**good)
    good["attention"] |= {"kv_b": linear("q_rank", 72, 12), "kv_a": linear("qkv", 18, 48),
                          "kv_a_norm": rms(12)}
    with pytest.raises(ValueError, match="q_rank: expected linears that read one value, got atten"):
        _C.DecoderLayer(**good)
    good["sites"]["kv_rank"] = 12, None, 16, 1.0
    good["attention"]["kv_b"] = linear("kv_rank", 72, 12)
    _C.DecoderLayer(**good)


@pytest.mark.parametrize("key", ["q_a", "kv_a", "kv_a_norm", "value_dim"])
def test_latent_parts_are_refused_beside_k_and_v(key):
    value = 4 if key == "value_dim" else latent()["attention"][key]
    message = "attention: ('kv_[ab]' is missing|k: expected none beside kv_a)"
    with pytest.raises(ValueError, match=message):
        _C.DecoderLayer(**changed(f"attention.{key}", value))


@pytest.mark.parametrize(("path", "value", "message"), TYPES)
def test_layer_says_which_type_it_wants(path, value, message):
    with pytest.raises(TypeError, match=message):
        _C.DecoderLayer(**changed(path, value))


@pytest.mark.parametrize("block", ["attention", "mlp", "norms"])
def test_unknown_keys_are_refused(block):
    with pytest.raises(ValueError, match=f"{block}: unknown key 'colour'"):
        _C.DecoderLayer(**changed(f"{block}.colour", None))
    good = arguments()
    good[block][3] = None
    with pytest.raises(ValueError, match=f"{block}: unknown key 3"):
        _C.DecoderLayer(**good)


@pytest.mark.parametrize("path", [f"{block}.{key}" for block in ("attention", "mlp")
                                  for key in arguments()[block]])
def test_missing_keys_are_named(path):
    block, key = path.split(".")
    with pytest.raises(ValueError, match=f"{block}: '{key}' is missing"):
        _C.DecoderLayer(**changed(path, ...))


def test_norm_of_a_sum_is_refused_in_a_parallel_layer():
    _C.DecoderLayer(**arguments(), norm_sums=True)
    with pytest.raises(ValueError, match="norm_sums: expected 0 in a parallel layer"):
        _C.DecoderLayer(**arguments(), norm_sums=True, parallel=True)


def test_clamped_swiglu_needs_a_gate():
    good = arguments()
    good["mlp"] |= {"activation": "swiglu_clamped", "limit": 7.0}
    _C.DecoderLayer(**good)
    good["mlp"]["gate"] = None
    with pytest.raises(ValueError, match="mlp.gate: expected one, as the activation is gated"):
        _C.DecoderLayer(**good)


def test_site_names_must_be_strings():
    good = arguments()
    good["sites"][4] = good["sites"].pop("down")
    with pytest.raises(TypeError, match="sites: expected names, got 4"):
        _C.DecoderLayer(**good)


def test_site_name_of_a_kind_of_its_own_is_refused():
    good = arguments()
    good["sites"][type("Name", (str,), {})("down")] = good["sites"].pop("down")
    with pytest.raises(TypeError, match="sites: expected names, got 'down'"):
        _C.DecoderLayer(**good)


def test_number_beyond_a_double_is_named():
    with pytest.raises(ValueError, match="attention: scale: expected a number, got one too large"):
        _C.DecoderLayer(**changed("attention.scale", 10**400))


def test_layer_without_sites_is_refused():
    with pytest.raises(ValueError, match=r"attention.q: expected one of the sites \(\), got 'qkv'"):
        _C.DecoderLayer(**changed("sites", {}))


@pytest.mark.parametrize("parallel", [False, True])
def test_up_may_share_the_site_of_queries_only_where_both_read_one_norm(parallel):
    good = arguments() | {"parallel": parallel}
    for role in ("gate", "up"):
        good["mlp"][role] = ("qkv", *good["mlp"][role][1:])
    del good["sites"]["gate_up"]
    with pytest.raises(ValueError, match="site qkv: expected linears that read one value"):
        _C.DecoderLayer(**good)
    del good["norms"]["before_mlp"]
    if parallel:
        _C.DecoderLayer(**good)
    else:
        with pytest.raises(ValueError, match="site qkv: expected linears that read one value"):
            _C.DecoderLayer(**good)


def test_packed_shapes_are_checked():
    good, other = arguments(("q", "down")), arguments()
    good["attention"]["q"] = ("qkv", good["mlp"]["down"][1], None)
    with pytest.raises(ValueError, match=r"attention.q: expected .* = \(48, 48\), got \(48, 40\)"):
        _C.DecoderLayer(**good)
    _C.DecoderLayer(**other)


def test_positional_arguments_are_those_of_the_signature():
    good = arguments()
    layer = _C.DecoderLayer(*good.values(), False, 1.0)
    assert repr(layer) == ("DecoderLayer(hidden=48, intermediate=40, heads=6, kv_heads=2, "
                           "0 of 7 packed)")
    with pytest.raises(TypeError, match="layers"):
        _C.DecoderLayer(**good, layers=3)


def test_forward_refuses_what_it_cannot_update_in_place():
    good = arguments()
    layer, cache = _C.DecoderLayer(**good), new_cache(_C, good)
    read_only = np.ones((1, 48), np.float32)
    read_only.flags.writeable = False
    for bad, error, message in [
        (np.ones((1, 48)), TypeError, "hidden: expected a float32 array"),
        ([[1.0] * 48], TypeError, "hidden: expected a float32 array"),
        (np.ones((2, 96), np.float32)[:, ::2], ValueError, "hidden: expected a C-contiguous"),
        (read_only, ValueError, "hidden: expected a C-contiguous, writable"),
        (np.ones((1, 48), ">f4"), ValueError, "hidden: expected a C-contiguous, writable, native"),
        (np.ones((1, 47), np.float32), ValueError, r"hidden: expected shape\[1\] = 48, got 47"),
        (np.ones(48, np.float32), ValueError, "hidden: expected 2 dimensions, got 1"),
    ]:
        with pytest.raises(error, match=message):
            layer.forward(bad, [0] * len(bad), [0] * len(bad), cache, 0)
