# SPDX-License-Identifier: Apache-2.0
"""The AMX table: shapes at the edges of its tiles, slabs and buffers, its emulated tiles, its
instructions. The shapes run on every table of this machine; `make amx` adds this one anywhere."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from singlequant import _C, _reference as reference

ROOT = Path(__file__).resolve().parent.parent
# kernels_amx.c: fewer rows than 16 (32 with short groups) go to AVX-512; 16 rows are a tile, 32 a
# block, 256 a buffer.
ROWS = [1, 7, 8, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 64, 65, 255, 256, 257, 300]
# A tile is 64 inputs, a slab 1024; the last 32 may be half a tile, or half a tile behind a slab.
INPUTS = [32, 64, 96, 1024, 1056, 1088, 2048, 2080, 3100]


def problem(m, n, k, group=0):
    """x [m, k] with one row of zeros, words and scales of n outputs."""
    rng = np.random.default_rng([m, n, k, group])
    x = rng.standard_normal((m, k)).astype(np.float32)
    x[m // 2] = 0
    words = reference.pack(rng.integers(-8, 8, (n, k)))
    scales = rng.uniform(-2, 2, (n, k // group if group else 1)).astype(np.float32)
    return x, words, scales


def linear_by(table, x, words, scales, group=0, bits=8, high=0):
    _C.use_kernels(table)
    weight = _C.PackedWeight(words, scales, x.shape[1], group, high)
    return _C.linear(x, weight, bits)


def assert_same_bits(found, expected):
    """Signed zeros count."""
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("k", INPUTS)
def test_rows_and_inputs_at_every_edge_give_the_generic_bits(table, k):
    x, words, scales = problem(max(ROWS), 33, k)
    expected = linear_by("generic", x, words, scales)
    for m in ROWS:
        assert_same_bits(linear_by(table, x[:m], words, scales), expected[:m])


# Several in a slab | across its end | odd: half tiles | longer than a slab | as long as k | more
# than the x86 tiles prepare at once (64).
@pytest.mark.parametrize(
    ("k", "group"),
    [(64, 64), (2048, 128), (1344, 192), (2112, 704), (288, 96), (4096, 2048), (4224, 1408),
     (1088, 1088), (1056, 1056), (4224, 64), (2112, 32), (1056, 32), (2880, 96)],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_inside_and_across_slabs_give_the_generic_bits(table, bits, k, group):
    x, words, scales = problem(41, 64, k, group)
    expected = linear_by("generic", x, words, scales, group, bits)
    for m in (15, 16, 31, 32, 41):
        assert_same_bits(linear_by(table, x[:m], words, scales, group, bits), expected[:m])


@pytest.mark.parametrize(("k", "group", "high"), [(1248, 0, 96), (1184, 0, 1120), (512, 64, 128)])
def test_high_inputs_are_added_in_the_generic_bits(table, k, group, high):
    x, words, scales = problem(70, 40, k, group)
    expected = linear_by("generic", x, words, scales, group, 4, high)
    assert_same_bits(linear_by(table, x, words, scales, group, 4, high), expected)


@pytest.mark.parametrize("k", [2**20, 2**20 - 40])
def test_largest_sums_of_many_rows_are_exact(table, k):
    weight = _C.PackedWeight(np.full((1, -(-k // 8)), -1, np.int32), [1.0], k)  # codes 7
    x = np.full((17 if table != "generic" else 1, k), -1, np.float32)
    expected = np.float32(0.5) / np.float32(127) * np.float32(-128 * 7 * k)
    np.testing.assert_array_equal(_C.linear(x, weight, 8, 0.5), np.full((len(x), 1), expected))


# ---- emulated tiles ---------------------------------------------------------------------------

# One product of argv's rows and inner bytes from standard input to standard output; a third
# argument breaks a rule.
PROGRAM = r"""
#include "kernels/amx_emulated.h"
int main(int argc, char **argv)
{
    const int rows = atoi(argv[1]), inner = atoi(argv[2]), rule = argc > 3 ? atoi(argv[3]) : 0;
    struct {
        uint8_t palette, rest[15];
        uint16_t colsb[16];
        uint8_t rows[16];
    } config = {.palette = 1, .colsb = {64, inner, 64}, .rows = {rows, rows, inner / 4}};
    int8_t a[16 * 64];
    int8_t w[16 * 64];
    int32_t sums[16 * 16];
    if (fread(a, 64, rows, stdin) + fread(w, 64, inner / 4, stdin) + fread(sums, 64, rows, stdin) !=
        (size_t)(2 * rows + inner / 4)) {
        return 1;
    }
    config.palette -= rule == 1;
    config.rows[0] += rule == 2 ? 16 : 0;
    config.rows[1] -= rule == 3;
    config.rows[2] -= rule == 4;
    config.colsb[2] -= rule == 5 ? 4 : 0;
    config.colsb[3] = rule == 6 ? 64 : 0;
    config.rest[3] = rule == 7;
    amx_load_config(&config);
    if (rule == 8) {
        amx_release();
    }
    amx_load(0, sums, 64);
    amx_load(1, a, 64);
    amx_load(2, w, 64);
    amx_dpbssd(0, rule == 9 ? 0 : 1, 2);
    amx_store(0, sums, 64);
    return fwrite(sums, 64, rows, stdout) != (size_t)rows;
}
"""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not compiler:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "program.c").write_text(PROGRAM)
    command = [compiler, "-std=c11", "-O1", "-I", ROOT / "csrc", "-o", folder / "program"]
    subprocess.run([*command, folder / "program.c"], check=True)
    return folder / "program"


def emulate(program, rows, inner, rule=0):
    rng = np.random.default_rng([rows, inner])
    a = rng.integers(-128, 128, (rows, 64), dtype=np.int8)
    w = rng.integers(-128, 128, (inner // 4, 64), dtype=np.int8)
    sums = rng.integers(-(2**31), 2**31, (rows, 16), dtype=np.int32)
    arguments = [program, str(rows), str(inner), str(rule)]
    result = subprocess.run(
        arguments, input=a.tobytes() + w.tobytes() + sums.tobytes(), capture_output=True,
        check=False,
    )
    # [k][output][byte] -> [4 k + byte][output]
    matrix = w.reshape(-1, 16, 4).transpose(0, 2, 1).reshape(inner, 16).astype(np.int64)
    expected = (sums + a[:, :inner].astype(np.int64) @ matrix).astype(np.int32)  # wraps around
    return result, expected


@pytest.mark.parametrize(("rows", "inner"), [(1, 4), (7, 32), (16, 64)])
def test_emulated_product_equals_numpy(emulator, rows, inner):
    result, expected = emulate(emulator, rows, inner)
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(np.frombuffer(result.stdout, np.int32).reshape(-1, 16), expected)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (1, "palette is not 1"),
        (2, "the tile is too large"),
        (3, "rows of sums and first factor differ"),
        (4, "the factors' inner sizes differ"),
        (5, "columns of sums and second factor differ"),
        (6, "rows or columns alone are zero"),
        (7, "reserved bytes are not zero"),
        (8, "the tile is not configured"),
        (9, "a tile is used twice"),
    ],
)
def test_emulated_tiles_refuse_what_the_cpu_refuses(emulator, rule, message):
    result, _ = emulate(emulator, 7, 32, rule)
    assert result.returncode == -6  # SIGABRT
    assert message in result.stderr.decode()


# ---- the object -------------------------------------------------------------------------------


def test_object_holds_the_tile_instructions():
    objects = list(ROOT.glob("build/**/kernels_amx.o"))
    if not objects or not shutil.which("objdump"):
        pytest.skip("no kernels_amx.o under build/, or no objdump")
    command = ["objdump", "-d", "--no-show-raw-insn", "-M", "intel", objects[0]]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "amx_load" in text or "tilerelease" not in text:
        assert _C.kernels()["missing"].get("amx") is None, "the real table lacks its instructions"
        pytest.skip("built with emulated tiles")
    # sums (0 .. 3) += codes (4, 5) times weights (6, 7); 1 5 7 is of short groups
    products = set(re.findall(r"tdpbssd +tmm(\d),tmm(\d),tmm(\d)", text))
    assert products == {("0", "4", "6"), ("1", "4", "7"), ("2", "5", "6"), ("3", "5", "7"),
                        ("1", "5", "7")}
    loads = set(re.findall(r"tileloadd +tmm(\d),\[r\w+\+r\w+\*1\]", text))
    assert loads == set("01234567")
    assert set(re.findall(r"tilestored +\[r\w+\+r\w+\*1\],tmm(\d)", text)) == set("0123")
    assert set(re.findall(r"tilezero +tmm(\d)", text)) == set("0123")
    assert "ldtilecfg" in text
