"""Calibration text that the model writes: which tokens, the same again, and what recipes say."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from chat_cases import TEMPLATES
from conftest import write_json
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import singlequant as sq
from singlequant.cli.main import main
from singlequant.study.compare import compare
from singlequant.sweep import self_text
from singlequant.sweep.estimate import dry_run
from singlequant.sweep.self_text import written_windows

BOS, EOS = 0, 1  # of the small tokenizer
TURNS = ("{% for m in messages %}{{ '<s>' + m.role + ':' + m.content + '</s>' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}")


@pytest.fixture
def model(make_checkpoint, tmp_path):
    """A folder whose model finds many tokens likely, so that it writes </s> now and then."""
    return make_checkpoint(tmp_path / "model", tie=False)


def config(**values):
    return sq.QuantConfig(**{"calibration_tokens": 256, "calibration_window": 64, "weights": "rtn",
                             **values})


def ids(checkpoint, text):
    return checkpoint.encode(text, special=False).tolist()


def without_bos(model):
    """The folder, its tokenizer without special tokens around a text."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.post_processor = None
    values = json.loads(tokenizer.to_str())
    write_json(model / "tokenizer.json", values)
    return sq.load_checkpoint(model)


def with_template(model, template=TURNS):
    (model / "chat_template.jinja").write_text(template, "utf-8")
    return sq.load_checkpoint(model)


def recipe_of(folder):
    return json.loads((folder / "recipe.json").read_text())


# ---- the windows --------------------------------------------------------------------------------


def test_windows_are_full_of_valid_ids_and_follow_the_seed(source):
    windows = written_windows(source, 5, 100, seed=3)
    assert windows.shape == (5, 100)
    assert windows.dtype == np.int64
    assert windows.min() >= 0
    assert windows.max() < source.spec.vocab
    assert len({row.tobytes() for row in windows}) == 5
    np.testing.assert_array_equal(windows, written_windows(source, 5, 100, seed=3))
    assert (windows != written_windows(source, 5, 100, seed=4)).any(axis=1).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_same_text_at_any_number_of_threads(make_checkpoint, tmp_path, both_thread_counts, dtype):
    checkpoint = sq.load_checkpoint(make_checkpoint(tmp_path / "m", hidden=256, dtype=dtype))
    one, two = both_thread_counts(lambda: written_windows(checkpoint, 6, 40, seed=0))
    np.testing.assert_array_equal(one, two)


def test_windows_of_16_bit_models_do_not_depend_on_the_batch(source, monkeypatch):
    windows = written_windows(source, 7, 48, seed=0)
    np.testing.assert_array_equal(written_windows(source, 3, 48, seed=0), windows[:3])
    monkeypatch.setattr(self_text, "CACHE_SHARE", 0)
    for room, batch in ((1, 1), (3 * 48 * 2 * 2 * 2 * 16 * 4, 3)):  # layers, k and v, heads, floats
        monkeypatch.setattr(self_text, "CACHE_BYTES", room)
        assert self_text._batch(source, 48) == batch
        np.testing.assert_array_equal(written_windows(source, 7, 48, seed=0), windows)


def test_text_is_the_models_own_and_not_its_noise():
    """The bundled model finds its own text likelier than another's, and than random tokens."""
    checkpoint = sq.load_checkpoint(sq.bundled_model())
    model, rng = sq.load(sq.bundled_model()), np.random.default_rng(0)
    own = written_windows(checkpoint, 4, 128, seed=0)
    noise = rng.integers(0, checkpoint.spec.vocab, own.size)
    other = sq.calibration_windows(checkpoint, config(calibration_tokens=own.size))
    found = [sq.perplexity(model, tokens.reshape(-1), 128).perplexity
             for tokens in (own, other, noise)]
    assert found[0] < found[1] < found[2]


def test_documents_begin_as_the_tokenizer_begins_a_text(source):
    windows = written_windows(source, 24, 256, seed=0)
    assert (windows[:, 0] == BOS).all()
    ends = [(row[i], row[i + 1]) for row in windows for i in np.flatnonzero(row[:-1] == EOS)]
    assert len(ends) >= 5  # a new document in the same window
    assert all(following == BOS for _, following in ends)


def test_documents_without_bos_begin_with_a_drawn_token(model):
    checkpoint = without_bos(model)
    assert len(checkpoint.encode("x")) == 1
    first = written_windows(checkpoint, 40, 2, seed=0)[:, 0]
    assert len(set(first.tolist())) > 20
    assert not {BOS, EOS} & set(first.tolist())  # special tokens are no text


