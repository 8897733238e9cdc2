"""Hidden-state loss: its value, which layers it pairs, and projectors of the objective alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distill.config.schema import LossConfig
from distill.errors import UserError
from distill.losses.hidden_states import (
    hidden_state_loss,
    mean_squares,
    pair_layers,
)
from distill.losses.objective import Objective, build_objective
from distill.training.data import TrainingData, load_batch, split
from distill.training.engine import TrainingJob, train
from students.model.decoder import SO8TForCausalLM
from students.weights import plain_weights
from teachers.store.store import SoftTargetStore
from teachers.targets.recipe import Recipe
from tests.support.stores import write_store
from tests.support.students import make_student
from tests.support.teachers import BigramTeacher
from tests.support.training import TRAIN, Killed, killer, save_all_the_time

VOCAB, WIDTH, TEACHER_LAYERS = 48, 16, 3
RECIPE = Recipe(num_topk=8, layers=(0, 2), layer_bytes=14)
ONLY_HIDDEN = LossConfig(alpha=0.0, beta=0.0, lambda_so8t=0.0, gamma=0.7)
NAMES = {
    f"hidden.projectors.{pair}.{x}" for pair in ("0_to_0", "1_to_2") for x in ("weight", "bias")
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SoftTargetStore:
    """Targets of 16 sequences with the states of two of three layers."""
    random = np.random.default_rng(1)
    rows = [
        random.integers(0, VOCAB, size=random.integers(3, 12)).astype(np.int32) for _ in range(16)
    ]
    folder = tmp_path_factory.mktemp("hidden") / "store"
    return write_store(folder, BigramTeacher(VOCAB, WIDTH, TEACHER_LAYERS), rows, RECIPE, 10)


def fresh(
    store: SoftTargetStore, config: LossConfig = ONLY_HIDDEN
) -> tuple[SO8TForCausalLM, Objective]:
    """A student of two layers and its objective, with random projectors."""
    student = make_student(16, 2, VOCAB)
    objective, draw = build_objective(config, store, student, TEACHER_LAYERS), torch.Generator()
    draw.manual_seed(0)
    if objective.hidden is not None:
        for projector in projectors(objective).values():
            nn.init.normal_(projector.weight, std=16**-0.5, generator=draw)
            nn.init.zeros_(projector.bias)
    return student, objective


def evaluated(
    student: SO8TForCausalLM, objective: Objective, store: SoftTargetStore
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and parts over the whole store."""
    batch = load_batch(store, range(len(store)))
    return objective(student, batch, total=batch.count(), share=1.0, fraction=0.0)


def projectors(objective: Objective) -> dict[str, nn.Linear]:
    """The projectors by name."""
    assert objective.hidden is not None
    found = dict(objective.hidden.projectors.items())
    assert all(isinstance(projector, nn.Linear) for projector in found.values())
    return found  # type: ignore[return-value]


def reference_loss(student: SO8TForCausalLM, objective: Objective, store: SoftTargetStore) -> float:
    """γ · mean over positions and pairs of |W h + b − k|² / (R · mean k²), in float64."""
    kept = [store.layer_states(index) for index in range(len(store))]
    errors = []
    for index, answer in enumerate(kept):
        tokens = torch.from_numpy(store.tokens(index).astype(np.int64))
        with torch.no_grad():
            states = student(tokens[None], layers_to_keep=(0, 1)).layer_states
        pairs = []
        for mine, theirs in ((0, 0), (1, 2)):
            size = torch.cat([row[theirs] for row in kept]).double().square().mean()
            projector = projectors(objective)[f"{mine}_to_{theirs}"]
            weight, bias = projector.weight.detach().double(), projector.bias.detach().double()
            wanted = answer[theirs].double()
            error = states[mine][0, : len(wanted)].double() @ weight.T + bias - wanted
            pairs.append(error.square().mean(dim=1) / size)
        errors.append(torch.stack(pairs).mean(dim=0))
    return objective.config.gamma * float(torch.cat(errors).mean())


def test_the_loss_is_relative_to_the_size_of_the_states() -> None:
    """0 where equal, 1 on average where the answer is 0, and the definition in between."""
    draw = torch.Generator().manual_seed(0)
    kept = 30.0 * torch.randn(7, 5, generator=draw)
    projected = torch.randn(7, 5, generator=draw)
    size = float(kept.double().square().mean())
    assert not hidden_state_loss(kept, kept, size).any()
    zeros = hidden_state_loss(torch.zeros_like(kept), kept, size)
    assert zeros.shape == (7,) and zeros.mean().item() == pytest.approx(1.0, rel=1e-6)
    expected = ((projected.double() - kept.double()) ** 2).sum(dim=1).numpy() / 5 / 3.0
    np.testing.assert_allclose(hidden_state_loss(projected, kept, 3.0), expected, rtol=1e-5)
    narrow = hidden_state_loss(projected.bfloat16(), kept, 3.0)
    assert narrow.dtype == torch.float32


