#!/usr/bin/env python3
"""Make the package's own zero-shot tasks, ``singlequant/data/tasks/*.jsonl``, from heldout.txt.

    python tools/make_task.py [--output FOLDER]

stdlib_continuation: 100 places, evenly spaced through the text. A question shows the eight words
that follow such a place and asks which of four passages they continue: the 32 words before it, or
those before three other places, a quarter of the text apart. The passages are the choices, not the
continuations, because a model's log-likelihoods of one text behind four contexts compare fairly;
those of four texts depend on how common their words are, and a small model then scores near chance.

stdlib_perplexity: 20 stretches of whole paragraphs, evenly spaced, for word and byte perplexity.

No random numbers: the same text gives the same files.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "singlequant" / "data"
QUESTIONS, CHOICES, PASSAGE_WORDS, CONTINUATION_WORDS = 100, 4, 32, 8
STRETCHES, STRETCH_WORDS = 20, 300


def continuation_questions(text: str) -> list[dict]:
    """Rows of continuation, passages and the index of the true one; white space as in the text."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    usable = len(words) - PASSAGE_WORDS - CONTINUATION_WORDS
    places = [PASSAGE_WORDS + usable * i // QUESTIONS for i in range(QUESTIONS)]
    passages = [text[words[p - PASSAGE_WORDS][0] : words[p - 1][1]] for p in places]
    rows = []
    for i, place in enumerate(places):
        label = i % CHOICES  # the true passage's place among the choices
        chosen = [(i + (k - label) * QUESTIONS // CHOICES) % QUESTIONS for k in range(CHOICES)]
        rows.append({
            "continuation": text[words[place][0] : words[place + CONTINUATION_WORDS - 1][1]],
            "passages": [passages[c] for c in chosen],
            "label": label,
        })
    return rows


def stretches(text: str) -> list[dict]:
    """Rows of text: whole paragraphs of at least STRETCH_WORDS words together."""
    pieces, waiting = [], []
    for paragraph in text.split("\n\n"):
        waiting.append(paragraph)
        if len(" ".join(waiting).split()) >= STRETCH_WORDS:
            pieces.append("\n\n".join(waiting))
            waiting = []
    return [{"text": pieces[len(pieces) * i // STRETCHES]} for i in range(STRETCHES)]


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=DATA / "tasks", help="where the files go")
    output = parser.parse_args().output
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")
    output.mkdir(parents=True, exist_ok=True)
    write_rows(output / "stdlib_continuation.jsonl", continuation_questions(text))
    write_rows(output / "stdlib_perplexity.jsonl", stretches(text))


if __name__ == "__main__":
    main()
