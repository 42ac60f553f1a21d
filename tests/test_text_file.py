"""Texts of any size: what is read of them, what is said of faults, which windows are drawn."""

import os
import resource
import threading

import numpy as np
import pytest

import singlequant as sq
from singlequant.cli.main import main
from singlequant.sweep.text_file import (
    BYTES_PER_TOKEN,
    MARGIN,
    drawn_windows,
    first_tokens,
    read_text,
)
from singlequant.sweep.texts import WHOLE_BYTES, bundled_path

FAR = 200_000  # bytes, behind all that a few windows need


@pytest.fixture(scope="module")
def checkpoint():
    return sq.load_checkpoint(sq.bundled_model())


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file above WHOLE_BYTES whose lines say where they begin."""
    path = tmp_path_factory.mktemp("texts") / "large.txt"
    path.write_text("".join(f"{i:08d} is the number of this line.\n" for i in range(40_000)))
    assert path.stat().st_size > WHOLE_BYTES
    return path


def characters(text, special=True):
    """A tokenizer with a token per character, and one in front."""
    return np.array([1] * special + [ord(c) for c in text], np.int64)


@pytest.mark.parametrize("count", [1, 63, 512, 5000, None])
def test_first_tokens_are_those_of_the_whole_file(checkpoint, count):
    whole = checkpoint.encode(sq.bundled_text("heldout"))
    found = first_tokens(checkpoint.encode, bundled_path("heldout"), count)
    np.testing.assert_array_equal(found, whole[:count])


def test_first_tokens_read_no_further_than_they_need(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"word " * (FAR // 5) + b"\xff")
    assert len(first_tokens(characters, path, 1000)) == 1000
    fault = rf"text\.txt: expected UTF-8 text, found byte 0xff at {FAR}"
    with pytest.raises(ValueError, match=fault):
        first_tokens(characters, path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
@pytest.mark.parametrize("lead", range(4))
def test_fault_behind_the_first_piece_is_named_with_its_offset(tmp_path, lead, mark):
    path = tmp_path / "text.txt"
    good = mark + b"a" * lead + "\u4e2d".encode() * 400  # characters lie across the pieces' ends
    path.write_bytes(good + b"\x80 more" + good)
    with pytest.raises(ValueError, match=rf"found byte 0x80 at {len(good)}$"):
        first_tokens(characters, path, 1000)


def test_characters_and_line_ends_across_pieces_are_whole(tmp_path):
    path = tmp_path / "text.txt"
    text = "\r\n".join("\u4e2d\u6587" * 3 for _ in range(2000))
    path.write_bytes(text.encode())
    assert read_text(path) == text.replace("\r\n", "\n")
    for count in range(200, 210):
        expected = characters(text.replace("\r\n", "\n"))[:count]
        np.testing.assert_array_equal(first_tokens(characters, path, count), expected)


def test_byte_order_mark_is_no_text(checkpoint, tmp_path, capsys):
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    text = sq.bundled_text("heldout")[:6000]
    plain.write_text(text, "utf-8")
    marked.write_text(text, "utf-8-sig")
    assert read_text(marked) == text
    config = sq.QuantConfig(calibration_tokens=64)
    windows = [sq.calibration_windows(checkpoint, config, path) for path in (plain, marked)]
    np.testing.assert_array_equal(*windows)
    printed = []
    for path in (plain, marked):
        assert main(["eval", str(sq.bundled_model()), "--text", str(path), "--seq-len", "64",
                     "--windows", "2"]) == 0
        printed.append(capsys.readouterr().out.splitlines()[1].split(","))
    assert printed[0][0] == printed[1][0]
    assert "126 predictions" in printed[0][0]


def test_text_behind_much_white_space_is_found(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" " * FAR + "word " * 1000)
    assert len(first_tokens(lambda text, _: characters(text.strip()), path, 500)) == 500
    path.write_text(" \n" * FAR)
    with pytest.raises(ValueError, match=r"text\.txt: expected text, found an empty file"):
        first_tokens(characters, path, 500)


def test_pipes_are_read_as_files_are(checkpoint):
    config = sq.QuantConfig(calibration_tokens=32, seed=3)
    read, write = os.pipe()

    def feed():
        with os.fdopen(write, "wb") as pipe:
            pipe.write(bundled_path("heldout").read_bytes()[:8000])

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        windows = sq.calibration_windows(checkpoint, config, f"/dev/fd/{read}")
    finally:
        feeder.join()
        os.close(read)
    assert windows.shape == (1, 32)


def test_drawn_windows_begin_at_lines_all_over_the_file(large):
    windows = drawn_windows(characters, large, 16, 64, seed=1)
    lines = [int(bytes(row[:8].astype(np.uint8))) for row in windows]
    parts = [line * 16 // 40_000 for line in lines]
    assert parts == list(range(16))
    np.testing.assert_array_equal(windows, drawn_windows(characters, large, 16, 64, seed=1))
    assert (windows != drawn_windows(characters, large, 16, 64, seed=2)).any()


def test_large_files_are_drawn_from_without_reading_them(checkpoint, large, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(large.read_bytes() + b"\xff" * FAR)  # no part begins so late
    config = sq.QuantConfig(calibration_tokens=256, calibration_window=128, seed=4)
    windows = sq.calibration_windows(checkpoint, config, path)
    expected = drawn_windows(checkpoint.encode, path, 2, 128, seed=4)
    np.testing.assert_array_equal(windows, expected)


def test_drawn_windows_of_one_long_line_begin_with_whole_characters(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\u4e2d\u6587" * 30_000, "utf-8")
    windows = drawn_windows(characters, path, 8, 32, seed=5)
    assert set(np.unique(windows)) <= {1, 0x4E2D, 0x6587}


def test_drawn_windows_near_the_end_step_back(tmp_path):
    path = tmp_path / "text.txt"
    need = BYTES_PER_TOKEN * (64 + MARGIN)
    path.write_text("x\n" * need + "\n" + "y" * need)
    shorten = characters(path.read_text()[-30:])
    windows = drawn_windows(lambda text, _: characters(text)[::20], path, 1, 64, seed=0)
    assert windows.shape == (1, 64)
    with pytest.raises(ValueError, match=r"text\.txt: expected at least one window of 64 tokens"):
        drawn_windows(lambda text, _: shorten, path, 1, 64, seed=0)


def test_calibration_window_is_as_asked_up_to_the_models_maximum(checkpoint):
    limit = checkpoint.spec.max_position_embeddings
    for asked, length in ((128, 128), (100 * limit, limit)):
        config = sq.QuantConfig(calibration_tokens=1024, calibration_window=asked)
        assert sq.calibration_windows(checkpoint, config).shape == (1024 // length, length)
    with pytest.raises(ValueError, match="calibration_window: expected an integer from 1"):
        sq.QuantConfig(calibration_window=0)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_text_of_wider_units_is_named_as_such(tmp_path, encoding):
    """Without a mark it decodes as UTF-8, every other character a zero."""
    path = tmp_path / "text.txt"
    path.write_bytes(("The quick brown fox. " * 9000).encode(encoding))
    for call in (lambda: first_tokens(characters, path, 100), lambda: read_text(path)):
        with pytest.raises(ValueError, match=r"text\.txt: expected UTF-8 text, found UTF-16 or"):
            call()


def test_a_few_zeros_are_characters_of_a_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\0two\0\n" * 100)
    assert read_text(path) == "one\0two\0\n" * 100


@pytest.mark.parametrize("head", [b"", b"some text \n" * 2000])
@pytest.mark.parametrize("count", [5000, None])
def test_zeros_without_an_end_are_no_text(tmp_path, head, count):
    """A file of 10 GB that holds nothing but a beginning, as a download that was reserved."""
    path = tmp_path / "t.txt"
    path.write_bytes(head)
    os.truncate(path, 10 << 30)
    many = None if count is None else count * 10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"t\.txt: expected UTF-8 text, found .*binary data"):
        first_tokens(characters, path, many)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_error_of_reading_names_the_file():
    """/proc/self/mem can be opened, and has nothing at its beginning."""
    with pytest.raises(OSError, match="/proc/self/mem"):
        read_text("/proc/self/mem")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom"])
def test_devices_without_an_end_are_no_text(device):
    with pytest.raises(ValueError, match=f"{device}: expected UTF-8 text, found"):
        read_text(device)
