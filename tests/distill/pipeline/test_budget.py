"""``--budget``: arithmetic with pretended speeds; what was decided is not decided again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from torch.optim import AdamW

import distill.pipeline.budget.budget as budget_module
import distill.pipeline.run
from distill.config.loading import load_config
from distill.config.units import parse_duration
from distill.errors import UserError
from distill.heads.prompt_set import PromptSet
from distill.heads.prompts import SafetyPrompt
from distill.heads.safety_data import SafetyData
from distill.heads.safety_fitting import (
    LEAST_READ,
    READ_FLOPS,
    FittingTime,
    prompts_within,
    readable,
)
from distill.pipeline.budget.allocation import (
    FEW_STEPS,
    LEAST_STEPS,
    LEAST_TOGETHER,
    MOST_EPOCHS,
    Costs,
    Text,
    TooShort,
    allocate,
    in_smaller_steps,
    stages,
)
from distill.pipeline.budget.budget import (
    Budget,
    budget_table,
    recommend,
    with_allocation,
    with_prompts,
)
from distill.pipeline.budget.costs import SAFETY_SHARE
from distill.pipeline.preflight import check_run
from distill.pipeline.probes import step_seconds
from distill.pipeline.run import run
from distill.runs.audit_verify import verify
from distill.runs.folder import RunFolder, RunPaths
from distill.runtime.progress import Console
from distill.training.data import load_batch
from tests.support.runs import interrupted, small_config
from tests.support.students import make_student
from tests.support.training import fresh_student, make_data

COSTS = Costs(
    start=10.0,
    capture=0.001,
    head_start=20.0,
    training=0.0015,
    read=0.0005,
    weigh=1.0,
    safety=30.0,
    export=0.002,
    exports=5.0,
    evaluation=0.003,
    evaluations=5.0,
)
TEXT = Text(sequences=1000, length=256, together=16, held_out=0.03, points=12, weighings=4)


def test_durations() -> None:
    for text, seconds in (
        ("90s", 90),
        ("20m", 1200),
        ("1h", 3600),
        ("1h30m", 5400),
        (" 1 H 0.5m 3s ", 3633),
    ):
        assert parse_duration(text) == seconds, text
    for text in ("", "10", "-1h", "0s", "1m1h", "1d", "h"):
        with pytest.raises(ValueError, match="no time; write for example 90s, 20m"):
            parse_duration(text)
            pytest.fail(f"{text!r} is accepted")


def test_allocation() -> None:
    """Fresh text first; text that is dear to capture is learnt from several times, and so is all of
    it where time is left, ten times at most; the time is used and not exceeded."""
    dear, endless = replace(COSTS, capture=0.006), replace(TEXT, sequences=None)
    for costs, text, minutes, samples, epochs in (
        (COSTS, TEXT, 6, range(200, 999), 1),
        (COSTS, TEXT, 20, range(1000, 1001), 3),
        (COSTS, TEXT, 600, range(1000, 1001), MOST_EPOCHS),
        (COSTS, endless, 600, range(10_000, 99_999), 1),
        (dear, TEXT, 20, range(200, 999), 4),
    ):
        found = allocate(60.0 * minutes, text, costs)
        assert found.samples in samples and found.epochs == epochs, (minutes, found)
        assert found.steps <= epochs * text.steps(found.samples)
        assert found.total <= 60.0 * minutes
        if minutes < 600 or text is endless:
            assert found.total > 0.95 * 60.0 * minutes, (minutes, found)
        assert found.seconds == stages(costs, text, found.samples, found.steps)


def test_few_steps_become_more_and_smaller() -> None:
    """Of as much text; never below eight sequences, nor where steps are many or small already."""
    for minutes, together, steps, size in (
        (6, 16, 2, 8),
        (600, 16, 1, None),
        (6, 64, 8, 8),
        (6, 8, 1, None),
        (6, 6, 1, None),
    ):
        plain = allocate(60.0 * minutes, replace(TEXT, together=together), COSTS)
        found = in_smaller_steps(plain, together)
        assert (found.steps, found.together) == (steps * plain.steps, size), (minutes, together)
        assert (found.samples, found.epochs, found.seconds) == (
            plain.samples,
            plain.epochs,
            plain.seconds,
        )
        if size is not None:
            assert found.steps * size == plain.steps * together
            assert found.steps >= FEW_STEPS or size == LEAST_TOGETHER


@pytest.mark.parametrize(
    ("settings", "size"),
    [([], 8), (["train.batch_size=16"], 16), (["train.batch_tokens=4096"], 16)],
)
def test_a_given_size_of_a_step_is_kept(
    settings: list[str], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a short time recommends reaches the settings, and says so; what is given stays."""
    config = load_config(None, {}, settings)
    measured = SimpleNamespace(config=config, student=SimpleNamespace(step_seconds=1.0))
    monkeypatch.setattr(budget_module, "expected_costs", lambda *given: COSTS)
    monkeypatch.setattr(budget_module, "text_of", lambda given: TEXT)
    allocation, _ = recommend(measured, 360.0, None, 10.0)  # type: ignore[arg-type]
    plain = allocate(360.0, TEXT, COSTS)
    assert allocation.steps == plain.steps * 16 // size
    assert with_allocation(config, allocation).train.batch_size == size
    shown = "".join(map(str, budget_table(allocation, 360.0).columns[1].cells))
    assert ("train.batch_size=8" in shown) == (size == 8)


