"""Conversations, plain text, or the teacher's own words → token sequences.

The teacher answers a conversation whose last message is not the assistant's; text is used as it
stands, cut into windows.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from distill.capture.data_files import TEXT_SUFFIXES, read_text, rows, suffix_of
from distill.capture.data_folder import find_files
from distill.capture.lengths import ANSWER_ROOM, cap, describe_cut, most_tokens
from distill.capture.row_parser import RowParser
from distill.config.schema import DataConfig
from distill.errors import UserError
from teachers.base import GenerationRequest, Keep, Progress, Sampling, Teacher, TeacherInfo, Tokens
from teachers.tokenizer.assistant_mask import AssistantMask
from teachers.tokenizer.chat_template import ChatTemplateError
from teachers.tokenizer.conversation import conversation_tokens, opening_segments
from teachers.tokenizer.rows import Conversation, Document, Row

DEFAULT_SPOKEN_SAMPLES = 4096
MAX_TOKENIZED_AT_ONCE = 1 << 20  # characters of text sent to the tokenizer in one piece


@dataclass(frozen=True)
class DataRows:
    """What the data's files hold, in order; ``notes``: what was left out."""

    rows: list[Row]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Item:
    """One sequence to be: forced segments, and whether the teacher writes after each of them.

    ``keep``: which predictions of a single segment's tokens are learnt (``None``: all); what the
    teacher writes after it is.
    """

    segments: tuple[Tokens, ...]
    speaks: bool
    keep: Keep | None = None


@dataclass(frozen=True)
class Draft:
    """A piece of data before it is cut. ``windows``: into several sequences, so that nothing is
    lost; ``answers``: the teacher writes after it; ``keep``: see ``Item``."""

    tokens: Tokens
    windows: bool = False
    answers: bool = False
    keep: Keep | None = None


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
        self.masked = any(item.keep is not None for item in items)  # something is not to be learnt

    def __len__(self) -> int:
        return len(self.items)

    @property
    def spoken(self) -> int:
        """How many sequences the teacher writes (in part)."""
        return sum(item.speaks for item in self.items)

    def digest(self) -> str:
        """SHA-256 over everything that decides the sequences, and what is learnt of them."""
        digest = hashlib.sha256(json.dumps(asdict(self.sampling), sort_keys=True).encode())
        for item in self.items:
            digest.update(f"{item.speaks} {[len(part) for part in item.segments]}".encode())
            for part in item.segments:
                digest.update(part.tobytes())
            if item.keep is not None:
                digest.update(b"keep" + item.keep.tobytes())
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

    def keep(self, start: int, stop: int) -> list[Keep] | None:
        """See ``teachers.store.capture.SequenceSource``."""
        if not self.masked:
            return None
        everything = np.empty(0, dtype=np.bool_)
        masks = (item.keep for item in self.items[start:stop])
        return [everything if mask is None else mask for mask in masks]

    def generation_request(self, start: int, stop: int) -> GenerationRequest | None:
        """See ``teachers.store.capture.SequenceSource``."""
        chosen = self.items[start:stop]
        if not all(item.speaks for item in chosen):
            return None
        requests = [item.segments for item in chosen]
        return GenerationRequest(requests, self.sampling, start, self.keep(start, stop))


def build_corpus(
    config: DataConfig, teacher: Teacher, seed: int, data: DataRows | None = None
) -> Corpus:
    """Read the data, unless given, or plan the teacher's text; tokenize it.

    Raises:
        UserError: missing, empty or malformed data; names file and line.
    """
    if data is None:
        data = read_rows(config)
    notes = [] if data is None else [*data.notes, *_not_shown(data.rows, teacher.info)]
    drafts = [] if data is None else _tokenize(data.rows, teacher, config, notes)
    whole = [draft for draft in drafts if not draft.windows]
    wanted = [len(draft.tokens) + ANSWER_ROOM * draft.answers for draft in whole]
    max_length = most_tokens(config, teacher.info, wanted)
    sampling = Sampling(config.sampling_temperature, config.top_p, max_length, seed)
    if max_length < (config.max_length or 0):
        notes.append(f"sequences are cut to the teacher's context of {max_length} tokens")
    if data is None or any(isinstance(row, Conversation) for row in data.rows):
        notes += _of_the_date(teacher.info.chat_template or "")
    if data is None:
        opening = opening_segments(teacher)
        if opening is None:
            raise UserError(f"teacher {teacher.info.name} has no token to start from; give --data")
        return Corpus(
            [Item(opening, True)] * (config.samples or DEFAULT_SPOKEN_SAMPLES), sampling, notes, []
        )
    lengths = [len(draft.tokens) + draft.answers for draft in whole]
    cut, much = describe_cut(lengths, max_length, teacher.info.context_length)
    notes += [cut] if cut and not much else []
    parts = [(draft, _cut(draft, teacher.info, max_length)) for draft in drafts]
    items = [item for _, part in parts for item in part]
    if silent := sum(not part and not draft.windows for draft, part in parts):
        notes.append(
            f"{silent} of {len(whole)} conversations are left out: there is no answer to learn in "
            f"their first {max_length:,} tokens"
        )
    if config.samples is not None and config.samples < len(items):
        kept = np.random.default_rng(seed).permutation(len(items))[: config.samples]
        items = [items[index] for index in sorted(kept.tolist())]
    if len(items) < 2:
        raise UserError(
            f"data {config.path}: only {len(items)} sequence; at least 2 are needed (1 is held out)"
            + "".join(f"; {note}" for note in notes)
        )
    return Corpus(items, sampling, notes, [cut] if much else [])


