"""Fitted codes of hidden states: the division of bits, the directions, the metric, the bytes.

Over 400 lines because the codec's references and its checks belong together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from teachers.targets import fit_codec, state_codec
from teachers.targets import recipe as recipe_module
from teachers.targets.distributions import Arrays, CompactTargets
from teachers.targets.fit_codec import (
    RANGES,
    Directions,
    checked,
    divide_bits,
    fit_basis,
    fit_directions,
    fit_sketch,
    tail_metric,
)
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import Basis
from teachers.targets.stored_arrays import Answer, reduce, typed
from tests.support.stores import (
    Array,
    correlated,
    lopsided_metric,
    normal,
    rotation,
    rows_of,
)

# --- the division of bits


def expected_error(errors: Array, bits: Sequence[int]) -> float:
    """Sum over coordinates of what so many bits leave."""
    return math.fsum(row[b] for row, b in zip(errors, bits, strict=True))


def test_bits_are_divided_best() -> None:
    """No assignment of 0 to 8 bits within the budget has a lower error, searched in full."""
    left = np.array([1.0, 0.4, 0.13, 0.04, 0.012, 4e-3, 1e-3, 3e-4, 1e-4])
    for size, decay in itertools.product((1, 2, 3, 4), (0.02, 0.3, 0.8, 1.0)):
        errors = 5.0 * decay ** np.arange(size)[:, None] * left
        least = [math.inf] * (8 * size + 1)
        for bits in itertools.product(range(9), repeat=size):
            least[sum(bits)] = min(least[sum(bits)], expected_error(errors, bits))
        for total in range(8 * size + 3):
            bits = tuple(divide_bits(torch.from_numpy(errors), total).tolist())
            assert sum(bits) == min(total, 8 * size), (size, decay, total)
            found = expected_error(errors, bits)
            assert found == pytest.approx(least[sum(bits)], rel=1e-9), (size, decay, total)
    assert divide_bits(torch.ones(0, 9), 9).tolist() == []
    useless = torch.tensor([[0.0] * 9, [1.0, 0.5, 0.6, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]])
    assert divide_bits(useless, 16).tolist() == [0, 1], "no bit that takes nothing away"


def test_rounding_is_measured() -> None:
    """The best of the ranges that are tried, and its mean squared error, against the definition;
    near what is known of normal variables (Max 1960)."""
    values = torch.cat((normal(40_000, 1), 3.0 * normal(40_000, 1, seed=1) ** 3), dim=1)
    errors, steps = fit_codec._rounding(values)
    known = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001040, 0.0003035, 0.0000869)
    np.testing.assert_allclose(errors[0].numpy(), known, rtol=0.12)
    exact = values.double().numpy()
    deviations = np.sqrt((exact**2).mean(axis=0))
    for column, bits in itertools.product((0, 1), range(1, 9)):
        half, found = 2 ** (bits - 1), []
        for limit in RANGES:
            step = deviations[column] * limit / half
            codes = np.clip(np.floor(exact[:, column] / step), -half, half - 1)
            found.append((((codes + 0.5) * step - exact[:, column]) ** 2).mean())
        row = (column, bits)
        assert float(errors[column, bits]) == pytest.approx(min(found), rel=1e-2), row
        chosen = float(steps[column, bits]) * half / deviations[column]
        assert chosen == pytest.approx(RANGES[int(np.argmin(found))], rel=1e-4), row


# --- the directions


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


def left_over(kept: Directions, states: Tensor, metric: Array) -> float:
    """Mean eᵀMe of what the directions cannot hold, nothing rounded, float64."""
    centered = states.double().numpy() - kept.mean.double().numpy()
    held = centered @ kept.encode.double().numpy() @ kept.decode.double().numpy()
    error = centered - held
    return float(np.einsum("nd,de,ne->", error, metric, error)) / len(states)


def optimum(states: Tensor, metric: Array, rank: int) -> float:
    """The least possible: trailing eigenvalues of M^½ Σ M^½."""
    centered = states.double().numpy()
    centered = centered - centered.mean(axis=0)
    values, vectors = np.linalg.eigh(metric)
    root = vectors * np.sqrt(values) @ vectors.T
    energies = np.linalg.eigvalsh(root @ (centered.T @ centered / len(states)) @ root)  # rising
    return float(energies[: len(energies) - rank].sum())


def metrics(width: int) -> tuple[Tensor | None, Tensor]:
    """None, and a lopsided one."""
    return None, torch.from_numpy(lopsided_metric(width))


def returned(basis: Basis, states: Tensor) -> Tensor:
    """States through bytes and back."""
    return basis.coordinates(*basis.encoded(states)) @ basis.decode + basis.mean


def test_the_directions_are_the_best() -> None:
    """In the metric (else as of PCA), of the states that they are fitted to: plain PCA and random
    ones are worse."""
    rows = [(correlated(400, n), np.eye(n), rank, 1e-4) for n in (30, 31) for rank in (0, 3, 8, 15)]
    skewed = lopsided_metric(28)
    rows += [(correlated(400, 28), skewed, rank, 1e-3) for rank in (3, 8, 14)]
    for states, metric, rank, rtol in rows:
        width, plain, row = len(metric), metric is not skewed, (len(metric), rank)
        whole = fit_directions(states, None if plain else torch.from_numpy(metric))
        kept, fitted = whole.only(torch.arange(width) < rank), states[:300]
        found = left_over(kept, fitted, metric)
        assert kept.encode.shape == (width, rank)
        assert found == pytest.approx(optimum(fitted, metric, rank), rel=rtol), row
        product = (kept.decode @ kept.encode).numpy()
        np.testing.assert_allclose(product, np.eye(rank), atol=rtol / 10, err_msg=str(row))
        if plain:
            continue
        vectors = np.linalg.eigh(np.cov(fitted.double().numpy().T))[1][:, -rank:]
        others = [rotation(28, seed)[:, :rank] for seed in range(10)]
        for number, kept_too in enumerate([vectors, *others]):
            turned = torch.from_numpy(kept_too.copy()).float()
            rival = replace(kept, encode=turned, decode=turned.T.contiguous())
            assert left_over(rival, fitted, metric) > 1.3 * found, (row, number)


def test_the_whole_way_costs_what_was_expected() -> None:
    """States through bytes and back: at most the error that the division of bits promised (scales
    lessen it), at any size; and less, the more bytes."""
    for width, budgets in ((1, (1,)), (7, (1, 3, 7)), (16, (1, 4, 10, 16, 40)), (33, (5, 20))):
        states, before = correlated(4000, width), math.inf
        directions = fit_directions(states, None)
        for budget in budgets:
            basis = fit_basis(states, None, budget)
            assert basis.bytes_per_position == min(budget, width)
            expected = expected_error(directions.errors.numpy(), directions.bits(budget).tolist())
            found = float((returned(basis, states) - states).double().square().sum(dim=-1).mean())
            assert found < 1.05 * expected, (width, budget)
            assert found <= before, (width, budget)
            before = found


def test_rounding_is_for_other_states() -> None:
    """States of other texts vary in directions in which those that the directions were fitted to
    hardly do: these get bits."""
    strong, weak = normal(400, 30), normal(400, 30, seed=1)
    states = torch.cat((strong[:300] * torch.tensor([1.0] * 15 + [1e-3] * 15), weak[:100]))
    basis = fit_basis(states, None, 20)
    assert len(basis.steps) == 30
    error = returned(basis, weak[100:]) - weak[100:]
    assert float(error.square().mean()) < 0.05


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
    """Directions that only rounding errors span must not spoil a state that uses them; one in which
    nothing varies takes no bits that another could use."""
    states = normal(300, 5) @ normal(5, 24, seed=1)
    for budget in (12, 24, 48):
        basis = fit_basis(states, None, budget)
        error = float((returned(basis, states) - states).norm())
        assert error <= 0.05 * float(states.norm()), budget
        unseen = returned(basis, states + 0.1 * normal(300, 24, seed=2))
        assert float((unseen - states).norm()) <= 0.2 * float(states.norm()), budget
    constant = torch.cat((normal(300, 3), torch.full((300, 2), 7.0)), dim=-1)
    basis = fit_basis(constant, None, 2)
    assert int(basis.bits.sum()) == 16 and len(basis.bits) == 3
    assert float((returned(basis, constant) - constant)[:, 3:].abs().max()) < 1e-4


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
    """Mean of P · Cov(w) over each position's own tail at T = 1 and 3, by its definition; under a
    soft cap each row is as long as the logit's mean derivative says."""
    logits = states @ matrix.T
    if cap:
        matrix = (1.0 / np.cosh(logits / cap) ** 2).mean(axis=0)[:, None] * matrix
        logits = cap * np.tanh(logits / cap)
    metric = np.zeros((matrix.shape[1], matrix.shape[1]))
    for row, temperature in itertools.product(logits, (1.0, 3.0)):
        weights = np.exp(row / temperature)
        tail = np.argsort(-row, kind="stable")[num_topk:]
        mass = weights[tail].sum() / weights.sum()
        shares = weights[tail] / weights[tail].sum()
        centered = matrix[tail] - shares @ matrix[tail]
        metric += mass * (shares[:, None] * centered).T @ centered / 2.0 / len(states)
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
        np.testing.assert_allclose(whole.numpy(), expected, rtol=1e-3, atol=1e-5, err_msg=row)
        with monkeypatch.context() as patch:
            patch.setattr(state_codec, "ROWS_AT_ONCE", 7)
            parts = tail_metric(states, rows_of(matrix), vocab_size, cap)
        np.testing.assert_allclose(parts, whole, rtol=1e-3, atol=1e-5, err_msg=row)


