"""What the user of ``distill evaluate`` asked for; without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distill.config.sources import DataConfig

DEFAULT_SAMPLES = 256
DEFAULT_LENGTH = 512
DRAFT_LENGTH = 4


@dataclass(frozen=True)
class TextRequest:
    """What text the user asked for: ``data`` or none, at most ``samples`` sequences, of at most
    ``max_length`` tokens (none: ``DEFAULT_LENGTH``); ``split``, ``columns``: see ``DataConfig``."""

    data: Path | None = None
    samples: int = DEFAULT_SAMPLES
    max_length: int | None = None
    seed: int = 0
    split: str | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)

    def settings(self, max_length: int = DEFAULT_LENGTH) -> DataConfig:
        """The same as a run says it; ``max_length``: tokens of a sequence at most."""
        path = None if self.data is None else str(self.data)
        return DataConfig(
            path=path,
            split=self.split,
            columns=dict(self.columns),
            samples=self.samples,
            max_length=max_length,
        )


@dataclass(frozen=True)
class Request:
    """The files, the text, and what else to measure.

    ``harness``: tasks of lm-evaluation-harness, at most ``harness_limit`` examples of each.
    """

    students: Sequence[Path]
    teacher: Path | None = None
    text: TextRequest = field(default_factory=TextRequest)
    draft_length: int = DRAFT_LENGTH
    safety_prompts: Path | None = None
    tasks: Path | None = None
    harness: Sequence[str] = ()
    harness_limit: int | None = None
    gpu_layers: int = 0
