"""Zero-shot tasks: scores against logits, windows against perplexity, tasks without a network."""

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import singlequant as sq
from singlequant import harness
from singlequant.cli.main import main
from singlequant.harness import evaluate_tasks, score_continuations, scoring

ROOT = Path(__file__).resolve().parents[1]
TASKS = Path(__file__).parent / "data" / "tasks"
CHANCE = 0.25
SCORE_TOLERANCE = 1e-5  # nats per token: float32 products of other shapes, summed in another order


def need_lm_eval():
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: the extra 'evaluation'")


@pytest.fixture
def loaded(model):
    return sq.load(model)


@pytest.fixture(params=["original", "w4a8"])
def either(request, model, tmp_path, text):
    """A loaded folder, unquantized and quantized."""
    if request.param == "original":
        return sq.load(model)
    config = sq.QuantConfig(scheme="w4a8", calibration_tokens=64)
    sq.quantize_folder(model, tmp_path / "quantized", config, text)
    return sq.load(tmp_path / "quantized")


@pytest.fixture
def adapter(loaded):
    need_lm_eval()
    return harness.SingleQuantLM(loaded, progress=False)


@pytest.fixture
def offline(monkeypatch):
    """Any connection is an error."""

    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: refuse(None, a))


def request(*arguments):
    """What the harness hands to a model."""
    return SimpleNamespace(args=arguments)


def direct(model, context, continuation):
    """(log-likelihood, greedy) by the definition: softmax of the logits of the whole sequence."""
    tokens = [*context, *continuation]
    logits = model.forward(np.array([tokens[:-1]]))[0, len(context) - 1 :].astype(np.float64)
    likelihood = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(len(continuation))
    return likelihood[rows, continuation].sum(), bool((logits.argmax(1) == continuation).all())


def random_pairs(rng, vocab):
    """Contexts with several continuations, equal ones and one-token ones among them."""
    pairs = []
    for length in rng.integers(1, 40, 12):
        context = rng.integers(2, vocab, length).tolist()
        for n in [1, 1, 2, *rng.integers(1, 9, 2)]:
            pairs.append((context, rng.integers(2, vocab, n).tolist()))
    return pairs + pairs[:3]


def scores_of(model, pairs, max_length=256):
    scores = [None] * len(pairs)
    for index, *score in score_continuations(model, pairs, max_length):
        assert scores[index] is None
        scores[index] = tuple(score)
    assert None not in scores
    return scores


# ---- scores -----------------------------------------------------------------------------------


def test_scores_equal_those_of_the_logits(either):
    pairs = random_pairs(np.random.default_rng(0), either.spec.vocab)
    for pair, (likelihood, greedy) in zip(pairs, scores_of(either, pairs), strict=True):
        expected = direct(either, *pair)
        assert likelihood == pytest.approx(expected[0], abs=SCORE_TOLERANCE * len(pair[1]))
        assert greedy == expected[1]


def test_greedy_is_true_for_what_the_model_writes(loaded):
    prompt = loaded.encode("the quick brown").tolist()
    new = loaded.generate(prompt, max_new_tokens=6, stop_tokens=[])
    wrong = [*new[:-1], (new[-1] + 1) % loaded.spec.vocab]
    assert [g for _, g in scores_of(loaded, [(prompt, new), (prompt, wrong)])] == [True, False]


def test_scores_do_not_depend_on_the_order(either):
    rng = np.random.default_rng(1)
    pairs = random_pairs(rng, either.spec.vocab)
    order = rng.permutation(len(pairs))
    shuffled = scores_of(either, [pairs[i] for i in order])
    assert [shuffled[i] for i in np.argsort(order)] == scores_of(either, pairs)


def test_scores_do_not_depend_on_the_other_pairs(either, monkeypatch):
    pairs = random_pairs(np.random.default_rng(1), either.spec.vocab)
    expected = np.array(scores_of(either, pairs))
    alone = [scores_of(either, [pair])[0] for pair in pairs]
    monkeypatch.setattr(scoring, "TOKENS_PER_STEP", 64)
    monkeypatch.setattr(scoring, "HEAD_ROWS", 5)
    for scores in (alone, scores_of(either, pairs)):
        np.testing.assert_allclose(scores, expected, atol=10 * SCORE_TOLERANCE)


