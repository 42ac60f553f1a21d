# SPDX-License-Identifier: Apache-2.0
"""Task files of the package and of a user's folder, as lm-evaluation-harness reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

# Loaders of `datasets` that read plain files: their data_files may be relative to the task file.
FILE_LOADERS = ("arrow", "csv", "json", "parquet", "text")


def bundled_tasks() -> Path:
    """Folder of the tasks that travel with the package."""
    return Path(str(resources.files("singlequant") / "data" / "tasks"))


def local_configs(folders: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Each YAML file that defines a task or a group; of equal names the last folder's."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            config = _read_task_file(path.resolve())
            name = defined_name(config)
            if name is not None:
                found[name] = path.resolve(), config
    return dict(found.values())


def defined_name(config: dict[str, Any]) -> str | None:
    """What a task or group file defines; None for one that is only included."""
    task = config.get("task")
    return task if isinstance(task, str) else config.get("group")


def is_local(name: str, local: dict[str, dict[str, Any]]) -> bool:
    """Whether a task, or all the members of a group, are defined by these files."""
    if name not in local:
        return False
    members = local[name].get("task") or []
    return isinstance(members, str) or all(
        isinstance(member, str) and is_local(member, local) for member in members
    )


def _read_task_file(path: Path) -> dict[str, Any]:
    """A task file with its includes merged; plain data files made absolute, functions left out."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda *_: None)
    try:
        config = yaml.load(path.read_text("utf-8"), Loader)  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a mapping, found {type(config).__name__}")
    arguments = config.get("dataset_kwargs")
    if isinstance(arguments, dict) and "data_files" in arguments:
        files = _absolute(arguments["data_files"], path.parent)
        config["dataset_kwargs"] = {**arguments, "data_files": files}
    merged: dict[str, Any] = {}
    includes = config.get("include") or []
    for include in [includes] if isinstance(includes, str) else includes:
        merged |= _read_task_file((path.parent / include).resolve())
    return merged | config


def _absolute(files: Any, folder: Path) -> Any:
    """data_files (a name, a list or a mapping of them) relative to a folder; addresses stay."""
    if isinstance(files, dict):
        return {split: _absolute(value, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_absolute(value, folder) for value in files]
    return files if "://" in files else str(folder / files)


def write_view(work: Path, configs: dict[Path, dict[str, Any]]) -> None:
    """One file per task that includes the original and says where its data lie.

    The harness hands data_files to `datasets` as they stand, relative to the working directory; an
    `include` by absolute path is the documented way to overwrite them. `datasets` keeps what it
    makes of them under `work`.
    """
    for number, (path, config) in enumerate(configs.items()):
        view = {key: config[key] for key in ("task", "group", "tag") if key in config}
        arguments = config.get("dataset_kwargs")
        if config.get("dataset_path") in FILE_LOADERS and isinstance(arguments, dict):
            view["dataset_kwargs"] = {"cache_dir": str(work / "cache"), **arguments}
        # JSON is YAML
        (work / f"{number}.yaml").write_text(json.dumps({"include": str(path), **view}), "utf-8")
