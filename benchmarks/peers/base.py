"""What the timed libraries share: one interface, int4 weights, the check of a result."""

import os

import numpy as np

KINDS = ("ours", "int4", "int8", "16-bit", "32-bit", "bound")
# Largest ||y - x W^T|| / ||x W^T|| on Gaussian data that rounding alone explains.
TOLERANCE = {"ours": 0.3, "int4": 0.2, "int8": 0.05, "16-bit": 0.02, "32-bit": 1e-4}


class Peer:
    """One way to multiply activations [m, k] by a weight [n, k] transposed.

    name, kind     as rows of the results have them; kind is one of KINDS
    activations    what happens to the float activations inside the timed call
    avx2           environment that holds the library to AVX2, or None where nothing does
    """

    name = kind = activations = ""
    avx2: dict[str, str] | None = None

    def __init__(self, threads: int) -> None:
        """Imports the library and sets its threads; an exception says why it cannot run here."""
        self.threads = threads

    def version(self) -> str:
        """Library, version and, where it tells, what it dispatches to."""
        raise NotImplementedError

    def weight_bytes(self, n: int, k: int) -> int:
        """Bytes that a product has to read of one packed weight."""
        raise NotImplementedError

    def prepare(self, weight: np.ndarray, copies: int) -> None:
        """Pack a float32 weight [n, k] so many times; calls walk round the copies."""
        raise NotImplementedError

    def load(self, x: np.ndarray) -> None:
        """Take float32 activations [m, k] for the calls to come."""
        raise NotImplementedError

    def run(self) -> float | None:
        """One product, by the next copy. Seconds where only a part of the call counts."""
        raise NotImplementedError

    def result(self) -> np.ndarray | None:
        """float32 [m, n] of the last call; None where there is none to check."""
        raise NotImplementedError


class Turn:
    """Walks round a list."""

    def __init__(self, items) -> None:
        self.items, self.next = list(items), 0

    def __call__(self):
        item = self.items[self.next]
        self.next = (self.next + 1) % len(self.items)
        return item


def held_to_avx2() -> bool:
    """Whether this process was asked to use AVX2 and nothing newer."""
    return os.environ.get("SINGLEQUANT_BENCH_ISA") == "avx2"


def round_int4(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int4 by rounding to nearest: codes int8 [n, k], scales float32 [n, k / group]."""
    n, k = weight.shape
    blocks = weight.reshape(n, k // group, group)
    scales = np.maximum(np.abs(blocks).max(axis=2) / 7, 1e-8).astype(np.float32)
    return np.rint(blocks / scales[:, :, None]).astype(np.int8).reshape(n, k), scales


def round_int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 per output: codes [n, k], scales [n]."""
    scales = np.maximum(np.abs(weight).max(axis=1) / 127, 1e-8).astype(np.float32)
    return np.rint(weight / scales[:, None]).astype(np.int8), scales


def nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., k / 2] of codes 0 .. 15 [..., k], the even ones in the low half."""
    codes = codes.astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4


def relative_error(y: np.ndarray, x: np.ndarray, weight: np.ndarray) -> float:
    """||y - x W^T|| / ||x W^T|| over at most 64 outputs from all over the weight."""
    rows = np.linspace(0, len(weight) - 1, min(64, len(weight))).astype(int)
    expected = x @ weight[rows].T
    return float(np.linalg.norm(y[:, rows] - expected) / np.linalg.norm(expected))
