"""An SO(8) gate before the output projection of a model that knows nothing of gates.

Letters: N blocks, G = 8, so that the attention output is 8N wide. The gate's two rotations cannot
both begin at the identity (they would commute and stay so), yet the model shall begin as it was:
what is applied is R_cmd R_safe R0ᵀ, where R0 is the product that the rotations began with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from students.model import so8
from students.model.gate import SO8Gate
from students.model.shape import GROUP

TURNS = (
    "so8_turns"  # the keyword that takes every layer's turn through the decoder to its attention
)


class StartingGate(SO8Gate):
    """A gate that remembers where it began, ``start [N, 8, 8]`` (R0), and turns by what has
    changed since."""

    start: Tensor

    def __init__(self, blocks: int, std: float) -> None:
        super().__init__(blocks)
        nn.init.normal_(self.safety, std=std)
        nn.init.normal_(self.command, std=std)
        with torch.no_grad():
            safety, command = super().forward()
            self.register_buffer("start", command @ safety)


def turn(rotations: Tensor, start: Tensor) -> Tensor:
    """R_cmd R_safe R0ᵀ: ``[..., 2, N, 8, 8]`` and ``[..., N, 8, 8]`` → ``[..., N, 8, 8]``, in
    the rotations' dtype."""
    with so8.full_precision(rotations):
        return (
            rotations[..., 1, :, :, :] @ rotations[..., 0, :, :, :] @ start.to(rotations.dtype).mT
        )


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """``blockdiag(turn) · x`` for every vector of ``x [..., 8N]``, in the dtype of ``turn [N, 8,
    8]``, rounded once.

    Raises:
        ValueError: the vectors are not 8 × the number of blocks wide.
    """
    blocks = turn.shape[0]
    if x.shape[-1] != blocks * GROUP:
        raise ValueError(
            f"the input is {x.shape[-1]} wide; {blocks} rotations need {blocks * GROUP}"
        )
    with so8.full_precision(x):
        split = x.reshape(-1, blocks, GROUP).to(turn.dtype).transpose(0, 1)  # [N, tokens, 8]
        return torch.bmm(split, turn.mT).transpose(0, 1).reshape(x.shape).to(x.dtype)


class GatedProjection(nn.Module):
    """An output projection (with its LoRA, if it has one) whose input is turned first."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection
        self.turn: Tensor | None = None  # for the next call alone

    def forward(self, x: Tensor) -> Tensor:
        """Project the turned ``x [..., 8N]``."""
        given, self.turn = self.turn, None
        assert given is not None, (
            "the attention around this projection has not handed over its turn"
        )
        return self.projection(rotate(x, given))


def add_gate(attention: nn.Module, gate: StartingGate) -> None:
    """Put ``gate`` before the output projection ``o_proj`` of ``attention``, as its submodule
    ``gate``."""
    attention.gate = gate
    attention.o_proj = GatedProjection(attention.get_submodule("o_proj"))
    attention.register_forward_pre_hook(_hand_over, with_kwargs=True)


def _hand_over(
    attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give the projection its layer's turn.

    It comes as an argument because a layer whose activations are computed again in the backward
    pass is then called with the very arguments of its own forward pass, whatever has been run in
    between. A decoder that somebody else calls has none to give; the gate computes it then.
    """
    turns = kwargs.pop(TURNS, None)
    gate: StartingGate = attention.gate
    attention.o_proj.turn = (
        turn(gate(), gate.start) if turns is None else turns[attention.layer_idx]
    )
    return args, kwargs
