# SPDX-License-Identifier: Apache-2.0
"""Folders that GPTQ, AWQ and compressed-tensors quantized, made by hand after their writers."""

import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import edit_config, make_checkpoint
from test_stored_floats import read, spread

import singlequant as sq
from singlequant import FormatError, load_checkpoint
from singlequant.checkpoint.decoded import Given
from singlequant.checkpoint.integers import find_gptq
from singlequant.cli.main import main
from singlequant.tensors import TensorFiles, read_header, write_safetensors

FILE = "model.safetensors"
LINEAR = re.compile(r"layers.*proj\.weight$")
UP = "model.layers.1.mlp.up_proj"
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
Parts = tuple[dict[str, np.ndarray], np.ndarray]  # stored tensors by suffix, the weight they are


def pack_along(codes: np.ndarray, bits: int, axis: int, order=None) -> np.ndarray:
    """Words of 32 bits of codes along an axis, low bits first; order: which code goes where."""
    codes, per = np.moveaxis(codes.astype(np.uint64), axis, -1), 32 // bits
    padding = -codes.shape[-1] % per
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)])
    parts = codes.reshape(*codes.shape[:-1], -1, per)[..., list(order or range(per))]
    words = (parts << np.arange(0, 32, bits, dtype=np.uint64)).sum(-1).astype(np.uint32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def asymmetric(weight: np.ndarray, bits: int, groups: int, dtype) -> tuple[np.ndarray, ...]:
    """Codes [n, k], zeros [n, groups], scales [n, groups] and the weight that they are."""
    n, k = weight.shape
    parts = weight.astype(np.float32).reshape(n, groups, -1)
    low, high = np.minimum(parts.min(2), 0), np.maximum(parts.max(2), 0)
    scales = ((high - low) / (2**bits - 1)).astype(dtype)
    wide = scales.astype(np.float32)
    zeros = np.clip(np.rint(-low / wide), 0, 2**bits - 1)
    codes = np.clip(np.rint(parts / wide[..., None]) + zeros[..., None], 0, 2**bits - 1)
    values = ((codes - zeros[..., None]) * wide[..., None]).astype(dtype).reshape(n, k)
    return codes.reshape(n, k).astype(np.int64), zeros.astype(np.int64), scales, values


def gptq(weight, bits=4, groups=4, v2=False, order=False, dtype=np.float16) -> Parts:
    codes, zeros, scales, values = asymmetric(weight, bits, groups, dtype)
    index = np.arange(weight.shape[1]) * groups // weight.shape[1]
    if order:  # act order: neighbours are of any group
        turn = np.random.default_rng(0).permutation(weight.shape[1])
        codes, values, index = codes[:, turn], values[:, turn], index[turn]
    words = pack_along(zeros.T, bits, 1).view(np.uint32)
    if not v2:
        words -= np.uint32(0x11111111 if bits == 4 else 0x01010101)
    return {"qweight": pack_along(codes.T, bits, 0), "qzeros": words.view(np.int32),
            "scales": np.ascontiguousarray(scales.T), "g_idx": index.astype(np.int32)}, values


def awq(weight, groups=4) -> Parts:
    codes, zeros, scales, values = asymmetric(weight, 4, groups, np.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": pack_along(codes.T, 4, 1, order),
            "qzeros": pack_along(zeros.T, 4, 1, order),
            "scales": np.ascontiguousarray(scales.T)}, values


def packed(weight, bits=4, groups=4, zero=True, order=False, dtype=BF16) -> Parts:
    codes, zeros, scales, values = asymmetric(weight, bits, groups, dtype)
    index = np.arange(weight.shape[1]) * groups // weight.shape[1]
    if not zero:
        half = 2 ** (bits - 1)
        values = spread(scales.astype(np.float32), 1, weight.shape[1] // groups, weight.shape)
        values = ((codes - half) * values).astype(dtype)
    if order:
        turn = np.random.default_rng(0).permutation(weight.shape[1])
        codes, values, index = codes[:, turn], values[:, turn], index[turn]
    stored = {"weight_packed": pack_along(codes, bits, 1), "weight_scale": scales,
              "weight_shape": np.array(weight.shape, np.int64)}
    if zero:
        stored["weight_zero_point"] = pack_along(zeros, bits, 0)
    if order:
        stored["weight_g_idx"] = index.astype(np.int32)
    return stored, values


def int8(weight, groups=1, per_tensor=False) -> Parts:
    scale = np.abs(weight.astype(np.float32)).reshape(len(weight), groups, -1).max(2) / 127
    scale = (scale.max().reshape(1) if per_tensor else scale).astype(np.float32)
    wide = spread(np.broadcast_to(np.atleast_2d(scale), (len(weight), groups)), 1,
                  weight.shape[1] // groups, weight.shape)
    codes = np.rint(weight.astype(np.float32) / wide).astype(np.int8)
    return {"weight": codes, "weight_scale": scale}, codes * wide


def float8(weight) -> Parts:
    scale = (np.abs(weight.astype(np.float32)).max(1, keepdims=True) / 448).astype(BF16)
    codes = (weight.astype(np.float32) / scale.astype(np.float32)).astype(E4M3)
    values = (codes.astype(np.float32) * scale.astype(np.float32)).astype(BF16)
    return {"weight": codes, "weight_scale": scale,
            "input_scale": np.ones(1, BF16)}, values


def quantize_with(folder: Path, make: Callable[[np.ndarray], Parts], settings: dict,
                  **options) -> dict[str, np.ndarray]:
    """Puts what `make` gives in place of a folder's linears; the tensors that should be read."""
    make_checkpoint(folder, hidden=128, heads=4, intermediate=160, dtype="float16", tie=False,
                    **options)
    stored, expected = {}, {}
    for name, tensor in read(folder / FILE).items():
        expected[name] = stored[name] = tensor
        if LINEAR.search(name):
            del stored[name]
            parts, expected[name] = make(tensor)
            stored |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
    write_safetensors(folder / FILE, stored)
    edit_config(folder, quantization_config=settings)
    return expected


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
V2 = {**GPTQ, "checkpoint_format": "gptq_v2"}
AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm"}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
NAIVE = {**CT, "format": "naive-quantized"}


def without_order(parts: Parts) -> Parts:
    return {k: v for k, v in parts[0].items() if k != "g_idx"}, parts[1]


FORMS = {
    "gptq": (gptq, GPTQ),
    "gptq v2": (lambda w: gptq(w, v2=True), V2),
    "gptq 8 bits": (lambda w: gptq(w, 8), GPTQ | {"bits": 8}),
    "gptq 8 bits v2": (lambda w: gptq(w, 8, v2=True), V2 | {"bits": 8}),
    "gptq whole rows": (lambda w: gptq(w, groups=1), GPTQ | {"group_size": -1}),
    "gptq act order": (lambda w: gptq(w, order=True), GPTQ | {"desc_act": True}),
    "gptq bfloat16": (lambda w: gptq(w, dtype=BF16), GPTQ),
    "gptq without g_idx": (lambda w: without_order(gptq(w, groups=w.shape[1] // 32)), GPTQ),
    "awq": (awq, AWQ),
    "awq whole rows": (lambda w: awq(w, 1), {"quant_method": "awq", "version": "GEMM"}),
    "pack": (packed, CT),
    "pack symmetric": (lambda w: packed(w, zero=False), CT),
    "pack 8 bits": (lambda w: packed(w, 8), CT),
    "pack channel": (lambda w: packed(w, groups=1, dtype=np.float32), CT),
    "pack act order": (lambda w: packed(w, order=True), CT),
    "pack mixed": (packed, CT | {"format": "mixed-precision",
                                 "config_groups": {"a": {"format": "pack-quantized"}}}),
    "int8 channel": (int8, NAIVE),
    "int8 group": (lambda w: int8(w, 4), CT | {"format": "int-quantized"}),
    "int8 tensor": (lambda w: int8(w, per_tensor=True), NAIVE),
    "fp8": (float8, CT | {"format": "float-quantized"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_dequantized_when_asked(tmp_path, form):
    expected = quantize_with(tmp_path / "m", *FORMS[form])
    checkpoint = load_checkpoint(tmp_path / "m", dequantize=True)
    assert set(checkpoint.tensors) == set(expected)
    assert checkpoint.ignored_tensors == ()
    for name, tensor in expected.items():
        found, info = checkpoint.tensor(name), checkpoint.tensors[name]
        assert found.dtype == tensor.dtype, name
        assert info.shape == found.shape
        assert info.nbytes == found.nbytes
        np.testing.assert_array_equal(found, tensor, err_msg=name)


@pytest.mark.parametrize("form", ["gptq", "awq", "pack", "fp8"])
def test_they_are_refused_when_not_asked(tmp_path, form):
    quantize_with(tmp_path / "m", *FORMS[form])
    method = FORMS[form][1]["quant_method"]
    with pytest.raises(FormatError, match=f"found '{method}'; --dequantize, load_checkpoint"):
        load_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "quanto", "aqlm", None, 3])
@pytest.mark.parametrize("dequantize", [False, True])
def test_other_methods_are_refused_by_name(model, method, dequantize):
    edit_config(model, quantization_config={"quant_method": method})
    with pytest.raises(FormatError, match=rf"quant_method: expected an .*awq.* found {method!r}"):
        load_checkpoint(model, dequantize)


@pytest.mark.parametrize(("settings", "message"), [
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format: expected gptq or gptq_v2, found"),
    (GPTQ | {"is_marlin_format": True}, "checkpoint_format: .* found 'marlin'"),
    (AWQ | {"version": "gemv"}, "version: expected gemm, found 'gemv'"),
    (CT | {"format": "nvfp4-pack-quantized"}, "format: expected one of .* found 'nvfp4-pack"),
    (CT | {"config_groups": {"a": {"format": "marlin-24"}}}, "format: .* found 'marlin-24'"),
    (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "format: .* found 'sparse-24"),
    (CT | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config: expected none"),
])
def test_layouts_that_are_not_read_are_refused_by_name(tmp_path, settings, message):
    quantize_with(tmp_path / "m", packed, settings)
    with pytest.raises(FormatError, match=rf"config\.json: quantization_config\.{message}"):
        load_checkpoint(tmp_path / "m", dequantize=True)


@pytest.mark.parametrize(("name", "method"), [("quantize_config.json", "gptq"),
                                              ("quant_config.json", "awq")])
def test_settings_in_a_file_of_their_own(tmp_path, name, method):
    make, settings = FORMS[method]
    expected = quantize_with(tmp_path / "m", make, settings)
    edit_config(tmp_path / "m", remove=("quantization_config",))
    (tmp_path / "m" / name).write_text('{"group_size": 32, "q_group_size": 32, "w_bit": 4}')
    with pytest.raises(FormatError, match=rf"{name}: .*found '{method}'; --dequantize"):
        load_checkpoint(tmp_path / "m")
    checkpoint = load_checkpoint(tmp_path / "m", dequantize=True)
    np.testing.assert_array_equal(checkpoint.tensor(f"{UP}.weight"), expected[f"{UP}.weight"])


BAD = {
    "gptq": {
        "qzeros": [None, np.zeros((4, 19), np.int32), np.zeros((4, 20), np.float32)],
        "scales": [None, np.zeros((3, 160), np.float16), np.zeros((4, 160), np.int32),
                   np.zeros(160, np.float16)],
        "qweight": [np.zeros((16, 159), np.int32), np.zeros((2, 16, 160), np.int32)],
        "g_idx": [np.zeros(127, np.int32), np.zeros(128, np.float32)],
    },
    "awq": {
        "qzeros": [None, np.zeros((4, 40), np.int32)],
        "scales": [np.zeros((5, 160), np.float16)],
        "qweight": [np.zeros((128, 19), np.int32)],
    },
    "pack": {
        "weight_scale": [None, np.zeros((159, 4), BF16), np.zeros((160, 5), BF16),
                         np.zeros((160, 4), np.int32), np.zeros((160, 0), BF16)],
        "weight_shape": [None, np.zeros(3, np.int64), np.array([160, 4096]), np.array([159, 128]),
                         np.array([160, -5])],
        "weight_zero_point": [np.zeros((19, 4), np.int32), np.zeros((160, 3), np.int8)],
        "weight_packed": [np.zeros((160, 15), np.int32), np.zeros((160, 16), np.int16)],
        "weight_g_idx": [np.zeros(5, np.int32)],
    },
}


@pytest.mark.parametrize(("form", "part", "tensor"), [
    (form, part, tensor) for form, parts in BAD.items() for part, all_of in parts.items()
    for tensor in all_of])
def test_parts_that_do_not_fit_are_refused_when_opened(tmp_path, form, part, tensor):
    quantize_with(tmp_path / "m", *FORMS[form])
    stored = read(tmp_path / "m" / FILE)
    stored.pop(f"{UP}.{part}", None)
    if tensor is not None:
        stored[f"{UP}.{part}"] = tensor
    write_safetensors(tmp_path / "m" / FILE, stored)
    with pytest.raises(FormatError, match=rf"{FILE}: {UP}\.\w+: expected .*, found "):
        load_checkpoint(tmp_path / "m", dequantize=True)


@pytest.mark.parametrize(("form", "part"), [("gptq", "g_idx"), ("pack act order", "weight_g_idx")])
@pytest.mark.parametrize("value", [4, -2, 2**30])
def test_groups_outside_are_refused_when_read(tmp_path, form, part, value):
    quantize_with(tmp_path / "m", *FORMS[form])
    stored = read(tmp_path / "m" / FILE)
    stored[f"{UP}.{part}"][5] = value
    write_safetensors(tmp_path / "m" / FILE, stored)
    checkpoint = load_checkpoint(tmp_path / "m", dequantize=True)
    with pytest.raises(FormatError, match=rf"{UP}\.weight: g_idx: expected groups from 0 to 3"):
        checkpoint.tensor(f"{UP}.weight")


@pytest.mark.parametrize("zero", [True, False])
def test_biases_of_zeros_that_old_writers_added(tmp_path, zero):
    quantize_with(tmp_path / "m", *FORMS["gptq"])
    stored = read(tmp_path / "m" / FILE)
    stored[f"{UP}.bias"] = np.full(160, not zero, np.float16)
    write_safetensors(tmp_path / "m" / FILE, stored)
    if zero:
        checkpoint = load_checkpoint(tmp_path / "m", dequantize=True)
        assert checkpoint.ignored_tensors == (f"{UP}.bias",)
        return
    with pytest.raises(FormatError, match=rf"{UP}\.bias: unexpected tensor"):
        load_checkpoint(tmp_path / "m", dequantize=True)


def test_biases_of_the_model_are_kept(tmp_path):
    expected = quantize_with(tmp_path / "m", *FORMS["gptq"], bias=True)
    checkpoint = load_checkpoint(tmp_path / "m", dequantize=True)
    np.testing.assert_array_equal(checkpoint.tensor(f"{UP}.bias"), expected[f"{UP}.bias"])


def test_family_that_stores_inputs_by_outputs(tmp_path):
    """GPT-2's Conv1D: a square weight's shape does not tell which way it lies."""
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    parts, values = gptq(weight)
    write_safetensors(tmp_path / "f", {f"h.{key}": part for key, part in parts.items()})
    files = TensorFiles(read_header(tmp_path / "f"))
    for transposed, expected in ((frozenset(), values), (frozenset(["h.weight"]), values.T)):
        forms = find_gptq(Given(files.infos, GPTQ, files.view, transposed=transposed))
        entry = forms.decoded["h.weight"]
        found = entry.decode(*(files.view(part) for part in entry.parts))
        np.testing.assert_array_equal(found, expected)


def test_every_command_takes_the_option(tmp_path, text, capsys):
    quantize_with(tmp_path / "m", *FORMS["awq"])
    model = str(tmp_path / "m")
    small = ["--calibration", str(text), "--calibration-tokens", "64"]
    commands = [
        ["quantize", model, str(tmp_path / "out"), *small],
        ["quantize", model, str(tmp_path / "dry"), "--dry-run", *small],
        ["eval", model, "--text", str(text), "--seq-len", "32", "--reference", model],
        ["generate", model, "--prompt", "a", "--max-new-tokens", "2"],
        ["compare", model, "--methods", "none", "--schemes", "w4a8", "--text", str(text),
         "--seq-len", "32", "--windows", "1", "--no-default", *small],
        ["inspect", model, "--layer", "0", *small],
    ]
    for command in commands:
        assert main(command) == 2, command
        assert "found 'awq'; --dequantize" in capsys.readouterr().err
        assert main([*command, "--dequantize"]) == 0, command
    assert sq.load(tmp_path / "out").checkpoint.quantized
    config = (tmp_path / "out" / "config.json").read_text()
    assert '"singlequant"' in config
    assert '"awq"' not in config


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("strategy", "symmetric"), [
    ("group", True), ("group", False), ("channel", True), ("channel", False)])
def test_pack_quantized_equals_the_library(tmp_path, bits, strategy, symmetric):
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor as Library
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy,
                                 group_size=32 if strategy == "group" else None)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)

    def make(weight: np.ndarray) -> Parts:
        groups = weight.shape[1] // 32 if strategy == "group" else 1
        _, zeros, scales, _ = asymmetric(weight, bits, groups, np.float16)
        half = 2 ** (bits - 1)
        state = {"weight": torch.from_numpy(weight), "weight_scale": torch.from_numpy(scales)}
        if not symmetric:
            state["weight_zero_point"] = torch.from_numpy((zeros - half).astype(np.int8))
        stored = Library.compress(state, scheme)
        whole = Library.decompress(dict(stored), scheme)["weight"]
        return {name: part.numpy() for name, part in stored.items()}, whole.numpy()

    expected = quantize_with(tmp_path / "m", make, CT)
    checkpoint = load_checkpoint(tmp_path / "m", dequantize=True)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), tensor, err_msg=name)
