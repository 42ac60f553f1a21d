"""Outliers of every site, before and after each step of its transformation: figures and pictures.

All figures are of the evenly spaced tokens that calibration keeps (512 of each site) and of as many
rows of the site's weights. `Measures` has the definitions.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..checkpoint.folder import Checkpoint, load_checkpoint
from ..config import BALANCED_SITES, RESIDUAL_METHODS, SITES, QuantConfig
from ..export.writer import RECIPE_FILE
from ..files import read_json, require_matplotlib
from ..methods.solve import METHODS, SWEEP_ORDER_MAX, solve_layer
from ..rotations import BlockRotation, Factor, SiteRotation
from ..statistics import LayerStatistics, SiteStatistics
from ..sweep.calibrate import SAMPLE_ROWS, calibrate
from ..sweep.layer import high_inputs, round_inputs, transform_inputs, transform_rows
from ..sweep.texts import calibration_windows
from ..weights import PackedLinear, packing_problem

MASSIVE = (100.0, 1000.0)  # times the median magnitude
NORMAL = 6.0  # times the token's root mean square
NORMAL_SHARE = 0.06  # of the tokens
SURFACE_TOKENS, SURFACE_CHANNELS = 64, 128  # cells of a surface, at most

Sample = NDArray[np.float32]  # [tokens, k]


# ---- measures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """How hard one site's inputs x [tokens, channels] are to quantize; tokens of zeros left out.

    massive: for each threshold T the number of entries beyond T times the median magnitude of all
    entries, in whatever scale that is ("Massive Activations in Large Language Models",
    arXiv 2402.17762, asks for about 1000 times the median, and for more than 100 in the hidden
    state, where a scale is given). largest: the largest magnitude over that median.
    normal: channels that exceed 6 times the token's rms in at least 6 % of the tokens (LLM.int8(),
    arXiv 2208.07339: a magnitude of 6 in 6 % of the sequence, on inputs of about unit rms).
    peak: mean over tokens of (max|x| / rms)^2, which the error of a quantizer that reaches the
    maximum is proportional to. 1 at equal magnitudes.
    kurtosis: mean over tokens of mean(x^4) / mean(x^2)^2; Gaussian 3, uniform 1.8.
    utilization: of the quantization space, the share of its bits that the codes carry: mean over
    tokens of the entropy of a token's codes / bits. 1 where all codes are used equally often.
    fill: mean over tokens of mean|x| / (max|x| / 2): 1 for values spread evenly up to the maximum,
    near 0 where a few entries claim the range. Rotations keep the volume that the data take
    (the determinant of their covariance), so that OSTQuant's volume ratio (arXiv 2501.13987) moves
    with the maximum alone.
    flatness: distance of the channels' norms from equal ones, |d - g| / |d|, d [channels], g the
    constant vector of the same length (after FlatQuant, arXiv 2410.09426). 0 is flat.
    activation_error: sum (x - Q(x))^2 / sum x^2 of the runtime's symmetric per-token quantizer.
    """

    massive: tuple[int, ...]
    largest: float
    normal: int
    peak: float
    kurtosis: float
    utilization: float
    fill: float
    flatness: float
    activation_error: float


def measure(
    x: Sample,
    bits: int = 4,
    clip: float = 1.0,
    massive: Sequence[float] = MASSIVE,
    normal: float = NORMAL,
    normal_share: float = NORMAL_SHARE,
) -> Measures:
    """The `Measures` of inputs x [tokens, k] under a `bits`-bit quantizer with that clip.

    massive, normal and normal_share are the thresholds of `Measures`. ValueError for x that is not
    a matrix with entries, that holds NaN or Inf, or for a threshold that is not above 0.
    """
    x = np.asarray(x, np.float32)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"x: expected (tokens, k) with entries, found {x.shape}")
    _check_thresholds(massive, normal, normal_share)
    codes, scales, _ = _C.quantize(x, bits, 0, True, clip)
    tokens, channel_sum2, above = _C.outliers(x, codes, scales[:, 0], normal)
    magnitudes = np.abs(x)
    median = float(np.median(magnitudes))
    peak, total, sum2, sum4, error, entropy = tokens[tokens[:, 2] > 0].T
    k, energy = x.shape[1], float(sum2.sum())
    norms = np.sqrt(channel_sum2)
    flat = np.sqrt(energy / k)
    return Measures(
        massive=tuple(int(np.count_nonzero(magnitudes > t * median)) for t in massive),
        largest=float(peak.max(initial=0.0)) / median if median > 0 else 0.0,
        normal=int(np.count_nonzero(above >= max(1.0, normal_share * len(x)))),
        peak=_mean(peak**2 * k / sum2),
        kurtosis=_mean(sum4 * k / sum2**2),
        utilization=_mean(entropy) / bits,
        fill=_mean(2 * total / (k * peak)),
        flatness=float(np.linalg.norm(norms - flat) / np.sqrt(energy)) if energy else 0.0,
        activation_error=float(error.sum()) / energy if energy else 0.0,
    )


def _mean(values: NDArray[np.float64]) -> float:
    """The mean; 0 of nothing."""
    return float(values.mean()) if values.size else 0.0


def _check_thresholds(massive: Sequence[float], normal: float, normal_share: float) -> None:
    if not massive:
        raise ValueError("massive: expected at least one threshold, found none")
    for name, values in (("massive", massive), ("normal", [normal])):
        for value in values:
            if not 0 < value < np.inf:
                raise ValueError(f"{name}: expected a finite number above 0, found {value!r}")
    if not 0 < normal_share <= 1:
        raise ValueError(f"normal_share: expected a number in (0, 1], found {normal_share!r}")


# ---- steps of a transformation ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StoredRotation:
    """Both factors as a packed file has them: dense float32 matrices, or (order, H, chain)."""

    left: Any
    right: Any


def transformation_steps(rotation: Any, method: str | None = None) -> list[tuple[str, Any]]:
    """(name, partial transformation) of each step in order; the first is ("original", None).

    A partial transformation is what stands after the step, and goes to `transform`; the last one is
    `rotation` itself. `paper`: ART, then URT on axis 1, Hadamard, then URT on axis 2 (paper: R1 =
    R_U1 R_A, R2 = H R_U2). `singlequant`: the Hadamard on both axes, ART on each, then each sweep
    of each axis in turn. `balanced`: the balance, the principal directions of axis 1, the Hadamard
    of axis 2, then the sweeps. A StoredRotation's dense factors no longer tell their steps apart;
    `method` says which of them begin with a Hadamard. Any other kind gives "original" and "final"
    alone.
    """
    steps: list[tuple[str, Any]] = [("original", None)]
    if rotation is None:
        return steps
    if isinstance(rotation, StoredRotation):
        return steps + _stored_steps(rotation, method)
    if not isinstance(rotation, SiteRotation):
        return [*steps, ("final", rotation)]
    factors = [_plain(rotation.left), _plain(rotation.right)]
    for name, changes in _operations(rotation):
        for axis, hadamard, count in changes:
            whole = (rotation.left, rotation.right)[axis]
            end = factors[axis].steps + count
            factors[axis] = replace(whole, hadamard=factors[axis].hadamard or hadamard,
                                    pairs=whole.pairs[:end], angles=whole.angles[:end])
        steps.append((name, replace(rotation, left=factors[0], right=factors[1])))
    if rotation.balance is not None:
        plain = replace(rotation, left=_plain(rotation.left), right=_plain(rotation.right))
        steps.insert(1, ("balance", plain))
    if len(steps) > 1:
        steps[-1] = steps[-1][0], rotation
    return steps


def _plain(factor: Factor) -> Factor:
    """The factor before its Hadamard and its chain."""
    return replace(factor, hadamard=False, pairs=factor.pairs[:0], angles=factor.angles[:0])


Change = tuple[int, bool, int]  # axis, Hadamard, Givens rotations


def _operations(rotation: SiteRotation) -> Iterator[tuple[str, list[Change]]]:
    """Named operations in the order in which the solver made them."""
    factors = rotation.left, rotation.right
    pieces = [_chain_pieces(rotation, axis) for axis in (0, 1)]
    if all(factor.hadamard for factor in factors):
        yield "Hadamard, both axes", [(0, True, 0), (1, True, 0)]
        for turn in range(max(map(len, pieces))):  # the axes take turns
            for axis in (0, 1):
                if turn < len(pieces[axis]):
                    name, count = pieces[axis][turn]
                    if count:
                        yield f"{name}, axis {axis + 1}", [(axis, False, count)]
        return
    if pieces[0] and pieces[0][0][0] == "principal directions":
        yield "principal directions, axis 1", [(0, False, pieces[0][0][1])]
        yield "Hadamard, axis 2", [(1, True, 0)]
        for turn, (name, count) in enumerate(pieces[0][1:]):
            yield f"{name}, axis 1", [(0, False, count)]
            for name, count in pieces[1][turn : turn + 1]:
                yield f"{name}, axis 2", [(1, False, count)]
        return
    for axis in (0, 1):
        if factors[axis].hadamard:
            yield f"Hadamard, axis {axis + 1}", [(axis, True, 0)]
        for name, count in pieces[axis]:
            yield f"{name}, axis {axis + 1}", [(axis, False, count)]


def _chain_pieces(rotation: SiteRotation, axis: int) -> list[tuple[str, int]]:
    """A factor's chain as (name, rotations) of its parts, as far as the counts tell them apart."""
    factor = (rotation.left, rotation.right)[axis]
    total = rotation.left.steps + rotation.right.steps
    art, urt, sweeps = rotation.art_steps, rotation.urt_steps, rotation.sweep_rotations
    if factor.steps == 0:
        return []
    rounds, per_round = _sweeps(rotation)
    first = factor.steps - rounds * per_round[axis]
    if rounds and first >= 0:
        name = "ART" if art and art + sweeps == total else "principal directions"
        named = [(f"sweep {i + 1}" if rounds > 1 else "sweep", per_round[axis])
                 for i in range(rounds)]
        return [(name, first), *named] if art or first else named
    if art + urt == total and (art == 0 or urt == 0):
        return [("URT" if art == 0 else "ART", factor.steps)]
    if art + urt == total and art <= rotation.left.steps:  # the paper's ART is on axis 1 alone
        if axis == 1:
            return [("URT", factor.steps)]
        return [(n, c) for n, c in (("ART", art), ("URT", factor.steps - art)) if c]
    return [("Givens chain", factor.steps)]


