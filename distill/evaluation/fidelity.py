"""How models predict one text, and how near the students' distributions are to the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.errors import UserError
from distill.evaluation.scorers import Scorer, perplexity
from distill.metrics.distributions import (
    COMPARED,
    Floats,
    Prediction,
    by_sequence,
    calibration_error,
    compare,
    groups,
    joined,
    mean_figures,
    next_tokens,
    predict,
)
from distill.metrics.intervals import Figure
from teachers.base import Keep, Tokens, whole_masks


@dataclass(frozen=True)
class TextScore:
    """One model on the text; ``compared``: the metrics ``COMPARED``, empty for the teacher."""

    perplexity: Figure
    calibration_error: float
    compared: dict[str, Figure]


def score_text(
    teacher: str,
    models: Mapping[str, Scorer],
    sequences: Sequence[Tokens],
    vocab_size: int,
    progress: Callable[[int], None] = lambda done: None,
    keep: Sequence[Keep] | None = None,
) -> dict[str, TextScore]:
    """Score all ``models``, ``teacher`` included, on ``sequences`` of at least two tokens, at every
    position or those that the masks ``keep`` want.

    Holds the logits of one group of sequences, of the teacher and one student. ``progress`` counts
    positions over all models.

    Raises:
        UserError: a model's logits are not finite.
    """
    predictions: dict[str, list[Prediction]] = {name: [] for name in models}
    compared: dict[str, list[Floats]] = {name: [] for name in models if name != teacher}
    done = 0
    masks = whole_masks(sequences, keep)
    for part in groups(sequences, vocab_size):
        group, kept = sequences[part], torch.from_numpy(np.concatenate(masks[part]))
        labels, counts = next_tokens(group)[kept], [int(mask.sum()) for mask in masks[part]]
        expected = _finite(models[teacher](group)[kept], teacher)
        predictions[teacher].append(predict(expected, labels))
        done += len(labels)
        progress(done)
        for name, rows in compared.items():
            logits = _finite(models[name](group)[kept], name)
            predictions[name].append(predict(logits, labels))
            rows.append(by_sequence(compare(expected, logits), counts))
            done += len(labels)
            progress(done)
    counts = [int(mask.sum()) for mask in masks]
    return {
        name: _score(joined(parts), compared.get(name, []), counts)
        for name, parts in predictions.items()
    }


def _finite(logits: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            f"{name} computes logits that are not finite; its weights are damaged, so export it "
            "again"
        )
    return logits


def _score(prediction: Prediction, compared: Sequence[Floats], counts: Sequence[int]) -> TextScore:
    surprise = mean_figures(by_sequence(prediction.surprise.numpy()[:, None], counts), counts)[0]
    figures = mean_figures(np.concatenate(compared), counts) if compared else []
    return TextScore(
        perplexity=_exponential(surprise),
        calibration_error=calibration_error(prediction),
        compared=dict(zip(COMPARED if compared else (), figures, strict=True)),
    )


def _exponential(nats: Figure) -> Figure:
    """The perplexity of a cross-entropy; exp keeps the order of the interval's ends."""
    if nats.low is None or nats.high is None:
        return Figure(perplexity(nats.value))
    return Figure(perplexity(nats.value), perplexity(nats.low), perplexity(nats.high))
