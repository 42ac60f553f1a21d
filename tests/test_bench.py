"""The benchmarks run, say what they measured, and their pages hold the JSON's figures alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from singlequant import _C
from singlequant.cli.main import main
from singlequant.study import bench

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def threads():
    before = _C.get_num_threads()
    yield
    _C.set_num_threads(before)


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: __import__(name)


def run(script, *arguments, expect=0):
    """The finished process of a benchmark; warnings are errors in it too."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(BENCHMARKS / script), *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


# ---- singlequant bench --------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "high", "limit"), [
    ("w4a4", None, 0.3), ("w4a4", 0, 0.3), ("w4a8", None, 0.15), ("w4a16", None, 0.15)])
def test_transformed_linear_multiplies_by_the_given_weight(scheme, high, limit):
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((96, 1024)), rng.standard_normal((5, 1024))
    linear = bench.TransformedLinear(weight.astype(np.float32), scheme, high, copies=3)
    expected = x @ weight.T
    for _ in range(4):  # every copy, and round
        y = linear(x.astype(np.float32))
        assert np.linalg.norm(y - expected) < limit * np.linalg.norm(expected)
    assert linear.weights[0].int8_inputs == (0 if high == 0 or scheme != "w4a4" else 128)


def test_bench_reports_every_scheme_and_advises(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.bench, "__defaults__", (0.3, (128, 256), (1, 4), ("w4a4", "w4a8")))
    path = tmp_path / "bench.json"
    assert main(["bench", "--seconds", "0.3", "--threads", "1", "--json", str(path)]) == 0
    result, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert {(r["scheme"], r["m"]) for r in result["rows"]} == {
        (s, m) for s in ("w4a4", "w4a8", "float32") for m in (1, 4)}
    for row in result["rows"]:
        assert row["gops"] > 0
        assert row["gops_low"] <= row["gops"] <= row["gops_high"]
        line = next(line for line in printed.splitlines()
                    if line.split()[:2] == [row["scheme"], str(row["m"])])
        assert f"{row['gops_low']:.1f} to {row['gops_high']:.1f}" in line
        for key, form in (("gops", ".1f"), ("speedup", ".2f"), ("share_of_peak", ".0%"),
                          ("share_of_read", ".0%")):
            assert row.get(key) is None or format(row[key], form) in line, (key, line)
        assert ("share_of_read" in row) == (row["m"] == 1 and row["scheme"] != "float32")
    assert 0 < result["transform"]["share"] < 1
    assert printed.strip().splitlines()[-1].startswith("advice: w4a")
    assert result["environment"]["kernels"]["active"] in printed


