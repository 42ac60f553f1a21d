"""Stub of the C core; _reference.py holds the NumPy twin of each array function."""

import os
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Int8 = NDArray[np.int8]
UInt8 = NDArray[np.uint8]
UInt16 = NDArray[np.uint16]
Float16 = NDArray[np.float16]
# Order of application: pairs [steps, 2] int32 and angles [steps] float64.
Chain = tuple[Int32, Float64]

class FormatError(ValueError): ...

# constants of the core
FACTOR_DENSE_MAX: Final[int]  # the largest order of a factor that is kept as a matrix
INT8_STEP: Final[int]  # leading inputs with 8 bits come in multiples of it
PACKED_K_MAX_W8: Final[int]  # inputs of a packed weight of more than 4 bits
DENSE_FEW: Final[int]  # rows up to which a row of linear_dense does not depend on the others
PAGE_TOKENS: Final[int]  # positions of one page of a KVCache

# runtime switches
def kernels() -> dict[str, Any]: ...
def use_kernels(name: str, /) -> None: ...
def set_num_threads(count: int, /) -> None: ...
def get_num_threads() -> int: ...
def cgroup_cpus(root: str, /) -> int: ...
def blas_info() -> str: ...

# A float32 matrix [n, n], or (order, hadamard, pairs [steps, 2], angles [steps]).
Factor = ArrayLike | tuple[int, bool, ArrayLike, ArrayLike]

class Rotation:
    def __init__(
        self,
        k: int,
        left: Factor | None = None,
        right: Factor | None = None,
        align: ArrayLike | None = None,
    ) -> None: ...
    @classmethod
    def blocks(
        cls, first: ArrayLike, permutation: ArrayLike, second: ArrayLike
    ) -> Rotation: ...
    k: Final[int]
    kind: Final[str]  # "kronecker", "aligned" or "blocks"
    sizes: Final[tuple[int, int]]  # (k1, k2) or (k / b, b)
    # (left, right), (left, right, align) or (first, permutation, second), read-only
    parts: Final[tuple[Any, ...]]

# rotate
def factor_sizes(k: int) -> tuple[int, int]: ...
def givens_angle(a: float, b: float) -> float: ...
def hadamard_matrix(n: int) -> Float64: ...
def hadamard_transform(x: ArrayLike) -> Float64: ...
def chain_apply(pairs: ArrayLike, angles: ArrayLike, x: ArrayLike) -> Float64: ...
def art_extremes(v: ArrayLike, threshold: float, max_steps: int) -> Chain: ...
def art_columns(columns: ArrayLike, max_steps: int) -> Chain: ...
def urt(v: ArrayLike, u: ArrayLike) -> Chain: ...
def principal_directions(gram: ArrayLike) -> Float64: ...
def chain_from_matrix(matrix: ArrayLike) -> Chain: ...
def uniformity_sweep(columns: ArrayLike, sweeps: int = 1) -> tuple[Int32, Float64, Float64]: ...
def rotate(x: ArrayLike, rotation: Rotation) -> Float32: ...
def random_orthogonal(n: int, seed: int) -> Float64: ...
def duquant_steps(b: int, count: int, seed: int) -> Float32: ...
def duquant_blocks(sample: ArrayLike, steps: ArrayLike) -> tuple[Float32, Float32]: ...
def zigzag(maxima: ArrayLike, b: int) -> Int32: ...
def align_blocks(
    x_gram: ArrayLike, w_gram: ArrayLike, damping: float, symmetric: bool = False
) -> tuple[Float64, Float64]: ...
def block_energy(gram: ArrayLike, m: ArrayLike) -> Float64: ...
def block_gram(x: ArrayLike, b: int, gram: ArrayLike | None = None) -> Float64: ...
def axis_gram(x: ArrayLike, k1: int, k2: int) -> Float64: ...
def block_peaks(weight: ArrayLike, scale: ArrayLike, block: int) -> Float64: ...
def statistics_update(
    x: ArrayLike, state: tuple[Any, ...] | None = None
) -> tuple[int, Float64, Float64, Float64]: ...
def column_moments(weight: Any) -> tuple[Float64, Float64]: ...
def statistics_merge(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]: ...

