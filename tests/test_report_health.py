"""A run's report on what its guard did and on the student's inside: steps taken back, events, weights, probes."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from rich.console import Console as RichConsole

from distill.errors import UserError
from distill.reports.charts import charts, comparison_charts
from distill.reports.html import page, write_page
from distill.reports.metrics import LOSS_PARTS, Metrics, read_metrics, step_of
from distill.reports.report import compare, read_report
from distill.reports.telling import Content
from distill.reports.text import print_report
from tests.report_run import (
    HOSTILE,
    MAX_BYTES,
    Page,
    add_student,
    event_line,
    guarded_lines,
    held_out_line,
    in_a_browser,
    lines_of_a_run,
    make_run,
    printed,
    probe_line,
    said,
    train_line,
    weights_line,
    weights_of_a_student,
)


def read_back(path: Path, lines: list[dict[str, Any]], rest: str = "") -> Metrics:
    file = path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)
    return read_metrics(file)


def steps_of(metrics: Metrics) -> list[int]:
    return [step_of(line) for line in metrics.train]


def figures_take(content: Content, drawn: Any) -> None:
    """Plotly's own schema takes every chart and every combination of buttons."""
    for chart in (one for some in drawn for one in some):
        text = json.dumps(chart.figure).replace('"@heat"', '"Blues"').replace('"@deep"', '"Blues"')
        figure = json.loads(re.sub(r'"@[a-z]+(:[0-9.]+)?"', '"#000000"', text.replace('"@change"', '"RdBu"')))
        built = go.Figure({key: figure[key] for key in ("data", "layout")})
        changes = [*figure.get("choices", []), *figure.get("combined", {}).values()]
        for change in changes:
            built.update_layout({key.replace(".", "_"): value for key, value in change["layout"].items()})
            for key, values in change["data"].items():
                assert len(values) in (1, len(built.data)), key
                built.data[0].update({key.replace(".", "_"): values[0]})


def test_steps_that_a_rollback_took_back_come_from_their_later_lines(tmp_path: Path) -> None:
    """Of every kind of line the later ones count, in order of steps, and it is counted how many were undone."""
    found = read_back(tmp_path, guarded_lines(steps=160, layers=1))
    assert steps_of(found) == list(range(1, 161)) and found.undone == 25
    assert max(line["loss"] or 0.0 for line in found.train[100:]) < 2.0
    assert [step_of(line) for line in found.weights] == list(range(0, 161, 10))
    assert [step_of(line) for line in found.probe] == list(range(0, 161, 20))
    assert [point.step for point in found.held_out] == list(range(0, 161, 40))
    rollback = next(event for event in found.events if event.action == "rollback")
    assert (rollback.step, rollback.to_step, rollback.undone, rollback.batch) == (125, 100, 25, (33, 34))
    assert [event.action for event in found.events] == ["clip", "skip_step", "rollback", "set_aside"]


def test_a_rollback_that_nothing_followed_leaves_the_steps_before_it(tmp_path: Path) -> None:
    """What was taken back is gone, also where training ended there; the guard's words remain."""
    lines = [*(train_line(step) for step in range(1, 31)), held_out_line(25, 1.0)]
    lines += [
        event_line(30, "rollback", to_step=20),
        event_line(30, "rollback", to_step=10),
        event_line(30, "abort"),
    ]
    found = read_back(tmp_path, lines)
    assert steps_of(found) == list(range(1, 11)) and found.held_out == [] and found.undone == 20
    assert [event.undone for event in found.events] == [10, 10, 0]


def test_steps_that_come_again_without_an_event(tmp_path: Path) -> None:
    """A run that was continued lost the event's line: the later lines count all the same."""
    lines = [train_line(step, loss=5.0) for step in range(1, 21)] + [
        held_out_line(20, 9.0),
        probe_line(20, 1),
    ]
    lines += [train_line(step, loss=1.0) for step in range(11, 16)]
    found = read_back(tmp_path, lines)
    assert steps_of(found) == list(range(1, 16)) and found.undone == 10
    assert [line["loss"] for line in found.train] == [5.0] * 10 + [1.0] * 5
    assert found.held_out == [] and found.probe == []


