"""How long GPTQ of a whole model takes, beside llm-compressor's on the same CPU and tokens.

    python -m benchmarks.quantize_side_by_side MODEL --peer-python FILE [--tokens 8192]
        [--rounds 3] [--json FILE] [--keep]

Ours is `quantize_folder` from the folder to the packed folder: 4 bits a weight, one scale per
output channel, embedding and head as they are, with its rotations. Theirs is `oneshot` with a
GPTQModifier of the same grid, from the model in memory: reading and writing are not timed, which
favours it. Both get the same windows and as many threads. Rounds take turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import singlequant as sq

from . import common
from .experiments import command as options

PEER = Path(__file__).with_name("quantize_llm_compressor.py")


def ours(model: Path, tokens: int) -> float:
    """Seconds of the whole of `quantize_folder`."""
    config = sq.QuantConfig(bits=4, head_bits=16, embedding_bits=16, calibration_tokens=tokens)
    with tempfile.TemporaryDirectory() as folder:
        return sq.quantize_folder(model, Path(folder) / "out", config).seconds


def theirs(python: Path, model: Path, windows: np.ndarray, threads: int) -> dict:
    """What the peer prints. RuntimeError with its last words when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "windows.npy"
        np.save(path, windows)
        done = subprocess.run([python, PEER, model.resolve(), path, str(threads)], cwd=folder,
                              capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{PEER.name}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--peer-python", type=Path, required=True, metavar="FILE",
                        help="the Python that has llm-compressor")
    parser.add_argument("--tokens", type=options.positive, default=8192)
    parser.add_argument("--rounds", type=options.positive, default=3)
    common.add_output(parser, "quantize-side-by-side")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments, environment = parse(argv), common.environment()
    common.print_environment(environment)
    threads = sq._C.get_num_threads()
    checkpoint = sq.load_checkpoint(arguments.model)
    config = sq.QuantConfig(calibration_tokens=arguments.tokens)
    windows = sq.calibration_windows(checkpoint, config)
    rows: dict[str, list[float]] = {"ours": [], "llm-compressor": []}
    for _ in range(arguments.rounds):
        rows["ours"].append(ours(arguments.model, arguments.tokens))
        peer = theirs(arguments.peer_python, arguments.model, windows, threads)
        rows["llm-compressor"].append(peer["seconds"])
        print({name: round(seconds[-1], 1) for name, seconds in rows.items()}, flush=True)
    medians = {name: float(np.median(seconds)) for name, seconds in rows.items()}
    ratio = medians["llm-compressor"] / medians["ours"]
    print(f"{checkpoint.name}, {windows.size} tokens, {threads} threads, {peer['version']}:")
    print(f"ours {medians['ours']:.1f} s, llm-compressor {medians['llm-compressor']:.1f} s, "
          f"{ratio:.1f} times as long")
    common.write_result({"what": "quantize side by side", "environment": environment,
                         "model": checkpoint.name, "tokens": int(windows.size),
                         "threads": threads, "rows": rows, "peer": peer["version"],
                         "ratio": ratio},
                        arguments.json, arguments.keep and "quantize-side-by-side")


if __name__ == "__main__":
    main()
