"""What ``distill evaluate`` measures, as plain data for the console, JSON and the page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from distill.metrics.intervals import Figure
from distill.metrics.safety import SafetyScore


@dataclass(frozen=True)
class Fidelity:
    """How near a student is to the teacher, over the same positions, at temperature 1.

    ``kl``: KL(teacher ‖ student), nats per token; ``reverse_kl``: KL(student ‖ teacher). ``top1``:
    share of positions with the same most probable token; ``top5``: shared part of both models' five
    most probable. ``acceptance``: Σ min(p, q), the chance that the teacher accepts a drafted token;
    ``tokens_per_pass``: expected tokens per teacher pass with ``draft_length`` drafted (Leviathan
    et al. 2023). ``greedy_prefix``: equal tokens at the start of greedy continuations of at most
    ``prefix_length``; ``greedy_same``: share of them equal to the end.
    """

    kl: Figure
    reverse_kl: Figure
    top1: Figure
    top5: Figure
    acceptance: Figure
    tokens_per_pass: float
    draft_length: int
    greedy_prefix: Figure | None
    prefix_length: int
    greedy_same: Figure | None = None


@dataclass(frozen=True)
class TaskScore:
    """Answers to the prompts of a file at temperature 0; ``share`` right, Wilson's 95 %
    interval."""

    name: str
    right: int
    prompts: int
    share: Figure


@dataclass(frozen=True)
class ModelEvaluation:
    """One model: the teacher (``fidelity`` is none) or a student; ``name`` is unique.

    ``file_type``: by the metadata, such as Q4_K_M. ``perplexity`` and ``calibration_error`` (most
    probable token, 15 bins) are of the text's actual next tokens. Speeds in tokens per second of
    one sequence; ``peak_memory``: bytes of llama.cpp's process. ``safety``: of its safety head, if
    any, on labeled prompts. ``harness``: lm-evaluation-harness values by task and metric.
    """

    name: str
    path: str
    sha256: str
    architecture: str
    file_type: str
    parameters: int
    file_bytes: int
    perplexity: Figure
    calibration_error: float
    prompt_speed: float
    generation_speed: float
    peak_memory: int
    fidelity: Fidelity | None = None
    task: TaskScore | None = None
    safety: SafetyScore | None = None
    harness: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The teacher and its students on one text; ``text`` describes it.

    ``positions``: next tokens compared. ``skipped``: sequences too long for a model.
    ``environment``: as in ``results.json``.
    """

    teacher: ModelEvaluation
    students: list[ModelEvaluation]
    text: str
    text_sha256: str
    sequences: int
    positions: int
    skipped: int
    seed: int
    environment: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return {"kind": "evaluation", **asdict(self)}
