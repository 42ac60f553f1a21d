# SPDX-License-Identifier: Apache-2.0
"""Values of config.json that no model has: each is refused by file and key, or taken."""

import json
import re
from pathlib import Path

import pytest

from singlequant._C import FormatError
from singlequant.models.config_json import Fields
from singlequant.models.families import FAMILIES, find_family

DATA = Path(__file__).parent / "data" / "families"
FOLDERS = sorted(path.parent.name for path in DATA.glob("*/config.json"))
ODD = ("x", -1, 2.5, 1e300, 2**31 - 1, True, [], [1], [None], {}, {"x": 1}, {"x": {}}, None)


def config_of(folder):
    return json.loads((DATA / folder / "config.json").read_text("utf-8"))


def keys_read(config, monkeypatch):
    """The outer keys that the family of config asks for."""
    read, usual = set(), Fields.__getitem__

    def noted(self, key):
        if not self._prefix:
            read.add(self._names.get(key, key))
        return usual(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(Fields, "__getitem__", noted)
        find_family(config).spec(config)
    return sorted(read)


@pytest.mark.parametrize("folder", FOLDERS)
def test_odd_value_of_any_key_gives_a_spec_or_a_format_error(folder, monkeypatch):
    config, messages = config_of(folder), []
    for key in keys_read(config, monkeypatch):
        for odd in ODD:
            try:
                find_family(config).spec({**config, key: odd})
            except FormatError as error:
                messages.append(str(error))
    assert [text for text in messages if not re.match(r"config\.json: \w", text)] == []


SWITCHED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
            "layer_types": None}


@pytest.mark.parametrize(
    ("folder", "values", "message"),
    [
        ("smollm3-no-rope", {"no_rope_layers": [1]}, "no_rope_layers: expected 2 entries.*found 1"),
        ("smollm3-no-rope", {"no_rope_layers": {"x": 1}}, "no_rope_layers: expected a list"),
        ("smollm3-no-rope", {"no_rope_layers": [1, "x"]}, "no_rope_layers: expected an integer"),
        ("qwen3-moe-tied", {"mlp_only_layers": 3}, "mlp_only_layers: expected a list"),
        ("qwen3-moe-tied", {"decoder_sparse_step": 0}, "decoder_sparse_step: expected an integer"),
        ("qwen2-tied", {**SWITCHED, "max_window_layers": "x"}, "max_window_layers: expected"),
        ("qwen2-moe-shared", {**SWITCHED, "max_window_layers": None}, "window_layers: expected"),
        ("qwen2-moe-shared", {"num_experts": 0}, "num_experts: expected an integer from 1"),
        ("qwen2-moe-shared", {"shared_expert_intermediate_size": 2.5}, "size: expected an integer"),
        ("mpt-alibi", {"attn_config": [1]}, "attn_config: expected an object"),
        ("mpt-alibi", {"attn_config": {"clip_qkv": "x"}}, r"attn_config\.clip_qkv: expected a"),
        ("mpt-alibi", {"attn_config": {"qk_ln": True}}, r"attn_config\.qk_ln: expected false"),
        ("deepseek-v3-latent", {"first_k_dense_replace": "x"}, "first_k_dense_replace: expected"),
        ("deepseek-v3-latent", {"n_shared_experts": [1]}, "n_shared_experts: expected an integer"),
        ("deepseek-v3-latent", {"n_group": 2.5}, "n_group: expected an integer"),
        ("deepseek-v3-latent", {"qk_rope_head_dim": 2**31 - 2}, "qk_rope_head_dim: expected at mo"),
        ("falcon-40b", {"num_kv_heads": "x"}, "num_kv_heads: expected an integer"),
        ("falcon-7b", {"num_ln_in_parallel_attn": "x"}, "num_ln_in_parallel_attn: expected an int"),
        ("gpt2-tied", {"n_inner": -4}, "n_inner: expected an integer from 1"),
        ("bloom-power-of-two", {"n_embed": 2**30, "hidden_size": 2**30, "n_head": 2**30},
         "n_head: expected at most 65536"),
        ("gemma2-tied", {"attn_logit_softcapping": -50}, "softcapping: expected a number"),
        ("gemma2-tied", {"layer_types": None, "sliding_window_pattern": "x"}, "pattern: expected"),
        ("gemma3-tied", {"rope_parameters": None, "rope_local_base_freq": "x"},
         r"config\.json: rope_local_base_freq: expected a number"),
        ("ministral3-beyond", {"rope_parameters": [1]}, "rope_parameters: expected an object"),
        ("ministral3-beyond", {"rope_parameters": {
            "rope_theta": 1e4, "llama_4_scaling_beta": "x",
            "original_max_position_embeddings": 16}}, "llama_4_scaling_beta: expected a number"),
    ],
)  # fmt: skip
def test_value_is_refused_by_its_key(folder, values, message):
    config = config_of(folder)
    with pytest.raises(FormatError, match=message):
        find_family(config).spec({**config, **values})


def test_key_that_is_off_takes_the_usual_width():
    config = config_of("gpt2-tied")
    mlp = FAMILIES["GPT2LMHeadModel"].spec({**config, "n_inner": None}).layer(0).mlp
    assert mlp.intermediate == 4 * config["n_embd"]
