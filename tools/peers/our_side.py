"""Our side of a comparison: the run as a user starts it, and what the other side must begin with,
taken from it: the training sequences and the student before its first step."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.capture.ready_store import find_teacher, open_full_store
from distill.errors import UserError
from distill.export.transformers_folder import publish_plain
from distill.pipeline.resolve import resolve
from distill.pipeline.stages import Prepared, Source, Workspace, prepare
from distill.runs.folder import RunFolder
from distill.runtime.launch import Launch
from distill.runtime.progress import Console
from students.model.decoder import SO8TForCausalLM
from tools.machine import child_environment, children_seconds


@dataclass(frozen=True)
class Taken:
    """What a process took: ``seconds`` of wall clock, and of the processor in all its threads and
    children."""

    seconds: float
    cpu_seconds: float


def taken_by(command: Sequence[str], log: Path, threads: int) -> Taken:
    """Run a command to its end, its output in ``log``.

    Raises:
        RuntimeError: it failed; says what it printed last.
    """
    before, begin = children_seconds(), time.time()
    with log.open("wb") as stream:
        result = subprocess.run(
            command, env=child_environment(threads), stdout=stream, stderr=subprocess.STDOUT
        )
    seconds = time.time() - begin
    if result.returncode != 0:
        last = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}:\n{last}")
    return Taken(seconds, children_seconds() - before)


def prepared_again(run: Path) -> Prepared:
    """A finished run as it was before its first training step, from its settings and its store: the
    same division of the data and the same first weights, to the byte.

    Raises:
        UserError, StoreError, TeacherFileError: its store or its teacher is not there any more.
    """
    folder, console = RunFolder(run), Console(quiet=True)
    if not folder.finished:
        raise UserError(f"{run} is not a finished run; let distill run end there first")
    config = folder.read_config()
    name = Path(folder.read_results()["soft_targets"]["folder"]).name
    store, record = open_full_store(run.parent / "stores" / name)
    gguf = find_teacher(config.teacher.path, record.info)
    resolved = resolve(config, record.info, record.tokenizer, gguf, console)
    source = Source(resolved, store, record, reused=True, safety=None, gguf=gguf)
    with tempfile.TemporaryDirectory() as temporary:
        work = Workspace(RunFolder(Path(temporary)), Launch.join(), console)
        return prepare(source, work)


def write_beginning(run: Path, tokens: Path, student: Path) -> None:
    """Write what the run trained on as a JSON file of token ids, one list a sequence, and its
    student before training as a plain transformers folder.

    Raises:
        UserError, StoreError, TeacherFileError: see ``prepared_again``.
    """
    prepared = prepared_again(run)
    if not isinstance(prepared.student, SO8TForCausalLM):
        raise UserError(f"the student of {run} is made of a base model; it has no first weights")
    store, train = prepared.data.store, prepared.data.split.train
    sequences = [store.tokens(int(index)).tolist() for index in train]
    publish_plain(prepared.student, prepared.source.teacher_record.tokenizer, student)
    tokens.write_text(json.dumps(sequences), encoding="utf-8")
