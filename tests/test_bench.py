"""The benchmarks run and say what they measured."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from made_results import ENVIRONMENT, ROOT, made_peers, run

from benchmarks import (
    bench_attention,
    bench_kv,
    bench_peers,
    common,
    end_to_end,
    instructions,
    kernel_ladder,
)
from singlequant import _C
from singlequant.cli.main import main
from singlequant.study import bench
from singlequant.study.float32 import Float32Product

BENCHMARKS = ROOT / "benchmarks"
MODULES = {module.__name__.rpartition(".")[2]: module for module in (
    bench_attention, bench_kv, bench_peers, end_to_end, kernel_ladder)}


@pytest.fixture(autouse=True)
def threads():
    before = _C.get_num_threads()
    yield
    _C.set_num_threads(before)


def module(name):
    """A module of benchmarks/."""
    return MODULES[name]


# ---- singlequant bench --------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "int8_inputs", "limit"), [
    ("w4a4", None, 0.3), ("w4a4", 0, 0.3), ("w4a8", None, 0.15), ("w4a16", None, 0.15)])
def test_transformed_linear_multiplies_by_the_given_weight(scheme, int8_inputs, limit):
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((96, 1024)), rng.standard_normal((5, 1024))
    linear = bench.TransformedLinear(weight.astype(np.float32), scheme, int8_inputs, copies=3)
    expected = x @ weight.T
    for _ in range(4):  # every copy, and round
        y = linear(x.astype(np.float32))
        assert np.linalg.norm(y - expected) < limit * np.linalg.norm(expected)
    mixed = scheme == "w4a4" and int8_inputs is None
    assert linear.weights[0].int8_inputs == (256 if mixed else 0)


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


def test_float32_is_timed_in_a_process_of_its_own(monkeypatch):
    """The figures are the child's, so that the threads of its BLAS never run beside ours."""
    asked = []

    class Elsewhere(Float32Product):
        def seconds(self, m):
            taken = super().seconds(m)
            assert 0 < taken < 60
            asked.append((self.pid != os.getpid(), m))
            return m * 1e-3

    monkeypatch.setattr(bench, "Float32Product", Elsewhere)
    rows = bench.bench(0.1, (64, 128), (1, 3), ("w4a8",))["rows"]
    assert {r["m"]: r["seconds"] for r in rows if r["scheme"] == "float32"} == {1: 1e-3, 3: 3e-3}
    assert set(asked) == {(True, 1), (True, 3)}


def test_float32_answers_once_its_threads_are_idle(tmp_path):
    def cpu_ticks(pid):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])  # utime, stime

    used = []
    with Float32Product(2048, 2048, 1) as product:
        while len(used) < 5 and min(used, default=1) > 0.05:
            product.seconds(1)
            before = cpu_ticks(product.pid)
            time.sleep(0.5)
            used.append((cpu_ticks(product.pid) - before) / os.sysconf("SC_CLK_TCK"))
    assert min(used) <= 0.05


