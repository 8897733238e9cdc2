"""Sketched hidden states: rounding, the division of bits, the directions, the metric, and what it is all for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachers import sketch
from teachers.recipe import Recipe
from teachers.records import Answer, reduce, typed
from teachers.sketch import Basis, divide_bits, fit_basis, tail_metric
from teachers.soft_targets import Arrays, CompactTargets

Array = NDArray[np.float64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Seeded float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(positions: int, width: int, seed: int = 0, decay: float = 0.9) -> Tensor:
    """States with a mean and a falling spectrum along random directions, float32 ``[N, D]``."""
    directions = torch.linalg.qr(normal(width, width, seed=seed + 100))[0]
    spectrum = torch.tensor([3.0 * decay**i for i in range(width)])
    mean = 2.0 * normal(width, seed=seed + 200)
    states: Tensor = (normal(positions, width, seed=seed) * spectrum) @ directions + mean
    return states


def rows_of(matrix: Tensor) -> Callable[[int, int], NDArray[np.float32]]:
    """The callback through which the sketch reads an output matrix."""
    return lambda start, stop: matrix[start:stop].numpy()


def plain_basis(wide: int, narrow: int, ranges: list[float]) -> Basis:
    """Coordinates are the state's own entries."""
    width = wide + narrow
    return Basis(torch.zeros(width), torch.eye(width), torch.eye(width), torch.tensor(ranges), wide)


def rotation(width: int, seed: int) -> Array:
    """A random orthonormal matrix."""
    return np.linalg.qr(normal(width, width, seed=seed).double().numpy())[0]


# --- rounding


def test_codes_are_as_documented() -> None:
    """A signed byte of range / 127 each, then two nibbles a byte, first one high, at the middle of 16 cells."""
    basis = plain_basis(2, 4, [1.27, 2.54, 8.0, 8.0, 16.0, 16.0])
    states = [[0.05, -1.0, 0.5, -7.5, 15.0, -1.0], [-1.26, 2.52, 0.0, 99.0, -99.0, 0.0]]
    codes, scales = basis.encoded(torch.tensor(states))
    assert codes.dtype == np.uint8 and scales.dtype == np.float16
    assert codes.tolist() == [[5, 256 - 50, 0x80, 0xF7], [256 - 126, 126, 0x8F, 0x08]]
    np.testing.assert_allclose(scales.astype(np.float64), 1.0, atol=2e-3)
    expected = [[0.05, -1.0, 0.5, -7.5, 15.0, -1.0], [-1.26, 2.52, 0.5, 7.5, -15.0, 1.0]]
    np.testing.assert_allclose(basis.coordinates(codes, scales).numpy(), expected, rtol=2e-3)


@pytest.mark.parametrize(("wide", "narrow"), [(8, 0), (0, 8), (5, 4), (1, 2), (0, 0)])
def test_rounding_stays_within_half_a_step(wide: int, narrow: int) -> None:
    """Each coordinate inside its range; outside, a nibble stays at the end of its range."""
    ranges = (0.5 + torch.arange(float(wide + narrow))).tolist()
    basis = plain_basis(wide, narrow, ranges)
    limits = torch.tensor(ranges)
    states = (torch.rand(400, wide + narrow, generator=torch.Generator().manual_seed(1)) * 2 - 1) * limits
    codes, scales = basis.encoded(states)
    assert codes.shape == (400, basis.bytes_per_position) and basis.bytes_per_position == wide + narrow // 2
    found = basis.coordinates(codes, scales)
    assert found.shape == (400, wide + narrow) and found.dtype == torch.float32
    steps = torch.cat((limits[:wide] / 127.0, limits[wide:] / 8.0))
    steps = steps * torch.from_numpy(scales).float()[:, None]
    assert bool(((found - states).abs() <= 0.5001 * steps).all())
    if narrow:
        assert float(((found - states).abs() / steps)[:, wide:].max()) > 0.45, "no finer than four bits"
        far = basis.coordinates(*basis.encoded(10.0 * states * (torch.arange(wide + narrow) >= wide)))
        assert bool((far[:, wide:].abs() <= limits[wide:]).all())


