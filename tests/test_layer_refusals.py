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
    ("attention.rotary", (np.ones(5), 1.0), "at most head_dim / 2 = 4 frequencies, got 5"),
    ("attention.rotary", (np.ones(0), 1.0), "attention.rotary: expected frequencies or None"),
    ("attention.rotary", (np.ones(4), -1.0), "attention.rotary: scale: expected at least 0"),
    ("attention.rotary", (np.ones((2, 2)), 1.0), "attention.rotary: expected 1 dimensions, got 2"),
    ("attention.q", linear("qkv", 40, 48), r"attention.q: expected \(n, k\) = \(48, 48\), got"),
    ("attention.k", linear("qkv", 48, 48), r"attention.k: expected \(n, k\) = \(16, 48\), got"),
    ("attention.v", linear("qkv", 16, 40), r"attention.v: expected .*, got \(16, 40\)"),
    ("attention.o", linear("o", 48, 40), r"attention.o: expected \(n, k\) = \(48, 48\), got"),
    ("attention.k", linear("qkv", 16, 48, np.zeros(15)),
     r"attention.k: bias: expected shape\[0\] = 16, got 15"),
    ("attention.o", linear("nowhere", 48, 48), "attention.o: expected one of the sites .*'nowhere"),
    ("attention.o", linear("qkv", 48, 48),
     "site qkv: expected linears that read one value, got attention.o, which reads another"),
    ("attention.q_norm", rms(48), r"attention.q_norm: weight: expected shape\[0\] = 8, got 48"),
    ("attention.k_norm", rms(8, eps=-1.0), "attention.k_norm: eps: expected at least 0, got -1"),
    # mlp
    ("mlp.activation", "swish", "mlp: activation: expected 'silu', .*, got 'swish'"),
    ("mlp.activation", None, "mlp: activation: expected 'silu', .*, got None"),
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
    ("attention.rotary", np.ones(4), r"attention.rotary: expected \(inv_freq, scale\) or None"),
    ("attention.q", np.zeros((48, 48)), r"attention.q: expected \(site, weight, bias or None\)"),
    ("attention.q", ("qkv", np.zeros((48, 48)), None), "attention.q: expected float32, float16 or"),
    ("mlp", [], "mlp: expected a dict, got list"),
    ("mlp.up", None, r"mlp.up: expected \(site, weight, bias or None\), got None"),
    ("norms", (np.ones(48),) * 2, "norms: expected a dict, got tuple"),
    ("norms.before_mlp", np.ones(48), r"norms.before_mlp: expected \(kind, eps, offset, weight"),
    ("norms.before_mlp", rms(48, eps="1"), "norms.before_mlp: eps: expected a number, got str"),
    ("norms.before_mlp", rms(48, offset=None), "norms.before_mlp: offset: expected a number, got"),
    ("attention.rotary", (np.ones(4), None), "attention.rotary: scale: expected a number, got"),
    ("norms.before_mlp", rms(48, weight=None), "norms.before_mlp: weight: expected an array"),
]


@pytest.mark.parametrize(("path", "value", "message"), VALUES)
def test_layer_says_what_does_not_fit(path, value, message):
    with pytest.raises(ValueError, match=message):
        _C.DecoderLayer(**changed(path, value))


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
