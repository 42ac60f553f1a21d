"""A folder, quantized or not -> logits and text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from .. import _C
from .._C import FormatError
from ..config import KV_BITS
from .layers import build_layer, flat_positions

PREFILL_TOKENS = 2048  # prompt tokens per call
HEAD_ROWS = 64  # SQ_DENSE_FEW of the core: a row of so many logits knows nothing of the others
STREAM_CONTEXT = 16  # prompt tokens decoded with new ones: spaces depend on what stands before


class Model:
    """A decoder ready to run: packed int4 linears, or 16- and 32-bit ones through OpenBLAS.

    Made by `load`. The weights stay memory-mapped, apart from the packed panels. kv_bits: 32, 16, 8
    or 4 bits for cached keys and values (default: the folder's; 32 if it is not quantized), which
    hidden_states keeps to as well. kv_hadamard: below 16 bits, queries and keys take a Hadamard
    after the rotary embedding. ValueError for other bits.
    """

    def __init__(self, checkpoint, kv_bits: int | None = None, kv_hadamard: bool = True) -> None:
        self.checkpoint = checkpoint
        self.kv_bits = own_kv_bits(checkpoint) if kv_bits is None else kv_bits
        if not isinstance(self.kv_bits, (int, np.integer)) or self.kv_bits not in (*KV_BITS, 32):
            raise ValueError(f"kv_bits: expected one of {', '.join(map(str, KV_BITS))}, 32, "
                             f"found {kv_bits!r}")
        self.kv_hadamard = kv_hadamard
        self.shape = checkpoint.shape
        self._embedding = checkpoint.embedding
        self._head = checkpoint.head
        self._norm = _C.to_float32(checkpoint.final_norm)
        self._layers = [build_layer(checkpoint, i) for i in range(self.shape.layers)]
        self._decoder = _C.Decoder(self._layers)

    def __repr__(self) -> str:
        kind = "quantized" if self.checkpoint.quantized else "unquantized"
        return (
            f"Model({self.checkpoint.path.name!r}, {kind}, layers={self.shape.layers}, "
            f"hidden={self.shape.hidden}, vocab={self.shape.vocab}, kv_bits={self.kv_bits})"
        )

    @property
    def tokenizer(self):
        """The folder's tokenizers.Tokenizer."""
        return self.checkpoint.tokenizer

    def encode(self, text: str, special: bool = True) -> NDArray[np.int64]:
        """Token ids [count] of a text; special adds the tokenizer's own special tokens (BOS)."""
        return self.checkpoint.encode(text, special)

    def decode_after(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """The text that new tokens add behind a prompt's, its first space included."""
        before = self.tokenizer.decode(list(prompt))
        return self.tokenizer.decode([*prompt, *new])[len(before) :]

    def hidden_states(self, windows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Final hidden states [count, length, hidden], after the last norm, of windows of tokens.

        ValueError when a token id is outside the vocabulary.
        """
        windows = np.asarray(windows, np.int64)
        if windows.ndim != 2:
            raise ValueError(f"windows: expected 2 dimensions (count, length), got {windows.ndim}")
        count, length = windows.shape
        sequence, position = flat_positions(np.full(count, length))
        hidden = _C.gather_rows(self._embedding, windows.reshape(-1))
        # one layer's keys and values at a time: nothing is decoded after these windows
        cache = self.new_cache(count, length, layers=1)
        for layer in self._layers:
            layer.forward(hidden, sequence, position, cache, 0)
        return self._normalized(hidden).reshape(count, length, -1)

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [..., vocab] of final hidden states [..., hidden].

        With a head in 16 bits a row's are the same bits whatever rows come with it.
        """
        hidden = np.asarray(hidden, np.float32)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if len(rows) <= HEAD_ROWS:
            return _C.linear_dense(hidden, self._head)
        out = np.empty((len(rows), len(self._head)), np.float32)
        for begin in range(0, len(rows), HEAD_ROWS):
            part = slice(begin, begin + HEAD_ROWS)
            out[part] = _C.linear_dense(rows[part], self._head)
        return out.reshape(*hidden.shape[:-1], -1)

    def forward(self, windows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [count, length, vocab] of windows of tokens [count, length]."""
        return self.logits(self.hidden_states(windows))

    def _normalized(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        return _C.rms_norm(hidden, self._norm, self.shape.rms_eps)

    def new_cache(
        self, sequences: int, capacity: int, limit: int = 0, layers: int | None = None
    ) -> _C.KVCache:
        """An empty cache of the model's kv_bits, for all layers by default; see `Session`."""
        shape = self.shape
        return _C.KVCache(shape.layers if layers is None else layers, sequences, shape.kv_heads,
                          shape.head_dim, capacity, self.kv_bits, self.kv_hadamard, limit)

    def new_session(self, sequences: int, capacity: int, limit: int = 0) -> Session:
        """A KV cache for so many sequences of at most `capacity` tokens, and their lengths.

        limit: bytes that its pages may take, 0 for any number.
        """
        return Session(self, sequences, capacity, limit)

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
        on_token: Callable[[int, int], bool | None] | None = None,
    ) -> str | list[int] | list[str] | list[list[int]]:
        """Continue one prompt or a batch; text in, text out, token ids in, token ids out.

        temperature 0 takes the most likely token; top_k 0 and top_p 1 are off. A sequence ends at a
        stop token (default: the folder's end-of-sequence ids) or after max_new_tokens. The same
        seed gives the same tokens; with packed linears and a head in 16 bits a sequence does not
        depend on its neighbours in the batch (unquantized linears go through BLAS, whose last bits
        follow the batch).
        on_token(sequence, token) is called as tokens appear; True ends the sequence, an exception
        cancels.
        ValueError when a prompt is empty or longer than the model's maximum.
        """
        single = isinstance(prompts, str) or (
            len(prompts) > 0 and isinstance(prompts[0], (int, np.integer))
        )
        batch = [prompts] if single else list(prompts)
        if not batch:
            raise ValueError("prompts: expected at least one prompt, got none")
        as_text = isinstance(batch[0], str)
        tokens = [self.encode(p) if as_text else np.asarray(p, np.int64) for p in batch]
        new = generate(self, tokens, max_new_tokens, temperature, top_k, top_p, seed,
                       self.stop_tokens if stop_tokens is None else stop_tokens, on_token)
        if as_text:
            new = [self.decode_after(p, ids) for p, ids in zip(tokens, new, strict=True)]
        return new[0] if single else new

    @property
    def stop_tokens(self) -> list[int]:
        """End-of-sequence ids of generation_config.json, or else of config.json."""
        for config in (self.checkpoint.generation_config, self.checkpoint.config):
            found = config.get("eos_token_id")
            if found is not None:
                ids = found if isinstance(found, list) else [found]
                if not all(type(i) is int for i in ids):
                    raise FormatError(f"{self.checkpoint.path}: eos_token_id: expected token ids, "
                                      f"found {found!r}")
                return ids
        return []

    def chat_tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation under the folder's chat template, for `generate`.

        messages: [{"role": "user", "content": ...}, ...]. The template writes the special tokens
        itself. ValueError without a template.
        """
        return self.encode(render_chat(self.checkpoint, messages), special=False).tolist()


class Session:
    """Sequences being decoded: their KV cache and how many tokens each holds.

    The cache grows page by page with what is appended; `end` gives a sequence's pages back, and
    another one may start in its place. One thread at a time.
    """

    def __init__(self, model: Model, sequences: int, capacity: int, limit: int = 0) -> None:
        self.model = model
        self.capacity = capacity
        self.lengths = np.zeros(sequences, np.int64)
        self._cache = model.new_cache(sequences, capacity, limit)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in memory."""
        return self._cache.nbytes

    def end(self, sequence: int) -> None:
        """Forget a sequence and free its pages. ValueError when there is no such sequence."""
        self._cache.release(sequence)
        self.lengths[sequence] = 0

    def append(
        self, tokens: Sequence[NDArray[np.int64]], sequences: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Feed tokens[i] to sequence sequences[i]; final hidden states [total, hidden] in order.

        The number of tokens may differ from sequence to sequence. ValueError past the capacity or
        for a sequence that does not exist or stands twice, MemoryError past the cache's limit: the
        session is as it was then.
        """
        if len(tokens) == 0:
            raise ValueError("tokens: expected at least one sequence's, got none")
        chosen = np.arange(len(tokens)) if sequences is None else np.asarray(sequences)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
            raise ValueError(f"sequences: expected a list of integers, got {sequences!r}")
        if len(chosen) != len(tokens):
            raise ValueError(f"sequences: expected {len(tokens)}, one for each of tokens, "
                             f"got {len(chosen)}")
        places = chosen.tolist()
        if not 0 <= min(places) <= max(places) < len(self.lengths):
            raise ValueError(f"sequences: expected 0 to {len(self.lengths) - 1}, got {places}")
        if len(set(places)) < len(places):
            raise ValueError(f"sequences: expected each once, got {places}")
        lengths = np.array([len(t) for t in tokens], np.int64)
        starts = self.lengths[chosen]
        if (longest := int((starts + lengths).max())) > self.capacity:
            raise ValueError(
                f"tokens: expected at most {self.capacity} in a sequence, got {longest}"
            )
        local, position = flat_positions(lengths, starts)
        hidden = _C.gather_rows(self.model._embedding, np.concatenate(tokens))
        self.model._decoder.forward(hidden, chosen[local], position, self._cache)
        self.lengths[chosen] = starts + lengths
        return self.model._normalized(hidden)


def own_kv_bits(checkpoint) -> int:
    """Bits of cached keys and values that a folder asks for: 32 when it is not quantized."""
    config = checkpoint.quant_config
    return 32 if config is None else config.kv_bits


def generate(
    model: Model,
    prompts: Sequence[NDArray[np.int64]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop_tokens: Sequence[int],
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """New tokens of each prompt; see `Model.generate`."""
    check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
    lengths = [len(p) for p in prompts]
    if min(lengths) == 0:
        raise ValueError(f"prompt {lengths.index(0)}: expected at least one token, got none")
    limit = model.shape.max_position_embeddings
    if max(lengths) >= limit:
        raise ValueError(f"prompt {int(np.argmax(lengths))}: expected fewer than {limit} tokens "
                         f"(max_position_embeddings), got {max(lengths)}")
    session = model.new_session(len(prompts), min(limit, max(lengths) + max_new_tokens))
    # one stream of random numbers per sequence, so that the batch's make-up changes nothing
    streams = [np.random.default_rng((seed, i)) for i in range(len(prompts))]
    out: list[list[int]] = [[] for _ in prompts]
    stop = set(stop_tokens)
    last = _prefill(session, prompts)
    alive = list(range(len(prompts)))
    for step in range(max_new_tokens):
        logits = model.logits(last)
        remaining, fed = [], []
        for row, index in enumerate(alive):
            token = _C.sample(logits[row], temperature, top_k, top_p, streams[index].random())
            if token in stop:
                continue
            out[index].append(token)
            if on_token and on_token(index, token):
                continue
            if session.lengths[index] < session.capacity:
                remaining.append(index)
                fed.append(np.array([token], np.int64))
        for index in set(alive) - set(remaining):
            session.end(index)
        alive = remaining
        if not alive or step + 1 == max_new_tokens:
            break
        last = session.append(fed, alive)
    return out


def _prefill(session: Session, prompts: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
    """Feed prompts, many or pieces of one to a call; each one's last hidden state [m, hidden]."""
    last = np.empty((len(prompts), session.model.shape.hidden), np.float32)
    for call in _prefill_calls([len(p) for p in prompts]):
        hidden = session.append([prompts[i][begin:end] for i, begin, end in call],
                                [i for i, _, _ in call])
        ends = np.cumsum([end - begin for _, begin, end in call])
        last[[i for i, _, _ in call]] = hidden[ends - 1]  # a later piece of i comes later
    return last


def _prefill_calls(lengths: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Lists of (sequence, begin, end) of PREFILL_TOKENS tokens in all, the last one of fewer."""
    call: list[tuple[int, int, int]] = []
    room = PREFILL_TOKENS
    for index, length in enumerate(lengths):
        begin = 0
        while begin < length:
            end = min(length, begin + room)
            call.append((index, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield call
                call, room = [], PREFILL_TOKENS
    if call:
        yield call


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """ValueError that names the argument, the expected and the found."""
    checks = (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("seed", seed, seed >= 0, "at least 0"),
        ("temperature", temperature, 0 <= temperature < math.inf, "a finite number of at least 0"),
        ("top_k", top_k, top_k >= 0, "at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
    )
    for name, value, good, expected in checks:
        if not good:
            raise ValueError(f"{name}: expected {expected}, got {value}")


def stream_text(model: Model, prompt: Sequence[int]) -> Callable[[int], str]:
    """A function from the next token behind a prompt to the text it completes.

    '' inside a character: a text that ends in U+FFFD waits for the bytes that follow.
    """
    context = list(prompt)[-STREAM_CONTEXT:]
    tokens: list[int] = []
    shown = ""

    def step(token: int) -> str:
        nonlocal shown
        tokens.append(token)
        text = model.decode_after(context, tokens)
        if text.endswith("\ufffd"):
            return ""
        new, shown = text[len(shown) :], text
        return new

    return step


def render_chat(checkpoint, messages: Sequence[dict[str, str]]) -> str:
    """Chat template of a folder (chat_template.jinja or tokenizer_config.json) over messages."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    config = checkpoint.tokenizer_config
    file = checkpoint.path / "chat_template.jinja"
    template = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ValueError(f"{checkpoint.path}: expected chat_template.jinja or a chat_template in "
                         "tokenizer_config.json, found neither")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    special = {k: (v["content"] if isinstance(v, dict) else v)
               for k, v in config.items() if k.endswith("_token") and v}
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, **special
        )
    except Exception as error:  # a template is foreign code: it may fail in any way
        raise ValueError(f"{checkpoint.path}: chat template: {error}") from None
