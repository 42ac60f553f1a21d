"""The command line: output, exit status, one line per error and nothing left behind."""

import json
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
from blocks import SITES
from safetensors.numpy import load_file, save_file

import singlequant as sq
from singlequant.cli.main import main, parser
from singlequant.cli.quantize import config_from


def quantize(model, out, text, *options):
    return main(["quantize", str(model), str(out), "--calibration", str(text),
                 "--calibration-tokens", "64", *options])


def assert_fails_with(capsys, status, *parts):
    """Exit status 2 and one line on standard error that holds all parts."""
    captured = capsys.readouterr()
    assert status == 2
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("singlequant: ")
    for part in parts:
        assert part in lines[0], lines[0]


def test_quantize_eval_and_generate(model, tmp_path, text, capsys):
    out = tmp_path / "out"
    assert quantize(model, out, text, "--scheme", "w4a8") == 0
    printed = capsys.readouterr().out
    assert "w4a8, method balanced, weights gptq" in printed
    assert "peak memory" in printed
    assert "gate_up" in printed
    assert main(["eval", str(out), "--text", str(text), "--seq-len", "32",
                 "--reference", str(model), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"perplexity", "tokens", "seq_len", "seconds", "kl_mean", "kl_p99",
            "top1_agreement"} <= set(result)
    assert main(["generate", str(out), "--prompt", "the quick", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("the quick")


def test_kv_bits_from_the_folder_or_the_option(model, tmp_path, text, capsys):
    out = tmp_path / "out"
    assert quantize(model, out, text, "--scheme", "w4a16", "--kv-bits", "4") == 0
    assert "kv bits 4" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["quantization_config"]["kv_bits"] == 4
    options = ["--text", str(text), "--seq-len", "32", "--reference", str(model), "--json"]
    found = {}
    for bits in ("folder", "4", "8", "16", "32"):
        given = [] if bits == "folder" else ["--kv-bits", bits]
        assert main(["eval", str(out), *options, *given]) == 0
        found[bits] = json.loads(capsys.readouterr().out)["perplexity"]
    assert found["folder"] == found["4"]
    assert len(set(found.values())) == 4
    for bits in ("4", "32"):
        assert main(["generate", str(out), "--prompt", "the", "--max-new-tokens", "3",
                     "--kv-bits", bits]) == 0
        assert capsys.readouterr().out.startswith("the")


def test_eval_prints_what_json_says(model, text, capsys):
    assert main(["eval", str(model), "--text", str(text), "--seq-len", "32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert main(["eval", str(model), "--text", str(text), "--seq-len", "32"]) == 0
    printed = capsys.readouterr().out
    assert f"{result['perplexity']:.4f}" in printed
    assert result["kv_bits"] == 32
    assert printed.startswith("kv_bits         32\n")
    assert main(["eval", str(model), "--text", str(text), "--seq-len", "32", "--kv-bits", "8",
                 "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_bits"] == 8


def test_generate_takes_a_batch_and_sampling(model, capsys):
    options = ["--max-new-tokens", "4", "--temperature", "1", "--top-k", "5", "--top-p", "0.9",
               "--seed", "3"]
    assert main(["generate", str(model), "--prompt", "a", "--prompt", "the fox", *options]) == 0
    first = capsys.readouterr().out
    assert main(["generate", str(model), "--prompt", "a", "--prompt", "the fox", *options]) == 0
    assert capsys.readouterr().out == first


def set_template(model, template):
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))


@pytest.mark.parametrize("template", [
    "{{ bos_token }}[{{ messages[0]['content'] }}]",
    [{"name": "default", "template": "{{ bos_token }}[{{ messages[0]['content'] }}]"}],
])
def test_chat_feeds_the_templates_tokens_and_one_bos(model, template, capsys):
    set_template(model, template)
    loaded = sq.load(model)
    tokens = loaded.chat_tokens([{"role": "user", "content": "hello"}])
    assert tokens == [0, *loaded.encode("[hello]", special=False)]
    options = ["--max-new-tokens", "4"]
    assert main(["generate", str(model), "--prompt", "hello", "--chat", *options]) == 0
    printed = capsys.readouterr().out
    expected = loaded.decode_after(tokens, loaded.generate(tokens, max_new_tokens=4))
    assert printed == expected + "\n"


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", "{% if %}"])
def test_failing_chat_template_is_one_line(model, template, capsys):
    set_template(model, template)
    status = main(["generate", str(model), "--prompt", "hello", "--chat"])
    assert_fails_with(capsys, status, str(model), "chat template")


@pytest.mark.parametrize("write", [
    lambda model: set_template(model, [{"name": ["x"], "template": "y"}]),
    lambda model: (model / "chat_template.jinja").write_bytes(b"\xff"),
])
def test_broken_chat_template_file_is_one_line(model, write, capsys):
    write(model)
    status = main(["generate", str(model), "--prompt", "hello", "--chat"])
    assert_fails_with(capsys, status, str(model), "chat_template")


def test_prompt_that_is_not_unicode_is_one_line(model, capsys):
    assert_fails_with(capsys, main(["generate", str(model), "--prompt", "caf\udce9"]), "surrogate")


def test_model_that_gives_nan_is_one_line(model, text, capsys):
    change_tensor(model, "model.norm.weight", lambda w: np.full_like(w, np.nan))
    status = main(["eval", str(model), "--text", str(text), "--seq-len", "32", "--json"])
    assert_fails_with(capsys, status, "finite logits")


def test_windows_beyond_the_models_maximum_are_warned_of(model, text, capsys):
    assert main(["eval", str(model), "--text", str(text), "--seq-len", "300", "--json"]) == 0
    assert "max_position_embeddings, 256" in capsys.readouterr().err


def test_chat_without_a_template_is_an_error(model, capsys):
    status = main(["generate", str(model), "--prompt", "hello", "--chat"])
    assert_fails_with(capsys, status, str(model), "chat_template")


def test_dry_run_prints_size_and_time(model, tmp_path, text, capsys):
    assert quantize(model, tmp_path / "out", text, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "size" in printed
    assert "time" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", [None, {"scheme": "w4a4"}])
@pytest.mark.parametrize(("weights", "tokens"), [("rtn", 2048), ("mse", 2048), ("gptq", 8192)])
def test_default_tokens_follow_the_rounding_that_is_asked_for(tmp_path, recipe, weights, tokens):
    options = ["quantize", "MODEL", "OUT", "--weights", weights]
    if recipe is not None:
        (tmp_path / "recipe.json").write_text(json.dumps(recipe))
        options += ["--recipe", str(tmp_path / "recipe.json")]
    assert config_from(parser().parse_args(options)).calibration_tokens == tokens
    options += ["--calibration-tokens", "300"]
    assert config_from(parser().parse_args(options)).calibration_tokens == 300


def test_recipe_is_overridden_by_options(model, tmp_path, text, capsys):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"scheme": "w4a8", "method": "hadamard"}))
    options = ["--recipe", str(recipe), "--method", "paper"]
    assert quantize(model, tmp_path / "out", text, *options) == 0
    assert "w4a8, method paper" in capsys.readouterr().out


# ---- bad input --------------------------------------------------------------------------------


def change_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensor(model, name, change):
    tensors = load_file(model / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, model / "model.safetensors")


def poison(value):
    def change(array):
        array = array.copy()
        array[1, 2] = value
        return array

    return change


Q = "model.layers.1.self_attn.q_proj.weight"
BAD_MODELS = {
    "pickled": (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), "pickled"),
    "missing config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "missing tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "tokenizer.json"),
    "unknown architecture": (lambda m: change_config(m, architectures=["BertModel"]), "BertModel"),
    "wrong shape": (lambda m: change_tensor(m, Q, lambda w: w[:-1].copy()), Q),
    "nan weight": (lambda m: change_tensor(m, Q, poison(np.nan)), "layers.1.self_attn.q_proj"),
    "inf weight": (lambda m: change_tensor(m, Q, poison(np.inf)), "layers.1.self_attn.q_proj"),
    "integer weight": (lambda m: change_tensor(m, Q, lambda w: w.astype(np.int32)), Q),
    "truncated": (
        lambda m: (m / "model.safetensors").write_bytes(
            (m / "model.safetensors").read_bytes()[:-1000]), "truncated"),
    "not safetensors": (
        lambda m: (m / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"x" * 64),
        "model.safetensors"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model_is_one_line_and_leaves_nothing(case, model, tmp_path, text, capsys):
    damage, named = BAD_MODELS[case]
    damage(model)
    assert_fails_with(capsys, quantize(model, tmp_path / "out", text), named)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_missing_shard_is_named(make_checkpoint, tmp_path, text, capsys):
    model = make_checkpoint(tmp_path / "sharded", shards=3)
    (model / "model-00002-of-00003.safetensors").unlink()
    status = quantize(model, tmp_path / "out", text)
    assert_fails_with(capsys, status, "model-00002-of-00003.safetensors")


def test_index_pointing_outside_is_refused(make_checkpoint, tmp_path, text, capsys):
    model = make_checkpoint(tmp_path / "sharded", shards=2)
    shutil.copy(model / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002", "../outside"))
    assert_fails_with(capsys, quantize(model, tmp_path / "out", text), "../outside.safetensors")


@pytest.mark.parametrize(("content", "named"), [("", "empty"), ("  \n ", "empty"),
                                                ("short", "window")])
def test_calibration_text_too_short_is_named(content, named, model, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text(content)
    assert_fails_with(capsys, quantize(model, tmp_path / "out", text), "short.txt", named)


def test_calibration_text_that_is_not_utf8_is_named(model, tmp_path, capsys):
    text = tmp_path / "latin.txt"
    text.write_bytes(b"caf\xe9 " * 100)
    assert_fails_with(capsys, quantize(model, tmp_path / "out", text), "latin.txt", "UTF-8")


def test_missing_text_is_named(model, tmp_path, capsys):
    assert_fails_with(capsys, quantize(model, tmp_path / "out", tmp_path / "no.txt"), "no.txt")


def test_text_shorter_than_a_window_is_an_error(model, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    assert_fails_with(capsys, main(["eval", str(model), "--text", str(tmp_path / "short.txt")]),
               "window of 256 tokens")


def test_existing_output_is_left_alone(model, tmp_path, text, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert_fails_with(capsys, quantize(model, tmp_path / "out", text), "out", "exists")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


@pytest.mark.parametrize(("options", "named"), [
    (["--group-size", "48"], "group_size"),
    (["--clip", "1.5"], "clip"),
    (["--clip", "nan"], "clip"),
    (["--calibration-tokens", "0"], "calibration_tokens"),
    (["--seed", "-1"], "seed"),
    (["--threads", "0"], "num_threads"),
])
def test_bad_option_is_named(options, named, model, tmp_path, text, capsys):
    assert_fails_with(capsys, quantize(model, tmp_path / "out", text, *options), named)


@pytest.mark.parametrize(("options", "named"), [
    (["--temperature", "-1"], "temperature"),
    (["--top-p", "0"], "top_p"),
    (["--max-new-tokens", "0"], "max_new_tokens"),
    (["--top-k", "-3"], "top_k"),
    (["--seed", "-1"], "seed"),
    (["--temperature", "inf"], "temperature"),
])
def test_bad_sampling_option_is_named(options, named, model, capsys):
    assert_fails_with(capsys, main(["generate", str(model), "--prompt", "a", *options]), named)


@pytest.mark.parametrize("arguments", [
    ["eval", ""], ["eval", "m", "--text", ""], ["quantize", "m", ""], ["inspect", "m", "--csv", ""],
    ["quantize", "m", "out", "--calibration", ""], ["compare", "m", "--text", "a", ""],
])
def test_empty_path_is_no_path(arguments, capsys):
    """What an unset variable of a script gives: Path("") would be the working directory."""
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "expected a path, found an empty text" in capsys.readouterr().err


def test_quantizing_a_quantized_folder_is_refused(model, tmp_path, text, capsys):
    quantize(model, tmp_path / "out", text)
    capsys.readouterr()
    assert_fails_with(capsys, quantize(tmp_path / "out", tmp_path / "again", text), "out")


def test_bfloat16_model_is_read(make_checkpoint, tmp_path, text, capsys):
    model = make_checkpoint(tmp_path / "bf16", dtype="bfloat16", shards=2, tie=False)
    assert load_file(model / "model-00001-of-00002.safetensors")[
        "model.embed_tokens.weight"].dtype == ml_dtypes.bfloat16
    assert quantize(model, tmp_path / "out", text) == 0
    assert main(["eval", str(tmp_path / "out"), "--text", str(text), "--seq-len", "32"]) == 0
    capsys.readouterr()


def test_quantize_prints_balance_and_8_bit_inputs(tmp_path, capsys):
    arguments = ["--weights", "rtn", "--calibration-tokens", "64"]
    model = str(sq.bundled_model())
    assert main(["quantize", model, str(tmp_path / "a"), "--scheme", "w4a4", *arguments]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()
            if line.split()[0] in SITES]
    assert [row[0] for row in rows] == list(SITES)
    assert {row[2] for row in rows} == {"yes"}
    assert [row[6] for row in rows] == ["64", "64", "64", "128"]
    assert main(["quantize", model, str(tmp_path / "b"), *arguments]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()
            if line.split()[0] in SITES]
    assert {row[6] for row in rows} == {"0"}


def test_sites_without_short_factors_are_named(tmp_path, make_checkpoint, text, capsys):
    """Of prime sizes: both commands say so, and the folder runs."""
    model, out = make_checkpoint(tmp_path / "model", hidden=66, heads=3, kv_heads=1,
                                 intermediate=1031), tmp_path / "out"
    options = ("--calibration", str(text), "--calibration-tokens", "128", "--method", "hadamard")
    assert main(["quantize", str(model), str(out), "--dry-run", *options]) == 0
    assert "none short enough for down (1031 = 1031 x 1)" in capsys.readouterr().out
    assert main(["inspect", str(model), *options]) == 0
    assert "no short factors: down (1031 = 1031 x 1)" in capsys.readouterr().out
    assert main(["quantize", str(model), str(out), "--weights", "rtn", *options]) == 0
    assert main(["generate", str(out), "--prompt", "the", "--max-new-tokens", "2"]) == 0