def test_a_time_that_is_too_short_says_the_least() -> None:
    with pytest.raises(
        TooShort, match=r"the least is about 1m\d+s, 30s of that for safety head"
    ) as caught:
        allocate(30.0, TEXT, COSTS)
    assert allocate(240.0, TEXT, COSTS).steps >= LEAST_STEPS, caught.value


def test_what_a_budget_decides_is_not_given(tmp_path: Path) -> None:
    for settings in (["train.epochs=2"], ["data.samples=9"], ["train.steps=3"]):
        with pytest.raises(UserError, match="--budget decides samples, epochs and steps"):
            check_run(load_config(None, {}, settings), RunPaths(out=tmp_path / "run"), budget=60.0)


def test_a_run_that_is_continued_decides_nothing_again(
    tiny_teacher_path: Path, tmp_path: Path
) -> None:
    """Samples are kept from the start, steps from the first step on; another budget is refused; the
    log says that the settings' file is another."""
    plain = small_config(tiny_teacher_path)
    data = plain.data.model_copy(update={"samples": None})
    train = plain.train.model_copy(update={"batch_size": 4})
    train = type(train).model_construct(train.model_fields_set - {"epochs"}, **dict(train))
    config = plain.model_copy(update={"data": data, "train": train})
    with_samples = config.model_copy(update={"data": data.model_copy(update={"samples": 40})})
    places = RunPaths(out=tmp_path / "run")
    settled = (with_samples, Budget(3600.0, COSTS))
    with (
        patch.object(distill.pipeline.run, "settle", return_value=settled),
        patch("distill.pipeline.budget.budget.steps_within", return_value=6),
        interrupted(at=3),
    ):
        run(config, places, Console(), seconds=3600.0)
    folder = RunFolder(places.out or Path())
    kept = folder.read_config()
    assert (kept.data.samples, kept.train.steps, kept.train.epochs) == (40, 6, 1)
    with pytest.raises(UserError, match="--budget is 3600 s there, 60 s here"):
        run(config, places, Console(), seconds=60.0)
    run(config, places, Console(), seconds=3600.0)
    results = folder.read_results()["training"]
    assert (results["planned_steps"], results["continued_from_step"]) == (6, 2)
    assert folder.read_config() == kept and verify(folder.path).intact
    # The recorded settings are the same run, without a budget.
    check_run(kept, places)


def test_steps_are_timed_as_training_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the run's optimizer for a step of that many tokens, over and over for a while; of slow
    first steps and quick later ones the later count. The student is as it was but for its steps."""
    data, student, asked = make_data(tmp_path), fresh_student(), []
    batch = load_batch(data.store, data.split.train[:16].tolist(), pack=False)
    config = load_config(None, {"student.size": "16x2"}, ["train.optimizer=muon"])
    seconds = iter([0.1, 0.3, 0.3, *[0.1] * 50])  # of each step, by the clock of the probe alone
    now = [0.0]

    class Slow(AdamW):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            now[0] += next(seconds)
            super().step()

    def recorded(module: object, train: object, width: int, tokens: float, *, narrow: bool) -> Slow:
        asked.append((width, tokens, narrow))
        return Slow(student.parameters(), 0.0)

    monkeypatch.setattr("distill.pipeline.probes.build_optimizer", recorded)
    monkeypatch.setattr("distill.pipeline.probes.time.perf_counter", lambda: now[0])
    each = step_seconds(student, batch, config, most=60.0)
    tokens = int(batch.lengths.sum())
    assert asked == [(16, float(tokens), False)] and student.training
    assert each == pytest.approx(0.1 / tokens)


def test_the_safety_head_takes_a_share_of_the_time(tmp_path: Path) -> None:
    """As many prompts of each part are read as fit into it, unless a number is given."""
    one = SafetyPrompt("0", "a scene", "a prompt", (1.0, 0.0, 0.0))
    parts = [PromptSet([one] * count, [np.ones(9, np.int32)] * count, 0) for count in (3000, 1000)]
    student, data = make_student(16, 2, 1024, heads=True), SafetyData("ours", "0", *parts, parts[1])
    settings = small_config(tmp_path)
    safety = settings.safety.model_copy(update={"most_read": 70})
    given = settings.model_copy(update={"safety": safety})
    pretended = FittingTime(each=0.01, rest=5.0)
    with patch("distill.pipeline.budget.budget.fitting_time", lambda *_: pretended):
        for config, seconds, most, taken in (
            (settings, 45.0, None, 45.0),
            (settings, 37.0, 1600, 31.0),  # one part has fewer
            (settings, 11.0, 300, 11.0),
            (settings, 1.0, LEAST_READ, 5.0 + 2 * LEAST_READ * 0.01),
            (given, 1.0, 70, 6.4),
        ):
            budget = Budget(seconds / SAFETY_SHARE, COSTS)
            found, costs = with_prompts(config, COSTS, student, data, budget)
            assert (found.safety.most_read, costs.safety) == (most, pytest.approx(taken)), seconds
    flops = READ_FLOPS / 1000
    assert readable((3000, 500), flops, None) == [1000, 500]
    assert readable((3000, 500), READ_FLOPS, None) == [LEAST_READ, LEAST_READ]
    assert prompts_within(15.0, pretended, (3000, 500), flops) == 500
    assert prompts_within(20.0, pretended, (3000, 500), flops) is None
    mostly_fitted = FittingTime(each=0.001, rest=7.0)  # half at least is for reading
    assert prompts_within(2.0, mostly_fitted, (3000, 3000), flops) == 500
