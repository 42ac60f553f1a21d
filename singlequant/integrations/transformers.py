# SPDX-License-Identifier: Apache-2.0
"""Packed folders in transformers: importing this file registers the quantizer "singlequant"."""

from __future__ import annotations

from . import needs_torch  # noqa: F401

# isort: split
import functools
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.folder import load_checkpoint
from ..config import QuantConfig
from ..export.packed import GUARD_KEY, QUANT_METHOD, parse_quantization
from ..sweep.texts import bundled_text
from .in_place import Report, quantize_, replace_module
from .packed_modules import OURS, find_places, make_modules, require_rest
from .saving import find_saved, keep_savable, remember

__all__ = ["SingleQuantConfig", "SingleQuantizer", "packed_config"]

logger = logging.getLogger(__name__)


class _Awaited(torch.nn.Identity):
    """Stands where a module of ours will be: it has nothing to load, to miss or to initialize."""

    weight = torch.empty(0)  # which the initialization of some models names


class _Patterns(list):
    """Versions of transformers add a list of patterns to these, or unite them with a set."""

    def __or__(self, other: Any) -> set[str]:
        return {*self, *other}


@register_quantization_config(QUANT_METHOD)
class SingleQuantConfig(QuantizationConfigMixin):
    """The recipe to quantize a model with as it is loaded, or what config.json of a folder says.

    options: those of `QuantConfig`. calibration: batches as `quantize_` takes them; None draws
    windows of the bundled text, by the model's tokenizer, as options ask for.
    """

    def __init__(self, calibration: Iterable[Any] | None = None, **options: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.recipe = QuantConfig(**options)
        self.calibration = calibration
        self.stored: dict[str, Any] | None = None  # quantization_config of a packed folder

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Of config.json's quantization_config, or of what `to_dict` gives. ValueError if it is not
        ours."""
        values = dict(config_dict)
        if "format_version" in values:
            config = cls()
            config.stored = values
            header = parse_quantization(values, "config.json")
            config.recipe = header.config
        else:
            names = {field.name for field in fields(QuantConfig)}
            options = {key: value for key, value in values.items() if key != "quant_method"}
            unknown = sorted(set(options) - names)
            if unknown:
                raise ValueError(f"quantization_config: unknown key {unknown[0]!r}")
            config = cls(**options)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        if self.stored is not None:
            return dict(self.stored)
        return {"quant_method": QUANT_METHOD, **self.recipe.to_json()}


@register_quantizer(QUANT_METHOD)
class SingleQuantizer(HfQuantizer):
    """Puts our modules into a model that transformers makes.

    The model runs in float32 on the CPU, and none of its parameters asks for a gradient. report:
    what `quantize_` said, of a model that was quantized as it was loaded.
    """

    requires_calibration = False
    report: Report | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """ValueError for devices other than the CPU."""
        places = self.update_device_map(kwargs.get("device_map"))
        places = places.values() if isinstance(places, Mapping) else [places]
        other = [place for place in places if place is not None and str(place) != "cpu"]
        if other:
            raise ValueError(f"device_map: expected the CPU for a singlequant model, found "
                             f"{other[0]!r}")

    def update_device_map(self, device_map: Any) -> Any:
        """"auto" is the CPU."""
        return None if device_map == "auto" else device_map

    def update_dtype(self, dtype: Any) -> Any:
        """float32, which our kernels take and give."""
        return torch.float32

    update_torch_dtype = update_dtype  # before transformers 5

    def update_ep_plan(self, config: Any) -> Any:
        """Lets transformers, which knows us now, find the weights."""
        return without_guard(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """The same; of the two, versions of transformers 5 call one or the other."""
        return without_guard(config)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        files = kwargs.get("checkpoint_files")
        folder = Path(files[0]).parent if files else Path(model.config.name_or_path)
        if self.quantization_config.stored is None:
            self._await_saved(model, folder)
        else:
            self._await_packed(model, folder)

    def _await_packed(self, model: Any, folder: Path) -> None:
        """Make room for the modules of a packed folder."""
        self._checkpoint = checkpoint = load_checkpoint(folder)
        if not checkpoint.quantized:
            raise ValueError(f"{folder}: expected a packed folder, found an unquantized model")
        self._places = find_places(model, checkpoint)
        for place in self._places.values():
            replace_module(model, place.module, _Awaited())
        _ignore(model, OURS)
        _untie(model)
        require_rest(model, folder, checkpoint.tensors)

    def _await_saved(self, model: Any, folder: Path) -> None:
        """Make room for the modules of `quantize_` in a folder that transformers wrote."""
        self._saved = saved = find_saved(folder)
        for name in saved.names:
            try:
                replace_module(model, name, _Awaited())
            except AttributeError:
                raise ValueError(f"{folder}: {name}: {type(model).__name__} has no such module"
                                 ) from None
        _ignore(model, [f"^{re.escape(name)}\\." for name in saved.names])
        require_rest(model, folder, saved.files.infos)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            recipe, batches = self.quantization_config.recipe, self.quantization_config.calibration
            if batches is None:
                batches = _windows(model, recipe)
            self.report = quantize_(model, batches, recipe)
            for left in self.report.left:
                logger.info("%s: left, %s", left.name, left.reason)
        elif self.quantization_config.stored is None:
            for name, linear in self._saved.modules():
                replace_module(model, name, linear)
            del self._saved
        else:
            made = dict(make_modules(self._checkpoint, self._places))
            for place, module in made.items():
                replace_module(model, place, module)
            remember(model, self._checkpoint, made)
            del self._checkpoint  # the modules have what they need of its files
        if self.quantization_config.stored is None:
            keep_savable(model, self.quantization_config.recipe)
        return model.requires_grad_(False).eval()

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether transformers may write the model's state: not that of a packed folder, which
        `save_packed` copies."""
        return self.quantization_config.stored is None

    @property
    def is_trainable(self) -> bool:
        """False: there is no backward."""
        return False


def packed_config(folder: str | Path, **options: Any) -> Any:
    """transformers' config of a packed folder, as `from_pretrained(folder, config=...)` takes it.

    options: of AutoConfig.from_pretrained.
    """
    return without_guard(AutoConfig.from_pretrained(folder, **options))


def without_guard(config: Any) -> Any:
    """The config without what keeps transformers from loading a folder that it does not know."""
    if hasattr(config, GUARD_KEY):
        delattr(config, GUARD_KEY)
    return config


def _read_without_guard() -> None:
    """Let configs of transformers 4 be read without the guard of our folders: that version looks at
    it before it asks a quantizer."""
    kind = transformers.PretrainedConfig
    read = kind.get_config_dict.__func__

    @functools.wraps(read)
    def get_config_dict(cls: Any, *args: Any, **kwargs: Any) -> Any:
        values, rest = read(cls, *args, **kwargs)
        quantization = values.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
            values = {key: value for key, value in values.items() if key != GUARD_KEY}
        return values, rest

    kind.get_config_dict = classmethod(get_config_dict)


if int(transformers.__version__.partition(".")[0]) < 5:
    _read_without_guard()


def _ignore(model: Any, patterns: Iterable[str]) -> None:
    """Let transformers not wonder about tensors whose names have one of the patterns."""
    model._keys_to_ignore_on_load_unexpected = _Patterns(
        [*(model._keys_to_ignore_on_load_unexpected or ()), *patterns])


def _untie(model: Any) -> None:
    """Forget ties of weights that are no longer there; a tied table is one object in both places.
    """
    for owner in model.modules():
        tied = getattr(owner, "all_tied_weights_keys", None)
        if isinstance(tied, dict):
            left = dict(owner.named_parameters(remove_duplicate=False))
            owner.all_tied_weights_keys = {a: b for a, b in tied.items() if {a, b} <= {*left}}


# ---- calibration of a model that is quantized as it is loaded -----------------------------------


def _windows(model: Any, recipe: QuantConfig) -> list[dict[str, torch.Tensor]] | None:
    """Windows of the bundled text by the model's tokenizer, from its first token on."""
    if not model.can_generate():
        return None
    tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    ids = tokenizer(bundled_text("broad"), return_tensors="pt", verbose=False)["input_ids"][0]
    length = min(recipe.calibration_window, len(ids),
                 getattr(model.config, "max_position_embeddings", len(ids)))
    count = max(1, min(len(ids), recipe.calibration_tokens) // length)
    return [{"input_ids": ids[i * length : (i + 1) * length][None], "use_cache": False}
            for i in range(count)]
