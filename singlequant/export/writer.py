# SPDX-License-Identifier: Apache-2.0
"""Writes the packed folder of docs/format.md: one shard per layer, whole or not there at all."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from .._C import FormatError
from ..config import KV_FLOAT16_LARGEST, KV_FLOAT16_LEAST, QuantConfig
from ..files import MAX_LISTING_BYTES, read_json, sync_folder, write_file
from ..info import kernel_names
from ..methods.registry import METHODS
from ..models.spec import LinearSpec, ModelSpec, Site, tensor_name
from ..tensors import INDEX_FILE, write_safetensors
from ..weights import (
    WEIGHT_BITS,
    PackedLinear,
    QuantizedLayer,
    int8_problem,
    packing_problem,
    table_shapes,
)
from .card import CARD_FILE, Figures, model_card
from .folder import (
    CONFIG_FILE,
    check_out,
    copied_files,
    copy_files,
    json_bytes,
    refuse_existing,
    shard_index,
    shard_name,
    shard_names,
    write_json,
)
from .packed import (
    FORMAT_VERSION,
    GUARD,
    GUARD_KEY,
    layer_tensors,
    outer_tensors,
    quantization_json,
)
from .partial import OUTER, PartialFolder, add_advice, content_digest, source_of
from .seal import RECIPE_FILE, file_facts, files_facts, sealed, unsealed

if TYPE_CHECKING:
    from ..checkpoint.folder import Checkpoint

__all__ = ["ModelWriter", "estimate_size"]

WIDE_CACHE = "kv_bfloat16"  # in the journal: a layer had such keys or values
SHARD = "shard"  # in the journal: `file_facts` of a shard
SEAL_LINES = 160  # bytes of recipe.json about a file


def _packed_config(checkpoint: Checkpoint, config: QuantConfig) -> dict[str, Any]:
    """config.json of the folder that config makes of checkpoint."""
    quantization = quantization_json(config, checkpoint.spec)
    return {**checkpoint.config, GUARD_KEY: GUARD, "quantization_config": quantization}


# ---- the folder ---------------------------------------------------------------------------------


class ModelWriter:
    """Writes OUT layer by layer, in OUT.partial; OUT appears complete, by one rename.

    As a context manager: an exception keeps the layers that are finished, for a later run with
    resume, and its message says so. If there are none, what the run made is removed, the parents
    of OUT included. An interrupt or a kill leaves everything. FileExistsError if OUT exists;
    ValueError if OUT.partial is of another run (with resume), holds files of others, or is in use.
    """

    def __init__(
        self,
        out: str | Path,
        checkpoint: Checkpoint,
        config: QuantConfig,
        *,
        resume: bool = False,
        resumable: bool = True,
        replace: bool = False,
        provenance: Mapping[str, Any] | None = None,
        bits: Mapping[str, int] | None = None,
        blas: bool = True,
    ) -> None:
        """resumable: False removes finished layers as well when an exception ends the run.
        replace: delete a finished folder of an earlier run that has the name OUT.
        provenance: JSON values that a resumed run must share, such as a hash of the text. bits:
        of the weights by linear, likewise; those of absent linears are 4. blas: whether sums of a
        BLAS library are in what is written; if not, recipe.json does not name it."""
        config = config.settled(checkpoint.spec.tied)
        self._out, self._checkpoint, self._config = Path(out), checkpoint, config
        self._resume, self._resumable, self._replace = resume, resumable, replace
        self._blas = blas
        check_run(self._out, checkpoint, config)
        self._total = checkpoint.spec.layers + 1
        self._copies = copied_files(checkpoint.path)
        self._folder = PartialFolder(
            self._out, [RECIPE_FILE, *shard_names(checkpoint.spec.layers), INDEX_FILE,
                        CONFIG_FILE, CARD_FILE, *self._copies])
        self._partial = self._folder.path
        self._finished: set[int] = set()
        self._completed = False
        self._recipe = {
            "format_version": FORMAT_VERSION,
            "config": config.to_json(),
            "layers": checkpoint.spec.layers,
            "source_sha256": checkpoint.fingerprint,
            "provenance": dict(provenance or {}),
            **({"bits": dict(bits)} if bits else {}),
        }

    def __enter__(self) -> ModelWriter:
        if self._replace:
            self._folder.delete_finished()
        refuse_existing(self._out)
        going_on = self._folder.open() and self._resume and (self._partial / RECIPE_FILE).is_file()
        try:
            if going_on:
                self._go_on()
        except BaseException:
            self._folder.release()
            raise
        try:
            if not going_on:
                self._folder.empty()
                self._folder.write_journal()
                write_json(self._partial / RECIPE_FILE, self._recipe)
            if not self._is_whole(OUTER):
                self._write_outer()
            return self
        except BaseException as error:
            self._leave(error)
            raise

    def _go_on(self) -> None:
        """Take over the finished layers. ValueError if this run would make other ones."""
        recipe = self._partial / RECIPE_FILE
        found = unsealed(read_json(recipe, MAX_LISTING_BYTES))
        source = {"source_sha256": found.get("source_sha256")}
        _compare_recipes(recipe, found, {**self._recipe, **source})
        finished = {i for i in range(self._checkpoint.spec.layers) if self._is_whole(str(i))}
        if finished:
            self._folder.require_kernels()
        written = [OUTER] if OUTER in self._folder.layers else []
        written += map(str, sorted(finished))
        if source["source_sha256"] != self._recipe["source_sha256"]:
            if part := self._folder.changed_part(self._checkpoint, written):
                raise ValueError(f"{recipe}: cannot resume: source_sha256: {part}")
            _compare_recipes(recipe, found, self._recipe)
        self._folder.require_sources(self._checkpoint, written)
        self._finished = finished
        self._folder.write_journal()  # files that this run writes beside

    def _shard(self, key: str) -> Path:
        """The file of a layer, by its number as a string, or of what is outside the layers."""
        return self._partial / shard_name(1 if key == OUTER else int(key) + 2, self._total)

    def _is_whole(self, key: str) -> bool:
        """Whether a shard is as the journal says that it was written."""
        facts, path = self._folder.layers.get(key, {}).get(SHARD), self._shard(key)
        return facts is not None and path.is_file() and file_facts(path) == facts

    def finished_layers(self) -> set[int]:
        """Layers that are already whole on the disk: those of the run that is resumed, and ours."""
        return set(self._finished)

    def _write_outer(self) -> None:
        """The tensors outside the layers: embedding and head in the config's bits, all else as it
        is."""
        bits = self._config.table_bits(self._checkpoint.spec)
        write_safetensors(self._shard(OUTER), outer_tensors(self._checkpoint.outer, bits))
        self._note(OUTER, _entry(self._shard(OUTER), self._checkpoint, OUTER))

    def write_layer(self, layer: QuantizedLayer) -> None:
        """Writes one layer's shard. ValueError if the layer is not what config and model ask."""
        path = self._shard(str(layer.index))
        self._note(str(layer.index), write_shard(path, layer, self._checkpoint, self._config))

    def take_layer(self, layer: int, path: Path, entry: Mapping[str, Any]) -> None:
        """Takes over a shard that `write_shard` wrote elsewhere on the same file system."""
        os.replace(path, self._shard(str(layer)))
        sync_folder(self._partial)
        self._note(str(layer), entry)

    def _note(self, key: str, entry: Mapping[str, Any]) -> None:
        """Say in the journal what a shard is and was made of. Without that it does not count."""
        self._folder.layers[key] = dict(entry)
        self._folder.write_journal()
        if key != OUTER:
            self._finished.add(int(key))

    def complete(self) -> Path:
        """Writes index, config and copies, behind which the folder can be opened; where it is."""
        missing = sorted(set(range(self._checkpoint.spec.layers)) - self._finished)
        if missing:
            raise ValueError(
                f"finish: layers not written: {', '.join(map(str, missing[:8]))} (a generator "
                f"gives its layers only once)"
            )
        shards = [self._partial / name for name in shard_names(self._total - 1)]
        write_json(self._partial / INDEX_FILE, shard_index(shards))
        config = self._config
        if any(entry.get(WIDE_CACHE) for entry in self._folder.layers.values()):
            config = replace(config, kv_dtype="bfloat16")
        write_json(self._partial / CONFIG_FILE, _packed_config(self._checkpoint, config))
        copy_files(self._checkpoint.path, self._partial, self._copies)
        self._completed = True
        return self._partial

    def finish(self, figures: Figures | None = None) -> Path:
        """Completes the folder, writes the model card, and gives the folder its name. Returns OUT.

        figures: what was measured on the folder that `complete` returned.
        """
        if not self._completed:
            self.complete()
        shards = [self._partial / name for name in shard_names(self._total - 1)]
        write_file(self._partial / CARD_FILE, model_card(
            self._checkpoint, self._config, packed_linears(self._checkpoint, self._config),
            shards=shards, written=self._recipe["provenance"].get("calibration"),
            figures=figures))
        self._seal()
        refuse_existing(self._out)
        self._folder.rename()
        return self._out

    def _seal(self) -> None:
        """Writes recipe.json again: on what kernels and of what bytes the shards were made, and
        the hash of every file."""
        shards = [OUTER, *map(str, range(self._checkpoint.spec.layers))]
        journal = {key: self._folder.layers[key] for key in shards}
        files = {self._shard(key).name: entry[SHARD] for key, entry in journal.items()}
        files |= files_facts(self._partial, [INDEX_FILE, CONFIG_FILE, CARD_FILE, *self._copies])
        sources = {key: entry["source_sha256"] for key, entry in journal.items()}
        kernels = {key: name for key, name in kernel_names().items() if self._blas or key != "blas"}
        write_json(self._partial / RECIPE_FILE,
                   sealed(self._recipe, files, kernels=kernels, shards=sources))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        changed = _written_to(self._checkpoint, error)
        self._leave(changed or error)
        if changed is not None:
            raise changed from error

    def _leave(self, error: BaseException | None) -> None:
        """Removes what this run made, unless it is to be resumed or was renamed."""
        interrupted = error is not None and not isinstance(error, Exception)
        finished = bool(self._finished) and self._resumable and error is not None
        if not (self._resume or interrupted or finished):
            self._folder.discard()
        elif error is not None and self._finished and self._partial.is_dir():
            count = len(self._finished)
            add_advice(error, f"{count} finished layer{'s are' if count > 1 else ' is'} in "
                              f"{self._partial}: the same run with resume (--resume) goes on")
        self._folder.release()


