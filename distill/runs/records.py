"""The records of a finished, running or crashed run, read back for a report.

``metrics.jsonl`` and ``config.json`` exist from the start, ``results.json`` only after success. The
settings need not be valid today, so older runs can be reported on too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distill.errors import UserError
from distill.metrics.closeness import WHOLE_VOCABULARY, kl_over
from distill.metrics.safety import SafetyScore
from distill.metrics.verification import VerificationPart
from distill.runs.folder import METRICS, RunFolder, latest_checkpoint, nothing_logged, require_run
from distill.runs.metrics_log import GuardEvent, HeldOutPoint, Line, Metrics, read_metrics, step_of
from distill.runs.proof_record import Proof
from students.model.head_decisions import DECISIONS
from teachers.atomic_files import LOCK, is_held


@dataclass(frozen=True)
class TeacherPart:
    """What is known of the teacher; of an unfinished run only its name and hash."""

    name: str
    sha256: str = ""
    architecture: str | None = None
    parameters: int | None = None
    file_bytes: int | None = None
    vocab_size: int | None = None
    width: int | None = None
    layers: int | None = None


@dataclass(frozen=True)
class StudentPart:
    """The requested size and the resulting student; also of one made of a base model."""

    size: str | None
    parameters: int | None = None
    file_bytes: int | None = None
    quant: str | None = None
    base: str | None = None
    architecture: str | None = None
    load_in_4bit: bool = False
    lora: dict[str, float] | None = None
    trained_parameters: int | None = None


@dataclass(frozen=True)
class StorePart:
    """The soft targets that the student learnt from, at ``positions`` of the tokens (older runs:
    all). ``truncation``: what they lack of the teacher's distributions, if anything; ``sketch``:
    ``bytes`` of the tail's shape, and the mean KL of what comes back from the teacher's own."""

    folder: str
    sequences: int
    tokens: int
    bytes: int
    reused: bool
    positions: int | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    corpus_sha256: str | None = None
    truncation: str | None = None
    sketch: dict[str, float] | None = None


@dataclass(frozen=True)
class TrainingPart:
    """What training did (see ``distill.training.summary.TrainingSummary``)."""

    steps: int
    planned_steps: int
    best_step: int
    tokens_seen: int
    seconds: float
    continued_from_step: int
    precision: str
    held_out: list[HeldOutPoint]
    learning_rate: float | None = None
    padding: float | None = None
    optimizer: str = "adamw"


@dataclass(frozen=True)
class ModelScore:
    """One model against the teacher, at T = 1, in nats per token; older runs lack ``intervals``."""

    kl: float | None
    agreement: float | None
    cross_entropy: float | None
    perplexity: float | None
    intervals: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherScore:
    """The teacher's own prediction of the text; ``approximate``: by its rounded soft targets."""

    cross_entropy: float | None
    perplexity: float | None
    approximate: bool = False


@dataclass(frozen=True)
class EvaluationPart:
    """The student before and after training and as exported, over the same ``positions``."""

    positions: int
    before: ModelScore
    after: ModelScore
    exported: ModelScore
    against: str = "teacher"
    kl_over: str = WHOLE_VOCABULARY
    teacher: TeacherScore | None = None


@dataclass(frozen=True)
class VocabularyPart:
    """A vocabulary that is a part of the teacher's (``teachers.vocabulary.cut``).
    ``bits_per_byte``: of ``teacher`` with its own, ``reduced_teacher`` and ``student``, on
    validation text."""

    kept: int
    of: int
    asked: str
    dropped_mass: float
    added_tokens: float
    lost: dict[str, float] = field(default_factory=dict)
    bits_per_byte: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SafetyPart:
    """The safety head: what it learnt from and how it did on prompts that nothing was fitted to
    (``test``) and on those of scenes that were left out (``cross_validation``).

    ``costs[label][decision]``; older runs had ``thresholds`` instead, and no cross-validation.
    """

    labels_from: str
    prompts: dict[str, int]
    scenarios: dict[str, int]
    test: SafetyScore
    languages: dict[str, SafetyScore]
    costs: list[list[float]] = field(default_factory=list)
    cross_validation: SafetyScore | None = None
    thresholds: dict[str, float] = field(default_factory=dict)

    @property
    def scores(self) -> list[SafetyScore]:
        """Every score that it holds."""
        left_out = [] if self.cross_validation is None else [self.cross_validation]
        return [self.test, *self.languages.values(), *left_out]


@dataclass(frozen=True)
class HeadsPart:
    """The heads that the student has; ``safety_left_out``: why it has no safety head though one
    was wanted."""

    safety: SafetyPart | None = None
    safety_left_out: str = ""
    verification: VerificationPart | None = None


@dataclass(frozen=True)
class RotationsPart:
    """The rotations of the finished student."""

    max_orthogonality_error: float | None
    min_commutator_norm: float | None
    mean_commutator_norm: float | None
    max_determinant_error: float | None = None


