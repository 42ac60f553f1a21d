"""The one sweep: folder -> calibrate, solve, rotate, quantize, pack -> folder, layer by layer."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from .. import _C
from ..checkpoint.folder import Checkpoint, load_checkpoint
from ..checkpoint.views import ResidualCheckpoint, ValueCheckpoint
from ..config import QuantConfig
from ..export.writer import ModelWriter, check_run, estimate_size
from ..files import read_json
from ..info import __version__
from ..methods.registry import METHODS
from ..methods.solve import solve_layer
from ..rotations import LayerRotations
from ..rows import require_finite
from ..runtime.model import Model
from ..statistics import LayerStatistics
from ..study.evaluate import Evaluation, evaluate
from ..weights import QuantizedLayer, norm_tensors
from .calibrate import WINDOW, calibrate, calibration_windows
from .layer import quantize_layer

View = Checkpoint | ResidualCheckpoint | ValueCheckpoint

BUNDLED_MODEL = "stdlib-llama"


def bundled_model() -> Path:
    """Folder of the small model that travels with the package."""
    return Path(str(resources.files("singlequant") / "data" / BUNDLED_MODEL))


def bundled_text(name: str) -> str:
    """The bundled "calibration" or "heldout" text."""
    return (resources.files("singlequant") / "data" / f"{name}.txt").read_text("utf-8")


def read_text(path: str | Path) -> str:
    """A text file as UTF-8. ValueError that names the file when it is empty or not UTF-8."""
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise ValueError(f"{path}: expected UTF-8 text, found {found}") from None
    if not text.strip():
        raise ValueError(f"{path}: expected text, found an empty file")
    return text


class PeakMemory:
    """Largest anonymous memory of this process while the context is open, in bytes.

    Read from /proc/self/status every few milliseconds; file-backed pages (the mapped weights) do
    not count. 0 where the file is missing.
    """

    INTERVAL_SECONDS = 0.01

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = self._read()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._read())

    def _watch(self) -> None:
        while not self._stop.wait(self.INTERVAL_SECONDS):
            self.peak = max(self.peak, self._read())

    @staticmethod
    def _read() -> int:
        try:
            with open("/proc/self/status") as file:
                for line in file:
                    if line.startswith("RssAnon:"):
                        return int(line.split()[1]) * 1024
        except OSError:
            pass
        return 0


@dataclass(frozen=True)
class SiteCounts:
    """What the solver did at one site: Kronecker sizes (or blocks and their size), numbers of
    Givens rotations, whether a balance is folded, and inputs that keep 8 bits."""

    layer: int
    site: str
    k1: int
    k2: int
    art_steps: int
    urt_steps: int
    sweep_rotations: int
    balanced: bool
    high: int


@dataclass(frozen=True)
class Summary:
    """What a sweep did and what it cost. Sizes in bytes; sites are of the layers done now."""

    out: Path
    config: QuantConfig
    seconds: float
    calibration_seconds: float
    solve_seconds: float
    quantize_seconds: float
    calibration_tokens: int
    bytes_before: int
    bytes_after: int
    peak_memory: int
    sites: tuple[SiteCounts, ...]
    resumed_layers: int  # taken over from the run that was interrupted

    def __repr__(self) -> str:
        return (
            f"Summary({self.out.name!r}, {self.config.scheme}, {self.config.method}, "
            f"{self.bytes_before / 1e6:.1f} -> {self.bytes_after / 1e6:.1f} MB, "
            f"{self.seconds:.1f} s)"
        )


class _Clock:
    """Seconds spent in each stage."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start


def prepare(checkpoint: Checkpoint, config: QuantConfig, windows: np.ndarray) -> View:
    """The checkpoint as config sees it: with its residual stream rotated, or as it is.

    With kv_bits below 16 its value heads are rotated in any case: by the method, or by a Hadamard.
    windows: the calibration tokens, which a method may learn on.
    """
    method = METHODS[config.method]
    if method.residual:
        return method.implementation().prepare(checkpoint, config, windows)
    return checkpoint if config.kv_bits == 16 else ValueCheckpoint(checkpoint)


