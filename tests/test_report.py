"""What a run says of itself: read from finished, running, crashed and damaged folders; as text, page and JSON."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from rich.console import Console as RichConsole

import distill.reports.html
from distill.cli import main
from distill.console import Console
from distill.errors import UserError
from distill.reports.charts import charts, comparison_charts
from distill.reports.html import page, write_page, write_run_report
from distill.reports.report import CURVE_POINTS, compare, read_report, thinned, wilson
from distill.reports.text import print_report
from distill.run_folder import RunFolder
from teachers.files import exclusive
from tests.report_run import (
    HOSTILE,
    MAX_BYTES,
    Page,
    held_out_line,
    in_a_browser,
    lines_of_a_run,
    make_run,
    printed,
    said,
    train_line,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "first")


def test_verdict_of_a_healthy_run(run: Path) -> None:
    """Finished, KL fell, nothing broken; the safety head's cost is said, and nothing else is a warning."""
    words = said(run)
    assert "good: Finished: 60 steps over 6.0 k tokens." in words
    assert "fell from 6.000 to 1.500" in words and "Every value logged is finite" in words
    assert "did not rise" in words and "did not double" in words and "stayed rotations" in words
    assert "AUROC 0.800" in words and "95% agreement with the teacher answering 80% of the tokens" in words
    warnings = [line for line in words.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2 and all("afety head" in line for line in warnings)
    assert (
        "refuse recall 98.0% (4 of 4)" in warnings[0] and "of 4 prompts to allow it allowed 1" in warnings[1]
    )


def test_verdict_finds_what_went_wrong(tmp_path: Path) -> None:
    """A best step before the last, a null, a loss that rises, a gradient that grows, rotations that are none."""
    lines: list[dict[str, Any]] = [held_out_line(0, 6.0), held_out_line(10, 2.0)]
    for step in range(1, 101):
        late = step > 90
        changes = {"loss": 9.0 + 0.01 * (step % 3) if late else 2.0 + 0.01 * (step % 3)}
        lines.append(train_line(step, **changes, grad_norm=50.0 if late else 1.0, rotation_error=1e-3))
    lines[50]["ce"] = None
    path = make_run(tmp_path / "bad", lines=[*lines, held_out_line(100, 3.0)], finished=False)
    words = said(path)
    assert "warning: The best step, 10, is earlier than the last one measured, 100" in words
    assert "warning: Values that are not finite were logged: ce at step 49." in words
    assert "warning: The training loss rose at the end" in words
    assert "warning: The gradient norm before clipping more than doubled" in words
    assert "warning: The rotations did not stay orthogonal" in words
    assert read_report(path).best_step == 10


def test_running_crashed_and_cut_off(tmp_path: Path) -> None:
    """Without results a run still has a report; a last line that is not whole is left out and said."""
    path = make_run(tmp_path / "crashed", finished=False)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 61, "lo')
    (path / "checkpoints" / "step-000040").mkdir(parents=True)
    (path / "checkpoints" / "step-000040" / "state.json").write_text("{}")
    report = read_report(path)
    assert report.state == "stopped" and report.last_step == 60 and report.results is None
    assert "last line was cut off" in said(path) and "continues from the checkpoint of step 40" in said(path)
    assert report.teacher.name == "example" and report.student.size == "64x2"
    assert "Held-out scores" in printed(path) and page(report)
    code = "import sys, pathlib, distill.reports.report as r; print(r.read_report(pathlib.Path(sys.argv[1])).state)"
    with exclusive(path):
        seen = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
        )
    assert seen.stdout.strip() == "running"


