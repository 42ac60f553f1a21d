"""Packed folders in transformers: its models run our modules and give what the native ones do, and
without our quantizer nothing is loaded at all."""

import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")
transformers = pytest.importorskip("transformers", "4.57", reason="needs transformers 4.57")

import family_models as zoo  # noqa: E402

import singlequant as sq  # noqa: E402
from singlequant.integrations.torch import Linear  # noqa: E402
from singlequant.integrations.transformers import (  # noqa: E402
    SingleQuantConfig,
    packed_config,
)
from singlequant.study.evaluate import split_windows  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
# Absolute, of logits of order 1 to 10. Both routes sum floats in an order of their own, and a head
# in codes rounds its inputs to integers: one that lies between two of them may become either.
TOLERANCE = 1e-3
EXPERTS = [name for name, row in zoo.FAMILIES.items() if row.experts or name == "gpt-oss"]
FAMILIES = [name for name in zoo.FAMILIES if name not in EXPERTS]
SCHEMES = ["w4a4", "w4a8", "w4a16"]


def pack(source, out, config):
    """A packed folder of random calibration tokens."""
    checkpoint = sq.load_checkpoint(source)
    windows = np.random.default_rng(0).integers(0, checkpoint.spec.vocab, (4, 32))
    rotations = sq.solve_rotations(sq.calibrate(checkpoint, windows), config)
    sq.save(sq.quantize(checkpoint, rotations, config), out, checkpoint, config)
    return out


def logits(model, tokens):
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def random_tokens(model, shape=(2, 24)):
    return np.random.default_rng(1).integers(0, model.config.vocab_size, shape)


def agree(folder, **options):
    """The model of transformers, whose logits are the native ones."""
    model = AutoModel.from_pretrained(folder, **options)
    tokens = random_tokens(model)
    expected = sq.load(folder, kv_bits=32).forward(tokens)
    np.testing.assert_allclose(logits(model, tokens), expected, atol=TOLERANCE, rtol=0)
    assert np.abs(expected).max() > 0.5
    return model


@pytest.fixture(scope="module", params=SCHEMES)
def bundled(request, tmp_path_factory):
    """The bundled model in each scheme, quantized with the defaults."""
    out = tmp_path_factory.mktemp("bundled") / request.param
    sq.quantize_folder(sq.bundled_model(), out, sq.QuantConfig(scheme=request.param))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small packed folder, W4A16."""
    return pack(sq.bundled_model(), tmp_path_factory.mktemp("packed") / "out",
                sq.QuantConfig("w4a16", "hadamard", "rtn", bits=4))


# ---- both routes agree --------------------------------------------------------------------------


def test_both_routes_agree_on_the_bundled_model(bundled):
    """W4A16 logits within 1e-3, W4A8 and W4A4 perplexity within 0.1 %: there an input that lies
    between two codes may be rounded to either, as sums in another order say."""
    model, native = AutoModel.from_pretrained(bundled), sq.load(bundled, kv_bits=32)
    windows = split_windows(native.encode(sq.bundled_text("heldout")), 256)
    found, expected = logits(model, windows), native.forward(windows)
    if bundled.name == "w4a16":
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)
    perplexities = [
        torch.nn.functional.cross_entropy(torch.from_numpy(y[:, :-1].reshape(-1, y.shape[-1])),
                                          torch.from_numpy(windows[:, 1:].reshape(-1))).exp()
        for y in (found, expected)]
    assert abs(perplexities[0] / perplexities[1] - 1) < 1e-3
    assert sum(isinstance(module, Linear) for module in model.modules()) == 35


def test_both_routes_generate_the_same(folder):
    model, native = AutoModel.from_pretrained(folder), sq.load(folder, kv_bits=32)
    prompt = native.encode("The function returns")
    found = model.generate(torch.from_numpy(prompt)[None], max_new_tokens=12, do_sample=False)
    expected = native.generate([prompt], max_new_tokens=12, temperature=0.0)[0]
    assert found[0, len(prompt):].tolist() == list(expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_both_routes_agree_for_each_family(name, tmp_path):
    """W4A16 of every variant's first; those whose linears transformers keeps together as well."""
    variant = next(iter(zoo.FAMILIES[name].variants))
    zoo.make_family(tmp_path / "model", name, variant, "float16")
    agree(pack(tmp_path / "model", tmp_path / "out",
               sq.QuantConfig("w4a16", "hadamard", "rtn", bits=4)))


