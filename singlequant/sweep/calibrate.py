"""Checkpoint + tokens -> statistics of every site, layer by layer.

The layers run one after the other on the unquantized weights; a layer's inputs live only while it
is processed. Statistics are the same bytes at any thread count.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from .. import _C
from .._C import FormatError
from ..config import CALIBRATION_BITS
from ..files import read_json
from ..methods.registry import ALL_INPUTS
from ..rows import float32_blocks, token_ids
from ..runtime.layers import flat_positions, new_cache
from ..runtime.outer import Outer
from ..statistics import LayerStatistics, SitesInTurn, SiteStatistics
from .experts import borrow
from .states import kept, map_states
from .stream import read_ahead, stream_layer

if TYPE_CHECKING:
    from .prepare import View

SAMPLE_TOKENS = 512  # tokens kept per site for the angles
SAMPLE_ROWS = 512  # rows kept of a site's weights, likewise
STATISTICS_FILE, STATISTICS_VERSION = "statistics.json", 5
ARRAYS = ("min", "max", "sum2", "sample", "weights", "weight_max", "weight_sum2", "gram",
          "weight_gram")
FACTS = ("k1", "k2", "count", "shared", "reads", "foldable", "borrowed")  # beside the arrays


def site_statistics(
    inputs: NDArray[np.float32],
    weights: Sequence[NDArray],
    sample_tokens: int = SAMPLE_TOKENS,
    keep_inputs: bool = False,
    shared: tuple[int, int, int] | None = None,
    reads: str = "mlp",
    foldable: bool = True,
) -> SiteStatistics:
    """Statistics of one site from its inputs [m, k] and its linears' weights, each [n, k].

    keep_inputs: the statistics hold the inputs themselves (not a copy), as GPTQ wants them. shared:
    k = a * b * c, where inputs that differ in b alone come from one producer (the queries that
    share a value head). reads: what the site reads, the "residual" stream, "attention" or the
    "mlp". foldable: whether what produces the inputs can take a balance.
    """
    k1, k2 = _C.factor_sizes(inputs.shape[1])
    count, low, high, sum2 = _C.statistics_update(inputs)
    tokens = max(1, -(-len(inputs) // sample_tokens))
    rows = max(1, -(-sum(map(len, weights)) // SAMPLE_ROWS))
    kept = [_C.to_float32(np.ascontiguousarray(w[::rows]), reject=True) for w in weights]
    moments = [_C.column_moments(w) for w in weights]
    shared = shared or (1, 1, k1 * k2)
    b = gram_block(reads, shared, k2)
    return SiteStatistics(k1, k2, count, low, high, sum2, sample=inputs[::tokens].copy(),
                          weights=np.concatenate(kept),
                          weight_max=np.max([m for m, _ in moments], axis=0),
                          weight_sum2=np.sum([s for _, s in moments], axis=0),
                          gram=_C.block_gram(inputs, b), weight_gram=_weight_gram(weights, b),
                          shared=shared, reads=reads, foldable=foldable,
                          inputs=inputs if keep_inputs else None)


def gram_block(reads: str, shared: tuple[int, int, int], k2: int) -> int:
    """Inputs of a block of a site's Gram matrices: a value head's where it reads attention."""
    return shared[2] if reads == "attention" else k2


def _weight_gram(weights: Sequence[NDArray], b: int) -> NDArray[np.float64] | None:
    """The Gram matrices [k / b, b, b] of the rows of weights [n, k] of any stored type."""
    gram = None
    for weight in weights:
        for _, block in float32_blocks(weight, "weight"):
            gram = _C.block_gram(block, b, gram)
    return gram


def calibrate(
    checkpoint: View,
    windows: NDArray[np.int64],
    sample_tokens: int = SAMPLE_TOKENS,
    progress: Callable[[int, int], None] | None = None,
    skip: Collection[int] = (),
    keep_inputs: bool = True,
    bits: int = 32,
) -> Iterator[LayerStatistics]:
    """Yield the statistics of each layer's sites, in order.

    checkpoint: an unquantized Checkpoint. windows: [count, length] token ids, each a sequence of
    its own. progress(layers done, layers) is called after each layer; an exception cancels.
    skip: layers that are only passed through, without statistics. keep_inputs: the statistics
    also hold the sites' inputs, which weights "gptq" need: fine in a chain of generators, where a
    layer is dropped before the next is made; pass False to collect the layers of a large model.
    bits: of weights and activations as the tokens pass the layers, see `stream_layer`.
    ValueError when the checkpoint is packed, a token id is outside the vocabulary or an activation
    is not finite.
    """
    passed = pass_layers(checkpoint, windows, bits, skip, progress)
    return layers_statistics(checkpoint, passed, sample_tokens, keep_inputs)


def layers_statistics(
    checkpoint: View, layers: Iterator[Passed], sample_tokens: int, keep_inputs: bool
) -> Iterator[LayerStatistics]:
    """The statistics of each layer. What a layer holds is dropped before the next one is made."""
    for layer in layers:
        sites = _layer_statistics(checkpoint, layer.index, layer.inputs, sample_tokens, keep_inputs)
        found = LayerStatistics(layer.index, sites, layer.kv_largest, layer.kv_least)
        del layer, sites
        yield found
        del found


@dataclass(frozen=True)
class Passed:
    """A layer that the tokens have passed."""

    index: int
    inputs: Mapping[str, NDArray[np.float32]]  # [tokens, k] by site
    kv_largest: float  # largest magnitude of its keys and values
    kv_least: float  # of its keys or of its values, of those that are less
    hidden: NDArray[np.float32]  # [tokens, hidden] behind it, in place: the next layer changes it


def pass_layers(
    checkpoint: View, windows: NDArray[np.int64], bits: int, skip: Collection[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Passed]:
    """Run windows through the layers one by one, and yield each but those of skip.

    Arguments and errors are those of `calibrate`, and errors of arguments come at once.
    """
    windows = check_windows(checkpoint, windows, bits)
    return _pass_layers(checkpoint, windows, bits, skip, progress)


def check_windows(checkpoint: View, windows: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """The windows as ids of tokens. Errors are those of `calibrate`'s arguments."""
    checkpoint.require_unquantized()
    windows = token_ids(windows, "windows")
    if windows.ndim != 2 or windows.size == 0:
        raise ValueError(f"windows: expected (count, length) with tokens, got {windows.shape}")
    if bits not in CALIBRATION_BITS:
        raise ValueError(f"bits: expected one of {', '.join(map(str, CALIBRATION_BITS))}, "
                         f"got {bits!r}")
    return windows


