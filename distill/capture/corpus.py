"""Conversations, plain text, or the teacher's own words → token sequences.

The teacher answers a conversation whose last message is not the assistant's; text is used as it
stands, cut into windows.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.capture.data_rows import DataRows, RowKinds, part_of, read_rows
from distill.capture.lengths import cap, describe_cut, most_tokens
from distill.capture.sequences.drafts import ANSWERS, WINDOWS, Drafts, Reader
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
from teachers.store.sequence_index import Item, Tally
from teachers.store.sequences import SequenceFiles
from teachers.tokenizer.conversation import opening_segments

DEFAULT_SPOKEN_SAMPLES = 4096


class Corpus:
    """The sequences of a run, in a fixed order; a ``teachers.store.capture.SequenceSource``.

    ``items``: in memory, or on disk (``SequenceFiles``). ``warnings``: of what is lost.
    """

    def __init__(
        self, items: Sequence[Item], sampling: Sampling, notes: list[str], warnings: list[str]
    ) -> None:
        self.items = items
        self.sampling = sampling
        self.notes, self.warnings = notes, warnings
        self._tally: Tally | None = None
        self.masked = self.tally.masked  # something is not to be learnt

    @property
    def tally(self) -> Tally:
        """What is known of the sequences without looking at them."""
        if isinstance(self.items, SequenceFiles):
            return self.items.about.tally
        if self._tally is None:
            self._tally = Tally.of(self.items, self.sampling)
        return self._tally

    def __len__(self) -> int:
        return len(self.items)

    @property
    def spoken(self) -> int:
        """How many sequences the teacher writes (in part)."""
        return self.tally.spoken

    def digest(self) -> str:
        """SHA-256 over everything that decides the sequences, and what is learnt of them."""
        return self.tally.digest

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


@dataclass(frozen=True)
class Planned:
    """Sequences that are cut from tokenized data as they are asked for, and what is said of
    them."""

    items: Iterable[Item]
    sampling: Sampling
    notes: list[str]
    warnings: list[str]


def build_corpus(
    config: DataConfig,
    teacher: Teacher,
    seed: int,
    data: DataRows | None = None,
    progress: Progress = no_progress,
) -> Corpus:
    """``plan_corpus``, with all sequences in memory."""
    planned = plan_corpus(config, teacher, seed, data, progress)
    return Corpus(list(planned.items), planned.sampling, planned.notes, planned.warnings)


def plan_corpus(
    config: DataConfig,
    teacher: Teacher,
    seed: int,
    data: DataRows | None = None,
    progress: Progress = no_progress,
    *,
    spool: Path | None = None,
) -> Planned:
    """Read the data, unless given, or plan the teacher's text; tokenize it, in a bounded memory.

    ``progress``: the share of that which is done. ``spool``: a folder for tokens that are not cut
    yet.

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
        items = itertools.repeat(Item(opening, True), samples or DEFAULT_SPOKEN_SAMPLES)
        notes = _of_the_context(config, max_length) + _of_the_date(info.chat_template or "")
        return Planned(items, _sampling(config, max_length, seed), notes, [])
    notes = [*data.notes, *_not_shown(data.kinds, info)]
    drafts = Drafts(spool)
    chosen, max_length = _tokenized(drafts, data, teacher, config, seed, progress)
    notes += _of_the_context(config, max_length)
    if data.kinds.rows > data.kinds.texts:
        notes += _of_the_date(info.chat_template or "")
    counts = drafts.counts(info, max_length)[chosen]
    owners = np.repeat(chosen, counts)  # the draft of each sequence
    taken = np.ones(len(owners), dtype=np.bool_)
    if samples is not None and samples < len(owners):
        taken[:] = False
        taken[np.random.default_rng(seed).permutation(len(owners))[:samples]] = True
    whole = owners[taken & ~drafts.are(WINDOWS)[owners]]
    lengths = drafts.lengths[whole] + drafts.are(ANSWERS)[whole]
    cut, much = describe_cut(lengths.tolist(), max_length, info.context_length)
    notes += [cut] if cut and not much else []
    notes += _of_answers(drafts, chosen, info, max_length)
    if (count := int(taken.sum())) < 2:
        raise UserError(
            f"data {config.path}: {'only 1 sequence' if count else 'no sequence'}; at least 2 are "
            "needed (1 is for validation)" + "".join(f"; {note}" for note in notes)
        )
    every = (item for place in chosen for item in drafts.items(int(place), info, max_length))
    items_taken = (item for item, wanted in zip(every, taken, strict=True) if wanted)
    warnings = [cut] if much else []
    return Planned(items_taken, _sampling(config, max_length, seed), notes, warnings)


