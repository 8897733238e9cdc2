"""The weights that a run has now: its student's, or those of the newest checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill.errors import UserError
from distill.reports.document import Fact
from distill.reports.render.plotly import thin_places
from distill.reports.weights.files import Stored, WeightFile, open_weights, shapes_in
from distill.reports.weights.layers import layers_of, places_of
from distill.reports.weights.report import WeightsReport, weigh_file
from distill.runs.folder import WEIGHTS, RunFolder
from distill.runs.records import Records
from distill.runtime.progress import Console
from stability.measures.weights import EXACT_SIDE

LARGE = 100_000_000  # parameters from which on only some layers are looked at, by the faster way
SOME_LAYERS = 8


@dataclass(frozen=True)
class FinalWeights:
    """``source``: whose weights, in words. ``report``: None where they could not be read, which
    ``problem`` tells."""

    source: str
    report: WeightsReport | None
    problem: str = ""


def final_weights(records: Records, console: Console | None = None) -> FinalWeights | None:
    """What the run's weights look like now; nothing where there are none yet."""
    result = _newest(records)
    if result is None:
        return None
    source, path = result
    try:
        with open_weights(path) as file:
            return FinalWeights(source, _weigh(file, console))
    except (UserError, OSError) as error:  # a running process may just have replaced its checkpoint
        return FinalWeights(source, None, " ".join(str(error).split()))


def full_ranks(records: Records, final: FinalWeights | None) -> dict[str, int]:
    """The smaller side of each matrix by name, from the headers of the files that the run has."""
    folder = RunFolder(records.folder)
    paths = [folder.student / WEIGHTS, folder.beginning]
    if records.checkpoint is not None:
        paths.insert(0, records.checkpoint / WEIGHTS)
    if final is not None and final.report is not None:
        paths.insert(0, Path(final.report.path))
    for path in paths:
        try:
            return {name: min(shape) for name, shape in shapes_in(path).items() if len(shape) == 2}
        except (UserError, OSError):
            # The next one has the same shapes; without any, ranks are shown against their start
            continue
    return {}


def final_facts(final: FinalWeights | None) -> list[Fact]:
    """What is worth a look in them; one sentence where nothing is."""
    if final is None:
        return []
    if final.report is None:
        return [
            Fact("plain", f"The weights of {final.source} could not be looked at: {final.problem}")
        ]
    warnings = [fact for fact in final.report.verdict if fact.level == "warning"]
    if not warnings:
        return [
            Fact(
                "good",
                f"The weights of {final.source} are finite, and no matrix has died or collapsed.",
            )
        ]
    return [Fact("warning", f"The weights of {final.source}: {fact.text}") for fact in warnings]


def _newest(records: Records) -> tuple[str, Path] | None:
    """Where the newest whole weights lie, and what to call them."""
    student = RunFolder(records.folder).student / WEIGHTS
    if student.exists():
        return "the trained student", student
    if records.checkpoint is not None:
        return f"the checkpoint of step {records.checkpoint_step:,}", records.checkpoint / WEIGHTS
    return None


def _weigh(file: WeightFile, console: Console | None) -> WeightsReport:
    """All of a small student's weights; of a large one some layers, by way of the Gram matrix."""
    places = places_of(one.name for one in file.tensors)
    layers = layers_of(places.values())
    large = file.bytes > 4 * LARGE
    kept = (
        {layers[place] for place in thin_places(len(layers), SOME_LAYERS)} if large else set(layers)
    )

    def wanted(stored: Stored) -> str:
        layer = places[stored.name].layer
        return (
            ""
            if layer is None or layer in kept
            else f"in none of {SOME_LAYERS} layers spread over the student"
        )

    return weigh_file(
        file, file.path.name, console, exact_side=0 if large else EXACT_SIDE, wanted=wanted
    )
