"""The typed record of a teacher's answer: which distribution over the next token it gave.

Letters: N positions, V vocabulary, K stored top tokens, M nodes, R stored coordinates of the
teacher's final hidden state. One position t of a sequence holds the distribution over the token
that follows t.

Three kinds, which differ in what they keep of a position's V logits:

- ``compact``: the K greatest, the mass of all others at every temperature, and a low-rank code of
  the final hidden state, which says how that mass is spread among them;
- ``hidden``: the final hidden state, from which the output matrix gives every logit back;
- ``dense``: every logit.

Each class also says how it is stored: ``arrays``, ``reduce`` and ``from_arrays``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachers.targets.output_head import OutputHead
from teachers.targets.recipe import NODES, TINY_VOCABULARY, Recipe
from teachers.targets.row_operations import lagrange, logsumexp, tail_sums, topk

Arrays = dict[str, NDArray[np.generic]]

EMPTY_TAIL = -1e4  # log of a tail in which no token has any probability
FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Answer:
    """A teacher's answer about N positions, as far as the recipe needs it.

    ``logits [N, V]``, ``states [N, D]`` (final hidden, after the last norm), ``layers``: output of
    each chosen layer, ``[N, D]``; all float32, where the teacher computed them: what is kept of
    them is computed there too.
    """

    logits: Tensor | None = None
    states: Tensor | None = None
    layers: Mapping[int, Tensor] | None = None


def tensors_of(record: Any) -> dict[str, Tensor]:
    """The fields of a dataclass that are tensors."""
    return {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}


Record = TypeVar("Record")


def each_tensor(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """A dataclass with every field that is a tensor changed."""
    changed = {name: change(value) for name, value in tensors_of(record).items()}
    return replace(record, **changed)  # type: ignore[type-var]


Self = TypeVar("Self", bound="_Rows")


class _Rows:
    """What all kinds share: rows that can be selected, joined and moved together.

    Every ``Tensor`` field has the positions as leading dimensions; other fields are common to all.
    """

    kind: ClassVar[str]
    arrays: ClassVar[tuple[str, ...]]  # stored, one row per position

    def each(self: Self, change: Callable[[Tensor], Tensor]) -> Self:
        """The targets with every tensor of theirs changed; the head is common to others."""
        return each_tensor(self, change)

    def select(self: Self, index: Tensor | slice) -> Self:
        """The targets at ``index`` of the leading dimension."""
        return self.each(lambda values: values[index])

    def to(self: Self, device: torch.device) -> Self:
        """The same targets on another device; nothing waits for what is pinned."""
        waits = device.type == "cpu"
        moved = self.each(lambda values: values.to(device, non_blocking=not waits))
        head = getattr(self, "head", None)
        return moved if head is None else replace(moved, head=head.to(device))  # type: ignore[type-var]

    @classmethod
    def join(cls: type[Self], parts: list[Self]) -> Self:
        """The rows of several records of one kind, in order."""
        rows = [tensors_of(part) for part in parts]
        joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return replace(parts[0], **joined)  # type: ignore[type-var]


@dataclass(frozen=True)
class CompactTargets(_Rows):
    """Exact top-k logits, the tail's mass at every temperature, and a code of the tail's shape.

    Attributes:
        topk_ids: the K most probable tokens, most probable first, int64 ``[..., K]``.
        topk_logits: their logits relative to the first, float32 ``[..., K]``, ≤ 0.
        tail: log Σ exp((z_v − z_first) / T) over all other tokens v at each node, nats, float32
            ``[..., M]``; −∞ where there are none.
        vocab_size: V.
        coordinates: the low-rank state code, float32 ``[..., R]``, or ``None``.
        head: turns the code into logits of the tail, up to a constant; ``None`` without a code.
    """

    kind = "compact"
    arrays = ("topk_ids", "topk_logits", "tail")

    topk_ids: Tensor
    topk_logits: Tensor
    tail: Tensor
    vocab_size: int
    coordinates: Tensor | None = None
    head: OutputHead | None = None

    @property
    def has_tail_shape(self) -> bool:
        """Whether there is a low-rank code, or no tail at all."""
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
        first, others = _node_weights(temperature, self.tail.dtype, self.tail.device)
        return first * at_zero + self.tail @ others

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

    def head_products(self) -> Tensor | None:
        """The code's products with the output matrix, ``[N, V]``, which ``completed_`` makes
        logits; ``None`` where every token is stored.

        Raises:
            ValueError: there is no code.
        """
        if self.topk_ids.shape[-1] == self.vocab_size:
            return None
        head, coordinates = self._code()
        return head.products(coordinates)

    def completed_(self, products: Tensor) -> Tensor:
        """Logits of some rows of ``head_products``, widened before, in place."""
        return self._code()[0].completed_(products)

    def _code(self) -> tuple[OutputHead, Tensor]:
        if self.head is None or self.coordinates is None:
            raise ValueError(
                "these soft targets have no tail sketch; capture with targets.sketch_bytes > 0"
            )
        return self.head, self.coordinates

    def log_probs(
        self, temperature: float, raw: Tensor | None = None, spare: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of all tokens, ``[..., V]``: exact in the top-k and in the tail's sum.

        ``raw``: the code's logits of these rows, which are overwritten by the result; ``spare``:
        room of the same shape.

        Raises:
            ValueError: there is no code.
        """
        if self.topk_ids.shape[-1] == self.vocab_size:
            result = torch.empty_like(self.topk_logits)
        else:
            head, coordinates = self._code()
            result = head.logits(coordinates) if raw is None else raw
            if temperature != 1.0:
                result.div_(temperature)
            result.scatter_(-1, self.topk_ids, -torch.inf)
            mass = self.tail_logsumexp(temperature) - self.log_partition(temperature)
            result.sub_((logsumexp(result, spare) - mass)[..., None])
        return result.scatter_(-1, self.topk_ids, self.topk_log_probs(temperature))

    def best(self) -> Tensor:
        """The most probable token of each position, int64 ``[...]``."""
        return self.topk_ids[..., 0]

    @classmethod
    def from_logits(cls, logits: Tensor, num_topk: int) -> CompactTargets:
        """Reduce dense logits ``[N, V]`` (float32) to compact targets without a code.

        Raises:
            ValueError: a logit of the top-k or the tail's sum is not finite (−∞ is fine outside
                the top-k: an excluded token).
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
        sums = tail_sums(logits, next_best, ids[:, :count]).log()
        tail = sums + (next_best - first) * torch.tensor(NODES, device=logits.device)
        if bool(torch.isnan(tail).any() | torch.isposinf(tail).any()):
            raise ValueError("the teacher's logits are not finite; its weights are damaged")
        return cls(ids[:, :count], kept - first, tail.clamp(min=EMPTY_TAIL), size)

    @classmethod
    def reduce(cls, answer: Answer, recipe: Recipe) -> Arrays:
        """Top-k and tail masses as they are stored."""
        assert answer.logits is not None
        targets = cls.from_logits(answer.logits, recipe.num_topk)
        ids = np.uint16 if targets.vocab_size <= TINY_VOCABULARY else np.int32
        return {
            "topk_ids": targets.topk_ids.cpu().numpy().astype(ids),
            "topk_logits": targets.topk_logits.clamp(min=-FLOAT16_MAX).half().cpu().numpy(),
            "tail": targets.tail.cpu().numpy(),
        }

    @classmethod
    def from_arrays(
        cls, arrays: Arrays, vocab_size: int, code: Tensor | None, head: OutputHead | None
    ) -> CompactTargets:
        """The stored arrays as targets; ``code``: the decoded states, where they are kept."""
        ids = torch.from_numpy(arrays["topk_ids"].astype(np.int64))
        logits, tail = floats(arrays["topk_logits"]), floats(arrays["tail"])
        return cls(ids, logits, tail, vocab_size, code, None if code is None else head)


@lru_cache(maxsize=64)
def _node_weights(
    temperature: float, dtype: torch.dtype, device: torch.device
) -> tuple[float, Tensor]:
    """Weights of the tail's mass at 1/T = 0 and at the nodes, at one temperature; made once, as a
    device would have to be waited for every time."""
    weights = lagrange((0.0, *NODES), 1.0 / temperature)
    return weights[0], torch.tensor(weights[1:], dtype=dtype, device=device)


class _AllLogits(_Rows, ABC):
    """Targets that give every logit."""

    has_tail_shape = True

    @abstractmethod
    def _logits(self) -> Tensor:
        """A copy of all logits ``[..., V]``."""

    @abstractmethod
    def head_products(self) -> Tensor:
        """What ``completed_`` makes logits, ``[N, V]``; not to be changed."""

    def completed_(self, products: Tensor) -> Tensor:
        """Logits of some rows of a copy of ``head_products``, in place."""
        return products

    def log_probs(
        self, temperature: float, raw: Tensor | None = None, spare: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of all tokens at temperature T, ``[..., V]``, in nats (see
        ``CompactTargets``)."""
        logits = (self._logits() if raw is None else raw).div_(temperature)
        logits.sub_(
            logits.amax(dim=-1, keepdim=True)
        )  # first, which keeps the digits of large ones
        return logits.sub_(logsumexp(logits, spare)[..., None])

    def best(self) -> Tensor:
        """The most probable token of each position, int64 ``[...]``."""
        return self._logits().argmax(dim=-1)


