# SPDX-License-Identifier: Apache-2.0
"""What surrounds the layers: tokens -> the residual stream, and the residual stream -> logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _C
from ..models.spec import NormSpec
from ..weights import PackedTable

HEAD_ROWS = _C.DENSE_FEW  # up to so many rows of logits, a row knows nothing of the others


class _Norm:
    """A norm outside the layers, ready to run."""

    def __init__(self, spec: NormSpec, tensors: dict[str, NDArray[Any]], channels: int) -> None:
        weight = tensors.get(f"{spec.name}.weight")
        weight = np.ones(channels, np.float32) if weight is None else _C.to_float32(weight)
        self._weight = weight + np.float32(spec.offset)
        bias = tensors.get(f"{spec.name}.bias")
        self._bias = None if bias is None else _C.to_float32(bias)
        self._spec = spec

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._spec.kind == "layer":
            return _C.layer_norm(x, self._weight, self._bias, self._spec.eps)
        y = _C.rms_norm(x, self._weight, self._spec.eps)
        return y if self._bias is None else y + self._bias


class Outer:
    """Embedding and head of a checkpoint. Weights stay mapped; norms are kept in float32.

    activation_bits: 8, 16 or 24, of what meets a head of 8, 6 or 4 bits, with a scale for every 32
    inputs of a token.
    """

    def __init__(self, checkpoint, activation_bits: int = 16) -> None:
        self.spec = spec = checkpoint.spec
        self._activation_bits = activation_bits
        self._tensors = tensors = checkpoint.outer
        self._embedding = tensors[f"{spec.embed}.weight"]
        self._head = self._embedding if spec.tied else tensors[f"{spec.head}.weight"]
        self._embed_norm, self._final_norm = (
            None if norm is None else _Norm(norm, tensors, spec.hidden)
            for norm in (spec.embed_norm, spec.final_norm)
        )
        bias = tensors[f"{spec.head}.bias"] if spec.head_bias else None
        self._bias = None if bias is None else _C.to_float32(bias)

    def hold_head(self, checkpoint) -> None:
        """Copy a head of 8, 6 or 4 bits into memory of its own, which decoding reads faster than a
        mapped file, and give back the checkpoint's pages of it."""
        if isinstance(self._head, PackedTable):
            self._head = self._head.in_memory()
            checkpoint.release_packed(self.spec.embed if self.spec.tied else self.spec.head)

    def embed(
        self, tokens: NDArray[np.int64], position: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """The residual stream [m, hidden] of token ids [m] at positions [m].

        ValueError for a token outside the vocabulary and for a position beyond a learned table.
        """
        spec = self.spec
        table = self._embedding
        packed = isinstance(table, PackedTable)
        hidden = table.gather(tokens) if packed else _C.gather_rows(table, tokens)
        if spec.embed_scale != 1:
            hidden *= np.float32(spec.embed_scale)
        if spec.project_in:
            hidden = _C.linear_dense(hidden, self._tensors[f"{spec.project_in}.weight"])
        if spec.positions:
            last = int(position.max(initial=-1)) + spec.positions.offset
            if last >= spec.positions.rows:
                raise ValueError(
                    f"tokens: expected positions up to {spec.max_position_embeddings - 1}, as the "
                    f"model learned no more, got {int(position.max())}")
            table = self._tensors[f"{spec.positions.name}.weight"]
            hidden += _C.gather_rows(table, position + spec.positions.offset)
        return hidden if self._embed_norm is None else self._embed_norm(hidden)

    def finish(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the head reads [..., width] of the residual stream [..., hidden]."""
        if self._final_norm is not None:
            hidden = self._final_norm(hidden)
        if self.spec.project_out:
            hidden = _C.linear_dense(hidden, self._tensors[f"{self.spec.project_out}.weight"])
        return hidden

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [..., vocab] of what `finish` returned.

        With a head in 16 bits or less a row's are the same bits whatever rows come with it.
        """
        hidden = np.asarray(hidden, np.float32)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if len(rows) <= HEAD_ROWS:
            return self._shaped(self._multiplied(hidden))
        out = np.empty((len(rows), self.spec.vocab), np.float32)
        for begin in range(0, len(rows), HEAD_ROWS):
            part = slice(begin, begin + HEAD_ROWS)
            out[part] = self._shaped(self._multiplied(rows[part]))
        return out.reshape(*hidden.shape[:-1], -1)

    def _multiplied(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """rows [..., width] times the head: [..., vocab]."""
        head = self._head
        if isinstance(head, PackedTable):
            return head.linear(rows, self._activation_bits)
        return _C.linear_dense(rows, head)

    def _shaped(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits with their bias, scale and soft cap, in place."""
        spec = self.spec
        if self._bias is not None:
            logits += self._bias
        if spec.logit_scale != 1:
            logits *= np.float32(spec.logit_scale)
        if spec.logit_softcap:
            cap = np.float32(spec.logit_softcap)
            logits /= cap
            np.tanh(logits, out=logits)
            logits *= cap
        return logits
