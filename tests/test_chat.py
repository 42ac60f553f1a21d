"""Chat templates: the text that transformers renders, which template, the command and tasks."""

import json
import sys
from dataclasses import dataclass
from enum import Enum

import pytest
from chat_cases import (
    CONVERSATIONS,
    DESCRIBED,
    DOCUMENTS,
    EXPECTED,
    SPECIAL,
    SYSTEM,
    TEMPLATES,
    TOOL,
    USER,
    adapter,
    need_transformers,
    rendered,
    set_config,
    transformers_text,
    undated,
)
from conftest import write_json

import singlequant as sq
from singlequant._C import FormatError
from singlequant.checkpoint.chat import ChatTemplateError, plain_data
from singlequant.cli.main import main
from singlequant.runtime import render_chat

STORED = json.loads(EXPECTED.read_text("utf-8"))


# ---- the text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_transformers(model, name):
    (model / "chat_template.jinja").write_text(TEMPLATES[name], "utf-8")
    checkpoint = sq.load_checkpoint(model)
    for said, (messages, options) in CONVERSATIONS.items():
        expected = STORED[f"{name}/{said}"]
        if expected is None:
            with pytest.raises(ValueError, match="chat template|continue_final_message"):
                render_chat(checkpoint, messages, **options)
        else:
            assert undated(render_chat(checkpoint, messages, **options)) == expected, said


@pytest.mark.parametrize("name", TEMPLATES)
def test_stored_texts_are_transformers(name):
    need_transformers()
    for said, (messages, options) in CONVERSATIONS.items():
        text = transformers_text(TEMPLATES[name], messages, options)
        assert (None if text is None else undated(text)) == STORED[f"{name}/{said}"], said


def test_messages_of_other_kinds_are_plain_to_a_template(model):
    class Role(str, Enum):
        USER = "user"

    @dataclass
    class Message:
        role: Role
        content: str
        name: None = None

    class Pydantic:
        def model_dump(self):
            return {"role": "user", "content": "two"}

    template = "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ thing }}{{ sys }}"
    text = rendered(model, template, [Message(Role.USER, "one"), Pydantic()], thing=open, sys=sys)
    assert text == ('{"role": "user", "content": "one"}{"role": "user", "content": "two"}'
                    "<builtin_function_or_method><module>")
    assert plain_data((1, [True])) == (1, [True])


def test_callers_messages_stay_as_they_are(model):
    messages = [{"role": "assistant", "content": [{"text": "It"}], "reasoning": "Hm", "x": None}]
    before = json.dumps(messages)
    rendered(model, "{{ messages[0].content[0].text }}", messages, continue_final_message=True)
    assert json.dumps(messages) == before


ENDLESS = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(("arguments", "named"), [
    ({"messages": []}, "messages"),
    ({"messages": ["hi"]}, "messages: expected a dict at 0, found str"),
    ({"messages": USER, "documents": ["x"]}, "documents"),
    ({"messages": USER, "tools": ["x"]}, "tools"),
    ({"messages": USER, "add_generation_prompt": True, "continue_final_message": True},
     "add_generation_prompt"),
    ({"messages": USER, "continue_final_message": "thinking"}, "thinking"),
    ({"messages": [{"role": "user"}], "continue_final_message": True}, "content"),
    ({"messages": USER, "chat_template": "tool_usee"}, "one of default"),
    ({"messages": USER, "chat_template": 5}, "chat_template: expected a text, found 5"),
    ({"messages": None}, "messages: expected a list, found NoneType"),
    ({"messages": USER[0]}, "messages: expected a list, found dict"),
    ({"messages": {"hi"}}, "messages: expected a list, found set"),
    ({"messages": iter([5])}, "messages: expected a dict at 0, found int"),
    ({"messages": USER, "documents": 5}, "documents: expected a list, found int"),
    ({"messages": USER, "tools": 5}, "tools: expected a list, found int"),
    ({"messages": USER, "tools": {"name": "f"}}, "tools: expected a list, found dict"),
    ({"messages": USER, "variable": ENDLESS}, "variables: expected less nesting"),
])
def test_bad_arguments_are_named(model, arguments, named):
    with pytest.raises(ValueError, match=named):
        rendered(model, "{{ messages[0].content }}", **arguments)


# ---- which template -----------------------------------------------------------------------------

NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"},
         {"name": "rag", "template": "R{{ documents[0].title }}"}]


