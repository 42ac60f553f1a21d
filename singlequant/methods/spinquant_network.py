# SPDX-License-Identifier: Apache-2.0
"""A model in transformers' own modules whose weights are functions of SpinQuant's rotations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _C

if TYPE_CHECKING:
    import torch

__all__ = ["Network", "fake_quantize", "fused_linear"]


# ---- rounding -----------------------------------------------------------------------------------


@functools.cache
def rounding_function() -> type:
    """The autograd function of a symmetric quantizer whose gradient is the identity."""
    import torch

    class Round(torch.autograd.Function):
        """x [..., k] -> scale * round(x / scale), one scale per row; as _C.quantize rounds."""

        @staticmethod
        def forward(ctx, x, bits, clip):
            half = 2 ** (bits - 1)
            scale = x.abs().amax(dim=-1, keepdim=True)
            scale = scale.mul_(clip).div_(half - 1)
            scale[scale == 0] = 1.0
            return (x / scale).round_().clamp_(-half, half - 1).mul_(scale)

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None, None

    return Round


@functools.cache
def fused_linear() -> type:
    """The autograd function of a linear whose rounded weight stems from a fixed one and R1."""
    import torch

    class FusedLinear(torch.autograd.Function):
        """y = x r^T for the rounded weight r of W R1 (transposed: of R1^T W).

        With g the gradient of y, r's is g^T x, and straight through the rounding R1's is
        W^T (g^T x) = (g W)^T x (transposed: W (g^T x)^T = (x W^T)^T g): bracketed like this, no
        gradient of the size of W is made, which saves a sixth of a step.
        """

        @staticmethod
        def forward(ctx, x, rounded, weight, R1, transposed):
            ctx.save_for_backward(x, rounded, weight)
            ctx.transposed = transposed
            return x @ rounded.T

        @staticmethod
        def backward(ctx, gradient):
            x, rounded, weight = ctx.saved_tensors
            g, rows = gradient.flatten(0, -2), x.flatten(0, -2)
            of_R1 = (rows @ weight.T).T @ g if ctx.transposed else (g @ weight).T @ rows
            return gradient @ rounded, None, None, of_R1, None

    return FusedLinear


def fake_quantize(x: torch.Tensor, bits: int, clip: float = 1.0) -> torch.Tensor:
    """x [..., k] rounded to `bits` bits, one symmetric scale per row; 16 leaves x as it is.

    Straight-through: the gradient passes unchanged, clipped values included (as published).
    """
    return x if bits == 16 else rounding_function().apply(x, bits, clip)


# ---- the network --------------------------------------------------------------------------------

VALUES = ("v", "o")  # roles that R2 of their layer rotates as well
OUTPUTS = ("o", "down")  # roles whose outputs join the residual stream


class Network:
    """A checkpoint's model in float32 whose weights are functions of R1 and R2.

    transformers computes; here the norms' weights are folded into the linears behind them, each
    linear gets another forward, and the inputs of linears are rounded. down's weight holds the
    transpose of the online Hadamard. Embedding and head are not rounded, as in the packed format.
    ValueError when a weight of the checkpoint holds NaN or Inf.
    """

    def __init__(self, checkpoint) -> None:
        import torch

        checkpoint.require_unquantized()
        for i in range(checkpoint.spec.layers):
            checkpoint.require_finite(i)
        self.shape = shape = checkpoint.shape
        self.activation_bits, self.clip = 16, 1.0
        k1, k2 = _C.factor_sizes(shape.intermediate)
        factors = [_C.hadamard_transform(np.eye(k)).astype(np.float32).T for k in (k1, k2)]
        self.online = tuple(torch.from_numpy(np.ascontiguousarray(f)) for f in factors)
        model = _load(checkpoint)
        self.decoder = model.base_model
        with torch.no_grad():
            self.embedding = model.get_input_embeddings().weight
            final = model.get_submodule(checkpoint.architecture.final_norm)
            self.head = model.get_output_embeddings().weight * final.weight
            final.weight.fill_(1)
            self.layers = [self._layer(model, checkpoint, i) for i in range(shape.layers)]
        self.R1: torch.Tensor | None = None

    def _layer(self, model, checkpoint, i: int) -> dict[str, _RotatedLinear]:
        """A layer's linears by role, their norms folded and their forwards replaced."""
        norms = [model.get_submodule(name.format(i=i)) for name in checkpoint.architecture.norms]
        linears = {}
        for role in checkpoint.architecture.linears:
            module = model.get_submodule(checkpoint.linear_name(i, role))
            norm = {"q": 0, "k": 0, "v": 0, "gate": 1, "up": 1}.get(role)
            weight = module.weight if norm is None else module.weight * norms[norm].weight
            weight = self.hadamard(weight) if role == "down" else weight
            linear = _RotatedLinear(self, role, weight.detach(), module.bias)
            module.weight, module.forward = None, linear.forward
            linears[role] = linear
        for norm in norms:
            norm.weight.fill_(1)
            norm.register_forward_hook(lambda module, inputs, output: self.rounded(output))
        return linears

    def hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """R4: x [..., intermediate] times the Hadamard of both Kronecker axes."""
        left, right = self.online
        grid = x.reshape(-1, len(left), len(right))
        return (left @ grid @ right.T).reshape(x.shape)

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs of a linear after their rounding."""
        return fake_quantize(x, self.activation_bits, self.clip)

    def rotate(self, R1: torch.Tensor, R2: torch.Tensor, bits: int) -> None:
        """Take R1 [hidden, hidden] and R2 [layers, head_dim, head_dim]; round weights to `bits`."""
        self.R1 = R1
        for r2, layer in zip(R2, self.layers, strict=True):
            for linear in layer.values():
                linear.rotate(R1, r2, bits)

    def logits(self, tokens, bits: int = 16, clip: float = 1.0) -> torch.Tensor:
        """Logits [count, length, vocab] of tokens [count, length], inputs rounded to `bits`.

        The weights are those of the last `rotate`.
        """
        self.activation_bits, self.clip = bits, clip
        hidden = self.decoder(inputs_embeds=self.embedding[tokens] @ self.R1,
                              use_cache=False).last_hidden_state
        # the head is not quantized: rotating hidden back costs less than rotating the head
        return (hidden @ self.R1.T) @ self.head.T

    def loss(self, tokens, R1, R2, bits: tuple[int, int], clip: float) -> torch.Tensor:
        """Mean cross-entropy (nats) of the next token; bits of (weights, activations)."""
        import torch.nn.functional as F

        self.rotate(R1, R2, bits[0])
        logits = self.logits(tokens, bits[1], clip)
        return F.cross_entropy(logits[:, :-1].reshape(-1, self.spec.vocab),
                               tokens[:, 1:].reshape(-1))


class _RotatedLinear:
    """The forward of one linear whose weight [n, k] and bias are rotated by R1 and R2."""

    def __init__(self, network: Network, role: str, weight, bias) -> None:
        self.network, self.role, self.weight = network, role, weight
        self.bias = None if bias is None else bias.detach()
        self._apply: Callable[[torch.Tensor], torch.Tensor] | None = None

    def rotate(self, R1: torch.Tensor, R2: torch.Tensor, bits: int) -> None:
        """Take the rotations; round the weight to `bits`.

        Linears that read the residual stream are W R1, those that write it R1^T W, with bias b R1.
        R2 rotates v's outputs and o's inputs, head by head.
        """
        import torch
        import torch.nn.functional as F

        weight, bias, outputs = self.weight, self.bias, self.role in OUTPUTS
        if bias is not None and outputs:
            bias = bias @ R1
        if self.role not in VALUES:
            with torch.no_grad():
                rounded = fake_quantize(R1.T @ weight if outputs else weight @ R1, bits)
            fused = fused_linear()

            def apply(x):
                y = fused.apply(x, rounded, weight, R1, outputs)
                return y if bias is None else y + bias

            self._apply = apply
            return
        if outputs:
            heads = R1.T @ (weight.reshape(-1, len(R2)) @ R2).reshape(weight.shape)
        else:
            heads = (R2.T @ (weight @ R1).reshape(-1, len(R2), len(R1))).reshape(weight.shape)
            bias = None if bias is None else (bias.reshape(-1, len(R2)) @ R2).reshape(-1)
        rounded = fake_quantize(heads, bits)
        self._apply = lambda x: F.linear(x, rounded, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] -> [..., n]; what a norm gave is rounded already."""
        if self.role == "down":
            x = self.network.hadamard(x)
        return self._apply(self.network.rounded(x) if self.role in OUTPUTS else x)


def _load(checkpoint) -> Any:
    """transformers' model of the checkpoint's folder, in float32, without gradients."""
    import torch
    from transformers import AutoModelForCausalLM

    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, dtype=torch.float32, attn_implementation="sdpa",
            local_files_only=True)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers on standard error."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