def test_every_second_window_is_a_conversation(model):
    checkpoint = with_template(model)
    windows = written_windows(checkpoint, 48, 256, seed=0)
    question, answer = ids(checkpoint, "<s>user:"), ids(checkpoint, "</s><s>assistant:")
    assert (windows[1::2, : len(question)] == question).all()
    assert not (windows[0::2, : len(question)] == question).all(axis=1).any()
    answered = again = 0
    for row in windows[1::2].tolist():
        asks, at = True, len(question)
        while EOS in row[at:]:
            at = row.index(EOS, at)
            expected = answer if asks else [EOS, *question]
            assert row[at : at + len(expected)] == expected[: len(row) - at]
            answered, again = answered + asks, again + (not asks)
            asks, at = not asks, at + len(expected)
    assert answered >= 3
    assert again >= 1


def test_stop_tokens_that_open_no_answer_begin_a_new_conversation(model):
    write_json(model / "generation_config.json", {"eos_token_id": list(range(100, 300))})
    checkpoint = with_template(model)
    question = ids(checkpoint, "<s>user:")
    for row in written_windows(checkpoint, 4, 64, seed=0)[1::2].tolist():
        inside = row[len(question) :]
        at = next(i for i, token in enumerate(inside) if 100 <= token < 300)
        assert inside[at + 1 : at + 1 + len(question)] == question


@pytest.mark.parametrize("template", [
    "{{ raise_exception('no user comes first') }}", "{{ 'the same whatever is asked' }}",
    "{{ messages[0]['content'] }}",
])
def test_templates_that_ask_no_question_leave_documents(model, template):
    plain = written_windows(sq.load_checkpoint(model), 4, 16, seed=0)
    np.testing.assert_array_equal(written_windows(with_template(model, template), 4, 16, seed=0),
                                  plain)


@pytest.mark.parametrize("name", TEMPLATES)
def test_published_templates_open_a_users_turn_on_any_day(model, name):
    checkpoint = with_template(model, TEMPLATES[name])
    question, answer = self_text._turns(checkpoint)
    text = checkpoint.tokenizer.decode(question, skip_special_tokens=False)
    assert question
    assert answer
    assert not re.search(r"20(2[6-9]|[3-9]\d)", text)  # no date of today's


# ---- instead of a text file ---------------------------------------------------------------------


