"""A loaded model: the same bits in prefill and decode, alone or in a batch, at any thread count."""

import numpy as np
import pytest
from tokenizers import pre_tokenizers

import singlequant as sq
from singlequant import _C
from singlequant.runtime.generate import _prefill_calls
from singlequant.runtime.text_stream import stream_text

TEXT = "the quick brown fox rotates its tail. " * 60


@pytest.fixture(scope="module", params=["w4a4", "w4a8", "w4a16"])
def model(request, tmp_path_factory):
    from conftest import make_checkpoint

    folder = tmp_path_factory.mktemp(request.param)
    source = make_checkpoint(folder / "source", hidden=96, intermediate=176, heads=6, kv_heads=2,
                             tie=False, layers=3)
    checkpoint = sq.load_checkpoint(source)
    config = sq.QuantConfig(scheme=request.param, bits=4, calibration_tokens=64)
    windows = np.arange(64).reshape(2, 32)
    rotations = sq.solve_rotations(sq.calibrate(checkpoint, windows))
    out = sq.save(sq.quantize(checkpoint, rotations, config), folder / "out", checkpoint, config)
    return sq.load(out)


def prompts(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 320, n) for n in rng.integers(5, 40, count)]


def hidden_alone(model, tokens):
    return model.new_session(1, 64).append([tokens])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_decode_gives_the_bits_of_prefill(model, threads):
    sq.set_num_threads(threads)
    tokens = prompts(1)[0]
    whole = hidden_alone(model, tokens)
    session = model.new_session(1, 64)
    steps = np.concatenate([session.append([tokens[i : i + 1]]) for i in range(len(tokens))])
    np.testing.assert_array_equal(steps, whole)
    np.testing.assert_allclose(model.logits(steps), model.logits(whole), atol=1e-4, rtol=0)


def test_prefill_in_pieces_gives_the_bits_of_prefill_at_once(model):
    tokens = prompts(1, seed=3)[0]
    session = model.new_session(1, 64)
    pieces = np.concatenate([session.append([tokens[:3]]), session.append([tokens[3:]])])
    np.testing.assert_array_equal(pieces, hidden_alone(model, tokens))


def test_batch_of_eight_gives_the_bits_of_each_alone(model):
    batch = prompts(8, seed=1)
    together = model.new_session(8, 64).append(batch)
    alone = np.concatenate([hidden_alone(model, tokens) for tokens in batch])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(model.logits(together), model.logits(alone), atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [64, 65, 70, 129])
def test_logits_of_a_row_know_nothing_of_the_others(model, table, count):
    _C.use_kernels(table)
    hidden = np.random.default_rng(count).normal(size=(count, 96)).astype(np.float32)
    together = model.logits(hidden)
    assert together.shape == (count, 320)
    for row in (0, 1, 63, count - 1):
        np.testing.assert_array_equal(together[row], model.logits(hidden[row]))
    np.testing.assert_array_equal(model.logits(hidden[None]), together[None])