@pytest.mark.parametrize("options", [
    {"method": "balanced"}, {"method": "aligned"}, {"method": "quarot"}, {"method": "duquant"},
    {"weights": "gptq", "group_size": 32}, {"kv_bits": 8}, {"head_bits": 16, "embedding_bits": 16},
    {"head_bits": 6}, {"ignore": ("*.o_proj", "model.layers.1.mlp.*")}], ids=str)
@pytest.mark.parametrize("tie", [True, False])
def test_both_routes_agree_for_each_recipe(options, tie, make_checkpoint, tmp_path):
    source = make_checkpoint(tmp_path / "model", tie=tie)
    config = sq.QuantConfig(**{"scheme": "w4a16", "method": "hadamard", "weights": "rtn",
                               "bits": 4, **options})
    sq.quantize_folder(source, tmp_path / "out", config)
    model = agree(tmp_path / "out")
    ignored = [name for name, module in model.named_modules()
               if type(module) is torch.nn.Linear and name != "lm_head"]
    assert len(ignored) == (5 if config.ignore else 0)


def test_a_base_model_takes_the_folder(folder):
    model = transformers.AutoModel.from_pretrained(folder)
    tokens = random_tokens(model)
    with torch.inference_mode():
        found = model(torch.from_numpy(tokens)).last_hidden_state.numpy()
    expected = sq.load(folder, kv_bits=32).hidden_states(tokens)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, "auto"])
def test_the_model_is_float32_and_takes_a_config(folder, dtype):
    model = agree(folder, dtype=dtype, device_map="cpu", config=packed_config(folder))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert model.hf_quantizer.quantization_config.recipe.scheme == "w4a16"
    tokens = random_tokens(model)
    assert np.array_equal(logits(copy.deepcopy(model), tokens), logits(model, tokens))


# ---- what is refused ----------------------------------------------------------------------------

PLAIN = """
import sys, transformers
assert transformers.AutoConfig.from_pretrained(sys.argv[1]).hidden_size
assert transformers.AutoTokenizer.from_pretrained(sys.argv[1])("the")
for kind in (transformers.AutoModelForCausalLM, transformers.AutoModel, transformers.LlamaModel,
             transformers.LlamaForCausalLM):
    try:
        kind.from_pretrained(sys.argv[1], attn_implementation="eager")
    except ValueError as error:
        assert "import singlequant.integrations.transformers" in str(error), error
    else:
        raise SystemExit(f"{kind.__name__} was loaded, and its weights are random")
import singlequant.integrations.transformers
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("refused, then loaded")
"""


def test_transformers_alone_refuses_the_folder_aloud(folder):
    done = subprocess.run([sys.executable, "-c", PLAIN, folder], capture_output=True, text=True)
    assert done.stdout == "refused, then loaded\n", done.stderr


