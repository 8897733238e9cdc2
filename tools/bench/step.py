"""One training step with the chunked loss against the plain PyTorch step: tokens per second and
extra peak memory.

Over 400 lines because both sides of the step, their measuring and their tables belong together.

    python -m tools.bench.step [--device cuda] [--precision fp32] [--json FILE]

Forward, loss, backward and optimizer of the same SO8T student (512×4, tied, batch 8 × 512 tokens, V
= 32,064, T = 3):

- ours: ``Objective`` on compact targets with a sketch, made from dense logits as a store would give
  them back;
- plain: logits ``[B, T, V]``, ``kl_div(log_softmax(z / T), p)·T² + cross_entropy(z)`` in float32,
  autograd. The teacher's probabilities p at T are dense, in memory, and free: making them is in
  neither its time nor its memory.

Each side has a process of its own, which is what a training run has: on a CPU ours keeps freed
memory for the next step, as the training loop does, and plain PyTorch gives it back
(``--keep-memory both`` or ``none`` for other rules). Speed: step by step in turns, one process
waiting for the other; medians after a warm-up. Memory: in fresh processes, peak above the state in
which student, optimizer with its moments, batch and targets are loaded (gradients count, targets do
not; their size is told apart). Both learn from every position but the last of a sequence. Our
regularisers are off (``--lambda-so8t``), as the plain step has none; clipping is in neither. The
losses of the first step are printed: they differ by what the sketch leaves out and by rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import distill.losses.chunked_lm_head
from distill.config.schema import LossConfig, TrainConfig
from distill.losses.batch import Batch
from distill.losses.objective import Objective
from distill.runtime.cpu import keep_freed_memory, onednn_for_float32
from distill.training.optimizer import build_optimizer
from students.model.build import build_student, student_config
from students.model.decoder import SO8TForCausalLM
from students.model.shape import parse_size
from teachers.targets.distributions import CompactTargets
from teachers.targets.fit_codec import FIT_POSITIONS, fit_sketch
from teachers.targets.output_head import OutputHead
from teachers.targets.recipe import compact_recipe
from teachers.targets.stored_arrays import Answer, join, reduce, typed
from tools.machine import (
    child_command,
    child_environment,
    machine,
    machine_line,
    peak_memory,
    write_json,
)

SIDES = ("ours", "plain")
KEEPING = {"ours": ("ours",), "both": SIDES, "none": ()}
MEMORY_STEPS = 3
NUM_TOPK = 16
STATE_DECAY = (
    1.0  # the k-th principal direction of the teacher's states is 1 / k as strong as its first
)


@dataclass(frozen=True)
class StepJob:
    """Sizes and weights of the step that is measured."""

    size: str = "512x4"
    batch: int = 8
    tokens: int = 512
    vocab_size: int = 32064
    teacher_width: int = 1024
    tied: bool = True
    temperature: float = 3.0
    alpha: float = 0.7
    beta: float = 0.3
    lambda_so8t: float = 0.0
    precision: str = "bf16"
    device: str = "cpu"
    threads: int = 1
    chunk_bytes: int | None = None
    keep_memory: str = "ours"
    seed: int = 0

    @property
    def positions(self) -> int:
        """Positions learnt from in one step."""
        return self.batch * (self.tokens - 1)


# -- material -------------------------------------------------------------------------------------


def make_material(job: StepJob) -> tuple[Batch, Tensor]:
    """Random sequences: a batch with compact targets, and the same teacher's probabilities at T,
    ``[n, V]``."""
    draw = torch.Generator().manual_seed(job.seed)
    tokens = torch.randint(0, job.vocab_size, (job.batch, job.tokens), generator=draw)
    matrix = torch.randn(job.vocab_size, job.teacher_width, generator=draw)
    strength = torch.arange(1, job.teacher_width + 1) ** -STATE_DECAY
    states = torch.randn(job.positions, job.teacher_width, generator=draw) * strength
    states *= 2.0 / float(strength.norm())  # logits of a spread of 2
    logits = states @ matrix.T
    targets = compact_targets(states, logits, matrix, job)
    lengths = torch.full((job.batch,), job.tokens)
    logits.div_(job.temperature)
    return Batch(tokens, lengths, targets), torch.softmax(logits, dim=-1)


def compact_targets(states: Tensor, logits: Tensor, matrix: Tensor, job: StepJob) -> CompactTargets:
    """Fit, reduce and read back, a sequence at a time, as capture and store do."""
    vocab_size, width = matrix.shape
    recipe = compact_recipe(NUM_TOPK, vocab_size, width)

    def rows(start: int, stop: int) -> np.ndarray:
        return matrix[start:stop].numpy()

    fitting = states[:: max(1, len(states) // FIT_POSITIONS)][:FIT_POSITIONS]
    sketch = fit_sketch(fitting, rows, vocab_size, recipe)
    parts = []
    for some, said in zip(states.split(job.tokens - 1), logits.split(job.tokens - 1), strict=True):
        arrays = reduce(Answer(said, some), recipe, {"final": sketch.basis})
        parts.append(typed(arrays, recipe, vocab_size, sketch.basis, sketch.head))
    joined = join(parts)
    assert isinstance(joined, CompactTargets)
    return joined


def target_bytes(targets: CompactTargets) -> dict[str, int]:
    """Bytes that loaded targets take: of their positions, and of the head that all share."""
    own = sum(value.nbytes for value in vars(targets).values() if isinstance(value, Tensor))
    shared = targets.head.matrix.nbytes + targets.head.bias.nbytes if targets.head else 0
    return {"positions": own, "head": shared}


# -- the two steps --------------------------------------------------------------------------------

Loss = Callable[[SO8TForCausalLM], Tensor]


def our_loss(job: StepJob, batch: Batch) -> Loss:
    """The objective as the training loop calls it."""
    config = LossConfig(
        temperature=job.temperature,
        alpha=job.alpha,
        beta=job.beta,
        lambda_so8t=job.lambda_so8t,
    )
    objective = Objective(config)
    if job.chunk_bytes is not None:
        assert hasattr(distill.losses.chunked_lm_head, "LOGITS_BYTES")
        distill.losses.chunked_lm_head.LOGITS_BYTES = job.chunk_bytes

    def loss(student: SO8TForCausalLM) -> Tensor:
        value, _ = objective(student, batch, total=batch.count(), share=1.0, fraction=0.5)
        return value

    return loss


def plain_loss(job: StepJob, tokens: Tensor, probabilities: Tensor) -> Loss:
    """What one writes in PyTorch: all logits at once, ``probabilities [n, V]`` known."""

    def loss(student: SO8TForCausalLM) -> Tensor:
        output = student(tokens)
        logits = output.logits[:, :-1].float().flatten(0, 1)
        student_log_probs = F.log_softmax(logits / job.temperature, dim=-1)
        divergence = F.kl_div(student_log_probs, probabilities, reduction="batchmean")
        cross_entropy = F.cross_entropy(logits, tokens[:, 1:].flatten())
        return job.alpha * job.temperature**2 * divergence + job.beta * cross_entropy

    return loss


class Trainee:
    """A student with its optimizer, the moments allocated, and one way to compute its loss."""

    def __init__(self, job: StepJob, loss: Loss) -> None:
        config = student_config(
            parse_size(job.size),
            vocab_size=job.vocab_size,
            context_length=job.tokens,
            tie_embeddings=job.tied,
        )
        self.device = torch.device(job.device)
        self.narrow = job.precision == "bf16"
        self.student = build_student(config, job.seed).to(self.device)
        self.student.train()
        self.loss = loss
        self.optimizer = build_optimizer(self.student, TrainConfig(), config.hidden_size)
        for parameter in self.student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        # Without a gradient it only makes the moments (and decays the weights a little)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> Tensor:
        """One step; its loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.narrow):
            loss = self.loss(self.student)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def seconds(self) -> float:
        """How long one step takes."""
        self._wait()
        begin = time.perf_counter()
        self.step()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()


