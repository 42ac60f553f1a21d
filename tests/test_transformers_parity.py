"""Hidden states after each layer and logits of tiny random models against transformers."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")
transformers = pytest.importorskip("transformers", reason="needs the torch extra")

from singlequant import _C  # noqa: E402
from singlequant.models.families import FAMILIES  # noqa: E402
from singlequant.models.spec import RotarySpec, tensor_name  # noqa: E402
from singlequant.runtime.layers import layer_blocks, new_cache  # noqa: E402
from singlequant.weights import Norm  # noqa: E402

TOLERANCE = 1e-4  # absolute; hidden states and logits are of order 1
SIZES = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "attn_implementation": "eager",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
MODELS = {
    "llama-gqa": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn-rope": ("Llama", {"rope_parameters": YARN}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("Llama", {"head_dim": 16}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2-bias": ("Qwen2", {}),
}


def tiny_model(family, options):
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():  # the initial weights are too small to tell layers apart
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def array(tensor):
    return tensor.detach().numpy()


def model_spec(model):
    """The spec that the family's row makes of the config; rotary frequencies are transformers'."""
    config = {**model.config.to_dict(), "rope_parameters": None}
    spec = FAMILIES[type(model).__name__].spec(config)
    embedding = model.model.rotary_emb
    rotary = RotarySpec(tuple(array(embedding.inv_freq).tolist()), embedding.attention_scaling)
    return replace(spec, kinds=tuple(
        replace(kind, attention=replace(kind.attention, rotary=rotary)) for kind in spec.kinds))


def decoder_layers(model, spec):
    for i in range(spec.layers):
        layer, linears, norms = spec.layer(i), {}, {}
        for place, norm in layer.norms.items():
            module = model.get_submodule(tensor_name(norm.name, i))
            norms[place] = Norm(norm.name, array(module.weight), None)
        for site in layer.sites.values():
            for role in site.roles:
                module = model.get_submodule(tensor_name(layer.linears[role].name, i))
                bias = None if module.bias is None else array(module.bias)
                linears[role] = site.name, array(module.weight), bias
        sites = {name: (site.k, None, 16, 1.0) for name, site in layer.sites.items()}
        yield _C.DecoderLayer(**layer_blocks(layer, norms, linears, sites))


def ours(model, ids, layers, cache, start):
    """Hidden states before each layer and after the last norm, and logits; ids [batch, length]."""
    batch, length = ids.shape
    sequence = np.repeat(np.arange(batch), length)
    position = np.tile(np.arange(start, start + length), batch)
    hidden = _C.gather_rows(array(model.model.embed_tokens.weight), ids.ravel())
    states = []
    for i, layer in enumerate(layers):
        states.append(hidden.copy())
        layer.forward(hidden, sequence, position, cache, i)
    norm = model.model.norm
    states.append(_C.rms_norm(hidden, array(norm.weight), model.config.rms_norm_eps))
    logits = _C.linear_dense(states[-1], array(model.lm_head.weight))
    return [x.reshape(batch, length, -1) for x in (*states, logits)]


@pytest.mark.parametrize("name", MODELS)
def test_tiny_model_agrees_with_transformers(name):
    model = tiny_model(*MODELS[name])
    ids = np.random.default_rng(1).integers(0, 101, (2, 41))
    with torch.no_grad():
        out = model(torch.from_numpy(ids), output_hidden_states=True, use_cache=False)
    expected = [array(x) for x in (*out.hidden_states, out.logits)]
    spec = model_spec(model)
    layers = list(decoder_layers(model, spec))
    cache = new_cache(spec, spec.layers, 2, 41)
    prompt = ours(model, ids[:, :30], layers, cache, 0)
    steps = [ours(model, ids[:, t : t + 1], layers, cache, t) for t in range(30, 41)]
    for i, state in enumerate(expected):
        got = np.concatenate([prompt[i], *(step[i] for step in steps)], axis=1)
        np.testing.assert_allclose(got, state, atol=TOLERANCE * max(1, np.abs(state).max()), rtol=0)
