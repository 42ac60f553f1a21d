"""The small networks that are no LLaMAs: their outlier channels, their text, a short training."""

import json
import math

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")
pytest.importorskip("transformers", reason="needs the torch extra")

import singlequant as sq  # noqa: E402
from benchmarks import train_families as script  # noqa: E402

FAMILIES = list(script.NETWORKS)


@pytest.fixture(scope="module")
def texts():
    """The bundled calibration text to train on, the beginning of the other one held out."""
    document = script.bundled.Document("calibration", sq.bundled_text("calibration"))
    return script.Texts([document], {"heldout": sq.bundled_text("heldout")[:8000]})


@pytest.fixture(scope="module")
def tokenizer(texts):
    return script.bundled.train_tokenizer([d.text for d in texts.training], 400)


def logits(model):
    ids = torch.arange(40)[None] * 7 % 400
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0]


def changed_logits(family, tokenizer, scale):
    """Relative change of the logits of a random network whose channels are scaled."""
    network = script.NETWORKS[family]
    model = script.build(network, tokenizer, 3)
    with torch.no_grad():
        for p in model.parameters():  # the initial weights are too small to tell layers apart
            p.add_(0.05 * torch.randn_like(p))
    before = logits(model)
    script.scale_channels(network, model, scale)
    return float((logits(model) - before).norm() / before.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_writer_and_reader_is_scaled(family, tokenizer):
    # The eps of the norms is not scaled.
    assert changed_logits(family, tokenizer, torch.full((256,), 2.0)) < 5e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_are_scaled_along_their_own_axis(family, tokenizer):
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (256,), generator=generator) * 2.0 - 1.0
    # A LayerNorm subtracts the mean, which the signs change a little.
    assert changed_logits(family, tokenizer, signs) < (0.3 if family == "gpt_neox" else 1e-3)


def test_held_out_lines_are_not_trained_on(tmp_path, monkeypatch):
    known = sq.bundled_text("heldout").split("\n\n")[3]
    module = script.bundled.Document("module", f"{known}\n\nA paragraph of a module.")
    monkeypatch.setattr(script.bundled, "collect_documents", lambda: [module])
    path = tmp_path / "more.txt"
    path.write_text("\n\n".join(f"Paragraph {i} of the file." for i in range(100)))
    found = script.read_texts([path])
    trained = "\n\n".join(d.text for d in found.training).split("\n\n")
    assert "A paragraph of a module." in trained
    assert "Paragraph 0 of the file." in trained
    assert set(found.held_out) == {"heldout", "calibration", "more.txt"}
    assert "Paragraph 99 of the file." in found.held_out["more.txt"]
    for text in found.held_out.values():
        assert not set(text.split("\n\n")) & set(trained)


def test_text_too_short_to_hold_out_is_refused(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("one line")
    with pytest.raises(ValueError, match="line.txt: expected lines to train on and to hold out"):
        script.read_texts([path])


def test_two_texts_of_one_name_are_refused(tmp_path):
    paths = [tmp_path / "a" / "t.txt", tmp_path / "b" / "t.txt"]
    for path in paths:
        path.parent.mkdir()
        path.write_text("line\n" * 50)
    with pytest.raises(ValueError, match="--text: expected files of different names"):
        script.read_texts(paths)


def test_too_little_text_is_refused(tmp_path):
    texts = script.Texts([script.bundled.Document("a", "few words " * 50)], {"heldout": "none"})
    with pytest.raises(ValueError, match="expected at least 20000 tokens"):
        script.train_folder("gpt_neox", texts, script.parse([str(tmp_path)]))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_short_training_writes_the_same_folder_twice(family, texts, tmp_path):
    folders = [script.train_folder(family, texts, script.parse([str(tmp_path / name), "--steps",
                                                                "4", "--threads", "2"]))
               for name in ("a", "b")]
    first, second = ((f / "model.safetensors").read_bytes() for f in folders)
    assert first == second
    assert (folders[0] / "tokenizer.json").is_file()
    record = json.loads((folders[0] / script.RECORD).read_text())
    assert record["plan"]["steps"] == 4
    assert record["architecture"] in (folders[0] / "config.json").read_text()
    assert 1 < record["perplexity"]["heldout"] < math.inf
    assert min(record["peaks"]["q, k, v"]) > 4  # the channels that were scaled
    assert len(record["outliers"]["channels"]) == len(record["plan"]["factors"])


@pytest.mark.slow
def test_plain_training_scales_no_channels(texts, tmp_path):
    folder = script.train_folder("gpt_neox", texts, script.parse(
        [str(tmp_path), "--steps", "4", "--threads", "2", "--plain"]))
    assert folder.name == "neox-small-plain-s0"
    record = json.loads((folder / script.RECORD).read_text())
    assert record["outliers"] == {}
    assert max(record["peaks"]["q, k, v"]) < 4
