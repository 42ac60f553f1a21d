# SPDX-License-Identifier: Apache-2.0
"""Every family against transformers: prefill, token by token, batches, layouts of the files."""

import copy
import inspect
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")
transformers = pytest.importorskip("transformers", "5.0", reason="needs transformers 5")

import family_models as zoo  # noqa: E402
from conftest import write_json  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import singlequant as sq  # noqa: E402

TOLERANCE = 1e-4  # absolute; logits are of order 1, and a wrong epsilon moves them by more
STEPS = 6  # tokens that follow the prompt one by one
ALL = [f"{name}-{variant}" for name, variant in zoo.variants()]
NAMES = dict(zip(ALL, zoo.variants(), strict=True))
FIRST = [f"{name}-{next(iter(row.variants))}" for name, row in zoo.FAMILIES.items()]
EXPERTS = [name for name in ALL if zoo.FAMILIES[NAMES[name][0]].experts
           and not name.endswith("all-dense")]


@pytest.fixture(scope="module")
def saved(request, tmp_path_factory):
    """(transformers' float32 model, folder, variant)."""
    name, variant = NAMES[request.param]
    folder = tmp_path_factory.mktemp("families") / request.param
    dtype = "bfloat16" if zoo.FAMILIES[name].variants[variant].golden else "float16"
    model = zoo.make_family(folder, name, variant, dtype)
    return model, folder, zoo.FAMILIES[name].variants[variant]


def theirs(model, *inputs, **options):
    """The outputs of a copy: rotary frequencies that follow the length change the model."""
    with torch.no_grad():
        return copy.deepcopy(model)(*inputs, **options)


def agree(found, expected, where=""):
    np.testing.assert_allclose(found, expected.numpy(), atol=TOLERANCE, rtol=0, err_msg=where)


def fed(session, *tokens, sequences=None):
    """Logits of each token that is appended."""
    return session.model.logits(session.append(list(tokens), sequences))


@pytest.mark.parametrize("saved", ALL, indirect=True)
def test_prefill_equals_transformers(saved):
    model, folder, variant = saved
    tokens = zoo.random_tokens(variant.text)[None]
    agree(sq.load(folder).forward(tokens), theirs(model, torch.from_numpy(tokens)).logits)


@pytest.mark.parametrize("saved", ALL, indirect=True)
def test_token_by_token_equals_transformers(saved):
    model, folder, variant = saved
    tokens = zoo.random_tokens(variant.text, seed=1)
    prompt = variant.text - STEPS
    session, running = sq.load(folder).new_session(1, variant.text), copy.deepcopy(model)
    key = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache, begin = {}, 0
    for end in range(prompt, variant.text + 1):
        part = tokens[begin:end]
        with torch.no_grad():
            out = running(torch.from_numpy(part[None]), use_cache=True, **cache)
        agree(fed(session, part), out.logits[0], f"tokens {begin} to {end - 1}")
        cache, begin = {key: out[key]}, end


