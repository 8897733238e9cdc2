"""Codes of a few bits in strings of bytes, against strings of digits."""

from __future__ import annotations

import numpy as np
import torch

from teachers.targets.bit_packing import BitLayout


def reference(codes: list[int], bits: list[int]) -> list[int]:
    """The bytes of one position, written out in digits."""
    digits = "".join(f"{code:0{width}b}" for code, width in zip(codes, bits, strict=True))
    digits += "0" * (-len(digits) % 8)
    return [int(digits[start : start + 8], 2) for start in range(0, len(digits), 8)]


def test_codes_lie_one_after_another() -> None:
    """Most significant bit first, over the bytes' borders, filled up with zeros; and back."""
    random = np.random.default_rng(0)
    rows = [[], [1], [8], [3, 7, 6], [5] * 8, [1] * 17, list(range(8, 0, -1))]
    rows += [random.integers(1, 9, n).tolist() for n in (2, 9, 100, 333)]
    for bits in rows:
        layout = BitLayout.of(torch.tensor(bits, dtype=torch.uint8))
        codes = (random.random((5, len(bits))) * 2.0 ** np.array(bits)).astype(np.int32)
        codes[0], codes[1] = 0, 2 ** np.array(bits) - 1
        packed = layout.packed(torch.from_numpy(codes))
        assert packed.dtype == torch.uint8 and packed.shape == (5, layout.num_bytes)
        assert packed.tolist() == [reference(row, bits) for row in codes.tolist()], bits
        assert torch.equal(layout.unpacked(packed), torch.from_numpy(codes)), bits
        assert layout.packed(torch.from_numpy(codes[:0])).shape == (0, layout.num_bytes)
        assert layout.unpacked(packed[:0]).shape == (0, len(bits))
