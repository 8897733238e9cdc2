"""Sketched hidden states: rounding, the division of bits, the directions, the metric.

Over 400 lines because the codec's references and its checks belong together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from teachers.targets import state_codec
from teachers.targets.distributions import Arrays, CompactTargets
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import Basis, bases_in, divide_bits, fit_basis, tail_metric
from teachers.targets.stored_arrays import Answer, reduce, typed

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
    """A signed byte of range / 127 each, then two nibbles a byte, first one high."""
    basis = plain_basis(2, 4, [1.27, 2.54, 8.0, 8.0, 16.0, 16.0])
    states = [[0.05, -1.0, 0.5, -7.5, 15.0, -1.0], [-1.26, 2.52, 0.0, 99.0, -99.0, 0.0]]
    codes, scales = basis.encoded(torch.tensor(states))
    assert codes.dtype == np.uint8 and scales.dtype == np.float16
    assert codes.tolist() == [[5, 256 - 50, 0x80, 0xF7], [256 - 126, 126, 0x8F, 0x08]]
    np.testing.assert_allclose(scales.astype(np.float64), 1.0, atol=2e-3)
    expected = [[0.05, -1.0, 0.5, -7.5, 15.0, -1.0], [-1.26, 2.52, 0.5, 7.5, -15.0, 1.0]]
    np.testing.assert_allclose(basis.coordinates(codes, scales).numpy(), expected, rtol=2e-3)


def test_rounding_stays_within_half_a_step() -> None:
    """Each coordinate inside its range; outside, a nibble stays at the end of its range."""
    for wide, narrow in ((8, 0), (0, 8), (5, 4), (1, 2), (0, 0)):
        width, row = wide + narrow, (wide, narrow)
        limits = 0.5 + torch.arange(float(width))
        basis = plain_basis(wide, narrow, limits.tolist())
        uniform = torch.rand(400, width, generator=torch.Generator().manual_seed(1))
        states = (uniform * 2 - 1) * limits
        codes, scales = basis.encoded(states)
        assert codes.shape == (400, basis.bytes_per_position), row
        assert basis.bytes_per_position == wide + narrow // 2, row
        found = basis.coordinates(codes, scales)
        assert found.shape == (400, width) and found.dtype == torch.float32, row
        steps = torch.cat((limits[:wide] / 127.0, limits[wide:] / 8.0))
        error = (found - states).abs() / (steps * torch.from_numpy(scales).float()[:, None])
        assert bool((error <= 0.5001).all()), row
        if narrow:
            assert float(error[:, wide:].max()) > 0.45, f"{row}: no finer than four bits"
            far = basis.encoded(10.0 * states * (torch.arange(width) >= wide))
            ends = basis.coordinates(*far)[:, wide:].abs()
            assert bool((ends <= limits[wide:]).all()), row


def test_outliers_are_scaled() -> None:
    """A strong coordinate stretches the position's steps; other positions do not notice."""
    basis = plain_basis(3, 2, [1.0, 2.0, 3.0, 1.0, 1.0])
    fine = torch.tensor([0.004, 0.008, 0.012, 0.063, 0.063])
    for factor in (1.0, 1.5, 40.0, 3000.0):
        states = torch.tensor([[0.1, -0.3, 0.5, 0.2, 0.3], [-0.1, -2.0 * factor, 0.5, 0.2, 0.3]])
        codes, scales = basis.encoded(states)
        assert float(scales[0]) == pytest.approx(1.0, abs=2e-3), factor
        assert factor <= float(scales[1]) <= factor * 1.003
        error = (basis.coordinates(codes, scales) - states).abs()
        steps = torch.tensor([1.0, 2.0, 3.0]) / 127.0 * torch.from_numpy(scales).float()[:, None]
        assert bool((error[:, :3] <= 0.5001 * steps).all()), factor
        assert bool((error[0] <= fine).all()), factor


