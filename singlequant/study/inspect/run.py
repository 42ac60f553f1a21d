# SPDX-License-Identifier: Apache-2.0
"""The run: calibrate, solve, and measure each site after each step of its transformation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import _C
from ...checkpoint.folder import Checkpoint, open_model
from ...config import QuantConfig
from ...export.writer import RECIPE_FILE
from ...files import MAX_LISTING_BYTES, read_json
from ...methods.gain import alignment_gain, balance_gain
from ...methods.registry import METHODS
from ...methods.solve import solve_layer
from ...rotations import SiteRotation
from ...statistics import LayerStatistics, SiteStatistics
from ...sweep.calibrate import SAMPLE_ROWS, calibrate
from ...sweep.layer import int8_inputs_of, round_inputs
from ...sweep.texts import calibration_windows
from ...weights import PackedLinear, packing_problem
from .measures import MASSIVE, NORMAL, NORMAL_SHARE, Sample, check_thresholds, measure
from .result import Inspection, OutlierRow, Surface
from .steps import transform, transform_weights, transformation_steps

SURFACE_TOKENS, SURFACE_CHANNELS = 64, 128  # cells of a surface, at most


def inspect_model(
    model: str | Path | Checkpoint,
    methods: Sequence[str] | None = None,
    original: str | Path | Checkpoint | None = None,
    config: QuantConfig | None = None,
    calibration: str | Path | None = None,
    layer: int | None = None,
    site: str | None = None,
    massive: Sequence[float] = MASSIVE,
    normal: float = NORMAL,
    normal_share: float = NORMAL_SHARE,
    surface: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Measure the inputs of every site before and after each step of its transformation.

    model: a folder as `save_pretrained` writes it: `methods` (default: the config's) are solved on
    its statistics. Or a packed folder, with the `original` it was made of: the rotations, clips and
    codes stored in it are shown. config: bits, clip, weight rounding and calibration tokens
    (default: `own_config`). layer, site: look at these alone. surface:
    keep |x| of the inspected site whose peak is largest. progress(layers done, layers) is called
    after each layer.
    The same input gives the same figures, at any number of threads. ValueError names the argument
    that is wrong, what was expected and what was found.
    """
    opened = open_model(model)
    checkpoint, packed = _original(opened, original)
    if config is None:
        config = own_config(opened)
    methods = _check(checkpoint, packed, config, methods, layer, site)
    check_thresholds(massive, normal, normal_share)
    windows = calibration_windows(checkpoint, config, calibration)
    run = _Inspector(config, methods, packed, massive, normal, normal_share, surface)
    skip = set() if layer is None else set(range(checkpoint.spec.layers)) - {layer}
    for statistics in calibrate(checkpoint, windows, progress=progress, skip=skip):
        for name in statistics.sites:
            if site in (None, name):
                try:
                    run.add(statistics.index, name, statistics.sites[name])
                except ValueError as error:  # numbers beyond float32 or float64
                    raise ValueError(f"layer {statistics.index}, site {name}: {error}") from None
    return Inspection(
        model=opened.name, methods=methods, bits=config.activation_bits,
        clip=config.activation_clip, weights=config.weights,
        calibration_tokens=int(windows.size), massive=tuple(map(float, massive)),
        normal=float(normal), normal_share=float(normal_share), rows=tuple(run.rows),
        surface=run.surface,
    )