def write_batch(batch: Batch, targets: CompactTargets, path: Path) -> None:
    """Write a batch with compact targets that have a sketch."""
    assert targets.coordinates is not None and targets.head is not None
    tensors = {
        "tokens": batch.tokens,
        "lengths": batch.lengths,
        "topk_ids": targets.topk_ids,
        "topk_logits": targets.topk_logits,
        "tail": targets.tail,
        "coordinates": targets.coordinates,
        "matrix": targets.head.matrix,
        "bias": targets.head.bias,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_batch(path: Path, vocab_size: int) -> Batch:
    """The inverse of ``write_batch``."""
    result = load_file(path)
    targets = CompactTargets(
        result["topk_ids"],
        result["topk_logits"],
        result["tail"],
        vocab_size,
        coordinates=result["coordinates"],
        head=OutputHead(result["matrix"], result["bias"]),
    )
    return Batch(result["tokens"], result["lengths"], targets)


def trainee(side: str, job: StepJob, files: Path) -> Trainee:
    """One side with what it learns from, read from ``files``."""
    device = torch.device(job.device)
    if side == "ours":
        batch = read_batch(files / "ours.safetensors", job.vocab_size)
        return Trainee(job, our_loss(job, batch.to(device)))
    material = load_file(files / "plain.safetensors")
    tokens, probabilities = material["tokens"].to(device), material["probabilities"].to(device)
    return Trainee(job, plain_loss(job, tokens, probabilities))


# -- measuring ------------------------------------------------------------------------------------


def save_material(job: StepJob, folder: Path) -> dict[str, Any]:
    """Make and save what both sides load; returns how large it is in memory."""
    folder.mkdir(exist_ok=True)
    batch, probabilities = make_material(job)
    assert isinstance(batch.targets, CompactTargets)
    write_batch(batch, batch.targets, folder / "ours.safetensors")
    save_file(
        {"tokens": batch.tokens, "probabilities": probabilities}, folder / "plain.safetensors"
    )
    return {
        "ours": target_bytes(batch.targets),
        "plain": {"positions": probabilities.nbytes, "head": 0},
    }


def measure_memory(side: str, job: StepJob, files: Path) -> dict[str, float]:
    """Peak of some steps above the loaded state, in this process, which must be fresh."""
    small = replace(job, size="64x1", batch=2, tokens=16, vocab_size=512, teacher_width=64)
    save_material(small, files / f"small-{side}")
    trainee(side, small, files / f"small-{side}").step()  # loads the code that the step will need
    measured = trainee(side, job, files)
    with peak_memory(torch.device(job.device)) as peak:
        for _ in range(MEMORY_STEPS):
            loss = measured.step()
    gradients = sum(parameter.nbytes for parameter in measured.student.parameters())
    return {"loaded": peak.before, "extra": peak.extra, "gradients": gradients, "loss": float(loss)}


def take_steps(side: str, job: StepJob, files: Path) -> None:
    """Say the loss of a first step, then take a step for every line that comes in and say its
    seconds."""
    measured = trainee(side, job, files)
    print(float(measured.step()), flush=True)
    for _ in sys.stdin:
        print(measured.seconds(), flush=True)


class Child:
    """A process that measures one side.

    ``what``: ``memory`` or ``speed``; it says numbers, a line each.
    """

    def __init__(self, what: str, side: str, job: StepJob, files: Path) -> None:
        spec = files / "job.json"
        write_json(spec, asdict(job))
        self.process = subprocess.Popen(
            child_command("tools.bench.step", "--child", what, side, "--spec", spec),
            env=child_environment(job.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> str:
        """The next line it says.

        Raises:
            RuntimeError: it has ended instead.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the measuring process ended with {self.process.wait()}")
        return line

    def step(self) -> float:
        """Have it take a step; its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self.hear())

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def measure_memory_apart(side: str, job: StepJob, files: Path) -> dict[str, float]:
    """``measure_memory`` in a process of its own."""
    with Child("memory", side, job, files) as child:
        result: dict[str, float] = json.loads(child.hear())
    return result


def measure_speed(job: StepJob, files: Path, steps: int, warmup: int) -> dict[str, Any]:
    """Seconds of both sides' steps, taken in turns."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with Child("speed", "ours", job, files) as ours:
        first = {"ours": float(ours.hear())}
        with Child("speed", "plain", job, files) as plain:
            first["plain"] = float(plain.hear())
            children = {"ours": ours, "plain": plain}
            for number in range(warmup - 1 + steps):
                for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                    seconds[side].append(children[side].step())
    return {
        "first_loss": first,
        "seconds": {side: every[warmup - 1 :] for side, every in seconds.items()},
    }


def compare(job: StepJob, steps: int, warmup: int) -> dict[str, Any]:
    """Memory of each side, then the speed of both."""
    with tempfile.TemporaryDirectory(prefix="bench-step-") as name:
        files = Path(name)
        targets = save_material(job, files)
        memory = {side: measure_memory_apart(side, job, files) for side in SIDES}
        speed = measure_speed(job, files, steps, warmup)
    median = {side: statistics.median(speed["seconds"][side]) for side in SIDES}
    return {
        "job": asdict(job),
        "targets_bytes": targets,
        "memory": memory,
        **speed,
        "median_seconds": median,
        "tokens_per_second": {side: job.positions / median[side] for side in SIDES},
        "speed_ratio": median["plain"] / median["ours"],
        "extra_memory_ratio": memory["plain"]["extra"] / memory["ours"]["extra"],
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table()
    for column in ("", *SIDES, "ratio"):
        table.add_column(column, justify="left" if not column else "right")

    def both(name: str, values: dict[str, str], ratio: str = "") -> None:
        table.add_row(name, *(values[side] for side in SIDES), ratio)

    seconds, memory, targets = result["seconds"], result["memory"], result["targets_bytes"]
    both(
        "tokens/s",
        {side: f"{result['tokens_per_second'][side]:,.0f}" for side in SIDES},
        f"{result['speed_ratio']:.2f} times as fast",
    )
    both(
        "seconds a step, median", {side: f"{result['median_seconds'][side]:.4f}" for side in SIDES}
    )
    both(
        "fastest – slowest",
        {side: f"{min(seconds[side]):.4f} – {max(seconds[side]):.4f}" for side in SIDES},
    )
    both(
        "extra peak memory, MB",
        {side: f"{memory[side]['extra'] / 1e6:,.0f}" for side in SIDES},
        f"{result['extra_memory_ratio']:.2f} times less",
    )
    both(
        "  of it gradients, MB", {side: f"{memory[side]['gradients'] / 1e6:,.0f}" for side in SIDES}
    )
    both("loaded before, MB", {side: f"{memory[side]['loaded'] / 1e6:,.0f}" for side in SIDES})
    both(
        "  of it targets, MB",
        {side: f"{targets[side]['positions'] / 1e6:,.2f}" for side in SIDES},
        f"and {targets['ours']['head'] / 1e6:,.1f} for all (head)",
    )
    both("loss of the first step", {side: f"{result['first_loss'][side]:.4f}" for side in SIDES})
    console.print(table)


def options() -> argparse.ArgumentParser:
    """The command line."""
    usual = StepJob()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default=usual.size, help="student, WIDTHxLAYERS")
    parser.add_argument(
        "--untied", action="store_true", help="output matrix apart from the input embedding"
    )
    parser.add_argument("--batch", type=int, default=usual.batch)
    parser.add_argument("--tokens", type=int, default=usual.tokens)
    parser.add_argument("--vocab", type=int, default=usual.vocab_size)
    parser.add_argument("--teacher-width", type=int, default=usual.teacher_width)
    parser.add_argument("--temperature", type=float, default=usual.temperature)
    parser.add_argument("--lambda-so8t", type=float, default=usual.lambda_so8t)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=usual.precision)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=usual.device)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--chunk-bytes", type=int, help="logits of one chunk of our loss")
    parser.add_argument(
        "--keep-memory", choices=KEEPING, default=usual.keep_memory, help="who keeps freed memory"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    return parser


def _be_child(what: str, side: str, spec: Path) -> None:
    """The measuring process of ``Child``."""
    job = StepJob(**json.loads(spec.read_text(encoding="utf-8")))
    torch.set_num_threads(job.threads)
    if job.device == "cpu" and side in KEEPING[job.keep_memory]:
        keep_freed_memory()
    with onednn_for_float32() if side == "ours" else nullcontext():
        if what == "memory":
            print(json.dumps(measure_memory(side, job, spec.parent)), flush=True)
        else:
            take_steps(side, job, spec.parent)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and measure."""
    chosen = options().parse_args(arguments)
    if chosen.child:
        what, side = chosen.child
        _be_child(what, side, chosen.spec)
        return
    job = StepJob(
        size=chosen.size,
        batch=chosen.batch,
        tokens=chosen.tokens,
        vocab_size=chosen.vocab,
        teacher_width=chosen.teacher_width,
        tied=not chosen.untied,
        temperature=chosen.temperature,
        lambda_so8t=chosen.lambda_so8t,
        precision=chosen.precision,
        device=chosen.device,
        threads=chosen.threads,
        chunk_bytes=chosen.chunk_bytes,
        keep_memory=chosen.keep_memory,
    )
    about = machine(chosen.threads)
    console = Console(width=110)
    console.print(machine_line(about))
    console.print(
        f"student {job.size}, {'tied' if job.tied else 'untied'}, batch {job.batch} × "
        f"{job.tokens}, "
        f"V = {job.vocab_size}, T = {job.temperature:g}, {job.precision} on {job.device}; freed "
        "memory is kept by: "
        f"{job.keep_memory if job.device == 'cpu' else 'both'}"
    )
    result = compare(job, chosen.steps, chosen.warmup)
    show(result, console)
    if chosen.json:
        write_json(chosen.json, {"machine": about, **result})


if __name__ == "__main__":
    main()
