# SPDX-License-Identifier: Apache-2.0
"""What the folders of every format share: shards and their index, copies, the name at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..files import is_present, whole_file
from .partial import PartialFolder

CONFIG_FILE = "config.json"
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


COPIED_FOLDERS = {"additional_chat_templates": "*.jinja"}  # and which of their files


def copied_files(folder: Path) -> list[str]:
    """Files beside the weights that a written folder keeps, relative to the folder."""
    names = [name for name in COPIED_FILES if is_present(folder / name)]
    for name, pattern in COPIED_FOLDERS.items():
        found = sorted((folder / name).glob(pattern))
        names += [f"{name}/{file.name}" for file in found if is_present(file)]
    return names


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy files of those relative names."""
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        with (source / name).open("rb") as file, whole_file(target / name) as copy:
            shutil.copyfileobj(file, copy)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    with whole_file(path) as file:
        file.write(json_bytes(values))


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def shard_name(number: int, total: int) -> str:
    """File of shard `number`, from 1; 1 holds what is outside the layers, i + 2 holds layer i."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def shard_names(layers: int) -> list[str]:
    """Files of all shards of a model with so many layers."""
    return [shard_name(number, layers + 1) for number in range(1, layers + 2)]


def shard_index(paths: Iterable[Path]) -> dict[str, Any]:
    """model.safetensors.index.json of these files: which of them has which tensor."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for path in paths:
        with safe_open(path, "np") as file:
            weight_map |= dict.fromkeys(sorted(file.keys()), path.name)
        with path.open("rb") as file:
            total_size += path.stat().st_size - 8 - struct.unpack("<Q", file.read(8))[0]
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map}


def check_out(out: Path, model: Path) -> None:
    """ValueError unless out names a new folder outside of the model's."""
    if out.name in ("", ".."):
        raise ValueError(f"OUT: expected the name of a new folder, found {str(out)!r}")
    inside = Path(os.path.realpath(out.parent)).is_relative_to(os.path.realpath(model))
    if inside and (model / CONFIG_FILE).is_file():  # not beside a GGUF file
        raise ValueError(f"OUT: expected a folder outside of {model}, found {out}")


def refuse_existing(out: Path) -> None:
    """FileExistsError if anything has that name; a symbolic link to nothing is there as well."""
    if os.path.lexists(out):
        raise FileExistsError(f"{out} already exists")


@contextlib.contextmanager
def whole_folder(out: Path, files: Iterable[str]) -> Iterator[Path]:
    """OUT.partial, to be filled with files of these relative names; OUT is its name at the end.

    An exception removes what was written, a kill leaves it for the next run to delete.
    FileExistsError if OUT exists; ValueError if OUT.partial is of others or in use.
    """
    refuse_existing(out)
    folder = PartialFolder(out, files)
    folder.open()
    try:
        folder.empty()
        folder.write_journal()
        yield folder.path
        refuse_existing(out)
        folder.rename()
    except BaseException:
        folder.discard()
        raise
    finally:
        folder.release()
