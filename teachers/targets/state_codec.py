"""The code of hidden states: some bits for each of the directions that move the logits.

A state's coordinates along a store's own directions (``teachers.targets.fit_codec`` chooses them)
are rounded to integers of 1 to 8 bits, as many as each direction is worth, and packed without gaps
(``teachers.targets.bit_packing``). With step s and b bits the code of a coordinate x is
⌊x / s + 2^(b − 1)⌋ within its bits, and stands for the middle of its step.

Letters: N positions, D width of the hidden state, R kept coordinates, B bytes of a code,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachers.targets.bit_packing import MOST_BITS, BitLayout
from teachers.targets.distributions import Arrays
from teachers.targets.output_head import OutputHead

ROWS_AT_ONCE = 4096  # of the output matrix, dequantized together
MAX_SCALE = 60000.0  # a state further out than this is cut
SCALES = tuple(np.array((0.5, 0.6, 0.72, 0.86, 1.0, 1.2, 1.45, 1.75), np.float16).tolist())

PARTS = ("mean", "encode", "decode", "steps", "bits")
SIGN = 1 << (MOST_BITS - 1)  # what tells two's complement from counting on from the least

OutputRows = Callable[[int, int], NDArray[np.float32]]
"""Rows ``start`` to ``stop`` of an output matrix, dequantized: float32 ``[n, D]``."""


@dataclass(frozen=True)
class Basis:
    """How hidden states are encoded: ``(x − mean) @ encode`` rounded, and back with ``decode``.

    ``mean [D]``, ``encode [D, R]``, ``decode [R, D]``, ``steps [R]``: float32; ``bits [R]``: uint8.
    ``signed``: how many coordinates, the first, are in two's complement around 0 instead (those
    of eight bits in stores up to format 4).
    """

    mean: Tensor
    encode: Tensor
    decode: Tensor
    steps: Tensor
    bits: Tensor
    signed: int = 0

    @cached_property
    def _layout(self) -> BitLayout:
        return BitLayout.of(self.bits).to(self.bits.device)

    @cached_property
    def _middles(self) -> Tensor:
        """What stands for 0, between two codes or one of them: ``[R]``."""
        halves = torch.ldexp(torch.ones_like(self.steps), self.bits.int() - 1)
        halves[self.signed :] -= 0.5
        return halves

    @cached_property
    def _limits(self) -> Tensor:
        """The greatest coordinates, in steps, that codes can tell, ``[R]``."""
        limits = self._middles + 0.5
        limits[: self.signed] -= 1.5
        return limits

    @property
    def bytes_per_position(self) -> int:
        """B, without the scale."""
        return self._layout.num_bytes

    def to(self, device: torch.device) -> Basis:
        """The same basis on another device, where states are to be encoded."""
        return replace(self, **{part: getattr(self, part).to(device) for part in PARTS})

    def arrays(self, name: str) -> Arrays:
        """The basis as named arrays, for a store or the worker."""
        arrays: Arrays = {f"{name}_{part}": getattr(self, part).numpy() for part in PARTS}
        if self.signed:
            arrays[f"{name}_signed"] = np.array([self.signed], dtype=np.int64)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Arrays, name: str) -> Basis:
        """The inverse of ``arrays``; also of those that formats up to 4 have.

        Raises:
            KeyError, ValueError: these arrays are no basis.
        """
        if f"{name}_wide" in arrays:
            arrays = _of_format_4(arrays, name)
        parts: list[NDArray[Any]] = [arrays[f"{name}_{part}"] for part in PARTS]
        _, encode, _, steps, bits = parts
        signed = int(arrays.get(f"{name}_signed", np.zeros(1, np.int64))[0])
        width, count = encode.shape if encode.ndim == 2 else (0, 0)
        shapes = [(width,), (width, count), (count, width), (count,), (count,)]
        if (
            [part.shape for part in parts] != shapes
            or any(part.dtype != np.float32 or not np.isfinite(part).all() for part in parts[:4])
            or bits.dtype != np.uint8
            or not ((bits >= 1) & (bits <= MOST_BITS)).all()
            or not (steps > 0).all()
            or not 0 <= signed <= int((bits == MOST_BITS).sum())
        ):
            raise ValueError(f"{name}: no basis of hidden states")
        mean, encoder, decoder, steps_of, bits_of = (torch.from_numpy(np.array(p)) for p in parts)
        return cls(mean, encoder, decoder, steps_of, bits_of, signed)

    def encoded(self, states: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
        """``states [N, D]`` → codes ``[N, B]`` and each position's scale ``[N]``, which multiplies
        its steps: that of ``SCALES``, or the one that cuts nothing off, which loses least.
        """
        relative = (states - self.mean) @ self.encode / self.steps
        reach = relative.new_ones(len(states))
        if len(self.steps):
            reach = (relative.abs() / self._limits).amax(dim=-1)
        # Slightly more, so that float16 never rounds it below.
        scales = (reach * 1.001).clamp(1.0, MAX_SCALE).half().float()
        codes, least = self._rounded(relative, scales)
        for one in SCALES:
            others, lost = self._rounded(relative, torch.full_like(scales, one))
            better = lost < least
            least = torch.where(better, lost, least)
            scales = torch.where(better, one, scales)
            codes = torch.where(better[:, None], others, codes)
        whole = codes.int()
        whole[:, : self.signed] ^= SIGN
        return self._layout.packed(whole).cpu().numpy(), scales.half().cpu().numpy()

    def _rounded(self, relative: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates in steps ``[N, R]`` as codes of steps ``scales [N]`` times as large, and what
        they lose, squared ``[N]``."""
        scaled = relative / scales[:, None]
        codes = (scaled + (self._middles + 0.5)).floor_().clamp_(min=0.0)
        codes = codes.minimum(self._layout.mask.float())
        lost = (codes - self._middles - scaled).mul_(self.steps).square_().sum(dim=-1)
        return codes, lost * scales.square()

    def coordinates(self, codes: NDArray[np.uint8], scales: NDArray[np.float16]) -> Tensor:
        """The rounded coordinates of encoded states, float32 ``[N, R]``.

        Raises:
            ValueError: these are no codes of this basis.
        """
        if codes.dtype != np.uint8 or codes.shape != (len(scales), self.bytes_per_position):
            raise ValueError(f"codes {codes.dtype} {codes.shape} of another basis")
        # A copy: mapped files cannot be written to, which torch minds.
        whole = self._layout.unpacked(torch.from_numpy(np.array(codes)))
        whole[:, : self.signed] ^= SIGN
        relative = whole.float().sub_(self._middles).mul_(self.steps)
        return relative.mul_(torch.from_numpy(scales.astype(np.float32))[:, None])

    def head(self, rows: OutputRows, vocab_size: int, cap: float = 0.0) -> OutputHead:
        """The output matrix in these coordinates, kept as float16 would: turns them into logits,
        which end at ``cap``, if any."""
        parts = output_parts(rows, vocab_size)
        products = [((part @ self.decode.T).half(), part @ self.mean) for _, part in parts]
        bias = torch.cat([product for _, product in products])
        matrix = torch.cat([product for product, _ in products]).float()
        return OutputHead(matrix, bias if cap else bias - bias.mean(), cap)


