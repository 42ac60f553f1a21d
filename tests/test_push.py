# SPDX-License-Identifier: Apache-2.0
"""`singlequant push` against a server on this machine that answers as the Hub does."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import edit_config, make_checkpoint
from hub_server import TOKEN, HubServer
from packed_folders import write

from singlequant.checkpoint.folder import load_checkpoint
from singlequant.integrations.hub import push_folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A small packed folder."""
    folder = tmp_path_factory.mktemp("push")
    write(load_checkpoint(make_checkpoint(folder / "source")), folder / "small-w4a4")
    return folder / "small-w4a4"


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run(endpoint: str, *arguments: object, token: str = TOKEN, code: int = 0,
        program: tuple[str, ...] = ("-m", "singlequant", "push")) -> tuple[str, str]:
    """(standard output, standard error) of a command in a process of its own: huggingface_hub reads
    the environment when it is imported."""
    home = {"HF_HOME": os.environ["HF_HOME"]} if "HF_HOME" in os.environ else {}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, *program, *map(str, arguments)], capture_output=True, text=True,
        timeout=120, env={**clean, **home, "HF_ENDPOINT": endpoint, "HF_TOKEN": token,
                          "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def test_pushed_folder_has_the_same_bytes_and_comes_back(packed, hub, tmp_path):
    printed, _ = run(hub.endpoint, packed, "owner/small", "--message", "First try", "--private")
    repository = hub.repositories["owner/small"]
    assert repository.files == contents(packed)
    assert "README.md" in repository.files
    assert repository.private
    assert repository.messages == ["First try"]
    assert f"pushed      {hub.endpoint}/owner/small/commit/" in printed
    fetch = ("import sys, huggingface_hub as h; "
             "h.snapshot_download('owner/small', local_dir=sys.argv[1])")
    run(hub.endpoint, tmp_path / "back", program=("-c", fetch))
    assert load_checkpoint(tmp_path / "back").quantized
    back = {k: v for k, v in contents(tmp_path / "back").items() if not k.startswith(".cache")}
    assert back == contents(packed)


def test_other_files_of_the_folder_stay_at_home(packed, hub, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(packed, folder)
    (folder / "passwords.txt").write_text("secret")
    (folder / "notes").mkdir()
    (folder / "notes" / "README.md").write_text("mine")
    printed, _ = run(hub.endpoint, folder, "owner/small")
    assert hub.repositories["owner/small"].files == contents(packed)
    assert not hub.repositories["owner/small"].private
    assert hub.repositories["owner/small"].messages == ["Upload out, made by singlequant"]
    assert "left out    notes/README.md, passwords.txt" in printed


def test_dry_run_asks_nothing_of_the_hub(packed, hub):
    printed, _ = run(hub.endpoint, packed, "owner/small", "--dry-run", token="")
    assert hub.requests == []
    assert "nothing was uploaded to owner/small" in printed
    for name in contents(packed):
        assert f"file        {name} (" in printed


def test_private_push_to_a_public_repository_is_refused(packed, hub):
    run(hub.endpoint, packed, "owner/small")
    before = dict(hub.repositories["owner/small"].files)
    _, error = run(hub.endpoint, packed, "owner/small", "--private", code=2)
    assert "expected a private repository, found a public one" in error
    assert hub.repositories["owner/small"].files == before
    assert len(hub.repositories["owner/small"].messages) == 1


def test_second_push_is_another_commit(packed, hub):
    run(hub.endpoint, packed, "owner/small", "--private")
    run(hub.endpoint, packed, "owner/small", "--private", "--message", "Again")
    assert hub.repositories["owner/small"].messages[1:] == ["Again"]


def test_refusals_of_the_hub_are_one_line(packed, hub):
    for repo, token, words in (("others/small", TOKEN, "others"), ("owner/a", "hf_wrong", "401")):
        _, error = run(hub.endpoint, packed, repo, token=token, code=2)
        assert error.startswith(f"singlequant: {repo}: nothing was pushed, or not all: ")
        assert words in error
        assert error.count("\n") == 1
    assert not hub.repositories


def test_without_a_network_is_one_line(packed):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, and nobody listens
        _, error = run(endpoint, packed, "owner/small", code=2)
    assert error.startswith("singlequant: owner/small: nothing was pushed, or not all: ")
    assert error.count("\n") == 1


def test_without_a_token_says_where_one_goes(packed, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    _, error = run(hub.endpoint, packed, "owner/small", token="", code=2)
    assert "set HF_TOKEN or run `hf auth login`" in error
    assert hub.requests == []


@pytest.mark.parametrize("name", ["small", "a/b/c", "owner/", "/small", "owner/a b", "o/a--b", ""])
def test_names_that_the_hub_has_not_are_refused(packed, name):
    with pytest.raises(ValueError, match="REPO_ID: expected OWNER/NAME, found"):
        push_folder(packed, name, dry_run=True)


def test_unfinished_folder_is_refused(packed, tmp_path):
    for name, file in (("out.partial", None), ("out", "singlequant-journal.json")):
        shutil.copytree(packed, tmp_path / name)
        if file:
            (tmp_path / name / file).write_text("{}")
        with pytest.raises(ValueError, match="found that of an unfinished run"):
            push_folder(tmp_path / name, "owner/small", dry_run=True)


def test_folder_that_is_not_packed_is_refused(packed):
    source = packed.parent / "source"
    with pytest.raises(ValueError, match="found a model that is not quantized"):
        push_folder(source, "owner/small", dry_run=True)


def test_damaged_folder_is_refused(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "short")
    shard = tmp_path / "short" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match="model-00002-of-00003"):
        push_folder(tmp_path / "short", "owner/small", dry_run=True)
    shutil.copytree(packed, tmp_path / "old")
    edit_config(tmp_path / "old", quantization_config={"quant_method": "other"})
    with pytest.raises(ValueError, match="quantization_config|quant_method"):
        push_folder(tmp_path / "old", "owner/small", dry_run=True)


def test_folder_with_another_byte_is_refused_and_one_with_a_longer_card_is_not(packed, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(packed, folder)
    with (folder / "README.md").open("a") as card:
        card.write("\nThanks to all.\n")
    assert "README.md" in push_folder(folder, "owner/small", dry_run=True).files
    shard = folder / "model-00003-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"model-00003-of-00003\.safetensors: sha256: expected"):
        push_folder(folder, "owner/small", dry_run=True)


def test_without_huggingface_hub_the_extra_is_named(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'singlequant\[hub\]'"):
        push_folder(packed, "owner/small", dry_run=True)
