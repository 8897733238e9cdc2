"""A run's report on its guard and the student's inside: events, weights, probes."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from distill.errors import UserError
from distill.reports.build import document_of
from distill.reports.render.html import write_page
from distill.reports.run.charts import charts, comparison_charts
from distill.reports.run.report import Report, compare, read_report
from distill.runs.metrics_log import LOSS_PARTS, Metrics, read_metrics, step_of
from tests.support.report_runs import (
    HOSTILE,
    about,
    add_student,
    check_facts,
    event_line,
    figures_take,
    guarded_lines,
    held_out_line,
    lines_of_a_run,
    make_run,
    needs_browser,
    page,
    printed,
    probe_line,
    said,
    sound_page,
    train_line,
    undrawn,
    unlike,
    weights_line,
    write_lines,
)


def read_back(path: Path, lines: list[dict[str, Any]]) -> Metrics:
    return read_metrics(write_lines(path / "metrics.jsonl", lines))


def steps_of(metrics: Metrics) -> list[int]:
    return [step_of(line) for line in metrics.train]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A run with a guard, events and a student."""
    path = make_run(tmp_path_factory.mktemp("guarded") / "run", lines=guarded_lines())
    add_student(path)
    return read_report(path)


def test_steps_that_a_rollback_took_back_come_from_their_later_lines(tmp_path: Path) -> None:
    """Of every kind of line the later ones count, in order; the undone ones are counted."""
    found = read_back(tmp_path, guarded_lines(steps=160, layers=1))
    assert steps_of(found) == list(range(1, 161)) and found.undone == 25
    assert max(line["loss"] or 0.0 for line in found.train[100:]) < 2.0
    assert [step_of(line) for line in found.weights] == list(range(0, 161, 10))
    assert [step_of(line) for line in found.probe] == list(range(0, 161, 20))
    assert [point.step for point in found.held_out] == list(range(0, 161, 40))
    rollback = next(event for event in found.events if event.action == "rollback")
    assert (rollback.step, rollback.to_step, rollback.undone) == (125, 100, 25)
    assert rollback.batch == (33, 34)
    assert [event.action for event in found.events] == [
        "clip",
        "skip_step",
        "rollback",
        "set_aside",
    ]


def test_a_rollback_that_nothing_followed_leaves_the_steps_before_it(tmp_path: Path) -> None:
    """What was taken back is gone, also where training ended there; the guard's words remain."""
    lines = [*(train_line(step) for step in range(1, 31)), held_out_line(25, 1.0)]
    lines += [event_line(30, "rollback", to_step=step) for step in (20, 10)]
    found = read_back(tmp_path, [*lines, event_line(30, "abort")])
    assert steps_of(found) == list(range(1, 11)) and found.held_out == [] and found.undone == 20
    assert [event.undone for event in found.events] == [10, 10, 0]


def test_steps_that_come_again_without_an_event(tmp_path: Path) -> None:
    """A run that was continued lost the event's line: the later lines count all the same."""
    lines = [train_line(step, loss=5.0) for step in range(1, 21)]
    lines += [held_out_line(20, 9.0), probe_line(20, 1)]
    found = read_back(tmp_path, lines + [train_line(step, loss=1.0) for step in range(11, 16)])
    assert steps_of(found) == list(range(1, 16)) and found.undone == 10
    assert [line["loss"] for line in found.train] == [5.0] * 10 + [1.0] * 5
    assert found.held_out == [] and found.probe == []


def test_what_a_newer_program_writes_is_passed_over(tmp_path: Path) -> None:
    """Unknown kinds, unknown fields of any type, and an action without a name here."""
    lines: list[dict[str, Any]] = [
        {"kind": "weather", "place": [1, {"x": None}], "step": "tomorrow"},
        train_line(1) | {"note": "a text", "list": [1, 2], "flag": True, "more": 7.5},
        weights_line(1, 1) | {"hash": "abc"},
        event_line(1, "sing", mood="good", extra=[1]),
    ]
    found = read_back(tmp_path, lines)
    assert found.train[0]["more"] == 7.5 and found.train[0].keys().isdisjoint(
        {"note", "list", "flag"}
    )
    assert "hash" not in found.weights[0] and found.events[0].action == "sing"
    path = make_run(tmp_path / "run", lines=[*lines_of_a_run(), event_line(60, "sing")])
    assert "1 × sing" in said(path) and "sing" in printed(path) and page(read_report(path))


