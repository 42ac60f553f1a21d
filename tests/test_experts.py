"""Layers with experts against the NumPy twin, and bit for bit against themselves."""

import ctypes
import mmap
import sys

import ml_dtypes
import numpy as np
import pytest
from blocks import TOLERANCE, assert_close, assert_equals_twin, hiddens, new_cache, run, tokens
from experts import HIDDEN, INNER, layers

from singlequant import _C, _reference as reference

SEED = 5
DEEPSEEK = {"scoring": "sigmoid", "normalize": True, "scale": 2.5, "groups": 4, "chosen_groups": 2,
            "group_score": "top2", "correction": True, "chosen": 3}  # fmt: skip
GPT_OSS = {"scoring": "chosen", "router_bias": True, "activation": "swiglu_clamped", "limit": 0.75}
FORMS = {
    "softmax": {},
    "mixtral": {"options": {"normalize": True}},
    "qwen2-moe": {"options": {"shared_gate": True}, "shared": "shared_gate_up"},
    "deepseek-v2": {"options": {"groups": 4, "chosen_groups": 2, "scale": 4.0},
                    "shared": "shared_gate_up"},
    "deepseek-v3": {"options": DEEPSEEK, "shared": "shared_gate_up"},
    "granite": {"options": {"scoring": "chosen", "chosen": 3}},
    "gpt-oss": {"options": GPT_OSS, "bias": True},
    "not-gated": {"options": {"activation": "relu2"}, "gated": False},
    "all-chosen": {"options": {"chosen": 8}},
    "one-expert": {"options": {"count": 1, "chosen": 1, "scoring": "sigmoid"}},
    "float16-router": {"dtype": np.float16, "options": {"shared_gate": True}, "shared": "shared"},
    "bfloat16-router": {"dtype": ml_dtypes.bfloat16},
    "parallel": {"parallel": True, "shared": "qkv"},
}  # fmt: skip


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_form_equals_twin(name, packed):
    assert_equals_twin(*layers(**FORMS[name], packed=packed, rotated=packed))


@pytest.mark.parametrize("name", sorted(FORMS.keys() - {"softmax", "bfloat16-router"}))
def test_form_is_seen(name):
    """The form's result is far from the plain one's."""
    where, hidden = tokens([20]), hiddens(20)
    before, after = (run(layers(**FORMS[form])[0], hidden, where) for form in ("softmax", name))
    assert np.abs(after - before).max() > 100 * TOLERANCE


@pytest.mark.parametrize("key", ["normalize", "scale", "groups", "group_score", "correction",
                                 "chosen", "scoring"])
def test_every_key_of_a_router_is_seen(key):
    where, hidden = tokens([40]), hiddens(40)
    without = {k: v for k, v in DEEPSEEK.items() if k != key}
    if key == "groups":
        del without["chosen_groups"]
    before, after = (run(layers(options)[0], hidden, where) for options in (DEEPSEEK, without))
    assert np.abs(after - before).max() > 100 * TOLERANCE


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", FORMS)
def test_prompt_batch_and_steps_give_the_same_bits(name, bits):
    parts, _ = layers(**FORMS[name], packed=True, bits=bits, rotated=True)
    lengths = [70, 1, 12]
    hidden = hiddens(sum(lengths))
    together = np.split(run(parts, hidden, tokens(lengths), 3), np.cumsum(lengths)[:-1])
    layer = _C.DecoderLayer(**parts)
    for own, whole in zip(np.split(hidden, np.cumsum(lengths)[:-1]), together, strict=True):
        np.testing.assert_array_equal(run(parts, own, tokens([len(own)])), whole)
        cache = new_cache(_C, parts, capacity=128)
        for t, token in enumerate(own):
            step = token[None].copy()
            layer.forward(step, [0], [t], cache, 0)
            np.testing.assert_array_equal(step[0], whole[t])


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("bits", [4, 8])
def test_layer_with_codes_equals_twin(bits):
    """A code within 1e-5 of a boundary may differ by one: few values may, and by little."""
    parts, twin = layers(**FORMS["deepseek-v3"], packed=True, bits=bits, rotated=True)
    hidden, where = hiddens(33), tokens([33])
    expected = hidden.astype(np.float64)
    cache = new_cache(reference, twin)
    reference.DecoderLayer(**twin).forward(expected, *where, cache, 0)
    error = np.abs(run(parts, hidden, where) - expected).max(axis=1) / np.abs(expected).max()
    assert np.median(error) < 2e-5
    assert error.max() < (0.1 if bits == 4 else 0.01)