def test_bench_names_the_tables_that_are_switched_off():
    script = ("from singlequant.study import bench\n"
              "print(bench.report(bench.bench(0.1, (64, 128), (1,), ('w4a8',))))")
    off = ",".join(t for t in _C.kernels()["runnable"] if t != "generic")
    if not off:
        pytest.skip("needs a table besides the generic one")
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True,
                          text=True, check=True, env={
                              **os.environ, "SINGLEQUANT_DISABLE_CPU": off,
                              "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])})
    told = next(line for line in done.stdout.splitlines() if "SINGLEQUANT_DISABLE_CPU" in line)
    assert set(off.split(",")) <= set(told.partition(": ")[2].split(", "))
    assert "kernels: generic, the best of those that run here (generic)" in done.stdout


def test_bench_refuses_no_time_and_no_folder(tmp_path, capsys):
    for seconds in ("0", "-1", "inf", "nan"):
        assert main(["bench", "--seconds", seconds]) == 2
        assert "seconds: expected a finite number above 0" in capsys.readouterr().err
    assert main(["bench", "--json", str(tmp_path / "none" / "x.json")]) == 2
    assert "none" in capsys.readouterr().err


def test_advice_prefers_accuracy_within_a_tenth():
    def result(**speeds):
        return {"rows": [{"scheme": s, "m": 1, "speedup": v} for s, v in speeds.items()]}

    assert bench.advice(result(w4a4=5.0, w4a8=4.6, w4a16=3.0, float32=1.0)).startswith(
        "advice: w4a8, 4.6 times")
    assert "w4a4, 1.04 times" in bench.advice(result(w4a4=5.2, w4a8=5.0, w4a16=3.0))
    assert bench.advice(result(w4a4=5.0, w4a8=4.0, w4a16=3.0)).startswith("advice: w4a4, 5.0")


def test_real_cores_is_the_ratio_of_medians_of_pinned_threads(monkeypatch):
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        assert bench.real_cores(0.01)["ratio"] is None
        pytest.skip("needs two CPUs")
    pinned, measure = [], _C.measure_peak

    def measure_at_known_rates(step, seconds):
        """The loop runs; its rate is 10 but for one moment that another took of the CPU."""
        assert measure(step, seconds) > 0
        pinned.append(os.sched_getaffinity(0))
        return 1.0 if len(pinned) == 1 else 10.0

    monkeypatch.setattr(_C, "measure_peak", measure_at_known_rates)
    found = bench.real_cores(0.02)
    assert found == {"cpus": sorted(allowed)[:2], "ratio": 2.0}
    first, second = ({cpu} for cpu in found["cpus"])
    assert (pinned.count(first), pinned.count(second)) == (14, 7)
    assert os.sched_getaffinity(0) == allowed  # this thread is not pinned


# ---- the driver, the ladder, the instructions ---------------------------------------------------


def test_driver_interleaves_ours_and_openblas(tmp_path):
    path = tmp_path / "peers.json"
    run("bench_peers.py", "--quick", "--m", "1,20", "--peers", "ours_w4a,read,bare_w4a4,openblas",
        "--seconds", "0.5", "--json", path)
    result = json.loads(path.read_text())
    assert not [r for r in result["rows"] if "failed" in r]
    assert {r["peer"] for r in result["rows"]} == set(result["peers"]) >= {
        "ours_w4a4", "ours_w4a8", "ours_w4a16", "read_loop", "bare_w4a4", "openblas"}
    for row in result["rows"]:
        assert row["seconds"]["repeats"] >= 3
        assert row["copies"] == 1 or row["m"] == 1
        if row["kind"] == "ours":
            assert row["relative_error"] < 0.3
            assert row["gops_low"] <= row["gops"] <= row["gops_high"]
            assert (row["m"] == 1) == ("share_of_read" in row)
    assert {(r["ours"], r["m"]) for r in result["ratios"] if r["against"] == "best 32-bit"} == {
        (p, m) for p in result["peers"] if p.startswith("ours") for m in (1, 20)}
    assert result["peers"]["openblas"]["version"].startswith("OpenBLAS")
    assert result["environment"]["cpu"]


def test_driver_holds_peers_to_avx2(tmp_path):
    if "avx2" not in _C.kernels()["runnable"]:
        pytest.skip("needs AVX2")
    path = tmp_path / "peers.json"
    done = run("bench_peers.py", "--quick", "--m", "2", "--isa", "avx2", "--peers",
               "ours_w4a8,openblas,openvino", "--seconds", "0.1", "--json", path)
    peers = json.loads(path.read_text())["peers"]
    assert peers["ours_w4a8"]["version"].endswith("avx2")
    assert "core Haswell" in peers["openblas"]["version"]
    assert peers["openvino_int4_channel"]["skipped"] == "nothing holds it to avx2"
    assert "SKIPPED: openvino_int4_channel" in done.stdout


@pytest.mark.parametrize(("arguments", "parts"), [
    (["--peers", "nobody"], ["--peers", "openblas", "nobody"]),
    (["--shapes", "3by4"], ["--shapes", "llama2-7b", "3by4"]),
    (["--threads", "9999"], ["--threads", "9999"]),
    (["--m", "0"], ["--m", "0"]),
    (["--cpus", "0,x"], ["--cpus", "0,x"]),
    (["--python", "/no/python"], ["--python", "/no/python"]),
])
def test_driver_refuses_bad_arguments(arguments, parts):
    done = run("bench_peers.py", *arguments, expect=1 if arguments[0] == "--peers" else 2)
    last = done.stderr.strip().splitlines()[-1]
    assert all(part in last for part in parts), done.stderr


@pytest.mark.parametrize(("script", "option", "values"), [
    ("bench_peers", "--seconds", ["inf", "nan", "0", "-1", "x"]),
    ("kernel_ladder", "--seconds", ["inf", "nan", "0", "-1", "x"]),
    ("end_to_end", "--seconds", ["inf", "nan", "0", "-1", "x"]),
    ("kernel_ladder", "--shape", ["64", "0x64", "64x64x64", "axb"]),
    ("kernel_ladder", "--threads", ["0", "99999"]),
    ("kernel_ladder", "--m", ["", "0", "1,,2", "1.5"]),
    ("end_to_end", "--batch", ["0", "x"]),
    ("bench_attention", "--batches", ["0", "1;2"]),
    ("bench_kv", "--schemes", ["w4a4,w9a9"]),
    *((script, "--json", ["/no/such/folder/x.json"]) for script in (
        "bench_peers", "kernel_ladder", "end_to_end", "bench_attention", "bench_kv")),
])
def test_parsers_name_the_option_and_what_was_found(benchmark_module, capsys, script, option,
                                                    values):
    parse = benchmark_module(script).parse
    for value in values:
        with pytest.raises(SystemExit):
            parse([f"{option}={value}"])
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"argument {option}: " in last
        assert f"found {value!r}" in last or f"found {value}" in last or "found no" in last


WRONG_PEER = """
import numpy as np
from base import Peer
class Wrong(Peer):
    name, kind = "wrong", "int4"
    def version(self): return "1"
    def weight_bytes(self, n, k): return n * k
    def prepare(self, weight, copies): self.n = len(weight)
    def load(self, x): self.m = len(x)
    def run(self): print("noise on standard output")
    def result(self): return np.ones((self.m, self.n), np.float32)
class Absent(Peer):
    name, kind = "absent", "int4"
    def __init__(self, threads): raise ImportError("no such library")
class Dead(Wrong):
    name = "dead"
    def load(self, x): import os; os._exit(3)
PEERS = (Wrong, Absent, Dead)
"""


def test_a_peer_that_is_wrong_absent_or_dies_is_told_apart(benchmark_module, tmp_path, monkeypatch):
    driver = benchmark_module("bench_peers")
    copy = tmp_path / "peers"
    copy.mkdir()
    for name in ("base", "worker"):
        shutil.copy(BENCHMARKS / "peers" / f"{name}.py", copy)
    (copy / "broken_peers.py").write_text(WRONG_PEER)
    monkeypatch.setattr(driver, "FOLDER", tmp_path)
    monkeypatch.syspath_prepend(str(copy))
    result = driver.run(["--quick", "--m", "2", "--seconds", "0.1"])
    failed = {r["peer"]: r["failed"] for r in result["rows"]}
    assert "not the product" in failed["wrong"]
    assert failed["dead"] == "the process ended with status 3"
    assert result["peers"]["absent"]["skipped"] == "ImportError: no such library"
    assert not [r for r in result["rows"] if "gops" in r]
    assert result["ratios"] == []


def test_ratios_are_geometric_means_over_the_best_of_each_shape(benchmark_module):
    rows = made_peers()["rows"]
    driver = benchmark_module("bench_peers")
    ratio = driver.ratio_to(rows, "ours_w4a4", 1, ["ggml_q4_0", "other"])
    assert ratio["peers"] == ["ggml_q4_0", "other"]
    assert ratio["ratio"] == pytest.approx((100 / 50 * 200 / 80) ** 0.5)
    assert driver.ratio_to(rows, "ours_w4a4", 99, ["ggml_q4_0"]) is None


def test_kept_commands_name_no_file_of_this_machine(benchmark_module):
    common = benchmark_module("common")
    for where in ("--python", "--peer-python", "--work", "--json", "--folder"):
        for given in ([where, "/here/x"], [f"{where}=/here/x"]):
            assert common.shown_arguments([*given, "--isa", "avx2", "--keep", *given, "--m=1"]) == [
                "--isa", "avx2", "--m=1"]
    assert common.environment(["--work", "/here", "--quick"])["argv"] == ["--quick"]


def test_kept_results_of_one_machine_share_a_folder(benchmark_module, tmp_path, monkeypatch):
    common = benchmark_module("common")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    for cpus, kind in ((1, "ladder"), (2, "quantize")):  # the first was held to one CPU
        common.write_result({"environment": {**ENVIRONMENT, "cpus": cpus}, "rows": []}, None, kind)
    written = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.json"))
    folder = f"benchmarks/results/made-up-9000-{os.cpu_count()}cpu-avx2"
    assert written == [f"{folder}/2025-01-02-ladder.json", f"{folder}/2025-01-02-quantize.json"]


@pytest.mark.parametrize("script", ["bench_peers", "kernel_ladder", "end_to_end"])
def test_every_option_that_names_a_path_is_left_out(benchmark_module, script, capsys):
    module = benchmark_module(script)
    with pytest.raises(SystemExit):
        module.parse(["--help"])
    options = re.findall(r"^  (--[a-z-]+) (?:FILE|DIR)$|^  (--[a-z-]+) (?:FILE|DIR) ",
                         capsys.readouterr().out, re.M)
    found = {a or b for a, b in options}
    assert "--json" in found
    assert found <= set(benchmark_module("common").PATH_OPTIONS)


def test_ladder_has_every_table(tmp_path):
    path = tmp_path / "ladder.json"
    done = run("kernel_ladder.py", "--quick", "--m", "1,8", "--seconds", "0.4", "--json", path)
    result = json.loads(path.read_text())
    tables = _C.kernels()["runnable"]
    assert {(r["table"], r["scheme"], r["m"]) for r in result["rows"]} == {
        (t, s, m) for t in tables for s in ("w4a4", "w4a8", "w4a16") for m in (1, 8)}
    for row in result["rows"]:
        assert 0 < row["gops"] <= row["bare_gops"] * 1.5
    assert {r["table"] for r in result["transform"]} == set(tables)
    assert all(0 < r["share"] < 1 for r in result["transform"])
    assert all(table in done.stdout for table in tables)


@pytest.mark.parametrize(("script", "arguments", "key"), [
    ("bench_transform.py", [], "dense_us_per_token"),
    ("bench_attention.py", ["--batches", "2", "--contexts", "70"], "microseconds_per_token")])
def test_quick_runs_say_that_they_are_quick_and_the_page_refuses_them(tmp_path, script, arguments,
                                                                      key):
    what = script.removeprefix("bench_").removesuffix(".py")
    path = tmp_path / "results" / "made-up" / f"2025-01-02-{what}.json"
    path.parent.mkdir(parents=True)
    run(script, "--quick", *arguments, "--json", path)
    result = json.loads(path.read_text())
    assert (result["what"], result["quick"]) == (what, True)
    assert all(row[key] > 0 for row in result["rows"])
    done = run("performance.py", "--from", path.parents[1], "--out", tmp_path / "page.md", expect=1)
    assert "a quick run" in done.stderr
    path.write_text(json.dumps({**result, "quick": False}))
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    run("performance.py", "--from", path.parents[1], "--out", tmp_path / "page.md", "--readme",
        tmp_path / "README.md", expect=1)  # for want of peers
    page = (tmp_path / "page.md").read_text()
    assert f"benchmarks/{script} --quick" in page
    assert str(tmp_path) not in page


def test_instructions_are_counted_and_compared(benchmark_module, tmp_path, capsys, monkeypatch):
    module = benchmark_module("instructions")
    kept = tmp_path / "kept.json"
    built = module.compiler(Path(_C.__file__))
    assert built.partition(" ")[0] in ("gcc", "clang")
    if shutil.which("valgrind") is None:
        assert module.main(["--kept", str(kept)]) == 0
        assert "SKIPPED: valgrind" in capsys.readouterr().out
        pytest.skip("needs valgrind")
    counts = dict.fromkeys(module.cases(), 1000)
    monkeypatch.setattr(module, "count", lambda names: {n: counts[n] for n in names})
    assert module.main(["--kept", str(kept)]) == 0
    assert f"no numbers of {built}" in capsys.readouterr().out
    assert module.main(["--kept", str(kept), "--update"]) == 0
    assert json.loads(kept.read_text()) == {built: counts}
    first = next(iter(counts))
    counts[first] = 1099
    assert module.main(["--kept", str(kept)]) == 0
    counts[first] = 1101
    assert module.main(["--kept", str(kept)]) == 1
    assert f"FAILED: {first}: 1101" in capsys.readouterr().out


@pytest.mark.slow
def test_callgrind_counts_the_linear_alone(benchmark_module):
    if shutil.which("valgrind") is None:
        pytest.skip("needs valgrind")
    module = benchmark_module("instructions")
    names = ["generic w4a4 m=1", "generic w4a4 m=16"]
    one, many = module.count(names).values()
    assert 12 < many / one <= 16.5


# ---- the page -----------------------------------------------------------------------------------

ENVIRONMENT = {
    "cpu": "Made Up 9000", "cpus": 2, "load": [0.0, 0.0, 0.0], "threads": 1, "date": "2025-01-02",
    "system": "Linux", "blas": "OpenBLAS 0", "commit": "abc", "argv": ["--seconds", "7"],
    "kernels": {"runnable": ["avx2", "generic"], "compiled": ["avx2", "generic"], "active": "avx2",
                "steps": {}},
}


def made_peers():
    speeds = {  # peer -> kind, GOP/s of both shapes at m = 1 and 512
        "ours_w4a4": ("ours", {1: (100, 200), 512: (240, 260)}),
        "ours_w4a8": ("ours", {1: (100, 200), 512: (190, 200)}),
        "bare_w4a4": ("bound", {512: (300, 320)}),
        "ggml_q4_0": ("int4", {1: (50, 40), 512: (90, 91)}),
        "other": ("int4", {1: (30, 80), 512: (100, 90)}),
        "openblas": ("32-bit", {1: (8, 9), 512: (115, 117)}),
    }
    rows = []
    for peer, (kind, found) in speeds.items():
        for m, values in found.items():
            for (n, k), gops in zip(((64, 64), (128, 64)), values, strict=True):
                row = {"peer": peer, "kind": kind, "n": n, "k": k, "m": m, "gops": gops}
                if m == 1:
                    row["share_of_read"] = 0.875
                if peer == "bare_w4a4":
                    row["share_of_peak"] = 0.625
                rows.append(row)
    peers = {p: {"kind": kind, "activations": "made", "version": f"{p} 1"}
             for p, (kind, _) in speeds.items()}
    peers["gone"] = {"kind": "int8", "activations": "made", "skipped": "it is not installed"}
    return {"what": "peers", "environment": ENVIRONMENT, "isa": "avx2", "threads": 1,
            "shapes": [[64, 64], [128, 64]], "peaks": {"fma 256": 111.4}, "peers": peers,
            "cores": {"cpus": [0, 1], "ratio": 1.9}, "rows": rows, "ratios": []}


def made_ladder():
    row = {"table": "avx2", "scheme": "w4a4", "m": 512, "gops": 271.0, "bare_gops": 283.0,
           "bare_share_of_peak": 0.741}
    return {"what": "ladder", "environment": ENVIRONMENT, "shape": [64, 64], "rows": [row],
            "transform": [{"table": "avx2", "scheme": "w4a4", "m": 512, "share": 0.137}],
            "cores": {"cpus": [0, 1], "ratio": 1.97},
            "threads": [{"table": "avx2", "threads": 2, "m": 512, "w4a4": 1.83, "w4a8": 1.74}],
            "peaks": {}}


def made_end_to_end():
    def row(engine, kind, speed):
        return {"engine": engine, "kind": kind, "phase": "decode", "batch": 64,
                "note": "AVX2 | FMA |",
                "tokens_per_s": {"median": speed, "low": speed - 1, "high": speed + 1}}

    rows = [row("our W4A4", "ours", 46.0), row("our W4A8", "ours", 60.0),
            row("our W4A16", "ours", 900.0), row("torch", "16-bit", 20.0),
            row("llama.cpp", "int4", 50.0)]
    environment = {**ENVIRONMENT, "argv": ["--work", "/here", "--layers", "3"], "load": [1.5, 0, 0]}
    return {"environment": environment, "rows": rows}


def made_quantize():
    figures = [("disk, cold file", 2.25, "GB/s"), ("memory, 2 threads", 30.5, "GB/s"),
               ("calibration, 1024 tokens, per 10^9 weights", 11.5, "s"), ("  CPU", 22.5, "s"),
               ("solving rotations (balanced), per 10^9 weights", 3.25, "s"), ("  CPU", 6.25, "s")]
    stage = {"weights": "mse", "cold, s per 10^9": 4.5, "warm, s per 10^9": 3.5,
             "CPU, s per 10^9": 6.75, "read from disk, MB": 400.0, "peak memory, MB": 120.25,
             "bound, MB": 140.0, "target, s per 10^9": 2.85}
    step = {"weights": "mse", "step": "clip search", "CPU ns per weight": 1.125}
    rows = [*({"figure": f, "value": v, "unit": u} for f, v, u in figures), stage, step]
    return {"what": "quantize", "environment": ENVIRONMENT, "rows": rows}


def made_transform():
    row = {"k": 4096, "k1": 64, "k2": 64, "tokens": 512, "quantize_us_per_token": 1.5,
           "linear_us_per_token": 90.0, "dense_us_per_token": 12.25, "hadamard_us_per_token": 20.5,
           "chain_us_per_token": 333.0, "dense_gflops": 97.0, "share": 0.136}
    return {"what": "transform", "environment": ENVIRONMENT, "rows": [row]}


def made_attention():
    row = {"model": "LLaMA-3-8B", "kv_bits": 8, "batch": 16, "context": 2048, "speedup": 2.75,
           "microseconds_per_token": 250.0, "without_context": 12.5, "gb_per_second": 14.5}
    return {"what": "attention", "environment": ENVIRONMENT, "rows": [row]}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "made-up"
    folder.mkdir(parents=True)
    old = made_peers()
    for row in old["rows"]:
        row["gops"] = 7777
    for name, value in (("2025-01-01-peers-avx2-1", old), ("2025-01-02-peers-avx2-1", made_peers()),
                        ("2025-01-02-ladder", made_ladder()),
                        ("2025-01-02-end-to-end", made_end_to_end()),
                        ("2025-01-02-quantize", made_quantize()),
                        ("2025-01-02-transform", made_transform()),
                        ("2025-01-02-attention", made_attention())):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "notes.md").write_text("The profile says why.\n")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- performance:begin -->\nold\n<!-- performance:end -->\nafter\n")
    return folder.parent


