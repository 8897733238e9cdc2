"""The figures of `distill evaluate` against their definitions, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from distill.errors import UserError
from distill.evaluation.cost import Cost, measure_cost
from distill.evaluation.fidelity import score_text
from distill.evaluation.greedy import greedy_prompts
from distill.evaluation.scorers import Scorer, evaluate, llama_scorer
from distill.metrics import distributions
from distill.metrics.distributions import (
    COMPARED,
    agreeing_prefix,
    by_sequence,
    calibration_error,
    compare,
    intervals,
    joined,
    mean_figures,
    predict,
    tokens_per_pass,
)
from distill.runs.records import Results
from teachers.base import Tokens
from tests.support.references import Array
from tests.support.report_runs import results_of_a_run
from tests.support.teachers import BigramTeacher


def drawn(count: int, vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two models' logits, some of them very sure, and the actual next tokens."""
    generator = torch.Generator().manual_seed(seed)
    teacher = 3.0 * torch.randn(count, vocab_size, generator=generator)
    student = teacher + 2.0 * torch.randn(count, vocab_size, generator=generator)
    teacher[::3] *= 20.0
    return teacher, student, torch.randint(0, vocab_size, (count,), generator=generator)


def reference(teacher: Tensor, student: Tensor) -> dict[str, Array]:
    """Every figure of each position, from its definition."""
    log_p, log_q = log_chances(teacher), log_chances(student)
    p, q, count = np.exp(log_p), np.exp(log_q), min(5, teacher.shape[1])
    ours, theirs = (np.argsort(-log, axis=1, kind="stable")[:, :count] for log in (log_p, log_q))
    # Drafting: a token x of q is accepted with probability min(1, p(x) / q(x)).
    return {
        "kl": (p * (log_p - log_q)).sum(axis=1),
        "reverse_kl": (q * (log_q - log_p)).sum(axis=1),
        "top1": (ours[:, 0] == theirs[:, 0]).astype(float),
        "top5": (ours[:, :, None] == theirs[:, None]).sum(axis=(1, 2)) / count,
        "acceptance": np.minimum(q, p).sum(axis=1),
    }


def log_chances(logits: Tensor) -> Array:
    """Logarithms of a softmax, in float64."""
    values = logits.double().numpy()
    values = values - values.max(axis=1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def test_figures_against_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure at every position, in one piece and in several."""
    for count, vocab_size in ((1, 3), (7, 5), (40, 61)):
        teacher, student, _ = drawn(count, vocab_size, seed=vocab_size)
        wanted = reference(teacher, student)
        rows = np.stack([wanted[name] for name in COMPARED], axis=1)
        assert len(set(wanted["top5"])) > 1 or vocab_size <= 5
        for room in (1 << 20, 3 * vocab_size):
            monkeypatch.setattr(distributions, "CHUNK_LOGITS", room)
            found, row = compare(teacher, student), f"{count} {room}"
            np.testing.assert_allclose(found, rows, rtol=1e-9, atol=1e-12, err_msg=row)


def test_a_model_is_nothing_away_from_itself() -> None:
    """Exactly, not nearly; and two models differ in both directions."""
    teacher, student, _ = drawn(50, 40)
    assert compare(teacher, teacher.clone()).tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0]] * 50
    there, back = compare(teacher, student), compare(student, teacher)
    np.testing.assert_allclose(there[:, 0], back[:, 1])
    assert abs(there[:, 0].mean() - there[:, 1].mean()) > 0.01


def test_predictions_against_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Surprise, confidence and hits; and the calibration error of parts put together."""
    logits, _, labels = drawn(60, 17)
    monkeypatch.setattr(distributions, "CHUNK_LOGITS", 17 * 7)
    found, logs = predict(logits, labels), log_chances(logits)
    surprises, confidences, hits = (getattr(found, name).numpy() for name in vars(found))
    wanted, best = -logs[np.arange(60), labels.numpy()], np.exp(logs.max(axis=1))
    np.testing.assert_allclose(surprises, wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(confidences, best, rtol=1e-9)
    right = logs.argmax(axis=1) == labels.numpy()
    assert hits.tolist() == right.tolist()
    bins = np.minimum(14, (best * 15).astype(int))
    gaps = [abs((best - right)[bins == place].sum()) for place in range(15)]
    together = joined([predict(logits[:11], labels[:11]), predict(logits[11:], labels[11:])])
    assert calibration_error(together) == pytest.approx(sum(gaps) / 60, abs=1e-9)


def test_tokens_per_pass_against_a_game() -> None:
    """Drafts are accepted until one is not; the pass itself yields one more token."""
    draw = np.random.default_rng(0)
    for chance, draft in ((0.0, 4), (0.3, 1), (0.8, 4), (1.0, 4), (1.0, 7)):
        accepted = np.cumprod(draw.random((20_000, draft)) < chance, axis=1).sum(axis=1)
        wanted = pytest.approx(float(accepted.mean()) + 1.0, abs=0.05)
        assert tokens_per_pass(chance, draft) == wanted, (chance, draft)
    assert tokens_per_pass(1.0, 4) == 5.0 and tokens_per_pass(0.0, 4) == 1.0


def test_prefixes() -> None:
    """As far as both wrote the same, the end of the turn included."""
    for teacher, student, length in (
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2, 3], [1, 2, 4], 2),
        ([5, 2], [1, 2], 0),
        ([1, 2, 9], [1, 2], 2),  # the student wrote less
        ([1, 9], [1, 8, 4], 1),  # the teacher ended its turn, the student went on
        ([9], [9], 1),
        ([], [1], 0),
    ):
        assert agreeing_prefix(teacher, student) == length, (teacher, student)


