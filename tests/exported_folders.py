# SPDX-License-Identifier: Apache-2.0
"""What the tests of exports share: folders that may be exported as codes, and what came out."""

import json

from conftest import SENTENCES
from safetensors.numpy import load_file

import singlequant as sq


def quantized(folder, out, **options):
    text = out.with_name("text.txt")
    text.write_text(SENTENCES[:600])
    config = sq.QuantConfig(**{"scheme": "w4a16", "method": "none", "weights": "rtn", "bits": 4,
                               "calibration_tokens": 128, "head_bits": 16, "embedding_bits": 16,
                               **options})
    return sq.quantize_folder(folder, out, config, text).out


def stored(folder):
    return {name: array for path in sorted(folder.glob("*.safetensors"))
            for name, array in load_file(path).items()}


def settings(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]
