"""Folders as transformers' save_pretrained writes them: its logits and perplexity are ours."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")
transformers = pytest.importorskip("transformers", reason="needs the torch extra")

import singlequant as sq  # noqa: E402
from singlequant.cli.main import main  # noqa: E402
from singlequant.methods.registry import METHODS  # noqa: E402
from singlequant.methods.spinquant import learn_rotations  # noqa: E402
from singlequant.study.evaluate import split_windows  # noqa: E402

SIZES = {
    "vocab_size": 320, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MODELS = {
    "llama-gqa-untied": ("Llama", {}),
    "llama-mha-untied": ("Llama", {"num_key_value_heads": 6}),
    "llama-gqa-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-linear-rope": ("Llama", {"rope_parameters": LINEAR}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {"sliding_window": 16, "use_sliding_window": False}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
}


@pytest.fixture(params=MODELS)
def pair(request, tmp_path, make_checkpoint):
    """A transformers model and the folder it was saved to, in shards, with a tokenizer."""
    family, options = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():  # the initial weights are too small to tell models apart
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    donor = make_checkpoint(tmp_path / "donor")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(donor / name, tmp_path / "saved" / name)
    return model, tmp_path / "saved"


def printed(capsys, *arguments):
    """What the command prints; it must succeed."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def test_logits_equal_transformers(pair):
    model, folder = pair
    tokens = np.random.default_rng(0).integers(0, 320, (2, 100))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(sq.load(folder).forward(tokens), expected, atol=1e-3, rtol=0)


def test_eval_equals_transformers(pair, text, capsys):
    model, folder = pair
    ours = json.loads(printed(capsys, "eval", folder, "--text", text, "--seq-len", 64, "--json"))
    windows = torch.from_numpy(split_windows(sq.load(folder).encode(text.read_text()), 64))
    with torch.no_grad():
        loss = model(windows, labels=windows).loss.item()
    assert ours["perplexity"] == pytest.approx(np.exp(loss), rel=1e-3)
    assert ours["predictions"] == windows.shape[0] * 63


UNRELATED = 2.0  # nats per token from such a model to one of other random weights, at the least
SWEPT = ("llama-gqa-untied", "llama-linear-rope", "llama-llama3-rope", "qwen2", "qwen2-tied")


@pytest.fixture
def calibration(text):
    return "--calibration", text, "--calibration-tokens", 256


def evaluation(capsys, out, folder, text):
    """Perplexity of a packed folder and its divergence from the original, by the command."""
    return json.loads(printed(capsys, "eval", out, "--text", text, "--seq-len", 64, "--reference",
                              folder, "--json"))


@pytest.mark.parametrize("pair", SWEPT, indirect=True)
@pytest.mark.parametrize("kv_bits", [16, 8])
def test_quantize_eval_and_generate_take_the_folder(pair, kv_bits, tmp_path, text, calibration,
                                                    capsys):
    folder, out = pair[1], tmp_path / "out"
    said = printed(capsys, "quantize", folder, out, "--scheme", "w4a8", "--kv-bits", kv_bits,
                   *calibration)
    assert "w4a8, method balanced, weights gptq" in said
    found = evaluation(capsys, out, folder, text)
    assert found["kv_bits"] == kv_bits
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=0.15)
    assert 0 < found["kl_mean"] < UNRELATED / 10
    for options in ((), ("--kv-bits", 4)):
        said = printed(capsys, "generate", out, "--prompt", "the quick", "--max-new-tokens", 5,
                       *options)
        assert said.startswith("the quick")


@pytest.mark.parametrize("pair", ["qwen2", "qwen2-tied"], indirect=True)
def test_learned_rotations_take_the_folder(pair, tmp_path, text, calibration, capsys):
    folder, out, file = pair[1], tmp_path / "out", tmp_path / "learned.safetensors"
    checkpoint = sq.load_checkpoint(folder)
    windows = sq.calibration_windows(checkpoint, sq.QuantConfig(calibration_tokens=256), text)
    learn_rotations(checkpoint, windows, steps=2, noise=False, threads=1, save=file)
    printed(capsys, "quantize", folder, out, "--scheme", "w4a8", "--method", "spinquant",
            "--learned", file, *calibration)
    found = evaluation(capsys, out, folder, text)
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=0.15)
    assert 0 < found["kl_mean"] < UNRELATED / 10


@pytest.mark.parametrize("pair", SWEPT, indirect=True)
def test_compare_takes_the_folder(pair, tmp_path, text, calibration, capsys):
    file = tmp_path / "rows.json"
    printed(capsys, "compare", pair[1], "--schemes", "w4a8", "--bits", 4.75, "--text", text,
            "--seq-len", 64, "--windows", 4, "--json", file, *calibration)
    original, *rows = json.loads(file.read_text())["rows"]
    assert {row["method"] for row in rows} == {m.name for m in METHODS.values() if not m.extra}
    (expected,) = original["results"]
    for row in rows:
        assert row["error"] is None
        (found,) = row["results"]
        assert np.isfinite(found["perplexity"])
        assert found["reference_perplexity"] == expected["perplexity"]
        assert 0 < found["kl_mean"] < UNRELATED / 4, row["method"]


@pytest.mark.parametrize("pair", SWEPT, indirect=True)
def test_inspect_takes_the_folder(pair, tmp_path, calibration, capsys):
    folder, out = pair[1], tmp_path / "out"
    of_model = json.loads(printed(capsys, "inspect", folder, "--method", "singlequant", "--json",
                                  *calibration))
    printed(capsys, "quantize", folder, out, "--method", "singlequant", *calibration)
    of_packed = json.loads(printed(capsys, "inspect", out, "--original", folder, "--json",
                                   "--calibration", calibration[1]))
    for found in (of_model, of_packed):
        last = [row for row in found["rows"] if row["final"]]
        assert {row["site"] for row in last} == {"qkv", "o", "gate_up", "down"}
        assert {row["layer"] for row in last} == {0, 1, 2}
        assert all(0 < row["output_error"] < 0.1 for row in last)