# --- means over positions, and their intervals


def test_sums_by_sequence() -> None:
    """Rows of each sequence, in order, an empty one too."""
    values = np.arange(12.0).reshape(6, 2)
    assert by_sequence(values, [1, 3, 0, 2]).tolist() == [[0, 1], [12, 15], [0, 0], [18, 20]]


def test_intervals_against_a_bootstrap() -> None:
    """Sequences of very different lengths, of which the long ones have other values."""
    draw = np.random.default_rng(3)
    counts = draw.integers(1, 60, 25)
    values = np.stack((draw.normal(size=25) + counts / 30, draw.random(25)), axis=1)
    sums = values * counts[:, None]
    found = intervals(sums, counts.tolist())
    assert found is not None
    # The 95 % interval of a mean over positions, by drawing sequences again, with other draws.
    places = np.random.default_rng(7).integers(0, 25, (2000, 25))
    means = sums[places].sum(axis=1) / counts[places].sum(axis=1)[:, None]
    wanted = np.sort(means, axis=0)[[50, 1950]]
    off = np.abs(found - wanted) / (wanted[1] - wanted[0])
    assert off.max() <= 0.06
    again = intervals(sums[:, :1], counts.tolist())
    assert again is not None and again[:, 0] == pytest.approx(found[:, 0])  # whatever else is asked


def test_intervals_are_those_of_the_normal_distribution_where_it_holds() -> None:
    """Four hundred independent values: 1.96 standard errors to either side, in 2,000 draws."""
    values = np.random.default_rng(0).normal(2.0, 3.0, (400, 1))
    found = mean_figures(values, [1] * 400)[0]
    assert found.low is not None and found.high is not None
    half = 1.96 * float(values.std()) / 20
    assert found.value == pytest.approx(float(values.mean()))
    wanted = (found.value - half, found.value + half)
    assert (found.low, found.high) == pytest.approx(wanted, abs=0.1 * half)


def test_positions_of_a_sequence_do_not_count_as_independent() -> None:
    """The same value at all 50 positions of a sequence says no more than at one."""
    values = np.random.default_rng(1).random((30, 1))
    once, often = intervals(values, [1] * 30), intervals(50 * values, [50] * 30)
    assert once is not None and often is not None
    np.testing.assert_allclose(once, often)


def test_one_sequence_has_no_interval() -> None:
    assert intervals(np.ones((1, 2)), [5]) is None
    figure = mean_figures(np.ones((1, 2)), [5])[0]
    assert (figure.value, figure.low, figure.high) == (0.2, None, None)


# --- whole texts


SEQUENCES: list[Tokens] = [
    np.random.default_rng(n).integers(0, 23, 2 + 5 * n).astype(np.int32) for n in range(6)
]


def scorer(seed: int = 0) -> Scorer:
    """What a small teacher computes."""
    return llama_scorer(BigramTeacher(23, 8, seed=seed))  # type: ignore[arg-type]


