"""Hidden-state loss: the student's layers, through projectors, against kept states of the teacher's
layers.

FitNets (Romero et al. 2015) with linear projectors. The projectors belong to the objective, never
to the student: they are trained with it and left behind. Letters: N positions, D student width, R
kept coordinates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import UserError
from stability.measures.probe import evaluating
from students.model.interface import Student
from teachers.store.store import SoftTargetStore

SCALE_SEQUENCES = 64  # first ones of a store, on which the size of its hidden states is measured
FIT_POSITIONS = 4096  # of these, on which the projectors are fitted
RIDGE = 1e-3  # of that fit, as a share of the inputs' mean square

LayerPair = tuple[int, int]
"""A layer of the student and the teacher's layer it is compared with, both counted from 0."""


def hidden_state_loss(projected: Tensor, kept: Tensor, mean_square: float) -> Tensor:
    """Mean squared error of each position relative to the size of the states, ``[N, R]`` twice →
    ``[N]``.

    ``mean_square``: of the teacher's coordinates over all positions, so that a projector that
    answers 0 has a loss of about 1 for every layer. Float32.
    """
    return (projected.float() - kept.float()).square().mean(dim=-1) / mean_square


def pair_layers(
    layer_map: Sequence[LayerPair], kept: Sequence[int], student_layers: int, teacher_layers: int
) -> list[LayerPair]:
    """Which layers are compared: as asked for, or each kept one with the student's at the same
    relative depth.

    Raises:
        UserError: ``layer_map`` names a layer that the student does not have or the store does not
        hold.
    """
    for student, teacher in layer_map:
        if student >= student_layers:
            raise UserError(
                f"loss.layer_map = ({student}, {teacher}): the student has layers 0 to "
                f"{student_layers - 1}"
            )
        if teacher not in kept:
            held = ", ".join(map(str, kept)) or "none"
            raise UserError(
                f"loss.layer_map = ({student}, {teacher}): the soft targets hold the teacher's "
                f"layers {held}; name the ones you want in targets.layers and capture again"
            )
    if layer_map:
        return list(layer_map)
    return [
        (max(0, round((layer + 1) / teacher_layers * student_layers) - 1), layer) for layer in kept
    ]


def mean_squares(store: SoftTargetStore) -> dict[int, float]:
    """Mean square of the kept coordinates of each layer, over the first sequences of a store."""
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    for index in range(min(SCALE_SEQUENCES, len(store))):
        for layer, states in store.layer_states(index).items():
            sums[layer] = sums.get(layer, 0.0) + float(states.double().square().sum())
            counts[layer] = counts.get(layer, 0) + states.numel()
    return {layer: max(sums[layer] / max(1, counts[layer]), 1e-12) for layer in sums}


class HiddenStateLoss(nn.Module):
    """One linear projector for each pair of layers, from the student's width to the kept
    coordinates."""

    def __init__(
        self,
        pairs: Sequence[LayerPair],
        width: int,
        sizes: Mapping[int, int],
        scales: Mapping[int, float],
    ) -> None:
        """``sizes``: coordinates kept of each teacher layer; ``scales``: their mean square."""
        super().__init__()
        self.pairs, self.scales = list(pairs), dict(scales)
        self.projectors = nn.ModuleDict(
            {_name(pair): nn.Linear(width, sizes[pair[1]]) for pair in self.pairs}
        )

    @classmethod
    def for_store(
        cls, store: SoftTargetStore, pairs: Sequence[LayerPair], student: Student
    ) -> HiddenStateLoss:
        """The loss for a store's kept layers and a student as it begins."""
        sizes = {layer: states.shape[-1] for layer, states in store.layer_states(0).items()}
        loss = cls(pairs, student.config.hidden_size, sizes, mean_squares(store))
        loss._fit(store, student)
        return loss

    @torch.no_grad()
    def _fit(self, store: SoftTargetStore, student: Student) -> None:
        """Give the projectors what predicts the kept states best from the student's first ones.

        With random ones the loss first pulls a student that begins near its teacher away from it
        (docs/benchmarks.md).
        """
        states, kept = _some_states(store, student, self.student_layers)
        for pair in self.pairs:
            inputs = F.pad(states[pair[0]], (0, 1), value=1.0).double()
            gram, cross = inputs.T @ inputs, inputs.T @ kept[pair[1]].double()
            gram.diagonal().add_(RIDGE * gram.diagonal().mean())
            found = torch.linalg.solve_ex(gram, cross).result.float()  # NaN is the guard's to find
            projector = self.projectors[_name(pair)]
            assert isinstance(projector, nn.Linear)
            projector.weight.copy_(found[:-1].T)
            projector.bias.copy_(found[-1])

    @property
    def student_layers(self) -> set[int]:
        """The student's layers whose output is needed."""
        return {student for student, _ in self.pairs}

    def forward(self, student: Mapping[int, Tensor], teacher: Mapping[int, Tensor]) -> Tensor:
        """Sum over positions of the mean over pairs: states ``[N, D]`` and coordinates ``[N,
        R]`` by layer."""
        # A base in bfloat16 has states of that kind also without autocast.
        losses = [
            hidden_state_loss(
                self.projectors[_name(pair)](student[pair[0]].float()),
                teacher[pair[1]],
                self.scales[pair[1]],
            ).sum()
            for pair in self.pairs
        ]
        return torch.stack(losses).mean()


def _some_states(
    store: SoftTargetStore, student: Student, layers: Collection[int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The student's states ``[N, D]`` after ``layers`` and the teacher's kept ones ``[N, R]``, by
    layer, at the learnt positions of the first sequences."""
    device = next(student.parameters()).device
    ours, theirs, positions = list[dict[int, Tensor]](), list[dict[int, Tensor]](), 0
    for index in range(min(SCALE_SEQUENCES, len(store))):
        if positions >= FIT_POSITIONS:
            break
        tokens = torch.from_numpy(store.tokens(index).astype(np.int64)).to(device)[None]
        with evaluating(student):
            output = student(tokens, with_logits=False, layers_to_keep=layers)
        keep = torch.from_numpy(store.keep(index))
        ours.append({n: x[0, :-1].float().cpu()[keep] for n, x in output.layer_states.items()})
        theirs.append(store.layer_states(index))
        positions += int(keep.sum())
    return _joined(ours), _joined(theirs)


def _joined(parts: Sequence[Mapping[int, Tensor]]) -> dict[int, Tensor]:
    return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}


def _name(pair: LayerPair) -> str:
    return f"{pair[0]}_to_{pair[1]}"
