"""Templates that loop, allocate or fail: one line in bounded time and memory."""

import os
import threading

import pytest
from chat_cases import HELLO, SYSTEM, adapter, rendered

import singlequant as sq
from singlequant._C import FormatError
from singlequant.checkpoint import template_process
from singlequant.checkpoint.chat import ChatTemplateError, _process
from singlequant.cli.main import main
from singlequant.runtime import render_chat

MEMORY_BOMBS = {
    "doubling": "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}"
                "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "times": "{{ messages[0].content * 10000000000 }}",
    "list": "{{ [0] * 10000000000 }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "indent": "{{ [1, [2]] | tojson(indent=10000000000) }}",
    "replace": "{% set x = 'a' * 1000000 %}{{ x | replace('a', x) }}",
    "text": "{% for i in range(1000) %}{{ 'a' * 100000 }}{% endfor %}",
}
TIME_BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "power": "{{ 10 ** 1000000000 }}",
    "power-later": "{{ (messages | length + 9) ** 1000000000 }}",
}
DEEP_BOMBS = {
    "calls": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "nested": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "ifs": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
}


@pytest.mark.parametrize("template", [*MEMORY_BOMBS.values(), *DEEP_BOMBS.values()],
                         ids=[*MEMORY_BOMBS, *DEEP_BOMBS])
def test_template_that_takes_all_memory_is_one_line(model, template):
    with pytest.raises(ValueError, match="chat_template.jinja: chat template: ") as error:
        rendered(model, template)
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)
    assert rendered(model, "{{ messages[0].content }}") == "hi"


@pytest.mark.parametrize("template", TIME_BOMBS.values(), ids=TIME_BOMBS)
def test_template_that_takes_for_ever_is_ended(model, template, monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 1)
    with pytest.raises(ValueError, match="chat_template.jinja: chat template: took more than 1 s"):
        rendered(model, template)
    monkeypatch.undo()
    assert rendered(model, "{{ messages[0].content }}") == "hi"


def test_bomb_ends_the_command_and_a_task(model, capsys, monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 1)
    (model / "chat_template.jinja").write_text(TIME_BOMBS["loops"])
    assert main(["generate", str(model), "--chat", "--prompt", "x"]) == 2
    assert "took more than 1 s" in capsys.readouterr().err
    with pytest.raises(ValueError, match="took more than 1 s"):
        adapter(model).apply_chat_template([SYSTEM, HELLO])


def test_long_conversation_is_no_bomb(model):
    messages = [{"role": "user", "content": "a fox " * 1_000_000}]
    assert rendered(model, "{{ messages[0].content }}", messages) == messages[0]["content"]


def test_large_template_is_named(model):
    with pytest.raises(FormatError, match="chat_template.jinja: expected a template of at most"):
        rendered(model, "x" * (1 << 20) + "x")


@pytest.mark.parametrize(("template", "named"), [
    ("a\n{{ 1 / 0 }}", "line 2: ZeroDivisionError"),
    ("a\n\n{% if %}", "line 3: "),
    ("{{ raise_exception('no \x1b[31m\n' ~ 'x' * 9999) }}", r"line 1: no \\x1b\[31m x"),
    ("{{ ''.__class__.mro() }}", "unsafe"),
    ("{% set ns = namespace(_x=1) %}", "underscore"),
    ("{% set ns = namespace(a=1) %}{% set ns._x = 1 %}", "underscore"),
    ("{% include 'x' %}", "loader"),
])
def test_error_of_a_template_is_one_line(model, template, named):
    with pytest.raises(ValueError, match=f"chat_template.jinja: chat template: .*({named})") as e:
        rendered(model, template)
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 600


def test_refusal_is_told_from_failure(model):
    with pytest.raises(ChatTemplateError):
        rendered(model, "{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match="ZeroDivisionError") as error:
        rendered(model, "{{ 1 / 0 }}")
    assert not isinstance(error.value, ChatTemplateError)


def test_process_that_dies_is_replaced(model):
    assert rendered(model, "a") == "a"
    _process._child.kill()
    with pytest.raises(ValueError, match="ended with status -9"):
        rendered(model, "b")
    assert rendered(model, "b") == "b"


def test_threads_take_turns(model):
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    checkpoint, found = sq.load_checkpoint(model), {}

    def render(i):
        found[i] = render_chat(checkpoint, [{"role": "user", "content": str(i)}])

    threads = [threading.Thread(target=render, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: str(i) for i in range(8)}


def test_forked_process_has_a_child_of_its_own(model):
    assert rendered(model, "parent") == "parent"
    pid = os.fork()
    if pid == 0:
        os._exit(0 if rendered(model, "{{ 1 + 1 }}") == "2" else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert rendered(model, "parent") == "parent"
