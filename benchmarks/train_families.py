"""Train two small networks that are no LLaMAs, so that methods can be compared on them.

    python -m benchmarks.train_families OUT [--family gpt_neox|qwen3_moe] [--seed N]
                                        [--text FILE...] [--steps N | --minutes N] [--plain]

gpt_neox has LayerNorm, GELU without a gate, biases, a partial rotary embedding and a parallel
residual. qwen3_moe has 8 experts, of which a token takes 2, and norms of q and k. Each is written
to a folder of OUT (neox-small-s0, moe-small-s0) as `save_pretrained` writes it. training.json in
it says what was done and what came out. Each takes five to ten minutes on two cores.

The text is the documentation of this Python's standard library, without the paragraphs of the two
bundled texts, so that calibration.txt and heldout.txt stay unseen. --text adds files: the last
twentieth of each is held out. Half-way some channels of the residual stream are scaled at every
writer and training goes on, so that the activations have persistent outlier channels. With --plain
this is left out (neox-small-plain-s0): a network without made outliers. The same seed, steps, text,
machine and versions give the same bytes.

Needs the torch extra.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import singlequant as sq
from singlequant.files import write_file
from singlequant.sweep.text_file import read_text
from tools import train_bundled_model as bundled

from . import common
from .experiments import command as options

VOCABULARY = 2048
HELD_OUT = 1 / 20  # of each added text
LEAST_TOKENS = 20_000  # to train on
RECORD = "training.json"


# ---- the networks -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A family to train. Names are the ends of parameters' names, or of modules' names in sites.

    writers and readers of the residual stream map to the axis of its channels.
    """

    folder: str
    build: Callable[[Mapping[str, Any]], nn.Module]
    writers: Mapping[str, int]
    readers: Mapping[str, int]
    last_norm: str
    sites: Mapping[str, str]  # linear or block -> what reads its input
    steps: int
    loss: Mapping[str, Any] = field(default_factory=dict)  # arguments of a training step


def gpt_neox(common_options: Mapping[str, Any]) -> nn.Module:
    """A network of Pythia's kind with random weights."""
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        **common_options, num_hidden_layers=6, intermediate_size=1024, hidden_act="gelu",
        rotary_pct=0.25, use_parallel_residual=True, tie_word_embeddings=False))


def qwen3_moe(common_options: Mapping[str, Any]) -> nn.Module:
    """A network of Qwen3-MoE's kind with random weights."""
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **common_options, num_hidden_layers=4, num_key_value_heads=2, head_dim=64,
        moe_intermediate_size=256, intermediate_size=512, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, router_aux_loss_coef=0.01, tie_word_embeddings=True))


NETWORKS = {
    "gpt_neox": Network(
        "neox-small", gpt_neox,
        writers={"embed_in.weight": 1, "attention.dense.weight": 0, "attention.dense.bias": 0,
                 "dense_4h_to_h.weight": 0, "dense_4h_to_h.bias": 0},
        readers={"query_key_value.weight": 1, "dense_h_to_4h.weight": 1},
        last_norm="final_layer_norm", steps=500,
        sites={"query_key_value": "q, k, v", "dense": "o", "dense_h_to_4h": "up",
               "dense_4h_to_h": "down"}),
    "qwen3_moe": Network(
        "moe-small", qwen3_moe,
        writers={"embed_tokens.weight": 1, "o_proj.weight": 0, "experts.down_proj": 1,
                 "down_proj.weight": 0},
        readers={"q_proj.weight": 1, "k_proj.weight": 1, "v_proj.weight": 1, "mlp.gate.weight": 1,
                 "experts.gate_up_proj": 2, "gate_proj.weight": 1, "up_proj.weight": 1},
        last_norm="model.norm", steps=500, loss={"output_router_logits": True},
        sites={"q_proj": "q, k, v", "o_proj": "o", "mlp": "experts"}),
}


def build(network: Network, tokenizer: Any, seed: int) -> nn.Module:
    """The network with random weights of a seed."""
    torch.manual_seed(seed)
    return network.build({
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 256, "num_attention_heads": 4,
        "max_position_embeddings": bundled.WINDOW,
        "bos_token_id": tokenizer.token_to_id(bundled.BOS),
        "eos_token_id": tokenizer.token_to_id(bundled.EOS)})


# ---- text ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """What is trained on, and texts held out of it by name."""

    training: Sequence[bundled.Document]
    held_out: Mapping[str, str]


def read_texts(files: Sequence[Path]) -> Texts:
    """The standard library's documentation and the files, without what is held out."""
    held_out = {name: sq.bundled_text(name) for name in ("heldout", "calibration")}
    added = []
    for path in files:
        text = read_text(path)
        cut = text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT))) + 1
        if not text[:cut].strip() or not text[cut:].strip():
            raise ValueError(f"{path}: expected lines to train on and to hold out, found "
                             f"{len(text)} characters")
        if path.name in held_out:
            raise ValueError(f"--text: expected files of different names, found {path.name} twice")
        added.append(bundled.Document(path.name, text[:cut]))
        held_out[path.name] = text[cut:]
    aside = bundled.Document("held out", "\n\n".join(held_out.values()))
    documents = bundled.drop_repeats([aside, *bundled.collect_documents(), *added])
    return Texts(documents[1:], held_out)


