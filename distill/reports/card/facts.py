"""What a model card has to say of a run, read from the run's own files; what is not recorded is not
there.

``results.json`` and the log are read as the report reads them. Here is what the card needs beyond
that, much of which an older run does not have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from distill.errors import UserError
from distill.reports.document import Fact
from distill.reports.run.guard_log import guard_facts, health_facts
from distill.reports.run.health import health
from distill.reports.verdict import run_verdict
from distill.runs.audit_log import LOG, read_head
from distill.runs.exports import ExportedFile, read_exports
from distill.runs.folder import RunFolder
from distill.runs.records import Records, Results, read_records
from teachers.gguf.file import GGUFFile, file_sha256, read_gguf

MOST_MODELS = 16  # that a file may name as its origin
_HUB_MODEL = re.compile(r"https://huggingface\.co/([\w.-]{1,96}/[\w.-]{1,96})/?")
_HASH = re.compile(r"[0-9a-f]{64}")
_LANGUAGE = re.compile(r"[a-z]{2,3}")

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class License:
    """The stated as the exported file carries it: ``general.license``, its name, and a link to
    its text."""

    identifier: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Metadata:
    """What the exported file says of itself. ``base_models``: identifiers on the Hub."""

    license: License | None = None
    base_models: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TransformersFolder:
    """The plain model beside the file, and what lies with it."""

    tokenizer: bool
    chat_template: bool


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card is made of.

    ``config``: the run's settings as its folder has them, whatever they are. ``verdict`` of use and
    ``health`` of training: the report's, without what looking at all weights would add. ``files``:
    the exported ones that are there. ``audit``: there is a log; ``audit_head``: the SHA-256 of its
    last line, where ``audit.head`` says it.
    """

    results: Results
    config: dict[str, Any]
    base_sha256: str
    verdict: list[Fact]
    health: list[Fact]
    guarded: bool
    metadata: Metadata
    files: list[ExportedFile]
    plain: TransformersFolder | None
    modelfile: bool
    audit: bool
    audit_head: str | None

    def setting(self, key: str) -> Any:
        """The setting with a dotted key; ``None`` where the records do not say."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_facts(folder: RunFolder) -> CardFacts:
    """Everything that a card says of a finished run.

    Raises:
        UserError: the run is not finished, or a file of it is damaged.
        TeacherFileError: the exported file is damaged.
    """
    records = read_records(folder.path)
    if records.results is None:
        raise UserError(
            f"{folder.path} has no results.json yet: a model card is made of a finished run"
        )
    exported = read_gguf(folder.gguf) if folder.gguf.exists() else None
    return CardFacts(
        results=records.results,
        config=records.config,
        base_sha256=records.identity.get("base_sha256", ""),
        verdict=run_verdict(records).facts,
        health=_health(records),
        guarded=records.metrics.guarded,
        metadata=Metadata() if exported is None else _metadata(exported),
        files=_files(folder, records.results, exported),
        plain=_plain(folder),
        modelfile=folder.modelfile.is_file(),
        audit=(folder.path / LOG).is_file(),
        audit_head=_audit_head(folder.path),
    )


def _health(records: Records) -> list[Fact]:
    """The report's facts on training.

    What the guard quoted, and names of sequences, are left out: strangers read a card.
    """
    events = [
        replace(
            event, words="", batch=tuple(one for one in event.batch or () if isinstance(one, int))
        )
        for event in records.events
    ]
    unquoted = replace(records.metrics, events=events)
    first, *facts = health(records)
    return [first, *guard_facts(unquoted, True), *facts, *health_facts(unquoted)]


def _metadata(file: GGUFFile) -> Metadata:
    """What the keys of the GGUF specification say of stated, origin and languages."""

    def text(key: str) -> str | None:
        value = file.value(key)
        return value.strip() if isinstance(value, str) and value.strip() else None

    identifier, name = text("general.license"), text("general.license.name")
    address = text("general.license.link")
    result = identifier or name
    links = [text(f"general.base_model.{number}.repo_url") or "" for number in range(MOST_MODELS)]
    models = dict.fromkeys(known[1] for link in links if (known := _HUB_MODEL.fullmatch(link)))
    languages = file.value("general.languages")
    spoken = languages if isinstance(languages, list) else []
    return Metadata(
        None if result is None else License(result, name, address),
        list(models),
        [one for one in spoken if isinstance(one, str) and _LANGUAGE.fullmatch(one)],
    )


def _files(folder: RunFolder, results: Results, own: GGUFFile | None) -> list[ExportedFile]:
    """The exported files that are there; of a run without a list of them only its own, as its
    header and the results know it: how far it is from the F32 file is then unknown."""
    files = list(read_exports(folder))
    if own is not None and all(one.file != folder.gguf.name for one in files):
        listed = ExportedFile(
            file=own.path.name,
            quant=results.student.quant or results.proof.quant,
            bytes=own.size,
            bits_per_weight=8 * sum(one.nbytes for one in own.tensors.values()) / own.parameters,
            sha256=file_sha256(own.path),
            generation=results.tokens_per_second.get("student", {}).get("generation"),
        )
        files.insert(0, listed)
    return files


def _plain(folder: RunFolder) -> TransformersFolder | None:
    if not (folder.plain / "config.json").is_file():
        return None
    return TransformersFolder(
        (folder.plain / "tokenizer.json").is_file(),
        (folder.plain / "chat_template.jinja").is_file(),
    )


def _audit_head(folder: Path) -> str | None:
    """Where the log ends; nothing where that is damaged, which the card says."""
    head = read_head(folder)
    return (
        head.sha256
        if head is not None and _HASH.fullmatch(head.sha256) and head.lines > 0
        else None
    )
