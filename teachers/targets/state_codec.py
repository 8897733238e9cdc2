"""The low-rank code of hidden states: a few dozen bytes for the directions that move the logits.

What is kept of a final hidden state x is judged by the logits it gives back. An error e in x moves
the logits of the tail by W·e, so its size is measured in the metric eᵀMe with M = Σ_v p_v (w_v −
w̄)(w_v − w̄)ᵀ, where p is the average tail of the teacher's own distributions at T = 1 and T = 3:
directions that move all logits alike cost nothing there. Principal directions in that metric
(fitted on some positions), eight bits for the strongest and four for the next, divided so that the
expected error is least (reverse water-filling).

Letters: N positions, D width of the hidden state, R kept coordinates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachers.targets.distributions import Arrays, OutputHead, soft_capped
from teachers.targets.threads import one_thread

FIT_RULES = 2  # part of a store's identity: to be counted up with whatever changes what is fitted
FIT_POSITIONS = 2048  # hidden states the directions are fitted on, at most,
FIT_SHARE = 0.125  # and of all positions, so that fitting costs little of the capture's time,
FIT_LEAST = 512  # but at least
METRIC_POSITIONS = 128  # of those, how many give the average tail
METRIC_TOPK = 16  # tokens of each that are not tail
METRIC_TEMPERATURES = (1.0, 3.0)
ROWS_AT_ONCE = 4096  # of the output matrix, dequantized together
NEGLIGIBLE = 1e-5  # of the strongest direction: what is weaker is rounding, not signal
MAX_SCALE = 60000.0  # a state further out than this is cut
RIDGE = 1e-5  # of the metric's mean diagonal, so that it can be inverted
# Half of the range that the integers span, in standard deviations, and the mean squared error of a
# normal variable of variance 1 rounded so.
RANGE_8, ERROR_8 = 6.0, 2.0e-4
RANGE_4, ERROR_4 = 2.9, 1.2e-2

OutputRows = Callable[[int, int], NDArray[np.float32]]
"""Rows ``start`` to ``stop`` of an output matrix, dequantized: float32 ``[n, D]``."""


@dataclass(frozen=True)
class Basis:
    """How hidden states are encoded: ``(x − mean) @ encode`` rounded, and back with ``decode``.

    ``mean [D]``, ``encode [D, R]``, ``decode [R, D]``, ``ranges [R]`` (half of the span of the
    integers), all float32; the first ``wide`` coordinates take a byte each, the others share one
    between two.
    """

    mean: Tensor
    encode: Tensor
    decode: Tensor
    ranges: Tensor
    wide: int

    @property
    def bytes_per_position(self) -> int:
        """Bytes of one encoded state, its scale not counted."""
        return self.wide + (len(self.ranges) - self.wide) // 2

    def to(self, device: torch.device) -> Basis:
        """The same basis on another device, where states are to be encoded."""
        mean, encode, decode, ranges = (
            part.to(device) for part in (self.mean, self.encode, self.decode, self.ranges)
        )
        return Basis(mean, encode, decode, ranges, self.wide)

    def arrays(self, name: str) -> Arrays:
        """The basis as named arrays, for a store or the worker."""
        return {
            f"{name}_mean": self.mean.numpy(),
            f"{name}_encode": self.encode.numpy(),
            f"{name}_decode": self.decode.numpy(),
            f"{name}_ranges": self.ranges.numpy(),
            f"{name}_wide": np.array([self.wide], dtype=np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays, name: str) -> Basis:
        """The inverse of ``arrays``."""
        mean, encode, decode, ranges = (
            torch.from_numpy(np.array(arrays[f"{name}_{part}"], dtype=np.float32))
            for part in ("mean", "encode", "decode", "ranges")
        )
        return cls(mean, encode, decode, ranges, int(arrays[f"{name}_wide"][0]))

    def encoded(self, states: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
        """``states [N, D]`` → codes ``[N, bytes_per_position]`` and each position's scale ``[N]``.

        The scale is 1 unless a strong coordinate is out of range, and at most ``MAX_SCALE``.
        """
        relative = (states - self.mean) @ self.encode / self.ranges
        largest = relative.new_zeros(len(states))
        if self.wide:
            largest = relative[:, : self.wide].abs().amax(dim=-1)
        # Slightly more where it is needed, so that float16 never rounds it below.
        scales = torch.where(largest > 1.0, largest * 1.001, 1.0).clamp(max=MAX_SCALE).half()
        relative = relative / scales.float()[:, None]
        wide = (relative[:, : self.wide] * 127.0).round().clamp(-127, 127).to(torch.int8)
        narrow = (relative[:, self.wide :] * 8.0).floor().clamp(-8, 7).to(torch.int16) + 8
        packed = (narrow[:, 0::2] * 16 + narrow[:, 1::2]).to(torch.uint8)
        codes = torch.cat((wide.view(torch.uint8), packed), dim=-1)
        return codes.cpu().numpy(), scales.cpu().numpy()

    def coordinates(self, codes: NDArray[np.uint8], scales: NDArray[np.float16]) -> Tensor:
        """The rounded coordinates of encoded states, float32 ``[N, R]``."""
        # A copy: mapped files cannot be written to, which torch minds.
        raw = torch.from_numpy(np.array(codes))
        wide = raw[:, : self.wide].view(torch.int8).float() / 127.0
        packed = raw[:, self.wide :]
        pairs = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)
        relative = torch.cat((wide, (pairs.float() - 7.5) / 8.0), dim=-1)
        return relative * self.ranges * torch.from_numpy(scales.astype(np.float32))[:, None]

    def head(self, rows: OutputRows, vocab_size: int, cap: float = 0.0) -> OutputHead:
        """The output matrix in these coordinates, kept as float16 would: turns them into logits,
        which end at ``cap``, if any."""
        parts = output_parts(rows, vocab_size)
        products = [((part @ self.decode.T).half(), part @ self.mean) for _, part in parts]
        bias = torch.cat([product for _, product in products])
        matrix = torch.cat([product for product, _ in products]).float()
        return OutputHead(matrix, bias if cap else bias - bias.mean(), cap)


def bases_arrays(bases: Mapping[str, Basis]) -> Arrays:
    """All bases as named arrays."""
    return {key: rows for name in bases for key, rows in bases[name].arrays(name).items()}


def bases_in(arrays: Arrays, layers: Sequence[int]) -> dict[str, Basis]:
    """The inverse of ``bases_arrays``: ``final`` and ``layer<i>``, as far as they are there."""
    names = ["final", *(f"layer{layer}" for layer in layers)]
    return {name: Basis.from_arrays(arrays, name) for name in names if f"{name}_mean" in arrays}


def divide_bits(variances: Tensor, budget: int) -> tuple[int, int]:
    """How many coordinates get eight and four bits in ``budget`` bytes; ``variances [D]`` fall."""
    size = len(variances)
    total = torch.cat((torch.zeros(1, dtype=variances.dtype), variances.cumsum(0)))
    best, least = (0, 0), float(total[-1]) + 1.0
    for wide in range(min(budget, size) + 1):
        narrow = min(2 * (budget - wide), size - wide) // 2 * 2
        strong, middle = float(total[wide]), float(total[wide + narrow] - total[wide])
        error = ERROR_8 * strong + ERROR_4 * middle + float(total[-1] - total[wide + narrow])
        if error < least:
            best, least = (wide, narrow), error
    return best


def fit_basis(states: Tensor, metric: Tensor | None, budget: int) -> Basis:
    """Fit the directions to ``states [N, D]`` for ``budget`` bytes a position.

    ``metric [D, D]`` symmetric and positive, or ``None`` for the plain squared error.
    """
    mean = states.double().mean(dim=0)
    centered = states.double() - mean
    with one_thread():
        factor = None if metric is None else torch.linalg.cholesky(metric)
    seen = centered if factor is None else centered @ factor
    singular, directions = _principal(seen)
    deviations = singular / max(1, len(states) - 1) ** 0.5
    wide, narrow = divide_bits(deviations**2, budget)
    kept = directions[: wide + narrow]  # [R, D], orthonormal in the metric
    if factor is None:
        encode, decode = kept.T, kept
    else:
        encode = factor @ kept.T
        decode = torch.linalg.solve_triangular(factor, kept, upper=False, left=False)
    spans = torch.cat((torch.full((wide,), RANGE_8), torch.full((narrow,), RANGE_4))).double()
    ranges = (deviations[: wide + narrow] * spans).clamp(min=1e-12)
    return Basis(mean.float(), encode.float(), decode.float(), ranges.float(), wide)


def _principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of float64 ``[N, D]``, falling, and right singular vectors ``[R, D]``, those
    that are not negligible; the largest component of each is positive, whatever LAPACK says.

    From the eigenvectors of the smaller Gram matrix, which take a fraction of the decomposition's
    own time. Squaring costs digits of the weak directions: about seven are left at ``NEGLIGIBLE``.
    """
    tall = rows.shape[0] >= rows.shape[1]
    gram = rows.T @ rows if tall else rows @ rows.T
    with one_thread():
        squares, vectors = torch.linalg.eigh(gram)
    singular = squares.flip(0).clamp(min=0.0).sqrt()
    singular = singular[singular > NEGLIGIBLE * singular[0]]
    vectors = vectors.flip(1)[:, : len(singular)]
    directions = vectors.T if tall else (rows.T @ vectors / singular).T
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return singular, directions * largest.sign()


