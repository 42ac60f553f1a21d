"""How long quantizing takes on many machines: a simulation of the schedule, and its check.

    python -m benchmarks.scale --page docs/scale.md   the table of that page, anew
    python -m benchmarks.scale --check 1,2,4          a made model on local processes

The table takes the seconds of one machine from the newest results of `bench_quantize`, or from
those that `--costs` names. The check prints measured and simulated seconds. It takes those of each
call from the very run whose whole it predicts: it is a check of the schedule, not of the machine.
"""

import argparse
import heapq
import json
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import singlequant as sq
from singlequant.distributed import ProcessWorkers

from . import common
from .made_model import LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B, Widths, write_checkpoint
from .tables import between

MARKS = ("<!-- table of benchmarks.scale -->", "<!-- end -->")
RESULTS = Path(__file__).parent / "results"
TOKENS, QUICK_TOKENS = 8192, 2048  # of the default recipe, and without GPTQ
WINDOW = 512
NOISE_TOKENS = 1024
MADE = Widths(hidden=512, intermediate=1376, heads=8, vocab=2048)
MADE_LAYERS = 12


@dataclass(frozen=True)
class Large:
    """A model whose time is predicted, and by which recipe.

    apart: whether windows can go apart (spread.py). quick: 4 bits each, rounded with a searched
    clip; otherwise the default recipe.
    """

    name: str
    widths: Widths
    layers: int
    apart: bool = True
    quick: bool = False

    @property
    def tokens(self) -> int:
        """Of calibration."""
        return QUICK_TOKENS if self.quick else TOKENS


MODELS = (
    Large("13B, mse, 4 bits", LLAMA_2_13B, 40, quick=True),
    Large("7B", LLAMA_2_7B, 32),
    Large("70B", LLAMA_2_70B, 80),
    Large("405B", Widths(16384, 53248, 128, 128256, 8), 126, apart=False),
    Large("1T, 384 experts", Widths(7168, 2048, 64, 163840, 64, 384), 61, apart=False),
)
WORKERS = (1, 4, 16, 64)


# ---- what one machine takes ---------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Seconds of one machine, by 10^9 weights where nothing else is said."""

    build: float  # a layer in 8 bits
    token: float  # a token through it, by 10^9 weights that it meets
    noise: float  # shares of linears, without the two above
    solve: float
    gptq: float  # seconds by 10^12 multiply-adds of Gram matrices, factors and rounding
    mse: float
    disk: float  # bytes a second

    @classmethod
    def of(cls, path: Path) -> "Costs":
        """From the JSON of `bench_quantize`, which measures a layer of LLaMA-2-7B."""
        rows = json.loads(path.read_text())["rows"]
        figures = [(row["figure"].strip(), row["value"]) for row in rows if "figure" in row]
        found = {name: statistics.mean(v for n, v in figures if n == name) for name, _ in figures}
        short, long = (found[f"calibration, {tokens} tokens, per 10^9 weights"]
                       for tokens in (2048, TOKENS))
        token = (long - short) / (TOKENS - 2048)
        build = max(0.0, short - 2048 * token)
        bits = found["choosing the bits of linears, per 10^9 weights"]
        rounding, mse = (next(row["warm, s per 10^9"] for row in rows if row.get("weights") == name)
                         for name in ("gptq", "mse"))
        layer = LLAMA_2_7B.layer_weights / 1e9
        return cls(build, token, max(0.0, bits - build - NOISE_TOKENS * token),
                   found["solving rotations (balanced), per 10^9 weights"],
                   rounding * layer / (gptq_products(LLAMA_2_7B) / 1e12), mse,
                   found["disk, cold file"] * 1e9)


def gptq_products(w: Widths) -> float:
    """Multiply-adds of GPTQ in a layer: k^2 a token for the Gram matrix of a site, k^3 for its
    factor, n k^2 to round a linear."""
    attention = 2 * w.hidden + 2 * w.kv_width  # rows of q, k, v, o
    experts = max(1, w.experts)
    tokens = TOKENS * min(w.chosen, experts) / experts
    sites = 2 * (TOKENS * w.hidden**2 + w.hidden**3)
    mlp = sum(tokens * k**2 + k**3 for k in (w.hidden, w.intermediate))
    rounding = attention * w.hidden**2 + experts * (
        2 * w.intermediate * w.hidden**2 + w.hidden * w.intermediate**2)
    return sites + experts * mlp + rounding


def met_weights(w: Widths) -> float:
    """Weights of a layer that a token meets."""
    met = replace(w, experts=min(w.experts, w.chosen))
    return met.layer_weights


