"""Checkpoint + rotations -> quantized layers: rotate the weights, round them, pack the codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..config import QuantConfig
from ..models.spec import LayerSpec
from ..rotations import BlockRotation, LayerRotations, SiteRotation
from ..rows import ROWS_PER_BLOCK, require_finite
from ..statistics import SiteStatistics
from ..weights import (
    WEIGHT_BITS,
    LayerWeights,
    Linear,
    Norm,
    PackedLinear,
    QuantizedLayer,
    norm_tensors,
    packed_words,
    packing_problem,
)

if TYPE_CHECKING:
    from .prepare import View

Rotation = SiteRotation | BlockRotation


# ---- GPTQ's view of a site ----------------------------------------------------------------------


class GptqFactor(NamedTuple):
    """What `_C` makes of a site's rotated inputs; all linears of the site share it."""

    factor: NDArray[np.float32]  # [k, k]
    permutation: NDArray[np.int32]  # [k]
    feedback: object | None = None  # the factor as `_C.gptq_feedback` has it


def transform_inputs(x: NDArray[np.float32], rotation: Rotation | None) -> NDArray[np.float32]:
    """Inputs x [m, k] of a site as its linears receive them."""
    if rotation is None:
        return x
    if rotation.balance is not None:
        x = x / rotation.balance
    turn = rotation.of_inputs
    return x if turn is None else _C.rotate(x, turn)


