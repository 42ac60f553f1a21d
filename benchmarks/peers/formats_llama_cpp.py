"""llama.cpp in formats_side_by_side.py: its quantizer, and its logits of given windows.

The command line is FOLDER WORK CPUS: GGUF files are made in WORK and kept.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from . import serving
from .e2e_llama_cpp import LlamaCpp


class Formats:
    """One file after the other of a folder's weights."""

    def __init__(self, folder: Path, work: Path, threads: int) -> None:
        import llama_cpp

        self.folder, self.work, self.threads = folder, work, threads
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self.engine: LlamaCpp | None = None

    def open(self, kind: str, importance: str | None = None) -> dict:
        """Make the file of a type unless it is there, and load it. seconds: of both."""
        start = time.perf_counter()
        self.engine = None
        self.engine = LlamaCpp(self.folder, kind, self.threads, self.work,
                               None if importance is None else Path(importance))
        return {"path": str(self.engine.path), "seconds": time.perf_counter() - start}

    def logits(self, windows: str, out: str) -> dict:
        """Write the float32 logits [count, length, vocab] of a file's windows [count, length]."""
        tokens = np.load(windows)
        found = self.engine.logits(tokens)
        np.save(out, found.reshape(*tokens.shape, -1).astype(np.float32, copy=False))
        return {}


if __name__ == "__main__":
    folder, work, cpus = sys.argv[1:]
    serving.serve(lambda: Formats(Path(folder), Path(work), len(cpus.split(","))),
                  lambda worker: {"version": worker.version}, cpus)
