"""From a teacher and a corpus to a store of soft targets, for ``run`` and ``capture``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from distill.capture.corpus import Corpus, build_corpus
from distill.capture.data_rows import DataRows
from distill.capture.sequences.known import StoreLocation
from distill.capture.sequences.stored import stored_corpus
from distill.capture.teachers import open_teacher
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.runtime import interrupts
from distill.runtime.format import human_bytes, human_count
from distill.runtime.progress import Console
from teachers.base import Progress, Teacher, TeacherInfo
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.library.build import processor
from teachers.reduced import cut_of
from teachers.store.capture import capture
from teachers.store.manifest import TASKS
from teachers.store.shard_records import totals
from teachers.store.store import SoftTargetStore
from teachers.store.tasks import Maker, Tasks
from teachers.store.teacher_record import (
    TEACHER,
    TeacherRecord,
    find_teacher_record,
    make_teacher_record,
    write_teacher_record,
)


def load_teacher(config: RunConfig, console: Console) -> Teacher:
    """Load the teacher and report what it is; raises as ``open_teacher``."""
    with console.stage("Load teacher") as stage:
        teacher = open_teacher(config.teacher)
        info = teacher.info
        stage.finish(describe_teacher(info))
    return teacher


def describe_teacher(info: TeacherInfo) -> str:
    """A teacher in a line."""
    size = f", {human_count(info.parameters)} parameters" if info.parameters else ""
    return f"{info.name}: {info.architecture}{size}"


def read_data(
    config: RunConfig, teacher: Teacher, console: Console, data: DataRows | None = None
) -> Corpus:
    """Read the data into memory, unless given, and report it.

    Raises:
        UserError: as ``build_corpus``; and where nothing is generated, and all sequences are the
            same, so that none is left for validation.
    """
    corpus = _read(
        lambda progress: build_corpus(config.data, teacher, config.seed, data, progress),
        config,
        console,
    )
    _tell_of(corpus, console)
    return corpus


@contextmanager
def data_on_disk(
    config: RunConfig,
    teacher: Teacher,
    place: StoreLocation,
    console: Console,
    data: DataRows | None = None,
) -> Iterator[Corpus]:
    """The sequences of the data on disk, made unless a store has them; see ``stored_corpus``.

    Raises:
        UserError: as ``read_data``. StoreError: as ``stored_corpus``.
    """
    read = partial(_read, config=config, console=console)
    with stored_corpus(config, teacher, place, read, interrupts.check, data) as corpus:
        if not console.seconds.get("Read data"):
            with console.stage("Read data") as stage:
                stage.finish(f"{len(corpus)} sequences, tokenized before{_spoken(corpus)}")
        _tell_of(corpus, console)
        yield corpus


def _read(make: Callable[[Progress], Corpus], config: RunConfig, console: Console) -> Corpus:
    with console.stage("Read data", total=100) as stage:
        corpus = make(lambda share: stage.update(int(100 * share)))
        if not corpus.spoken and not corpus.tally.varied:
            raise UserError(
                f"data {config.data.path}: all {len(corpus)} sequences are the same; at least 2 "
                "different ones are needed (1 is for validation)"
            )
        stage.finish(f"{len(corpus)} sequences{_spoken(corpus)}")
    return corpus


def _spoken(corpus: Corpus) -> str:
    return f", the teacher writes in {corpus.spoken}" if corpus.spoken else ""


def _tell_of(corpus: Corpus, console: Console) -> None:
    for note in corpus.notes:
        console.note(note)
    for warning in corpus.warnings:
        console.warn(warning)


def fill_store(teacher: Teacher, corpus: Corpus, store: SoftTargetStore, console: Console) -> bool:
    """Capture what is missing, together with whoever else does; returns whether everything was
    there already."""
    tasks = store_tasks(store)
    with console.stage("Capture", total=len(store)) as stage:
        summary = capture(teacher, corpus, store, stage.update, tasks)
        whole = totals(tasks.records(), store.manifest)
        size = f"{learnt(whole)}, {human_bytes(store.bytes_on_disk())} in {store.folder}"
        parts = [f"{summary.written} shards captured"] if summary.written else []
        parts += [f"{summary.others} by other processes"] if summary.others else []
        if not parts:
            stage.finish(f"skipped: soft targets of this teacher and data reused, {size}")
        else:
            parts += [f"{summary.reused} reused"] if summary.reused else []
            stage.finish(", ".join([*parts, size] if len(parts) > 1 else [size]))
    for shard in summary.damaged:
        console.warn(f"{store.shard_path(shard)} was damaged and has been captured again")
    return summary.written + summary.others == 0


def store_tasks(store: SoftTargetStore) -> Tasks:
    """The tasks of a store, for this process to take."""
    maker = Maker(
        processor=processor().name,
        threads=torch.get_num_threads(),
        version=version("so8t-distill"),
    )
    return Tasks(store.folder / TASKS, maker)


def keep_teacher_record(
    teacher: Teacher,
    gguf: Path | None,
    store: SoftTargetStore,
    console: Console,
    text: str = "",
) -> TeacherRecord:
    """The store's teacher record, made now if it is missing or damaged.

    ``gguf``: source of tokenizer and embeddings; ``text``: a description of the sequences. Of
    several processes one makes it.
    """

    def find() -> TeacherRecord | None:
        kept = find_teacher_record(store)
        # An older version did not keep the teacher's shape, which the student's follows; and stores
        # of plain text are the same whatever the settings put into the chat template.
        wanted = (
            kept is not None
            and (kept.tokenizer or gguf is None)
            and kept.info.shape == teacher.info.shape
            and kept.info.chat_template == teacher.info.chat_template
        )
        return kept if wanted else None

    def make() -> TeacherRecord:
        if find_teacher_record(store) is None and (store.folder / TEACHER).exists():
            console.warn(f"{store.folder / TEACHER} was damaged and is made again")
        with console.stage("Keep teacher") as stage:
            sequences = (store.tokens(index) for index in range(len(store)))
            file = read_gguf(gguf, model=False) if gguf else None
            made = make_teacher_record(teacher, file, sequences, text)
            made = replace(made, cut=cut_of(teacher))
            write_teacher_record(store, made)
            size = human_bytes((store.folder / TEACHER).stat().st_size)
            stage.finish(
                f"tokenizer and embeddings, {size}"
                if gguf
                else "no GGUF file, so no tokenizer is kept"
            )
        return made

    return store_tasks(store).once(TEACHER, find, make, interrupts.check)


def text_of(config: RunConfig, info: TeacherInfo) -> str:
    """A store's text in words: a file's name without its folders, which may be private."""
    path = config.data.path
    return f"text written by {info.name}" if path is None else Path(path).resolve().name


def trained_on(store: SoftTargetStore) -> str:
    """How many tokens of a complete store are trained on."""
    return learnt({"tokens": int(store.lengths().sum()), "positions": store.positions()})


def learnt(whole: Mapping[str, int]) -> str:
    """How many tokens of a store are trained on; ``whole``: see ``totals``."""
    tokens = human_count(whole["tokens"])
    return f"{human_count(whole['positions'])} of {tokens} tokens are trained on"
