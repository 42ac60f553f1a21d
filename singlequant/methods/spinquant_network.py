# SPDX-License-Identifier: Apache-2.0
"""A model in transformers' own modules whose weights are functions of SpinQuant's rotations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _C
from ..checkpoint.views import require_commuting
from ..models.spec import NORM_PLACES, LayerSpec, Site, tensor_name
from .quarot import online_hadamard

if TYPE_CHECKING:
    import torch

__all__ = ["Network", "fake_quantize", "fused_linear", "load_network"]


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


class Network:
    """A checkpoint's model in float32 whose weights are functions of R1 and R2.

    transformers computes. Here the norms' weights are folded into the linears that read them, each
    linear gets another forward, and the inputs of linears are rounded. A linear that reads the MLP
    holds the transpose of the online Hadamard. Embedding and head are not rounded, whatever the
    packed folder does with them. ValueError when a weight of the checkpoint holds NaN or Inf, and
    when a norm does not commute with R1.
    """

    def __init__(self, checkpoint) -> None:
        import torch

        checkpoint.require_unquantized()
        self.spec = spec = checkpoint.spec
        require_commuting(spec)
        if any(kind.experts for kind in spec.kinds):
            raise ValueError(f"checkpoint: expected a family without experts, as rotations are "
                             f"learned for no other, found {spec.family}")
        for i in range(spec.layers):
            checkpoint.require_finite(i)
        self.activation_bits, self.clip = 16, 1.0
        model = load_network(checkpoint)
        self.decoder = model.base_model
        with torch.no_grad():
            self.embedding = model.get_input_embeddings().weight
            final = model.get_submodule(spec.final_norm.name)
            offset = spec.final_norm.offset
            self.head = model.get_output_embeddings().weight * (final.weight + offset)
            final.weight.fill_(1 - offset)
            self.layers = [self._layer(model, i) for i in range(spec.layers)]
        self.R1: torch.Tensor | None = None

    def _layer(self, model, i: int) -> list[_RotatedLinear]:
        """A layer's linears, their norms folded and their forwards replaced."""
        layer, by_module = self.spec.layer(i), {}
        norms = {place: model.get_submodule(tensor_name(norm.name, i))
                 for place, norm in layer.norms.items() if place in NORM_PLACES}
        values = _value_roles(layer)
        for site in layer.sites.values():
            for role in sorted(site.roles, key=lambda role: layer.linears[role].first_row):
                row = layer.linears[role]
                name = tensor_name(row.stored or row.name, i).removesuffix(".weight")
                module = model.get_submodule(name)
                weight = module.weight[row.first_row : row.first_row + row.n]
                if site.reads == "residual":
                    norm = layer.norms[site.norm]
                    weight = weight * (norms[site.norm].weight + norm.offset)
                bias = module.bias
                if bias is not None:
                    bias = bias[row.first_row : row.first_row + row.n]
                linear = _RotatedLinear(self, site, role in values, weight, bias)
                by_module.setdefault(module, []).append(linear)
        for module, linears in by_module.items():
            module.weight, module.forward = None, _joined(linears)
        for place, norm in norms.items():
            norm.weight.fill_(1 - layer.norms[place].offset)
            norm.register_forward_hook(lambda module, inputs, output: self.rounded(output))
        return [linear for linears in by_module.values() for linear in linears]

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Inputs of a linear after their rounding."""
        return fake_quantize(x, self.activation_bits, self.clip)

    def rotate(self, R1: torch.Tensor, R2: torch.Tensor, bits: int) -> None:
        """Take R1 [hidden, hidden] and R2 [layers, head_dim, head_dim]; round weights to `bits`."""
        self.R1 = R1
        for r2, layer in zip(R2, self.layers, strict=True):
            for linear in layer:
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
    """The forward of one linear whose weight [n, k] and bias are rotated by R1 and R2.

    It reads the residual stream or it writes it. `values`: R2 rotates it as well.
    """

    def __init__(self, network: Network, site: Site, values: bool, weight, bias) -> None:
        self.network, self.values = network, values
        self.writes = site.reads != "residual"
        self.online = _online_factors(site.k) if site.reads == "mlp" else None
        self.weight = self._hadamard(weight).detach()
        self.bias = None if bias is None else bias.detach()
        self._apply: Callable[[torch.Tensor], torch.Tensor] | None = None

    def _hadamard(self, x: torch.Tensor) -> torch.Tensor:
        """R4 where the linear reads the MLP: x [..., k] times the Hadamard of both axes."""
        if self.online is None:
            return x
        left, right = self.online
        grid = x.reshape(-1, len(left), len(right))
        return (left @ grid @ right.T).reshape(x.shape)

    def rotate(self, R1: torch.Tensor, R2: torch.Tensor, bits: int) -> None:
        """Take the rotations; round the weight to `bits`.

        Linears that read the residual stream are W R1, those that write it R1^T W, with bias b R1.
        R2 rotates the outputs of the one that makes the values, and the inputs of the one that
        reads attention, head by head.
        """
        import torch
        import torch.nn.functional as F

        weight, bias, writes = self.weight, self.bias, self.writes
        if bias is not None and writes:
            bias = bias @ R1
        if not self.values:
            with torch.no_grad():
                rounded = fake_quantize(R1.T @ weight if writes else weight @ R1, bits)
            fused = fused_linear()

            def apply(x):
                y = fused.apply(x, rounded, weight, R1, writes)
                return y if bias is None else y + bias

            self._apply = apply
            return
        if writes:
            heads = R1.T @ (weight.reshape(-1, len(R2)) @ R2).reshape(weight.shape)
        else:
            heads = (R2.T @ (weight @ R1).reshape(-1, len(R2), len(R1))).reshape(weight.shape)
            bias = None if bias is None else (bias.reshape(-1, len(R2)) @ R2).reshape(-1)
        rounded = fake_quantize(heads, bits)
        self._apply = lambda x: F.linear(x, rounded, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., k] -> [..., n]; what a norm gave is rounded already."""
        return self._apply(self.network.rounded(self._hadamard(x)) if self.writes else x)


def _value_roles(layer: LayerSpec) -> set[str]:
    """The role that makes the value heads and those that read them behind attention."""
    return {role for site in layer.sites.values() if site.reads == "attention"
            for role in (site.producer, *site.roles)}


def _joined(linears: list[_RotatedLinear]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of a module that holds the rows of these linears one after the other."""
    import torch

    if len(linears) == 1:
        return linears[0].forward
    return lambda x: torch.cat([linear.forward(x) for linear in linears], dim=-1)


@functools.cache
def _online_factors(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the online Hadamard of k inputs, in float32."""
    import torch

    rotation = online_hadamard(*_C.factor_sizes(k))
    return tuple(torch.from_numpy(factor.matrix().astype(np.float32))
                 for factor in (rotation.left, rotation.right))


def load_network(checkpoint) -> Any:
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
