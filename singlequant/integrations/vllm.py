# SPDX-License-Identifier: Apache-2.0
"""vLLM's plugin: packed folders in vLLM's CPU backend, with our kernels in its linears and tables.

Importing this file imports torch and not vLLM. `register` is the entry point that vLLM calls.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.folder import load_checkpoint
from ..export.packed import QUANT_METHOD, parse_quantization
from ..weights import PackedTable
from .packed_modules import OURS, layer_modules
from .tables import TableEmbedding, TableHead

# What a compiled graph calls, by number: torch.compile cannot look into our kernels.
_modules: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}
_numbers = itertools.count()


@torch.library.custom_op("singlequant::apply", mutates_args=())
def _apply(x: torch.Tensor, number: int, outputs: int, dtype: torch.dtype) -> torch.Tensor:
    return _modules[number](x).to(dtype)


@_apply.register_fake
def _(x: torch.Tensor, number: int, outputs: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (*x.shape[:-1], outputs) if x.is_floating_point() else (*x.shape, outputs)
    return x.new_empty(shape, dtype=dtype)


class Operator:
    """A module of ours as one operator of torch, which graphs take as it is."""

    def __init__(
        self, module: Callable[[torch.Tensor], torch.Tensor], outputs: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.number, self.outputs, self.dtype = next(_numbers), outputs, dtype
        _modules[self.number] = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., outputs] of x [..., inputs], or of ids; of dtype, or of x's."""
        return _apply(x, self.number, self.outputs, self.dtype or x.dtype)


class Folder:
    """What a packed folder has for the modules of vLLM."""

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_dir():
            raise ValueError(f"model: expected a packed folder on this machine, found {path}")
        self.checkpoint = load_checkpoint(path)
        if not self.checkpoint.quantized:
            raise ValueError(f"{path}: expected a packed folder, found an unquantized model")

    def __reduce__(self) -> Any:
        """By its path: vLLM sends its config from process to process, and copies it."""
        return Folder, (self.checkpoint.path,)

    @functools.cached_property
    def linears(self) -> dict[str, torch.nn.Module]:
        """The packed linears by name, without their biases: those are vLLM's."""
        return {name: module for i in range(self.checkpoint.spec.layers)
                for name, module in layer_modules(self.checkpoint, i, biases=False)}

    def linear(self, name: str, fused: Mapping[str, Sequence[str]]) -> Operator | None:
        """The linear of that name in vLLM's model, or those that it fused; None where the folder
        has it unquantized. ValueError where the folder has none, or one part packed only."""
        parent, _, last = name.rpartition(".")
        names = [f"{parent}.{part}" for part in fused.get(last, (last,))]
        packed = [self.linears[part] for part in names if part in self.linears]
        missing = [part for part in names
                   if part not in self.linears and f"{part}.weight" not in self.checkpoint.tensors]
        if missing:
            raise ValueError(f"{self.checkpoint.path}: expected a linear {missing[0]}, as vLLM "
                             f"calls it, found none; singlequant.load runs the folder")
        if packed and len(packed) < len(names):
            raise ValueError(f"{name}: expected all linears of it packed or none, found some")
        if not packed:
            return None
        return Operator(lambda x: torch.cat([part(x) for part in packed], -1),
                        sum(part.out_features for part in packed))

    def table(self, is_head: bool, dtype: torch.dtype) -> Operator | None:
        """The embedding or the head; None where the folder has it unquantized."""
        checkpoint = self.checkpoint
        table = checkpoint.head if is_head else checkpoint.embedding
        if not isinstance(table, PackedTable):
            return None
        rows, width = table.shape
        if is_head:
            return Operator(TableHead(table, checkpoint.quant_config.head_input_bits), rows)
        return Operator(TableEmbedding(table), width, dtype)


def register() -> None:
    """Make vLLM know packed folders. It calls this in each of its processes, and more than once."""
    _config_class()


@functools.cache
def _config_class() -> type:
    """vLLM's config of packed folders, registered. ImportError without vLLM."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )
    from vllm.model_executor.models.utils import WeightsMapper

    linear_method, table_method = _methods()

    @register_quantization_config(QUANT_METHOD)
    class SingleQuantConfig(QuantizationConfig):
        """quantization_config of a packed folder."""

        folder: Folder | None = None

        def __reduce__(self) -> Any:
            return _restored, (self.__dict__,)

        def get_name(self) -> str:
            return QUANT_METHOD

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.float32, torch.bfloat16, torch.float16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> SingleQuantConfig:
            parse_quantization(config, "config.json")
            return cls()

        def maybe_update_config(self, model_name: str, *args: Any, **kwargs: Any) -> None:
            """Open the folder, which vLLM names here alone."""
            self.folder = Folder(model_name)

        @staticmethod
        def get_cache_scale_mapper() -> Any:
            """What vLLM's loader passes over: we read these tensors ourselves."""
            ours = WeightsMapper(orig_to_new_regex={re.compile(name): None for name in OURS})
            return ours | QuantizationConfig.get_cache_scale_mapper()

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            folder = self.folder
            if folder is None:
                raise ValueError("quantization_config: expected the name of its folder before "
                                 "layers are made: this version of vLLM gives none")
            if isinstance(layer, LinearBase):
                found = folder.linear(prefix, self.packed_modules_mapping)
                return UnquantizedLinearMethod() if found is None else linear_method(found)
            if isinstance(layer, VocabParallelEmbedding):
                found = folder.table(isinstance(layer, ParallelLMHead), torch.get_default_dtype())
                return None if found is None else table_method(found)
            if "FusedMoE" in type(layer).__name__ or "RoutedExperts" in type(layer).__name__:
                raise ValueError(f"{prefix}: expected a model without experts; singlequant.load "
                                 f"runs the folder")
            return None

    return SingleQuantConfig


def _restored(state: dict[str, Any]) -> Any:
    """A config that vLLM sent from process to process."""
    config = _config_class()()
    config.__dict__.update(state)
    return config


def _methods() -> tuple[type, type]:
    """vLLM's methods of linears and of tables that call an operator."""
    from vllm.model_executor.layers.linear import LinearMethodBase

    class LinearMethod(LinearMethodBase):
        def __init__(self, operator: Operator) -> None:
            self.operator = operator

        def create_weights(
            self, layer: torch.nn.Module, input_size_per_partition: int,
            output_partition_sizes: list[int], input_size: int, *args: Any, **kwargs: Any,
        ) -> None:
            """None: the operator has them. ValueError where vLLM would split the layer."""
            outputs = sum(output_partition_sizes)
            if input_size_per_partition != input_size or outputs < self.operator.outputs:
                raise ValueError("tensor_parallel_size: expected 1 for a singlequant folder, found "
                                 "more")

        def apply(
            self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            y = self.operator(x)
            return y if bias is None else y + bias

    class TableMethod(LinearMethod):
        def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            if layer.tp_size != 1:
                raise ValueError(f"tensor_parallel_size: expected 1 for a singlequant folder, "
                                 f"found {layer.tp_size}")

        def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
            return self.operator(input_)

        def tie_weights(self, layer: torch.nn.Module, embed_tokens: Any) -> Any:
            return layer  # both read the folder's one table

    return LinearMethod, TableMethod