def test_what_a_newer_program_writes_is_passed_over(tmp_path: Path) -> None:
    """Unknown kinds whatever they hold, unknown fields of any type, and an action without a name here."""
    lines: list[dict[str, Any]] = [
        {"kind": "weather", "place": [1, {"x": None}], "step": "tomorrow"},
        train_line(1) | {"note": "a text", "list": [1, 2], "flag": True, "more": 7.5},
        weights_line(1, 1) | {"hash": "abc"},
        event_line(1, "sing", mood="good", extra=[1]),
    ]
    found = read_back(tmp_path, lines)
    assert found.train[0]["more"] == 7.5 and "note" not in found.train[0] and "flag" not in found.train[0]
    assert "hash" not in found.weights[0] and found.events[0].action == "sing"
    path = make_run(tmp_path / "run", lines=[*lines_of_a_run(), event_line(60, "sing")])
    assert "1 × sing" in said(path) and "sing" in printed(path) and page(read_report(path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (train_line(1) | {"loss": "high"}, "loss is not a number"),
        (train_line(1) | {"update_ratio": [1]}, "update_ratio is not a number"),
        (train_line(1) | {"step": None}, "step is not a number"),
        (weights_line(1, 1) | {"norm:x": "1"}, "norm:x is not a number"),
        (probe_line(1, 1) | {"information": True}, "information is not a number"),
        (event_line(1, "clip") | {"action": 5}, "action is not a text"),
        (event_line(1, "clip") | {"tensor": 5}, "tensor is not a text"),
        (event_line(1, "clip") | {"step": None}, "step or action is missing"),
        (event_line(1, "clip") | {"value": "big"}, "value is not a number"),
        (event_line(1, "clip") | {"batch": [1.5]}, "batch is not a list"),
        ({"step": 3, "loss": 1.0}, "kind is not a text"),
        ({"kind": ["train"], "step": 3}, "kind is not a text"),
    ],
)
def test_a_known_field_of_a_wrong_type_is_damage(tmp_path: Path, line: dict[str, Any], words: str) -> None:
    """One line that names the field; at the very end of the file it may be half written."""
    with pytest.raises(UserError, match=re.escape(f"line 2: {words}")):
        read_back(tmp_path, [train_line(1), line, train_line(2)])
    assert read_back(tmp_path, [train_line(1), line]).cut_off


def test_verdict_of_the_guard(tmp_path: Path) -> None:
    """What it did, to which tensors and sequences, and how that ended."""
    words = said(make_run(tmp_path / "some", lines=guarded_lines()))
    assert (
        "warning: The guard acted: 1 step clipped harder, 1 step skipped, 1 rollback, 1 batch set aside"
        in words
    )
    assert "25 steps taken back" in words and "it named model.layers.3.mlp.down_proj.weight" in words
    assert "sequences 17, 18, 19, 20, 33, 34" in words and "recovered" in words
    assert "went from 0.000 to 2.980 nats" in words and "None of 43 matrices lost half" in words
    calm = [line for line in guarded_lines() if line["kind"] != "event"][:100]
    assert "good: The guard had nothing to do" in said(make_run(tmp_path / "calm", lines=calm))
    clipped = [*lines_of_a_run(), event_line(60, "clip"), event_line(60, "clip")]
    assert "plain: The guard acted: 2 steps clipped harder." in said(
        make_run(tmp_path / "clip", lines=clipped)
    )
    lost = [
        *lines_of_a_run(),
        event_line(60, "rollback", to_step=50),
        event_line(60, "abort", words="Three in a row."),
    ]
    words = said(make_run(tmp_path / "lost", lines=lost, finished=False))
    assert "It gave up at step 60. Its words: Three in a row." in words and "10 steps taken back" in words
    open_end = [*lines_of_a_run(), event_line(60, "rollback", to_step=50)]
    assert "No step is logged after" in said(make_run(tmp_path / "open", lines=open_end, finished=False))


def test_a_run_from_before_there_was_a_guard(tmp_path: Path) -> None:
    """Nothing is said of a guard that did not watch."""
    path = make_run(tmp_path / "old")
    report = read_report(path)
    assert "guard" not in said(path) and "guard" not in printed(path).lower() and not report.guarded
    assert not charts(report).get("health") and not report.events and report.final_weights is None


def test_verdict_of_the_students_inside(tmp_path: Path) -> None:
    """A student that came to say the same everywhere, and a matrix that lost its rank."""
    lines = [*lines_of_a_run(), probe_line(0, 1), probe_line(20, 1, 3.0), probe_line(40, 1, 0.1)]
    name = "rank:model.layers.0.mlp.up_proj.weight"
    lines += [weights_line(0, 1), weights_line(40, 1) | {name: 4.0}]
    words = said(make_run(tmp_path / "bad", lines=lines))
    assert "warning: What the next-token distribution says about its place in a fixed text fell" in words
    assert "at most 3.000" in words and f"{name[5:]} (8% left)" in words


