"""TRL's own trainer on given sequences: ``GKDTrainer`` with forward KL and nothing spoken by the
student.

    PYTHON -m tools.peers.trl_training JOB.json      (written by the comparisons)

PYTHON has TRL (``tools.peers.trl_environment``) and need not have what this project needs, so
nothing of it is imported but ``tools.peers.pace``.

``GKDTrainer`` computes both models' logits of every batch over the whole vocabulary and their
divergence (``beta`` 0: KL of the student from the teacher; ``lmbda`` 0: on the given text alone).
Its ``temperature`` is that of the student's own text: the divergence is at T = 1 whatever it says,
and there is no cross-entropy beside it. All else is left to the trainer but for what the job names
and what would only cost time on one machine: no checkpoints, few logs, no recomputed activations.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.gkd import GKDConfig, GKDTrainer

from tools.peers.pace import Pace, rate_factor


class PacedTrainer(GKDTrainer):
    """TRL's trainer, its learning rate falling with the time that is left."""

    def __init__(self, pace: Pace, **others: Any) -> None:
        self.pace = pace
        super().__init__(**others)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """See ``transformers.Trainer``."""

        def factor(step: int) -> float:
            return rate_factor(self.pace.progress(step, num_training_steps))

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler


class Ending(TrainerCallback):
    """Ends the training in time."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See ``TrainerCallback``."""
        if self.pace.over():
            control.should_training_stop = True


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch of rows padded on the right to the longest of them, ``[B, T]`` each."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[number, : len(row["input_ids"])] = 1
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def load_models(job: dict[str, Any], marks: dict[str, float]) -> tuple[Any, Any]:
    """Teacher and student; writes into ``marks`` when each was there."""
    narrow = torch.float32 if job["precision"] == "fp32" else torch.bfloat16
    gguf: dict[str, Any] = {}
    if job.get("teacher_gguf"):  # unpacked: kernels for packed blocks compute in float32
        plain = GgufConfig(dequantize=True)
        gguf = {"gguf_file": job["teacher_gguf"], "quantization_config": plain}
    teacher = AutoModelForCausalLM.from_pretrained(job["teacher"], dtype=narrow, **gguf)
    marks["load the teacher"] = time.time()
    own = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    if job.get("random_seed") is None:
        student = AutoModelForCausalLM.from_pretrained(job["student"], dtype=own)
    else:
        torch.manual_seed(job["random_seed"])
        shape = AutoConfig.from_pretrained(job["student"])
        student = AutoModelForCausalLM.from_config(shape, dtype=own)
    student.config.use_cache = teacher.config.use_cache = False
    marks["make the student"] = time.time()
    return teacher, student


def make_trainer(job: dict[str, Any], pace: Pace, teacher: Any, student: Any) -> PacedTrainer:
    """TRL's trainer for the job."""
    sequences = json.loads(Path(job["tokens"]).read_text(encoding="utf-8"))
    settings = GKDConfig(
        output_dir=str(Path(job["out"]).parent / "trainer"),
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        learning_rate=job["learning_rate"],
        per_device_train_batch_size=job["batch_size"],
        num_train_epochs=job.get("epochs") or 1e6,
        bf16=job["precision"] == "autocast",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        max_length=None,
        train_sampling_strategy="group_by_length",
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    # The sequences are tokens already; the trainer only asks for a padding token.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<pad>",
    )
    return PacedTrainer(
        pace,
        model=student,
        teacher_model=teacher,
        args=settings,
        data_collator=padded,
        train_dataset=Dataset.from_dict({"input_ids": sequences}),
        processing_class=tokenizer,
        callbacks=[Ending(pace)],
    )


def main(path: Path) -> None:
    """Train as the job says; write the student, and when each part was over.

    The job, in JSON: ``tokens``, a JSON file of sequences of ids; ``teacher`` and ``student``,
    transformers folders, of which the teacher's may name a GGUF file in it as ``teacher_gguf``;
    ``random_seed``, if the student has the folder's shape and random weights; ``out`` and
    ``marks``, where the student and the times go; ``epochs``, or ``seconds`` and ``began`` of a
    ``Pace``; ``batch_size``, ``learning_rate``, and ``precision``: ``autocast`` (student in
    float32, computing in bfloat16), ``bf16`` (both all bfloat16) or ``fp32``.
    """
    job = json.loads(path.read_text(encoding="utf-8"))
    marks = {"start and imports": time.time()}
    teacher, student = load_models(job, marks)
    pace = Pace(job.get("seconds"), job.get("began"))
    trainer = make_trainer(job, replace(pace, before=pace.used()), teacher, student)
    marks["make the trainer"] = time.time()
    trainer.train()
    marks["train"] = time.time()
    student.save_pretrained(job["out"])
    marks["save the student"] = time.time()
    steps = trainer.state.global_step
    packages = (trl, transformers, torch)
    result = {
        "ends": marks,
        "steps": steps,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "sequences_seen": steps * job["batch_size"],
        "student_parameters": student.num_parameters(),
        "teacher_parameters": teacher.num_parameters(),
        "threads": torch.get_num_threads(),
        "versions": {package.__name__: package.__version__ for package in packages},
    }
    Path(job["marks"]).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
