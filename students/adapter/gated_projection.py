"""An SO(8) gate before the output projection of a model without gates of its own.

Letters: N blocks, G = 8, so that the attention output is 8N wide. The two rotations cannot both
start at the identity (they would commute forever), yet the model must start unchanged: R_cmd R_safe
R0ᵀ is applied, where R0 is the initial R_cmd R_safe.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from numerics.precision import full_precision
from students.model.gate import SO8Gate
from students.model.shape import GROUP

TURNS = "so8_turns"  # keyword that passes all layers' turns through the decoder to the attention


class StartingGate(SO8Gate):
    """A gate that remembers its initial product, ``start [N, 8, 8]`` (R0)."""

    start: Tensor

    def __init__(self, blocks: int, std: float) -> None:
        super().__init__(blocks)
        nn.init.normal_(self.safety, std=std)
        nn.init.normal_(self.command, std=std)
        with torch.no_grad():
            safety, command = super().forward()
            with full_precision(command):
                self.register_buffer("start", command @ safety)


def turn(rotations: Tensor, start: Tensor) -> Tensor:
    """R_cmd R_safe R0ᵀ, in the rotations' dtype.

    ``[..., 2, N, 8, 8]`` and ``[..., N, 8, 8]`` → ``[..., N, 8, 8]``.
    """
    with full_precision(rotations):
        safety, command = rotations.unbind(-4)
        return command @ safety @ start.to(rotations.dtype).mT


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """``blockdiag(turn) · x`` of ``x [..., 8N]``, computed in the dtype of ``turn [N, 8, 8]``.

    Raises:
        ValueError: the vectors are not 8 × the number of blocks wide.
    """
    blocks = turn.shape[0]
    if x.shape[-1] != blocks * GROUP:
        raise ValueError(
            f"the input is {x.shape[-1]} wide; {blocks} rotations need {blocks * GROUP}"
        )
    with full_precision(x):
        split = x.reshape(-1, blocks, GROUP).to(turn.dtype).transpose(0, 1)  # [N, tokens, 8]
        return torch.bmm(split, turn.mT).transpose(0, 1).reshape(x.shape).to(x.dtype)


class GatedProjection(nn.Module):
    """An output projection (with its LoRA) whose input is turned first."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection
        self.turn: Tensor | None = None  # for the next call alone

    def forward(self, x: Tensor) -> Tensor:
        """Project the turned ``x [..., 8N]``."""
        current, self.turn = self.turn, None
        assert current is not None, "the attention around this projection has not set its turn"
        return self.projection(rotate(x, current))


def add_gate(attention: nn.Module, gate: StartingGate) -> None:
    """Put ``gate`` before ``attention.o_proj``, as submodule ``gate``."""
    attention.gate = gate
    attention.o_proj = GatedProjection(attention.get_submodule("o_proj"))
    attention.register_forward_pre_hook(_set_turn, with_kwargs=True)


def _set_turn(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Set the projection's turn.

    It is an argument because activation checkpointing calls a layer again with the arguments of its
    own forward pass, whatever has been run in between. Without the argument (the decoder is called
    directly) the gate computes it.
    """
    turns, gate = kwargs.pop(TURNS, None), attention.gate
    attention.o_proj.turn = (
        turn(gate(), gate.start) if turns is None else turns[attention.layer_idx]
    )
    return args, kwargs
