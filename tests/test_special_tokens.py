"""Special and added tokens: what a template shows and how their text is encoded."""

import json

import pytest
from chat_cases import DESCRIBED, USER, need_transformers, rendered, set_config
from conftest import write_json

import singlequant as sq
from singlequant._C import FormatError

SHOW = ("{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ pad_token }}|{{ soi_token }}|"
        "{{ messages[0].content }}<|im_end|>the fox<|im_end|>")


def map_file(**values):
    return lambda folder: write_json(folder / "special_tokens_map.json", values)


def added_file(folder):
    write_json(folder / "added_tokens.json", {"<|im_end|>": 320, "fox": 321})


FOLDERS = {  # a change of the folder, and what the template shows of the special tokens
    "as-saved": ([], "<s>|</s>|||"),
    "described": ([lambda f: set_config(f, bos_token={"__type": "AddedToken", **DESCRIBED})],
                  "<s>|</s>|||"),
    "null": ([lambda f: set_config(f, bos_token=None)], "|</s>|||"),
    "map": ([lambda f: set_config(f, remove=("bos_token", "eos_token")),
             map_file(bos_token=DESCRIBED, eos_token="</s>", pad_token=None)], "<s>|</s>|||"),
    "map-over-config": ([map_file(bos_token="</s>")], "</s>|</s>|||"),
    "map-unread": ([lambda f: set_config(f, added_tokens_decoder={"0": {**DESCRIBED, "special":
                                                                          True}}),
                    map_file(bos_token="</s>")], "<s>|</s>|||"),
    "own-names": ([lambda f: set_config(f, image_token="<img>", extra_special_tokens={
        "soi_token": "<soi>"}, add_bos_token=True)], "<s>|</s>|<img>||<soi>"),
    "extra": ([lambda f: set_config(f, extra_special_tokens=["<|im_end|>"])], "<s>|</s>|||"),
    "additional": ([lambda f: set_config(f, additional_special_tokens=["<|im_end|>"])],
                   "<s>|</s>|||"),
    "map-additional": ([map_file(additional_special_tokens=["<|im_end|>"])], "<s>|</s>|||"),
    "decoder": ([lambda f: set_config(f, added_tokens_decoder={
        "321": {"content": "fox", "lstrip": True, "rstrip": False, "normalized": False,
                "single_word": False, "special": False},
        "320": {**DESCRIBED, "content": "<|im_end|>", "special": True}})], "<s>|</s>|||"),
    "added-file": ([added_file], "<s>|</s>|||"),
    "no-config": ([lambda f: (f / "tokenizer_config.json").unlink(),
                   map_file(bos_token="<s>", pad_token="[PAD]")], "<s>|||[PAD]|"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_special_tokens_of_a_folder(model, name):
    changes, expected = FOLDERS[name]
    for change in changes:
        change(model)
    assert rendered(model, SHOW).startswith(f"{expected}|hi<|im_end|>")


@pytest.mark.parametrize("name", FOLDERS)
def test_special_tokens_and_ids_are_transformers(model, name):
    transformers = need_transformers()
    for change in FOLDERS[name][0]:
        change(model)
    text = rendered(model, SHOW)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    options = {"tokenize": False, "add_generation_prompt": True}
    assert theirs.apply_chat_template(USER, **options) == text
    ids = theirs.encode(text, add_special_tokens=False)
    assert sq.load_checkpoint(model).tokenizer.encode(text, add_special_tokens=False).ids == ids


def test_tokens_that_only_the_configs_name_stay_whole(model):
    special, plain = {**DESCRIBED, "content": "<|im_end|>"}, {**DESCRIBED, "content": "fox"}
    set_config(model, added_tokens_decoder={"321": plain, "320": {**special, "special": True}})
    tokenizer = sq.load_checkpoint(model).tokenizer
    assert tokenizer.encode("<|im_end|>fox", add_special_tokens=False).ids == [320, 321]
    assert tokenizer.decode([320, 321]) == "fox"


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer"])
def test_tokens_of_the_tokenizer_class_where_the_vocabulary_has_them(model, kind):
    set_config(model, remove=("bos_token", "eos_token"), tokenizer_class=kind)
    expected = "<s>|</s>" if kind.startswith("Llama") else "|"
    assert rendered(model, SHOW).startswith(f"{expected}|")


@pytest.mark.parametrize("change", [
    lambda f: set_config(f, bos_token=5),
    lambda f: set_config(f, eos_token={"id": 3}),
    lambda f: set_config(f, extra_special_tokens=[None, ["x"]]),
    map_file(bos_token=["<s>"]),
    lambda f: set_config(f, added_tokens_decoder=["x"]),
    lambda f: set_config(f, added_tokens_decoder={"1": "x", "y": "z"}),
    lambda f: write_json(f / "added_tokens.json", {"<x>": "first"}),
])
def test_tokens_that_are_none_are_named(model, change):
    change(model)
    with pytest.raises(FormatError, match=r"\.json: "):
        sq.load_checkpoint(model).encode("a")


def test_tokenizer_that_fails_in_encode_is_named(model):
    values = json.loads((model / "tokenizer.json").read_text())
    values |= {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}}
    write_json(model / "tokenizer.json", values)
    with pytest.raises(FormatError, match="tokenizer.json: WordLevel"):
        sq.load_checkpoint(model).encode("hello")