def _sampling(config: DataConfig, max_length: int, seed: int) -> Sampling:
    return Sampling(config.sampling_temperature, config.top_p, max_length, seed)


def _of_the_context(config: DataConfig, max_length: int) -> list[str]:
    if max_length >= (config.max_length or 0):
        return []
    return [f"sequences are cut to the teacher's context of {max_length} tokens"]


def _of_answers(
    drafts: Drafts, chosen: NDArray[np.int64], info: TeacherInfo, max_length: int
) -> list[str]:
    """Notes on answers that are not learnt, and conversations left out for that."""
    notes = []
    if lost := int(drafts.lost[chosen].sum()):
        notes.append(
            f"{lost} answers are not trained on: the chat template rewrites them, and shows not "
            "where they are"
        )
    whole = chosen[~drafts.are(WINDOWS)[chosen]]
    silent = whole[drafts.counts(info, max_length)[whole] == 0]
    if len(silent):
        longer = max_length < min(info.context_length, int(drafts.lengths[silent].max()))
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


def _not_shown(kinds: RowKinds, info: TeacherInfo) -> list[str]:
    """Notes on tools and documents that the teacher's chat template has no word for.

    Raises:
        UserError: it has none for tool calls, without which the conversation is another.
    """
    unseen: Counter[str] = Counter()
    for tools in (True, False):
        template = (info.tool_template if tools else None) or info.chat_template or ""
        for name, counts in (("tools", kinds.tools), ("documents", kinds.documents)):
            unseen[name] += counts[tools] * (name not in template)
        shown = "tool_calls" in template or "tojson" in template
        if not shown and tools in kinds.calls:
            raise UserError(
                f"{kinds.calls[tools]}: the teacher's chat template shows no tool calls; leave "
                "such rows out, or use a teacher whose template does"
            )
    return [
        f"{name} of {count} conversations are not used: the teacher's chat template has no place "
        "for them"
        for name, count in unseen.items()
        if count
    ]


def _tokenized(
    drafts: Drafts,
    data: DataRows,
    teacher: Teacher,
    config: DataConfig,
    seed: int,
    progress: Progress,
) -> tuple[NDArray[np.int64], int]:
    """Tokenize the data into ``drafts``; those that count, in the data's order, and how many tokens
    a sequence has at most.

    A conversation is one sequence or none, so that where there is nothing else only so many of
    them are tokenized, chosen at random, that ``config.samples`` sequences come of them.
    """
    info, total = teacher.info, len(data.rows)
    reader = Reader(teacher, cap(config, info) if config.train_on == "assistant" else None)
    samples, count, order = config.samples or total, total, np.arange(total)
    if samples < total and not data.kinds.texts:
        order, count = np.random.default_rng(seed).permutation(total), samples
    places = np.full(total, -1, dtype=np.int64)  # of each row among the drafts
    while True:
        wanted = np.zeros(total, dtype=np.bool_)
        wanted[order[len(drafts) : count]] = True
        for number, row in enumerate(data.rows):
            if wanted[number]:
                done = len(drafts)
                drafts.add(number, row, reader, part_of(progress, done / count, 1 / count))
        places[drafts.rows] = np.arange(len(drafts))
        max_length = most_tokens(config, info, drafts.wanted().tolist())
        if count == total:
            break
        made = np.cumsum(drafts.counts(info, max_length)[places[order[:count]]])
        if made[-1] >= samples:
            count = int(np.searchsorted(made, samples)) + 1  # what was read beyond is not needed
            break
        count = min(total, count + max(samples - int(made[-1]), count // 4))
    return places[np.sort(order[:count])], max_length
