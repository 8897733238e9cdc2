"""Sketched hidden states: how they are rounded, scaled, written, and read from older stores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from teachers.targets import state_codec
from teachers.targets.distributions import Arrays
from teachers.targets.fit_codec import fit_basis, tail_metric
from teachers.targets.state_codec import PARTS, SCALES, Basis, bases_in
from tests.support.stores import basis_of_format_4, correlated, normal, of_format_4, rows_of


def plain_basis(bits: list[int], steps: list[float]) -> Basis:
    """Coordinates are the state's own entries."""
    eye = torch.eye(len(bits))
    widths = torch.tensor(bits, dtype=torch.uint8)
    return Basis(torch.zeros(len(bits)), eye, eye, torch.tensor(steps), widths)


def reference_codes(places: list[float], bits: list[int]) -> list[int]:
    """Codes of coordinates in steps, by their definition."""
    codes = (math.floor(x + 2 ** (b - 1)) for x, b in zip(places, bits, strict=True))
    return [min(max(code, 0), 2**b - 1) for code, b in zip(codes, bits, strict=True)]


def reference_values(codes: list[int], bits: list[int]) -> list[float]:
    """The middles of the steps that codes stand for."""
    return [code - 2 ** (b - 1) + 0.5 for code, b in zip(codes, bits, strict=True)]