def test_the_metric_is_what_errors_cost() -> None:
    """½ eᵀMe is the KL of small errors in the states, given the exact top tokens and tail mass, by
    both temperatures' mean."""
    states, matrix = normal(40, 12), normal(200, 12, seed=1)
    metric = tail_metric(states, rows_of(matrix), 200).numpy()
    logits = (states @ matrix.T).double().numpy()
    for scale, seed in ((0.01, 2), (0.05, 3)):
        error = scale * normal(40, 12, seed=seed).double().numpy()
        found = []
        for temperature in (1.0, 3.0):
            for row, moved in zip(logits, logits + error @ matrix.double().numpy().T, strict=True):
                tail = np.argsort(-row, kind="stable")[16:]
                shares, others = (np.exp(z / temperature) for z in (row, moved))
                mass = shares[tail].sum() / shares.sum()
                p, q = shares[tail] / shares[tail].sum(), others[tail] / others[tail].sum()
                # An error of a logit counts for 1/T.
                found.append(temperature**2 * mass * (p * np.log(p / q)).sum())
        expected = 0.5 * np.einsum("nd,de,ne->n", error, metric, error).mean()
        assert np.mean(found) == pytest.approx(expected, rel=0.2), scale


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
    and 4.6e-2 before format 5.
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


def test_as_few_bytes_as_are_near_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The KL that is allowed is kept on positions that nothing was fitted to, and with eight bytes
    less it is not; without an allowance all bytes are taken; the cap holds, and so do the bytes
    that are usual."""
    states, matrix, _, _ = teacher_and_student()
    rows = rows_of(matrix)
    usual = fit_sketch(states, rows, 1500, Recipe("compact", 40, 64, 1.0))
    assert usual.basis.bytes_per_position == 200 - 40 * 4 - 24 - 2
    monkeypatch.setattr(recipe_module, "BYTES_PER_POSITION", 0)
    before = math.inf
    for allowed in (0.03, 0.001, 0.0001):
        sketch = fit_sketch(states, rows, 1500, Recipe("compact", 16, 64, allowed))
        size = sketch.basis.bytes_per_position
        assert sketch.kl <= allowed and sketch.head.matrix.shape == (1500, len(sketch.basis.steps))
        fewer = fit_sketch(states, rows, 1500, Recipe("compact", 16, size - 8))
        assert fewer.basis.bytes_per_position == size - 8 and fewer.kl > allowed
        assert sketch.kl < before
        before = sketch.kl
    capped = fit_sketch(states, rows, 1500, Recipe("compact", 16, 12, 1e-6))
    assert capped.basis.bytes_per_position == 12 and capped.kl > 1e-6


def test_the_measured_kl_is_the_codes() -> None:
    """Of the very positions that were left out, through bytes, against the definition."""
    states, matrix, _, _ = teacher_and_student()
    recipe = Recipe("compact", 16, 20)
    for cap in (0.0, 8.0):
        sketch = fit_sketch(states, rows_of(matrix), 1500, recipe, cap)
        left_out = checked(states)
        assert len(left_out) == 64 and torch.equal(left_out, states[-64:])
        logits = left_out @ matrix.T
        logits = cap * torch.tanh(logits / cap) if cap else logits
        arrays: Arrays = reduce(Answer(logits, left_out), recipe, {"final": sketch.basis})
        targets = typed(arrays, recipe, 1500, sketch.basis, sketch.head)
        p, q = logits.double().log_softmax(dim=-1), targets.log_probs(1.0).double()
        found = float((p.exp() * (p - q)).sum(dim=-1).mean())
        assert sketch.kl == pytest.approx(found, rel=1e-2), cap
