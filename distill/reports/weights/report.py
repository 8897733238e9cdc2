"""Weights by themselves, of any file: what is broken, collapsed or odd in them, in figures and
in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.reports.document import Fact
from distill.reports.weights.files import Stored, WeightFile, open_weights
from distill.reports.weights.layers import Place, layers_of, places_of
from distill.runs.folder import WEIGHTS
from distill.runtime import interrupts
from distill.runtime.format import human_bytes, human_count
from distill.runtime.progress import Console
from stability.measures.weights import EXACT_SIDE, GRAM, WeightStats, weigh

WORTH_SHOWING = 5e9  # values times smaller side, over all matrices: about two seconds on two cores
COLLAPSED = (
    0.1  # effective rank, as a share of the full one, below which a matrix counts as collapsed
)
SMALLEST_SIDE = 16  # of a matrix whose rank says something
USUAL_TAIL = (2.0, 6.0)  # exponents of well-trained layers (Martin and Mahoney 2021)
HASH_TABLE = "safety_head.runs"
NAMED = 3  # tensors named of those that something is said about


@dataclass(frozen=True)
class MeasuredTensor:
    """One tensor's figures, where it belongs, and the type that it is stored in."""

    figures: WeightStats
    place: Place
    stored_as: str

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.figures.name

    @property
    def dead(self) -> int:
        """Rows and columns of nothing but zeros, in a matrix that is not all zeros; a hash table
        has rows that nothing met."""
        if self.figures.zero_share == 1.0 or self.name.endswith(HASH_TABLE):
            return 0
        return (self.figures.dead_rows or 0) + (self.figures.dead_columns or 0)

    @property
    def rank_share(self) -> float | None:
        """Effective rank as a share of the full one, where that says something."""
        spectrum = self.figures.spectrum
        if spectrum is None or spectrum.full_rank < SMALLEST_SIDE or self.figures.zero_share == 1.0:
            return None
        return spectrum.rank_share

    @property
    def alpha(self) -> float | None:
        """The heavy tail's exponent."""
        spectrum = self.figures.spectrum
        return None if spectrum is None or spectrum.tail is None else spectrum.tail.alpha

    @property
    def collapsed(self) -> bool:
        """Whether it uses hardly any of its directions."""
        return self.rank_share is not None and self.rank_share < COLLAPSED

    @property
    def odd_tail(self) -> bool:
        """Whether its exponent is not what well-trained layers have."""
        return self.alpha is not None and not USUAL_TAIL[0] <= self.alpha <= USUAL_TAIL[1]

    @property
    def concern(self) -> tuple[bool, bool, bool, bool, float]:
        """For sorting: what is worst comes first in descending order."""
        figures = self.figures
        return (
            bool(figures.not_finite),
            self.dead > 0,
            self.collapsed,
            self.odd_tail,
            -(self.rank_share or 1.0),
        )


def verdict(tensors: Sequence[MeasuredTensor]) -> list[Fact]:
    """What the figures say, what is broken first."""
    matrices = [one for one in tensors if one.figures.spectrum is not None]
    return [
        _finite(tensors),
        *_zeros(tensors),
        *_dead(tensors),
        *_ranks(matrices),
        *_tails(matrices),
        *_routes(matrices),
    ]


@dataclass(frozen=True)
class WeightsReport:
    """The weights of one file.

    ``left_out``: tensors that were not looked at, by the reason in words.
    """

    name: str
    path: str
    format: str
    architecture: str | None
    file_bytes: int
    parameters: int
    verdict: list[Fact]
    tensors: list[MeasuredTensor]
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        tree: dict[str, Any] = without_infinities(asdict(self))
        return {"kind": "weights", **tree}


def read_weights(path: Path, console: Console | None = None) -> WeightsReport:
    """Look at every weight of a file or a folder with weights; ``console`` shows the progress.

    Raises:
        UserError, TeacherFileError: not weights, empty, cut off, or damaged.
    """
    with open_weights(path) as file:
        return weigh_file(file, name_of(path), console)


def name_of(path: Path) -> str:
    """What to call weights: a file by its name; a folder, and what is named alike in all, with
    what it lies in."""
    parts = [
        part for part in path.resolve().parts if part not in (path.resolve().anchor, "checkpoints")
    ]
    if path.is_file():
        return "/".join(parts[-3:]) if path.name == WEIGHTS else path.name
    return "/".join(parts[-2:])


def weigh_file(
    file: WeightFile,
    name: str,
    console: Console | None = None,
    *,
    exact_side: int = EXACT_SIDE,
    wanted: Callable[[Stored], str] = lambda stored: "",
) -> WeightsReport:
    """The report on an open file. ``wanted``: why a tensor is to be left out, empty where it is
    not.

    Raises:
        UserError, TeacherFileError: a tensor cannot be read.
    """
    left_out: dict[str, list[str]] = {}
    chosen: list[Stored] = []
    for stored in file.tensors:
        reason = "whole numbers (packed, a table, or a counter)" if stored.whole else wanted(stored)
        if reason:
            left_out.setdefault(reason, []).append(stored.name)
        else:
            chosen.append(stored)
    if not chosen:
        raise UserError(f"{file.path} holds whole numbers only; weights are numbers with a point")
    places, tensors = places_of(stored.name for stored in file.tensors), []
    with progress(console, "Weigh", chosen) as update:
        for number, stored in enumerate(chosen, 1):
            figures = weigh(stored.name, stored.read(), exact_side=exact_side)
            tensors.append(MeasuredTensor(figures, places[stored.name], stored.kind))
            update(number, stored.name)
    return WeightsReport(
        name=name,
        path=str(file.path),
        format=file.format,
        architecture=file.architecture,
        file_bytes=file.bytes,
        parameters=sum(math.prod(stored.shape) for stored in file.tensors if not stored.whole),
        verdict=verdict(tensors),
        tensors=tensors,
        left_out=left_out,
    )