@pytest.mark.parametrize("count", [64, 65, 70])
def test_generate_of_many_prompts_gives_the_tokens_of_each_alone(model, count):
    batch = [tokens[:6] for tokens in prompts(count, seed=5)]
    options = {"max_new_tokens": 3, "temperature": 1.0, "stop_tokens": []}
    together = model.generate(batch, **options)
    assert together[0] == model.generate(batch[0], **options)  # stream 0, as in the batch
    assert together[:count // 2] == model.generate(batch[:count // 2], **options)


def test_threads_do_not_change_a_bit(model):
    batch = prompts(4, seed=2)
    results = []
    for threads in (1, 2, 5):
        sq.set_num_threads(threads)
        results.append(model.new_session(4, 64).append(batch))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_windows_give_the_bits_of_a_session(model):
    windows = np.stack([np.arange(20, 52), np.arange(100, 132)])
    hidden = model.hidden_states(windows)
    np.testing.assert_array_equal(hidden.reshape(64, -1), model.new_session(2, 32).append(windows))


def test_kernel_tables_agree_within_rounding(model):
    tokens = prompts(1, seed=8)[0]  # of some prompts a 4-bit code lies on a boundary of two tables
    results = {}
    for name in _C.kernels()["runnable"]:
        _C.use_kernels(name)
        results[name] = sq.load(model.checkpoint.path).forward(tokens[None])
    first = next(iter(results.values()))
    for logits in results.values():
        scale = np.abs(first).max()
        # a code may step at a rounding boundary; everything else is float32 rounding
        assert np.abs(logits - first).max() < 0.05 * scale


def test_generate_is_the_same_alone_and_in_a_batch(model):
    batch = prompts(5, seed=5)
    options = {"max_new_tokens": 12, "temperature": 0.0, "stop_tokens": []}
    together = model.generate([list(p) for p in batch], **options)
    alone = [model.generate([int(t) for t in p], **options) for p in batch]
    assert together == alone


@pytest.mark.parametrize("room", [1, 7, 64])
def test_generate_does_not_depend_on_how_prompts_are_cut(model, monkeypatch, room):
    batch = prompts(5, seed=4)
    whole = model.generate(batch, 4)
    monkeypatch.setattr("singlequant.runtime.generate.PREFILL_TOKENS", room)
    calls = list(_prefill_calls([len(p) for p in batch]))
    assert all(sum(end - begin for _, begin, end in call) == room for call in calls[:-1])
    for i, prompt in enumerate(batch):
        pieces = [piece[1:] for call in calls for piece in call if piece[0] == i]
        assert np.concatenate([prompt[slice(*p)] for p in pieces]).tolist() == prompt.tolist()
    assert model.generate(batch, 4) == whole


def test_generate_with_a_seed_repeats_itself_and_streams(model):
    seen = []
    options = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 20, "top_p": 0.9}
    a = model.generate("the quick", **options, seed=1, stop_tokens=[],
                       on_token=lambda i, t: seen.append(t))
    assert a == model.generate("the quick", **options, seed=1, stop_tokens=[])
    assert len(seen) == 8
    others = {model.generate("the quick", **options, seed=s, stop_tokens=[]) for s in range(2, 7)}
    assert others - {a}


