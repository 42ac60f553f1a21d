"""Run large language models in 4 bits on the CPU: closed-form rotations, packed int4 kernels."""

from . import startup as _startup  # noqa: F401, I001 - signals from here on

import typing as _typing
import warnings as _warnings

from . import arrays
from ._C import FormatError, get_num_threads, set_num_threads
from .arrays import art, givens_angle, hadamard, linear, pack, rotate, unpack, urt
from .checkpoint.folder import Checkpoint, load_checkpoint
from .checkpoint.verify import verify_folder
from .config import QuantConfig
from .info import __version__, show_runtime
from .methods.solve import solve_rotations
from .progress import progress_bar
from .rotations import BlockRotation, Factor, LayerRotations, SiteRotation
from .runtime.model import Model
from .runtime.open import load
from .statistics import LayerStatistics, SiteStatistics
from .study.compare import CompareOptions, Comparison, compare
from .study.evaluate import Evaluation, evaluate, perplexity
from .study.inspect import Inspection, inspect_model
from .sweep.bits import assign_bits
from .sweep.calibrate import calibrate, load_statistics, save_statistics
from .sweep.estimate import Estimate, dry_run
from .sweep.export import export
from .sweep.layer import quantize
from .sweep.run import Summary, quantize_folder, save
from .sweep.texts import bundled_model, bundled_text, calibration_windows
from .weights import PackedLinear, QuantizedLayer

__all__ = [
    "BlockRotation",
    "Checkpoint",
    "CompareOptions",
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
    "assign_bits",
    "bundled_model",
    "bundled_text",
    "calibrate",
    "calibration_windows",
    "compare",
    "dry_run",
    "evaluate",
    "export",
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
    "progress_bar",
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
    "verify_folder",
]


if not _typing.TYPE_CHECKING:  # a type checker would take every misspelled name for one of these

    def __getattr__(name: str):
        if name == "calibration_tokens":
            _warnings.warn("singlequant.calibration_tokens is now singlequant.calibration_windows",
                           DeprecationWarning, stacklevel=2)
            return calibration_windows
        if name == "torch":  # of the extra, hence imported when it is asked for
            from .integrations import torch

            return torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
