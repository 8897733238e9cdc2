"""The text on which models are compared: given data, a run's held-out sequences, or the
teacher's own words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distill.capture.corpus import Corpus, Entry, Item, build_corpus
from distill.errors import UserError
from distill.evaluation.candidates import Candidate, Candidates
from distill.evaluation.inputs.request import DEFAULT_LENGTH, Wanted
from distill.runs.folder import RunFolder
from teachers.base import Sampling, Teacher, Tokens

SHORTEST = 8  # tokens that a context or --max-length must have
# What the teacher says here is drawn from streams of random numbers that no run's sequence has:
# with a run's own seed and numbers it would say again what its student was trained on.
FIRST_STREAM = 1 << 32


@dataclass(frozen=True)
class Text:
    """Where the sequences are from, in words. ``items``: as a corpus has them; some the teacher has
    yet to finish.

    ``skipped``: sequences left out because a model's context does not hold them.
    """

    words: str
    items: list[Item]
    sampling: Sampling
    skipped: int = 0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def sequences(self, teacher: Teacher, progress: Callable[[int], None]) -> list[Tokens]:
        """All sequences; the teacher writes what is missing, and ``progress`` counts those it
        has written."""
        requests = [item.segments for item in self.items if item.speaks]
        said = (
            teacher.speak(requests, self.sampling, first_index=FIRST_STREAM, progress=progress)
            if requests
            else []
        )
        spoken = iter(said)
        return [next(spoken) if item.speaks else item.segments[0] for item in self.items]


def choose_text(
    wanted: Wanted, models: Candidates, teacher: Teacher, entries: list[Entry] | None = None
) -> Text:
    """Read the data, or find the held-out sequences of the students' run, or plan what the teacher
    is to say.

    ``entries``: the data, if it has been read.

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
    text = _choose(wanted, models, teacher, (room, length), entries)
    if wanted.max_length is not None and wanted.max_length > room:
        text.notes.append(
            f"--max-length {wanted.max_length}: a model's context is {room} tokens; that is taken"
        )
    return text


def _choose(
    wanted: Wanted,
    models: Candidates,
    teacher: Teacher,
    lengths: tuple[int, int],
    entries: list[Entry] | None,
) -> Text:
    """``lengths``: what every context holds, and what a sequence is to have at most."""
    room, length = lengths
    if wanted.data is not None:
        corpus = build_corpus(wanted.settings(length), teacher, wanted.seed, entries)
        return _data(wanted, wanted.data, models.students, corpus)
    held_out = _shared_held_out(models.students, teacher.info.vocab_size)
    if held_out is not None:
        return _held_out(wanted, *held_out, models.students, room, length)
    corpus = build_corpus(wanted.settings(length), teacher, wanted.seed)
    words = (
        f"{len(corpus)} sequences of the teacher's own words (temperature 1, seed "
        f"{wanted.seed}), new ones"
    )
    return Text(words, corpus.items, corpus.sampling)


def digest(sequences: Sequence[Tokens]) -> str:
    """SHA-256 of the token ids, as hexadecimal: of each sequence its length and its ids, as
    little-endian int32."""
    found = hashlib.sha256()
    for tokens in sequences:
        found.update(np.concatenate(([len(tokens)], tokens)).astype("<i4").tobytes())
    return found.hexdigest()


# -- data -----------------------------------------------------------------------------------------------------


def _data(wanted: Wanted, data: Path, students: Sequence[Candidate], corpus: Corpus) -> Text:
    words = f"{len(corpus)} sequences of {data}"
    if corpus.spoken:
        words += (
            f", {corpus.spoken} of them with the teacher's answers (temperature 1, seed "
            f"{wanted.seed})"
        )
    seen = [_has_seen(student, data) for student in students]
    warnings = []
    if trained := [student.name for student, has in zip(students, seen, strict=True) if has]:
        words += f"; the run of {', '.join(trained)} was given the same data to train on"
        warnings.append(
            f"{data} is what the run of {', '.join(trained)} was trained on: its figures here are "
            "better than on new "
            "text; leave --data out to take the run's held-out sequences"
        )
    elif any(has is None for has in seen):
        words += "; whether the students were trained on it is not known"
    else:
        words += "; the students' runs were given other data"
    return Text(words, corpus.items, corpus.sampling, notes=corpus.notes, warnings=warnings)


def _has_seen(student: Candidate, data: Path) -> bool | None:
    """Whether a student's run was given ``data``, a folder of it or a file in it; ``None`` where
    that is not known."""
    if student.run is None:
        return None
    config = student.run.read_json(student.run.config_file)
    section = config.get("data")
    given = section.get("path") if isinstance(section, dict) else None
    if config.get("store") is not None:
        return None  # what is in the store was decided where it was captured
    if given is None:
        return False  # the teacher spoke
    theirs, ours = Path(str(given)).resolve(), data.resolve()
    return theirs == ours or theirs in ours.parents or ours in theirs.parents


# -- held-out sequences -----------------------------------------------------------------------------------------


def _shared_held_out(
    students: Sequence[Candidate], vocab_size: int
) -> tuple[list[Tokens], list[RunFolder]] | None:
    """The held-out sequences of the students' runs, where all runs have the same, and those
    runs."""
    runs = {
        student.run.path.resolve(): student.run for student in students if student.run is not None
    }
    known = [run for run in runs.values() if run.held_out_file.exists()]
    if not known or len(known) < len(runs):
        return None
    first, *others = [run.read_held_out(vocab_size).sequences for run in known]
    if any([row.tolist() for row in other] != [row.tolist() for row in first] for other in others):
        return None
    return first, known


def _held_out(
    wanted: Wanted,
    sequences: list[Tokens],
    runs: Sequence[RunFolder],
    students: Sequence[Candidate],
    room: int,
    length: int,
) -> Text:
    # A length that was asked for is what they are cut to; without one, what a model cannot hold is
    # left out.
    fitting = [row for row in sequences if wanted.max_length is not None or len(row) <= room]
    if not fitting:
        raise UserError(
            f"every held-out sequence is longer than a model's context of {room} tokens; give "
            f"--max-length {room} to "
            "cut them"
        )
    chosen = fitting
    if wanted.samples < len(fitting):
        kept = np.random.default_rng(wanted.seed).permutation(len(fitting))[: wanted.samples]
        chosen = [fitting[place] for place in sorted(kept.tolist())]
    cut = sum(len(row) > length for row in chosen)
    names = " and ".join(dict.fromkeys(str(run.path) for run in runs))
    words = (
        f"{len(chosen)} of the {len(sequences)} sequences that {names} held out: nothing was "
        "trained on them, but they "
        "chose its best weights"
    )
    words += f"; {cut} cut at {length} tokens" if cut else ""
    strangers = [student.name for student in students if student.run is None]
    warnings = [
        f"{name} lies in no run's folder: whether it was trained on the held-out sequences is not "
        "known"
        for name in strangers
    ]
    if strangers:
        words += f"; whether {', '.join(strangers)} was trained on them is not known"
    items = [Item((row[:length],), False) for row in chosen]
    return Text(words, items, Sampling(), len(sequences) - len(fitting), warnings=warnings)
