"""The safety head, fitted once the student is trained: a regularized logistic regression on its
states and the prompts' token runs, calibrated on authors that were left out.

N prompts, F features, B runs of tokens, C = 3 decisions (``students.model.safety_head``).

Every prompt that probabilities are fitted to and the cross-validation counts is predicted by a head
that has seen no prompt of its author (of its scene, where authors are not known): each author has
ways of putting things, and a head knows those of its own too well. The exported head has learnt
from all of them.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.heads.prompt_set import PromptSet
from distill.heads.prompts import SafetyPrompt
from distill.heads.safety_data import SafetyData
from distill.losses.batch import padded
from distill.metrics.safety import SafetyScore, fit_temperature, score_decisions
from distill.runtime.progress import Console
from students.model.head_decisions import DECISIONS
from students.model.heads import decide, rounded_runs
from students.model.interface import Student
from students.model.safety_head import SafetyHead, SafetyShape, prompt_features, token_runs

BUCKETS = 1 << 17
# Strength of the pull towards 0, of each kind's squared weights (docs/benchmarks.md has others).
RUNS_DECAY, STATES_DECAY = 0.02, 30.0
# Of L-BFGS, which has converged by then: from nothing, and from the fit without these scenes.
ITERATIONS, MORE_ITERATIONS = 60, 45
FOLDS = 5
COMMON = 8.0  # the unit of a run's rarity, which RUNS_DECAY is made for
LEAST_READ = 256  # prompts of a part, without which the cross-validation says little
READ_FLOPS = 2e12  # that reading prompts of a part may cost: more help little beside token runs
DRAWN = 11  # stream of random numbers
MIN_CALIBRATED = 64  # fewer prompts would make a calibration worse
BATCH_TOKENS = 4096  # read at once, padding included
TIMED, TIMED_FLOPS = 1024, 2e11  # prompts by which the time of all is told, or fewer of them
FITTED_PROMPT = 1.3e-3  # seconds that the regressions take for each prompt

Progress = Callable[[int], None]


@dataclass(frozen=True)
class SafetyFit:
    """A fitted head, or why there is none; ``cross_validation``: its decisions on the prompts whose
    authors or scenes were left out."""

    head: SafetyHead | None
    cross_validation: SafetyScore
    left_out: str = ""


@dataclass(frozen=True)
class Read:
    """The prompts of two parts that the student reads, by number, ascending."""

    train: list[int]
    validation: list[int]

    def __len__(self) -> int:
        return len(self.train) + len(self.validation)


@dataclass(frozen=True)
class _Examples:
    """Prompts as a head sees them: standardized ``states [R, F]`` of those that are read, which are
    the ``read [R]`` among all, ``runs [N, B]`` (sparse), ``labels [N, 3]``, and what each counts,
    ``weights [N]``."""

    states: Tensor
    read: Tensor
    runs: Tensor
    labels: Tensor
    weights: Tensor

    def logits(self, head: _Linear) -> Tensor:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sparse rows are a beta feature
            by_runs = head.bias + self.runs @ head.runs
        return by_runs.index_add(0, self.read, self.states @ head.states)


@dataclass(frozen=True)
class _Linear:
    """Weights for standardized states ``[F, 3]`` and runs ``[B, 3]``, and a bias ``[1, 3]``."""

    states: Tensor
    runs: Tensor
    bias: Tensor


def fit_safety_head(
    student: Student,
    data: SafetyData,
    progress: Progress = lambda done: None,
    read: Read | None = None,
) -> SafetyFit:
    """Fit a safety head to the student as it is; ``progress`` counts prompts read.

    ``read``: the prompts that the student reads. Of the others token runs alone are known, which
    all are fitted to; their states stand at the mean of all that are read. The probabilities and
    the cross-validation are those of prompts that are read.

    It is left out if on prompts of authors (or scenes) it had not seen its decisions cost no less
    than escalating everything.
    """
    shape = SafetyShape((student.config.num_hidden_layers // 2,), mean=True, buckets=BUCKETS)
    train, validation = data.train, data.validation
    read = read or affordable(student, data)
    first = read_prompts(student, shape, train.some(read.train), progress)
    more = read_prompts(
        student,
        shape,
        validation.some(read.validation),
        lambda done: progress(len(read.train) + done),
    )
    states = torch.cat((first, more))
    numbers = [*read.train, *(len(train) + place for place in read.validation)]
    row_of = dict(zip(numbers, range(len(numbers)), strict=True))
    found = [token_runs(tokens, BUCKETS) for tokens in (*train.tokens, *validation.tokens)]
    present, places = torch.cat(found).unique(return_inverse=True)  # the weights of others stay 0
    rows = places.split([len(row) for row in found])
    labels = torch.from_numpy(np.concatenate((train.labels, validation.labels)))
    weights = torch.tensor([one.weight for one in (*train.prompts, *validation.prompts)])
    mean, spread = _moments(states, weights[numbers])
    scale = spread.clamp_min(1e-6) * states.shape[1] ** 0.5
    states = (states - mean) / scale
    rarity = _rarity(rows)

    def examples(chosen: Sequence[int]) -> _Examples:
        runs = _sparse([rows[i] for i in chosen], rarity)
        seen = [place for place, number in enumerate(chosen) if number in row_of]
        own = states[[row_of[chosen[place]] for place in seen]]
        return _Examples(
            own, torch.tensor(seen, dtype=torch.int64), runs, labels[chosen], weights[chosen]
        )

    known = list(range(len(train)))
    start = _fit(examples(known))
    logits = torch.zeros(len(validation), len(DECISIONS))
    folds = _folds(_left_out_together(validation.prompts))
    for fold in range(FOLDS):
        out = [place for place in read.validation if folds[place] == fold]
        if out:
            others = [len(train) + place for place, own in enumerate(folds) if own != fold]
            left = examples([len(train) + place for place in out])
            logits[out] = left.logits(_fit(examples(known + others), start))
    logits = logits[read.validation]
    truth = torch.from_numpy(validation.labels[read.validation]).argmax(dim=-1)
    temperature = fit_temperature(logits, truth) if len(truth) >= MIN_CALIBRATED else 1.0
    chances = (logits / temperature).softmax(dim=-1)
    score = score_decisions(chances, truth, decide(chances))
    if reason := why_useless(score):
        return SafetyFit(None, score, reason)
    linear = _fit(examples(range(len(rows))), start)
    head = SafetyHead(student.config.hidden_size, shape)
    weight = (linear.states / scale[:, None]) / temperature
    with torch.no_grad():
        head.linear.weight.copy_(weight.T)
        head.linear.bias.copy_(linear.bias[0] / temperature - mean @ weight)
        assert head.runs is not None
        rounded, scales = rounded_runs(linear.runs * rarity[:, None] / temperature)
        head.runs[present] = rounded * scales
    return SafetyFit(head, score)


def with_safety_head(
    student: Student, data: SafetyData | None, most: int | None, console: Console
) -> SafetyFit | None:
    """Fit the safety head where there is to be one, or take it away if it is of no use; ``most``:
    see ``affordable``."""
    if data is None:
        return None
    read = affordable(student, data, most)
    with console.stage("Fit safety", total=len(read)) as stage:

        def told(done: int) -> None:
            stage.update(done, "prompts read")

        fitted = fit_safety_head(student, data, told, read)
        score = fitted.cross_validation
        stage.finish(
            f"{score.accuracy:.1%} of {score.prompts:,} prompts decided rightly, whose author or "
            "scene was left out"
        )
    student.replace_safety_head(fitted.head)
    if fitted.left_out:
        console.note(f"the student gets no safety head: {fitted.left_out}")
    return fitted


def why_useless(score: SafetyScore) -> str:
    """Why a head with this score is not worth exporting; empty if it is."""
    assert score.cost is not None and score.cost_escalating is not None
    if score.cost < score.cost_escalating:
        return ""
    return (
        f"on {score.prompts} prompts that it had not seen its decisions cost "
        f"{score.cost:.2f} each, no less than escalating everything ({score.cost_escalating:.2f})"
    )


@torch.no_grad()
def read_prompts(
    student: Student, shape: SafetyShape, prompts: PromptSet, progress: Progress
) -> Tensor:
    """The features ``[N, F]`` of all prompts, as the student reads them, on the processor."""
    student.eval()
    features: dict[int, Tensor] = {}
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts.tokens[index]))
    while len(features) < len(order):
        count = max(1, BATCH_TOKENS // len(prompts.tokens[order[len(features)]]))
        some = order[len(features) : len(features) + count]
        tokens, lengths = padded([prompts.tokens[index] for index in some])
        output = student(tokens.to(student.device), with_logits=False, layers_to_keep=shape.layers)
        kept = output.layer_states or {}
        found = [
            prompt_features(
                shape,
                output.last_hidden_state[row, :length],
                {number: states[row, :length] for number, states in kept.items()},
            )
            for row, length in enumerate(lengths.tolist())
        ]
        features |= zip(some, torch.stack(found).cpu(), strict=True)  # one copy from a GPU
        progress(len(features))
    return torch.stack([features[index] for index in range(len(prompts))])


@dataclass(frozen=True)
class FittingTime:
    """Seconds that ``fit_safety_head`` takes: ``each`` prompt to read, and ``rest``."""

    each: float
    rest: float


def fitting_time(student: Student, data: SafetyData) -> FittingTime:
    """What the fit will take, by reading a few prompts."""
    shape = SafetyShape((student.config.num_hidden_layers // 2,), mean=True, buckets=BUCKETS)
    prompts = data.train
    count = max(1, min(TIMED, int(TIMED_FLOPS / reading_flops(student, data))))
    few = prompts.some(range(0, len(prompts), -(-len(prompts) // count)))  # short and long ones
    for _ in range(2):  # the first time more has to be set up
        start = time.perf_counter()
        read_prompts(student, shape, few, lambda done: None)
        each = (time.perf_counter() - start) / sum(map(len, few.tokens))
    parts = data.train, data.validation
    count = sum(map(len, parts))
    tokens = sum(len(tokens) for part in parts for tokens in part.tokens)
    return FittingTime(each * tokens / count, FITTED_PROMPT * count)


def expected_fitting_time(counts: Sequence[int], length: float, reading: float) -> FittingTime:
    """The same before there is a student: of parts with so many prompts of ``length`` tokens, and
    ``reading`` seconds of a token."""
    return FittingTime(length * reading, FITTED_PROMPT * sum(counts))


def prompts_within(
    seconds: float, time: FittingTime, counts: Sequence[int], flops: float
) -> int | None:
    """How many prompts of each part a student may read for the fit to take ``seconds``, of which
    reading gets half at least; ``None``: as many as it reads without a limit (``flops``: of one).
    """
    allowed = max(seconds - time.rest, seconds / 2)
    if time.each * sum(readable(counts, flops, None)) <= allowed:
        return None
    return max(LEAST_READ, int(allowed / time.each / len(counts)))


def fitting_within(
    seconds: float, time: FittingTime, counts: Sequence[int], flops: float, most: int | None
) -> tuple[int | None, float]:
    """How many prompts of each part to read, ``most`` where that is given, and how long the fit
    then takes; the rest as in ``prompts_within``."""
    if most is None:
        most = prompts_within(seconds, time, counts, flops)
    return most, time.rest + time.each * sum(readable(counts, flops, most))


def readable(counts: Sequence[int], flops: float, most: int | None) -> list[int]:
    """How many prompts of each part are read: ``most`` of so many, or what does not take too long;
    ``flops``: of one."""
    enough = max(LEAST_READ, int(READ_FLOPS / flops)) if most is None else most
    return [min(count, enough) for count in counts]


def affordable(student: Student, data: SafetyData, most: int | None = None) -> Read:
    """The prompts to read, drawn from all; ``most``: of each part."""
    parts = (data.train, data.validation)
    counts = readable([len(part) for part in parts], reading_flops(student, data), most)
    return Read(*(_drawn(*both) for both in zip(parts, counts, strict=True)))


def _drawn(prompts: PromptSet, count: int) -> list[int]:
    order = np.random.default_rng([prompts.seed, DRAWN]).permutation(len(prompts))
    drawn: list[int] = sorted(order[:count].tolist())
    return drawn


def reading_flops(student: Student, data: SafetyData) -> float:
    """Operations of the layers on a prompt, on average."""
    each = 2.0 * sum(parameter.numel() for parameter in student.layers().parameters())
    rows = [*data.train.tokens, *data.validation.tokens]
    return each * sum(map(len, rows)) / len(rows)


def _left_out_together(prompts: Sequence[SafetyPrompt]) -> list[str]:
    """What must not be known of each prompt when it is predicted: its author, or its scene where
    there are too few authors."""
    authors = [prompt.author for prompt in prompts]
    if len(set(authors)) >= FOLDS:
        return authors
    return [prompt.scenario for prompt in prompts]


def _folds(names: Sequence[str]) -> list[int]:
    """The fold of each prompt: names in turn, in the order of their hashes."""
    order = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())
    fold = {name: place % FOLDS for place, name in enumerate(order)}
    return [fold[name] for name in names]


def _moments(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[F]`` of ``values [N, F]``, each counted so often."""
    shares = weights / weights.sum()
    mean = shares @ values
    return mean, (shares @ (values - mean).square()).sqrt()


