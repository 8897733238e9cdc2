"""What ``distill evaluate`` finds out, as plain data: the console, JSON and the page all show
this."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from distill.metrics.intervals import Figure
from distill.metrics.safety import SafetyScore


@dataclass(frozen=True)
class Fidelity:
    """How near a student is to the teacher, over the same positions, at temperature 1.

    ``kl``: KL(teacher ‖ student) over the whole vocabulary, nats per token; ``reverse_kl``:
    KL(student ‖ teacher). ``top1``: share of positions with the same most probable token; ``top5``:
    mean share of the teacher's five most probable tokens that are among the student's five.
    ``acceptance``: Σ min(p, q), the chance that the teacher takes a token that the student drafts
    (Leviathan et al. 2023); ``tokens_per_pass``: expected tokens per pass of the teacher when the
    student drafts ``draft_length``. ``greedy_prefix``: tokens that both write alike, from the
    beginning of a continuation at temperature 0, of at most ``prefix_length`` (fewer where the turn
    ends); ``greedy_same``: share of these continuations that are alike to their end.
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
    """Answers to the prompts of a file, at temperature 0; ``share`` right with Wilson's 95 %
    interval."""

    name: str
    right: int
    prompts: int
    share: Figure


@dataclass(frozen=True)
class ModelEvaluation:
    """One model: the teacher (``fidelity`` is none) or a student.

    ``name`` is unique among the models of one evaluation. ``file_type``: as the file says, such as
    Q4_K_M, empty where it does not. ``perplexity`` and ``calibration_error`` (of the most probable
    token's probability, 15 bins) are of the text's actual next tokens. Speeds in tokens per second
    of one sequence; ``peak_memory``: the most bytes of main memory that llama.cpp's process had.
    ``safety``: of the decisions of its safety head, where it has one and labelled prompts were
    given. ``harness``: lm-evaluation-harness figures by task and metric.
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
    """The teacher and its students on one text. ``text``: where it is from, in words;
    ``text_sha256``: of its tokens.

    ``positions``: next tokens compared. ``skipped``: sequences left out because they were too long
    for a model. ``environment``: what computed it, as in ``results.json``. ``warnings``: what was
    told of the files and figures.
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
