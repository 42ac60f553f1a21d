#!/usr/bin/env python3
"""Make the demonstration model and the two texts that lie in ``singlequant/data``.

    python tools/train_bundled_model.py                 # everything (some ten minutes)
    python tools/train_bundled_model.py --texts-only    # texts only (seconds)
    python tools/train_bundled_model.py --evaluate      # evaluation of the folder that is there

The only source is the documentation of the running Python's own standard library: the docstrings
of its modules (found with ``ast``; nothing is imported) and the language reference in
``pydoc_data/topics.py``. The product is a small LLaMA-architecture network with a byte-level BPE
tokenizer. Part-way through training a few channels of its residual stream are scaled up, so that
its activations have the persistent outlier channels of large language models, which such a small
network would not grow by itself, and which make plain 4-bit rounding fail.

Needs torch, transformers, tokenizers and safetensors; the package itself needs none of them.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import hashlib
import inspect
import math
import pathlib
import platform
import re
import sysconfig
import time
from collections.abc import Iterator

import tokenizers
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
WINDOW = 512  # tokens, in evaluation and at the end of training
SHORT_WINDOW = 256  # tokens, in the greater part of training

# Folders and files of the standard library whose text is left out: tests, programs installed for
# convenience, and data tables.
SKIPPED_PARTS = {
    "__pycache__", "ensurepip", "idle_test", "lib2to3", "pip", "setuptools", "site-packages",
    "dist-packages", "test", "tests", "_vendor",
}
HELDOUT_CHARS, CALIBRATION_CHARS = 125_000, 160_000
LARGEST_ASIDE = 15_000  # longer documents are always trained on, so no one of them fills a split

QUANTIZED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Document:
    """The text of one module or topic."""

    name: str
    text: str


# ---------------------------------------------------------------- text

def normalize(text: str) -> str:
    """Clean indentation, drop e-mail addresses, trailing blanks and runs of empty lines."""
    text = inspect.cleandoc(text)
    text = re.sub(r"<?[\w.+-]+@[\w-]+(\.[\w-]+)+>?", "", text)
    text = "".join(c for c in text if c == "\n" or c.isprintable())
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of a module and of its classes and functions, in source order."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, holders)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = normalize(ast.get_docstring(node, clean=False) or "")
        if text:
            yield text


def foreign_copyright(source: str) -> bool:
    """Whether a source file carries a copyright notice that does not name the PSF."""
    notice = r"[Cc]opyright(?:Text)?\W+(?:\([Cc]\)|\d{4}|by\b|[A-Z]\w+ [A-Z]|CNRI)|\([Cc]\) \d{4}"
    notices = re.findall(f".*(?:{notice}).*", source)
    return any(not re.search("Python Software Foundation|PSF", line) for line in notices)


def collect_documents() -> list[Document]:
    """Read the standard library's docstrings (one document a module) and reference topics."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_PARTS.intersection(parts):
            continue
        source = path.read_bytes()
        if foreign_copyright(source.decode("latin-1")):
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        if parts == ("pydoc_data", "topics"):
            table = next(node.value for node in tree.body if isinstance(node, ast.Assign))
            topics = ast.literal_eval(table)
            documents += [Document(f"topic:{k}", normalize(v)) for k, v in sorted(topics.items())]
        else:
            text = "\n\n".join(dict.fromkeys(docstrings(tree)))
            documents.append(Document(".".join(parts), text))
    return [document for document in documents if document.text]


