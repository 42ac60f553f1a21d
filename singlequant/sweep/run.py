"""A folder in, a packed folder out: `quantize_folder`, and `save` for stages chained by hand."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.folder import Checkpoint, open_model
from ..config import KV_DTYPES, QuantConfig
from ..distributed import Workers
from ..export.card import Figures
from ..export.writer import ModelWriter, check_run
from ..files import MAX_LISTING_BYTES, folder_bytes, read_json
from ..html import facts_html, megabytes
from ..weights import QuantizedLayer
from .measure import PeakMemory, measure
from .prepare import check_outer, prepare
from .spread import Spread
from .sweep import Job, SiteCounts, sweep
from .texts import calibration_windows, token_digest, written_by_model, written_tokens


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
    kv_dtype: str = KV_DTYPES[0]  # the folder's; bfloat16 where calibration asked for it
    written_tokens: int = 0  # calibration tokens that the model wrote itself
    writing_seconds: float = 0.0
    table_bits: Mapping[str, int] = field(default_factory=dict)  # of embedding and head, below 16

    def __repr__(self) -> str:
        return (
            f"Summary({self.out.name!r}, {self.config.scheme}, {self.config.method}, "
            f"{self.bytes_before / 1e6:.1f} -> {self.bytes_after / 1e6:.1f} MB, "
            f"{self.seconds:.1f} s)"
        )

    def _repr_html_(self) -> str:
        config = self.config
        tables = "".join(f", {name} {bits}" for name, bits in self.table_bits.items())
        return facts_html("Quantized", {
            "folder": self.out,
            "scheme": f"{config.scheme}, method {config.method}, weights {config.weights}",
            "bits": f"{config.bits:.4g} a weight of the linears on average{tables}",
            "size": f"{megabytes(self.bytes_before)} → {megabytes(self.bytes_after)}",
            "time": f"{self.seconds:.1f} s: calibrate {self.calibration_seconds:.1f}, solve "
                    f"{self.solve_seconds:.1f}, quantize and pack {self.quantize_seconds:.1f}",
            "calibration": f"{self.calibration_tokens} tokens",
            "peak memory": f"{megabytes(self.peak_memory)} besides the mapped weights",
            "resumed": f"{self.resumed_layers} layers" if self.resumed_layers else None,
        }, bold=["size"])


def quantize_folder(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: QuantConfig | None = None,
    calibration: str | Path | None = None,
    *,
    resume: bool = False,
    recipe: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    writing: Callable[[int, int], None] | None = None,
    workers: Workers | None = None,
    check: Callable[[Path], Figures | None] | None = None,
) -> Summary:
    """Quantize a `save_pretrained` folder into a new folder `out`, in one sweep.

    model: the folder, or what `load_checkpoint` made of it.
    calibration: a text file; a bundled text otherwise. "self" has the unquantized model write the
    text, "mixed" half of it (`calibration_windows`). progress(layers done, layers) is called after
    each layer, writing(tokens done, tokens) as the model writes; an exception in them cancels.
    OUT appears only when whole; resume=True goes on behind the layers that an interrupted run of
    the same recipe left in OUT.partial. recipe: the recipe.json that config is from; ValueError
    when it was made of the same model, by the same choice of tokens, with another calibration text.
    workers: of `singlequant.distributed`, which make the layers; the bytes are the same. Seconds
    are then those of all workers together, and peak_memory is of this process.
    check(folder) measures the folder for its model card, before it is named OUT: `study.check`. The
    summary counts neither its time nor its memory.
    """
    config = config or QuantConfig()
    out, start = Path(out), time.perf_counter()
    with PeakMemory() as memory, contextlib.ExitStack() as stack:
        checkpoint = open_model(model)
        if not config.leaves_tables_open:
            config = config.settled(checkpoint.spec.tied)  # before a method unties the head
        check_run(out, checkpoint, config)
        check_outer(checkpoint)
        chosen = measure(calibration_windows, checkpoint, config, calibration, writing)
        windows = chosen.value
        if recipe is not None:
            _check_text(Path(recipe), checkpoint, config, token_digest(windows))
        prepared = measure(prepare, checkpoint, config, windows)
        spread, checked = None, _Check(check, memory)
        if workers is not None:
            spread = stack.enter_context(Spread(workers, out.parent, out.name))
        job = Job(config, out, resume=resume, check=checked)
        (outcome,) = sweep(prepared.value, windows, [job], progress=progress,
                           written=written_by_model(calibration), spread=spread)
    written, settled = written_tokens(calibration, windows), outcome.config or config
    return Summary(
        out=out,
        config=settled,
        seconds=time.perf_counter() - start - checked.seconds,
        calibration_seconds=outcome.seconds["calibrate"],
        solve_seconds=prepared.seconds + outcome.seconds["solve"],
        quantize_seconds=outcome.seconds["quantize"],
        calibration_tokens=int(windows.size),
        bytes_before=checkpoint.bytes_with_tokenizer,
        bytes_after=folder_bytes(out),
        peak_memory=checked.peak_memory,
        sites=tuple(sorted(outcome.sites, key=lambda site: site.layer)),
        resumed_layers=outcome.resumed_layers,
        kv_dtype=_kv_dtype(out),
        written_tokens=written,
        writing_seconds=chosen.seconds if written else 0.0,
        table_bits=settled.table_bits(checkpoint.spec),
    )


class _Check:
    """A job's check, if any: it remembers its seconds, and the peak of memory before it."""

    def __init__(self, check: Callable[[Path], Figures | None] | None, memory: PeakMemory) -> None:
        self._check, self._memory = check, memory
        self.seconds, self.peak_memory = 0.0, 0

    def __call__(self, folder: Path) -> Figures | None:
        self._memory.look()
        self.peak_memory = self._memory.peak
        measured = measure(lambda: self._check and self._check(folder))
        self.seconds = measured.seconds
        return measured.value


def save(
    layers: Iterable[QuantizedLayer],
    out: str | Path,
    checkpoint: Checkpoint,
    config: QuantConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write what `quantize` yields as a packed folder; OUT appears only when it is whole."""
    with ModelWriter(Path(out), checkpoint, config, resumable=False) as writer:
        for layer in layers:
            writer.write_layer(layer)
            if progress:
                progress(layer.index + 1, checkpoint.spec.layers)
        writer.finish()
    return Path(out)


def _kv_dtype(out: Path) -> str:
    """What a folder that was written asks for."""
    quantization = read_json(out / "config.json")["quantization_config"]
    return quantization.get("kv_dtype", KV_DTYPES[0])


def _check_text(recipe: Path, checkpoint: Checkpoint, config: QuantConfig, digest: str) -> None:
    """ValueError when a saved recipe of this model saw other tokens, chosen in the same way."""
    saved = read_json(recipe, MAX_LISTING_BYTES)
    used, provenance = saved.get("config"), saved.get("provenance")
    if not isinstance(used, dict) or not isinstance(provenance, dict):
        return  # options alone, as people write them
    same = (saved.get("source_sha256") == checkpoint.fingerprint
            and QuantConfig.from_json(used).sample == config.sample)
    found = provenance.get("calibration_sha256", digest)
    if same and found != digest:
        advice = "pass the same --calibration"
        if (word := written_by_model(provenance.get("calibration"))) is not None:
            advice = (f"pass --calibration {word}, on a machine with the same kernels: others "
                      f"write another text")
        raise ValueError(
            f"{recipe}: it was made with another calibration text (sha256 {found!s:.64}); {advice}"
        )
