"""What goes on inside the student while it learns, in a table: the worst of all weights and
layers, over steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from distill.reports.document import Section, Table
from distill.runs.metrics_log import Line, names_of
from distill.runtime.format import number

WORDS = (
    "Figures of every weight, and of the student's answers to a text that stays the same, taken "
    "while it learnt. Of "
    "several weights or layers the table has the one that is named; the charts have all."
)


def health_sections(
    weights: Sequence[Line], probe: Sequence[Line], full_ranks: Mapping[str, int]
) -> list[Section]:
    """The section on weights and probe over steps; nothing where neither was logged."""
    if not weights and not probe:
        return []
    rows = [
        _row("information (nats)", [line.get("information") for line in probe]),
        _row("entropy (nats)", [line.get("output_entropy") for line in probe]),
        _row("smallest hidden rank", _over_names(probe, "hidden_rank:", min)),
        _row("smallest entropy of attention (nats)", _over_names(probe, "attention_entropy:", min)),
        _row("largest share of dead units", _over_names(probe, "dead_units:", max)),
    ]
    start = {name: _first(weights, f"norm:{name}") for name in names_of(weights, "norm:")}
    rows.append(_row("largest norm against its start", _over_names(weights, "norm:", max, start)))
    rows.append(_row("smallest norm against its start", _over_names(weights, "norm:", min, start)))
    if full_ranks:
        whole = {name: float(rank) for name, rank in full_ranks.items()}
        rows.append(
            _row("smallest share of the full rank", _over_names(weights, "rank:", min, whole))
        )
    head = ["over all steps", "first", "smallest", "largest", "last"]
    table = Table("", head, [row for row in rows if row])
    return [Section("health", "Inside the student", [WORDS], [table] if table.rows else [])]


def _row(title: str, values: Sequence[float | None]) -> list[str]:
    """First, smallest, largest and last; empty where nothing is known."""
    known = [value for value in values if value is not None]
    return [title, *map(number, (known[0], min(known), max(known), known[-1]))] if known else []


def _over_names(
    lines: Sequence[Line],
    prefix: str,
    choose: Callable[[Iterable[float]], float],
    whole: Mapping[str, float] | None = None,
) -> list[float | None]:
    """Of each line the smallest or largest over all names; over what is given as whole, where
    that is."""
    result: list[float | None] = []
    names = names_of(lines, prefix)
    for line in lines:
        values = [
            value if whole is None else value / whole[name]
            for name in names
            if (value := line.get(prefix + name)) is not None and (whole is None or whole.get(name))
        ]
        result.append(choose(values) if values else None)
    return result


def _first(lines: Sequence[Line], name: str) -> float:
    """A figure's first known value; 0 where there is none."""
    return next((value for line in lines if (value := line.get(name)) is not None), 0.0)
