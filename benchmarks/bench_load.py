"""How long a packed folder takes to load from the page cache, and what memory it holds then.

    python -m benchmarks.bench_load OUT... [--repeats 5] [--json FILE]

Every load has a process of its own, and the folders take turns with a copy that bounds them: the
packed words are read from the mapped files into fresh memory, by as many threads. No loader that
keeps its own panels can do less. The memory is that of smaps_rollup, before and after the load.
CPU seconds tell more than seconds where others use the machine.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

import singlequant as sq
from singlequant import _C

from . import common, tables

WORDS = ".weight_packed"
SMAPS = Path("/proc/self/smaps_rollup")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUT", help="packed folders")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", choices=("load", "copy"), help=argparse.SUPPRESS)
    common.add_output(parser)
    return parser.parse_args(argv)


# ---- in a process of its own --------------------------------------------------------------------


def resident():
    """Bytes of this process in memory: all, and what no file is behind."""
    text = SMAPS.read_text()
    return [1024 * int(re.search(rf"^{key}:\s+(\d+)", text, re.MULTILINE)[1])
            for key in ("Rss", "Anonymous")]


def copy_words(checkpoint):
    """The packed words of all linears in memory of their own."""
    views = [checkpoint.tensor(n).reshape(-1) for n in checkpoint.tensors if n.endswith(WORDS)]
    threads = _C.get_num_threads()
    copies = []
    for view in views:  # as a load goes: tensor by tensor, all threads on each
        copy = np.empty_like(view)
        bounds = np.linspace(0, len(view), threads + 1).astype(np.int64)
        workers = [threading.Thread(target=np.copyto, args=(copy[a:b], view[a:b]))
                   for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        copies.append(copy)
    return copies


def worker(kind, folder):
    """One load or copy, as a line of JSON."""
    before, cpu, begin = resident(), time.process_time(), time.perf_counter()
    if kind == "load":
        held = sq.load(folder)
        checkpoint = held.checkpoint
    else:
        checkpoint = sq.load_checkpoint(folder)
        held = copy_words(checkpoint)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    after = resident()
    words = sum(i.nbytes for n, i in checkpoint.tensors.items() if n.endswith(WORDS))
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "words": words,
                      "rss": after[0] - before[0], "anonymous": after[1] - before[1]}))
    del held


# ---- the driver ---------------------------------------------------------------------------------


def measure(kind, folder):
    """What a worker found."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_load", "--worker", kind, str(folder.resolve())],
        cwd=common.ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def row(folder, runs):
    """The medians of one folder, for JSON."""
    load, copy = ({key: float(np.median([r[key] for r in found])) for key in found[0]}
                  for found in (runs["load"], runs["copy"]))
    return {"folder": folder.name, "load": load, "copy": copy,
            "runs": {kind: [r["seconds"] for r in found] for kind, found in runs.items()}}


def main(argv=None):
    arguments = parse(argv)
    if arguments.worker:
        worker(arguments.worker, arguments.folders[0])
        return
    environment = common.environment(argv)
    common.print_environment(environment)
    runs = {folder: {"load": [], "copy": []} for folder in arguments.folders}
    for repeat in range(arguments.repeats + 1):  # the first brings the files into the page cache
        for folder, found in runs.items():
            for kind, values in found.items():
                value = measure(kind, folder)
                if repeat:
                    values.append(value)
    rows = [row(folder, found) for folder, found in runs.items()]
    lines = []
    for r in rows:
        load, copy, gigabytes = r["load"], r["copy"], r["load"]["words"] / 1e9
        lines.append([r["folder"], f"{gigabytes:.2f}", f"{load['seconds']:.2f}",
                      f"{load['cpu_seconds']:.2f}", f"{copy['seconds']:.2f}",
                      f"{copy['cpu_seconds']:.2f}", f"{load['cpu_seconds'] / gigabytes:.2f}",
                      f"{load['rss'] / load['words']:.2f}x"])
    print(tables.table(["", "GB packed", "load, s", "CPU s", "copy, s", "CPU s",
                        "CPU s a GB", "memory over packed"], lines, 1))
    common.write_result({"environment": environment, "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
