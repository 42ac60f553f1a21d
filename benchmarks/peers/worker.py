"""One peer in one process; `serving.py` reads the orders and writes the answers.

    prepare n k rotate_bytes   pack a weight as often as makes rotate_bytes (0: once)
    load m                     take activations, multiply by each copy, check against x W^T
    run seconds                repeat the product for so long; median seconds of a call

Started by bench_peers.py as `python -m benchmarks.peers.worker MODULE PEER THREADS CPUS`. A peer
that fails says so in `failed` and stays.
"""

import importlib
import statistics
import sys
import time

from . import base, serving


def find(module: str, name: str):
    """The class of that name in a file of peers."""
    peers = importlib.import_module(f"benchmarks.peers.{module}").PEERS
    return next(p for p in peers if p.name == name)


class Worker:
    """The peer, its weight and activations."""

    def __init__(self, module: str, name: str, threads: int) -> None:
        self.peer = find(module, name)(threads)

    def prepare(self, n: int, k: int, rotate_bytes: int) -> dict:
        import numpy as np

        self.weight = np.random.default_rng(0).standard_normal((n, k), np.float32) * np.float32(0.1)
        size = self.peer.weight_bytes(n, k)
        copies = max(2, -(-rotate_bytes // size)) if rotate_bytes else 1
        self.peer.prepare(self.weight, copies)
        self.copies = copies
        return {"weight_bytes": size, "copies": copies}

    def load(self, m: int) -> dict:
        import numpy as np

        x = np.random.default_rng(m).standard_normal((m, self.weight.shape[1]), np.float32)
        self.peer.load(x)
        for _ in range(self.copies):  # some libraries compile or repack at a copy's first call
            self.peer.run()
        y = self.peer.result()
        if y is None:
            return {"relative_error": None}
        error, limit = base.relative_error(y, x, self.weight), base.TOLERANCE[self.peer.kind]
        if not error <= limit:
            raise ValueError(f"relative error {error:.3g}, more than {limit:g}: not the product")
        return {"relative_error": error}

    def run(self, seconds: float) -> dict:
        run, clock = self.peer.run, time.perf_counter
        run()  # brings code, threads and clock back after the others' turn
        times, begin = [], clock()
        while not times or clock() - begin < seconds:
            start = clock()
            own = run()
            times.append(clock() - start if own is None else own)
        return {"seconds": statistics.median(times), "calls": len(times)}


def main(module: str, name: str, threads: str, cpus: str) -> None:
    serving.serve(lambda: Worker(module, name, int(threads)),
                  lambda worker: {"version": worker.peer.version()}, cpus)


if __name__ == "__main__":
    main(*sys.argv[1:])
