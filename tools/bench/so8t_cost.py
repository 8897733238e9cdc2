"""What gates, terms and heads cost in a training step and in an exported file
(``tools.studies.so8t cost``)."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFValueType
from rich.table import Table
from torch import Tensor, nn

from distill.config.schema import RunConfig
from distill.heads.prompt_set import PromptSet
from distill.losses.batch import Batch
from distill.losses.objective import Objective
from distill.runtime.cpu import keep_freed_memory, onednn_for_float32
from distill.runtime.device import choose_precision
from distill.training.distributed import TrainingModule
from distill.training.optimizer import build_optimizer, parameter_groups
from stability.measures.tensors import gradient_norm
from students.gguf.metadata import ExportNames, MetadataEntry
from students.gguf.writer import write_gguf
from students.model.build import build_student
from students.model.config import SO8TConfig
from students.model.decoder import SHORT_ON_CPU, Attention, SO8TForCausalLM
from students.model.shape import GROUP
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from tools.models.random_teacher import vocabulary

MIDDLE = 0.5  # of training: where PET has its second weight
SIDES = ("plain", "plain again", "gates", "heads")
PHASES = ("forward", "backward", "optimizer", "figures")
FILES = ("plain", "folded")
PROMPT_TOKENS, NEW_TOKENS = 128, 64


@torch.no_grad()
def freeze_identity(student: SO8TForCausalLM) -> None:
    """Make every rotation exactly the identity, for good: exp(0), and no gradient."""
    for gate in student.gates():
        for parameter in gate.parameters():
            parameter.zero_()
            parameter.requires_grad_(False)


# -- training steps -------------------------------------------------------------------------------


class NoGate(nn.Module):
    """Says that the rotations are the identity; they are applied to nothing."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.register_buffer(
            "rotations", torch.eye(GROUP).expand(2, blocks, -1, -1), persistent=False
        )

    def forward(self) -> Tensor:
        """``[2, N, 8, 8]``, the same every time."""
        assert isinstance(self.rotations, Tensor)
        return self.rotations


