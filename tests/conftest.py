# SPDX-License-Identifier: Apache-2.0
"""Fixtures: small random checkpoints as save_pretrained writes them, and the reference model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from singlequant import _C, _reference as reference
from singlequant.checkpoint.folder import Checkpoint, load_checkpoint
from singlequant.config import QuantConfig
from singlequant.rotations import Factor, SiteRotation
from singlequant.weights import PackedLinear, QuantizedLayer

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy one is no fault
hypothesis.settings.load_profile("any machine")
REFERENCE_MODEL = Path(__file__).resolve().parents[2] / "shared" / "models" / "lm25m"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
TEXT = """A rotation keeps every length. The quick brown fox jumps over the lazy dog, and the other
foxes of the forest rotate their tails: there is nothing that these rotations do not preserve."""
SENTENCES = "the quick brown fox rotates its tail. " * 200
MODEL_TYPES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral",
               "Qwen2ForCausalLM": "qwen2"}


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level BPE: <s>, </s>, 256 bytes and the merges of a short text, vocab at most."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", values)


def copy_golden(name: str, target: Path) -> Path:
    """A family's golden folder with a tokenizer, copied into `target`; its path."""
    families = Path(__file__).resolve().parent / "data" / "families"
    folder = target / name
    shutil.copytree(families / name, folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(families / file, folder / file)
    return folder


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2))


def edit_config(path: Path, remove: tuple[str, ...] = (), **values: Any) -> None:
    """Sets and removes keys of the folder's config.json."""
    config = json.loads((path / "config.json").read_text())
    write_json(
        path / "config.json", {k: v for k, v in {**config, **values}.items() if k not in remove}
    )


