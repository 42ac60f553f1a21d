# SPDX-License-Identifier: Apache-2.0
"""Folders in fp8 and MXFP4: read as bfloat16, and refused where their scales do not fit."""

import gc
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import edit_config, make_checkpoint, write_weights

import singlequant as sq
from singlequant import FormatError, load_checkpoint
from singlequant.checkpoint.decoded import Forms, Given, StoredTensors
from singlequant.checkpoint.floats import find_fp8, find_mxfp4
from singlequant.tensors import TensorFiles, read_header, write_safetensors

FILE = "model.safetensors"
E4M3, BF16, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu
LINEAR = re.compile(r"layers.*proj\.weight$")
UP = "model.layers.1.mlp.up_proj.weight"


def read(path: Path) -> dict[str, np.ndarray]:
    """Copies of a file's tensors; the safetensors library knows no fp8 of NumPy's."""
    files = TensorFiles(read_header(path))
    return {name: files.view(name).copy() for name in files.infos}


def blocks_of(weight: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of blocks [rows, columns], those at the edges smaller."""
    n, k = weight.shape
    padded = np.zeros((-(-n // rows) * rows, -(-k // columns) * columns), np.float32)
    padded[:n, :k] = weight
    parts = padded.reshape(len(padded) // rows, rows, -1, columns)
    scales = (np.abs(parts).max((1, 3)) / 448).astype(np.float32)
    codes = (parts / scales[:, None, :, None]).reshape(padded.shape)[:n, :k].astype(E4M3)
    return codes, scales


def spread(scales: np.ndarray, rows: int, columns: int, shape: tuple[int, int]) -> np.ndarray:
    return np.repeat(np.repeat(scales, rows, 0), columns, 1)[: shape[0], : shape[1]]


def make_fp8(folder: Path, block: tuple[int, int] | None, name: str, dtype=np.float32,
             **settings) -> dict[str, np.ndarray]:
    """Puts fp8 in place of a folder's linears; the tensors that should be read."""
    make_checkpoint(folder, hidden=96, heads=4, intermediate=200, dtype="bfloat16", tie=False)
    tensors, expected = read(folder / FILE), {}
    for key, weight in list(tensors.items()):
        expected[key] = weight
        if not LINEAR.search(key):
            continue
        sizes = block or weight.shape
        codes, scales = blocks_of(weight, *sizes)
        scales = scales.astype(dtype)
        tensors[key] = codes
        tensors[key.replace("weight", name)] = scales if block else scales.reshape(())
        wide = spread(scales.astype(np.float32), *sizes, weight.shape)
        expected[key] = (codes.astype(np.float32) * wide).astype(BF16)
    write_safetensors(folder / FILE, tensors)
    edit_config(folder, quantization_config={
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
        "weight_block_size": block and list(block), **settings})
    return expected


FORMS = {
    "blocks": ((64, 64), "weight_scale_inv", np.float32),
    "large blocks": ((128, 128), "weight_scale_inv", np.float32),
    "powers of two": ((64, 32), "weight_scale_inv", E8M0),
    "bfloat16 scales": ((64, 64), "weight_scale_inv", BF16),
    "per tensor": (None, "weight_scale_inv", BF16),
    "named weight_scale": (None, "weight_scale", np.float32),
    "named scale": ((64, 64), "scale", np.float32),
}


@pytest.mark.parametrize("form", FORMS)
def test_fp8_is_read_as_bfloat16(tmp_path, form):
    expected = make_fp8(tmp_path / "m", *FORMS[form])
    checkpoint = load_checkpoint(tmp_path / "m")
    assert set(checkpoint.tensors) == set(expected)
    assert checkpoint.dtype == "bfloat16"
    assert "quantization_config" not in checkpoint.config
    assert not checkpoint.quantized
    for name, tensor in expected.items():
        found = checkpoint.tensor(name)
        assert found.dtype == tensor.dtype
        assert not found.flags.writeable
        np.testing.assert_array_equal(found, tensor)
        assert checkpoint.tensors[name].shape == tensor.shape
        assert checkpoint.tensors[name].nbytes == tensor.nbytes
    assert checkpoint.bytes_on_disk == (tmp_path / "m" / FILE).stat().st_size


def test_fp8_folder_runs_and_quantizes(tmp_path):
    expected = make_fp8(tmp_path / "m", *FORMS["blocks"])
    plain = make_checkpoint(tmp_path / "p", hidden=96, heads=4, intermediate=200, tie=False,
                            dtype="bfloat16")
    write_weights(plain, expected, 1)
    tokens = np.arange(9)[None]
    models = [sq.load(tmp_path / "m"), sq.load(plain)]
    models += [sq.load(sq.quantize_folder(path, tmp_path / f"out-{path.name}").out)
               for path in (tmp_path / "m", plain)]
    logits = [model.logits(model.hidden_states(tokens)) for model in models]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[2], logits[3])


