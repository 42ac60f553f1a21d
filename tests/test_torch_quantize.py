"""quantize_: models in memory stay close to what they were, and the report says what happened."""

import copy
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")
transformers = pytest.importorskip("transformers", reason="needs the torch extra")

import torch_models as models  # noqa: E402

import singlequant as sq  # noqa: E402
from singlequant.integrations import inputs as recorded  # noqa: E402
from singlequant.integrations.torch import Linear, load_, quantize_  # noqa: E402
from singlequant.methods.registry import METHODS  # noqa: E402

SCHEMES = {"w4a4": 4, "w4a8": 8, "w4a16": 16}
RTN = sq.QuantConfig(method="hadamard", weights="rtn", bits=4)


def rounding(bits, k):
    """Squared relative error of rounding k Gaussian numbers to nearest on one scale.

    The largest of k magnitudes is sqrt(2 ln 2k) sigma in the mean at most, and stands at code
    2^(bits-1) - 1. Errors are uniform within a step: its square over 12.
    """
    return 2 * np.log(2 * k) / (2 ** (bits - 1) - 1) ** 2 / 12 if bits < 16 else 0.0


def bound(name, scheme, layers=3, k=192):
    """Relative error of a model's output: roundings are independent, so that their squared
    relative errors add up, and a block hands a relative error on as a relative error."""
    each = rounding(4, k) + rounding(SCHEMES[scheme], k)
    return np.sqrt(layers * models.ROUNDINGS[name] * each)


@pytest.mark.parametrize("name", models.MAKERS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("method", "weights"), [
    ("hadamard", "rtn"), ("singlequant", "mse"), ("balanced", "gptq")])
def test_outputs_are_close_to_the_original(name, scheme, method, weights):
    model = models.make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (batch,) = models.batches(name, 1, seed=1)
    expected = models.output(model, batch)
    config = sq.QuantConfig(scheme=scheme, method=method, weights=weights, bits=4)
    report = quantize_(model, models.batches(name, 4), config)
    assert not any(isinstance(m, torch.nn.Linear) for n, m in model.named_modules()
                   if n != "lm_head")
    assert len(report.linears) == sum(isinstance(m, Linear) for m in model.modules())
    error = models.relative_error(models.output(model, batch), expected)
    assert error < bound(name, scheme)
    assert error > bound(name, scheme) / 10  # it was rounded
    for key, value in model.state_dict().items():  # what is no linear stays
        if key in before:
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", models.MAKERS)
def test_gptq_is_closer_than_rtn_and_more_bits_are_closer(name):
    original = models.make(name)
    (batch,) = models.batches(name, 1, seed=1)
    expected = models.output(original, batch)
    errors = {}
    for weights, bits in (("rtn", 4), ("gptq", 4), ("gptq", 4.75), ("gptq", 8)):
        model = copy.deepcopy(original)
        config = sq.QuantConfig(method="hadamard", weights=weights, bits=bits)
        report = quantize_(model, models.batches(name, 8), config)
        assert bits - 0.2 < report.bits <= bits
        errors[weights, bits] = models.relative_error(models.output(model, batch), expected)
    values = list(errors.values())
    assert values == sorted(values, reverse=True)
    assert errors["gptq", 8] < errors["gptq", 4] / 5


def test_linears_that_read_one_tensor_are_one_site():
    model = models.make("bert")
    batches = models.batches("bert", 2)
    found, left = sq.integrations.in_place.find_linears(model, RTN, ())
    sites = recorded.find_sites(model, batches, found)
    shared = [tuple(linear.name.rpartition(".")[2] for linear in site.linears) for site in sites]
    assert shared.count(("query", "key", "value")) == 3
    assert {site for site in shared if len(site) > 1} == {("query", "key", "value")}
    assert not left
    assert {site.rows for site in sites} == {2 * 4 * 32, 2 * 4}  # the pooler reads one token


def test_recorded_inputs_are_evenly_spaced_rows():
    model = torch.nn.Sequential(torch.nn.Linear(5, 3))
    batches = [torch.arange(5 * count).float().reshape(count, 5) + 1000 * i
               for i, count in enumerate((3, 7, 2))]
    (linear,), _ = sq.integrations.in_place.find_linears(model, RTN, ())
    (site,) = recorded.find_sites(model, batches, [linear])
    whole = torch.cat(batches).numpy()
    for limit, step in ((12, 1), (11, 2), (6, 2), (5, 3), (1, 12)):
        (found,) = recorded.record_inputs(model, batches, [site], limit)
        np.testing.assert_array_equal(found, whole[::step])


