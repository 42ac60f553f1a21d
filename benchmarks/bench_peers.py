"""Packed linears beside every int4, int8, 16-bit and 32-bit library that installs from PyPI.

    python -m benchmarks.bench_peers --python PEERS_VENV/bin/python --threads 1 \
        --shapes llama2-7b,llama3-8b --m 1,4,16,64,512 --isa best --seconds 600 --json FILE

Each peer (a class in peers/*.py) has a process of its own, pinned to the same CPUs, which stands
still (SIGSTOP) while another is measured. Rounds walk through all processes in a new order each
time, so that a slow moment of the machine meets all of them. Up to 16 rows, the weights of a
product come from memory: packed copies, four times the last cache together, take turns.
GOP/s counts a multiply-add as two operations; ratios are of medians of one run. --isa avx2 holds
every peer that can be held to AVX2 and leaves out the others, by name.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from singlequant.study.bench import (
    MEMORY_BYTES_MAX,
    ROTATE_ROWS,
    last_level_bytes,
    measure_peaks,
    real_cores,
    summary,
    table_peaks,
)

from . import common, peers
from .peers.base import Peer
from .processes import Process

MODELS = {  # outputs and inputs of each linear
    "llama2-7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "llama3-8b": ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)),
}
OURS = "singlequant_"
# files of peers/ that hold none
NO_PEERS = ("base", "formats_llama_cpp", "gguf_files", "serving", "worker")
QUICK_SHAPES = ((256, 512), (512, 256))
ROUNDS = 7  # that the time of a cell is planned for
MIN_ROUNDS = 3
SLICE_SECONDS = (0.003, 1.0)  # of one peer in one round
PREPARE_SECONDS = 300.0  # that packing may take


def peer_files() -> list[str]:
    """Modules of peers/ that hold peers, ours first."""
    names = sorted(module.name for module in pkgutil.iter_modules(peers.__path__))
    found = [n for n in names if n not in NO_PEERS and not n.startswith("e2e")]
    return sorted(found, key=lambda n: n != OURS)


def find_peers(wanted: Sequence[str] | None = None) -> list[tuple[str, type[Peer]]]:
    """(module, class) of all peers, or of those whose names begin like one of wanted."""
    found = [(name, peer) for name in peer_files()
             for peer in importlib.import_module(f"{peers.__name__}.{name}").PEERS]
    if wanted is None:
        return found
    for text in wanted:
        if not any(peer.name.startswith(text) for _, peer in found):
            raise ValueError(f"--peers: expected names beginning like "
                             f"{', '.join(peer.name for _, peer in found)}, found {text!r}")
    return [(name, p) for name, p in found if any(p.name.startswith(text) for text in wanted)]


class PeerProcess(Process):
    """A peer at work in a process of its own, pinned, which stands still until it is asked."""

    def __init__(self, module: str, peer: type[Peer], arguments: argparse.Namespace) -> None:
        environment, own = {"HF_HUB_OFFLINE": "1"}, module == OURS
        if arguments.isa != "best":
            environment |= {**(peer.avx2 or {}), "SINGLEQUANT_BENCH_ISA": arguments.isa,
                            "SINGLEQUANT_DISABLE_CPU": common.better_tables(arguments.isa)}
        super().__init__(
            "worker", [module, peer.name, arguments.threads, ",".join(map(str, arguments.cpus))],
            python=sys.executable if own else arguments.python, threads=arguments.threads,
            environment=environment, own=own, paused=True, timeout=PREPARE_SECONDS)
        self.peer, self.version = peer, self.hello.get("version")


def start(arguments: argparse.Namespace) -> tuple[list[PeerProcess], dict[str, dict[str, Any]]]:
    """Processes that run, and what is known of every peer, the skipped ones included."""
    processes, known = [], {}
    for module, peer in find_peers(arguments.peers):
        about = known[peer.name] = {"kind": peer.kind, "activations": peer.activations}
        if arguments.isa == "best":
            about["held"] = None
        elif peer.avx2 is None:
            about["skipped"] = f"nothing holds it to {arguments.isa}"
        else:
            about["held"] = " ".join(f"{k}={v}" for k, v in peer.avx2.items()) or "its own build"
        if "skipped" not in about:
            process = PeerProcess(module, peer, arguments)
            if process.version is None:
                process.end()
                about["skipped"] = process.failed
            else:
                about["version"] = process.version
                processes.append(process)
        if "skipped" in about:
            print(f"SKIPPED: {peer.name}: {about['skipped']}", flush=True)
    return processes, known


def measure_cell(
    processes: Sequence[PeerProcess], shape: tuple[int, int], m: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Rows of one shape and m: rounds over all processes until the time is over."""
    times: dict[str, list[float]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for process in processes:
        answer = process.ask(do="load", m=m)
        name = process.peer.name
        facts[name] = answer
        if "failed" not in answer:
            times[name] = []
    live = [p for p in processes if p.peer.name in times]
    low, high = SLICE_SECONDS
    part = min(max(seconds / (ROUNDS * max(len(live), 1)) / 2, low), high)
    shuffle, begin, rounds = np.random.default_rng(m).shuffle, time.perf_counter(), 0
    while live and (rounds < MIN_ROUNDS or time.perf_counter() - begin < seconds):
        shuffle(live)
        for process in live:
            answer = process.ask(do="run", seconds=part)
            if "failed" in answer:
                facts[process.peer.name] = answer
            else:
                times[process.peer.name].append(answer["seconds"])
        live = [p for p in live if "failed" not in facts[p.peer.name]]
        rounds += 1
    n, k = shape
    for process in processes:
        name = process.peer.name
        row = {"peer": name, "kind": process.peer.kind, "n": n, "k": k, "m": m, **facts[name]}
        if "failed" not in row:
            t = summary(times[name])
            operations = 2e-9 * m * n * k
            row |= {"seconds": t, "gops": operations / t["median"],
                    "gops_low": operations / t["high"], "gops_high": operations / t["low"]}
        yield row


def measure(
    processes: Sequence[PeerProcess], arguments: argparse.Namespace,
    shapes: Sequence[tuple[int, int]],
) -> list[dict[str, Any]]:
    """All rows; printed as they come."""
    rows: list[dict[str, Any]] = []
    budget = arguments.seconds / (len(shapes) * len(arguments.m))
    for n, k in shapes:
        for rotated in (True, False):
            ms = [m for m in arguments.m if (m <= ROTATE_ROWS) == rotated]
            if not ms:
                continue
            size = min(4 * last_level_bytes(), MEMORY_BYTES_MAX) if rotated else 0
            if arguments.quick:
                size = min(size, 1 << 20)
            packed = {p.peer.name: p.ask(do="prepare", n=n, k=k, rotate_bytes=size)
                      for p in processes}
            for name, answer in packed.items():
                if "failed" in answer:
                    rows.append({"peer": name, "n": n, "k": k, "m": None, **answer})
                    print(f"n={n} k={k} {name}: {answer['failed']}", flush=True)
            ready = [p for p in processes if "failed" not in packed[p.peer.name]]
            for m in ms:
                for row in measure_cell(ready, (n, k), m, budget):
                    row |= packed[row["peer"]]
                    if "gops" in row:
                        row["gbs"] = row["weight_bytes"] / row["seconds"]["median"] / 1e9
                    rows.append(row)
                    print_row(row)
    return rows


def print_row(row: Mapping[str, Any]) -> None:
    text = f"n={row['n']:<6}k={row['k']:<6}m={row['m']:<4}{row['peer']:<26}"
    if "failed" in row:
        print(text + row["failed"], flush=True)
    else:
        print(text + f"{row['gops']:8.1f} ({row['gops_low']:.0f}-{row['gops_high']:.0f}) GOP/s "
              f"{row['gbs']:6.1f} GB/s", flush=True)


# ---- what follows from the rows -----------------------------------------------------------------


def add_shares(rows: Sequence[dict[str, Any]], bounds: Mapping[int, float | None]) -> None:
    """share_of_peak of ours and the bare ones, share_of_read of all where m = 1.

    bounds: bits of the activations -> GOP/s at most, on the threads of the run.
    """
    reads = {(r["n"], r["k"]): r for r in rows
             if r["peer"] == "read_loop" and r["m"] == 1 and "gops" in r}
    for row in rows:
        if "gops" not in row:
            continue
        bits = next((b for b in (16, 8, 4) if f"w4a{b}" in row["peer"]), None)
        if row["kind"] in ("ours", "bound") and bounds.get(bits):
            row["share_of_peak"] = row["gops"] / bounds[bits]
        read = reads.get((row["n"], row["k"]))
        if row["m"] == 1 and read and row["peer"] != "read_loop":
            row["share_of_read"] = row["gbs"] / read["gbs"]


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def speeds(rows: Sequence[Mapping[str, Any]], m: int) -> dict[str, dict[tuple[int, int], float]]:
    """Peer -> (n, k) -> GOP/s of the rows with m."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    for row in rows:
        if row["m"] == m and "gops" in row:
            found.setdefault(row["peer"], {})[row["n"], row["k"]] = row["gops"]
    return found


def ratio_to(
    rows: Sequence[Mapping[str, Any]], ours: str, m: int, rivals: Sequence[str]
) -> dict[str, Any] | None:
    """Ours over the best of the rivals, shape by shape, as a geometric mean.

    Over the shapes that ours and any rival have; `shapes` says how many, `peers` who was best in
    one of them. None where there are none.
    """
    gops = speeds(rows, m)
    best = {}
    for shape in gops.get(ours, {}):
        there = {r: gops[r][shape] for r in rivals if shape in gops.get(r, {})}
        if there:
            best[shape] = max(there.items(), key=lambda item: item[1])
    if not best:
        return None
    return {"ours": ours, "m": m, "peers": sorted({peer for peer, _ in best.values()}),
            "shapes": len(best),
            "ratio": geometric_mean([gops[ours][s] / best[s][1] for s in best])}


def of_kinds(rows: Sequence[Mapping[str, Any]], *kinds: str) -> list[str]:
    """Peers of these kinds that have a figure."""
    return list(dict.fromkeys(r["peer"] for r in rows if "gops" in r and r["kind"] in kinds))


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each of ours over the best of each kind and over each peer, by m."""
    rivals = {f"best {kind}": of_kinds(rows, kind) for kind in ("int4", "int8", "16-bit", "32-bit")}
    others = of_kinds(rows, "int4", "int8", "16-bit", "32-bit")
    rivals |= {other: [other] for other in others}
    found = []
    for m in dict.fromkeys(row["m"] for row in rows if "gops" in row):
        for ours in of_kinds(rows, "ours"):
            for against, names in rivals.items():
                ratio = ratio_to(rows, ours, m, names)
                if ratio is not None:
                    found.append({**ratio, "against": against})
    return found


# ---- command line -------------------------------------------------------------------------------


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """A type for argparse: shapes of names in MODELS and of NxK, each once."""
    found: list[tuple[int, int]] = []
    for part in text.split(","):
        try:
            found += MODELS[part] if part in MODELS else [common.shape(part)]
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{', '.join(MODELS)}, or {error}") from None
    return list(dict.fromkeys(found))


def interpreter(text: str) -> str:
    """A type for argparse: a program that can be run."""
    if shutil.which(text) is None:
        raise argparse.ArgumentTypeError(f"expected a Python to run, found {text!r}")
    return text


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=1, metavar="N")
    p.add_argument("--cpus", type=partial(common.integers, least=0), metavar="0,1",
                   help="to pin to (default: the first N allowed)")
    p.add_argument("--shapes", type=parse_shapes, default="llama2-7b,llama3-8b", metavar="A,B",
                   help=f"{', '.join(MODELS)} or NxK (default %(default)s)")
    p.add_argument("--m", type=common.integers, default="1,4,16,64,512", metavar="A,B",
                   help="rows (default %(default)s)")
    p.add_argument("--isa", choices=("best", "avx2"), default="best")
    p.add_argument("--peers", metavar="A,B", help="names, or how they begin (default: all)")
    p.add_argument("--python", type=interpreter, default=sys.executable, metavar="FILE",
                   help="interpreter that has the peers (default: this one)")
    p.add_argument("--seconds", type=common.seconds, default=600.0, metavar="S",
                   help="time to measure for, packing aside (default %(default)g)")
    p.add_argument("--quick", action="store_true",
                   help="toy shapes and seconds: shows that all runs, means nothing")
    common.add_output(p, "peers-ISA-THREADS")
    return p


