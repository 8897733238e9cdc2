"""The weights of two files, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.reports.document import Fact
from distill.reports.weights.files import GGUF, Stored, WeightFile, open_weights
from distill.reports.weights.report import (
    NAMED,
    MeasuredTensor,
    WeightsReport,
    name_of,
    progress,
    weigh_file,
    without_infinities,
)
from distill.runtime.format import number
from distill.runtime.progress import Console
from stability.measures.weights import BLOCK_VALUES
from students.gguf.architectures import UnmappedTensor, from_gguf_name


@dataclass(frozen=True)
class Pair:
    """One tensor of both files, the second's figures against the first's.

    ``norm_ratio``: None where the first's norm is 0. ``distance``: ‖B - A‖ / ‖A‖, None where shapes
    or names differ or a value is not finite. ``rank_ratio``: of the effective ranks.
    """

    name: str
    second_name: str
    first: MeasuredTensor
    second: MeasuredTensor
    norm_ratio: float | None
    distance: float | None
    rank_ratio: float | None


@dataclass(frozen=True)
class WeightsComparison:
    """Two files. ``translated``: their names differ, and GGUF's were put into PyTorch's."""

    first: WeightsReport
    second: WeightsReport
    verdict: list[Fact]
    pairs: list[Pair]
    only_first: list[str]
    only_second: list[str]
    translated: bool

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        pairs = [
            {key: value for key, value in asdict(one).items() if key not in ("first", "second")}
            for one in self.pairs
        ]
        tree: dict[str, Any] = without_infinities(
            {
                "kind": "weights comparison",
                "files": [self.first.to_json(), self.second.to_json()],
                "verdict": [asdict(fact) for fact in self.verdict],
                "pairs": pairs,
                "only_first": self.only_first,
                "only_second": self.only_second,
                "translated": self.translated,
            }
        )
        return tree


def compare_weights(paths: Sequence[Path], console: Console | None = None) -> WeightsComparison:
    """Look at two files and put their tensors side by side by name.

    Raises:
        UserError, TeacherFileError: one is not weights, or damaged, or they share no tensor.
    """
    first, second = paths
    with open_weights(first) as ours, open_weights(second) as theirs:
        reports = [
            weigh_file(file, name_of(path), console)
            for file, path in ((ours, first), (theirs, second))
        ]
        names, translated = _matched(ours, theirs)
        left, right = ({one.name: one for one in report.tensors} for report in reports)
        shared = {mine: its for mine, its in names.items() if mine in left and its in right}
        if not shared:
            raise UserError(
                f"{first} and {second} share no tensor by name; compare files of the same kind of "
                "model"
            )
        stored = [{one.name: one for one in file.tensors} for file in (ours, theirs)]
        pairs = []
        with progress(console, "Compare", [stored[0][name] for name in shared]) as update:
            for done, (mine, its) in enumerate(shared.items(), 1):
                distance = (
                    None if translated else _distance(stored[0][mine], stored[1][its], left[mine])
                )
                pairs.append(_pair(left[mine], right[its], distance))
                update(done, mine)
    only_first = [name for name in left if name not in shared]
    only_second = [name for name in right if name not in shared.values()]
    facts = _facts(pairs, only_first, only_second, translated)
    return WeightsComparison(
        reports[0], reports[1], facts, pairs, only_first, only_second, translated
    )


def _matched(ours: WeightFile, theirs: WeightFile) -> tuple[dict[str, str], bool]:
    """Names of the first file with those of the second, and whether they had to be translated."""
    mine, its = ([one.name for one in file.tensors] for file in (ours, theirs))
    same = {name: name for name in mine if name in set(its)}
    if same or ours.format == theirs.format:
        return same, False
    there = {_translated(name, theirs.format): name for name in its}
    result = {name: there[key] for name in mine if (key := _translated(name, ours.format)) in there}
    return result, True


def _translated(name: str, kind: str) -> str:
    try:
        return from_gguf_name(name) if kind == GGUF else name
    except UnmappedTensor:
        return name


def _distance(mine: Stored, its: Stored, figures: MeasuredTensor) -> float | None:
    """‖B - A‖ / ‖A‖ in float64, a block of values at a time."""
    if mine.shape != its.shape or not figures.figures.norm or figures.figures.not_finite:
        return None
    one, other = mine.read().reshape(-1), its.read().reshape(-1)
    total = sum(
        float((right.double() - left.double()).square().sum())
        for left, right in zip(one.split(BLOCK_VALUES), other.split(BLOCK_VALUES), strict=True)
    )
    return float(total**0.5 / figures.figures.norm)


def _pair(first: MeasuredTensor, second: MeasuredTensor, distance: float | None) -> Pair:
    ranks = [
        one.figures.spectrum.effective_rank if one.figures.spectrum else 0.0
        for one in (first, second)
    ]
    return Pair(
        name=first.name,
        second_name=second.name,
        first=first,
        second=second,
        norm_ratio=second.figures.norm / first.figures.norm if first.figures.norm else None,
        distance=distance,
        rank_ratio=ranks[1] / ranks[0] if ranks[0] and second.figures.spectrum else None,
    )


def _facts(
    pairs: list[Pair], only_first: list[str], only_second: list[str], translated: bool
) -> list[Fact]:
    """What the pairs say, in words."""
    facts = []
    known = sorted(
        ((one.distance, one) for one in pairs if one.distance is not None),
        key=lambda pair: -pair[0],
    )
    if known:
        same = sum(distance == 0 for distance, _ in known)
        words = f"{same:,} of {len(known):,} tensors with the same shape are the same in both"
        if same < len(known):
            far = ", ".join(
                f"{one.name} {distance:.1%}" for distance, one in known[:NAMED] if distance
            )
            words += f"; farthest apart, relative to A: {far}"
        facts.append(Fact("plain", words + "."))
    ratios = [one for one in pairs if one.norm_ratio]
    if ratios:
        low, high = (choose(ratios, key=lambda one: one.norm_ratio or 1.0) for choose in (min, max))
        facts.append(
            Fact(
                "plain",
                f"Norms in B are {number(low.norm_ratio or 0.0)} ({low.name}) to "
                f"{number(high.norm_ratio or 0.0)} "
                f"({high.name}) times those in A.",
            )
        )
    for letter, names in (("A", only_first), ("B", only_second)):
        if names:
            more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
            facts.append(Fact("plain", f"Only in {letter}: {', '.join(names[:NAMED])}{more}."))
    if translated:
        facts.append(
            Fact(
                "plain",
                "The files name their tensors differently, so they were matched by GGUF's table of "
                "names. Rows may lie "
                "in another order, which changes no norm and no rank but makes distances "
                "meaningless: none is given.",
            )
        )
    return facts
