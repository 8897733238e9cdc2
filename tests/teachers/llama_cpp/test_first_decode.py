"""The measure by which results of a first decode are compared."""

from __future__ import annotations

import numpy as np
import pytest

from teachers.llama_cpp.first_decode import allowed_kl, mean_kl, usable


def test_divergence_of_logits() -> None:
    """Against the definition in float64; identity, direction, excluded tokens, unusable logits."""
    draw = np.random.default_rng(0)
    p, q = draw.normal(0, 3, (2, 5, 40)).astype(np.float32)
    one, other = (np.exp(rows.astype(np.float64)) for rows in (p, q))
    one, other = (rows / rows.sum(1, keepdims=True) for rows in (one, other))
    expected = (one * np.log(one / other)).sum(1).mean()
    assert mean_kl(p, q) == pytest.approx(expected, rel=1e-6) and mean_kl(p, p) == 0.0
    assert mean_kl(p, q) != pytest.approx(mean_kl(q, p), rel=1e-3)
    p[:, 3] = q[:, 3] = -np.inf  # tokens that a model excludes
    assert np.isfinite(mean_kl(p, q)) and usable(p)
    assert allowed_kl(p, p) == 0.01 and allowed_kl(p, q) == pytest.approx(5 * mean_kl(p, q))
    for bad in (np.nan, np.inf):
        rows = p.copy()
        rows[2, 5] = bad
        assert not usable(rows), bad
    rows[:] = -np.inf
    assert not usable(rows)
