"""The typed record of a teacher's answer: which distribution over the next token it gave.

Letters: N positions, V vocabulary, K stored top tokens, M nodes, R stored coordinates of the
teacher's final hidden state. One position t of a sequence holds the distribution over the token
that follows t.

Three kinds, which differ in what they keep of a position's V logits:

- ``compact``: the K greatest, the mass of all others at every temperature, and a sketch of how that
  mass is spread among them;
- ``hidden``: the final hidden state, from which the output matrix gives every logit back;
- ``dense``: every logit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachers.targets.recipe import NODES

Arrays = dict[str, NDArray[np.generic]]

LOGITS_TOGETHER = 1 << 18  # looked at together: 1 MB, which stays in a core's own cache
EMPTY_TAIL = -1e4  # log of a tail in which no token has any probability


@dataclass(frozen=True)
class OutputHead:
    """What turns stored coordinates into logits: ``coordinates @ matrix.T + bias``.

    ``matrix [V, R]`` and ``bias [V]``, float32: the teacher's output matrix, or its projection on
    the directions a sketch keeps. Logits are defined up to a constant of the position.
    """

    matrix: Tensor
    bias: Tensor

    def logits(self, coordinates: Tensor, out: Tensor | None = None) -> Tensor:
        """``[..., R]`` → ``[..., V]``; into ``out`` where it is given (then ``coordinates`` are
        ``[N, R]``)."""
        if out is None:
            return torch.nn.functional.linear(coordinates, self.matrix, self.bias)
        return torch.addmm(self.bias, coordinates, self.matrix.T, out=out)

    def to(self, device: torch.device) -> OutputHead:
        """The same head on another device."""
        return (
            self
            if self.matrix.device == device
            else OutputHead(self.matrix.to(device), self.bias.to(device))
        )


Self = TypeVar("Self", bound="_Rows")


class _Rows:
    """What all kinds share: rows that can be selected, joined and moved together.

    Every ``Tensor`` field of a kind has the positions as leading dimensions; other fields are
    common to all.
    """

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def select(self: Self, index: Tensor | slice) -> Self:
        """The targets at ``index`` of the leading dimension (a slice, or any index PyTorch
        accepts)."""
        return replace(self, **{name: value[index] for name, value in self._tensors().items()})  # type: ignore[type-var]

    def to(self: Self, device: torch.device) -> Self:
        """The same targets on another device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self._tensors().items()}
        head = getattr(self, "head", None)
        if head is not None:
            moved["head"] = head.to(device)
        return replace(self, **moved)  # type: ignore[type-var]

    @classmethod
    def join(cls: type[Self], parts: list[Self]) -> Self:
        """The rows of several records of one kind, in order."""
        names = parts[0]._tensors()
        joined = {name: torch.cat([part._tensors()[name] for part in parts]) for name in names}
        return replace(parts[0], **joined)  # type: ignore[type-var]