def solve(view: View, statistics: LayerStatistics, config: QuantConfig) -> LayerRotations:
    """One layer's transformations under config, for statistics of what `prepare` returned."""
    return solve_layer(statistics, config)


def quantize_folder(
    model: str | Path,
    out: str | Path,
    config: QuantConfig | None = None,
    calibration: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
    recipe: str | Path | None = None,
) -> Summary:
    """Quantize a `save_pretrained` folder into a new folder `out`, in one sweep.

    calibration: a text file; a bundled text otherwise. progress(layers done, layers) is called
    after each layer; an exception in it cancels. OUT appears only when whole; resume=True goes
    on behind the layers that an interrupted run of the same recipe left in OUT.partial. recipe:
    the recipe.json that config is from; ValueError when it was made of the same model, by the same
    choice of tokens, with another calibration text.
    """
    config = config or QuantConfig()
    start = time.perf_counter()
    with PeakMemory() as memory:
        checkpoint = load_checkpoint(model)
        check_run(Path(out), checkpoint, config)
        windows = calibration_tokens(checkpoint, config, calibration)
        digest = hashlib.sha256(np.ascontiguousarray(windows)).hexdigest()
        if recipe is not None:
            _check_text(Path(recipe), checkpoint, config, digest)
        check_outer(checkpoint)
        clock, counts = _Clock(), []
        with clock.measure("solve"):
            view = prepare(checkpoint, config, windows)
        provenance = {"version": __version__, "calibration_sha256": digest}
        with ModelWriter(
            Path(out), view, config, resume=resume, provenance=provenance
        ) as writer:
            done = writer.finished_layers()
            layers = calibrate(view, windows, progress=progress, skip=done,
                               keep_inputs=config.weights == "gptq")
            while True:
                with clock.measure("calibrate"):
                    statistics = next(layers, None)
                if statistics is None:
                    break
                read_ahead(checkpoint, statistics.index + 1)
                with clock.measure("solve"):
                    rotations = solve(view, statistics, config)
                with clock.measure("quantize"):
                    layer = quantize_layer(view, rotations, config)
                    writer.write_layer(layer)
                counts += _counts(layer)
                del statistics, rotations, layer  # with its inputs, before the next layer's
            writer.finish()
    return Summary(
        out=Path(out),
        config=config,
        seconds=time.perf_counter() - start,
        calibration_seconds=clock.seconds["calibrate"],
        solve_seconds=clock.seconds["solve"],
        quantize_seconds=clock.seconds["quantize"],
        calibration_tokens=int(windows.size),
        bytes_before=folder_bytes(checkpoint.path),
        bytes_after=folder_bytes(Path(out)),
        peak_memory=memory.peak,
        sites=tuple(counts),
        resumed_layers=len(done),
    )