# ---- the schedule -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A sweep's calls as `sweep/spread.py` makes them, with their seconds.

    few: the pass of the noise's windows, where they go by themselves. noise: 0 where no bits are
    chosen.
    """

    layers: int
    parts: int
    pass_part: float
    noise: float
    make_layer: float
    few: float | None = None


@dataclass(frozen=True)
class Times:
    """Seconds: until the noise is known, the whole, and all calls one after the other."""

    stream: float
    whole: float
    work: float


def carry(
    layers: int, parts: int, pass_part: float, attached: float, workers: int
) -> tuple[float, float]:
    """Seconds of parts that pass layer after layer, and of a call for each layer that can begin
    once all parts stand before it: the whole, and one after the other.

    The first worker that is free takes the first call that waits; passes go before others.
    """
    arrived = [0] * (layers + 1)
    events: list[tuple[float, int, tuple[int, int, int]]] = []  # a call ends; which it was
    waiting: list[tuple[int, int, int]] = []  # 0: pass, 1: attached; layer; part
    idle, number, now, work = workers, 0, 0.0, 0.0

    def arrive(layer: int, part: int) -> None:
        arrived[layer] += 1
        if layer < layers:
            heapq.heappush(waiting, (0, layer, part))
            if arrived[layer] == parts:
                heapq.heappush(waiting, (1, layer, 0))

    for part in range(parts):
        arrive(0, part)
    while waiting or events:
        while waiting and idle:
            call = heapq.heappop(waiting)
            seconds = attached if call[0] else pass_part
            heapq.heappush(events, (now + seconds, number, call))
            idle, number, work = idle - 1, number + 1, work + seconds
        now, _, (kind, layer, part) = heapq.heappop(events)
        idle += 1
        if kind == 0:
            arrive(layer + 1, part)
    return now, work


def simulate(job: Job, workers: int) -> Times:
    """The schedule of `Spread`: the stream with the noise, then all layers at once; where windows
    do not go apart, or no bits are chosen, the layers beside a stream of their own."""
    if job.noise and job.few is None:
        stream, work = carry(job.layers, job.parts, job.pass_part, job.noise, workers)
        rounds = -(-job.layers // workers)
        return Times(stream, stream + rounds * job.make_layer, work + job.layers * job.make_layer)
    begin = before = 0.0
    if job.noise:
        begin, before = carry(job.layers, 1, job.few or 0.0, job.noise, workers)
    whole, work = carry(job.layers, job.parts, job.pass_part, job.make_layer, workers)
    return Times(begin, begin + whole, before + work)


def longest_chain(job: Job) -> float:
    """Seconds that no number of workers makes less, for so many parts."""
    carried = (job.layers - 1) * job.pass_part
    if not job.noise:
        return carried + job.make_layer
    if job.few is None:
        return carried + max(job.pass_part, job.noise) + job.make_layer
    return (job.layers - 1) * job.few + max(job.few, job.noise) + carried + job.make_layer


def job_of(model: Large, costs: Costs, workers: int) -> Job:
    """The calls of a model, from the costs of one machine."""
    w, tokens = model.widths, model.tokens
    weights, token = w.layer_weights / 1e9, costs.token * met_weights(w) / 1e9
    read = 2 * w.layer_weights / costs.disk
    prepare = read + (costs.build * weights if model.apart else 0.0)
    parts = min(workers, tokens // WINDOW) if model.apart else 1
    rounding = costs.mse * weights if model.quick else costs.gptq * gptq_products(w) / 1e12
    few = prepare + NOISE_TOKENS * token
    return Job(
        model.layers, parts, pass_part=prepare + tokens / parts * token,
        noise=0.0 if model.quick else few + costs.noise * weights,
        make_layer=prepare + tokens * token + costs.solve * weights + rounding,
        few=None if model.apart else few)


def alone(model: Large, costs: Costs) -> float:
    """Seconds of one process without workers, which carries the stream once."""
    job = job_of(model, costs, 1)
    return model.layers * (job.noise + job.make_layer)


def moved_bytes(model: Large, workers: int) -> float:
    """Bytes that workers read and write: weights for each call, the stream, the packed layers."""
    w, job = model.widths, job_of(model, Costs(0, 0, 1, 0, 0, 0, 1e30), workers)
    calls = job.parts + 1 + bool(job.noise) + (job.few is not None)
    stream, packed = 4.0 * model.tokens * w.hidden, w.layer_weights * 4.75 / 8
    # the stream: written by a pass, read by the next one and by the layer; the noise reads a part
    return model.layers * (2.0 * w.layer_weights * calls + 3 * stream + packed)


def table(costs: Costs) -> str:
    """Expected times of MODELS as a table."""
    lines = ["| model | workers | bits chosen after | whole | one process over it | longest chain "
             "| moved, TB | stream on disk, GB |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for model in MODELS:
        for workers in WORKERS:
            job = job_of(model, costs, workers)
            times, single = simulate(job, workers), alone(model, costs)
            chain = longest_chain(job)
            disk = 4 * model.tokens * model.widths.hidden * (model.layers + 1) / 1e9
            lines.append(f"| {model.name} | {workers} | {shown(times.stream)} | "
                         f"{shown(times.whole)} | {single / times.whole:.1f} | {shown(chain)} | "
                         f"{moved_bytes(model, workers) / 1e12:.2f} | {disk:.1f} |")
    return "\n".join(lines)


def shown(seconds: float) -> str:
    """A time for people."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36000 else f"{seconds / 3600:.1f} h"


