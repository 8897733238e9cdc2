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
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from distill.capture.data_files import TEXT_SUFFIXES, Listener, rows, suffix_of
from distill.capture.data_folder import find_files
from distill.capture.file_text import TextFile
from distill.capture.lengths import ANSWER_ROOM, cap, describe_cut, most_tokens
from distill.capture.row_parser import RowParser
from distill.config.sources import DataConfig
from distill.errors import UserError
from teachers.base import (
    GenerationRequest,
    Keep,
    Progress,
    Sampling,
    Teacher,
    TeacherInfo,
    Tokens,
    no_progress,
)
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
    lost; ``answers``: the teacher writes after it; ``keep``: see ``Item``; ``lost``: how many
    answers in it are not found."""

    tokens: Tokens
    windows: bool = False
    answers: bool = False
    keep: Keep | None = None
    lost: int = 0


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
    config: DataConfig,
    teacher: Teacher,
    seed: int,
    data: DataRows | None = None,
    progress: Progress = no_progress,
) -> Corpus:
    """Read the data, unless given, or plan the teacher's text; tokenize it. ``progress``: the share
    of that which is done.

    Raises:
        UserError: missing, empty or malformed data; names file and line.
    """
    info, samples = teacher.info, config.samples
    if data is None:
        data = read_rows(config)
    if data is None:
        opening = opening_segments(teacher)
        if opening is None:
            raise UserError(f"teacher {info.name} has no token to start from; give --data")
        max_length = most_tokens(config, info, ())
        items = [Item(opening, True)] * (samples or DEFAULT_SPOKEN_SAMPLES)
        notes = _of_the_context(config, max_length) + _of_the_date(info.chat_template or "")
        return Corpus(items, _sampling(config, max_length, seed), notes, [])
    notes = [*data.notes, *_not_shown(data.rows, info)]
    drafts, max_length = _drafts(data.rows, teacher, config, seed, progress)
    notes += _of_the_context(config, max_length)
    if any(isinstance(row, Conversation) for row in data.rows):
        notes += _of_the_date(info.chat_template or "")
    pairs = [(draft, item) for draft in drafts for item in _cut(draft, info, max_length)]
    if samples is not None and samples < len(pairs):
        kept = np.random.default_rng(seed).permutation(len(pairs))[:samples]
        pairs = [pairs[index] for index in sorted(kept.tolist())]
    lengths = [len(draft.tokens) + draft.answers for draft, _ in pairs if not draft.windows]
    cut, much = describe_cut(lengths, max_length, info.context_length)
    notes += [cut] if cut and not much else []
    notes += _of_answers(drafts, info, max_length)
    if len(pairs) < 2:
        raise UserError(
            f"data {config.path}: {'only 1 sequence' if pairs else 'no sequence'}; at least 2 are "
            "needed (1 is for validation)" + "".join(f"; {note}" for note in notes)
        )
    items = [item for _, item in pairs]
    return Corpus(items, _sampling(config, max_length, seed), notes, [cut] if much else [])


def _sampling(config: DataConfig, max_length: int, seed: int) -> Sampling:
    return Sampling(config.sampling_temperature, config.top_p, max_length, seed)


def _of_the_context(config: DataConfig, max_length: int) -> list[str]:
    if max_length >= (config.max_length or 0):
        return []
    return [f"sequences are cut to the teacher's context of {max_length} tokens"]


def _of_answers(drafts: list[Draft], info: TeacherInfo, max_length: int) -> list[str]:
    """Notes on answers that are not learnt, and conversations left out for that."""
    notes = []
    if lost := sum(draft.lost for draft in drafts):
        notes.append(
            f"{lost} answers are not trained on: the chat template rewrites them, and shows not "
            "where they are"
        )
    whole = [draft for draft in drafts if not draft.windows]
    if silent := [draft for draft in whole if not _cut(draft, info, max_length)]:
        longer = max_length < min(info.context_length, max(len(one.tokens) for one in silent))
        notes.append(
            f"{len(silent)} of {len(whole)} conversations are left out: there is no answer to "
            f"learn in their first {max_length:,} tokens; to learn from them, "
            f"{'raise data.max_length or ' if longer else ''}set data.train_on=all"
        )
    return notes


def _of_the_date(template: str) -> list[str]:
    if "strftime_now" not in template or "SOURCE_DATE_EPOCH" in os.environ:
        return []
    return [
        "the teacher's chat template writes today's date, so that the soft targets of another day "
        "are others; to make them again, or continue a run, then, set SOURCE_DATE_EPOCH="
        f"{int(time.time())}"
    ]


def read_rows(config: DataConfig, progress: Progress = no_progress) -> DataRows | None:
    """The data in its files; ``None`` if the teacher generates it. ``progress``: the share of their
    bytes that is read.

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
    sizes = [file.stat().st_size if file.is_file() else 0 for file in files]
    for number, file in enumerate(files):
        before, size, whole = sum(sizes[:number]), sizes[number], max(1, sum(sizes))
        tell = _part_of(progress, before / whole, size / whole)
        if suffix_of(file) in TEXT_SUFFIXES:
            text = TextFile(file, "data file")
            filled = False
            for part in text.read(tell):  # to its end, for what is wrong anywhere
                filled = filled or bool(part.strip())
            result.append(Document(text, str(file)))
        else:
            filled, listener = False, Listener(parser.count_unused, notes.append, tell)
            for where, value in rows(file, parser.known.keys(), split=split, listener=listener):
                filled = True
                if (row := parser.parse(value, where)) is not None:
                    result.append(row)
        if not filled:
            raise UserError(f"data file {file} is empty; remove it or fill it")
    notes += parser.finish(bool(result), f"data {config.path}")
    if parser.unlearnt:
        anyhow = "learnt all the same, as data.train_on = 'all'"
        notes.append(
            f"{parser.unlearnt:,} messages of the assistant whose weight is 0, or train, training "
            f"or loss false, are {anyhow if config.train_on == 'all' else 'not learnt'}"
        )
    return DataRows(result, notes)


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


