"""From a time to samples, epochs and steps: arithmetic on what was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from distill.training.data import MAX_HELD_OUT, WATCH_LEAST, WATCH_SEQUENCES, watched_tokens

MOST_EPOCHS = 10  # text that was seen so often teaches little more
LEAST_STEPS = 2
FEW_STEPS, LEAST_TOGETHER = 64, 8
EXPORT_TOKENS = 4096  # of validation that the proof of a file looks at, at most


@dataclass(frozen=True)
class Costs:
    """What a run costs, in seconds: ``start`` until the capture begins, ``capture`` of a token,
    ``head_start`` of the first weights, ``training`` of a token in an optimizer step, ``read`` of a
    validation token in one scoring, ``weigh`` once of all matrices, ``safety`` of that head,
    ``export`` of a token that a proof looks at and ``exports`` beside that, ``evaluation`` of a
    validation token and ``evaluations`` beside that."""

    start: float
    capture: float
    head_start: float
    training: float
    read: float
    weigh: float
    safety: float
    export: float
    exports: float
    evaluation: float
    evaluations: float


@dataclass(frozen=True)
class Text:
    """What there is to learn from. ``sequences`` at most (none: as many as are asked for) of
    ``length`` tokens, on average; ``together`` in a step; ``held_out``: share for validation;
    ``points``: how often some of these are scored in training, ``weighings``: how often all
    matrices are weighed."""

    sequences: int | None
    length: float
    together: int
    held_out: float
    points: int
    weighings: int

    def validation(self, samples: int) -> int:
        """Validation sequences among so many."""
        return min(MAX_HELD_OUT, samples - 1, max(1, round(self.held_out * samples)))

    def steps(self, samples: int) -> int:
        """Steps of an epoch."""
        return -(-(samples - self.validation(samples)) // self.together)


@dataclass(frozen=True)
class Allocation:
    """``samples``, of which ``steps`` steps are made, the last of ``epochs`` perhaps not to its
    end; ``seconds`` expected by stage. ``together``: sequences of a step, where they are fewer than
    was asked for."""

    samples: int
    epochs: int
    steps: int
    seconds: dict[str, float]
    together: int | None = None

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.seconds.values())


def in_smaller_steps(allocation: Allocation, together: int) -> Allocation:
    """The same text in smaller steps where ``together`` sequences make few of them: from as many
    tokens twice as many steps then learn more, but not where there are many
    (docs/benchmarks.md)."""
    size, steps = together, allocation.steps
    while steps < FEW_STEPS and size > LEAST_TOGETHER:
        size, steps = size // 2, 2 * steps
    return allocation if size == together else replace(allocation, steps=steps, together=size)


class TooShort(ValueError):
    """A time in which there is no run; says the least that there is."""


def stages(costs: Costs, text: Text, samples: int, steps: int) -> dict[str, float]:
    """Expected seconds of each stage."""
    validation = text.validation(samples) * text.length
    tokens = steps * text.together * text.length
    least = max(WATCH_LEAST, WATCH_SEQUENCES * text.length)
    watched = min(validation, max(least, watched_tokens(tokens, text.points)))
    return {
        "start": costs.start,
        "capture": samples * text.length * costs.capture,
        "head start": costs.head_start,
        "training": tokens * costs.training
        + (text.points + 1) * watched * costs.read  # once more for the learning rate
        + text.weighings * costs.weigh,
        "safety head": costs.safety,
        "export and proof": min(EXPORT_TOKENS, validation) * costs.export + costs.exports,
        "evaluation": validation * costs.evaluation + costs.evaluations,
    }


def allocate(seconds: float, text: Text, costs: Costs) -> Allocation:
    """The run that fills ``seconds``.

    Fresh text comes first: one epoch over as many sequences as there are. Text that costs more to
    capture than to learn from once is learnt from more often instead, and so is all of the text
    where time is left: ``MOST_EPOCHS`` times at most.

    Raises:
        TooShort: not even a few sequences fit.
    """
    epochs = min(MOST_EPOCHS, max(1, round(costs.capture / costs.training)))

    def total(samples: int, steps: int) -> float:
        return sum(stages(costs, text, samples, steps).values())

    def fits(samples: int) -> bool:
        return total(samples, epochs * text.steps(samples)) <= seconds

    least = LEAST_STEPS * text.together + 1
    if text.sequences is not None:
        least = min(least, text.sequences)
    if total(least, text.steps(least)) > seconds:
        parts = stages(costs, text, least, text.steps(least))
        longest = max(parts, key=parts.__getitem__)
        raise TooShort(
            f"the least is about {_written(sum(parts.values()))}, {_written(parts[longest])} of "
            f"that for {longest}"
        )
    few = least
    many = text.sequences if text.sequences is not None else _beyond(fits, least)
    if fits(many):
        few = many
    while many - few > 1:  # the last that fits, and the first that does not
        middle = (few + many) // 2
        few, many = (middle, many) if fits(middle) else (few, middle)
    steps = steps_within(seconds - total(few, 0), text, costs, few)
    if few != text.sequences:
        steps = min(steps, epochs * text.steps(few))
    return Allocation(few, -(-steps // text.steps(few)), steps, stages(costs, text, few, steps))


def steps_within(seconds: float, text: Text, costs: Costs, samples: int) -> int:
    """Steps that fit into ``seconds`` that are left for nothing else, up to ``MOST_EPOCHS``."""
    steps = int(seconds / (text.together * text.length * costs.training))
    return max(LEAST_STEPS, min(steps, MOST_EPOCHS * text.steps(samples)))


def _beyond(fits, least: int) -> int:  # type: ignore[no-untyped-def]
    """A number of samples that does not fit."""
    many = 2 * least
    while fits(many):
        many *= 2
    return many


def _written(seconds: float) -> str:
    """A time as ``--budget`` takes it, not too short."""
    seconds = 10 * -(-seconds // 10)
    return f"{seconds:.0f}s" if seconds < 90 else f"{seconds // 60:.0f}m{seconds % 60:.0f}s"
