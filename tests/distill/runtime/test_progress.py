"""Time left, on clocks of our own: never early, never negative, no days after one slow start."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from distill.runtime import progress
from distill.runtime.progress import TimeLeft


def told(reports: Iterable[tuple[float, float]]) -> list[float | None]:
    """What is said after each report (seconds, share of the work)."""
    left, said = TimeLeft(), []
    for now, share in reports:
        left.report(now, share)
        said.append(left.seconds(now))
    return said


def test_a_steady_speed() -> None:
    """From the fifth second after the first progress on, what is really left."""
    said = told((second, second / 100) for second in range(101))
    assert said[:6] == [None] * 6
    for second, left in enumerate(said[6:], 6):
        assert left is not None and abs(left - (100 - second)) < 1e-6, second


def test_a_slow_start_does_not_count() -> None:
    """A minute for the first of 10,000 parts, then ten a second: never more than 20 minutes."""
    said = told([(0.0, 0.0), *((60 + part / 10, (part + 1) / 10_000) for part in range(3_000))])
    assert max(left for left in said if left is not None) < 1_200
    assert abs((said[-1] or 0.0) - 700) < 10
    found = told(
        [(60.0, 0.001), (61.0, 0.002), (400.0, 0.003), *((400.0 + n, 0.1) for n in (1, 2))]
    )
    assert all(left is None or 0.0 <= left < 7_200 for left in found), found


def test_going_back_begins_anew() -> None:
    """A rollback or a shard captured again; more than everything leaves nothing, not less."""
    said = told([*((second, second / 50) for second in range(30)), (30.0, 0.2), (31.0, 0.22)])
    assert said[29] is not None and said[-2:] == [None, None]
    assert told((second, second / 5) for second in range(9))[-1] == 0.0


def test_what_is_usually_quick_is_shown_where_it_is_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line at its end, or nothing at all."""
    for seconds, shown in ((60.0, False), (-1.0, True)):
        monkeypatch.setattr(progress, "SLOW_SECONDS", seconds)
        with progress.Console().stage_if_slow("Read files") as tell:
            for share in (0.1, 0.5, 1.0):
                tell(share)
        said = capsys.readouterr().out
        assert ("Read files" in said and said.count("\n") == 1) if shown else not said, said
