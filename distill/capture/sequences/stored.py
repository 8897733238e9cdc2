"""The sequences of a capture on disk: found by whoever asks for the same data, or else read,
tokenized and written by one process while the others wait."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from distill.capture.corpus import Corpus, Planned, plan_corpus
from distill.capture.data_rows import DataRows
from distill.capture.sequences.known import (
    StoreLocation,
    data_files,
    data_settings,
    find_sequences,
)
from distill.config.schema import RunConfig
from teachers.atomic_files import remove_leftovers, temporary_name
from teachers.base import Progress, Teacher
from teachers.gguf.file import file_sha256
from teachers.reduced import cut_of
from teachers.store.manifest import SEQUENCES, TASKS
from teachers.store.sequence_index import Index, Tally
from teachers.store.sequences import SequenceFiles, write_sequences
from teachers.store.tasks import Maker, Tasks


def _of_teacher(teacher: Teacher) -> dict[str, str]:
    """What of a teacher decides how data becomes tokens."""
    info, cut = teacher.info, cut_of(teacher)
    templates = json.dumps([info.chat_template, info.tool_template, sorted(info.special_tokens)])
    return {
        "teacher": info.sha256,
        "tokenizer": info.tokenizer_sha256,
        "templates": hashlib.sha256(templates.encode()).hexdigest(),
        "vocabulary": "" if cut is None else cut.key,
    }


@contextmanager
def stored_corpus(
    config: RunConfig,
    teacher: Teacher,
    place: StoreLocation,
    read: Callable[[Callable[[Progress], Corpus]], Corpus],
    waiting: Callable[[], None],
    data: DataRows | None = None,
) -> Iterator[Corpus]:
    """The sequences of this data on disk: in the store, or until they are put there
    (``SequenceFiles.keep_in``) in a temporary folder.

    ``read``: runs what it is given and tells its progress; ``waiting``: called while another
    process reads the data.

    Raises:
        UserError: as ``plan_corpus``. StoreError: the store that is asked for is damaged.
    """

    def find() -> Corpus | None:
        found = find_sequences(place, config)
        if found is None or found[1].request.get("teacher") != _of_teacher(teacher):
            return None
        return _corpus(*found)

    with ExitStack() as stack:
        found = Tasks(place.home / TASKS, Maker()).claimed(SEQUENCES, find, waiting)
        if isinstance(found, Corpus):
            yield found
            return
        remove_leftovers(place.home)
        folder = temporary_name(place.home / SEQUENCES)
        stack.callback(_remove_empty, place)
        stack.callback(found.release)
        with found.telling() if place.asked is not None else nullcontext():
            folder.mkdir(parents=True)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)

            def written(progress: Progress) -> Corpus:
                planned = plan_corpus(
                    config.data, teacher, config.seed, data, progress, spool=folder
                )
                return _written(folder, planned, config, teacher)

            corpus = read(written)
        assert isinstance(corpus.items, SequenceFiles)
        corpus.items.pending = found.release
        yield corpus


def _remove_empty(place: StoreLocation) -> None:
    """Remove the folders of stores, where there is nothing in them after all."""
    if place.asked is None:
        for folder in (place.home / TASKS, place.home, place.home.parent):
            try:
                folder.rmdir()
            except OSError:  # it is not empty
                return


def _written(folder: Path, planned: Planned, config: RunConfig, teacher: Teacher) -> Corpus:
    files = [
        {
            "name": file.name,
            "bytes": file.stat().st_size,
            "mtime_ns": file.stat().st_mtime_ns,
            "sha256": file_sha256(file),
        }
        for file in data_files(config)
    ]
    request = {"settings": data_settings(config), "files": files, "teacher": _of_teacher(teacher)}
    index = Index(planned.sampling, Tally(), [], request, planned.notes, planned.warnings)
    return _corpus(folder, write_sequences(folder, planned.items, index))


def _corpus(folder: Path, index: Index) -> Corpus:
    return Corpus(SequenceFiles(folder, index), index.sampling, index.notes, index.warnings)
