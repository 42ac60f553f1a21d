"""ik_llama.cpp in end_to_end.py, through its C interface; KIND is the type of the GGUF file.

IK_LLAMA_CPP names its source folder, with a build of its library under build/ (README.md). A small
C file is compiled against its header. The GGUF files are those of llama.cpp's engine. Its runtime
repacking is on, which makes its fastest formats while a file is loaded. Its cache is one of all
sequences, in the default 16 bits, with flash attention, its defaults.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from .e2e_llama_cpp import MICRO_BATCH, LlamaCpp
from .e2e_worker import serve
from .gguf_files import gguf_file

SOURCE = Path(__file__).with_name("ik_llama.c")
FOLDER = "IK_LLAMA_CPP"


def build(root: Path) -> ctypes.CDLL:
    """The shim of SOURCE, compiled and loaded. ModuleNotFoundError without a built library."""
    libraries = {path.parent for name in ("libllama.so", "libggml.so")
                 for path in sorted((root / "build").rglob(name))}
    if not (root / "include" / "llama.h").is_file() or not libraries:
        raise ModuleNotFoundError(f"{FOLDER}={root}: expected the sources of ik_llama.cpp with "
                                  "build/**/libllama.so")
    with tempfile.TemporaryDirectory() as work:
        shim = Path(work) / "ik_llama.so"
        command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", str(SOURCE), "-o",
                   str(shim), f"-I{root / 'include'}", f"-I{root / 'ggml' / 'include'}"]
        for folder in sorted(libraries):
            command += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
        subprocess.run([*command, "-lllama", "-lggml"], check=True)
        library = ctypes.CDLL(str(shim))
    library.ik_run.restype = ctypes.POINTER(ctypes.c_float)
    library.ik_info.restype = ctypes.c_char_p
    return library


class IkLlama(LlamaCpp):
    """What it asks is what llama.cpp is asked; how the library is called is its own."""

    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        root = os.environ.get(FOLDER)
        if not root:
            raise ModuleNotFoundError(f"{FOLDER} names no folder with ik_llama.cpp")
        self.threads = threads
        self.library = build(Path(root).resolve())
        path = gguf_file(folder, kind, threads)
        if self.library.ik_load(bytes(path)):
            raise RuntimeError(f"ik_llama.cpp does not load {path}")
        self.vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
        commit = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], text=True,
                                capture_output=True, check=False).stdout.strip()
        self.version = f"ik_llama.cpp {commit or 'of unknown commit'}"
        said = self.library.ik_info().decode().split("|")
        has = [name.strip().removesuffix(" = 1") for name in said if " = 1" in name]
        self.note = "built for " + " | ".join(has)

    def open(self, count: int, capacity: int) -> None:
        if self.library.ik_open(count, capacity, MICRO_BATCH, self.threads):
            raise RuntimeError(f"ik_llama.cpp refuses {count} sequences of {capacity} tokens")
        self.length = 0

    def run(self, tokens: np.ndarray, every: bool) -> np.ndarray:
        """Logits [count, vocab] of the last tokens, or of all [count * length, vocab]."""
        count, length = tokens.shape
        given = np.ascontiguousarray(tokens, np.int32)
        found = self.library.ik_run(given.ctypes.data_as(ctypes.c_void_p), count, length,
                                    self.length, int(every))
        if not found:
            raise RuntimeError("ik_llama.cpp refuses the tokens")
        self.length += length
        return np.ctypeslib.as_array(found, (tokens.size if every else count, self.vocab))

    def rewind(self, length: int) -> None:
        self.library.ik_rewind(length)
        self.length = length

    def fill(self, tokens: np.ndarray) -> None:
        self.run(tokens[:1], False)
        self.library.ik_spread(len(tokens))


if __name__ == "__main__":
    serve(IkLlama)
