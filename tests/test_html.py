# SPDX-License-Identifier: Apache-2.0
"""What notebooks show: results as small HTML tables, progress bars, figures."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import make_checkpoint

import singlequant as sq
from singlequant.html import facts_html, table_html
from singlequant.study import inspect

VOID = {"br", "hr", "img"}


class Balanced(HTMLParser):
    """Text of a page whose tags all close in order, and which asks for nothing from elsewhere."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.tags = [], [], set()
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert {name for name, _ in attrs} <= {"style"}
        assert not any("url(" in value for _, value in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def text_of(thing):
    return " | ".join(Balanced(thing if isinstance(thing, str) else thing._repr_html_()).text)


NASTY = "<script>alert('&')</script>"


def test_every_text_is_escaped():
    for page in (facts_html(NASTY, {NASTY: NASTY}, [NASTY]),
                 table_html(NASTY, [[NASTY, NASTY], ["a", 1]], notes=[NASTY])):
        found = Balanced(page)
        assert "script" not in found.tags
        assert "".join(found.text).count(NASTY) >= 3


def test_table_marks_rows_and_aligns_numbers():
    page = table_html("t", [["name", "a", "b"], ["n", 1, 2]], bold=[1])
    cells = re.findall(r'<td style="([^"]*)">([^<]*)', page)
    assert [("bold" in style, "left" in style, text) for style, text in cells] == [
        (False, True, "a"), (False, False, "1"), (True, True, "b"), (True, False, "2")]


def test_none_facts_are_left_out():
    assert text_of(facts_html("t", {"a": None, "b": 0})) == "t | b | 0"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("html")
    model = make_checkpoint(folder / "a<b>&c")
    config = sq.QuantConfig("w4a4", bits=4.0, calibration_tokens=256, weights="rtn")
    return model, sq.quantize_folder(model, folder / "<i>out", config)


def test_models_and_summaries_show_sizes_and_escape_folders(quantized):
    model, summary = quantized
    shown = text_of(summary)
    assert f"{summary.bytes_before / 1e6:.1f} MB → {summary.bytes_after / 1e6:.1f} MB" in shown
    assert str(summary.out) in shown
    assert "w4a4, method balanced, weights rtn" in text_of(sq.load_checkpoint(summary.out))
    original = text_of(sq.load(model))
    assert str(model) in original
    assert "float16, not quantized" in original
    assert "32 bits" in original
    estimate = sq.dry_run(model, summary.config)
    assert f"{estimate.bytes_after / 1e6:.1f} MB" in text_of(estimate)


def test_evaluation_shows_its_figures(quantized, text):
    model, summary = quantized
    found = sq.perplexity(sq.load(summary.out), text.read_text(), 64, sq.load(model))
    shown = text_of(found)
    assert f"{found.perplexity:.3f}" in shown
    assert f"{found.kl_mean:.5f} nats per token" in shown
    alone = text_of(sq.perplexity(sq.load(model), text.read_text(), 64))
    assert "KL" not in alone


def test_config_marks_what_is_not_the_default():
    page = sq.QuantConfig("w4a4", seed=3)._repr_html_()
    bold = re.findall(r'font-weight:bold">([^<]*)', page)
    assert bold == ["scheme", "w4a4", "seed", "3"]
    assert "bold" not in text_of(sq.QuantConfig())


def test_stages_show_a_line_for_each_site_and_linear(source):
    config = sq.QuantConfig(bits=4.0, weights="rtn", calibration_tokens=256)
    layer = next(sq.calibrate(source, sq.calibration_windows(source, config)))
    site = layer.sites["down"]
    assert site.largest.max() == max(site.max.max(), -site.min.min())
    assert (site.rms**2 * site.count).sum() == pytest.approx(site.sum2.sum())
    shown = text_of(layer)
    assert all(name in shown for name in layer.sites)
    assert f"{site.rms.max() / np.median(site.rms):.1f}" in text_of(site)
    rotations = next(sq.solve_rotations([layer], config))
    assert repr(rotations.sites["qkv"]) in text_of(rotations)
    quantized = next(sq.quantize(source, [rotations], config))
    assert all(name in text_of(quantized) for name in quantized.packed)


def test_inspection_and_comparison_show_their_tables():
    model, config = sq.bundled_model(), sq.QuantConfig("w4a4", calibration_tokens=256)
    found = sq.inspect_model(model, ["none", "hadamard"], config=config, layer=0, site="qkv")
    shown = text_of(found)
    row = found.select(method="hadamard", final=True)[0]
    assert f"{row.kurtosis:.2f}" in shown
    assert shown.count("original") == 1
    compared = sq.compare(model, methods=["none", "hadamard"], schemes=["w4a4"], windows=1,
                          seq_len=64, calibration_tokens=256, defaults=False)
    shown = text_of(compared)
    best = min(compared.rows[1:], key=lambda r: r.results[0].kl_mean)
    assert f"{best.results[0].kl_mean:.5f}*" in shown
    assert "* lowest KL of its scheme" in shown


def test_channels_are_drawn_before_and_after(source):
    pytest.importorskip("matplotlib")
    config = sq.QuantConfig(method="hadamard", bits=4.0, calibration_tokens=64)
    layer = next(sq.calibrate(source, sq.calibration_windows(source, config)))
    site, rotation = layer.sites["down"], next(sq.solve_rotations([layer], config)).sites["down"]
    before, after = inspect.plot_channels(site, rotation, "inputs of down").axes
    rotated = sq.rotate(site.sample, rotation.left.matrix(), rotation.right.matrix())
    for axis, values in ((before, site.sample), (after, rotated)):
        tops = np.array([line[1, 1] for line in axis.collections[0].get_segments()])
        np.testing.assert_allclose(tops, np.abs(values).max(axis=0), rtol=1e-4)
    assert before.get_ylim() == after.get_ylim()
    assert before.get_title() == "inputs of down: before"


def test_overview_of_an_inspection_is_saved_whole_or_refused_at_once(tmp_path):
    pytest.importorskip("matplotlib")
    config = sq.QuantConfig("w4a4", calibration_tokens=64)
    found = sq.inspect_model(sq.bundled_model(), ["hadamard"], config=config, layer=0, site="o")
    figure = found.plot(tmp_path / "outliers.png")
    assert (tmp_path / "outliers.png").read_bytes().startswith(b"\x89PNG")
    assert found.model in figure.get_suptitle()
    with pytest.raises(ValueError, match="outliers.doc"):
        found.plot(tmp_path / "outliers.doc")


CELLS = (
    "import singlequant as sq\nfrom singlequant.study import inspect\n"
    "found = sq.inspect_model(sq.bundled_model(), ['hadamard'], layer=0, site='o',\n"
    "    config=sq.QuantConfig('w4a4', calibration_tokens=256))\nfound",
    "found.plot()",
    "with sq.progress_bar('counting', 'step') as progress:\n    progress(1, 4)\n    progress(4, 4)",
)


@pytest.mark.filterwarnings("ignore")  # the kernel's machinery warns about itself
def test_a_notebook_shows_tables_figures_and_bars():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    table, figure, bar = (cell.outputs for cell in notebook.cells)
    assert "<table>" in table[0].data["text/html"]
    assert "image/png" in figure[0].data
    assert "counting" in str(bar)


def test_bar_on_no_terminal_is_silent(capsys):
    with sq.progress_bar("counting", "step") as progress:
        progress(1, 4)
        progress.part("writing", "token")(1, 2)
        progress(4, 4)
    assert capsys.readouterr() == ("", "")
