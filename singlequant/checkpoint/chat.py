# SPDX-License-Identifier: Apache-2.0
"""Chat templates: a conversation as the text that a model was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from .._C import FormatError
from ..files import MAX_TEMPLATE_BYTES, is_present, read_json, require_size
from .special_tokens import special_tokens
from .template_process import TemplateError, TemplateProcess
from .tools import tool_schema

__all__ = ["ChatTemplateError", "chat_templates", "reads_roles", "render_chat"]

TEMPLATE_FILE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja
PROCESSOR_FILE = "chat_template.json"  # older folders of multimodal models
DEFAULT, TOOL_USE = "default", "tool_use"
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing
MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' own, behind the message to continue

_process = TemplateProcess()


class ChatTemplateError(ValueError):
    """A template that refuses a conversation: it raised an error of its own."""


def render_chat(
    checkpoint,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> str:
    """The text of a conversation under a folder's chat template, as transformers renders it.

    tools: JSON schemas, or functions with type hints and a docstring. chat_template: the name of
    one of the folder's templates, or a template. add_generation_prompt opens the assistant's turn;
    it is on unless continue_final_message leaves the last message open, or the field of it that a
    string names. Other variables, such as enable_thinking, go to the template.
    ValueError that names the file; ChatTemplateError when the template itself refuses.
    """
    template, file = _choose(checkpoint, chat_template, tools)
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    if add_generation_prompt and continue_final_message:
        raise ValueError("continue_final_message: expected no add_generation_prompt beside it")
    chat = _messages(messages)
    opened = _open_final(chat, continue_final_message, template, file)
    given = {
        **special_tokens(checkpoint).named,
        **variables,  # come before special tokens of their name
        "messages": chat,
        "tools": None if tools is None else [tool_schema(t) for t in _listed("tools", tools)],
        "documents": _documents(documents),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        text = _process.render(template, _plain("variables", given))
    except TemplateError as error:
        kind = ChatTemplateError if error.refused else ValueError
        raise kind(f"{file}: chat template: {_one_line(str(error))}") from None
    return text if opened is None else _cut_behind(text, opened, file)


# ---- which template -----------------------------------------------------------------------------


def chat_templates(checkpoint) -> tuple[dict[str, str], Path]:
    """The folder's templates by name and the file that tells of them; {} if it has none.

    chat_template.jinja and additional_chat_templates/ come before tokenizer_config.json, and this
    comes before chat_template.json. FormatError for a file that holds something else.
    """
    folder = checkpoint.path
    files = {path.stem: path for path in sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))}
    if is_present(folder / TEMPLATE_FILE):
        files[DEFAULT] = folder / TEMPLATE_FILE
    if files:
        file = files.get(DEFAULT, folder / NAMED_TEMPLATES)
        return {name: _read_template(path) for name, path in files.items()}, file
    config, processor = folder / "tokenizer_config.json", folder / PROCESSOR_FILE
    found = checkpoint.tokenizer_config.get("chat_template")
    if found is not None or not is_present(processor):
        return _named(found, config), config
    return _named(read_json(processor).get("chat_template"), processor), processor


def reads_roles(checkpoint) -> bool:
    """Whether the folder's template tells messages apart by their roles."""
    return "role" in _choose(checkpoint, None, None)[0]


def _read_template(path: Path) -> str:
    is_present(path)
    require_size(path, MAX_TEMPLATE_BYTES, "a template")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: expected text in UTF-8, found {error}") from None


def _named(value: Any, file: Path) -> dict[str, str]:
    """A template, {name: template} or [{"name": ..., "template": ...}] as a dict."""
    if value is None:
        return {}
    if isinstance(value, str):
        value = {DEFAULT: value}
    elif isinstance(value, list) and all(isinstance(t, dict) for t in value):
        pairs = [(t.get("name"), t.get("template")) for t in value]
        value = dict(pairs) if all(isinstance(name, str) for name, _ in pairs) else None
    if not isinstance(value, dict) or not all(isinstance(t, str) for t in value.values()):
        raise FormatError(f"{file}: chat_template: expected a template or named templates, "
                          "found something else")
    for template in value.values():
        if len(template) > MAX_TEMPLATE_BYTES:
            raise FormatError(f"{file}: chat_template: expected at most {MAX_TEMPLATE_BYTES} "
                              f"characters, found {len(template)}")
    return value


