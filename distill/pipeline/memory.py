"""The most memory that each stage of a run takes, estimated before it starts.

Main memory counts what the system cannot take back. Files that are read again and again are counted
apart: what of them finds no room is read from the disk.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from distill.base_models.memory_estimate import TrainingMemory
from distill.config.schema import RunConfig
from distill.export.proof import PROOF_BYTES
from distill.metrics.distributions import LOGITS_BYTES
from distill.pipeline.disk import exported_bytes

CAPTURE, INITIALIZATION, TRAINING = "capture", "initialization", "training"
EXPORT, EVALUATION = "export and proof", "evaluation"
WORKER_BYTES = 300 << 20  # of a llama.cpp process beside its weights, where none was measured
# Tables of logits that comparing two models holds: both in float32, and in float64 with the
# logarithms of their probabilities and what these are made of.
PROOF_COPIES, EVALUATION_COPIES = 14, 6
QUANTIZER_BYTES = 150 << 20  # of its process, beside the tensor in work


@dataclass(frozen=True)
class Peak:
    """The most bytes of a stage: of main memory, of the device, of files that are mapped."""

    main: int
    device: int = 0
    mapped: int = 0


@dataclass(frozen=True)
class Models:
    """What the peaks depend on; bytes of main memory unless it says otherwise.

    ``process``: of this process without a student; ``teacher``: of the teacher's, ``on_device`` of
    which are the device's; ``worker``: of a llama.cpp process beside its weights. ``training``: see
    there; ``exported``: numbers of the exported file. ``longest``: tokens of a sequence;
    ``scored``: of all validation sequences.
    """

    process: int
    teacher: int
    on_device: int
    worker: int
    training: TrainingMemory
    exported: int
    vocab_size: int
    longest: int
    scored: int


def own_memory() -> int:
    """Bytes of main memory that this process cannot give back."""
    found = psutil.Process().memory_info()
    return int(found.rss - getattr(found, "shared", 0))  # the libraries it has mapped


def stage_peaks(models: Models, config: RunConfig) -> dict[str, Peak]:
    """The peak of every stage, in their order."""
    training, own = models.training, models.process
    on_cpu = training.on_cpu
    best = 4 * training.trained_numbers  # weights of the best step
    student = training.base + training.trained
    first = student + training.gradients + training.activations + training.temporary + training.loss
    kept = training.total if on_cpu else training.snapshots
    open_teacher = bool(config.train.on_policy)
    there = student if on_cpu else 0  # of the student in main memory, until it is exported
    file = exported_bytes(config.export.quant, models.exported)
    logits = 4 * models.vocab_size * models.longest
    groups = min(max(logits, LOGITS_BYTES), 4 * models.vocab_size * models.scored)
    device = {
        CAPTURE: models.on_device,
        INITIALIZATION: first,
        TRAINING: training.total + open_teacher * models.on_device,
        EXPORT: student + logits,
        EVALUATION: max(student + logits, models.on_device + (file if models.on_device else 0)),
    }
    main = {
        CAPTURE: models.teacher,
        INITIALIZATION: first if on_cpu else best,
        TRAINING: kept + best + open_teacher * models.teacher,
        EXPORT: there + _exporting(models, file),
        EVALUATION: student
        + best
        + models.teacher
        + models.worker
        + EVALUATION_COPIES * groups
        + (0 if models.on_device else file),
    }
    # Of a base: the merged model beside the F32 file; a new student's weights are its own.
    files = 4 * models.exported * (2 if training.base else 1)
    return {
        name: Peak(own + main[name], 0 if on_cpu else device[name], files * (name == EXPORT))
        for name in main
    }


def _exporting(models: Models, file: int) -> int:
    """What export and proof take beside the student."""
    logits = 4 * models.vocab_size * models.longest
    return max(
        models.training.merging,
        logits,  # of a sequence that the importance is measured on
        QUANTIZER_BYTES + 4 * models.training.largest,
        models.worker + PROOF_COPIES * min(logits, PROOF_BYTES) + file,
    )