def test_mean_squares_are_those_of_each_layer(
    store: SoftTargetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the first sequences of the store."""
    monkeypatch.setattr("distill.losses.hidden_states.SCALE_SEQUENCES", 5)
    found = mean_squares(store)
    for layer in (0, 2):
        states = torch.cat([store.layer_states(index)[layer] for index in range(5)]).double()
        assert found[layer] == pytest.approx(float((states**2).mean()), rel=1e-9)
    assert set(found) == {0, 2}


def test_layers_pair_at_the_same_relative_depth() -> None:
    """Each kept layer once; the last with the last. An explicit map is taken as it is."""
    for kept, student_layers, teacher_layers, expected in (
        ((0, 1, 2, 3), 2, 4, [(0, 0), (0, 1), (1, 2), (1, 3)]),
        ((0, 1), 4, 2, [(1, 0), (3, 1)]),
        ((5, 11), 4, 12, [(1, 5), (3, 11)]),
        ((0, 31), 1, 32, [(0, 0), (0, 31)]),
        ((0, 1, 2), 3, 3, [(0, 0), (1, 1), (2, 2)]),
        ((), 3, 3, []),
    ):
        assert pair_layers((), kept, student_layers, teacher_layers) == expected, kept
    assert pair_layers([(1, 0), (0, 2)], (0, 1, 2), 2, 3) == [(1, 0), (0, 2)]


@pytest.mark.parametrize(
    ("pair", "kept", "message"),
    [
        ((2, 0), (0, 1), r"loss.layer_map = \(2, 0\): the student has layers 0 to 1"),
        ((1, 2), (0, 1), r"loss.layer_map = \(1, 2\): .* the teacher's layers 0, 1; .*targets"),
        ((0, 0), (), r"hold the teacher's layers none"),
    ],
)
def test_layers_that_are_not_there_are_refused(
    pair: tuple[int, int], kept: tuple[int, ...], message: str
) -> None:
    """By the student's number of layers, or by the store; setting and remedy are named."""
    with pytest.raises(UserError, match=message):
        pair_layers([(0, 1), pair] if kept else [pair], kept, 2, 3)


def test_projectors_belong_to_the_objective(store: SoftTargetStore, tmp_path: Path) -> None:
    """There are none in the student, or without weight or layers."""
    student, first = fresh(store)
    assert list(student.state_dict()) == list(make_student(16, 2, VOCAB).state_dict())
    assert {name for name, _ in first.named_parameters()} == NAMES
    assert fresh(store, ONLY_HIDDEN.model_copy(update={"gamma": 0.0}))[1].hidden is None
    rows = [np.arange(5, dtype=np.int32)] * 2
    teacher = BigramTeacher(VOCAB, WIDTH)
    bare = write_store(tmp_path / "bare", teacher, rows, Recipe(num_topk=8), 10)
    assert fresh(bare)[1].hidden is None


def test_projectors_begin_as_what_predicts_the_teacher_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kept states are a linear map of the student's and an offset, that very map; learnt
    positions alone count; the same every time; and of noisy ones one as near as least
    squares find."""
    random = np.random.default_rng(5)
    rows = [random.integers(0, VOCAB, size=40).astype(np.int32) for _ in range(12)]
    keep = [random.random(39) < 0.7 for _ in rows]
    teacher = BigramTeacher(VOCAB, WIDTH, TEACHER_LAYERS)
    store = write_store(tmp_path, teacher, rows, RECIPE, 10, keep)
    student = make_student(16, 2, VOCAB)
    draw = torch.Generator().manual_seed(0)
    size = store.layer_states(0)[0].shape[1]
    maps = {layer: torch.randn(size, 16, generator=draw) for layer in (0, 2)}
    offset = torch.randn(size, generator=draw)
    states = []
    for row, mask in zip(rows, keep, strict=True):
        with torch.no_grad():
            output = student(torch.from_numpy(row.astype(np.int64))[None], layers_to_keep=(0, 1))
        states.append([output.layer_states[layer][0, :-1][mask] for layer in (0, 1)])
    noise = 0.0

    def kept(index: int) -> dict[int, torch.Tensor]:
        pairs = zip((0, 2), states[index], strict=True)
        exact = {layer: own @ maps[layer].T + offset for layer, own in pairs}
        torch.manual_seed(index)
        return {layer: own + noise * torch.randn_like(own) for layer, own in exact.items()}

    monkeypatch.setattr(store, "layer_states", kept)
    for name, projector in projectors(build_objective(ONLY_HIDDEN, store, student, 3)).items():
        wanted = maps[int(name[-1])]
        assert (projector.weight - wanted).norm() < 0.02 * wanted.norm(), name
        assert (projector.bias - offset).norm() < 0.02 * offset.norm(), name
    noise = 3.0
    student.train()
    random_state = torch.get_rng_state()
    first, again = (build_objective(ONLY_HIDDEN, store, student, 3) for _ in range(2))
    assert student.training and torch.equal(torch.get_rng_state(), random_state)
    for name, projector in projectors(first).items():
        assert torch.equal(projector.weight, projectors(again)[name].weight)
        inputs = torch.cat([own[int(name[0])] for own in states]).double().numpy()
        noisy = torch.cat([kept(index)[int(name[-1])] for index in range(len(rows))])
        padded = np.pad(inputs, ((0, 0), (0, 1)), constant_values=1.0)
        fitted = padded @ np.linalg.lstsq(padded, noisy.double().numpy(), rcond=None)[0]
        exact = inputs @ maps[int(name[-1])].double().numpy().T + offset.double().numpy()
        found = inputs @ projector.weight.detach().double().numpy().T
        found += projector.bias.detach().double().numpy()
        errors = [float(((one - exact) ** 2).mean()) for one in (found, fitted)]
        assert errors[0] < 1.05 * errors[1] < 1.05 * noise**2, name


def test_the_objective_adds_it_weighted(store: SoftTargetStore) -> None:
    """γ times the mean over positions and pairs, on top of the other parts."""
    student, objective = fresh(store)
    expected = reference_loss(student, objective, store)
    loss, parts = evaluated(student, objective, store)
    assert set(parts) == {"hidden"} and expected > 0.5
    assert loss.item() == pytest.approx(expected, rel=1e-4) == float(parts["hidden"])
    _, full = fresh(store, LossConfig(gamma=0.7))
    whole, parts = evaluated(student, full, store)
    assert float(parts["hidden"]) == pytest.approx(expected, rel=1e-4)
    parts.pop("second_difference")  # no part of the loss
    assert whole.item() == pytest.approx(sum(float(part) for part in parts.values()), rel=1e-5)


def gradients_after(store: SoftTargetStore, size: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a step over the whole store in micro-batches of ``size``."""
    student, objective = fresh(store)
    total, value = int((store.lengths() - 1).sum()), 0.0
    for start in range(0, len(store), size):
        batch = load_batch(store, range(start, min(start + size, len(store))))
        share = batch.count() / total
        loss, _ = objective(student, batch, total=total, share=share, fraction=0.0)
        loss.backward()
        value += loss.item()
    named = [*student.named_parameters(), *objective.named_parameters()]
    return value, {name: p.grad for name, p in named if p.grad is not None}


def test_micro_batches_equal_the_whole_batch(store: SoftTargetStore) -> None:
    """The same loss, and the same gradients in student and projectors."""
    value, gradients = gradients_after(store, len(store))
    assert {name for name in gradients if name.startswith("hidden.")} == NAMES
    for size in (1, 5):
        small_value, small = gradients_after(store, size)
        assert small_value == pytest.approx(value, rel=1e-5) and small.keys() == gradients.keys()
        for name, gradient in gradients.items():
            message = f"{name} in parts of {size}"
            torch.testing.assert_close(small[name], gradient, rtol=1e-4, atol=1e-6, msg=message)
            # The last norm comes after every layer's output; so does the tied output matrix.
            assert gradient.any() or name == "model.norm.weight", name


@pytest.mark.parametrize("of_student", [True, False])
def test_the_gradient_is_the_slope_of_the_loss(store: SoftTargetStore, of_student: bool) -> None:
    """Along the gradient's direction the float64 reference changes by the gradient's length."""
    student, objective = fresh(store)
    evaluated(student, objective, store)[0].backward()
    module: nn.Module = student if of_student else objective
    moved = [(p, p.grad.clone()) for p in module.parameters() if p.grad is not None]
    length = float(torch.stack([gradient.square().sum() for _, gradient in moved]).sum().sqrt())
    values, distance = [], 2e-3
    for step in (distance, -2 * distance):
        with torch.no_grad():
            for parameter, gradient in moved:
                parameter.add_(step / length * gradient)
        values.append(reference_loss(student, objective, store))
    assert (values[0] - values[1]) / (2 * distance) == pytest.approx(length, rel=1e-2)


CONFIG = TRAIN.model_copy(update={"evaluations": 3})


def run(
    store: SoftTargetStore, folder: Path, kill_at: int = -1
) -> tuple[SO8TForCausalLM, Objective, dict[str, torch.Tensor]]:
    """A run that is killed after a step; the objective and its projectors as they began."""
    student, objective = fresh(store, LossConfig(gamma=1.0))
    before = {name: value.detach().clone() for name, value in objective.named_parameters()}
    folder.mkdir(exist_ok=True)

    data = TrainingData(store, split(store, 0.2, 0), 0)
    train(TrainingJob(student, data, objective, CONFIG, folder), killer(kill_at))
    return student, objective, before


def test_training_with_projectors_continues_bit_for_bit(
    store: SoftTargetStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Projectors learn, and their weights and moments survive a kill with everything else."""
    save_all_the_time(monkeypatch)
    student, objective, before = run(store, tmp_path / "whole")
    assert all(not torch.equal(value, before[name]) for name, value in objective.named_parameters())
    whole = {**student.state_dict(), **objective.state_dict()}
    assert not any("projector" in name for name in plain_weights(student))
    for kill_at in (1, 4):
        folder = tmp_path / f"cut-{kill_at}"
        with pytest.raises(Killed):
            run(store, folder, kill_at)
        again, continued, _ = run(store, folder)
        found = {**again.state_dict(), **continued.state_dict()}
        assert found.keys() == whole.keys(), kill_at
        for name, tensor in whole.items():
            assert torch.equal(found[name], tensor), (kill_at, name)
