# SPDX-License-Identifier: Apache-2.0
"""transformers opens what `export` writes, and gives the logits of the packed folder."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")
transformers = pytest.importorskip("transformers", "5.0", reason="needs transformers 5")

import family_models as zoo  # noqa: E402
from conftest import SENTENCES, copy_golden  # noqa: E402

import singlequant as sq  # noqa: E402

FAMILIES = Path(__file__).resolve().parent / "data" / "families"
GOLDEN = [f"{name}-{variant}" for name, variant in zoo.variants(golden=True)]
TOLERANCE = 1e-4  # absolute, of logits of order 1 in float32
BFLOAT16_SHARE = 0.1  # of the logits' norm: what rounding weights to 8 bits of mantissa moves


def opened(folder, attention="eager", dtype="auto"):
    """transformers' model of a folder, in its own type. Tensors that are left over fail the test.
    Gemma's rounds the scale of its embedding to dtype."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=dtype, attn_implementation=attention,
        experts_implementation="eager")  # grouped products want sizes that are multiples of 4
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def theirs(model, tokens):
    with torch.no_grad():
        return model.float()(torch.from_numpy(tokens)).logits.numpy()


def attention_of(golden):
    """transformers' implementation of attention that computes what the family means."""
    name = next(name for name, variant in zoo.variants(golden=True)
                if f"{name}-{variant}" == golden)
    return zoo.FAMILIES[name].attention


@pytest.fixture(params=GOLDEN)
def packed(request, tmp_path):
    """(packed folder of a family, tokens, transformers' implementation of attention)."""
    folder = copy_golden(request.param, tmp_path)
    (tmp_path / "text.txt").write_text(SENTENCES[:600])
    config = sq.QuantConfig("w4a16", weights="rtn", bits=4, calibration_tokens=128, head_bits=16,
                            embedding_bits=16)  # a head of codes rounds what it multiplies
    out = sq.quantize_folder(folder, tmp_path / "packed", config, tmp_path / "text.txt").out
    return out, np.load(folder / "tokens.npy")[None], attention_of(request.param)


def test_logits_of_the_plain_folder_are_those_of_the_packed_one(packed, tmp_path):
    folder, tokens, attention = packed
    plain = sq.export(folder, "hf", tmp_path / "plain", dtype="float32")
    expected = sq.load(folder, kv_bits=32).forward(tokens)
    np.testing.assert_allclose(theirs(opened(plain, attention), tokens), expected, atol=TOLERANCE,
                               rtol=0)


@pytest.mark.parametrize("packed", ["llama-tied", "qwen3-moe-tied", "gpt2-tied"], indirect=True)
def test_bfloat16_is_the_default_and_what_transformers_loads(packed, tmp_path):
    folder, tokens, attention = packed
    model = opened(sq.export(folder, "hf", tmp_path / "plain"), attention)
    assert model.dtype == torch.bfloat16
    expected = sq.load(folder, kv_bits=32).forward(tokens)
    error = np.linalg.norm(theirs(model, tokens) - expected) / np.linalg.norm(expected)
    assert 0 < error < BFLOAT16_SHARE


@pytest.mark.parametrize("packed", ["llama-tied"], indirect=True)
def test_tokenizer_opens(packed, tmp_path):
    plain = sq.export(packed[0], "hf", tmp_path / "plain")
    found = transformers.AutoTokenizer.from_pretrained(plain)("the quick")["input_ids"]
    np.testing.assert_array_equal(found, sq.load_checkpoint(packed[0]).encode("the quick"))


@pytest.mark.parametrize("fuse", ["balance", "rotation"])
@pytest.mark.parametrize("golden", sorted(zoo.COMMUTING))
def test_logits_of_a_rotated_folder_are_those_of_the_model(golden, fuse, tmp_path):
    tokens = np.load(FAMILIES / golden / "tokens.npy")[None]
    folder = copy_golden(golden, tmp_path)  # with a tokenizer, to calibrate
    rotated = sq.export(folder, "rotated-hf", tmp_path / "rotated", dtype="float32", fuse=fuse)
    attention = attention_of(golden)
    original = opened(FAMILIES / golden, attention, torch.float32)
    np.testing.assert_allclose(theirs(opened(rotated, attention), tokens),
                               theirs(original, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "mixtral"])
def test_plain_folder_of_a_gguf_file_opens(name, tmp_path):
    pytest.importorskip("gguf", reason="needs the gguf extra")
    files = FAMILIES.parent / "gguf"
    plain = sq.export(files / f"{name}.gguf", "hf", tmp_path / "plain", dtype="float32")
    tokens = np.arange(24)[None] * 7 % 90 + 3
    np.testing.assert_allclose(theirs(opened(plain), tokens), np.load(files / f"{name}.npy"),
                               atol=TOLERANCE, rtol=0)
