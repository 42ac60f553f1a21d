# SPDX-License-Identifier: Apache-2.0
"""`save_pretrained` and its way back: packed folders are copied, modules of `quantize_` are kept.

A packed folder is copied by `save_packed`. A model that `quantize_` changed is written by
transformers, from the state of its modules, and read back by `find_saved`. What a model gets here
in place of its methods is a partial, which is pickled with the model.
"""

from __future__ import annotations

import inspect
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..checkpoint.folder import Checkpoint
from ..config import QuantConfig
from ..export.folder import CONFIG_FILE, copied_files, copy_files, whole_folder, write_json
from ..export.packed import GUARD, GUARD_KEY, QUANT_METHOD
from ..export.writer import RECIPE_FILE
from ..files import MAX_JSON_BYTES, read_json
from ..tensors import INDEX_FILE, TensorFiles, find_tensors
from .inputs import array
from .linear import REQUIRED, Linear
from .tables import TableEmbedding, TableHead

LAYOUT = f".{REQUIRED[2]}"  # the end of a name that each saved module has


def _check(out: Path, options: Mapping[str, Any]) -> None:
    """Refuse what cannot be followed, and a folder that has a model."""
    for name in ("state_dict", "push_to_hub", "variant"):
        if options.get(name):
            raise ValueError(f"{name}: expected none, as the folder's files are copied whole, "
                             f"found {options[name]!r:.80}")
    if not options.get("safe_serialization", True):
        raise ValueError("safe_serialization: expected True, found False")
    if out.exists():
        there = [path.name for name in (CONFIG_FILE, INDEX_FILE, "*.safetensors")
                 for path in sorted(out.glob(name))]
        if there or not out.is_dir():
            raise FileExistsError(f"{out}: expected a folder without a model, found "
                                  f"{there[0] if there else 'a file'}")


def _copy(source: Path, names: Sequence[str], out: Path) -> None:
    """Copy files of those names: to a new folder all or none, to an existing one each."""
    if out.exists():
        copy_files(source, out, names)
        return
    with whole_folder(out, names) as partial:
        copy_files(source, partial, names)


def _replace_methods(model: Any, save: Any) -> None:
    """Let the model be saved that way, and tell the bytes of our modules too."""
    model.save_pretrained = partial(save, model)
    model.get_memory_footprint = partial(memory_footprint, model)


def memory_footprint(model: Any, return_buffers: bool = True) -> int:
    """transformers' get_memory_footprint, with the codes, scales and rotations of our modules."""
    found = type(model).get_memory_footprint(model, return_buffers)
    tables = {}  # by where the codes lie: a tied head has those of the embedding
    for module in model.modules():
        if isinstance(module, Linear):
            found += module.nbytes
        elif isinstance(module, (TableEmbedding, TableHead)):
            tables[module.table.codes.ctypes.data] = module.table.nbytes
    return found + sum(tables.values())


# ---- a packed folder ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """What a model was right after it was loaded from a packed folder."""

    folder: Path
    files: tuple[str, ...]  # of the folder, config.json first
    modules: Mapping[str, torch.nn.Module]  # ours, by name
    checksums: Mapping[str, int]  # of its parameters


def remember(
    model: Any, checkpoint: Checkpoint, modules: Mapping[str, torch.nn.Module]
) -> None:
    """Make model.save_pretrained copy the folder that it was loaded from."""
    folder = checkpoint.path
    weights = {info.path.name for info in checkpoint.tensors.values()}
    beside = [name for name in (INDEX_FILE, RECIPE_FILE, "README.md") if (folder / name).is_file()]
    files = (CONFIG_FILE, *sorted(weights), *beside, *copied_files(folder))
    model._singlequant = Loaded(folder, files, dict(modules), _checksums(model))
    _replace_methods(model, save_packed)