def transform_rows(
    weights: NDArray[np.float32], rotation: Rotation | None, rows: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Weight rows [n, k] of a site as they meet its transformed inputs: x' W'^T = x W^T.

    rows [n] multiplies the rows first.
    """
    weights = scaled(weights, None if rotation is None else rotation.balance, rows)
    turn = None if rotation is None else rotation.of_weights
    return weights if turn is None else _C.rotate(weights, turn)


def round_inputs(
    x: NDArray[np.float32], rotation: Rotation | None, config: QuantConfig
) -> NDArray[np.float32]:
    """Transformed inputs x [m, k] after the quantizer that they meet when the model runs."""
    bits = config.activation_bits
    if bits == 16:
        return x
    first = 0 if rotation is None else int8_inputs_of(rotation, config)
    rest = _C.dequantize(*_C.quantize(x[:, first:], bits, 0, True, config.activation_clip))
    if not first:
        return rest
    return np.concatenate([_C.dequantize(*_C.quantize(x[:, :first], 8)), rest], axis=1)


def gptq_factor(
    statistics: SiteStatistics, rotation: Rotation | None, config: QuantConfig
) -> GptqFactor:
    """`factor_of_inputs` of the inputs that a site's statistics hold."""
    return factor_of_inputs(statistics.inputs, rotation, config)


def factor_of_inputs(
    inputs: NDArray[np.float32] | None, rotation: Rotation | None, config: QuantConfig
) -> GptqFactor:
    """The factor of the Gram matrix of a site's rotated calibration inputs.

    Sums of products are of inputs with config.calibration_bits, and so is the error feedback from
    one block of columns to the others. The rest is float32.

    With config.gptq_inputs "quantized", of the inputs after their own rounding and clip. Where
    fewer tokens than inputs were seen, the matrix has not the rank to say how all inputs go
    together: its damping is more by that ratio. The more of it, the nearer GPTQ is to rounding each
    weight by itself. ValueError when there are no inputs or the matrix is not positive definite.
    """
    if inputs is None:
        raise ValueError(
            "statistics: weights 'gptq' needs the calibration inputs, found none kept (saved "
            "statistics never hold them): calibrate with keep_inputs=True"
        )
    bits = config.calibration_bits
    if config.gptq_inputs == "quantized":
        gram = None
        for first in range(0, len(inputs), ROWS_PER_BLOCK):
            x = transform_inputs(inputs[first : first + ROWS_PER_BLOCK], rotation)
            gram = _C.gram(round_inputs(x, rotation, config), gram, bits)
    elif rotation is None:
        gram = _C.gram(inputs, None, bits)
    else:
        columns = None if rotation.balance is None else 1 / rotation.balance
        gram = _C.gram(inputs, None, bits, rotation.of_inputs, columns)
    missing = max(1.0, gram.shape[0] / len(inputs))
    factor = _C.gptq_factor(gram, config.gptq_damping * missing, config.gptq_order, True)
    return GptqFactor(*factor, _C.gptq_feedback(factor[0]) if bits == 8 else None)


# ---- linears and layers -------------------------------------------------------------------------


def quantize_linear(
    weight: NDArray,
    rotation: Rotation | None,
    config: QuantConfig,
    name: str = "weight",
    gptq: GptqFactor | None = None,
    rows_scale: NDArray[np.float32] | None = None,
    bits: int = 4,
) -> PackedLinear:
    """Rotate, quantize and pack weight [n, k] (float32, float16 or bfloat16), blocks in cache.

    gptq: the site's `gptq_factor`, which config.weights "gptq" needs. rows_scale [n] multiplies the
    rows first. bits of a weight: 4, 5, 6 or 8. Scales of groups are rounded to bfloat16, as they
    are stored, before the weights are rounded with them. ValueError names the linear when it holds
    NaN or Inf, when k does not suit the group size, or when the factor is missing.
    """
    n, k = weight.shape
    group = config.group_size
    problem = packing_problem(name, k, config)
    if problem:
        raise ValueError(problem)
    if (config.weights == "gptq") != (gptq is not None):
        raise ValueError(f"gptq: expected a factor with weights 'gptq' and none otherwise, found "
                         f"{'none' if gptq is None else 'one'} with {config.weights!r}")
    columns = None if rotation is None else rotation.balance
    turn = None if rotation is None else rotation.of_weights
    try:
        if gptq is None:
            words, scales = _C.quantize_weight(
                weight, group, config.weights == "mse", turn, columns, rows_scale, bits, group > 0
            )
            return PackedLinear(words, scales, (n, k), group, bits)
        words = np.empty((n, packed_words(k, bits)), np.int32)
        scales = np.empty((n, k // group if group else 1), np.float32)
        for first in range(0, n, ROWS_PER_BLOCK):
            rows = slice(first, min(first + ROWS_PER_BLOCK, n))
            scale = None if rows_scale is None else rows_scale[rows]
            block = _C.transform_weight(weight[rows], turn, columns, scale)
            codes, scales[rows] = _C.gptq_round(block, gptq.factor, gptq.permutation, bits, group,
                                                True, group > 0, gptq.feedback)
            words[rows] = _C.pack(codes, bits)
    except ValueError as error:
        require_finite(weight, name)  # names its rows as everywhere else
        raise ValueError(f"{name}: {error}") from None
    return PackedLinear(words, scales, (n, k), group, bits)


def scaled(
    block: NDArray[np.float32],
    columns: NDArray[np.float32] | None,
    rows: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """block [n, k] with its columns and its rows multiplied, each where there is a factor."""
    if columns is not None:
        block = block * columns
    return block if rows is None else block * rows[:, None]


def producer_scales(spec: LayerSpec, rotations: LayerRotations) -> dict[str, NDArray[np.float32]]:
    """What each site's balance makes of its producer: factors [n], by a norm's place or a role.

    ValueError when queries that share a value head ask for different factors, and where nothing
    can take a balance.
    """
    scales: dict[str, NDArray[np.float32]] = {}
    for name, rotation in rotations.sites.items():
        if rotation.balance is None:
            continue
        site, scale = spec.sites[name], 1 / rotation.balance
        if site.producer is None:
            raise ValueError(f"layer {rotations.layer}: {name}: balance: expected none, as nothing "
                             f"produces its input channel by channel, found one")
        if site.reads == "attention":  # a value head serves all its queries
            heads = scale.reshape(spec.attention.kv_heads, -1, spec.attention.value_channels)
            if (heads != heads[:, :1]).any():
                raise ValueError(f"layer {rotations.layer}: {name}: balance: expected one factor "
                                 f"per channel of a value head, found several")
            scale = np.ascontiguousarray(heads[:, 0]).reshape(-1)
        scales[site.producer] = scale
    return scales


def producer_blocks(spec: LayerSpec, rotations: LayerRotations) -> dict[str, _C.Rotation]:
    """By role, the blocks that a folded alignment makes its producer's outputs take.

    ValueError where queries that share a value head ask for different ones, and where the site's
    producer is not v.
    """
    blocks = {}
    for name, rotation in rotations.sites.items():
        if rotation.align is None or not rotation.align.folded:
            continue
        site, a = spec.sites[name], spec.attention
        where = f"layer {rotations.layer}: {name}: align"
        if site.producer != "v" or site.reads != "attention":
            raise ValueError(f"{where}: expected blocks that v's heads can take, found producer "
                             f"{site.producer}")
        matrices = rotation.align.matrices
        d = a.value_channels
        if matrices.shape != (a.heads, d, d):
            raise ValueError(f"{where}: expected {(a.heads, d, d)}, found {matrices.shape}")
        heads = matrices.reshape(a.kv_heads, -1, d, d)
        if (heads != heads[:, :1]).any():
            raise ValueError(f"{where}: expected one block per value head, found several")
        own = np.ascontiguousarray(heads[:, 0], np.float32)
        blocks[site.producer] = _C.Rotation(a.kv_heads * d, align=own)
    return blocks


def _with_blocks(linear: Linear, blocks: _C.Rotation) -> Linear:
    """The linear whose outputs take the blocks: W -> (W^T blockdiag)^T, in float32."""
    require_finite(linear.weight, f"{linear.name}.weight")
    columns = np.ascontiguousarray(_C.to_float32(linear.weight).T)
    weight = np.ascontiguousarray(_C.rotate(columns, blocks).T)
    bias = None if linear.bias is None else _C.rotate(_C.to_float32(linear.bias), blocks)
    return Linear(linear.name, weight, bias)


def quantize_layer(
    checkpoint, rotations: LayerRotations, config: QuantConfig,
    bits: Mapping[str, int] | None = None,
) -> QuantizedLayer:
    """One layer: every linear that config.ignore does not name, packed; the rest as it is.

    bits: of the weights by linear; one that is absent has 4.

    A site's balance is folded into the norm or the rows of the linear that produce its input, and
    into the columns of its linears, the ignored ones included; a site whose linears are all ignored
    is left as it is. Weights "gptq" need the statistics that the rotations were solved from, with
    inputs. ValueError names the tensor that holds NaN or Inf, or the site whose statistics do not
    do.
    """
    index = rotations.layer
    spec, weights = checkpoint.spec.layer(index), checkpoint.layer(index)
    spec.require_sites("rotations", rotations.sites)
    packs = {
        site.name: [not config.ignores(weights.linears[role].name) for role in site.roles]
        for site in spec.sites.values()
    }
    used_sites = {site: r for site, r in rotations.sites.items() if any(packs[site])}
    rotations = replace(rotations, sites=used_sites)
    scales, blocks = producer_scales(spec, rotations), producer_blocks(spec, rotations)
    linears = {role: _with_blocks(linear, blocks[role]) if role in blocks else linear
               for role, linear in weights.linears.items()}
    dense: dict[str, NDArray] = {}
    for place, norm in weights.norms.items():
        scaled_norm = _scaled_norm(norm, spec.norms[place].offset, scales.get(place))
        dense |= norm_tensors(scaled_norm, spec.norms[place].weight)
    dense |= {tensor.name: tensor.array for tensor in weights.dense.values()}
    packed, used, int8 = {}, {}, {}
    for site in spec.sites.values():
        rotation, gptq = rotations.sites.get(site.name), None
        if config.weights == "gptq" and any(packs[site.name]):
            gptq = _site_factor(rotations, site.name, config)
        for role, pack in zip(site.roles, packs[site.name], strict=True):
            linear, rows = linears[role], scales.get(role)
            if linear.bias is not None:
                bias = linear.bias if rows is None else _C.to_float32(linear.bias) * rows
                dense[f"{linear.name}.bias"] = bias
            if not pack:
                dense[f"{linear.name}.weight"] = _ignored_weight(linear, rotation, rows)
                continue
            packed[linear.name] = quantize_linear(
                linear.weight, rotation, config, linear.name, gptq, rows,
                (bits or {}).get(linear.name, 4)
            )
            if rotation is not None:
                used[site.name], int8[site.name] = rotation, int8_inputs_of(rotation, config)
    for name, array in dense.items():
        require_finite(array, name)
    return QuantizedLayer(index, packed, dense, used, int8_inputs=int8,
                          kv_largest=_kv_largest(rotations, scales.get("v"), blocks.get("v")),
                          kv_least=_kv_least(rotations, scales.get("v")))


def folded_layer(checkpoint, rotations: LayerRotations) -> LayerWeights:
    """One layer with the balances of its sites folded in, in float32 where they change it.

    rotations: balances alone; what they would rotate at inference is left out.
    """
    index = rotations.layer
    spec, weights = checkpoint.spec.layer(index), checkpoint.layer(index)
    scales = producer_scales(spec, rotations)
    norms = {place: _scaled_norm(norm, spec.norms[place].offset, scales.get(place))
             for place, norm in weights.norms.items()}
    linears = {}
    for site in spec.sites.values():
        for role in site.roles:
            linear, rows = weights.linears[role], scales.get(role)
            bias = linear.bias
            if bias is not None and rows is not None:
                bias = _C.to_float32(bias) * rows
            weight = _ignored_weight(linear, rotations.sites.get(site.name), rows)
            linears[role] = Linear(linear.name, weight, bias)
    return LayerWeights(index, norms, linears, dense=weights.dense)


def _kv_largest(
    rotations: LayerRotations, rows: NDArray[np.float32] | None, blocks: _C.Rotation | None
) -> float:
    """At most so large are the keys and values of calibration, after what v's rows take."""
    largest = rotations.statistics.kv_largest if rotations.statistics else 0.0
    if blocks is not None:
        return largest * max(1.0, float(np.abs(blocks.parts[2]).sum(axis=1).max()))
    return largest if rows is None else largest * max(1.0, float(np.max(rows)))


def _kv_least(rotations: LayerRotations, rows: NDArray[np.float32] | None) -> float:
    """`LayerStatistics.kv_least`, after what v's rows take at most; 0 = unknown."""
    least = rotations.statistics.kv_least if rotations.statistics else 0.0
    return least if rows is None else least * min(1.0, float(np.min(rows)))


def _scaled_norm(norm: Norm, offset: float, scale: NDArray[np.float32] | None) -> Norm:
    """The norm whose output's channels are multiplied by scale [hidden]."""
    if scale is None:
        return norm
    weight = _C.to_float32(norm.weight)
    if offset:
        weight = (weight + np.float32(offset)) * scale - np.float32(offset)
    else:
        weight = weight * scale
    bias = None if norm.bias is None else _C.to_float32(norm.bias) * scale
    return Norm(norm.name, weight, bias)


def _ignored_weight(linear: Linear, rotation: Rotation | None, rows: NDArray | None) -> NDArray:
    """The weight as it is, or in float32 where a balance multiplies its columns or rows."""
    balance = None if rotation is None else rotation.balance
    if balance is None and rows is None:
        return linear.weight
    return scaled(_C.to_float32(linear.weight), balance, rows)


def int8_inputs_of(rotation: Rotation, config: QuantConfig) -> int:
    """Inputs that keep 8 bits under config: whole weight groups of them, none but in W4A4.

    Rotations that were solved for config have whole groups.
    """
    if config.activation_bits != 4:
        return 0
    return rotation.int8_inputs - rotation.int8_inputs % (config.group_size or 1)


def _site_factor(rotations: LayerRotations, site: str, config: QuantConfig) -> GptqFactor:
    """`gptq_factor` of one site; errors name the layer and the site."""
    index, statistics = rotations.layer, rotations.statistics
    if statistics is None or statistics.index != index:
        found = "none" if statistics is None else f"layer {statistics.index}'s"
        raise ValueError(f"rotations: weights 'gptq' expects them with the statistics of layer "
                         f"{index}, found {found}")
    try:
        return factor_of_inputs(statistics.inputs_of(site), rotations.sites.get(site), config)
    except ValueError as error:
        raise ValueError(f"layer {index}, inputs of {site}: {error}") from None


def quantize(
    checkpoint: View, rotations: Iterable[LayerRotations], config: QuantConfig | None = None,
    bits: Mapping[str, int] | None = None,
) -> Iterator[QuantizedLayer]:
    """Quantize layer by layer; takes what `solve_rotations` yields and feeds `save`.

    bits: by linear, as `assign_bits` gives them; needed where config.bits is above 4. Weights
    "gptq" look at the calibration inputs that `calibrate` keeps by default. For arrays use
    `singlequant.arrays.quantize`.
    """
    if isinstance(checkpoint, np.ndarray):
        raise TypeError(
            "checkpoint: expected a Checkpoint, got an array; arrays are quantized by "
            "singlequant.arrays.quantize"
        )
    config = config or QuantConfig()
    if bits is None and config.bits > WEIGHT_BITS[0]:
        raise ValueError(f"bits: config.bits is {config.bits:g}: expected what "
                         f"assign_bits(checkpoint, config, windows) gives, found none")
    return (quantize_layer(checkpoint, layer, config, bits) for layer in rotations)
