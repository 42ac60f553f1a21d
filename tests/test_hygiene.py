# SPDX-License-Identifier: Apache-2.0
"""What every array function of the core owes its caller: inputs stay as they are, any layout is
accepted, nothing leaks after success or failure, the GIL is free, no symbol escapes."""

import contextlib
import ctypes
import gc
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from blocks import geometry, llama, shapes

from singlequant import _C

RNG = np.random.default_rng(0)
EYE = np.eye(4, dtype=np.float32)


def f32(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def f64(*shape):
    return RNG.standard_normal(shape)


CODES = RNG.integers(-8, 8, (6, 40)).astype(np.int8)
WORDS = _C.pack(CODES)
PAIRS = np.array([[0, 3], [2, 1], [1, 3]], np.int32)
CHAIN = (4, True, PAIRS, f64(3))
STATE = _C.statistics_update(f32(5, 12))
TURN = _C.Rotation(16, EYE, CHAIN)
GEOMETRY = geometry(16, 24, 2, 2, 8, rotary={"inv_freq": f32(4)})
LAYER = llama(GEOMETRY, {role: (f32(n, k), f32(n)) for role, (n, k) in shapes(GEOMETRY).items()},
              (f32(16), f32(16)),
              {"qkv": (TURN, 4, 1.0),
               "gate_up": (_C.Rotation(16, CHAIN, EYE), 4, 1.0),
               "down": (_C.Rotation(24, np.eye(6)), 4, 1.0)})
LAYER["attention"]["k_norm"] = ("layer", 1e-5, 1.0, f32(8), f32(8))

# Function -> positional arguments; arrays may stand inside tuples and dicts.
CALLS = {
    "hadamard_transform": (f64(3, 12),),
    "chain_apply": (PAIRS, f64(3), f64(5, 4)),
    "art_extremes": (f64(20), 1.5, 30),
    "art_columns": (f64(7, 9), 12),
    "urt": (f64(9), f64(9)),
    "uniformity_sweep": (f64(6, 11), 2),
    "Rotation": (16, EYE, CHAIN),
    "rotate": (f32(3, 16), TURN),
    "chain_from_matrix": (_C.random_orthogonal(5, 1),),
    "principal_directions": (np.cov(f64(6, 30)),),
    "align_blocks": (np.cov(f64(6, 30))[None], np.cov(f64(6, 30))[None], 0.1, True),
    "block_energy": (f64(3, 4, 4), f64(3, 4, 4)),
    "block_gram": (f32(5, 12), 4, f64(3, 4, 4)),
    "column_moments": (f32(9, 70).astype(np.float16),),
    "block_peaks": (f32(9, 64), f32(64), 32),
    "duquant_blocks": (f32(5, 12), _C.duquant_steps(4, 3, 0)),
    "zigzag": (f64(12), 4),
    "axis_gram": (f32(5, 12), 3, 4),
    "statistics_update": (f32(5, 12), STATE),
    "statistics_merge": (STATE, STATE),
    "quantize": (f32(3, 64), 4, 32, False, 1.0, True),
    "dequantize": (CODES, f32(6, 2), RNG.integers(0, 15, (6, 2)).astype(np.int32)),
    "quantize_weight": (f32(5, 16).astype(np.float16), 8, True, TURN, f32(16), f32(5)),
    "transform_weight": (f32(5, 16), TURN, f32(16), f32(5)),
    "gram": (f32(9, 5),),
    "gptq_factor": (np.cov(f32(5, 40)).astype(np.float32), 0.1, True),
    "gptq_feedback": (np.eye(300, dtype=np.float32) + np.tril(f32(300, 300) / 20, -1),),
    "gptq_round": (f32(3, 6), np.eye(6, dtype=np.float32) + np.tril(f32(6, 6), -1),
                   np.arange(6, dtype=np.int32)[::-1].copy(), 4, 3, True),
    "decode_fp8": (RNG.integers(0, 256, (2, 5, 70)).astype(np.uint8), f32(2, 2, 3), 3, 32),
    "decode_mxfp4": (RNG.integers(0, 256, (2, 5, 3, 16)).astype(np.uint8),
                     RNG.integers(0, 256, (2, 5, 3)).astype(np.uint8)),
    "pack": (CODES,),
    "unpack": (WORDS, 40),
    "PackedWeight": (WORDS, f32(6, 1), 40, 0, 32),
    "linear": (f32(3, 40), _C.PackedWeight(WORDS, f32(6, 1), 40), 4, 0.9, None, f32(6)),
    "Activations": (f32(3, 40), 4, 0.9, None, 32),
    "linear_dense": (f32(3, 40), f32(6, 40).astype(np.float16)),
    "to_float32": (f32(3, 40).astype(np.float16), True),
    "gather_rows": (f32(9, 5).astype(np.float16), np.array([3, 0, 8])),
    "quantize_rows": (f32(6, 40).astype(np.float16), 4),
    "linear_rows": (f32(3, 40), *_C.quantize_rows(f32(6, 40), 8), 8),
    "gather_codes": (*_C.quantize_rows(f32(9, 40), 4), 4, 40, np.array([3, 0, 8])),
    "rms_norm": (f32(3, 40), f32(40), 1e-5),
    "activate": ("gelu", f32(3, 40), f32(3, 40)),
    "layer_norm": (f32(3, 40), f32(40), f32(40), 1e-5),
    "sample": (f32(50), 0.7, 10, 0.9, 0.4),
    "sample_rows": (f32(3, 50), 0.7, 10, 0.9, RNG.random(3)),
    "negative_log_likelihood": (f32(3, 50), np.array([0, 49, 7])),
    "kl_divergence": (f32(3, 50), f32(3, 50)),
    "outliers": (f32(6, 40), CODES, f32(6), 2.0),
    "read_loop": (np.arange(203, dtype=np.uint8), 64, 3),
    "kernel_gemm_f32": (f32(3, 5), f32(5, 4), f32(3, 4)),
    "kernel_rms_norm": (f32(9), f32(9), 1e-5, f32(9)),
    "kernel_silu_mul": (f32(9), f32(9), f32(9)),
    "kernel_softmax": (f32(9), 5, 0.5),
    "kernel_widen": (np.arange(9, dtype=np.uint16), True, f32(9)),
    "kernel_fixed_errors": (np.arange(-9, 9, dtype=np.int16), 7),
    "kernel_narrow": (f32(9), np.zeros(9, np.uint16)),
    "kernel_kv": (RNG.integers(0, 256, (3, 16)).astype(np.uint8), np.arange(20, dtype=np.uint16),
                  np.arange(20, dtype=np.uint16), 4, False, f32(3, 20)),
    "kv_quantize": (f32(3, 40), 4),
    "DecoderLayer": tuple(LAYER.values()),
}
# Position of the argument that is the output.
OUTPUT = {"kernel_gemm_f32": 2, "kernel_rms_norm": 3, "kernel_silu_mul": 2, "kernel_softmax": 0,
          "kernel_widen": 2, "kernel_narrow": 1, "kernel_kv": 5}
# Arguments whose dtype says what the bits are, so that a list (float64, int64) will not do.
TYPED = {"column_moments": {0}, "dequantize": {0}, "unpack": {0}, "PackedWeight": {0},
         "linear_dense": {1}, "to_float32": {0}, "gather_rows": {0}, "kernel_widen": {0},
         "kernel_kv": {0, 1, 2}, "DecoderLayer": {2, 3}, "quantize_weight": {0},
         "transform_weight": {0}, "read_loop": {0}, "decode_fp8": {0}, "decode_mxfp4": {0, 1},
         "quantize_rows": {0}, "linear_rows": {1, 2}, "gather_codes": {0, 1}}
NO_ARRAYS = {"kernels", "use_kernels", "set_num_threads", "get_num_threads", "cgroup_cpus",
             "blas_info",
             "factor_sizes", "givens_angle", "hadamard_matrix", "random_orthogonal",
             "duquant_steps", "KVCache", "Decoder", "FormatError", "will_need", "peak_steps",
             "measure_peak", "watch_mapping", "exit_when_lost", "map_states", "trim_heap"}
CONSTANTS = {"FACTOR_DENSE_MAX", "INT8_STEP", "DENSE_FEW", "PACKED_K_MAX_W8", "PAGE_TOKENS"}
# Functions whose results are times, which no two calls share; tests/test_bench.py has their tests.
TIMES = {"measure_linear"}

LAYOUTS = {
    "list": lambda a: a.tolist(),
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "reversed": lambda a: a[..., ::-1].copy()[..., ::-1],
    "fortran": np.asfortranarray,
    "swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "unaligned": lambda a: np.frombuffer(b"\0" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "readonly": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = _C.get_num_threads()
    _C.set_num_threads(1)
    yield
    _C.set_num_threads(before)


def change(value, how):
    """value with how() applied to every array in it."""
    if isinstance(value, np.ndarray):
        return how(value)
    if isinstance(value, tuple):
        return tuple(change(v, how) for v in value)
    if isinstance(value, dict):
        return {k: change(v, how) for k, v in value.items()}
    return value


def arrays_in(value):
    found = []
    change(value, found.append)
    return found


def fresh(name, how=np.copy):
    """New arguments: inputs through how(), the output copied."""
    return [
        change(v, np.copy if i == OUTPUT.get(name) else how) for i, v in enumerate(CALLS[name])
    ]


def outcome(name, arguments):
    """Every byte that a call produces."""
    result = getattr(_C, name)(*arguments)
    if name == "gptq_feedback":
        weights, order = np.arange(600, dtype=np.float32).reshape(2, 300) % 17, np.arange(300)[::-1]
        result = _C.gptq_round(weights, CALLS[name][0], order, feedback=result)
    if name == "PackedWeight":
        result = _C.linear(CALLS["linear"][0], result)
    if name == "Activations":
        result = result.linear(_C.PackedWeight(WORDS, np.ones((6, 1), np.float32), 40, 0, 32))
    if name == "Rotation":
        result = _C.rotate(CALLS["rotate"][0], result)
    if name == "DecoderLayer":
        hidden = np.ones((2, 16), np.float32)
        result.forward(hidden, [0, 0], [0, 1], _C.KVCache(1, 1, 2, 8, 4), 0)
        result = hidden
    values = result if isinstance(result, tuple) else (result,)
    if name in OUTPUT:
        values = (*values, arguments[OUTPUT[name]])
    return [np.asarray(v).tobytes() for v in values]


def test_table_holds_every_array_function():
    public = {name for name in dir(_C) if not name.startswith("_")}
    assert set(CALLS) | NO_ARRAYS | TIMES | CONSTANTS == public
    assert not set(CALLS) & NO_ARRAYS


@pytest.mark.parametrize("name", CALLS)
def test_inputs_are_untouched(name):
    arguments = fresh(name)
    inputs = [a for i, v in enumerate(arguments) if i != OUTPUT.get(name) for a in arrays_in(v)]
    before = [a.tobytes() for a in inputs]
    outcome(name, arguments)
    assert [a.tobytes() for a in inputs] == before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_any_layout_gives_the_same_bytes(name, layout):
    arguments = fresh(name, LAYOUTS[layout])
    if layout == "list":
        for i in TYPED.get(name, ()):
            arguments[i] = CALLS[name][i]
    assert outcome(name, arguments) == outcome(name, fresh(name))


# ---- leaks --------------------------------------------------------------------------------------

ROUNDS = 200
LIBC = ctypes.CDLL(None)


def heap_bytes():
    """What malloc has handed out and not got back, to the byte."""
    if not hasattr(LIBC, "mallinfo2"):
        pytest.skip("needs glibc 2.33")
    info = type("mallinfo2", (ctypes.Structure,), {"_fields_": [("sizes", ctypes.c_size_t * 10)]})
    LIBC.mallinfo2.restype = info
    sizes = LIBC.mallinfo2().sizes
    return sizes[7] + sizes[4]  # uordblks, in the heap, and hblkhd, mapped


def leaks(call):
    """Whether call keeps memory. A leak shows each time, a cache that fills up does not."""
    for _ in range(20):
        call()
    return all(growth(call) >= 8 for _ in range(3))


def growth(call):
    """Bytes per round that call keeps, of the C heap or of Python's objects and arrays."""
    gc.collect()
    heap = heap_bytes()
    for _ in range(ROUNDS):
        call()
    gc.collect()
    heap = heap_bytes() - heap
    tracemalloc.start()
    try:
        call()
        gc.collect()
        traced = tracemalloc.get_traced_memory()[0]
        for _ in range(ROUNDS):
            call()
        gc.collect()
        traced = tracemalloc.get_traced_memory()[0] - traced
    finally:
        tracemalloc.stop()
    return max(heap, traced) / ROUNDS


def broken_arguments(name):
    """The call's arguments with one array at a time of a wrong kind, size or value."""
    wrong = [
        lambda a: a.astype(complex),
        lambda a: a[None, None],
        lambda a: np.concatenate([a, a], axis=-1)[..., : a.shape[-1] + 1],
        lambda a: np.full_like(a, np.nan if a.dtype.kind == "f" else np.iinfo(a.dtype).max),
    ]
    n = len(arrays_in(tuple(CALLS[name])))
    for how in wrong:
        for target in range(n):
            count = iter(range(n))
            yield list(change(
                tuple(CALLS[name]), lambda a, c=count, t=target, h=how: h(a) if next(c) == t else a
            ))


@pytest.mark.parametrize("leak", [
    lambda kept: kept.append(np.empty(20)),
    lambda kept: kept.append(object()),
    lambda kept: LIBC.malloc(200),
], ids=["array", "object", "malloc"])
def test_leaks_are_seen(leak):
    kept = []
    if heap_bytes() == 0:
        pytest.skip("another malloc, a sanitizer's, is in front")
    assert leaks(lambda: leak(kept))


@pytest.mark.parametrize("name", CALLS)
def test_good_calls_leak_nothing(name):
    arguments = fresh(name)
    held = [a for a in arrays_in(tuple(arguments))]
    references = [sys.getrefcount(a) for a in held]
    assert not leaks(lambda: getattr(_C, name)(*arguments))
    assert [sys.getrefcount(a) for a in held] == references


@pytest.mark.parametrize("name", CALLS)
def test_failing_calls_leak_nothing(name):
    function = getattr(_C, name)
    failing = []
    for arguments in broken_arguments(name):
        try:
            function(*arguments)
        except (TypeError, ValueError):
            failing.append(arguments)
    assert failing, "every function refuses something"
    held = [a for arguments in failing for a in arrays_in(tuple(arguments))]
    references = [sys.getrefcount(a) for a in held]

    def call():
        for arguments in failing[:: max(1, len(failing) // 12)]:
            with contextlib.suppress(TypeError, ValueError):
                function(*arguments)

    assert not leaks(call)
    assert [sys.getrefcount(a) for a in held] == references


# ---- the GIL ------------------------------------------------------------------------------------

BIG = f32(1024, 2048)
TALL = np.tile(BIG, (8, 1))
SQUARE, ORTHOGONAL = f64(100, 100), _C.random_orthogonal(256, 0)
LONG_CHAIN = (2048, False, np.tile([[0, 1]], (20_000, 1)).astype(np.int32), f64(20_000))
LONG_TURN, FLAT_TURN = _C.Rotation(2048, LONG_CHAIN), _C.Rotation(2048, np.eye(32), np.eye(64))
BIG_WORDS = RNG.integers(-(2**31), 2**31, (2048, 256)).astype(np.int32)
BIG_WEIGHT = _C.PackedWeight(BIG_WORDS, np.ones((2048, 1), np.float32), 2048)
LONG_CALLS = {
    "quantize": lambda: _C.quantize(TALL, 4, 0, True, 1.0, True),
    "linear": lambda: _C.linear(BIG, BIG_WEIGHT, 16),
    "linear_dense": lambda: _C.linear_dense(BIG, BIG),
    "quantize_rows": lambda: _C.quantize_rows(BIG, 4),
    "rotate": lambda: _C.rotate(BIG, LONG_TURN),
    "axis_gram": lambda: _C.axis_gram(BIG, 64, 32),
    "align_blocks": lambda: _C.align_blocks([SQUARE @ SQUARE.T], [SQUARE @ SQUARE.T], 0.1),
    "block_energy": lambda: _C.block_energy([SQUARE] * 40, [SQUARE] * 40),
    "block_gram": lambda: _C.block_gram(BIG, 512),
    "kl_divergence": lambda: _C.kl_divergence(BIG, -BIG),
    "principal_directions": lambda: _C.principal_directions(SQUARE @ SQUARE.T),
    "chain_from_matrix": lambda: _C.chain_from_matrix(ORTHOGONAL),
    "column_moments": lambda: _C.column_moments(TALL),
    "block_peaks": lambda: _C.block_peaks(TALL, TALL[0], 32),
    "quantize_weight": lambda: _C.quantize_weight(BIG, 0, True, FLAT_TURN),
}


@pytest.mark.parametrize("name", LONG_CALLS)
def test_long_calls_release_the_gil(name):
    """A Python thread runs on in the middle third of the call: NumPy may drop the lock at the
    begin, where arguments are converted."""
    call, stop, ticks = LONG_CALLS[name], threading.Event(), []

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for _ in range(200):
            begin = time.perf_counter()
            call()
            end = time.perf_counter()
            margin = (end - begin) / 3
            if any(begin + margin < t < end - margin for t in ticks):
                return
    finally:
        stop.set()
        thread.join()
    pytest.fail(f"no tick inside {name}, which took {end - begin:.4f} s")


# ---- symbols ------------------------------------------------------------------------------------

needs_nm = pytest.mark.skipif(not shutil.which("nm"), reason="nm is not installed")


def symbols(path, *options):
    run = subprocess.run(["nm", *options, path], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in run.stdout.splitlines()}
    return {n for n in names if not n.startswith(("__asan", "__ubsan", "__odr_asan"))}


@needs_nm
def test_extension_exports_its_init_function_alone():
    assert symbols(_C.__file__, "-D", "--defined-only") - {"_init", "_fini"} == {"PyInit__C"}


@needs_nm
def test_core_symbols_have_the_prefix():
    objects = [p for p in (Path(_C.__file__).parents[1] / "build").glob("**/csrc/**/*.o")]
    if not objects:
        pytest.skip("no objects under build/")
    for path in objects:
        for name in symbols(path, "-g", "--defined-only"):
            own = name.startswith("sq_") or name == "PyInit__C"
            assert own or name.startswith("singlequant_ARRAY_API"), path  # NumPy's table
