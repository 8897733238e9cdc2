"""The text to compare on: given data, a run's validation sequences, or text by the teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distill.capture.corpus import Corpus, build_corpus
from distill.capture.data_rows import DataRows
from distill.errors import UserError
from distill.evaluation.candidates import Candidate, Candidates
from distill.evaluation.inputs.request import DEFAULT_LENGTH, TextRequest
from distill.runs.folder import HeldOut, RunFolder
from teachers.base import GenerationRequest, Keep, Sampling, Teacher, Tokens, whole_masks
from teachers.store.sequence_index import Item

SHORTEST = 8  # tokens that a context or --max-length must have
# Random streams that no run's sequence has: with a run's own seed and numbers, the teacher would
# generate again what its student was trained on.
FIRST_STREAM = 1 << 32


@dataclass(frozen=True)
class Text:
    """Sequences as in a corpus, some still to be generated; ``description`` describes their source.

    ``skipped``: sequences left out because a model's context does not hold them.
    """

    description: str
    items: Sequence[Item]
    sampling: Sampling
    skipped: int = 0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def sequences(self, teacher: Teacher, progress: Callable[[float], None]) -> list[Tokens]:
        """All sequences; the teacher generates what is missing, which ``progress`` counts."""
        requests = [item.segments for item in self.items if item.speaks]
        rows = iter(
            teacher.generate(GenerationRequest(requests, self.sampling, FIRST_STREAM), progress)
            if requests
            else ()
        )
        return [next(rows) if item.speaks else item.segments[0] for item in self.items]

    @property
    def keep(self) -> list[Keep] | None:
        """Which predictions of ``sequences`` count; ``None``: all."""
        corpus = Corpus(self.items, self.sampling, self.notes, self.warnings)
        return corpus.keep(0, len(corpus))


def choose_text(
    wanted: TextRequest, models: Candidates, teacher: Teacher, data: DataRows | None = None
) -> Text:
    """Read the data, take the runs' validation sequences, or plan what the teacher generates.

    Raises:
        UserError: the data cannot be used, or no sequence fits the models' contexts.
    """
    room = min(model.context_length for model in (models.teacher, *models.students))
    length = min(room, wanted.max_length or DEFAULT_LENGTH)
    if length < SHORTEST:
        raise UserError(
            f"sequences of {length} tokens are too short: a model's context is {room}; give other "
            "models"
        )
    held_out: tuple[HeldOut, list[RunFolder]] | None = None
    if wanted.data is None:
        held_out = _shared_held_out(models.students, teacher.info.vocab_size)
    if held_out is not None:
        text = _held_out(wanted, *held_out, models.students, room, length)
    else:
        corpus = build_corpus(wanted.settings(length), teacher, wanted.seed, data)
        text = _corpus_text(wanted, models.students, corpus)
    if wanted.max_length is not None and wanted.max_length > room:
        text.notes.append(
            f"--max-length {wanted.max_length}: a model's context is {room} tokens; that is taken"
        )
    return text


def digest(sequences: Sequence[Tokens], keep: Sequence[Keep] | None = None) -> str:
    """SHA-256 in hexadecimal: of each sequence its length and its ids as little-endian int32, then
    of each mask, where there are masks, a byte per prediction."""
    hasher = hashlib.sha256()
    for tokens in sequences:
        hasher.update(np.concatenate(([len(tokens)], tokens)).astype("<i4").tobytes())
    for mask in whole_masks(sequences, keep) if keep is not None else ():
        hasher.update(mask.tobytes())
    return hasher.hexdigest()


def _corpus_text(wanted: TextRequest, students: Sequence[Candidate], corpus: Corpus) -> Text:
    """The user's data or the teacher's text, and whether the students were trained on it."""
    data = wanted.data
    if data is None:
        description = (
            f"{len(corpus)} sequences of the teacher's own words (temperature 1, seed "
            f"{wanted.seed}), new ones"
        )
        return Text(description, corpus.items, corpus.sampling)
    description = f"{len(corpus)} sequences of {data}"
    if corpus.spoken:
        description += (
            f", {corpus.spoken} of them with the teacher's answers (temperature 1, seed "
            f"{wanted.seed})"
        )
    seen = [_has_seen(student, data, wanted.split) for student in students]
    warnings = []
    if trained := [student.name for student, has in zip(students, seen, strict=True) if has]:
        description += f"; the run of {', '.join(trained)} was given the same data to train on"
        warnings.append(
            f"{data} is what the run of {', '.join(trained)} was trained on: its figures here are "
            "better than on new text; leave --data out to take the run's validation sequences"
        )
    elif any(has is None for has in seen):
        description += "; whether the students were trained on it is not known"
    else:
        description += "; the students' runs were given other data"
    if corpus.masked:
        description += "; what counts in conversations is the assistant's tokens"
    return Text(description, corpus.items, corpus.sampling, notes=corpus.notes, warnings=warnings)


def _has_seen(student: Candidate, data: Path, split: str | None) -> bool | None:
    """Whether a student's run trained on ``data`` or a part of it; ``None``: not known, as where it
    took another split of it."""
    if student.run is None:
        return None
    config = student.run.read_json(student.run.config_file)
    section = config.get("data")
    section = section if isinstance(section, dict) else {}
    given = section.get("path")
    if config.get("store") is not None:
        return None  # what is in the store was decided where it was captured
    if given is None:
        return False  # the teacher spoke
    theirs, ours = Path(str(given)).resolve(), data.resolve()
    same = theirs == ours or theirs in ours.parents or ours in theirs.parents
    other = (section.get("split") or "train") != (split or "train")  # as where none is named
    return None if same and other else same


def _shared_held_out(
    students: Sequence[Candidate], vocab_size: int
) -> tuple[HeldOut, list[RunFolder]] | None:
    """The validation sequences of the students' runs if all have the same, and those runs."""
    runs = {
        student.run.path.resolve(): student.run for student in students if student.run is not None
    }
    known = [run for run in runs.values() if run.held_out_file.exists()]
    if not known or len(known) < len(runs):
        return None
    first, *others = [run.read_held_out(vocab_size) for run in known]
    here = digest(first.sequences, first.keep)
    if any(digest(other.sequences, other.keep) != here for other in others):
        return None
    return first, known