def test_equal_contexts_are_fed_once(loaded, monkeypatch):
    fed = []
    append = type(loaded.new_session(1, 1)).append

    def counting(self, tokens, sequences=None):
        fed.extend(len(t) for t in tokens)
        return append(self, tokens, sequences)

    monkeypatch.setattr("singlequant.runtime.model.Session.append", counting)
    context = list(range(2, 52))
    scores_of(loaded, [(context, [7]), (context, [8]), (context, [8, 9, 10]), (context, [8])])
    assert sum(fed) == len(context) + 2


def test_long_contexts_lose_their_first_tokens(loaded):
    rng = np.random.default_rng(2)
    context, continuation = rng.integers(2, 300, 50).tolist(), [5, 6, 7]
    kept = context[-(16 + 1 - 3) :]
    scores = scores_of(loaded, [(context, continuation)], max_length=16)
    assert scores == scores_of(loaded, [(kept, continuation)], max_length=16)
    assert scores != scores_of(loaded, [(context, continuation)])


@pytest.mark.parametrize("pair", [([], [3]), ([3], []), ([3], [4] * 17)])
def test_pair_that_cannot_be_scored_is_an_error(pair, loaded):
    with pytest.raises(ValueError, match="pair 1: expected a context"):
        scores_of(loaded, [([3], [4]), pair], max_length=16)


# ---- the harness's face -----------------------------------------------------------------------


def test_importing_the_package_never_imports_the_harness():
    code = ("import sys, singlequant.harness, singlequant.cli.main\n"
            "print('lm_eval' in sys.modules)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_missing_harness_says_what_to_install(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'singlequant\[evaluation\]'"):
        evaluate_tasks(loaded, ["stdlib_continuation"])


def test_loglikelihood_of_texts_equals_that_of_tokens(adapter, loaded):
    requests = [request("the quick", " brown fox"), request("the quick ", "brown fox"),
                request("", "A rotation")]
    scores = adapter.loglikelihood(requests)
    assert scores[0] == scores[1]  # a trailing space of the context belongs to the continuation
    context = loaded.encode("the quick").tolist()
    whole = loaded.encode("the quick brown fox").tolist()
    assert whole[0] == 0  # BOS
    expected = direct(loaded, context, whole[len(context) :])[0]
    assert scores[0][0] == pytest.approx(expected, abs=1e-4)
    bare = loaded.encode("A rotation", special=False).tolist()
    assert scores[2][0] == pytest.approx(direct(loaded, [0], bare)[0], abs=1e-4)


def test_text_that_begins_with_bos_gets_no_other(adapter, loaded):
    assert adapter.tok_encode("<s>fox") == adapter.tok_encode("fox")
    assert adapter.tok_encode("fox", add_special_tokens=False) == adapter.tok_encode("fox")[1:]


def test_rolling_equals_the_nll_of_perplexity(adapter, loaded):
    tokens = loaded.encode("the quick brown fox rotates its tail. " * 3)
    evaluation = sq.perplexity(loaded, tokens, len(tokens))
    text = loaded.tokenizer.decode(tokens.tolist())
    assert loaded.encode(text).tolist() == tokens.tolist()
    nll = np.log(evaluation.perplexity) * evaluation.predictions
    assert adapter.loglikelihood_rolling([request(text)])[0] == pytest.approx(-nll, rel=1e-9)


def test_rolling_windows_predict_each_token_once(loaded):
    need_lm_eval()
    text = "the quick brown fox rotates its tail. " * 4
    tokens = [0, *loaded.encode(text, special=False).tolist()]
    size = 16
    expected = 0.0
    for first in range(1, len(tokens), size):  # the last window reaches back to be full
        end = min(first + size, len(tokens))
        begin = 0 if first == 1 else end - 1 - size
        expected += direct(loaded, tokens[begin:first], tokens[first:end])[0]
    small = harness.SingleQuantLM(loaded, max_length=size, progress=False)
    both = small.loglikelihood_rolling([request(text), request("")])
    assert both == [pytest.approx(expected, abs=1e-3), 0.0]