@pytest.mark.parametrize("factor", [1.0, 1.5, 40.0, 3000.0])
def test_outliers_are_scaled(factor: float) -> None:
    """A strong coordinate outside its range stretches the position's steps; other positions do not notice."""
    basis = plain_basis(3, 2, [1.0, 2.0, 3.0, 1.0, 1.0])
    states = torch.tensor([[0.1, -0.3, 0.5, 0.2, 0.3], [-0.1, -2.0 * factor, 0.5, 0.2, 0.3]])
    codes, scales = basis.encoded(states)
    assert float(scales[0]) == pytest.approx(1.0, abs=2e-3)
    assert factor <= float(scales[1]) <= factor * 1.003
    found = basis.coordinates(codes, scales)
    steps = torch.tensor([1.0, 2.0, 3.0]) / 127.0 * torch.from_numpy(scales).float()[:, None]
    assert bool(((found - states)[:, :3].abs() <= 0.5001 * steps).all())
    assert bool(((found - states)[0].abs() <= torch.tensor([0.004, 0.008, 0.012, 0.063, 0.063])).all())


def test_positions_are_independent() -> None:
    """Encoding in parts gives the same bytes; no positions give none."""
    states = correlated(50, 24)
    basis = fit_basis(states, None, 12)
    codes, scales = basis.encoded(states)
    parts = [basis.encoded(part) for part in (states[:1], states[1:30], states[30:])]
    assert np.array_equal(np.concatenate([part[0] for part in parts]), codes)
    assert np.array_equal(np.concatenate([part[1] for part in parts]), scales)
    nothing = basis.encoded(states[:0])
    assert nothing[0].shape == (0, 12) and basis.coordinates(*nothing).shape == (0, len(basis.ranges))


@pytest.mark.parametrize("budget", [0, 5, 24])
def test_arrays_and_back(budget: int) -> None:
    """A basis survives its arrays bit for bit; another name finds nothing."""
    basis = fit_basis(correlated(80, 24), None, budget)
    arrays = {**basis.arrays("final"), **fit_basis(correlated(80, 24, seed=1), None, 3).arrays("layer1")}
    again = Basis.from_arrays(arrays, "final")
    assert again is not None and again.wide == basis.wide
    for name in ("mean", "encode", "decode", "ranges"):
        assert torch.equal(getattr(again, name), getattr(basis, name))
        assert getattr(basis, name).dtype == torch.float32
    assert Basis.from_arrays(arrays, "layer2") is None
    states = correlated(10, 24, seed=3)
    mine, theirs = basis.encoded(states), again.encoded(states)
    assert np.array_equal(mine[0], theirs[0]) and np.array_equal(mine[1], theirs[1])


# --- the division of bits


def expected_error(variances: list[float], bits: tuple[int, ...]) -> float:
    """Sum over coordinates of what 8, 4 or 0 bits leave of their variance."""
    left = {8: sketch.ERROR_8, 4: sketch.ERROR_4, 0: 1.0}
    return math.fsum(variance * left[b] for variance, b in zip(variances, bits, strict=True))


@pytest.mark.parametrize("size", [1, 2, 5, 6])
@pytest.mark.parametrize("decay", [0.02, 0.3, 0.8, 1.0])
def test_bits_are_divided_best(size: int, decay: float) -> None:
    """No assignment of 8, 4 or 0 bits to coordinates within the budget has a lower error, searched in full."""
    variances = [5.0 * decay**i for i in range(size)]
    for budget in range(2 * size + 2):
        wide, narrow = divide_bits(torch.tensor(variances, dtype=torch.float64), budget)
        assert narrow % 2 == 0 and wide + narrow <= size and wide + narrow // 2 <= budget
        found = expected_error(variances, (8,) * wide + (4,) * narrow + (0,) * (size - wide - narrow))
        least = min(
            expected_error(variances, bits)
            for bits in itertools.product((0, 4, 8), repeat=size)
            if bits.count(4) % 2 == 0 and bits.count(8) + bits.count(4) // 2 <= budget
        )
        assert found == pytest.approx(least, rel=1e-9)


