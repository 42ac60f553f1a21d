# SPDX-License-Identifier: Apache-2.0
"""A folder's tensors as the family's spec names and reads them, in whatever form they are stored.

READ lists the quantized forms that are always read, ASKED those that are read with `dequantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._C import FormatError
from ..export.packed import QUANT_METHOD
from ..files import is_present, read_json
from ..models.spec import ModelSpec
from ..tensors import TensorFiles, find_tensors
from .decoded import Forms, Given, StoredTensors
from .floats import find_fp8, find_mxfp4
from .integers import find_awq, find_compressed, find_gptq
from .names import find_renaming, find_spelling

READ: dict[str, Callable[[Given], Forms]] = {
    "fp8": find_fp8, "fbgemm_fp8": find_fp8, "mxfp4": find_mxfp4}
ASKED: dict[str, Callable[[Given], Forms]] = {
    "gptq": find_gptq, "awq": find_awq, "compressed-tensors": find_compressed}
# Files that old writers put beside a config.json without quantization_config, by method.
SETTINGS_FILES = {"gptq": "quantize_config.json", "awq": "quant_config.json"}


@dataclass(frozen=True)
class Quantization:
    """How another program quantized a folder."""

    method: str
    settings: Mapping[str, Any]  # its quantization_config
    source: str  # the file that says so


def find_quantization(
    config: Mapping[str, Any], folder: Path, dequantize: bool = False
) -> Quantization | None:
    """What a folder says of a quantization by others; None if there is none, or it is ours.

    FormatError for one that is not read, or not without `dequantize`.
    """
    settings, source = config.get("quantization_config"), folder / "config.json"
    if settings is None:
        settings = config.get("compression_config")  # of old compressed-tensors
    if settings is None:
        for method, name in SETTINGS_FILES.items():
            if is_present(folder / name):
                source = folder / name
                settings = {"quant_method": method, **read_json(source)}
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if settings is None or method == QUANT_METHOD:
        return None
    if isinstance(method, str) and (method in READ or (dequantize and method in ASKED)):
        return Quantization(method, settings, str(source))
    where = f"{source}: quantization_config.quant_method: "
    if isinstance(method, str) and method in ASKED:
        raise FormatError(f"{where}expected an unquantized model, found {method!r}; --dequantize, "
                          f"load_checkpoint(..., dequantize=True), reads it as 16-bit weights")
    raise FormatError(f"{where}expected an unquantized model or one of "
                      f"{', '.join((QUANT_METHOD, *READ, *ASKED))}, found {method!r:.80}")


@dataclass(frozen=True)
class Opened:
    """The tensors of a folder. outside: shown names of those that are not of the base model."""

    files: TensorFiles
    outside: frozenset[str] = frozenset()
    unneeded: frozenset[str] = frozenset()  # names whose values change nothing


def open_tensors(
    folder: Path, spec: ModelSpec, respelled: Mapping[str, str] | None = None,
    quantization: Quantization | None = None,
) -> Opened:
    """The tensors of a folder under the spec's names. FormatError names what is wrong.

    respelled: parts of names that some folders spell in another way, and how the spec does.
    """
    files = TensorFiles(find_tensors(folder))
    renaming, respell = find_renaming(spec, files.infos), find_spelling(respelled, files.infos)
    if renaming is None and not respell and quantization is None:
        return Opened(files)
    names: dict[str, str] = {}
    for stored in files.infos:
        name = stored if renaming is None else renaming(stored)
        for other, own in respell.items():
            name = name.replace(other, own)
        if name in names:
            raise FormatError(f"{files.infos[stored].path}: {stored}: duplicate: {names[name]} "
                              f"is the same tensor, {name}")
        names[name] = stored
    forms = Forms()
    if quantization is not None:
        infos = {name: files.infos[stored] for name, stored in names.items()}
        find = (READ | ASKED)[quantization.method]
        forms = find(Given(infos, quantization.settings, lambda name: files.view(names[name]),
                           quantization.source, _transposed(spec, len(infos))))
    outside = frozenset(
        name for name, stored in names.items() if renaming is not None
        and not renaming.covers(stored) and not name.startswith(f"{spec.head}."))
    return Opened(StoredTensors(files, names, forms), outside, frozenset(forms.unneeded))


def _transposed(spec: ModelSpec, tensors: int) -> frozenset[str]:
    """Names of the weights that the family stores as [inputs, outputs]."""
    if not any(linear.transposed for kind in spec.kinds for linear in kind.linears.values()):
        return frozenset()
    layers = min(spec.layers, tensors)  # config.json may claim billions
    return frozenset(linear.weight_name(i) for i in range(layers)
                     for linear in spec.layer(i).linears.values() if linear.transposed)