def generate(results, expect=0):
    base = results.parent
    done = run("performance.py", "--from", results, "--out", base / "page.md", "--readme",
               base / "README.md", expect=expect)
    return done if expect else ((base / "page.md").read_text(), (base / "README.md").read_text())


def test_page_holds_the_figures_of_the_newest_files(results):
    page, _ = generate(results)
    assert "7777" not in page
    assert "<!-- generated -->" not in page
    assert "| ours_w4a4 | ours | made | 141 | 250 |" in page  # sqrt(100 * 200), sqrt(240 * 260)
    assert "| ours_w4a4 | best int4 | 2.24x | 2.62x |" in page
    assert "Made Up 9000" in page
    assert "gone: it is not installed" in page
    assert "fma 256 111" in page
    assert "| avx2 | w4a4 | 512 | 271 | 283 | 74% | - |" in page
    assert "| our W4A4 | ours | decode | 64 | 46.0 | 45.0 - 47.0 | AVX2, FMA |" in page
    assert "| mse | 4.50 | 3.50 | 6.75 | 2.85 | 120 | 140 |" in page
    assert "| disk, cold file | 2.25 | GB/s |" in page
    assert "| calibration, 1024 tokens, per 10^9 weights: CPU | 22.5 | s |" in page
    assert "| mse | clip search | 1.12 |" in page
    assert "| 4096 | 64 x 64 | 1.50 | 12.2 | 20.5 | 333 | 97.0 | 14% |" in page
    assert "| LLaMA-3-8B | 16 | 2048 | 8 | 250 | 12.5 | 14.5 | 2.75x |" in page
    assert "The profile says why." in page


