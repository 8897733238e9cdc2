"""Prompts, conversations, plain text, or the teacher's own words → token sequences.

A JSONL line is an object with exactly one of ``prompt`` (the teacher answers), ``messages`` (a
conversation; the teacher answers if the last message is not the assistant's) or ``text`` (used as
it stands); other keys are left alone. Everything else is plain text, cut into windows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.capture.lengths import ANSWER_ROOM, describe_cut, most_tokens
from distill.config.schema import DataConfig
from distill.errors import UserError
from distill.runtime.files import json_lines, read_text, require_unicode
from teachers.base import GenerationRequest, Progress, Sampling, Teacher, TeacherInfo, Tokens
from teachers.tokenizer.chat_template import ChatTemplateError
from teachers.tokenizer.conversation import conversation_tokens, opening_segments

DEFAULT_SPOKEN_SAMPLES = 4096
JSONL_SUFFIXES = (".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", ".text")
MAX_TOKENIZED_AT_ONCE = 1 << 20  # characters of text sent to the tokenizer in one piece
_KINDS = ("prompt", "messages", "text")


@dataclass(frozen=True)
class Entry:
    """One piece of data and where it stands (``file:line``), for messages about it."""

    kind: str
    value: Any
    where: str


@dataclass(frozen=True)
class Item:
    """One sequence to be: forced segments, and whether the teacher writes after each of them."""

    segments: tuple[Tokens, ...]
    speaks: bool


@dataclass(frozen=True)
class Draft:
    """A piece of data before it is cut. ``windows``: into several sequences, so that nothing is
    lost; ``answers``: the teacher writes after it."""

    tokens: Tokens
    windows: bool = False
    answers: bool = False


class Corpus:
    """The sequences of a run, in a fixed order; a ``teachers.store.capture.SequenceSource``.

    ``warnings``: of what is lost.
    """

    def __init__(
        self, items: list[Item], sampling: Sampling, notes: list[str], warnings: list[str]
    ) -> None:
        self.items = items
        self.sampling = sampling
        self.notes, self.warnings = notes, warnings

    def __len__(self) -> int:
        return len(self.items)

    @property
    def spoken(self) -> int:
        """How many sequences the teacher writes (in part)."""
        return sum(item.speaks for item in self.items)

    def digest(self) -> str:
        """SHA-256 over everything that decides the sequences."""
        digest = hashlib.sha256(json.dumps(asdict(self.sampling), sort_keys=True).encode())
        for item in self.items:
            digest.update(f"{item.speaks} {[len(part) for part in item.segments]}".encode())
            for part in item.segments:
                digest.update(part.tobytes())
        return digest.hexdigest()

    def take(self, teacher: Teacher, start: int, stop: int, progress: Progress) -> list[Tokens]:
        """See ``teachers.store.capture.SequenceSource``."""
        chosen = self.items[start:stop]
        requests = [item.segments for item in chosen if item.speaks]
        rows = iter(
            teacher.generate(GenerationRequest(requests, self.sampling, start), progress)
            if requests
            else ()
        )
        return [next(rows) if item.speaks else item.segments[0] for item in chosen]

    def generation_request(self, start: int, stop: int) -> GenerationRequest | None:
        """See ``teachers.store.capture.SequenceSource``."""
        chosen = self.items[start:stop]
        if not all(item.speaks for item in chosen):
            return None
        return GenerationRequest([item.segments for item in chosen], self.sampling, start)


def build_corpus(
    config: DataConfig, teacher: Teacher, seed: int, entries: list[Entry] | None = None
) -> Corpus:
    """Read the data, unless given as ``entries``, or plan the teacher's text; tokenize it.

    Raises:
        UserError: missing, empty or malformed data; names file and line.
    """
    if entries is None:
        entries = read_entries(config)
    drafts = [] if entries is None else _tokenize(entries, teacher)
    whole = [draft for draft in drafts if not draft.windows]
    wanted = [len(draft.tokens) + ANSWER_ROOM * draft.answers for draft in whole]
    max_length = most_tokens(config, teacher.info, wanted)
    sampling = Sampling(config.sampling_temperature, config.top_p, max_length, seed)
    notes: list[str] = []
    if max_length < (config.max_length or 0):
        notes.append(f"sequences are cut to the teacher's context of {max_length} tokens")
    if entries is None:
        opening = opening_segments(teacher)
        if opening is None:
            raise UserError(f"teacher {teacher.info.name} has no token to start from; give --data")
        return Corpus(
            [Item(opening, True)] * (config.samples or DEFAULT_SPOKEN_SAMPLES), sampling, notes, []
        )
    lengths = [len(draft.tokens) + draft.answers for draft in whole]
    cut, much = describe_cut(lengths, max_length, teacher.info.context_length)
    notes += [cut] if cut and not much else []
    items = [item for draft in drafts for item in _cut(draft, teacher.info, max_length)]
    if config.samples is not None and config.samples < len(items):
        kept = np.random.default_rng(seed).permutation(len(items))[: config.samples]
        items = [items[index] for index in sorted(kept.tolist())]
    if len(items) < 2:
        raise UserError(
            f"data {config.path}: only {len(items)} sequence; at least 2 are needed (1 is held out)"
        )
    return Corpus(items, sampling, notes, [cut] if much else [])


def read_entries(config: DataConfig) -> list[Entry] | None:
    """The data in its files; ``None`` if the teacher generates it.

    Raises:
        UserError: unusable data, with file and line; or a teacher that generates one text only.
    """
    if config.path is not None:
        return list(_read(Path(config.path)))
    if config.sampling_temperature == 0.0:
        raise UserError(
            "data.sampling_temperature=0 lets the teacher say one thing only; give --data or raise "
            "it"
        )
    return None


def _read(path: Path) -> Iterator[Entry]:
    readable = JSONL_SUFFIXES + TEXT_SUFFIXES
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.is_file() and _suffix(file) in readable
        )
        if not files:
            raise UserError(f"data folder {path} has no {', '.join(readable)} file")
    elif path.is_file():
        files = [path]
        if _suffix(path) not in readable:
            raise UserError(
                f"data file {path} is none of {', '.join(readable)}; rename or convert it"
            )
    else:
        reason = "is not a regular file or folder" if path.exists() else "does not exist"
        raise UserError(f"data {path} {reason}; give a JSONL or text file, or a folder of them")
    for file in files:
        text = read_text(file, "data file")
        if not text.strip():
            raise UserError(f"data file {file} is empty; remove it or fill it")
        if _suffix(file) in JSONL_SUFFIXES:
            yield from _read_jsonl(file, text)
        else:
            yield Entry("plain", text, str(file))


def _suffix(file: Path) -> str:
    return file.suffix.lower()


def _read_jsonl(file: Path, text: str) -> Iterator[Entry]:
    for number, value in json_lines(text, f"data file {file}"):
        where = f"data file {file}, line {number}"
        kinds = [kind for kind in _KINDS if isinstance(value, dict) and kind in value]
        if len(kinds) != 1:
            has = f"has {' and '.join(kinds)}" if kinds else "has none of them"
            raise UserError(f"{where}: needs exactly one of {', '.join(_KINDS)}; it {has}")
        _check_value(kinds[0], value[kinds[0]], where)
        yield Entry(kinds[0], value[kinds[0]], where)


def _check_value(kind: str, value: Any, where: str) -> None:
    require_unicode(value, where)
    if kind != "messages":
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {kind!r} must be text that is not empty, got {value!r}")
        return
    fitting = (
        isinstance(value, list)
        and value
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )
    if not fitting:
        raise UserError(
            f"{where}: 'messages' must be a list of objects with 'role' and 'content' as text"
        )


def _tokenize(entries: list[Entry], teacher: Teacher) -> list[Draft]:
    drafts: list[Draft] = []
    for entry in entries:
        if entry.kind in ("plain", "text"):
            # Control tokens spelled out in a text stay text: data must not imitate the template.
            parts = [
                teacher.tokenize([piece], add_special=False, parse_special=False)[0]
                for piece in _pieces(entry.value)
            ]
            drafts.append(Draft(np.concatenate(parts), windows=True))
            continue
        messages = (
            entry.value if entry.kind == "messages" else [{"role": "user", "content": entry.value}]
        )
        answers = messages[-1]["role"] != "assistant"
        try:
            tokens = conversation_tokens(teacher, messages, answer=answers)
        except ChatTemplateError as error:
            raise UserError(f"{entry.where}: {error}") from None
        drafts.append(Draft(tokens, answers=answers))
    return drafts


def _cut(draft: Draft, info: TeacherInfo, max_length: int) -> list[Item]:
    """The sequences of one piece of data: a text's windows each begin with BOS where the model
    wants one."""
    tokens = draft.tokens
    if not draft.windows:
        speaks = draft.answers and 0 < len(tokens) < max_length
        enough = speaks or len(tokens) > 1
        return [Item((tokens[:max_length],), speaks)] if enough else []
    bos = info.bos if info.add_bos else None
    start = np.array([] if bos is None else [bos], dtype=np.int32)
    step = max_length - len(start)
    windows = [
        np.concatenate((start, tokens[at : at + step])) for at in range(0, len(tokens), step)
    ]
    return [Item((window.astype(np.int32),), False) for window in windows if len(window) > 1]


def _pieces(text: str) -> list[str]:
    """Cut long text at line ends, into pieces of about ``MAX_TOKENIZED_AT_ONCE`` at most."""
    pieces: list[str] = []
    start = 0
    while len(text) - start > MAX_TOKENIZED_AT_ONCE:
        end = text.rfind("\n", start, start + MAX_TOKENIZED_AT_ONCE)
        end = start + MAX_TOKENIZED_AT_ONCE if end <= start else end
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]
