"""The bundled model: its outliers make plain rounding fail, and the demo shows it."""

import numpy as np
import pytest

import singlequant as sq
from singlequant.cli.main import main
from singlequant.models.families import find_family


@pytest.fixture(scope="module")
def original():
    return sq.load(sq.bundled_model())


def kl_mean(original, folder, **config) -> float:
    config = sq.QuantConfig(weights="rtn", bits=4, clip=1.0, calibration_tokens=2048, **config)
    sq.quantize_folder(sq.bundled_model(), folder, config)
    tokens = original.encode(sq.bundled_text("heldout"))[:4096]
    return sq.perplexity(sq.load(folder), tokens, 256, reference=original).kl_mean


def test_plain_rounding_fails_where_a_hadamard_does_not(original, tmp_path):
    plain = kl_mean(original, tmp_path / "none", scheme="w4a4", method="none")
    assert plain >= 5 * kl_mean(original, tmp_path / "hadamard", scheme="w4a4", method="hadamard")


def test_eight_bit_activations_are_far_closer(original, tmp_path):
    four = kl_mean(original, tmp_path / "w4a4", scheme="w4a4")
    assert kl_mean(original, tmp_path / "w4a8", scheme="w4a8") < four / 2


def test_residual_stream_has_outlier_channels():
    checkpoint = sq.load_checkpoint(sq.bundled_model())
    windows = sq.calibration_windows(checkpoint, sq.QuantConfig(calibration_tokens=1024))
    for layer in sq.calibrate(checkpoint, windows):
        rms = np.sqrt(layer.sites["qkv"].sum2 / layer.sites["qkv"].count)
        assert rms.max() > 5 * np.median(rms)


def test_it_is_a_llama_of_a_few_megabytes():
    checkpoint = sq.load_checkpoint(sq.bundled_model())
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert find_family(checkpoint.config).spec(checkpoint.config) == checkpoint.spec
    assert checkpoint.bytes_on_disk < 6e6


@pytest.mark.slow
def test_demo_prints_a_table_a_sentence_and_saves_a_picture(tmp_path, capsys):
    assert main(["demo", "--picture", str(tmp_path / "picture.png")]) == 0
    printed = capsys.readouterr().out
    kl = {}
    for line in printed.splitlines():
        words = line.split()
        if words and words[0] in ("w4a4", "w4a8"):
            kl[words[0], words[1]] = float(words[4])
    assert kl["w4a4", "none"] > 5 * kl["w4a4", "hadamard"]
    assert kl["w4a4", "singlequant"] < kl["w4a4", "hadamard"]
    assert kl["w4a4", "balanced"] < kl["w4a4", "singlequant"] / 2
    assert kl["w4a8", "balanced"] < kl["w4a4", "balanced"] / 2
    assert "W4A8 writes: This function" in printed
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