def test_a_text_in_groups_is_the_text_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few logits are held, the figures are those of all positions; progress is reported."""
    models = {name: scorer(seed) for seed, name in enumerate(("t", "a", "b"))}
    done: list[int] = []
    whole = score_text("t", models, SEQUENCES, 23)
    monkeypatch.setattr(distributions, "LOGITS_BYTES", 4 * 23 * 20)
    parts = score_text("t", models, SEQUENCES, 23, done.append)
    assert (
        done[-1] == 3 * sum(len(tokens) - 1 for tokens in SEQUENCES)
        and len(done) > 6
        and done == sorted(done)
    )
    assert not whole["t"].compared and list(whole["a"].compared) == list(COMPARED)
    logits = {name: model(SEQUENCES) for name, model in models.items()}
    wanted = reference(logits["t"], logits["b"])
    labels = np.concatenate([tokens[1:] for tokens in SEQUENCES])
    surprise = -log_chances(logits["b"])[np.arange(len(labels)), labels].mean()
    for found in (whole["b"], parts["b"]):
        for name, figure in found.compared.items():
            assert figure.value == pytest.approx(wanted[name].mean(), rel=1e-9), name
            assert figure.low is not None and figure.high is not None
            assert figure.low <= figure.value <= figure.high, name
        assert found.perplexity.value == pytest.approx(math.exp(surprise), rel=1e-9)
        assert found.perplexity.low is not None and found.perplexity.low < found.perplexity.value
    assert parts["b"].calibration_error == pytest.approx(whole["b"].calibration_error)


def test_masked_positions_count_nowhere() -> None:
    """In means, perplexity, calibration and the weights of sequences, of either evaluation."""
    teacher = BigramTeacher(23, 8)
    masks = [np.arange(len(tokens) - 1) % 3 == 0 for tokens in SEQUENCES]
    kept = np.concatenate(masks)
    pair = {"t": scorer(), "a": scorer(1)}
    found = score_text("t", pair, SEQUENCES, 23, keep=masks)["a"]
    ran: Any = evaluate(teacher, SEQUENCES, {"a": scorer(1)}, keep=masks)  # type: ignore[arg-type]
    logits = {name: model(SEQUENCES)[torch.from_numpy(kept)] for name, model in pair.items()}
    wanted = reference(logits["t"], logits["a"])
    for name, figure in found.compared.items():
        assert figure.value == pytest.approx(wanted[name].mean(), rel=1e-9), name
    labels = np.concatenate([tokens[1:] for tokens in SEQUENCES])[kept]
    surprise = -log_chances(logits["a"])[np.arange(len(labels)), labels].mean()
    assert found.perplexity.value == pytest.approx(math.exp(surprise), rel=1e-9)
    assert ran.positions == kept.sum() and ran.models["a"].cross_entropy == pytest.approx(surprise)
    assert ran.models["a"].kl == pytest.approx(wanted["kl"].mean(), rel=1e-5)


def test_logits_that_are_not_finite_are_refused() -> None:
    """By the name of the model; a NaN would otherwise spread into every figure."""
    teacher = scorer()

    def broken(sequences: Sequence[Tokens]) -> Tensor:
        logits = teacher(sequences).clone()
        logits[3, 5] = math.nan
        return logits

    with pytest.raises(UserError, match=r"worn\.gguf computes logits that are not finite"):
        score_text("t", {"t": teacher, "worn.gguf": broken}, SEQUENCES, 23)


def test_a_run_has_intervals_too() -> None:
    """Of each figure it reports, by the same draws; none of one sequence."""
    teacher, other = BigramTeacher(23, 8), BigramTeacher(23, 8, seed=1)
    score = evaluate(teacher, SEQUENCES, {"student": scorer(1)}).models["student"]  # type: ignore[arg-type]
    assert score.intervals.keys() == {"kl", "agreement", "cross_entropy", "perplexity"}
    for name, (low, high) in score.intervals.items():
        assert low <= getattr(score, name) <= high and low < high, name
    ends = [math.exp(end) for end in score.intervals["cross_entropy"]]
    assert list(score.intervals["perplexity"]) == pytest.approx(ends)
    rows = compare(*(torch.from_numpy(model.logits(SEQUENCES)) for model in (teacher, other)))
    counts = [len(row) - 1 for row in SEQUENCES]
    wanted = mean_figures(by_sequence(rows, counts), counts)[0]
    assert score.intervals["kl"] == pytest.approx((wanted.low, wanted.high), rel=1e-5)
    alone = evaluate(teacher, SEQUENCES[3:4], {"student": scorer(1)})  # type: ignore[arg-type]
    assert alone.models["student"].intervals == {}


def test_reports_read_results_with_and_without_intervals() -> None:
    """Those of older runs have none."""
    results: dict[str, Any] = results_of_a_run("teacher")
    assert TypeAdapter(Results).validate_python(results).evaluation.exported.intervals == {}
    given = {"kl": [1.25, 1.75], "perplexity": [3.0, None]}
    results["evaluation"]["exported"] |= {"intervals": given}
    read = TypeAdapter(Results).validate_python(results).evaluation.exported
    assert read.intervals == {"kl": (1.25, 1.75), "perplexity": (3.0, None)}


# --- what is asked of a model


def test_beginnings_leave_room() -> None:
    """Half a sequence each, of the first 32; new tokens as the shortest context has room for."""
    rows = [np.arange(n, dtype=np.int32) for n in (2, 3, 41)] + [np.arange(9, dtype=np.int32)] * 40
    start = greedy_prompts(rows, 25)
    assert start is not None and [len(p) for p in start.prompts[:3]] == [1, 1, 20]
    assert len(start.prompts) == 32 and start.new_tokens == 5
    assert greedy_prompts(rows, 20) is None


class Timed:
    """A model of a short context whose speed is known."""

    info = SimpleNamespace(context_length=100)

    def __init__(self, *speeds: tuple[float, float]) -> None:
        self.speeds = list(speeds)
        self.asked: list[tuple[int, int]] = []

    def speed(self, prompt: int, new: int) -> tuple[float, float]:
        self.asked.append((prompt, new))
        return self.speeds.pop(0)

    def peak_memory(self) -> int:
        return 7


def test_cost_is_the_median_of_three() -> None:
    """Of reading and writing each, within the context; how much the trials differ is kept."""
    model = Timed((10.0, 3.0), (30.0, 1.0), (20.0, 2.0))
    assert measure_cost(model) == Cost(20.0, 2.0, 7, 3.0)  # type: ignore[arg-type]
    assert model.asked == [(50, 49)] * 3
