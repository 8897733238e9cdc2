"""What gates, terms and heads do: variants of one training, and their figures
(``tools.studies.so8t ablation``).

Over 400 lines because variants, trainings and tables belong together.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.table import Table
from torch import Tensor

from distill.capture.ready_store import find_teacher
from distill.config.schema import LossConfig, RunConfig
from distill.errors import TrainingAborted
from distill.heads.fitting import calibrate, halves
from distill.heads.prompt_set import PromptSet
from distill.heads.safety_data import SafetyData
from distill.heads.safety_fitting import fit_safety_head
from distill.initialization.shape import student_shape
from distill.initialization.start import begin
from distill.losses.chunked_lm_head import chunk_size, logits_bytes
from distill.losses.objective import build_objective
from distill.losses.so8t_regularizers import second_difference
from distill.metrics.verification import score_verification
from distill.runs.folder import latest_checkpoint
from distill.runtime.launch import Launch
from distill.runtime.progress import Console
from distill.training.data import TrainingData, load_batch
from distill.training.engine import TrainingJob, train
from students.model.build import build_student
from students.model.decoder import Attention, SO8TForCausalLM
from students.model.shape import GROUP
from students.weights import set_weights
from teachers.base import SINGLE_PROCESS
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import TeacherRecord
from tools.bench.so8t_cost import freeze_identity
from tools.studies.objectives import Bench, Row
from tools.studies.results import Results

FULL = "full"
BEGINNING_TEXTS = 512  # of training text that a head start may look at
WINDOW, LEAST = 32, 8  # steps whose median a loss is compared with; fewer than LEAST say nothing
ROBUST = (
    1.4826  # times the median absolute deviation: the standard deviation of a normal distribution
)
TOGETHER = 32  # prompts read at once


# -- variants and their figures -------------------------------------------------------------------


@dataclass(frozen=True)
class Variant(Row):
    """One row of the ablation. ``gates``: whether there are rotations at all."""

    gates: bool = True


def all_variants(loss: LossConfig) -> list[Variant]:
    """Every variant, from the loss that ``full`` has."""

    def changed(name: str, gates: bool = True, **changes: Any) -> Variant:
        return Variant(name, LossConfig.model_validate(loss.model_dump() | changes), gates=gates)

    return [
        changed(FULL),
        changed("no-gates", gates=False, lambda_so8t=0.0),
        changed("no-terms", lambda_so8t=0.0),
        changed("no-pet", pet=(0.0, 0.0, 0.0)),
        changed("no-inertia", inertia=0.0),
        changed("no-non-commutation", commutator_margin=0.0),
        changed("10x-pet", pet=tuple(10 * weight for weight in loss.pet)),
        changed("10x-inertia", inertia=10 * loss.inertia),
        changed("10x-margin", commutator_margin=10 * loss.commutator_margin),
        changed("no-verification", lambda_verification=0.0),
        changed("no-safety", lambda_safety=0.0),
        changed("no-heads", lambda_verification=0.0, lambda_safety=0.0),
    ]


@dataclass(frozen=True)
class Ablation(Bench):
    """What all variants share. ``run``: the settings of ``full``."""

    run: RunConfig
    kept: TeacherRecord
    safety: SafetyData | None
    beginnings: Path  # folder of the students' first weights

    def settings(self) -> dict[str, Any]:
        """See ``Bench.settings``."""
        prompts = None if self.safety is None else self.safety.sha256
        own = {
            "safety": self.run.safety.model_dump(),
            "prompts_sha256": prompts,
            "init": self.run.student.init,
        }
        return super().settings() | own

    def beginning(self, seed: int) -> SO8TForCausalLM:
        """The student of all settings as training begins."""
        run = self.run.model_copy(update={"seed": seed})
        store, train = self.data.store, self.data.split.train
        texts = [store.tokens(int(index)) for index in train[:BEGINNING_TEXTS]]
        gguf = find_teacher(None, self.kept.info)
        path = self.beginnings / f"{seed}.safetensors"
        return begin(run, self.kept, gguf, texts, path, Launch(SINGLE_PROCESS), Console(quiet=True))

    def initial(self, variant: Variant, seed: int) -> SO8TForCausalLM:
        """The variant's student as training begins."""
        config = self.run.model_copy(update={"loss": variant.loss})
        student = build_student(student_shape(config, self.kept.info), seed)
        whole = self.beginning(seed)
        if not variant.gates:
            fold_gates(whole)
        # All variants begin alike; a head that is drawn without the one before it would have other
        # weights.
        weights = whole.state_dict()
        student.load_state_dict({name: weights[name] for name in student.state_dict()})
        if not variant.gates:
            freeze_identity(student)
        return student

    def measure(self, row: Row, seed: int) -> dict[str, Any]:
        """Train one student; what came of it."""
        assert isinstance(row, Variant)
        student = self.initial(row, seed)
        store, parts = self.data.store, self.data.split
        objective = build_objective(row.loss, store, student, self.teacher_layers)
        prompts, safety = None, self.safety if student.config.safety_head else None
        if safety is not None:
            prompts = PromptSet(safety.train.prompts, safety.train.tokens, seed)
        data = TrainingData(store, parts, seed, prompts)
        count = len(data.batches(self.config.epochs, self.config.batch_size))
        every, together = self.run.safety.rhythm(count)
        data = replace(data, prompts_every=every, prompts_together=together)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                job = TrainingJob(student, data, objective, self.config, folder)
                summary = train(job, lambda step, text: None)
            except TrainingAborted as error:
                return {"failed": str(error)}
            # The student has the weights of its best evaluation; wanted are those of the last step.
            newest = latest_checkpoint(folder / "checkpoints")
            assert newest is not None
            set_weights(student, safetensors.torch.load_file(newest / "model.safetensors"))
            lines = [
                json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
            ]
        steps = [line for line in lines if line["kind"] == "train"]
        warmup = round(self.config.warmup * summary.steps)
        return (
            asdict(summary.scores[-1][1])
            | {
                "tokens": summary.tokens_seen,
                "steps": summary.steps,
                "seconds": round(summary.seconds, 2),
            }
            | stability_figures(steps, warmup)
            | group_figures(steps, student)
            | held_out_figures(student, store, parts.held_out.tolist())
            | head_figures(student, safety, store, parts.held_out.tolist())
        )


