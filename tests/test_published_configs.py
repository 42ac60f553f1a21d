# SPDX-License-Identifier: Apache-2.0
"""config.json of models that people have: every row reads its keys, and no weight is missing.

data/published_configs.json has the keys and sizes that the authors publish, and the number of
weights that transformers makes of them. Only the numbers in long lists are made up.
"""

import json
from pathlib import Path

import pytest

from singlequant.models.families import FAMILIES, find_family

FILE = Path(__file__).resolve().parent / "data" / "published_configs.json"
PUBLISHED = json.loads(FILE.read_text("utf-8"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_gives_every_weight(name):
    config = PUBLISHED[name]["config"]
    assert find_family(config).spec(config).parameters == PUBLISHED[name]["parameters"]


def test_published_configs_are_of_most_families():
    found = {find_family(entry["config"]).name for entry in PUBLISHED.values()}
    assert set(FAMILIES) - found <= {"MinistralForCausalLM", "Ministral3ForCausalLM",
                                     "GraniteMoeSharedForCausalLM"}
