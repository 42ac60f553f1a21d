# SPDX-License-Identifier: Apache-2.0
"""Panels share huge pages: blocks do not touch each other, and their memory comes back."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
from memory import anonymous_bytes

from singlequant import _C

K = 512
BYTES = K // 2  # of a row of 4-bit codes


def pack(rng, rows):
    codes = rng.integers(-8, 8, (rows, K), dtype=np.int8)
    return _C.PackedWeight(_C.pack(codes), np.ones((rows, 1), np.float32), K)


def test_blocks_of_all_sizes_come_and_go_without_touching_each_other():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, K)).astype(np.float32)
    kept = {}
    for step in range(600):
        rows = int(rng.choice([16, 64, 65, 160, 1000, 4000, 9000]))  # 4 KiB to 2.3 MB of panels
        weight = pack(rng, rows)
        kept[step] = weight, _C.linear(x, weight, 8)
        if len(kept) > 24:
            del kept[int(rng.choice(list(kept)))]
        if step % 50 == 0:
            for weight, expected in kept.values():
                assert np.array_equal(_C.linear(x, weight, 8), expected)


def test_blocks_that_are_given_back_do_not_leak():
    """In a process of its own: other tests' blocks leave room that these would take."""
    run = subprocess.run([sys.executable, __file__], check=True, capture_output=True, text=True)
    assert run.stdout == "done\n"


def main() -> None:
    rng = np.random.default_rng(1)
    pack(rng, 1000)
    before = anonymous_bytes()
    weights = [pack(rng, 1000) for _ in range(400)]
    size = 400 * 1000 * BYTES
    assert anonymous_bytes() - before > 0.9 * size
    del weights[1::2]
    weights += [pack(rng, 1000) for _ in range(200)]  # these take the room of the others
    assert anonymous_bytes() - before < 1.2 * size
    del weights
    gc.collect()
    assert anonymous_bytes() - before < 0.1 * size
    print("done")


if __name__ == "__main__":
    main()
