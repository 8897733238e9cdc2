"""What is written into a run's log, ``audit.jsonl``, by whom it happens to
(``distill.runs.audit_log`` keeps the chain).

Texts of people and models never get there: prompts appear as SHA-256, files as their name within
the run, size and SHA-256, settings that name a place as the last part of it. The first process of a
launch alone calls these functions. Whatever event names files under ``files``, the newest line
about a file says what it has to be now.
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
    """A command begins or continues the run: its settings, teacher and data, and what computes it.

    ``settings``: the resolved configuration; ``identity``: as the folder was claimed with;
    ``environment``: versions, as in ``results.json``. A run that is finished is not begun again:
    nothing is written.

    Raises:
        OSError: the disk refuses (of every function here).
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


def record_capture(
    folder: Path, store: SoftTargetStore, reused: bool, reasoning_sha256: Sequence[str] = ()
) -> None:
    """The soft targets are complete: the store's key and manifest, which has the hashes of data and
    tokenizer.

    ``reasoning_sha256``: of the private reasoning in the teacher's texts that the run keeps in
    words (``held_out.json``).
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
    """Training goes on from ``checkpoint``, with these files: they must be those that were
    saved."""
    append(
        folder,
        [("training_resumed", {"step": step, "read": _described(folder, checkpoint.iterdir())})],
    )


def record_guard(folder: Path, step: int, event: Mapping[str, Any]) -> None:
    """The guard did something: what ``distill.training.guard_hooks.event_line`` says of it but
    its sentence."""
    figures = {name: value for name, value in event.items() if name != "words"}
    append(folder, [("guard", {"step": step, **figures})])


def record_training(folder: Path, figures: Mapping[str, Any]) -> None:
    """Training is over; ``figures`` say what it came to."""
    append(folder, [("training_finished", figures)])


def record_export(
    folder: Path, files: Sequence[Path], quant: str | None, figures: Mapping[str, Any] | None = None
) -> bool:
    """Files were made of the run's student: a GGUF file, its companions, a model card; call it when
    they have their final names.

    ``files``: they are hashed here; those outside ``folder`` appear by their name alone. ``quant``:
    such as ``q8_0``, ``None`` for what has none. ``figures``: what is known of them, such as
    ``Proof.to_json()``: numbers and short words, never texts. Returns whether it was written: a run
    made before the log existed gets none by this.
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
    """A student that lies in a run's folder (or a folder in that) has decided on prompts; all in
    one write.

    ``decisions``: ``Judgment.to_audit()``, without a word of the prompts. Returns whether it was
    written: not of a student elsewhere, nor in a run that has no log.
    """
    folder = _run_of(student)
    if folder is None or not decisions:
        return False
    described = _described(folder, [student])
    append(folder, [("judged", {**decision, "read": described}) for decision in decisions])
    return True


def record_finish(folder: RunFolder) -> bool:
    """The run is finished: the hash of everything it has made. Written once, also if it is
    called again."""
    if last_event(folder.path, {STARTED, CONTINUED, FINISHED}) in (None, FINISHED):
        return False
    places = [folder.results_file, folder.gguf, folder.held_out_file, folder.importance]
    places.append(folder.path / "metrics.jsonl")
    inside = [
        path
        for place in (folder.student, folder.plain)
        if place.is_dir()
        for path in place.rglob("*")
    ]
    files = [path for path in (*places, *inside) if path.is_file()]
    append(folder.path, [(FINISHED, {"files": _described(folder.path, files)})])
    return True


def anchor(folder: Path) -> dict[str, Any]:
    """Where the log ends now, to be kept in another file: lines and SHA-256 of the last. ``{}``:
    there is none."""
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
        for place in path.parents[:2]:
            if has_log(place) and _name_in(place, path) is not None:
                return place
    return None


def _name_in(folder: Path, path: Path) -> str | None:
    """A file's name within the run's folder, ``None`` of one elsewhere.

    A link in the folder keeps its own name, wherever it points: checkpoints may have been moved to
    another disk. A link elsewhere that points into the folder has the name of what it points at.
    """
    place = folder.resolve()
    for known in (path.absolute(), path.resolve()):
        for parent in known.parents:
            name = known.relative_to(parent)
            if parent.resolve() == place and ".." not in name.parts:
                return name.as_posix()
    return None