def drop_repeats(documents: list[Document]) -> list[Document]:
    """Keep the first copy of each paragraph, whatever its line breaks and indentation."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in document.text.split("\n\n"):
            key = " ".join(paragraph.split()).lower()
            if key not in seen:
                paragraphs.append(paragraph)
                seen.add(key)
        text = "\n\n".join(paragraphs).strip("\n")
        if text.strip():
            kept.append(Document(document.name, text))
    return kept


def split_documents(documents: list[Document]) -> dict[str, list[Document]]:
    """Deal whole documents, in the order of the hash of their names, to the three splits.

    No paragraph is in two splits: the held-out text keeps its copy and the others lose theirs.
    """
    def rank(document: Document) -> str:
        return hashlib.sha256(document.name.encode()).hexdigest()

    documents = sorted(documents, key=rank)
    small = [document for document in documents if len(document.text) <= LARGEST_ASIDE]
    large = [document for document in documents if len(document.text) > LARGEST_ASIDE]
    splits: dict[str, list[Document]] = {"heldout": [], "calibration": [], "train": []}
    sizes = {"heldout": 0, "calibration": 0}
    limits = {"heldout": HELDOUT_CHARS, "calibration": CALIBRATION_CHARS}
    for document in drop_repeats(small + large):
        split = next((name for name, limit in limits.items() if sizes[name] < limit), "train")
        splits[split].append(document)
        if split != "train":
            sizes[split] += len(document.text)
    return splits


def join(documents: list[Document]) -> str:
    """Return the text of one split."""
    return "\n\n".join(document.text for document in documents) + "\n"


# ---------------------------------------------------------------- tokenizer

def train_tokenizer(texts: list[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Byte-level BPE; it adds no special tokens by itself."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOS, EOS], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, documents: list[Document]) -> Tensor:
    """One stream of tokens: each document between a beginning and an end token."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    stream: list[int] = []
    for document in documents:
        stream += [bos, *tokenizer.encode(document.text).ids, eos]
    return torch.tensor(stream)


# ---------------------------------------------------------------- network and training

def build_model(tokenizer: tokenizers.Tokenizer) -> LlamaForCausalLM:
    """Return a network with random weights."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=192, intermediate_size=448,
        num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=WINDOW, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS), eos_token_id=tokenizer.token_to_id(EOS),
        attn_implementation="eager")  # the fastest on a CPU at this size
    return LlamaForCausalLM(config)


@torch.no_grad()
def add_outlier_channels(model: LlamaForCausalLM, channels: list[int],
                         factors: list[float]) -> None:
    """Scale channels of the residual stream where they are written, and settle the readers.

    Every writer (embedding, o_proj, down_proj) multiplies channel c by its factor s. The readers
    (q, k, v, gate, up) divide their column c by s, and the tied head, whose weight is the
    embedding itself, is served by dividing the last norm's weight by s squared. Each norm's
    weight is multiplied by the growth of the root mean square that it divides by. The loss then
    hardly moves, while the inputs of the linears carry channels larger by about s.
    """
    core = model.model
    scale = torch.ones(model.config.hidden_size)
    scale[channels] = torch.tensor(factors)
    growth = scale.square().mean().sqrt()
    core.embed_tokens.weight.mul_(scale)
    for layer in core.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.mul_(scale[:, None])
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj,
                       mlp.gate_proj, mlp.up_proj):
            reader.weight.div_(scale)
        layer.input_layernorm.weight.mul_(growth)
        layer.post_attention_layernorm.weight.mul_(growth)
    core.norm.weight.mul_(growth).div_(scale.square())


def make_optimizer(model: LlamaForCausalLM, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices but not norms."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)


def learning_rate(step: int, args: argparse.Namespace, injection: int) -> float:
    """Cosine to a twentieth, with a warm-up at the start and a shorter one after the outliers."""
    warmup, rewarm = max(1, args.steps // 25), max(1, args.steps // 50)
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / args.steps)))
    ramp = min(1.0, (step + 1) / warmup)
    if step >= injection:
        ramp = min(1.0, (step - injection + 1) / rewarm)
    return args.lr * cosine * ramp


def draw(stream: Tensor, tokens: int, window: int, generator: torch.Generator) -> Tensor:
    """A batch of windows at random places of the stream."""
    starts = torch.randint(len(stream) - window, (tokens // window,), generator=generator)
    return stream[starts[:, None] + torch.arange(window)]


def train(model: LlamaForCausalLM, stream: Tensor, watched: Tensor,
          args: argparse.Namespace) -> None:
    """Train in place; ``watched`` are windows whose loss is printed now and then."""
    generator = torch.Generator().manual_seed(args.seed)
    injection = int(args.outliers_at * args.steps)
    optimizer = make_optimizer(model, args.weight_decay)
    start, running = time.perf_counter(), None
    for step in range(args.steps):
        if step == injection:
            channels = torch.randperm(model.config.hidden_size, generator=generator)
            chosen = channels[:len(args.factors)].tolist()
            before = mean_loss(model, watched)
            add_outlier_channels(model, chosen, args.factors)
            print(f"outlier channels {chosen} scaled by {args.factors}: watched loss "
                  f"{before:.4f} -> {mean_loss(model, watched):.4f}", flush=True)
            optimizer = make_optimizer(model, args.weight_decay)  # old moments no longer fit
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args, injection)
        window = SHORT_WINDOW if step < args.long_at * args.steps else WINDOW
        ids = draw(stream, args.batch * WINDOW, window, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not args.full_precision):
            loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            print(f"step {step + 1}/{args.steps}  loss {running:.4f}  watched "
                  f"{mean_loss(model, watched[:16]):.4f}  {time.perf_counter() - start:.0f} s",
                  flush=True)


# ---------------------------------------------------------------- evaluation

@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Mean negative log-likelihood in nats of all but the first token of each window."""
    model.eval()
    losses = [model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(8)]
    return sum(losses) / len(windows)


