"""Benchmarks of lm-evaluation-harness (the package ``lm_eval``, optional) on a GGUF file.

The model gets what the harness's own models get: plain text without a chat template, context and
continuation tokenized together, truncated on the left. So the results compare with those of other
models. Written for ``lm_eval`` 0.4 (``LM``, ``simple_evaluate``), tried with 0.4.13.

The harness downloads its tasks' data sets only with ``HF_HUB_OFFLINE=0``: this program uses no
network by itself. A task may also be a YAML file, which may name Python functions beside it: such a
file is a program, so give only your own.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distill.errors import UserError
from distill.evaluation.inputs.check import require_harness
from distill.metrics.distributions import log_probability
from teachers.base import GenerationRequest, Sampling, Tokens, budget_slices
from teachers.llama_cpp.teacher import GGUFTeacher

MAX_WINDOW = 4096  # tokens looked at together at most: all their logits are held at once
LOGITS_BYTES = 256 << 20  # of logits held at once, unless one sequence alone has more
NEW_TOKENS = 256  # the harness's own default
FIRST_PIECE = 32  # tokens generated before the first look for stop texts; doubled each time
TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def require_tasks(tasks: Sequence[str]) -> Any:
    """The harness's task manager, once it has loaded these tasks and their data.

    Raises:
        UserError: the harness is missing or too old, or a task cannot be used.
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
            loaded = manager.load([task])["tasks"]
        except Exception as error:  # of any kind: a foreign program reads files or asks a server
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"lm-evaluation-harness cannot load task {task!r} ({reason}); leave it out, or set "
                "HF_HUB_OFFLINE=0 to let it download"
            ) from None
        if any(getattr(one, "UNSAFE_CODE", False) for one in loaded.values()):
            raise UserError(
                f"task {task!r} would run what a model writes as a program, which is not done here"
            )
    return manager


def run_harness(
    model: GGUFTeacher, tasks: list[str], limit: int | None
) -> dict[str, dict[str, float]]:
    """Values by task (or group) and metric, of at most ``limit`` examples of each task.

    Metrics have the harness's names: ``acc``, ``acc_stderr``, …; behind a comma the filter, unless
    it is ``none``. Numbers that are not finite are left out. Raises as ``require_tasks``.
    """
    manager = require_tasks(tasks)
    result = importlib.import_module("lm_eval").simple_evaluate(
        model=adapter(model), tasks=tasks, limit=limit, task_manager=manager, log_samples=False
    )
    values = {**result["results"], **result.get("groups", {})}
    return {str(task): _metrics(metrics) for task, metrics in values.items()}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of one task; ``acc,none`` becomes ``acc``."""
    metrics = {}
    for key, value in values.items():
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
            return score_pairs(model, [encode_pair(model, *request.args) for request in requests])

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
            return score_texts(model, [request.args[0] for request in requests])

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            return generate(model, [request.args for request in requests])

    return GGUFLanguageModel()


# -- log-likelihoods ------------------------------------------------------------------------------


def window(model: GGUFTeacher) -> int:
    """How many tokens the model may see together."""
    return min(model.info.context_length, MAX_WINDOW)


def encode(model: GGUFTeacher, texts: Sequence[str]) -> list[Tokens]:
    """Tokens behind BOS where the model wants one; control tokens in the texts are parsed."""
    rows = model.tokenize(texts, add_special=False, parse_special=True)
    bos = model.info.bos
    if bos is None or not model.info.add_bos:
        return rows
    begin = np.array([bos], dtype=np.int32)
    return [row if len(row) and row[0] == bos else np.concatenate((begin, row)) for row in rows]


def encode_pair(model: GGUFTeacher, context: str, continuation: str) -> tuple[Tokens, Tokens]:
    """Tokenize context and continuation together; the continuation is what follows the context.

    As ``TemplateLM`` of the harness does it, spaces at the context's end belong to the
    continuation, and without a context it follows the model's first token. Where one token spans
    the border so that nothing would be left, that token is the continuation.
    """
    bare = context.rstrip()
    rest = context[len(bare) :] + continuation
    if not bare:
        tokens = model.tokenize([rest], add_special=False, parse_special=True)[0]
        first = first_token(model)
        if len(tokens) and tokens[0] == first:
            return tokens[:1], tokens[1:]
        return np.array([first], dtype=np.int32), tokens
    before, whole = encode(model, [bare, bare + rest])
    border = min(len(before), len(whole) - 1) if rest else len(whole)
    if not border:
        return np.array([first_token(model)], dtype=np.int32), whole
    return whole[:border], whole[border:]


def first_token(model: GGUFTeacher) -> int:
    """BOS, else EOS, before a text without context; raises ``UserError`` if it has neither."""
    first = model.info.bos if model.info.bos is not None else model.info.eos
    if first is None:
        raise UserError(
            f"{model.file.path} has neither BOS nor EOS, so no text can be scored from its "
            "beginning"
        )
    return first


def score_pairs(
    model: GGUFTeacher, pairs: Sequence[tuple[Tokens, Tokens]]
) -> list[tuple[float, bool]]:
    """log p(continuation | context) of each pair in nats, and whether it is the greedy one.

    A context that is too long loses its beginning.

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
    scored = []
    room = LOGITS_BYTES // (4 * model.info.vocab_size)
    for part in budget_slices([len(tokens) for tokens in sequences], room):
        some = sequences[part]
        rows = np.split(model.logits(some), np.cumsum([len(tokens) - 1 for tokens in some])[:-1])
        for logits, tokens, count in zip(rows, some, counts[part], strict=True):
            answers, labels = logits[len(logits) - count :], tokens[len(tokens) - count :]
            greedy = bool((answers.argmax(axis=1) == labels).all())
            scored.append((log_probability(answers, labels), greedy))
    return scored


