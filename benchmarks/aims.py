"""What the kernels and the networks aim at, beside what a machine's results found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import bench_peers
from .machines import OURS, RIVALS, Machine, end_to_end_title, mean_share, peers_title
from .tables import percent, times

REAL_CORES = 1.8  # ratio of two CPUs to one, from which they are two cores


@dataclass(frozen=True)
class Aim:
    """A line of the table of aims: found None where there is no figure."""

    where: str
    what: str
    aim: float
    found: float | None
    at_most: bool = False
    share: bool = False

    def cells(self) -> list[str]:
        show = percent if self.share else times
        sign = "<=" if self.at_most else ">="
        if self.found is None:
            return [self.where, self.what, f"{sign} {show(self.aim)}", "-", "no figure"]
        met = self.found <= self.aim if self.at_most else self.found >= self.aim
        return [self.where, self.what, f"{sign} {show(self.aim)}", show(self.found),
                "met" if met else "not met"]


# what is compared with whom, at how many rows, and the aim: (ours, m, rivals, aim)
FASTEST, INT4, INTEGER = RIVALS, ("int4",), ("int4", "int8")
AMX_AIMS = [(ours, m, rivals, aim) for m, rivals, aim in
            ((512, INTEGER, 2.0), (16, INT4, 1.5), (1, FASTEST, 1.1)) for ours in OURS]
AVX2_AIMS = [
    ("ours_w4a4", 512, "ggml_q4_0", 2.5), ("ours_w4a4", 512, "openblas", 1.7),
    ("ours_w4a4", 512, INT4, 1.4), ("ours_w4a8", 512, "ours_w4a4", 0.85),
    *((ours, m, rivals, aim) for m, rivals, aim in ((16, INT4, 1.3), (1, FASTEST, 1.1))
      for ours in OURS),
]
READ_SHARE, BARE_SHARE, TRANSFORM_SHARE = 0.85, {True: 0.65, False: 0.75}, {True: 0.3, False: 0.15}
THREADS, OVER_16_BIT, OVER_INT4 = 1.8, 2.3, 1.0
OVER_GPTQ = 5.0


def linear_aims(result: Mapping[str, Any], amx: bool) -> list[Aim]:
    """Of one run of bench_peers: AMX's on an AMX machine, AVX2's when held to it."""
    rows, where = result["rows"], peers_title(result)
    found = []
    for ours, m, rivals, aim in AMX_AIMS if amx else AVX2_AIMS:
        names = [rivals] if isinstance(rivals, str) else bench_peers.of_kinds(rows, *rivals)
        ratio = bench_peers.ratio_to(rows, ours, m, names)
        against = rivals if isinstance(rivals, str) else f"the fastest {' or '.join(rivals)}"
        against = "the fastest" if rivals == FASTEST else against
        found.append(Aim(where, f"{ours}, m = {m}, over {against}", aim, ratio and ratio["ratio"]))
    for ours in OURS:
        found.append(Aim(where, f"{ours}, m = 1, of the read loop", READ_SHARE,
                         mean_share(rows, ours, 1, "share_of_read"), share=True))
        bare = ours.replace("ours", "bare")
        found.append(Aim(where, f"{bare}, m = 512, of the peak", BARE_SHARE[amx],
                         mean_share(rows, bare, 512, "share_of_peak"), share=True))
    return found


def ladder_aims(result: Mapping[str, Any]) -> list[Aim]:
    """The transform's share, and threads where the cores are real."""
    found = []
    for r in result["transform"]:
        limit = TRANSFORM_SHARE["amx" in r["table"]]
        if r["scheme"] == "w4a4" and ("amx" in r["table"] or r["table"] == "avx2"):
            found.append(Aim("Kernel ladder", f"transform of {r['scheme']} on {r['table']}, "
                             f"m = {r['m']}", limit, r["share"], at_most=True, share=True))
    if (result["cores"]["ratio"] or 0) >= REAL_CORES:
        best = result["environment"]["kernels"]["runnable"][0]
        for r in result["threads"]:
            if r["table"] == best and r["threads"] == 2:
                found += [Aim("Kernel ladder", f"two threads on {best}, {s}", THREADS, r[s])
                          for s in ("w4a4", "w4a8")]
    return found


def end_to_end_aims(where: str, result: Mapping[str, Any]) -> list[Aim]:
    """W4A4 and W4A8, each over the fastest 16-bit and int4 engine, by phase and batch.

    W4A16 does not count: its products are float32's.
    """
    found = []
    for phase, batch in dict.fromkeys((r["phase"], r["batch"]) for r in result["rows"]):
        rows = [r for r in result["rows"] if (r["phase"], r["batch"]) == (phase, batch)]
        for ours in (r for r in rows if r["kind"] == "ours" and not r["engine"].endswith("W4A16")):
            for kind, aim in (("16-bit", OVER_16_BIT), ("int4", OVER_INT4)):
                speeds = [r["tokens_per_s"]["median"] for r in rows if r["kind"] == kind]
                ratio = ours["tokens_per_s"]["median"] / max(speeds) if speeds else None
                found.append(Aim(where, f"{ours['engine']}, {phase}, batch {batch}, over the "
                                 f"fastest {kind}", aim, ratio))
    return found


def aims(machine: Machine) -> list[Aim]:
    found = []
    for _, result in machine.of("peers"):
        if result["isa"] == "avx2":
            found += linear_aims(result, amx=False)
        elif machine.has_amx:
            found += linear_aims(result, amx=True)
        elif machine.environment["kernels"]["runnable"][0] == "avx2":
            found += linear_aims(result, amx=False)
    for _, result in machine.of("ladder"):
        found += ladder_aims(result)
    for name, result in machine.of("end-to-end"):
        found += end_to_end_aims(end_to_end_title(name), result)
    for _, result in machine.of("side-by-side"):
        found.append(Aim("Quantizing", "the whole of GPTQ over llm-compressor's", OVER_GPTQ,
                         result["ratio"]))
    return found