def test_a_known_field_of_a_wrong_type_is_damage(tmp_path: Path) -> None:
    """One line that names the field; at the very end of the file it may be half written."""
    train, event = train_line(1), event_line(1, "clip")
    rows = [
        (train | {"loss": "high"}, "loss is not a number"),
        (train | {"update_ratio": [1]}, "update_ratio is not a number"),
        (train | {"step": None}, "step is not a number"),
        (weights_line(1, 1) | {"norm:x": "1"}, "norm:x is not a number"),
        (probe_line(1, 1) | {"information": True}, "information is not a number"),
        (event | {"action": 5}, "action is not a text"),
        (event | {"tensor": 5}, "tensor is not a text"),
        (event | {"step": None}, "step or action is missing"),
        (event | {"value": "big"}, "value is not a number"),
        (event | {"batch": [1.5]}, "batch is not a list"),
        ({"step": 3, "loss": 1.0}, "kind is not a text"),
        ({"kind": ["train"], "step": 3}, "kind is not a text"),
    ]
    for line, words in rows:
        with pytest.raises(UserError, match=re.escape(f"line 2: {words}")):
            read_back(tmp_path, [train, line, train_line(2)])
        assert read_back(tmp_path, [train, line]).cut_off, words


def test_verdict_of_the_guard(tmp_path: Path) -> None:
    """What it did, to which tensors and sequences, and how that ended."""
    path = make_run(tmp_path / "some", lines=guarded_lines())
    counts = "1 step clipped harder, 1 step skipped, 1 rollback, 1 batch set aside"
    tensor, batch = "model.layers.3.mlp.down_proj.weight", "sequences 17, 18, 19, 20, 33, 34"
    ended = ("warning", counts, "25 steps taken back", tensor, batch, "recovered")
    check_facts(about(read_report(path).health, "guard"), ended)
    check_facts(about(read_report(path).health, "fixed text"), ("good", "from 0.000 to 2.980 nats"))
    check_facts(about(read_report(path).health, "ffective rank"), ("good", "None of 43 matrices"))
    calm = [line for line in guarded_lines() if line["kind"] != "event"][:100]
    run, back, lost = (
        lines_of_a_run(),
        event_line(60, "rollback", to_step=50),
        "10 steps taken back",
    )
    clip, gave_up = event_line(60, "clip"), event_line(60, "abort", words="Three in a row.")
    for name, lines, finished, row in (
        ("calm", calm, True, ("good", "nothing to do")),
        ("clip", [*run, clip, clip], True, ("plain", "2 steps clipped harder.")),
        ("lost", [*run, back, gave_up], False, ("warning", lost, "step 60", "Three in a row.")),
        (
            "open",
            [*run, back],
            False,
            ("warning", "10 steps taken back", "No step is logged after"),
        ),
    ):
        path = make_run(tmp_path / name, lines=lines, finished=finished)
        assert unlike(about(read_report(path).health, "guard"), row) == [], name


def test_a_run_from_before_there_was_a_guard(tmp_path: Path) -> None:
    """Nothing is said of a guard that did not watch."""
    path = make_run(tmp_path / "old")
    report = read_report(path)
    assert "guard" not in said(path) and "guard" not in printed(path).lower() and not report.guarded
    assert not charts(report).get("health") and not report.events and report.final_weights is None


def test_verdict_of_the_students_inside(tmp_path: Path) -> None:
    """A student that came to say the same everywhere, and a matrix that lost its rank."""
    probes = [probe_line(0, 1), probe_line(20, 1, 3.0), probe_line(40, 1, 0.1)]
    name = "model.layers.0.mlp.up_proj.weight"
    ranks = [weights_line(0, 1), weights_line(40, 1) | {f"rank:{name}": 4.0}]
    path = make_run(tmp_path / "bad", lines=[*lines_of_a_run(), *probes, *ranks])
    check_facts(
        about(read_report(path).health, "fixed text"),
        ("warning", "fell", "to 0.100 nats", "at most 3.000"),
    )
    ranks = about(read_report(path).health, "ffective rank")
    assert unlike(ranks, ("warning", f"{name} (8% left)")) == []


