# SPDX-License-Identifier: Apache-2.0
"""The seal of a packed folder: recipe.json names the hash of every file, and holds its own.

Nothing in it depends on when or where the folder was made, so that equal inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import _C
from .._C import FormatError
from ..files import MAX_LISTING_BYTES, is_present, read_json
from .folder import json_bytes

RECIPE_FILE = "recipe.json"
FILES, OWN_HASH = "files", "sha256"
SEAL_KEYS = ("kernels", "shards", FILES, OWN_HASH)  # of recipe.json, beside what was asked for
CHUNK = 1 << 20  # bytes that are hashed at a time


def file_facts(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, which is read once, a chunk at a time."""
    digest, size, chunk = hashlib.sha256(), 0, bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(memoryview(chunk)[:count])
            size += count
    return {"bytes": size, OWN_HASH: digest.hexdigest()}


def files_facts(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`file_facts` by name, of several files at a time."""
    names = sorted(names)
    with ThreadPoolExecutor(_C.get_num_threads()) as pool:
        return dict(zip(names, pool.map(lambda name: file_facts(folder / name), names),
                        strict=True))


def sealed(recipe: Mapping[str, Any], files: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """recipe.json of a whole folder. files: of `files_facts`, all but recipe.json itself."""
    values = {**recipe, **facts, FILES: dict(files)}
    return {**values, OWN_HASH: _own_hash(values)}


def unsealed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """recipe.json as it is while the folder is made."""
    return {key: value for key, value in recipe.items() if key not in SEAL_KEYS}


def _own_hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_bytes(values)).hexdigest()


def read_seal(folder: Path) -> dict[str, Any]:
    """recipe.json of a sealed folder. FormatError when it is missing, or not as it was written."""
    path = folder / RECIPE_FILE
    values = read_json(path, MAX_LISTING_BYTES)
    files = values.get(FILES)
    if not isinstance(files, dict) or not isinstance(values.get(OWN_HASH), str):
        raise FormatError(f"{path}: {FILES}, {OWN_HASH}: expected the hashes of the folder's "
                          f"files, found none: only what the files hold can be checked")
    own = _own_hash({key: value for key, value in values.items() if key != OWN_HASH})
    if own != values[OWN_HASH]:
        raise FormatError(f"{path}: {OWN_HASH}: expected {own}, the hash of its other keys, found "
                          f"{values[OWN_HASH]!s:.80}")
    if json_bytes(values) != path.read_bytes():
        raise FormatError(f"{path}: expected its values as the writer spells them, found another "
                          f"spelling")
    return values


def file_faults(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each file that is not there, or not as it was written. files: of the seal."""
    present = [name for name in files if _is_file(folder / name)]
    found = files_facts(folder, present)
    for name, facts in files.items():
        if name not in found:
            yield f"{folder / name}: expected a file of {facts.get('bytes')} bytes, found none"
            continue
        for key in ("bytes", OWN_HASH):
            if found[name][key] != facts.get(key):
                yield f"{folder / name}: {key}: expected {facts.get(key)}, found {found[name][key]}"
                break


def _is_file(path: Path) -> bool:
    try:
        return is_present(path)
    except FormatError:
        return False
