"""Hidden states after each layer and logits of tiny random models against transformers."""

import numpy as np
import pytest
from blocks import geometry, llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from singlequant import _C  # noqa: E402

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


def decoder_layers(model):
    config, rotary = model.config, model.model.rotary_emb
    heads = config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    sizes = geometry(
        config.hidden_size, config.intermediate_size, heads, config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads, window or 0,
        eps=config.rms_norm_eps, rotary=(array(rotary.inv_freq), rotary.attention_scaling),
    )  # fmt: skip
    for layer in model.model.layers:
        a, mlp = layer.self_attn, layer.mlp
        linears = {
            "q": a.q_proj,
            "k": a.k_proj,
            "v": a.v_proj,
            "o": a.o_proj,
            "gate": mlp.gate_proj,
            "up": mlp.up_proj,
            "down": mlp.down_proj,
        }
        norms = array(layer.input_layernorm.weight), array(layer.post_attention_layernorm.weight)
        yield _C.DecoderLayer(**llama(
            sizes,
            {role: (array(p.weight), None if p.bias is None else array(p.bias))
             for role, p in linears.items()},
            norms,
        ))


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
    layers = list(decoder_layers(model))
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // 6
    cache = _C.KVCache(3, 2, config.num_key_value_heads, head_dim, 41)
    prompt = ours(model, ids[:, :30], layers, cache, 0)
    steps = [ours(model, ids[:, t : t + 1], layers, cache, t) for t in range(30, 41)]
    for i, state in enumerate(expected):
        got = np.concatenate([prompt[i], *(step[i] for step in steps)], axis=1)
        np.testing.assert_allclose(got, state, atol=TOLERANCE * max(1, np.abs(state).max()), rtol=0)