@pytest.fixture(scope="module")
def metaspace_model(tmp_path_factory):
    """A tokenizer as LLaMA 2's: words carry their space, decoding strips the first."""
    from conftest import make_checkpoint
    from tokenizers import Tokenizer, decoders, models, normalizers

    folder = make_checkpoint(tmp_path_factory.mktemp("metaspace") / "model")
    pieces = ["<unk>", "<s>", "</s>", *(f"\u2581{w}" for w in ("the", "function", "returns")), "x"]
    vocabulary = {p: i for i, p in enumerate([*pieces, *(f"\u2581w{i}" for i in range(313))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return sq.load(folder)


def test_space_before_the_first_new_word_is_kept(metaspace_model):
    prompt = metaspace_model.encode("the function").tolist()
    assert len(prompt) == 2
    new = metaspace_model.encode("returns the").tolist()
    assert metaspace_model.decode_after(prompt, new) == " returns the"
    step = stream_text(metaspace_model, prompt)
    assert [step(token) for token in new] == [" returns", " the"]


def test_generated_text_continues_the_prompt(metaspace_model):
    text = metaspace_model.generate("the function", max_new_tokens=3, stop_tokens=[])
    tokens = metaspace_model.encode("the function").tolist()
    new = metaspace_model.generate(tokens, max_new_tokens=3, stop_tokens=[])
    whole = metaspace_model.tokenizer.decode(tokens + new)
    assert "the function" + text == whole


def test_stream_waits_for_whole_characters(model):
    new = model.encode("\u20ac!", special=False).tolist()  # three bytes, a token each
    step = stream_text(model, [5])
    shown = [step(token) for token in new]
    assert "".join(shown) == "\u20ac!"
    assert shown[0] == ""


def test_stream_ends_with_what_waits(model):
    new = model.encode("a\u20ac", special=False).tolist()[:-1]  # a character without its end
    step = stream_text(model, [5])
    shown = [step(token) for token in new]
    assert "".join(shown) == "a"
    assert step.finish() == model.decode_after([5], new)[1:]
    assert step.finish() == ""


def test_generate_ends_at_a_stop_token(model):
    tokens = model.generate([5, 6, 7], max_new_tokens=10, stop_tokens=[])
    assert len(tokens) == 10
    cut = model.generate([5, 6, 7], max_new_tokens=10, stop_tokens=[tokens[4]])
    assert cut == tokens[: tokens.index(tokens[4])]


def test_generate_stops_at_the_models_maximum(model):
    limit = model.spec.max_position_embeddings
    new = model.generate([5] * (limit - 3), max_new_tokens=50, stop_tokens=[])
    assert len(new) == 4  # positions limit - 3 .. limit - 1 are fed, the last one's answer is free


@pytest.mark.parametrize(("prompt", "message"), [
    ([], "at least one prompt"), ([[]], "prompt 0: expected at least one token"),
    ([[5] * 256], "prompt 0: expected fewer than 256 tokens"), ([[5, 320]], "320"),
])
def test_generate_names_a_bad_prompt(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompt)


def test_session_refuses_more_than_its_capacity(model):
    session = model.new_session(1, 8)
    session.append([np.arange(6)])
    with pytest.raises(ValueError, match="at most 8 in a sequence, got 9"):
        session.append([np.arange(3)])


def test_perplexity_counts_windows_and_predictions(model):
    result = sq.perplexity(model, TEXT, seq_len=32)
    count = len(model.encode(TEXT)) // 32
    assert (result.tokens, result.predictions) == (count * 32, count * 31)
    assert result.kl_mean is None
    assert set(result.to_json()) == {"perplexity", "tokens", "predictions", "seq_len", "seconds"}


def test_perplexity_equals_the_formula(model):
    tokens = model.encode(TEXT)[:64]
    result = sq.perplexity(model, tokens, seq_len=32)
    logits = model.forward(tokens.reshape(2, 32)).astype(np.float64)[:, :-1]
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, tokens.reshape(2, 32)[:, 1:, None], -1)
    assert result.perplexity == pytest.approx(np.exp(-picked.mean()), rel=1e-6)


def test_divergence_from_itself_is_zero(model):
    result = sq.perplexity(model, TEXT, seq_len=32, reference=model)
    assert abs(result.kl_mean) < 1e-9
    assert result.top1_agreement == 1.0


def test_model_repr_says_what_it_is(model):
    assert repr(model) == "Model('out', quantized, layers=3, hidden=96, vocab=320, kv_bits=16)"


# ---- the KV cache -------------------------------------------------------------------------------

KV_BITS = [32, 16, 8, 4]


@pytest.fixture(scope="module", params=KV_BITS)
def kv_model(request, model):
    return sq.load(model.checkpoint.path, request.param)


def test_cache_of_any_width_gives_the_same_bits_however_tokens_come(kv_model):
    """Prefill, pieces, single steps, a batch of unequal length and windows."""
    batch = [np.concatenate([p, p, p]) for p in prompts(4, seed=6)]  # over one page
    together = kv_model.new_session(4, 128).append(batch)
    alone = [kv_model.new_session(1, 128).append([tokens]) for tokens in batch]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    tokens = batch[int(np.argmax([len(t) for t in batch]))]
    assert len(tokens) > 64
    whole = kv_model.new_session(1, 128).append([tokens])
    for size in (1, 7, 63, 64, 65):
        session = kv_model.new_session(1, 128)
        pieces = [session.append([tokens[i : i + size]]) for i in range(0, len(tokens), size)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    np.testing.assert_array_equal(kv_model.hidden_states(tokens[None])[0], whole)


def test_sequences_that_end_and_start_give_the_bits_of_each_alone(kv_model):
    rng = np.random.default_rng(3)
    texts = [rng.integers(2, 320, n) for n in (90, 20, 70, 66, 5)]
    alone = [kv_model.new_session(1, 128).append([t]) for t in texts]
    session = kv_model.new_session(3, 128)
    waiting, slots, found = list(range(5)), {}, {}
    while waiting or slots:
        for slot in range(3):
            if slot not in slots and waiting:
                slots[slot] = waiting.pop(0)
        fed = {s: texts[i][session.lengths[s] : session.lengths[s] + 9] for s, i in slots.items()}
        hidden = np.split(session.append(list(fed.values()), list(fed)),
                          np.cumsum([len(f) for f in fed.values()])[:-1])
        for slot, states in zip(fed, hidden, strict=True):
            found.setdefault(slots[slot], []).append(states)
        for slot in fed:
            if session.lengths[slot] == len(texts[slots[slot]]):
                session.end(slot)
                del slots[slot]
    for i, expected in enumerate(alone):
        np.testing.assert_array_equal(np.concatenate(found[i]), expected)
    assert session.nbytes == 0


def test_fewer_bits_are_further_from_the_float_cache(model):
    windows = np.random.default_rng(0).integers(2, 320, (2, 100))
    exact = sq.load(model.checkpoint.path, 32).hidden_states(windows)
    errors = [np.abs(sq.load(model.checkpoint.path, bits).hidden_states(windows) - exact).mean()
              for bits in KV_BITS]
    assert errors[0] == 0
    assert errors[3] > 0
    if model.checkpoint.quant_config.scheme == "w4a16":  # codes of activations add their own noise
        assert errors[1] < errors[2] < errors[3]


def test_session_memory_follows_the_tokens_it_holds(model):
    session = model.new_session(2, 10_000)
    assert session.nbytes == 0
    session.append([np.arange(2, 66)])
    one = session.nbytes
    assert one == 3 * 2 * 2 * 64 * 16 * 2  # layers, key and value, heads, tokens, head_dim, float16
    session.append([np.arange(2, 67)], [1])
    assert session.nbytes == 3 * one
    session.end(1)
    assert session.lengths.tolist() == [64, 0]
    assert session.nbytes <= 2 * one


def test_session_at_its_limit_is_as_it_was(model):
    page = model.new_cache(1, 64).page_bytes
    session = model.new_session(2, 300, limit=3 * page)
    session.append([np.arange(2, 62)])
    with pytest.raises(MemoryError, match="limit"):
        session.append([np.arange(2, 12)])
    assert session.lengths.tolist() == [60, 0]
    tokens = np.arange(2, 6)
    expected = hidden_alone(model, np.concatenate([np.arange(2, 62), tokens]))[60:]
    np.testing.assert_array_equal(session.append([tokens]), expected)


@pytest.mark.parametrize(("sequences", "message"), [
    ([2], r"sequences: expected 0 to 1, got \[2\]"), ([-1], "sequences: expected 0 to 1"),
    ([0, 1], "sequences: expected 1, one for each of tokens, got 2"),
    ([0.7], r"sequences: expected a list of integers, got \[0.7\]"),
])
def test_session_names_a_bad_sequence(model, sequences, message):
    session = model.new_session(2, 8)
    with pytest.raises(ValueError, match=message):
        session.append([np.arange(2, 4)], sequences)
    with pytest.raises(ValueError, match="sequences: expected each once"):
        session.append([np.arange(2, 4)] * 2, [1, 1])
    with pytest.raises(ValueError, match="tokens: expected at least one sequence's, got none"):
        session.append([])
    with pytest.raises(ValueError, match="sequence: expected 0 to 1, got 2"):
        session.end(2)


@pytest.mark.parametrize("bits", [0, 3, 64, "4", 4.0])
def test_model_refuses_other_kv_bits(model, bits):
    with pytest.raises(ValueError, match="kv_bits: expected one of 4, 8, 16, 32"):
        sq.load(model.checkpoint.path, bits)
