"""Benchmarks of lm-evaluation-harness (the package ``lm_eval``, optional) on a GGUF file.

A model is asked as the harness asks its own: plain text without a chat template, a context and its
continuation tokenised together, what is too long cut off at the left. So the figures compare with
those that it gives for other models. Written for ``lm_eval`` 0.4 (``lm_eval.api.model.LM``,
``lm_eval.simple_evaluate``); tried with 0.4.13.

The harness brings its tasks itself and downloads their data sets, for which ``HF_HUB_OFFLINE=0``
has to be set, since this program asks the network for nothing by itself. A task may also be a YAML
file of the harness's form, which may name Python functions beside it: such a file is a program, and
only one's own should be given.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import UserError
from distill.evaluation.inputs.check import require_harness
from teachers.base import Sampling, Tokens
from teachers.llama_cpp.teacher import GGUFTeacher

MAX_WINDOW = 4096  # tokens looked at together at most: all their logits are held at once
LOGITS_BYTES = 256 << 20  # of logits held at once, unless one sequence alone has more
NEW_TOKENS = 256  # the harness's own default
FIRST_PIECE = (
    32  # tokens written before it is looked whether a stop text is there; doubled each time
)
TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Scored:
    """Log-probability of a continuation in nats, and whether greedy decoding would write just
    that."""

    log_probability: float
    greedy: bool


def require_tasks(tasks: Sequence[str]) -> Any:
    """See that the harness knows these tasks and has their data, which it downloads if need be.

    Returns:
        The harness's manager of tasks, which has them.

    Raises:
        UserError: the harness is not installed, too old, or says why a task cannot be used.
    """
    require_harness()
    manager = importlib.import_module("lm_eval.tasks").TaskManager()
    if not hasattr(manager, "load"):
        raise UserError(
            "this lm-evaluation-harness is too old; run `python -m pip install --upgrade lm_eval`"
        )
    for task in tasks:
        if not task.endswith((".yaml", ".yml")) and task not in manager.all_tasks:
            raise UserError(
                f"lm-evaluation-harness has no task {task!r}; `lm_eval ls tasks` lists them"
            )
        try:
            found = manager.load([task])["tasks"]
        except (
            Exception
        ) as error:  # of any kind: a foreign program reads a file, or asks a server for data
            words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"lm-evaluation-harness cannot load task {task!r} ({words}); leave it out, or set "
                "HF_HUB_OFFLINE=0 to "
                "let it download"
            ) from None
        if any(getattr(one, "UNSAFE_CODE", False) for one in found.values()):
            raise UserError(
                f"task {task!r} would run what a model writes as a program, which is not done here"
            )
    return manager


def run_harness(
    model: GGUFTeacher, tasks: list[str], limit: int | None
) -> dict[str, dict[str, float]]:
    """Figures by task (or group of tasks) and metric, of at most ``limit`` examples of each task.

    Metrics have the harness's names: ``acc``, ``acc_stderr``, …; one behind another filter than
    ``none`` has the filter's name behind a comma. What is not a finite number is left out.

    Raises:
        UserError: see ``require_tasks``.
    """
    manager = require_tasks(tasks)
    found = importlib.import_module("lm_eval").simple_evaluate(
        model=adapter(model), tasks=tasks, limit=limit, task_manager=manager, log_samples=False
    )
    figures = {**found["results"], **found.get("groups", {})}
    return {str(task): _metrics(metrics) for task, metrics in figures.items()}


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """The numbers of one task; ``acc,none`` is said as ``acc``."""
    metrics = {}
    for key, value in found.items():
        name, _, chain = str(key).partition(",")
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if chain and number and math.isfinite(value):
            metrics[name if chain == "none" else f"{name},{chain}"] = float(value)
    return metrics


def adapter(model: GGUFTeacher) -> Any:
    """The model as the harness's ``LM``."""
    base: Any = importlib.import_module("lm_eval.api.model").LM

    class GGUFLanguageModel(base):
        """Answers the harness's requests, whose ``args`` say what is asked."""

        def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            pairs = [encoded(model, *request.args) for request in requests]
            return [(one.log_probability, one.greedy) for one in score_pairs(model, pairs)]

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
            texts = [request.args[0] for request in requests]
            return score_texts(model, texts)

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            return generate(model, [request.args for request in requests])

    return GGUFLanguageModel()


# -- log-likelihoods ----------------------------------------------------------------------------------


def window(model: GGUFTeacher) -> int:
    """How many tokens the model may see together."""
    return min(model.info.context_length, MAX_WINDOW)