def test_positions_are_independent() -> None:
    """Encoding in parts gives the same bytes; no positions give none."""
    states = correlated(50, 24)
    basis = fit_basis(states, None, 12)
    codes, scales = basis.encoded(states)
    parts = [basis.encoded(part) for part in (states[:1], states[1:30], states[30:])]
    assert np.array_equal(np.concatenate([part[0] for part in parts]), codes)
    assert np.array_equal(np.concatenate([part[1] for part in parts]), scales)
    nothing = basis.encoded(states[:0])
    assert nothing[0].shape == (0, 12)
    assert basis.coordinates(*nothing).shape == (0, len(basis.ranges))


def test_arrays_and_back() -> None:
    """A basis survives its arrays bit for bit; another name finds nothing."""
    states = correlated(10, 24, seed=3)
    for budget in (0, 5, 24):
        basis = fit_basis(correlated(80, 24), None, budget)
        other = fit_basis(correlated(80, 24, seed=1), None, 3)
        arrays = {**basis.arrays("final"), **other.arrays("layer1")}
        again = Basis.from_arrays(arrays, "final")
        assert again.wide == basis.wide
        for name in ("mean", "encode", "decode", "ranges"):
            assert torch.equal(getattr(again, name), getattr(basis, name)), (budget, name)
            assert getattr(basis, name).dtype == torch.float32
        assert set(bases_in(arrays, (1, 2))) == {"final", "layer1"}
        for mine, theirs in zip(basis.encoded(states), again.encoded(states), strict=True):
            assert np.array_equal(mine, theirs), budget