def test_generation_stops_before_a_stop_string(adapter, loaded):
    prompt = "the quick brown"
    free = adapter.generate_until([request(prompt, {"max_gen_toks": 40, "until": []})])[0]
    assert free == loaded.generate(prompt, max_new_tokens=40)
    stop = free[5:8]
    short = adapter.generate_until([request(prompt, {"max_gen_toks": 40, "until": [stop]})])[0]
    assert short == free[: free.index(stop)]


def test_true_from_on_token_ends_that_sequence_alone(loaded):
    prompts = [loaded.encode(t).tolist() for t in ("the quick", "a rotation", "foxes")]
    whole = loaded.generate(prompts, max_new_tokens=9, stop_tokens=[])
    seen = [0, 0, 0]

    def stopped(sequence, _):
        seen[sequence] += 1
        return sequence == 1 and seen[1] == 3

    new = loaded.generate(prompts, max_new_tokens=9, stop_tokens=[], on_token=stopped)
    assert new == [whole[0], whole[1][:3], whole[2]]


def test_a_stop_string_ends_the_work(adapter, loaded, monkeypatch):
    prompt = "the quick brown"
    free = loaded.generate(prompt, max_new_tokens=40)
    steps = []
    logits = type(loaded).logits
    monkeypatch.setattr(type(loaded), "logits", lambda s, h: steps.append(len(h)) or logits(s, h))
    options = {"max_gen_toks": 40, "until": [free[2:4]]}
    adapter.generate_until([request(prompt, options), request("foxes", {"max_gen_toks": 2})])
    assert sum(steps) < 15


def test_generations_do_not_depend_on_their_order(adapter):
    options = {"max_gen_toks": 12, "until": "\n"}
    requests = [request(t, options) for t in ("a", "the fox", "there is nothing", "a fox " * 60)]
    texts = adapter.generate_until(requests)
    assert adapter.generate_until(requests[::-1]) == texts[::-1]
    assert [adapter.generate_until([r])[0] for r in requests] == texts


def test_generation_leaves_room_by_losing_first_tokens(adapter, loaded):
    text = "the quick brown fox rotates " * 40
    tokens = adapter.tok_encode(text)
    assert len(tokens) > 256
    new = adapter.generate_until([request(text, {"max_gen_toks": 20})])[0]
    kept = tokens[-(256 - 20) :]
    assert new == loaded.decode_after(kept, loaded.generate(kept, max_new_tokens=20))


@pytest.mark.parametrize(("options", "same"), [
    ({"do_sample": False, "temperature": 5.0}, True),
    ({"temperature": 0.0}, True),
    ({"do_sample": True, "temperature": 5.0}, False),
    ({"temperature": 5.0}, False),
    ({"do_sample": True, "temperature": 5.0, "top_k": 1}, True),
])
def test_generation_samples_only_when_asked(options, same, adapter, loaded):
    text = adapter.generate_until([request("the quick", {"max_new_tokens": 20, **options})])[0]
    assert (text == loaded.generate("the quick", max_new_tokens=20)) == same


def test_generation_longer_than_the_model_is_an_error(adapter):
    with pytest.raises(ValueError, match="max_gen_toks: expected 1 to 255"):
        adapter.generate_until([request("a", {"max_gen_toks": 256})])


def test_unknown_generation_option_is_told(adapter, caplog):
    adapter.generate_until([request("a", {"max_gen_toks": 1, "num_beams": 4})])
    assert "num_beams" in caplog.text
    assert "max_gen_toks" not in caplog.text


def test_chat_template_is_the_folders(model):
    need_lm_eval()
    config = json.loads((model / "tokenizer_config.json").read_text())
    template = ("{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
                "{% if add_generation_prompt %}>{% endif %}")
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    adapter = harness.SingleQuantLM(path=model)
    history = [{"role": "user", "content": "hello"}]
    text = adapter.apply_chat_template(history)
    assert text == "<s>[hello]>"
    assert adapter.tok_encode(text) == adapter.model.chat_tokens(history)
    opened = [*history, {"role": "assistant", "content": "It is"}]
    assert adapter.apply_chat_template(opened, add_generation_prompt=False) == "<s>[hello]>It is"
    assert "/" not in adapter.tokenizer_name
    assert adapter.tokenizer_name.endswith(model.name)