def test_share_of_clipped_steps_by_their_own_limits(tmp_path: Path) -> None:
    """Where a step has its own limit, that one counts; the norms are 2 ± 0.1."""
    own = [train_line(step, clip_limit=1.0 if step <= 50 else 9.0) for step in range(1, 101)]
    plain = [train_line(step) for step in range(1, 101)]
    for name, lines, words in (
        ("own", own, "50% of the steps were clipped (above 1, or a lower limit"),
        ("fixed", plain, "100% of the steps were clipped (above 1)"),
    ):
        assert words in said(make_run(tmp_path / name, lines=lines)), name


def test_charts_have_the_events_and_plotly_takes_them(guarded: Report) -> None:
    """Marks with words on loss, gradient and step size; lines for all but clips."""
    drawn = charts(guarded)
    training = {chart.key: chart.figure for chart in drawn["training"]}
    kinds = ["step clipped harder", "step skipped", "rollback", "batch set aside"]
    for key in ("loss", "gradient", "update-ratio"):
        marks = {trace["name"]: trace for trace in training[key]["data"] if "text" in trace}
        assert list(marks) == kinds, key
        back = marks["rollback"]
        assert back["x"] == [125] and "to step 100" in back["text"][0].replace("<br>", " "), key
        assert [shape["x0"] for shape in training[key]["layout"]["shapes"]] == [60, 125], key
    for choice in training["loss"]["choices"]:
        assert len(choice["data"]["visible"]) == len(training["loss"]["data"])
        assert choice["data"]["visible"][-4:] == [True] * 4
    assert [chart.key for chart in drawn["health"]] == [
        "weights-over-time",
        "probe",
        "probe-layers",
    ]
    assert [chart.key for chart in drawn["weights"]] == ["spectra", "by-layer"]
    figures_take(drawn.values())
    figures_take(comparison_charts(compare(guarded, guarded)).values())


def test_weights_over_time(tmp_path: Path) -> None:
    """Ratios to the start by layer, the farthest of a layer, and ranks as a share of the full."""
    path = make_run(tmp_path / "run", lines=guarded_lines(layers=3))
    figure = charts(read_report(path))["health"][0].figure
    assert figure["groups"][0][2] == "effective rank against its start"
    add_student(path, layers=3, width=64)
    figure = charts(read_report(path))["health"][0].figure
    measures, kinds = figure["groups"]
    start = [f"{measure} against its start" for measure in ("norm", "spread")]
    assert measures == [*start, "effective rank, share of full"]
    assert kinds[:2] == ["most changed", "q_proj"] and kinds[-1] == "outside the layers"

    def data(measure: int, kind: str) -> dict[str, Any]:
        combined: dict[str, Any] = figure["combined"][f"{measure},{kinds.index(kind)}"]["data"]
        return combined

    query = data(0, "q_proj")
    assert query["y"] == [["0", "1", "2"]] and query["z"][0][0][0] == 1.0
    last = 1 - 0.3 * 0.002 * 200 * (1 + 17 / 20)
    assert query["z"][0][2][-1] == pytest.approx(last, rel=5e-3)
    most = data(0, "most changed")["z"][0][2][-1]
    assert most == pytest.approx(1 + 0.002 * 200 * (1 + 24 / 20), rel=5e-3)
    ranks = [(50 - 0.05 * step) / 64 for step in range(0, 201, 10)]
    assert data(2, "down_proj")["z"][0][0] == pytest.approx(ranks, abs=1e-3)
    assert data(0, "outside the layers")["y"] == [["model.embed_tokens", "model.norm"]]


def test_final_weights_come_from_the_student_or_the_newest_checkpoint(tmp_path: Path) -> None:
    """And a file that is damaged, or gone meanwhile, does not spoil the report on the run."""
    path = make_run(tmp_path / "run", lines=guarded_lines(), finished=False)
    assert read_report(path).final_weights is None
    checkpoint = path / "checkpoints" / "step-000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    assert "could not be looked at" in said(path)
    add_student(tmp_path / "other", layers=2).replace(checkpoint / "model.safetensors")
    final = read_report(path).final_weights
    assert final is not None and final.source == "the checkpoint of step 100"
    assert final.report is not None and len(final.report.tensors) == 18
    assert "Weights" in printed(path)
    student = add_student(path, layers=2)
    assert "The weights of the trained student are finite" in said(path)
    student.write_bytes(student.read_bytes()[:5000])
    assert "The weights of the trained student could not be looked at" in said(path)
    assert page(read_report(path))