def _of_the_date(template: str) -> list[str]:
    if "strftime_now" not in template or "SOURCE_DATE_EPOCH" in os.environ:
        return []
    return [
        "the teacher's chat template writes today's date, so that the soft targets of another day "
        "are others; to make them again, or continue a run, then, set SOURCE_DATE_EPOCH="
        f"{int(time.time())}"
    ]


def read_rows(config: DataConfig) -> DataRows | None:
    """The data in its files; ``None`` if the teacher generates it.

    Raises:
        UserError: unusable data, with file and line; or a teacher that generates one text only.
    """
    if config.path is None:
        if config.sampling_temperature == 0.0:
            raise UserError(
                "data.sampling_temperature=0 lets the teacher say one thing only; give --data or "
                "raise it"
            )
        return None
    parser = RowParser(config.columns)
    path = Path(config.path)
    files, notes = find_files(path, config.split, parser.known.keys())
    split = config.split if path.is_file() else None  # in a folder the files are the splits
    result: list[Row] = []
    for file in files:
        count = 0
        if suffix_of(file) in TEXT_SUFFIXES:
            text = read_text(file, "data file")
            count = len(text.strip())
            result.append(Document(text, str(file)))
        else:
            known, unread = parser.known.keys(), parser.count_unused
            for where, value in rows(file, known, split=split, unread=unread, note=notes.append):
                count += 1
                if (row := parser.parse(value, where)) is not None:
                    result.append(row)
        if not count:
            raise UserError(f"data file {file} is empty; remove it or fill it")
    return DataRows(result, notes + parser.finish(bool(result), f"data {config.path}"))


def _not_shown(data: list[Row], info: TeacherInfo) -> list[str]:
    """Notes on tools and documents that the teacher's chat template has no word for.

    Raises:
        UserError: it has none for tool calls, without which the conversation is another.
    """
    counts: Counter[str] = Counter()
    for row in data:
        if isinstance(row, Document):
            continue
        template = (info.tool_template if row.tools else None) or info.chat_template or ""
        counts.update(
            name for name in ("tools", "documents") if getattr(row, name) and name not in template
        )
        shown = "tool_calls" in template or "tojson" in template
        if not shown and any("tool_calls" in message for message in row.messages):
            raise UserError(
                f"{row.where}: the teacher's chat template shows no tool calls; leave such rows "
                "out, or use a teacher whose template does"
            )
    return [
        f"{name} of {count} conversations are not used: the teacher's chat template has no place "
        "for them"
        for name, count in counts.items()
    ]


def _tokenize(
    data: list[Row], teacher: Teacher, config: DataConfig, notes: list[str]
) -> list[Draft]:
    masks = None
    if config.train_on == "assistant":
        masks = AssistantMask(teacher, cap(config, teacher.info))
    drafts: list[Draft] = []
    lost = 0
    for row in data:
        if isinstance(row, Document):
            # Control tokens spelled out in a text stay text: data must not imitate the template.
            parts = [
                teacher.tokenize([piece], add_special=False, parse_special=False)[0]
                for piece in _pieces(row.text)
            ]
            drafts.append(Draft(np.concatenate(parts), windows=True))
            continue
        try:
            if masks is None:
                tokens, keep = conversation_tokens(teacher, row, answer=row.waits), None
            else:
                tokens, learnt, unknown = masks.tokens(row, answer=row.waits)
                keep, lost = learnt[1:], lost + unknown
        except ChatTemplateError as error:
            raise UserError(f"{row.where}: {error}") from None
        drafts.append(Draft(tokens, answers=row.waits, keep=keep))
    if lost:
        notes.append(
            f"{lost} answers are not trained on: the chat template rewrites them, and shows not "
            "where they are"
        )
    return drafts


def _cut(draft: Draft, info: TeacherInfo, max_length: int) -> list[Item]:
    """The sequences of one piece of data: a text's windows each begin with BOS where the model
    wants one; none of a conversation in which nothing is learnt."""
    tokens = draft.tokens
    if not draft.windows:
        speaks = draft.answers and 0 < len(tokens) < max_length
        keep = None if draft.keep is None else draft.keep[: max_length - 1]
        enough = speaks or (len(tokens) > 1 and (keep is None or bool(keep.any())))
        return [Item((tokens[:max_length],), speaks, keep)] if enough else []
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
