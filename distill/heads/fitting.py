"""Calibration of the verification head, and the scores of both heads.

What is fitted after training comes from data that training has not seen, scores from other data
again: validation sequences are split into two halves, safety prompts by scenario
(``distill.heads.safety_fitting``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.heads.gguf_heads import chances_of
from distill.heads.prompt_set import PromptSet
from distill.heads.safety_data import SafetyData
from distill.heads.safety_fitting import MIN_CALIBRATED, SafetyFit
from distill.metrics.calibration import fit_platt
from distill.metrics.safety import SafetyScore, first_ratios, score_decisions
from distill.metrics.verification import VerificationScore, fit_trust, score_verification
from students.model.heads import Heads, certainty
from students.model.interface import Student
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.store import SoftTargetStore

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
def calibrate(student: Student, store: SoftTargetStore, sequences: Sequence[int]) -> None:
    """Fit the verification head's probabilities to data that training has not seen (scaled and
    shifted, Platt 1999, within its own weights), and choose its threshold, in place."""
    student.eval()
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
        chances, labels = chances_of(exported, heads, data.test.tokens), decisions(data.test)
        taken = heads.decide(chances)
        safety = score_decisions(chances, labels, taken)
        languages_of = [prompt.language for prompt in data.test.prompts]
        for language in sorted(set(languages_of) - {""}):
            rows = torch.tensor([name == language for name in languages_of])
            languages[language] = score_decisions(chances[rows], labels[rows], taken[rows])
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
        parts.append(", ".join(f"{one.name} {_percent(one.value)}" for one in first_ratios(safety)))
    if (verification := scores.verification) is not None:
        auroc = "not known" if verification.auroc is None else f"{verification.auroc:.3f}"
        parts.append(
            f"verification AUROC {auroc}, calibration error {verification.calibration_error:.3f}"
        )
    return "; ".join(parts)


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{value:.1%}"


def heads_results(
    scores: HeadScores, heads: Heads, data: SafetyData | None, fitted: SafetyFit | None
) -> dict[str, Any]:
    """What ``results.json`` says about the heads."""
    content: dict[str, Any] = {}
    if fitted is not None and fitted.left_out:
        content["safety_left_out"] = fitted.left_out
    if scores.safety is not None and data is not None and fitted is not None:
        parts = {"train": data.train, "validation": data.validation, "test": data.test}
        content["safety"] = {
            "labels_from": data.source,
            "prompts_sha256": data.sha256,
            "prompts": {name: len(part) for name, part in parts.items()},
            "scenarios": {
                name: len({p.scenario for p in part.prompts}) for name, part in parts.items()
            },
            "costs": [list(row) for row in heads.costs],
            "cross_validation": fitted.cross_validation.to_json(),
            "test": scores.safety.to_json(),
            "languages": {name: score.to_json() for name, score in scores.languages.items()},
        }
    if scores.verification is not None:
        content["verification"] = {"trust": heads.trust, **scores.verification.to_json()}
    return content


def decisions(prompts: PromptSet) -> Tensor:
    """The most probable label of each prompt, ``[N]``."""
    return torch.from_numpy(prompts.labels).argmax(dim=-1)


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