def _drafts(
    data: list[Row], teacher: Teacher, config: DataConfig, seed: int, progress: Progress
) -> tuple[list[Draft], int]:
    """The data tokenized, in its order, and how many tokens a sequence has at most.

    A conversation is one sequence or none, so that where there is nothing else only so many of
    them are tokenized, chosen at random, that ``config.samples`` sequences come of them.
    """
    masks = None
    if config.train_on == "assistant":
        masks = AssistantMask(teacher, cap(config, teacher.info))
    samples, order, count = config.samples or len(data), list(range(len(data))), len(data)
    if samples < count and not any(isinstance(row, Document) for row in data):
        order, count = np.random.default_rng(seed).permutation(count).tolist(), samples
    drafts: list[Draft] = []
    while True:
        for done in range(len(drafts), count):
            step = _part_of(progress, done / count, 1 / count)
            drafts.append(_tokenize(data[order[done]], teacher, masks, step))
        whole = [draft for draft in drafts if not draft.windows]
        wanted = [len(draft.tokens) + ANSWER_ROOM * draft.answers for draft in whole]
        max_length = most_tokens(config, teacher.info, wanted)
        if count == len(data):
            break
        made = np.cumsum([len(_cut(draft, teacher.info, max_length)) for draft in drafts])
        if made[-1] >= samples:
            count = int(np.searchsorted(made, samples)) + 1  # what was read beyond is not needed
            break
        count = min(len(data), count + max(samples - int(made[-1]), count // 4))
    return [drafts[place] for place in np.argsort(order[:count])], max_length


def _part_of(progress: Progress, before: float, part: float) -> Progress:
    """Progress of a ``part`` of the work, behind that which comes ``before``."""
    return lambda share: progress(before + share * part)


def _tokenize(row: Row, teacher: Teacher, masks: AssistantMask | None, progress: Progress) -> Draft:
    """One row tokenized; ``masks``: if only the assistant's words are learnt."""
    if isinstance(row, Document):
        # Control tokens spelled out in a text stay text: data must not imitate the template.
        parts, done, length = [], 0, max(1, len(row.text))
        for piece in _pieces([row.text] if isinstance(row.text, str) else row.text):
            parts += teacher.tokenize([piece], add_special=False, parse_special=False)
            progress(min(1.0, (done := done + len(piece)) / length))
        return Draft(np.concatenate(parts), windows=True)
    try:
        if masks is None:
            tokens, keep, lost = conversation_tokens(teacher, row, answer=row.waits), None, 0
        else:
            tokens, learnt, lost = masks.tokens(row, answer=row.waits)
            keep = learnt[1:]
    except ChatTemplateError as error:
        raise UserError(f"{row.where}: {error}") from None
    progress(1.0)
    return Draft(tokens, answers=row.waits, keep=keep, lost=lost)


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


def _pieces(parts: Iterable[str]) -> Iterator[str]:
    """Cut long text at line ends, into pieces of about ``MAX_TOKENIZED_AT_ONCE`` at most."""
    text = ""
    for part in parts:
        text, start = text + part, 0
        while len(text) - start > MAX_TOKENIZED_AT_ONCE:
            end = text.rfind("\n", start, start + MAX_TOKENIZED_AT_ONCE)
            end = start + MAX_TOKENIZED_AT_ONCE if end <= start else end
            yield text[start:end]
            start = end
        text = text[start:]
    yield text