def save(
    layers: Iterable[QuantizedLayer],
    out: str | Path,
    checkpoint: Checkpoint,
    config: QuantConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write what `quantize` yields as a packed folder; OUT appears only when it is whole."""
    with ModelWriter(Path(out), checkpoint, config) as writer:
        for layer in layers:
            writer.write_layer(layer)
            if progress:
                progress(layer.index + 1, checkpoint.spec.layers)
        writer.finish()
    return Path(out)


def read_ahead(checkpoint: Checkpoint, index: int) -> threading.Thread | None:
    """Start reading layer `index` into the page cache, beside the work; None behind the last.

    Takes no memory of the process: the pages are the file's own, and the system's to drop.
    """
    if index >= checkpoint.spec.layers:
        return None
    weights = [linear.weight for linear in checkpoint.layer(index).linears.values()]

    def advise() -> None:
        for weight in weights:
            _C.will_need(weight)

    thread = threading.Thread(target=advise, daemon=True)
    thread.start()
    return thread


def folder_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir() if f.is_file())


def _check_text(recipe: Path, checkpoint: Checkpoint, config: QuantConfig, digest: str) -> None:
    """ValueError when a saved recipe of this model saw other tokens, chosen in the same way."""
    saved = read_json(recipe)
    used, provenance = saved.get("config"), saved.get("provenance")
    if not isinstance(used, dict) or not isinstance(provenance, dict):
        return  # options alone, as people write them
    same = saved.get("source_sha256") == checkpoint.fingerprint and all(
        used.get(key) == getattr(config, key) for key in ("calibration_tokens", "seed")
    )
    found = provenance.get("calibration_sha256", digest)
    if same and found != digest:
        raise ValueError(
            f"{recipe}: it was made with another calibration text (sha256 {found!s:.64}); pass the "
            f"same --calibration"
        )


def _counts(layer: QuantizedLayer) -> list[SiteCounts]:
    return [
        SiteCounts(layer.index, name, *r.sizes, *map(r.givens_count, ("ART", "URT", "sweep")),
                   r.balance is not None, layer.high.get(name, 0))
        for name, r in layer.rotations.items()
    ]


def check_outer(checkpoint: Checkpoint) -> None:
    """ValueError when the embedding, the last norm or the head holds NaN or Inf."""
    spec, norm = checkpoint.spec, checkpoint.final_norm
    require_finite(checkpoint.embedding, f"{spec.embed}.weight")
    for name, tensor in norm_tensors(norm).items():
        require_finite(tensor, name)
    if not spec.tied:
        require_finite(checkpoint.head, f"{spec.head}.weight")


def calibration_tokens(
    checkpoint: Checkpoint, config: QuantConfig, calibration: str | Path | None = None
) -> np.ndarray:
    """Calibration windows [count, length] of a text file, or of the bundled text."""
    text = bundled_text("calibration") if calibration is None else read_text(calibration)
    ids = checkpoint.encode(text)
    window = min(WINDOW, checkpoint.spec.max_position_embeddings)
    try:
        return calibration_windows(ids, config.calibration_tokens, window, config.seed)
    except ValueError as error:
        raise ValueError(f"{calibration or 'bundled text'}: {error}") from None


@dataclass(frozen=True)
class Estimate:
    """What a sweep would make and take: bytes within a few percent, seconds from one layer."""

    bytes_before: int
    bytes_after: int
    seconds: float
    peak_memory: int


def dry_run(
    model: str | Path, config: QuantConfig | None = None, calibration: str | Path | None = None
) -> Estimate:
    """Process the first layer, write nothing, and scale up."""
    config = config or QuantConfig()
    checkpoint = load_checkpoint(model)
    check_run(None, checkpoint, config)
    windows = calibration_tokens(checkpoint, config, calibration)
    with PeakMemory() as memory:
        start = time.perf_counter()
        view = prepare(checkpoint, config, windows)
        prepared = time.perf_counter()
        statistics = next(calibrate(view, windows, keep_inputs=config.weights == "gptq"))
        quantize_layer(view, solve(view, statistics, config), config)
        layers = (time.perf_counter() - prepared) * checkpoint.spec.layers
    return Estimate(folder_bytes(checkpoint.path), estimate_size(view, config),
                    prepared - start + layers, memory.peak)


def load(path: str | Path, kv_bits: int | None = None) -> Model:
    """A folder, quantized or not, ready to run. FormatError names what is wrong with it.

    kv_bits: bits of cached keys and values in place of the folder's own; see `Model`.
    """
    return Model(load_checkpoint(path), kv_bits)


def default_seq_len(model: Model) -> int:
    """Tokens of an evaluation window where none are asked: the model's maximum, 2048 at most."""
    return min(2048, model.spec.max_position_embeddings)


def perplexity(
    model: Model,
    text: str | np.ndarray,
    seq_len: int | None = None,
    reference: Model | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity on a text or on token ids, by the protocol of GPTQ and QuaRot.

    The text is tokenized once and cut into windows of seq_len tokens (default: the model's maximum,
    2048 at most) without overlap; see `evaluate`. reference: a model with the same vocabulary, for
    the divergences. ValueError when the text is shorter than a window.
    """
    tokens = model.encode(text) if isinstance(text, str) else np.asarray(text, np.int64)
    seq_len = default_seq_len(model) if seq_len is None else seq_len
    if reference is not None and reference.spec.vocab != model.spec.vocab:
        raise ValueError(f"reference: expected a vocabulary of {model.spec.vocab}, "
                         f"got {reference.spec.vocab}")
    return evaluate(model, tokens, seq_len, reference, progress)
