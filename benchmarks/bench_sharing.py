"""How two processes on the same CPUs share them: decode alone, and two at once.

    python -m benchmarks.bench_sharing [MODEL] [--tokens 128] [--rounds 7]
        [--json FILE] [--keep]

Each process decodes one sequence with a thread on every CPU, as if it were alone. Alone and
together take turns. `sum over alone` is the tokens per second of both together over those of one
alone: 1 is a fair share without a loss. `CPU time` is what a token takes of the CPUs together,
over alone: what waiting costs. Others on the machine spoil the first figure more than the second.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import singlequant as sq
from singlequant.study.bench_model import decode

from . import common

PROCESSES = 2
SPIN_UP = 8  # tokens before a process says that it is ready


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=sq.bundled_model())
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    common.add_output(parser, "sharing")
    return parser.parse_args(argv)


def worker(arguments):
    """Decodes until standard input is closed: a line in, a line of times out."""
    model = sq.load(arguments.model)
    tokens = np.random.default_rng(0).integers(0, model.spec.vocab, arguments.tokens)
    decode(model, tokens[:SPIN_UP])
    print("ready", flush=True)
    for _ in sys.stdin:
        cpu, begin = time.process_time(), time.perf_counter()
        decode(model, tokens)
        print(json.dumps({"seconds": time.perf_counter() - begin,
                          "cpu_seconds": time.process_time() - cpu}), flush=True)


def start(arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bench_sharing", "--worker", "--tokens",
         str(arguments.tokens), str(arguments.model.resolve())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=common.ROOT)
    process.stdout.readline()
    return process


def together(processes):
    """What each of processes that begin at once found."""
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return [json.loads(process.stdout.readline()) for process in processes]


def measure(arguments):
    """The rounds: of each, one process alone and all at once."""
    processes = [start(arguments) for _ in range(PROCESSES)]
    try:
        return [{"alone": together(processes[i % PROCESSES :][:1])[0],
                 "together": together(processes)} for i in range(arguments.rounds)]
    finally:
        for process in processes:
            process.stdin.close()
            process.wait()
            process.stdout.close()


def summary(rounds, tokens):
    """Tokens per second alone and of all together, and the two ratios, as medians of rounds."""
    rates = [tokens / r["alone"]["seconds"] for r in rounds]
    sums = [sum(tokens / t["seconds"] for t in r["together"]) for r in rounds]
    costs = [np.mean([t["cpu_seconds"] for t in r["together"]]) / r["alone"]["cpu_seconds"]
             for r in rounds]
    alone, both = float(np.median(rates)), float(np.median(sums))
    return {"alone": alone, "together": both, "sum_over_alone": both / alone,
            "cpu_time": float(np.median(costs))}


def main(argv=None):
    arguments = parse(argv)
    if arguments.worker:
        worker(arguments)
        return
    environment = common.environment(argv)
    common.print_environment(environment)
    rounds = measure(arguments)
    found = summary(rounds, arguments.tokens)
    print(f"alone {found['alone']:.1f} tokens/s, {PROCESSES} at once {found['together']:.1f}: sum "
          f"over alone {found['sum_over_alone']:.2f}, CPU time a token {found['cpu_time']:.2f}x")
    common.write_result({"environment": environment, "model": arguments.model.name,
                         "processes": PROCESSES, **found, "rows": rounds},
                        arguments.json, arguments.keep and "sharing")


if __name__ == "__main__":
    main()
