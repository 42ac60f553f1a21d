# SPDX-License-Identifier: Apache-2.0
"""A folder, quantized or not -> logits of whole windows, with one layer in memory at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..config import KV_BITS, KV_DTYPES, KV_FLOAT16_LEAST
from ..rows import token_ids
from .layers import build_layer, flat_positions, new_cache
from .outer import Outer

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint

FAINT_TOKENS = 16  # of a sequence, by which keys and values are judged


class WindowModel:
    """A decoder that runs whole windows: a layer is built when they come to it, and dropped behind.

    For a model that is run once. `Model` has the same hidden states and logits, keeps its layers,
    and decodes. kv_bits, kv_hadamard, kv_dtype: as for `Model`.
    """

    def __init__(
        self, checkpoint: Checkpoint, kv_bits: int | None = None, kv_hadamard: bool = True,
        kv_dtype: str | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.kv_bits = own_kv_bits(checkpoint) if kv_bits is None else kv_bits
        if not isinstance(self.kv_bits, (int, np.integer)) or self.kv_bits not in (*KV_BITS, 32):
            raise ValueError(f"kv_bits: expected one of {', '.join(map(str, KV_BITS))}, 32, "
                             f"found {kv_bits!r}")
        self.kv_hadamard = kv_hadamard
        self.kv_dtype = own_kv_dtype(checkpoint) if kv_dtype is None else kv_dtype
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype: expected one of {', '.join(KV_DTYPES)}, "
                             f"found {kv_dtype!r}")
        self._clamp_told = False
        # a quantized folder's type is that of its calibration
        self._faint_known = checkpoint.quantized or self.kv_bits == 32 or self.kv_dtype != "float16"
        self.spec = checkpoint.spec
        config = checkpoint.quant_config  # an unquantized head has no use for these bits
        self.outer = Outer(checkpoint, 16 if config is None else config.head_input_bits)

    def layer(self, index: int) -> _C.DecoderLayer:
        """A layer, built now."""
        _C.trim_heap()  # what the layer before left in pieces
        return build_layer(self.checkpoint, index)

    def hidden_states(self, windows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Final hidden states [count, length, hidden], after the last norm, of windows of tokens.

        ValueError when a token id is outside the vocabulary.
        """
        *_, (_, hidden) = self._states(windows)
        return self.outer.finish(hidden).reshape(*np.shape(windows), -1)

    def first_not_finite(self, windows: NDArray[np.int64]) -> str | None:
        """Where activations of windows first have NaN or Inf: "embedding", "layer 3"; else None."""
        for index, hidden in self._states(windows):
            if not np.isfinite(hidden).all():
                return "embedding" if index < 0 else f"layer {index}"
        return None

    def _states(self, windows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Index and hidden states [count * length, hidden]: the embedding's, -1, and each layer's,
        in one array."""
        windows = token_ids(windows, "windows")
        if windows.ndim != 2:
            raise ValueError(f"windows: expected 2 dimensions (count, length), got {windows.ndim}")
        count, length = windows.shape
        sequence, position = flat_positions(np.full(count, length))
        hidden = self.outer.embed(windows.reshape(-1), position)
        yield -1, hidden
        # one layer's keys and values at a time: nothing is decoded after these windows
        cache = self.new_cache(count, length, layers=1)
        for index in range(self.spec.layers):
            self.layer(index).forward(hidden, sequence, position, cache, 0)
            self.warn_of_clamped(cache, f"layer {index}: ")
            if count and self._must_judge(length):
                self._judge(cache, index, 0, 0)
            yield index, hidden
        self._faint_known |= count > 0 and length >= FAINT_TOKENS

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [..., vocab] of final hidden states, as `hidden_states` returns them.

        With a head in 16 bits or less a row's are the same bits whatever rows come with it.
        """
        return self.outer.logits(hidden)

    def forward(self, windows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [count, length, vocab] of windows of tokens [count, length]."""
        return self.logits(self.hidden_states(windows))

    def new_cache(
        self, sequences: int, capacity: int, limit: int = 0, layers: int | None = None
    ) -> _C.KVCache:
        """An empty cache of the model's kv_bits, for all layers by default; see `Session`."""
        layers = self.spec.layers if layers is None else layers
        return new_cache(self.spec, layers, sequences, capacity, self.kv_bits, self.kv_hadamard,
                         limit, self.kv_dtype == "bfloat16")

    def warn_of_clamped(self, cache: _C.KVCache, where: str = "") -> None:
        """A RuntimeWarning if a cache of the model has clamped numbers and none was given yet."""
        if cache.clamped and not self._clamp_told:
            self._clamp_told = True
            warnings.warn(
                f"{self.checkpoint.path.name}: {where}{cache.clamped} keys and values are beyond "
                f"the range of {self.kv_dtype} and were clamped (the largest is "
                f"{cache.largest:.4g}): run it with 32 KV bits (--kv-bits 32) or with "
                f"kv_dtype='bfloat16'", RuntimeWarning, stacklevel=3)

    def warn_of_faint(self, cache: _C.KVCache, sequence: int, length: int) -> None:
        """A RuntimeWarning if all keys or values of a layer are too small for float16, by the first
        sequence of some tokens that the model decodes."""
        if self._must_judge(length):
            for index in range(self.spec.layers):
                self._judge(cache, index, index, sequence)
            self._faint_known = True

    def _must_judge(self, length: int) -> bool:
        return length >= FAINT_TOKENS and not self._faint_known

    def _judge(self, cache: _C.KVCache, index: int, place: int, sequence: int) -> None:
        """The warning about a layer, which has this place in the cache, where none was given."""
        for role, part in zip("kv", cache.read(place, sequence, FAINT_TOKENS), strict=True):
            largest = float(np.abs(part).max())
            linear = self.checkpoint.layer(index).linears.get(role) if largest == 0 else None
            # zeros of a linear of zeros have lost nothing
            lost = linear is not None and bool(np.any(linear.weight))
            if not self._faint_known and (lost or 0 < largest < KV_FLOAT16_LEAST):
                self._faint_known = True
                what = {"k": "keys", "v": "values"}[role]
                warnings.warn(
                    f"{self.checkpoint.path.name}: layer {index}: {what} are too small for float16 "
                    f"(the largest becomes {largest:.4g}): run it with 32 KV bits (--kv-bits 32) "
                    f"or with kv_dtype='bfloat16'", RuntimeWarning, stacklevel=4)


def own_kv_bits(checkpoint) -> int:
    """Bits of cached keys and values that a folder asks for: 32 when it is not quantized."""
    config = checkpoint.quant_config
    return 32 if config is None else config.kv_bits


def own_kv_dtype(checkpoint) -> str:
    """The 16-bit floats of the KV cache that a folder asks for."""
    config = checkpoint.quant_config
    return KV_DTYPES[0] if config is None else config.kv_dtype
