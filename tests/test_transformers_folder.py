"""Folders as transformers' save_pretrained writes them: its logits and perplexity are ours."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import singlequant as sq  # noqa: E402
from singlequant.cli.main import main  # noqa: E402
from singlequant.study.evaluate import split_windows  # noqa: E402

SIZES = {
    "vocab_size": 320, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama-gqa-untied": ("Llama", {}),
    "llama-mha-untied": ("Llama", {"num_key_value_heads": 6}),
    "llama-gqa-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {"sliding_window": 16, "use_sliding_window": False}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
}
TEXT = "the quick brown fox rotates its tail. " * 120


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


def test_logits_equal_transformers(pair):
    model, folder = pair
    tokens = np.random.default_rng(0).integers(0, 320, (2, 100))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(sq.load(folder).forward(tokens), expected, atol=1e-3, rtol=0)


def test_eval_equals_transformers(pair, tmp_path, capsys):
    model, folder = pair
    (tmp_path / "text.txt").write_text(TEXT)
    assert main(["eval", str(folder), "--text", str(tmp_path / "text.txt"), "--seq-len", "64",
                 "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    windows = torch.from_numpy(
        split_windows(sq.load(folder).encode(TEXT), 64))
    with torch.no_grad():
        loss = model(windows, labels=windows).loss.item()
    assert ours["perplexity"] == pytest.approx(np.exp(loss), rel=1e-3)
    assert ours["predictions"] == windows.shape[0] * 63