def test_a_run_of_nothing_but_nulls(tmp_path: Path) -> None:
    """Every value null: the report says so and does not fail."""
    lines = [
        {**line, **{key: None for key in line if key not in ("kind", "step")}} for line in lines_of_a_run()
    ]
    path = make_run(tmp_path / "nulls", lines=lines, finished=False)
    assert "loss at steps 1, 2, 3, 4, 5 and 55 more" in said(path) and "held-out kl at steps 0, 20" in said(
        path
    )
    assert printed(path) and page(read_report(path))
    json.dumps(read_report(path).to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: shutil.rmtree(run), "no such folder"),
        (lambda run: (run / "config.json").unlink(), "not a run's folder"),
        (lambda run: (run / "config.json").write_text("{"), "config.json is damaged"),
        (lambda run: (run / "results.json").write_text('{"teacher": 5'), "results.json is damaged"),
        (lambda run: (run / "results.json").write_text('{"teacher": 5}'), "results.json is damaged (teacher"),
        (
            lambda run: (run / "metrics.jsonl").write_text('nonsense\n{"kind": "train", "step": 1}\n'),
            "line 1",
        ),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "train", "step": "x"}\n[]\n'), "line 1"),
        (
            lambda run: [(run / name).unlink() for name in ("metrics.jsonl", "results.json")],
            "nothing is logged yet",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    run: Path, damage: Any, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a run, nothing logged, damaged files."""
    damage(run)
    monkeypatch.setattr(sys, "argv", ["distill", "report", str(run)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert stop.value.code == 2 and words in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_text_shows_the_figures_and_cannot_steer_the_terminal(tmp_path: Path) -> None:
    """The tables of every section; names from files are text only."""
    text = printed(make_run(tmp_path / "hostile", teacher=HOSTILE, settings=("train.epochs=3",)))
    for words in (
        "train.epochs",
        "Refuse Recall",
        "51.0–100.0%",
        "AUROC",
        "Proof",
        "torch",
        "3 scenarios",
        "seed",
    ):
        assert words in text, words
    assert "\x1b" not in text and "[red]" in text


def test_how_llama_cpp_ran_is_said(run: Path) -> None:
    """Only where it did not run as it does by default; a record that says nothing is of an older run."""
    assert "extra CPU buffers" not in page(read_report(run))
    content = json.loads((run / "results.json").read_text())
    content["llama_cpp"] = {"extra_buffers": False, "reason": "died (signal SIGILL)"}
    (run / "results.json").write_text(json.dumps(content))
    assert "without its extra CPU buffers, with which it died (signal SIGILL)" in page(read_report(run))


def test_json_is_the_same_for_machines(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One object on standard output, and the page beside it where it is asked for."""
    out = run.parent / "page.html"
    monkeypatch.setattr(sys, "argv", ["distill", "report", str(run), "--json", "--output", str(out)])
    with pytest.raises(SystemExit) as stop:
        main()
    content = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and out.stat().st_size <= MAX_BYTES
    assert content["state"] == "finished" and content["best_step"] == 60
    assert content["results"]["heads"]["verification"]["auroc"] == 0.8
    assert content["curves"]["loss"]["steps"] == list(range(1, 61))
    refuse = content["safety_ratios"]["all"][0]
    assert (refuse["name"], refuse["right"], refuse["cases"]) == ("Refuse Recall", 4, 4)


def test_page_is_one_file_that_asks_for_nothing(run: Path) -> None:
    """It parses, is small enough, holds Plotly once, and has no address in it outside Plotly's script."""
    text = page(read_report(run))
    assert len(text.encode()) <= MAX_BYTES
    assert text.count("* plotly.js v") == 1
    parsed = Page(text)
    figures, plotly, _ = parsed.scripts
    assert json.loads(figures).keys() >= {
        "loss",
        "held-out",
        "gradient",
        "rate",
        "confusion",
        "reliability",
        "cascade",
    }
    for tag, attributes in parsed.tags:
        assert tag not in ("iframe", "object", "embed", "base", "form", "img")
        for name in ("src", "href", "action", "srcset"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("#", "data:")), (tag, name, value)
    ours = text.replace(plotly, "")
    assert "http" not in ours.replace("http-equiv", "")
    assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|import\(|url\(|@import", ours)
    policy = (
        next(a["content"] for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    )
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2 and "connect-src" not in policy
    drawn = {attributes["data-chart"] for _, attributes in parsed.tags if "data-chart" in attributes}
    assert drawn == json.loads(figures).keys()


def test_page_keeps_hostile_names_as_text(tmp_path: Path) -> None:
    """A teacher, a folder and a setting that look like markup are shown, not run."""
    path = make_run(
        tmp_path / "<b onclick=alert(4)>run", teacher=HOSTILE, settings=("data.path='<svg onload=alert(3)>'",)
    )
    second = make_run(tmp_path / "<i>&<script>", finished=False)
    for text in (page(read_report(path)), page(compare(read_report(path), read_report(second)))):
        parsed = Page(text)
        assert len(parsed.scripts) == 3
        assert not {"img", "svg", "b", "i"} & {tag for tag, _ in parsed.tags}
        assert "<b onclick=alert(4)>run" in "".join(parsed.words)
        figures = json.loads(parsed.scripts[0])  # Plotly takes some markup in names
        assert "<i" not in json.dumps(figures) and "<b o" not in json.dumps(figures)
    assert "{{ 7*7 }}<img" in "".join(Page(page(read_report(path))).words)


def test_figures_are_plotlys(run: Path) -> None:
    """Plotly's own schema takes every chart, once colours have the page's names put in."""
    report = read_report(run)
    for some in (*charts(report).values(), *comparison_charts(compare(report, report)).values()):
        for chart in some:
            text = json.dumps({key: chart.figure[key] for key in ("data", "layout")})
            plain = text.replace('"@heat"', '"Blues"')
            figure = json.loads(re.sub(r'"@[a-z]+"', '"#000000"', plain))
            assert len(go.Figure(figure).data) == len(
                chart.figure["data"]
            )  # raises at a name it does not know
            for choice in chart.figure.get("choices", []):
                go.Figure(figure).update_layout(
                    {key.replace(".", "_"): v for key, v in choice["layout"].items()}
                )


def test_long_runs_stay_small_and_keep_their_spikes(tmp_path: Path) -> None:
    """A curve of many steps is thinned, and its extremes and ends are not."""
    lines = [train_line(step) for step in range(1, 20_001)]
    lines[12_344]["loss"], lines[7_000]["loss"] = 99.0, None
    report = read_report(make_run(tmp_path / "long", lines=lines, finished=False))
    curve = report.curves["loss"]
    assert len(curve.steps) <= CURVE_POINTS and 99.0 in curve.values and None in curve.values
    assert curve.steps[0] == 1 and curve.steps[-1] == 20_000 and report.curves["kd"].steps == curve.steps
    assert len(page(report).encode()) <= MAX_BYTES
    assert thinned([1.0, 2.0]) == [0, 1] and thinned([]) == []


def test_wilson() -> None:
    """Values of Newcombe 1998, table I (method 3), and the ends."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)


def test_comparison(run: Path, tmp_path: Path) -> None:
    """Figures side by side, the settings that differ, and why the figures may not be comparable."""
    second = make_run(tmp_path / "second", finished=False, settings=("train.epochs=3", "seed=4"))
    both = compare(read_report(run), read_report(second))
    assert [(one.key, one.value, one.default) for one in both.differences] == [
        ("seed", 0, 4),
        ("train.epochs", 8, 3),
    ]
    assert both.cautions == ["Another seed or held-out share chose other held-out text."]
    console = RichConsole(file=io.StringIO(), width=200)
    print_report(both, console)
    assert isinstance(console.file, io.StringIO) and "A: first" in console.file.getvalue()
    keys = [chart.key for chart in comparison_charts(both)["curves"]]
    assert keys == ["both-kl", "both-agreement", "both-cross_entropy", "both-loss", "both-grad_norm"]
    assert json.loads(json.dumps(both.to_json(), allow_nan=False))["differences"][0]["second"] == 4


def test_page_goes_only_where_a_page_belongs(run: Path) -> None:
    """No other file is overwritten, and a missing folder is named."""
    for path, words in (
        (run / "config.json", "must end in .html"),
        (run / "no" / "page.html", "there is no folder"),
    ):
        with pytest.raises(UserError, match=words):
            write_page(read_report(run), path)


def test_a_report_that_cannot_be_written_spoils_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a run the failure is said and not raised."""
    write_run_report(RunFolder(run), Console())
    assert RunFolder(run).report.stat().st_size > 1000 and capsys.readouterr().out == ""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(distill.reports.html, "write_whole", full)
    write_run_report(RunFolder(run), Console())
    words = " ".join(capsys.readouterr().out.split())
    assert "could not be written" in words and "No space left" in words


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(run: Path, tmp_path: Path, width: int) -> None:
    """All charts are drawn, and the console stays empty: also of requests, each of which the policy would refuse."""
    out = tmp_path / "report.html"
    write_page(read_report(run), out)
    document, words = in_a_browser(out, width)
    assert re.search(r'<html[^>]* data-drawn="12"', document), words[-2000:]
    assert document.count('class="main-svg"') >= 12
    assert "CONSOLE" not in words, words


@pytest.mark.slow
def test_a_browser_refuses_what_a_page_must_not_ask_for(run: Path, tmp_path: Path) -> None:
    """The check above can fail: an image from the network and a foreign script are refused, and said."""
    out = tmp_path / "report.html"
    foreign = '<img src="https://example.org/x.png"><script>document.title = "taken"</script></main>'
    out.write_text(page(read_report(run)).replace("</main>", foreign))
    document, words = in_a_browser(out, 1280)
    assert words.count("CONSOLE") >= 2 and "Content Security Policy" in words
    assert "<title>taken" not in document