def _written_to(checkpoint: Checkpoint, error: BaseException | None) -> FormatError | None:
    """The better message where somebody wrote to a file of the source, and what was read of it is
    refused for another reason: such as numbers that are not finite."""
    if isinstance(error, ValueError):
        try:
            source_of(checkpoint).files.require_unchanged()
        except FormatError as changed:
            return None if str(error).startswith(str(changed)) else changed
    return None


def write_shard(
    path: Path, layer: QuantizedLayer, checkpoint: Checkpoint, config: QuantConfig
) -> dict[str, Any]:
    """Writes one layer's shard to path; the journal's entry about it. ValueError if the layer is
    not what config and model ask."""
    _check_layer(layer, checkpoint, config)
    write_safetensors(path, layer_tensors(layer, config))
    # a resumed run does not see it again
    wide = layer.kv_largest > KV_FLOAT16_LARGEST or 0 < layer.kv_least < KV_FLOAT16_LEAST
    return _entry(path, checkpoint, str(layer.index)) | ({WIDE_CACHE: True} if wide else {})


def _entry(path: Path, checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    """What the journal says of a shard: what it was made of, and what it is."""
    return {"source_sha256": content_digest(checkpoint, key), SHARD: file_facts(path)}


def _compare_recipes(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """ValueError naming a field in which a saved recipe differs from this run's: bits of linears,
    which follow from the others, only where no other differs."""

    def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            nested = isinstance(value, Mapping)
            flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
        return flat

    old, new = flatten(found), flatten(expected)
    for key in sorted(set(old) | set(new), key=lambda key: (key.startswith("bits."), key)):
        if old.get(key) != new.get(key):
            raise ValueError(
                f"{path}: cannot resume: {key}: expected {new.get(key)!r}, found {old.get(key)!r} "
                f"(run without resume to start again)"
            )


# ---- what a run and a layer must be --------------------------------------------------------------


def check_run(out: Path | None, checkpoint: Checkpoint, config: QuantConfig) -> None:
    """ValueError unless config can be made of checkpoint in out (None: nowhere). Reads nothing."""
    checkpoint.require_unquantized()
    if out is not None:
        check_out(out, checkpoint.path)
    config.settled(checkpoint.spec.tied)
    names = [name for name, _ in _linears(checkpoint)]
    last = names[-1]
    names += _left_alone(checkpoint.spec)
    for pattern in config.ignore:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"ignore: {pattern!r} matches no linear of the model; the last layer "
                             f"has such as {last}")
    for name, linear in packed_linears(checkpoint, config).items():
        problem = packing_problem(name, linear.k, config)
        if problem:
            raise ValueError(problem)


def _linears(checkpoint: Checkpoint) -> Iterator[tuple[str, LinearSpec]]:
    """(name, spec) of every linear of the model."""
    for i in range(checkpoint.spec.layers):
        for linear in checkpoint.spec.layer(i).linears.values():
            yield linear.at(i), linear


def _left_alone(spec: ModelSpec) -> Iterator[str]:
    """What is never packed as a linear, and may be named by `ignore` all the same: embedding and
    head, which then keep their bits, and what recipes of others name."""
    yield from (spec.head, spec.embed)
    for i in range(spec.layers):
        for tensor in spec.layer(i).dense.values():
            yield tensor_name(tensor.name, i).removesuffix(".weight")


def packed_linears(checkpoint: Checkpoint, config: QuantConfig) -> dict[str, LinearSpec]:
    """Every linear that config packs, by name."""
    return {name: linear for name, linear in _linears(checkpoint) if not config.ignores(name)}


def _check_layer(layer: QuantizedLayer, checkpoint: Checkpoint, config: QuantConfig) -> None:
    """ValueError unless the layer has exactly the tensors that checkpoint and config ask for."""
    i = layer.index
    if not 0 <= i < checkpoint.spec.layers:
        raise ValueError(f"layer: expected 0 to {checkpoint.spec.layers - 1}, found {i}")
    spec = checkpoint.spec.separate()
    names = {linear.at(i): linear for linear in spec.layer(i).linears.values()}
    packed = {name: (x.n, x.k) for name, x in names.items() if not config.ignores(name)}
    dense = {name: shape for name, shape in spec.layer_tensors(i)
             if name.removesuffix(".weight") not in packed or not name.endswith(".weight")}
    sites = spec.layer(i).sites
    for what in ("rotations", "clips", "int8_inputs"):
        spec.layer(i).require_sites(f"layer {i}: {what}", getattr(layer, what))
    for site, count in layer.int8_inputs.items():
        problem = int8_problem(count, sites[site].k, config)
        if problem:
            raise ValueError(f"layer {i}: {site}: int8_inputs: {problem}, found {count}")
    _check_shapes(f"layer {i}: packed", packed, layer.packed)
    _check_shapes(f"layer {i}: dense", dense, layer.dense)
    for name, array in layer.dense.items():
        if array.dtype.name not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"{name}: expected 32 or 16-bit floats, found {array.dtype}")
    for name, linear in layer.packed.items():
        groups = linear.shape[1] // config.group_size if config.group_size else 1
        if linear.scales.shape[1] != groups:
            raise ValueError(
                f"{name}: expected {groups} scales per row, found {linear.scales.shape[1]}"
            )
    for site, rotation in layer.rotations.items():
        if rotation.k != sites[site].k:
            raise ValueError(
                f"layer {i}: {site}: expected a rotation of {sites[site].k} inputs, "
                f"found {rotation!r}"
            )