def named_files(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text("D")
    for value in NAMED[1:]:
        path = folder / "additional_chat_templates" / f"{value['name']}.jinja"
        path.write_text(value["template"])
    set_config(folder, chat_template="never")  # files come first, all of them


@pytest.mark.parametrize("write", [
    lambda folder: set_config(folder, chat_template=NAMED),
    lambda folder: set_config(folder, chat_template={t["name"]: t["template"] for t in NAMED}),
    named_files,
    lambda folder: write_json(folder / "chat_template.json", {"chat_template": NAMED}),
])
def test_named_templates(model, write):
    write(model)
    checkpoint = sq.load_checkpoint(model)
    assert render_chat(checkpoint, USER) == "D"
    assert render_chat(checkpoint, USER, tools=[TOOL]) == "T"
    assert render_chat(checkpoint, USER, tools=[]) == "T"
    assert render_chat(checkpoint, USER, tools=[TOOL], chat_template="default") == "D"
    assert render_chat(checkpoint, USER, documents=DOCUMENTS, chat_template="rag") == "RPenguins"
    assert render_chat(checkpoint, USER, chat_template="{{ 1 + 1 }}") == "2"


def test_order_of_the_files(model):
    write_json(model / "chat_template.json", {"chat_template": "json"})
    assert render_chat(sq.load_checkpoint(model), USER) == "json"
    set_config(model, chat_template="config")
    assert render_chat(sq.load_checkpoint(model), USER) == "config"
    assert rendered(model, "file") == "file"


def test_templates_without_a_default_are_named(model):
    set_config(model, chat_template=NAMED[1:])
    with pytest.raises(ValueError, match=r"tokenizer_config.json.* default, found rag, tool_use"):
        render_chat(sq.load_checkpoint(model), USER)
    assert render_chat(sq.load_checkpoint(model), USER, tools=[]) == "T"


@pytest.mark.parametrize("value", [5, [5], [{"name": "default"}], {"default": 1}, [["default"]]])
def test_templates_that_are_none_are_named(model, value):
    set_config(model, chat_template=value)
    with pytest.raises(FormatError, match="tokenizer_config.json: chat_template"):
        render_chat(sq.load_checkpoint(model), USER)


def test_quantized_folder_keeps_all_templates(model, tmp_path, text):
    named_files(model)
    write_json(model / "chat_template.json", {"chat_template": "json"})
    config = sq.QuantConfig(scheme="w4a16", weights="rtn", calibration_tokens=64)
    out = tmp_path / "out"
    partial = tmp_path / "out.partial" / "additional_chat_templates"
    partial.mkdir(parents=True)  # left by an interrupt
    (partial / "old.jinja").write_text("x")
    write_json(partial.parent / "singlequant-journal.json",
               {"out": "out", "files": ["additional_chat_templates/old.jinja"], "layers": {}})
    sq.quantize_folder(model, out, config, text)
    assert sorted(p.name for p in (out / "additional_chat_templates").iterdir()) == [
        "rag.jinja", "tool_use.jinja"]
    assert (out / "chat_template.json").is_file()
    assert render_chat(sq.load_checkpoint(out), USER, tools=[TOOL]) == "T"


# ---- the command and tasks ----------------------------------------------------------------------


def test_command_takes_system_tools_and_variables(model, tmp_path, capsys):
    (model / "chat_template.jinja").write_text(TEMPLATES["qwen3"] + "{{ tools[0].function.name }}")
    tools = tmp_path / "tools.json"
    write_json(tools, [TOOL])
    loaded = sq.load(model)
    tokens = loaded.chat_tokens([{"role": "system", "content": "Be brief"}, *USER], tools=[TOOL],
                                enable_thinking=False)
    assert loaded.tokenizer.decode(tokens).endswith("<think>\n\n</think>\n\nweather")
    options = ["--max-new-tokens", "4", "--prompt", "hi"]
    assert main(["generate", str(model), "--chat", "--system", "Be brief", "--tools", str(tools),
                 "--chat-template-kwargs", '{"enable_thinking": false}', *options]) == 0
    expected = loaded.decode_after(tokens, loaded.generate(tokens, max_new_tokens=4))
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(("options", "named"), [
    (["--system", "x"], "--system: expected --chat"),
    (["--chat", "--chat-template-kwargs", "{"], "--chat-template-kwargs: expected JSON"),
    (["--chat", "--chat-template-kwargs", "[1]"], "expected a JSON object, found list"),
    (["--chat", "--chat-template-kwargs", '{"tools": 1}'], "found tools"),
    (["--chat", "--chat-template-kwargs", '{"self": 1}'], "found self"),
    (["--chat", "--chat-template-kwargs", '{"documents": 5}'], "documents: expected a list"),
    (["--chat", "--tools", "none.json"], "none.json"),
    (["--chat", "--chat-template-kwargs", '{"chat_template": "{{ none_of_this }}"}'],
     "prompt 0: expected at least one token"),
])
def test_bad_options_of_the_command_are_named(model, options, named, capsys):
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert main(["generate", str(model), "--prompt", "x", *options]) == 2
    assert named in capsys.readouterr().err


def test_task_renders_as_transformers_does(model):
    (model / "chat_template.jinja").write_text(TEMPLATES["qwen3"])
    history = [*USER, {"role": "assistant", "content": "It is"}]
    assert adapter(model, enable_thinking=False).apply_chat_template(USER).endswith(
        "assistant\n<think>\n\n</think>\n\n")
    opened = adapter(model).apply_chat_template(history, add_generation_prompt=False)
    assert opened == rendered(model, TEMPLATES["qwen3"], history, continue_final_message=True)
    assert opened.endswith("<think>\n\n</think>\n\nIt is")


def test_task_goes_without_a_system_message_that_is_refused(model, caplog):
    (model / "chat_template.jinja").write_text(TEMPLATES["gemma"])
    face = adapter(model)
    assert face.apply_chat_template([SYSTEM, *USER]) == face.apply_chat_template(USER)
    assert "system" in caplog.text
    with pytest.raises(ChatTemplateError, match="alternate"):
        face.apply_chat_template([*USER, *USER])


def test_task_takes_bos_from_the_special_tokens_map(model):
    set_config(model, remove=tuple(SPECIAL))
    write_json(model / "special_tokens_map.json", SPECIAL)
    assert adapter(model).prefix_token_id == 0


@pytest.mark.parametrize("stop", ["{0}", "{0}{1}", "{0}\n"])
def test_task_stops_at_a_special_token(model, stop):
    loaded = sq.load(model)
    prompt = loaded.encode("the quick").tolist()
    sampling = {"max_new_tokens": 20, "temperature": 8.0}
    new = loaded.generate(prompt, **sampling, stop_tokens=())
    values = json.loads((model / "tokenizer.json").read_text())
    names = {token: text for text, token in values["model"]["vocab"].items()}
    at = next(i for i, token in enumerate(new)
              if i > 2 and token not in new[:i] and names[token].isalpha()
              and names[token].isascii() and token > 1)
    special, following = names[new[at]], loaded.tokenizer.decode([new[at + 1]])
    assert special not in loaded.decode_after(prompt, new[:at])
    values["added_tokens"].append({**DESCRIBED, "id": new[at], "content": special, "special": True})
    write_json(model / "tokenizer.json", values)
    face = adapter(model)
    until = [stop.format(special, following)]
    text = face._continue([prompt], until, sampling, 0)[0]
    whole = face.model.decode_after(prompt, new)
    before = face.model.decode_after(prompt, new[:at])
    assert text == (whole if stop.endswith("\n") else before)


def test_task_stops_at_a_token_that_the_decoder_writes_otherwise(model):
    """As a decoder makes spaces of the marks in <|end▁of▁text|>."""
    loaded = sq.load(model)
    prompt = loaded.encode("the quick").tolist()
    sampling = {"max_new_tokens": 20, "temperature": 8.0}
    new = loaded.generate(prompt, **sampling, stop_tokens=())
    values = json.loads((model / "tokenizer.json").read_text())
    names = {token: text for text, token in values["model"]["vocab"].items()}
    at = next(i for i, token in enumerate(new)
              if i > 2 and token not in new[:i] and "\u0120" in names[token])
    content = names[new[at]]
    assert content not in loaded.decode_after(prompt, new)
    values["added_tokens"].append({**DESCRIBED, "id": new[at], "content": content,
                                   "special": True})
    write_json(model / "tokenizer.json", values)
    face = adapter(model)
    assert face._continue([prompt], [content], sampling, 0)[0] == face.model.decode_after(
        prompt, new[:at])


def test_options_of_a_task_that_are_null_are_as_if_not_given(model):
    face = adapter(model)
    given = {"until": ["a", ""], "temperature": None, "top_p": None, "max_gen_toks": None,
             "do_sample": None}
    assert face._generation(given) == face._generation({"until": "a"})
    with pytest.raises(ValueError, match=r"until: expected texts, got \[5\]"):
        face._generation({"until": [5]})
