"""Fidelity at equal training tokens: one student, one store, one thing changed, the objective.

Over 400 lines because every objective of the table is a few lines here.

    python -m tools.studies.objectives STORE --json FILE.jsonl [--size 64x3] [--seeds 0,1,2] [--only
    'top32-*,T3-then-T1']

Every row trains the same student: for a seed the initial weights and the order of the data are the
same, and so are schedule, tokens and our regularisers; the validation sequences are the same for
all seeds. The rows:

- ``ce``: cross-entropy alone, of the text in the store;
- ``top32-…-T``: KL truncated to the 32 top tokens, as public toolkits have it; only here, in no
  product. ``renormalised``: softmax of both models over these 32 alone. ``zero-tail``: the
  teacher's log-probabilities of T = 1 divided by T and renormalised over the 32, the student's
  taken from the whole vocabulary. ``one-token-tail``: the missing mass of T = 1 is tempered as if
  it were a single token's. They need a store with that many top tokens: ``distill capture --set
  targets.num_topk=32``, or one of kind hidden or dense;
- ``<divergence>-T``: ours, T constant; ``T3-then-T1``: T = 3 for the first tenth of the steps;
  ``…+hidden``: with the hidden-state loss too, where the store holds layers (``--set
  targets.layers=[1,3]``); ``…-alone``: without cross-entropy.

KL, agreement and cross-entropy are of the last step's weights on the validation sequences at T = 1.
"over all" is the KL over the whole vocabulary as far as the stored targets know the tail's shape.
Seconds contain two evaluations and the checkpoints. Each result is a line of the JSON file as soon
as it is there; a rerun does only what is missing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch
from rich.console import Console as RichConsole
from rich.table import Table
from torch import Tensor

from distill.capture.ready_store import require_complete
from distill.config.schema import DivergenceName, LossConfig, TrainConfig
from distill.errors import TrainingAborted, UserError
from distill.initialization.shape import likeness, new_student
from distill.losses.batch import Batch
from distill.losses.chunked_lm_head import chunk_size, chunked_head_loss, logits_bytes
from distill.losses.divergences import bucket_log_probs, cross_entropy, divergence
from distill.losses.objective import Objective, build_objective, temperature_at
from distill.losses.vocabulary_sample import VocabularySample
from distill.runs.folder import latest_checkpoint
from distill.runtime.progress import Console
from distill.training.data import TrainingData, split
from distill.training.engine import TrainingJob, train
from students.model.build import build_student, student_config
from students.model.decoder import SO8TForCausalLM
from students.model.shape import TeacherLikeness, parse_size
from students.weights import set_weights
from teachers.atomic_files import StoreError
from teachers.store.manifest import read_manifest
from teachers.store.store import SoftTargetStore
from teachers.store.teacher_record import TeacherRecord, find_teacher_record
from teachers.targets.distributions import CompactTargets
from teachers.targets.stored_arrays import Targets
from tools.machine import machine, machine_line
from tools.studies.results import Results, run_missing, spread

TOPK = 32
TRUNCATED_TEMPERATURES = (1.0, 3.0)
SPLIT_SEED = 0  # one for all seeds, so that their spread is that of training

# -- truncated losses, as public toolkits have them -----------------------------------------------

TruncatedLoss = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Student's logits ``[C, V]``, the teacher's top ids ``[C, K]`` and their log-probabilities at T =
1 ``[C, K]``, T → loss of each position ``[C]``, in nats."""