def _of_format_4(arrays: Arrays, name: str) -> Arrays:
    """A basis as formats up to 4 keep it, in today's words: ``wide`` coordinates of a byte in two's
    complement, the others of half a byte; half of their ``ranges`` where there are steps today."""
    ranges, wide = arrays[f"{name}_ranges"], int(arrays[f"{name}_wide"][0])
    count = len(ranges)
    if not 0 <= wide <= count:
        raise ValueError(f"{name}: {wide} of {count} coordinates in eight bits")
    first = np.arange(count) < wide
    return {
        **arrays,
        f"{name}_steps": (ranges / np.where(first, 127.0, 8.0)).astype(np.float32),
        f"{name}_bits": np.where(first, 8, 4).astype(np.uint8),
        f"{name}_signed": np.array([wide], dtype=np.int64),
    }


def bases_arrays(bases: Mapping[str, Basis]) -> Arrays:
    """All bases as named arrays."""
    return {key: rows for name in bases for key, rows in bases[name].arrays(name).items()}


def bases_in(arrays: Arrays, layers: Sequence[int]) -> dict[str, Basis]:
    """The inverse of ``bases_arrays``: ``final`` and ``layer<i>``, as far as they are there."""
    names = ["final", *(f"layer{layer}" for layer in layers)]
    return {name: Basis.from_arrays(arrays, name) for name in names if f"{name}_mean" in arrays}


def output_parts(rows: OutputRows, vocab_size: int) -> Iterator[tuple[int, Tensor]]:
    """The output matrix a few thousand rows at a time, with the first row's index."""
    for start in range(0, vocab_size, ROWS_AT_ONCE):
        yield start, torch.from_numpy(np.array(rows(start, min(vocab_size, start + ROWS_AT_ONCE))))
