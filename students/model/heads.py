"""The two heads, and the ``so8t.*`` keys that carry them in a GGUF file.

The final hidden state (after the last norm) is what llama.cpp hands out as a token's embedding, so
a head works on the exported file as it does in PyTorch. Letters: D width, F features of the safety
head (``students.model.safety_head``), C = 3 decisions, U hidden units of the verification head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from stability.precision import full_precision
from students.model.head_decisions import (
    ALLOW,
    COSTS,
    DECISIONS,
    ESCALATE,
    REFUSE,
    SAFETY_KEYS,
    VERIFICATION_KEYS,
)
from students.model.safety_head import MOST_BUCKETS, SafetyHead, SafetyShape

VERIFICATION_UNITS = 64
DEFAULT_TRUST = 0.5
MOST_CERTAIN = 13.8155  # log-odds of a probability of 1 − 10⁻⁶: nothing counts as more certain
GREATEST_LEAD = 100.0
INT8 = 127
MOST_LAYERS = 1 << 16

Costs = tuple[tuple[float, float, float], ...]
Value = list[float] | list[str] | list[int] | float | int


class HeadError(ValueError):
    """Head keys of a file that are missing or unusable; names the key and the reason."""


class VerificationHead(nn.Module):
    """Per token, the log-odds that the student's most probable next token is the teacher's.

    The certainty of the student's own probabilities (see ``certainty``), corrected by a small
    network on the hidden state. Initially the log-odds of the student's top token.
    """

    def __init__(self, width: int, units: int = VERIFICATION_UNITS) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, units)
        self.output = nn.Linear(units, 1)
        self.certainty = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, states: Tensor, certain: Tensor) -> Tensor:
        """Log-odds ``[...]`` of ``states [..., D]`` and their ``certain [..., 2]``, in float32."""
        with full_precision(states):
            correction = _linear(F.silu(_linear(states.float(), self.hidden)), self.output)
            return correction.squeeze(-1) + certain @ self.certainty.float()


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.float(), layer.bias.float())


def certainty(logits: Tensor) -> Tensor:
    """Certainty ``[..., 2]``, float32, of next-token ``logits [..., V]``.

    The log-odds of the most probable token, and the difference of its logit from the second's.
    """
    # One copy, and all of it in place: of a large vocabulary, each buffer more takes as long as the
    # product that made the logits.
    others = logits.to(torch.float32, copy=True)
    best = others.topk(2, dim=-1)
    first, second = best.values.unbind(dim=-1)
    # Not from the probability itself, whose doubt float32 rounds away next to 1.
    others.scatter_(-1, best.indices[..., :1], -torch.inf)
    shift = second.where(second.isfinite(), 0.0)
    rest = others.sub_(shift[..., None]).exp_().sum(dim=-1).log() + shift
    log_odds = (first - rest).clamp(max=MOST_CERTAIN)
    lead = (first - second).clamp(max=GREATEST_LEAD)
    return torch.stack((log_odds, lead), dim=-1)


def decide(probabilities: Tensor, costs: Costs = COSTS) -> Tensor:
    """The decisions ``[N]`` of least expected cost for ``probabilities [N, 3]``; ``costs[label]
    [decision]``. Of equally good ones ESCALATE."""
    expected = probabilities.double() @ torch.tensor(costs, dtype=torch.float64)
    best = expected.argmin(dim=-1)
    tied = expected[:, ESCALATE] <= expected.amin(dim=-1) + 1e-12
    return torch.where(tied, ESCALATE, best)


def decide_by_thresholds(probabilities: Tensor, thresholds: tuple[float, float]) -> Tensor:
    """Decisions ``[N]`` of a file of an older version: REFUSE from ``thresholds[0]`` on; of the
    others ALLOW where it holds at least ``thresholds[1]`` of what REFUSE leaves, else ESCALATE."""
    refuse, allow = thresholds
    rest = probabilities[:, ALLOW] + probabilities[:, ESCALATE]
    allowed = probabilities[:, ALLOW] >= allow * rest
    decisions = torch.where(allowed, ALLOW, ESCALATE)
    return torch.where(probabilities[:, REFUSE] >= refuse, REFUSE, decisions)


@dataclass(frozen=True)
class Heads:
    """The heads of one student, either of which may be missing, and their decision rules.

    ``costs``: see ``decide``. ``thresholds``: of an older file, which decides by them instead (see
    ``decide_by_thresholds``). ``trust``: below this probability of agreeing, the teacher should be
    asked.
    """

    safety: SafetyHead | None
    verification: VerificationHead | None
    trust: float = DEFAULT_TRUST
    costs: Costs = COSTS
    thresholds: tuple[float, float] | None = None

    @torch.no_grad()
    def probabilities(self, features: Tensor, tokens: Sequence[NDArray[np.int32]] = ()) -> Tensor:
        """Probabilities of the three decisions, ``[N, 3]``, from features ``[N, F]`` and tokens."""
        assert self.safety is not None
        there = self.safety.linear.weight.device
        return self.safety(features.to(there), tokens).softmax(dim=-1).to(features.device)

    def decide(self, probabilities: Tensor) -> Tensor:
        """Decisions ``[N]`` for ``probabilities [N, 3]``."""
        if self.thresholds is not None:
            return decide_by_thresholds(probabilities, self.thresholds)
        return decide(probabilities, self.costs)

    @torch.no_grad()
    def agreement(self, states: Tensor, logits: Tensor) -> Tensor:
        """Probability that the student's top token is the teacher's, ``[N]``.

        From ``states [N, D]`` and their ``logits [N, V]``.
        """
        assert self.verification is not None
        there = self.verification.output.weight.device
        log_odds = self.verification(states.to(there), certainty(logits).to(there))
        return log_odds.sigmoid().to(states.device)


def head_values(heads: Heads) -> dict[str, Value]:
    """Both heads as the values of GGUF keys; matrices row by row."""
    values: dict[str, Value] = {}
    if heads.safety is not None:
        values |= _safety_values(heads.safety)
        if heads.thresholds is None:
            values[SAFETY_KEYS + "costs"] = [cost for row in heads.costs for cost in row]
        else:
            values[SAFETY_KEYS + "thresholds"] = list(heads.thresholds)
    if heads.verification is not None:
        head = heads.verification
        values[VERIFICATION_KEYS + "units"] = head.hidden.out_features
        values[VERIFICATION_KEYS + "hidden.weight"] = _numbers(head.hidden.weight)
        values[VERIFICATION_KEYS + "hidden.bias"] = _numbers(head.hidden.bias)
        values[VERIFICATION_KEYS + "output.weight"] = _numbers(head.output.weight)
        values[VERIFICATION_KEYS + "output.bias"] = _numbers(head.output.bias)
        values[VERIFICATION_KEYS + "certainty"] = _numbers(head.certainty)
        values[VERIFICATION_KEYS + "trust"] = heads.trust
    return values


def read_heads(values: Mapping[str, Any], width: int) -> Heads:
    """The heads of an untrusted file of ``width`` from its metadata ``values``, all checked.

    Raises:
        HeadError: a key is missing, of the wrong length, or not finite; or the labels are others.
    """
    safety = verification = thresholds = None
    costs: Costs = COSTS
    trust = DEFAULT_TRUST
    if any(key.startswith(SAFETY_KEYS) for key in values):
        safety = _read_safety(values, width)
        if SAFETY_KEYS + "costs" in values:
            costs = _read_costs(values)
        else:
            refuse, allow = _shares(values, SAFETY_KEYS + "thresholds", 2)
            thresholds = (refuse, allow)
    if any(key.startswith(VERIFICATION_KEYS) for key in values):
        units = values.get(VERIFICATION_KEYS + "units")
        if not isinstance(units, int) or isinstance(units, bool) or not 1 <= units <= 1 << 16:
            raise HeadError(f"{VERIFICATION_KEYS}units is {units!r}, not a number of hidden units")
        # Checked before anything of that size is allocated.
        _floats(values, VERIFICATION_KEYS + "hidden.weight", units * width)
        verification = VerificationHead(width, units)
        for name, parameter in verification.named_parameters():
            _fill(parameter, values, VERIFICATION_KEYS + name)
        key = VERIFICATION_KEYS + "trust"
        trust = _shares({key: [values.get(key)]}, key, 1)[0]
    return Heads(safety, verification, trust, costs, thresholds)


def _safety_values(head: SafetyHead) -> dict[str, Value]:
    """The head's numbers; what only its newer shapes have is left out where they lack it."""
    shape = head.shape
    values: dict[str, Value] = {
        SAFETY_KEYS + "labels": list(DECISIONS),
        SAFETY_KEYS + "weight": _numbers(head.linear.weight),
        SAFETY_KEYS + "bias": _numbers(head.linear.bias),
    }
    if shape.layers:
        values[SAFETY_KEYS + "layers"] = list(shape.layers)
    if shape.mean:
        values[SAFETY_KEYS + "positions"] = ["last", "mean"]
    if head.runs is not None:
        rounded, scales = rounded_runs(head.runs)
        values[SAFETY_KEYS + "runs"] = rounded.flatten().tolist()
        values[SAFETY_KEYS + "runs.scale"] = _numbers(scales)
    return values