def test_more_bytes_are_never_worse() -> None:
    """The expected error falls with the budget, all of which is used until every coordinate has a byte."""
    variances = (0.93 ** torch.arange(45)).double()
    before = math.inf
    for budget in range(100):
        wide, narrow = divide_bits(variances, budget)
        error = expected_error(variances.tolist(), (8,) * wide + (4,) * narrow + (0,) * (45 - wide - narrow))
        assert error < before if budget <= 45 else error == before
        assert wide + narrow // 2 == min(budget, 45)
        before = error
    assert divide_bits(variances, 0) == (0, 0) and divide_bits(variances, 99) == (45, 0)
    assert divide_bits(variances[:0], 4) == (0, 0)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_nothing_to_keep(size: int) -> None:
    """Where nothing varies any division will do that fits its bytes."""
    for budget in range(8):
        wide, narrow = divide_bits(torch.zeros(size, dtype=torch.float64), budget)
        assert narrow % 2 == 0 and wide + narrow <= size and wide + narrow // 2 <= budget


@pytest.mark.parametrize(("wide", "narrow", "expected"), [(2, 0, sketch.ERROR_8), (0, 2, sketch.ERROR_4)])
def test_error_constants_are_what_rounding_costs(wide: int, narrow: int, expected: float) -> None:
    """Of normal variables with variance 1, at the ranges that ``fit_basis`` chooses."""
    values = normal(100_000, 2)
    basis = plain_basis(wide, narrow, [sketch.RANGE_8 if wide else sketch.RANGE_4] * 2)
    found = float((basis.coordinates(*basis.encoded(values)) - values).square().mean())
    assert found == pytest.approx(expected, rel=0.12)


# --- the directions


def left_over(basis: Basis, states: Tensor, metric: Array) -> float:
    """Mean eᵀMe of what the directions cannot hold, nothing rounded, float64."""
    centred = states.double().numpy() - basis.mean.double().numpy()
    kept = centred @ basis.encode.double().numpy() @ basis.decode.double().numpy()
    error = centred - kept
    return float(np.einsum("nd,de,ne->", error, metric, error)) / len(states)


def optimum(states: Tensor, metric: Array, rank: int) -> float:
    """The least possible: trailing eigenvalues of M^½ Σ M^½."""
    centred = states.double().numpy()
    centred = centred - centred.mean(axis=0)
    values, vectors = np.linalg.eigh(metric)
    root = vectors * np.sqrt(values) @ vectors.T
    energies = np.linalg.eigvalsh(root @ (centred.T @ centred / len(states)) @ root)  # rising
    return float(energies[: len(energies) - rank].sum())


@pytest.mark.parametrize("budget", [0, 3, 8, 15])
@pytest.mark.parametrize("width", [30, 31])
def test_without_a_metric_it_is_pca(width: int, budget: int) -> None:
    """What the kept directions miss is the energy of the other principal components."""
    states = correlated(300, width)
    basis = fit_basis(states, None, budget)
    rank = len(basis.ranges)
    assert basis.bytes_per_position == budget and basis.encode.shape == (width, rank)
    found = left_over(basis, states, np.eye(width))
    assert found == pytest.approx(optimum(states, np.eye(width), rank), rel=1e-4)
    np.testing.assert_allclose((basis.decode @ basis.encode).numpy(), np.eye(rank), atol=1e-5)


def lopsided_metric(width: int) -> Array:
    """Some directions, unlike those in which the states vary most, count a thousand times more than others."""
    turn = rotation(width, 17)
    metric: Array = turn * np.logspace(0, 3, width) @ turn.T
    return metric


@pytest.mark.parametrize("budget", [3, 8, 14])
def test_the_metric_decides(budget: int) -> None:
    """The kept directions are the best in the metric: better than plain PCA and than any random ones."""
    states, metric = correlated(400, 28), lopsided_metric(28)
    basis = fit_basis(states, torch.from_numpy(metric), budget)
    rank, found = len(basis.ranges), left_over(basis, states, metric)
    np.testing.assert_allclose((basis.decode @ basis.encode).numpy(), np.eye(rank), atol=1e-4)
    assert found == pytest.approx(optimum(states, metric, rank), rel=1e-3)
    vectors = np.linalg.eigh(np.cov(states.double().numpy().T))[1][:, -rank:]
    others = [vectors] + [rotation(28, seed)[:, :rank] for seed in range(10)]
    for kept in others:
        turned = torch.from_numpy(kept.copy()).float()
        rival = Basis(basis.mean, turned, turned.T.contiguous(), basis.ranges, basis.wide)
        assert left_over(rival, states, metric) > 1.3 * found