def embedded(checkpoint: View, windows: NDArray[np.int64]) -> NDArray[np.float32]:
    """The residual stream [tokens, hidden] of windows [count, length] before the first layer."""
    position = flat_positions(np.full(len(windows), windows.shape[1]))[1]
    return kept(Outer(checkpoint).embed(windows.reshape(-1), position))


def _pass_layers(checkpoint, windows, bits, skip, progress) -> Iterator[Passed]:
    """The loop of `pass_layers`, whose arguments were checked."""
    spec = checkpoint.spec
    last = max(set(range(spec.layers)) - set(skip), default=-1)  # nothing is asked behind it
    hidden = embedded(checkpoint, windows)
    for index in range(spec.layers):
        if index <= last:
            wanted = index not in skip
            found = pass_layer(checkpoint, index, hidden, windows.shape[1], bits, wanted)
            if index < last:
                read_ahead(checkpoint, index + 1)
            if wanted:
                yield found
            del found
        if progress:
            progress(index + 1, spec.layers)


def pass_layer(
    checkpoint: View, index: int, hidden: NDArray[np.float32], length: int, bits: int,
    record: bool = True,
) -> Passed:
    """Run the residual stream [tokens, hidden] of windows of `length` tokens through one layer, in
    place. record: keep the sites' inputs."""
    _C.trim_heap()  # what the layer before left in pieces
    map_states()
    windows = len(hidden) // length
    sequence, position = flat_positions(np.full(windows, length))
    layer = stream_layer(checkpoint, index, bits)
    cache = new_cache(checkpoint.spec, 1, windows, length)
    try:
        inputs = layer.forward(hidden, sequence, position, cache, 0, record=record)
    except ValueError as error:  # 8-bit activations that are not finite
        blame_weight(checkpoint, index)
        raise ValueError(f"layer {index}: {error}") from None
    return Passed(index, inputs or {}, cache.largest, _kv_least(cache, length), hidden)


def _kv_least(cache: _C.KVCache, length: int) -> float:
    """The largest magnitude of keys or of values, of those that are less, in the first window; 0
    where all are zeros."""
    found = (float(np.abs(part).max(initial=0.0)) for part in cache.read(0, 0, length))
    return min((largest for largest in found if largest > 0), default=0.0)


def _layer_statistics(
    checkpoint, index, inputs, sample_tokens, keep_inputs
) -> Mapping[str, SiteStatistics]:
    """Statistics of a layer's sites from their recorded inputs; those of experts in turn, where the
    inputs are kept as well."""
    linears, spec = checkpoint.layer(index).linears, checkpoint.spec.layer(index)
    borrowed = borrow(spec, linears, inputs)
    own = {**inputs, **borrowed}

    def make(name: str) -> SiteStatistics:
        site, a, shared = spec.sites[name], spec.attention, None
        weights = [linears[role].weight for role in site.roles]
        if site.reads == "attention":  # a value head serves all its queries
            shared = a.kv_heads, a.heads // a.kv_heads, a.value_channels
        try:
            found = site_statistics(own[name], weights, sample_tokens, keep_inputs, shared,
                                    site.reads, site.producer is not None)
        except ValueError as error:
            blame_weight(checkpoint, index)
            raise ValueError(f"layer {index}, inputs of {name}: {error}") from None
        return replace(found, borrowed=name in borrowed)

    later = {name for name, site in spec.sites.items() if keep_inputs and site.expert is not None}
    sites = {name: make(name) for name in spec.sites if name not in later}
    if not later:
        return sites
    return SitesInTurn(sites, {name: own[name] for name in spec.sites}, frozenset(borrowed), make)


