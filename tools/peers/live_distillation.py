"""Distillation as it is usually done: teacher and student are live ``transformers`` models in one
process.

The other side of ``tools.peers.headline``, which starts it: a re-creation, from its published
definition, of what TRL's GKD trainer does with fixed sequences at the forward-KL end of the
generalised Jensen-Shannon divergence (Agarwal et al. 2024,
https://huggingface.co/docs/trl/gkd_trainer): both models' logits ``[B, T, V]`` of every batch,
divided by the temperature, two float32 log-softmaxes over the whole vocabulary, and their
divergence, element by element. Cross-entropy is added with the weights of our objective. Whatever
the real trainer does beyond that (its data loader, callbacks, logging, masks, checkpoints,
re-computation of activations) is left out, in its favour.

    python -m tools.peers.live_distillation SPEC.json      (written by tools.peers.headline)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup
from transformers.utils import logging

PRECISIONS = ("autocast", "bf16", "fp32")


def faster_precision() -> str:
    """What live models compute in sooner here, by a product of each kind: PyTorch imitates bfloat16
    several times slower on a processor without it."""

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(4):
            begun = time.thread_time()
            left @ right
            times.append(time.thread_time() - begun)
        return min(times[1:])

    return "autocast" if seconds(torch.bfloat16) < seconds(torch.float32) else "fp32"


WARMUP = 0.05
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    feed_forward: int
    context_length: int
    tied: bool = False

    def config(self) -> LlamaConfig:
        """Such a model's settings."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            intermediate_size=self.feed_forward,
            max_position_embeddings=self.context_length,
            tie_word_embeddings=self.tied,
        )

    def model(self) -> LlamaForCausalLM:
        """Such a model with random float32 weights."""
        return LlamaForCausalLM(self.config())


@dataclass(frozen=True)
class LiveJob:
    """What to do. ``tokens``: a file of token ids ``[N, T]``; ``teacher``: a checkpoint folder;
    ``out``: the student's; ``precision``: ``autocast`` (student in float32, computing in bfloat16,
    the teacher all bfloat16), ``bf16`` (both all bfloat16) or ``fp32``."""

    tokens: str
    teacher: str
    out: str
    marks: str
    student: LlamaShape
    epochs: int
    batch_size: int
    temperature: float
    alpha: float
    beta: float
    learning_rate: float
    precision: str = "autocast"
    seed: int = 0

    def write(self, path: Path) -> None:
        """Write the job for the process that does it."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> LiveJob:
        """The inverse of ``write``."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**content | {"student": LlamaShape(**content["student"])})


def make_teacher(shape: LlamaShape, folder: Path, precision: str) -> None:
    """Save a random teacher to be loaded: no part of the measured time, as the GGUF file's
    making is not."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    shape.model().to(torch.float32 if precision == "fp32" else torch.bfloat16).save_pretrained(
        folder
    )


def live_loss(
    student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, job: LiveJob
) -> tuple[Tensor, Tensor]:
    """T²·KL_T(teacher ‖ student) and CE, mean over positions, of logits ``[B, T, V]`` and
    ``tokens [B, T]``."""
    ours, theirs = student_logits[:, :-1].float(), teacher_logits[:, :-1].float()
    student = F.log_softmax(ours / job.temperature, dim=-1)
    teacher = F.log_softmax(theirs / job.temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True)  # [B, T - 1, V]
    cross_entropy = F.cross_entropy(ours.flatten(0, 1), tokens[:, 1:].flatten())
    return job.temperature**2 * divergence.sum() / tokens[:, 1:].numel(), cross_entropy


def run(job: LiveJob) -> None:
    """Load the teacher, train the student, save it; write down when each part was over."""
    marks = {"start and imports": time.time()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    narrow = torch.float32 if job.precision == "fp32" else torch.bfloat16
    teacher = LlamaForCausalLM.from_pretrained(job.teacher, dtype=narrow).to(device).eval()
    marks["load the teacher"] = time.time()
    torch.manual_seed(job.seed)
    student = job.student.model().to(
        device, torch.bfloat16 if job.precision == "bf16" else torch.float32
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=job.learning_rate, fused=True)
    marks["make the student"] = time.time()
    tokens = torch.from_numpy(np.load(job.tokens).astype(np.int64))
    steps, loss = train(student, teacher, optimizer, tokens.to(device), job)
    marks["train"] = time.time()
    student.save_pretrained(job.out)
    marks["save the student"] = time.time()
    result = {
        "ends": marks,
        "steps": steps,
        "loss": loss,
        "student_parameters": student.num_parameters(),
        "teacher_parameters": teacher.num_parameters(),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    Path(job.marks).write_text(json.dumps(result), encoding="utf-8")


def train(
    student: LlamaForCausalLM,
    teacher: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    job: LiveJob,
) -> tuple[int, float]:
    """All epochs over ``tokens [N, T]``; returns the number of steps and the last loss."""
    steps = job.epochs * -(-len(tokens) // job.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    order = torch.Generator().manual_seed(job.seed)
    autocast = (
        torch.autocast(tokens.device.type, torch.bfloat16)
        if job.precision == "autocast"
        else contextlib.nullcontext()
    )
    student.train()
    done, loss = 0, torch.zeros(())
    for _ in range(job.epochs):
        for rows in torch.randperm(len(tokens), generator=order).split(job.batch_size):
            batch = tokens[rows.to(tokens.device)]
            with autocast:
                student_logits = student(batch, use_cache=False).logits
                with torch.no_grad():
                    teacher_logits = teacher(batch, use_cache=False).logits
            divergence, cross_entropy = live_loss(student_logits, teacher_logits, batch, job)
            loss = job.alpha * divergence + job.beta * cross_entropy
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
    return done, float(loss.detach())


def main() -> None:
    """Do the job in the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", type=Path)
    run(LiveJob.read(parser.parse_args().job))


if __name__ == "__main__":
    main()