def test_page_says_which_aims_are_met(results):
    page, _ = generate(results)
    for line in (
        "ours_w4a4, m = 512, over ggml_q4_0 | >= 2.50x | 2.76x | met |",
        "ours_w4a4, m = 512, over the fastest int4 | >= 1.40x | 2.62x | met |",
        "ours_w4a8, m = 512, over ours_w4a4 | >= 0.85x | 0.78x | not met |",
        "ours_w4a4, m = 16, over the fastest int4 | >= 1.30x | - | no figure |",
        "ours_w4a4, m = 1, of the read loop | >= 85% | 88% | met |",
        "bare_w4a4, m = 512, of the peak | >= 75% | 62% | not met |",
        "transform of w4a4 on avx2, m = 512 | <= 15% | 14% | met |",
        "two threads on avx2, w4a8 | >= 1.80x | 1.74x | not met |",
        "our W4A4, decode, batch 64, over the fastest 16-bit | >= 2.30x | 2.30x | met |",
        "our W4A4, decode, batch 64, over the fastest int4 | >= 1.00x | 0.92x | not met |",
        "our W4A8, decode, batch 64, over the fastest int4 | >= 1.00x | 1.20x | met |",
    ):
        assert line in page, line
    assert "our W4A16, decode" not in page


def test_each_section_names_its_command_commit_and_load(results):
    page, _ = generate(results)
    assert ("`python benchmarks/end_to_end.py --layers 3`, 2025-01-02, commit abc, load 1.5 before"
            in page)
    assert "`python benchmarks/kernel_ladder.py --seconds 7`, 2025-01-02, commit abc, load" in page
    assert "/here" not in page


