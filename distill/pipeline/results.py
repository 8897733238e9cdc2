"""What a run ends with: ``results.json``, the report, the model card, the log's last line."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from distill.evaluation.scorers import Evaluation, perplexity
from distill.pipeline.stages import Evaluated, Prepared, Workspace
from distill.reports.build import write_run_report
from distill.reports.card.card import is_ours, write_card
from distill.runs.audit_events import anchor, record_finish
from distill.runtime.environment import environment, llama_cpp_environment
from students.adapter.adapter import AdaptedStudent
from students.gguf.writer import rotation_stats

# What the student's own file has of the teacher.
_IN_THE_FILE = ("chat_template", "tool_template", "special_tokens")


def write_results(evaluated: Evaluated, work: Workspace) -> None:
    """Make the run a finished one: the results, then all that is made of them."""
    folder = work.folder
    folder.report.unlink(missing_ok=True)  # of an attempt that was given up
    if is_ours(folder):
        folder.card.unlink()
    results = build_results(evaluated, folder.gguf.stat().st_size, work.console.seconds)
    folder.write_results(results | {"audit": anchor(folder.path)})
    finalize(work)


def finalize(work: Workspace) -> None:
    """What is done last, and again if the process was killed there: the log's last line, the
    report, the model card, and no more file of first weights."""
    record_finish(work.folder)
    if not work.folder.report.exists():
        write_run_report(work.folder, work.console)
    if not work.folder.card.exists():
        write_card(work.folder)
    work.folder.beginning.unlink(missing_ok=True)


def build_results(
    evaluated: Evaluated, file_bytes: int, seconds: dict[str, float]
) -> dict[str, Any]:
    """The content of ``results.json``.

    KL and cross-entropy are in nats per token at temperature 1.
    """
    published, summary = evaluated.published, evaluated.published.trained.summary
    prepared = published.trained.prepared
    source, student, store = prepared.source, prepared.student, prepared.source.store
    proof, codec = published.proofs.only, store.shared_codec()
    cut = source.teacher_record.cut
    return {
        "teacher": {
            key: value for key, value in asdict(source.info).items() if key not in _IN_THE_FILE
        }
        | ({} if cut is None else {"vocab_size": cut.vocabulary.old_size}),
        "student": {
            "size": source.config.student.label,
            "parameters": student.parameter_count(),
            **_of_base(prepared),
            "file_bytes": file_bytes,
            "quant": proof.quant,
        },
        "soft_targets": {
            "folder": str(store.folder),
            "sequences": len(store),
            "tokens": int(store.lengths().sum()),
            "positions": store.positions(),
            "bytes": store.bytes_on_disk(),
            "reused": source.reused,
            "sketch": None if codec is None else codec.sketch,
            **store.manifest.identity,
        },
        "training": {
            **summary.to_json(),
            "seconds": round(summary.seconds, 3),
            "learning_rate": prepared.learning_rate,
            "held_out": [{"step": step, **asdict(score)} for step, score in summary.scores],
        },
        "evaluation": _evaluation(evaluated.evaluation),
        **_of_vocabulary(evaluated),
        "heads": evaluated.heads,
        "proof": proof.to_json(),
        "f32_proof": published.proofs.original.to_json(),
        "rotations": rotation_stats(student),
        "tokens_per_second": {
            name: {"prompt": round(prompt, 1), "generation": round(generation, 1)}
            for name, (prompt, generation) in evaluated.speeds.items()
        },
        "stage_seconds": seconds,
        "environment": environment(),
        "llama_cpp": llama_cpp_environment(),
    }


def _of_vocabulary(evaluated: Evaluated) -> dict[str, Any]:
    """What results say of a vocabulary that is a part of the teacher's."""
    cut = evaluated.published.trained.prepared.source.teacher_record.cut
    if cut is None:
        return {}
    return {"vocabulary": cut.facts() | {"bits_per_byte": evaluated.bits_per_byte}}


def _of_base(prepared: Prepared) -> dict[str, Any]:
    """What results say of a student that is made of a base model."""
    student, chosen = prepared.student, prepared.source.config.student
    if not isinstance(student, AdaptedStudent):
        return {}
    return {
        "base": chosen.base,
        "architecture": student.base.config.model_type,
        "load_in_4bit": chosen.load_in_4bit,
        "lora": {
            "rank": chosen.lora_rank,
            "alpha": chosen.lora_alpha,
            "dropout": chosen.lora_dropout,
        },
        "trained_parameters": student.trainable_parameters(),
        "gradients": prepared.gradients,
    }


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Scores as ``results.json`` has them, without what is not known of the teacher."""
    content: dict[str, Any] = {
        "against": evaluation.against,
        "positions": evaluation.positions,
        "kl_over": evaluation.kl_over,
    }
    if (entropy := evaluation.teacher) is not None:
        known = {"cross_entropy": entropy, "perplexity": perplexity(entropy)}
        content["teacher"] = known | {"approximate": evaluation.approximate}
    for name, score in evaluation.models.items():
        content[name] = asdict(score) | {"perplexity": score.perplexity}
    return content
