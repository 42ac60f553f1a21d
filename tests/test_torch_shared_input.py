"""Linears that read one tensor rotate and quantize it once, and never take what it was before."""

import copy
import gc
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

import singlequant as sq  # noqa: E402
from singlequant import _C  # noqa: E402
from singlequant.integrations import shared_input  # noqa: E402
from singlequant.integrations.torch import Linear, load_, quantize_  # noqa: E402

K = 96


class Attention(torch.nn.Module):
    """Three linears of one input, and one of another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(K, n) for n in (K, 32, 32))
        self.o = torch.nn.Linear(K, K)

    def forward(self, x, between=lambda x: None):
        parts = []
        for linear in (self.q, self.k, self.v):
            parts.append(linear(x))
            between(x)
        return torch.cat([*parts, self.o(parts[0])], -1)


@pytest.fixture(params=["w4a4", "w4a8", "w4a16"])
def model(request):
    torch.manual_seed(0)
    made = Attention()
    quantize_(made, [torch.randn(64, K)],
              sq.QuantConfig(scheme=request.param, method="singlequant", bits=4))
    return made


@pytest.fixture
def made(monkeypatch):
    """How many activations were prepared, as a list that grows."""
    count, kind = [], shared_input._Prepared
    monkeypatch.setattr(shared_input, "_Prepared",
                        lambda *arguments: count.append(1) or kind(*arguments))
    return count


def alone(model, x):
    """What each linear gives by itself."""
    parts = [_C.linear(x.numpy(), m._panels, m._bits, m._clip, m._turn.core, m._arrays["bias"])
             for m in (model.q, model.k, model.v)]
    last = model.o
    parts.append(_C.linear(parts[0], last._panels, last._bits, last._clip, last._turn.core,
                           last._arrays["bias"]))
    return np.concatenate(parts, -1)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("shape", [(5, K), (2, 3, K), (K,), (0, K)])
def test_outputs_are_those_of_each_linear_alone(mode, shape, model, made):
    with mode():
        x = torch.randn(shape)
        assert np.array_equal(model(x).numpy(), alone(model, x))
    assert len(made) == 1  # of q, k and v; the one that shares with nobody prepares nothing here


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_tensor_that_changes_between_two_linears_is_read_again(mode, model, made):
    with mode():
        x = torch.randn(7, K)
        first, begin = model(x), x.clone()
        changed = model(x, between=lambda x: x.mul_(2.0))
        assert torch.equal(changed[:, :K], first[:, :K])
        for linear, factor, part in ((model.k, 2, slice(K, K + 32)),
                                     (model.v, 4, slice(K + 32, K + 64))):
            assert torch.equal(changed[:, part], linear(begin * factor))
    assert len(made) >= 4


def test_another_tensor_in_the_same_memory_is_read(model):
    memory = np.zeros((4, K), np.float32)
    with torch.inference_mode():
        for value in (1.0, 2.0, 3.0):
            memory[:] = value
            x = torch.from_numpy(memory)
            assert np.array_equal(model(x).numpy(), alone(model, x))


def test_codes_go_with_their_tensor(model):
    with torch.inference_mode():
        x = torch.randn(3, K)
        model(x)
        prepared = weakref.ref(shared_input._last.prepared)
        assert prepared().activations is not None
        del x
        assert prepared().activations is None
        model(torch.randn(3, K))
    assert prepared() is None  # without the garbage collector


def test_other_quantizers_of_the_same_tensor_are_their_own(model):
    other = Linear.of(model.k.packed, None, model.k._turn.core, model.k._bits, 0.5)
    assert other._turn is model.k._turn
    with torch.inference_mode():
        x = torch.randn(3, K)
        model(x)
        expected = _C.linear(x.numpy(), other._panels, other._bits, 0.5, other._turn.core)
        assert np.array_equal(other(x).numpy(), expected)


def test_copies_and_loaded_states_share_as_well(model, made):
    torch.manual_seed(0)
    loaded = Attention()
    load_(loaded, model.state_dict())
    with torch.inference_mode():
        x = torch.randn(4, K)
        expected = model(x)
        for other in (loaded, copy.deepcopy(model)):
            made.clear()
            assert torch.equal(other(x.clone()), expected)
            assert len(made) == 2  # of q, k and v, and of o, which has a twin now


def test_a_rotation_goes_with_its_last_linear(model):
    turn = weakref.ref(model.q._turn)
    assert len(turn().users) == 3
    shared_input._last.prepared = None
    model.q = model.k = model.v = None
    gc.collect()
    assert turn() is None


def test_errors_are_those_of_one_linear(model):
    with torch.inference_mode():
        for bad, message in ((torch.full((1, K), torch.nan), "NaN"),
                             (torch.zeros(2, K - 1), "expected")):
            for _ in range(2):
                with pytest.raises(ValueError, match=message):
                    model.q(bad)