@dataclass(frozen=True)
class HiddenTargets(_AllLogits):
    """The final hidden state, ``coordinates [..., R]``, and the head that gives its logits."""

    kind = "hidden"
    arrays = ("hidden", "hidden_scale")

    coordinates: Tensor
    head: OutputHead

    def _logits(self) -> Tensor:
        return self.head.logits(self.coordinates)

    def head_products(self) -> Tensor:
        return self.head.products(self.coordinates)

    def completed_(self, products: Tensor) -> Tensor:
        return self.head.completed_(products)

    @classmethod
    def reduce(cls, answer: Answer, recipe: Recipe) -> Arrays:
        """Final states in eight bits with a scale per position, as they are stored."""
        assert answer.states is not None
        require_finite(answer.states)
        scale = (answer.states.abs().amax(dim=-1) / 127.0).clamp(min=1e-30)
        codes = (answer.states / scale[:, None]).round().to(torch.int8)
        return {"hidden": codes.cpu().numpy(), "hidden_scale": scale.cpu().numpy()}

    @classmethod
    def from_arrays(
        cls, arrays: Arrays, vocab_size: int, code: Tensor | None, head: OutputHead | None
    ) -> HiddenTargets:
        """The stored arrays as targets."""
        assert head is not None
        return cls(floats(arrays["hidden"]) * floats(arrays["hidden_scale"])[:, None], head)