def _check(
    checkpoint: Checkpoint, packed: Checkpoint | None, config: QuantConfig,
    methods: Sequence[str] | None, layer: int | None, site: str | None,
) -> tuple[str, ...]:
    """The methods to show. ValueError names the argument that does not suit the model."""
    if config.activation_bits == 16:
        raise ValueError(
            f"scheme: expected w4a4 or w4a8, whose activations are quantized, found "
            f"{config.scheme}"
        )
    if packed is not None and methods:
        raise ValueError(f"methods: expected none with a packed folder, which has its own "
                         f"({packed.quant_config.method}), found {', '.join(methods)}")
    methods = tuple(dict.fromkeys(methods or [
        config.method if packed is None else packed.quant_config.method]))
    shown = [row.name for row in METHODS.values() if not row.residual]
    for name in methods:
        if packed is None and name not in shown:
            raise ValueError(f"methods: expected among {', '.join(shown)}, found {name!r}")
    layers = checkpoint.spec.layers
    if layer is not None and not 0 <= layer < layers:
        raise ValueError(f"layer: expected 0 to {layers - 1}, found {layer}")
    sites = checkpoint.spec.site_names()
    if site is not None and site not in sites:
        raise ValueError(f"site: expected one of {', '.join(sites)}, found {site!r}")
    for role, linear in checkpoint.layer(0).linears.items():
        if problem := packing_problem(role, linear.weight.shape[1], config):
            raise ValueError(problem)
    return methods


def own_config(opened: Checkpoint) -> QuantConfig:
    """A packed folder's recipe, calibration tokens included; QuantConfig() of any other."""
    if opened.quant_config is None:
        return QuantConfig()
    recipe = opened.path / RECIPE_FILE
    if not recipe.is_file():  # others' folders may come without
        return opened.quant_config
    made = QuantConfig.from_file(recipe)
    return replace(opened.quant_config, calibration_tokens=made.calibration_tokens,
                   calibration_window=made.calibration_window, seed=made.seed)


def _original(
    opened: Checkpoint, original: str | Path | Checkpoint | None
) -> tuple[Checkpoint, Checkpoint | None]:
    """(the unquantized checkpoint, the packed one or None)."""
    if not opened.quantized:
        if original is not None:
            raise ValueError(f"original: expected with a packed folder only, and {opened.path} is "
                             f"not packed; found {original}")
        return opened, None
    method = METHODS[opened.quant_config.method]
    if method.folds:
        advice = "" if method.residual else f": inspect the original with --method {method.name}"
        raise ValueError(f"{opened.path}: its method, {method.name}, folds a {method.folds} into "
                         f"the weights, which the folder does not tell apart{advice}")
    if original is None:
        raise ValueError(f"original: expected the model that {opened.path} was made of (the packed "
                         f"weights give other activations), found none")
    checkpoint = open_model(original)
    if checkpoint.quantized:
        raise ValueError(f"original: expected an unquantized model, found a packed one: "
                         f"{checkpoint.path}")
    recipe = opened.path / RECIPE_FILE
    source = read_json(recipe, MAX_LISTING_BYTES).get("source_sha256") if recipe.is_file() else None
    same = checkpoint.spec.separate() == opened.spec.separate()
    if not same or source not in (None, checkpoint.fingerprint):
        raise ValueError(f"original: expected the model that {opened.path} was made of, found "
                         f"another: {checkpoint.path}")
    return checkpoint, opened


