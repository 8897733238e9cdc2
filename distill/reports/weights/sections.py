"""The tables on weights by themselves: kinds of weight first, then tensors, worst first where
there are many."""

from __future__ import annotations

from collections.abc import Sequence

from distill.reports.document import Section, Table
from distill.reports.weights.comparison import WeightsComparison
from distill.reports.weights.layers import kinds_of
from distill.reports.weights.report import MeasuredTensor, WeightsReport, summary_words
from distill.runtime.format import MISSING, figure, number, share
from stability.measures.weights import GRAM

FEW = 40  # tensors that are listed in the order they lie in
IN_TERMINAL = 25  # of more
MOST_ROWS = 400  # on the page
HEAD = ["tensor", "shape", "stored as", "norm", "spread", "largest", "effective rank", "of full"]
HEAD += ["stable rank", "tail", "remarks"]
SPARE = (2, 4, 5, 6, 8)
NOTE = (
    "Effective rank: exp of the entropy of the singular values, and as a share of all. Stable "
    "rank: squared norms, "
    "Frobenius over spectral. Tail: exponent of the power law of the largest eigenvalues."
)


def weight_sections(report: WeightsReport) -> list[Section]:
    """The parts of the report on a file of weights."""
    words = [summary_words(report), report.path]
    for reason, names in report.left_out.items():
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        words.append(f"Not looked at, {reason}: {', '.join(names[:3])}{more}.")
    return [Section("weights", "Weights", words, tensor_tables(report.tensors))]


def tensor_tables(tensors: Sequence[MeasuredTensor]) -> list[Table]:
    """All tensors where they are few; else the kinds, and the tensors worst first."""
    if len(tensors) <= FEW:
        return [Table("Tensors", HEAD, [_row(one) for one in tensors], NOTE, spare=SPARE)]
    worst = sorted(tensors, key=lambda one: one.concern, reverse=True)
    note = (
        NOTE
        if len(tensors) <= MOST_ROWS
        else f"{NOTE} The first {MOST_ROWS:,} of {len(tensors):,}; --json has all."
    )
    rows = [_row(one) for one in worst[:MOST_ROWS]]
    title = "Tensors, worst first"
    return [_kinds(tensors), Table(title, HEAD, rows, note, shown=IN_TERMINAL, spare=SPARE)]


def weight_comparison_sections(comparison: WeightsComparison) -> list[Section]:
    """The parts of a comparison of two files."""
    words = [
        f"{letter}: {summary_words(one)}"
        for letter, one in (("A", comparison.first), ("B", comparison.second))
    ]
    pairs = sorted(
        comparison.pairs, key=lambda one: -(one.distance if one.distance is not None else 0.0)
    )
    rows = [
        [
            one.name,
            _shape(one.first)
            if one.first.figures.shape == one.second.figures.shape
            else f"{_shape(one.first)}; {_shape(one.second)}",
            figure(one.norm_ratio),
            MISSING if one.distance is None else f"{one.distance:.2%}",
            *(_rank(side) for side in (one.first, one.second)),
            *(figure(side.alpha) for side in (one.first, one.second)),
        ]
        for one in pairs[:MOST_ROWS]
    ]
    head = ["tensor", "shape", "norm, B/A", "distance", "rank, A", "rank, B", "tail, A", "tail, B"]
    note = (
        "Distance: norm of the difference over the norm in A; the farthest first. Rank: the "
        "effective one."
    )
    if len(pairs) > MOST_ROWS:
        note += f" The first {MOST_ROWS:,} of {len(pairs):,}; --json has all."
    return [
        Section(
            "pairs",
            "Tensor by tensor",
            words,
            [Table("", head, rows, note, shown=FEW, spare=(1, 6, 7))],
        )
    ]


def _kinds(tensors: Sequence[MeasuredTensor]) -> Table:
    """One row for each kind of weight in layers, and for each tensor outside."""
    rows = []
    for kind in kinds_of(one.place for one in tensors):
        some = [one for one in tensors if one.place.layer is not None and one.place.kind == kind]
        rows.append([kind, *_span_cells(some)])
    rows += [[one.name, *_span_cells([one])] for one in tensors if one.place.layer is None][:FEW]
    head = ["kind of weight", "tensors", "norm", "spread", "effective rank", "tail"]
    return Table("By kind", head, rows, "Smallest to largest over the layers.")


def _span_cells(some: Sequence[MeasuredTensor]) -> list[str]:
    shares = [one.rank_share for one in some if one.rank_share is not None]
    return [
        str(len(some)),
        _span([one.figures.norm for one in some]),
        _span([one.figures.spread for one in some]),
        MISSING if not shares else _joined(f"{min(shares):.0%}", f"{max(shares):.0%}"),
        _span([one.alpha for one in some if one.alpha is not None]),
    ]


def _span(values: Sequence[float]) -> str:
    return MISSING if not values else _joined(number(min(values)), number(max(values)))


def _joined(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _row(one: MeasuredTensor) -> list[str]:
    figures = one.figures
    spectrum = figures.spectrum
    return [
        one.name,
        _shape(one),
        one.stored_as,
        number(figures.norm),
        number(figures.spread),
        number(figures.largest),
        _rank(one),
        share(one.rank_share),
        MISSING if spectrum is None else number(spectrum.stable_rank),
        figure(one.alpha),
        ", ".join(_remarks(one)),
    ]


def _remarks(one: MeasuredTensor) -> list[str]:
    """What is to be said of a tensor beyond its figures."""
    figures, result = one.figures, []
    if figures.not_finite:
        result.append(f"{figures.not_finite:,} not finite")
    if figures.zero_share == 1.0:
        result.append("all zeros")
    elif one.dead:
        result.append(
            f"{figures.dead_rows or 0:,} dead rows, {figures.dead_columns or 0:,} dead columns"
        )
    if one.collapsed:
        result.append("collapsed")
    if one.odd_tail:
        result.append("odd tail")
    if figures.spectrum is not None and figures.spectrum.route == GRAM:
        result.append("by Gram matrix")
    return result


def _rank(one: MeasuredTensor) -> str:
    spectrum = one.figures.spectrum
    return MISSING if spectrum is None else f"{spectrum.effective_rank:,.1f}"


def _shape(one: MeasuredTensor) -> str:
    return "×".join(f"{side:,}" for side in one.figures.shape) or "scalar"