@torch.no_grad()
def fold_gates(student: SO8TForCausalLM) -> None:
    """Let the output projections do what the gates did to them."""
    for module in student.modules():
        if isinstance(module, Attention):
            module.o_proj.weight.copy_(module.gated_output_weight(module.gate()))


def rises(losses: Sequence[float], begin: int) -> tuple[float, int]:
    """The largest rise above the median of the steps before, and how many are beyond three
    robust deviations."""
    largest, spikes = 0.0, 0
    for step in range(max(begin, LEAST), len(losses)):
        before = losses[max(0, step - WINDOW) : step]
        middle = statistics.median(before)
        deviation = ROBUST * statistics.median(abs(value - middle) for value in before)
        largest = max(largest, losses[step] - middle)
        spikes += losses[step] - middle > 3 * deviation
    return largest, spikes


def stability_figures(steps: Sequence[dict[str, Any]], warmup: int) -> dict[str, Any]:
    """How calm training was, from what was logged of each step."""
    norms = [step["grad_norm"] for step in steps[warmup:]]
    rise, spikes = rises([step.get("kd", 0.0) + step.get("ce", 0.0) for step in steps], warmup)
    whole_rise, whole_spikes = rises([step["loss"] for step in steps], warmup)
    return {
        "largest_grad_norm": max(norms),
        "grad_norm_spread": statistics.pstdev(norms) / statistics.fmean(norms),
        "largest_rise": rise,
        "spikes": spikes,
        "largest_rise_of_whole_loss": whole_rise,
        "spikes_of_whole_loss": whole_spikes,
    }


