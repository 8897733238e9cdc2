"""The share of prompts with known answers that a model answers right at temperature 0.

Private reasoning is removed from answers first (``distill.inference.reasoning``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from distill.errors import UserError
from distill.evaluation.inputs.task_file import Task
from distill.evaluation.records import TaskScore
from distill.inference.reasoning import ends_inside, holds_tags, visible
from distill.metrics.intervals import Figure, wilson
from teachers.base import GenerationRequest, Sampling, Tokens
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.conversation import opening_segments, request_tokens

MARGIN = 64  # tokens that an answer may have beyond the longest right one
REASONING_TOKENS = 1024  # besides, for a model whose chat template knows reasoning
TOGETHER = 64  # prompts answered together


def score_task(
    model: GGUFTeacher,
    tasks: Sequence[Task],
    name: str,
    progress: Callable[[float], None] = lambda done: None,
) -> TaskScore:
    """The share of ``tasks`` (≥ 1) answered right; ``progress`` counts answers."""
    answers, inside = answer_tasks(model, tasks, progress), _begins_inside(model)
    right = sum(
        task.is_right(visible(answer, inside=inside))
        for task, answer in zip(tasks, answers, strict=True)
    )
    return TaskScore(
        name, right, len(tasks), Figure(right / len(tasks), *wilson(right, len(tasks)))
    )


def answer_tasks(
    model: GGUFTeacher, tasks: Sequence[Task], progress: Callable[[float], None] = lambda done: None
) -> list[str]:
    """Greedy answers through the chat template, with their reasoning.

    Raises:
        UserError: a prompt leaves no room for its answer.
        ChatTemplateError: the model's chat template does not render.
    """
    prompts = request_tokens(model, [task.prompt for task in tasks])
    wanted = _wanted_tokens(model, tasks)
    for task, prompt, tokens in zip(tasks, prompts, wanted, strict=True):
        _require_room(model, task, len(prompt), tokens)
    limit = max(wanted) + MARGIN
    if holds_tags(model.info.chat_template or ""):
        limit += REASONING_TOKENS
    order = sorted(range(len(tasks)), key=lambda index: len(prompts[index]))  # batches by length
    answers = [""] * len(tasks)
    for start in range(0, len(order), TOGETHER):
        batch = order[start : start + TOGETHER]
        some = [prompts[index] for index in batch]
        written = speak_on(model, some, limit, partial(_report, progress, start))
        for index, text in zip(batch, model.detokenize(written), strict=True):
            answers[index] = text
    return answers


def _report(progress: Callable[[float], None], before: int, done: float) -> None:
    progress(before + done)


def speak_on(
    model: GGUFTeacher,
    prompts: Sequence[Tokens],
    limit: int,
    progress: Callable[[float], None] = lambda done: None,
) -> list[Tokens]:
    """What the model writes behind each prompt at temperature 0: at most ``limit`` tokens and what
    its context holds, without the token that ends its turn."""
    context = model.info.context_length
    longest = min(context, max(map(len, prompts)) + limit)
    rows = model.generate(
        GenerationRequest([[prompt] for prompt in prompts], Sampling(0.0, max_length=longest)),
        progress,
    )
    # A shorter prompt has more room in the batch; what a model writes must not depend on that.
    written = [
        tokens[len(prompt) : len(prompt) + limit]
        for tokens, prompt in zip(rows, prompts, strict=True)
    ]
    ends = model.info.end_tokens
    return [
        tokens[:-1] if len(tokens) and int(tokens[-1]) in ends else tokens for tokens in written
    ]


def _begins_inside(model: GGUFTeacher) -> bool:
    """Whether the model's chat template opens the reasoning that an answer begins with."""
    around = opening_segments(model)
    return around is not None and len(around) == 2 and ends_inside(model.detokenize([around[1]])[0])


def _wanted_tokens(model: GGUFTeacher, tasks: Sequence[Task]) -> list[int]:
    """How many tokens the longest right answer of each task has."""
    flat = [answer for task in tasks for answer in task.answers]
    counts = iter(
        [len(tokens) for tokens in model.tokenize(flat, add_special=False, parse_special=False)]
    )
    return [max(next(counts) for _ in task.answers) for task in tasks]


def _require_room(model: GGUFTeacher, task: Task, prompt: int, answer: int) -> None:
    context = model.info.context_length
    if prompt + answer > context:
        start = task.prompt if len(task.prompt) <= 40 else task.prompt[:40] + "…"
        raise UserError(
            f"task prompt {start!r} ({task.where}) has {prompt} tokens and its answer "
            f"{answer}; the context of {model.file.path} is {context}: leave it out"
        )