def encode(model: GGUFTeacher, texts: Sequence[str]) -> list[Tokens]:
    """Tokens of texts, behind BOS where the model wants one; control tokens spelled in them are
    read as such."""
    rows = model.tokenize(texts, add_special=False, parse_special=True)
    bos = model.info.bos
    if bos is None or not model.info.add_bos:
        return rows
    begin = np.array([bos], dtype=np.int32)
    return [row if len(row) and row[0] == bos else np.concatenate((begin, row)) for row in rows]


def encoded(model: GGUFTeacher, context: str, continuation: str) -> tuple[Tokens, Tokens]:
    """Context and continuation as tokens: both together, of which the continuation is what the
    context leaves.

    Spaces at the context's end count as the continuation's beginning. Without a context the
    continuation follows the model's first token. Where a token has grown over the border so that
    nothing is left, it is the continuation.
    """
    bare = context.rstrip()
    said = context[len(bare) :] + continuation
    if not bare:
        tokens = model.tokenize([said], add_special=False, parse_special=True)[0]
        first = first_token(model)
        if len(tokens) and tokens[0] == first:
            return tokens[:1], tokens[1:]
        return np.array([first], dtype=np.int32), tokens
    before, whole = encode(model, [bare, bare + said])
    border = min(len(before), len(whole) - 1) if said else len(whole)
    if not border:
        return np.array([first_token(model)], dtype=np.int32), whole
    return whole[:border], whole[border:]


def first_token(model: GGUFTeacher) -> int:
    """What a text without any context follows: BOS, or what else the model has to begin with.

    Raises:
        UserError: it has neither BOS nor EOS.
    """
    first = model.info.bos if model.info.bos is not None else model.info.eos
    if first is None:
        raise UserError(
            f"{model.file.path} has neither BOS nor EOS, so no text can be scored from its "
            "beginning"
        )
    return first


def score_pairs(model: GGUFTeacher, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Scored]:
    """log p(continuation | context) of each pair; a context that is too long loses its beginning.

    Raises:
        UserError: a continuation is longer than the model's context.
    """
    room = window(model)
    sequences, counts = [], []
    for context, continuation in pairs:
        if len(continuation) > room:
            raise UserError(
                f"a continuation of a benchmark has {len(continuation)} tokens; {model.file.path} "
                f"can look at {room}"
            )
        # The last token is only predicted: the model never sees it.
        sequences.append(np.concatenate((context, continuation)).astype(np.int32)[-(room + 1) :])
        counts.append(len(continuation))
    scored: list[Scored] = []
    for group in _groups([len(tokens) for tokens in sequences], model.info.vocab_size):
        some = [sequences[place] for place in group]
        rows = np.split(model.logits(some), np.cumsum([len(tokens) - 1 for tokens in some])[:-1])
        for logits, tokens, place in zip(rows, some, group, strict=True):
            count = counts[place]
            scored.append(_scored(logits[len(logits) - count :], tokens[len(tokens) - count :]))
    return scored


def _scored(logits: NDArray[np.float32], labels: Tokens) -> Scored:
    """Σ log p of ``labels [C]`` under ``logits [C, V]``; of no label 0."""
    rows = logits.astype(np.float64)
    top = rows.max(axis=1, initial=-np.inf)
    sums = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
    chosen = rows[np.arange(len(labels)), labels]
    return Scored(float((chosen - sums).sum()), bool((logits.argmax(axis=1) == labels).all()))


def _groups(lengths: Sequence[int], vocab_size: int) -> Iterator[list[int]]:
    """Places of sequences, in order, in groups whose logits fit into ``LOGITS_BYTES`` (at least
    one each)."""
    group: list[int] = []
    held = 0
    for place, length in enumerate(lengths):
        size = 4 * vocab_size * length
        if group and held + size > LOGITS_BYTES:
            yield group
            group, held = [], 0
        group.append(place)
        held += size
    if group:
        yield group


def score_texts(model: GGUFTeacher, texts: Sequence[str]) -> list[float]:
    """log p of whole texts in nats, each token predicted once, a long text in windows
    (``windows``).

    BOS is what the first token follows, and not predicted. The harness's own ``transformers``
    models (0.4.13) predict a second BOS behind the first where the tokenizer adds one, unless they
    get ``add_bos_token=False``.
    """
    pairs, owners = [], []
    for place, tokens in enumerate(encode(model, texts)):
        if len(tokens) and model.info.add_bos and tokens[0] == model.info.bos:
            tokens = tokens[1:]  # it is the text's prefix, and not predicted itself
        some = windows(tokens, first_token(model), window(model))
        pairs += some
        owners += [place] * len(some)
    sums = [0.0] * len(texts)
    for owner, one in zip(owners, score_pairs(model, pairs), strict=True):
        sums[owner] += one.log_probability
    return sums


