"""Files that every later version must read: packed folders of each format version, their logits.

Made once, as data/golden/README.md says, and kept for ever: a change that breaks this breaks
users' files.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import singlequant as sq
from singlequant import _C

GOLDEN = Path(__file__).resolve().parent / "data" / "golden"
TOKENS = np.arange(24).reshape(1, 24) * 7 + 3
CONFIGS = {
    "v1": sq.QuantConfig(scheme="w4a8", bits=4, method="singlequant", weights="mse", group_size=32,
                         ignore=("*.k_proj",), clip=1.0, calibration_tokens=64),
    # A folded balance (norms and the ignored linear in F32) and 32 inputs of each site at 8 bits.
    "v1-balanced": sq.QuantConfig("w4a4", "balanced", "rtn", 4, clip=0.875,
                                  ignore=("*.up_proj",), calibration_tokens=64),
    # The model is described by the folder: biases at q, k and v alone, as Qwen2 has them.
    "v2-qwen2": sq.QuantConfig(scheme="w4a8", bits=4, method="balanced", weights="mse", clip=1.0,
                               calibration_tokens=64),
}  # fmt: skip
VERSIONS = {name: int(name[1]) for name in CONFIGS}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kernels", _C.kernels()["runnable"])
def test_golden_folder_gives_the_logits_it_gave(kernels, name):
    _C.use_kernels(kernels)
    expected = np.load(GOLDEN / name / "logits.npy")
    tokens = TOKENS[:, : expected.shape[1]]
    logits = sq.load(GOLDEN / name / "packed", kv_bits=32).forward(tokens)  # as they were made
    np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=0)
    logits = sq.load(GOLDEN / name / "packed").forward(tokens)  # 16 bits move a few codes
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_golden_folder_says_what_it_is(name):
    config = sq.load_checkpoint(GOLDEN / name / "packed").quant_config
    for field in ("scheme", "method", "group_size", "ignore"):
        assert getattr(config, field) == getattr(CONFIGS[name], field)
    assert config.activation_clip == CONFIGS[name].clip
    recipe = sq.QuantConfig.from_file(GOLDEN / name / "packed" / "recipe.json")
    assert recipe.calibration_tokens == 64


@pytest.mark.parametrize("name", CONFIGS)
def test_golden_folder_is_of_its_version(name):
    config = json.loads((GOLDEN / name / "packed" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == VERSIONS[name]
    assert ("model" in config["quantization_config"]) == (VERSIONS[name] > 1)


def test_golden_folder_of_version_2_needs_no_family(monkeypatch):
    monkeypatch.setattr("singlequant.models.families.FAMILIES", {})
    spec = sq.load_checkpoint(GOLDEN / "v2-qwen2" / "packed").spec
    assert [role for role, linear in spec.layer(0).linears.items() if linear.bias] == [*"qkv"]
    with pytest.raises(sq.FormatError, match="architectures: expected one of"):
        sq.load_checkpoint(GOLDEN / "v1" / "packed")


def test_golden_balanced_folder_has_what_it_is_kept_for():
    checkpoint = sq.load_checkpoint(GOLDEN / "v1-balanced" / "packed")
    layer = checkpoint.layer(0)
    assert layer.int8_inputs == {"qkv": 32, "o": 32, "gate_up": 32, "down": 32}
    assert all(norm.weight.dtype == np.float32 for norm in layer.norms.values())
    assert layer.linears["up"].weight.dtype == np.float32
    assert layer.linears["q"].bias is not None
    assert checkpoint.final_norm.weight.dtype == np.float16


def make(name: str, tokens: int) -> None:
    """A folder of the checked-out version, under its name, and the logits of the first tokens."""
    import tempfile

    from conftest import make_checkpoint

    config = CONFIGS[name]
    with tempfile.TemporaryDirectory() as folder:
        architecture = "Qwen2ForCausalLM" if name == "v2-qwen2" else "LlamaForCausalLM"
        source = make_checkpoint(Path(folder) / "source", hidden=64, intermediate=96, layers=1,
                                 vocab=258, bias=name == "v1-balanced", architecture=architecture)
        checkpoint = sq.load_checkpoint(source)
        statistics = sq.calibrate(checkpoint, np.arange(64).reshape(2, 32))
        rotations = sq.solve_rotations(statistics, config.method)
        (GOLDEN / name).mkdir(parents=True)
        packed = GOLDEN / name / "packed"
        sq.save(sq.quantize(checkpoint, rotations, config), packed, checkpoint, config)
    np.save(GOLDEN / name / "logits.npy", sq.load(packed, kv_bits=32).forward(TOKENS[:, :tokens]))


if __name__ == "__main__":
    make(sys.argv[1], int(sys.argv[2]))
