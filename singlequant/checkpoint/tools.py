# SPDX-License-Identifier: Apache-2.0
"""Tools of a conversation: JSON schemas, and Python functions described as JSON schemas."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["tool_schema"]

SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
TYPES = {**{kind: {"type": name} for kind, name in SCALARS.items()}, list: {"type": "array"},
         tuple: {"type": "array"}, dict: {"type": "object"}, Any: {}}
# Google's sections of a docstring, and one argument of "Args:" with lines indented deeper
SECTION = re.compile(r"\s*^\s*(Args|Returns|Raises):", re.MULTILINE)
ARGUMENT = re.compile(r"""
(?:^|\n)([ \t]*)(\w+)(?:[ \t]*\([^()\n]*\))?:\s*
(.*?)\s*(?=\n(?!\1[ \t])[ \t]*\w+(?:[ \t]*\([^()\n]*\))?:|\Z)""", re.DOTALL | re.VERBOSE)
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schema(tool: Any) -> Any:
    """A tool as a template reads it. A function's type hints and docstring make its schema.

    The docstring is Google's kind: what the function does, and each argument under `Args:`.
    ValueError names what is missing.
    """
    if isinstance(tool, Mapping):
        return tool
    if not (inspect.isfunction(tool) or inspect.ismethod(tool)):
        raise ValueError(f"tools: expected JSON schemas or functions, found {type(tool).__name__}")
    name, doc = tool.__name__, (inspect.getdoc(tool) or "").strip()
    if not doc:
        raise ValueError(f"tools: {name}: expected a docstring, found none")
    sections = _sections(doc)
    properties, required, returns = _parameters(tool)
    described = _arguments(sections.get("Args", ""))
    for argument, schema in properties.items():
        if argument not in described:
            raise ValueError(f"tools: {name}: expected a line for {argument} under Args: in the "
                             "docstring, found none")
        text = described[argument]
        if choices := CHOICES.search(text):
            schema["enum"] = _choices(choices.group(1), f"tools: {name}: {argument}")
            text = text[: choices.start()].strip()
        schema["description"] = text
    parameters = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    function = {"name": name, "description": sections["description"], "parameters": parameters}
    if returns is not None:
        if "Returns" in sections:
            returns["description"] = sections["Returns"]
        function["return"] = returns
    return {"type": "function", "function": function}


def _sections(doc: str) -> dict[str, str]:
    """Parts of a docstring by the word in front; "description" comes first."""
    parts = SECTION.split(doc)
    found = {"description": parts[0].strip()}
    for word, text in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(word, text if word == "Args" else text.strip())
    return found


def _arguments(text: str) -> dict[str, str]:
    lines = "\n".join(line for line in text.split("\n") if line.strip())
    return {name: re.sub(r"\s*\n+\s*", " ", said.strip())
            for _, name, said in ARGUMENT.findall(lines)}


def _choices(text: str, place: str) -> list[Any]:
    try:
        return [c.strip() if isinstance(c, str) else c for c in json.loads(text)]
    except (TypeError, ValueError):
        raise ValueError(f"{place}: choices: expected a JSON list, found {text!r:.80}") from None


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, Any], list[str], Any]:
    """({argument: schema}, those without a default, the schema of what is returned or None)."""
    hints, signature = get_type_hints(function), inspect.signature(function).parameters
    properties, required = {}, []
    for index, (name, parameter) in enumerate(signature.items()):
        place = f"tools: {function.__name__}: {name}"
        if index == 0 and name in ("self", "cls") and name not in hints:
            continue
        if name not in hints:
            raise ValueError(f"{place}: expected a type hint, found none")
        properties[name] = _type_schema(hints[name], place)
        if parameter.default is inspect.Parameter.empty:
            required.append(name)
    try:
        return properties, required, _type_schema(hints["return"], "return")
    except (KeyError, ValueError):  # nobody generates what a tool returns
        return properties, required, None


def _type_schema(hint: Any, place: str) -> dict[str, Any]:
    """The JSON schema of a type hint."""
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _values_schema([member.value for member in hint], place)
    if origin is None and hint in TYPES:
        return dict(TYPES[hint])
    if origin is Literal:
        return _values_schema(list(arguments), place)
    if origin is Union or origin is types.UnionType:
        return _union_schema(arguments, place)
    if origin is list:
        return {"type": "array", "items": _type_schema(arguments[0], place)}
    if origin is tuple and len(arguments) > 1 and ... not in arguments:
        return {"type": "array", "prefixItems": [_type_schema(a, place) for a in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type_schema(arguments[1], place)}
    raise ValueError(f"{place}: expected a type hint that JSON has, found {hint!r:.80}")


def _values_schema(values: list[Any], place: str) -> dict[str, Any]:
    kinds = list(dict.fromkeys(SCALARS.get(type(value)) for value in values))
    if not kinds or None in kinds:
        raise ValueError(f"{place}: expected values that JSON has, found {values!r:.80}")
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union_schema(arguments: tuple[Any, ...], place: str) -> dict[str, Any]:
    parts = [_type_schema(a, place) for a in arguments if a is not type(None)]
    if len(parts) == 1:
        schema = parts[0]
    elif all(part.keys() == {"type"} and isinstance(part["type"], str) for part in parts):
        kinds = sorted({part["type"] for part in parts})
        schema = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        schema = {"anyOf": parts}
    return {**schema, "nullable": True} if type(None) in arguments else schema