def test_a_folder_of_before_there_was_a_guard_is_loaded(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    values = json.loads(path.read_text())
    del values["transformers_weights"]
    path.write_text(json.dumps(values))
    agree(tmp_path / "old")


@pytest.mark.parametrize("name", [EXPERTS[0], EXPERTS[-1]])
def test_experts_are_refused(name, tmp_path):
    variant = next(iter(zoo.FAMILIES[name].variants))
    zoo.make_family(tmp_path / "model", name, variant, "float16")
    pack(tmp_path / "model", tmp_path / "out", sq.QuantConfig("w4a16", "hadamard", "rtn", bits=4))
    with pytest.raises(ValueError, match="transformers keeps experts in tensors of its own"):
        AutoModel.from_pretrained(tmp_path / "out")


def test_linears_that_share_a_module_and_were_ignored_are_refused(tmp_path):
    zoo.make_family(tmp_path / "model", "gpt2", "tied", "float16")
    for ignore, message in (("*.q", "packed or none"), ("*.c_attn.*", "expects it, and the")):
        out = tmp_path / ignore.strip("*.")
        pack(tmp_path / "model", out, sq.QuantConfig("w4a16", "hadamard", "rtn", bits=4,
                                                     ignore=(ignore,)))
        with pytest.raises(ValueError, match=message):
            AutoModel.from_pretrained(out)


def test_a_head_that_the_folder_does_not_have_is_refused(folder):
    with pytest.raises(ValueError, match="score.weight: LlamaForSequenceClassification expects it"):
        transformers.AutoModelForSequenceClassification.from_pretrained(folder)


def test_sizes_that_do_not_agree_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="q_proj: expected a Linear .192, 192. in Llama"):
        AutoModel.from_pretrained(folder, hidden_size=96)


@pytest.mark.parametrize(("change", "error"), [
    ({"format_version": 3}, "format_version: expected 1 or 2, found 3"),
    ({"scheme": "w3a3"}, "scheme: expected one of"),
    ({"format_version": None}, "format_version: expected 1 or 2, found None"),
])
def test_a_config_that_is_not_ours_is_refused(change, error, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=error):
        AutoModel.from_pretrained(tmp_path / "changed")


def test_other_devices_and_training_are_refused(folder):
    with pytest.raises(ValueError, match="device_map: expected the CPU"):
        AutoModel.from_pretrained(folder, device_map="meta")
    model = AutoModel.from_pretrained(folder, device_map="auto")
    tokens = torch.from_numpy(random_tokens(model))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    found = model(tokens).logits  # needs no torch.no_grad()
    assert not found.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        found.sum().backward()
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="there is no backward"):
        model(tokens)


# ---- quantized as they are loaded ---------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_is_quantized_as_it_is_loaded(scheme):
    config = SingleQuantConfig(scheme=scheme, calibration_tokens=1024)
    model = AutoModel.from_pretrained(sq.bundled_model(), quantization_config=config)
    report = model.hf_quantizer.report
    assert len(report.linears) == 35
    assert [left.name for left in report.left] == ["lm_head"]
    original = sq.load(sq.bundled_model())
    windows = split_windows(original.encode(sq.bundled_text("heldout")), 256)[:4]
    found, expected = logits(model, windows), original.forward(windows)
    divergence, _ = sq._C.kl_divergence(expected.reshape(-1, 2048), found.reshape(-1, 2048))
    assert 0 < divergence.mean() < {"w4a4": 0.1, "w4a8": 0.02, "w4a16": 0.02}[scheme]


def test_a_model_is_quantized_with_batches_of_ones_own():
    tokens = torch.arange(512).reshape(4, 128)
    config = SingleQuantConfig(calibration=[{"input_ids": tokens}], method="singlequant", bits=4)
    model = AutoModel.from_pretrained(sq.bundled_model(), quantization_config=config)
    assert model.hf_quantizer.report.bits == 4
    assert repr(model.config)


def test_options_of_a_recipe_are_checked():
    with pytest.raises(ValueError, match="scheme: expected one of"):
        SingleQuantConfig(scheme="w2a2")
    with pytest.raises(ValueError, match="unknown key 'more'"):
        SingleQuantConfig.from_dict({"quant_method": "singlequant", "more": 1})
    values = SingleQuantConfig(scheme="w4a4", ignore=("a*",)).to_dict()
    assert SingleQuantConfig.from_dict(json.loads(json.dumps(values))).to_dict() == values
