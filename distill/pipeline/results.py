"""What a run found: ``results.json`` and the table a person reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from distill.config.schema import RunConfig
from distill.evaluation.scorers import Evaluation, perplexity
from distill.export.export import Proofs
from distill.runtime.environment import environment, how_llama_cpp_ran
from distill.training.summary import TrainingSummary
from students.adapter.adapter import AdaptedStudent
from students.gguf.writer import rotation_figures
from students.model.interface import Student
from teachers.base import TeacherInfo
from teachers.store.store import SoftTargetStore


@dataclass(frozen=True)
class Outcome:
    """Everything the stages of a run found. ``speeds``: prompt and generation tokens per second.
    ``heads``: see ``distill.heads.fitting.heads_results``. ``gradients``: of the probe batch, where
    the student is made of a base.
    """

    config: RunConfig
    teacher: TeacherInfo
    student: Student
    store: SoftTargetStore
    store_reused: bool
    training: TrainingSummary
    proofs: Proofs
    evaluation: Evaluation
    speeds: dict[str, tuple[float, float]]
    heads: dict[str, Any]
    gradients: dict[str, Any]


def build_results(outcome: Outcome, file_bytes: int, seconds: dict[str, float]) -> dict[str, Any]:
    """The content of ``results.json``.

    KL and cross-entropy are in nats per token at temperature 1.
    """
    teacher = {
        key: value for key, value in asdict(outcome.teacher).items() if key != "chat_template"
    }
    training, proof = outcome.training, outcome.proofs.files[outcome.config.export.quant]
    return {
        "teacher": teacher,
        "student": {
            "size": outcome.config.student.label,
            "parameters": outcome.student.parameter_count(),
            **_of_base(outcome),
            "file_bytes": file_bytes,
            "quant": proof.quant,
        },
        "soft_targets": {
            "folder": str(outcome.store.folder),
            "sequences": len(outcome.store),
            "tokens": int(outcome.store.lengths().sum()),
            "bytes": outcome.store.bytes_on_disk(),
            "reused": outcome.store_reused,
            **outcome.store.manifest.identity,
        },
        "training": {
            **training.to_json(),
            "seconds": round(training.seconds, 3),
            "learning_rate": outcome.config.train.learning_rate,
            "held_out": [{"step": step, **asdict(score)} for step, score in training.scores],
        },
        "evaluation": _evaluation(outcome.evaluation),
        "heads": outcome.heads,
        "proof": proof.to_json(),
        "f32_proof": outcome.proofs.original.to_json(),
        "rotations": rotation_figures(outcome.student),
        "tokens_per_second": {
            name: {"prompt": round(prompt, 1), "generation": round(generation, 1)}
            for name, (prompt, generation) in outcome.speeds.items()
        },
        "stage_seconds": seconds,
        "environment": environment(),
        "llama_cpp": how_llama_cpp_ran(),
    }


def _of_base(outcome: Outcome) -> dict[str, Any]:
    """What is to be said of a student that is made of a base."""
    if not isinstance(outcome.student, AdaptedStudent):
        return {}
    chosen = outcome.config.student
    return {
        "base": chosen.base,
        "architecture": outcome.student.base.config.model_type,
        "load_in_4bit": chosen.load_in_4bit,
        "lora": {
            "rank": chosen.lora_rank,
            "alpha": chosen.lora_alpha,
            "dropout": chosen.lora_dropout,
        },
        "trained_parameters": outcome.student.trainable_parameters(),
        "gradients": outcome.gradients,
    }


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Scores as ``results.json`` has them; what is not known of the teacher is not there."""
    content: dict[str, Any] = {
        "against": evaluation.against,
        "positions": evaluation.positions,
        "kl_over": evaluation.kl_over,
    }
    if (surprise := evaluation.teacher) is not None:
        known = {"cross_entropy": surprise, "perplexity": perplexity(surprise)}
        content["teacher"] = known | {"approximate": evaluation.approximate}
    for name, score in evaluation.models.items():
        content[name] = asdict(score) | {"perplexity": score.perplexity}
    return content