def _held_out(
    wanted: TextRequest,
    held_out: HeldOut,
    runs: Sequence[RunFolder],
    students: Sequence[Candidate],
    room: int,
    length: int,
) -> Text:
    # A length that was asked for is what they are cut to; without one, what a model cannot hold is
    # left out.
    everything = [None] * len(held_out.sequences)
    fitting = [
        (row, mask)
        for row, mask in zip(held_out.sequences, held_out.keep or everything, strict=True)
        if (wanted.max_length is not None or len(row) <= room)
        and (mask is None or mask[: length - 1].any())
    ]
    if not fitting:
        raise UserError(
            f"every validation sequence is longer than a model's context of {room} tokens; give "
            f"--max-length {room} to cut them"
            if wanted.max_length is None
            else f"--max-length {length}: no token of the validation sequences that counts lies "
            "there"
        )
    chosen = fitting
    if wanted.samples < len(fitting):
        kept = np.random.default_rng(wanted.seed).permutation(len(fitting))[: wanted.samples]
        chosen = [fitting[index] for index in sorted(kept.tolist())]
    cut = sum(len(row) > length for row, _ in chosen)
    names = " and ".join(dict.fromkeys(str(run.path) for run in runs))
    description = (
        f"{len(chosen)} of the {len(held_out.sequences)} validation sequences of {names}: nothing "
        "was trained on them, but they chose its best weights"
    )
    description += f"; {cut} cut at {length} tokens" if cut else ""
    strangers = [student.name for student in students if student.run is None]
    warnings = [
        f"{name} lies in no run's folder: whether it was trained on the validation sequences is "
        "not known"
        for name in strangers
    ]
    if strangers:
        description += f"; whether {', '.join(strangers)} was trained on them is not known"
    items = [
        Item((row[:length],), False, None if mask is None else mask[: length - 1])
        for row, mask in chosen
    ]
    skipped = len(held_out.sequences) - len(fitting)
    return Text(description, items, Sampling(), skipped, warnings=warnings)