def test_passes_of_few_bytes_give_the_same(monkeypatch):
    results, counts = [], []
    run = recorded.run
    for size in (1 << 30, 4 * 96 * 200):
        monkeypatch.setattr(recorded, "PASS_BYTES", size)
        calls = []
        monkeypatch.setattr(recorded, "run", lambda *a, calls=calls: calls.append(1) or run(*a))
        model = models.make("vit")
        quantize_(model, models.batches("vit", 2), sq.QuantConfig(bits=4))
        results.append(models.output(model, models.batches("vit", 1, seed=1)[0]))
        counts.append(len(calls))
    assert torch.equal(*results)
    assert counts[0] == 2 < counts[1]


@pytest.mark.parametrize("form", [dict, tuple, list, torch.Tensor])
def test_batches_of_each_form(form):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = torch.nn.Linear(32, 48), torch.nn.Linear(48, 8, bias=False)

        def forward(self, x):
            return self.second(input=torch.relu(self.first(x)))

    model, x = Net().eval(), torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(x)
    batch = {dict: {"x": x}, tuple: (x,), list: [x], torch.Tensor: x}[form]
    report = quantize_(model, iter([batch]), sq.QuantConfig(bits=8))
    assert [linear.name for linear in report.linears] == ["first", "second"]
    assert [linear.shape for linear in report.linears] == [(48, 32), (8, 48)]
    with torch.inference_mode():
        assert models.relative_error(model(x), expected) < np.sqrt(4 * rounding(8, 48))


def test_without_calibration_methods_that_do_not_look():
    (batch,) = models.batches("bert", 1, seed=1)
    for row in METHODS.values():
        model = models.make("bert")
        expected = models.output(model, batch)
        config = sq.QuantConfig(method=row.name, weights="mse", bits=4.5)
        if row.looks or row.trains or row.residual:
            with pytest.raises(ValueError, match="^(calibration|method): expected"):
                quantize_(model, config=config)
        else:
            report = quantize_(model, config=config)
            assert 4.3 < report.bits <= 4.5
            assert models.relative_error(models.output(model, batch), expected) < bound(
                "bert", "w4a8")


