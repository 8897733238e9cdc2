"""Calibration and scores of the safety and the verification head.

Calibration and thresholds come from data that training has not seen, scores from other data again:
safety prompts are split by scenario, validation sequences into two halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.heads.prompt_set import PromptSet
from distill.heads.safety_data import SafetyData
from distill.metrics.calibration import fit_platt
from distill.metrics.safety import SafetyScore, fit_temperature, fit_thresholds, score_decisions
from distill.metrics.verification import VerificationScore, fit_trust, score_verification
from students.model.heads import Heads, certainty
from students.model.interface import Student
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.store import SoftTargetStore

MIN_CALIBRATED = 64  # fewer positions or prompts would make a calibration worse
LOGITS_BYTES = 128 << 20  # of logits held at once, where top tokens are compared


@dataclass(frozen=True)
class HeadScores:
    """Scores of the exported file's heads; ``None`` for a head that it does not have.

    ``languages``: the safety score of each language of the test prompts.
    """

    safety: SafetyScore | None
    languages: dict[str, SafetyScore]
    verification: VerificationScore | None


def halves(held_out: Sequence[int]) -> tuple[list[int], list[int]]:
    """Validation sequences for calibration, and those for the score (a single one serves both)."""
    return list(held_out[::2]), list(held_out[1::2] or held_out)


@torch.no_grad()
def calibrate(
    student: Student, data: SafetyData | None, store: SoftTargetStore, sequences: Sequence[int]
) -> None:
    """Fit the heads' probabilities to data that training has not seen, and choose their
    thresholds, in place.

    The safety head is divided by a temperature (Guo et al. 2017), the verification head scaled and
    shifted (Platt 1999), both within their own weights.
    """
    student.eval()
    if student.config.safety_head and data is not None:
        labels = decisions(data.validation)
        logits = student.safety_head(_last_states(student, data.validation)).cpu()
        if len(labels) >= MIN_CALIBRATED:
            temperature = fit_temperature(logits, labels)
            for parameter in student.safety_head.parameters():
                parameter.div_(temperature)
            logits = logits / temperature
        student.config.decision_thresholds = list(fit_thresholds(logits.softmax(dim=-1), labels))
    if student.config.verification_head:
        log_odds, agreed = _verified(student, store, sequences)
        if len(agreed) >= MIN_CALIBRATED:
            scale, offset = fit_platt(log_odds, agreed)
            output = student.verification_head.output
            output.weight.mul_(scale)
            output.bias.mul_(scale).add_(offset)
            student.verification_head.certainty.mul_(scale)
            log_odds = scale * log_odds + offset
        student.config.trust = fit_trust(log_odds.sigmoid(), agreed)


def score_heads(
    exported: GGUFTeacher,
    heads: Heads,
    data: SafetyData | None,
    store: SoftTargetStore,
    sequences: Sequence[int],
) -> HeadScores:
    """Score the heads on the exported file's own hidden states and top tokens, through
    llama.cpp."""
    safety, languages, verification = None, {}, None
    if heads.safety is not None and data is not None:
        states = torch.from_numpy(exported.last_states(data.test.tokens))
        chances, labels = heads.probabilities(states), decisions(data.test)
        safety = score_decisions(chances, labels, heads.thresholds)
        languages_of = [prompt.language for prompt in data.test.prompts]
        for language in sorted(set(languages_of) - {""}):
            rows = torch.tensor([name == language for name in languages_of])
            languages[language] = score_decisions(chances[rows], labels[rows], heads.thresholds)
    if heads.verification is not None:
        certain, agreed = [], []
        logits_bytes = 4 * exported.info.vocab_size * int(store.lengths().max())
        together = max(1, LOGITS_BYTES // logits_bytes)
        for start in range(0, len(sequences), together):
            some = sequences[start : start + together]
            tokens = [store.tokens(index) for index in some]
            states = torch.from_numpy(exported.states(tokens, exact=True)["final"])
            logits = torch.from_numpy(exported.logits(tokens, exact=True))
            kept = torch.cat([torch.from_numpy(store.keep(index)) for index in some])
            certain.append(heads.agreement(states[kept], logits[kept]))
            best = torch.cat([store.targets(index).best() for index in some])
            agreed.append(logits[kept].argmax(dim=-1) == best)
        verification = score_verification(torch.cat(certain), torch.cat(agreed), heads.trust)
    return HeadScores(safety, languages, verification)


def describe_scores(scores: HeadScores) -> str:
    """One line about both heads."""
    parts = []
    if (safety := scores.safety) is not None:
        parts.append(
            f"Refuse Recall {_percent(safety.refuse_recall)}, Escalate Precision "
            f"{_percent(safety.escalate_precision)}, Allow Precision "
            f"{_percent(safety.allow_precision)}"
        )
    if (verification := scores.verification) is not None:
        auroc = "not known" if verification.auroc is None else f"{verification.auroc:.3f}"
        parts.append(
            f"verification AUROC {auroc}, calibration error {verification.calibration_error:.3f}"
        )
    return "; ".join(parts)


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{value:.1%}"


def heads_results(scores: HeadScores, heads: Heads, data: SafetyData | None) -> dict[str, Any]:
    """What ``results.json`` says about the heads."""
    content: dict[str, Any] = {}
    if scores.safety is not None and data is not None:
        parts = {"train": data.train, "validation": data.validation, "test": data.test}
        content["safety"] = {
            "labels_from": data.source,
            "prompts_sha256": data.sha256,
            "prompts": {name: len(part) for name, part in parts.items()},
            "scenarios": {
                name: len({p.scenario for p in part.prompts}) for name, part in parts.items()
            },
            "thresholds": {"refuse": heads.thresholds[0], "allow": heads.thresholds[1]},
            "test": scores.safety.to_json(),
            "languages": {name: score.to_json() for name, score in scores.languages.items()},
        }
    if scores.verification is not None:
        content["verification"] = {"trust": heads.trust, **scores.verification.to_json()}
    return content


def decisions(prompts: PromptSet) -> Tensor:
    """The most probable label of each prompt, ``[N]``."""
    return torch.from_numpy(prompts.labels).argmax(dim=-1)


def _last_states(student: Student, prompts: PromptSet) -> Tensor:
    """The final hidden state of each prompt's last token, ``[N, D]``."""
    rows = []
    for tokens in prompts.tokens:
        ids = torch.from_numpy(tokens.astype(np.int64))[None].to(student.device)
        rows.append(student(ids, with_logits=False).last_hidden_state[0, -1])
    return torch.stack(rows)


def _verified(
    student: Student, store: SoftTargetStore, sequences: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Log-odds of the verification head, and whether the top tokens do agree, at all kept
    positions, ``[N]`` each."""
    log_odds, agreed = [], []
    for index in sequences:
        ids = torch.from_numpy(store.tokens(index)[:-1].astype(np.int64))[None].to(student.device)
        output, kept = student(ids), torch.from_numpy(store.keep(index))
        logits, states = output.logits[0][kept], output.last_hidden_state[0][kept]
        log_odds.append(student.verification_head(states, certainty(logits)).cpu())
        agreed.append(logits.argmax(dim=-1).cpu() == store.targets(index).best())
    return torch.cat(log_odds), torch.cat(agreed)