def renormalised(logits: Tensor, ids: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """KL_T(teacher ‖ student) of both models' softmax over the top-k alone: blind to what lies
    outside."""
    teacher = (log_probs / temperature).log_softmax(dim=-1)
    student = (logits.gather(-1, ids) / temperature).log_softmax(dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def zero_tail(logits: Tensor, ids: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """The teacher's top-k renormalised as if there were nothing else, the student over the whole
    vocabulary."""
    teacher = (log_probs / temperature).log_softmax(dim=-1)
    student = (logits / temperature).log_softmax(dim=-1).gather(-1, ids)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def one_token_tail(logits: Tensor, ids: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """k + 1 buckets, with the teacher's missing mass of T = 1 tempered as one token's: right at
    T = 1 alone."""
    known = log_probs.logsumexp(dim=-1, keepdim=True).clamp(max=-1e-6)
    missing = (-known.expm1()).log()
    teacher = (torch.cat((log_probs, missing), dim=-1) / temperature).log_softmax(dim=-1)
    student = bucket_log_probs(logits, ids, temperature)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


TRUNCATED: dict[str, TruncatedLoss] = {
    "renormalised": renormalised,
    "zero-tail": zero_tail,
    "one-token-tail": one_token_tail,
}


def stored_top(targets: Targets, count: int) -> tuple[Tensor, Tensor]:
    """The teacher's ``count`` most probable tokens and their log-probabilities at T = 1, ``[...,
    K]`` each."""
    if isinstance(targets, CompactTargets):
        return targets.topk_ids[..., :count], targets.topk_log_probs(1.0)[..., :count]
    values, ids = targets.log_probs(1.0).topk(count, dim=-1)
    return ids, values


class TruncatedObjective(Objective):
    """α·T²·(a truncated loss) + β·CE and our regularisers."""

    def __init__(self, config: LossConfig, truncated: TruncatedLoss, count: int = TOPK) -> None:
        super().__init__(config)
        self.truncated = truncated
        self.count = count

    def _distillation(
        self,
        states: Tensor,
        matrix: Tensor,
        batch: Batch,
        total: int,
        fraction: float,
        sample: VocabularySample | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, labels = self.config, batch.labels
        temperature = temperature_at(config, fraction)
        weights = {"kd": config.alpha * temperature**2 / total, "ce": config.beta / total}
        parts = {name: states.new_zeros((), dtype=torch.float32) for name in weights}

        def chunk(logits: Tensor, span: slice) -> Tensor:
            """Both weighted terms of one chunk of positions, whose logits become their gradient."""
            ids, log_probs = stored_top(batch.targets.select(span), self.count)
            with torch.enable_grad():
                wide = logits.detach().float().requires_grad_()
                kd = weights["kd"] * self.truncated(wide, ids, log_probs, temperature).sum()
                ce = weights["ce"] * cross_entropy(wide, labels[span]).sum()
                loss = kd + ce
            parts["kd"] += kd.detach()
            parts["ce"] += ce.detach()
            logits.copy_(torch.autograd.grad(loss, wide)[0])
            return loss.detach()

        return chunked_head_loss(states, matrix, chunk), parts


# -- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One objective. ``truncated``: name of a truncated loss that takes our divergence's place."""

    name: str
    loss: LossConfig
    truncated: str | None = None

    def identity(self) -> dict[str, Any]:
        """See ``StudyRow``."""
        return {"loss": self.loss.model_dump(mode="json"), "truncated": self.truncated}

    def objective(self, bench: Bench, student: SO8TForCausalLM) -> Objective:
        """A fresh objective for this student."""
        if self.truncated:
            return TruncatedObjective(self.loss, TRUNCATED[self.truncated])
        return build_objective(self.loss, bench.data.store, student, bench.teacher_layers)


def all_rows(temperatures: Sequence[float], divergences: Sequence[DivergenceName]) -> list[Row]:
    """Every row there is, whatever the store holds; γ = 0 but where the hidden-state loss is
    what is asked about."""
    default = LossConfig(gamma=0.0, vocabulary_sample=0)  # truncated losses take no sample

    def constant(temperature: float, **changes: Any) -> LossConfig:
        fixed = {"temperature": temperature}
        return LossConfig.model_validate(default.model_dump() | fixed | changes)

    rows = [Row("ce", constant(1.0, alpha=0.0, beta=1.0))]
    rows += [
        Row(f"top{TOPK}-{name}-T{temperature:g}", constant(temperature), name)
        for name in TRUNCATED
        for temperature in TRUNCATED_TEMPERATURES
    ]
    rows += [
        Row(f"{name}-T{temperature:g}", constant(temperature, divergence=name))
        for name in divergences
        for temperature in temperatures
    ]
    changing = constant(3.0, final_temperature=1.0, final_from=0.1)
    hidden = constant(1.0, gamma=LossConfig().gamma)
    alone = constant(1.0, alpha=1.0, beta=0.0)
    return [
        *rows,
        Row("T3-then-T1", changing),
        Row("forward_kl-T1+hidden", hidden),
        Row("forward_kl-T1-alone", alone),
    ]


def possible_rows(rows: Iterable[Row], store: SoftTargetStore) -> tuple[list[Row], list[str]]:
    """The rows that a store has the targets for, and in words why others are left out."""
    recipe, vocab_size = store.manifest.recipe, int(store.manifest.identity["vocab_size"])
    kept, notes = list(rows), []
    stored = recipe.num_topk if recipe.kind == "compact" else vocab_size
    if min(stored, vocab_size - 1) < TOPK:
        kept = [row for row in kept if not row.truncated]
        notes.append(
            f"no top{TOPK} rows: the store keeps {stored} top tokens of {vocab_size}; capture with "
            f"--set targets.num_topk={TOPK}"
        )
    if not recipe.layers:
        kept = [row for row in kept if not row.loss.gamma]
        notes.append(
            "no row with the hidden-state loss: the store holds no layers; capture with "
            "targets.layers"
        )
    return kept, notes


def chosen_rows(rows: Sequence[Row], only: str | None) -> list[Row]:
    """The rows whose names fit one of the comma-separated patterns; all without any.

    Raises:
        UserError: a pattern fits no row.
    """
    if only is None:
        return list(rows)
    patterns = only.split(",")
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            raise UserError(
                f"--only {pattern}: there is no such row; there are "
                f"{', '.join(r.name for r in rows)}"
            )
    return [row for row in rows if any(fnmatchcase(row.name, pattern) for pattern in patterns)]


# -- one training ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What all rows share. ``teacher_record``: what the store keeps of its teacher, if it does."""

    data: TrainingData
    teacher_record: TeacherRecord | None
    size: str
    config: TrainConfig

    @property
    def teacher_layers(self) -> int:
        """Layers of the teacher, as far as the store says."""
        if self.teacher_record:
            return self.teacher_record.info.layers
        return max(self.data.store.manifest.recipe.layers, default=0) + 1

    def settings(self) -> dict[str, Any]:
        """What a result depends on besides its row and seed."""
        return {
            "store": self.data.store.manifest.key,
            "held_out": len(self.data.split.held_out),
            "size": self.size,
            "inherits": self._inherits,
            "train": self.config.model_dump(mode="json"),
        }

    @property
    def _inherits(self) -> bool:
        return self.teacher_record is not None and len(self.teacher_record.embeddings) > 0

    def student(self, seed: int) -> SO8TForCausalLM:
        """The student as training begins, with the teacher's embeddings where the store has
        them."""
        store, info = self.data.store, self.teacher_record.info if self.teacher_record else None
        shape = student_config(
            parse_size(self.size),
            vocab_size=int(store.manifest.identity["vocab_size"]),
            context_length=info.context_length if info else int(store.lengths().max()),
            bos=info.bos if info else None,
            eos=info.eos if info else None,
            like=likeness(info) if info else TeacherLikeness(),
        )
        if self.teacher_record is not None and self._inherits:
            return new_student(shape, seed, self.teacher_record.embeddings)
        return build_student(shape, seed)

    def measure(self, row: Row, seed: int) -> dict[str, Any]:
        """Train one student; what came of it."""
        student = self.student(seed)
        objective = row.objective(self, student)
        data = TrainingData(self.data.store, self.data.split, seed)
        with tempfile.TemporaryDirectory() as folder:
            try:
                job = TrainingJob(student, data, objective, self.config, Path(folder))
                summary = train(job, lambda step, text: None)
            except TrainingAborted as error:
                return {"failed": str(error)}
            take_last_weights(student, Path(folder))
        (_, before), (_, last) = summary.scores[0], summary.scores[-1]
        device = next(student.parameters()).device
        over_all = whole_vocabulary_kl(student, data.held_out(self.config.batch_size, device))
        return asdict(last) | {
            "kl_over_all": over_all,
            "kl_before": before.kl,
            "tokens": summary.tokens_seen,
            "steps": summary.steps,
            "seconds": round(summary.seconds, 2),
            "precision": summary.precision,
        }


def take_last_weights(student: SO8TForCausalLM, folder: Path) -> None:
    """Give a trained student, which has the weights of its best evaluation, those of the last
    step."""
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    set_weights(student, safetensors.torch.load_file(newest / "model.safetensors"))


@torch.no_grad()
def whole_vocabulary_kl(student: SO8TForCausalLM, batches: Iterable[Batch]) -> float | None:
    """Mean KL(teacher ‖ student) over the whole vocabulary at T = 1; ``None`` where the targets
    do not know it."""
    student.eval()
    total, count = 0.0, 0
    for batch in batches:
        if not batch.targets.has_tail_shape:
            return None
        states = student(batch.tokens, with_logits=False).last_hidden_state[batch.valid]
        matrix = student.lm_head.weight
        together = chunk_size(len(matrix), logits_bytes(matrix.device))
        for start in range(0, len(states), together):
            span = slice(start, start + together)
            logits = (states[span] @ matrix.T).float()
            total += float(divergence(logits, batch.targets.select(span), 1.0).double().sum())
        count += batch.count()
    return total / count


# -- results --------------------------------------------------------------------------------------


def results_table(rows: Sequence[Row], seeds: Sequence[int], results: Results) -> Table:
    """All rows, closest to the teacher first; those that failed last."""
    table = Table(
        "objective", "KL", "KL over all", "agreement", "cross-entropy", "tokens", "seconds"
    )
    made = {row.name: [line for seed in seeds if (line := results.find(row, seed))] for row in rows}
    good = {name: [line for line in lines if "failed" not in line] for name, lines in made.items()}
    there = [name for name, lines in good.items() if lines]
    for name in sorted(there, key=lambda name: statistics.fmean(line["kl"] for line in good[name])):
        lines = good[name]
        over_all = [line["kl_over_all"] for line in lines if line["kl_over_all"] is not None]
        table.add_row(
            name if len(lines) == len(seeds) else f"{name} ({len(lines)} of {len(seeds)} seeds)",
            spread([line["kl"] for line in lines]),
            spread(over_all) if over_all else "not known",
            spread([100.0 * line["agreement"] for line in lines], 2) + " %",
            spread([line["cross_entropy"] for line in lines]),
            f"{statistics.fmean(line['tokens'] for line in lines):,.0f}",
            f"{statistics.fmean(line['seconds'] for line in lines):.1f}",
        )
    for name, lines in made.items():
        for line in lines:
            if "failed" in line:
                table.add_row(name, f"seed {line['seed']} failed: {line['failed']}")
    return table


# -- command line ---------------------------------------------------------------------------------


def open_bench(options: argparse.Namespace) -> Bench:
    """The store, proved to be complete, and how every student is trained.

    Raises:
        StoreError, UserError, ValueError: the store or a setting cannot be used.
    """
    store = SoftTargetStore(options.store, read_manifest(options.store))
    require_complete(store, Console())
    parse_size(options.size)
    config = TrainConfig(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        precision=options.precision,
        evaluations=2,
    )
    data = TrainingData(store, split(store, options.held_out, SPLIT_SEED), SPLIT_SEED)
    return Bench(data, find_teacher_record(store), options.size, config)


def read_options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    divergences = get_args(DivergenceName)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = TrainConfig()
    parser.add_argument("store", type=Path, help="folder that `distill capture` has filled")
    parser.add_argument("--size", default="64x3")
    parser.add_argument("--epochs", type=int, default=usual.epochs)
    parser.add_argument("--batch-size", type=int, default=usual.batch_size)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--precision", default=usual.precision, choices=("auto", "bf16", "fp32"))
    parser.add_argument("--held-out", type=float, default=0.03, help="share of the sequences")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--temperatures", default="1,2,3")
    parser.add_argument("--divergences", default=",".join(divergences))
    parser.add_argument("--only", help="names of rows, with * and ?, separated by commas")
    parser.add_argument(
        "--json", type=Path, help="file of results, one a line; continued where it is there"
    )
    return parser, parser.parse_args()


def main() -> None:
    """Parse the command line, train what is missing, show everything."""
    parser, options = read_options()
    console = RichConsole(width=200, highlight=False)
    try:
        bench = open_bench(options)
        seeds = [int(seed) for seed in options.seeds.split(",")]
        temperatures = [float(temperature) for temperature in options.temperatures.split(",")]
        rows = all_rows(temperatures, options.divergences.split(","))
        rows, notes = possible_rows(rows, bench.data.store)
        for note in notes:
            console.print(f"note: {note}")
        rows = chosen_rows(rows, options.only)
    except (UserError, StoreError, ValueError) as error:
        parser.error(str(error))
    if not bench.settings()["inherits"]:
        console.print(
            "note: the store keeps no embeddings of its teacher; the students' are random"
        )
    here = machine(torch.get_num_threads())
    results = Results(options.json, bench.settings())
    results.write({"machine": here})
    run_missing(bench, rows, seeds, results, console.print)
    held_out = int((bench.data.store.lengths()[bench.data.split.held_out] - 1).sum())
    console.print(machine_line(here))
    console.print(
        f"{options.size}, {options.epochs} epochs, seeds {options.seeds}, {held_out:,} validation "
        "positions"
    )
    console.print(results_table(rows, seeds, results))


if __name__ == "__main__":
    main()