@pytest.mark.parametrize("name", ["qwen2-moe", "deepseek-v3", "gpt-oss", "bfloat16-router"])
def test_threads_do_not_change_bits(name):
    """More tokens than are worked on at a time."""
    parts, _ = layers(**FORMS[name], packed=True, bits=8)
    hidden, seen = hiddens(1100), set()
    for threads in (1, 2, 3):
        _C.set_num_threads(threads)
        got, recorded = run(parts, hidden, tokens([1100]), record=True)
        seen.add((got.tobytes(), *(x.tobytes() for x in recorded.values())))
    assert len(seen) == 1


def test_record_of_an_expert_is_its_tokens_in_order_over_all_chunks():
    parts, twin = layers(DEEPSEEK, shared="shared_gate_up")
    del parts["norms"]["before_mlp"]
    parts["attention"]["o"] = ("o", np.zeros((HIDDEN, HIDDEN), np.float32), None)
    hidden = hiddens(1100)
    _, recorded = run(parts, hidden, tokens([1100]), record=True)
    index, _ = reference.route(twin["experts"], hidden)
    for i in range(8):
        mine = hidden[(index == i).any(axis=1)]
        np.testing.assert_array_equal(recorded[f"gate_up.{i}"], mine)
        assert recorded[f"down.{i}"].shape == (len(mine), INNER)
    np.testing.assert_array_equal(recorded["shared_gate_up"], hidden)
    assert recorded["qkv"].shape == (1100, HIDDEN)


def test_record_may_be_written_and_outlives_the_layer():
    parts, _ = layers()
    _, recorded = run(parts, hiddens(5), tokens([5]), record=True)
    for value in recorded.values():
        assert value.flags.c_contiguous
        value[:] = 1
    kept = recorded.pop("gate_up.3")
    del recorded
    assert (kept == 1).all()


def only(parts, *chosen):
    """Routes every token to these experts."""
    parts["experts"]["router"] = np.zeros((8, HIDDEN), np.float32)
    bias = np.zeros(8, np.float32)
    bias[list(chosen)] = 5
    parts["experts"]["router_bias"] = bias


def test_record_of_an_expert_that_nobody_chose_is_empty():
    parts, _ = layers()
    only(parts, 2, 5)
    _, recorded = run(parts, hiddens(5), tokens([5]), record=True)
    assert {name: len(x) for name, x in recorded.items() if name.startswith("down")} == {
        f"down.{i}": 5 * (i in (2, 5)) for i in range(8)}
    assert recorded["down.0"].shape == (0, INNER)
    _, recorded = run(parts, hiddens(0), tokens([0]), record=True)
    assert {len(x) for x in recorded.values()} == {0}


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "chosen"])
def test_equal_scores_go_to_the_lower_index(scoring):
    parts, _ = layers({"scoring": scoring, "chosen": 3})
    only(parts, 6)
    _, recorded = run(parts, hiddens(4), tokens([4]), record=True)
    assert [len(recorded[f"down.{i}"]) for i in range(8)] == [4, 4, 0, 0, 0, 0, 4, 0]
    parts["experts"] |= {"groups": 4, "chosen_groups": 2}
    _, recorded = run(parts, hiddens(4), tokens([4]), record=True)
    assert [len(recorded[f"down.{i}"]) for i in range(8)] == [4, 4, 0, 0, 0, 0, 4, 0]


def test_memory_of_experts_that_nobody_chose_is_not_read():
    """Their weights lie on pages that may not be read."""
    parts, _ = layers()
    only(parts, 2, 5)
    expected = run(parts, hiddens(5), tokens([5]))
    closed = mmap.mmap(-1, mmap.PAGESIZE * 2)
    weight = np.frombuffer(closed, np.float32)[: INNER * HIDDEN]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for i in (0, 1, 3, 4, 6, 7):
        parts["experts"]["each"][i] = (
            (f"gate_up.{i}", weight.reshape(INNER, HIDDEN), None),
            (f"gate_up.{i}", weight.reshape(INNER, HIDDEN), None),
            (f"down.{i}", weight.reshape(HIDDEN, INNER), None),
        )
    assert libc.mprotect(weight.ctypes.data, 2 * mmap.PAGESIZE, 0) == 0
    np.testing.assert_array_equal(run(parts, hiddens(5), tokens([5])), expected)