def test_codes_are_as_documented() -> None:
    """⌊x / s + 2^(b − 1)⌋ within its bits, one code after another, and back to the step's middle;
    at the scale of all that may be which loses least."""
    random = np.random.default_rng(0)
    for bits in ([8, 4, 3, 1], [2] * 9, [5], [8, 7, 6, 5, 4, 3, 2, 1], [1, 8]):
        steps = random.uniform(0.5, 2.0, len(bits)).astype(np.float32)
        spread = 0.4 * steps * 2.0 ** np.array(bits) * np.array([[0.3], [1.0], [3.0]] * 30)
        states = (random.normal(size=(90, len(bits))) * spread).astype(np.float32)
        basis = plain_basis(bits, steps.tolist())
        codes, scales = basis.encoded(torch.from_numpy(states))
        found = basis.coordinates(codes, scales).numpy()
        assert codes.dtype == np.uint8 and scales.dtype == np.float16
        assert codes.shape == (90, -(-sum(bits) // 8)) == (90, basis.bytes_per_position)
        for row, (state, scale) in enumerate(zip(states, scales.astype(float), strict=True)):
            places = (state / steps).tolist()
            reach = max(abs(x) / 2 ** (b - 1) for x, b in zip(places, bits, strict=True))
            losses = {}
            for one in (*SCALES, float(np.float16(max(1.0, 1.001 * reach)))):
                kept = reference_codes([x / one for x in places], bits)
                back = np.array(reference_values(kept, bits)) * one * steps
                losses[one] = float(((back - state) ** 2).sum())
            kept = reference_codes([x / scale for x in places], bits)
            digits = "".join(f"{code:0{b}b}" for code, b in zip(kept, bits, strict=True))
            stored = "".join(f"{byte:08b}" for byte in codes[row])
            assert stored.startswith(digits) and set(stored[len(digits) :]) <= {"0"}, (bits, row)
            values = np.array(reference_values(kept, bits)) * scale * steps
            np.testing.assert_allclose(found[row], values, rtol=1e-5)
            lost = float(((found[row] - state) ** 2).sum())
            assert lost <= min(losses.values()) * 1.01 + 1e-6, (bits, row)


def test_outliers_are_scaled() -> None:
    """A coordinate far out stretches its position's steps; other positions do not notice."""
    basis = plain_basis([8, 7, 3], [0.01, 0.02, 0.3])
    for factor in (10.0, 40.0, 3000.0):
        states = torch.tensor([[0.1, -0.3, 0.5], [-0.1, -1.28 * factor, 0.5]])
        codes, scales = basis.encoded(states)
        assert float(scales[0]) in SCALES
        assert factor <= float(scales[1]) <= factor * 1.003
        error = (basis.coordinates(codes, scales) - states).abs()
        steps = torch.tensor([0.01, 0.02, 0.3]) * torch.from_numpy(scales).float()[:, None]
        assert bool((error[1] <= 0.5001 * steps[1]).all()), factor
    far = basis.encoded(torch.tensor([[0.0, 1e9, 0.0]]))
    assert bool(torch.isfinite(basis.coordinates(*far)).all()), "cut, not lost"


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
    assert basis.coordinates(*nothing).shape == (0, len(basis.steps))


def test_arrays_and_back() -> None:
    """A basis survives its arrays bit for bit; another name finds nothing."""
    states = correlated(10, 24, seed=3)
    for budget in (0, 5, 24):
        basis = fit_basis(correlated(80, 24), None, budget)
        other = fit_basis(correlated(80, 24, seed=1), None, 3)
        arrays = {**basis.arrays("final"), **other.arrays("layer1")}
        again = Basis.from_arrays(arrays, "final")
        for name in PARTS:
            assert torch.equal(getattr(again, name), getattr(basis, name)), (budget, name)
        assert set(bases_in(arrays, (1, 2))) == {"final", "layer1"}
        for mine, theirs in zip(basis.encoded(states), again.encoded(states), strict=True):
            assert np.array_equal(mine, theirs), budget


def test_what_is_no_basis_is_refused() -> None:
    """A store comes from outside: shapes, types, bits and steps are looked at, and codes."""
    basis = fit_basis(correlated(80, 30), None, 2)
    arrays = basis.arrays("final")
    count = len(basis.steps)
    bits, steps = arrays["final_bits"], arrays["final_steps"]
    wrong: list[Arrays] = [
        {"final_bits": bits[:-1]},
        {"final_bits": np.append(bits, bits[-1:])},
        {"final_bits": bits.astype(np.int64)},
        {"final_bits": bits[:, None]},
        *({"final_bits": np.full(count, one, np.uint8)} for one in (0, 9, 255)),
        *({"final_steps": np.full(count, one, np.float32)} for one in (0.0, -1.0, np.nan, np.inf)),
        {"final_steps": steps.astype(np.float64)},
        {"final_mean": arrays["final_mean"][:-1]},
        {"final_encode": arrays["final_encode"].T.copy()},
        {"final_encode": arrays["final_encode"].ravel()},
        {"final_decode": arrays["final_decode"][:-1]},
        {"final_signed": np.array([count + 1])},
        {"final_signed": np.array([-1])},
        {"final_wide": np.array([3]), "final_ranges": steps[:2]},
        {"final_wide": np.array([-1]), "final_ranges": steps},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match="final"):
            Basis.from_arrays(arrays | change, "final")
            pytest.fail(f"passes: {change}")
    with pytest.raises(KeyError):
        Basis.from_arrays({k: v for k, v in arrays.items() if k != "final_bits"}, "final")
    codes, scales = basis.encoded(correlated(3, 30))
    others: list[Any] = [codes[:, :-1], codes[:-1], codes.astype(np.int8), codes[0]]
    for other in others:
        with pytest.raises(ValueError, match="another basis"):
            basis.coordinates(other, scales)


def test_codes_of_earlier_formats_are_read_and_written() -> None:
    """As their own writer left them, for every byte; new ones for the same store mean the same."""
    random = np.random.default_rng(0)
    for wide, narrow in ((3, 4), (0, 6), (5, 0)):
        arrays = basis_of_format_4("final", wide + narrow, wide, narrow, random)
        ranges = arrays["final_ranges"]
        basis = Basis.from_arrays(arrays, "final")
        codes = random.integers(0, 256, (300, wide + narrow // 2)).astype(np.uint8)
        scales = random.uniform(1.0, 2.0, 300).astype(np.float16)
        expected = np.array(of_format_4(codes.tolist(), wide, ranges.tolist()))
        expected *= scales.astype(float)[:, None]
        assert basis.bytes_per_position == codes.shape[1]
        found = basis.coordinates(codes, scales).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
        states = torch.from_numpy((random.random((200, wide + narrow)) * 2 - 1) * ranges).float()
        back = basis.coordinates(*basis.encoded(states))
        steps = torch.from_numpy(ranges) / torch.tensor([127.0] * wide + [8.0] * narrow)
        error = (back - states).norm(dim=-1)
        assert bool((error <= 0.5001 * steps.norm()).all()), (wide, narrow)
        again = Basis.from_arrays(basis.arrays("final"), "final")
        assert torch.equal(again.coordinates(codes, scales), basis.coordinates(codes, scales))


def test_a_full_basis_gives_the_logits_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a constant of each position; to rounding with bytes, to float16 without."""
    monkeypatch.setattr(state_codec, "ROWS_AT_ONCE", 70)
    states, matrix = correlated(400, 20), normal(300, 20, seed=1) + 1.0
    true = states.double() @ matrix.double().T
    spread = float((true - true.mean(dim=-1, keepdim=True)).std())
    for metric in (None, tail_metric(states, rows_of(matrix), 300)):
        basis = fit_basis(states, metric, 20)
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
        kept = torch.arange(20) % 3 == 1
        some = head.only(kept).logits(exact[:, kept]) - exact[:, kept] @ head.matrix[:, kept].T
        torch.testing.assert_close(some, head.bias.expand(400, -1), atol=1e-4, rtol=0)