def _check_shapes(
    what: str,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, PackedLinear | NDArray[Any]],
) -> None:
    for name in [*expected, *found]:
        want = expected.get(name, "no such tensor")
        have = tuple(found[name].shape) if name in found else "none"
        if want != have:
            raise ValueError(f"{what}: {name}: expected {want}, found {have}")


# ---- how large it will be -----------------------------------------------------------------------


def estimate_size(checkpoint: Checkpoint, config: QuantConfig) -> int:
    """Bytes of the folder that config would make of checkpoint, within a few percent."""
    spec, packed = checkpoint.spec.separate(), packed_linears(checkpoint, config)
    total = sum((checkpoint.path / n).stat().st_size for n in copied_files(checkpoint.path))
    total += len(json_bytes(_packed_config(checkpoint, config)))
    total += SEAL_LINES * (len(copied_files(checkpoint.path)) + 2 + (spec.layers + 1) * 3 // 2)
    total += len(model_card(checkpoint, config, packed))
    folded, method = _folded_tensors(checkpoint, config), METHODS[config.method]
    usual, tables = checkpoint.tensors[f"{spec.embed}.weight"], config.table_bits(spec)
    for name, shape in spec.tensors():
        entry = 2 * len(name) + 105  # in the header of its shard, and its line of the index
        linear = name.removesuffix(".weight")
        total += entry
        if linear in packed and linear != name:
            n, k = shape
            groups = k // config.group_size if config.group_size else 1
            scale_bytes = 2 if config.group_size else 4
            total += n * (int(k * config.bits) // 8 + scale_bytes * groups) + 16 + 2 * entry
            if config.bits > WEIGHT_BITS[0]:  # weight_bits, and the linear's line of the recipe
                total += 8 + entry + len(name)
        elif linear in tables:
            codes, scales = table_shapes(*shape, tables[linear])
            total += prod(codes) + 2 * prod(scales) + entry
        elif name in folded:
            total += 4 * prod(shape)
        else:
            info = checkpoint.tensors.get(name, usual)
            total += prod(shape) * info.nbytes // prod(info.shape)
    return total + sum(method.online_bytes(site.reads, site.k) for i in range(spec.layers)
                       for site in _packed_sites(checkpoint, config, i))


def _packed_sites(checkpoint: Checkpoint, config: QuantConfig, i: int) -> list[Site]:
    """The sites of layer i with a linear that config packs."""
    return [site for site in checkpoint.spec.layer(i).sites.values()
            if not all(config.ignores(checkpoint.linear_name(i, role)) for role in site.roles)]


def _folded_tensors(checkpoint: Checkpoint, config: QuantConfig) -> set[str]:
    """Tensors that the method's balance multiplies: in float32 unless they are packed."""
    balances, names = METHODS[config.method].balances, set()
    for i in range(checkpoint.spec.layers):
        norms = checkpoint.spec.layer(i).norms
        for site in _packed_sites(checkpoint, config, i):
            if site.reads not in balances or site.producer is None:
                continue
            roles = [*site.roles]
            if site.producer in norms:
                names.add(f"{tensor_name(norms[site.producer].name, i)}.weight")
            else:
                roles.append(site.producer)
            names |= {f"{checkpoint.linear_name(i, role)}.weight" for role in roles}
    return names
