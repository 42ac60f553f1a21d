"""GGUF files of a LLaMA folder: the 16-bit one, and what llama.cpp's own quantizer makes of it.

The types that a file can have are those of llama.cpp's enum llama_ftype, without the prefix
LLAMA_FTYPE_MOSTLY_. This file needs NumPy, gguf and safetensors, ml_dtypes for bfloat16, and
llama-cpp-python for the quantizer.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np

LAYER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm",
               "lm_head": "output"}
SOURCES = {"float16": "F16", "bfloat16": "BF16"}  # dtype of a folder -> type that loses nothing


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor of a LLaMA folder. ValueError for a tensor that LLaMA has not."""
    stem = name.removesuffix(".weight")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.weight"
    index, _, rest = stem.removeprefix("model.layers.").partition(".")
    if rest not in LAYER_NAMES or name == stem:
        raise ValueError(f"{name}: expected a weight of a LLaMA folder")
    return f"blk.{int(index)}.{LAYER_NAMES[rest]}.weight"


def interleave_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * d, k] in the order that llama.cpp's rotary embedding wants.

    It turns the pairs (2i, 2i + 1) of a head where the folder's model turns (i, i + d / 2).
    """
    n, k = weight.shape
    return weight.reshape(heads, 2, n // heads // 2, k).swapaxes(1, 2).reshape(n, k)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a LLaMA folder. ValueError for what `write_gguf` does not write."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    if config.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type: expected llama, found {config.get('model_type')!r}")
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rotary.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"{path}: rope_type: expected default, found {kind!r}")
    return config


def source_type(folder: Path) -> str:
    """The type that holds a folder's weights as they are: F16 or BF16."""
    config = read_config(folder)
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in SOURCES:
        raise ValueError(f"{folder / 'config.json'}: dtype: expected {' or '.join(SOURCES)}, "
                         f"found {dtype!r}")
    return SOURCES[dtype]


def write_gguf(folder: Path, path: Path) -> None:
    """The folder's weights in its own 16 bits, norms in float32, no tokenizer."""
    import gguf
    from safetensors import safe_open

    config, kind = read_config(folder), source_type(folder)
    if kind == "BF16":
        import ml_dtypes  # noqa: F401  safetensors then reads bfloat16
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = (config.get("rope_parameters") or config).get("rope_theta", 10000.0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_tokenizer_model("none")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: expected safetensors, found none")
    for file in files:
        with safe_open(file, "np") as tensors:
            for name in list(tensors.keys()):
                tensor = tensors.get_tensor(name)
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    tensor = interleave_pairs(tensor, heads if "q_proj" in name else kv_heads)
                add_tensor(writer, gguf_name(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(writer: Any, name: str, tensor: np.ndarray) -> None:
    """A norm in float32, a matrix in its own 16 bits."""
    import gguf

    if tensor.ndim == 1:
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    elif tensor.dtype == np.float16:
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    elif tensor.dtype.name == "bfloat16":  # NumPy has no such type: the writer takes its bytes
        writer.add_tensor(name, np.ascontiguousarray(tensor).view(np.uint8),
                          raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        raise ValueError(f"{name}: expected float16 or bfloat16, found {tensor.dtype.name}")


def gguf_file(folder: Path, kind: str, threads: int, work: Path | None = None,
              importance: Path | None = None) -> Path:
    """The file of a type such as Q8_0, Q4_0 or Q4_K_M, made in `work` unless it is there.

    The quantizer takes its defaults. importance: an .npz file of float32 [k] by GGUF's names, whose
    name tells it from others. RuntimeError when the quantizer fails.
    """
    of = f"-{importance.stem.removeprefix(folder.name).strip('-')}" if importance else ""
    path = (work or folder.parent) / f"{folder.name}-{kind}{of}.gguf"
    if path.exists():
        return path
    partial = path.with_suffix(".partial")
    source = source_type(folder)
    if kind == source:
        write_gguf(folder, partial)
    else:
        quantize(gguf_file(folder, source, threads, work), partial, kind, threads, importance)
    partial.replace(path)
    return path


def quantize(source: Path, target: Path, kind: str, threads: int,
             importance: Path | None = None) -> None:
    """A 16-bit file as another type, by llama.cpp. importance: as for `gguf_file`."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread = threads
    ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}", None)
    if ftype is None:
        raise ValueError(f"{kind}: expected a type of llama.cpp's, found another name")
    options.ftype = ftype
    values = {} if importance is None else dict(np.load(importance))  # alive while C reads them
    if values:
        entry, pointer = llama_cpp.llama_model_imatrix_data, ctypes.POINTER(ctypes.c_float)
        entries = [entry(name.encode(), value.ctypes.data_as(pointer), value.size)
                   for name, value in values.items()]
        options.imatrix = (entry * (len(entries) + 1))(*entries)  # one without a name ends them
    failed = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(options))
    if failed:
        raise RuntimeError(f"llama_model_quantize: {kind}: status {failed}")