@pytest.mark.parametrize("options", [{}, DEEPSEEK, GPT_OSS])
def test_token_that_is_not_finite_leaves_the_others_alone(options):
    parts, _ = layers(options)
    parts["norms"] = {}
    for bad in (np.nan, np.inf):
        hidden = hiddens(6)
        expected = run(parts, hidden[:5], tokens([5, 0]), 2)
        hidden[5] = bad
        got = run(parts, hidden, tokens([5, 1]), 2)
        assert_close(got[:5], expected)
        assert np.isnan(got[5]).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_group_whose_score_is_no_number_is_the_last(bad):
    """Logits of Inf and -Inf stand in one group, whose sum is NaN; the others score 10, 8 and 6."""
    parts, _ = layers({"scoring": "chosen", "groups": 4, "chosen_groups": 2, "chosen": 3,
                       "group_score": "top2"}, parallel=True)  # fmt: skip
    parts["norms"] = {}
    parts["experts"]["router"] = np.zeros((8, HIDDEN), np.float32)
    parts["experts"]["router_bias"] = np.array([bad, -bad, 5, 5, 4, 4, 3, 3], np.float32)
    _, recorded = run(parts, hiddens(4), tokens([4]), record=True)
    assert [len(recorded[f"down.{i}"]) for i in range(8)] == [0, 0, 4, 4, 4, 0, 0, 0]


def test_scores_that_vanish_give_zeros():
    """Sigmoids that underflow have a sum of 0."""
    parts, _ = layers({"scoring": "sigmoid", "normalize": True})
    parts["experts"]["router"] = np.zeros((8, HIDDEN), np.float32)
    parts["experts"]["router_bias"] = np.full(8, -200, np.float32)
    parts["attention"]["o"] = ("o", np.zeros((HIDDEN, HIDDEN), np.float32), None)
    np.testing.assert_array_equal(run(parts, hiddens(5), tokens([5])), hiddens(5))


def test_many_experts_of_many_sites():
    rng, options = np.random.default_rng(0), {"count": 128, "chosen": 8, "normalize": True}
    parts, twin = layers(options, packed=True, rotated=True)
    assert len(parts["sites"]) == 2 + 2 * 128
    hidden = rng.normal(size=(300, HIDDEN)).astype(np.float32)
    expected = hidden.astype(np.float64)
    reference.DecoderLayer(**twin).forward(
        expected, *tokens([300]), new_cache(reference, twin, 1, 300), 0
    )
    got, recorded = run(parts, hidden, tokens([300]), record=True)
    assert_close(got, expected)
    assert sum(len(recorded[f"down.{i}"]) for i in range(128)) == 300 * 8


def test_decoder_runs_layers_with_and_without_experts():
    many = [layers(**FORMS[name], packed=True, bits=8)[0] for name in ("deepseek-v3", "gpt-oss")]
    plain = dict(many[0], mlp=many[0]["experts"]["shared"], experts=None)
    plain["sites"] = {name: site for name, site in plain["sites"].items() if "." not in name}
    stack = [_C.DecoderLayer(**p) for p in (plain, *many)]
    decoder, caches = _C.Decoder(stack), [new_cache(_C, plain, 1, 64, 3) for _ in range(2)]
    one, other = hiddens(20), hiddens(20)
    decoder.forward(one, *tokens([20]), caches[0])
    for i, layer in enumerate(stack):
        layer.forward(other, *tokens([20]), caches[1], i)
    np.testing.assert_array_equal(one, other)
    assert repr(stack[1]) == ("DecoderLayer(hidden=64, experts=3 of 8, intermediate=32, heads=4, "
                              "kv_heads=2, 31 of 31 packed)")
    assert "DecoderLayer(hidden=64, intermediate=96," in repr(decoder)


