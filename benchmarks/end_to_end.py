"""Prefill and decode in tokens per second of whole networks: ours against other engines.

    python -m benchmarks.end_to_end --peer-python VENV/bin/python [--widths llama-2-7b] [--layers 2]
        [--model FOLDER] [--bits 4] [--batch 1,64] [--prompt 512,16] [--context 128] [--threads 2]
        [--engines A,B] [--seconds 200] [--isa native|avx2] [--work DIR] [--json FILE] [--keep]
        [--quick]

A made checkpoint of a 7B model's widths, or --model, is given to every engine in the form it reads:
the folder itself, our packed folders of it (method `balanced`, whose online transform and
quantization are in the measured time), GGUF files. Our linears of --model have the bits of the
default recipe unless --bits says otherwise. Each engine is a process of its own, pinned to the same
CPUs and kept for the whole run, in VENV if it is another's; all take turns in each round, in a new
order. An engine whose packages are missing is left out aloud. ik_llama.cpp is built from its
source, which the environment variable IK_LLAMA_CPP names.

Prefill: from token ids to the logits behind each prompt, from empty caches; the head runs for the
last token only. Decode: steps of one token in every sequence, each to the logits of all, behind a
context. --prompt has a length for each batch: the larger batch has the shorter prompts, for time.
--isa avx2 holds all engines to AVX2; llama.cpp must have been built for it in VENV.
Before anything is timed the logits of all engines on the same windows are compared with those of
the first of REFERENCES that runs; an engine that is further off than its kind allows is an error.

A made checkpoint has few layers and a whole head, so that the head weighs more than in the model it
stands for: `head` in the settings is its share of the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from singlequant import _C, QuantConfig, load_checkpoint, quantize_folder

from . import common
from .made_model import LLAMA_2_7B, QWEN_2_5_7B, TOY, Widths, write_checkpoint
from .processes import Process

ANSWER_SECONDS = 3600.0  # that an engine may take for one answer
CALIBRATION_TOKENS = 512  # only speed is asked for
CHECK_WINDOWS = (2, 48)  # count and length of the windows whose logits are compared
# Largest relative error |logits - reference| / |reference|; two unrelated networks have about 1.4.
ERROR_LIMITS = {"32-bit": 0.005, "16-bit": 0.03, "int8": 0.15, "int4": 1.0, "ours": 1.0}
LEAST_AGREEMENT = {"32-bit": 0.95, "16-bit": 0.85}  # share of equal most likely tokens
WIDTHS = {"llama-2-7b": LLAMA_2_7B, "qwen2.5-7b": QWEN_2_5_7B}
REST = 0.02  # seconds before each measurement: idle threads of the engine before stop spinning
AIM_16BIT, AIM_INT4 = 2.3, 1.0


# What holds PyTorch, oneDNN, MKL and OpenBLAS to AVX2.
AVX2_ENVIRONMENT = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
                    "MKL_ENABLE_INSTRUCTIONS": "AVX2", "OPENBLAS_CORETYPE": "Haswell"}


@dataclass(frozen=True)
class EngineSpec:
    """How an engine is started: its module in peers/, and KIND as that file understands it."""

    label: str
    module: str
    variant: str
    kind: str

    @property
    def ours(self) -> bool:
        return self.module == "e2e_singlequant"


def _specs() -> dict[str, EngineSpec]:
    ours, llama, ik, torch = (f"e2e_{x}" for x in ("singlequant", "llama_cpp", "ik_llama",
                                                   "transformers"))
    specs = {"ours-16bit": EngineSpec("singlequant 16-bit", ours, "16-bit", "16-bit")}
    for scheme in ("w4a16", "w4a8", "w4a4"):
        specs[f"ours-{scheme}"] = EngineSpec(f"singlequant {scheme.upper()}", ours, scheme, "ours")
    for variant, kind in (("F16", "16-bit"), ("BF16", "16-bit"), ("Q8_0", "int8"),
                          ("Q4_0", "int4"), ("IQ4_NL", "int4"), ("Q4_K_M", "int4")):
        specs[f"llama-{variant}"] = EngineSpec(f"llama.cpp {variant}", llama, variant, kind)
        specs[f"ik-{variant}"] = EngineSpec(f"ik_llama.cpp {variant}", ik, variant, kind)
    for variant, kind in (("float32", "32-bit"), ("bfloat16", "16-bit")):
        name = f"transformers-{variant}"
        specs[name] = EngineSpec(name.replace("-", " "), torch, variant, kind)
    return specs


ENGINES = _specs()
REFERENCES = ("transformers-float32", "ours-16bit", "llama-F16", "llama-BF16")
DEFAULT_ENGINES = [name for name in ENGINES if not name.endswith(("IQ4_NL", "Q4_K_M"))]


# ---- processes ----------------------------------------------------------------------------------


class Missing(Exception):
    """An engine's packages are not installed in the Python it was given."""


