"""The text that a vocabulary is cut by: nothing lost, nothing twice; letters that fall to bytes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from distill.capture.data_rows import DataRows, read_rows
from distill.config.schema import DataConfig
from distill.errors import UserError
from distill.trimming.scripts import lost_scripts
from distill.trimming.text import PIECE, spread, text_of, windows
from teachers.gguf.file import Field
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.vocabulary.selection import Vocabulary
from tests.support.llama.tokenizers import sentencepiece_fields
from tests.support.teachers import BigramTeacher, example_fields


def rows_of(path: Path) -> DataRows:
    """What is in a file."""
    data = read_rows(DataConfig(path=str(path)))
    assert data is not None
    return data


def test_pieces_are_the_text(tmp_path: Path, example_gguf: GGUFTeacher) -> None:
    """Plain text in pieces that end with lines; conversations as the template writes them; a tenth
    held out, in stretches over all of it."""
    lines = [f"line {number} " + "word " * (number % 40) + "\n" for number in range(3000)]
    lines.insert(7, "x" * 5000 + "\n")
    (tmp_path / "a.txt").write_text("".join(lines))
    text = text_of(rows_of(tmp_path / "a.txt"), example_gguf)
    whole, held = "".join(lines), [piece.text for piece in text.held_out]
    pieces = sorted((p.text for p in (*text.training, *text.held_out)), key=whole.index)
    assert "".join(pieces) == whole and text.whole
    places = [pieces.index(one) / len(pieces) for one in held]
    in_each = [sum(n <= 10 * place < n + 1 for place in places) for n in range(10)]
    assert max(in_each) - min(in_each) <= 1, "the same share of each part of the text"
    assert max(map(len, pieces)) <= PIECE and len(text.held_out) == len(pieces) // 10
    ended = sum(piece.endswith("\n") for piece in pieces)
    assert ended > len(pieces) - 8, "but for the long line"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns} for _ in range(30)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = text_of(rows_of(tmp_path / "b.jsonl"), example_gguf)
    assert chats.training[0].special and chats.training[0].text.startswith("<|user|>\nq<|end|>")
    (tmp_path / "c.txt").write_text("too short")
    with pytest.raises(UserError, match=r"9 characters are too little text.*give 3000"):
        text_of(rows_of(tmp_path / "c.txt"), example_gguf)


def test_every_token_is_predicted_once() -> None:
    """Behind the first token, in windows that the context holds; spread evenly."""
    teacher = BigramTeacher(50, 8)
    rows = [np.arange(1, n, dtype=np.int32) % 50 for n in (2, 5, 1024, 1025, 2500)]
    sequences = windows(teacher, rows)
    assert max(map(len, sequences)) == 1024 and {int(one[0]) for one in sequences} == {0}
    assert np.array_equal(np.concatenate([one[1:] for one in sequences]), np.concatenate(rows))
    assert spread([10] * 100, 50) == [0, 25, 50, 74, 99]
    assert spread([10] * 3, 1000) == [0, 1, 2] and spread([10] * 3, 1) == [0]


def lost(fields: dict[str, Field], dropped: str, text: str) -> dict[str, tuple[float, float]]:
    """What is lost of ``text`` without the tokens that hold a letter of ``dropped``."""
    vocabulary = Vocabulary(fields)
    whole = Vocabulary(fields).pieces
    texts = {number: text for text, number in whole.ids.items()}
    kept = [n for n in texts if not any(sign in texts[n] for sign in dropped)]
    found = lost_scripts(vocabulary, kept, Counter(text))
    return {one.name: (one.share, one.of_text) for one in found}


def test_letters_that_fall_to_bytes() -> None:
    """By script, of those that had a token."""
    pieces = sentencepiece_fields()
    assert lost(pieces, "カ", "カタカナ and 日本, 12") == {"Katakana": (2 / 4, 2 / 9)}
    assert lost(pieces, "ab", "ab αβ") == {"Latin": (1.0, 0.5)}
    assert lost(pieces, "", "αβ 😀 ㈱") == {}
    assert lost(example_fields(), "Ļ", "すて e") == {"Hiragana": (1 / 2, 1 / 3)}  # す: E3 81 99