def _choose(checkpoint, asked: str | None, tools: Any) -> tuple[str, Path | str]:
    """The template to render and what an error names."""
    templates, file = chat_templates(checkpoint)
    if isinstance(asked, str) and asked in templates:
        return templates[asked], _file_of(file, asked)
    if asked is not None:
        if not isinstance(asked, str):
            raise ValueError(f"chat_template: expected a text, found {asked!r:.80}")
        if "{" in asked:  # a template, not a name
            return asked, "chat_template"
        raise ValueError(f"chat_template: expected a template or one of "
                         f"{', '.join(sorted(templates)) or 'none'} ({file}), found {asked!r}")
    if not templates:
        raise ValueError(f"{checkpoint.path}: expected chat_template.jinja or a chat_template in "
                         "tokenizer_config.json, found neither")
    name = TOOL_USE if tools is not None and TOOL_USE in templates else DEFAULT
    if name not in templates:
        raise ValueError(f"{file}: chat_template: expected one named {DEFAULT}, found "
                         f"{', '.join(sorted(templates))}")
    return templates[name], _file_of(file, name)


def _file_of(file: Path, name: str) -> Path:
    """The file of a template: files in the folder of named ones have one each."""
    own = (file if file.name == NAMED_TEMPLATES else file.parent / NAMED_TEMPLATES)
    return own / f"{name}.jinja" if file.suffix != ".json" and name != DEFAULT else file


# ---- what a template sees -----------------------------------------------------------------------


def plain_data(value: Any) -> Any:
    """value of plain Python types only: what a template sees has no methods of its own.

    Dataclasses and pydantic models become dicts. Anything else becomes the name of its type.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, np.generic):
        return plain_data(value.item())
    for base in (str, int, float):  # an enum, for one
        if isinstance(value, base):
            return getattr(base, f"__{base.__name__}__")(value)
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        kind = list if isinstance(value, list) else tuple
        return kind(plain_data(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return plain_data(value.model_dump())
    return f"<{type(value).__name__}>"


def _listed(name: str, values: Any) -> list[Any]:
    """The values as a list. ValueError for what has no order, or is none of them itself."""
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected a list, found {type(values).__name__}")
    return list(values)


def _plain(name: str, values: Any) -> Any:
    """`plain_data`; ValueError for values that have no end."""
    try:
        return plain_data(values)
    except RecursionError:
        raise ValueError(f"{name}: expected less nesting") from None


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as dicts of their own, without what is None, reasoning under all its names."""
    given = _listed("messages", messages)
    chat = _plain("messages", given)
    if not chat:
        raise ValueError("messages: expected at least one, found none")
    for index, message in enumerate(chat):
        if not isinstance(message, dict):
            raise ValueError(f"messages: expected a dict at {index}, found "
                             f"{type(given[index]).__name__}")
        message = {key: value for key, value in message.items() if value is not None}
        said = next((message[name] for name in REASONING if name in message), None)
        if said is not None:
            message = {"thinking": said, **message, "reasoning_content": said}
        chat[index] = message
    return chat


def _documents(documents: Any) -> list[dict[str, Any]] | None:
    found = None if documents is None else _listed("documents", documents)
    for index, document in enumerate(found or ()):
        if not isinstance(document, dict):
            raise ValueError(f"documents: expected a dict at {index}, found "
                             f"{type(document).__name__}")
    return found


# ---- the last message, left open ----------------------------------------------------------------


def _open_final(
    chat: list[dict[str, Any]], wanted: bool | str, template: str, file: Any
) -> str | None:
    """Marks the end of the last message and returns its text; None unless it is wanted."""
    if not wanted:
        return None
    field, last = wanted if isinstance(wanted, str) else "content", chat[-1]
    if (final := last.get(field)) is None:
        raise ValueError(f"continue_final_message: expected a last message with {field!r}, found "
                         "none")
    fields = [f for f in REASONING if last.get(f) == final] if field in REASONING else [field]
    if not any(f in template for f in fields):
        raise ValueError(f"continue_final_message: expected a template that reads {field!r}: "
                         f"{file}")
    if not isinstance(final, (list, tuple)):
        last.update(dict.fromkeys(fields, str(final) + MARK))
        return str(final)
    for block in reversed(final):
        if isinstance(block, dict) and "text" in block:
            text, block["text"] = block["text"], block["text"] + MARK
            return text
    raise ValueError("continue_final_message: expected a text in the last message, found none")


def _cut_behind(text: str, final: str, file: Any) -> str:
    """text up to the mark, which goes; spaces that the template cut off the message go as well."""
    at = text.rfind(MARK.strip())
    if at < 0 or final.strip() not in text:
        raise ValueError(f"{file}: chat template: continue_final_message: expected the last "
                         "message in the text, found that the template changes it")
    return text[:at] if text.startswith(MARK, at) else text[:at].rstrip()


def _one_line(message: str) -> str:
    """A template's message without what could disturb a terminal."""
    line = " ".join(message.split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)[:400]
