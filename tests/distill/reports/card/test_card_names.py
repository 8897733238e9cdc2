"""The model card is plain Markdown whatever names a run's files hold, and tells nothing private."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from distill.reports.card.card import build_card
from distill.reports.render.markdown import escaped, one_line, without_folders
from distill.runs.folder import RunFolder
from tests.support.report_runs import (
    event_line,
    finished_run,
    headings,
    lines_of_a_run,
    parsed,
    put,
    structure,
    text_of,
    write_file,
    write_lines,
)

HOSTILE_NAMES = [
    "a`b``c",
    "x | y | z",
    "one\n---\n# two\n\n```sh\nrm -rf ~\n```",
    "[click](https://evil.example) ![x](https://evil.example/x.png)",
    "https://evil.example www.evil.example me@evil.example",
    "<script>alert(1)</script> <!-- &lt; &#x41; -->",
    "**bold** _it_ ~~gone~~ $$x$$",
    "{{ 7*7 }}{% raw %}",
    "a: b # c",
    "- item",
    "\"quoted' !!python/object:os.system {a: [b]} *x &y %z",
    "back\\slash \\",
    "\u202emirrored\u2028line\x85next\x00\udcff",
    "yes",
]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return finished_run(tmp_path / "first")


def card_with(run: RunFolder, name: str, licence: str) -> str:
    """The card with a name in every place where a run's files hold one."""
    for key in ("teacher.name", "teacher.architecture", "student.quant", "training.precision"):
        put(run.results_file, key, name)
    put(run.results_file, "heads.safety.labels_from", name)
    put(run.config_file, "data.path", f"/data/{name.replace('/', '')}.jsonl")
    write_file(run.gguf, license="other", license__name=licence)
    return build_card(run)


def test_names_are_text_and_nothing_else(run: RunFolder) -> None:
    """A page with a hostile name has the parts of any other, and YAML gives the name back."""
    titles = headings(build_card(run))
    harmless = structure(card_with(run, "name", "name"))
    for name in HOSTILE_NAMES:
        licence = name.encode("utf-8", "replace").decode()
        card = card_with(run, name, licence)
        assert structure(card) == harmless and headings(card) == titles, name
        front, told = parsed(card)[0], without_folders(name)
        assert front["model-index"][0]["name"] == f"SO8T 64x2, distilled from {told}", name
        assert front["license_name"] == one_line(licence), name
        assert ModelCard(card).data.to_dict() == front, name
        start = without_folders(f"{name}, {name}, 4.8 M parameters")
        assert any(line.startswith(start) for line in text_of(card).splitlines()), name


def test_escapes() -> None:
    """Each once, and what is escaped stays as it is."""
    for text, shown in (
        ("a_b", r"a\_b"),
        ("http://x", r"http\://x"),
        ("www.x.org", r"www\.x.org"),
        ("10:30", "10:30"),
        ("a  b\tc", "a b c"),
        ("\x1b[31m", r"�\[31m"),
    ):
        assert escaped(text) == escaped(escaped(text)) == shown, text


def test_of_a_path_only_the_last_part_is_told() -> None:
    for name, shown in (
        ("/home/alice/models/tiny.gguf", "tiny.gguf"),
        ("/home/al ice/tiny.gguf", "tiny.gguf"),
        ("~/tiny", "tiny"),
        (r"C:\Users\alice\tiny", "tiny"),
        ("one + /home/alice/two", "one + two"),
        ("made of /home/alice/two", "made of two"),
        ("owner/name", "owner/name"),
        ("either / or", "either / or"),
    ):
        assert without_folders(name) == shown, name


def test_nothing_private_is_told(run: RunFolder) -> None:
    """Of all texts and places that a run's folder holds, none is in the card."""
    secret = "MARKER-alice"
    for file, key, name in (
        (run.config_file, "data.path", "letters.jsonl"),
        (run.config_file, "teacher.path", "teacher.gguf"),
        (run.results_file, "teacher.name", "teacher.gguf"),
        (run.results_file, "soft_targets.folder", "store"),
        (run.results_file, "heads.safety.labels_from", "labels.jsonl"),
        (run.results_file, "student.base", "base"),
    ):
        put(file, key, f"/home/{secret}/{name}")
    put(run.results_file, "teacher.chat_template", secret)
    run.held_out_file.write_text(json.dumps({"texts": [f"<think>{secret}</think>"]}))
    for name in ("audit.jsonl", "safety_prompts.jsonl"):
        (run.path / name).write_text(json.dumps({"prompt": secret, "hash": "ab" * 32}) + "\n")
    end = event_line(60, "abort", words=f"<think>{secret}", batch=[3, f"{secret}.txt"])
    write_lines(run.path / "metrics.jsonl", [*lines_of_a_run(), end])
    card = build_card(run)
    assert secret not in card and "<think>" not in card and "/home" not in card
    assert "letters.jsonl" in card and "labels.jsonl" in card and "“teacher.gguf”" in card
    assert "1 training given up" in card
    put(run.config_file, "data.path", f"/home/{secret}")
    card = build_card(run)
    assert secret not in card and "text files of a folder" in card