def test_directions_have_the_signs_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK gives eigenvectors up to their sign, and another one gives others."""
    eigh, metric = torch.linalg.eigh, torch.eye(24, dtype=torch.float64) * 2.0
    for rows in (80, 12):  # from either Gram matrix
        states = correlated(rows, 24)
        expected = [fit_basis(states, one, 12).arrays("final") for one in (None, metric)]
        with monkeypatch.context() as other:

            def turned(gram: Tensor) -> tuple[Tensor, Tensor]:
                values, vectors = eigh(gram)
                return values, vectors * torch.tensor([1.0, -1.0, -1.0]).repeat(99)[: len(gram)]

            other.setattr(torch.linalg, "eigh", turned)
            found = [fit_basis(states, one, 12).arrays("final") for one in (None, metric)]
        for mine, theirs in zip(found, expected, strict=True):
            for name, values in theirs.items():
                assert np.array_equal(mine[name], values), (rows, name)


# --- the division of bits


def bits_of(wide: int, narrow: int, size: int) -> tuple[int, ...]:
    """8 bits for each of the first coordinates, 4 for each of the next, none for the others."""
    assert narrow % 2 == 0 and wide + narrow <= size
    return (8,) * wide + (4,) * narrow + (0,) * (size - wide - narrow)


def expected_error(variances: list[float], bits: tuple[int, ...]) -> float:
    """Sum over coordinates of what 8, 4 or 0 bits leave of their variance."""
    left = {8: state_codec.ERROR_8, 4: state_codec.ERROR_4, 0: 1.0}
    return math.fsum(variance * left[b] for variance, b in zip(variances, bits, strict=True))


def test_bits_are_divided_best() -> None:
    """No assignment of 8, 4 or 0 bits within the budget has a lower error, searched in full."""
    for size, decay in itertools.product((1, 2, 5, 6), (0.02, 0.3, 0.8, 1.0)):
        variances = [5.0 * decay**i for i in range(size)]
        errors = [
            (bits.count(8) + bits.count(4) // 2, expected_error(variances, bits))
            for bits in itertools.product((0, 4, 8), repeat=size)
            if bits.count(4) % 2 == 0
        ]
        for budget in range(2 * size + 2):
            wide, narrow = divide_bits(torch.tensor(variances, dtype=torch.float64), budget)
            assert wide + narrow // 2 <= budget, (size, decay, budget)
            found = expected_error(variances, bits_of(wide, narrow, size))
            least = min(error for cost, error in errors if cost <= budget)
            assert found == pytest.approx(least, rel=1e-9), (size, decay, budget)


def test_more_bytes_are_never_worse() -> None:
    """The expected error falls with the budget, all of which is used while it can be."""
    variances = (0.93 ** torch.arange(45)).double()
    before = math.inf
    for budget in range(100):
        wide, narrow = divide_bits(variances, budget)
        error = expected_error(variances.tolist(), bits_of(wide, narrow, 45))
        assert error < before if budget <= 45 else error == before
        assert wide + narrow // 2 == min(budget, 45)
        before = error
    assert divide_bits(variances, 0) == (0, 0) and divide_bits(variances, 99) == (45, 0)
    assert divide_bits(variances[:0], 4) == (0, 0)
    for size, budget in itertools.product((1, 4, 5), range(8)):  # nothing varies: any will do
        wide, narrow = divide_bits(torch.zeros(size, dtype=torch.float64), budget)
        assert len(bits_of(wide, narrow, size)) == size
        assert wide + narrow // 2 <= budget, (size, budget)


def test_error_constants_are_what_rounding_costs() -> None:
    """Of normal variables with variance 1, at the ranges that ``fit_basis`` chooses."""
    values = normal(100_000, 2)
    for wide, narrow, limit, expected in (
        (2, 0, state_codec.RANGE_8, state_codec.ERROR_8),
        (0, 2, state_codec.RANGE_4, state_codec.ERROR_4),
    ):
        basis = plain_basis(wide, narrow, [limit] * 2)
        error = basis.coordinates(*basis.encoded(values)) - values
        assert float(error.square().mean()) == pytest.approx(expected, rel=0.12), (wide, narrow)


# --- the directions


def left_over(basis: Basis, states: Tensor, metric: Array) -> float:
    """Mean eᵀMe of what the directions cannot hold, nothing rounded, float64."""
    centered = states.double().numpy() - basis.mean.double().numpy()
    kept = centered @ basis.encode.double().numpy() @ basis.decode.double().numpy()
    error = centered - kept
    return float(np.einsum("nd,de,ne->", error, metric, error)) / len(states)


def optimum(states: Tensor, metric: Array, rank: int) -> float:
    """The least possible: trailing eigenvalues of M^½ Σ M^½."""
    centered = states.double().numpy()
    centered = centered - centered.mean(axis=0)
    values, vectors = np.linalg.eigh(metric)
    root = vectors * np.sqrt(values) @ vectors.T
    energies = np.linalg.eigvalsh(root @ (centered.T @ centered / len(states)) @ root)  # rising
    return float(energies[: len(energies) - rank].sum())


def lopsided_metric(width: int) -> Array:
    """Some directions, not those in which the states vary most, count a thousand times more."""
    turn = rotation(width, 17)
    metric: Array = turn * np.logspace(0, 3, width) @ turn.T
    return metric


def metrics(width: int) -> tuple[Tensor | None, Tensor]:
    """None, and a lopsided one."""
    return None, torch.from_numpy(lopsided_metric(width))


def returned(basis: Basis, states: Tensor) -> Tensor:
    """States through bytes and back."""
    return basis.coordinates(*basis.encoded(states)) @ basis.decode + basis.mean


def test_the_directions_are_the_best() -> None:
    """In the metric (else as of PCA): plain PCA and random ones are worse."""
    rows = [
        (correlated(300, n), np.eye(n), budget, 1e-4) for n in (30, 31) for budget in (0, 3, 8, 15)
    ]
    skewed = lopsided_metric(28)
    rows += [(correlated(400, 28), skewed, budget, 1e-3) for budget in (3, 8, 14)]
    for states, metric, budget, rtol in rows:
        width, plain, row = len(metric), metric is not skewed, (len(metric), budget)
        basis = fit_basis(states, None if plain else torch.from_numpy(metric), budget)
        rank, found = len(basis.ranges), left_over(basis, states, metric)
        assert basis.bytes_per_position == budget and basis.encode.shape == (width, rank)
        assert found == pytest.approx(optimum(states, metric, rank), rel=rtol), row
        product = (basis.decode @ basis.encode).numpy()
        np.testing.assert_allclose(product, np.eye(rank), atol=rtol / 10, err_msg=str(row))
        if plain:
            continue
        vectors = np.linalg.eigh(np.cov(states.double().numpy().T))[1][:, -rank:]
        others = [rotation(28, seed)[:, :rank] for seed in range(10)]
        for number, kept in enumerate([vectors, *others]):
            turned = torch.from_numpy(kept.copy()).float()
            rival = Basis(basis.mean, turned, turned.T.contiguous(), basis.ranges, basis.wide)
            assert left_over(rival, states, metric) > 1.3 * found, (row, number)


def test_ranges_follow_the_deviations() -> None:
    """Six and 2.9 standard deviations of each coordinate; strongest first."""
    states = correlated(500, 28, decay=0.75)
    for metric in metrics(28):
        basis, row = fit_basis(states, metric, 10), f"metric: {metric is not None}"
        deviations = ((states - basis.mean) @ basis.encode).std(dim=0)
        narrow = len(basis.ranges) - basis.wide
        assert basis.wide > 0 and narrow > 0, row
        times = torch.tensor([state_codec.RANGE_8] * basis.wide + [state_codec.RANGE_4] * narrow)
        expected = (deviations * times).numpy()
        np.testing.assert_allclose(basis.ranges.numpy(), expected, rtol=1e-3, err_msg=row)
        assert bool((deviations.diff() <= 1e-4).all()), row


def test_the_whole_way_costs_what_was_expected() -> None:
    """States through bytes and back: the error that the division of bits promised, at any size."""
    for width, budget in ((1, 1), (7, 3), (7, 7), (16, 16), (16, 40), (33, 20)):
        states = correlated(3000, width)
        basis = fit_basis(states, None, budget)
        assert basis.bytes_per_position == min(budget, width)
        covariance = np.cov(states.double().numpy().T, bias=True).reshape(width, width)
        variances = np.linalg.eigvalsh(covariance)[::-1].tolist()
        bits = bits_of(basis.wide, len(basis.ranges) - basis.wide, width)
        found = float((returned(basis, states) - states).double().square().sum(dim=-1).mean())
        expected = pytest.approx(expected_error(variances, bits), rel=0.15)
        assert found == expected, (width, budget)


def test_few_states() -> None:
    """Fewer states than their width, or all the same: they come back, unseen ones stay finite."""
    unseen = normal(50, 24, seed=5)
    for positions, metric in itertools.product((1, 2, 5, 12), metrics(24)):
        states, row = correlated(positions, 24), (positions, metric is not None)
        basis = fit_basis(states, metric, 24)
        assert basis.bytes_per_position <= 24, row
        error = float((returned(basis, states) - states).norm())
        assert error <= 0.05 * float(states.norm()), row
        assert bool(torch.isfinite(basis.coordinates(*basis.encoded(10.0 * unseen))).all()), row
    states = normal(1, 24).repeat(30, 1)
    for metric in metrics(24):
        basis = fit_basis(states, metric, 8)
        torch.testing.assert_close(returned(basis, states), states, rtol=1e-4, atol=1e-5)
        assert bool(torch.isfinite(basis.coordinates(*basis.encoded(unseen))).all())


def test_states_without_full_rank() -> None:
    """Directions that only rounding errors span must not spoil a state that uses them."""
    states = normal(300, 5) @ normal(5, 24, seed=1)
    for budget in (12, 24, 48):
        basis = fit_basis(states, None, budget)
        error = float((returned(basis, states) - states).norm())
        assert error <= 0.05 * float(states.norm()), budget
        unseen = returned(basis, states + 0.1 * normal(300, 24, seed=2))
        assert float((unseen - states).norm()) <= 0.2 * float(states.norm()), budget


def test_the_same_states_give_the_same_bytes() -> None:
    """Twice the same call."""
    states, metric = correlated(200, 24), torch.from_numpy(lopsided_metric(24))
    first, second = (fit_basis(states.clone(), metric.clone(), 10) for _ in range(2))
    for name, array in first.arrays("b").items():
        assert array.tobytes() == second.arrays("b")[name].tobytes(), name
    for mine, theirs in zip(first.encoded(states), second.encoded(states), strict=True):
        assert mine.tobytes() == theirs.tobytes()


# --- the metric and the head


def reference_metric(states: Array, matrix: Array, num_topk: int, cap: float = 0.0) -> Array:
    """Σ_v p_v (w_v − w̄)(w_v − w̄)ᵀ with the average tail p, by its definition; under a soft cap
    each row is as long as the logit's mean derivative says."""
    logits = states @ matrix.T
    if cap:
        matrix = (1.0 / np.cosh(logits / cap) ** 2).mean(axis=0)[:, None] * matrix
        logits = cap * np.tanh(logits / cap)
    average = np.zeros(len(matrix))
    for row in logits:
        tail = np.argsort(-row, kind="stable")[num_topk:]
        for temperature in (1.0, 3.0):
            weights = np.exp(row[tail] / temperature)
            average[tail] += weights / weights.sum() / 2.0 / len(states)
    centered = matrix - average @ matrix
    metric: Array = (average[:, None] * centered).T @ centered
    return metric


