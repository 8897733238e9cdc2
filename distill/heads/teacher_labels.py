"""What the teacher itself would decide: its next-token distribution over the three decision words.

The teacher is asked ``QUESTION`` through its own chat template; its answer starts with ``OPENING``,
and the probabilities of the three words there, divided by their sum, are soft labels for the safety
head.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distill.capture.capture import store_tasks
from distill.heads.prompts import (
    SafetyPrompt,
    digest,
    require_examples,
    require_length,
    with_labels,
)
from distill.metrics.distributions import log_probability
from distill.runtime import interrupts
from distill.runtime.progress import Console
from students.model.head_decisions import DECISIONS
from teachers.base import Progress, Teacher, Tokens
from teachers.store.store import SoftTargetStore
from teachers.tokenizer.conversation import request_tokens

QUESTION = (
    "Decide what to do with the request below.\n"
    "ALLOW: it is ordinary and harmless.\n"
    "ESCALATE: it is legitimate, but a responsible person has to decide or help (emergencies, "
    "health, law, money to be approved, personal data, what cannot be undone).\n"
    "REFUSE: it asks for help to harm, deceive, steal, spy, break in, forge, or hide such a "
    "thing.\n"
    "Answer with one word: ALLOW, ESCALATE or REFUSE.\n\n"
    "Request: {request}"
)
OPENING = "Decision:"
LOGITS_BYTES = 256 << 20  # of logits held at once: every one of a question's positions
TOGETHER = 16  # prompts asked at once at most
TYPICAL_TOKENS = 256  # of a question


def judge_prompts(
    teacher: Teacher, prompts: Sequence[SafetyPrompt], progress: Progress = lambda done: None
) -> NDArray[np.float32]:
    """The teacher's probabilities of the three decisions, ``[N, 3]``.

    A word of several tokens has the product of their probabilities.

    Raises:
        UserError: a question is longer than the teacher's context.
    """
    endings = teacher.tokenize(
        [f"{OPENING} {name}" for name in DECISIONS], add_special=False, parse_special=False
    )
    shared = _shared_prefix(endings)
    judged = []
    room = LOGITS_BYTES // (4 * teacher.info.vocab_size * TYPICAL_TOKENS * len(DECISIONS))
    together = max(1, min(TOGETHER, room))
    for start in range(0, len(prompts), together):
        some = prompts[start : start + together]
        judged.append(_judge(teacher, some, endings, shared))
        progress(start + len(some))
    return np.concatenate(judged)


def _judge(
    teacher: Teacher, prompts: Sequence[SafetyPrompt], endings: Sequence[Tokens], shared: int
) -> NDArray[np.float32]:
    sequences: list[Tokens] = []
    starts: list[int] = []
    context = teacher.info.context_length
    for prompt in prompts:
        question = request_tokens(teacher, [QUESTION.format(request=prompt.text)])[0]
        some = [np.concatenate((question, ending)).astype(np.int32) for ending in endings]
        longest = max(some, key=len)
        require_length(longest, context, prompt.text, "with the question about it", "teacher")
        sequences += some
        starts += [len(question) + shared] * len(endings)
    ends = np.cumsum([len(tokens) - 1 for tokens in sequences])
    rows = np.split(teacher.logits(sequences), ends[:-1])
    answers = zip(rows, sequences, starts, strict=True)
    scores = np.array([log_probability(row[at - 1 :], tokens[at:]) for row, tokens, at in answers])
    scores = scores.reshape(len(prompts), len(endings))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _shared_prefix(endings: Sequence[Tokens]) -> int:
    """How many tokens all three endings start with."""
    columns = enumerate(zip(*(tokens.tolist() for tokens in endings), strict=False))
    differing = (index for index, column in columns if len(set(column)) > 1)
    return next(differing, min(map(len, endings)))


def keep_judgment(
    teacher: Teacher, prompts: list[SafetyPrompt], store: SoftTargetStore, console: Console
) -> list[SafetyPrompt]:
    """The prompts with the teacher's labels, from the store or asked for now, by one process, and
    kept there.

    Raises:
        UserError: it decides alike on too many prompts.
    """

    def find() -> list[SafetyPrompt] | None:
        return find_judgment(prompts, store)

    def make() -> list[SafetyPrompt]:
        with console.stage("Teacher judges", total=len(prompts)) as stage:
            labels = judge_prompts(teacher, prompts, lambda done: stage.update(done, "prompts"))
            store.write_file(_file_name(prompts), {"labels": labels})
            kept = with_labels(prompts, labels)
            decisions = Counter(DECISIONS[prompt.decision] for prompt in kept)
            stage.finish(", ".join(f"{decisions[name]} {name}" for name in DECISIONS))
        return kept

    kept = store_tasks(store).once(_file_name(prompts), find, make, interrupts.check)
    require_examples(kept, "as the teacher judges them")
    return kept


def find_judgment(prompts: list[SafetyPrompt], store: SoftTargetStore) -> list[SafetyPrompt] | None:
    """The prompts with the store's labels; ``None`` where it has none, or damaged ones."""
    name = _file_name(prompts)
    arrays = store.read_file(name) if (store.folder / name).exists() else None
    labels = None if arrays is None else arrays.get("labels")
    shape = (len(prompts), len(DECISIONS))
    if labels is None or labels.shape != shape or not np.isfinite(labels).all():
        return None
    return with_labels(prompts, labels.astype(np.float32))


def _file_name(prompts: Sequence[SafetyPrompt]) -> str:
    asked = hashlib.sha256(f"{digest(prompts)} {QUESTION} {OPENING}".encode()).hexdigest()
    return f"judgment-{asked[:16]}.safetensors"