class EngineError(RuntimeError):
    """An engine ended instead of answering."""


class EngineProcess(Process):
    """A running engine, pinned to the CPUs.

    Missing when a package that it needs is not there, EngineError when it fails otherwise.
    """

    def __init__(self, spec: EngineSpec, folder: Path, cpus: Sequence[int], python: str,
                 isa: str = "native") -> None:
        self.spec = spec
        super().__init__(
            spec.module, [folder.resolve(), spec.variant, ",".join(map(str, cpus))],
            python=sys.executable if spec.ours else python, threads=len(cpus),
            environment=isa_environment(isa), own=spec.ours, paused=False, timeout=ANSWER_SECONDS)
        if "failed" in self.hello:
            try:
                if "missing" in self.hello:
                    raise Missing(self.hello["failed"])
                self._raise(self.hello)
            finally:
                self.end()
        self.version, self.note = self.hello["version"], self.hello["note"]

    def _raise(self, answer: Mapping[str, Any]) -> None:
        raise EngineError(f"{self.spec.label}: {answer['failed']}\n{self.said()}")

    def ask(self, **order: Any) -> dict[str, Any]:
        """The answer; EngineError when the engine failed."""
        answer = super().ask(**order)
        if "failed" in answer:
            self._raise(answer)
        return answer


def isa_environment(isa: str) -> dict[str, str]:
    """Environment variables that hold an engine to an instruction set."""
    if isa == "native":
        return {}
    wider = [name for name in _C.kernels()["compiled"] if name not in ("avx2", "generic")]
    off = list(filter(None, [os.environ.get("SINGLEQUANT_DISABLE_CPU"), *wider]))
    return {**AVX2_ENVIRONMENT, "SINGLEQUANT_DISABLE_CPU": ",".join(off)}


def start(names: Sequence[str], folders: Mapping[str, Path], cpus: Sequence[int],
          peer_python: str, isa: str, stack: contextlib.ExitStack) -> dict[str, EngineProcess]:
    """Name -> running engine; those that are missing are named.

    ValueError when an engine that is to be held to AVX2 says that it uses more.
    """
    running = {}
    for name in names:
        spec = ENGINES[name]
        folder = folders[spec.variant if spec.ours else "16-bit"]
        try:
            python = sys.executable if spec.ours else peer_python
            engine = EngineProcess(spec, folder, cpus, python, isa)
        except Missing as missing:
            print(f"left out: {spec.label}: {missing}")
            continue
        stack.callback(engine.end)
        running[name] = engine
        print(f"{spec.label:<24} {engine.version}; {engine.note}", flush=True)
        if isa == "avx2" and "AVX512" in engine.note.upper():
            raise ValueError(f"--isa: expected {spec.label} to use AVX2 only, found {engine.note}")
    return running


# ---- the network --------------------------------------------------------------------------------


def make_folders(work: Path, a: argparse.Namespace, widths: Widths) -> dict[str, Path]:
    """Variant of ours -> folder, made unless it is there: the 16-bit one and packed ones of it."""
    stem = a.model.resolve().name if a.model else f"made-{widths.hidden}-{a.layers}"
    folders = {"16-bit": work / stem}
    if not folders["16-bit"].exists():
        if a.model:  # a link: the GGUF files are made beside it
            folders["16-bit"].symlink_to(a.model.resolve())
        else:
            write_checkpoint(folders["16-bit"], a.layers, widths)
    bits = {} if a.bits is None else {"bits": a.bits}
    made = {} if a.model else {"weights": "rtn", "calibration_tokens": CALIBRATION_TOKENS,
                               "head_bits": 6}  # as the head has in the peers' files: Q6_K
    for name in a.engines:
        spec = ENGINES[name]
        if spec.ours and spec.variant != "16-bit":
            kind = spec.variant if a.bits is None else f"{spec.variant}-{a.bits:g}"
            out = folders[spec.variant] = work / f"{stem}-{kind}"
            if not out.exists():
                quantize_folder(folders["16-bit"], out,
                                QuantConfig(scheme=spec.variant, **bits, **made))
            require_transform(out)
    return folders


