"""The text of tokens that come one by one is the text of all of them, at a bounded cost a token."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from singlequant.runtime.model import Model
from singlequant.runtime.text_stream import CONTEXT, stream_text

WORDS = ["a", "the", "\u20ac", "\U0001f600", "\ufffd", "x y", "'s"]
UTF8 = [b"\xe2", b"\x82", b"\xac", b"\xff", b"\xf0\x9f", b"\x98\x80", b"\x82\xac\xe2", b"a\xe2",
        b"\xc3", b"\xe2\x82", b"\xac\xe2\x82", b"\xe2\x82\xac", b" ", b" the", b"\x80\x80"]
LIMIT = 80  # tokens of one example, some windows long


def byte_letters() -> dict[int, str]:
    """Each byte's letter in a byte-level vocabulary."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in own)
    return {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(others)}


def tokenizer(tokens: list[str], decoder) -> Tokenizer:
    """Words by number, two special tokens among them, the last added and not special."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", *tokens])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.add_special_tokens(["<s>", "<|end|>"])
    made.add_tokens([AddedToken("<tool>", special=False)])
    if decoder is not None:
        made.decoder = decoder
    return made


def made_tokenizers() -> dict[str, Tokenizer]:
    letters = byte_letters()
    spaced = ["\u2581", "\u2581\u2581\u2581", *(f"\u2581{w}" for w in WORDS), *WORDS]
    single = [f"<0x{b:02X}>" for b in b"\xe2\x82\xac\xf0\x9f\x98\x80\xffA "]
    llama = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    return {
        "byte level": tokenizer(["".join(letters[b] for b in t) for t in UTF8],
                                decoders.ByteLevel()),
        "llama 2": tokenizer(spaced + single,
                             decoders.Sequence([*llama, decoders.Strip(" ", 1, 0)])),
        "gemma": tokenizer(spaced + single, decoders.Sequence(llama)),
        "metaspace": tokenizer(spaced, decoders.Metaspace()),
        "byte fallback and metaspace": tokenizer(
            spaced + single, decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
        "words": tokenizer([*WORDS, "##ing", ".", "n't"], decoders.WordPiece()),
        "end of word": tokenizer([*(f"{w}</w>" for w in WORDS), *WORDS], decoders.BPEDecoder()),
        "spaces between": tokenizer(WORDS, None),
    }


TOKENIZERS = made_tokenizers()


def model_with(tokenizer):
    """What a stream takes of a model."""
    return SimpleNamespace(tokenizer=tokenizer, checkpoint=SimpleNamespace(path=Path("model")))


def streamed(model, prompt: list[int], new: list[int]) -> list[str]:
    step = stream_text(model, prompt)
    return [*map(step, new), step.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=100)
@example(numbers=[8] * LIMIT, cut=40)  # characters across all tokens
@example(numbers=[12] * LIMIT, cut=0)
@example(numbers=[2, 3, 4] * 26, cut=0)  # characters of three tokens
@example(numbers=[18, 19, 20] * 11 + [4], cut=30)  # a prompt that ends in many single bytes
@example(numbers=[4] + [1] * 30 + [4] * 3, cut=31)  # and in many special tokens
@given(numbers=st.lists(st.integers(0, 10**6), max_size=LIMIT), cut=st.integers(0, LIMIT))
def test_streamed_text_is_the_text_of_all_tokens(name, numbers, cut):
    made = TOKENIZERS[name]
    tokens = [n % (made.get_vocab_size() + 1) for n in numbers]  # the last one is no token
    model = model_with(made)
    prompt, new = tokens[:cut], tokens[cut:]
    shown = streamed(model, prompt, new)
    assert "".join(shown) == Model.decode_after(model, prompt, new)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_whole_words_appear_at_once(name):
    made = TOKENIZERS[name]
    letters = byte_letters()
    word = {"byte level": letters[32] + "the", "words": "the", "end of word": "the</w>",
            "spaces between": "the"}.get(name, "\u2581the")
    token = made.token_to_id(word)
    shown = streamed(model_with(made), [token], [token] * 50)
    assert [bool(text) for text in shown] == [True] * 50 + [False]


@pytest.mark.parametrize("name", ["llama 2", "gemma"])
def test_single_bytes_wait_for_the_token_behind_them(name):
    made = TOKENIZERS[name]
    euro = [made.token_to_id(f"<0x{b:02X}>") for b in "\u20ac".encode()]
    word, bad = made.token_to_id("\u2581the"), made.token_to_id("<0xFF>")
    model = model_with(made)
    assert streamed(model, [word], [*euro, word]) == ["", "", "", "\u20ac the", ""]
    assert streamed(model, [word], [*euro, bad, word])[-2:] == ["\ufffd" * 4 + " the", ""]
    assert streamed(model, [word], euro)[-1] == "\u20ac"


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, made: Tokenizer) -> None:
        self.made, self.decoded = made, 0

    def __getattr__(self, name):
        return getattr(self.made, name)

    def decode(self, tokens):
        self.decoded += len(tokens)
        return self.made.decode(tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", ["all kinds", "one that never ends a character", "bytes"])
def test_a_token_costs_the_same_however_many_came_before(name, kind):
    counting = Counting(TOKENIZERS[name])
    count = counting.get_vocab_size()
    tokens = {"all kinds": [i * 7 % count for i in range(3000)],
              "one that never ends a character": [8] * 3000,
              "bytes": [count - 3] * 3000}[kind]
    step = stream_text(model_with(counting), tokens[:1000])
    counting.decoded = 0
    for token in tokens:
        step(token)
    assert counting.decoded <= 3 * CONTEXT * len(tokens)
    step.finish()
    assert counting.decoded <= 4 * CONTEXT * len(tokens)
