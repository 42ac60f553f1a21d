"""Tools of a conversation that are Python functions."""

import json
from enum import Enum
from typing import Literal

import pytest
from chat_cases import need_transformers

from singlequant.checkpoint.tools import tool_schema


class Sky(Enum):
    CLEAR = "clear"
    GREY = "grey"


def weather(place: str, days: int | None = None, unit: Literal["C", "F"] = "C",
            at: list[float] = (), sky: Sky = Sky.CLEAR, more: dict[str, int] | None = None,
            kind: int | str = 1, pair: tuple[int, str] = (1, "a"), drink: str = "tea") -> str:
    """
    Tell the weather.

    It may be wrong.

    Args:
        place: Where, a city
            or a village
        days (int, optional): How many: a number
        unit: The unit
        at: Hours
        sky: What to expect
        more: Anything
        kind: A number or a name
        pair: Two
        drink: What to serve (choices: ["tea", "coffee "])

    Returns:
        The weather in words
    """
    return ""


class Station:
    def read(self):
        """Read it."""

    def bare(self, x: int) -> None:
        """
        Do nothing.

        Args:
            x: A number
        """


def no_docstring(x: int): ...


def no_hint(x):
    """Do.

    Args:
        x: A number
    """


def no_line(x: int):
    """Do."""


def odd_hint(x: set[int]):
    """Do.

    Args:
        x: Numbers
    """


def test_function_is_described_by_its_hints_and_docstring():
    function = tool_schema(weather)["function"]
    assert function["description"] == "Tell the weather.\n\nIt may be wrong."
    assert function["parameters"]["required"] == ["place"]
    properties = function["parameters"]["properties"]
    assert properties["place"] == {"type": "string", "description": "Where, a city or a village"}
    assert properties["days"] == {"type": "integer", "nullable": True,
                                  "description": "How many: a number"}
    assert properties["drink"]["enum"] == ["tea", "coffee"]
    assert properties["kind"]["type"] == ["integer", "string"]
    assert function["return"] == {"type": "string", "description": "The weather in words"}


@pytest.mark.parametrize("function", [weather, Station().read, Station().bare])
def test_functions_schema_is_transformers(function):
    need_transformers()
    from transformers.utils import get_json_schema

    assert json.dumps(tool_schema(function)) == json.dumps(get_json_schema(function))


@pytest.mark.parametrize("function", [no_docstring, no_hint, no_line, odd_hint, "x", Station])
def test_function_that_cannot_be_described_is_named(function):
    with pytest.raises(ValueError, match="tools: "):
        tool_schema(function)
