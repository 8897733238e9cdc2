"""The two heads on the final hidden state, and the ``so8t.*`` keys that carry them in a GGUF file.

The final hidden state (after the last norm) is what llama.cpp hands out as a token's embedding, so
a head works on the exported file as it does in PyTorch. Letters: D width, C = 3 decisions, U hidden
units of the verification head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from numerics.precision import full_precision
from students.model.head_decisions import (
    ALLOW,
    DECISIONS,
    ESCALATE,
    REFUSE,
    SAFETY_KEYS,
    VERIFICATION_KEYS,
)

VERIFICATION_UNITS = 64
DEFAULT_THRESHOLDS = (0.5, 0.5)
DEFAULT_TRUST = 0.5
MOST_CERTAIN = 13.8155  # log-odds of a probability of 1 − 10⁻⁶: nothing counts as more certain
GREATEST_LEAD = 100.0


class HeadError(ValueError):
    """Head keys of a file that are missing or unusable; names the key and the reason."""


class SafetyHead(nn.Module):
    """ALLOW / ESCALATE / REFUSE from the final hidden state of a prompt's last token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, len(DECISIONS))

    def forward(self, states: Tensor) -> Tensor:
        """Logits ``[..., 3]`` of ``states [..., D]``, in float32."""
        with full_precision(states):
            return _linear(states.float(), self.linear)


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
    logits = logits.float()
    best = logits.topk(2, dim=-1)
    # Not from the probability itself, whose doubt float32 rounds away next to 1.
    others = logits.scatter(-1, best.indices[..., :1], -torch.inf).logsumexp(dim=-1)
    log_odds = (best.values[..., 0] - others).clamp(max=MOST_CERTAIN)
    lead = (best.values[..., 0] - best.values[..., 1]).clamp(max=GREATEST_LEAD)
    return torch.stack((log_odds, lead), dim=-1)


def decide(probabilities: Tensor, thresholds: tuple[float, float]) -> Tensor:
    """Decisions ``[N]`` of ``probabilities [N, 3]``: REFUSE from ``thresholds[0]`` on; of the
    others ALLOW where it holds at least ``thresholds[1]`` of what REFUSE leaves, else ESCALATE."""
    refuse, allow = thresholds
    rest = probabilities[:, ALLOW] + probabilities[:, ESCALATE]
    allowed = probabilities[:, ALLOW] >= allow * rest
    decisions = torch.where(allowed, ALLOW, ESCALATE)
    return torch.where(probabilities[:, REFUSE] >= refuse, REFUSE, decisions)


@dataclass(frozen=True)
class Heads:
    """The heads of one student, either of which may be missing, and their decision rules.

    ``thresholds``: of REFUSE and ALLOW, see ``decide``. ``trust``: below this probability of
    agreeing, the teacher should be asked.
    """

    safety: SafetyHead | None
    verification: VerificationHead | None
    thresholds: tuple[float, float] = DEFAULT_THRESHOLDS
    trust: float = DEFAULT_TRUST

    @torch.no_grad()
    def probabilities(self, states: Tensor) -> Tensor:
        """Probabilities of the three decisions, ``[N, 3]``, from last-token states ``[N, D]``."""
        assert self.safety is not None
        there = self.safety.linear.weight.device
        return self.safety(states.to(there)).softmax(dim=-1).to(states.device)

    @torch.no_grad()
    def agreement(self, states: Tensor, logits: Tensor) -> Tensor:
        """Probability that the student's top token is the teacher's, ``[N]``.

        From ``states [N, D]`` and their ``logits [N, V]``.
        """
        assert self.verification is not None
        there = self.verification.output.weight.device
        log_odds = self.verification(states.to(there), certainty(logits).to(there))
        return log_odds.sigmoid().to(states.device)


def head_values(heads: Heads) -> dict[str, list[float] | list[str] | float | int]:
    """Both heads as the values of GGUF keys; matrices row by row."""
    values: dict[str, list[float] | list[str] | float | int] = {}
    if heads.safety is not None:
        values[SAFETY_KEYS + "labels"] = list(DECISIONS)
        values[SAFETY_KEYS + "weight"] = _numbers(heads.safety.linear.weight)
        values[SAFETY_KEYS + "bias"] = _numbers(heads.safety.linear.bias)
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
    safety = verification = None
    thresholds, trust = DEFAULT_THRESHOLDS, DEFAULT_TRUST
    if any(key.startswith(SAFETY_KEYS) for key in values):
        if values.get(SAFETY_KEYS + "labels") != list(DECISIONS):
            raise HeadError(
                f"{SAFETY_KEYS}labels is {repr(values.get(SAFETY_KEYS + 'labels'))[:60]}, not "
                f"{', '.join(DECISIONS)}"
            )
        safety = SafetyHead(width)
        _fill(safety.linear.weight, values, SAFETY_KEYS + "weight")
        _fill(safety.linear.bias, values, SAFETY_KEYS + "bias")
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
    return Heads(safety, verification, thresholds, trust)


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
