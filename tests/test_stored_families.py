# SPDX-License-Identifier: Apache-2.0
"""Every family's folder as people have it: without its prefix, inside a wrapper, without a name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import edit_config

import singlequant as sq
from singlequant import load_checkpoint
from singlequant.checkpoint.names import base_prefix
from singlequant.models.families import find_family
from singlequant.tensors import TensorFiles, find_tensors, write_safetensors

FAMILIES = Path(__file__).parent / "data" / "families"
FOLDERS = sorted(path.name for path in FAMILIES.iterdir() if (path / "config.json").is_file())
FILE = "model.safetensors"


def stored(folder: Path) -> dict[str, np.ndarray]:
    files = TensorFiles(find_tensors(folder))
    return {name: files.view(name).copy() for name in files.infos}


def copy(name: str, folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    shutil.copytree(FAMILIES / name, folder, ignore=shutil.ignore_patterns("*.npy", "*.safetens*"))
    write_safetensors(folder / FILE, tensors)
    return folder


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", FOLDERS)
def test_names_with_another_prefix(tmp_path, name, wrapped):
    plain, tensors = load_checkpoint(FAMILIES / name), stored(FAMILIES / name)
    root = base_prefix(plain.spec).partition(".")[0] + "."
    other = copy(name, tmp_path / "m", {
        f"language_model.{tensor}" if wrapped else tensor.removeprefix(root): array
        for tensor, array in tensors.items()})
    found = load_checkpoint(other)
    assert found.spec == plain.spec
    assert set(found.tensors) == set(plain.tensors)
    for tensor in plain.tensors:
        np.testing.assert_array_equal(found.tensor(tensor), plain.tensor(tensor))


@pytest.mark.parametrize("name", FOLDERS)
def test_model_type_alone_names_the_family(name):
    config = json.loads((FAMILIES / name / "config.json").read_text())
    expected = find_family(config)
    assert find_family({**config, "architectures": None}) is expected


BUFFERS = {
    "gpt2-tied": {"transformer.h.0.attn.bias": np.ones((1, 1, 9, 9), np.uint8),
                  "transformer.h.1.attn.masked_bias": np.array(-1e4, np.float32)},
    "gptj-partial": {"transformer.h.0.attn.bias": np.ones((1, 1, 9, 9), np.bool_)},
    "gpt-neox-parallel": {
        "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 9, 9), np.bool_),
        "gpt_neox.layers.0.attention.masked_bias": np.array(-1e9, np.float32),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": np.ones(2, np.float32)},
}


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("stripped", [False, True])
def test_buffers_of_published_folders(tmp_path, name, stripped):
    root = base_prefix(load_checkpoint(FAMILIES / name).spec)
    tensors = {tensor.removeprefix(root) if stripped else tensor: array
               for tensor, array in {**stored(FAMILIES / name), **BUFFERS[name]}.items()}
    found = load_checkpoint(copy(name, tmp_path / "m", tensors))
    assert set(found.ignored_tensors) == set(BUFFERS[name])


def test_further_layer_of_deepseek_is_reported(tmp_path):
    name = "deepseek-v3-latent"
    layers = load_checkpoint(FAMILIES / name).spec.layers
    extra = {f"model.layers.{layers}.{part}.weight": np.ones(3, np.float32)
             for part in ("eh_proj", "embed_tokens", "self_attn.q_a_proj")}
    folder = copy(name, tmp_path / "m", {**stored(FAMILIES / name), **extra})
    edit_config(folder, num_nextn_predict_layers=1)
    with pytest.warns(UserWarning, match="3 tensors are not of the model and left out"):
        assert set(load_checkpoint(folder).ignored_tensors) == set(extra)
    edit_config(folder, num_nextn_predict_layers=0)
    with pytest.raises(sq.FormatError, match="unexpected tensor"):
        load_checkpoint(folder)


def test_gptq_of_a_family_that_stores_inputs_by_outputs(tmp_path):
    """GPT-2's Conv1D: the words lie as for a linear, the weight is its transpose."""
    from test_stored_integers import GPTQ, gptq

    tensors, expected = stored(FAMILIES / "gpt2-tied"), {}
    for name in [name for name in tensors if name.endswith("attn.c_proj.weight")]:
        parts, values = gptq(np.ascontiguousarray(tensors.pop(name).T), groups=2)
        expected[name] = values.T
        tensors |= {name.removesuffix("weight") + part: array for part, array in parts.items()}
    folder = copy("gpt2-tied", tmp_path / "m", tensors)
    edit_config(folder, quantization_config=GPTQ)
    found = load_checkpoint(folder, dequantize=True)
    for name, values in expected.items():
        np.testing.assert_array_equal(found.tensor(name), values)
    assert np.isfinite(sq.load(folder, dequantize=True).forward(np.arange(9)[None])).all()