@dataclass(frozen=True)
class DenseTargets(_AllLogits):
    """Every logit, float32 ``[..., V]``."""

    kind = "dense"
    arrays = ("logits",)

    logits: Tensor

    def _logits(self) -> Tensor:
        return self.logits.clone()

    def head_products(self) -> Tensor:
        return self.logits

    @classmethod
    def reduce(cls, answer: Answer, recipe: Recipe) -> Arrays:
        """All logits, as they are stored."""
        assert answer.logits is not None
        require_finite(answer.logits)
        return {"logits": answer.logits.cpu().numpy().copy()}

    @classmethod
    def from_arrays(
        cls, arrays: Arrays, vocab_size: int, code: Tensor | None, head: OutputHead | None
    ) -> DenseTargets:
        """The stored arrays as targets."""
        return cls(floats(arrays["logits"]))


Targets = CompactTargets | HiddenTargets | DenseTargets


def require_finite(values: Tensor) -> None:
    """Raises:
    ValueError: something in the teacher's answer is not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise ValueError("the teacher's answer is not finite; its weights are damaged")


def floats(array: NDArray[Any]) -> Tensor:
    """A float32 copy (mapped files cannot be written to, which torch minds)."""
    return torch.from_numpy(np.array(array, dtype=np.float32))