@torch.no_grad()
def group_figures(steps: Sequence[dict[str, Any]], student: SO8TForCausalLM) -> dict[str, float]:
    """Where the rotations ended."""
    names = ("min_commutator", "mean_commutator", "rotation_error", "rotation_drift")
    rotations = student.rotations()
    away = torch.linalg.matrix_norm(rotations - torch.eye(GROUP, device=rotations.device))
    return {name: steps[-1][name] for name in names} | {
        "largest_drift": max(step["rotation_drift"] for step in steps),
        "from_identity": float(away.mean()),
    }


@dataclass
class Finals:
    """Of some sequences: final hidden states ``[N, D]``, whether the top tokens agree ``[N]``, how
    probable the verification head holds that ``[N]`` (``None`` without one), and the sum of squared
    second differences in time.
    """

    states: Tensor
    agreed: Tensor
    expected: Tensor | None
    bend: float


@torch.no_grad()
def finals(student: SO8TForCausalLM, store: SoftTargetStore, indices: Sequence[int]) -> Finals:
    """Run the student over stored sequences."""
    states, agreed, expected, bend = [], [], [], 0.0
    heads = student.heads()
    together = chunk_size(student.config.vocab_size, logits_bytes(student.device))
    student.eval()
    for start in range(0, len(indices), TOGETHER):
        batch = load_batch(store, indices[start : start + TOGETHER]).to(student.device)
        output = student(batch.tokens, with_logits=False)
        bend += float(second_difference(output.last_hidden_state, batch.layout.bends))
        states.append(output.last_hidden_state[batch.valid])
        best = batch.targets.best()
        for some, wanted in zip(states[-1].split(together), best.split(together), strict=True):
            logits = student.lm_head(some)
            agreed.append(logits.argmax(dim=-1) == wanted)
            if heads.verification is not None:
                expected.append(heads.agreement(some, logits))
    return Finals(
        torch.cat(states),
        torch.cat(agreed).cpu(),
        torch.cat(expected).cpu() if expected else None,
        bend,
    )


