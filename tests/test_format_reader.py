# SPDX-License-Identifier: Apache-2.0
"""The plain reader of format_reader.py reads what the writer wrote: docs/format.md is enough."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from conftest import random_layer
from format_reader import hadamard, quantize, read_model, rotate, sites, table, weight
from test_golden import GOLDEN

from singlequant import _C, _reference as reference
from singlequant.checkpoint.folder import load_checkpoint
from singlequant.config import QuantConfig
from singlequant.export.writer import ModelWriter
from singlequant.weights import PackedLinear

ORDERS = {"qkv": (8, 8), "o": (4, 16), "gate_up": (8, 8), "down": (521, 2)}


BITS = {"self_attn.q_proj": 5, "self_attn.o_proj": 6, "mlp.down_proj": 8}


@pytest.fixture
def written(make_checkpoint, tmp_path, request):
    """(folder, layers, codes by linear, checkpoint) of a model with a chain of order 521."""
    source = load_checkpoint(make_checkpoint(tmp_path / "m", intermediate=1042, dtype="bfloat16"))
    config = QuantConfig("w4a4", bits=4, method="hadamard", ignore=("*.k_proj",))
    layers, codes = [], {}
    with ModelWriter(tmp_path / "out", source, config) as writer:
        for i in range(source.spec.layers):
            layer, of_layer = random_layer(source, config, i, orders=ORDERS, bits=BITS)
            writer.write_layer(layer)
            layers.append(layer)
            codes |= of_layer
        writer.finish()
    return tmp_path / "out", layers, codes, source


def test_plain_reader_reads_the_weights_written(written):
    folder, layers, codes, source = written
    quantization, tensors = read_model(folder)
    assert (quantization["scheme"], quantization["method"]) == ("w4a4", "hadamard")
    for layer in layers:
        for name, linear in layer.packed.items():
            expected = codes[name] * linear.scales.astype(np.float64)
            np.testing.assert_array_equal(weight(tensors, name), expected)
        for name, array in layer.dense.items():
            np.testing.assert_array_equal(tensors[name], array.astype(np.float32))
    expected = reference.rows_of_codes(*_C.quantize_rows(source.embedding, 8), 8, 64)
    for key in ("embed", "head"):  # tied
        np.testing.assert_array_equal(table(quantization, tensors, key), expected)


def test_plain_reader_rotates_as_the_factors_do(written):
    folder, layers, _, source = written
    _, tensors = read_model(folder)
    rng = np.random.default_rng(1)
    for layer in layers:
        for site, rotation in layer.rotations.items():
            x = rng.standard_normal((3, source.spec.layer(0).sites[site].k))
            blocks = x.reshape(3, rotation.left.order, rotation.right.order)
            expected = rotation.left.matrix() @ blocks @ rotation.right.matrix().T
            found = rotate(tensors, layer.index, site, x).reshape(expected.shape)
            # dense factors were rounded to float32: 64 terms of 6e-8
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("folder", ["v1", "v1-balanced", "v2-qwen2"])
def test_plain_reader_multiplies_as_the_core_does(folder):
    """Rotated, quantized at one width or two, multiplied: the packed linears of golden files."""
    path = GOLDEN / folder / "packed"
    quantization, tensors = read_model(path)
    checkpoint = load_checkpoint(path)
    layer, rng, seen = checkpoint.layer(0), np.random.default_rng(0), 0
    linears = {linear.name: linear for linear in layer.linears.values()}
    for site, names in sites(quantization, 0).items():
        x = rng.standard_normal((5, checkpoint.spec.layer(0).sites[site].k)).astype(np.float32)
        given = quantize(tensors, 0, site, quantization["activations"], rotate(tensors, 0, site, x))
        rotated = _C.rotate(x, layer.rotations[site])
        for name in names:
            linear, packed = linears[name], linears[name].weight
            if isinstance(packed, PackedLinear):
                w = _C.PackedWeight(packed.words, packed.scales, x.shape[1], packed.group,
                                    layer.int8_inputs[site])
                bits = quantization["activations"]["bits"]
                found = _C.linear(rotated, w, bits, layer.clips[site])
                expected = given @ weight(tensors, linear.name).T
                np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
                seen += 1
    assert seen == {"v1": 6, "v1-balanced": 6, "v2-qwen2": 7}[folder]


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12, 20, 28, 36, 44, 52, 86, 92, 172, 521, 600, 1042])
def test_plain_hadamard_is_the_cores(n):
    np.testing.assert_allclose(hadamard(n), _C.hadamard_matrix(n), atol=1e-12)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_plain_reader_reads_tables_of_all_bits(bits):
    given = np.random.default_rng(bits).standard_normal((9, 70)).astype(np.float32)
    codes, scales = _C.quantize_rows(given, bits)
    tensors = {"head.weight_codes": codes.view(np.int8) if bits == 8 else codes,
               "head.weight_scale": scales.view(ml_dtypes.bfloat16).astype(np.float64)}
    quantization = {"head_bits": bits, "model": {"head": "head", "tied": False, "hidden": 70}}
    np.testing.assert_array_equal(table(quantization, tensors, "head"),
                                  reference.rows_of_codes(codes, scales, bits, 70))
