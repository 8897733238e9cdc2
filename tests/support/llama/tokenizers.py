"""Made-up tokenizers of both kinds, in GGUF metadata, in llama.cpp and in transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.capture.temporary_files.tokenizer_only import metadata_entries
from students.gguf.metadata import ExportNames
from students.gguf.writer import write_gguf
from students.model.build import build_student, student_config
from students.model.shape import parse_size
from teachers.base import Tokens
from teachers.gguf.file import Field
from teachers.llama_cpp.context import LlamaModel
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.tokenizer.tokenizer_json import write_tokenizer_folder
from tests.support.teachers import LINES, TEXT, Fields, edited, example_fields


def trained(text: list[str], special: list[str], byte_level: bool) -> tuple[list[str], list[str]]:
    """Tokens (``special`` first) and merges learnt across words, so that every wrong cut shows."""
    tokenizer = Tokenizer(models.BPE())
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        alphabet = sorted(set("".join(text)) - set("\0"))
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        initial_alphabet=alphabet,
        show_progress=False,
        max_token_length=6,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(text, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    learnt = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens = special + [token for token in learnt if "\0" not in token]
    return tokens, [" ".join(pair) for pair in model["merges"]]


@functools.lru_cache
def learnt_bytes() -> tuple[list[str], list[str]]:
    return trained(LINES, ["<|endoftext|>", "<|end|>"], byte_level=True)


def byte_level_fields(**values: Any) -> Fields:
    """A byte-level teacher's metadata with a vocabulary that joins across words."""
    tokens, merges = learnt_bytes()
    # Some tokens are reached only where merges are ignored.
    merges = [merge for number, merge in enumerate(merges) if number % 9]
    kinds = [3, 3] + [1] * (len(tokens) - 2)
    made = {"tokens": tokens, "merges": merges, "token_type": kinds}
    absent = ("eot_token_id", "padding_token_id", "add_bos_token", "chat_template")
    changes = {**made, "bos_token_id": 0, "eos_token_id": 1, **dict.fromkeys(absent), **values}
    return edited(example_fields(), **changes)


@functools.lru_cache
def learnt_pieces() -> list[str]:
    """Tokens of bytes, of ASCII and kana, and of what was learnt."""
    plain = [
        line.replace(" ", "▁") for line in (*TEXT.splitlines(), "▁▁▁▁▁▁▁▁ ｶﾀ") for _ in range(2)
    ]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return trained(plain, first, byte_level=False)[0]


def sentencepiece_fields(more: Mapping[str, TokenType] | None = None, **values: Any) -> Fields:
    """A SentencePiece teacher's metadata: what was learnt, and ``more`` tokens."""
    tokens = learnt_pieces()
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    kinds += [TokenType.NORMAL] * (len(tokens) - len(kinds))
    more = {token: kind for token, kind in (more or {}).items() if token not in tokens}
    # Spaces and what is added later have one score in common, as in Llama's own vocabulary.
    scores = [
        -1e9 if set(token) == {"▁"} and len(token) > 1 else -float(n)
        for n, token in enumerate(tokens)
    ]
    made = {
        "model": "llama",
        "tokens": tokens + list(more),
        "token_type": [int(kind) for kind in (*kinds, *more.values())],
        "scores": scores + [-1e9] * len(more),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    absent = ("pre", "merges", "chat_template", "eot_token_id", "padding_token_id")
    return edited(example_fields(), **{**dict.fromkeys(absent), **made, **values})


@contextmanager
def teacher_of(fields: Mapping[str, Field], folder: Path, name: str = "made up") -> Iterator[Any]:
    """llama.cpp with this tokenizer, in this process, where nothing else is asked of it."""
    count = len(fields["tokenizer.ggml.tokens"].value)
    shape = student_config(parse_size("32x1"), vocab_size=count, context_length=128)
    every, path = metadata_entries(fields), folder / "teacher.gguf"
    entries = {key: entry for key, entry in every.items() if key.startswith("tokenizer.")}
    write_gguf(build_student(shape, 0), path, "f16", entries, ExportNames(name, {}))
    model = LlamaModel(str(path), LoadOptions(extra_buffers=False), threads=1)

    def tokenize(texts: list[str], **how: bool) -> list[Tokens]:
        return [model.tokenize(text, **how) for text in texts]

    try:
        yield SimpleNamespace(tokenize=tokenize)
    finally:
        model.close()


def loaded_tokenizer(fields: Mapping[str, Field], folder: Path) -> Any:
    """The tokenizer as transformers reads it from the folder that is written for it."""
    write_tokenizer_folder(fields, folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert type(loaded) is PreTrainedTokenizerFast
    return loaded
