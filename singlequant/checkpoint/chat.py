# SPDX-License-Identifier: Apache-2.0
"""Chat templates: a conversation as the text that a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime


def render_chat(checkpoint, messages: Sequence[dict[str, str]]) -> str:
    """Chat template of a folder (chat_template.jinja or tokenizer_config.json) over messages."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    config = checkpoint.tokenizer_config
    file = checkpoint.path / "chat_template.jinja"
    try:
        template = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8, found {error}") from None
    if isinstance(template, list):  # several named ones
        template = next((t.get("template") for t in template
                         if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(template, str):
        raise ValueError(f"{checkpoint.path}: expected chat_template.jinja or a chat_template in "
                         "tokenizer_config.json, found neither")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    special = {k: (v.get("content", "") if isinstance(v, dict) else v)
               for k, v in config.items() if k.endswith("_token") and v}
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, **special
        )
    except Exception as error:  # a template is foreign code: it may fail in any way
        raise ValueError(f"{checkpoint.path}: chat template: {error}") from None
