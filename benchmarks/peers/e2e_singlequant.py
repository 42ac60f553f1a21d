"""Our own engine in end_to_end.py: a packed folder, or a 16-bit one through OpenBLAS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from e2e_worker import serve

TOKENS_PER_CALL = 2048  # as generation cuts its prompts


class SingleQuant:
    """KIND is ignored: the folder says what it holds."""

    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        import singlequant as sq

        sq.set_num_threads(threads)
        self.model = sq.load(folder)
        self.vocab = self.model.shape.vocab
        self.version = sq.__version__
        self.note = f"kernels {sq._C.kernels()['active']}"

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self.model.forward(tokens)

    def open(self, count: int, capacity: int) -> None:
        self.session = None  # the old cache goes before the new one comes
        self.session = self.model.new_session(count, capacity)

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        last = []
        step = max(1, TOKENS_PER_CALL // tokens.shape[1])
        for first in range(0, len(tokens), step):
            group = tokens[first : first + step]
            hidden = self.session.append(list(group), range(first, first + len(group)))
            last.append(hidden[tokens.shape[1] - 1 :: tokens.shape[1]])
        return self.model.logits(np.concatenate(last))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self.model.logits(self.session.append(list(tokens[:, None])))

    def rewind(self, length: int) -> None:
        self.session.lengths[:] = length

    def fill(self, tokens: np.ndarray) -> None:
        self.prefill(tokens)


if __name__ == "__main__":
    serve(SingleQuant)
