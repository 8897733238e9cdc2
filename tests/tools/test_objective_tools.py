"""The comparison of objectives, and the killing of trainings: they notice a difference."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.config.schema import LossConfig, TrainConfig
from distill.errors import UserError
from distill.losses.divergences import FORWARD_KL, cross_entropy, divergence
from distill.training.data import TrainingData, split
from teachers.store.store import SoftTargetStore
from teachers.targets.recipe import Recipe
from tests.support.objectives import make_batch, make_rows
from tests.support.references import drawn, probabilities, rows
from tests.support.stores import exact_targets, write_store
from tests.support.students import make_student
from tests.support.teachers import BigramTeacher
from tools.robustness.kill_training import (
    COMPARED,
    Kill,
    differences,
    draw_moments,
    judge,
    last_step,
)
from tools.studies.objectives import (
    TRUNCATED,
    Bench,
    Row,
    TruncatedObjective,
    all_rows,
    chosen_rows,
    possible_rows,
    results_table,
    stored_top,
    whole_vocabulary_kl,
)
from tools.studies.results import Results, run_missing, spread

KEPT = 5


def reference(form: str, teacher: Any, student: Any, temperature: float) -> float:
    """A truncated loss of one position from probabilities; shares nothing with the tool."""
    best = sorted(range(len(teacher)), key=lambda v: -teacher[v])[:KEPT]
    at_one, q = probabilities(teacher, 1.0), probabilities(student, temperature)
    weights = [at_one[v] ** (1.0 / temperature) for v in best]
    answers = [q[v] for v in best]
    if form == "one-token-tail":
        weights.append((1.0 - math.fsum(at_one[v] for v in best)) ** (1.0 / temperature))
        answers.append(1.0 - math.fsum(answers))
    if form == "renormalised":
        answers = [answer / math.fsum(answers) for answer in answers]
    p = [weight / math.fsum(weights) for weight in weights]
    return math.fsum(a * math.log(a / b) for a, b in zip(p, answers, strict=True))


def truncated(form: str, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    ids, log_probs = stored_top(exact_targets("buckets", teacher, KEPT + 2), KEPT)
    return TRUNCATED[form](student, ids, log_probs, temperature)


def test_truncated_losses_against_the_reference() -> None:
    """Every form at every temperature."""
    teacher, student = drawn(9), drawn(9, seed=1)
    pairs = list(zip(rows(teacher), rows(student), strict=True))
    for form in TRUNCATED:
        for temperature in (1.0, 1.7, 3.0):
            found = truncated(form, teacher, student, temperature).tolist()
            wanted = [reference(form, p, q, temperature) for p, q in pairs]
            assert found == pytest.approx(wanted, rel=1e-4), (form, temperature)


def test_stored_top_is_the_teachers() -> None:
    """Whatever is stored: ids and log-probabilities at T = 1."""
    teacher = drawn(6)
    values, best = teacher.double().log_softmax(dim=-1).topk(KEPT)
    for kind in ("buckets", "hidden", "dense"):
        ids, log_probs = stored_top(exact_targets(kind, teacher, KEPT), KEPT)
        assert torch.equal(ids, best), kind
        assert torch.allclose(log_probs.double(), values, rtol=1e-5, atol=1e-5), kind


def pull(
    form: str | None, teacher: Tensor, student: Tensor, temperature: float
) -> tuple[float, float]:
    """Mean loss and norm of its gradient in the logits; ours for ``None``."""
    logits = student.clone().requires_grad_()
    if form is None:
        values = divergence(logits, exact_targets("dense", teacher, KEPT), temperature, FORWARD_KL)
    else:
        values = truncated(form, teacher, logits, temperature)
    values.mean().backward()
    assert logits.grad is not None
    return float(values.mean().detach()), float(logits.grad.norm())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_truncation_is_biased_where_ours_is_not(temperature: float) -> None:
    """Identical models: ours is 0 and at rest, a dropped or a wrongly tempered tail pulls them
    apart. To a student that moves half of its mass into the tail, renormalising is blind."""
    teacher = drawn(20)
    ours, rest = pull(None, teacher, teacher, temperature)
    assert abs(ours) < 1e-6 and rest < 1e-6
    loss, force = pull("zero-tail", teacher, teacher, temperature)
    assert loss > 0.1 and force > 0.01
    loss, force = pull("one-token-tail", teacher, teacher, temperature)
    if temperature == 1.0:  # the one temperature it is right at
        assert loss == pytest.approx(0.0, abs=1e-5) and force < 1e-5
    else:
        assert loss > 0.05 and force > 0.01
    ids, _ = stored_top(exact_targets("buckets", teacher, KEPT), KEPT)
    student = (teacher + 4.0).scatter(-1, ids, teacher.gather(-1, ids))
    loss, force = pull("renormalised", teacher, student, temperature)
    assert abs(loss) < 1e-6 and force < 1e-6
    ours, rest = pull(None, teacher, student, temperature)
    assert ours > 0.1 and rest > 0.01


@pytest.mark.parametrize("form", TRUNCATED)
def test_truncated_objective_is_the_weighted_sum(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """α·T²·loss + β·CE, value and gradient, in whatever chunks; our regularisers are there."""
    monkeypatch.setattr("distill.losses.chunked_lm_head.LOGITS_BYTES", 0)  # 16 positions together
    weights = {"alpha": 0.6, "beta": 0.4, "lambda_so8t": 0.0}
    config = LossConfig(temperature=3.0, final_temperature=2.0, final_from=0.5, **weights)
    student, batch = make_student(), make_batch(*make_rows())
    objective = TruncatedObjective(config, TRUNCATED[form], count=KEPT)
    loss, parts = objective(student, batch, total=50, share=1.0, fraction=0.7)
    loss.backward()
    found = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    logits = student(batch.tokens).logits[batch.valid]
    ids, log_probs = stored_top(batch.targets, KEPT)
    expected = {
        "kd": 0.6 * 4.0 / 50 * TRUNCATED[form](logits, ids, log_probs, 2.0).sum(),
        "ce": 0.4 / 50 * cross_entropy(logits, batch.labels).sum(),
    }
    torch.stack(list(expected.values())).sum().backward()
    assert parts.keys() == expected.keys()
    for name, part in expected.items():
        assert float(parts[name]) == pytest.approx(float(part.detach()), rel=1e-5)
    wanted = [p.grad for p in student.parameters() if p.grad is not None]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    regularised = TruncatedObjective(LossConfig(gamma=0.0), TRUNCATED[form], count=KEPT)
    _, parts = regularised(student, batch, total=50, share=1.0, fraction=0.7)
    assert {"kd", "ce", "pet"} <= set(parts)


# --- rows and results


def make_store(folder: Path, recipe: Recipe) -> SoftTargetStore:
    draw = np.random.default_rng(0)
    sequences = [draw.integers(0, 60, size).astype(np.int32) for size in draw.integers(4, 12, 24)]
    return write_store(folder, BigramTeacher(60, 16, layers=4), sequences, recipe, 10)


def make_bench(store: SoftTargetStore) -> Bench:
    data = TrainingData(store, split(store, 0.2, 0), 0)
    config = TrainConfig(epochs=1, batch_size=4, evaluations=2, precision="fp32")
    return Bench(data, None, "16x1", config)


def test_rows_are_what_the_store_has_targets_for(tmp_path: Path) -> None:
    rows, usual = all_rows([1.0, 2.0], ["forward_kl", "reverse_kl"]), LossConfig()
    assert len({row.name for row in rows}) == len(rows) == 1 + 6 + 4 + 3
    loss = next(row.loss for row in rows if row.name == "reverse_kl-T2")
    assert (loss.temperature, loss.final_temperature) == (2.0, None)
    assert (loss.divergence, loss.gamma) == ("reverse_kl", 0)
    left = {(row.loss.lambda_so8t, row.loss.pet) for row in rows}
    assert left == {(usual.lambda_so8t, usual.pet)}
    few, notes = possible_rows(rows, make_store(tmp_path / "few", Recipe(num_topk=16)))
    assert not any(row.truncated or row.loss.gamma for row in few) and len(few) == 7
    assert "targets.num_topk=32" in notes[0] and "targets.layers" in notes[1]
    recipes = (Recipe(num_topk=32, layers=(1, 3)), Recipe("hidden", layers=(1,)))
    for number, recipe in enumerate(recipes):
        every, notes = possible_rows(rows, make_store(tmp_path / str(number), recipe))
        assert every == rows and notes == [], recipe
    chosen = [row.name for row in chosen_rows(rows, "top32-zero*,T3-then-T1")]
    assert chosen == ["top32-zero-tail-T1", "top32-zero-tail-T3", "T3-then-T1"]
    with pytest.raises(UserError, match="no such row; there are ce, top32-renormalised-T1"):
        chosen_rows(rows, "ce,nothing")


def test_results_are_not_made_again(tmp_path: Path) -> None:
    """Nor after a kill that cut the last line off; other settings and seeds are others."""
    asked: list[tuple[str, int]] = []

    def measure(row: Row, seed: int) -> dict[str, Any]:
        asked.append((row.name, seed))
        scores = {"kl": 0.5 + seed, "kl_over_all": None, "agreement": 0.25, "cross_entropy": 2.0}
        return scores | {"tokens": 100, "seconds": 1.0}

    bench: Any = SimpleNamespace(measure=measure)
    path = tmp_path / "results.jsonl"
    rows = [Row("one", LossConfig()), Row("two", LossConfig(alpha=0.1))]

    def again(settings: dict[str, Any], rows: list[Row], seeds: list[int]) -> list[tuple[str, int]]:
        asked.clear()
        run_missing(bench, rows, seeds, Results(path, settings), lambda text: None)
        return list(asked)

    assert again({"size": "16x1"}, rows, [0]) == [("one", 0), ("two", 0)]
    assert again({"size": "16x1"}, rows, [0]) == []
    assert again({"size": "16x1"}, rows, [0, 1]) == [("one", 1), ("two", 1)]
    assert again({"size": "32x1"}, rows, [0]) == [("one", 0), ("two", 0)]
    assert again({"size": "16x1"}, [Row("one", LossConfig(beta=0.2))], [0]) == [("one", 0)]
    path.write_text(path.read_text()[:-9])
    assert again({"size": "16x1"}, [Row("one", LossConfig(beta=0.2))], [0]) == [("one", 0)]
    assert again({"size": "16x1"}, rows, [0, 1]) == []
    table = results_table(rows, [0, 1], Results(path, {"size": "16x1"}))
    assert next(iter(table.columns[1].cells)) == "1.0000 ± 0.7071 (0.5000–1.5000)"
    assert list(table.columns[2].cells) == ["not known", "not known"]


def test_rows_differ_in_the_objective_alone(tmp_path: Path) -> None:
    """The same student to begin with, the same tokens; the same objective, the same student."""
    store = make_store(tmp_path / "store", Recipe(num_topk=32, sketch_bytes=16, layers=(1, 3)))
    bench = make_bench(store)
    rows, _ = possible_rows(all_rows([1.0], ["forward_kl"]), store)
    found = {row.name: bench.measure(row, 0) for row in rows}
    assert len({(one["kl_before"], one["tokens"], one["steps"]) for one in found.values()}) == 1
    assert len({one["kl"] for one in found.values()}) == len(rows) == 11
    assert all(0.0 < one["kl"] <= one["kl_over_all"] + 1e-3 for one in found.values())
    again = bench.measure(rows[-1], 0)
    assert {**again, "seconds": 0} == {**found[rows[-1].name], "seconds": 0}
    assert bench.measure(rows[-1], 1)["kl"] != again["kl"]


def test_an_aborted_training_is_a_result(tmp_path: Path) -> None:
    """It does not stop the others, and it is seen."""
    store = make_store(tmp_path / "store", Recipe(num_topk=32))
    bench = make_bench(store)
    row = Row("broken", LossConfig(alpha=1e308))
    results = Results(None, bench.settings())
    run_missing(bench, [row], [0], results, lambda text: None)
    assert "not finite" in results.lines[0]["failed"]
    assert "seed 0 failed" in next(iter(results_table([row], [0], results).columns[1].cells))


def test_kl_over_all_needs_the_tails_shape(tmp_path: Path) -> None:
    bench = make_bench(make_store(tmp_path / "buckets", Recipe(num_topk=8)))
    batches = list(bench.data.held_out(4, torch.device("cpu")))
    assert whole_vocabulary_kl(bench.student(0), batches) is None
    bench = make_bench(make_store(tmp_path / "dense", Recipe("dense")))
    batches = list(bench.data.held_out(4, torch.device("cpu")))
    student, total, count = bench.student(0), 0.0, 0
    with torch.no_grad():
        for batch in batches:
            answers = student(batch.tokens).logits[batch.valid].double().log_softmax(dim=-1)
            teacher = batch.targets.log_probs(1.0).double()
            total += float((teacher.exp() * (teacher - answers)).sum())
            count += len(teacher)
    assert whole_vocabulary_kl(student, batches) == pytest.approx(total / count, rel=1e-5)


def test_spread() -> None:
    assert spread([0.25]) == "0.2500"
    assert spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0 (1.0–3.0)"


# --- killing


def test_differences_are_seen(tmp_path: Path) -> None:
    """A byte, a missing file; nothing where all is equal."""
    for name in ("reference", "found"):
        for file in COMPARED:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.encode())
    reference, found = tmp_path / "reference", tmp_path / "found"
    assert differences(reference, found) == []
    (found / "student.gguf").write_bytes(b"student.gguF")
    (found / COMPARED[0]).unlink()
    assert differences(reference, found) == [COMPARED[0], "student.gguf"]


def test_a_run_is_judged_by_its_files_and_by_where_it_continued(tmp_path: Path) -> None:
    """A training that begins anew may end alike, but has not continued."""
    for file in COMPARED:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"the same")
    (tmp_path / "results.json").write_text('{"training": {"continued_from_step": 7}}')
    moments = ((5, 3, False), (9, 7, True))
    kills = [Kill(1, *at, while_saving=saving, counts=True) for *at, saving in moments]
    assert judge(1, kills, tmp_path, tmp_path) == []
    assert judge(1, kills[:1], tmp_path, tmp_path) == ["run 1: continued from step 7, not 3"]
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text('{"training": {"continued_from_step": 3}}')
    different = [f"run 2: {name} differs" for name in COMPARED]
    found = judge(2, kills, tmp_path, out)
    assert found == [*different, "run 2: continued from step 3, not 7"]


def test_last_step_of_a_file_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 0
    lines = [json.dumps({"kind": "train", "step": step, "loss": 1 / 3}) for step in range(1, 200)]
    held_out = json.dumps({"kind": "held_out", "step": 199})
    path.write_text("\n".join([*lines, held_out, lines[0][:9]]))
    assert last_step(path) == 199
    path.write_text(json.dumps({"kind": "held_out", "step": 0}) + "\n")
    assert last_step(path) == 0


def test_moments_lie_in_the_training_in_order() -> None:
    moments = draw_moments(random.Random(0), 9, 50, 0.1)
    assert [moment.step for moment in moments] == sorted(moment.step for moment in moments)
    assert all(0 <= moment.step < 50 and 0.0 <= moment.delay <= 0.1 for moment in moments)
    assert sum(moment.at_checkpoint for moment in moments) == 3
    assert draw_moments(random.Random(0), 9, 50, 0.1) == moments
