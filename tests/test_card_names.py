"""The model card is plain Markdown whatever names are in a run's files, and tells nothing private."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from distill.card import build_card
from distill.markdown import escaped, one_line, without_folders
from distill.run_folder import RunFolder
from tests.card_run import finished_run, headings, parsed, put, structure, text_of, write_file
from tests.report_run import event_line, lines_of_a_run

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


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_are_text_and_nothing_else(run: RunFolder, name: str) -> None:
    """A page with a hostile name has the parts of one with a harmless name, and YAML gives the name back."""
    harmless = build_card(run)
    for key in ("teacher.name", "teacher.architecture"):
        put(run.results_file, key, name)
    put(run.config_file, "data.path", f"/data/{name.replace('/', '')}.jsonl")
    put(run.results_file, "heads.safety.labels_from", name)
    for key in ("student.quant", "training.precision"):
        put(run.results_file, key, name)
    run.gguf.unlink()
    write_file(run.gguf, license="other", license__name=name.encode("utf-8", "replace").decode())
    card = build_card(run)
    benign = build_card_with_plain_names(run)
    assert structure(card) == structure(benign)
    assert headings(card) == headings(harmless)
    front = parsed(card)[0]
    assert front["model-index"][0]["name"] == f"SO8T 64x2, distilled from {without_folders(name)}"
    assert front["license_name"] == one_line(name.encode("utf-8", "replace").decode())
    assert ModelCard(card).data.to_dict() == front
    shown = text_of(card).splitlines()
    assert any(
        line.startswith(f"{without_folders(name)}, {one_line(name)}, 4.8 M parameters") for line in shown
    )


def build_card_with_plain_names(run: RunFolder) -> str:
    """The card with harmless names in place of all that are put into it above."""
    for key in ("teacher.name", "teacher.architecture", "student.quant", "training.precision"):
        put(run.results_file, key, "name")
    put(run.config_file, "data.path", "/data/name.jsonl")
    put(run.results_file, "heads.safety.labels_from", "name")
    write_file(run.gguf, license="other", license__name="name")
    return build_card(run)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a_b", r"a\_b"),
        ("http://x", r"http\://x"),
        ("www.x.org", r"www\.x.org"),
        ("10:30", "10:30"),
        ("a  b\tc", "a b c"),
        ("\x1b[31m", r"�\[31m"),
    ],
)
def test_escapes(text: str, shown: str) -> None:
    assert escaped(text) == shown
    assert escaped(escaped(text)) == shown


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/alice/models/tiny.gguf", "tiny.gguf"),
        ("/home/al ice/tiny.gguf", "tiny.gguf"),
        ("~/tiny", "tiny"),
        (r"C:\Users\alice\tiny", "tiny"),
        ("one + /home/alice/two", "one + two"),
        ("made of /home/alice/two", "made of two"),
        ("owner/name", "owner/name"),
        ("either / or", "either / or"),
    ],
)
def test_of_a_path_only_the_last_part_is_told(name: str, shown: str) -> None:
    assert without_folders(name) == shown


def test_nothing_private_is_told(run: RunFolder) -> None:
    """Markers in everything that a run's folder holds of texts and places: none of them is in the card."""
    secret = "MARKER-alice"
    put(run.config_file, "data.path", f"/home/{secret}/letters.jsonl")
    put(run.config_file, "teacher.path", f"/home/{secret}/teacher.gguf")
    put(run.results_file, "teacher.name", f"/home/{secret}/teacher.gguf")
    put(run.results_file, "teacher.chat_template", secret)
    put(run.results_file, "soft_targets.folder", f"/home/{secret}/store")
    put(run.results_file, "heads.safety.labels_from", f"/home/{secret}/labels.jsonl")
    put(run.results_file, "student.base", f"/home/{secret}/base")
    run.held_out_file.write_text(json.dumps({"texts": [f"<think>{secret}</think>"]}))
    for name in ("audit.jsonl", "safety_prompts.jsonl"):
        (run.path / name).write_text(json.dumps({"prompt": secret, "hash": "ab" * 32}) + "\n")
    lines = [*lines_of_a_run(), event_line(60, "abort", words=f"<think>{secret}", batch=[3, f"{secret}.txt"])]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = build_card(run)
    assert secret not in card and "<think>" not in card and "/home" not in card
    assert "letters.jsonl" in card and "labels.jsonl" in card and "“teacher.gguf”" in card
    assert "1 training given up" in card
    put(run.config_file, "data.path", f"/home/{secret}")
    card = build_card(run)
    assert secret not in card and "text files of a folder" in card