def make_checkpoint(
    path: Path,
    *,
    architecture: str = "LlamaForCausalLM",
    hidden: int = 64,
    intermediate: int = 96,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 320,
    tie: bool = True,
    dtype: str = "float16",
    shards: int = 1,
    rope_scaling: dict[str, Any] | None = None,
    seed: int = 0,
    bias: bool = False,
) -> Path:
    """Writes a random model folder as save_pretrained does and returns it.

    vocab must be at least 258 (256 bytes and two special tokens).
    """
    assert vocab >= 258, "the byte-level tokenizer needs 258 entries"
    path.mkdir(parents=True)
    d = head_dim or hidden // heads
    config = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES.get(architecture, "unknown"),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": tie,
        "torch_dtype": dtype,
        "vocab_size": vocab,
    }
    if architecture == "LlamaForCausalLM":
        config |= {"attention_bias": bias, "mlp_bias": bias}
    if architecture == "MistralForCausalLM":
        config["sliding_window"] = None
    if architecture == "Qwen2ForCausalLM":
        config |= {"sliding_window": 32, "use_sliding_window": False, "max_window_layers": 2}
    if head_dim:
        config["head_dim"] = head_dim
    write_json(path / "config.json", config)
    write_json(path / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    write_tokenizer(path, vocab)

    rng = np.random.default_rng(seed)

    def random(*shape: int, scale: float, mean: float = 0.0) -> np.ndarray:
        return (mean + scale * rng.standard_normal(shape)).astype(DTYPES[dtype])

    tensors = {
        "model.embed_tokens.weight": random(vocab, hidden, scale=0.5),
        "model.norm.weight": random(hidden, scale=0.1, mean=1.0),
    }
    if not tie:
        tensors["lm_head.weight"] = random(vocab, hidden, scale=hidden**-0.5)
    linears = {
        "self_attn.q_proj": (heads * d, hidden),
        "self_attn.k_proj": (kv_heads * d, hidden),
        "self_attn.v_proj": (kv_heads * d, hidden),
        "self_attn.o_proj": (hidden, heads * d),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    for i in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = random(hidden, scale=0.1, mean=1.0)
        for name, (n, k) in linears.items():
            tensors[f"model.layers.{i}.{name}.weight"] = random(n, k, scale=k**-0.5)
            if bias or (architecture == "Qwen2ForCausalLM" and name[-6:-5] in "qkv"):
                tensors[f"model.layers.{i}.{name}.bias"] = random(n, scale=0.1)
    write_weights(path, tensors, shards)
    return path


def write_weights(path: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    """model.safetensors, or shards of about equal counts and their index."""
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for s in range(shards):
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[s * len(names) // shards : (s + 1) * len(names) // shards]
        save_file({n: tensors[n] for n in chosen}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(path / "model.safetensors.index.json", index)


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """codes [n, k] in [-8, 7] -> words int32 [n, ceil(k / 8)] by the format's definition."""
    n, k = codes.shape
    nibbles = np.full((n, -(-k // 8) * 8), 8, np.uint32)
    nibbles[:, :k] = codes + 8
    words = (nibbles.reshape(n, -1, 8) << (4 * np.arange(8, dtype=np.uint32))).sum(axis=2)
    return words.astype(np.uint32).view(np.int32)


def random_factor(rng: np.random.Generator, order: int, hadamard: bool = True) -> Factor:
    """A Hadamard transform and 2 * order random Givens rotations (none of order 1)."""
    steps = 2 * order if order > 1 else 0
    first = rng.integers(0, order, steps)
    second = (first + rng.integers(1, max(order, 2), steps)) % order
    return Factor(order, hadamard, np.stack([first, second], 1), rng.uniform(-3, 3, steps))


def random_layer(
    checkpoint: Checkpoint,
    config: QuantConfig,
    index: int,
    *,
    orders: dict[str, tuple[int, int]] | None = None,
    clips: dict[str, float] | None = None,
    bits: dict[str, int] | None = None,
    seed: int = 0,
) -> tuple[QuantizedLayer, dict[str, np.ndarray]]:
    """A layer of random codes, scales and rotations of the given orders, and its codes by name.

    bits: of the codes by linear, without the layer's prefix; absent = 4.
    """
    rng = np.random.default_rng([seed, index])
    weights, packed, codes = checkpoint.layer(index), {}, {}
    dense = {f"{norm.name}.weight": norm.weight for norm in weights.norms.values()}
    for linear in weights.linears.values():
        n, k = linear.weight.shape
        if linear.bias is not None:
            dense[f"{linear.name}.bias"] = linear.bias
        if config.ignores(linear.name):
            dense[f"{linear.name}.weight"] = linear.weight
            continue
        width = (bits or {}).get(linear.name.split(".", 3)[-1], 4)
        codes[linear.name] = rng.integers(-(2 ** (width - 1)), 2 ** (width - 1), (n, k))
        groups = k // config.group_size if config.group_size else 1
        scales = rng.uniform(0.01, 0.1, (n, groups)).astype(np.float32)
        if config.group_size:  # as they are stored
            scales = scales.astype(ml_dtypes.bfloat16).astype(np.float32)
        words = (pack_codes(codes[linear.name]) if width == 4
                 else reference.pack(codes[linear.name], width))
        packed[linear.name] = PackedLinear(words, scales, (n, k), config.group_size, width)
    rotations = {
        site: SiteRotation(random_factor(rng, k1), random_factor(rng, k2))
        for site, (k1, k2) in (orders or {}).items()
    }
    return QuantizedLayer(index, packed, dense, rotations, clips or {}), codes


@pytest.fixture(autouse=True)
def _restore_runtime():
    """A test may change the number of threads and the kernel table: put them back."""
    threads, table = _C.get_num_threads(), _C.kernels()["active"]
    yield
    _C.set_num_threads(threads)
    _C.use_kernels(table)


@pytest.fixture(params=_C.kernels()["runnable"])
def table(request) -> str:
    """Runs the test on each kernel table of this machine; its name."""
    _C.use_kernels(request.param)
    return request.param


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers from the SEED of the test's module."""
    return np.random.default_rng(request.module.SEED)


@pytest.fixture
def both_thread_counts():
    """A function that returns a callable's results under 1 and 2 threads."""
    before = _C.get_num_threads()

    def run(function):
        results = []
        for count in (1, 2):
            _C.set_num_threads(count)
            results.append(function())
        return results

    yield run
    _C.set_num_threads(before)


@pytest.fixture(name="make_checkpoint")
def make_checkpoint_fixture() -> Callable[..., Path]:
    """The function make_checkpoint."""
    return make_checkpoint


@pytest.fixture
def model(tmp_path) -> Path:
    """A small random folder."""
    return make_checkpoint(tmp_path / "model")


@pytest.fixture
def source(model) -> Checkpoint:
    """The small random folder, opened."""
    return load_checkpoint(model)


@pytest.fixture
def out(tmp_path) -> Path:
    """Where a folder may be written."""
    return tmp_path / "out"


@pytest.fixture
def text(tmp_path) -> Path:
    """A text file of some thousand tokens."""
    path = tmp_path / "text.txt"
    path.write_text(SENTENCES)
    return path


@pytest.fixture(scope="session")
def reference_model() -> Path:
    """The 25.7M-parameter LLaMA that lies beside the repository, where there is one."""
    if not (REFERENCE_MODEL / "config.json").is_file():
        pytest.skip("needs the reference model beside the repository: shared/models/lm25m")
    return REFERENCE_MODEL
