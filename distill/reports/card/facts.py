"""What a model card has to say of a run, read from the run's own files; what is not recorded is not there.

``results.json`` and the log are read as the report reads them. Here is what the card needs beyond that, much of which
an older run does not have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from distill.errors import UserError
from distill.reports.document import Fact
from distill.reports.run.guard_log import guard_facts, health_facts
from distill.reports.run.verdict import verdict
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
class DataSettings:
    """What the teacher read, or said where ``path`` is none."""

    path: str | None
    max_length: int | None = None
    held_out: float | None = None
    sampling_temperature: float | None = None
    top_p: float | None = None


@dataclass(frozen=True)
class LossSettings:
    """The loss and its weights."""

    temperature: float | None = None
    final_temperature: float | None = None
    divergence: str | None = None
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    lambda_so8t: float | None = None
    lambda_safety: float | None = None
    lambda_verification: float | None = None


@dataclass(frozen=True)
class TrainSettings:
    """The training loop."""

    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    warmup: float | None = None
    on_policy: float | None = None


@dataclass(frozen=True)
class Settings:
    """What the card says of ``config.json``. ``store``: a path, where the run had no teacher."""

    data: DataSettings | None = None
    loss: LossSettings = LossSettings()
    train: TrainSettings = TrainSettings()
    store: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class _Student:
    base: str | None = None
    architecture: str | None = None
    load_in_4bit: bool = False
    lora: dict[str, float] | None = None
    trained_parameters: int | None = None


@dataclass(frozen=True)
class _Training:
    learning_rate: float | None = None


@dataclass(frozen=True)
class _Store:
    corpus_sha256: str | None = None


@dataclass(frozen=True)
class Further:
    """What ``results.json`` says beyond ``distill.runs.records.Results``."""

    student: _Student
    training: _Training
    soft_targets: _Store


@dataclass(frozen=True)
class UnlistedFile:
    """The exported file of a run without ``exports.json``: what its header and the results say, as ``ExportedFile``
    has it. How far it is from the F32 file is not known."""

    file: str
    quant: str
    bytes: int
    bits_per_weight: float
    sha256: str
    generation: float | None
    kl: None = None
    agreement: None = None
    imatrix: bool = False
    types: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class License:
    """The licence as the exported file carries it: ``general.license``, its name, and a link to its text."""

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

    ``base_sha256``: of the model that the student was made of; may be empty. ``intervals``: 95 %, of the exported
    file's scores. ``verdict``: as the report has it, without what looking at all weights would add. ``files``: the
    exported ones that are there. ``audit``: there is a log; ``audit_head``: the SHA-256 of its last line, where
    ``audit.head`` says it.
    """

    results: Results
    further: Further
    settings: Settings
    base_sha256: str
    intervals: dict[str, tuple[float, float]]
    verdict: list[Fact]
    guarded: bool
    metadata: Metadata
    files: list[ExportedFile | UnlistedFile]
    plain: TransformersFolder | None
    modelfile: bool
    audit: bool
    audit_head: str | None


def read_facts(folder: RunFolder) -> CardFacts:
    """Everything that a card says of a finished run.

    Raises:
        UserError: the run is not finished, or a file of it is damaged.
        TeacherFileError: the exported file is damaged.
    """
    records = read_records(folder.path)
    if records.results is None:
        raise UserError(f"{folder.path} has no results.json yet: a model card is made of a finished run")
    raw = folder.read_results()
    further = _read_as(Further, raw, folder.results_file)
    exported = read_gguf(folder.gguf) if folder.gguf.exists() else None
    return CardFacts(
        results=records.results,
        further=further,
        settings=_read_as(Settings, records.config, folder.config_file),
        base_sha256=records.identity.get("base_sha256", ""),
        intervals=_known_intervals(records.results.evaluation.exported.intervals),
        verdict=_verdict(records),
        guarded=records.metrics.guarded,
        metadata=Metadata() if exported is None else _metadata(exported),
        files=_files(folder, records.results, exported),
        plain=_plain(folder),
        modelfile=folder.modelfile.is_file(),
        audit=(folder.path / LOG).is_file(),
        audit_head=_audit_head(folder.path),
    )


def _read_as(kind: type[Kind], content: Any, path: Path) -> Kind:
    """JSON as a dataclass; entries that it does not know are passed over."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is damaged ({where}: {first['msg']})") from None


def _known_intervals(found: dict[str, tuple[float | None, float | None]]) -> dict[str, tuple[float, float]]:
    """Those with two finite ends in order."""
    return {
        name: (low, high)
        for name, (low, high) in found.items()
        if low is not None and high is not None and low <= high
    }


def _verdict(records: Records) -> list[Fact]:
    """The report's verdict. What the guard quoted, and names of sequences, are left out: strangers read a card."""
    events = [
        replace(event, words="", batch=tuple(one for one in event.batch or () if isinstance(one, int)))
        for event in records.events
    ]
    unquoted = replace(records.metrics, events=events)
    first, *facts = verdict(records)
    return [first, *guard_facts(unquoted, True), *facts, *health_facts(unquoted)]


def _metadata(file: GGUFFile) -> Metadata:
    """What the keys of the GGUF specification say of licence, origin and languages."""

    def text(key: str) -> str | None:
        value = file.value(key)
        return value.strip() if isinstance(value, str) and value.strip() else None

    identifier, name = text("general.license"), text("general.license.name")
    address = text("general.license.link")
    found = identifier or name
    links = [text(f"general.base_model.{number}.repo_url") or "" for number in range(MOST_MODELS)]
    models = dict.fromkeys(known[1] for link in links if (known := _HUB_MODEL.fullmatch(link)))
    languages = file.value("general.languages")
    spoken = languages if isinstance(languages, list) else []
    return Metadata(
        None if found is None else License(found, name, address),
        list(models),
        [one for one in spoken if isinstance(one, str) and _LANGUAGE.fullmatch(one)],
    )


def _files(folder: RunFolder, results: Results, own: GGUFFile | None) -> list[ExportedFile | UnlistedFile]:
    """The exported files that are there; of a run without a list of them only its own."""
    found: list[ExportedFile | UnlistedFile] = [*read_exports(folder)]
    if own is not None and all(one.file != folder.gguf.name for one in found):
        found.insert(0, _own_file(own, results))
    return found


def _own_file(own: GGUFFile, results: Results) -> UnlistedFile:
    """``student.gguf`` as its header and the results know it."""
    return UnlistedFile(
        file=own.path.name,
        quant=results.student.quant or results.proof.quant,
        bytes=own.size,
        bits_per_weight=8 * sum(tensor.nbytes for tensor in own.tensors.values()) / own.parameters,
        sha256=file_sha256(own.path),
        generation=results.tokens_per_second.get("student", {}).get("generation"),
    )


def _plain(folder: RunFolder) -> TransformersFolder | None:
    if not (folder.plain / "config.json").is_file():
        return None
    return TransformersFolder(
        (folder.plain / "tokenizer.json").is_file(), (folder.plain / "chat_template.jinja").is_file()
    )


def _audit_head(folder: Path) -> str | None:
    """Where the log ends; nothing where that is damaged, which the card says."""
    head = read_head(folder)
    return head.sha256 if head is not None and _HASH.fullmatch(head.sha256) and head.lines > 0 else None
