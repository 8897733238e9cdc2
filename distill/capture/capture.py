"""From a teacher and a corpus to a store of soft targets, for ``run`` and ``capture``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distill.capture.corpus import Corpus, DataRows, build_corpus
from distill.capture.teachers import open_teacher
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.runtime.format import human_bytes, human_count
from distill.runtime.progress import Console
from teachers.base import SINGLE_PROCESS, ProcessRank, Teacher, TeacherInfo
from teachers.gguf.file import read_gguf
from teachers.reduced import cut_of
from teachers.store.capture import capture
from teachers.store.store import SoftTargetStore
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
    """Read the data, unless given, and report it.

    Raises:
        UserError: as ``build_corpus``; and where nothing is generated, and all sequences are the
            same, so that none is left for validation.
    """
    with console.stage("Read data", total=100) as stage:
        corpus = build_corpus(
            config.data, teacher, config.seed, data, lambda share: stage.update(int(100 * share))
        )
        if not corpus.spoken and len({item.segments[0].tobytes() for item in corpus.items}) < 2:
            raise UserError(
                f"data {config.data.path}: all {len(corpus)} sequences are the same; at least 2 "
                "different ones are needed (1 is for validation)"
            )
        spoken = f", the teacher writes in {corpus.spoken}" if corpus.spoken else ""
        stage.finish(f"{len(corpus)} sequences{spoken}")
    for note in corpus.notes:
        console.note(note)
    for warning in corpus.warnings:
        console.warn(warning)
    return corpus


def fill_store(
    teacher: Teacher,
    corpus: Corpus,
    store: SoftTargetStore,
    console: Console,
    share: ProcessRank = SINGLE_PROCESS,
) -> bool:
    """Capture what is missing; returns whether everything was there already."""
    with console.stage("Capture", total=_sequences(store, share)) as stage:
        summary = capture(teacher, corpus, store, stage.update, share)
        size = f"{human_bytes(store.bytes_on_disk())} in {store.folder}"
        if share.world == 1:
            size = f"{trained_on(store)}, {size}"
        if summary.written == 0:
            stage.finish(f"skipped: soft targets of this teacher and data reused, {size}")
        elif summary.reused:
            stage.finish(f"{summary.written} shards captured, {summary.reused} reused, {size}")
        else:
            stage.finish(size)
    for shard in summary.damaged:
        console.warn(f"{store.shard_path(shard)} was damaged and has been captured again")
    return summary.written == 0


def keep_teacher_record(
    teacher: Teacher,
    gguf: Path | None,
    store: SoftTargetStore,
    console: Console,
    share: ProcessRank = SINGLE_PROCESS,
    text: str = "",
) -> TeacherRecord:
    """The store's teacher record, made now if it is missing or damaged.

    ``gguf``: source of tokenizer and embeddings. The lines come from this process's own shards.
    ``text``: a description of the sequences.
    """
    kept = find_teacher_record(store)
    # An older version did not keep the teacher's shape, which the student's follows; and stores of
    # plain text are the same whatever the settings put into the chat template.
    if (
        kept is not None
        and (kept.tokenizer or gguf is None)
        and kept.info.shape == teacher.info.shape
        and kept.info.chat_template == teacher.info.chat_template
    ):
        return kept
    if kept is None and (store.folder / TEACHER).exists():
        console.warn(f"{store.folder / TEACHER} was damaged and is made again")
    with console.stage("Keep teacher") as stage:
        spans = (
            range(*store.span(shard))
            for shard in range(share.rank, store.manifest.shards, share.world)
        )
        sequences = (store.tokens(index) for span in spans for index in span)
        file = read_gguf(gguf, model=False) if gguf else None
        made = make_teacher_record(teacher, file, sequences, text)
        made = replace(made, cut=cut_of(teacher))
        write_teacher_record(store, made)
        size = human_bytes((store.folder / TEACHER).stat().st_size)
        stage.finish(
            f"tokenizer and embeddings, {size}" if gguf else "no GGUF file, so no tokenizer is kept"
        )
    return made


def text_of(config: RunConfig, info: TeacherInfo) -> str:
    """A store's text in words: a file's name without its folders, which may be private."""
    path = config.data.path
    return f"text written by {info.name}" if path is None else Path(path).resolve().name


def trained_on(store: SoftTargetStore) -> str:
    """How many tokens of a complete store are trained on."""
    tokens = human_count(int(store.lengths().sum()))
    return f"{human_count(store.positions())} of {tokens} tokens are trained on"


def _sequences(store: SoftTargetStore, share: ProcessRank) -> int:
    """How many sequences this process's shards hold."""
    spans = [store.span(shard) for shard in range(share.rank, store.manifest.shards, share.world)]
    return sum(stop - start for start, stop in spans)