def require_transform(folder: Path) -> None:
    """ValueError unless every site is rotated at run time, and in W4A4 has its 8-bit inputs."""
    checkpoint = load_checkpoint(folder)
    mixed = checkpoint.quant_config.activation_bits == 4
    for index in range(checkpoint.spec.layers):
        layer = checkpoint.layer(index)
        absent = [site for site in checkpoint.spec.layer(index).sites
                  if site not in layer.rotations or mixed and not layer.int8_inputs.get(site)]
        if absent:
            raise ValueError(f"{folder}: layer {index}: expected every site rotated"
                             f"{', some inputs of 8 bits' if mixed else ''}, "
                             f"found otherwise: {', '.join(absent)}")


def describe_transform(folder: Path) -> dict[str, str]:
    """Site -> what its input goes through, in the first layer of a packed folder."""
    checkpoint = load_checkpoint(folder)
    layer = checkpoint.layer(0)

    def factor(value: Any) -> str:
        dense = isinstance(value, np.ndarray)
        return f"dense {len(value)}" if dense else f"chain of order {value[0]}"

    return {site: f"{' x '.join(map(factor, layer.rotations[site].parts))}, "
                  f"clip {layer.clips[site]:g}, {layer.int8_inputs.get(site, 0)} inputs of 8 bits"
            for site in checkpoint.spec.layer(0).sites}


# ---- agreement ----------------------------------------------------------------------------------


def compare_logits(engines: Mapping[str, EngineProcess], work: Path) -> dict[str, dict[str, float]]:
    """Name -> relative error, mean KL (nats) and top-1 agreement to the reference's logits."""
    reference = next((name for name in REFERENCES if name in engines), None)
    if reference is None:
        raise ValueError(f"engines: expected one of {', '.join(REFERENCES)} to compare with")
    count, length = CHECK_WINDOWS
    found = {}
    path = work / "logits.npy"
    for name in (reference, *(n for n in engines if n != reference)):
        engines[name].ask(do="logits", count=count, length=length, file=str(path.resolve()))
        logits = np.load(path).reshape(count * length, -1)
        path.unlink()
        if name == reference:
            expected = logits
        divergence, agrees = _C.kl_divergence(expected, logits)
        found[name] = {
            "relative_error": float(np.linalg.norm(logits - expected) / np.linalg.norm(expected)),
            "kl_mean": float(divergence.mean()), "top1_agreement": float(agrees.mean()),
            "reference": ENGINES[reference].label,
        }
    return found


def check_logits(agreement: Mapping[str, Mapping[str, Any]]) -> None:
    """ValueError when an engine does not compute the network it was given."""
    for name, values in agreement.items():
        spec = ENGINES[name]
        limit, least = ERROR_LIMITS[spec.kind], LEAST_AGREEMENT.get(spec.kind, 0)
        if not (values["relative_error"] <= limit and values["top1_agreement"] >= least):
            raise ValueError(
                f"{spec.label}: expected logits within {limit:g} of {values['reference']}'s and "
                f"{least:.0%} equal most likely tokens, found {values['relative_error']:.4f} and "
                f"{values['top1_agreement']:.0%}")


# ---- timing -------------------------------------------------------------------------------------


def measure(engines: Mapping[str, EngineProcess],
            requests: Mapping[tuple[str, int], dict[str, Any]], seconds: float, min_rounds: int,
            ) -> dict[tuple[str, str, int], list[float]]:
    """(name, phase, batch) -> tokens per second of each round; seconds is the aim for all."""
    rates: dict[tuple[str, str, int], list[float]] = {}
    shuffle = random.Random(0).shuffle
    order = list(engines)
    for (phase, batch), request in requests.items():
        begin = time.perf_counter()
        for round_number in range(1000):
            spent = time.perf_counter() - begin
            if round_number >= min_rounds and spent > seconds / len(requests):
                break
            shuffle(order)
            for name in order:
                time.sleep(REST)
                answer = engines[name].ask(do=phase, batch=batch, **request)
                if not answer["finite"]:
                    raise ValueError(f"{ENGINES[name].label}, {phase}, batch {batch}: expected "
                                     "finite logits, found NaN or Inf")
                rate = answer["tokens"] / answer["seconds"]
                rates.setdefault((name, phase, batch), []).append(rate)
        for engine in engines.values():
            engine.ask(do="close")
        print_phase(phase, batch, rates)
    return rates