@pytest.mark.parametrize("with_metric", [False, True])
def test_ranges_follow_the_deviations(with_metric: bool) -> None:
    """Six and 2.9 standard deviations of each coordinate; strongest first."""
    states = correlated(500, 28, decay=0.75)
    basis = fit_basis(states, torch.from_numpy(lopsided_metric(28)) if with_metric else None, 10)
    deviations = ((states - basis.mean) @ basis.encode).std(dim=0)
    narrow = len(basis.ranges) - basis.wide
    assert basis.wide > 0 and narrow > 0
    expected = deviations * torch.tensor([sketch.RANGE_8] * basis.wide + [sketch.RANGE_4] * narrow)
    np.testing.assert_allclose(basis.ranges.numpy(), expected.numpy(), rtol=1e-3)
    assert bool((deviations.diff() <= 1e-4).all())


@pytest.mark.parametrize(("width", "budget"), [(1, 1), (7, 3), (7, 7), (16, 16), (16, 40), (33, 20)])
def test_the_whole_way_costs_what_was_expected(width: int, budget: int) -> None:
    """States through bytes and back: the error that the division of bits promised, at sizes odd and even."""
    states = correlated(3000, width)
    basis = fit_basis(states, None, budget)
    assert basis.bytes_per_position == min(budget, width)
    centred = states.double().numpy() - states.double().numpy().mean(axis=0)
    variances = np.sort(np.linalg.eigvalsh(centred.T @ centred / len(states)))[::-1].tolist()
    narrow = len(basis.ranges) - basis.wide
    bits = (8,) * basis.wide + (4,) * narrow + (0,) * (width - basis.wide - narrow)
    back = basis.coordinates(*basis.encoded(states)) @ basis.decode + basis.mean
    found = float((back - states).double().square().sum(dim=-1).mean())
    assert found == pytest.approx(expected_error(variances, bits), rel=0.15)


@pytest.mark.parametrize("positions", [1, 2, 5, 12])
@pytest.mark.parametrize("with_metric", [False, True])
def test_few_states(positions: int, with_metric: bool) -> None:
    """Fewer states than their width: they come back, and unseen ones stay finite."""
    states = correlated(positions, 24)
    basis = fit_basis(states, torch.from_numpy(lopsided_metric(24)) if with_metric else None, 24)
    assert basis.bytes_per_position <= 24
    back = basis.coordinates(*basis.encoded(states)) @ basis.decode + basis.mean
    assert float((back - states).norm()) <= 0.05 * float(states.norm())
    assert bool(torch.isfinite(basis.coordinates(*basis.encoded(10.0 * normal(50, 24, seed=5)))).all())


@pytest.mark.parametrize("with_metric", [False, True])
def test_constant_states(with_metric: bool) -> None:
    """No variance at all: every state comes back, unseen ones finite."""
    states = normal(1, 24).repeat(30, 1)
    basis = fit_basis(states, torch.from_numpy(lopsided_metric(24)) if with_metric else None, 8)
    back = basis.coordinates(*basis.encoded(states)) @ basis.decode + basis.mean
    torch.testing.assert_close(back, states, rtol=1e-4, atol=1e-5)
    assert bool(torch.isfinite(basis.coordinates(*basis.encoded(normal(50, 24, seed=5)))).all())


@pytest.mark.parametrize("budget", [12, 24, 48])
def test_states_without_full_rank(budget: int) -> None:
    """Directions that only rounding errors span must not spoil a state that uses them."""
    states = normal(300, 5) @ normal(5, 24, seed=1)
    basis = fit_basis(states, None, budget)
    back = basis.coordinates(*basis.encoded(states)) @ basis.decode + basis.mean
    assert float((back - states).norm()) <= 0.05 * float(states.norm())
    codes, scales = basis.encoded(states + 0.1 * normal(300, 24, seed=2))
    unseen = basis.coordinates(codes, scales) @ basis.decode + basis.mean
    assert float((unseen - states).norm()) <= 0.2 * float(states.norm())


def test_the_same_states_give_the_same_bytes() -> None:
    """Twice the same call."""
    states, metric = correlated(200, 24), torch.from_numpy(lopsided_metric(24))
    first, second = fit_basis(states, metric, 10), fit_basis(states.clone(), metric.clone(), 10)
    for name, array in first.arrays("b").items():
        assert array.tobytes() == second.arrays("b")[name].tobytes()
    mine, theirs = first.encoded(states), second.encoded(states)
    assert mine[0].tobytes() == theirs[0].tobytes() and mine[1].tobytes() == theirs[1].tobytes()