def rounded_runs(table: Tensor) -> tuple[Tensor, Tensor]:
    """A table of token runs ``[B, 3]`` as int8 and the scale ``[3]`` of each decision; a table that
    was rounded before comes out as it was."""
    scales = table.abs().amax(dim=0).clamp_min(torch.finfo(torch.float32).tiny) / INT8
    return (table / scales).round().to(torch.int8), scales


def _read_safety(values: Mapping[str, Any], width: int) -> SafetyHead:
    """The safety head of an untrusted file, every length checked before anything is allocated."""
    if values.get(SAFETY_KEYS + "labels") != list(DECISIONS):
        raise HeadError(
            f"{SAFETY_KEYS}labels is {repr(values.get(SAFETY_KEYS + 'labels'))[:60]}, not "
            f"{', '.join(DECISIONS)}"
        )
    layers = values.get(SAFETY_KEYS + "layers", [])
    if (
        not isinstance(layers, list)
        or len(layers) > MOST_LAYERS
        or not all(type(layer) is int and 0 <= layer < MOST_LAYERS for layer in layers)
    ):
        raise HeadError(f"{SAFETY_KEYS}layers is {repr(layers)[:60]}, not layers' numbers")
    positions = values.get(SAFETY_KEYS + "positions", ["last"])
    if positions not in (["last"], ["last", "mean"]):
        raise HeadError(f"{SAFETY_KEYS}positions is {repr(positions)[:60]}, not last and mean")
    runs = values.get(SAFETY_KEYS + "runs")
    count = 0 if runs is None else _run_count(runs)
    shape = SafetyShape(tuple(layers), len(positions) == 2, count)
    _floats(values, SAFETY_KEYS + "weight", len(DECISIONS) * shape.features(width))
    head = SafetyHead(width, shape)
    _fill(head.linear.weight, values, SAFETY_KEYS + "weight")
    _fill(head.linear.bias, values, SAFETY_KEYS + "bias")
    if runs is not None and head.runs is not None:
        scales = torch.tensor(_floats(values, SAFETY_KEYS + "runs.scale", len(DECISIONS)))
        head.runs.copy_(torch.tensor(runs, dtype=torch.int8).view_as(head.runs) * scales)
    return head