def parse(argv: Sequence[str]) -> argparse.Namespace:
    p = parser()
    arguments = p.parse_args(argv)
    if arguments.quick:
        arguments.seconds, arguments.shapes = min(arguments.seconds, 1.0), list(QUICK_SHAPES)
    arguments.m = sorted(set(arguments.m))
    allowed = sorted(os.sched_getaffinity(0))
    arguments.cpus = arguments.cpus or allowed[: max(arguments.threads, 0)]
    if not set(arguments.cpus) <= set(allowed):
        p.error(f"argument --cpus: expected some of {allowed}, found {arguments.cpus}")
    if arguments.threads < 1 or len(arguments.cpus) != arguments.threads:
        p.error(f"argument --threads: expected as many as CPUs to pin to, {len(arguments.cpus)}, "
                f"found {arguments.threads}")
    arguments.peers = arguments.peers and arguments.peers.split(",")
    return arguments


def run(argv: Sequence[str]) -> dict[str, Any]:
    arguments = parse(argv)
    environment = {**common.environment(argv), "threads": arguments.threads}
    table = arguments.isa
    if table == "best":
        table = environment["kernels"]["active"]
    environment["kernels"]["active"] = table
    common.print_environment(environment)
    peaks = measure_peaks(0.01 if arguments.quick else 0.1)
    cores = real_cores(0.02 if arguments.quick else 0.2)
    bounds = {bits: peak and peak * arguments.threads
              for bits, peak in table_peaks(peaks, table).items()}
    processes, known = start(arguments)
    try:
        rows = measure(processes, arguments, arguments.shapes)
    finally:
        for process in processes:
            process.end()
    add_shares(rows, bounds)
    result = {"what": "peers", "environment": environment, "isa": arguments.isa,
              "threads": arguments.threads, "cpus": arguments.cpus, "quick": arguments.quick,
              "shapes": [list(s) for s in arguments.shapes], "peaks": peaks, "cores": cores,
              "peers": known, "rows": rows, "ratios": ratios(rows)}
    for ratio in result["ratios"]:
        if ratio["against"].startswith("best "):
            print(f"m={ratio['m']:<4} {ratio['ours']:<22} {ratio['ratio']:6.2f}x the "
                  f"{ratio['against']} ({', '.join(ratio['peers'])})")
    common.write_result(result, arguments.json, arguments.keep and
                        f"peers-{arguments.isa}-{arguments.threads}")
    return result


def main() -> None:
    try:
        run(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"bench_peers: {error}")


if __name__ == "__main__":
    main()
