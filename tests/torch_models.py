"""Small transformers models of random weights, and batches that they take. Needs torch."""

import torch
import transformers

VOCAB = 320
SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 192}
# A linear keeps the size of its inputs. With 0.02, the default, what a block adds hardly counts.
SPREAD = 96**-0.5


def bert():
    return transformers.BertModel(transformers.BertConfig(
        vocab_size=VOCAB, num_attention_heads=4, **SIZES))


def vit():
    return transformers.ViTModel(transformers.ViTConfig(
        num_attention_heads=4, image_size=32, patch_size=8, **SIZES))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, num_attention_heads=6, num_key_value_heads=2, **SIZES))


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=96, n_layer=3, n_head=6, bos_token_id=0, eos_token_id=0))


# Linears whose rounding adds noise to a layer's output: q, k, v, o, up, down, and llama's gate.
ROUNDINGS = {"bert": 6, "vit": 6, "llama": 7, "gpt2": 6}
MAKERS = {"bert": bert, "vit": vit, "llama": llama, "gpt2": gpt2}


def make(name):
    """The model of that name, ready for inference."""
    torch.manual_seed(0)
    model = MAKERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, SPREAD)
    return model.eval()


def batches(name, count, seed=0):
    """So many batches of 4 inputs."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return [{"pixel_values": torch.randn(4, 3, 32, 32, generator=generator)}
                for _ in range(count)]
    return [{"input_ids": torch.randint(0, VOCAB, (4, 32), generator=generator)}
            for _ in range(count)]


def output(model, batch):
    """The first of what the model returns."""
    with torch.inference_mode():
        return model(**batch)[0]


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())
