"""What the bits of the KV cache cost in quality: a Markdown table of perplexity and KL.

    python -m benchmarks.bench_kv [MODEL] [--text FILE] [--calibration FILE] [--seq-len 512]
        [--windows 12] [--schemes w4a4,w4a8] [--json FILE]

Each scheme is quantized twice by the default method: as it is, and with the value heads rotated
(kv_bits below 16). KL is from the unquantized model with a float32 cache, in nats per token.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import singlequant as sq
from singlequant.config import SCHEMES
from singlequant.runtime.model import Model
from singlequant.study.evaluate import CachedScorer

from . import common, tables

# name of the row, folder (are value heads rotated?), bits, Hadamard on queries and keys
ROWS = [
    ("32", 16, 32, True),
    ("16", 16, 16, True),
    ("8", 4, 8, True),
    ("4", 4, 4, True),
    ("4, keys' Hadamard alone", 16, 4, True),
    ("4, values' Hadamard alone", 4, 4, False),
    ("8, no Hadamard", 16, 8, False),
    ("4, no Hadamard", 16, 4, False),
]


def bits_per_number(model):
    """Stored bits of a key's or value's number, scales and minima included."""
    cache = model.new_cache(1, 64, layers=1)
    a = model.spec.attention
    return cache.page_bytes * 8 / (2 * cache.page_tokens * a.kv_heads * a.head_dim)


def parse(argv):
    def schemes(text):
        found = text.split(",")
        if not set(found) <= set(SCHEMES):
            raise argparse.ArgumentTypeError(
                f"expected some of {','.join(SCHEMES)}, found {text!r}")
        return found

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=sq.bundled_model())
    parser.add_argument("--text", type=Path, help="default: the bundled held-out text")
    parser.add_argument("--calibration", type=Path, help="default: the bundled text")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--schemes", type=schemes, default="w4a4,w4a8", metavar="A,B")
    common.add_output(parser)
    return parser.parse_args(argv)


def evaluations(arguments, tokens, reference):
    """Yields (scheme or 'original', row, bits per number, Evaluation)."""
    def judge(model):
        return sq.evaluate(model, tokens, arguments.seq_len, reference)

    original = sq.load_checkpoint(arguments.model)
    for bits in (16, 8, 4):
        model = Model(original, bits)
        row = str(bits) if bits == 16 else f"{bits}, keys' Hadamard alone"
        yield "original", row, bits_per_number(model), judge(model)
    for scheme in arguments.schemes:
        with tempfile.TemporaryDirectory() as folder:
            for kv_bits in (16, 4):
                sq.quantize_folder(arguments.model, Path(folder) / str(kv_bits),
                                   sq.QuantConfig(scheme=scheme, kv_bits=kv_bits),
                                   arguments.calibration)
            for row, kv_bits, bits, hadamard in ROWS:
                model = Model(sq.load_checkpoint(Path(folder) / str(kv_bits)), bits, hadamard)
                yield scheme, row, bits_per_number(model), judge(model)


def main():
    arguments = parse(sys.argv[1:])
    model = sq.load(arguments.model)
    text = sq.bundled_text("heldout") if arguments.text is None else arguments.text.read_text()
    tokens = model.encode(text)[: arguments.windows * arguments.seq_len]
    values, rows = common.environment(), []
    common.print_environment(values)
    header = ["scheme", "KV bits", "stored bits a number", "perplexity", "KL"]
    print(tables.table(header, [], left=2))
    for scheme, row, stored, e in evaluations(arguments, tokens, CachedScorer(model)):
        cells = [f"{stored:.2f}", f"{e.perplexity:.3f}", f"{e.kl_mean:.5f}"]
        print(tables.line([scheme, row, *cells]), flush=True)
        rows.append({"scheme": scheme, "kv": row, "stored_bits": stored, **e.to_json()})
    common.write_result({"environment": values, "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
