"""The default calibration text: its bytes, its breadth and its licences are as recorded."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import singlequant as sq
from singlequant.sweep.texts import DEFAULT_TEXT, bundled_path

ROOT = Path(__file__).parents[1]
LICENCES = {"public domain", "MIT", "BSD-3-Clause", "Apache-2.0"}
SCRIPTS = {
    "Chinese": "[\u4e00-\u9fff]", "Japanese": "[\u3040-\u30ff]",
    "Cyrillic": "[\u0400-\u04ff]", "Arabic": "[\u0600-\u06ff]",
    "Devanagari": "[\u0900-\u097f]", "Hangul": "[\uac00-\ud7af]",
}


@pytest.fixture(scope="module")
def record():
    return json.loads(bundled_path(DEFAULT_TEXT).with_suffix(".json").read_text("utf-8"))


@pytest.fixture(scope="module")
def documents(record):
    """(kind, source, text) of each document."""
    data, at, found = bundled_path(DEFAULT_TEXT).read_bytes(), 0, []
    for kind, source, size in record["documents"]:
        found.append((kind, source, data[at:at + size].decode()))  # cut at whole characters
        at += size
    assert at == len(data)
    return found


def test_text_is_the_recorded_one(record):
    data = bundled_path(DEFAULT_TEXT).read_bytes()
    assert len(data) == record["bytes"]
    assert hashlib.sha256(data).hexdigest() == record["sha256"]
    assert 512_000 <= len(data) <= 1_200_000


def test_kinds_take_turns(record, documents):
    kinds = [kind for kind, _, _ in documents]
    assert sorted(set(kinds)) == sorted(record["kinds"])
    counts = Counter(kinds)
    assert min(counts.values()) >= 0.9 * max(counts.values())
    whole = min(counts.values()) * len(counts)
    for start in range(0, whole, len(counts)):
        assert len(set(kinds[start:start + len(counts)])) == len(counts)


def test_documents_are_short_whole_and_different(documents):
    texts = [text for _, _, text in documents]
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert text.endswith("\n\n")
        assert "\ufffd" not in text
        assert 200 <= len(text.encode()) <= 5000


def test_ten_thousand_tokens_are_broad(record):
    """About 40 kB, which 10,000 tokens of common tokenizers are, and the next ones."""
    text = sq.bundled_text(DEFAULT_TEXT)
    for start in (0, 200_000, 400_000):
        part = text[start:start + 40_000]
        assert sum(bool(re.search(script, part)) for script in SCRIPTS.values()) >= 1
        assert "User: " in part
        assert re.search(r"def |func |\{\n|local function", part)
    for name, script in SCRIPTS.items():
        assert len(re.findall(script, text)) > 500, name


def test_every_source_is_named_with_its_licence(record, documents):
    notice = (ROOT / "licenses" / "calibration-text.txt").read_text("utf-8")
    names = {source["name"] for source in record["sources"]}
    assert names == {source for _, source, _ in documents}
    for source in record["sources"]:
        assert source["licence"] in LICENCES
        assert re.fullmatch("[0-9a-f]{64}", source["sha256"])
        head = f"from {source['package']}, {source['address']}\nlicence: {source['licence']}"
        assert notice.count(f"{source['text']}\n{head}") == 1
        section = notice.split(f"{source['text']}\n{head}")[1].split("-" * 80)[0]
        needs = {"MIT": "Permission is hereby granted", "BSD-3-Clause": "Redistribution and use"}
        assert needs.get(source["licence"], "(") in section
    assert "calibration-text.txt" in (ROOT / "NOTICE").read_text("utf-8")


def test_default_is_this_text():
    checkpoint = sq.load_checkpoint(sq.bundled_model())
    config = sq.QuantConfig(calibration_tokens=64)
    expected = sq.calibration_windows(checkpoint, config, bundled_path(DEFAULT_TEXT))
    assert (sq.calibration_windows(checkpoint, config) == expected).all()
    assert checkpoint.tokenizer.decode(expected[0][:12].tolist())[:12] in (
        sq.bundled_text(DEFAULT_TEXT)[:60])
