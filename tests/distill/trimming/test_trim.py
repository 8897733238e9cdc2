"""``distill trim`` from the command line: a file that is the original's with fewer tokens."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import distill.trimming.trim
from distill.capture.temporary_files.tokenizer_only import metadata_entries
from distill.export.ollama_modelfile import modelfile
from distill.trimming.request import TrimRequest, check_trim
from distill.trimming.text import text_of
from students.gguf.metadata import add_tokenizer, small_gguf
from teachers import example_teacher
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.vocabulary.size import VocabularySize
from tests.conftest import command, not_refused, says
from tests.support.teachers import LINES, different, edited, example_fields
from tests.support.tiny_models import Tiny, write_tiny

pytestmark = pytest.mark.usefixtures("llama_here")
WORDS = "Please move my booking to Friday, the desk by the window. 予約を変更してください。\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text like the example teacher's."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    lines = [f"{number}. {WORDS}" for number in range(300)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trimmed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The example teacher with 700 of its tokens, and what the command says of it."""
    out = tmp_path_factory.mktemp("out") / "small.gguf"
    arguments = (example_teacher(), "--vocab", 700, "--data", data, "-o", out)
    ended = command("trim", *arguments, "--tokens", 512, "--json")
    assert ended.code == 0, ended
    return out, json.loads(ended.out)


def test_kept_tokens_have_the_originals_logits(
    trimmed: tuple[Path, dict[str, Any]], example_gguf: GGUFTeacher
) -> None:
    """On the same tokens; and the figures are what they are called."""
    path, said = trimmed
    before = example_gguf.file.value("tokenizer.ggml.tokens")
    after = read_gguf(path).value("tokenizer.ggml.tokens")
    kept = np.array([before.index(text) for text in after], np.int32)
    draw = np.random.default_rng(0)
    plain = LoadOptions(extra_buffers=False)  # other kernels for other numbers of rows
    with GGUFTeacher(path, plain) as model, GGUFTeacher(example_teacher(), plain) as original:
        ids = [draw.integers(0, 700, 40).astype(np.int32) for _ in range(2)]
        ours = model.logits(ids, exact=True)
        theirs = original.logits([kept[one] for one in ids], exact=True)[:, kept]
        assert np.abs(ours - theirs).max() <= 1e-3
        assert said["trimmed"]["vocabulary"] == len(after) == model.info.vocab_size == 700
    assert said["logit_difference"] <= 1e-3 and said["proof_positions"] > 100
    assert said["trimmed"]["file_bytes"] == path.stat().st_size
    assert 0 <= said["dropped_mass"] < 0.05 and said["token_lines"] > 5


def test_bits_are_those_of_the_held_out_text(
    trimmed: tuple[Path, dict[str, Any]], data: Path, example_gguf: GGUFTeacher
) -> None:
    """−log2 p of every token of the pieces, each behind BOS, over their bytes in UTF-8."""
    path, said = trimmed
    request = TrimRequest(
        example_teacher(), data, path.with_name("other.gguf"), VocabularySize(700)
    )
    pieces = text_of(check_trim(request).data, example_gguf).held_out
    assert "".join(piece.text for piece in pieces) in data.read_text(encoding="utf-8")
    with GGUFTeacher(path, threads=1) as model:
        for teacher, name in ((example_gguf, "original"), (model, "trimmed")):
            bits, count = 0.0, 0
            for piece in pieces:
                (ids,) = teacher.tokenize([piece.text], add_special=False, parse_special=False)
                count += len(ids)
                bos = teacher.info.bos
                assert bos is not None and len(ids) < teacher.info.context_length
                logits = teacher.logits([np.append([bos], ids).astype(np.int32)])
                logs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
                bits -= float(logs[np.arange(len(ids)), ids].sum()) / math.log(2)
            size = len("".join(piece.text for piece in pieces).encode())
            assert said["judged_bytes"] == size and said[name]["held_out_tokens"] == count
            assert said[name]["bits_per_byte"] == pytest.approx(bits / size, rel=1e-3), name


