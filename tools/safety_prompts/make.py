"""Writes ``distill/heads/prompts.jsonl.gz``, what a safety head learns from and is measured on.

    python -m tools.safety_prompts.make

Three parts, none of which shares a scene or a run of words with another:

- ``train``: of the grammar, whose worlds are its scenes;
- ``validation``: ``text/written_en.jsonl`` and ``text/written_ja.jsonl``, 16,200 prompts written
  line by line by 28 authors, language models in roles of their own; what is learnt from them counts
  more, and probabilities are fitted to them, author by author;
- ``test``: ``tools/checks/fresh_safety_prompts.jsonl``, by an author who saw none of the others, to
  be replaced by another's whenever somebody has looked at which of them fail.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tools.safety_prompts.grammar import Written, written
from tools.safety_prompts.tables import TEXT

EACH = 110  # prompts of a world, language and label, before leaks are taken out
RUN = {"en": 6, "ja": 12}  # words, or characters: so many in a row are a leak
TARGET = Path("distill/heads/prompts.jsonl.gz")
WRITTEN = {language: TEXT / f"written_{language}.jsonl" for language in RUN}
FRESH = Path("tools/checks/fresh_safety_prompts.jsonl")


def runs(text: str, language: str) -> set[str]:
    """All runs of ``RUN`` words or characters of a prompt, without case and punctuation; words end
    at a hyphen, not at an apostrophe."""
    plain = re.sub(r"_|[^\w\s]", " ", text.lower().replace("'", ""))
    units = plain.split() if language == "en" else list(re.sub(r"\s", "", plain))
    length = RUN[language]
    starts = range(len(units) - length + 1)
    return {" ".join(units[start : start + length]) for start in starts}


def without_leaks(prompts: Iterable[Written], taken: set[str]) -> Iterator[Written]:
    """Of the grammar's prompts those that share no run of words with a prompt of another world, nor
    any with ``taken``; of what belongs to every world, the frames, only ``taken`` counts."""
    owner: dict[str, int] = {}
    for one in prompts:
        own = runs(one.wanted, one.language)
        if taken & runs(one.text, one.language):
            continue
        if all(owner.get(run, one.world) == one.world for run in own):
            owner |= dict.fromkeys(own, one.world)
            yield one


def balanced(prompts: list[Written]) -> Iterator[Written]:
    """As many of each label and language as of the rarest, spread over all worlds."""
    counts = Counter((one.label, one.language) for one in prompts)
    least, seen = min(counts.values()), Counter[tuple[str, str]]()
    for one in prompts:
        cell = one.label, one.language
        seen[cell] += 1
        if seen[cell] * least // counts[cell] > (seen[cell] - 1) * least // counts[cell]:
            yield one


def by_hand() -> dict[str, list[dict[str, Any]]]:
    """The rows of the parts written by hand; of ``validation`` without those that share a run of
    words with ``test``. Scenes are each author's own."""
    test = [{**row, "scenario": f"fresh: {row['scenario']}"} for row in lines(FRESH)]
    tested = runs_of(test)
    written = [
        {**row, "language": language, "scenario": f"{row['author']}: {row['scenario']}"}
        for language, path in WRITTEN.items()
        for row in lines(path)
    ]
    return {"validation": [row for row in written if not tested & runs_of([row])], "test": test}


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def runs_of(some: Iterable[dict[str, Any]]) -> set[str]:
    """All runs of these rows' prompts."""
    return {run for row in some for run in runs(row["prompt"], row["language"])}


def rows() -> Iterator[dict[str, Any]]:
    """Every row of the file, part by part."""
    parts = by_hand()
    taken = runs_of(row for some in parts.values() for row in some)
    for one in balanced(list(without_leaks(written(EACH), taken))):
        yield {
            "part": "train",
            "scenario": f"world {one.world}",
            "language": one.language,
            "label": one.label,
            "prompt": one.text,
        }
    for part, some in parts.items():
        for row in some:
            yield {"part": part, **row}


def packed() -> bytes:
    """The file's bytes, the same on every machine with the same zlib."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows()]
    return gzip.compress("".join(lines).encode(), mtime=0)


if __name__ == "__main__":
    content = packed()
    TARGET.write_bytes(content)
    print(f"{TARGET}: {len(gzip.decompress(content).splitlines()):,} rows, {len(content):,} bytes")
