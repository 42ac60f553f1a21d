"""llama.cpp in end_to_end.py, through llama-cpp-python's C interface; KIND is the file's type.

The folder's weights go into a GGUF file beside it, which llama.cpp's own quantizer turns into the
other types: the files are made once and kept. The cache has a stream per sequence, as a server for
many users has it, in the default 16 bits; flash attention is left to llama.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from .e2e_worker import serve
from .gguf_files import gguf_file

MICRO_BATCH = 512  # llama.cpp's default n_ubatch


class LlamaCpp:
    def __init__(self, folder: Path, kind: str, threads: int, work: Path | None = None,
                 importance: Path | None = None) -> None:
        """kind: a type, or the name of a file. work: where the GGUF files are kept, beside the
        folder by default. importance: as for `gguf_file`."""
        import llama_cpp

        self.c, self.threads = llama_cpp, threads
        llama_cpp.llama_backend_init()
        given = kind.endswith(".gguf")
        path = Path(kind) if given else gguf_file(folder, kind, threads, work, importance)
        self.model = llama_cpp.llama_model_load_from_file(
            bytes(path), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.path = path
        self.vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        features = llama_cpp.llama_print_system_info().decode().partition("AVX2")
        self.note = "built for " + " ".join((features[1] + features[2]).replace(" = 1", "").split())
        self.context = self.batch = None

    def open(self, count: int, capacity: int) -> None:
        c = self.c
        if self.context:
            c.llama_free(self.context)
            c.llama_batch_free(self.batch)
        options = c.llama_context_default_params()
        # a stream's share of the context is rounded up to 256 cells
        options.n_ctx = count * -(-capacity // 256) * 256
        options.n_batch = count * capacity
        options.n_ubatch = min(MICRO_BATCH, count * capacity)
        options.n_seq_max = count
        options.n_threads = options.n_threads_batch = self.threads
        options.kv_unified = False
        self.context = c.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp refuses {count} sequences of {capacity} tokens")
        self.memory = c.llama_get_memory(self.context)
        self.batch = c.llama_batch_init(count * capacity, 0, 1)
        self.length = 0

    def run(self, tokens: np.ndarray, every: bool) -> np.ndarray:
        """Logits [count, vocab] of the last tokens, or of all [count * length, vocab]."""
        count, length = tokens.shape
        batch, total = self.batch, tokens.size
        batch.n_tokens = total
        positions = np.tile(np.arange(self.length, self.length + length, dtype=np.int32), count)
        wanted = np.zeros((count, length), np.int8)
        wanted[:, 0 if every else length - 1 :] = 1
        as_array = np.ctypeslib.as_array
        as_array(batch.token, (total,))[:] = tokens.reshape(-1)
        as_array(batch.pos, (total,))[:] = positions
        as_array(batch.logits, (total,))[:] = wanted.reshape(-1)
        as_array(batch.n_seq_id, (total,))[:] = 1
        for token, sequence in enumerate(np.repeat(np.arange(count), length).tolist()):
            batch.seq_id[token][0] = sequence
        status = self.c.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode: status {status}")
        self.length += length
        rows = total if every else count
        # the first access waits for the computation
        return as_array(self.c.llama_get_logits(self.context), (rows, self.vocab))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        self.open(*tokens.shape)
        return self.run(tokens, True).copy()

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        return self.run(tokens, False)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self.run(tokens[:, None], False)

    def rewind(self, length: int) -> None:
        if length == 0:
            self.c.llama_memory_clear(self.memory, False)
        else:
            self.c.llama_memory_seq_rm(self.memory, -1, length, -1)
        self.length = length

    def fill(self, tokens: np.ndarray) -> None:
        self.run(tokens[:1], False)
        for sequence in range(1, len(tokens)):
            self.c.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)


if __name__ == "__main__":
    serve(LlamaCpp)
