"""The prompts that a run's safety head learns from, with their labels, as tokens."""

from __future__ import annotations

from dataclasses import dataclass

from distill.capture.temporary_files.tokenizer_only import metadata_entries, tokenizer_alone
from distill.config.schema import RunConfig
from distill.errors import UserError
from distill.heads.prompt_set import PromptSet
from distill.heads.prompts import (
    TEACHER,
    SafetyPrompt,
    digest,
    prompt_tokens,
    require_examples,
    split_by_scenario,
)
from distill.heads.teacher_labels import find_judgment, keep_judgment
from distill.runtime.progress import Console
from teachers.base import Teacher, TeacherInfo
from teachers.gguf.file import Field
from teachers.store.store import SoftTargetStore
from teachers.tokenizer.chat_template import ChatTemplateError


@dataclass(frozen=True)
class SafetyData:
    """The tokenized prompts of a run by part of the split; ``source``: of their labels."""

    source: str
    sha256: str
    train: PromptSet
    validation: PromptSet
    test: PromptSet


def labelled_prompts(
    config: RunConfig,
    prompts: list[SafetyPrompt] | None,
    teacher: Teacher | None,
    store: SoftTargetStore,
    console: Console,
) -> list[SafetyPrompt] | None:
    """The prompts with their labels; the teacher's from the store, or asked for now.

    Raises:
        UserError: the teacher's labels are wanted, but neither the store has them nor is the
            teacher open.
    """
    if prompts is None or config.safety.labels != TEACHER:
        return prompts
    if teacher is not None:
        return keep_judgment(teacher, prompts, store, console)
    kept = find_judgment(prompts, store)
    if kept is None:
        raise UserError(
            f"safety.labels = teacher: store {store.folder} does not hold its judgment of these "
            "prompts; run `distill capture` with the same safety settings where the teacher is"
        )
    require_examples(kept, "as the teacher judges them")
    return kept


def safety_data(
    config: RunConfig,
    prompts: list[SafetyPrompt] | None,
    tokenizer: dict[str, Field],
    info: TeacherInfo,
) -> SafetyData | None:
    """The prompts as the student will read them.

    Raises:
        UserError: one is longer than the student's context, or there are too few scenarios.
        ChatTemplateError: the teacher's chat template does not render.
    """
    if prompts is None:
        return None
    parts = split_by_scenario(prompts)
    if not all(parts.values()):
        count = len({prompt.scenario for prompt in prompts})
        raise UserError(
            f"safety.prompts = {config.safety.prompts!r}: prompts of {count} scenarios cannot be "
            "divided into a part to train on, one to fit thresholds and one to measure; give at "
            "least five"
        )
    context, seed = info.context_length, config.seed
    with tokenizer_alone(metadata_entries(tokenizer), info.vocab_size, info.name) as reader:
        try:
            sets = {
                part: PromptSet(some, prompt_tokens(reader, some, context), seed)
                for part, some in parts.items()
            }
        except (ChatTemplateError, UserError) as error:
            message = f"{error}; or do without a safety head (--safety-labels none)"
            raise type(error)(message) from None
    return SafetyData(config.safety.labels, digest(prompts), **sets)
