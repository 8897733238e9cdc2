"""The SO(8) gate: one rotation for each group of eight channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from students.model import so8
from students.model.shape import PARAMETERS_PER_BLOCK


class SO8Gate(nn.Module):
    """The parameters of one layer's two block rotations, R_safe applied first, then R_cmd."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.safety = nn.Parameter(torch.zeros(blocks, PARAMETERS_PER_BLOCK))
        self.command = nn.Parameter(torch.zeros(blocks, PARAMETERS_PER_BLOCK))

    def forward(self) -> Tensor:
        """Return ``[2, N, 8, 8]``: R_safe and R_cmd of every block, exact rotations in float32."""
        return so8.rotation(torch.stack((self.safety, self.command)))