def test_layer_gives_its_references_back():
    parts, twin = layers(**FORMS["deepseek-v3"], packed=True)
    del twin
    e = parts["experts"]
    watched = [e["router"], e["correction"], e["each"][3][0][1], e["shared"]["up"][1]]
    before = [sys.getrefcount(x) for x in watched]
    layer = _C.DecoderLayer(**parts)
    assert all(sys.getrefcount(x) > n for x, n in zip(watched, before, strict=True))
    del layer
    e["chosen"] = 9
    with pytest.raises(ValueError, match="experts.chosen"):
        _C.DecoderLayer(**parts)
    assert [sys.getrefcount(x) for x in watched] == before


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"])
def test_activation_equals_twin(rng, name, gated):
    gate, up = rng.normal(size=(2, 30, 70)).astype(np.float32) * 3
    gate = gate if gated else None
    assert_close(_C.activate(name, gate, up), reference.activate(name, gate, up))


def test_clamped_swiglu_equals_twin_beyond_its_limits(rng):
    gate, up = rng.normal(size=(2, 30, 70)).astype(np.float32) * 6
    gate[0, :5], up[0, :5] = (-3e38, np.inf, 3e38, 7, np.nan), (3e38, -3e38, np.inf, -np.inf, 1)
    got = _C.activate("swiglu_clamped", gate, up, 7.0)
    expected = reference.activate("swiglu_clamped", gate, up, 7.0)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-30)
    assert np.isnan(got).sum() == 1


