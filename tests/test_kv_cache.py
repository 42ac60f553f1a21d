# SPDX-License-Identifier: Apache-2.0
"""The KV cache: pages that come and go, hostile input, and quantized models that use it."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from cached_attention import BITS, PAGE, TOLERANCE, Attention, hiddens, tokens
from test_hygiene import leaks

import singlequant as sq
from singlequant import _C
from singlequant.checkpoint.views import ValueCheckpoint
from singlequant.runtime.model import Model
from singlequant.sweep.prepare import prepare

SEED = 21


# ---- pages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head_dim", [2, 10, 64, 128])
def test_memory_is_that_of_the_pages_held(rng, bits, head_dim):
    attention = Attention(rng, 3, 3, head_dim)
    cache = attention.cache(2, layers=2, bits=bits)
    codes = 3 * 2 * PAGE * head_dim * bits / 8
    scales = 0 if bits >= 16 else 3 * 4 * PAGE * 2
    padding = 0 if head_dim % 16 == 0 else 3 * PAGE * (14 if bits == 4 else 6 if bits == 8 else 0)
    assert codes + scales <= cache.page_bytes <= codes + scales + padding + 3 * 64
    assert cache.nbytes == 0
    attention.run(hiddens(rng, PAGE), *tokens(PAGE), cache)
    assert cache.nbytes == cache.page_bytes
    attention.run(hiddens(rng, 1), *tokens(1, PAGE), cache)
    assert cache.nbytes == 2 * cache.page_bytes
    attention.run(hiddens(rng, 1), *tokens(1, 0, 1), cache, 1)
    assert cache.nbytes == 3 * cache.page_bytes
    cache.release(0)
    assert cache.nbytes == 2 * cache.page_bytes  # one held, one free
    cache.release(1)
    assert cache.nbytes == 0


def test_4_bits_take_little_more_than_an_eighth_of_32():
    sizes = {b: _C.KVCache(1, 1, 8, 128, 64, b).page_bytes for b in BITS}
    assert sizes[16] / sizes[32] == 1 / 2
    assert sizes[8] / sizes[32] == 8.25 / 32
    assert sizes[4] / sizes[32] == 4.25 / 32


@pytest.mark.parametrize("bits", BITS)
def test_reused_pages_hold_nothing_of_the_past(rng, bits):
    attention = Attention(rng)
    cache, fresh = attention.cache(2, bits=bits), attention.cache(2, bits=bits)
    attention.run(hiddens(rng, 150) * 5, *tokens(150), cache)
    attention.run(hiddens(rng, 150), *tokens(150, 0, 1), cache)
    cache.release(0)
    assert not np.any(cache.read(0, 0, 150))
    hidden = hiddens(rng, 3)
    for each in (cache, fresh):  # positions 0 to 4 and 8 on stay unwritten, and are seen as zeros
        out = attention.run(hidden, *tokens(3, 5), each)
    for one, other in zip(cache.read(0, 0, 300), fresh.read(0, 0, 300), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(out, attention.run(hidden, *tokens(3, 5), cache))
    np.testing.assert_allclose(
        out, attention.expected(hidden, np.arange(5, 8), cache), atol=TOLERANCE
    )


@pytest.mark.parametrize("bits", BITS)
def test_gap_of_whole_pages_holds_zeros(rng, bits):
    attention = Attention(rng)
    cache, hidden = attention.cache(bits=bits), hiddens(rng, 1)
    got = attention.run(hidden, [0], [3 * PAGE + 1], cache)
    assert cache.nbytes == cache.page_bytes
    np.testing.assert_allclose(got, attention.expected(hidden, [3 * PAGE + 1], cache),
                               atol=TOLERANCE)


def test_reserve_takes_the_pages_of_all_layers_or_none(rng):
    attention = Attention(rng)
    page = attention.cache(bits=4).page_bytes
    cache = attention.cache(4, layers=3, bits=4, limit=7 * page)
    cache.reserve([0, 0, 1], [0, PAGE - 1, 5])
    assert cache.nbytes == 6 * page
    with pytest.raises(MemoryError, match=rf"limit: expected room for more pages of {page} bytes, "
                                          rf"found {6 * page} of {7 * page} bytes taken"):
        cache.reserve([0, 2], [5, 0])
    assert cache.nbytes == 6 * page
    cache.reserve([0], [7])
    hidden = hiddens(rng, 2)
    with pytest.raises(MemoryError, match="limit: expected room for more pages of"):
        attention.layer.forward(hidden, [0, 0], [PAGE, 2 * PAGE], cache, 1)
    assert not np.any(cache.read(1, 0, 200))
    attention.layer.forward(hidden, [1, 1], [PAGE, PAGE + 1], cache, 1)  # the seventh
    assert cache.nbytes == 7 * page
    cache.release(1)
    cache.reserve([3], [9])  # takes the place of what was freed
    assert cache.nbytes <= 7 * page


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # CPython's note on forking with threads
def test_cache_in_use_at_a_fork_is_refused_by_the_child_and_an_idle_one_is_not(rng):
    attention = Attention(rng)
    many = 12_000  # half a second of attention
    busy, idle, hidden = attention.cache(capacity=many), attention.cache(), hiddens(rng, many)
    sq.set_num_threads(1)
    thread = threading.Thread(target=attention.run, args=(hidden, *tokens(many), busy))
    thread.start()
    while not busy.nbytes:
        time.sleep(0.001)
    child = os.fork()  # the thread is in the core, in a call that has taken its pages
    if child == 0:
        signal.alarm(20)  # ends the child where it would wait for ever
        failed = 1
        try:
            idle.reserve([0], [5])
            busy.reserve([0], [5])
        except RuntimeError as error:
            failed = 0 if "when this process was forked" in str(error) else 2
        os._exit(failed)
    _, status = os.waitpid(child, 0)
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_forward_refuses_more_tokens_than_a_call_may_have(rng):
    attention = Attention(rng)
    hidden = np.empty((2**24 + 1, 24), np.float32)  # never touched
    with pytest.raises(ValueError, match="hidden: expected at most 16777216 tokens, got 16777217"):
        attention.layer.forward(hidden, [0], [0], attention.cache(), 0)


def test_limit_below_a_page_is_reached_at_once(rng):
    attention = Attention(rng)
    with pytest.raises(MemoryError, match="limit"):
        attention.run(hiddens(rng, 1), [0], [0], attention.cache(limit=5))


def test_many_sequences_come_and_go_without_growing(rng):
    attention = Attention(rng, 2, 1, 8)
    cache, largest = attention.cache(8, bits=4), 0
    for round_ in range(60):
        slot, n = round_ % 8, int(rng.integers(1, 200))
        cache.release(slot)
        attention.run(hiddens(rng, n), *tokens(n, 0, slot), cache)
        largest = max(largest, cache.nbytes)
    assert largest <= 2 * 8 * 4 * cache.page_bytes
    for slot in range(8):
        cache.release(slot)
    assert cache.nbytes == 0


@pytest.mark.parametrize("bits", [32, 4])
def test_cache_leaks_nothing(rng, bits):
    attention = Attention(rng, 2, 1, 12)  # with a dense Hadamard
    hidden = hiddens(rng, 70)

    def call():
        cache = attention.cache(2, bits=bits, limit=3 * attention.cache(bits=bits).page_bytes)
        attention.run(hidden, *tokens(70), cache)
        with pytest.raises(MemoryError):
            cache.reserve([0, 1], [140, 140])
        cache.release(0)
        attention.run(hidden, *tokens(70, 5, 1), cache)
        cache.read(0, 1, 70)

    assert not leaks(call)


def test_released_sequence_may_be_released_again():
    cache = _C.KVCache(2, 2, 2, 8, 100)
    cache.release(1)
    cache.release(1)
    assert cache.nbytes == 0


def test_threads_that_share_a_cache_wait_for_each_other(rng):
    attention = Attention(rng, 4, 2, 16)
    cache = attention.cache(4, layers=4, bits=4, capacity=1000)
    hidden = hiddens(rng, 40)
    expected = attention.run(hidden, *tokens(40), attention.cache(bits=4))
    failures = []

    def work(i):
        for _ in range(20):
            out = attention.run(hidden, *tokens(40, 0, i), cache, i)
            if not (out == expected).all():
                failures.append(i)
            cache.release(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert cache.nbytes == 0


# ---- hostile input ------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"bits": 3}, "bits: expected 4, 8, 16 or 32, got 3"),
    ({"bits": -4}, "bits: expected 4, 8, 16 or 32, got -4"),
    ({"limit": -1}, "limit: expected at least 0, got -1"),
    ({"capacity": 2**31 + 1}, "at most 2\\^31 - 1 sequences, 2\\^31 positions"),
    ({"sequences": 2**31}, "at most 2\\^31 - 1 sequences"),
    ({"head_dim": 2**25}, "head_dim of 2\\^24, got 1, 9 and 33554432"),
    ({"sequences": 0}, "sequences: expected at least 1, got 0"),
    ({"layers": -2}, "layers: expected at least 1, got -2"),
])
def test_cache_of_impossible_sizes_is_refused(options, message):
    sizes = {"layers": 1, "sequences": 1, "kv_heads": 1, "head_dim": 8, "capacity": 9}
    with pytest.raises(ValueError, match=message):
        _C.KVCache(**(sizes | options))


@pytest.mark.parametrize(("method", "arguments", "message"), [
    ("release", (-1,), "sequence: expected 0 to 1, got -1"),
    ("release", (2,), "sequence: expected 0 to 1, got 2"),
    ("reserve", ([2], [0]), r"sequence\[0\]: expected 0 to 1, got 2"),
    ("reserve", ([0, -1], [0, 0]), r"sequence\[1\]: expected 0 to 1, got -1"),
    ("reserve", ([0], [9]), r"position\[0\]: expected 0 to 8, got 9"),
    ("reserve", ([0], [0, 1]), r"position: expected shape\[0\] = 1, got 2"),
    ("read", (0, 0, 10), "count: expected 0 to 9, got 10"),
    ("read", (0, -1, 1), "sequence: expected 0 to 1, got -1"),
    ("read", (1, 0, 1), "layer: expected 0 to 0, got 1"),
])
def test_cache_methods_say_what_is_out_of_range(method, arguments, message):
    cache = _C.KVCache(1, 2, 1, 8, 9)
    with pytest.raises(ValueError, match=message):
        getattr(cache, method)(*arguments)
    assert cache.nbytes == 0


def test_cache_says_what_it_is():
    cache = _C.KVCache(2, 3, 4, 8, 100, bits=4, limit=10**6)
    assert (cache.bits, cache.hadamard, cache.limit, cache.page_tokens) == (4, True, 10**6, 64)
    assert repr(cache) == ("KVCache(layers=2, sequences=3, kv_heads=4, head_dim=8, capacity=100, "
                           "bits=4, hadamard)")
    assert not _C.KVCache(1, 1, 1, 8, 9, 16).hadamard  # floats are not rotated
    with pytest.raises(AttributeError):
        cache.bits = 8
    assert repr(_C.KVCache(1, 1, 1, 8, 9, 16, bfloat16=True)).endswith("bits=16, bfloat16)")
    assert not _C.KVCache(1, 1, 1, 8, 9, 32, bfloat16=True).bfloat16  # nothing is in 16 bits


# ---- a quantized model --------------------------------------------------------------------------


def folder(make_checkpoint, tmp_path, **options):
    return make_checkpoint(tmp_path / "model", hidden=96, heads=6, kv_heads=2, intermediate=128,
                           layers=2, **options)


@pytest.mark.parametrize("options", [
    {}, {"bias": True, "tie": False}, {"head_dim": 24}, {"kv_heads": 6, "dtype": "bfloat16"},
    {"architecture": "MistralForCausalLM"},
])
def test_rotated_value_heads_leave_the_model_as_it_is(make_checkpoint, tmp_path, options):
    sizes = {"hidden": 96, "heads": 6, "kv_heads": 2} | options
    checkpoint = sq.load_checkpoint(make_checkpoint(tmp_path / "m", **sizes))
    view = ValueCheckpoint(checkpoint)
    tokens = np.random.default_rng(0).integers(0, 320, (2, 80))
    expected, found = Model(checkpoint).forward(tokens), Model(view).forward(tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert view.fingerprint != checkpoint.fingerprint
    for i in range(checkpoint.spec.layers):
        before, after = checkpoint.layer(i).linears, view.layer(i).linears
        changed = {role for role in before
                   if not np.array_equal(before[role].weight, after[role].weight)}
        assert changed == {"v", "o"}
        for linear in after.values():
            assert view.tensors[f"{linear.name}.weight"].nbytes == linear.weight.nbytes


@pytest.mark.parametrize("method", ["balanced", "quarot", "duquant", "singlequant", "none"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_method_quantizes_with_kv_bits(make_checkpoint, tmp_path, text, method, bits):
    model = folder(make_checkpoint, tmp_path, bias=True)
    config = sq.QuantConfig(scheme="w4a8", method=method, kv_bits=bits, calibration_tokens=128)
    sq.quantize_folder(model, tmp_path / "out", config, text)
    loaded = sq.load(tmp_path / "out")
    assert loaded.checkpoint.quant_config.kv_bits == bits
    assert loaded.kv_bits == bits
    assert loaded.new_session(1, 8)._cache.bits == bits
    tokens = np.random.default_rng(1).integers(0, 320, (2, 80))
    original, found = sq.load(model).forward(tokens), loaded.forward(tokens)
    plain = sq.load(tmp_path / "out", 32).forward(tokens)
    scale = np.abs(original).max()
    assert np.abs(plain - original).mean() < 0.05 * scale
    assert 0 < np.abs(found - plain).mean() < (0.05 if bits == 4 else 0.01) * scale


def test_values_are_rotated_once(make_checkpoint, tmp_path, text):
    """The view stands before every method but those that rotate value heads themselves."""
    checkpoint = sq.load_checkpoint(folder(make_checkpoint, tmp_path))
    windows = np.arange(64).reshape(2, 32)
    for method, bits, kind in (("balanced", 4, "ValueCheckpoint"), ("balanced", 16, "Checkpoint"),
                               ("duquant", 8, "ValueCheckpoint"), ("quarot", 4, "Residual")):
        view = prepare(checkpoint, sq.QuantConfig(method=method, kv_bits=bits), windows)
        assert type(view).__name__.startswith(kind)
        if method == "quarot":
            assert view.source is checkpoint


def test_recipes_with_other_kv_bits_do_not_resume_each_other(make_checkpoint, tmp_path, text):
    model = folder(make_checkpoint, tmp_path)
    config = {"scheme": "w4a8", "weights": "rtn", "calibration_tokens": 64}

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sq.quantize_folder(model, tmp_path / "out", sq.QuantConfig(kv_bits=4, **config), text,
                           resume=True, progress=stop)
    with pytest.raises(ValueError, match=r"config\.kv_bits: expected 8, found 4"):
        sq.quantize_folder(model, tmp_path / "out", sq.QuantConfig(kv_bits=8, **config), text,
                           resume=True)


def test_dry_run_and_ignored_value_linears_take_kv_bits(make_checkpoint, tmp_path, text):
    model = folder(make_checkpoint, tmp_path)
    config = sq.QuantConfig(kv_bits=4, calibration_tokens=64, weights="rtn",
                            ignore=("*.v_proj", "*.o_proj"))
    estimate = sq.dry_run(model, config, text)
    sq.quantize_folder(model, tmp_path / "out", config, text)
    size = sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    assert abs(estimate.bytes_after / size - 1) < 0.05
    out = sq.load(tmp_path / "out", 32)
    tokens = np.random.default_rng(1).integers(0, 320, (1, 60))
    expected = sq.load(model).forward(tokens)
    assert np.abs(out.forward(tokens) - expected).mean() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [0, 2, 32, 4.0, True, "8", None])
def test_config_refuses_other_kv_bits(bits):
    with pytest.raises(ValueError, match="kv_bits: expected one of 4, 8, 16, found"):
        sq.QuantConfig(kv_bits=bits)