# --- the metric and the head


def reference_metric(states: Array, matrix: Array, num_topk: int) -> Array:
    """Σ_v p_v (w_v − w̄)(w_v − w̄)ᵀ with the average tail p, in plain loops."""
    vocab_size, width = matrix.shape
    average = np.zeros(vocab_size)
    for state in states:
        logits = [float(np.dot(matrix[v], state)) for v in range(vocab_size)]
        tail = sorted(range(vocab_size), key=lambda v, z=logits: -z[v])[num_topk:]  # type: ignore[misc]
        for temperature in (1.0, 3.0):
            total = math.fsum(math.exp(logits[v] / temperature) for v in tail)
            for v in tail:
                average[v] += math.exp(logits[v] / temperature) / total / 2.0 / len(states)
    mean = np.zeros(width)
    for v in range(vocab_size):
        mean += average[v] * matrix[v]
    metric = np.zeros((width, width))
    for v in range(vocab_size):
        metric += average[v] * np.outer(matrix[v] - mean, matrix[v] - mean)
    return metric


@pytest.mark.parametrize(("vocab_size", "num_topk"), [(60, 16), (17, 16), (9, 8)])
def test_the_metric_by_hand(vocab_size: int, num_topk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the output matrix comes in several parts."""
    states, matrix = normal(5, 4), normal(vocab_size, 4, seed=1) + torch.tensor([1.0, 0.0, -1.0, 0.5])
    expected = reference_metric(states.double().numpy(), matrix.double().numpy(), num_topk)
    whole = tail_metric(states, rows_of(matrix), vocab_size)
    assert whole.dtype == torch.float64
    np.testing.assert_allclose(whole.numpy(), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(sketch, "ROWS_AT_ONCE", 7)
    parts = tail_metric(states, rows_of(matrix), vocab_size)
    np.testing.assert_allclose(parts.numpy(), whole.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("vocab_size", "width", "rank", "offset"),
    [
        (2000, 64, 64, 0.0),
        (2000, 64, 64, 300.0),
        (300, 512, 512, 0.0),
        (300, 512, 512, 1.0),
        (900, 256, 8, 0.0),
    ],
)
def test_the_metric_is_always_positive(vocab_size: int, width: int, rank: int, offset: float) -> None:
    """Whatever all rows of the output matrix have in common, however few they are, however low their rank."""
    for seed in range(3):
        matrix = normal(vocab_size, width, seed=seed)
        if rank < width:
            matrix = matrix[:, :rank] @ normal(rank, width, seed=seed + 40) / rank**0.5
        matrix = 0.1 * (matrix + offset * normal(1, width, seed=seed + 10))
        metric = tail_metric(normal(32, width, seed=seed + 20), rows_of(matrix), vocab_size)
        basis = fit_basis(normal(200, width, seed=seed + 30), metric, 16)
        assert bool(torch.isfinite(basis.encode).all() and torch.isfinite(basis.decode).all())


@pytest.mark.parametrize("with_metric", [False, True])
def test_a_full_basis_gives_the_logits_back(with_metric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a constant of each position; to rounding with bytes, to float16 without."""
    monkeypatch.setattr(sketch, "ROWS_AT_ONCE", 70)
    states, matrix = correlated(400, 20), normal(300, 20, seed=1) + 1.0
    metric = tail_metric(states, rows_of(matrix), 300) if with_metric else None
    basis = fit_basis(states, metric, 20)
    assert basis.wide == 20
    head = basis.head(rows_of(matrix), 300)
    assert head.matrix.shape == (300, 20) and head.bias.shape == (300,)
    assert head.matrix.dtype == head.bias.dtype == torch.float32
    assert torch.equal(head.matrix, head.matrix.half().float()), "as float16 would keep it"
    true = states.double() @ matrix.double().T
    spread = float((true - true.mean(dim=-1, keepdim=True)).std())
    exact, rounded = (states - basis.mean) @ basis.encode, basis.coordinates(*basis.encoded(states))
    for coordinates, tolerance in ((exact, 1e-3), (rounded, 0.02)):
        error = head.logits(coordinates).double() - true
        error -= error.mean(dim=-1, keepdim=True)
        assert float(error.square().mean().sqrt()) <= tolerance * spread
        assert float(error.abs().max()) <= 10 * tolerance * spread


@pytest.mark.filterwarnings("error")
def test_the_output_matrix_may_be_mapped_from_a_file(request: pytest.FixtureRequest) -> None:
    """A float32 matrix is read in place, where nothing may be written; no warning of it."""
    warned_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else only the first in a process
    request.addfinalizer(lambda: torch.set_warn_always(warned_always))
    matrix = normal(90, 12, seed=1).numpy()
    matrix.setflags(write=False)
    states = correlated(60, 12)
    metric = tail_metric(states, lambda start, stop: matrix[start:stop], 90)
    head = fit_basis(states, metric, 8).head(lambda start, stop: matrix[start:stop], 90)
    assert bool(torch.isfinite(head.matrix).all())


# --- what it is for


def teacher_and_student() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States and output matrix of a teacher whose logits have low rank; the same of a student somewhat off."""
    states = correlated(256, 64) * 0.35
    matrix = normal(1500, 64, seed=1) * 0.6
    return states, matrix, states + 0.2 * normal(256, 64, seed=2), matrix + 0.2 * normal(1500, 64, seed=3)


def head_gradients(
    teacher: Array, student_states: Array, student_matrix: Array, temperature: float
) -> list[Array]:
    """Gradients of T·KL(teacher ‖ student) in the student's output matrix and in its hidden states."""
    scores = student_states @ student_matrix.T / temperature
    student = np.exp(scores - scores.max(axis=1, keepdims=True))
    student /= student.sum(axis=1, keepdims=True)
    return [(student - teacher).T @ student_states, (student - teacher) @ student_matrix]


def with_bucket(targets: CompactTargets, student_logits: Array, temperature: float) -> Array:
    """The teacher that the bucket alone describes: its tail's mass, spread as the student spreads its own."""
    weights = np.exp((student_logits - student_logits.max(axis=1, keepdims=True)) / temperature)
    ids = targets.topk_ids.numpy()
    np.put_along_axis(weights, ids, 0.0, axis=1)
    mass = targets.tail_mass(temperature).double().numpy()
    spread: Array = weights * (mass / weights.sum(axis=1))[:, None]
    np.put_along_axis(spread, ids, targets.topk_log_probs(temperature).double().exp().numpy(), axis=1)
    return spread


@pytest.mark.parametrize(("sketch_bytes", "at_most"), [(48, 0.03), (24, 0.08)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_the_gradient_is_far_closer_than_with_the_bucket_alone(
    temperature: float, sketch_bytes: int, at_most: float
) -> None:
    """Through stored bytes: error of both LM-head gradients, against those of the dense teacher.

    Measured shares of the bucket's error, in the hidden states (the weights' are lower): 1.6e-2 and 4.6e-2.
    """
    states, matrix, student_states, student_matrix = teacher_and_student()
    logits = states @ matrix.T
    metric = tail_metric(states[::2], rows_of(matrix), 1500)
    basis = fit_basis(states[::2], metric, sketch_bytes)
    recipe = Recipe(num_topk=16, sketch_bytes=sketch_bytes)
    arrays: Arrays = reduce(Answer(logits=logits, states=states), recipe, {"final": basis})
    targets = typed(arrays, recipe, 1500, basis, basis.head(rows_of(matrix), 1500))
    assert isinstance(targets, CompactTargets)
    ours, theirs = student_states.double().numpy(), student_matrix.double().numpy()
    exact = np.exp(logits.double().numpy() / temperature)
    exact /= exact.sum(axis=1, keepdims=True)
    sketched = targets.log_probs(temperature).double().exp().numpy()
    bucket = with_bucket(targets, ours @ theirs.T, temperature)
    true = head_gradients(exact, ours, theirs, temperature)
    found = head_gradients(sketched, ours, theirs, temperature)
    coarse = head_gradients(bucket, ours, theirs, temperature)
    for a, b, c in zip(true, found, coarse, strict=True):
        assert np.linalg.norm(c - a) > 0.05 * np.linalg.norm(a), "the tail matters here"
        assert np.linalg.norm(b - a) < at_most * np.linalg.norm(c - a)