def test_share_of_clipped_steps_by_their_own_limits(tmp_path: Path) -> None:
    """Where a step has its own limit, that one counts; the norms are 2 ± 0.1."""
    lines = [train_line(step, clip_limit=1.0 if step <= 50 else 9.0) for step in range(1, 101)]
    assert "50% of the steps were clipped (above 1, or a lower limit that follows" in said(
        make_run(tmp_path / "own", lines=lines)
    )
    plain = [train_line(step) for step in range(1, 101)]
    assert "100% of the steps were clipped (above 1)" in said(make_run(tmp_path / "fixed", lines=plain))


def test_charts_have_the_events_and_plotly_takes_them(tmp_path: Path) -> None:
    """Marks with words on loss, gradient and step size; lines for all but clips; every button's change fits."""
    path = make_run(tmp_path / "run", lines=guarded_lines())
    add_student(path)
    report = read_report(path)
    drawn = charts(report)
    training = {chart.key: chart.figure for chart in drawn["training"]}
    for key in ("loss", "gradient", "update-ratio"):
        marks = {trace["name"]: trace for trace in training[key]["data"] if "text" in trace}
        assert marks.keys() == {"step clipped harder", "step skipped", "rollback", "batch set aside"}
        assert marks["rollback"]["x"] == [125] and "back to step 100" in marks["rollback"]["text"][0].replace(
            "<br>", " "
        )
        assert [shape["x0"] for shape in training[key]["layout"]["shapes"]] == [60, 125]
    for choice in training["loss"]["choices"]:
        assert len(choice["data"]["visible"]) == len(training["loss"]["data"])
        assert choice["data"]["visible"][-4:] == [True] * 4
    assert [chart.key for chart in drawn["health"]] == ["weights-over-time", "probe", "probe-layers"]
    assert [chart.key for chart in drawn["weights"]] == ["spectra", "by-layer"]
    figures_take(report, drawn.values())
    figures_take(report, comparison_charts(compare(report, report)).values())


def test_weights_over_time(tmp_path: Path) -> None:
    """Ratios to the start by layer, the farthest of a layer, and ranks as a share of the full one where it is known."""
    path = make_run(tmp_path / "run", lines=guarded_lines(layers=3))
    figure = charts(read_report(path))["health"][0].figure
    assert figure["groups"][0][2] == "effective rank against its start"
    add_student(path, layers=3, width=64)
    figure = charts(read_report(path))["health"][0].figure
    measures, kinds = figure["groups"]
    assert measures == ["norm against its start", "spread against its start", "effective rank, share of full"]
    assert kinds[:2] == ["most changed", "q_proj"] and kinds[-1] == "outside the layers"
    query = figure["combined"][f"0,{kinds.index('q_proj')}"]["data"]
    assert query["y"] == [["0", "1", "2"]] and query["z"][0][0][0] == 1.0
    assert query["z"][0][2][-1] == pytest.approx(1 - 0.3 * 0.002 * 200 * (1 + 17 / 20), rel=5e-3)
    most = figure["combined"]["0,0"]["data"]["z"][0]
    assert most[2][-1] == pytest.approx(1 + 0.002 * 200 * (1 + 24 / 20), rel=5e-3)
    ranks = figure["combined"][f"2,{kinds.index('down_proj')}"]["data"]["z"][0]
    assert ranks[0] == pytest.approx([(50 - 0.05 * step) / 64 for step in range(0, 201, 10)], abs=1e-3)
    outside = figure["combined"][f"0,{len(kinds) - 1}"]["data"]["y"]
    assert outside == [["model.embed_tokens", "model.norm"]]


def test_final_weights_come_from_the_student_or_the_newest_checkpoint(tmp_path: Path) -> None:
    """And a file that is damaged, or gone meanwhile, does not spoil the report on the run."""
    path = make_run(tmp_path / "run", lines=guarded_lines(), finished=False)
    assert read_report(path).final_weights is None
    checkpoint = path / "checkpoints" / "step-000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    assert "could not be looked at" in said(path)
    file = add_student(tmp_path / "other", layers=2)
    file.replace(checkpoint / "model.safetensors")
    final = read_report(path).final_weights
    assert final is not None and final.source == "the checkpoint of step 100" and final.report is not None
    assert len(final.report.tensors) == 18 and "Weights" in printed(path)
    student = add_student(path, layers=2)
    assert "The weights of the trained student are finite" in said(path)
    student.write_bytes(student.read_bytes()[:5000])
    assert "The weights of the trained student could not be looked at" in said(path) and page(
        read_report(path)
    )


