"""What each command can refuse before PyTorch is imported, which takes seconds.

A command calls its check as soon as it has its settings, and hands on what was read. Whoever calls
what is behind a command without that gets the same check there. Nothing here may import PyTorch, or
what does (``tests/test_quick_refusals.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.config import Quant, RunConfig
from distill.corpus import Entry, read_entries
from distill.errors import UserError
from distill.evaluation.files import Files, find_files
from distill.evaluation.harness import require_harness
from distill.evaluation.request import Request
from distill.evaluation.task_file import Task, read_tasks
from distill.exports import export_paths, read_exports
from distill.launched import launched_share, require_trainable
from distill.reports.paths import require_logged, require_page_path, weights_among
from distill.run_folder import Places, RunFolder
from distill.safety_prompts import (
    SafetyPrompt,
    read_given,
    read_prompts,
    read_safety_prompts,
    require_words,
)
from distill.teacher_source import require_gguf, require_teachers
from students.decisions import carries_heads
from teachers.files import StoreError
from teachers.gguf_file import GGUFFile, TeacherFileError, read_gguf
from teachers.manifest import Manifest, read_manifest, require_store_folder
from teachers.model_folder import ModelFolder, check_folder


@dataclass
class Inputs:
    """What was read for a run.

    ``prompts``: of the safety head, if there is to be one. ``entries``: the data, until somebody
    takes it; ``None`` where the teacher speaks.
    """

    prompts: list[SafetyPrompt] | None = None
    entries: list[Entry] | None = None

    def take_entries(self) -> list[Entry] | None:
        """The data, which is not kept here any longer: it may be large."""
        taken, self.entries = self.entries, None
        return taken


def check_run(config: RunConfig, places: Places) -> Inputs:
    """Refuse what ``distill run`` cannot do.

    Raises:
        UserError, StoreError, TeacherFileError: the input cannot be used.
    """
    world = launched_share().world
    _require_no_store(config)
    require_gguf(config.teacher)
    require_teachers(config.teacher)
    require_trainable(config.train, world)
    _check_student(config)
    if places.out is not None:
        RunFolder(places.out).require_usable()
    if places.store is not None:
        require_store_folder(places.store)
    return Inputs(read_safety_prompts(config), read_entries(config.data))


def check_capture(config: RunConfig, store: Path | None) -> Inputs:
    """Refuse what ``distill capture`` cannot do.

    Raises:
        UserError, StoreError, TeacherFileError: the input cannot be used.
    """
    launched_share()
    _require_no_store(config)
    require_teachers(config.teacher)
    if store is not None:
        require_store_folder(store)
    return Inputs(read_safety_prompts(config), read_entries(config.data))


def check_train(config: RunConfig, out: Path | None) -> Inputs:
    """Refuse what ``distill train`` cannot do; the data is in the store.

    Raises:
        UserError, StoreError, TeacherFileError: the input cannot be used.
    """
    assert config.store is not None
    world = launched_share().world
    if config.train.on_policy:
        raise UserError(
            f"train.on_policy = {config.train.on_policy:g} needs the teacher, which `distill train` does without; "
            "use `distill run --teacher`"
        )
    require_trainable(config.train, world)
    filled_manifest(Path(config.store))
    if config.teacher.path is not None:
        read_gguf(Path(config.teacher.path))
    _check_student(config)
    if out is not None:
        RunFolder(out).require_usable()
    return Inputs(read_safety_prompts(config))


def check_plan(config: RunConfig) -> Inputs:
    """Refuse what ``distill plan`` cannot do; it reads no prompts.

    Raises:
        UserError, TeacherFileError: the input cannot be used.
    """
    _require_no_store(config)
    if config.student.base is not None:
        require_gguf(config.teacher)
    require_teachers(config.teacher)
    _check_student(config)
    return Inputs(entries=read_entries(config.data))


def _require_no_store(config: RunConfig) -> None:
    if config.store is not None:
        raise UserError(
            f"store = {config.store!r} in the configuration: only `distill train` learns from a store; use that, or "
            "take it out to ask the teacher"
        )


def _check_student(config: RunConfig) -> None:
    if config.student.base is not None:
        base_folder(Path(config.student.base))


def base_folder(path: Path, what: str = "--student-base") -> ModelFolder:
    """The folder of a model that is to become a student, which errors call ``what``.

    Raises:
        UserError: it is none, or is quantised.
    """
    try:
        folder = check_folder(path)
    except TeacherFileError as error:
        raise UserError(f"{what}: {error}") from None
    if "quantization_config" in folder.config:
        raise UserError(
            f"{what} {path} is quantised already; give the folder of the model before that, and add "
            "--load-in-4bit"
        )
    return folder


def filled_manifest(folder: Path) -> Manifest:
    """The manifest of a store that ``distill capture`` has filled; its files are not looked at.

    Raises:
        StoreError: it is no store, damaged, or empty.
    """
    if not folder.is_dir():
        wrong = "is not a folder" if folder.exists() else "does not exist"
        raise StoreError(f"store {folder} {wrong}; give the folder that `distill capture` has filled")
    manifest = read_manifest(folder)
    if not any(folder.glob("shard-*.safetensors")):
        raise StoreError(
            f"store {folder} holds no soft targets yet; run the capture again where the teacher is"
        )
    return manifest


def check_report(paths: list[Path], output: Path | None) -> None:
    """Refuse what ``distill report`` cannot do.

    Raises:
        UserError: paths that are no runs or weights, damaged ones, or no place for a page.
        TeacherFileError: a GGUF file's header is damaged.
    """
    weights = weights_among(paths)
    if output is not None:
        require_page_path(output)
    for path in paths if not weights else ():
        require_logged(path)


def check_export(
    folder: RunFolder,
    quants: Sequence[Quant],
    output: Path | None,
) -> dict[Quant, Path]:
    """Refuse what ``distill export-gguf`` cannot do; returns where each type goes.

    Raises:
        UserError: not a run's folder or an unfinished one, a damaged file, or something in the
            way of ``output``.
    """
    folder.read_config()
    if not folder.tokenizer.exists():
        raise UserError(f"{folder.path} has no trained student yet; let its command finish first")
    wanted = export_paths(folder, quants, output)
    read_exports(folder)
    return wanted


def check_judge(student: Path, prompt: str | None, prompts: Path | None) -> list[str]:
    """Refuse what ``distill judge`` cannot do; returns what is to be judged.

    Raises:
        UserError: no prompt or two kinds of them, a file that cannot be used, or a student
            without heads.
        TeacherFileError: the student is no GGUF file, or damaged.
    """
    if (prompt is None) == (prompts is None):
        raise UserError("give one prompt to judge, or --prompts FILE.jsonl")
    if prompt is not None:
        require_words(prompt)
    require_heads(read_gguf(student))
    if prompts is not None:
        return [entry.text for entry in read_prompts(prompts, labelled=False)]
    return [] if prompt is None else [prompt]


def require_heads(file: GGUFFile) -> None:
    """See that a student has a head.

    Raises:
        UserError: it has none.
    """
    if not carries_heads(file.fields):
        raise UserError(
            f"{file.path} carries no heads (so8t.safety.*, so8t.verification.*); give a student that `distill run` has "
            "made, with safety.labels and loss.lambda_safety as they are by default"
        )


@dataclass(frozen=True)
class EvaluationInputs:
    """What was read for an evaluation: the models' headers, and what the user's files hold."""

    files: Files
    tasks: list[Task]
    prompts: list[SafetyPrompt] | None
    entries: list[Entry] | None


def check_evaluation(request: Request) -> EvaluationInputs:
    """Refuse what ``distill evaluate`` cannot do.

    Raises:
        UserError, TeacherFileError: the input cannot be used.
    """
    if request.harness:
        require_harness()
    tasks = [] if request.tasks is None else read_tasks(request.tasks)
    entries = None if request.text.data is None else read_entries(request.text.settings())
    prompts = read_given(request.safety_prompts)
    files = find_files(request.students, request.teacher)  # last: it may hash a large teacher
    return EvaluationInputs(files, tasks, prompts, entries)
