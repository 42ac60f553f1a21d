"""Conversations that every template of data/chat renders, and what transformers makes of them.

`python tests/chat_cases.py` writes data/chat/expected.json with transformers.
"""

import json
from datetime import datetime
from pathlib import Path

import pytest

import singlequant as sq
from singlequant.harness.adapter import Adapter
from singlequant.runtime import render_chat

FOLDER = Path(__file__).parent / "data" / "chat"
EXPECTED = FOLDER / "expected.json"
TEMPLATES = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
DATES = ("%d %b %Y", "%B %d, %Y", "%Y-%m-%d", "%d %B %Y")  # what the templates write

USER = [{"role": "user", "content": "hi"}]
DESCRIBED = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False,
             "single_word": False}  # a token as special_tokens_map.json describes it

SYSTEM = {"role": "system", "content": "Be brief & <exact>.  "}
HELLO = {"role": "user", "content": " What's the weather in Zürich? 1 < 2 & \"it's\" é 🌤\n"}
ANSWER = {"role": "assistant", "content": "It is sunny.\n\nTake a hat. "}
MORE = {"role": "user", "content": "And tomorrow?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"type": "function", "id": "abcdefgh1", "function":
     {"name": "weather", "arguments": {"place": "Zürich <CH>", "days": 2, "exact": True}}}]}
RESULT = {"role": "tool", "tool_call_id": "abcdefgh1", "name": "weather",
          "content": '{"sky": "clear & "}'}
THOUGHT = {"role": "assistant", "content": "Sunny.", "reasoning": "July is warm."}
TAGGED = {"role": "assistant", "content": "<think>\nJuly is warm.\n</think>\n\nSunny."}
BLOCKS = {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image"},
                                      {"type": "text", "text": "what is it?"}]}
TOOL = {"type": "function", "function": {
    "name": "weather", "description": "Tell the weather's <forecast> & more", "parameters": {
        "type": "object", "properties": {
            "place": {"type": "string", "description": "Where (Zürich)"},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "days": {"type": ["integer", "null"]},
            "at": {"type": "array", "items": {"type": "number"}}},
        "required": ["place"]}}}
TIME = {"type": "function", "function": {
    "name": "time", "description": "Tell the time", "parameters": {"type": "object",
                                                                  "properties": {}}}}
DOCUMENTS = [{"title": "Penguins", "text": "They swim & <dive>."},
             {"text": "Zürich is in \"Switzerland\".", "title": "Cities"}]

# messages and options; add_generation_prompt is on unless said
CONVERSATIONS = {
    "hello": ([HELLO], {}),
    "no-prompt": ([HELLO], {"add_generation_prompt": False}),
    "system": ([SYSTEM, HELLO], {}),
    "turns": ([SYSTEM, HELLO, ANSWER, MORE], {}),
    "whole": ([HELLO, ANSWER], {"add_generation_prompt": False}),
    "continued": ([HELLO, ANSWER], {"continue_final_message": True}),
    "continued-system": ([SYSTEM, HELLO, {**ANSWER, "content": "It is"}],
                         {"continue_final_message": True}),
    "two-users": ([HELLO, MORE], {}),
    "unknown-role": ([HELLO, ANSWER, {"role": "critic", "content": "Hm."}], {}),
    "tools": ([SYSTEM, HELLO], {"tools": [TOOL, TIME]}),
    "no-tools": ([HELLO], {"tools": []}),
    "called": ([HELLO, CALL, RESULT], {"tools": [TOOL, TIME]}),
    "called-twice": ([SYSTEM, HELLO, {**CALL, "tool_calls": CALL["tool_calls"] * 2}, RESULT, RESULT,
                      ANSWER, MORE], {"tools": [TOOL]}),
    "builtin-tools": ([HELLO, CALL, RESULT], {"builtin_tools": ["weather", "python"]}),
    "short-id": ([HELLO, {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "id": "1"}]}, RESULT],
                 {}),
    "documents": ([HELLO], {"documents": DOCUMENTS}),
    "documents-tools": ([HELLO], {"documents": DOCUMENTS, "tools": [TOOL],
                                  "controls": {"citations": True}}),
    "thinking": ([HELLO], {"enable_thinking": True, "thinking": True}),
    "no-thinking": ([HELLO], {"enable_thinking": False, "reasoning_effort": "low"}),
    "thought": ([HELLO, THOUGHT, MORE], {}),
    "thought-last": ([HELLO, THOUGHT], {"add_generation_prompt": False}),
    "thought-continued": ([HELLO, THOUGHT], {"continue_final_message": "reasoning_content"}),
    "tagged": ([HELLO, TAGGED, MORE, TAGGED], {"add_generation_prompt": False}),
    "blocks": ([{"role": "system", "content": [{"type": "text", "text": "See."}]}, BLOCKS], {}),
    "blocks-continued": ([BLOCKS, {"role": "assistant", "content": [
        {"type": "text", "text": "A fox "}]}], {"continue_final_message": True}),
    "dated": ([HELLO], {"date_string": "1 Jan 2020", "model_identity": "You are Q.",
                        "bos_token": "<other>"}),
    "empty-content": ([{"role": "system", "content": ""}, {"role": "user", "content": ""}], {}),
    "extra-keys": ([{**HELLO, "name": "Ada", "weight": 0.5, "tags": ("a", "b")}], {}),
}


def set_config(folder, remove=(), **values):
    """Sets and removes keys of tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: v for key, v in config.items() if key not in remove}))


def rendered(folder, template, messages=USER, **options):
    """Text of messages under a template that becomes the folder's."""
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return render_chat(sq.load_checkpoint(folder), messages, **options)


def adapter(folder, **options):
    """The harness's face of a folder, without the harness."""
    return Adapter(sq.load(folder), progress=False, **options)


def need_transformers():
    """The module, or the test is skipped."""
    return pytest.importorskip("transformers", reason="needs the torch extra")


def undated(text: str) -> str:
    """text with today's date as DATE."""
    today = datetime.now()
    for form in sorted((today.strftime(form) for form in DATES), key=len, reverse=True):
        text = text.replace(form, "DATE")
    return text


def transformers_text(template, messages, options):
    """What transformers renders, None where it refuses. Options as in CONVERSATIONS."""
    from transformers import PreTrainedTokenizerFast

    class Tokens(PreTrainedTokenizerFast):
        def __init__(self):
            self.chat_template = template
            self.__dict__["_special_tokens_map"] = dict(SPECIAL)

    options = {"add_generation_prompt": not options.get("continue_final_message"), **options}
    try:
        return Tokens().apply_chat_template(messages, tokenize=False, **options)
    except Exception:  # jinja2's, or what a template's code raises
        return None


if __name__ == "__main__":
    found = {f"{name}/{said}": transformers_text(template, *conversation)
             for name, template in TEMPLATES.items()
             for said, conversation in CONVERSATIONS.items()}
    found = {name: None if text is None else undated(text) for name, text in found.items()}
    EXPECTED.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", "utf-8")