# ---- training -----------------------------------------------------------------------------------


@dataclass
class Plan:
    """How a network is trained. A step takes batch tokens; lr falls by a cosine."""

    seed: int
    steps: int
    lr: float = 2e-3
    batch: int = 2048
    weight_decay: float = 0.1
    long_at: float = 0.9  # share of the steps in short windows
    outliers_at: float = 0.5  # share of the steps before the channels are scaled
    factors: Sequence[float] = (6.0, 8.0, 11.0, 14.0, 18.0, 24.0)


@torch.no_grad()
def scale_channels(network: Network, model: nn.Module, scale: Tensor) -> None:
    """Multiply channels of the residual stream where they are written, and settle the readers.

    The readers divide their columns, and the last norm serves the head. Each norm's weight grows
    as the length that it divides by, and its bias as the channel. So the function stays nearly the
    same, while the inputs of the linears carry channels larger by about their factor.
    """
    growth = scale.square().mean().sqrt()
    tied = model.config.tie_word_embeddings
    for name, p in model.named_parameters():
        writer = next((a for end, a in network.writers.items() if name.endswith(end)), None)
        reader = next((a for end, a in network.readers.items() if name.endswith(end)), None)
        if writer is not None:
            p.mul_(scale.view([-1 if axis == writer else 1 for axis in range(p.ndim)]))
        elif reader is not None:
            p.div_(scale.view([-1 if axis == reader else 1 for axis in range(p.ndim)]))
        elif f"{network.last_norm}.weight" in name:
            p.mul_(growth).div_(scale.square() if tied else scale)
        elif name.endswith("layernorm.weight"):
            p.mul_(growth)
        elif name.endswith("layernorm.bias"):
            p.mul_(scale)


def train_step(network: Network, model: nn.Module, optimizer: Any, ids: Tensor) -> float:
    """One step on a batch; its loss."""
    loss = model.train()(input_ids=ids, labels=ids, **network.loss).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train(network: Network, model: nn.Module, stream: Tensor, watched: Tensor,
          plan: Plan) -> dict[str, Any]:
    """Train in place and print the loss now and then; what the outliers did to the loss."""
    generator = torch.Generator().manual_seed(plan.seed)
    injection = int(plan.outliers_at * plan.steps)
    optimizer = bundled.make_optimizer(model, plan.weight_decay)
    found: dict[str, Any] = {}
    start, running = time.perf_counter(), None
    for step in range(plan.steps):
        if step == injection and plan.factors:
            found = make_outliers(network, model, watched, generator, plan)
            optimizer = bundled.make_optimizer(model, plan.weight_decay)  # its moments do not fit
        for group in optimizer.param_groups:
            group["lr"] = bundled.learning_rate(step, plan, injection)
        window = bundled.SHORT_WINDOW if step < plan.long_at * plan.steps else bundled.WINDOW
        loss = train_step(network, model, optimizer,
                          bundled.draw(stream, plan.batch, window, generator))
        running = loss if running is None else 0.95 * running + 0.05 * loss
        if (step + 1) % 100 == 0 or step + 1 == plan.steps:
            print(f"step {step + 1}/{plan.steps}  loss {running:.4f}  watched "
                  f"{bundled.mean_loss(model, watched):.4f}  {time.perf_counter() - start:.0f} s",
                  flush=True)
    return found


def make_outliers(network: Network, model: nn.Module, watched: Tensor,
                  generator: torch.Generator, plan: Plan) -> dict[str, Any]:
    """Scale channels drawn by the generator; the channels and the loss before and after."""
    channels = torch.randperm(model.config.hidden_size, generator=generator)[:len(plan.factors)]
    scale = torch.ones(model.config.hidden_size)
    scale[channels] = torch.tensor(plan.factors)
    before = bundled.mean_loss(model, watched)
    scale_channels(network, model, scale)
    after = bundled.mean_loss(model, watched)
    print(f"channels {channels.tolist()} scaled by {list(plan.factors)}: watched loss {before:.4f} "
          f"-> {after:.4f}", flush=True)
    return {"channels": channels.tolist(), "loss_before": before, "loss_after": after}


def steps_within(minutes: float, network: Network, tokenizer: Any, stream: Tensor,
                 plan: Plan) -> int:
    """How many steps take so many minutes here, from the time of a few steps on a trial network."""
    model = build(network, tokenizer, plan.seed)
    optimizer = bundled.make_optimizer(model, plan.weight_decay)
    generator = torch.Generator().manual_seed(plan.seed)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        train_step(network, model, optimizer,
                   bundled.draw(stream, plan.batch, bundled.SHORT_WINDOW, generator))
        seconds.append(time.perf_counter() - start)
    return max(20, int(60 * minutes / min(seconds)))