@contextmanager
def progress(
    console: Console | None, title: str, work: Sequence[Stored]
) -> Iterator[Callable[[int, str], None]]:
    """What is to be told how many of the tensors are done: it shows a stage where that takes a
    while."""
    cost = sum(
        math.prod(one.shape) * min(one.shape, default=1) for one in work if len(one.shape) == 2
    )
    if console is None or cost < WORTH_SHOWING:
        yield lambda done, note: interrupts.check()
        return
    with console.stage(title, len(work)) as stage:
        yield stage.update
        stage.finish(f"{len(work):,} tensors")


def summary_words(report: WeightsReport) -> str:
    """One line on what the file is."""
    words = [
        report.format,
        f"{len(report.tensors):,} tensors",
        f"{human_count(report.parameters)} parameters",
    ]
    layers = layers_of(one.place for one in report.tensors)
    if layers:
        words.append(f"{len(layers)} layer{'s' if len(layers) > 1 else ''}")
    words.append(human_bytes(report.file_bytes))
    return ", ".join(words if report.architecture is None else [report.architecture, *words])


def named(tensors: Sequence[MeasuredTensor]) -> str:
    """The first few by name, and how many more there are."""
    more = f" and {len(tensors) - NAMED:,} more" if len(tensors) > NAMED else ""
    return ", ".join(one.name for one in tensors[:NAMED]) + more


def without_infinities(tree: Any) -> Any:
    """The same tree with None for every number that is not finite."""
    if isinstance(tree, dict):
        return {key: without_infinities(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [without_infinities(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _finite(tensors: Sequence[MeasuredTensor]) -> Fact:
    bad = [one for one in tensors if one.figures.not_finite]
    count = sum(one.figures.count for one in tensors)
    if not bad:
        return Fact("good", f"All {human_count(count)} values looked at are finite.")
    values = sum(one.figures.not_finite for one in bad)
    return Fact(
        "warning",
        f"{values:,} of {human_count(count)} values are not finite, in {_tensors(bad)}: "
        f"{named(bad)}. A model with "
        "such weights answers nothing but NaN; use an earlier checkpoint.",
    )


def _zeros(tensors: Sequence[MeasuredTensor]) -> list[Fact]:
    zero = [one for one in tensors if one.figures.zero_share == 1.0]
    if not zero:
        return []
    return [Fact("plain", f"Nothing but zeros is in {_tensors(zero)}: {named(zero)}.")]


def _dead(tensors: Sequence[MeasuredTensor]) -> list[Fact]:
    matrices = [one for one in tensors if one.figures.dead_rows is not None]
    dead = sorted((one for one in matrices if one.dead), key=lambda one: -one.dead)
    if not dead:
        return [Fact("good", "No matrix has a row or column of zeros.")] if matrices else []
    rows, columns = (
        sum(getattr(one.figures, kind) or 0 for one in dead)
        for kind in ("dead_rows", "dead_columns")
    )
    words = (
        f"{rows:,} rows and {columns:,} columns are all zeros, in {_tensors(dead)}: {named(dead)}"
    )
    return [Fact("warning", f"{words}. Units behind them do nothing.")]


def _ranks(matrices: Sequence[MeasuredTensor]) -> list[Fact]:
    known = [(one.rank_share, one) for one in matrices if one.rank_share is not None]
    if not known:
        return []
    low, high = min(known, key=lambda pair: pair[0]), max(known, key=lambda pair: pair[0])
    words = (
        f"effective ranks lie between {low[0]:.0%} ({low[1].name}) and {high[0]:.0%} of the "
        "full one"
    )
    collapsed = [one for _, one in sorted(known, key=lambda pair: pair[0]) if one.collapsed]
    if collapsed:
        return [
            Fact(
                "warning",
                f"{_tensors(collapsed).capitalize()} collapsed to less than {COLLAPSED:.0%} of the "
                "directions: "
                f"{named(collapsed)}; {words}.",
            )
        ]
    return [Fact("good", f"No matrix has collapsed: {words}.")]


def _tails(matrices: Sequence[MeasuredTensor]) -> list[Fact]:
    known = [one for one in matrices if one.alpha is not None]
    if not known:
        return []
    low, high = USUAL_TAIL
    odd = [one for one in known if one.odd_tail]
    usual = f"{low:g} to {high:g}, where layers that were trained well usually lie"
    if not odd:
        return [
            Fact(
                "good", f"The heavy-tail exponent of all {len(known):,} matrices is within {usual}."
            )
        ]
    odd.sort(key=lambda one: -abs(math.log((one.alpha or 1.0) / math.sqrt(low * high))))
    words = ", ".join(f"{one.name} {one.alpha:.1f}" for one in odd[:NAMED])
    return [
        Fact(
            "plain",
            f"The heavy-tail exponent of {len(odd):,} of {len(known):,} matrices is outside "
            f"{usual} ({words}). That "
            "is worth a look and no alarm: in small models, and in layers that learnt little, it "
            "is common.",
        )
    ]


def _routes(matrices: Sequence[MeasuredTensor]) -> list[Fact]:
    fast = [
        one
        for one in matrices
        if one.figures.spectrum is not None and one.figures.spectrum.route == GRAM
    ]
    if not fast:
        return []
    return [
        Fact(
            "plain",
            f"The singular values of {_tensors(fast)} come from the Gram matrix in float32, for "
            "speed: below some "
            "0.0005 of the largest one they are rounding.",
        )
    ]


def _tensors(some: Sequence[MeasuredTensor]) -> str:
    return "one tensor" if len(some) == 1 else f"{len(some):,} tensors"
