# SPDX-License-Identifier: Apache-2.0
"""`inspect --html` and `compare --html`: one file, the run's figures, and what a browser shows.

The browser is Chromium, driven by playwright; without them those tests are skipped.
"""

import re
import shutil
import sys
from html.parser import HTMLParser

import pytest
from conftest import SENTENCES, make_checkpoint

import singlequant as sq
from singlequant.cli.main import main
from singlequant.study.inspect import inspect_model
from singlequant.study.page import page, table

HOSTILE = "<b>model</b>&amp;\"'"  # a name of a folder
TOKENS = ["--calibration-tokens", "64"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model of a hostile name, inspect.html and compare.html."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("pages")
    make_checkpoint(folder / HOSTILE.replace("/", "\N{DIVISION SLASH}"))
    (model,) = [path for path in folder.iterdir() if path.is_dir()]
    text = folder / "text.txt"
    text.write_text(SENTENCES)
    common = ["--calibration", str(text), *TOKENS]
    assert main(["inspect", str(model), "--method", "hadamard", "balanced", *common,
                 "--html", str(folder / "inspect.html")]) == 0
    assert main(["compare", str(model), "--methods", "none,hadamard", "--schemes", "w4a4", "--text",
                 str(text), "--seq-len", "32", "--windows", "2", "--no-default", *common,
                 "--html", str(folder / "compare.html"), "--csv", str(folder / "rows.csv")]) == 0
    return folder


class Sources(HTMLParser):
    """Every address that a page names, and every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs
                           if name.rpartition(":")[2] in ("href", "src", "data", "srcset",
                                                          "action", "poster")]

    handle_startendtag = handle_starttag


@pytest.mark.parametrize("name", ["inspect", "compare"])
def test_page_names_no_other_file(made, name):
    text = (made / f"{name}.html").read_text()
    found = Sources(text)
    assert found.addresses
    assert all(address.startswith(("#", "data:")) for address in found.addresses)
    assert not found.tags & {"script", "iframe", "object", "embed", "form", "base"}
    style = "".join(re.findall(r"<style.*?</style>", text, re.S))
    assert "@import" not in style
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))
    assert len(text) < 2_000_000


@pytest.mark.parametrize("name", ["inspect", "compare"])
def test_names_from_outside_are_escaped(made, name):
    text = (made / f"{name}.html").read_text()
    assert "<b>model" not in text
    assert "&lt;b&gt;model&lt;" in text


def test_lines_of_a_picture_have_colours_of_the_page(made):
    text = (made / "compare.html").read_text()
    assert "stroke: var(--line)" in text
    assert "stroke: currentColor" in text
    assert not re.findall(r"#(?:e[56]){3}|#010203", text)


def test_comparison_shows_the_rows_figures(made):
    text = (made / "compare.html").read_text()
    head, *rows = (line.split(",") for line in (made / "rows.csv").read_text().splitlines())
    for row in rows:
        assert f"<td>{float(row[head.index('perplexity')]):.3f}</td>" in text
        kl = float(row[head.index("kl_mean")])
        assert re.search(rf"<td>{re.escape(f'{kl:.5f}')}\*?</td>", text)


def test_inspection_shows_every_site_and_the_same_bytes_again(made, tmp_path):
    (model,) = [path for path in made.iterdir() if path.is_dir()]
    again = inspect_model(model, ["hadamard", "balanced"],
                          config=sq.QuantConfig(calibration_tokens=64),
                          calibration=made / "text.txt", surface=True)
    again.to_html(tmp_path / "again.html")
    text = (tmp_path / "again.html").read_text()
    assert text == (made / "inspect.html").read_text()
    for site in again.sites:
        assert f'<td class="text">{site}</td>' in text
    assert text.count("<svg") == 3


def test_page_without_a_folder_or_matplotlib_is_refused_before_work(made, capsys, monkeypatch):
    (model,) = [path for path in made.iterdir() if path.is_dir()]
    for command in ("inspect", "compare"):
        assert main([command, str(model), "--html", str(made / "none" / "page.html")]) == 2
        assert "expected a file in an existing folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in ("inspect", "compare"):
        assert main([command, str(model), "--html", str(made / "page.html")]) == 2
        assert "pip install 'singlequant[plots]'" in capsys.readouterr().err


# ---- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def open_page(browser, path, scheme="light", width=1280):
    """(page, every address that it asked for, what it complained of)."""
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, complaints = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(path.as_uri())
    return opened, asked, complaints


def brightness(colour: str) -> float:
    """Of rgb(...): 0 black, 255 white."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["inspect", "compare"])
def test_browser_shows_all_of_it_and_asks_for_nothing(made, browser, name, scheme, width):
    opened, asked, complaints = open_page(browser, made / f"{name}.html", scheme, width)
    own = (made / f"{name}.html").as_uri()
    assert [address for address in asked if not address.startswith("data:")] == [own]
    assert complaints == []
    assert opened.locator("h1").inner_text().startswith("<b>model<")
    # tables and pictures scroll in themselves: the page never does sideways
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    for locator in (opened.locator("svg"), opened.locator("table").first):
        box = locator.first.bounding_box()
        assert box["width"] > 300
        assert box["height"] > 60
    ground = brightness(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
    for ink in ("h1", ".card b", "svg g g", "td", "dd"):
        shown = opened.locator(ink).first.evaluate("e => getComputedStyle(e).color")
        assert abs(brightness(shown) - ground) > 90, ink
    assert ground < 60 if scheme == "dark" else ground > 200
    opened.close()


def test_browser_unfolds_the_details(made, browser):
    opened, _, _ = open_page(browser, made / "inspect.html")
    hidden = opened.locator("details table").first
    assert not hidden.is_visible()
    opened.locator("summary").first.click()
    assert hidden.is_visible()
    opened.close()


def test_browser_refuses_what_is_not_in_the_page(browser, tmp_path):
    """The page's own policy, should a name ever slip through the escaping."""
    slipped = '<img src="http://127.0.0.1:9/x.png"><script>document.title = "run"</script>'
    (tmp_path / "page.html").write_text(page("title", "lead", [slipped], [table([["a"]], 1)], "me"))
    opened, _, complaints = open_page(browser, tmp_path / "page.html")
    assert opened.title() == "title"
    assert len(complaints) >= 2
    assert all("Content Security Policy" in complaint for complaint in complaints)
    opened.close()
