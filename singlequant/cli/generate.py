# SPDX-License-Identifier: Apache-2.0
"""The command `generate`: continue prompts."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from .shared import add_command, add_dequantize, add_kv_bits, some_path

RENDER_OPTIONS = {"self", "checkpoint", "messages", "tools"}  # have a place of their own


def add(commands) -> None:
    """Add the command to the parser's."""
    c = add_command(commands, "generate", run, "Continue a prompt, streamed.")
    c.add_argument("model", metavar="MODEL_OR_OUT", type=some_path)
    c.add_argument("--prompt", action="append", required=True, type=utf8,
                   help="may be repeated: a batch, printed when it is whole")
    c.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    c.add_argument("--temperature", type=float, default=0.0, metavar="T",
                   help="0 (default) takes the most likely token")
    c.add_argument("--top-k", type=int, default=0, metavar="K", help="0 (default): off")
    c.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 (default): off")
    c.add_argument("--seed", type=int, default=0, metavar="N")
    c.add_argument("--chat", action="store_true", help="put the prompt into the chat template")
    c.add_argument("--system", metavar="TEXT", type=utf8,
                   help="with --chat: a system message in front")
    c.add_argument("--tools", type=some_path, metavar="FILE",
                   help="with --chat: a JSON list of tools that the model may call")
    c.add_argument("--chat-template-kwargs", metavar="JSON",
                   help="with --chat: variables of the template, as '{\"enable_thinking\": false}'")
    add_kv_bits(c)
    add_dequantize(c)


def utf8(argument: str) -> str:
    """An argument in UTF-8, where the locale made Python take its bytes for something else."""
    if argument.isascii() or not any("\ud800" <= c <= "\udfff" for c in argument):
        return argument
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:  # its user hears of it from the tokenizer
        return argument


def run(arguments: argparse.Namespace) -> None:
    """What the parsed command line asks for."""
    from ..runtime.generate import check_sampling
    from ..runtime.open import load
    from ..runtime.text_stream import stream_text

    sampling = {
        "max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature,
        "top_k": arguments.top_k, "top_p": arguments.top_p, "seed": arguments.seed,
    }
    check_sampling(**sampling)
    system, options = chat_options(arguments)
    model = load(arguments.model, arguments.kv_bits, arguments.dequantize)
    if arguments.chat:
        prompts = [model.chat_tokens([*system, {"role": "user", "content": p}], **options)
                   for p in arguments.prompt]
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

    model.generate(prompts, **sampling, on_token=show)
    print(waiting + to_text.finish())


def chat_options(arguments: argparse.Namespace) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """(messages in front of the prompt, options of `Model.chat_tokens`); ValueError without --chat.
    """
    given = {"--system": arguments.system, "--tools": arguments.tools,
             "--chat-template-kwargs": arguments.chat_template_kwargs}
    for option, value in given.items():
        if value is not None and not arguments.chat:
            raise ValueError(f"{option}: expected --chat beside it, found none")
    options: dict[str, Any] = {}
    if arguments.chat_template_kwargs is not None:
        options = parse_json(arguments.chat_template_kwargs, "--chat-template-kwargs", dict)
        reserved = options.keys() & RENDER_OPTIONS
        if reserved:
            raise ValueError(f"--chat-template-kwargs: expected variables of the template, found "
                             f"{', '.join(sorted(reserved))}")
    if arguments.tools is not None:
        text = arguments.tools.read_bytes()
        options["tools"] = parse_json(text, str(arguments.tools), list)
        if not all(isinstance(tool, dict) for tool in options["tools"]):
            raise ValueError(f"{arguments.tools}: expected a JSON list of objects")
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return system, options


def parse_json(text: str | bytes, source: str, kind: type) -> Any:
    """The JSON list or object in text. ValueError names the source."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected JSON, found: {error}") from None
    if not isinstance(value, kind):
        word = {dict: "object", list: "list"}[kind]
        raise ValueError(f"{source}: expected a JSON {word}, found {type(value).__name__}")
    return value