@pytest.mark.parametrize("saved", ALL, indirect=True)
def test_batch_of_unequal_lengths_equals_transformers(saved):
    model, folder, variant = saved
    lengths = [variant.text, *variant.shorter]
    texts = [zoo.random_tokens(length, seed) for seed, length in enumerate(lengths)]
    ids, mask = np.zeros((2, len(texts), variant.text), np.int64)
    for row, tokens in enumerate(texts):
        ids[row, -len(tokens) :], mask[row, -len(tokens) :] = tokens, 1
    options = {"attention_mask": torch.from_numpy(mask)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = torch.from_numpy((mask.cumsum(1) - 1).clip(0))
    logits = theirs(model, torch.from_numpy(ids), **options).logits
    expected = torch.cat([logits[row, -len(tokens) :] for row, tokens in enumerate(texts)])
    session = sq.load(folder).new_session(3, variant.text)
    agree(fed(session, *texts), expected)


@pytest.mark.parametrize("saved", ALL, indirect=True)
def test_a_batch_continues_as_its_sequences_do_alone(saved):
    _, folder, variant = saved
    lengths = [min(length, variant.text - 1) for length in (variant.text, *variant.shorter)]
    texts = [zoo.random_tokens(length + 1, seed) for seed, length in enumerate(lengths)]
    model = sq.load(folder)
    session = model.new_session(3, variant.text)
    fed(session, *(tokens[:-1] for tokens in texts))
    found = fed(session, *(tokens[-1:] for tokens in texts))
    for row, tokens in enumerate(texts):
        alone = model.new_session(1, variant.text)
        fed(alone, tokens[:-1])
        np.testing.assert_allclose(found[row], fed(alone, tokens[-1:])[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", EXPERTS)
def test_stacked_experts_equal_transformers(name, tmp_path):
    model = zoo.make_family(tmp_path / "saved", *NAMES[name], fused=True)
    names = load_file(tmp_path / "saved" / "model.safetensors")
    assert any(part.endswith("experts.gate_up_proj") for part in names)
    tokens = zoo.random_tokens(24)[None]
    expected = theirs(model, torch.from_numpy(tokens)).logits
    agree(sq.load(tmp_path / "saved").forward(tokens), expected)


@pytest.mark.parametrize("saved", FIRST, indirect=True)
def test_names_without_the_models_prefix_are_read(saved, tmp_path):
    model, folder, _ = saved
    prefix = f"{model.base_model_prefix}."
    other = tmp_path / "bare"
    other.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (other / file).write_bytes((folder / file).read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix(prefix): t for name, t in tensors.items()},
              other / "model.safetensors", {"format": "pt"})
    tokens = zoo.random_tokens(24)[None]
    np.testing.assert_array_equal(sq.load(other).forward(tokens), sq.load(folder).forward(tokens))


REFUSED = [(name, variant) for name, row in zoo.FAMILIES.items()
           for variant, values in row.variants.items() if values.refused]


@pytest.mark.parametrize(("name", "variant"), REFUSED)
def test_what_no_block_computes_is_refused_by_its_key(name, variant, tmp_path):
    zoo.make_family(tmp_path / "saved", name, variant)
    with pytest.raises(sq.FormatError, match=zoo.FAMILIES[name].variants[variant].refused):
        sq.load_checkpoint(tmp_path / "saved")


# ---- text models inside of others ---------------------------------------------------------------

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 28,
          "num_attention_heads": 2, "patch_size": 14}
WRAPPERS = {
    "Gemma3": (("gemma3", "six"), "SiglipVisionConfig",
               {"mm_tokens_per_image": 4, "boi_token_index": 251, "eoi_token_index": 252}),
    "Mistral3": (("mistral", "window"), "PixtralVisionConfig", {}),
}


@pytest.mark.parametrize("stem", WRAPPERS)
def test_text_model_of_a_wrapper_equals_transformers(stem, tmp_path):
    (name, variant), vision, options = WRAPPERS[stem]
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(
        text_config=zoo.config_of(name, variant), image_token_index=250, **options,
        vision_config=getattr(transformers, vision)(**VISION), attn_implementation="eager")
    model = getattr(transformers, f"{stem}ForConditionalGeneration")(config).float().eval()
    zoo.randomize(model, zoo.FAMILIES[name].zero_norms, "bfloat16")
    zoo.save_model(model, tmp_path / "saved")
    tokens = zoo.random_tokens(48)[None] % 250
    with pytest.warns(UserWarning, match="left out: multi_modal_projector"):
        ours = sq.load(tmp_path / "saved")
    agree(ours.forward(tokens), theirs(model, torch.from_numpy(tokens)).logits)


# ---- config.json as transformers 4 wrote it -----------------------------------------------------

THETA_NAMES = {"gpt_neox": "rotary_emb_base"}
PARTIAL_NAMES = {"gpt_neox": "rotary_pct"}
COUNT_NAMES = {"qwen3_moe": "num_experts"}
YARN_BY_DEFAULT = ("gpt_oss", "ministral3")
UNSAYABLE = "olmo3-bases"  # version 4 has one base for all layers


def as_transformers_4(config):
    """The same model in the spelling of transformers 4."""
    config = dict(config)
    kind, config["torch_dtype"] = config["model_type"], config.pop("dtype")
    del config["transformers_version"]
    rope = dict(config.pop("rope_parameters", None) or {})
    if "full_attention" in rope:
        local, rope = rope["sliding_attention"], dict(rope["full_attention"])
        if kind == "gemma3_text":
            config["rope_local_base_freq"] = local["rope_theta"]
    for key, names in (("rope_theta", THETA_NAMES), ("partial_rotary_factor", PARTIAL_NAMES)):
        if key in rope:
            config[names.get(kind, key)] = rope.pop(key)
    if rope.get("rope_type", "default") != "default" or kind in YARN_BY_DEFAULT:
        config["rope_scaling"] = rope
    if kind in COUNT_NAMES:
        config[COUNT_NAMES[kind]] = config.pop("num_local_experts")
    return config


@pytest.mark.parametrize("saved", [name for name in ALL if name != UNSAYABLE], indirect=True)
def test_config_of_transformers_4_says_the_same(saved, tmp_path):
    model, folder, _ = saved
    other = tmp_path / "old"
    other.mkdir()
    (other / "model.safetensors").symlink_to(folder / "model.safetensors")
    write_json(other / "config.json",
               as_transformers_4(json.loads((folder / "config.json").read_text())))
    read = transformers.AutoConfig.from_pretrained(other).to_dict()
    expected = model.config.to_dict()
    for key in ("rope_parameters", "num_local_experts", "layer_types"):
        assert read.get(key) == expected.get(key), "the test spells it in another way"
    assert sq.load_checkpoint(other).spec == sq.load_checkpoint(folder).spec
