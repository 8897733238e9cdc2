"""A batch and the objective's terms on it."""

from __future__ import annotations

import torch

from distill.config.schema import LossConfig
from distill.losses.batch import Batch
from distill.losses.objective import Objective
from students.model.decoder import SO8TForCausalLM
from tests.support.stores import exact_targets
from tests.support.students import make_student

VOCAB = 96
TOPK = 6

LENGTHS = (2, 9, 5, 3, 7, 2, 4, 6)
WEIGHTS = LossConfig(
    temperature=2.0,
    final_temperature=3.0,
    final_from=0.5,
    alpha=0.7,
    beta=0.4,
    lambda_so8t=0.5,
    pet=(0.3, 0.6, 0.9),
    inertia=0.2,
    inertia_decay=0.75,
    commutator_margin=9.0,
)


def make_rows(lengths: tuple[int, ...] = LENGTHS) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Seeded sequences and the teacher's dense logits ``[n − 1, V]`` of each."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return rows, [2.0 * torch.randn(n - 1, VOCAB, generator=generator) for n in lengths]


def make_batch(
    rows: list[list[int]],
    teacher: list[torch.Tensor],
    padding: int = 0,
    fill: int = 0,
    kind: str = "buckets",
) -> Batch:
    """Pad ``rows`` on the right, by ``padding`` more than needed."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max()) + padding), fill)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    return Batch(tokens, lengths, exact_targets(kind, torch.cat(teacher), TOPK))


def ready(student: SO8TForCausalLM, config: LossConfig = WEIGHTS) -> Objective:
    """An objective whose rotation average is some way off the student's rotations."""
    objective = Objective(config)
    objective.load_state({"rotation_average": make_student(seed=9).rotations().detach()})
    return objective


def evaluated(
    student: SO8TForCausalLM, objective: Objective, batch: Batch, fraction: float = 0.5
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and parts of a step that is one batch."""
    return objective(student, batch, total=batch.count(), share=1.0, fraction=fraction)
