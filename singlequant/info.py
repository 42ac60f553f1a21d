"""The version of the package, and descriptions of the machine that it runs on."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib import metadata

import numpy as np

from . import _C

__version__ = metadata.version("singlequant")


def kernel_names() -> dict[str, str]:
    """The kernels whose sums the results depend on: this package's table, and BLAS."""
    return {"table": str(_C.kernels()["active"]), "blas": str(_C.blas_info())}


def runtime_info() -> dict[str, object]:
    """The facts that a bug report needs: versions, CPU, kernel tables, threads and BLAS.

    "kernels" is the active table. "kernels not runnable" says which features the CPU or the
    operating system lacks. "kernels disabled" are those that SINGLEQUANT_DISABLE_CPU switches off.
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
    """The facts that a reader needs to judge measured figures, among them the current load."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cpus": len(own_cpus()) or os.cpu_count(),
        "threads": _C.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "system": platform.platform(),
        "singlequant": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": _C.blas_info(),
        "kernels": _C.kernels(),
    }


def own_cpus() -> list[int]:
    """The CPUs that this process may use, in order; none where the system does not bind any."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []


def cpu_name() -> str:
    """The name of the CPU in /proc/cpuinfo, or "unknown" if there is none."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown"


def show_runtime() -> None:
    """Print each entry of `runtime_info` on a line of its own."""
    info = runtime_info()
    width = max(map(len, info))
    for key, value in info.items():
        print(f"{key:<{width}} {value}")
