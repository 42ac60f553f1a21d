# SPDX-License-Identifier: Apache-2.0
"""The command `generate`: continue prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

from .shared import add_command, add_kv_bits


def add(commands) -> None:
    """Add the command to the parser's."""
    c = add_command(commands, "generate", run, "Continue a prompt, streamed.")
    c.add_argument("model", metavar="MODEL_OR_OUT", type=Path)
    c.add_argument("--prompt", action="append", required=True,
                   help="may be repeated: a batch, printed when it is whole")
    c.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    c.add_argument("--temperature", type=float, default=0.0, metavar="T",
                   help="0 (default) takes the most likely token")
    c.add_argument("--top-k", type=int, default=0, metavar="K", help="0 (default): off")
    c.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 (default): off")
    c.add_argument("--seed", type=int, default=0, metavar="N")
    c.add_argument("--chat", action="store_true", help="put the prompt into the chat template")
    add_kv_bits(c)


def run(arguments: argparse.Namespace) -> None:
    """What the parsed command line asks for."""
    from ..runtime.generate import check_sampling, stream_text
    from ..runtime.open import load

    sampling = {
        "max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature,
        "top_k": arguments.top_k, "top_p": arguments.top_p, "seed": arguments.seed,
    }
    check_sampling(**sampling)
    model = load(arguments.model, arguments.kv_bits)
    if arguments.chat:
        prompts = [model.chat_tokens([{"role": "user", "content": p}]) for p in arguments.prompt]
        shown = [""] * len(prompts)
    else:
        prompts = [model.encode(p).tolist() for p in arguments.prompt]
        shown = arguments.prompt
    if len(prompts) > 1:
        for text, prompt, new in zip(shown, prompts, model.generate(prompts, **sampling),
                                     strict=True):
            print(f"{text}{model.decode_after(prompt, new)}\n")
        return
    to_text = stream_text(model, prompts[0])
    waiting = shown[0]  # the prompt appears with the first token: not before an error

    def show(_: int, token: int) -> None:
        nonlocal waiting
        print(waiting + to_text(token), end="", flush=True)
        waiting = ""

    model.generate(prompts[0], **sampling, on_token=show)
    print(waiting)
