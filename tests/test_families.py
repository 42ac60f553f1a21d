# SPDX-License-Identifier: Apache-2.0
"""What holds for every row: how long it is, and that a packed folder carries all it says."""

import ast
import json
from pathlib import Path

import pytest

from singlequant._C import FormatError
from singlequant.models.config_json import Fields
from singlequant.models.families import FAMILIES, MODULES, find_family
from singlequant.models.spec_json import model_json, model_spec

LONGEST_ROW = 25  # lines
DATA = Path(__file__).parent / "data" / "families"
FOLDERS = sorted(path.parent for path in DATA.glob("*/config.json"))


def rows():
    """(name, lines) of each assignment that makes a row."""
    for module in MODULES:
        for node in ast.parse(Path(module.__file__).read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                name = node.targets[0].id
                if getattr(module, name) in FAMILIES.values():
                    yield name, node.end_lineno - node.lineno + 1


def test_rows_are_short():
    found = dict(rows())
    assert len(found) >= len(FAMILIES)  # those that a module imports from another count there
    assert {name: lines for name, lines in found.items() if lines > LONGEST_ROW} == {}


def test_every_family_has_a_golden_folder():
    names = {find_family(json.loads((f / "config.json").read_text())).name for f in FOLDERS}
    assert names == set(FAMILIES)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_description_of_a_model_survives_json(folder):
    config = json.loads((folder / "config.json").read_text())
    spec = find_family(config).spec(config)
    values = json.loads(json.dumps(model_json(spec)))
    assert model_spec(Fields(values, "config.json")) == spec.separate()


def test_description_with_other_sites_or_too_many_experts_is_refused():
    folder = next(f for f in FOLDERS if f.name.startswith("mixtral"))
    config = json.loads((folder / "config.json").read_text())
    values = json.loads(json.dumps(model_json(find_family(config).spec(config))))
    values["kinds"][0]["experts"]["count"] = 5000
    with pytest.raises(FormatError, match=r"experts\.count: expected chosen = .* to 4096 experts"):
        model_spec(Fields(values, "config.json"))
    values["kinds"][0]["experts"]["count"] = 4
    values["kinds"][0]["sites"]["gate_up.{e}"] = ["gate.{e}"]
    with pytest.raises(FormatError, match="sites: expected .* as the blocks ask for"):
        model_spec(Fields(values, "config.json"))
    values["kinds"][0]["mlp"] = {"activation": "silu", "intermediate": 8}
    with pytest.raises(FormatError, match="mlp: expected an object, or null"):
        model_spec(Fields(values, "config.json"))
