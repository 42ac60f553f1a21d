# SPDX-License-Identifier: Apache-2.0
"""Packed folders on the Hub, through huggingface_hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.folder import Checkpoint, load_checkpoint
from ..checkpoint.verify import verify_folder
from ..export.card import CARD_FILE
from ..export.folder import CONFIG_FILE, copied_files
from ..export.partial import JOURNAL_FILE
from ..export.writer import RECIPE_FILE
from ..tensors import INDEX_FILE

__all__ = ["Pushed", "push_folder"]


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be. files: bytes by name. left_out: what else is in the folder.
    url: of the commit, None in a dry run."""

    repo_id: str
    files: dict[str, int]
    left_out: tuple[str, ...]
    url: str | None = None


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    message: str | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Pushed:
    """Upload a packed folder to the Hub's repository OWNER/NAME, which is made if it is not there.

    The folder is verified first. Only the files of docs/format.md are uploaded. private: of a
    repository that is made; one that is there must be private as well. message: of the commit.
    dry_run: check, and upload nothing. The token is huggingface_hub's own, of HF_TOKEN or
    `hf auth login`. ValueError or FormatError for a folder that is not whole; ConnectionError with
    the Hub's reason when it cannot be reached or refuses.
    """
    hub = require_hub()
    folder = Path(folder)
    _check_name(repo_id)
    checkpoint = _whole_folder(folder, progress)
    files = {name: (folder / name).stat().st_size for name in _own_files(checkpoint)}
    found = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))
             if path.is_file())
    pushed = Pushed(repo_id, files, tuple(name for name in found if name not in files))
    if dry_run:
        return pushed
    if hub.get_token() is None:
        raise ValueError("token: expected one of huggingface_hub, found none: set HF_TOKEN or run "
                         "`hf auth login`")
    try:
        url = _upload(hub.HfApi(library_name="singlequant"), pushed, folder, private,
                      message or f"Upload {folder.resolve().name}, made by singlequant")
    except _Public:
        raise ValueError(f"{repo_id}: expected a private repository, found a public one of that "
                         f"name") from None
    except Exception as error:  # of huggingface_hub and of its HTTP library, which versions change
        raise ConnectionError(f"{repo_id}: nothing was pushed, or not all: "
                              f"{str(error) or type(error).__name__}") from error
    return Pushed(repo_id, pushed.files, pushed.left_out, url)


def require_hub() -> Any:
    """The module huggingface_hub. ImportError that names the extra when it is missing."""
    try:
        import huggingface_hub
        import huggingface_hub.utils  # which the module's own attributes leave out
    except ImportError:
        raise ImportError("push needs huggingface_hub: pip install 'singlequant[hub]'") from None
    return huggingface_hub


class _Public(Exception):
    """The repository is there, and public."""


def _upload(api: Any, pushed: Pushed, folder: Path, private: bool, message: str) -> str:
    """The URL of the commit."""
    api.create_repo(pushed.repo_id, private=private or None, exist_ok=True)
    if private and not api.repo_info(pushed.repo_id).private:
        raise _Public
    commit = api.upload_folder(repo_id=pushed.repo_id, folder_path=folder, commit_message=message,
                               allow_patterns=[*pushed.files])
    return str(commit.commit_url)


def _check_name(repo_id: str) -> None:
    """ValueError unless it is OWNER/NAME, as the Hub spells names."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        problem = "" if repo_id.count("/") == 1 else "expected one slash"
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ValueError(f"REPO_ID: expected OWNER/NAME, found {repo_id!r:.200}: {problem}")


def _whole_folder(folder: Path, progress: Callable[[int, int], None] | None) -> Checkpoint:
    """The opened folder, which was verified: the card alone may differ, as people add to it.

    ValueError or FormatError if it is not a packed one, or not whole.
    """
    if (folder / JOURNAL_FILE).exists() or folder.resolve().name.endswith(".partial"):
        raise ValueError(f"{folder}: expected a packed folder that is whole, found that of an "
                         f"unfinished run: finish it with --resume")
    checkpoint = load_checkpoint(folder)
    if not checkpoint.quantized:
        raise ValueError(f"{folder}: expected a packed folder, as quantize writes, found a model "
                         f"that is not quantized")
    for fault in verify_folder(folder, progress=progress):
        if not fault.startswith(f"{folder / CARD_FILE}: "):
            raise ValueError(fault)
    return checkpoint


def _own_files(checkpoint: Checkpoint) -> list[str]:
    """Names of the files of docs/format.md that the folder has."""
    shards = {info.path.name for info in checkpoint.tensors.values()}
    others = [CARD_FILE, CONFIG_FILE, INDEX_FILE, RECIPE_FILE]
    return [*(name for name in others if (checkpoint.path / name).is_file()),
            *copied_files(checkpoint.path), *sorted(shards)]
