"""The whole thing on the bundled model: quantize, compare, draw, write."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from ..checkpoint.folder import load_checkpoint
from ..config import QuantConfig
from ..files import check_file, folder_bytes, require_matplotlib, save_figure
from ..methods.solve import solve_site
from ..rotations import SiteRotation
from ..runtime.open import load
from ..statistics import SiteStatistics
from ..sweep.calibrate import calibrate
from ..sweep.run import quantize_folder
from ..sweep.texts import bundled_model, bundled_text, calibration_windows
from .evaluate import perplexity
from .inspect.channels import plot_channels

EQUAL = {"weights": "rtn", "clip": 1.0, "bits": 4.0}  # plain rounding, for all but the defaults
RUNS = (
    QuantConfig("w4a4", "none", **EQUAL),
    QuantConfig("w4a4", "hadamard", **EQUAL),
    QuantConfig("w4a4", "singlequant", **EQUAL),
    QuantConfig("w4a4"),
    QuantConfig("w4a8"),
)
SEQ_LEN = 256
EVALUATED_TOKENS = 8192
PROMPT = "This function"
NEW_TOKENS = 40


def demo(picture: Path) -> None:
    """Print one table and one sentence, save one picture of activations before and after."""
    check_file(picture)
    source = bundled_model()
    original = load(source)
    tokens = original.encode(bundled_text("heldout"))[:EVALUATED_TOKENS]
    print(f"{original!r}: activations with outlier channels, as in large models\n")
    before = perplexity(original, tokens, SEQ_LEN)
    print("scheme  method       weights  perplexity  KL to original   size MB   quantized in s")
    print(f"{'16-bit':<7} {'original':<12} {'':<7} {before.perplexity:>11.3f}  {0:>14.5f}  "
          f"{folder_bytes(source) / 1e6:>8.2f}")
    with tempfile.TemporaryDirectory() as folder:
        for i, config in enumerate(RUNS):
            out = Path(folder) / str(i)
            summary = quantize_folder(source, out, config)
            quantized = load(out)
            result = perplexity(quantized, tokens, SEQ_LEN, reference=original)
            print(f"{config.scheme:<7} {config.method:<12} {config.weights:<7} "
                  f"{result.perplexity:>11.3f}  {result.kl_mean:>14.5f}  "
                  f"{summary.bytes_after / 1e6:>8.2f}   {summary.seconds:>14.2f}")
            if config == QuantConfig():
                text = quantized.generate(PROMPT, max_new_tokens=NEW_TOKENS, temperature=0.6,
                                          top_k=20, seed=1)
    written = " ".join(f"{PROMPT}{text}".split())
    print(f"\nW4A8 writes: {written}\n")
    print(draw(source, picture))


def worst_site(source: Path) -> tuple[str, SiteStatistics, SiteRotation]:
    """The site whose channels differ most in size: its name, statistics and rotation."""
    checkpoint = load_checkpoint(source)
    found = None
    for layer in calibrate(checkpoint, calibration_windows(checkpoint, QuantConfig())):
        for name, site in layer.sites.items():
            ratio = site.rms.max() / np.median(site.rms)
            if found is None or ratio > found[0]:
                found = ratio, f"layer {layer.index}, inputs of {name}", site
    _, name, site = found
    return name, site, solve_site(site)


def draw(source: Path, picture: Path) -> str:
    """Save the picture; returns the line to print."""
    try:
        require_matplotlib()
    except ImportError as error:
        return f"no picture: {error}"
    name, site, rotation = worst_site(source)
    save_figure(plot_channels(site, rotation, name), picture, dpi=120)
    return f"picture: {picture}"
