# ruff: noqa: I001
"""Run large language models in 4 bits on the CPU: closed-form rotations, packed int4 kernels."""

from . import arrays
from ._C import FormatError, get_num_threads, set_num_threads
from .config import QuantConfig
from .rotations import BlockRotation, Factor, LayerRotations, SiteRotation
from .statistics import LayerStatistics, SiteStatistics
from .weights import PackedLinear, QuantizedLayer
from .sweep.calibrate import calibrate, calibration_windows, load_statistics, save_statistics
from .checkpoint.folder import Checkpoint, load_checkpoint
from .study.compare import Comparison, compare
from .study.evaluate import Evaluation, evaluate
from .info import __version__, show_runtime
from .study.inspect import Inspection, inspect_model
from .sweep.layer import quantize
from .methods.solve import solve_rotations
from .runtime.model import Model
from .sweep.run import (
    Estimate,
    Summary,
    bundled_model,
    bundled_text,
    calibration_tokens,
    dry_run,
    load,
    perplexity,
    quantize_folder,
    save,
)

# Last: `rotate` and `pack` are functions here, and stage modules of the same name when imported.
from .arrays import art, givens_angle, hadamard, linear, pack, rotate, unpack, urt

__all__ = [
    "BlockRotation",
    "Checkpoint",
    "Comparison",
    "Estimate",
    "Evaluation",
    "Factor",
    "FormatError",
    "Inspection",
    "LayerRotations",
    "LayerStatistics",
    "Model",
    "PackedLinear",
    "QuantConfig",
    "QuantizedLayer",
    "SiteRotation",
    "SiteStatistics",
    "Summary",
    "__version__",
    "arrays",
    "art",
    "bundled_model",
    "bundled_text",
    "calibrate",
    "calibration_tokens",
    "calibration_windows",
    "compare",
    "dry_run",
    "evaluate",
    "get_num_threads",
    "givens_angle",
    "hadamard",
    "inspect_model",
    "linear",
    "load",
    "load_checkpoint",
    "load_statistics",
    "pack",
    "perplexity",
    "quantize",
    "quantize_folder",
    "rotate",
    "save",
    "save_statistics",
    "set_num_threads",
    "show_runtime",
    "solve_rotations",
    "unpack",
    "urt",
]
