"""A finished run that a model card is made of, and the card as parsers and a reader see it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from gguf import GGUFWriter
from markdown_it import MarkdownIt
from markdown_it.token import Token

from distill.run_folder import RunFolder
from tests.report_run import make_run


def write_file(path: Path, **general: str) -> Path:
    """A GGUF file of 4 × 32 weights with these ``general.*`` keys (``__`` stands for a dot)."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("a student")
    writer.add_token_list(["a", "b", "c", "d"])
    for key, text in general.items():
        writer.add_string(f"general.{key.replace('__', '.')}", text)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def finished_run(path: Path) -> RunFolder:
    """A finished run with everything but a Modelfile, further exports, a transformers folder and a log."""
    folder = RunFolder(make_run(path))
    write_file(folder.gguf)
    return folder


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def put(path: Path, dotted: str, value: Any) -> None:
    """Set one entry of a JSON file."""
    *places, last = dotted.split(".")

    def edit(tree: dict[str, Any]) -> None:
        for place in places:
            tree = tree[place]
        tree[last] = value

    change(path, edit)


def parsed(card: str) -> tuple[dict[str, Any], list[Token]]:
    """Front matter and Markdown, as YAML's and CommonMark's own parsers see them, tables included."""
    _, front, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front), MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)


def text_of(card: str) -> str:
    """What a reader of the rendered page sees, each paragraph and cell in one line."""
    lines = []
    for token in parsed(card)[1]:
        if token.type == "inline":
            lines.append("".join(one.content for one in token.children or ()))
        elif token.type == "fence":
            lines.append(token.content)
    return "\n".join(lines)


def structure(card: str) -> list[str]:
    """The kinds of everything on the page, in order."""
    kinds = []
    for token in parsed(card)[1]:
        kinds.append(token.type + token.tag)
        kinds += [one.type for one in token.children or () if one.type != "text"]
    return kinds


def headings(card: str) -> list[str]:
    tokens = parsed(card)[1]
    return [
        follower.content
        for token, follower in itertools.pairwise(tokens)
        if token.type == "heading_open" and token.tag != "h1"
    ]


def section(card: str, title: str) -> str:
    """The Markdown under one heading."""
    found = re.search(rf"^##+ {title}\n(.*?)(?=^##+ |\Z)", card, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def row(card: str, first: str) -> list[str]:
    """The cells of the table row that begins with this."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]