def test_activate_says_what_does_not_fit():
    x = np.ones((2, 3), np.float32)
    for arguments, message in [
        (("swish", None, x), "activate: activation: expected 'silu', .*, got 'swish'"),
        (("silu", x, x, 7.0), "activate.limit: expected 0, as the activation has none, got 7"),
        (("swiglu_clamped", x, x), "activate.limit: expected more than 0, got 0"),
        (("swiglu_clamped", None, x, 7.0), "activate.gate: expected one, as the activation is gat"),
        (("silu", x[:1], x), r"gate: expected shape\[0\] = 2, got 1"),
        (("silu", x[:, :2], x), r"gate: expected shape\[1\] = 3, got 2"),
        (("silu", None, x[0]), "up: expected 2 dimensions, got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.activate(*arguments)


# ---- refusals -----------------------------------------------------------------------------------


def replaced(key, value):
    """Good arguments of everything, with the experts' entry `key` replaced."""
    parts, _ = layers(DEEPSEEK | {"shared_gate": True}, shared="shared_gate_up")
    if value is ...:
        del parts["experts"][key]
    else:
        parts["experts"][key] = value
    return parts


def linear(site, n, k, dtype=np.float32):
    return site, np.zeros((n, k), dtype), None


def swapped(index, role, value):
    each = list(replaced("count", 8)["experts"]["each"])
    one = list(each[index])
    one[role] = value
    each[index] = tuple(one)
    return each


NAN = float("nan")
VALUES = [
    ("count", 0, "experts.count: expected 1 to 2048, got 0"),
    ("count", 2**40, "experts.count: expected 1 to 2048, got 1099511627776"),
    ("count", 9, r"experts.router: expected shape\[0\] = 9, got 8"),
    ("chosen", 0, "experts.chosen: expected 1 to 8, got 0"),
    ("chosen", 9, "experts.chosen: expected 1 to 8, got 9"),
    ("chosen", 5, "experts.chosen: expected at most the 4 experts of 2 groups, got 5"),
    ("scoring", "top", "experts: scoring: expected 'softmax', 'sigmoid' or 'chosen', got 'top'"),
    ("scoring", None, "experts: scoring: expected 'softmax', 'sigmoid' or 'chosen', got None"),
    ("group_score", "sum", "experts: group_score: expected 'max' or 'top2', got 'sum'"),
    ("normalize", 2, "experts: normalize: expected True or False, got 2"),
    ("scale", NAN, "experts: scale: expected a finite number, got nan"),
    ("groups", 0, "experts.groups: expected 1 to 8, got 0"),
    ("groups", 3, "experts.groups: expected a divisor of count = 8, got 3"),
    ("groups", 8, "experts.groups: expected groups of at least 2 experts, got groups of 1"),
    ("chosen_groups", 0, "experts.chosen_groups: expected 1 to 4, got 0"),
    ("chosen_groups", 5, "experts.chosen_groups: expected 1 to 4, got 5"),
    ("router", np.zeros((8, 63), np.float32), r"experts.router: expected shape\[1\] = 64, got 63"),
    ("router", np.zeros(8, np.float32), "experts.router: expected 2 dimensions, got 1"),
    ("router_bias", np.zeros(7), r"experts.router_bias: expected shape\[0\] = 8, got 7"),
    ("correction", np.zeros(9), r"experts.correction: expected shape\[0\] = 8, got 9"),
    ("activation", "swish", "experts: activation: expected 'silu', .* 'swiglu_clamped', got 'swis"),
    ("activation", "swiglu_clamped", r"experts.each\[0\].limit: expected more than 0, got 0"),
    ("limit", 7.0, r"experts.each\[0\].limit: expected 0, as the activation has none, got 7"),
    ("each", [], "experts.each: expected count = 8 experts, got 0"),
    ("each", swapped(5, 1, linear("gate_up.5", 31, 64)),
     r"experts.each\[5\].up: n: expected 32, as in the first, got 31"),
    ("each", swapped(5, 0, linear("gate_up.5", 31, 64)),
     r"experts.each\[5\].gate: expected \(n, k\) = \(32, 64\), got \(31, 64\)"),
    ("each", swapped(7, 2, linear("down.7", 63, 32)),
     r"experts.each\[7\].down: expected \(n, k\) = \(64, 32\), got \(63, 32\)"),
    ("each", swapped(4, 1, linear("gate_up.3", 32, 64)),
     r"site gate_up.3: expected linears that read one value, got experts.each\[4\].up, which"),
    ("each", swapped(4, 1, linear("shared_gate_up", 32, 64)),
     r"site shared_gate_up: expected linears that read one value, got experts.shared.gate"),
    ("each", swapped(4, 1, linear("nowhere", 32, 64)),
     r"experts.each\[4\].up: expected one of the sites .*'nowhere'"),
    ("shared", None, "experts.shared_gate: expected none without shared, got one"),
    ("shared_gate", np.zeros((2, 64), np.float32),
     r"experts.shared_gate: expected shape\[0\] = 1, got 2"),
    ("colour", None, "experts: unknown key 'colour'"),
    *[(key, ..., f"experts: '{key}' is missing")
      for key in ("count", "chosen", "scoring", "router", "activation", "each")],
]  # fmt: skip
TYPES = [
    ("count", "8", "experts: count: expected an integer, got str"),
    ("normalize", None, "experts: normalize: expected an integer, got NoneType"),
    ("router", np.zeros((8, 64)), "experts.router: expected float32, float16 or"),
    ("each", 3, "experts.each: expected a list, got int"),
    ("each", [None] * 8, r"experts.each\[0\]: expected \(gate or None, up, down\), got None"),
    ("each", swapped(5, 1, None), r"experts.each\[5\].up: expected \(site, weight, bias or None"),
    ("shared", [], "experts.shared: expected a dict, got list"),
]


@pytest.mark.parametrize(("key", "value", "message"), VALUES)
def test_experts_say_what_does_not_fit(key, value, message):
    with pytest.raises(ValueError, match=message):
        _C.DecoderLayer(**replaced(key, value))


@pytest.mark.parametrize(("key", "value", "message"), TYPES)
def test_experts_say_which_type_they_want(key, value, message):
    with pytest.raises(TypeError, match=message):
        _C.DecoderLayer(**replaced(key, value))


def test_layer_has_an_mlp_or_experts():
    parts = replaced("count", 8)
    with pytest.raises(ValueError, match="mlp: expected None, as there are experts, got dict"):
        _C.DecoderLayer(**(parts | {"mlp": parts["experts"]["shared"]}))
    with pytest.raises(TypeError, match="mlp: expected a dict, got NoneType"):
        _C.DecoderLayer(**(parts | {"experts": None}))
    with pytest.raises(TypeError, match="experts: expected a dict, got list"):
        _C.DecoderLayer(**(parts | {"experts": [parts["experts"]]}))