# ---- the check ----------------------------------------------------------------------------------


def timed(function, *arguments):
    """The call's seconds, and what it gives."""
    start = time.perf_counter()
    found = function(*arguments)
    return time.perf_counter() - start, found


class TimedWorkers(ProcessWorkers):
    """Processes whose calls are timed, by the name of the function."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.seconds: dict[str, list[float]] = {}

    def run(self, calls):
        return super().run(map(self._named, calls))

    def _named(self, call):
        follow = call.then

        def then(found):
            self.seconds.setdefault(call.function.__name__, []).append(found[0])
            return map(self._named, follow(found[1]))

        return replace(call, function=timed, arguments=(call.function, *call.arguments), then=then)


def check(counts: list[int], work: Path) -> list[dict]:
    """Measured and simulated seconds of a made model on so many local processes."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_checkpoint(work / "model", MADE_LAYERS, MADE)
    config = sq.QuantConfig(calibration_tokens=TOKENS // 4)
    rows = []
    try:
        for count in counts:
            with TimedWorkers(count) as workers:
                start = time.perf_counter()
                sq.quantize_folder(work / "model", work / f"out-{count}", config, workers=workers)
                whole = time.perf_counter() - start
            mean = {name: statistics.mean(found) for name, found in workers.seconds.items()}
            parts = len(workers.seconds["pass_part"]) // MADE_LAYERS
            job = Job(MADE_LAYERS, parts, mean["pass_part"], mean["layer_noise"],
                      mean["make_layer"])
            rows.append({"workers": count, "measured": whole,
                         "simulated": simulate(job, count).whole, **mean})
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return rows


# ---- the command --------------------------------------------------------------------------------


def source_text(path: Path) -> str:
    """Of what machine and run the costs are."""
    facts = json.loads(path.read_text())["environment"]
    return (f"Costs: `bench_quantize` of {facts['date']}, {facts['cpu']}, {facts['threads']} "
            f"threads, kernels {facts['kernels']['active']}, load {facts['load'][0]:.0f}.")


def pass_text(costs: Costs) -> str:
    """What a layer of the chain of MODELS' first is made of."""
    weights = MODELS[0].widths.layer_weights
    seconds = (2 * weights / costs.disk, costs.build * weights / 1e9,
               WINDOW * costs.token * weights / 1e9)
    read, build, run = (f"{value:.2f} s" for value in seconds)
    return (f"A layer of the 13B model's chain takes {read} to read, {build} to turn into 8 bits, "
            f"and {run} to run a window of {WINDOW} tokens.")


def with_table(page: str, costs: Costs, source: str) -> str:
    """The page with the table of these costs between its marks."""
    return between(page, MARKS, "\n\n".join([source, table(costs), pass_text(costs)]))


def newest_costs() -> Path:
    """The newest results of `bench_quantize`."""
    return max(RESULTS.glob("*/*-quantize.json"), key=lambda path: (path.name, str(path)))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--costs", type=Path, help="JSON of bench_quantize")
    parser.add_argument("--page", type=Path, help="a page whose table is replaced")
    parser.add_argument("--check", help="numbers of local processes, such as 1,2,4")
    parser.add_argument("--work", type=Path, default=Path("scale-check"))
    common.add_output(parser)
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse(argv)
    if arguments.check:
        rows = check([int(n) for n in arguments.check.split(",")], arguments.work)
        for row in rows:
            print("  ".join(f"{name} {value:.2f}" for name, value in row.items()))
        return
    path = arguments.costs or newest_costs()
    costs = Costs.of(path)
    if arguments.page:
        page = with_table(arguments.page.read_text(), costs, source_text(path))
        arguments.page.write_text(page)
        return
    print(f"costs of {path.parent.name}, {path.name}: {costs}\n")
    print(table(costs))


if __name__ == "__main__":
    main()
