# SPDX-License-Identifier: Apache-2.0
"""`export --to gptq` and `awq`: unpacked by the published formulas, and opened by transformers."""

import family_models as zoo
import ml_dtypes
import numpy as np
import pytest
from conftest import make_checkpoint
from exported_folders import quantized, settings, stored

import singlequant as sq
from singlequant import _C
from singlequant.checkpoint.folder import load_checkpoint

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.fixture
def exported(model, tmp_path):
    def make(to, dtype="float16", **options):
        packed = quantized(model, tmp_path / "packed", **options)
        return packed, sq.export(packed, to, tmp_path / "out", dtype=dtype)
    return make


def rounded(linear):
    """The weight [n, k] of codes and float16 scales."""
    codes = _C.unpack(linear.words, linear.shape[1], linear.bits)
    return _C.dequantize(codes, linear.scales.astype(np.float16).astype(np.float32))


def by_gptq(tensors, name, bits):
    """The weight [n, k] as AutoGPTQ's torch kernel unpacks it: w = scale * (q - (zero + 1))."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    mask = np.uint32((1 << bits) - 1)
    words, zeros = (tensors[f"{name}.{part}"].view(np.uint32) for part in ("qweight", "qzeros"))
    codes = (words[:, None, :] >> shifts[:, None] & mask).reshape(-1, words.shape[1])
    zeros = (zeros[:, :, None] >> shifts & mask).reshape(len(zeros), -1).astype(np.int64) + 1
    group = tensors[f"{name}.g_idx"]
    scales = tensors[f"{name}.scales"].astype(np.float32)
    return (scales[group] * (codes.astype(np.int64) - zeros[group])).T


def by_awq(tensors, name):
    """The weight [n, k] as AutoAWQ unpacks its gemm layout: w = scale * (q - zero)."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    found = []
    for part in ("qweight", "qzeros"):
        words = tensors[f"{name}.{part}"].view(np.uint32)
        nibbles = (words[:, :, None] >> shifts & np.uint32(15)).astype(np.int64)
        codes = np.empty_like(nibbles)
        codes[:, :, AWQ_ORDER] = nibbles
        found.append(codes.reshape(len(words), -1))
    codes, zeros = found
    scales = tensors[f"{name}.scales"].astype(np.float32)
    group = len(codes) // len(scales)
    return ((codes - zeros.repeat(group, 0)) * scales.repeat(group, 0)).T


@pytest.mark.parametrize(("bits", "group"), [(4, 0), (4, 32), (8, 32)])
def test_gptqs_formula_gives_the_weights(bits, group, exported):
    packed, out = exported("gptq", bits=bits, group_size=group)
    tensors, source = stored(out), load_checkpoint(packed)
    read = load_checkpoint(out, dequantize=True)
    for role, name in (("v", "self_attn.v_proj"), ("down", "mlp.down_proj")):
        linear = source.layer(1).linears[role].weight
        expected = rounded(linear)
        np.testing.assert_array_equal(by_gptq(tensors, f"model.layers.1.{name}", bits), expected)
        np.testing.assert_array_equal(read.layer(1).linears[role].weight,
                                      expected.astype(np.float16))
    assert settings(out) == {
        "quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": True,
        "desc_act": False, "lm_head": False, "true_sequential": True, "checkpoint_format": "gptq"}


@pytest.mark.parametrize("group", [0, 32])
def test_awqs_formula_gives_the_weights(group, exported):
    packed, out = exported("awq", group_size=group, method="smoothquant",
                           ignore=("*.1.mlp.up_proj",))
    tensors, source = stored(out), load_checkpoint(packed)
    read = load_checkpoint(out, dequantize=True)
    for role, name in (("q", "self_attn.q_proj"), ("gate", "mlp.gate_proj")):
        expected = rounded(source.layer(1).linears[role].weight)
        np.testing.assert_array_equal(by_awq(tensors, f"model.layers.1.{name}"), expected)
        np.testing.assert_array_equal(read.layer(1).linears[role].weight,
                                      expected.astype(np.float16))
    assert settings(out)["modules_to_not_convert"] == ["lm_head", "model.layers.1.mlp.up_proj"]
    assert tensors["model.layers.1.mlp.up_proj.weight"].dtype == np.float16


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_what_is_not_packed_has_the_type_and_scales_float16(to, exported):
    _, out = exported(to, dtype="bfloat16")
    tensors = stored(out)
    assert tensors["model.embed_tokens.weight"].dtype == ml_dtypes.bfloat16
    assert tensors["model.layers.0.mlp.up_proj.scales"].dtype == np.float16


@pytest.mark.parametrize(("to", "options", "message"), [
    ("gptq", {"method": "balanced"}, r"gptq: expected codes of weights that read their inputs as"),
    ("awq", {"method": "quarot"}, "found a rotation that runs beside them .*: quantize with"),
    ("awq", {"scheme": "w4a8"}, "awq: expected w4a16, found w4a8"),
    ("awq", {"bits": 8}, r"awq: expected 4 bits, found 8: quantize with --bits 4"),
    ("gptq", {"bits": 5}, r"gptq: expected 4 or 8 bits, found 5: quantize with --bits 4"),
    ("gptq", {"ignore": ("*.0.mlp.up_proj",)}, r"found model\.layers\.0\.mlp\.up_proj that is not"),
])
def test_what_a_layout_cannot_say_is_refused_and_nothing_is_left(to, options, message, model,
                                                                 tmp_path):
    packed = quantized(model, tmp_path / "packed", **options)
    with pytest.raises(ValueError, match=message):
        sq.export(packed, to, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_sizes_that_leave_words_unfilled_are_refused(tmp_path):
    packed = quantized(make_checkpoint(tmp_path / "model", intermediate=92), tmp_path / "packed")
    with pytest.raises(ValueError, match=r"expected sizes that are multiples of 8, found \[92, 64"):
        sq.export(packed, "awq", tmp_path / "out")


@pytest.mark.slow  # gptqmodel takes half a minute to begin; TORCHDYNAMO_DISABLE=1 spares a compiler
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_transformers_gives_the_logits(to, exported):
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("gptqmodel", reason="needs gptqmodel")
    packed, out = exported(to, dtype="float16", group_size=32)
    settings = {"gptq": transformers.GPTQConfig(bits=4, group_size=32, backend="torch"),
                "awq": transformers.AwqConfig(bits=4, group_size=32, backend="torch_awq")}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float16, quantization_config=settings[to])
    tokens = zoo.random_tokens(40)[None]
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(tokens)).logits.float().numpy()
    expected = sq.load(packed, kv_bits=32).forward(tokens)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