def test_names_and_forms_together(tmp_path):
    expected = make_fp8(tmp_path / "m", *FORMS["blocks"])
    tensors = read(tmp_path / "m" / FILE)
    write_safetensors(tmp_path / "m" / FILE,
                      {f"language_model.{name}": tensor for name, tensor in tensors.items()})
    checkpoint = load_checkpoint(tmp_path / "m")
    for name, tensor in expected.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), tensor)


def test_scales_of_activations_are_dropped(tmp_path):
    make_fp8(tmp_path / "m", *FORMS["per tensor"])
    tensors = read(tmp_path / "m" / FILE)
    for name in [name for name in tensors if LINEAR.search(name)]:
        tensors[name.replace("weight", "activation_scale")] = np.ones((), np.float32)
    write_safetensors(tmp_path / "m" / FILE, tensors)
    assert load_checkpoint(tmp_path / "m").ignored_tensors == ()


def test_nan_of_fp8_is_refused_by_name(tmp_path):
    make_fp8(tmp_path / "m", *FORMS["blocks"])
    tensors = read(tmp_path / "m" / FILE)
    tensors[UP].view(np.uint8)[3, 5] = 0xFF
    write_safetensors(tmp_path / "m" / FILE, tensors)
    checkpoint = load_checkpoint(tmp_path / "m")
    with pytest.raises(ValueError, match=UP):
        checkpoint.require_finite(1)


@pytest.mark.parametrize(("scale", "message"), [
    (None, f"{UP}: expected a scale beside the fp8 weight, such as .*up_proj.weight_scale_inv"),
    (np.ones((4, 5), np.float32), r"scale per block .*\[200, 96\], found shape \[4, 5\]"),
    (np.ones((3, 2), np.float32), r"found shape \[3, 2\] with weight_block_size \[64, 64\]"),
    (np.ones((0, 2), np.float32), r"found shape \[0, 2\]"),
    (np.ones(96, np.float32), r"found shape \[96\]"),
    (np.ones((4, 2), np.int32), "found .* and I32"),
])
def test_fp8_without_a_scale_that_fits_is_refused(tmp_path, scale, message):
    make_fp8(tmp_path / "m", *FORMS["blocks"])
    tensors = read(tmp_path / "m" / FILE)
    del tensors[UP + "_scale_inv"]
    if scale is not None:
        tensors[UP + "_scale_inv"] = scale
    write_safetensors(tmp_path / "m" / FILE, tensors)
    with pytest.raises(FormatError, match=message):
        load_checkpoint(tmp_path / "m")


def stored(path: Path, tensors: dict[str, np.ndarray], find, settings=None) -> StoredTensors:
    write_safetensors(path, tensors)
    files = TensorFiles(read_header(path))
    return StoredTensors(files, {name: name for name in tensors},
                         find(Given(files.infos, settings or {}, files.view)))