def test_the_metric_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the output matrix comes in several parts."""
    states, apart = normal(5, 4), torch.tensor([1.0, 0.0, -1.0, 0.5])
    for vocab_size, num_topk, cap in ((60, 16, 0.0), (17, 16, 0.0), (9, 8, 0.0), (60, 16, 3.0)):
        matrix = normal(vocab_size, 4, seed=1) + apart
        exact = states.double().numpy(), matrix.double().numpy()
        expected = reference_metric(*exact, num_topk, cap)
        whole = tail_metric(states, rows_of(matrix), vocab_size, cap)
        assert whole.dtype == torch.float64
        row = f"{vocab_size}, cap {cap}"
        np.testing.assert_allclose(whole.numpy(), expected, rtol=1e-4, atol=1e-5, err_msg=row)
        with monkeypatch.context() as patch:
            patch.setattr(state_codec, "ROWS_AT_ONCE", 7)
            parts = tail_metric(states, rows_of(matrix), vocab_size, cap)
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5, err_msg=row)


def test_the_metric_is_always_positive() -> None:
    """Whatever all rows of the output matrix share, however few, however low their rank."""
    for vocab_size, width, rank, offset in (
        (2000, 64, 64, 0.0),
        (2000, 64, 64, 300.0),
        (300, 512, 512, 0.0),
        (300, 512, 512, 1.0),
        (900, 256, 8, 0.0),
    ):
        for seed in range(3):
            matrix = normal(vocab_size, width, seed=seed)
            if rank < width:
                matrix = matrix[:, :rank] @ normal(rank, width, seed=seed + 40) / rank**0.5
            matrix = 0.1 * (matrix + offset * normal(1, width, seed=seed + 10))
            metric = tail_metric(normal(32, width, seed=seed + 20), rows_of(matrix), vocab_size)
            basis = fit_basis(normal(200, width, seed=seed + 30), metric, 16)
            row = (vocab_size, width, rank, offset, seed)
            assert bool(torch.isfinite(basis.encode).all()), row
            assert bool(torch.isfinite(basis.decode).all()), row


def test_a_full_basis_gives_the_logits_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a constant of each position; to rounding with bytes, to float16 without."""
    monkeypatch.setattr(state_codec, "ROWS_AT_ONCE", 70)
    states, matrix = correlated(400, 20), normal(300, 20, seed=1) + 1.0
    true = states.double() @ matrix.double().T
    spread = float((true - true.mean(dim=-1, keepdim=True)).std())
    for metric in (None, tail_metric(states, rows_of(matrix), 300)):
        basis = fit_basis(states, metric, 20)
        assert basis.wide == 20
        head = basis.head(rows_of(matrix), 300)
        assert head.matrix.shape == (300, 20) and head.bias.shape == (300,)
        assert head.matrix.dtype == head.bias.dtype == torch.float32
        assert torch.equal(head.matrix, head.matrix.half().float()), "as float16 would keep it"
        exact = (states - basis.mean) @ basis.encode
        rounded = basis.coordinates(*basis.encoded(states))
        for coordinates, tolerance in ((exact, 1e-3), (rounded, 0.02)):
            error = head.logits(coordinates).double() - true
            error -= error.mean(dim=-1, keepdim=True)
            row = (metric is not None, tolerance)
            assert float(error.square().mean().sqrt()) <= tolerance * spread, row
            assert float(error.abs().max()) <= 10 * tolerance * spread, row


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
    """States and output matrix of a low-rank teacher; the same of a student somewhat off."""
    states = correlated(256, 64) * 0.35
    matrix = normal(1500, 64, seed=1) * 0.6
    off = 0.2 * normal(256, 64, seed=2), 0.2 * normal(1500, 64, seed=3)
    return states, matrix, states + off[0], matrix + off[1]