def blame_weight(checkpoint, index: int) -> None:
    """ValueError for a weight up to layer `index` that is not finite, the better message."""
    for i in range(index + 1):
        checkpoint.require_finite(i)


def save_statistics(statistics: Iterable[LayerStatistics], folder: str | Path) -> None:
    """Write one file per layer, and statistics.json; the folder appears only when it is whole.

    Inputs that were kept are not written. FileExistsError when it is there already.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} already exists")
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    try:
        count = 0
        for layer in statistics:
            tensors = {
                f"{name}.{field}": getattr(site, field)
                for name, site in layer.sites.items()
                for field in ARRAYS
            }
            facts = {name: {fact: getattr(site, fact) for fact in FACTS}
                     for name, site in layer.sites.items()}
            save_file(tensors, partial / _layer_file(layer.index),
                      {"sites": json.dumps(facts, allow_nan=False),
                       "kv_largest": repr(layer.kv_largest),
                       "kv_least": repr(layer.kv_least)})
            count += 1
        header = {"format_version": STATISTICS_VERSION, "layers": count}
        (partial / STATISTICS_FILE).write_text(json.dumps(header, allow_nan=False))
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _layer_file(index: int) -> str:
    return f"layer-{index:05d}.safetensors"


def load_statistics(folder: str | Path) -> Iterator[LayerStatistics]:
    """Yield what `save_statistics` wrote, layer by layer. FormatError names what is wrong."""
    path = Path(folder) / STATISTICS_FILE
    header = read_json(path)
    version, layers = header.get("format_version"), header.get("layers")
    if type(version) is not int or version != STATISTICS_VERSION:
        raise FormatError(
            f"{path}: format_version: expected {STATISTICS_VERSION}, found {version!r:.80}"
        )
    if type(layers) is not int or layers < 0:
        raise FormatError(f"{path}: layers: expected an integer from 0, found {layers!r:.80}")
    for index in range(layers):
        yield _load_layer(Path(folder) / _layer_file(index), index)


def _load_layer(path: Path, index: int) -> LayerStatistics:
    try:
        tensors = load_file(path)
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            facts = json.loads(metadata["sites"])
            largest, least = (float(metadata.get(n, 0)) for n in ("kv_largest", "kv_least"))
        if not isinstance(facts, dict) or not all(isinstance(f, dict) for f in facts.values()):
            raise ValueError(f"sites: expected facts of each site, found {facts!r:.80}")
        sites = {name: _load_site(name, tensors, facts[name]) for name in facts}
        return LayerStatistics(index, sites, largest, least)
    except KeyError as error:
        raise FormatError(f"{path}: expected {error.args[0]}, found no such entry") from None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise FormatError(f"{path}: {error}") from None


def _load_site(
    name: str, tensors: Mapping[str, NDArray], facts: Mapping[str, Any]
) -> SiteStatistics:
    """One site's statistics. KeyError for a missing entry, ValueError for one that is wrong."""
    arrays = {field: tensors[f"{name}.{field}"] for field in ARRAYS}
    found = {fact: facts[fact] if fact in facts else _missing(f"{name}.{fact}") for fact in FACTS}
    k1, k2, count = (found[fact] for fact in ("k1", "k2", "count"))
    for fact, least in (("k1", 1), ("k2", 1), ("count", 0)):
        if type(found[fact]) is not int or found[fact] < least:
            raise ValueError(f"{name}.{fact}: expected an integer from {least}, "
                             f"found {found[fact]!r:.80}")
    b = arrays["gram"].shape[-1] if arrays["gram"].ndim == 3 else 0
    grams = (k1 * k2 // b if b else 0, b, b)
    for field, array in arrays.items():
        rows = len(array) if array.ndim else 0
        shape = (rows, k1 * k2) if field in ("sample", "weights") else (k1 * k2,)
        shape = grams if field in ("gram", "weight_gram") else shape
        dtype = np.float32 if field in ("sample", "weights") else np.float64
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{name}.{field}: expected {np.dtype(dtype)} {shape}, "
                             f"found {array.dtype} {array.shape}")
    shared, reads, *switches = (found[fact] for fact in FACTS[3:])
    whole = isinstance(shared, list) and len(shared) == 3 and all(type(n) is int for n in shared)
    if not whole or min(shared) < 1 or prod(shared) != k1 * k2:
        raise ValueError(f"{name}.shared: expected 3 factors of {k1 * k2}, found {shared!r:.80}")
    if reads not in ALL_INPUTS or any(type(switch) is not bool for switch in switches):
        raise ValueError(f"{name}: expected reads among {', '.join(ALL_INPUTS)}, foldable and "
                         f"borrowed true or false, found {reads!r:.80} and {switches!r:.80}")
    expected = gram_block(reads, tuple(shared), k2)
    if b != expected:
        raise ValueError(f"{name}.gram: expected blocks of {expected} inputs, found {b}")
    foldable, borrowed = switches
    return SiteStatistics(k1, k2, count, **arrays, shared=tuple(shared), reads=reads,
                          foldable=foldable, borrowed=borrowed)


def _missing(name: str) -> None:
    raise KeyError(name)
