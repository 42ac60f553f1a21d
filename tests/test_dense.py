"""Dense linears, conversions and RMSNorm against their NumPy twins."""

import ml_dtypes
import numpy as np
import pytest

from singlequant import _C, _reference as reference

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def assert_close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 300, 129), (3, 17, 40), (300, 40, 33), (257, 513, 20)]
)
def test_linear_dense_equals_numpy(rng, dtype, m, n, k):
    x, w = rng.normal(size=(m, k)).astype(np.float32), rng.normal(size=(n, k)).astype(dtype)
    y = _C.linear_dense(x, w)
    assert y.dtype == np.float32
    assert y.shape == (m, n)
    assert_close(y, reference.linear_dense(x, w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_dense_does_not_depend_on_threads(rng, dtype):
    x, w = rng.normal(size=(300, 96)).astype(np.float32), rng.normal(size=(500, 96)).astype(dtype)
    seen = set()
    for threads in (1, 2, 3, 8):
        _C.set_num_threads(threads)
        seen.add(_C.linear_dense(x, w).tobytes())
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_dense_takes_any_layout(rng, dtype):
    w = rng.normal(size=(12, 20)).astype(dtype)
    x = rng.normal(size=(2, 3, 20)).astype(np.float32)
    expected = _C.linear_dense(x.reshape(6, 20), w).reshape(2, 3, 12)
    assert (_C.linear_dense(x, w) == expected).all()
    assert (_C.linear_dense(x, np.asfortranarray(w)) == expected).all()
    read_only = w.copy()
    read_only.flags.writeable = False
    assert (_C.linear_dense(x, read_only) == expected).all()
    raw = np.empty(w.nbytes + 1, np.uint8)  # not aligned
    odd = raw[1:].view(dtype).reshape(w.shape)
    odd[:] = w
    assert not odd.flags.aligned
    assert (_C.linear_dense(x, odd) == expected).all()
    one = _C.linear_dense(x[0, 0], w)
    if dtype == np.float32:  # OpenBLAS sums one row in an order of its own, on some CPUs
        bound = 20 * np.finfo(np.float32).eps * (np.abs(x[0, 0]) @ np.abs(w).T)
        assert (np.abs(one - expected[0, 0]) <= bound).all()
    else:
        assert (one == expected[0, 0]).all()
    assert _C.linear_dense(x[:0], w).shape == (0, 3, 12)
    assert _C.linear_dense(x, w[:0]).shape == (2, 3, 0)


def test_linear_dense_takes_swapped_bytes(rng):
    x, w = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float16)
    assert (_C.linear_dense(x.astype(">f4"), w.astype(">f2")) == _C.linear_dense(x, w)).all()


def test_linear_dense_errors_name_the_argument():
    with pytest.raises(TypeError, match="weight: expected float32, float16 or bfloat16, got"):
        _C.linear_dense(np.zeros((2, 3)), np.zeros((4, 3)))
    with pytest.raises(TypeError, match="weight: expected float32, float16 or bfloat16, got"):
        _C.linear_dense(np.zeros((2, 3)), np.zeros((4, 3), ml_dtypes.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"x: expected shape\[1\] = 3, got 4"):
        _C.linear_dense(np.zeros((2, 4)), np.zeros((4, 3), np.float32))
    with pytest.raises(ValueError, match="weight: expected 2 dimensions, got 1"):
        _C.linear_dense(np.zeros((2, 4)), np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="x: expected at least 1 dimension"):
        _C.linear_dense(np.float32(1), np.zeros((4, 3), np.float32))


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_to_float32_is_exact_for_all_bit_patterns(dtype):
    every = np.arange(65536, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        expected = every.astype(np.float32)
    got = _C.to_float32(every)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[finite].view(np.uint32), expected[finite].view(np.uint32))
    np.testing.assert_array_equal(got[~finite], expected[~finite])


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 40000, 99999])
def test_to_float32_rejects_nonfinite_only_when_asked(dtype, bad, where):
    x = np.ones(100000, dtype)
    assert (_C.to_float32(x, reject=True) == 1).all()
    x[where] = bad
    np.testing.assert_array_equal(_C.to_float32(x)[where], np.float32(bad))
    with pytest.raises(ValueError, match="x: "):
        _C.to_float32(x, reject=True)


def test_to_float32_copies(rng):
    x = rng.normal(size=(3, 4, 5)).astype(np.float32)
    y = _C.to_float32(x)
    assert y.shape == x.shape
    assert not np.shares_memory(x, y)
    assert _C.to_float32(np.float16(2)).shape == ()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_rows_equals_numpy(rng, dtype):
    table = rng.normal(size=(50, 33)).astype(dtype)
    index = rng.integers(0, 50, 2000)
    np.testing.assert_array_equal(_C.gather_rows(table, index), reference.gather_rows(table, index))
    assert _C.gather_rows(table, np.zeros(0, int)).shape == (0, 33)


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_gather_rows_names_the_index(bad):
    with pytest.raises(ValueError, match=rf"index\[2\]: expected 0 to 49, got {bad}"):
        _C.gather_rows(np.zeros((50, 3), np.float32), [0, 49, bad])
    with pytest.raises(TypeError, match="index"):
        _C.gather_rows(np.zeros((50, 3), np.float32), [0.5])


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 64), (100, 129)])
def test_rms_norm_equals_twin(rng, shape):
    x = rng.normal(size=shape).astype(np.float32) * 10
    weight = rng.normal(size=shape[-1]).astype(np.float32)
    assert_close(_C.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), 1e-6)


def test_layer_norm_equals_the_formula(rng):
    x, weight, bias = (rng.normal(size=shape) for shape in ((2, 3, 40), 40, 40))
    x = x * 3 + 100  # a mean far from 0
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    expected = (x - x.mean(axis=-1, keepdims=True)) / deviation * weight
    np.testing.assert_allclose(_C.layer_norm(x, weight, None, 1e-5), expected, atol=2e-5)
    np.testing.assert_allclose(_C.layer_norm(x, weight, bias, 1e-5), expected + bias, atol=2e-5)
    with pytest.raises(ValueError, match=r"bias: expected shape\[0\] = 40, got 39"):
        _C.layer_norm(x, weight, bias[:39], 1e-5)
    with pytest.raises(ValueError, match="layer_norm: eps: expected at least 0, got -1"):
        _C.layer_norm(x, weight, None, -1)


def test_activate_refuses_what_does_not_fit():
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(_C.activate("relu", None, -x), np.zeros((2, 3)))
    np.testing.assert_array_equal(_C.activate("relu", 2 * x, 3 * x), 6 * x)
    with pytest.raises(ValueError, match=r"gate: expected shape\[1\] = 3, got 2"):
        _C.activate("silu", x[:, :2], x)
    with pytest.raises(ValueError, match="activate.gate: expected one"):
        _C.activate("swiglu_clamped", None, x, 7.0)
    with pytest.raises(ValueError, match="activation: expected 'silu'"):
        _C.activate("mish", x, x)


def test_rms_norm_errors():
    with pytest.raises(ValueError, match=r"x: expected shape\[1\] = 4, got 3"):
        _C.rms_norm(np.ones((2, 3)), np.ones(4), 1e-6)
    with pytest.raises(ValueError, match="rms_norm: eps: expected at least 0, got -1"):
        _C.rms_norm(np.ones((2, 3)), np.ones(3), -1)