def test_bad_arguments_of_the_adapter_are_named(loaded, model):
    need_lm_eval()
    for arguments, named in [({}, "path=DIR"), ({"model": loaded, "path": model}, "one of the two"),
                             ({"model": loaded, "device": "cuda"}, "device"),
                             ({"model": loaded, "max_length": 257}, "max_length")]:
        with pytest.raises(ValueError, match=named):
            harness.SingleQuantLM(**arguments)


def test_model_without_an_end_is_named(model):
    need_lm_eval()
    for name in ("config.json", "generation_config.json"):
        config = json.loads((model / name).read_text())
        config.pop("eos_token_id")
        (model / name).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="eos_token_id"):
        _ = harness.SingleQuantLM(path=model).eot_token_id


# ---- tasks ------------------------------------------------------------------------------------


def test_local_tasks_run_without_a_network(loaded, offline, tmp_path, monkeypatch):
    need_lm_eval()
    monkeypatch.chdir(tmp_path)  # data_files are relative to the task's file, not to here
    results = evaluate_tasks(loaded, ["local_choose", "local_write"], TASKS)
    assert set(results) == {"local_choose", "local_write"}
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} <= set(results["local_choose"])
    assert results["local_write"]["exact_match"] == 0.0
    questions = [json.loads(q) for q in (TASKS / "questions.jsonl").read_text().splitlines()]
    right = []
    for q in questions:
        context = loaded.encode(q["question"]).tolist()
        likelihoods = [direct(loaded, context, loaded.encode(f"{q['question']} {c}").tolist()[
            len(context) :])[0] for c in q["choices"]]
        right.append(np.argmax(likelihoods) == q["answer"])
    assert results["local_choose"]["acc"] == pytest.approx(np.mean(right))


def test_local_group_runs_its_tasks(loaded, offline):
    need_lm_eval()
    assert {"local_choose", "local_write"} <= set(evaluate_tasks(loaded, ["local_both"], TASKS))


def test_by_name_by_instance_and_by_function_agree(model, loaded, offline, tmp_path):
    need_lm_eval()
    import lm_eval
    from lm_eval.tasks import TaskManager

    (tmp_path / "tasks").mkdir()
    files = {"data_files": {"test": str(TASKS / "questions.jsonl")},
             "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "tasks" / "plain.yaml").write_text(json.dumps(
        {"include": str(TASKS / "choose.yaml"), "task": "plain_choose", "dataset_kwargs": files}))
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    named = {"model": "singlequant", "model_args": f"path={model}"}
    given = {"model": harness.SingleQuantLM(loaded)}
    found = [lm_eval.simple_evaluate(**how, tasks=["plain_choose"], task_manager=manager,
                                     log_samples=True)["samples"]["plain_choose"]
             for how in (named, given)]
    assert [s["filtered_resps"] for s in found[0]] == [s["filtered_resps"] for s in found[1]]
    accuracy = np.mean([s["acc"] for s in found[0]])
    assert evaluate_tasks(loaded, ["local_choose"], TASKS)["local_choose"]["acc"] == accuracy


def test_entry_point_names_the_class():
    need_lm_eval()
    point, = importlib.metadata.entry_points(group="lm_eval.models", name="singlequant")
    assert point.load() is harness.SingleQuantLM


@pytest.mark.slow  # reads the harness's own task files
def test_unknown_task_is_named_with_the_local_ones(loaded):
    need_lm_eval()
    with pytest.raises(ValueError, match=r"local_choose.*stdlib_continuation.*got no_such_task$"):
        evaluate_tasks(loaded, ["no_such_task"], TASKS)


@pytest.mark.parametrize(("arguments", "named"), [
    ({"tasks": []}, "tasks"),
    ({"tasks": ["stdlib_continuation"], "limit": 0}, "limit"),
    ({"tasks": ["stdlib_continuation"], "task_folder": "no-such-folder"}, "no-such-folder"),
])
def test_bad_argument_is_named(arguments, named, loaded):
    need_lm_eval()
    with pytest.raises(ValueError, match=named):
        evaluate_tasks(loaded, **arguments)