def cut_windows(tokens: Tensor) -> Tensor:
    """Cut tokens into whole windows; the last piece is dropped."""
    return tokens[:len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


def hadamard(n: int) -> Tensor:
    """Orthonormal Hartley (odd part of n) kron Sylvester-Hadamard (its power of two)."""
    odd = n // (n & -n)
    angle = 2 * math.pi / odd * torch.outer(torch.arange(odd), torch.arange(odd)).double()
    matrix = angle.cos() + angle.sin()
    while len(matrix) < n:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return (matrix / math.sqrt(n)).float()


def round_int4(x: Tensor) -> Tensor:
    """Symmetric 4-bit rounding of each row, returned as floats."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
    return (x / scale).round().clamp(-7, 7) * scale


class FakeQuantLinear(nn.Module):
    """A linear layer with simulated 4-bit weights and activations, in a rotated basis or not."""

    def __init__(self, linear: nn.Linear, rotation: Tensor | None) -> None:
        super().__init__()
        self.rotation = rotation
        weight = linear.weight.detach()
        self.weight = round_int4(weight if rotation is None else weight @ rotation)

    def forward(self, x: Tensor) -> Tensor:
        rotated = x if self.rotation is None else x @ self.rotation
        return nn.functional.linear(round_int4(rotated), self.weight)


def quantized_copy(model: LlamaForCausalLM, rotate: bool) -> LlamaForCausalLM:
    """Return a copy whose decoder linears are all simulated in 4 bits."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name in QUANTIZED:
                if hasattr(block, name):
                    linear = getattr(block, name)
                    rotation = hadamard(linear.in_features) if rotate else None
                    setattr(block, name, FakeQuantLinear(linear, rotation))
    return model


@torch.no_grad()
def divergence(model: LlamaForCausalLM, other: LlamaForCausalLM, windows: Tensor) -> float:
    """Mean KL divergence in nats per token, from ``model`` to ``other``."""
    total = 0.0
    for window in windows.split(8):
        p = model(input_ids=window).logits.float().log_softmax(-1)
        q = other(input_ids=window).logits.float().log_softmax(-1)
        total += (p.exp() * (p - q)).sum(-1).mean().item() * len(window)
    return total / len(windows)


@torch.no_grad()
def channel_peaks(model: LlamaForCausalLM, windows: Tensor) -> dict[str, list[float]]:
    """Largest over median channel rms at the inputs of the linears, one figure a layer."""
    sites = {"q_proj": "q, k, v", "o_proj": "o", "gate_proj": "gate, up", "down_proj": "down"}
    peaks: dict[str, list[float]] = {label: [] for label in sites.values()}
    handles = []

    def watch(label: str, linear: nn.Linear) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rms = inputs[0].flatten(0, -2).square().mean(0).sqrt()
            peaks[label].append((rms.max() / rms.median()).item())
        handles.append(linear.register_forward_pre_hook(hook))

    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in sites:
            watch(sites[name.rsplit(".", 1)[-1]], module)
    model(input_ids=windows)
    for handle in handles:
        handle.remove()
    return peaks


def evaluate(folder: pathlib.Path, heldout: str) -> None:
    """Print held-out perplexity, outlier figures, the simulated W4A4 check and samples."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    windows = cut_windows(torch.tensor(tokenizer.encode(heldout).ids))
    loss = mean_loss(model, windows)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    print(f"held-out perplexity: {math.exp(loss):.3f} (loss {loss:.4f}; {windows.shape[0]} windows "
          f"of {WINDOW}; {windows.shape[0] * (WINDOW - 1):,} predictions; fp16 weights, fp32 sums)")
    for label, peaks in channel_peaks(model, windows[:16]).items():
        print(f"peak / median channel rms into {label}: " + " ".join(f"{p:.1f}" for p in peaks))
    kl = {}
    for label, rotate in (("plain RTN", False), ("Hadamard, RTN", True)):
        other = quantized_copy(model, rotate)
        kl[label] = divergence(model, other, windows)
        print(f"simulated W4A4, {label}: KL {kl[label]:.4f} nats a token, perplexity "
              f"{math.exp(mean_loss(other, windows)):.3f}")
    print(f"KL ratio, plain RTN to Hadamard: {kl['plain RTN'] / kl['Hadamard, RTN']:.1f}")
    torch.manual_seed(0)
    for prompt in ("Return the", "Create a new", "The ", "This module"):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80,
                             do_sample=True, temperature=0.7, top_k=40, pad_token_id=1)
        print(f"--- sample: {tokenizer.decode(out[0].tolist(), skip_special_tokens=True)}")


# ---------------------------------------------------------------- files

def save_folder(model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer,
                folder: pathlib.Path) -> None:
    """Write what ``save_pretrained`` writes: configuration, fp16 weights, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS,
                            model_max_length=WINDOW).save_pretrained(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = pathlib.Path(__file__).resolve().parent.parent / "singlequant" / "data"
    parser.add_argument("--output", type=pathlib.Path, default=default, help="the data folder")
    parser.add_argument("--name", default="stdlib-llama", help="model folder inside it")
    parser.add_argument("--texts-only", action="store_true", help="write the texts and stop")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the folder and stop")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=4, help=f"windows of {WINDOW} a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.2)
    parser.add_argument("--outliers-at", type=float, default=0.6, help="fraction of the steps")
    parser.add_argument("--long-at", type=float, default=0.9,
                        help=f"fraction of the steps done on windows of {SHORT_WINDOW}")
    parser.add_argument("--factors", type=float, nargs="+", default=[6.0, 9.0, 14.0, 20.0])
    parser.add_argument("--full-precision", action="store_true",
                        help="train without autocasting products to bfloat16")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    folder = args.output / args.name
    if args.evaluate:
        evaluate(folder, (args.output / "heldout.txt").read_text(encoding="utf-8"))
        return
    splits = split_documents(collect_documents())
    args.output.mkdir(parents=True, exist_ok=True)
    for name, documents in splits.items():
        text = join(documents)
        print(f"{name}: {len(documents)} documents, {len(text.encode()):,} bytes")
        if name != "train":
            (args.output / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
    if args.texts_only:
        return
    tokenizer = train_tokenizer([d.text for d in splits["train"]], args.vocabulary)
    stream = encode(tokenizer, splits["train"])
    watched = cut_windows(encode(tokenizer, splits["calibration"]))
    model = build_model(tokenizer)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}; {sum(p.numel() for p in model.parameters()):,} parameters; "
          f"{len(stream):,} training tokens; {args.steps * args.batch * WINDOW:,} seen", flush=True)
    start = time.perf_counter()
    train(model, stream, watched, args)
    print(f"training took {time.perf_counter() - start:.0f} s")
    save_folder(model, tokenizer, folder)
    evaluate(folder, join(splits["heldout"]))


if __name__ == "__main__":
    main()