def test_large_students_are_looked_at_in_some_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the Gram matrix, and it is said which part was left out."""
    path = make_run(tmp_path / "run", lines=guarded_lines())
    add_student(path, layers=12, width=32)
    monkeypatch.setattr("distill.reports.weights.final.LARGE", 1000)
    final = read_report(path).final_weights
    assert final is not None and final.report is not None
    tensors = final.report.tensors
    assert {one.place.layer for one in tensors} == {None, 0, 2, 3, 5, 6, 8, 9, 11}
    routes = {one.figures.spectrum.route for one in tensors if one.figures.spectrum}
    assert routes == {"gram"} and "tensors were left out" in printed(path)


def test_long_guarded_run_of_many_layers_stays_small(tmp_path: Path) -> None:
    """48 layers, 5,000 steps, 400 events with hostile names: the page is small and sound."""
    lines: list[dict[str, Any]] = []
    draw = random.Random(0)
    names = ("loss", *LOSS_PARTS, "update_ratio", "clip_limit", "grad_norm")
    for step in range(5001):
        if step:
            rotations = ("rotation_error", "rotation_drift")
            lines.append(train_line(step, **{name: draw.random() for name in (*names, *rotations)}))
        if step % 20 == 0:
            lines.append(probe_line(step, 48))
        if step % 200 == 0:
            lines.append(weights_line(step, 48, growth=1e-4))
        if step % 12 == 1:
            lines.append(event_line(step, "clip", tensor=HOSTILE, words=HOSTILE, signal=HOSTILE))
    path = make_run(tmp_path / "long", lines=lines)
    add_student(path, layers=48, width=64)  # as many values as a page shows of a spectrum
    _, figures = sound_page(page(read_report(path)))
    assert "<img" not in json.dumps(figures)


def test_json_has_all_of_it(guarded: Report) -> None:
    """Events, what was undone, every figure of weights and probe, and the final spectra."""
    content = json.loads(json.dumps(guarded.to_json(), allow_nan=False))
    assert content["kind"] == "run" and content["undone"] == 25 and content["guarded"] is True
    event = content["events"][2]
    assert (event["action"], event["undone"]) == ("rollback", 25)
    assert len(content["weights"]) == 21 and len(content["probe"]) == 11
    assert content["weights"][3]["norm:model.norm.weight"] > 4.0
    tensors = content["final_weights"]["report"]["tensors"]
    assert len(tensors) == 50 and tensors[0]["figures"]["shape"] == [256, 64]
    assert len(tensors[0]["figures"]["spectrum"]["values"]) == 64
    assert content["full_ranks"]["model.layers.0.mlp.down_proj.weight"] == 64
    assert content["curves"]["update_ratio"]["steps"] == list(range(1, 201))


def test_comparison_has_events_and_information(tmp_path: Path) -> None:
    """Side by side with a run that had no guard."""
    first = make_run(tmp_path / "first", lines=guarded_lines())
    second = make_run(tmp_path / "second", finished=False)
    both = compare(read_report(first), read_report(second))
    text = printed(both, 220)
    for words in ("1 step clipped harder, 1 step skipped", "information at the end", "2.980"):
        assert words in text
    keys = [chart.key for chart in comparison_charts(both)["curves"]]
    assert keys[-1] == "both-information" and json.dumps(both.to_json(), allow_nan=False)


def test_log_in_the_terminal_is_the_newest(tmp_path: Path) -> None:
    """Twenty rows, newest first, and how many more there are; names cannot steer the terminal."""
    bad = {"tensor": HOSTILE, "signal": HOSTILE}
    events = [event_line(step, "clip", words=f"w{step}. {HOSTILE}", **bad) for step in range(1, 61)]
    text = printed(make_run(tmp_path / "run", lines=[*lines_of_a_run(), *events]))
    assert "w60." in text and "w41." in text and "w40." not in text
    assert "40 more rows" in text and "\x1b" not in text


@needs_browser
@pytest.mark.slow
def test_in_a_browser(guarded: Report, tmp_path: Path) -> None:
    """All charts are drawn and the console stays empty."""
    write_page(document_of(guarded), tmp_path / "report.html")
    assert undrawn(tmp_path / "report.html", sum(map(len, charts(guarded).values()))) == []