class _Inspector:
    """Rows and the surface as they grow, a site at a time."""

    def __init__(self, config, methods, packed, massive, normal, normal_share, surface) -> None:
        self.config, self.methods, self.packed = config, methods, packed
        self.thresholds = massive, normal, normal_share
        self.wanted = surface
        self.rows: list[OutlierRow] = []
        self.surface: Surface | None = None
        self._worst = -1.0
        self._layer: tuple[int, Any] | None = None  # the packed layer opened last
        self._as_stored = packed is not None and all(
            getattr(packed.quant_config, name) == getattr(config, name)
            for name in ("scheme", "clip"))

    def add(self, layer: int, site: str, statistics: SiteStatistics) -> None:
        """Measure one site after each step of each method."""
        x, weights = statistics.sample, statistics.weights
        exact = _C.linear_dense(x, weights).astype(np.float64)
        gains = {"balance_gain": balance_gain(statistics),
                 "alignment_gain": alignment_gain(statistics)}
        clip, stored = self.config.activation_clip, None
        finals, peak = [], 0.0
        for method in self.methods:
            if self.packed is None:
                rotation = solve_layer(LayerStatistics(layer, {site: statistics}),
                                       replace(self.config, method=method)).sites.get(site)
                if rotation and rotation.is_identity and rotation.balance is None:
                    rotation = None
            else:
                rotation, own, stored = self._stored(layer, site, len(weights))
                clip = own if self._as_stored else clip
            steps = transformation_steps(rotation)
            for index, (name, partial) in enumerate(steps):
                final = index == len(steps) - 1
                inputs = transform(partial, x)
                figures = measure(inputs, self.config.activation_bits, clip, *self.thresholds)
                int8_inputs = 0
                if final and isinstance(rotation, SiteRotation):
                    int8_inputs = int8_inputs_of(rotation, self.config)
                if int8_inputs:
                    rounded = round_inputs(inputs, rotation, self.config)
                    error = float(np.sum((rounded - inputs) ** 2) / np.sum(inputs**2))
                    figures = replace(figures, activation_error=error)
                packed = stored if final and stored else self._quantize(
                    transform_weights(partial, weights), int8_inputs)
                self.rows.append(OutlierRow(
                    **vars(figures), output_error=self._output_error(inputs, packed, clip, exact),
                    layer=layer, site=site, method=method, step=index, name=name, final=final,
                    tokens=len(x), channels=x.shape[1], **gains,
                ))
                peak = figures.peak if index == 0 else peak
            finals.append((method, inputs))
        if self.wanted and peak > self._worst:
            panels = tuple((name, _cells(values)) for name, values in [("original", x), *finals])
            self._worst = peak
            self.surface = Surface(layer, site, *x.shape, panels)

    def _quantize(self, weights: Sample, int8_inputs: int) -> Any:
        """Rounded to nearest, with a searched clip unless the config says rtn."""
        group = self.config.group_size
        codes, scales, _ = _C.quantize(weights, 4, group, True, 1.0, self.config.weights != "rtn")
        return _C.PackedWeight(_C.pack(codes), scales, weights.shape[1], group, int8_inputs)

    def _output_error(self, inputs: Sample, packed: Any, clip: float, exact: NDArray) -> float:
        found = _C.linear(inputs, packed, self.config.activation_bits, clip)
        size = float(np.sum(exact**2))
        return float(np.sum((found - exact) ** 2)) / size if size else 0.0

    def _stored(self, layer: int, site: str, kept: int) -> tuple[Any, float, Any]:
        """A packed site's rotation (None without one), clip, and the rows that statistics keep.

        The rows are None where a linear of the site was left unquantized.
        """
        if self._layer is None or self._layer[0] != layer:
            self._layer = layer, self.packed.layer(layer)
        weights = self._layer[1]
        rotation = weights.rotations.get(site)
        roles = self.packed.spec.layer(layer).sites[site].roles
        linears = [weights.linears[role].weight for role in roles]
        rows = None
        if all(isinstance(linear, PackedLinear) for linear in linears):
            every = max(1, -(-sum(linear.shape[0] for linear in linears) // SAMPLE_ROWS))
            k, bits = linears[0].shape[1], max(linear.bits for linear in linears)
            words = np.concatenate([
                _C.pack(_C.unpack(w.words[::every], k, w.bits), bits) for w in linears])
            scales = np.concatenate([w.scales[::every] for w in linears])
            if len(words) == kept and len({linear.group for linear in linears}) == 1:
                rows = _C.PackedWeight(words, scales, k, linears[0].group, bits=bits)
        return rotation, weights.clips[site], rows


def _cells(x: Sample) -> NDArray[np.float32]:
    """|x| [tokens, k] as at most SURFACE_TOKENS x SURFACE_CHANNELS cells, each its largest."""
    size = np.abs(x)
    for axis, cells in ((0, SURFACE_TOKENS), (1, SURFACE_CHANNELS)):
        length = size.shape[axis]
        starts = np.arange(min(cells, length)) * length // min(cells, length)
        size = np.maximum.reduceat(size, starts, axis=axis)
    return size
