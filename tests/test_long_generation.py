# SPDX-License-Identifier: Apache-2.0
"""Long runs through a bounded cache: memory stays flat, results are those of a fresh prefill."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import edit_config

import singlequant as sq
from singlequant import _C
from singlequant.sweep.measure import anonymous_bytes

WINDOW, CAPACITY = 128, 1 << 17
PAGE = _C.PAGE_TOKENS
MB = 1 << 20


@pytest.fixture
def make_model(make_checkpoint, tmp_path):
    """A packed model of two layers; window: of its attention, 0 for none."""

    def make(window: int) -> sq.Model:
        folder = make_checkpoint(tmp_path / "m", architecture="MistralForCausalLM", hidden=64)
        edit_config(folder, sliding_window=window or None, max_position_embeddings=CAPACITY)
        config = sq.QuantConfig(bits=4, weights="rtn", calibration_tokens=64, kv_bits=8,
                                calibration_window=64)
        sq.quantize_folder(folder, tmp_path / "out", config)
        return sq.load(tmp_path / "out")

    return make


def follow(model: sq.Model, session, count: int, marks: list[int]):
    """Feed a sequence its own most likely tokens, with a drawn one now and then, so that it does
    not end in a circle: (tokens, hidden states at the marks, bytes of pages, anonymous memory)."""
    rng = np.random.default_rng(0)
    tokens = np.empty(count, np.int64)
    tokens[0], kept, pages, memory = 1, {}, [], []
    for i in range(count):
        hidden = session.append([tokens[i : i + 1]])[0]
        if i in marks:
            kept[i] = hidden
        if i % PAGE == 0:
            pages.append(session.nbytes)
            memory.append(anonymous_bytes())
        if i + 1 < count:
            drawn = rng.integers(model.spec.vocab)
            tokens[i + 1] = drawn if i % 7 == 0 else int(model.logits(hidden).argmax())
    return tokens, kept, pages, memory


def check_windows_stay_bounded(model: sq.Model, count: int) -> None:
    page_bytes = model.new_cache(1, PAGE).page_bytes
    most = model.spec.layers * (WINDOW // PAGE + 2) * page_bytes
    # the limit stops a cache that keeps more; free pages, at most as many as are used, count too
    session = model.new_session(1, CAPACITY, limit=most, sliding=True)
    marks = [0, WINDOW, *np.linspace(2 * WINDOW, count - 1, 6).astype(int).tolist()]
    tokens, kept, pages, memory = follow(model, session, count, marks)
    warm = len(pages) // 4
    assert max(pages) <= 2 * most
    assert max(pages[warm:]) == max(pages[: warm + 1])
    assert max(memory[warm:]) - memory[warm] < 4 * MB
    assert len(set(tokens[-200:].tolist())) > 10
    for mark, hidden in kept.items():
        fresh = model.hidden_states(tokens[None, : mark + 1])[0, -1]
        np.testing.assert_array_equal(hidden, fresh, err_msg=str(mark))
        np.testing.assert_array_equal(model.logits(hidden), model.logits(fresh))


def test_thousands_of_tokens_take_the_pages_of_a_window(make_model):
    check_windows_stay_bounded(make_model(WINDOW), 3000)


@pytest.mark.slow
def test_100_000_tokens_take_the_pages_of_a_window(make_model):
    check_windows_stay_bounded(make_model(WINDOW), 100_000)


def test_session_that_does_not_slide_keeps_all_pages(make_model):
    model = make_model(WINDOW)
    sliding, whole = (model.new_session(1, CAPACITY, sliding=on) for on in (True, False))
    tokens = np.arange(1000) % model.spec.vocab
    for session in (sliding, whole):
        for piece in np.split(tokens, 10):
            session.append([piece])
    assert whole.nbytes > 2 * sliding.nbytes
    np.testing.assert_array_equal(*(s.append([tokens[:3]]) for s in (sliding, whole)))


def test_layers_without_a_window_slide_nowhere(make_model):
    model = make_model(0)
    sliding, whole = (model.new_session(1, CAPACITY, sliding=on) for on in (True, False))
    for session in (sliding, whole):
        session.append([np.arange(300) % model.spec.vocab])
    assert whole.nbytes == sliding.nbytes


def check_sequences_in_turn(model: sq.Model, total: int, length: int) -> None:
    """Sequences that end and begin again share pages that a limit bounds."""
    limit = model.spec.layers * -(-length // PAGE) * model.new_cache(1, PAGE).page_bytes
    session = model.new_session(1, length, limit=limit)
    rng = np.random.default_rng(1)
    memory, checked, turns = [], [], total // length
    for turn in range(turns):
        tokens, kept, pages, _ = follow(model, session, length, [length - 1])
        assert max(pages) <= limit
        memory.append(anonymous_bytes())
        if turn in (0, turns // 2, turns - 1):
            checked.append((tokens, kept[length - 1]))
        session.end(0)
        assert session.nbytes == 0
        first = rng.integers(model.spec.vocab, size=1)
        session.append([first])  # another beginning: pages hold nothing of the one before
        np.testing.assert_array_equal(session.append([tokens[:1]])[0],
                                      model.hidden_states(np.append(first, tokens[:1])[None])[0, 1])
        session.end(0)
    assert max(memory) - memory[0] < 4 * MB
    for tokens, hidden in checked:
        fresh = model.hidden_states(tokens[None])[0, -1]
        np.testing.assert_array_equal(hidden, fresh)


def test_sequences_in_turn_share_the_pages_of_one(make_model):
    check_sequences_in_turn(make_model(0), 2000, 500)


@pytest.mark.slow
def test_100_000_tokens_of_sequences_in_turn_share_the_pages_of_one(make_model):
    check_sequences_in_turn(make_model(0), 100_000, 2000)


def test_pages_before_a_position_are_given_back():
    cache = _C.KVCache(2, 2, 1, 8, 1000)
    for sequence in (0, 1):
        cache.reserve(np.full(4 * PAGE, sequence), np.arange(4 * PAGE))
    whole = cache.nbytes
    cache.forget(1, 0, 2 * PAGE + 1)  # two pages end before it
    cache.forget(1, 0, 2 * PAGE + 1)
    cache.reserve([0], [4 * PAGE])  # layers 0 and 1: two pages, which were free
    assert cache.nbytes == whole
    for arguments, text in (((2, 0, 0), "layer: expected 0 to 1, got 2"),
                            ((0, -1, 0), "sequence: expected 0 to 1, got -1"),
                            ((0, 0, 1001), "position: expected 0 to 1000, got 1001")):
        with pytest.raises(ValueError, match=text):
            cache.forget(*arguments)