class Odd(torch.nn.Module):
    """Linears that stay, each for a reason of its own, and one that does not."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 64)
        self.taken = torch.nn.Linear(64, 64)
        self.again = self.taken
        self.named = torch.nn.Linear(64, 64)
        self.unread = torch.nn.Linear(64, 64)
        self.narrow = torch.nn.Linear(48, 48)
        self.hooked = torch.nn.Linear(64, 64)
        self.hooked.register_forward_hook(lambda *a: None)
        self.encoder = torch.nn.TransformerEncoderLayer(64, 2, 64, batch_first=True)
        self.head = torch.nn.Linear(64, 10)
        self.head.weight = self.embed.weight
        self.scaled = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(64, 64))
        self.wide = torch.nn.Linear(65537, 1)
        self.away = torch.nn.Linear(64, 64, device="meta")

    def forward(self, tokens):
        x = self.hooked(self.named(self.again(self.taken(self.embed(tokens)))))
        self.narrow(x[..., :48])
        return self.head(self.scaled(self.encoder(x)))


def test_report_says_what_was_left_and_why():
    torch.manual_seed(0)
    model = Odd().eval()
    tokens = torch.arange(20).reshape(2, 10) % 10
    config = sq.QuantConfig(method="hadamard", weights="rtn", group_size=64, bits=4,
                            ignore=("na*",))
    report = quantize_(model, [tokens], config, ignore=["narro"])
    (taken,) = report.linears
    assert (taken.name, taken.shape, taken.bits) == ("taken", (64, 64), 4)
    assert taken.nbytes == model.taken.nbytes
    assert isinstance(model.taken, Linear)
    assert model.again is model.taken
    reasons = {left.name: left.reason for left in report.left}
    assert reasons.pop("unread") == "no batch of the calibration reaches it"
    assert reasons.pop("hooked") == "it has hooks of its own"
    assert reasons.pop("head") == "its weight is also embed.weight"
    assert reasons.pop("scaled") == "it is a ParametrizedLinear, not a plain Linear"
    assert reasons.pop("wide") == "the kernels take 65536 inputs at most, and it has 65537"
    assert reasons.pop("away") == "its weight is on meta, not on the CPU"
    assert reasons.pop("narrow") == reasons.pop("named") == "ignored"
    assert {*reasons} == {"encoder.linear1", "encoder.linear2", "encoder.self_attn.out_proj"}
    assert reasons["encoder.linear1"] == "torch's TransformerEncoderLayer reads its weight"
    assert "1 linears in w4a8, 4.00 bits" in str(report)
    assert "head: left, its weight is also embed.weight" in str(report)
    with torch.inference_mode():
        assert torch.isfinite(model(tokens)).all()


def test_groups_that_do_not_divide_the_inputs_leave_the_linear():
    model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.Linear(64, 2))
    report = quantize_(model, config=sq.QuantConfig(method="none", weights="rtn", group_size=64,
                                                    bits=4))
    assert [linear.name for linear in report.linears] == ["1"]
    assert "group_size: expected a divisor of 0's 48 inputs" in report.left[0].reason


def test_output_head_stays_unless_it_is_asked_for():
    for ignore, quantized in ((None, False), ((), True)):
        model = models.make("llama")
        report = quantize_(model, models.batches("llama", 1), RTN, ignore=ignore)
        assert isinstance(model.lm_head, Linear) == quantized
        assert [left.reason for left in report.left] == (
            [] if quantized else ["it is the model's output head"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_error_names_the_linear_and_leaves_the_model(bad):
    model = models.make("bert")
    with torch.no_grad():
        model.encoder.layer[2].output.dense.weight[3, 4] = bad
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="layer.2.output.dense"):
        quantize_(model, config=sq.QuantConfig(method="hadamard", weights="rtn", bits=4))
    assert [type(module) for module in model.modules()] == kinds


def test_inputs_that_are_not_finite_are_named():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    with pytest.raises(ValueError, match="^0: inputs: expected finite numbers"):
        quantize_(model, [torch.full((4, 32), torch.inf)], RTN)


def test_a_forward_that_differs_from_run_to_run_is_refused():
    class Growing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = torch.nn.Linear(32, 32), 0

        def forward(self, x):
            self.calls += 1
            return self.linear(x.repeat(self.calls, 1))

    with pytest.raises(ValueError, match="linear: calibration: expected 4 rows"):
        quantize_(Growing(), [torch.ones(4, 32)], RTN)


@pytest.mark.parametrize(("arguments", "error"), [
    ({"model": 3}, "model: expected a torch.nn.Module, found int"),
    ({"model": torch.nn.Linear(4, 4)}, "model: expected a model that contains linears"),
    ({"calibration": []}, "calibration: expected at least one batch"),
    ({"config": sq.QuantConfig()}, "calibration: expected batches for method 'balanced'"),
    ({"config": sq.QuantConfig(method="hadamard")}, "and weights 'gptq', found none"),
    ({"config": sq.QuantConfig(method="quarot")}, "method: expected one that works on each"),
    ({"config": sq.QuantConfig(method="efficientqat")}, "method: expected one that works on each"),
    ({"config": sq.QuantConfig(kv_bits=8)}, "kv_bits: expected 16, as only folders"),
    ({"config": sq.QuantConfig(head_bits=6)}, "head_bits: expected None, as only folders"),
])
def test_arguments_that_do_not_go_together(arguments, error):
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    with pytest.raises((ValueError, TypeError), match=error):
        quantize_(**{"model": model, "config": RTN, **arguments})


@pytest.mark.parametrize("name", models.MAKERS)
@pytest.mark.parametrize("scheme", ["w4a4", "w4a16"])
def test_state_is_loaded_into_a_new_model(name, scheme):
    model = models.make(name)
    quantize_(model, models.batches(name, 2), sq.QuantConfig(scheme=scheme))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = models.MAKERS[name]()
    load_(other, torch.load(file, weights_only=True))
    (batch,) = models.batches(name, 1, seed=1)
    assert torch.equal(models.output(other, batch), models.output(model, batch))


def test_a_state_of_another_model_is_refused():
    model = models.make("bert")
    quantize_(model, models.batches("bert", 1), RTN)
    with pytest.raises(RuntimeError, match="encoder.layer.0.attention.self.query: expected a module"
                                           " of that name in the model, found none"):
        load_(models.make("vit"), model.state_dict())


def test_a_bfloat16_model_stays_one():
    model = models.make("llama").bfloat16()
    (batch,) = models.batches("llama", 1, seed=1)
    expected = models.output(model, batch)
    quantize_(model, models.batches("llama", 4), RTN)
    found = models.output(model, batch)
    assert found.dtype == torch.bfloat16
    assert models.relative_error(found.float(), expected.float()) < bound("llama", "w4a8")


def test_training_mode_is_left():
    model = models.make("bert").train()
    quantize_(model, models.batches("bert", 1), RTN)
    assert not any(module.training for module in model.modules())
    with pytest.raises(RuntimeError, match="no backward"):
        model(**models.batches("bert", 1)[0])