def _run_count(runs: object) -> int:
    """The rows of a file's table of token runs."""
    count, rest = divmod(len(runs) if isinstance(runs, list) else 0, len(DECISIONS))
    if not isinstance(runs, list) or rest or not 1 <= count <= MOST_BUCKETS:
        raise HeadError(
            f"{SAFETY_KEYS}runs has {len(runs) if isinstance(runs, list) else 'no'} "
            f"values, {len(DECISIONS)} for each of some rows are needed"
        )
    if not all(type(number) is int and -INT8 <= number <= INT8 for number in runs):
        raise HeadError(f"{SAFETY_KEYS}runs has values that are no small whole numbers")
    return count


def _read_costs(values: Mapping[str, Any]) -> Costs:
    """What each decision costs on each label; numbers that are not negative."""
    key, count = SAFETY_KEYS + "costs", len(DECISIONS)
    numbers = _floats(values, key, count * count)
    if min(numbers) < 0.0:
        raise HeadError(f"{key} is {numbers}, which has costs below 0")
    rows = [numbers[start : start + count] for start in range(0, count * count, count)]
    return tuple((row[0], row[1], row[2]) for row in rows)


def _numbers(tensor: Tensor) -> list[float]:
    values: list[float] = tensor.detach().float().cpu().flatten().tolist()
    return values


@torch.no_grad()
def _fill(parameter: Tensor, values: Mapping[str, Any], key: str) -> None:
    numbers = torch.tensor(_floats(values, key, parameter.numel()))
    parameter.copy_(numbers.view_as(parameter))


def _shares(values: Mapping[str, Any], key: str, count: int) -> list[float]:
    """Numbers between 0 and 1."""
    numbers = _floats(values, key, count)
    if not all(0.0 <= number <= 1.0 for number in numbers):
        raise HeadError(f"{key} is {numbers}, not between 0 and 1")
    return numbers


def _floats(values: Mapping[str, Any], key: str, count: int) -> list[float]:
    numbers = values.get(key)
    if not isinstance(numbers, list) or len(numbers) != count:
        length = len(numbers) if isinstance(numbers, list) else "no"
        raise HeadError(f"{key} has {length} values, {count} are needed")
    largest = torch.finfo(torch.float32).max  # NaN is not below it either
    if not all(isinstance(number, float) and abs(number) <= largest for number in numbers):
        raise HeadError(f"{key} has values that are not finite numbers")
    return numbers
