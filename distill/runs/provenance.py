"""Where a run's student comes from: the teacher's own words about itself, and the text it learnt
from."""

from __future__ import annotations

import json
from collections.abc import Mapping

from distill.errors import UserError
from distill.runs.folder import RunFolder
from students.gguf.provenance import DETAILS, Lineage, Source
from teachers.base import TeacherInfo
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import Inheritance

LICENCE = {"": "license", "name": "license.name", "link": "license.link"}


def lineage_of(inheritance: Inheritance, store: SoftTargetStore, base_name: str | None) -> Lineage:
    """What an exported file says of its origin. ``base_name``: of the model that the student is
    made of, if it is not a new one."""
    about, info = inheritance.about, inheritance.info
    teacher = Source(info.name, _details(about) | {"description": _teacher_words(info)})
    models = (teacher,) if base_name is None else (Source(base_name), teacher)
    # The weights of a student made of a base are that base's, whose licence is not known here.
    known = about if base_name is None else {}
    licence = {key: known[name] for key, name in LICENCE.items() if known.get(name)}
    languages = tuple(name for name in about.get("languages", "").split(",") if name)
    return Lineage(licence, models, (_dataset(about, store),), languages)


def read_lineage(folder: RunFolder) -> Lineage:
    """What ``student/lineage.json`` says; a student saved before there was one has none.

    Raises:
        UserError: it is damaged.
    """
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


def _teacher_words(info: TeacherInfo) -> str:
    return (
        f"the teacher: {info.architecture}, {info.parameters} parameters, SHA-256 of its file "
        f"{info.sha256}"
    )


def _dataset(about: Mapping[str, str], store: SoftTargetStore) -> Source:
    """The text, by what the store says of it: the same whether the teacher is here or not."""
    name = about.get("text") or f"soft targets {store.manifest.key[:12]}"
    tokens = int(store.lengths().sum())
    words = f"{len(store)} sequences, {tokens} tokens; soft targets {store.manifest.key}"
    return Source(name, {"description": words})


LINEAGE = "lineage.json"