def test_broken_task_file_is_named(loaded, tmp_path):
    need_lm_eval()
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(ValueError, match=r"broken\.yaml"):
        evaluate_tasks(loaded, ["stdlib_continuation"], tmp_path)


def test_nothing_is_left_behind(loaded, tmp_path, monkeypatch):
    need_lm_eval()
    (tmp_path / "work").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "work"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    evaluate_tasks(loaded, ["local_choose"], TASKS, limit=1)
    assert list((tmp_path / "work").iterdir()) == []
    assert not (tmp_path / "cache").exists()


# ---- the package's own tasks ------------------------------------------------------------------


def test_bundled_task_data_are_what_the_script_makes(tmp_path):
    script = ROOT / "tools" / "make_task.py"
    subprocess.run([sys.executable, str(script), "--output", str(tmp_path)], check=True)
    for path in sorted(harness.bundled_tasks().glob("*.jsonl")):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_no_choice_is_favoured_by_itself():
    lines = (harness.bundled_tasks() / "stdlib_continuation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert 60 <= len(rows) <= 100
    assert np.bincount([r["label"] for r in rows]).tolist() == [len(rows) // 4] * 4
    seen = [p for r in rows for p in r["passages"]]
    true = [r["passages"][r["label"]] for r in rows]
    assert all(seen.count(p) == 4 and true.count(p) == 1 for p in true)


def test_bundled_model_knows_the_bundled_task_and_plain_rounding_forgets_it(tmp_path, offline):
    need_lm_eval()
    config = sq.QuantConfig("w4a4", "none", "rtn", clip=1.0)
    sq.quantize_folder(sq.bundled_model(), tmp_path / "none", config)
    models = [sq.load(sq.bundled_model()), sq.load(tmp_path / "none")]
    before, plain = (evaluate_tasks(m, ["stdlib_continuation"])["stdlib_continuation"]
                     for m in models)
    assert before["acc"] - 5 * before["acc_stderr"] > CHANCE
    assert plain["acc"] <= before["acc"]
    before, plain = (evaluate_tasks(m, ["stdlib_perplexity"], limit=3)["stdlib_perplexity"]
                     for m in models)
    assert before["bits_per_byte"] < plain["bits_per_byte"]


# ---- the command ------------------------------------------------------------------------------


def test_eval_prints_text_and_tasks(model, text, capsys):
    need_lm_eval()
    both = ["eval", str(model), "--text", str(text), "--seq-len", "32",
            "--tasks", "local_choose, stdlib_continuation", "--task-folder", str(TASKS),
            "--limit", "3"]
    assert main([*both, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "perplexity" in result
    assert set(result["tasks"]) == {"local_choose", "stdlib_continuation"}
    assert main(both) == 0
    printed = capsys.readouterr().out
    assert f"perplexity      {result['perplexity']:.4f}" in printed
    accuracy = result["tasks"]["local_choose"]
    assert f"acc              {accuracy['acc']:.4f} +- {accuracy['acc_stderr']:.4f}" in printed


def test_harness_says_nothing_of_its_own(model, tmp_path):
    need_lm_eval()
    done = subprocess.run(
        [sys.executable, "-m", "singlequant", "eval", str(model), "--tasks", "local_choose",
         "--task-folder", str(TASKS), "--json"], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    assert set(json.loads(done.stdout)) == {"kv_bits", "tasks"}


def test_eval_of_tasks_alone_prints_no_perplexity(model, capsys):
    need_lm_eval()
    arguments = ["eval", str(model), "--tasks", "local_choose", "--task-folder", str(TASKS)]
    assert main([*arguments, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"kv_bits", "tasks"}


@pytest.mark.parametrize(("options", "named"), [
    ([], "--text"),
    (["--limit", "3", "--text", "T"], "--limit: needs --tasks"),
    (["--task-folder", "F", "--text", "T"], "--task-folder: needs --tasks"),
    (["--seq-len", "3", "--tasks", "t"], "--seq-len: needs --text"),
    (["--reference", "M", "--tasks", "t"], "--reference: needs --text"),
    (["--against", "M", "--text", "T"], "--against: needs --tasks"),
])
def test_eval_option_without_its_partner_is_one_line(options, named, model, capsys):
    assert main(["eval", str(model), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error
    assert "\n" not in error