def windows(tokens: Tokens, prefix: int, length: int) -> list[tuple[Tokens, Tokens]]:
    """A text of ``tokens [n]`` in pairs of context and what is predicted behind it; the model sees
    at most ``length``.

    The first ``length`` tokens follow ``prefix``; each later window predicts up to ``length``
    tokens behind as much context as is left, at least one token. That is the harness's rolling
    window with a context of one token.
    """
    whole = np.concatenate(([prefix], tokens)).astype(np.int32)
    pairs = []
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        pairs.append((whole[max(0, stop - length) : start + 1], whole[start + 1 : stop + 1]))
    return pairs


# -- writing ------------------------------------------------------------------------------------------


@dataclass
class Writing:
    """A text being written: its prompt, what it holds so far, the tokens it may still get, and
    what ends it."""

    prompt: Tokens
    tokens: Tokens
    limit: int
    stops: list[str]
    text: str | None = None  # once it is finished


def generate(model: GGUFTeacher, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """What the model writes behind each context, up to the first stop text of its settings'
    ``until``.

    As the harness says it: at temperature 0 unless the settings have another one; at most
    ``max_gen_toks`` tokens, but never more than half of what the model may look at. All are written
    together, in pieces that grow, because stop texts are seen only between them.
    """
    contexts = encode(model, [context for context, _ in requests])
    alike: dict[tuple[float, float], list[Writing]] = {}
    everything = []
    for tokens, (_, settings) in zip(contexts, requests, strict=True):
        one = _writing(model, tokens, settings)
        everything.append(one)
        alike.setdefault(_temperature(settings), []).append(one)
    for (temperature, top_p), writings in alike.items():
        waiting, piece = writings, FIRST_PIECE
        while waiting:
            _write(model, waiting, piece, Sampling(temperature, top_p, seed=piece))
            waiting = [one for one in waiting if one.text is None]
            piece *= 2
    return [one.text or "" for one in everything]


def writes_space_first(model: GGUFTeacher) -> bool:
    """Whether the first word of any text has a space before it that is not part of the text
    (SentencePiece)."""
    file = model.file
    return (
        file.value("tokenizer.ggml.model") == "llama"
        and file.value("tokenizer.ggml.add_space_prefix") is not False
    )


def _writing(model: GGUFTeacher, tokens: Tokens, settings: dict[str, Any]) -> Writing:
    until = settings.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    limit = next(
        (int(settings[name]) for name in TOKEN_LIMITS if settings.get(name) is not None), NEW_TOKENS
    )
    limit = max(1, min(limit, window(model) // 2))
    prompt = tokens[-(window(model) - limit) :]
    if not len(prompt):
        prompt = np.array([first_token(model)], dtype=np.int32)
    return Writing(prompt, prompt, limit, stops)


def _temperature(settings: dict[str, Any]) -> tuple[float, float]:
    """Temperature and nucleus that the settings mean."""
    temperature = (
        0.0 if settings.get("do_sample") is False else float(settings.get("temperature") or 0.0)
    )
    return temperature, float(settings.get("top_p") or 1.0)


def _write(model: GGUFTeacher, writings: Sequence[Writing], piece: int, sampling: Sampling) -> None:
    """Let each text grow by up to ``piece`` tokens, and finish those that have ended."""
    goals = [min(len(one.prompt) + one.limit, len(one.tokens) + piece) for one in writings]
    requests = [[one.tokens] for one in writings]
    said = model.speak(requests, replace(sampling, max_length=max(goals)))
    for one, tokens, goal in zip(writings, said, goals, strict=True):
        one.tokens = tokens[:goal]  # the longest of the batch sets the length of all
    ended = [int(one.tokens[-1]) in model.info.end_tokens for one in writings]
    new = [
        one.tokens[len(one.prompt) : len(one.tokens) - end]
        for one, end in zip(writings, ended, strict=True)
    ]
    spaced = writes_space_first(model)
    for one, end, text in zip(writings, ended, model.detokenize(new), strict=True):
        text = text.removeprefix(" ") if spaced else text
        found = [place for stop in one.stops if (place := text.find(stop)) >= 0]
        if found or end or len(one.tokens) == len(one.prompt) + one.limit:
            one.text = text[: min(found)] if found else text
