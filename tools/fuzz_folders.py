#!/usr/bin/env python3
"""Change files of the bundled model, packed or not, at random, and run what comes out.

    python tools/fuzz_folders.py [--minutes M] [--seed N] [--cases N]

Case N is drawn from the seed N: one file of a folder has one to three of its JSON values replaced,
removed or renamed, or some of its bytes changed, cut off or added. `singlequant generate` must then
answer, or end with exit code 2 and one line. Anything else is printed with its seed: a traceback,
a signal, more than 20 s, more than 3 GB. Exit code 1 if there was any.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from singlequant import QuantConfig, bundled_model, quantize_folder
from singlequant.cli.main import main as singlequant

SECONDS, MEMORY_BYTES, LINE_CHARACTERS = 20, 3 << 30, 800
COMMAND = ["generate", "--prompt", "Return the", "--max-new-tokens", "2"]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 65536, 2**31 - 1, 2**31, 2**63, -(2**63), 10**30,
    0.0, -0.5, 1e-300, 1e300, "", "a", "float16", "\x1b[2J", "x" * 3000, "\ud800", [], [0], [[]],
    ["a"], {}, {"a": 1}, [1, 2, 3, 4], [-1, 0], [2**62, 2**62],
]


def changed_json(draw: random.Random, values: Any) -> Any:
    """The values with one of them replaced, removed or renamed."""
    if not isinstance(values, (dict, list)) or not values or draw.random() < 0.1:
        return draw.choice(VALUES)
    if isinstance(values, list):
        place = draw.randrange(len(values))
        new = [changed_json(draw, values[place])] if draw.random() < 0.9 else []
        return [*values[:place], *new, *values[place + 1 :]]
    key = draw.choice([*values])
    rest = {k: v for k, v in values.items() if k != key}
    how = draw.random()
    if how < 0.15:
        return rest
    if how < 0.25:
        return {**rest, draw.choice([*values, "x", ""]): values[key]}
    return {**values, key: changed_json(draw, values[key])}


def changed_bytes(draw: random.Random, data: bytes) -> bytes:
    """The bytes with a few of them changed, cut off or added, near the beginning by preference."""
    end = len(data) if draw.random() < 0.3 else min(len(data), 4096)
    place = draw.randrange(end + 1)
    how = draw.randrange(4)
    if how == 0:
        return data[:place]
    new = draw.randbytes(draw.choice((1, 2, 8, 100)))
    return data[:place] + new + data[place + (0 if how == 1 else len(new)) :]


def changed_file(draw: random.Random, path: Path) -> bytes:
    """The content of a file after one to three changes."""
    data = path.read_bytes()
    for _ in range(draw.choice((1, 1, 2, 3))):
        text = path.suffix in (".json", ".safetensors") and draw.random() < 0.7
        try:
            if not text:
                data = changed_bytes(draw, data)
            elif path.suffix == ".json":
                data = json.dumps(changed_json(draw, json.loads(data))).encode()
            else:
                end = 8 + struct.unpack("<Q", data[:8])[0]
                header = json.dumps(changed_json(draw, json.loads(data[8:end]))).encode()
                data = struct.pack("<Q", len(header)) + header + data[end:]
        except (ValueError, struct.error):  # what an earlier change left is no JSON
            data = changed_bytes(draw, data)
    return data


def run(folder: Path, errors: Path) -> tuple[int, str]:
    """(exit code or minus the signal, standard error) of the command in a child."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            code = singlequant([*COMMAND[:1], str(folder), *COMMAND[1:]])
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, errors.read_text("utf-8", "replace").strip()


def problem(code: int, error: str) -> str:
    """What is wrong with an outcome; "" if nothing is."""
    lines = [line for line in error.splitlines() if not line.startswith("singlequant: warning")]
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    if code not in (0, 2) or "Traceback" in error:
        return f"exit {code}: {lines[-1] if lines else ''}"
    if code == 2 and len(lines) != 1:
        return f"{len(lines)} lines: {error[:300]!r}"
    if any(len(line) > LINE_CHARACTERS for line in lines):
        return f"a line of {max(map(len, lines))} characters: {error[:200]!r}"
    return ""


def case(seed: int, sources: list[Path], work: Path) -> str:
    """What is wrong with case `seed`; "" if nothing is."""
    draw = random.Random(seed)
    source, folder = draw.choice(sources), work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, copy_function=os.link)
    path = draw.choice(sorted(file for file in folder.iterdir() if file.suffix != ".md"))
    data = changed_file(draw, path)
    path.unlink()
    path.write_bytes(data)
    found = problem(*run(folder, work / "errors"))
    return f"seed {seed}, {source.name}/{path.name}: {found}" if found else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, metavar="M")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first case")
    parser.add_argument("--cases", type=int, metavar="N", help="at most so many")
    arguments = parser.parse_args()
    count = wrong = 0
    with tempfile.TemporaryDirectory(prefix="singlequant-fuzz-") as name:
        work = Path(name)
        shutil.copytree(bundled_model(), work / "plain")
        quantize_folder(work / "plain", work / "packed",
                        QuantConfig(method="hadamard", weights="rtn", calibration_tokens=256))
        end = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < end and (arguments.cases is None or count < arguments.cases):
            found = case(arguments.seed + count, [work / "plain", work / "packed"], work)
            count += 1
            if found:
                wrong += 1
                print(found, flush=True)
    print(f"{count} cases, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