def tail_metric(states: Tensor, rows: OutputRows, vocab_size: int, cap: float = 0.0) -> Tensor:
    """M of the module's docstring, float64 ``[D, D]``, from ``states [n, D]``.

    Under a soft ``cap`` an error moves a logit by its slope there less than W·e, and the more so
    the greater it is; w_v is multiplied by its average.
    """
    logits = torch.cat([states @ part.T for _, part in output_parts(rows, vocab_size)], dim=-1)
    slopes = torch.ones(vocab_size, 1)
    if cap:
        slopes = (1.0 - (soft_capped(logits, cap) / cap).square()).mean(dim=0)[:, None]
    count = min(METRIC_TOPK, vocab_size - 1)
    logits.scatter_(-1, logits.topk(count, dim=-1).indices, -torch.inf)
    tails = [torch.softmax(logits / t, dim=-1).mean(dim=0) for t in METRIC_TEMPERATURES]
    weights = torch.stack(tails).mean(dim=0)
    width = states.shape[1]
    center = torch.zeros(width, dtype=torch.float64)
    for start, part in output_parts(rows, vocab_size):
        here = slice(start, start + len(part))
        center += weights[here].double() @ (part * slopes[here]).double()
    metric = torch.zeros(width, width, dtype=torch.float64)
    for start, part in output_parts(rows, vocab_size):
        here = slice(start, start + len(part))
        relative = part * slopes[here] - center.float()
        metric += ((relative * weights[here, None]).T @ relative).double()
    return metric + RIDGE * metric.diagonal().mean() * torch.eye(width, dtype=torch.float64)


def output_parts(rows: OutputRows, vocab_size: int) -> Iterator[tuple[int, Tensor]]:
    """The output matrix a few thousand rows at a time, with the first row's index."""
    for start in range(0, vocab_size, ROWS_AT_ONCE):
        yield start, torch.from_numpy(np.array(rows(start, min(vocab_size, start + ROWS_AT_ONCE))))
