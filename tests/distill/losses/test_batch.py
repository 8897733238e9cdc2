"""Packed batches: the loss, its gradient and the scores are those of the sequences alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.config.schema import LossConfig
from distill.losses.batch import SLACK, Batch, arrange
from distill.losses.objective import Objective, build_objective
from distill.training.data import load_batch
from distill.training.distributed import TrainingModule
from distill.training.validation import validation_score
from students.model.decoder import SO8TForCausalLM
from teachers.store.store import SoftTargetStore
from teachers.targets.recipe import Recipe
from tests.support.stores import write_store
from tests.support.students import make_student
from tests.support.teachers import BigramTeacher

VOCAB, WIDTH, LAYERS = 48, 16, 3
LENGTHS = (21, 2, 17, 40, 3, 18, 5)  # the verification head learns from some of the positions
EVERY_TERM = LossConfig(
    temperature=2.0, gamma=0.5, pet=(0.3, 0.3, 0.3), commutator_margin=9.0, lambda_verification=0.4
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SoftTargetStore:
    random = np.random.default_rng(1)
    rows = [random.integers(0, VOCAB, size=length).astype(np.int32) for length in LENGTHS]
    recipe = Recipe(num_topk=8, sketch_bytes=10, layers=(0, 2), layer_bytes=14)
    folder: Path = tmp_path_factory.mktemp("packed") / "store"
    return write_store(folder, BigramTeacher(VOCAB, WIDTH, LAYERS), rows, recipe, 4)


def gradients(
    student: SO8TForCausalLM, objective: Objective, batches: list[Batch]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """A step's parts and gradients, summed over its micro-batches."""
    total = sum(batch.count() for batch in batches)
    sums: dict[str, float] = {}
    module = TrainingModule(student, objective)
    module.zero_grad()
    for batch in batches:
        share = batch.count() / total
        loss, parts = objective(student, batch, total=total, share=share, fraction=0.5)
        loss.backward()
        for name, value in {"loss": loss.detach(), **parts}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    named = module.named_parameters()
    return sums, {name: one.grad.clone() for name, one in named if one.grad is not None}


def chosen(batch: Batch, start: int) -> Batch:
    """A part of the positions left out, by number from the batch's ``start`` on."""
    keep = (torch.arange(batch.count()) + start) % 3 > 0
    layers = {layer: states[keep] for layer, states in batch.layers.items()}
    return replace(batch, keep=keep, targets=batch.targets.select(keep), layers=layers)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_is_sequence_by_sequence(store: SoftTargetStore, checkpointing: bool) -> None:
    """Every part of the loss and every gradient; with text that the student wrote, and with
    positions left out."""
    student = make_student(16, 2, VOCAB, heads=True).train()
    student.checkpoint_activations(checkpointing)
    objective = build_objective(EVERY_TERM, store, student, LAYERS)
    numbers, given = list(range(len(LENGTHS))), torch.tensor([9, 1, 17, 12, 3, 1, 2])
    starts = np.cumsum([0, *(length - 1 for length in LENGTHS)])
    for kind in ("whole", "written", "kept"):
        packed = load_batch(store, numbers, pack=True)
        alone = [load_batch(store, [number]) for number in numbers]
        assert packed.rooms is not None and packed.tokens.shape == (1, int(packed.rooms.sum()))
        if kind == "written":
            packed = replace(packed, given=given)
            alone = [replace(one, given=given[i : i + 1]) for i, one in enumerate(alone)]
        if kind == "kept":
            packed = chosen(packed, 0)
            alone = [chosen(one, int(start)) for one, start in zip(alone, starts, strict=False)]
        (wanted, slopes), (got, found) = (
            gradients(student, objective, batches) for batches in (alone, [packed])
        )
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-7), kind
        assert {
            "verification",
            "hidden",
            "pet",
            "kd",
        } <= got.keys() and found.keys() == slopes.keys()
        for name, slope in slopes.items():
            assert torch.allclose(found[name], slope, rtol=1e-4, atol=1e-6), (kind, name)
        module = TrainingModule(student, objective)
        scores = [vars(validation_score(module, batches)) for batches in (alone, [packed])]
        assert scores[1] == pytest.approx(scores[0], rel=1e-5), kind


def test_rows_leave_little_empty() -> None:
    """Every sequence in its place, in order, at most so much padding; like lengths share a size."""
    random = np.random.default_rng(0)
    for lengths in (
        [7],
        [4, 4],
        [3, 5, 9],
        [9, 5, 3],
        [30, 31, 35, 36],
        random.integers(1, 60, 40),
    ):
        rows = [random.integers(1, 90, size=int(n)).astype(np.int32) for n in lengths]
        tokens, sizes, rooms = arrange(rows, pack=True)
        assert sizes.tolist() == list(lengths)
        if rooms is None:
            assert len(set(lengths)) == 1 and tokens.tolist() == [row.tolist() for row in rows]
            continue
        assert int((rooms - sizes).min()) >= 0 and int((rooms - sizes).max()) <= SLACK, lengths
        for row, part in zip(rows, tokens[0].split(rooms.tolist()), strict=True):
            assert part.tolist() == row.tolist() + [0] * (len(part) - len(row)), lengths
    assert arrange([rows[0], rows[0][:2]], pack=False)[2] is None
    rooms = arrange([np.ones(n, np.int32) for n in (30, 31, 34, 36)], pack=True)[2]
    assert rooms is not None and rooms.tolist() == [31, 31, 36, 36]
