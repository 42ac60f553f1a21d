# SPDX-License-Identifier: Apache-2.0
"""Embedding and head in 8, 6 or 4 bits as torch modules."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from ..weights import PackedTable
from .inputs import array


class TableEmbedding(torch.nn.Module):
    """Rows of a packed table, times `scale`, in the place of a torch.nn.Embedding. float32."""

    def __init__(self, table: PackedTable, scale: float = 1.0) -> None:
        super().__init__()
        self.table, self.scale = table, scale
        self.num_embeddings, self.embedding_dim = table.shape

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., width] of ids [...]. ValueError outside of the table."""
        rows = self.table.gather(input.detach().long().reshape(-1).numpy())
        found = torch.from_numpy(rows).reshape(*input.shape, -1)
        return found if self.scale == 1 else found * self.scale

    def extra_repr(self) -> str:
        """What repr shows between the brackets."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.table.bits}"


class TableHead(torch.nn.Module):
    """Logits by a packed table in the place of a torch.nn.Linear.

    input_bits: of the inputs, as `QuantConfig.head_input_bits` says.
    """

    def __init__(
        self, table: PackedTable, input_bits: int, bias: NDArray[Any] | None = None
    ) -> None:
        super().__init__()
        self.table, self.input_bits = table, input_bits
        self.bias = None if bias is None else torch.from_numpy(bias)
        self.out_features, self.in_features = table.shape

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., rows] of x [..., width], of the same type."""
        logits = torch.from_numpy(self.table.linear(array(input), self.input_bits))
        return (logits if self.bias is None else logits + self.bias).to(input.dtype)

    def extra_repr(self) -> str:
        """What repr shows between the brackets."""
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, bits={self.table.bits}, "
                f"input_bits={self.input_bits}")
