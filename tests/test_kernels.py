"""Kernel tables: selection, symbols, each float row against its twin, nothing read or written past
the ends of its arrays."""

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from singlequant import _C, _reference as reference

ROOT = Path(__file__).resolve().parent.parent
TABLES = _C.kernels()["runnable"]
EPS = np.finfo(np.float32).eps
# The polynomial exp is within 3e-7; the sum, the division and the scaling round a few times more.
SOFTMAX_RTOL = 1.5e-6
# exp, one addition, one division, one product.
SILU_RTOL = 6e-7


# ---- selection --------------------------------------------------------------------------------


def active_in_subprocess(disabled):
    return run_in_subprocess("from singlequant import _C; print(_C.kernels()['active'])", disabled)


def run_in_subprocess(code, disabled):
    environment = {**os.environ, "SINGLEQUANT_DISABLE_CPU": disabled}
    package_root = str(Path(_C.__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([package_root, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif("avx2" not in _C.kernels()["compiled"], reason="avx2 is not compiled in")
@pytest.mark.parametrize("disabled", ["avx2", "avx2,", ",avx2"])
def test_disable_cpu_falls_back_to_generic(disabled):
    result = active_in_subprocess(disabled)
    assert result.stdout.strip() == "generic", result.stderr


def test_disable_cpu_nothing_leaves_the_best():
    assert active_in_subprocess("").stdout.strip() == TABLES[0]


@pytest.mark.parametrize("disabled", ["avx3", "generic", "avx2 ", "avx"])
def test_disable_cpu_unknown_name_is_an_import_error(disabled):
    result = active_in_subprocess(disabled)
    assert result.returncode != 0
    assert f"ImportError: SINGLEQUANT_DISABLE_CPU: unknown name in '{disabled}'" in result.stderr


def test_use_kernels_unknown_name_is_refused_and_changes_nothing():
    before = _C.kernels()
    with pytest.raises(ValueError, match="use_kernels: 'nonsense' is unknown or cannot run here"):
        _C.use_kernels("nonsense")
    assert _C.kernels() == before


def test_every_compiled_table_runs_here():
    assert TABLES[-1] == "generic"
    lacks = [f"{t} lacks {', '.join(f)}" for t, f in _C.kernels()["missing"].items()]
    if lacks:
        pytest.skip(f"on this CPU or OS {'; '.join(lacks)}")


def test_kernels_says_what_each_table_lacks():
    kernels = _C.kernels()
    assert [t for t in kernels["compiled"] if t not in kernels["missing"]] == kernels["runnable"]
    features = {"avx2", "avx-vnni", "avx512-vnni", "amx-int8", "neon-dot"}
    for missing in kernels["missing"].values():
        assert missing
        assert set(missing) <= features


@pytest.mark.skipif("avx2" not in _C.kernels()["compiled"], reason="avx2 is not compiled in")
def test_runtime_says_which_tables_are_off_and_why():
    code = "import singlequant as s; print(s._C.kernels()['disabled']); s.show_runtime()"
    lines = run_in_subprocess(code, "avx2").stdout.splitlines()
    off = [t for t in _C.kernels()["compiled"] if t.startswith(("avx", "amx"))]
    assert lines[0] == str(off)
    shown = {line[:21].strip(): line[21:] for line in lines[1:]}
    assert shown["kernels"] == "generic"
    assert shown["kernels disabled"] == ", ".join(off)
    expected = [
        f"{t} (CPU or OS lacks {', '.join(f)})" for t, f in _C.kernels()["missing"].items()
    ]
    assert shown["kernels not runnable"] == (", ".join(expected) or "none")


def test_kernel_objects_export_exactly_their_table():
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    objects = list(ROOT.glob("build/**/kernels_*.o"))
    if not objects:
        pytest.skip("no kernel objects under build/")
    for path in objects:
        result = subprocess.run(
            ["nm", "-g", "--defined-only", path], capture_output=True, text=True, check=True
        )
        names = [line.split()[-1] for line in result.stdout.splitlines()]
        names = [name for name in names if not name.startswith(("__asan", "__odr_asan"))]
        assert names == [f"sq_{path.stem}"]


# ---- guard pages ------------------------------------------------------------------------------


class Guarded:
    """Arrays whose last byte, or first, is next to a page that may not be touched."""

    def __init__(self):
        self.kept = []

    def place(self, values, at_end=True):
        values = np.ascontiguousarray(values)
        page = mmap.PAGESIZE
        inner = -(-max(values.nbytes, 1) // page) * page
        block = mmap.mmap(-1, inner + 2 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(block))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for guard in (address, address + page + inner):
            assert libc.mprotect(guard, page, 0) == 0  # PROT_NONE
        begin = page + (inner - values.nbytes if at_end else 0)
        placed = np.frombuffer(block, values.dtype, values.size, begin).reshape(values.shape)
        placed[...] = values
        self.kept.append(block)
        return placed


@pytest.fixture(params=[True, False], ids=["end", "start"])
def guarded(request):
    pages = Guarded()
    return lambda values: pages.place(values, request.param)


def test_guard_pages_are_there():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import numpy as np, test_kernels as t\n"
        "x = t.Guarded().place(np.ones(5, np.float32))\n"
        "np.lib.stride_tricks.as_strided(x, (6,), (4,)).sum()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), *sys.path], check=False,
        capture_output=True,
    )
    assert result.returncode == -11  # SIGSEGV


@pytest.mark.parametrize("k", [1, 3, 7, 8, 9, 31, 32, 33, 63, 100])
def test_quantize_and_linear_stay_inside_their_arrays(table, guarded, k):
    rng = np.random.default_rng(k)
    for m, n in ((1, 1), (3, 7), (5, 33)):
        x = guarded(rng.standard_normal((m, k)).astype(np.float32))
        codes = guarded(rng.integers(-8, 8, (n, k)).astype(np.int8))
        words = guarded(_C.pack(codes))
        scales = guarded(np.ones((n, 1), np.float32))
        np.testing.assert_array_equal(_C.unpack(words, k), codes)
        weight = _C.PackedWeight(words, scales, k)
        for bits in (4, 8, 16):
            found = _C.linear(x, weight, bits)
            expected = reference.packed_linear(x, words, scales, bits=bits)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
        for symmetric in (True, False):
            found = _C.quantize(x, 4, 0, symmetric, 1.0, True)
            expected = reference.quantize(x, 4, 0, symmetric, 1.0, True)
            np.testing.assert_array_equal(found[0], expected[0])


# ---- float rows -------------------------------------------------------------------------------


def gemm(a, b, place=np.ascontiguousarray):
    out = place(np.full((a.shape[0], b.shape[1]), np.nan, np.float32))
    _C.kernel_gemm_f32(a, b, out)
    return out


@pytest.mark.parametrize("m", [1, 2, 5, 6, 7, 13, 24, 33])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 17, 31, 50])
def test_gemm_f32_is_within_the_chain_bound(table, guarded, m, n):
    rng = np.random.default_rng([m, n])
    for k in (1, 2, 9, 64, 257, 600):
        a = guarded(rng.standard_normal((m, k)).astype(np.float32))
        b = guarded(rng.standard_normal((k, n)).astype(np.float32))
        found = gemm(a, b, guarded)
        assert (np.abs(found - a.astype(float) @ b) <= k * EPS * (np.abs(a) @ np.abs(b))).all()


def test_gemm_f32_of_no_inputs_is_zero(table):
    for m in (1, 4):
        out = gemm(np.zeros((m, 0), np.float32), np.zeros((0, 21), np.float32))
        np.testing.assert_array_equal(out, np.zeros((m, 21)))


def test_gemm_f32_elements_do_not_depend_on_shape_or_place(table):
    rng = np.random.default_rng(0)
    for k in (5, 64, 300):
        a = rng.standard_normal((40, k)).astype(np.float32)
        b = rng.standard_normal((k, 70)).astype(np.float32)
        whole = gemm(a, b)
        for rows in ((0, 1), (3, 5), (7, 14), (39, 40), (10, 35)):
            for columns in ((0, 1), (5, 38), (16, 70), (69, 70), (3, 12)):
                part = gemm(a[slice(*rows)], b[:, slice(*columns)])
                np.testing.assert_array_equal(part, whole[slice(*rows), slice(*columns)])


def test_gemm_f32_generic_is_the_plain_chain():
    rng = np.random.default_rng(1)
    a = rng.standard_normal((3, 50)).astype(np.float32)
    b = rng.standard_normal((50, 4)).astype(np.float32)
    chain = np.zeros((3, 4), np.float32)
    for p in range(50):
        chain = chain + a[:, p : p + 1] * b[p]
    before = _C.kernels()["active"]
    _C.use_kernels("generic")
    np.testing.assert_array_equal(gemm(a, b), chain)
    _C.use_kernels(before)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("k", [1, 7, 8, 15, 16, 17, 33, 250])
def test_gemm_half_is_within_the_chain_bound_and_knows_no_batch(table, guarded, dtype, k):
    rng = np.random.default_rng(k)
    for n in (1, 3, 4, 9, 35):
        w = guarded(rng.standard_normal((n, k)).astype(dtype))
        x = guarded(rng.standard_normal((8, k)).astype(np.float32))
        whole = _C.linear_dense(x, w)  # 8 tokens and fewer than 4: two loops in the generic table
        wide = w.astype(float)
        bound = k * EPS * (np.abs(x) @ np.abs(wide).T)
        assert (np.abs(whole - x.astype(float) @ wide.T) <= bound).all()
        for m in range(1, 8):
            np.testing.assert_array_equal(_C.linear_dense(guarded(x[:m]), w), whole[:m])
        np.testing.assert_array_equal(_C.linear_dense(x, guarded(w[-1:])), whole[:, -1:])


@pytest.mark.parametrize("activation_bits", [8, 16, 24])
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 250, 545, 2050])
def test_gemm_rows_equals_twin_bit_for_bit(table, guarded, bits, k, activation_bits):
    rng = np.random.default_rng(k)
    for n in (1, 3, 33, 67):
        given = rng.standard_normal((n, k)).astype(np.float32)
        codes, scales = map(guarded, _C.quantize_rows(given, bits))
        x = guarded((rng.standard_normal((14, k)) * np.exp(rng.normal(size=k))).astype(np.float32))
        expected = reference.linear_rows(x, codes, scales, bits, activation_bits)
        for m in (1, 2, 3, 7, 14):
            found = _C.linear_rows(guarded(x[:m]), codes, scales, bits, activation_bits)
            np.testing.assert_array_equal(found, expected[:m])
        found = _C.linear_rows(x, guarded(codes[-1:]), guarded(scales[-1:]), bits, activation_bits)
        np.testing.assert_array_equal(found, expected[:, -1:])
        wide = reference.rows_of_codes(codes, scales, bits, k)
        bound = reference.linear_rows_bound(x, codes, scales, bits, activation_bits)
        assert (np.abs(expected - x.astype(float) @ wide.T) <= bound).all()


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_gemm_rows_takes_every_byte_and_says_nan(table, bits):
    """Codes that no writer makes, -128 among them; tokens that are tiny, huge, Inf or NaN."""
    rng, k = np.random.default_rng(bits), 2080
    codes = rng.integers(0, 256, (40, k * bits // 8), dtype=np.uint8)
    codes[:3] = 128
    scales = rng.integers(0x3000, 0x4000, (40, k // 32)).astype(np.uint16)
    x = rng.standard_normal((6, k)).astype(np.float32)
    x[1] *= np.float32(1e-44)
    x[2, :32] = 1e-40
    x[3, 5] = 1e30
    x[4, 7], x[5, 9] = np.inf, np.nan
    for activation_bits in (8, 16, 24):
        found = _C.linear_rows(x, codes, scales, bits, activation_bits)
        expected = reference.linear_rows(x[:4], codes, scales, bits, activation_bits)
        np.testing.assert_array_equal(found[:4], expected)
        assert np.isnan(found[4:]).all()
        for row in range(6):
            alone = _C.linear_rows(x[row], codes, scales, bits, activation_bits)
            np.testing.assert_array_equal(alone, found[row])


SIZES = [1, 2, 7, 8, 9, 15, 16, 33, 64, 100, 1000, 2049]


@pytest.mark.parametrize("n", SIZES)
def test_rms_norm_equals_twin_bit_for_bit(table, guarded, n):
    rng = np.random.default_rng(n)
    for scale in (1e-6, 1.0, 1e6):
        x = guarded((rng.standard_normal(n) * scale).astype(np.float32))
        weight = guarded(rng.standard_normal(n).astype(np.float32))
        out = guarded(np.full(n, np.nan, np.float32))
        _C.kernel_rms_norm(x, weight, 1e-6, out)
        np.testing.assert_array_equal(out, reference.rms_norm(x, weight, 1e-6))


def test_rms_norm_of_zeros_is_zero_and_in_place_is_the_same(table):
    out = np.full(9, np.nan, np.float32)
    _C.kernel_rms_norm(np.zeros(9), np.ones(9), 1e-5, out)
    np.testing.assert_array_equal(out, np.zeros(9))
    x = np.random.default_rng(0).standard_normal(21).astype(np.float32)
    expected = reference.rms_norm(x, np.ones(21), 1e-5)
    _C.kernel_rms_norm(x, np.ones(21), 1e-5, x)
    np.testing.assert_array_equal(x, expected)


def silu(gate, up, place=np.ascontiguousarray):
    out = place(np.full(len(gate), np.nan, np.float32))
    _C.kernel_silu_mul(gate, up, out)
    return out


@pytest.mark.parametrize("n", SIZES)
def test_silu_mul_is_close_to_twin(table, guarded, n):
    rng = np.random.default_rng(n)
    gate = guarded((rng.standard_normal(n) * 20).astype(np.float32))
    up = guarded(rng.standard_normal(n).astype(np.float32))
    found = silu(gate, up, guarded)
    np.testing.assert_allclose(found, reference.silu_mul(gate, up), rtol=SILU_RTOL, atol=1e-37)


def test_silu_mul_covers_the_whole_range(table):
    gate = np.linspace(-87, 100, 400_001, dtype=np.float32)
    found = silu(gate, np.ones_like(gate))
    np.testing.assert_allclose(found, reference.silu_mul(gate, 1.0), rtol=SILU_RTOL)
    big = np.float32([3e38, -3e38, 1e30, -1e30, 200, -200, -104, -103, 0, -0.0])
    found = silu(big, np.ones_like(big))
    np.testing.assert_allclose(found, reference.silu_mul(big, 1.0), rtol=SILU_RTOL, atol=1e-36)
    assert np.isnan(silu(np.float32([np.nan] * 9), np.ones(9, np.float32))).all()


@pytest.mark.parametrize("n", SIZES)
def test_tables_of_one_cpu_give_silu_and_softmax_the_same_bits(n, request):
    """They evaluate one polynomial in one order; the generic table calls libm."""
    rng, active, found = np.random.default_rng(n), _C.kernels()["active"], set()
    x = (rng.standard_normal((2, n)) * 30).astype(np.float32)
    request.addfinalizer(lambda: _C.use_kernels(active))
    for name in TABLES:
        if name != "generic":
            _C.use_kernels(name)
            shares = np.concatenate([x[0], np.full(40, np.nan, np.float32)])
            _C.kernel_softmax(shares, n, 0.125)
            found.add(silu(*x).tobytes() + shares.tobytes())
    assert len(found) <= 1


@pytest.mark.parametrize("n", SIZES)
def test_softmax_is_close_to_twin(table, guarded, n):
    rng = np.random.default_rng(n)
    for spread in (0.1, 3.0, 50.0):
        x = (rng.standard_normal(n) * spread).astype(np.float32)
        expected = reference.softmax(x, 0.125)
        results = []
        for padding in (0, 1, 7, 40):  # what lies there is not read
            out = guarded(np.concatenate([x, np.full(padding, np.nan, np.float32)]))
            _C.kernel_softmax(out, n, 0.125)
            assert not out[n:].any()
            results.append(out[:n])
        # scale * x is rounded to float32 first: |x| eps / 2 in the exponent
        rtol = SOFTMAX_RTOL + np.abs(x).max() * 0.125 * EPS
        np.testing.assert_allclose(results[0], expected, rtol=rtol, atol=1e-37)
        for other in results[1:]:
            np.testing.assert_array_equal(other, results[0])


def test_softmax_handles_large_and_equal_scores(table):
    x = np.float32([3e38, -3e38, 0, 3e38, 1, 2, 3, 4, 5])
    _C.kernel_softmax(x, 9, 1.0)
    np.testing.assert_array_equal(x, [0.5, 0, 0, 0.5, 0, 0, 0, 0, 0])
    x = np.full(16, -5, np.float32)
    _C.kernel_softmax(x, 16, 0.3)
    np.testing.assert_array_equal(x, np.full(16, 1 / 16))


@pytest.mark.parametrize("bfloat16", [False, True], ids=["f16", "bf16"])
def test_widening_is_exact_for_every_value(table, bfloat16):
    bits = np.arange(2**16, dtype=np.uint16)
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    if not bfloat16:
        expected = bits.view(np.float16).astype(np.float32)
    found = np.empty(2**16, np.float32)
    assert not _C.kernel_widen(bits, bfloat16, found)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(
        found[numbers].view(np.uint32), expected[numbers].view(np.uint32)
    )
    assert np.isnan(found[~numbers]).all()


@pytest.mark.parametrize("bfloat16", [False, True], ids=["f16", "bf16"])
@pytest.mark.parametrize("n", SIZES)
def test_widening_finds_nonfinite_values_anywhere(table, guarded, n, bfloat16):
    bits = guarded(np.full(n, 0x3C00, np.uint16))
    out = guarded(np.empty(n, np.float32))
    assert _C.kernel_widen(bits, bfloat16, out)
    infinite = 0x7F80 if bfloat16 else 0x7C00
    for position in {0, n // 2, n - 1}:
        for value in (infinite, infinite | 0x8000, infinite | 1):
            broken = bits.copy()
            broken[position] = value
            assert not _C.kernel_widen(guarded(broken), bfloat16, out)
        largest = bits.copy()
        largest[position] = infinite - 1
        assert _C.kernel_widen(guarded(largest), bfloat16, out)


@pytest.mark.parametrize("n", SIZES)
def test_narrowing_equals_numpy_and_stays_finite(table, guarded, n):
    rng = np.random.default_rng(n)
    scale = np.float32(10.0) ** rng.uniform(-9, 6, n).astype(np.float32)
    x = rng.standard_normal(n).astype(np.float32) * scale
    out = guarded(np.zeros(n, np.uint16))
    _C.kernel_narrow(guarded(x), out)
    expected = np.clip(x, -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(out, expected.view(np.uint16))


def test_narrowing_rounds_at_every_boundary(table):
    """Every float16, the middle to the next one (to even), and its neighbours in float32."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    middle = ((halves[:-1].astype(np.float64) + halves[1:]) / 2).astype(np.float32)
    x = np.concatenate([halves.astype(np.float32), middle,
                        np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9)),
                        np.float32([65519, 65520, 1e30, np.inf, np.nan, 1e-40])])
    x = np.concatenate([x, -x])
    out = np.empty(len(x), np.uint16)
    _C.kernel_narrow(x, out)
    got, expected = out.view(np.float16), np.clip(x, -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


def packed_codes(codes, bits):
    """codes [rows, n] in the cache's groups of 8 bytes; what is behind n is random."""
    rows, n = codes.shape
    group = 64 // bits
    padded = np.random.default_rng(n).integers(0, 2**bits, (rows, -(-n // group) * group))
    padded[:, :n] = codes
    if bits == 8:
        return padded.astype(np.uint8)
    halves = padded.reshape(rows, -1, 2, 8)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, -1).astype(np.uint8)


@pytest.mark.parametrize("by_row", [True, False], ids=["row", "column"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", SIZES)
def test_kv_blocks_are_widened_exactly(table, guarded, n, bits, by_row):
    rng = np.random.default_rng(n)
    for rows in (1, 5):
        codes = rng.integers(0, 2**bits, (rows, n))
        halves = rng.uniform(-3, 3, (2, rows if by_row else n)).astype(np.float16)
        s, m = halves.astype(np.float32)
        s = np.abs(s)
        out = guarded(np.empty((rows, n), np.float32))
        _C.kernel_kv(guarded(packed_codes(codes, bits)), guarded(s), guarded(m), bits, by_row,
                     out)
        if by_row:
            s, m = s[:, None], m[:, None]
        np.testing.assert_array_equal(out, s * codes.astype(np.float32) + m)


def test_hooks_refuse_what_they_cannot_write():
    x = np.ones((2, 3), np.float32)
    for out in (np.ones((2, 2)), np.ones((2, 4), np.float32)[:, ::2], [[0.0] * 2] * 2):
        with pytest.raises(TypeError, match="out: expected a writable C-contiguous float32 array"):
            _C.kernel_gemm_f32(x, np.ones((3, 2)), out)
    with pytest.raises(ValueError, match=r"out: expected shape\[1\] = 2, got 3"):
        _C.kernel_gemm_f32(x, np.ones((3, 2)), np.empty((2, 3), np.float32))
    with pytest.raises(ValueError, match="n: expected 1 to 3, got 4"):
        _C.kernel_softmax(np.ones(3, np.float32), 4, 1.0)
    with pytest.raises(TypeError, match="out: expected a writable C-contiguous uint16 array"):
        _C.kernel_narrow(np.ones(3), np.ones(3, np.int16))
    codes, floats = np.zeros((2, 8), np.uint8), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"codes: expected shape\[1\] = 16, got 8"):
        _C.kernel_kv(codes, floats, floats, 8, True, np.empty((2, 9), np.float32))
    with pytest.raises(ValueError, match=r"scales: expected shape\[0\] = 3, got 2"):
        _C.kernel_kv(codes, floats, floats, 8, False, np.empty((2, 3), np.float32))
    with pytest.raises(ValueError, match="bits: expected 8 or 4, got 16"):
        _C.kernel_kv(codes, floats, floats, 16, True, np.empty((2, 3), np.float32))