def test_self_takes_all_windows_and_mixed_every_second(source):
    own = sq.calibration_windows(source, config(seed=2), "self")
    np.testing.assert_array_equal(own, written_windows(source, 4, 64, seed=2))
    for count in (4, 5):
        tokens = 64 * count
        mixed = sq.calibration_windows(source, config(calibration_tokens=tokens), "mixed")
        written = written_windows(source, count // 2, 64, seed=0)
        bundled = sq.calibration_windows(source, config(calibration_tokens=tokens))
        np.testing.assert_array_equal(mixed[1::2], written)
        np.testing.assert_array_equal(mixed[0::2], bundled[: count - count // 2])


def test_windows_are_cut_to_the_models_maximum(source):
    limit = source.spec.max_position_embeddings
    recipe = config(calibration_tokens=2 * limit, calibration_window=4 * limit)
    assert sq.calibration_windows(source, recipe, "self").shape == (2, limit)


def test_files_called_self_and_mixed_are_read(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("self", "mixed"):
        Path(word).write_text(f"what the file {word} says. " * 300)
        expected = source.encode(Path(word).read_text())[:256].reshape(4, 64)
        for path in (Path(word), f"./{word}", os.path.abspath(word)):
            found = sq.calibration_windows(source, config(), path)
            np.testing.assert_array_equal(found, expected)
        assert (sq.calibration_windows(source, config(), word) != expected).any()


def test_progress_counts_the_tokens_written(source):
    for word, total in (("self", 256), ("mixed", 128)):
        seen = []
        sq.calibration_windows(source, config(), word, lambda *done, seen=seen: seen.append(done))
        assert seen == sorted(set(seen))
        assert {every for _, every in seen} == {total}
        assert seen[-1] == (total, total)


def test_bad_input_is_named(source, model, out):
    limit = source.spec.max_position_embeddings
    for values, message in (
        ((0, 8, 0), "count: expected at least 1, got 0"),
        ((1, 0, 0), f"window: expected at least 1 and at most {limit}, the model's maximum, got 0"),
        ((1, limit + 1, 0), f"window: .*the model's maximum, got {limit + 1}"),
        ((1, 8, -1), "seed: expected at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            written_windows(source, *values)
    with pytest.raises(ValueError, match="calibration: expected at least 2 windows for 'mixed'"):
        sq.calibration_windows(source, config(calibration_tokens=64), "mixed")
    sq.quantize_folder(model, out, config(), "self")
    with pytest.raises(ValueError, match="checkpoint: expected an unquantized model"):
        written_windows(sq.load_checkpoint(out), 1, 8)


def test_tensor_that_is_not_finite_is_named(model, out):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(model / "model.safetensors")
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match=f"^{re.escape(name)}"):
        sq.quantize_folder(model, out, config(), "self")
    assert not out.exists()


# ---- recipes and commands -----------------------------------------------------------------------


@pytest.mark.parametrize("word", ["self", "mixed"])
def test_summary_and_recipe_say_who_wrote_the_text(model, out, word):
    summary = sq.quantize_folder(model, out, config(), word)
    assert summary.calibration_tokens == 256
    assert summary.written_tokens == (256 if word == "self" else 128)
    assert 0 < summary.writing_seconds < summary.seconds
    windows = sq.calibration_windows(sq.load_checkpoint(model), config(), word)
    made = recipe_of(out)["provenance"]
    assert made["calibration"] == word
    assert made["calibration_sha256"] == sq.sweep.texts.token_digest(windows)


def test_summary_of_a_text_file_has_nothing_written(model, out, text):
    summary = sq.quantize_folder(model, out, config(), text)
    assert (summary.written_tokens, summary.writing_seconds) == (0, 0.0)
    assert "calibration" not in recipe_of(out)["provenance"]


def test_resumed_run_writes_the_same_text_again(model, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sq.quantize_folder(model, tmp_path / "out", config(), "self", progress=stop)
    with pytest.raises(ValueError, match="calibration"):
        sq.quantize_folder(model, tmp_path / "out", config(), "mixed", resume=True)
    summary = sq.quantize_folder(model, tmp_path / "out", config(), "self", resume=True)
    assert summary.resumed_layers == 1
    sq.quantize_folder(model, tmp_path / "whole", config(), "self")
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_recipe_made_with_self_wants_self_again(model, tmp_path):
    sq.quantize_folder(model, tmp_path / "out", config(), "self")
    recipe = tmp_path / "out" / "recipe.json"
    again = sq.QuantConfig.from_file(recipe)
    with pytest.raises(ValueError, match="another calibration text .* pass --calibration self"):
        sq.quantize_folder(model, tmp_path / "other", again, recipe=recipe)
    sq.quantize_folder(model, tmp_path / "same", again, "self", recipe=recipe)
    assert recipe_of(tmp_path / "same") == recipe_of(tmp_path / "out")


def test_command_shows_what_was_written_and_reads_files_called_self(model, tmp_path, monkeypatch,
                                                                    capsys):
    monkeypatch.chdir(tmp_path)
    Path("self").write_text("what the file says. " * 300)
    options = ["--calibration-tokens", "128", "--calibration-window", "64", "--weights", "rtn",
               "--no-check"]
    assert main(["quantize", str(model), "out", "--calibration", "self", *options]) == 0
    assert re.search(r"^wrote +128 calibration tokens in [\d.]+ s$", capsys.readouterr().out, re.M)
    assert main(["quantize", str(model), "file", "--calibration", "./self", *options]) == 0
    assert "wrote" not in capsys.readouterr().out
    assert recipe_of(Path("out"))["provenance"]["calibration"] == "self"
    assert "calibration" not in recipe_of(Path("file"))["provenance"]
    assert main(["quantize", str(model), "none", "--calibration", "mixed", "--dry-run",
                 *options]) == 0


def test_dry_run_counts_the_writing(model, monkeypatch):
    seen = []
    estimate = dry_run(model, config(), "self", lambda *done: seen.append(done))
    assert seen[-1] == (256, 256)
    assert estimate.seconds > 0


def test_comparison_takes_the_words(model, tmp_path, text):
    seen = []
    options = {"methods": ["none"], "schemes": ["w4a8"], "defaults": False, "texts": [text],
               "seq_len": 64, "windows": 2, "calibration_tokens": 256, "out": tmp_path / "out"}
    result = compare(model, calibration="self", writing=lambda *done: seen.append(done), **options)
    assert result.calibration == "self"
    assert seen[-1] == (256, 256)
    assert all(row.error is None for row in result.rows)
    folder = next(path for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert recipe_of(folder)["provenance"]["calibration"] == "self"
    assert compare(model, calibration="self", **options).rows == result.rows  # taken over
    compare(model, calibration=text, **options)
    assert len([path for path in (tmp_path / "out").iterdir() if path.is_dir()]) == 2
