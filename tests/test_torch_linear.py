"""torch.nn.Linear on the packed kernels: its outputs, types and state, and what it refuses."""

import copy
import io
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

import singlequant as sq  # noqa: E402
from singlequant import _C, _reference as reference  # noqa: E402
from singlequant.integrations.torch import Linear  # noqa: E402
from singlequant.sweep.layer import quantize_linear  # noqa: E402

EPS = np.finfo(np.float32).eps
SCHEMES = {"w4a4": 4, "w4a8": 8, "w4a16": 16}


def rotation(kind, k, rng):
    """A rotation of k inputs of each form that the core takes."""
    k1, k2 = _C.factor_sizes(k)
    if kind == "none":
        return None
    if kind == "kronecker":
        return sq.SiteRotation(sq.Factor(k1, True, np.empty((0, 2), np.int32), np.empty(0)),
                               sq.Factor(k2, True, [[0, 1]], [0.3])).core
    if kind == "aligned":
        blocks = np.eye(4) + 0.1 * rng.standard_normal((k // 4, 4, 4))
        return _C.Rotation(k, _C.random_orthogonal(k1, 1), _C.random_orthogonal(k2, 2),
                           blocks.astype(np.float32))
    blocks = np.stack([_C.random_orthogonal(8, i) for i in range(k // 8)])
    return _C.Rotation.blocks(blocks, rng.permutation(k).astype(np.int32), blocks)


def module(bits=8, group=0, weight_bits=4, kind="kronecker", n=24, k=96, bias=True, int8=0):
    """A Linear of random weights, and those weights as the codes should stand for them."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((n, k)).astype(np.float32)
    words, scales = _C.quantize_weight(w, group, bits=weight_bits)
    packed = sq.PackedLinear(words, scales, (n, k), group, weight_bits)
    b = rng.standard_normal(n).astype(np.float32) if bias else None
    turn = rotation(kind, k, rng)
    return Linear.of(packed, b, turn, bits, 0.9 if bits < 16 else 1.0, int8), packed, turn, b


def inputs(k=96, dtype=torch.float32):
    return torch.randn(2, 5, k, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("kind", ["none", "kronecker", "aligned", "blocks"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_output_equals_the_twin(scheme, kind):
    bits = SCHEMES[scheme]
    layer, packed, turn, bias = module(bits, kind=kind)
    x = inputs()
    rows = x.reshape(-1, 96).numpy()
    rows = rows if turn is None else _C.rotate(rows, turn)
    expected = reference.packed_linear(rows, packed.words, packed.scales, bits=bits,
                                       clip=0.9 if bits < 16 else 1.0)
    found = layer(x).reshape(-1, 24).numpy()
    if bits < 16:  # integer sums are exact
        np.testing.assert_array_equal(found, expected + bias)
    else:  # |error| <= (2 k + 2) eps sum |x w|, as of the kernel, and the sum with the bias
        w = reference.dequantize(reference.unpack(packed.words, 96), packed.scales)
        magnitude = np.abs(rows) @ np.abs(w).T + np.abs(bias)
        assert (np.abs(found - expected - bias) <= (2 * 96 + 3) * EPS * magnitude).all()


@pytest.mark.parametrize("kind", ["none", "kronecker", "aligned", "blocks"])
@pytest.mark.parametrize(("group", "weight_bits"), [(0, 4), (32, 4), (0, 5), (0, 6), (32, 8)])
def test_weight_is_of_the_unrotated_inputs(kind, group, weight_bits):
    layer, *_, bias = module(16, group, weight_bits, kind)
    x = inputs()
    expected = x @ layer.weight().T + torch.from_numpy(bias)
    torch.testing.assert_close(layer(x), expected, atol=2e-4, rtol=1e-5)


def test_quantized_weight_is_within_half_a_step_of_the_original():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((16, 64)).astype(np.float32)
    k1, k2 = _C.factor_sizes(64)
    none = np.empty((0, 2), np.int32), np.empty(0)
    turn = sq.SiteRotation(sq.Factor(k1, True, *none), sq.Factor(k2, True, *none))
    config = sq.QuantConfig(weights="rtn", bits=4)
    packed = quantize_linear(w, turn, config)
    layer = Linear.of(packed, None, turn.core, 16)
    # A rotated weight is off by half a step at most, a row by sqrt(k) / 2 steps: rotations keep it.
    off = np.linalg.norm(layer.weight().numpy() - w, axis=1)
    assert (off <= packed.scales[:, 0] * np.sqrt(64) / 2 * 1.001).all()
    assert (off >= packed.scales[:, 0] * np.sqrt(64) / 8).all()  # and it was rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_converted(dtype):
    layer = module()[0]
    x = inputs(dtype=dtype)
    found = layer(x)
    assert found.dtype == dtype
    assert torch.equal(found, layer(x.float()).to(dtype))


def test_float32_is_read_in_place_and_left_as_it_is(monkeypatch):
    layer, x = module()[0], inputs()
    seen = []
    linear = _C.linear
    monkeypatch.setattr(_C, "linear", lambda a, *rest: seen.append(a.ctypes.data) or
                        linear(a, *rest))
    before = x.clone()
    y = layer(x)
    assert seen == [x.data_ptr()]
    assert torch.equal(x, before)
    assert torch.equal(layer(x[:, ::2]), y[:, ::2])  # what is not contiguous is copied


def test_tokens_and_shapes():
    layer = module()[0]
    x = inputs()
    with torch.inference_mode():
        whole = layer(x)
    assert whole.shape == (2, 5, 24)
    assert torch.equal(layer(x[0, 0]), whole[0, 0])
    assert layer(x[:, :0]).shape == (2, 0, 24)
    with pytest.raises(ValueError, match="x: expected"):
        layer(inputs(95))


@pytest.mark.parametrize("kind", ["none", "kronecker", "aligned", "blocks"])
@pytest.mark.parametrize("bias", [True, False])
def test_state_comes_back(kind, bias):
    layer = module(4, 32, kind=kind, bias=bias, int8=32)[0]
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    empty = Linear(96, 24, bias).eval()
    empty.load_state_dict(torch.load(file, weights_only=True))
    x = inputs()
    assert torch.equal(empty(x), layer(x))
    assert repr(empty) == repr(layer)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_state_of_a_chain_comes_back():
    k = 521  # a prime above the largest order of a matrix
    turn = sq.SiteRotation(sq.Factor(k, True, [[0, 520], [3, 4]], [0.5, 0.1]),
                           sq.Factor.identity(1)).core
    layer = module(8, kind="none", k=k)[0]
    chained = Linear.of(layer.packed, None, turn)
    empty = Linear(k, 24, bias=False).eval()
    empty.load_state_dict(chained.state_dict())
    assert torch.equal(empty(inputs(k)), chained(inputs(k)))
    assert not torch.equal(empty(inputs(k)), Linear.of(layer.packed, None)(inputs(k)))


def test_a_whole_model_is_saved_with_torch():
    model = torch.nn.Sequential(module()[0], torch.nn.ReLU(), torch.nn.Linear(24, 2)).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.inference_mode():
        assert torch.equal(loaded(inputs()), model(inputs()))


def test_casts_of_a_model_leave_the_weight():
    layer = module()[0]
    x = inputs(dtype=torch.bfloat16)
    expected = layer(x)
    model = torch.nn.Sequential(layer, torch.nn.LayerNorm(24)).half().bfloat16().to("cpu")
    assert model[1].weight.dtype == torch.bfloat16
    assert torch.equal(model[0](x), expected)
    assert layer.state_dict()["weight_scale"].dtype == torch.float32
    with pytest.raises(ValueError, match="expected the CPU, found meta"):
        model.to("meta")


def test_training_is_refused():
    layer = module()[0]
    with pytest.raises(RuntimeError, match="no backward: run the model under"):
        layer(inputs().requires_grad_())
    with torch.no_grad():
        layer(inputs().requires_grad_())
    with pytest.raises(RuntimeError, match=r"found training mode: call eval\(\)"):
        layer.train()(inputs())


def test_what_is_no_float_on_the_cpu_is_refused():
    layer = module()[0]
    with pytest.raises(TypeError, match="found torch.int64 on cpu"):
        layer(torch.ones(1, 96, dtype=torch.int64))
    with pytest.raises(TypeError, match="found torch.float32 on meta"):
        layer(torch.ones(1, 96, device="meta"))
    with pytest.raises(ValueError, match="NaN"):
        layer(torch.full((1, 96), torch.nan))


def test_a_module_without_weight_says_so():
    empty = Linear(96, 24).eval()
    for use in (lambda: empty(inputs()), empty.weight, lambda: empty.packed):
        with pytest.raises(RuntimeError, match="expected a weight, found none"):
            use()
    assert "no weight" in repr(empty)


@pytest.mark.parametrize(("change", "error"), [
    ({"weight_packed": None}, "Missing key.*weight_packed"),
    ({"weight_scale": None, "bias": None}, "Missing key.*weight_scale"),
    ({"bias": None}, r"bias: expected \(24,\), found none"),
    ({"weight_layout": torch.tensor([24, 95, 4, 0])}, "weight_layout: expected"),
    ({"weight_layout": torch.tensor([24, 96, 7, 0])}, "bits: expected one of"),
    ({"weight_packed": torch.zeros(24, 11, dtype=torch.int32)}, "words: expected"),
    ({"weight_scale": torch.full((24, 1), torch.nan)}, "scales: expected finite"),
    ({"activation_layout": torch.tensor([5, 0])}, "activation_layout: expected"),
    ({"activation_layout": torch.tensor([4, 5])}, "int8_inputs: expected"),
    ({"activation_layout": torch.tensor([8, 32])}, "activation_layout: expected 4"),
    ({"activation_clip": torch.tensor([2.0])}, "activation_clip: expected"),
    ({"rotation_left": torch.ones(8, 8)}, "left"),
    ({"rotation_first": torch.ones(12, 8, 8)}, "rotation_permutation: expected it"),
    ({"rotation_left_chain": torch.tensor([8])}, "rotation_left_pairs: expected it"),
])  # fmt: skip
def test_a_state_that_makes_no_linear_is_refused(change, error):
    state = module()[0].state_dict() | change
    state = {key: value for key, value in state.items() if value is not None}
    empty = Linear(96, 24)
    with pytest.raises(RuntimeError, match=error):
        empty.load_state_dict(state)
    assert "no weight" in repr(empty)


def test_keys_that_no_linear_has_are_named():
    state = module()[0].state_dict() | {"more": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="Unexpected key.*more"):
        Linear(96, 24).load_state_dict(state)
    Linear(96, 24).load_state_dict(state, strict=False)


def test_the_package_itself_imports_no_torch():
    code = ("import sys, singlequant as sq; assert 'torch' not in sys.modules; "
            "assert sq.torch.Linear and 'torch' in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