def head_gradients(
    teacher: Array, student_states: Array, student_matrix: Array, temperature: float
) -> list[Array]:
    """Gradients of T·KL(teacher ‖ student) in the student's output matrix and hidden states."""
    scores = student_states @ student_matrix.T / temperature
    student = np.exp(scores - scores.max(axis=1, keepdims=True))
    student /= student.sum(axis=1, keepdims=True)
    return [(student - teacher).T @ student_states, (student - teacher) @ student_matrix]


def with_bucket(targets: CompactTargets, student_logits: Array, temperature: float) -> Array:
    """What the bucket says: the tail's mass, spread as the student spreads its own."""
    weights = np.exp((student_logits - student_logits.max(axis=1, keepdims=True)) / temperature)
    ids = targets.topk_ids.numpy()
    np.put_along_axis(weights, ids, 0.0, axis=1)
    mass = targets.tail_mass(temperature).double().numpy()
    spread: Array = weights * (mass / weights.sum(axis=1))[:, None]
    inside = targets.topk_log_probs(temperature).double().exp().numpy()
    np.put_along_axis(spread, ids, inside, axis=1)
    return spread


def test_the_gradient_is_far_closer_than_with_the_bucket_alone() -> None:
    """Through stored bytes: error of both LM-head gradients, against those of the dense teacher.

    Measured shares of the bucket's error, in the hidden states (the weights' are lower): 1.6e-2
    and 4.6e-2.
    """
    states, matrix, student_states, student_matrix = teacher_and_student()
    logits = states @ matrix.T
    metric = tail_metric(states[::2], rows_of(matrix), 1500)
    ours, theirs = student_states.double().numpy(), student_matrix.double().numpy()
    for sketch_bytes, at_most in ((48, 0.03), (24, 0.08)):
        basis = fit_basis(states[::2], metric, sketch_bytes)
        recipe = Recipe(num_topk=16, sketch_bytes=sketch_bytes)
        arrays: Arrays = reduce(Answer(logits=logits, states=states), recipe, {"final": basis})
        targets = typed(arrays, recipe, 1500, basis, basis.head(rows_of(matrix), 1500))
        assert isinstance(targets, CompactTargets)
        for temperature in (1.0, 2.0, 3.0):
            exact = np.exp(logits.double().numpy() / temperature)
            exact /= exact.sum(axis=1, keepdims=True)
            sketched = targets.log_probs(temperature).double().exp().numpy()
            bucket = with_bucket(targets, ours @ theirs.T, temperature)
            true, found, coarse = (
                head_gradients(teacher, ours, theirs, temperature)
                for teacher in (exact, sketched, bucket)
            )
            for a, b, c in zip(true, found, coarse, strict=True):
                row = (sketch_bytes, temperature)
                assert np.linalg.norm(c - a) > 0.05 * np.linalg.norm(a), f"{row}: the tail matters"
                assert np.linalg.norm(b - a) < at_most * np.linalg.norm(c - a), row