# quantize
def quantize(
    x: ArrayLike,
    bits: int = 4,
    group: int = 0,
    symmetric: bool = True,
    clip: float = 1.0,
    search: bool = False,
    bfloat16: bool = False,
) -> tuple[Int8, Float32, Int32 | None]: ...
def dequantize(
    codes: ArrayLike, scales: ArrayLike, zeros: ArrayLike | None = None
) -> Float32: ...
def quantize_weight(
    weight: Any,
    group: int = 0,
    search: bool = False,
    rotation: Rotation | None = None,
    columns: ArrayLike | None = None,
    rows: ArrayLike | None = None,
    bits: int = 4,
    bfloat16: bool = False,
) -> tuple[Int32, Float32]: ...
def transform_weight(
    weight: Any,
    rotation: Rotation | None = None,
    columns: ArrayLike | None = None,
    rows: ArrayLike | None = None,
) -> Float32: ...
def will_need(array: NDArray[Any], /) -> None: ...
def map_states(limit: int, folder: str | os.PathLike[str] | None) -> None: ...
def trim_heap() -> None: ...
def watch_mapping(array: NDArray[Any], message: str) -> None: ...
def exit_when_lost(status: int, /) -> int: ...
def gram(
    x: ArrayLike, out: Float32 | None = None, bits: int = 32, rotation: Rotation | None = None,
    columns: ArrayLike | None = None,
) -> Float32: ...
def gptq_factor(
    gram: ArrayLike, damping: float = 0.01, order: bool = False, overwrite: bool = False
) -> tuple[Float32, Int32]: ...
def gptq_feedback(factor: ArrayLike, /) -> object: ...
def gptq_round(
    weights: ArrayLike,
    factor: ArrayLike,
    permutation: ArrayLike,
    bits: int = 4,
    group: int = 0,
    search: bool = False,
    bfloat16: bool = False,
    feedback: object | None = None,
) -> tuple[Int8, Float32]: ...
def decode_fp8(
    codes: ArrayLike, scales: ArrayLike, block_rows: int, block_columns: int
) -> UInt16: ...
def decode_mxfp4(blocks: ArrayLike, scales: ArrayLike) -> UInt16: ...

# outliers
def outliers(
    x: ArrayLike, codes: ArrayLike, scales: ArrayLike, normal: float
) -> tuple[Float64, Float64, Int64]: ...

# pack
def pack(codes: ArrayLike, bits: int = 4) -> Int32: ...
def unpack(words: ArrayLike, k: int, bits: int = 4) -> Int8: ...

class PackedWeight:
    def __init__(
        self, words: ArrayLike, scales: ArrayLike, k: int, group: int = 0, int8_inputs: int = 0,
        bits: int = 4,
    ) -> None: ...
    shape: Final[tuple[int, int]]
    group: Final[int]
    int8_inputs: Final[int]
    bits: Final[int]
    kernels: Final[str]
    nbytes: Final[int]

def linear(
    x: ArrayLike,
    weight: PackedWeight,
    bits: int = 4,
    clip: float = 1.0,
    rotation: Rotation | None = None,
    bias: ArrayLike | None = None,
) -> Float32: ...

class Activations:
    def __init__(
        self, x: ArrayLike, bits: int = 4, clip: float = 1.0, rotation: Rotation | None = None,
        int8_inputs: int = 0,
    ) -> None: ...
    shape: Final[tuple[int, ...]]
    bits: Final[int]
    def linear(self, weight: PackedWeight, bias: ArrayLike | None = None) -> Float32: ...

# runtime
def linear_dense(x: ArrayLike, weight: Any) -> Float32: ...
def to_float32(x: Any, reject: bool = False) -> Float32: ...
def gather_rows(table: Any, index: ArrayLike) -> Float32: ...
def quantize_rows(table: Any, bits: int) -> tuple[UInt8, UInt16]: ...
def linear_rows(
    x: ArrayLike, codes: ArrayLike, scales: ArrayLike, bits: int, activation_bits: int = 16
) -> Float32: ...
def gather_codes(
    codes: ArrayLike, scales: ArrayLike, bits: int, width: int, index: ArrayLike
) -> Float32: ...
def rms_norm(x: ArrayLike, weight: ArrayLike, eps: float) -> Float32: ...
def activate(
    activation: str, gate: ArrayLike | None, up: ArrayLike, limit: float = 0.0
) -> Float32: ...
def layer_norm(
    x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None, eps: float
) -> Float32: ...