# ---- figures ------------------------------------------------------------------------------------


@torch.no_grad()
def channel_peaks(network: Network, model: nn.Module, windows: Tensor) -> dict[str, list[float]]:
    """Largest over median channel rms of the inputs of each kind, one figure a layer."""
    peaks: dict[str, list[float]] = {site: [] for site in network.sites.values()}
    handles = []

    def watch(site: str, module: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rms = inputs[0].flatten(0, -2).square().mean(0).sqrt()
            peaks[site].append((rms.max() / rms.median()).item())
        handles.append(module.register_forward_pre_hook(hook))

    for name, module in model.named_modules():
        site = network.sites.get(name.rsplit(".", 1)[-1])
        if site:
            watch(site, module)
    model.eval()(input_ids=windows)
    for handle in handles:
        handle.remove()
    return peaks


def evaluate(network: Network, folder: Path, held_out: Mapping[str, str]) -> dict[str, Any]:
    """Figures of the folder as it lies there: perplexities of the texts, outlier ratios."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = bundled.tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    windows = {name: bundled.cut_windows(torch.tensor(tokenizer.encode(text).ids))
               for name, text in held_out.items()}
    perplexity = {name: math.exp(bundled.mean_loss(model, w)) for name, w in windows.items()
                  if len(w)}
    peaks = channel_peaks(network, model, windows["heldout"][:16])
    for name, value in perplexity.items():
        print(f"perplexity of {name}: {value:.2f} ({len(windows[name])} windows of "
              f"{bundled.WINDOW} tokens)")
    for site, values in peaks.items():
        print(f"peak / median channel rms into {site}: " + " ".join(f"{v:.1f}" for v in values))
    return {"perplexity": perplexity, "peaks": peaks}


# ---- the command --------------------------------------------------------------------------------


def train_folder(family: str, texts: Texts, arguments: argparse.Namespace) -> Path:
    """Train a network and write its folder, which is returned."""
    network = NETWORKS[family]
    kind = "-plain" if arguments.plain else ""
    folder = arguments.out / f"{network.folder}{kind}-s{arguments.seed}"
    tokenizer = bundled.train_tokenizer([d.text for d in texts.training], VOCABULARY)
    stream = bundled.encode(tokenizer, list(texts.training))
    if len(stream) < LEAST_TOKENS:
        raise ValueError(f"expected at least {LEAST_TOKENS} tokens of text to train on, found "
                         f"{len(stream)} in this Python's documentation: add some with --text")
    watched = bundled.cut_windows(torch.tensor(tokenizer.encode(texts.held_out["heldout"]).ids))
    plan = Plan(arguments.seed, arguments.steps or network.steps)
    if arguments.plain:
        plan.outliers_at, plan.factors = 1.0, ()
    if arguments.minutes is not None:
        plan.steps = steps_within(arguments.minutes, network, tokenizer, stream, plan)
    model = build(network, tokenizer, plan.seed)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{family}, seed {plan.seed}: {parameters:,} parameters, {len(stream):,} tokens of text, "
          f"{plan.steps} steps of {plan.batch} tokens", flush=True)
    start, cpu_start = time.perf_counter(), time.process_time()
    outliers = train(network, model, stream, watched[:8], plan)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    print(f"training took {seconds:.0f} s, {cpu_seconds:.0f} CPU s, with "
          f"{torch.get_num_threads()} threads")
    bundled.save_folder(model, tokenizer, folder)
    figures = evaluate(network, folder, texts.held_out)
    write_file(folder / RECORD, json.dumps({
        "family": family, "architecture": type(model).__name__, "parameters": parameters,
        "tokens": len(stream), "plan": asdict(plan), "seconds": seconds,
        "cpu_seconds": cpu_seconds, "threads": torch.get_num_threads(), "outliers": outliers,
        **figures, "torch": torch.__version__, "transformers": transformers.__version__,
        "texts": ["standard library", *(path.name for path in arguments.text)],
        "environment": common.environment(arguments.argv)}, indent=1) + "\n")
    print(f"written {folder}\n", flush=True)
    return folder


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.bare_parser(__doc__, "")
    parser.prog = "python -m benchmarks.train_families"
    parser.add_argument("out", metavar="OUT", type=Path, help="where the folders are written")
    parser.add_argument("--family", choices=NETWORKS, help="one of them (default: both)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE",
                        help="more text to train on")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=options.positive, metavar="N",
                        help="(default: the network's own number)")
    length.add_argument("--minutes", type=common.seconds, metavar="N",
                        help="as many steps as take about so long here; the output names them")
    parser.add_argument("--threads", type=options.positive, default=2, metavar="N",
                        help="(default %(default)s)")
    parser.add_argument("--plain", action="store_true", help="make no outlier channels")
    return options.parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    with options.errors_of("train_families"):
        texts = read_texts(arguments.text)
        for family in [arguments.family] if arguments.family else NETWORKS:
            train_folder(family, texts, arguments)


if __name__ == "__main__":
    main()
