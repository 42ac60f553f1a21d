# SPDX-License-Identifier: Apache-2.0
"""What several commands share: options and lists in options."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ..config import DEFAULT_TABLE_BITS, KV_BITS, TABLE_BITS
from ..distributed import EXECUTORS, Workers, open_workers
from ..progress import ProgressBar, progress_bar as progress_bar


def add_command(commands, name: str, run: Callable, help_text: str) -> argparse.ArgumentParser:
    """A command with the options that every one has; `run` is called with what was parsed."""
    command = commands.add_parser(name, help=help_text, description=help_text)
    command.add_argument("--threads", type=int, metavar="N",
                         help="default: one per CPU that affinity and cgroup quotas allow")
    command.set_defaults(run=run)
    return command


def add_kv_bits(command: argparse.ArgumentParser) -> None:
    """The option --kv-bits of commands that run a model."""
    command.add_argument("--kv-bits", type=int, choices=(*KV_BITS, 32),
                         help="bits of cached keys and values (default: the folder's, 32 if it is "
                              "not quantized)")


def add_dequantize(command: argparse.ArgumentParser) -> None:
    """The option --dequantize of commands that read a model."""
    command.add_argument("--dequantize", action="store_true",
                         help="read a folder that GPTQ, AWQ or compressed-tensors quantized as "
                              "16-bit weights, instead of refusing it")


def add_table_bits(c: argparse.ArgumentParser) -> None:
    """The options about embedding and head."""
    c.add_argument("--head-bits", type=int, choices=TABLE_BITS,
                   help=f"bits of the head; 16 leaves it as it is (default {DEFAULT_TABLE_BITS}; 6 "
                        "where neither is given and the linears make more of the bits; where the "
                        "head is the embedding: as --embedding-bits)")
    c.add_argument("--embedding-bits", type=int, choices=TABLE_BITS,
                   help=f"bits of the embedding, likewise (default {DEFAULT_TABLE_BITS}; where it "
                        "is the head: as --head-bits)")


def add_calibration(command: argparse.ArgumentParser) -> None:
    """The option --calibration; a str, as a Path would make ./self of it the word self."""
    command.add_argument("--calibration", type=some_name, metavar="FILE|self|mixed",
                         help="UTF-8 text (default: a bundled one); self = text that the "
                              "unquantized model writes, mixed = half of it the bundled one; "
                              "./self is a file of that name")


def add_workers(command: argparse.ArgumentParser) -> None:
    """The options about other processes and machines."""
    command.add_argument("--executor", choices=EXECUTORS,
                         help="spread the work: over processes of this machine, or over the "
                              "workers of a Dask scheduler, which must see MODEL and OUT under the "
                              "same paths; the results are the same bytes")
    command.add_argument("--workers", type=int, metavar="N",
                         help="processes of --executor processes (default: one per thread)")
    command.add_argument("--scheduler", metavar="ADDRESS",
                         help="of --executor dask, such as tcp://host:8786")


@contextlib.contextmanager
def opened_workers(arguments: argparse.Namespace) -> Iterator[Workers | None]:
    """The workers that the options of `add_workers` ask for, or None."""
    if arguments.executor is None:
        for option in ("workers", "scheduler"):
            if getattr(arguments, option) is not None:
                raise ValueError(f"--{option}: needs --executor")
        yield None
        return
    with open_workers(arguments.executor, arguments.workers, arguments.scheduler) as workers:
        yield workers


def writing_part(bar: ProgressBar) -> Callable[[int, int], None]:
    """The part of a bar while the model writes its calibration text."""
    return bar.part("writing calibration text", "token")


def some_name(text: str) -> str:
    """The name of a file: an empty text, as an unset variable gives, is none."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return text


def some_path(text: str) -> Path:
    """The path of such a name."""
    return Path(some_name(text))


def names(text: str) -> list[str]:
    """The parts of 'a,b'."""
    return [part.strip() for part in text.split(",") if part.strip()]


def integers(text: str) -> list[int]:
    """The numbers of '0,1'."""
    return [int(part) for part in names(text)]
