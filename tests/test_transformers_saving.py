"""save_pretrained of models with our modules, and from_pretrained of what it wrote."""

import copy
import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")
transformers = pytest.importorskip("transformers", "4.57", reason="needs transformers 4.57")

import torch_models as models  # noqa: E402

import singlequant as sq  # noqa: E402
from singlequant.export import folder as folders  # noqa: E402
from singlequant.export.packed import GUARD  # noqa: E402
from singlequant.integrations.torch import Linear, load_, quantize_  # noqa: E402
from singlequant.integrations.transformers import SingleQuantConfig  # noqa: E402

AutoModel = transformers.AutoModelForCausalLM
FAST = {"method": "hadamard", "weights": "rtn", "bits": 4}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    sq.quantize_folder(sq.bundled_model(), out, sq.QuantConfig("w4a8", **FAST))
    return out


@pytest.fixture
def model(packed):
    return AutoModel.from_pretrained(packed)


def outputs(model):
    tokens = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        return model(tokens).logits


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


# ---- a packed folder ----------------------------------------------------------------------------


def test_a_packed_folder_comes_back_byte_for_byte(model, packed, tmp_path):
    model.save_pretrained(tmp_path / "new" / "again")
    assert contents(tmp_path / "new" / "again") == contents(packed)
    again = AutoModel.from_pretrained(tmp_path / "new" / "again")
    assert torch.equal(outputs(again), outputs(model))
    again.save_pretrained(tmp_path / "third")
    assert contents(tmp_path / "third") == contents(packed)


def test_copies_of_a_model_save_as_well(model, packed, tmp_path):
    copy.deepcopy(model).save_pretrained(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(packed)


def test_a_pickled_model_saves_as_well(model, packed, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(outputs(again), outputs(model))
    again.save_pretrained(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(packed)


def test_the_footprint_counts_codes_and_scales_once(model, packed):
    stored = sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    assert 0.9 * stored < model.get_memory_footprint() < 1.1 * stored


def test_a_folder_with_a_tokenizer_takes_the_model(model, packed, tmp_path):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(packed / "tokenizer.json"))
    tokenizer.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out", max_shard_size="1MB")
    assert contents(packed).items() <= contents(tmp_path / "out").items()


def test_a_folder_with_a_model_is_refused_and_stays(model, packed, tmp_path):
    before = contents(packed)
    with pytest.raises(FileExistsError, match="expected a folder without a model, found config"):
        model.save_pretrained(packed)
    assert contents(packed) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a folder without a model, found a file"):
        model.save_pretrained(tmp_path / "file")
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("there", [False, True])
def test_a_copy_that_fails_leaves_no_model(there, model, tmp_path, monkeypatch):
    copied, calls = folders.shutil.copyfileobj, []

    def full(source, target):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        copied(source, target)

    monkeypatch.setattr(folders.shutil, "copyfileobj", full)
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "out")
    if there:
        assert not list((tmp_path / "out").glob("*.tmp"))
        with pytest.raises(OSError, match="no file named"):
            AutoModel.from_pretrained(tmp_path / "out")
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("change", "named"), [
    (lambda m: m.model.norm.weight.data.mul_(2), "model.norm.weight: expected it as it was loaded"),
    (lambda m: m.model.layers[1].mlp.__setattr__("down_proj", torch.nn.Linear(512, 192)),
     "model.layers.1.mlp.down_proj: expected it as it was loaded"),
    (lambda m: m.add_module("more", torch.nn.Linear(2, 2)), "more.weight: expected it as"),
])
def test_what_was_changed_in_memory_is_not_lost_in_silence(change, named, model, tmp_path):
    change(model)
    with pytest.raises(ValueError, match=named):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [
    {"state_dict": {"a": 1}}, {"variant": "x"}, {"push_to_hub": True},
    {"safe_serialization": False}])