def test_float32_names_a_process_that_ended():
    with Float32Product(8, 8, 1) as product:
        product.seconds(1)
        os.kill(product.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="float32: its process ended with status -9"):
            product.seconds(1)


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
    run("bench_peers", "--quick", "--m", "1,20", "--peers", "ours_w4a,read,bare_w4a4,openblas",
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
    done = run("bench_peers", "--quick", "--m", "2", "--isa", "avx2", "--peers",
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
    done = run("bench_peers", *arguments, expect=1 if arguments[0] == "--peers" else 2)
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
def test_parsers_name_the_option_and_what_was_found(capsys, script, option,
                                                    values):
    parse = module(script).parse
    for value in values:
        with pytest.raises(SystemExit):
            parse([f"{option}={value}"])
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"argument {option}: " in last
        assert f"found {value!r}" in last or f"found {value}" in last or "found no" in last


WRONG_PEER = """
import numpy as np
from benchmarks.peers.base import Peer
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


def test_a_peer_that_is_wrong_absent_or_dies_is_told_apart(tmp_path, monkeypatch):
    copy = tmp_path / "benchmarks" / "peers"  # what the workers import, the root being tmp_path
    copy.mkdir(parents=True)
    shutil.copy(BENCHMARKS / "__init__.py", copy.parent)  # else an installed one wins
    for name in ("__init__", "base", "serving", "worker"):
        shutil.copy(BENCHMARKS / "peers" / f"{name}.py", copy)
    (copy / "broken_peers.py").write_text(WRONG_PEER)
    monkeypatch.setattr(bench_peers.common, "ROOT", tmp_path)
    monkeypatch.setattr(bench_peers.peers, "__path__", [str(copy)])
    monkeypatch.setitem(sys.modules, "benchmarks.peers.broken_peers", None)
    del sys.modules["benchmarks.peers.broken_peers"]
    result = bench_peers.run(["--quick", "--m", "2", "--seconds", "0.1"])
    failed = {r["peer"]: r["failed"] for r in result["rows"]}
    assert "not the product" in failed["wrong"]
    assert failed["dead"] == "the process ended with status 3"
    assert result["peers"]["absent"]["skipped"] == "ImportError: no such library"
    assert not [r for r in result["rows"] if "gops" in r]
    assert result["ratios"] == []


def test_ratios_are_geometric_means_over_the_best_of_each_shape():
    rows = made_peers()["rows"]
    ratio = bench_peers.ratio_to(rows, "ours_w4a4", 1, ["ggml_q4_0", "other"])
    assert ratio["peers"] == ["ggml_q4_0", "other"]
    assert ratio["ratio"] == pytest.approx((100 / 50 * 200 / 80) ** 0.5)
    assert bench_peers.ratio_to(rows, "ours_w4a4", 99, ["ggml_q4_0"]) is None


def test_kept_commands_name_no_file_of_this_machine():
    for where in ("--python", "--peer-python", "--work", "--json", "--folder"):
        for given in ([where, "/here/x"], [f"{where}=/here/x"]):
            assert common.shown_arguments([*given, "--isa", "avx2", "--keep", *given, "--m=1"]) == [
                "--isa", "avx2", "--m=1"]
    assert common.environment(["--work", "/here", "--quick"])["argv"] == ["--quick"]


def test_kept_results_of_one_machine_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    for cpus, kind in ((1, "ladder"), (2, "quantize")):  # the first was held to one CPU
        common.write_result({"environment": {**ENVIRONMENT, "cpus": cpus}, "rows": []}, None, kind)
    written = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.json"))
    folder = f"benchmarks/results/made-up-9000-{os.cpu_count()}cpu-avx2"
    assert written == [f"{folder}/2025-01-02-ladder.json", f"{folder}/2025-01-02-quantize.json"]


@pytest.mark.parametrize("script", ["bench_peers", "kernel_ladder", "end_to_end"])
def test_every_option_that_names_a_path_is_left_out(script, capsys):
    parse = module(script).parse
    with pytest.raises(SystemExit):
        parse(["--help"])
    options = re.findall(r"^  (--[a-z-]+) (?:FILE|DIR)$|^  (--[a-z-]+) (?:FILE|DIR) ",
                         capsys.readouterr().out, re.M)
    found = {a or b for a, b in options}
    assert "--json" in found
    assert found <= set(common.PATH_OPTIONS)


def test_ladder_has_every_table(tmp_path):
    path = tmp_path / "ladder.json"
    done = run("kernel_ladder", "--quick", "--m", "1,8", "--seconds", "0.4", "--json", path)
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
    ("bench_transform", [], "dense_us_per_token"),
    ("bench_attention", ["--batches", "2", "--contexts", "70"], "microseconds_per_token")])
def test_quick_runs_say_that_they_are_quick_and_the_page_refuses_them(tmp_path, script, arguments,
                                                                      key):
    what = script.removeprefix("bench_")
    path = tmp_path / "results" / "made-up" / f"2025-01-02-{what}.json"
    path.parent.mkdir(parents=True)
    run(script, "--quick", *arguments, "--json", path)
    result = json.loads(path.read_text())
    assert (result["what"], result["quick"]) == (what, True)
    assert all(row[key] > 0 for row in result["rows"])
    done = run("performance", "--from", path.parents[1], "--out", tmp_path / "page.md", expect=1)
    assert "a quick run" in done.stderr
    path.write_text(json.dumps({**result, "quick": False}))
    (tmp_path / "summary.md").write_text((ROOT / "docs" / "summary.md").read_text())
    run("performance", "--from", path.parents[1], "--out", tmp_path / "page.md", "--summary",
        tmp_path / "summary.md", expect=1)  # for want of peers
    page = (tmp_path / "page.md").read_text()
    assert f"benchmarks.{script} --quick" in page
    assert str(tmp_path) not in page


def test_instructions_are_counted_and_compared(tmp_path, capsys, monkeypatch):
    kept = tmp_path / "kept.json"
    built = instructions.compiler(Path(_C.__file__))
    assert built.partition(" ")[0] in ("gcc", "clang")
    if shutil.which("valgrind") is None:
        assert instructions.main(["--kept", str(kept)]) == 0
        assert "SKIPPED: valgrind" in capsys.readouterr().out
        pytest.skip("needs valgrind")
    counts = dict.fromkeys(instructions.cases(), 1000)
    monkeypatch.setattr(instructions, "count", lambda names: {n: counts[n] for n in names})
    assert instructions.main(["--kept", str(kept)]) == 0
    assert f"no numbers of {built}" in capsys.readouterr().out
    assert instructions.main(["--kept", str(kept), "--update"]) == 0
    assert json.loads(kept.read_text()) == {built: counts}
    first = next(iter(counts))
    counts[first] = 1099
    assert instructions.main(["--kept", str(kept)]) == 0
    counts[first] = 1101
    assert instructions.main(["--kept", str(kept)]) == 1
    assert f"FAILED: {first}: 1101" in capsys.readouterr().out


@pytest.mark.slow
def test_callgrind_counts_the_linear_alone():
    if shutil.which("valgrind") is None:
        pytest.skip("needs valgrind")
    names = ["generic w4a4 m=1", "generic w4a4 m=16"]
    one, many = instructions.count(names).values()
    assert 12 < many / one <= 16.5


# ---- groups -------------------------------------------------------------------------------------


def test_groups_are_compared_with_one_scale_per_output(tmp_path):
    path = tmp_path / "groups.json"
    printed = run("bench_groups", "--shapes", "64x192", "--groups", "64,128", "--m", "9",
                  "--seconds", "0.01", "--json", path).stdout
    rows = json.loads(path.read_text())["rows"]
    assert {row["group"] for row in rows} == {0, 64}  # 128 does not divide 192
    for row in rows:
        assert row["table"] in _C.kernels()["runnable"]
        assert row["gops"] > 0
        assert row["times"] == 1 or row["group"]
    assert f"g64 {rows[1]['times']:.2f}x" in printed
    refused = run("bench_groups", "--groups", "48", expect=2)
    assert "expected multiples of 32, found 48" in refused.stderr
