# SPDX-License-Identifier: Apache-2.0
"""Renders chat templates in a process of its own, whose time and memory are bounded.

A template is a program that somebody else wrote. jinja2's sandbox keeps it from the machine, but
not from looping or from asking for memory. Nothing inside one process can stop both. So this file
is two things: a module for the parent, and the script that the child runs. The script imports the
standard library and jinja2 only.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 10  # of one conversation, the start of the process included
MEMORY_BYTES = 512 << 20  # beyond what the child has before it renders
PER_BYTE = 16  # bytes of memory and characters of text for each byte of messages
TEXT_CHARACTERS = 1 << 18  # of the text, beyond those for the messages
MESSAGE_CHARACTERS = 300  # of a template's own error
SIZE = struct.Struct("<Q")  # in front of what goes through a pipe
FILENAME = "<template>"  # jinja2's name of a template that is no file


class TemplateError(ValueError):
    """A template that did not give a text. refused: the template, or jinja2, said no itself."""

    def __init__(self, message: str, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused


# ---- the parent ---------------------------------------------------------------------------------


class TemplateProcess:
    """A child that renders one template after the other. It starts with the first one.

    A child that reached a bound is ended; the next template gets a new one. Threads take turns.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._inherited: list[Any] = []
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text of a template over variables of plain Python data; TemplateError."""
        request = pickle.dumps((template, variables), protocol=4)
        with self._lock:
            try:
                status, text = self._ask(request)
            except BaseException:
                self.close(kill=True)
                raise
            if status == "spent":
                self.close(kill=True)  # with all that it holds
            if status != "text":
                raise TemplateError(text, refused=status == "refused")
            return text

    def _ask(self, request: bytes) -> tuple[str, str]:
        deadline = time.monotonic() + SECONDS
        if self._child is None:
            self._child = _start()
        with contextlib.suppress(BrokenPipeError):  # a child that died is named below
            self._child.stdin.write(SIZE.pack(len(request)) + request)
            self._child.stdin.flush()
        try:
            size = SIZE.unpack(self._read(SIZE.size, deadline))[0]
            return tuple(json.loads(self._read(size, deadline)))
        except TimeoutError:
            raise TemplateError(f"took more than {SECONDS} s", refused=False) from None
        except EOFError:
            status = self._child.wait(timeout=SECONDS)
            if status == -signal.SIGXCPU:
                raise TemplateError(f"took more than {SECONDS} s", refused=False) from None
            raise TemplateError(f"its process ended with status {status}", refused=False) from None

    def _read(self, size: int, deadline: float) -> bytes:
        """Exactly size bytes; TimeoutError behind the deadline, EOFError if the child ends."""
        pipe, parts = self._child.stdout.fileno(), []
        while size:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([pipe], [], [], left)[0]:
                raise TimeoutError
            part = os.read(pipe, min(size, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def close(self, kill: bool = False) -> None:
        """Ends the child, if there is one."""
        child, self._child = self._child, None
        if child is None:
            return
        if kill:
            child.kill()
        with contextlib.suppress(OSError):
            child.stdin.close()  # it ends at the end of its input
        child.stdout.close()
        child.wait()

    def _forget(self) -> None:
        """In a forked process: the child is the other's. Its object is kept, or it would warn."""
        self._inherited.append(self._child)
        self._child, self._lock = None, threading.Lock()


def _start() -> subprocess.Popen[bytes]:
    folders = []
    for name in ("jinja2", "markupsafe"):
        found = importlib.util.find_spec(name)
        if found is None:
            raise ImportError(f"chat templates need {name}: pip install {name}")
        folders.append(str(Path(found.origin).parents[1]))
    return subprocess.Popen([sys.executable, "-I", "-S", __file__, *folders],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL)


# ---- the child ----------------------------------------------------------------------------------


def serve(folders: list[str]) -> None:
    """Answers requests on standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.path += folders
    environment = make_environment()
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "r+b") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    own = _address_bytes()
    compiled = functools.lru_cache(maxsize=8)(environment.from_string)
    while head := requests.read(SIZE.size):
        request = requests.read(SIZE.unpack(head)[0])
        if own is not None:
            _limit(resource.RLIMIT_AS, own + MEMORY_BYTES + PER_BYTE * len(request))
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + SECONDS + 1)
        answer = json.dumps(_answer(compiled, request)).encode()
        answers.write(SIZE.pack(len(answer)) + answer)
        answers.flush()


def _address_bytes() -> int | None:
    """Bytes of this process' address space; None on macOS, which does not limit it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return None


def _limit(what: int, value: int) -> None:
    """Lowers or raises a soft limit, within the hard one."""
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _answer(compiled: Callable[[str], Any], request: bytes) -> tuple[str, str]:
    """("text", the text), or why there is none: "refused", "failed" or, out of memory, "spent"."""
    import jinja2

    try:
        template, variables = pickle.loads(request)
        text = compiled(template).render(variables)
        limit = TEXT_CHARACTERS + PER_BYTE * len(request)
        if len(text) > limit:
            return "failed", f"wrote {len(text)} characters, more than the {limit} allowed"
        return "text", text
    except MemoryError:
        return "spent", f"asked for more than {MEMORY_BYTES >> 20} MiB of memory"
    except RecursionError:
        return "failed", "is nested too deeply"
    except jinja2.TemplateError as error:
        return "refused", _place(error) + str(error.message)[:MESSAGE_CHARACTERS]
    except Exception as error:  # a template is foreign code: it may fail in any way
        text = str(error)[:MESSAGE_CHARACTERS]
        return "failed", f"{_place(error)}{type(error).__name__}: {text}"


def _place(error: Exception) -> str:
    """'line 3: ', when it is known."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILENAME:
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f"line {line}: "


def make_environment() -> Any:
    """The sandbox that transformers renders chat templates in, with its filters and functions."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: what the assistant says. It marks, and changes nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
               sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        **_safe_types(),
    }
    return environment


def _safe_types() -> dict[str, Any]:
    """namespace and dict, without ways to what Python keeps behind names with underscores."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class PlainNamespace(Namespace):
        """A namespace without names that begin with an underscore."""

        def __init__(*arguments: Any, **values: Any) -> None:  # a value may be named self
            self, arguments = arguments[0], arguments[1:]
            values = dict(*arguments, **values)
            for name in values:
                _check_name(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            Namespace.__setitem__(self, name, value)

    class Dict:
        """dict, without what the type itself would open."""

        def __call__(self, *arguments: Any, **values: Any) -> dict[Any, Any]:
            return dict(*arguments, **values)

        def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
            return dict.fromkeys(*arguments)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(
                f"namespace: expected a name without an underscore in front, found {name!r}")

    return {"namespace": PlainNamespace, "dict": Dict()}


if __name__ == "__main__":
    serve(sys.argv[1:])