def test_what_lies_beside_it(trimmed: tuple[Path, dict[str, Any]]) -> None:
    """The tokenizer gives llama.cpp's ids and the original's text; Ollama gets the same."""
    path, _ = trimmed
    whole, file = read_gguf(example_teacher()), read_gguf(path)
    loaded = AutoTokenizer.from_pretrained(path.with_name("small-tokenizer"))
    with GGUFTeacher(path, threads=1) as model:
        assert different(loaded, model, LINES) == []
        rows = model.tokenize(LINES, add_special=False, parse_special=False)
        assert [loaded.decode(row.tolist()) for row in rows] == LINES
        ends, context = model.info.end_tokens, model.info.context_length
    with GGUFTeacher(example_teacher(), threads=1) as original:
        theirs = original.info.end_tokens
    texts = [
        modelfile("small.gguf", one.fields, end_tokens=end, context_length=context, name="small")
        for one, end in ((whole, theirs), (file, ends))
    ]
    assert texts[0] == texts[1] and path.with_suffix(".Modelfile").read_text() == texts[1][0]
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "700" in card and read_gguf(example_teacher()).sha256 in card and "Apache-2.0" in card
    assert not [one for one in path.parent.iterdir() if ".tmp" in one.name]


def test_letters_that_are_lost(data: Path, tmp_path: Path) -> None:
    """In words: how much of the text's Japanese falls to bytes."""
    text = tmp_path / "mixed.txt"
    rare = "".join(chr(0x3041 + number) for number in range(60))
    text.write_text(data.read_text(encoding="utf-8") + rare * 9, encoding="utf-8")
    arguments = ("--data", text, "--tokens", 64, "--vocab", 330, "-o", tmp_path / "few.gguf")
    said = says("trim", example_teacher(), *arguments)
    assert "tokens in the vocabulary" in said
    assert "letters in the text" in said and "are written in bytes; ask for more" in said


def test_a_file_that_is_not_the_original_gets_no_name(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, and nothing is left."""
    right = distill.trimming.trim.write_reduced

    def wrong(file: Any, vocabulary: Any, *rest: Any) -> None:
        kept = vocabulary.kept.copy()
        kept[[300, 301]] = kept[[301, 300]]  # rows of two tokens, exchanged
        right(file, replace(vocabulary, kept=kept), *rest)

    monkeypatch.setattr("distill.trimming.trim.write_reduced", wrong)
    arguments = (example_teacher(), "--vocab", 700, "--data", data, "-o", tmp_path / "x.gguf")
    ended = command("trim", *arguments, "--tokens", 64)
    assert ended.code == 1 and "error: logits of kept tokens differ by" in ended.complaint
    assert list(tmp_path.iterdir()) == []


def test_bad_input(data: Path, tmp_path: Path) -> None:
    """One line, exit code 2."""
    fields = edited(example_fields(), model="bert")
    other = tmp_path / "wpm.gguf"
    with small_gguf(other, "llama") as writer:
        add_tokenizer(writer, metadata_entries(fields))
        writer.add_tensor("token_embd.weight", np.zeros((1024, 32), np.float32))
    (tmp_path / "there.md").write_text("mine")
    (tmp_path / "short.txt").write_text("short")
    out, here = tmp_path / "o.gguf", example_teacher()
    bias = {"output.bias": np.zeros(1024, np.float32)}
    biased = write_tiny(tmp_path / "bias.gguf", Tiny(), bias)  # type: ignore[arg-type]
    rows: list[tuple[list[object], list[str]]] = [
        ([here, "--vocab", "many"], ["--vocab 'many' is no size", "16k"]),
        ([here, "--vocab", "9"], ["tokens must stay", "ask for"]),
        ([here, "--vocab", "5000"], ["has 1024 tokens", "ask for fewer"]),
        ([other, "--vocab", "300"], ["WordPiece (WPM)", "wpm.gguf"]),
        ([biased, "--vocab", "300"], ["'llama' cannot be cut", "'output.bias'"]),
        ([tmp_path / "none.gguf", "--vocab", "300"], ["none.gguf does not exist"]),
        ([data, "--vocab", "300"], ["is not a GGUF file"]),
    ]
    assert (
        not_refused([([*row, "--data", data, "-o", out], words) for row, words in rows], "trim")
        == []
    )
    for changes, words in (
        (["--data", tmp_path / "none.txt", "-o", out], "none.txt does not exist"),
        (["--data", tmp_path / "short.txt", "-o", out], "too little text"),
        (["--data", data, "-o", tmp_path / "o.bin"], "must end in .gguf"),
        (["--data", data, "-o", tmp_path / "no" / "o.gguf"], "does not exist"),
        (["--data", data, "-o", tmp_path / "there.gguf"], "there.md exists"),
        (["--data", data, "-o", here], "exists; choose another name"),
        (["--data", data, "-o", out, "--tokens", 3], "--tokens 3 is too few"),
    ):
        ended = command("trim", here, "--vocab", 300, *changes)
        assert ended.code == 2 and words in " ".join(ended.complaint.split()), (changes, ended)
    assert not out.exists()
    assert TrimRequest(here, data, out, VocabularySize(300)).card == tmp_path / "o.md"
