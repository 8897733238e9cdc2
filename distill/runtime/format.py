"""Numbers as people read them: bytes, counts, times, shares."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """A size in bytes, kB, MB or GB (powers of 1000)."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def human_count(count: float) -> str:
    """A number of parameters or tokens: 512, 12.3 k, 46.1 M, 3.8 B."""
    for unit in ("", " k", " M"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} B"


def human_time(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


MISSING = "–"


def figure(value: float | None) -> str:
    """A figure, or a dash where there is none."""
    return MISSING if value is None else number(value)


def share(value: float | None) -> str:
    """A share in percent, or a dash where there is none."""
    return MISSING if value is None else f"{value:.1%}"


def number(value: float) -> str:
    """A figure with about three digits that count."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = 3 if abs(value) < 100 else 1
        return f"{value:,.{digits}f}"
    return f"{value:.1e}"