@dataclass(frozen=True)
class CompactTargets(_Rows):
    """Exact top-k logits, the tail's mass at every temperature, and a sketch of the tail's shape.

    Attributes:
        topk_ids: the K most probable tokens, most probable first, int64 ``[..., K]``. topk_logits:
        their logits relative to the first, float32 ``[..., K]``, ≤ 0. tail: log Σ exp((z_v −
        z_first) / T) over all other tokens v at each node, nats, float32 ``[..., M]``;
            −∞ where there are none.
        vocab_size: V.
        coordinates: the sketch, float32 ``[..., R]``, or ``None``.
        head: turns the sketch into logits of the tail, up to a constant; ``None`` without a sketch.
    """

    topk_ids: Tensor
    topk_logits: Tensor
    tail: Tensor
    vocab_size: int
    coordinates: Tensor | None = None
    head: OutputHead | None = None

    @property
    def has_tail_shape(self) -> bool:
        """Whether there is a sketch, or no tail at all."""
        return self.head is not None or self.topk_ids.shape[-1] == self.vocab_size

    def tail_logsumexp(self, temperature: float) -> Tensor:
        """log Σ exp((z_v − z_first) / T) over the tail, ``[...]``, in nats: exact at the nodes.

        Raises:
            ValueError: T < 1; the nodes say nothing there.
        """
        if temperature < 1.0:
            raise ValueError(
                f"soft targets are known at temperatures from 1 on, not at {temperature:g}"
            )
        if self.topk_ids.shape[-1] == self.vocab_size:
            return self.tail[..., 0]
        at_zero = float(np.log(self.vocab_size - self.topk_ids.shape[-1]))
        weights = _lagrange((0.0, *NODES), 1.0 / temperature)
        stored = torch.tensor(weights[1:], dtype=self.tail.dtype, device=self.tail.device)
        return weights[0] * at_zero + self.tail @ stored

    def log_partition(self, temperature: float) -> Tensor:
        """log Σ_v exp((z_v − z_first) / T) over all tokens, ``[...]``, in nats."""
        inside = (self.topk_logits / temperature).logsumexp(dim=-1)
        return torch.logaddexp(inside, self.tail_logsumexp(temperature))

    def topk_log_probs(self, temperature: float) -> Tensor:
        """Log-probabilities of the top-k tokens at temperature T, ``[..., K]``, in nats."""
        return self.topk_logits / temperature - self.log_partition(temperature)[..., None]

    def tail_mass(self, temperature: float) -> Tensor:
        """Probability outside the top-k at temperature T, ``[...]``."""
        return (self.tail_logsumexp(temperature) - self.log_partition(temperature)).exp()

    def head_logits(self, out: Tensor) -> Tensor | None:
        """What the sketch says of all logits, into ``out [N, V]``; ``None`` where every token is
        stored.

        Raises:
            ValueError: there is no sketch.
        """
        if self.topk_ids.shape[-1] == self.vocab_size:
            return None
        if self.head is None or self.coordinates is None:
            raise ValueError(
                "these soft targets have no tail sketch; capture with targets.sketch_bytes > 0"
            )
        return self.head.logits(self.coordinates, out)

    def log_probs(
        self, temperature: float, raw: Tensor | None = None, spare: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of all tokens, ``[..., V]``: exact in the top-k and in the tail's sum.

        ``raw``: what ``head_logits`` gave for these rows, which is overwritten by the result;
        ``spare``: room of the same shape.

        Raises:
            ValueError: there is no sketch.
        """
        shape = (*self.topk_ids.shape[:-1], self.vocab_size)
        if self.topk_ids.shape[-1] < self.vocab_size:
            if self.head is None or self.coordinates is None:
                raise ValueError(
                    "these soft targets have no tail sketch; capture with targets.sketch_bytes > 0"
                )
            tail = self.head.logits(self.coordinates) if raw is None else raw
            if temperature != 1.0:
                tail = tail.div_(temperature)
            tail = tail.scatter_(-1, self.topk_ids, -torch.inf)
            mass = self.tail_logsumexp(temperature) - self.log_partition(temperature)
            result = tail.sub_((_logsumexp(tail, spare) - mass)[..., None])
        else:
            result = self.topk_logits.new_empty(shape)
        return result.scatter_(-1, self.topk_ids, self.topk_log_probs(temperature))

    def best(self) -> Tensor:
        """The most probable token of each position, int64 ``[...]``."""
        return self.topk_ids[..., 0]

    @classmethod
    def from_logits(cls, logits: Tensor, num_topk: int) -> CompactTargets:
        """Reduce dense logits ``[N, V]`` (float32) to compact targets without a sketch.

        Raises:
            ValueError: a logit of the top-k or the sum over the tail is not finite (an excluded
                token's −∞ is fine outside the top-k).
        """
        size = logits.shape[-1]
        count = min(num_topk, size)
        values, ids = topk(logits, min(count + 1, size))
        kept, first = values[:, :count], values[:, :1]
        if not bool(torch.isfinite(kept).all()):
            raise ValueError("the teacher's logits are not finite; its weights are damaged")
        if count == size:
            tail = logits.new_full((len(logits), len(NODES)), -torch.inf)
            return cls(ids, kept - first, tail, size)
        # Relative to the tail's own greatest, so that a tail far below the top keeps its digits.
        next_best = values[:, count:].clamp(min=torch.finfo(logits.dtype).min)
        sums = _tail_sums(logits, next_best, ids[:, :count]).log()
        tail = sums + (next_best - first) * torch.tensor(NODES, device=logits.device)
        if bool(torch.isnan(tail).any() | torch.isposinf(tail).any()):
            raise ValueError("the teacher's logits are not finite; its weights are damaged")
        return cls(ids[:, :count], kept - first, tail.clamp(min=EMPTY_TAIL), size)


@dataclass(frozen=True)
class HiddenTargets(_Rows):
    """The teacher's final hidden state and the head that gives its logits: ``coordinates [...,
    R]``."""

    coordinates: Tensor
    head: OutputHead
    has_tail_shape = True

    def head_logits(self, out: Tensor) -> Tensor | None:
        """All logits, into ``out [N, V]``."""
        return self.head.logits(self.coordinates, out)

    def log_probs(
        self, temperature: float, raw: Tensor | None = None, spare: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of all tokens at temperature T, ``[..., V]``, in nats (see
        ``CompactTargets``)."""
        logits = self.head.logits(self.coordinates) if raw is None else raw
        return _log_softmax_(logits.div_(temperature), spare)

    def best(self) -> Tensor:
        """The most probable token of each position, int64 ``[...]``."""
        return self.head.logits(self.coordinates).argmax(dim=-1)


@dataclass(frozen=True)
class DenseTargets(_Rows):
    """Every logit, float32 ``[..., V]``."""

    logits: Tensor
    has_tail_shape = True

    def head_logits(self, out: Tensor) -> Tensor | None:
        """A copy of all logits, in ``out [N, V]``."""
        return out.copy_(self.logits)

    def log_probs(
        self, temperature: float, raw: Tensor | None = None, spare: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of all tokens at temperature T, ``[..., V]``, in nats (see
        ``CompactTargets``)."""
        logits = self.logits.clone() if raw is None else raw
        return _log_softmax_(logits.div_(temperature), spare)

    def best(self) -> Tensor:
        """The most probable token of each position, int64 ``[...]``."""
        return self.logits.argmax(dim=-1)


def _log_softmax_(logits: Tensor, spare: Tensor | None) -> Tensor:
    """``logits.log_softmax(-1)`` in place; the greatest is taken off first, which keeps the
    digits of large ones."""
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    return logits.sub_(_logsumexp(logits, spare)[..., None])


def _logsumexp(values: Tensor, spare: Tensor | None = None) -> Tensor:
    """``values.logsumexp(-1)`` with the faster exponential (see ``_tail_sums``)."""
    top = values.amax(dim=-1, keepdim=True)
    relative = torch.sub(values, top, out=spare).mul_(1.0 / math.log(2.0))
    return relative.exp2_().sum(dim=-1).log() + top[..., 0]


def _tail_sums(logits: Tensor, origin: Tensor, ids: Tensor) -> Tensor:
    """Σ exp((z_v − origin) · node) over all tokens but ``ids``, at every node: ``[N, V]`` → ``[N,
    M]``.

    One exponential serves all nodes: exp(x/6) and its powers up to the sixth. A few rows at a time,
    so that everything stays in a core's own cache; base 2, which is the faster exponential of
    PyTorch by far.
    """
    scale = NODES[0] / math.log(2.0)
    sums = logits.new_empty(len(logits), len(NODES))
    together = max(1, LOGITS_TOGETHER // logits.shape[-1])
    space = logits.new_empty(3, min(together, len(logits)), logits.shape[-1])
    for start in range(0, len(logits), together):
        rows = slice(start, start + together)
        root, square, cube = space[:, : len(logits[rows])]
        torch.sub(logits[rows], origin[rows], out=root).mul_(scale).exp2_()
        root.scatter_(-1, ids[rows], 0.0)
        torch.mul(root, root, out=square)
        torch.mul(square, root, out=cube)
        torch.sum(root, dim=-1, out=sums[rows, 0])
        for column, (left, right) in enumerate(
            ((root, root), (square, root), (square, square), (square, cube), (cube, cube)), 1
        ):
            sums[rows, column] = torch.linalg.vecdot(left, right)
    return sums


def topk(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``torch.topk(logits, count)`` of the last dimension of ``[N, V]``, about twice as fast for
    long rows.

    Divided into columns c, c + B, c + 2B, …, the ``count`` greatest of a row lie in the ``count``
    columns with the greatest maxima (or in the rest that fills no column); only those are looked
    through.
    """
    size = logits.shape[-1]
    columns = math.isqrt(size * count)  # as many maxima to choose from as there will be candidates
    depth = size // max(1, columns)
    if depth < 2 or columns <= count:
        values, ids = torch.topk(logits, count, dim=-1)
        return values, ids
    steps = torch.arange(depth, device=logits.device) * columns
    rest = torch.arange(depth * columns, size, device=logits.device)
    found = []
    together = max(1, LOGITS_TOGETHER // size)
    for start in range(0, len(logits), together):
        rows = logits[start : start + together]
        maxima = rows[:, : depth * columns].view(len(rows), depth, columns).amax(dim=1)
        chosen = torch.topk(maxima, count, dim=-1, sorted=False).indices
        places = (chosen[:, :, None] + steps).flatten(1)
        places = torch.cat((places, rest.expand(len(rows), -1)), dim=-1)
        values, order = torch.topk(rows.gather(-1, places), count, dim=-1)
        found.append((values, places.gather(-1, order)))
    if not found:
        return logits.new_empty(0, count), logits.new_empty(0, count, dtype=torch.int64)
    return torch.cat([values for values, _ in found]), torch.cat([ids for _, ids in found])


def _lagrange(points: tuple[float, ...], at: float) -> list[float]:
    """Weights of the values at ``points`` in the polynomial through them, evaluated at ``at``."""
    return [
        float(np.prod([(at - other) / (point - other) for other in points if other != point]))
        for point in points
    ]
