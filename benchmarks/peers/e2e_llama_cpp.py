"""llama.cpp in end_to_end.py, through llama-cpp-python's C interface; KIND is the file's type.

The folder's weights go into a GGUF file beside it, which llama.cpp's own quantizer turns into the
other types: the files are made once and kept. The cache has a stream per sequence, as a server for
many users has it, in the default 16 bits; flash attention is left to llama.cpp.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import numpy as np

from .e2e_worker import serve

MICRO_BATCH = 512  # llama.cpp's default n_ubatch
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm",
               "lm_head": "output"}


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor of a LLaMA folder."""
    stem = name.removesuffix(".weight")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.weight"
    index, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{int(index)}.{LAYER_NAMES[rest]}.weight"


def interleave_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * d, k] in the order that llama.cpp's rotary embedding wants.

    It turns the pairs (2i, 2i + 1) of a head where the folder's model turns (i, i + d / 2).
    """
    n, k = weight.shape
    return weight.reshape(heads, 2, n // heads // 2, k).swapaxes(1, 2).reshape(n, k)


def write_gguf(folder: Path, path: Path) -> None:
    """The folder's weights in float16, norms in float32, no tokenizer."""
    import gguf
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    with safe_open(folder / "model.safetensors", "np") as file:
        for name in list(file.keys()):
            tensor = file.get_tensor(name)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                count = heads if "q_proj" in name else config["num_key_value_heads"]
                tensor = interleave_pairs(tensor, count)
            kind = np.float32 if tensor.ndim == 1 else np.float16
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(tensor, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_file(folder: Path, kind: str, threads: int) -> Path:
    """The file of this type, F16, BF16, Q8_0, Q4_0 or Q4_K_M, made unless it is there."""
    import llama_cpp

    path = folder.with_name(f"{folder.name}-{kind}.gguf")
    partial = path.with_suffix(".partial")
    if path.exists():
        return path
    if kind == "F16":
        write_gguf(folder, partial)
    else:
        options = llama_cpp.llama_model_quantize_default_params()
        options.nthread = threads
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        source = gguf_file(folder, "F16", threads)
        failed = llama_cpp.llama_model_quantize(bytes(source), bytes(partial),
                                                ctypes.byref(options))
        if failed:
            raise RuntimeError(f"llama_model_quantize: {kind}: status {failed}")
    partial.replace(path)
    return path


class LlamaCpp:
    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        import llama_cpp

        self.c, self.threads = llama_cpp, threads
        llama_cpp.llama_backend_init()
        path = gguf_file(folder, kind, threads)
        self.model = llama_cpp.llama_model_load_from_file(
            bytes(path), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        features = llama_cpp.llama_print_system_info().decode().partition("AVX2")
        self.note = "built for " + " ".join((features[1] + features[2]).replace(" = 1", "").split())
        self.context = self.batch = None

    def open(self, count: int, capacity: int) -> None:
        c = self.c
        if self.context:
            c.llama_free(self.context)
            c.llama_batch_free(self.batch)
        options = c.llama_context_default_params()
        # a stream's share of the context is rounded up to 256 cells
        options.n_ctx = count * -(-capacity // 256) * 256
        options.n_batch = count * capacity
        options.n_ubatch = min(MICRO_BATCH, count * capacity)
        options.n_seq_max = count
        options.n_threads = options.n_threads_batch = self.threads
        options.kv_unified = False
        self.context = c.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp refuses {count} sequences of {capacity} tokens")
        self.memory = c.llama_get_memory(self.context)
        self.batch = c.llama_batch_init(count * capacity, 0, 1)
        self.length = 0

    def run(self, tokens: np.ndarray, every: bool) -> np.ndarray:
        """Logits [count, vocab] of the last tokens, or of all [count * length, vocab]."""
        count, length = tokens.shape
        batch, total = self.batch, tokens.size
        batch.n_tokens = total
        positions = np.tile(np.arange(self.length, self.length + length, dtype=np.int32), count)
        wanted = np.zeros((count, length), np.int8)
        wanted[:, 0 if every else length - 1 :] = 1
        as_array = np.ctypeslib.as_array
        as_array(batch.token, (total,))[:] = tokens.reshape(-1)
        as_array(batch.pos, (total,))[:] = positions
        as_array(batch.logits, (total,))[:] = wanted.reshape(-1)
        as_array(batch.n_seq_id, (total,))[:] = 1
        for token, sequence in enumerate(np.repeat(np.arange(count), length).tolist()):
            batch.seq_id[token][0] = sequence
        status = self.c.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode: status {status}")
        self.length += length
        rows = total if every else count
        # the first access waits for the computation
        return as_array(self.c.llama_get_logits(self.context), (rows, self.vocab))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        self.open(*tokens.shape)
        return self.run(tokens, True).copy()

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        return self.run(tokens, False)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self.run(tokens[:, None], False)

    def rewind(self, length: int) -> None:
        if length == 0:
            self.c.llama_memory_clear(self.memory, False)
        else:
            self.c.llama_memory_seq_rm(self.memory, -1, length, -1)
        self.length = length

    def fill(self, tokens: np.ndarray) -> None:
        self.run(tokens[:1], False)
        for sequence in range(1, len(tokens)):
            self.c.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)


if __name__ == "__main__":
    serve(LlamaCpp)
