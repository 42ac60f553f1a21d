# SPDX-License-Identifier: Apache-2.0
"""Numbers from users: token ids that are none, and options beyond what the core's types hold."""

from __future__ import annotations

import numpy as np
import pytest

import singlequant as sq
from singlequant.cli.main import main
from singlequant.rows import token_ids
from singlequant.sweep.texts import choose_windows

FLOATS = [[100.9, 200.2], np.array([100.0, 200.0]), np.array([1, 0], bool), [2**70, 1],
          np.array([2**63], np.uint64), ["1", "2"], [None, 1]]


@pytest.fixture
def model(make_checkpoint, tmp_path):
    return sq.load(make_checkpoint(tmp_path / "model"))


# ---- token ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", FLOATS)
def test_what_is_no_integer_is_never_taken_for_a_token(model, ids):
    windows = [np.asarray(ids)]
    calls = {
        "generate": lambda: model.generate([ids]),
        "forward": lambda: model.forward(windows),
        "hidden_states": lambda: model.hidden_states(windows),
        "session": lambda: model.new_session(1, 8).append([ids]),
        "evaluate": lambda: sq.perplexity(model, np.asarray(ids), 2),
        "choose_windows": lambda: choose_windows(ids, 2, 2),
        "calibrate": lambda: list(sq.calibrate(model.checkpoint, windows)),
        "stop_tokens": lambda: model.generate([[1, 2]], stop_tokens=ids),
    }
    if isinstance(ids[0], str):
        del calls["generate"], calls["evaluate"]  # texts are prompts
    for name, call in calls.items():
        with pytest.raises(ValueError, match="expected integers, the ids of tokens, found"):
            print(name, call())


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_integers_of_every_type_are_tokens(model, dtype):
    expected = model.generate([[100, 20]], max_new_tokens=2)
    assert model.generate([np.array([100, 20], dtype)], max_new_tokens=2) == expected


def test_empty_list_is_no_float():
    assert token_ids([], "x").dtype == np.int64


@pytest.mark.parametrize("prompts", [["a", [1, 2]], [[1, 2], "a"]])
def test_texts_and_ids_are_not_mixed(model, prompts):
    with pytest.raises(ValueError, match="texts alone or token ids alone"):
        model.generate(prompts)


# ---- options ------------------------------------------------------------------------------------

HUGE = (2**63, 10**30, -(2**63) - 1)


@pytest.mark.parametrize(("option", "value", "more"), [
    *(("--threads", value, []) for value in HUGE),
    *(("--top-k", value, ["--temperature", "1"]) for value in HUGE),
    *(("--seed", value, ["--temperature", "1"]) for value in HUGE),
    *(("--max-new-tokens", value, []) for value in HUGE[2:]),
    *(("--temperature", value, []) for value in ("1e39", "1e400", "1e-50", "nan", "-1")),
    *(("--top-p", value, ["--temperature", "1"]) for value in ("1e-50", "1e39", "nan", "0")),
])
def test_numbers_are_taken_or_named(model, capsys, option, value, more):
    code = main(["generate", str(model.checkpoint.path), "--prompt", "the", "--max-new-tokens", "2",
                 f"{option}={value}", *more])
    error = capsys.readouterr().err
    assert code in (0, 2)
    assert len(error.splitlines()) == code // 2
    assert code == 0 or option[2:].replace("-", "_") in error


@pytest.mark.parametrize("option", ["--windows", "--seq-len"])
@pytest.mark.parametrize("value", HUGE)
def test_more_text_than_there_is_is_all_of_it_or_named(model, text, capsys, option, value):
    code = main(["eval", str(model.checkpoint.path), "--text", str(text), f"{option}={value}"])
    error = capsys.readouterr().err
    assert code == (0 if option == "--windows" and value > 0 else 2)
    named = (option, f"window of {value} tokens", "seq_len")
    assert code == 0 or any(name in error for name in named)


def test_numbers_beyond_float32_mean_what_they_say(model):
    prompt = [[100, 20, 30]]
    greedy = model.generate(prompt, max_new_tokens=8)
    for options in ({"temperature": 1e-50}, {"temperature": 1.0, "top_p": 1e-50},
                    {"temperature": 1.0, "top_k": 1}):
        assert model.generate(prompt, max_new_tokens=8, **options) == greedy
    assert (model.generate(prompt, 8, temperature=1.0, top_k=2**70, seed=3)
            == model.generate(prompt, 8, temperature=1.0, seed=3))
    assert (model.generate(prompt, 8, temperature=1e300, seed=3)
            == model.generate(prompt, 8, temperature=3e38, seed=3))


@pytest.mark.parametrize(("name", "value"), [
    ("max_new_tokens", 2.5), ("max_new_tokens", True), ("seed", 0.5), ("top_k", "3"),
    ("temperature", "1"), ("temperature", None), ("top_p", 1j)])
def test_values_of_another_type_are_named(model, name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected a"):
        model.generate([[1, 2]], **{name: value})


@pytest.mark.parametrize("prompts", [{"prompt": 1}, {0: [1]}, {1}, frozenset({1}), {}, None, 5,
                                     np.array(5), np.float32(5), iter([1])])
def test_prompts_without_an_order_are_named(model, prompts):
    with pytest.raises(ValueError, match="^prompts: expected a text, token ids, or a list of"):
        model.generate(prompts)


@pytest.mark.parametrize("stop", [2, np.int64(2), np.array(2), [[1], [2]]])
def test_stop_tokens_that_are_no_list_are_named(model, stop):
    with pytest.raises(ValueError, match="^stop_tokens: expected a list of token ids, found"):
        model.generate([[1, 2]], stop_tokens=stop)
