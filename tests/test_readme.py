"""What the README shows must run, and its commands are those of CI."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_block_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "perplexity=" in capsys.readouterr().out


def test_python_block_is_ten_lines_of_code():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 11  # ten, and the import


def test_ci_runs_the_readmes_test_command():
    command = next(b for b in blocks("sh") if "pytest" in b).strip()
    assert command in (ROOT / ".ci" / "run").read_text()


def test_shell_blocks_name_existing_options():
    from singlequant.cli.main import parser

    lines = [line for b in blocks("sh") for line in b.splitlines()]
    commands = [line for line in lines if line.startswith("singlequant ")]
    assert commands
    for line in commands:
        words = shlex.split(line, comments=True)[1:]
        parser().parse_args(words)


def test_links_inside_the_repository_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