def save_packed(
    model: Any, save_directory: Any, is_main_process: bool = True, **options: Any
) -> None:
    """Copy the packed folder that the model was loaded from, tokenizer included.

    A new folder appears whole or not at all. In an existing one, which must have no model yet, each
    file does, config.json first. Options of transformers about shards have no effect. ValueError
    where the model is no longer what the folder says; FileExistsError where a model is there.
    """
    loaded, out = model._singlequant, Path(save_directory)
    _check(out, options)
    _require_same(model, loaded)
    if is_main_process:
        _copy(loaded.folder, loaded.files, out)


def _checksums(model: Any) -> dict[str, int]:
    """Of all parameters by name. Those of packed linears and tables are none."""
    return {name: zlib.crc32(array(parameter)) for name, parameter in model.named_parameters()}


def _require_same(model: Any, loaded: Loaded) -> None:
    """ValueError that names what is not as it was loaded."""
    modules = dict(model.named_modules())
    changed = [name for name, module in loaded.modules.items() if modules.get(name) is not module]
    found = _checksums(model)
    changed += [name for name in {**loaded.checksums, **found}
                if loaded.checksums.get(name) != found.get(name)]
    if changed:
        raise ValueError(f"{changed[0]}: expected it as it was loaded from {loaded.folder}, as "
                         f"save_pretrained copies that folder, found it changed")


# ---- a model that quantize_ changed -------------------------------------------------------------


def keep_savable(model: Any, config: QuantConfig | None) -> None:
    """Make a model of transformers that has modules of ours now come back from what its
    save_pretrained writes; others stay as they are.

    config: the recipe, None where it is not known.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return
    there = getattr(model.config, "quantization_config", None)
    if there is None:
        recipe = {} if config is None else config.to_json()
        model.config.quantization_config = {"quant_method": QUANT_METHOD, **recipe}
    else:
        there = there if isinstance(there, dict) else there.to_dict()
        if there.get("quant_method") != QUANT_METHOD:  # of another library, which saves it
            return
    _replace_methods(model, save_quantized)


def save_quantized(
    model: Any, save_directory: Any, is_main_process: bool = True, **options: Any
) -> None:
    """What transformers writes of the model's state, as whole as `save_packed` makes it.

    config.json gets what keeps transformers from loading random weights in silence where nothing
    is registered.
    """
    out = Path(save_directory)
    _check(out, options)
    if not is_main_process:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=".singlequant-") as name:
        work, write = Path(name), type(model).save_pretrained
        if "save_original_format" in inspect.signature(write).parameters:
            options["save_original_format"] = False  # tensors are named as modules are
        write(model, work, **options)
        config = work / CONFIG_FILE
        write_json(config, {**read_json(config, MAX_JSON_BYTES), GUARD_KEY: GUARD})
        others = sorted(path.name for path in work.iterdir() if path.name != CONFIG_FILE)
        _copy(work, (CONFIG_FILE, *others), out)


@dataclass(frozen=True)
class Saved:
    """The modules of `quantize_` that a folder has, and its files."""

    files: TensorFiles
    names: tuple[str, ...]

    def modules(self) -> Iterator[tuple[str, Linear]]:
        """(name in the model, module). ValueError for a state that makes none."""
        for name in self.names:
            prefix = f"{name}."
            own = {key.removeprefix(prefix): torch.from_numpy(self.files.view(key).copy())
                   for key in self.files.infos if key.startswith(prefix)}
            n, k = own[REQUIRED[2]].tolist()[:2]
            module = Linear(k, n, "bias" in own)
            try:
                module.load_state_dict(own)
            except RuntimeError as error:
                raise ValueError(f"{name}: {error}") from None
            yield name, module.eval()


def find_saved(folder: Path) -> Saved:
    """The modules of a folder that transformers wrote. ValueError where there are none."""
    files = TensorFiles(find_tensors(folder))
    names = tuple(key.removesuffix(LAYOUT) for key in files.infos if key.endswith(LAYOUT))
    if not names:
        raise ValueError(f"{folder}: expected tensors such as NAME{LAYOUT}, found none")
    return Saved(files, names)