def _rarity(rows: Sequence[Tensor]) -> Tensor:
    """How strongly each run speaks, ``[B]``: more if few prompts have it (inverse document
    frequency, Sparck Jones 1972), in units of ``COMMON``."""
    return (((1 + len(rows)) / (1 + torch.cat(list(rows)).bincount())).log() + 1) / COMMON


def _sparse(rows: Sequence[Tensor], rarity: Tensor) -> Tensor:
    """Each prompt's runs as a compressed row: ``rarity [B]`` over the root of their number."""
    counts = torch.tensor([0, *map(len, rows)])
    values = torch.cat([rarity[row] * len(row) ** -0.5 for row in rows])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(
            counts.cumsum(0), torch.cat(list(rows)), values, (len(rows), len(rarity))
        )


class _SparseProduct(torch.autograd.Function):
    """runs [N, B] · weights [B, 3], whose gradient is the transposed product."""

    @staticmethod
    def forward(ctx, runs: Tensor, transposed: Tensor, weights: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.transposed = transposed
        return runs @ weights

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None, Tensor]:  # type: ignore[no-untyped-def]
        return None, None, ctx.transposed @ gradient


def _fit(examples: _Examples, start: _Linear | None = None) -> _Linear:
    """Multinomial logistic regression with a pull towards 0, by L-BFGS with line search."""
    count = float(examples.weights.sum())
    sizes = (examples.states.shape[1], examples.runs.shape[1], 1)
    begin = start or _Linear(*(torch.zeros(size, len(DECISIONS)) for size in sizes))
    states, runs, bias = (nn.Parameter(one.clone()) for one in vars(begin).values())
    optimizer = torch.optim.LBFGS(
        [states, runs, bias],
        max_iter=ITERATIONS if start is None else MORE_ITERATIONS,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transposed = examples.runs.to_sparse_csc().t()

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = bias + _SparseProduct.apply(examples.runs, transposed, runs)
            logits = logits.index_add(0, examples.read, examples.states @ states)
            pull = STATES_DECAY * states.square().sum() + RUNS_DECAY * runs.square().sum()
            losses = F.cross_entropy(logits, examples.labels, reduction="none")
            value = (examples.weights @ losses + pull) / count
            value.backward()
            return value

        optimizer.step(loss)
    return _Linear(states.detach(), runs.detach(), bias.detach())