class PlainAttention(Attention):
    """Attention whose output goes through W_o as it is."""

    def __init__(self, config: SO8TConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.gate = NoGate(config.num_blocks)  # type: ignore[assignment]

    def gated_output_weight(self, rotations: Tensor) -> Tensor:
        """W_o."""
        return self.o_proj.weight


def take_gates_out(student: SO8TForCausalLM) -> None:
    """Replace every attention by a plain one with the same weights."""
    for number, layer in enumerate(student.model.layers):
        plain = PlainAttention(student.config, number)
        assert isinstance(layer.self_attn, Attention)
        weights = layer.self_attn.state_dict()
        plain.load_state_dict(
            {name: value for name, value in weights.items() if "gate." not in name}
        )
        layer.self_attn = plain


@dataclass(frozen=True)
class CostJob:
    """One size of student and what it learns from; ``batches`` without prompts. ``steps``: of the
    training that they stand for, over which the prompts are spread."""

    title: str
    shape: SO8TConfig
    batches: list[Batch]
    prompts: PromptSet
    run: RunConfig
    steps: int


class Side:
    """A student with its optimizer, and how one of its steps is taken."""

    def __init__(self, name: str, job: CostJob) -> None:
        self.job, self.gated, self.heads = job, not name.startswith("plain"), name == "heads"
        shape = copy.deepcopy(job.shape)
        shape.safety_head = shape.verification_head = self.heads
        student = build_student(shape, 0)
        if not self.gated:
            take_gates_out(student)
        changes = {} if self.heads else {"lambda_safety": 0.0, "lambda_verification": 0.0}
        changes |= {} if self.gated else {"lambda_so8t": 0.0}
        self.student = student.train()
        self.objective = Objective(job.run.loss.model_copy(update=changes))
        self.module = TrainingModule(student, self.objective)
        self.optimizer = build_optimizer(self.module, job.run.train, shape.hidden_size)
        precision = choose_precision(job.run.train, shape.hidden_size, torch.device("cpu"))
        self.narrow = precision == "bf16"

    def seconds(self, turn: int) -> dict[str, float]:
        """How long each phase of a step takes on average, over as many steps as prompts come in
        once."""
        every, together = self.job.run.safety.rhythm(self.job.steps)
        taken = [
            self._seconds(turn * every + number, None if number else together)
            for number in range(every)
        ]
        return {name: statistics.fmean(step[name] for step in taken) for name in taken[0]}

    def _seconds(self, number: int, prompts_together: int | None) -> dict[str, float]:
        """How long each phase of step ``number`` takes."""
        batch = self.job.batches[number % len(self.job.batches)]
        if self.heads and prompts_together is not None:
            prompts = self.job.prompts.batch(number, prompts_together, 0, 1)
            wrapped = (
                prompts.tokens % self.student.config.vocab_size
            )  # a made-up vocabulary may be smaller
            batch = replace(batch, prompts=replace(prompts, tokens=wrapped))
        marks = [time.perf_counter()]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.narrow):
            loss, _ = self.objective(
                self.student, batch, total=batch.count(), share=1.0, fraction=MIDDLE
            )
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        for parameters in parameter_groups(self.module).values():
            norm = gradient_norm(parameters)
            torch.nn.utils.clip_grads_with_norm_(parameters, self.job.run.train.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(time.perf_counter())
        if self.gated:
            self.objective.rotation_stats()
            self.objective.after_step()
        marks.append(time.perf_counter())
        parts = {
            name: end - begin
            for name, begin, end in zip(PHASES, marks[:-1], marks[1:], strict=True)
        }
        return parts | {"step": marks[-1] - marks[0]}


def measure_steps(job: CostJob, rounds: int, warmup: int) -> dict[str, Any]:
    """Seconds of every side's steps, in turns, each side first equally often."""
    keep_freed_memory()
    longest = max(batch.tokens.shape[1] for batch in job.batches)
    sides = {name: Side(name, job) for name in SIDES}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    with onednn_for_float32() if longest <= SHORT_ON_CPU else nullcontext():
        for number in range(warmup + rounds):
            first = number % len(SIDES)
            for name in SIDES[first:] + SIDES[:first]:
                taken[name].append(sides[name].seconds(number))
    kept = {name: every[warmup:] for name, every in taken.items()}
    whole = {name: [step["step"] for step in every] for name, every in kept.items()}
    medians = {
        name: {part: statistics.median(step[part] for step in every) for part in (*PHASES, "step")}
        for name, every in kept.items()
    }
    return {
        "title": job.title,
        "precision": "bf16" if sides["plain"].narrow else "fp32",
        "parameters": {name: side.student.parameter_count() for name, side in sides.items()},
        "median_seconds": medians,
        "ratio_to_plain": {name: ratios(whole[name], whole["plain"]) for name in SIDES[1:]},
        "seconds": whole,
    }


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios round by round."""
    result = [one / other for one, other in zip(above, below, strict=True)]
    low, middle, high = statistics.quantiles(result, n=4) if len(result) > 1 else result * 3
    return {"median": middle, "low": low, "high": high}


# -- exported files -------------------------------------------------------------------------------


def made_up_tokenizer(vocab_size: int) -> dict[str, MetadataEntry]:
    """A tokenizer of that many tokens, as the exporter takes it."""
    tokens, scores, types = vocabulary(vocab_size)
    name = "tokenizer.ggml."
    return {
        name + "model": ("llama", GGUFValueType.STRING, None),
        name + "pre": ("default", GGUFValueType.STRING, None),
        name + "tokens": (tokens, GGUFValueType.ARRAY, GGUFValueType.STRING),
        name + "scores": (scores, GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
        name + "token_type": (types, GGUFValueType.ARRAY, GGUFValueType.INT32),
        name + "bos_token_id": (1, GGUFValueType.UINT32, None),
        name + "eos_token_id": (2, GGUFValueType.UINT32, None),
    }


def export_pair(shape: SO8TConfig, folder: Path, quant: str) -> dict[str, Path]:
    """Files of a student with gates and heads, and of one whose gates are the identity, without
    heads.

    Random weights: speed does not depend on them.
    """
    paths = {}
    for name in FILES:
        own = copy.deepcopy(shape)
        own.safety_head = own.verification_head = name == "folded"
        student = build_student(own, 0)
        if name == "plain":
            freeze_identity(student)
        paths[name] = folder / f"{name}.gguf"
        write_gguf(
            student, paths[name], quant, made_up_tokenizer(own.vocab_size), ExportNames(name, {})
        )
    return paths


def measure_files(
    title: str, shape: SO8TConfig, folder: Path, quant: str, rounds: int
) -> dict[str, Any]:
    """Tokens per second of both files in llama.cpp, in turns, after a round that does not count."""
    paths = export_pair(shape, folder, quant)
    files = {name: read_gguf(path) for name, path in paths.items()}
    prompt = min(PROMPT_TOKENS, shape.max_position_embeddings // 2)
    new = min(NEW_TOKENS, shape.max_position_embeddings - prompt - 1)
    said: dict[str, list[tuple[float, float]]] = {name: [] for name in FILES}
    with GGUFTeacher(paths["plain"]) as plain, GGUFTeacher(paths["folded"]) as folded:
        models = {"plain": plain, "folded": folded}
        for number in range(1 + rounds):
            for name in FILES if number % 2 == 0 else FILES[::-1]:
                said[name].append(models[name].speed(prompt, new))
    speeds = {
        kind: {name: [both[place] for both in every[1:]] for name, every in said.items()}
        for place, kind in enumerate(("prompt", "generation"))
    }
    tensors = {
        name: [(key, part.shape, part.type) for key, part in file.tensors.items()]
        for name, file in files.items()
    }
    return {
        "title": title,
        "quant": quant,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "same_tensors": tensors["plain"] == tensors["folded"],
        "bytes": {name: file.size for name, file in files.items()},
        "tokens_per_second": speeds,
        "ratio_to_plain": {
            kind: ratios(both["folded"], both["plain"]) for kind, both in speeds.items()
        },
    }


# -- tables ---------------------------------------------------------------------------------------


def told(ratio: dict[str, float]) -> str:
    """Median and quartiles."""
    return f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})"


def steps_table(result: dict[str, Any]) -> Table:
    """Milliseconds of a step and its phases, and how many times those of the plain one."""
    table = Table(
        title=f"training step, {result['title']}, {result['precision']}", title_justify="left"
    )
    for column in ("student", "parameters", *PHASES, "step, ms", "of plain's, quartiles"):
        table.add_column(column, justify="left" if column == "student" else "right")
    for name, medians in result["median_seconds"].items():
        ratio = result["ratio_to_plain"].get(name)
        table.add_row(
            name,
            f"{result['parameters'][name]:,}",
            *(f"{1e3 * medians[part]:.1f}" for part in (*PHASES, "step")),
            told(ratio) if ratio else "1",
        )
    return table


def files_table(result: dict[str, Any]) -> Table:
    """Tokens per second of both files."""
    same = "the same tensors" if result["same_tensors"] else "OTHER TENSORS"
    title = f"exported files, {result['title']}, {result['quant']}, {same}; tokens/s"
    table = Table(title=title, title_justify="left")
    for column in ("", *FILES, "of plain's, quartiles"):
        table.add_column(column, justify="left" if not column else "right")
    for kind, speeds in result["tokens_per_second"].items():
        cells = [f"{statistics.median(speeds[name]):,.0f}" for name in FILES]
        table.add_row(kind, *cells, told(result["ratio_to_plain"][kind]))
    table.add_row("bytes", *(f"{result['bytes'][name]:,}" for name in FILES), "")
    return table


def cost_tables(result: dict[str, Any]) -> Iterator[Table]:
    """Everything that was measured."""
    yield from map(steps_table, result["steps"])
    yield from map(files_table, result["files"])