@dataclass(frozen=True)
class LibraryPart:
    """llama.cpp with its extra CPU buffers, or why without (``teachers.llama_cpp.worker``)."""

    extra_buffers: bool = True
    reason: str = ""

    @property
    def text(self) -> str:
        """The same in words; empty where it ran as it does by default."""
        without = f"without its extra CPU buffers, with which it {self.reason}"
        return "" if self.extra_buffers else without


@dataclass(frozen=True)
class EnvironmentPart:
    """What computed the results."""

    python: str
    machine: str
    cpu: str
    threads: int
    packages: dict[str, str]


@dataclass(frozen=True)
class Results:
    """The content of ``results.json``."""

    teacher: TeacherPart
    student: StudentPart
    soft_targets: StorePart
    training: TrainingPart
    evaluation: EvaluationPart
    proof: Proof
    rotations: RotationsPart
    tokens_per_second: dict[str, dict[str, float]]
    stage_seconds: dict[str, float]
    environment: EnvironmentPart
    heads: HeadsPart = HeadsPart()
    vocabulary: VocabularyPart | None = None
    llama_cpp: LibraryPart = LibraryPart()  # older runs do not say
    f32_proof: Proof | None = None  # of the exported file's source; older runs have none


@dataclass(frozen=True)
class Records:
    """All records of a run. ``held``: a process is working in the folder."""

    folder: Path
    config: dict[str, Any]
    identity: dict[str, str]
    metrics: Metrics
    held_out: list[HeldOutPoint]
    results: Results | None
    held: bool
    checkpoint: Path | None

    @property
    def train(self) -> list[Line]:
        """The lines of training that count, in order of steps."""
        return self.metrics.train

    @property
    def events(self) -> list[GuardEvent]:
        """What the guard did, in order."""
        return self.metrics.events

    @property
    def checkpoint_step(self) -> int | None:
        """The step of the newest checkpoint."""
        return None if self.checkpoint is None else int(self.checkpoint.name.rpartition("-")[2])

    @property
    def recipe(self) -> dict[str, Any]:
        """What the soft targets keep of a position (``teachers.targets.recipe``), as written."""
        part = self.results
        known = self.config.get("targets") if part is None else part.soft_targets.recipe
        return known if isinstance(known, dict) else {}

    @property
    def validation_over(self) -> str:
        """What the KL at validation points is over (``distill.metrics.closeness``)."""
        return kl_over(self.recipe.get("kind"), self.recipe.get("num_topk"))

    @property
    def knows_tail(self) -> bool:
        """Whether training saw how the teacher's probability is spread over all tokens."""
        return self.recipe.get("kind") != "compact" or self.recipe.get("sketch_bytes") != 0

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of training in the process that finished it."""
        if self.results is None:
            return None
        part = self.results.training
        lines = {step_of(line): line.get("tokens_seen") or 0.0 for line in self.train}
        tokens = part.tokens_seen - lines.get(part.continued_from_step, 0.0)
        return tokens / part.seconds if part.seconds > 0 else None

    def column(self, name: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of one metric of training, at the steps that have it."""
        lines = [line for line in self.train if name in line]
        return [step_of(line) for line in lines], [line[name] for line in lines]

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        known = [step_of(line) for line in self.train] + [point.step for point in self.held_out]
        return max(known, default=0)


def read_records(path: Path) -> Records:
    """Read a run's folder; raises ``UserError`` if it is none, empty or damaged."""
    require_run(path)
    folder = RunFolder(path)
    config = folder.read_json(folder.config_file)
    identity = folder.read_identity() if folder.identity_file.exists() else {}
    results = _results(folder) if folder.results_file.exists() else None
    metrics = read_metrics(path / METRICS)
    held_out = metrics.held_out
    if results is not None and not held_out:
        held_out = results.training.held_out
    if not metrics.train and not held_out and not metrics.events:
        raise nothing_logged(path)
    return Records(
        folder=path,
        config=config,
        identity=identity,
        metrics=metrics,
        held_out=held_out,
        results=results,
        held=results is None and _is_held(path),
        checkpoint=latest_checkpoint(path / "checkpoints"),
    )


def _is_held(path: Path) -> bool:
    """Whether a process works in the folder, as far as that can be seen without writing to it."""
    try:
        return (path / LOCK).exists() and is_held(path)
    except OSError:
        return False


def _results(folder: RunFolder) -> Results:
    content = _finite(folder.read_json(folder.results_file))
    try:
        results = TypeAdapter(Results).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{folder.results_file} is damaged ({where}: {first['msg']})") from None
    safety = results.heads.safety
    for score in () if safety is None else safety.scores:
        if [len(row) for row in score.confusion] != [len(DECISIONS)] * len(DECISIONS):
            raise UserError(
                f"{folder.results_file} is damaged (heads.safety: confusion is not 3 × 3)"
            )
    return results


def _finite(tree: Any) -> Any:
    """The same JSON with null for every number that is not finite."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def max_grad_norm(records: Records) -> float | None:
    """The limit that gradients were clipped at."""
    section = records.config.get("train")
    limit = section.get("max_grad_norm") if isinstance(section, dict) else None
    return float(limit) if isinstance(limit, int | float) else None
