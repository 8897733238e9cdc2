"""Codes of a few bits each, one after another in a string of bytes.

Code i of a position takes ``bits[i]`` bits, most significant first, and begins where the one before
it ends; the last byte is filled up with zeros. Letters: N positions, R codes, B bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_BITS = 8  # of one code: it lies in two neighbouring bytes at most


@dataclass(frozen=True)
class BitLayout:
    """Where each of R codes lies in a position's bytes.

    ``first [R]``: the byte that a code begins in; ``shift [R]``: how many bits follow it in that
    byte and the next; ``mask [R]``: its bits; ``code``, ``place [8 B]``: of every bit of the bytes,
    which code's it is and its place there (beyond any code's, so 0, of those that fill up).
    """

    first: Tensor
    shift: Tensor
    mask: Tensor
    code: Tensor
    place: Tensor

    @classmethod
    def of(cls, bits: Tensor) -> BitLayout:
        """The layout of ``bits [R]`` (1 to ``MOST_BITS`` each), on the processor."""
        bits = bits.long().cpu()
        starts = bits.cumsum(0) - bits
        total = int(bits.sum())
        code = torch.repeat_interleave(torch.arange(len(bits)), bits)
        place = (starts + bits)[code] - 1 - torch.arange(total)
        rest = -total % 8
        code = torch.cat((code, code.new_zeros(rest)))
        place = torch.cat((place, place.new_full((rest,), MOST_BITS)))
        mask = ((1 << bits) - 1).int()
        return cls(starts // 8, (16 - starts % 8 - bits).int(), mask, code, place.to(torch.uint8))

    @property
    def num_bytes(self) -> int:
        """B."""
        return len(self.code) // 8

    def to(self, device: torch.device) -> BitLayout:
        """The same layout on another device, where codes are to be packed."""
        return BitLayout(*(part.to(device) for part in vars(self).values()))

    # Both ways with the positions last, so that whole rows are moved.

    def packed(self, codes: Tensor) -> Tensor:
        """``codes [N, R]``, int32, each within its bits → uint8 ``[N, B]``."""
        columns = codes.to(torch.uint8).T.contiguous()
        each = (columns.index_select(0, self.code) >> self.place[:, None]) & 1
        byte = each.view(self.num_bytes, 8, len(codes))
        packed = byte[:, 0] << 7
        for place in range(1, 8):
            packed |= byte[:, place] << (7 - place)
        return packed.T.contiguous()

    def unpacked(self, raw: Tensor) -> Tensor:
        """The inverse: uint8 ``[N, B]`` → int32 ``[N, R]``."""
        columns = torch.nn.functional.pad(raw, (0, 1)).T.int()
        words = columns.index_select(0, self.first) << 8
        words |= columns.index_select(0, self.first + 1)
        return ((words >> self.shift[:, None]) & self.mask[:, None]).T.contiguous()