def test_readme_gets_the_table_between_its_marks(results):
    _, readme = generate(results)
    assert readme.startswith("before\n<!-- performance:begin -->\n")
    assert readme.endswith("<!-- performance:end -->\nafter\n")
    assert "old" not in readme
    assert "| W4A4 | best int4 | 2.24x | 2.62x |" in readme
    assert ("CPU seconds: 22.5 to calibrate and 6.25 to solve; to quantize and write, 6.75 with "
            "`--weights mse` in 120 MB of" in readme)


def test_readme_is_left_as_it_is_without_peers(results):
    for path in (results / "made-up").glob("*peers*"):
        path.unlink()
    before = (results.parent / "README.md").read_text()
    assert "expected a file of peers" in generate(results, expect=1).stderr
    assert (results.parent / "README.md").read_text() == before
    assert "### Kernel ladder" in (results.parent / "page.md").read_text()


def test_generator_names_a_folder_that_is_not_there(tmp_path):
    done = run("performance.py", "--from", tmp_path / "none", "--out", tmp_path / "page.md",
               expect=1)
    assert "--from: expected a folder" in done.stderr
    assert not (tmp_path / "page.md").exists()


def test_generator_refuses_strange_files_and_keeps_the_page(results):
    (results.parent / "page.md").write_text("as it was")
    quick = json.dumps({**made_ladder(), "quick": True})
    old_quick = json.dumps({**made_end_to_end(), "settings": {"quick": True}})
    for name, text, part in (("notes.json", "{}", "expected a name like"),
                             ("2025-01-02-ladder.json", '{"rows": []}', "environment and rows"),
                             ("2025-01-02-ladder.json", quick, "a quick run"),
                             ("2025-01-02-end-to-end.json", old_quick, "a quick run")):
        path = results / "made-up" / name
        before = path.read_text() if path.exists() else None
        path.write_text(text)
        assert part in generate(results, expect=1).stderr
        if before is None:
            path.unlink()
        else:
            path.write_text(before)
    (results.parent / "README.md").write_text("no marks")
    assert "performance:begin" in generate(results, expect=1).stderr
    assert (results.parent / "page.md").read_text() == "as it was"


def test_the_repositorys_readme_has_the_marks():
    text = (ROOT / "README.md").read_text()
    assert text.index("<!-- performance:begin -->") < text.index("<!-- performance:end -->")