def _sweeps(rotation: SiteRotation) -> tuple[int, tuple[int, int]]:
    """(rounds, a round's rotations on each axis): a sweep meets every pair of indices once, with a
    block at 8 bits every pair inside it and every pair outside. (0, (0, 0)) where counts disagree.
    """
    k1, k2 = rotation.sizes
    block = rotation.high // k2
    pairs = [block * (block - 1) // 2 + (k1 - block) * (k1 - block - 1) // 2, k2 * (k2 - 1) // 2]
    one = tuple(0 if n > SWEEP_ORDER_MAX else p for n, p in zip((k1, k2), pairs, strict=True))
    rounds, rest = divmod(rotation.sweep_rotations, max(1, sum(one)))
    return (0, (0, 0)) if rest else (rounds, one)


# Methods whose factor begins with a Hadamard, by axis.
STORED_HADAMARD = ({"hadamard", "singlequant"},
                   {"hadamard", "singlequant", "paper", "art", "urt"})


def _stored_steps(rotation: StoredRotation, method: str | None) -> list[tuple[str, Any]]:
    """Steps of factors from a file: the Hadamard of the method, then one factor after the other."""
    whole, now, steps = (rotation.left, rotation.right), [], []
    for axis, factor in enumerate(whole):
        order = factor[0] if isinstance(factor, tuple) else len(factor)
        starts = factor[1] if isinstance(factor, tuple) else method in STORED_HADAMARD[axis]
        now.append((starts, replace(Factor.identity(order), hadamard=bool(starts)).runtime()))
    if any(starts for starts, _ in now):
        both = "both axes" if all(s for s, _ in now) else f"axis {1 + (not now[0][0])}"
        steps.append((f"Hadamard, {both}", StoredRotation(now[0][1], now[1][1])))
    factors = [f for _, f in now]
    for axis in (0, 1):
        if _same(factors[axis], whole[axis]):
            continue
        factors[axis] = whole[axis]
        steps.append((f"Givens chain, axis {axis + 1}", StoredRotation(*factors)))
    if not steps:
        return [("final", rotation)]
    steps[-1] = steps[-1][0], rotation
    return steps


def _same(a: Any, b: Any) -> bool:
    """Whether two runtime factors are the same transformation, up to float32."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        return isinstance(a, tuple) and isinstance(b, tuple) and len(a[3]) == len(b[3]) == 0 and (
            a[1] == b[1])
    return bool(np.abs(a - b).max() < 1e-4)


def transform(partial: Any, x: Sample) -> Sample:
    """Inputs x [tokens, k] after a partial transformation; None leaves them."""
    if partial is None:
        return x
    if isinstance(partial, StoredRotation):
        return _C.rotate(x, partial.left, partial.right)
    return transform_inputs(x, partial)


def transform_weights(partial: Any, weights: Sample) -> Sample:
    """Weight rows [n, k] after the same: x' W'^T = x W^T."""
    if isinstance(partial, StoredRotation):
        return _C.rotate(weights, partial.left, partial.right)
    return transform_rows(weights, partial)


# ---- the result ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutlierRow(Measures):
    """One site after one step (0: the original); `final` marks the whole transformation.

    output_error: |x W^T - Q(x') Q(W')^T|^2 / |x W^T|^2 on the sample, x', W' the transformed inputs
    and weight rows, computed by the runtime's integer kernels.
    """

    output_error: float
    layer: int
    site: str
    method: str
    step: int
    name: str
    final: bool
    tokens: int
    channels: int


IDENTITY_FIELDS = ("layer", "site", "method", "step", "name", "final", "tokens", "channels")
FIGURE_FIELDS = ("largest", "normal", "peak", "kurtosis", "utilization", "fill", "flatness",
                 "activation_error", "output_error")


@dataclass(frozen=True, eq=False, repr=False)
class Surface:
    """|x| of one site, each cell the largest of its tokens and channels: what a picture shows."""

    layer: int
    site: str
    tokens: int  # before they were gathered in cells
    channels: int
    panels: tuple[tuple[str, NDArray[np.float32]], ...]  # (name, [cells, cells]); original first

    def __repr__(self) -> str:
        names = ", ".join(name for name, _ in self.panels)
        return f"Surface(layer {self.layer}, {self.site}, {self.tokens}x{self.channels}, {names})"


@dataclass(frozen=True, repr=False)
class Inspection:
    """What `inspect_model` found."""

    model: str  # name of the folder
    methods: tuple[str, ...]
    bits: int  # of the activations' codes
    clip: float
    weights: str  # rounding of the weights
    calibration_tokens: int
    massive: tuple[float, ...]
    normal: float
    normal_share: float
    rows: tuple[OutlierRow, ...]
    surface: Surface | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        sites = len({(row.layer, row.site) for row in self.rows})
        return (f"Inspection({self.model!r}, {', '.join(self.methods)}, {sites} sites, "
                f"{len(self.rows)} rows, {self.bits} bits)")

    def select(self, **where: Any) -> list[OutlierRow]:
        """Rows whose fields have these values: select(site="down", final=True)."""
        return [row for row in self.rows if all(getattr(row, k) == v for k, v in where.items())]

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values, without the surface; from_json() takes it back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["surface"]
        rows = [dataclasses.asdict(row) | {"massive": list(row.massive)} for row in self.rows]
        return values | {"methods": list(self.methods), "massive": list(self.massive),
                         "rows": rows}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Inspection:
        """The inspection of a dict that `to_json` made. ValueError when it is another."""
        try:
            rows = tuple(OutlierRow(**{**row, "massive": tuple(row["massive"])})
                         for row in values["rows"])
            return cls(**{**values, "methods": tuple(values["methods"]),
                          "massive": tuple(values["massive"]), "rows": rows})
        except (KeyError, TypeError) as error:
            raise ValueError(f"inspection: expected what to_json writes, found: {error}") from None

    def to_csv(self) -> str:
        """A line per row; massive_T counts the entries beyond T times the median."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        massive = [f"massive_{t:g}" for t in self.massive]
        writer.writerow([*IDENTITY_FIELDS, *massive, *FIGURE_FIELDS])
        for row in self.rows:
            identity, figures = ([getattr(row, name) for name in names]
                                 for names in (IDENTITY_FIELDS, FIGURE_FIELDS))
            writer.writerow([*identity, *row.massive, *figures])
        return out.getvalue()


# ---- the run ------------------------------------------------------------------------------------


def inspect_model(
    model: str | Path,
    methods: Sequence[str] | None = None,
    original: str | Path | None = None,
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
    opened = load_checkpoint(model)
    checkpoint, packed = _original(opened, original)
    if config is None:
        config = own_config(opened)
    if config.activation_bits == 16:
        raise ValueError(
            f"scheme: expected w4a4 or w4a8, whose activations are quantized, found "
            f"{config.scheme}"
        )
    if packed is not None and methods:
        raise ValueError(f"methods: expected none with a packed folder, which has its own "
                         f"({opened.quant_config.method}), found {', '.join(methods)}")
    methods = tuple(dict.fromkeys(methods or [
        config.method if packed is None else opened.quant_config.method]))
    for name in methods:
        if packed is None and name not in METHODS:
            raise ValueError(f"methods: expected among {', '.join(METHODS)}, found {name!r}")
    layers = checkpoint.shape.layers
    if layer is not None and not 0 <= layer < layers:
        raise ValueError(f"layer: expected 0 to {layers - 1}, found {layer}")
    if site is not None and site not in SITES:
        raise ValueError(f"site: expected one of {', '.join(SITES)}, found {site!r}")
    _check_thresholds(massive, normal, normal_share)
    for role, linear in checkpoint.layer(0).linears.items():
        if problem := packing_problem(role, linear.weight.shape[1], config):
            raise ValueError(problem)
    windows = calibration_windows(checkpoint, config, calibration)
    run = _Run(config, methods, packed, massive, normal, normal_share, surface)
    skip = set() if layer is None else set(range(layers)) - {layer}
    for statistics in calibrate(checkpoint, windows, progress=progress, skip=skip):
        for name in SITES if site is None else (site,):
            run.add(statistics.index, name, statistics.sites[name])
    return Inspection(
        model=opened.path.resolve().name, methods=methods, bits=config.activation_bits,
        clip=config.activation_clip, weights=config.weights,
        calibration_tokens=int(windows.size), massive=tuple(map(float, massive)),
        normal=float(normal), normal_share=float(normal_share), rows=tuple(run.rows),
        surface=run.surface,
    )


def own_config(opened: Checkpoint) -> QuantConfig:
    """A packed folder's recipe, calibration tokens included; QuantConfig() of any other."""
    if opened.quant_config is None:
        return QuantConfig()
    recipe = opened.path / RECIPE_FILE
    if not recipe.is_file():  # others' folders may come without
        return opened.quant_config
    made = QuantConfig.from_file(recipe)
    return replace(opened.quant_config, calibration_tokens=made.calibration_tokens, seed=made.seed)


def _original(
    opened: Checkpoint, original: str | Path | None
) -> tuple[Checkpoint, Checkpoint | None]:
    """(the unquantized checkpoint, the packed one or None)."""
    if not opened.quantized:
        if original is not None:
            raise ValueError(f"original: expected with a packed folder only, and {opened.path} is "
                             f"not packed; found {original}")
        return opened, None
    if original is None:
        raise ValueError(f"original: expected the model that {opened.path} was made of (the packed "
                         f"weights give other activations), found none")
    method = opened.quant_config.method
    if method in BALANCED_SITES or method in RESIDUAL_METHODS:
        folded = "balance" if method in BALANCED_SITES else "rotation of the residual stream"
        shown = f": inspect the original with --method {method}" if method in METHODS else ""
        raise ValueError(f"{opened.path}: its method, {method}, folds a {folded} into the weights, "
                         f"which the folder does not tell apart{shown}")
    checkpoint = load_checkpoint(original)
    if checkpoint.quantized:
        raise ValueError(f"original: expected an unquantized model, found a packed one: {original}")
    recipe = opened.path / RECIPE_FILE
    source = read_json(recipe).get("source_sha256") if recipe.is_file() else None
    if checkpoint.shape != opened.shape or source not in (None, checkpoint.fingerprint):
        raise ValueError(f"original: expected the model that {opened.path} was made of, found "
                         f"another: {original}")
    return checkpoint, opened


class _Run:
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
        clip, stored = self.config.activation_clip, None
        finals, peak = [], 0.0
        for method in self.methods:
            if self.packed is None:
                rotation = solve_layer(LayerStatistics(layer, {site: statistics}),
                                       replace(self.config, method=method)).sites[site]
                idle = rotation.is_identity and rotation.balance is None
                rotation = None if idle else rotation
            else:
                rotation, own, stored = self._stored(layer, site, len(weights))
                clip = own if self._as_stored else clip
            steps = transformation_steps(rotation, method)
            for index, (name, partial) in enumerate(steps):
                final = index == len(steps) - 1
                inputs = transform(partial, x)
                figures = measure(inputs, self.config.activation_bits, clip, *self.thresholds)
                high = 0
                if final and isinstance(rotation, SiteRotation):
                    high = high_inputs(rotation, self.config)
                if high:
                    rounded = round_inputs(inputs, rotation, self.config)
                    error = float(np.sum((rounded - inputs) ** 2) / np.sum(inputs**2))
                    figures = replace(figures, activation_error=error)
                packed = stored if final and stored else self._quantize(
                    transform_weights(partial, weights), high)
                self.rows.append(OutlierRow(
                    **vars(figures), output_error=self._output_error(inputs, packed, clip, exact),
                    layer=layer, site=site, method=method, step=index, name=name, final=final,
                    tokens=len(x), channels=x.shape[1],
                ))
                peak = figures.peak if index == 0 else peak
            finals.append((method, inputs))
        if self.wanted and peak > self._worst:
            panels = tuple((name, _cells(values)) for name, values in [("original", x), *finals])
            self._worst = peak
            self.surface = Surface(layer, site, *x.shape, panels)

    def _quantize(self, weights: Sample, high: int) -> Any:
        """Rounded to nearest, with a searched clip unless the config says rtn."""
        group = self.config.group_size
        codes, scales, _ = _C.quantize(weights, 4, group, True, 1.0, self.config.weights != "rtn")
        return _C.PackedWeight(_C.pack(codes), scales, weights.shape[1], group, high)

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
        roles = self.packed.architecture.sites[site]
        linears = [weights.linears[role].weight for role in roles]
        rows = None
        if all(isinstance(linear, PackedLinear) for linear in linears):
            every = max(1, -(-sum(linear.shape[0] for linear in linears) // SAMPLE_ROWS))
            words, scales = (np.concatenate([getattr(w, part)[::every] for w in linears])
                             for part in ("words", "scales"))
            if len(words) == kept and len({linear.group for linear in linears}) == 1:
                rows = _C.PackedWeight(words, scales, linears[0].shape[1], linears[0].group)
        if rotation:
            rotation = (BlockRotation if len(rotation) == 3 else StoredRotation)(*rotation)
        return rotation, weights.clips[site], rows


def _cells(x: Sample) -> NDArray[np.float32]:
    """|x| [tokens, k] as at most SURFACE_TOKENS x SURFACE_CHANNELS cells, each its largest."""
    size = np.abs(x)
    for axis, cells in ((0, SURFACE_TOKENS), (1, SURFACE_CHANNELS)):
        length = size.shape[axis]
        starts = np.arange(min(cells, length)) * length // min(cells, length)
        size = np.maximum.reduceat(size, starts, axis=axis)
    return size


# ---- tables -------------------------------------------------------------------------------------

HEADINGS = ("largest", "NO", "peak²/rms²", "kurtosis", "utiliz.", "fill", "flatness", "act. err",
            "out. err")


def site_table(inspection: Inspection) -> str:
    """Every layer and site, the original and what the whole transformation makes of it."""
    names = {row.name if row.step == 0 else row.method: None for row in inspection.rows}
    label = max(len(name) for name in names)
    lines = [f"layer site     {'after':<{label}} {_heading(inspection)}"]
    for row in inspection.rows:
        if row.step == 0 and row.method == inspection.methods[0]:
            lines.append(f"{row.layer:>5} {row.site:<8} {'original':<{label}} {_figures([row])}")
        if row.final and row.step:
            lines.append(f"{row.layer:>5} {row.site:<8} {row.method:<{label}} {_figures([row])}")
    return "\n".join(lines)


def step_table(inspection: Inspection) -> str:
    """Every step at each site: means over the layers, massive entries and NO channels in sum."""
    label = max(len(row.name) for row in inspection.rows)
    width = max(len(method) for method in inspection.methods)
    lines = [f"{'method':<{width}} site     {'after':<{label}} {_heading(inspection)}"]
    groups: dict[tuple[str, str, str], list[OutlierRow]] = {}
    for row in inspection.rows:
        groups.setdefault((row.method, row.site, row.name), []).append(row)
    order = {site: i for i, site in enumerate(SITES)}
    for (method, site, name), rows in sorted(
        groups.items(),
        key=lambda item: (inspection.methods.index(item[0][0]), order[item[0][1]],
                          item[1][0].step),
    ):
        lines.append(f"{method:<{width}} {site:<8} {name:<{label}} {_figures(rows)}")
    return "\n".join(lines)


def _heading(inspection: Inspection) -> str:
    massive = [f"MO>{t:g}" for t in inspection.massive]
    return " ".join(f"{title:>10}" for title in [*massive, *HEADINGS])


def _figures(rows: Sequence[OutlierRow]) -> str:
    """One line: counts in sum, the largest of `largest`, means of the rest."""
    counts = [f"{sum(row.massive[i] for row in rows):>10}" for i in range(len(rows[0].massive))]
    counts += [f"{max(row.largest for row in rows):>10.1f}",
               f"{sum(row.normal for row in rows):>10}"]
    means = {name: float(np.mean([getattr(row, name) for row in rows])) for name in FIGURE_FIELDS}
    counts += [f"{means[name]:>10.2f}" for name in ("peak", "kurtosis")]
    counts += [f"{means[name]:>10.3f}" for name in ("utilization", "fill", "flatness")]
    counts += [f"{means[name]:>10.4f}" for name in ("activation_error", "output_error")]
    return " ".join(counts)


# ---- pictures -----------------------------------------------------------------------------------

COLOURS = ("#999999", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # Okabe-Ito
FIELD_LABELS = {
    "peak": "(max / rms)² of a token, mean",
    "kurtosis": "kurtosis",
    "utilization": "utilization of the codes",
    "fill": "mean|x| / (max / 2)",
    "flatness": "distance from flat channels",
    "activation_error": "relative squared error of the activations",
    "output_error": "relative squared error of the outputs",
    "largest": "largest / median magnitude",
}


def _figure(width: float, height: float):
    """A figure of its own, outside pyplot's global state. Sizes in inches."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_heatmaps(inspection: Inspection, field: str = "peak", figure=None):
    """Layers x sites of one figure, the original and each method's result side by side.

    All panels share one logarithmic colour scale. Returns the matplotlib Figure (or the SubFigure
    given). ImportError without matplotlib; ValueError for an unknown field.
    """
    _check_field(field)
    layers = sorted({row.layer for row in inspection.rows})
    sites = [site for site in SITES if any(row.site == site for row in inspection.rows)]
    panels = [("original", inspection.select(step=0, method=inspection.methods[0]))]
    panels += [(name, inspection.select(final=True, method=name)) for name in inspection.methods]
    if figure is None:
        figure = _figure(1.6 + 2.4 * len(panels), 1.8 + min(0.32 * len(layers), 12))
    require_matplotlib()
    from matplotlib.colors import LogNorm

    grids = []
    for _, rows in panels:
        grid = np.full((len(layers), len(sites)), np.nan)
        for row in rows:
            grid[layers.index(row.layer), sites.index(row.site)] = getattr(row, field)
        grids.append(grid)
    found = np.concatenate([grid[grid > 0] for grid in grids])
    low, high = (found.min(), found.max()) if found.size else (1.0, 10.0)
    norm = LogNorm(low, high if high > low else low * 1.01)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, _), grid in zip(axes, panels, grids, strict=True):
        image = axis.imshow(grid, cmap="cividis", norm=norm, aspect="auto", origin="upper")
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(len(sites)), sites, fontsize=8)
        axis.tick_params(length=0)
        if len(layers) <= 16:
            _annotate(axis, grid, norm)
    every = max(1, len(layers) // 16)
    axes[0].set_yticks(range(0, len(layers), every), layers[::every], fontsize=8)
    axes[0].set_ylabel("layer")
    colorbar = figure.colorbar(image, ax=list(axes), pad=0.02)
    colorbar.ax.tick_params(labelsize=8)
    colorbar.set_label(f"{FIELD_LABELS[field]}\n(log scale, shared)", fontsize=8)
    return figure


def _annotate(axis, grid: NDArray, norm) -> None:
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value):
            dark = value <= 0 or norm(value) < 0.55
            axis.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")


def plot_errors(inspection: Inspection, field: str = "output_error", figure=None):
    """Bars: per site the error of the original and of each method, means over the layers.

    The thin line spans the layers. Returns the Figure, as plot_heatmaps does.
    """
    _check_field(field)
    sites = [site for site in SITES if any(row.site == site for row in inspection.rows)]
    series = [("original", {"step": 0, "method": inspection.methods[0]})]
    series += [(name, {"final": True, "method": name}) for name in inspection.methods
               if inspection.select(method=name, final=True)[0].step]
    if figure is None:
        figure = _figure(2.2 + 1.4 * len(sites), 3.4)
    axis = figure.subplots()
    width = 0.8 / len(series)
    for i, (name, where) in enumerate(series):
        values = [[getattr(row, field) for row in inspection.select(site=site, **where)]
                  for site in sites]
        means = np.array([np.mean(v) for v in values])
        spans = np.array([[m - min(v), max(v) - m] for m, v in zip(means, values, strict=True)]).T
        at = np.arange(len(sites)) + (i - (len(series) - 1) / 2) * width
        axis.bar(at, means, width * 0.94, label=name, color=COLOURS[i % len(COLOURS)])
        axis.errorbar(at, means, np.maximum(spans, 0), fmt="none", ecolor="black", lw=0.8)
        for x, mean, top in zip(at, means, means + spans[1], strict=True):
            axis.annotate(f"{mean:.2g}", (x, max(top, mean)), (0, 2), fontsize=7, ha="center",
                          textcoords="offset points")
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * 1.5)
    axis.set_xticks(range(len(sites)), sites)
    axis.set_ylabel(f"{FIELD_LABELS[field]}\n{inspection.bits}-bit activations, log scale",
                    fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=len(series), loc="lower center",
                bbox_to_anchor=(0.5, 1.0), title="mean over layers; the line spans them",
                title_fontsize=8)
    return figure


def plot_overview(inspection: Inspection):
    """Heat maps of the peaks above, error bars below: the command's --picture."""
    layers = len({row.layer for row in inspection.rows})
    above = 1.6 + min(0.32 * max(layers, 4), 12)
    figure = _figure(max(7.5, 1.6 + 2.4 * (1 + len(inspection.methods))), above + 3.4)
    figure.suptitle(f"{inspection.model}: outliers before and after", fontsize=11)
    top, bottom = figure.subfigures(2, 1, height_ratios=[above, 3.4])
    plot_heatmaps(inspection, figure=top)
    plot_errors(inspection, figure=bottom)
    return figure


def plot_surface(inspection: Inspection):
    """The 3-D surface of |activation| over tokens and channels, before and after.

    All panels have the same z scale; a cell is the largest of its tokens and channels. Returns the
    Figure. ValueError for an inspection made without surface=True; ImportError without matplotlib.
    """
    surface = inspection.surface
    if surface is None:
        raise ValueError("surface: expected an inspection made with surface=True, found none")
    count = len(surface.panels)
    columns = count if count <= 3 else -(-count // 2)
    lines = -(-count // columns)
    figure = _figure(5.0 * columns, 0.35 + 3.85 * lines)
    room = 3.85 / (0.35 + 3.85 * lines)  # of the height, for a line of panels
    figure.set_layout_engine("none")  # it leaves 3-D axes too little room
    top = max(float(cells.max()) for _, cells in surface.panels) or 1.0
    for i, (name, cells) in enumerate(surface.panels):
        line, column = divmod(i, columns)
        place = ((column - 0.02) / columns, (lines - 1 - line) * room, 1 / columns, room)
        axis = figure.add_axes(place, projection="3d")
        _draw_surface(axis, surface, cells, top)
        axis.set_title(f"{name}: largest {cells.max():.3g}", fontsize=10, y=0.98)
    figure.suptitle(f"{inspection.model}, layer {surface.layer}, inputs of {surface.site}: "
                    f"|activation| of {surface.tokens} tokens (same z scale)", fontsize=11)
    return figure


def _draw_surface(axis, surface: Surface, cells: NDArray[np.float32], top: float) -> None:
    """One panel; a face has the colour of its highest corner, or thin peaks would look low."""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    cells = np.pad(cells, [(0, max(0, 2 - n)) for n in cells.shape], mode="edge")  # faces need two
    tokens, channels = ((np.arange(n) + 0.5) * length / n for n, length in
                        zip(cells.shape, (surface.tokens, surface.channels), strict=True))
    highest = np.maximum(cells[:-1], cells[1:])
    highest = np.maximum(highest[:, :-1], highest[:, 1:])
    colours = colormaps["cividis"](PowerNorm(0.5, 0, top)(highest))
    axis.plot_surface(*np.meshgrid(channels, tokens), cells, facecolors=colours, linewidth=0,
                      rcount=cells.shape[0], ccount=cells.shape[1], antialiased=False, shade=False)
    axis.set_zlim(0, top)
    axis.set_xlabel("channel", fontsize=9)
    axis.set_ylabel("token", fontsize=9)
    axis.set_zlabel("|activation|", fontsize=9, labelpad=1)
    axis.tick_params(labelsize=7, pad=1)
    axis.view_init(elev=26, azim=-58)
    axis.set_box_aspect((1.35, 1.0, 0.85), zoom=1.0)


def _check_field(field: str) -> None:
    if field not in FIELD_LABELS:
        raise ValueError(f"field: expected one of {', '.join(FIELD_LABELS)}, found {field!r}")