def test_large_students_are_looked_at_in_some_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Gram matrix, and it is said which part was left out."""
    path = make_run(tmp_path / "run", lines=guarded_lines())
    add_student(path, layers=12, width=32)
    monkeypatch.setattr("distill.reports.final_weights.LARGE", 1000)
    final = read_report(path).final_weights
    assert final is not None and final.report is not None
    assert {one.place.layer for one in final.report.tensors} == {None, 0, 2, 3, 5, 6, 8, 9, 11}
    routes = {one.figures.spectrum.route for one in final.report.tensors if one.figures.spectrum}
    assert routes == {"gram"} and "tensors were left out" in printed(path)


def test_long_guarded_run_of_many_layers_stays_small(tmp_path: Path) -> None:
    """48 layers, 5,000 steps, 400 events and as many hostile names: the page is under the limit and keeps to itself."""
    lines: list[dict[str, Any]] = []
    draw = random.Random(0)
    for step in range(5001):
        if step:
            parts = {
                name: draw.random()
                for name in ("loss", *LOSS_PARTS, "update_ratio", "clip_limit", "grad_norm")
            }
            lines.append(
                train_line(
                    step, **parts, **{name: draw.random() for name in ("rotation_error", "rotation_drift")}
                )
            )
        if step % 20 == 0:
            lines.append(probe_line(step, 48))
        if step % 200 == 0:
            lines.append(weights_line(step, 48, growth=1e-4))
        if step % 12 == 1:
            lines.append(event_line(step, "clip", tensor=HOSTILE, words=HOSTILE, signal=HOSTILE))
    path = make_run(tmp_path / "long", lines=lines)
    add_student(path, layers=48, width=128)
    report = read_report(path)
    text = page(report)
    assert len(text.encode()) <= MAX_BYTES
    parsed = Page(text)
    assert len(parsed.scripts) == 3 and not {"img", "svg", "iframe"} & {tag for tag, _ in parsed.tags}
    assert "<img" not in json.dumps(json.loads(parsed.scripts[0]))
    json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert "\x1b" not in printed(path)


def test_json_has_all_of_it(tmp_path: Path) -> None:
    """Events, what was undone, every figure of weights and probe, and the final spectra."""
    path = make_run(tmp_path / "run", lines=guarded_lines())
    add_student(path)
    content = json.loads(json.dumps(read_report(path).to_json(), allow_nan=False))
    assert content["kind"] == "run" and content["undone"] == 25 and content["guarded"] is True
    assert (content["events"][2]["action"], content["events"][2]["undone"]) == ("rollback", 25)
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
    console = RichConsole(file=io.StringIO(), width=220)
    print_report(both, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert (
        "1 step clipped harder, 1 step skipped" in text
        and "information at the end" in text
        and "2.980" in text
    )
    keys = [chart.key for chart in comparison_charts(both)["curves"]]
    assert keys[-1] == "both-information" and json.dumps(both.to_json(), allow_nan=False)


def test_log_in_the_terminal_is_the_newest(tmp_path: Path) -> None:
    """Twenty rows, newest first, and how many more there are."""
    lines = [*lines_of_a_run(), *(event_line(step, "clip", words=f"word{step}.") for step in range(1, 61))]
    text = printed(make_run(tmp_path / "run", lines=lines))
    assert "word60." in text and "word41." in text and "word40." not in text and "40 more rows" in text


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(tmp_path: Path, width: int) -> None:
    """All charts are drawn and the console stays empty."""
    path = make_run(tmp_path / "run", lines=guarded_lines())
    add_student(path)
    report, out = read_report(path), tmp_path / "report.html"
    write_page(report, out)
    number = sum(map(len, charts(report).values()))
    document, words = in_a_browser(out, width)
    assert f'data-drawn="{number}"' in document and document.count('class="main-svg"') >= number
    assert "CONSOLE" not in words, words


def test_helpers_agree() -> None:
    """The names that a run logs are those of its weights."""
    logged = {key[5:] for key in weights_line(0, 2) if key.startswith("norm:")}
    assert logged == weights_of_a_student(2, 16).keys()