def score_texts(model: GGUFTeacher, texts: Sequence[str]) -> list[float]:
    """log p of whole texts in nats, each token predicted once, long texts in ``windows``.

    BOS precedes the first token and is not predicted. The harness's own ``transformers`` models
    (0.4.13) predict a second BOS unless they get ``add_bos_token=False``.
    """
    pairs, owners = [], []
    for index, tokens in enumerate(encode(model, texts)):
        if len(tokens) and model.info.add_bos and tokens[0] == model.info.bos:
            tokens = tokens[1:]  # it is the text's prefix, and not predicted itself
        some = windows(tokens, first_token(model), window(model))
        pairs += some
        owners += [index] * len(some)
    sums = [0.0] * len(texts)
    for owner, (log_prob, _) in zip(owners, score_pairs(model, pairs), strict=True):
        sums[owner] += log_prob
    return sums


def windows(tokens: Tokens, prefix: int, length: int) -> list[tuple[Tokens, Tokens]]:
    """Pairs of context and the tokens predicted behind it; the model sees at most ``length``.

    The harness's ``get_rolling_token_windows`` with a context of one token, disjoint: the first
    ``length`` tokens follow ``prefix``, later windows have as much context as is left.
    """
    whole = np.concatenate(([prefix], tokens)).astype(np.int32)
    pairs = []
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        pairs.append((whole[max(0, stop - length) : start + 1], whole[start + 1 : stop + 1]))
    return pairs


# -- generation -----------------------------------------------------------------------------------


@dataclass
class Generation:
    """A text in progress: its prompt, all tokens so far, how many are allowed, and stop texts."""

    prompt: Tokens
    tokens: Tokens
    limit: int
    stops: list[str]
    text: str | None = None  # once it is finished


def generate(model: GGUFTeacher, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Generate behind each context, up to the first stop text of its settings' ``until``.

    Greedy unless the settings have a temperature; at most ``max_gen_toks`` tokens, and half of the
    model's window. All grow together, in ever longer pieces between which stop texts are looked
    for.
    """
    contexts = encode(model, [context for context, _ in requests])
    by_sampling: dict[tuple[float, float], list[Generation]] = {}
    generations = []
    for tokens, (_, settings) in zip(contexts, requests, strict=True):
        one = _generation(model, tokens, settings)
        generations.append(one)
        by_sampling.setdefault(_sampling(settings), []).append(one)
    for (temperature, top_p), unfinished in by_sampling.items():
        piece = FIRST_PIECE
        while unfinished:
            _extend(model, unfinished, piece, Sampling(temperature, top_p, seed=piece))
            unfinished = [one for one in unfinished if one.text is None]
            piece *= 2
    return [one.text or "" for one in generations]


def space_is_prefixed(model: GGUFTeacher) -> bool:
    """Whether detokenized text begins with a space that is not part of it (SentencePiece)."""
    file = model.file
    return (
        file.value("tokenizer.ggml.model") == "llama"
        and file.value("tokenizer.ggml.add_space_prefix") is not False
    )


def _generation(model: GGUFTeacher, tokens: Tokens, settings: dict[str, Any]) -> Generation:
    until = settings.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    limit = next(
        (int(settings[name]) for name in TOKEN_LIMITS if settings.get(name) is not None), NEW_TOKENS
    )
    limit = max(1, min(limit, window(model) // 2))
    prompt = tokens[-(window(model) - limit) :]
    if not len(prompt):
        prompt = np.array([first_token(model)], dtype=np.int32)
    return Generation(prompt, prompt, limit, stops)


def _sampling(settings: dict[str, Any]) -> tuple[float, float]:
    """Temperature and top-p of a request's settings."""
    sampled = settings.get("do_sample") is not False
    temperature = float(settings.get("temperature") or 0.0) if sampled else 0.0
    return temperature, float(settings.get("top_p") or 1.0)


def _extend(
    model: GGUFTeacher, texts: Sequence[Generation], piece: int, sampling: Sampling
) -> None:
    """Let each text grow by up to ``piece`` tokens, and finish those that have ended."""
    goals = [min(len(one.prompt) + one.limit, len(one.tokens) + piece) for one in texts]
    requests = [[one.tokens] for one in texts]
    rows = model.generate(GenerationRequest(requests, replace(sampling, max_length=max(goals))))
    for one, tokens, goal in zip(texts, rows, goals, strict=True):
        one.tokens = tokens[:goal]  # the longest of the batch sets the length of all
    ended = [int(one.tokens[-1]) in model.info.end_tokens for one in texts]
    new = [
        one.tokens[len(one.prompt) : len(one.tokens) - end]
        for one, end in zip(texts, ended, strict=True)
    ]
    spaced = space_is_prefixed(model)
    for one, end, text in zip(texts, ended, model.detokenize(new), strict=True):
        text = text.removeprefix(" ") if spaced else text
        stops = [position for stop in one.stops if (position := text.find(stop)) >= 0]
        if stops or end or len(one.tokens) == len(one.prompt) + one.limit:
            one.text = text[: min(stops, default=None)]
