"""torch models whose linears are ours, beside torch's own dynamic int8: speed, error and size.

    python -m benchmarks.torch_dynamic [--models bert,vit,llama] [--folder FOLDER] [--json FILE] \\
        [--keep]

It needs the torch extra. The models are of random weights, BERT-base's and ViT-base's widths with
fewer layers, and a LLaMA of like size. --folder takes a real causal language model in their place.
All variants of a model are measured in turn, several times, in one process, and a ratio is of the
medians of that run. The error is |y - y0| / |y0| of the model's first output y, where y0 is the
float32 model's. Weights of MB are those of the linears that were quantized. With
OMP_WAIT_POLICY=passive in the environment, torch's threads leave the CPUs between its operations.
"""

import argparse
import copy
import os
import warnings
from functools import partial
from pathlib import Path

from singlequant import _C, QuantConfig, bundled_text

from . import common

SCHEMES = ("w4a16", "w4a8", "w4a4")
MODELS = ("bert", "vit", "llama")
CALIBRATION_BATCHES = 8
KIND = "torch-dynamic"
VOCAB = 8192


def sizes(arguments):
    return {"hidden_size": arguments.width, "intermediate_size": 4 * arguments.width,
            "num_hidden_layers": arguments.layers, "num_attention_heads": arguments.width // 64}


def made_model(name, arguments):
    """(model, batch) of random weights; batch(generator) makes one batch."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    count, length = arguments.batch, arguments.tokens
    if name == "vit":
        model = t.ViTModel(t.ViTConfig(**sizes(arguments)))
        return model, lambda g: {"pixel_values": torch.randn(count, 3, 224, 224, generator=g)}
    if name == "bert":
        model = t.BertModel(t.BertConfig(vocab_size=VOCAB, **sizes(arguments)))
    else:
        model = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=VOCAB, **sizes(arguments)))
    return model, lambda g: {"input_ids": torch.randint(0, VOCAB, (count, length), generator=g)}


def real_model(arguments):
    """(model, batch) of a folder; batches are windows of the bundled text, drawn at random."""
    import torch
    import transformers as t

    model = t.AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32)
    tokenizer = t.AutoTokenizer.from_pretrained(arguments.folder)
    tokens = torch.tensor(tokenizer(bundled_text("calibration"))["input_ids"])
    count, length = arguments.batch, arguments.tokens

    def batch(generator):
        begins = torch.randint(0, len(tokens) - length, (count,), generator=generator)
        return {"input_ids": torch.stack([tokens[b : b + length] for b in begins])}

    return model, batch


def variants(model, batch):
    """By name, (model, bytes of the linears that it quantized)."""
    import torch

    from singlequant.integrations.torch import quantize_

    generator = torch.Generator().manual_seed(0)
    calibration = [batch(generator) for _ in range(CALIBRATION_BATCHES)]
    found, names = {}, []
    for scheme in SCHEMES:
        changed = copy.deepcopy(model)
        report = quantize_(changed, calibration, QuantConfig(scheme=scheme, bits=4))
        names = [linear.name for linear in report.linears]
        found[scheme] = changed, sum(linear.nbytes for linear in report.linears)
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    with warnings.catch_warnings():  # torch.ao is to move to a package of its own
        warnings.simplefilter("ignore")
        int8 = torch.ao.quantization.quantize_dynamic(model, set(names), dtype=torch.qint8)
    return {"float32": (model, 4 * weights), "torch int8": (int8, weights), **found}


def forward(model, batch):
    import torch

    with torch.inference_mode():
        return model(**batch)[0]


def bench_model(name, model, batch, seconds):
    """The rows of a model; prints them."""
    import torch

    models = variants(model.eval(), batch)
    test = batch(torch.Generator().manual_seed(1))
    expected = forward(model, test)
    times = common.interleave({key: partial(forward, found, test)
                               for key, (found, _) in models.items()}, seconds)
    rows = []
    print(f"\n{name}, {_C.get_num_threads()} threads: ms (quartiles), times the speed of torch "
          f"int8 and of float32, error, MB of linears")
    for key, (found, size) in models.items():
        error = float((forward(found, test) - expected).norm() / expected.norm())
        median = times[key]["median"]
        row = {"model": name, "variant": key, "error": error, "bytes": size, **times[key],
               "speed_of_int8": times["torch int8"]["median"] / median,
               "speed_of_float32": times["float32"]["median"] / median}
        rows.append(row)
        print(f"{key:<11}{1e3 * median:8.1f} ({1e3 * row['low']:.1f}-{1e3 * row['high']:.1f})  "
              f"{row['speed_of_int8']:5.2f}x {row['speed_of_float32']:5.2f}x  {error:.4f}  "
              f"{size / 1e6:.1f}", flush=True)
    return rows


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="of bert, vit and llama")
    parser.add_argument("--folder", help="a causal language model in place of the made ones")
    parser.add_argument("--width", type=int, default=768, help="channels, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1, help="sequences or images of a call")
    parser.add_argument("--tokens", type=int, default=128, help="of a sequence")
    parser.add_argument("--threads", type=int, default=_C.get_num_threads())
    parser.add_argument("--seconds", type=common.seconds, default=20.0, help="for each model")
    common.add_output(parser, KIND)
    arguments = parser.parse_args(argv)
    arguments.models = arguments.models.split(",")
    if not set(arguments.models) <= set(MODELS):
        parser.error(f"--models: expected some of {', '.join(MODELS)}, found "
                     f"{','.join(arguments.models)}")
    if arguments.width % 64 or arguments.width < 64:
        parser.error(f"--width: expected a multiple of 64, found {arguments.width}")
    return arguments


def main(argv=None):
    arguments = parse(argv)
    import torch

    environment = common.environment(argv) | {
        "torch": torch.__version__, "quantized_engine": torch.backends.quantized.engine,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set")}
    common.print_environment(environment)
    print(f"torch {torch.__version__}, int8 by {environment['quantized_engine']}, "
          f"OMP_WAIT_POLICY {environment['omp_wait_policy']}")
    torch.set_num_threads(arguments.threads)
    _C.set_num_threads(arguments.threads)
    rows = []
    for name in [arguments.folder] if arguments.folder else arguments.models:
        made = real_model(arguments) if arguments.folder else made_model(name, arguments)
        shown = Path(name).resolve().name if arguments.folder else name
        rows += bench_model(shown, *made, arguments.seconds)
    setting = ["folder"] * bool(arguments.folder)
    setting += ["passive"] * (environment["omp_wait_policy"].lower() == "passive")
    common.write_result({"environment": environment, "rows": rows}, arguments.json,
                        arguments.keep and "-".join([KIND, *setting]))


if __name__ == "__main__":
    main()