def test_options_that_a_copy_cannot_follow_are_refused(options, model, tmp_path):
    with pytest.raises(ValueError, match=f"{list(options)[-1]}: expected"):
        model.save_pretrained(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_only_the_main_process_writes(model, tmp_path):
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert list(tmp_path.iterdir()) == []


# ---- a model that was quantized as it was loaded ------------------------------------------------

PLAIN = """
import sys, transformers
try:
    transformers.AutoModel.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "import singlequant.integrations.transformers" in str(error), error
    print("refused")
"""


@pytest.fixture(scope="module")
def config():
    tokens = torch.arange(512).reshape(4, 128)
    return SingleQuantConfig(calibration=[{"input_ids": tokens}], calibration_tokens=512,
                             scheme="w4a4")


def test_a_model_quantized_as_it_was_loaded_comes_back(config, tmp_path):
    model = AutoModel.from_pretrained(sq.bundled_model(), quantization_config=config)
    model.save_pretrained(tmp_path / "out", max_shard_size="500KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["quantization_config"]["scheme"] == "w4a4"
    assert values["transformers_weights"] == GUARD
    again = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert sum(isinstance(module, Linear) for module in again.modules()) == 35
    assert torch.equal(outputs(again), outputs(model))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    with pytest.raises(FileExistsError, match="expected a folder without a model"):
        again.save_pretrained(tmp_path / "out")
    again.save_pretrained(tmp_path / "new" / "third")
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path / "new" / "third")),
                       outputs(model))
    with pytest.raises(sq.FormatError, match="format_version: expected 1 or 2, found None"):
        sq.load(tmp_path / "out")


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_model_quantized_in_memory_comes_back(name, loaded, tmp_path):
    model, (batch,) = models.make(name), models.batches(name, 1)
    quantize_(model, [batch], sq.QuantConfig("w4a4", method="singlequant", weights="rtn"))
    if loaded:  # the recipe is then unknown
        model, state = models.make(name), model.state_dict()
        load_(model, state)
    copy.deepcopy(model).save_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(models.output(again, batch), models.output(model, batch))
    assert again.config.quantization_config.recipe.scheme == ("w4a8" if loaded else "w4a4")
    done = subprocess.run([sys.executable, "-c", PLAIN, tmp_path / "out"], capture_output=True,
                          text=True)
    assert done.stdout == "refused\n", done.stderr


def test_a_model_of_another_library_keeps_its_own_way_to_be_saved():
    model, (batch,) = models.make("bert"), models.batches("bert", 1)
    model.config.quantization_config = {"quant_method": "other"}
    quantize_(model, [batch], sq.QuantConfig(method="none", weights="rtn"))
    assert "save_pretrained" not in vars(model)
    assert model.config.quantization_config == {"quant_method": "other"}


@pytest.mark.parametrize("name", models.MAKERS)
def test_families_with_no_row_of_ours_come_back(name, tmp_path):
    original = models.make(name)
    original.save_pretrained(tmp_path / "original")
    (batch,) = models.batches(name, 1)
    config = SingleQuantConfig(calibration=[batch], method="singlequant", weights="rtn")
    model = type(original).from_pretrained(tmp_path / "original", quantization_config=config)
    model.save_pretrained(tmp_path / "out")
    again = type(original).from_pretrained(tmp_path / "out")
    assert torch.equal(models.output(again, batch), models.output(model, batch))
    done = subprocess.run([sys.executable, "-c", PLAIN, tmp_path / "out"], capture_output=True,
                          text=True)
    assert done.stdout == "refused\n", done.stderr


def test_a_saved_folder_that_lacks_something_is_named(config, tmp_path):
    from safetensors.torch import load_file, save_file

    AutoModel.from_pretrained(sq.bundled_model(), quantization_config=config).save_pretrained(
        tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    state = load_file(path)
    last = "model.layers.4.mlp.down_proj"
    for gone, message in (("model.norm.weight", "model.norm.weight: LlamaForCausalLM expects it"),
                          (f"{last}.weight_scale", f"{last}: (?s:.)*Missing key.*weight_scale"),
                          (f"{last}.weight_layout", f"{last}.weight: LlamaForCausalLM expects")):
        save_file({key: value for key, value in state.items() if key != gone}, path,
                  {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            AutoModel.from_pretrained(tmp_path / "out")
    other = {f"{last}.more.weight_layout": torch.tensor([1, 1, 4, 0])}
    save_file(state | other, path, {"format": "pt"})
    with pytest.raises(ValueError, match="more: LlamaForCausalLM has no such module"):
        AutoModel.from_pretrained(tmp_path / "out")
    save_file({"a": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="expected tensors such as NAME.weight_layout, found none"):
        AutoModel.from_pretrained(tmp_path / "out")
