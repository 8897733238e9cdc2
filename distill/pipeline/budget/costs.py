"""What the stages of a run cost, by the probes, and again by what has been measured since.

The constants are rough: they weigh stages that are short beside capture and training.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from distill.config.schema import RunConfig
from distill.export.export import takes_importance
from distill.export.importance import calibration_tokens
from distill.heads.prompts import SafetyPrompt, split_by_scenario
from distill.heads.safety_fitting import expected_fitting_time, fitting_within
from distill.pipeline.budget.allocation import Costs, Text
from distill.pipeline.budget.measure import Measured
from distill.pipeline.probes import sequences_together
from distill.training.validation import WEIGH_EVERY
from stability.precision import ieee_float32

SAFETY_SHARE = 0.1  # of the time, that the safety head is to take
MORE_THAN_STEPS = 1.035  # checkpoints, snapshots and the guard's probes, in proportion
PROVED_FILES, EXACT_DECODE = 2, 3.0  # files of an export; exact logits against fast ones
COMPARED, COMPARED_EXACTLY = 1e-8, 2.5e-8  # seconds of one logit in float32, in float64
WEIGHED = 4e-8  # seconds of a number among the trained ones
OPENED = 4.0  # seconds of files written, llama.cpp started and timed
PRODUCT = 1024  # rows and columns of the matrices by which float32 is timed


def expected_costs(
    measured: Measured, prompts: Sequence[SafetyPrompt] | None, start: float, seconds: float
) -> Costs:
    """By the probes; ``start``: seconds until the capture begins; ``seconds``: of the run."""
    info, student = measured.info, measured.student
    assert student.step_seconds is not None and student.scoring_seconds is not None
    assert student.reading_seconds is not None
    read, exported, vocabulary = student.scoring_seconds, student.numbers.exported, info.vocab_size
    capture = measured.probe.seconds_per_token
    scoring = capture * measured.probe.faster  # the file itself, which evaluation runs
    decode = scoring * min(1.0, exported / max(info.parameters, exported))
    shape = measured.resolved.shape
    width = info.width if shape is None else shape.hidden_size
    layers = max(0.1, 1.0 - vocabulary * width / exported)  # share of the parameters
    weighed = takes_importance(measured.resolved.config.export.quant)
    important = calibration_tokens(int(exported)) if weighed else 0
    safety = tested = 0.0
    if prompts:
        reading = student.reading_seconds
        length, parts = measured.prompt_length, split_by_scenario(prompts)
        counts = len(parts["train"]), len(parts["validation"])
        time = expected_fitting_time(counts, length, reading)
        flops = 2.0 * layers * exported * length
        most = measured.config.safety.most_read
        _, safety = fitting_within(SAFETY_SHARE * seconds, time, counts, flops, most)
        tested = len(parts["test"]) * time.each
    return Costs(
        start=start,
        capture=capture,
        head_start=measured.fit_work / product_speed(),
        training=student.step_seconds * MORE_THAN_STEPS,
        read=read,
        weigh=WEIGHED * student.numbers.trained,
        safety=safety,
        export=read + PROVED_FILES * (EXACT_DECODE * decode + vocabulary * COMPARED_EXACTLY),
        exports=important * read * layers + OPENED,
        evaluation=scoring + 2 * read + decode + 3 * vocabulary * COMPARED,
        evaluations=OPENED + tested,
    )


def text_of(measured: Measured) -> Text:
    """What there is to learn from."""
    config, corpus, probe = measured.config, measured.corpus, measured.probe
    endless = config.data.path is None
    tokens = probe.length * corpus.spoken + corpus.tally.tokens
    return Text(
        sequences=None if endless else len(corpus),
        length=tokens / len(corpus),
        together=sequences_together(config, probe.batch),
        held_out=config.data.held_out,
        **_watching(config),
    )


def _watching(config: RunConfig) -> dict[str, int]:
    """How often training stops to look."""
    points = config.train.evaluations
    return {"points": points, "weighings": 1 + points // WEIGH_EVERY}


def text_in(config: RunConfig, lengths: NDArray[np.int32], together: int) -> Text:
    """The same of a store, whose sequences have these ``lengths``."""
    return Text(
        sequences=len(lengths),
        length=float(lengths.mean()),
        together=together,
        held_out=config.data.held_out,
        **_watching(config),
    )


def with_measured(costs: Costs, training: float, read: float) -> Costs:
    """The costs with what has been measured of the very student: see ``Costs``."""
    slower = read / costs.read
    return replace(
        costs,
        training=training * MORE_THAN_STEPS,
        read=read,
        export=costs.export * slower,
        exports=costs.exports * slower,
    )


@ieee_float32()
def product_speed() -> float:
    """Products per second in float32, of this process's threads."""
    matrix, seconds = torch.ones(PRODUCT, PRODUCT), []
    for _ in range(3):
        begin = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - begin)
    return 2 * PRODUCT**3 / min(seconds)
