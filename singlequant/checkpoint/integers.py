# SPDX-License-Identifier: Apache-2.0
"""Weights stored as integers by GPTQ, AWQ and compressed-tensors, as 16-bit floats.

All compute scale * (code - zero) in float32 and round once to the type of the scales. They differ
in how codes and zeros are packed into words of 32 bits, and along which side of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from .._C import FormatError
from ..tensors import TensorInfo
from .decoded import Decoded, Forms, Given
from .floats import find_fp8, made_info

BITS = (4, 8)
CT_BITS = (4, 5, 6, 8)  # of packed codes without zeros: one stream of bits a row
AT_A_TIME = 128  # inputs, or rows, whose float32 values stay in a cache
SCALES = ("F16", "BF16", "F32")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of a word that each nibble holds, low one first
CT_FORMATS = ("pack-quantized", "naive-quantized", "int-quantized", "float-quantized", "dense",
              "mixed-precision")
CT_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


# ---- codes --------------------------------------------------------------------------------------


def unpack_rows(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Codes [rows * 32 / bits, n] of words [rows, n]: a word holds codes of successive rows."""
    rows, n = words.shape
    codes = np.empty((rows, 32 // bits, n), np.uint8)
    for i in range(32 // bits):
        codes[:, i] = words.view(np.uint32) >> np.uint32(bits * i) & np.uint32(2**bits - 1)
    return codes.reshape(-1, n)


def unpack_columns(
    words: NDArray[np.int32], bits: int, order: Sequence[int] | None = None
) -> NDArray[np.uint8]:
    """Codes [m, columns * 32 / bits] of words [m, columns]; order: the column of each code."""
    m, columns = words.shape
    codes = np.empty((m, columns, 32 // bits), np.uint8)
    for i, column in enumerate(order or range(32 // bits)):
        codes[:, :, column] = words.view(np.uint32) >> np.uint32(bits * i) & np.uint32(2**bits - 1)
    return codes.reshape(m, -1)


def _scaled(
    codes: NDArray[Any], zeros: NDArray[Any], scales: NDArray[Any], index: NDArray[np.intp],
    transposed: bool,
) -> NDArray[Any]:
    """codes [k, n] with zeros and scales [groups, n] and the group [k] of each input: [k, n], or
    [n, k] if transposed, a block of inputs at a time."""
    k, n = codes.shape
    out = np.empty((n, k) if transposed else (k, n), scales.dtype)
    inputs = out.T if transposed else out
    for first in range(0, k, AT_A_TIME):
        rows = slice(first, first + AT_A_TIME)
        group = index[rows]
        steps = codes[rows].astype(np.float32) - zeros[group].astype(np.float32)
        with np.errstate(over="ignore"):  # Inf is refused by name when the weight is used
            inputs[rows] = (steps * scales[group].astype(np.float32)).astype(scales.dtype)
    return out


def _even_groups(k: int, groups: int) -> NDArray[np.intp]:
    """The group of each of k inputs in groups of one length, the last of which may be short."""
    return np.arange(k) // max(-(-k // max(groups, 1)), 1)


def _error(info: TensorInfo, name: str, expected: str, found: str) -> FormatError:
    return FormatError(f"{info.path}: {name}: expected {expected}, found {found}")


# ---- GPTQ and AWQ: words [.., n] of a weight [n, k], its transpose -------------------------------


def find_gptq(given: Given) -> Forms:
    """GPTQ: qweight [k * bits / 32, n], qzeros [groups, n * bits / 32], scales [groups, n], g_idx.

    Zeros are stored one too small, unless checkpoint_format is "gptq_v2".
    """
    forms, infos, settings = Forms(), given.infos, given.settings
    version = settings.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        raise given.refuse("checkpoint_format", "gptq or gptq_v2",
                           "marlin" if settings.get("is_marlin_format") else version)
    for name in [name for name in infos if name.endswith(".qweight")]:
        stem = name.removesuffix("qweight")
        bits, (k, n), groups = _packed_sizes(infos, stem, rows=True)
        order = infos.get(f"{stem}g_idx")
        if order is not None and (order.dtype not in ("I32", "I64") or order.shape != (k,)):
            raise _error(order, f"{stem}g_idx", f"I32 [{k}]", f"{order.dtype} {list(order.shape)}")
        group = settings.get("group_size")
        length = group if type(group) is int and group > 0 else -(-k // groups)
        if order is None and -(-k // length) != groups:
            raise _error(infos[name], f"{stem}scales", f"{-(-k // length)} groups of {length} "
                         "inputs", str(groups))
        whole = f"{stem}weight"
        parts = tuple(f"{stem}{part}" for part in ("qweight", "qzeros", "scales"))
        turned = whole not in given.transposed
        decode = partial(_decode_gptq, whole, bits, length, version == "gptq", turned)
        made = made_info(infos[name], (n, k) if turned else (k, n), infos[f"{stem}scales"].dtype)
        parts += () if order is None else (f"{stem}g_idx",)
        forms.add(whole, Decoded(made, parts, decode))
        _note_zero_bias(forms, given, stem)
    return forms


def _decode_gptq(
    name: str, bits: int, length: int, smaller: bool, transposed: bool, words: NDArray[np.int32],
    zeros: NDArray[np.int32], scales: NDArray[Any], order: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """smaller: whether zeros are stored one too small, in every code of a word at once."""
    if smaller:
        one = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
        zeros = (zeros.view(np.uint32) + one).view(np.int32)
    codes = unpack_rows(words, bits)
    index = np.arange(len(codes)) // length if order is None else order.astype(np.intp)
    if index.size and not 0 <= index.min() <= index.max() < len(scales):
        raise FormatError(f"{name}: g_idx: expected groups from 0 to {len(scales) - 1}, found "
                          f"{index.min()} to {index.max()}")
    return _scaled(codes, unpack_columns(zeros, bits), scales, index, transposed)


def find_awq(given: Given) -> Forms:
    """AWQ's gemm layout: qweight [k, n / 8], qzeros [groups, n / 8], scales [groups, n]."""
    forms, infos, version = Forms(), given.infos, given.settings.get("version") or "gemm"
    if str(version).lower() != "gemm":
        raise given.refuse("version", "gemm", version)
    for name in [name for name in infos if name.endswith(".qweight")]:
        stem = name.removesuffix("qweight")
        bits, (k, n), groups = _packed_sizes(infos, stem, rows=False)
        if bits != 4:
            raise _error(infos[name], name, "4 bits", f"{bits}")
        parts = tuple(f"{stem}{part}" for part in ("qweight", "qzeros", "scales"))
        decode = partial(_decode_awq, groups)
        made = made_info(infos[name], (n, k), infos[f"{stem}scales"].dtype)
        forms.add(f"{stem}weight", Decoded(made, parts, decode))
        _note_zero_bias(forms, given, stem)
    return forms


def _decode_awq(
    groups: int, words: NDArray[np.int32], zeros: NDArray[np.int32], scales: NDArray[Any]
) -> NDArray[Any]:
    codes = unpack_columns(words, 4, AWQ_ORDER)
    return _scaled(codes, unpack_columns(zeros, 4, AWQ_ORDER), scales,
                   _even_groups(len(codes), groups), True)


def _packed_sizes(
    infos: Mapping[str, TensorInfo], stem: str, rows: bool
) -> tuple[int, tuple[int, int], int]:
    """(bits, (k, n), groups) of a linear; rows: whether a word holds codes of successive rows."""
    found = infos[f"{stem}qweight"]
    for part, dtypes in (("qweight", ("I32",)), ("qzeros", ("I32",)), ("scales", SCALES)):
        info = infos.get(f"{stem}{part}")
        if info is None or info.dtype not in dtypes or len(info.shape) != 2:
            raise _error(found, f"{stem}{part}", f"a matrix of {' or '.join(dtypes)}",
                         "none" if info is None else f"{info.dtype} {list(info.shape)}")
    words, zeros = found.shape, infos[f"{stem}qzeros"].shape
    groups, n = infos[f"{stem}scales"].shape
    bits = next((b for b in BITS if zeros[1] * 32 == n * b), 0)
    k = words[0] * 32 // bits if rows and bits else words[0]
    columns = n if rows else n * bits // 32
    if not bits or not groups or zeros[0] != groups or words[1] != columns:
        raise _error(found, f"{stem}qweight", "words of 4 or 8 bits that fit qzeros and scales",
                     f"qweight {list(words)}, qzeros {list(zeros)}, scales {[groups, n]}")
    if not rows and k % groups:
        raise _error(found, f"{stem}scales", f"a divisor of {k} groups", str(groups))
    return bits, (k, n), groups


def _note_zero_bias(forms: Forms, given: Given, stem: str) -> None:
    """Old writers gave every linear a bias, of zeros where the model has none."""
    name = f"{stem}bias"
    info = given.infos.get(name)
    if info is not None and len(info.shape) == 1 and not given.view(name).any():
        forms.unneeded.add(name)


# ---- compressed-tensors: a weight [n, k] as it is ------------------------------------------------


def find_compressed(given: Given) -> Forms:
    """compressed-tensors: packed words (`weight_packed`), int8 and fp8 weights with `weight_scale`.

    FormatError for its other formats, for sparse weights, and for rotations that the model applies
    when it runs.
    """
    infos, settings = given.infos, given.settings
    groups = _config_groups(settings)
    named = [settings.get("format"), *(group.get("format") for group in groups)]
    sparsity = settings.get("sparsity_config")
    named += [sparsity.get("format")] if isinstance(sparsity, dict) else []
    for name in named:
        if name is not None and name not in CT_FORMATS:
            raise given.refuse("format", f"one of {', '.join(CT_FORMATS)}", name)
    if settings.get("transform_config"):
        raise given.refuse("transform_config", "none", settings["transform_config"])
    block = next((g["weights"].get("block_structure") for g in groups
                  if isinstance(g.get("weights"), dict)), None)
    forms = find_fp8(replace(given, settings={"weight_block_size": block}))
    for name, info in infos.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            forms.add(f"{stem}.weight", _packed_entry(given, stem))
        elif leaf == "weight" and info.dtype == "I8":
            forms.add(name, _int8_entry(infos, stem))
        else:
            continue
        beside = (*CT_ACTIVATIONS, "weight_shape", "weight_g_idx")
        forms.dropped.update({f"{stem}.{part}" for part in beside} & set(infos))
    return forms


def _config_groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    values = groups.values() if isinstance(groups, dict) else ()
    return [group for group in values if isinstance(group, dict)]


def _packed_entry(given: Given, stem: str) -> Decoded:
    """The entry of a linear whose codes, plus half their range, lie in words along k."""
    name, infos = f"{stem}.weight_packed", given.infos
    found, shape = infos[name], infos.get(f"{stem}.weight_shape")
    if found.dtype != "I32" or len(found.shape) != 2 or shape is None or shape.shape != (2,):
        raise _error(found, name, "a matrix of I32 and weight_shape [2]",
                     f"{found.dtype} {list(found.shape)}"
                     + ("" if shape is None else f" and {list(shape.shape)}"))
    n, k = (int(size) for size in given.view(f"{stem}.weight_shape"))
    bits = next((b for b in CT_BITS if k > 0 and -(-k * b // 32) == found.shape[1]), 0)
    if not bits or n != found.shape[0]:
        raise _error(found, name, f"words of 4, 5, 6 or 8 bits for weight_shape {[n, k]}",
                     f"{list(found.shape)}")
    return _ct_entry(infos, stem, name, (n, k), bits)


def _int8_entry(infos: Mapping[str, TensorInfo], stem: str) -> Decoded:
    """The entry of a linear whose codes are int8."""
    info = infos[f"{stem}.weight"]
    if len(info.shape) != 2:
        raise _error(info, f"{stem}.weight", "a matrix of I8", f"{list(info.shape)}")
    return _ct_entry(infos, stem, f"{stem}.weight", info.shape, 0)


def _ct_entry(
    infos: Mapping[str, TensorInfo], stem: str, codes: str, shape: tuple[int, int], bits: int
) -> Decoded:
    """bits: of packed codes; 0: int8."""
    (n, k), found = shape, infos[codes]
    scale, zero, order = (infos.get(f"{stem}.weight_{part}")
                          for part in ("scale", "zero_point", "g_idx"))
    if scale is None or scale.dtype not in SCALES or not (
            scale.shape in ((), (1,)) or len(scale.shape) == 2 and scale.shape[0] in (1, n)
            and 0 < scale.shape[1] <= k):
        raise _error(found, f"{stem}.weight_scale", f"[{n}, groups] of {' or '.join(SCALES)}",
                     "none" if scale is None else f"{scale.dtype} {list(scale.shape)}")
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    if order is None and k % groups:
        raise _error(scale, f"{stem}.weight_scale", f"a divisor of {k} groups", str(groups))
    if order is not None and (order.dtype not in ("I32", "I64") or order.shape != (k,)):
        raise _error(order, f"{stem}.weight_g_idx", f"I32 [{k}]",
                     f"{order.dtype} {list(order.shape)}")
    packed = (-(-n * bits // 32), groups) if bits in BITS else None
    if zero is not None and not (zero.dtype == "I8" and zero.shape == scale.shape
                                 or zero.dtype == "I32" and zero.shape == packed):
        raise _error(zero, f"{stem}.weight_zero_point", f"I8 {list(scale.shape)} or packed",
                     f"{zero.dtype} {list(zero.shape)}")
    parts = [codes, f"{stem}.weight_scale"]
    parts += [f"{stem}.weight_{part}" for part, there in (("zero_point", zero), ("g_idx", order))
              if there is not None]
    decode = partial(_decode_ct, f"{stem}.weight", shape, bits, zero is not None)
    return Decoded(made_info(found, shape, scale.dtype), tuple(parts), decode)


def _decode_ct(
    name: str, shape: tuple[int, int], bits: int, asymmetric: bool, codes: NDArray[Any],
    scales: NDArray[Any], *rest: NDArray[Any],
) -> NDArray[Any]:
    """rest: zeros if asymmetric, then the group of each input if that is stored."""
    n, k = shape
    if bits:
        codes = _C.unpack(codes, k, bits)
    scales = np.broadcast_to(np.atleast_2d(scales), (n, np.atleast_2d(scales).shape[1]))
    zeros = np.zeros((n, 1), np.int16)
    if asymmetric:
        stored = rest[0]
        zeros = np.atleast_2d(stored).astype(np.int16)
        if stored.dtype == np.int32:
            zeros = unpack_rows(stored, bits)[:n].astype(np.int16) - np.int16(1 << bits - 1)
    zeros = np.broadcast_to(zeros, scales.shape)
    order = rest[-1] if len(rest) > asymmetric else None
    groups = scales.shape[1]
    index = _even_groups(k, groups)
    if order is not None and not (order == -1).all():  # -1: of no use
        index = order.astype(np.intp)
    if index.size and not 0 <= index.min() <= index.max() < groups:
        raise FormatError(f"{name}: g_idx: expected groups from 0 to {groups - 1}, found "
                          f"{index.min()} to {index.max()}")
    out = np.empty(shape, scales.dtype)
    for first in range(0, n, AT_A_TIME):
        rows = slice(first, first + AT_A_TIME)
        wide = (part[rows][:, index] if groups > 1 else part[rows] for part in (zeros, scales))
        zero, scale = (part.astype(np.float32) for part in wide)
        with np.errstate(over="ignore"):
            out[rows] = ((codes[rows].astype(np.float32) - zero) * scale).astype(scales.dtype)
    return out
