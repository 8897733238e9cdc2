"""The events of a run's log, ``audit.jsonl`` (``distill.runs.audit_log`` keeps the chain).

Texts of people and models are never logged: prompts appear as SHA-256, files as their name within
the run, size and SHA-256, paths in settings as their last part. Only the first process of a launch
calls these functions. The newest line that names a file under ``files`` is what it must be now.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.runs.audit_log import append, has_log, last_event, read_head

if TYPE_CHECKING:
    from distill.runs.folder import RunFolder
    from teachers.store.store import SoftTargetStore


STARTED, CONTINUED, FINISHED = "run_started", "run_continued", "run_finished"
BLOCK = 1 << 20


def record_start(
    folder: RunFolder,
    settings: Mapping[str, Any],
    identity: Mapping[str, str],
    environment: Mapping[str, Any],
) -> None:
    """A command starts or continues the run; a finished one is not started again.

    ``settings``: the resolved configuration; ``identity``: as the folder was claimed with;
    ``environment``: as in ``results.json``. Every function here raises ``OSError`` if the disk
    refuses.
    """
    if folder.finished:
        return
    about: dict[str, Any] = {"identity": identity, "environment": environment}
    if last_event(folder.path, {STARTED}) is not None:
        append(folder.path, [(CONTINUED, about)])
        return
    about |= {"settings": settings, "seed": settings["seed"]}
    files = _described(folder.path, [folder.config_file, folder.identity_file])
    append(folder.path, [(STARTED, {**about, "files": files})])


def record_settings(folder: RunFolder) -> None:
    """Settings that were left to what is measured are fixed, and their file is written anew."""
    files = _described(folder.path, [folder.config_file])
    append(folder.path, [("settings_fixed", {"files": files})])


def record_capture(
    folder: Path, store: SoftTargetStore, reused: bool, reasoning_sha256: Sequence[str] = ()
) -> None:
    """The soft targets are complete; the manifest has the hashes of data and tokenizer.

    ``reasoning_sha256``: of the private reasoning in the texts that ``held_out.json`` keeps.
    """
    manifest = store.manifest
    content = {
        "store_key": manifest.key,
        "manifest_sha256": hashlib.sha256(manifest.to_json().encode()).hexdigest(),
        "identity": {
            name: value for name, value in manifest.identity.items() if not isinstance(value, dict)
        },
        "sequences": manifest.sequences,
        "reused": reused,
        "reasoning_sha256": list(reasoning_sha256),
    }
    append(folder, [("captured", content)])


def record_checkpoint(folder: Path, checkpoint: Path, step: int) -> None:
    """A checkpoint was saved in ``checkpoint``, a folder of the run."""
    files = _described(folder, checkpoint.iterdir())
    append(folder, [("checkpoint", {"step": step, "files": files})])


def record_resumed(folder: Path, checkpoint: Path, step: int) -> None:
    """Training resumes from ``checkpoint``; its files must be those that were saved."""
    files = _described(folder, checkpoint.iterdir())
    append(folder, [("training_resumed", {"step": step, "read": files})])


def record_guard(folder: Path, step: int, event: Mapping[str, Any]) -> None:
    """A guard action: ``distill.training.guard_hooks.event_line`` without its sentence."""
    values = {name: value for name, value in event.items() if name != "words"}
    append(folder, [("guard", {"step": step, **values})])


def record_training(folder: Path, figures: Mapping[str, Any]) -> None:
    """Training is over; ``figures`` are its results."""
    append(folder, [("training_finished", figures)])


def record_export(
    folder: Path, files: Sequence[Path], quant: str | None, figures: Mapping[str, Any] | None = None
) -> bool:
    """Files were exported: GGUF, companions, model card; call it when they have their final names.

    Files outside ``folder`` are logged by name alone. ``quant``: such as ``q8_0``. ``figures``:
    such as ``Proof.to_json()``, never texts. Returns whether it was written: older runs have no
    log.
    """
    if not has_log(folder):
        return False
    inside = [path for path in files if _name_in(folder, path) is not None]
    content = {
        "quant": quant,
        "figures": dict(figures or {}),
        "files": _described(folder, inside),
        "elsewhere": [{"name": path.name, **_file(path)} for path in files if path not in inside],
    }
    append(folder, [("exported", content)])
    return True


def record_judgments(student: Path, decisions: Sequence[Mapping[str, Any]]) -> bool:
    """A student in a run's folder (or in a folder of it) has judged prompts; one write.

    ``decisions``: ``Judgment.to_audit()``, without the prompts. Returns whether it was written: not
    for a student elsewhere or a run without a log.
    """
    folder = _run_of(student)
    if folder is None or not decisions:
        return False
    described = _described(folder, [student])
    append(folder, [("judged", {**decision, "read": described}) for decision in decisions])
    return True


def record_finish(folder: RunFolder) -> bool:
    """The run is finished: hash everything it made. Writes once, however often it is called."""
    if last_event(folder.path, {STARTED, CONTINUED, FINISHED}) in (None, FINISHED):
        return False
    paths = [folder.results_file, folder.gguf, folder.held_out_file, folder.importance]
    paths.append(folder.path / "metrics.jsonl")
    for inside in (folder.student, folder.plain):
        paths += inside.rglob("*")
    files = [path for path in paths if path.is_file()]
    append(folder.path, [(FINISHED, {"files": _described(folder.path, files)})])
    return True


def anchor(folder: Path) -> dict[str, Any]:
    """The log's end, to be kept in another file: lines, SHA-256 of the last. ``{}``: no log."""
    head = read_head(folder)
    return {} if head is None else {"lines": head.lines, "sha256": head.sha256}


def hash_file(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file, read now."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _described(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files in a run's folder, by their names within it."""
    named = {_name_in(folder, path): path for path in sorted(paths)}
    return {name: _file(path) for name, path in named.items() if name is not None}


def _file(path: Path) -> dict[str, Any]:
    size, digest = hash_file(path)
    return {"bytes": size, "sha256": digest}


def _run_of(student: Path) -> Path | None:
    """The run's folder with a log that a file lies in, or in a folder of."""
    for path in (student.absolute(), student.resolve()):
        for parent in path.parents[:2]:
            if has_log(parent) and _name_in(parent, path) is not None:
                return parent
    return None


def _name_in(folder: Path, path: Path) -> str | None:
    """A file's name within the run's folder, ``None`` if it is elsewhere.

    A link in the folder keeps its own name: checkpoints may have been moved to another disk. A link
    elsewhere that points into the folder has its target's name.
    """
    inside = folder.resolve()
    for known in (path.absolute(), path.resolve()):
        for parent in known.parents:
            name = known.relative_to(parent)
            if parent.resolve() == inside and ".." not in name.parts:
                return name.as_posix()
    return None
