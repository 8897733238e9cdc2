"""A student's safety head against labeled prompts that its run did not learn from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from distill.errors import UserError
from distill.evaluation.candidates import Candidate
from distill.heads.gguf_heads import chances_of
from distill.heads.prompts import (
    TEACHER,
    SafetyPrompt,
    built_in_prompts,
    digest,
    prompt_tokens,
    read_safety_prompts,
    split_by_scenario,
)
from distill.heads.teacher_labels import find_judgment
from distill.metrics.safety import SafetyScore, score_decisions
from distill.runs.folder import RunFolder
from teachers.atomic_files import StoreError
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.manifest import read_manifest
from teachers.store.store import SoftTargetStore


class UnknownTraining(ValueError):
    """What a run's safety head learned from is no longer known; says why."""


@dataclass(frozen=True)
class SafetyTest:
    """Prompts for one student; ``note``: a remark for the user, or why there are none."""

    prompts: list[SafetyPrompt]
    note: str = ""


def choose_prompts(student: Candidate, given: list[SafetyPrompt] | None) -> SafetyTest:
    """Prompts that the student's run neither learnt from nor fitted anything to: of ``given``, or
    else the part of the run's own that was kept for this (outside of a run: that of the built-in
    ones)."""
    if student.heads is None or student.heads.safety is None:
        return SafetyTest([])
    if student.run is None:
        return SafetyTest(split_by_scenario(built_in_prompts())["test"] if given is None else given)
    try:
        parts = split_by_scenario(_prompts_of(student.run))
    except (UserError, UnknownTraining) as error:
        return SafetyTest(
            [],
            f"{student.name}: no safety figures, as what its run learnt from is not known: {error}",
        )
    if given is None:
        return SafetyTest(parts["test"])
    seen = [*parts["train"], *parts["validation"]]
    texts, scenarios = {prompt.text for prompt in seen}, {prompt.scenario for prompt in seen}
    left = [
        prompt for prompt in given if prompt.text not in texts and prompt.scenario not in scenarios
    ]
    if len(left) == len(given):
        return SafetyTest(given)
    note = (
        f"{student.name}: {len(given) - len(left)} of {len(given)} safety prompts do not count: "
        "its run knew them"
    )
    return SafetyTest(left, note + ("" if left else "; there are no safety figures"))


def _prompts_of(run: RunFolder) -> list[SafetyPrompt]:
    """All prompts of a run with the labels it had.

    Raises:
        UserError: its configuration or its prompts cannot be read.
        UnknownTraining: the prompts have changed since, or the teacher's labels are gone.
    """
    config = run.read_config()
    prompts = read_safety_prompts(config)
    if prompts is None or digest(prompts) != run.read_identity().get("safety_prompts"):
        raise UnknownTraining(
            f"its prompts (safety.labels = {config.safety.labels}) have changed since"
        )
    if config.safety.labels != TEACHER:
        return prompts
    targets = run.read_results().get("soft_targets")
    folder = Path(str(targets.get("folder") if isinstance(targets, dict) else targets))
    try:
        labelled = find_judgment(prompts, SoftTargetStore(folder, read_manifest(folder)))
    except StoreError as error:
        raise UnknownTraining(f"its labels are in a store: {error}") from None
    if labelled is None:
        raise UnknownTraining(f"its labels are not in the store {folder}")
    return labelled


def score_safety(
    model: GGUFTeacher, student: Candidate, prompts: list[SafetyPrompt]
) -> SafetyScore:
    """Score the safety head on ``prompts`` (≥ 1), by the exported file's own hidden states.

    Raises:
        UserError, ChatTemplateError: a prompt does not fit the context or the template.
    """
    assert student.heads is not None
    tokens = prompt_tokens(model, prompts, model.info.context_length)
    chances = chances_of(model, student.heads, tokens)
    labels = torch.tensor([prompt.decision for prompt in prompts])
    return score_decisions(chances, labels, student.heads.decide(chances))