def kv_quantize(
    x: ArrayLike, bits: int = 4
) -> tuple[UInt8, Float16, Float16]: ...

class KVCache:
    def __init__(
        self,
        layers: int,
        sequences: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        bits: int = 32,
        hadamard: bool = True,
        limit: int = 0,
        bfloat16: bool = False,
    ) -> None: ...
    layers: Final[int]
    sequences: Final[int]
    kv_heads: Final[int]
    head_dim: Final[int]
    capacity: Final[int]
    limit: Final[int]
    bits: Final[int]
    hadamard: Final[bool]
    bfloat16: Final[bool]
    largest: Final[float]
    clamped: Final[int]
    nbytes: Final[int]
    page_bytes: Final[int]
    page_tokens: Final[int]
    def reserve(self, sequence: ArrayLike, position: ArrayLike) -> None: ...
    def release(self, sequence: int, /) -> None: ...
    def forget(self, layer: int, sequence: int, position: int) -> None: ...
    def read(self, layer: int, sequence: int, count: int) -> tuple[Float32, Float32]: ...

# k, rotation (see linear()), bits, clip
Site = tuple[int, tuple[Any, ...] | None, int, float]
# site, weight (PackedWeight or an array [n, k]), bias
LayerLinear = tuple[str, Any, ArrayLike | None]
# kind ("rms" or "layer"), eps, offset, weight, bias
LayerNorm = tuple[str, float, float, ArrayLike, ArrayLike | None]

class DecoderLayer:
    def __init__(
        self,
        hidden: int,
        sites: dict[str, Site],
        attention: dict[str, Any],
        mlp: dict[str, Any] | None,
        norms: dict[str, LayerNorm],
        parallel: bool = False,
        residual_scale: float = 1.0,
        experts: dict[str, Any] | None = None,
        norm_sums: bool = False,
    ) -> None: ...
    def forward(
        self,
        hidden: Float32,
        sequence: ArrayLike,
        position: ArrayLike,
        cache: KVCache,
        layer: int,
        record: bool = False,
    ) -> dict[str, Float32] | None: ...

class Decoder:
    def __init__(self, layers: Iterable[DecoderLayer]) -> None: ...
    def forward(
        self, hidden: Float32, sequence: ArrayLike, position: ArrayLike, cache: KVCache
    ) -> None: ...

def sample(
    logits: ArrayLike, temperature: float, top_k: int, top_p: float, uniform: float
) -> int: ...
def sample_rows(
    logits: ArrayLike, temperature: float, top_k: int, top_p: float, uniform: ArrayLike
) -> Int64: ...
def negative_log_likelihood(logits: ArrayLike, target: ArrayLike) -> Float64: ...
def kl_divergence(p: ArrayLike, q: ArrayLike) -> tuple[Float64, NDArray[np.bool_]]: ...

# benchmarks
def peak_steps() -> list[str]: ...
def measure_peak(step: str, seconds: float = 0.05) -> float: ...
def read_loop(data: ArrayLike | PackedWeight, prefetch: int = 0, streams: int = 1) -> int: ...
def measure_linear(
    x: ArrayLike,
    weight: PackedWeight,
    bits: int = 4,
    clip: float = 1.0,
    rotation: Rotation | None = None,
    bias: ArrayLike | None = None,
) -> tuple[float, float]: ...

# kernels of the active table, outputs written in place (test hooks)
def kernel_gemm_f32(a: ArrayLike, b: ArrayLike, out: Float32, /) -> None: ...
def kernel_rms_norm(x: ArrayLike, weight: ArrayLike, eps: float, out: Float32, /) -> None: ...
def kernel_silu_mul(gate: ArrayLike, up: ArrayLike, out: Float32, /) -> None: ...
def kernel_softmax(x: Float32, n: int, scale: float, /) -> None: ...
def kernel_widen(x: ArrayLike, bfloat16: bool, out: Float32, /) -> bool: ...
def kernel_fixed_errors(u: ArrayLike, index: int, /) -> tuple[list[int], int]: ...
def kernel_narrow(x: ArrayLike, out: NDArray[np.uint16], /) -> None: ...
def kernel_kv(
    codes: ArrayLike,
    scales: ArrayLike,
    minima: ArrayLike,
    bits: int,
    by_row: bool,
    out: Float32,
    /,
) -> None: ...