def test_stacked_experts_in_fp8(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((3, 40, 64)).astype(E4M3)
    scales = rng.uniform(1, 2, (3, 2, 2)).astype(np.float32)
    tensors = {"e.gate_up_proj": codes, "e.gate_up_proj_scale_inv": scales,
               "e.down_proj": codes, "e.down_proj_scale_inv": scales[:, 0, 0].copy()}
    found = stored(tmp_path / "f", tensors, find_fp8, {"weight_block_size": [32, 32]})
    assert set(found.infos) == {"e.gate_up_proj", "e.down_proj"}
    for i in range(3):
        wide = spread(scales[i], 32, 32, (40, 64))
        expected = (codes[i].astype(np.float32) * wide).astype(BF16)
        np.testing.assert_array_equal(found.view("e.gate_up_proj")[i], expected)
        expected = (codes[i].astype(np.float32) * scales[i, 0, 0]).astype(BF16)
        np.testing.assert_array_equal(found.view("e.down_proj")[i], expected)


def mxfp4(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"e.gate_up_proj_blocks": rng.integers(0, 256, (4, 24, 3, 16)).astype(np.uint8),
            "e.gate_up_proj_scales": rng.integers(120, 130, (4, 24, 3)).astype(np.uint8),
            "e.gate_up_proj_bias": np.ones((4, 24), BF16)}


def test_mxfp4_is_inputs_by_outputs(tmp_path):
    tensors = mxfp4(np.random.default_rng(1))
    found = stored(tmp_path / "f", tensors, find_mxfp4)
    assert set(found.infos) == {"e.gate_up_proj", "e.gate_up_proj_bias"}
    assert found.infos["e.gate_up_proj"].shape == (4, 96, 24)
    assert found.infos["e.gate_up_proj"].dtype == "BF16"
    view = found.view("e.gate_up_proj")
    byte = tensors["e.gate_up_proj_blocks"][2, 7, 1, 4]
    power = 2.0 ** (tensors["e.gate_up_proj_scales"][2, 7, 1] - 127.0)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values += [-v for v in values]
    assert view[2, 32 + 8, 7] == values[byte & 15] * power
    assert view[2, 32 + 9, 7] == values[byte >> 4] * power


@pytest.mark.parametrize(("name", "tensor"), [
    ("e.gate_up_proj_blocks", np.zeros((4, 24, 3, 8), np.uint8)),
    ("e.gate_up_proj_blocks", np.zeros((4, 24, 48), np.uint8)),
    ("e.gate_up_proj_blocks", np.zeros((4, 24, 3, 16), np.int8)),
    ("e.gate_up_proj_scales", np.zeros((4, 24, 4), np.uint8)),
])
def test_mxfp4_of_other_shapes_is_refused(tmp_path, name, tensor):
    tensors = mxfp4(np.random.default_rng(1)) | {name: tensor}
    with pytest.raises(FormatError, match="e.gate_up_proj_blocks: expected U8"):
        stored(tmp_path / "f", tensors, find_mxfp4)


def test_decoded_tensors_are_made_once_while_they_are_held(tmp_path, monkeypatch):
    rng, made = np.random.default_rng(2), []
    tensors = {}
    for i in range(4):
        tensors |= {f"{i}.weight": rng.standard_normal((8, 8)).astype(E4M3),
                    f"{i}.weight_scale_inv": np.ones((), np.float32)}
    monkeypatch.setattr("singlequant.checkpoint.floats._decode_fp8",
                        lambda *a: made.append(1) or a[-2].astype(BF16))
    found = stored(tmp_path / "f", tensors, find_fp8)
    row = found.view("0.weight")[3]  # a slice holds the whole
    for i in (1, 2, 3, 0, 0):
        found.view(f"{i}.weight")
    assert len(made) == 4
    del row
    gc.collect()
    for i in (1, 2, 3, 0):
        found.view(f"{i}.weight")
    assert len(made) == 8  # only the last two are kept
    assert found.view("0.weight") is found.view("0.weight")


def test_fingerprint_sees_every_part(tmp_path):
    prints = set()
    for changed in (None, UP, UP + "_scale_inv"):
        folder = tmp_path / str(changed)
        make_fp8(folder, *FORMS["blocks"])
        tensors = read(folder / FILE)
        if changed:
            tensors[changed] = np.roll(tensors[changed], 1)
        write_safetensors(folder / FILE, tensors)
        prints.add(load_checkpoint(folder).fingerprint)
    assert len(prints) == 3


def test_nothing_quantized_is_shown_as_it_is(tmp_path):
    tensors = {"a": np.ones(3, np.float32)}
    write_safetensors(tmp_path / "f", tensors)
    files = TensorFiles(read_header(tmp_path / "f"))
    found = StoredTensors(files, {"b": "a"}, Forms())
    assert "b" in found
    assert "a" not in found
    assert found.pages("b") == files.pages("a")
    with pytest.raises(KeyError):
        found.view("a")


def test_fp8_folder_equals_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    make_fp8(tmp_path / "m", (8, 8), "weight_scale_inv")  # 8 divides every size
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    checkpoint = load_checkpoint(tmp_path / "m")
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(checkpoint.tensor(name).astype(np.float32),
                                      tensor.float().numpy(), err_msg=name)


def test_gpt_oss_in_mxfp4_equals_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    families, rng = Path(__file__).parent / "data" / "families", np.random.default_rng(0)
    folder = tmp_path / "m"
    folder.mkdir()
    config = (families / "gpt-oss-tied" / "config.json").read_text()
    (folder / "config.json").write_text(config)
    tensors = read(families / "gpt-oss-tied" / FILE)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, n = len(tensors.pop(name)), 64 if "gate" in name else 32
        blocks = rng.integers(0, 256, (experts, n, 1, 16)).astype(np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_bias": np.ones((experts, n), BF16),
                    f"{name}_scales": rng.integers(121, 125, blocks.shape[:3]).astype(np.uint8)}
    write_safetensors(folder / FILE, tensors)
    edit_config(folder, intermediate_size=32, quantization_config={
        "quant_method": "mxfp4", "modules_to_not_convert": []})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=transformers.Mxfp4Config(dequantize=True))
    tokens = np.arange(40)[None] % 250 + 3
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(sq.load(folder).forward(tokens), expected, atol=1e-3, rtol=0)
