"""The package's version and what it runs on."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata

import numpy as np

from . import _C

__version__ = metadata.version("singlequant")


def runtime_info() -> dict[str, object]:
    """What matters in a bug report: kernels, and why better ones are off, threads, BLAS, versions.

    Disabled kernels are those switched off through SINGLEQUANT_DISABLE_CPU.
    """
    kernels = _C.kernels()
    return {
        "singlequant": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "kernels": kernels["active"],
        "kernels compiled": ", ".join(kernels["compiled"]),
        "kernels runnable": ", ".join(kernels["runnable"]),
        "kernels not runnable": ", ".join(
            f"{table} (CPU or OS lacks {', '.join(features)})"
            for table, features in kernels["missing"].items()
        ) or "none",
        "kernels disabled": ", ".join(kernels["disabled"]) or "none",
        "threads": _C.get_num_threads(),
        "blas": _C.blas_info(),
    }


def machine_info() -> dict[str, object]:
    """What a reader needs to judge measured figures. The load is the machine's at this moment."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": _C.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "system": platform.platform(),
        "singlequant": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": _C.blas_info(),
        "kernels": _C.kernels(),
    }


def cpu_name() -> str:
    """The CPU as /proc/cpuinfo names it; "unknown" elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown"


def show_runtime() -> None:
    """Print `runtime_info`, a line each."""
    info = runtime_info()
    width = max(map(len, info))
    for key, value in info.items():
        print(f"{key:<{width}} {value}")
