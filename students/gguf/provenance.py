"""Where a student comes from: license, models, data (``general.*`` keys of GGUF)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter

DETAILS = ("author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")


@dataclass(frozen=True)
class Source:
    """A model or a text corpus; ``details``: some of ``DETAILS``, with text."""

    name: str
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Lineage:
    """``licence``: text under ``""`` (its identifier), ``name`` and ``link``, as in the teacher's
    file, or empty. ``languages``: as in the teacher's file.
    """

    licence: Mapping[str, str] = field(default_factory=dict)
    models: tuple[Source, ...] = ()
    datasets: tuple[Source, ...] = ()
    languages: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For ``student/lineage.json``."""
        return {
            "licence": dict(self.licence),
            "models": [{"name": source.name, **source.details} for source in self.models],
            "datasets": [{"name": source.name, **source.details} for source in self.datasets],
            "languages": list(self.languages),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Lineage:
        """The inverse of ``to_json``.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is not one.
        """
        json.dumps(content, ensure_ascii=False).encode()  # nothing that could not be written
        licence = {str(key): str(value) for key, value in content["licence"].items()}
        if not licence.keys() <= {"", "name", "link"}:
            raise ValueError(f"a licence with {sorted(licence)}")
        models, datasets = (
            tuple(_source(one) for one in content[kind]) for kind in ("models", "datasets")
        )
        return cls(licence, models, datasets, tuple(str(name) for name in content["languages"]))


def add_lineage(writer: GGUFWriter, lineage: Lineage) -> None:
    """Write it as the specification names it."""
    writer.add_type("model")
    for key, text in lineage.licence.items():
        writer.add_string(f"general.license.{key}" if key else "general.license", text)
    for kind, sources in (("base_model", lineage.models), ("dataset", lineage.datasets)):
        if sources:
            writer.add_uint32(f"general.{kind}.count", len(sources))
        for number, source in enumerate(sources):
            writer.add_string(f"general.{kind}.{number}.name", source.name)
            for key, text in source.details.items():
                writer.add_string(f"general.{kind}.{number}.{key}", text)
    if lineage.languages:
        writer.add_languages(list(lineage.languages))
    writer.add_tags(["text-generation", "distillation", "so8t"])


def _source(content: Mapping[str, Any]) -> Source:
    details = {str(key): str(value) for key, value in content.items() if key != "name"}
    if not details.keys() <= set(DETAILS):
        raise ValueError(f"a source with {sorted(details)}")
    return Source(str(content["name"]), details)
