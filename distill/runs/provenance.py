"""Where a run's student comes from: its teacher's metadata, and its training text."""

from __future__ import annotations

import json
from collections.abc import Mapping

from distill.errors import UserError
from distill.runs.folder import RunFolder
from students.gguf.provenance import DETAILS, Lineage, Source
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import TeacherRecord

LINEAGE = "lineage.json"
LICENCE = {"": "license", "name": "license.name", "link": "license.link"}


def lineage_of(
    teacher_record: TeacherRecord, store: SoftTargetStore, base_name: str | None
) -> Lineage:
    """The origin of an exported file; ``base_name``: of the base model, if there is one."""
    about, info = teacher_record.about, teacher_record.info
    teacher = Source(info.name, _details(about) | {"description": _teacher_words(teacher_record)})
    models = (teacher,) if base_name is None else (Source(base_name), teacher)
    # The weights of a student made of a base are that base's, whose licence is not known here.
    known = about if base_name is None else {}
    licence = {key: known[name] for key, name in LICENCE.items() if known.get(name)}
    languages = tuple(name for name in about.get("languages", "").split(",") if name)
    return Lineage(licence, models, (_dataset(about, store),), languages)


def read_lineage(folder: RunFolder) -> Lineage:
    """The content of ``student/lineage.json``, which older runs lack; ``UserError`` if damaged."""
    path = folder.student / LINEAGE
    if not path.exists():
        return Lineage()
    try:
        return Lineage.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({' '.join(str(error).split())}); run distill again"
        ) from None


def _details(about: Mapping[str, str]) -> dict[str, str]:
    return {key: about[key] for key in DETAILS if about.get(key)}


def _teacher_words(teacher_record: TeacherRecord) -> str:
    info, cut = teacher_record.info, teacher_record.cut
    text = f"the teacher: {info.architecture}, {info.parameters} parameters"
    if not info.parameters:
        text = f"the teacher: {info.architecture}, behind a server"
    if info.file_bytes:
        text += f", SHA-256 of its file {info.sha256}"
    if cut is None:
        return text
    return f"{text}; {len(cut.vocabulary)} of its {cut.vocabulary.old_size} tokens"


def _dataset(about: Mapping[str, str], store: SoftTargetStore) -> Source:
    """The text, by what the store says of it: the same whether the teacher is here or not."""
    name = about.get("text") or f"soft targets {store.manifest.key[:12]}"
    tokens = int(store.lengths().sum())
    text = f"{len(store)} sequences, {tokens} tokens; soft targets {store.manifest.key}"
    return Source(name, {"description": text})