def print_phase(phase: str, batch: int, rates: Mapping[tuple[str, str, int], list]) -> None:
    print(f"\n{phase}, batch {batch}: tokens/s (quartiles, rounds)")
    for (name, p, b), values in rates.items():
        if (p, b) == (phase, batch):
            t = common.summary(values)
            print(f"  {ENGINES[name].label:<24} {t['median']:9.1f}  ({t['low']:.1f} to "
                  f"{t['high']:.1f}, {t['repeats']})", flush=True)


def rows_of(engines: Mapping[str, EngineProcess], rates: Mapping, agreement: Mapping) -> list[dict]:
    """The JSON's rows."""
    rows = []
    for (name, phase, batch), values in rates.items():
        t = common.summary(values)
        rows.append({
            "engine": ENGINES[name].label, "version": engines[name].version,
            "kind": ENGINES[name].kind, "phase": phase, "batch": batch,
            "tokens_per_s": {"median": t["median"], "low": t["low"], "high": t["high"],
                             "rounds": t["repeats"]},
            "agreement": agreement[name], "note": engines[name].note,
        })
    return rows


def ratios_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ours, scheme by scheme, over the fastest engine of 16 bits and of INT4, where there is one.

    Q8_0's 8-bit weights are no INT4 engine; our own 16-bit path is one of 16 bits.
    """
    found = []
    for phase, batch in dict.fromkeys((r["phase"], r["batch"]) for r in rows):
        here = [r for r in rows if (r["phase"], r["batch"]) == (phase, batch)]
        for row in (r for r in here if r["kind"] == "ours"):
            entry = {"engine": row["engine"], "phase": phase, "batch": batch}
            for kind, aim in (("16-bit", AIM_16BIT), ("int4", AIM_INT4)):
                peers = [r for r in here if r["kind"] == kind]
                if peers:
                    best = max(peers, key=lambda r: r["tokens_per_s"]["median"])
                    entry[kind] = {
                        "peer": best["engine"], "aim": aim,
                        "ratio": row["tokens_per_s"]["median"] / best["tokens_per_s"]["median"],
                    }
            found.append(entry)
    return found


def print_ratios(ratios: Sequence[Mapping[str, Any]]) -> None:
    print("\nours over the fastest peer: ratio (aim), * where the aim is met")
    for r in ratios:
        text = f"  {r['phase']:<8} batch {r['batch']:<4} {r['engine']:<20}"
        for kind in ("16-bit", "int4"):
            if kind in r:
                one = r[kind]
                star = "*" if one["ratio"] >= one["aim"] else " "
                text += f" {kind}: {one['ratio']:5.2f} ({one['aim']:g}){star} {one['peer']:<24}"
        print(text.rstrip())


# ---- the command --------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--widths", choices=WIDTHS, default="llama-2-7b",
                   help="of the made network (default %(default)s)")
    p.add_argument("--layers", type=int, default=2, metavar="N")
    p.add_argument("--model", type=Path, metavar="FOLDER",
                   help="a LLaMA in 16 bits, in place of the made network")
    p.add_argument("--bits", type=float, metavar="B",
                   help="bits of our linears (default: 4 for the made network)")
    p.add_argument("--batch", type=common.integers, default=[1, 64], metavar="A,B")
    p.add_argument("--prompt", type=common.integers, metavar="A,B",
                   help="tokens of a prompt, for each batch (default 512,16)")
    p.add_argument("--context", type=int, default=128, metavar="N",
                   help="tokens that a sequence holds before it is decoded (default 128)")
    p.add_argument("--steps", type=common.integers, metavar="A,B",
                   help="decoded tokens of one measurement, for each batch (default 16,2)")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    p.add_argument("--engines", type=lambda text: text.split(","), default=DEFAULT_ENGINES,
                   metavar="A,B", help=f"of {', '.join(ENGINES)} "
                        "(default: all but IQ4_NL and Q4_K_M)")
    p.add_argument("--peer-python", default=sys.executable, metavar="FILE",
                   help="the Python that has transformers and llama-cpp-python (default: this)")
    p.add_argument("--isa", choices=("native", "avx2"), default="native")
    p.add_argument("--seconds", type=common.seconds, default=200.0, metavar="S",
                   help="aim for the timed rounds together")
    p.add_argument("--rounds", type=int, default=3, metavar="N", help="at least (default 3)")
    p.add_argument("--work", type=Path, metavar="DIR",
                   help="where the networks are made and kept (default: a temporary folder)")
    common.add_output(p, "end-to-end")
    p.add_argument("--quick", action="store_true",
                   help="a toy network in seconds, to see that the engines run")
    a = p.parse_args(argv)
    if a.quick:
        a.prompt, a.steps, a.context, a.seconds = [16] * len(a.batch), [2] * len(a.batch), 8, 0
    a.bits = 4.0 if a.bits is None and not a.model else a.bits
    a.prompt = a.prompt or [512 if batch == 1 else 16 for batch in a.batch]
    a.steps = a.steps or [16 if batch == 1 else 2 for batch in a.batch]
    check_options(p, a)
    return a


def check_options(p: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """Exit with the option, the expected and the found."""
    cpus = len(os.sched_getaffinity(0))
    for name in ("batch", "prompt", "steps"):
        values = getattr(a, name)
        if len(values) != len(a.batch):
            p.error(f"--{name}: expected {len(a.batch)} numbers, as of --batch, found {values}")
    for name in ("layers", "context", "rounds"):
        if getattr(a, name) < 1:
            p.error(f"--{name}: expected at least 1, found {getattr(a, name)}")
    if not 1 <= a.threads <= cpus:
        p.error(f"--threads: expected 1 to {cpus}, the CPUs here, found {a.threads}")
    unknown = [name for name in a.engines if name not in ENGINES]
    if unknown:
        p.error(f"--engines: expected {', '.join(ENGINES)}, found {', '.join(unknown)}")


def settings_of(a: argparse.Namespace, widths: Widths, cpus: Sequence[int]) -> dict[str, Any]:
    weights = a.layers * widths.layer_weights + widths.head_weights
    network = {"model": a.model.resolve().name} if a.model else {
        "widths": vars(widths), "layers": a.layers, "head": widths.head_weights / weights}
    return {
        **network, "bits": a.bits,
        "batch": a.batch, "prompt": a.prompt, "context": a.context, "steps": a.steps,
        "threads": a.threads, "cpus": list(cpus), "isa": a.isa, "quick": a.quick,
        "prefill": "from token ids to the logits of each prompt's last token, empty caches",
        "decode": "one token in every sequence per step, to the logits of all",
    }


def run(a: argparse.Namespace, work: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Make, start, compare, measure; the JSON's contents."""
    begin = time.perf_counter()
    environment = common.environment()
    common.print_environment(environment)
    widths = TOY if a.quick else WIDTHS[a.widths]
    cpus = sorted(os.sched_getaffinity(0))[: a.threads]
    settings = settings_of(a, widths, cpus)
    folders = make_folders(work, a, widths)
    packed = next((folders[s] for s in ("w4a4", "w4a8", "w4a16") if s in folders), None)
    if packed:
        settings["transform"] = describe_transform(packed)
        print(f"{packed.name}: " + "; ".join(f"{k}: {v}" for k, v in settings["transform"].items()))
    engines = start(a.engines, folders, cpus, a.peer_python, a.isa, stack)
    print(f"ready after {time.perf_counter() - begin:.0f} s")
    agreement = compare_logits(engines, work)
    for name, values in agreement.items():
        print(f"  {ENGINES[name].label:<24} relative error {values['relative_error']:.5f}, KL "
              f"{values['kl_mean']:.5f}, top-1 {values['top1_agreement']:.1%}", flush=True)
    check_logits(agreement)
    requests = {}
    for batch, prompt, steps in zip(a.batch, a.prompt, a.steps, strict=True):
        requests["prefill", batch] = {"length": prompt}
        requests["decode", batch] = {"context": a.context, "steps": steps}
    rates = measure(engines, requests, a.seconds, a.rounds)
    rows = rows_of(engines, rates, agreement)
    ratios = ratios_of(rows)
    print_ratios(ratios)
    print(f"took {time.perf_counter() - begin:.0f} s")
    return {"what": "end-to-end", "environment": environment, "quick": a.quick,
            "settings": settings, "rows": rows, "ratios": ratios}


def main(argv: Sequence[str] | None = None) -> None:
    a = parse(argv)
    with contextlib.ExitStack() as stack:
        if a.work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="end-to-end-")))
        else:
            work = a.work
            work.mkdir(parents=True, exist_ok=True)
        try:
            result = run(a, work, stack)
        except (ValueError, EngineError) as error:
            sys.exit(f"end_to_end: {error}")
    name = "end-to-end" if a.isa == "native" else f"end-to-end-{a.isa}"
    common.write_result(result, a.json, a.keep and name)


if __name__ == "__main__":
    main()