def effective_rank(states: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred ``states [N, D]`` (Roy &
    Vetterli 2007)."""
    values = torch.linalg.svdvals(states.double() - states.double().mean(dim=0))
    return float(torch.special.entr(values / values.sum()).sum().exp())


def held_out_figures(
    student: SO8TForCausalLM, store: SoftTargetStore, held_out: list[int]
) -> dict[str, float]:
    """What the final hidden states of validation sequences look like."""
    result = finals(student, store, held_out)
    return {
        "effective_rank": effective_rank(result.states),
        "second_difference": result.bend / len(result.states),
    }


def head_figures(
    student: SO8TForCausalLM, safety: SafetyData | None, store: SoftTargetStore, held_out: list[int]
) -> dict[str, float | None]:
    """Fit the heads that there are and score them, as a run does, but in PyTorch."""
    for_calibration, for_scores = halves(held_out)
    calibrate(student, store, for_calibration)
    content: dict[str, float | None] = {}
    if student.config.safety_head and safety is not None:
        decided = fit_safety_head(student, safety).cross_validation
        names = ("refuse_recall", "escalate_precision", "allow_precision", "accuracy")
        content |= {name: getattr(decided, name) for name in names}
    heads = student.heads()
    if heads.verification is not None:
        result = finals(student, store, for_scores)
        assert result.expected is not None
        score = score_verification(result.expected, result.agreed, heads.trust)
        content |= {"auroc": score.auroc, "calibration_error": score.calibration_error}
    return content


# -- tables ---------------------------------------------------------------------------------------

Columns = Sequence[tuple[str, str, int, float]]
"""Title, name of the figure, digits, factor."""

TABLES: dict[str, Columns] = {
    "fidelity": (("KL", "kl", 4, 1.0), ("agreement, %", "agreement", 2, 100.0)),
    "stability": (
        ("largest gradient norm", "largest_grad_norm", 3, 1.0),
        ("its spread", "grad_norm_spread", 3, 1.0),
        ("largest rise", "largest_rise", 3, 1.0),
        ("spikes", "spikes", 1, 1.0),
        ("effective rank", "effective_rank", 1, 1.0),
    ),
    "group": (
        ("min commutator", "min_commutator", 4, 1.0),
        ("mean commutator", "mean_commutator", 4, 1.0),
        ("rotation error, 1e-6", "rotation_error", 2, 1e6),
        ("last drift, 1e-3", "rotation_drift", 3, 1e3),
        ("largest drift, 1e-3", "largest_drift", 3, 1e3),
        ("‖R − I‖", "from_identity", 3, 1.0),
        ("second difference", "second_difference", 4, 1.0),
    ),
    "heads": (
        ("Refuse Recall, %", "refuse_recall", 1, 100.0),
        ("Escalate Precision, %", "escalate_precision", 1, 100.0),
        ("Allow Precision, %", "allow_precision", 1, 100.0),
        ("accuracy, %", "accuracy", 1, 100.0),
        ("AUROC", "auroc", 3, 1.0),
        ("calibration error", "calibration_error", 4, 1.0),
    ),
}


def mean_and_spread(lines: Sequence[dict[str, Any]], name: str, digits: int, factor: float) -> str:
    """Mean ± standard deviation over the seeds that know the figure."""
    values = [factor * line[name] for line in lines if line.get(name) is not None]
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def verdict(full: dict[int, float], other: dict[int, float]) -> str:
    """How far the KL of each seed differs from that of ``full``."""
    shared = sorted(full.keys() & other.keys())
    if not shared:
        return "–"
    differences = [other[seed] - full[seed] for seed in shared]
    mean = statistics.fmean(differences)
    higher = f"higher in {sum(value > 0 for value in differences)} of {len(shared)}"
    spreads = [
        statistics.variance([kl[seed] for seed in shared])
        for kl in (full, other)
        if len(shared) > 1
    ]
    pooled = statistics.fmean(spreads) ** 0.5 if spreads else 0.0
    told = f"{mean / pooled:+.1f} spreads" if pooled else "spread not known"
    return f"{told} ({mean:+.4f}; {higher})"


def ablation_tables(
    full: Variant, variants: Sequence[Variant], seeds: Sequence[int], results: Results
) -> Iterator[Table]:
    """A table of each kind of figure of ``variants``, compared with ``full``, and the trainings
    that failed."""
    made = {
        row.name: [line for seed in seeds if (line := results.find(row, seed))] for row in variants
    }
    good = {name: [line for line in lines if "failed" not in line] for name, lines in made.items()}
    kls = {name: {line["seed"]: line["kl"] for line in lines} for name, lines in good.items()}
    result = [results.find(full, seed) for seed in seeds]
    of_full = {line["seed"]: line["kl"] for line in result if line and "failed" not in line}
    for title, columns in TABLES.items():
        table = Table(
            "variant", *(column[0] for column in columns), title=title, title_justify="left"
        )
        if title == "fidelity":
            table.add_column("KL against full")
        for name, lines in good.items():
            cells = [mean_and_spread(lines, *column[1:]) for column in columns]
            if title == "fidelity" and name != full.name:
                cells.append(verdict(of_full, kls[name]))
            table.add_row(
                name if len(lines) == len(seeds) else f"{name} ({len(lines)} seeds)", *cells
            )
        yield table
    failed = [(name, line) for name, lines in made.items() for line in lines if "failed" in line]
    if failed:
        table = Table("variant", "seed", "why", title="failed", title_justify="left")
        for name, line in failed:
            table.add_row(name, str(line["seed"]), line["failed"])
        yield table
