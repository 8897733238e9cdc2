"""What a run says of itself: finished, running, crashed or damaged; as text, page and JSON."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distill.reports.render.html
from distill.errors import UserError
from distill.metrics.intervals import wilson
from distill.reports.build import document_of, write_run_report
from distill.reports.render.html import write_page
from distill.reports.run.charts import charts, comparison_charts
from distill.reports.run.report import CURVE_POINTS, compare, read_report, thinned
from distill.runs.folder import RunFolder
from distill.runtime.progress import Console
from teachers.atomic_files import exclusive
from tests.conftest import refuses, says
from tests.support.report_runs import (
    HOSTILE,
    MAX_BYTES,
    check_facts,
    figures_take,
    held_out_line,
    in_a_browser,
    lines_of_a_run,
    make_run,
    needs_browser,
    page,
    printed,
    put,
    said,
    sound_page,
    train_line,
    undrawn,
    unlike,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "first")


def test_verdict_of_a_healthy_run(run: Path) -> None:
    """Finished, KL fell, nothing broken; only the safety head is a warning."""
    rows = [
        ("good", "Finished", "60 steps", "6.0 k tokens"),
        ("good", "KL", "from 6.000 to 1.500"),
        ("good", "finite"),
        ("good", "training loss"),
        ("good", "gradient norm"),
        ("good", "rotations", "2.0e-07", "0.050"),
        ("warning", "afety head", "refuse recall 100.0% (4 of 4)", "allow recall at least 80%"),
        ("good", "AUROC 0.800", "95% agreement", "80% of the tokens"),
        ("good", "exported", "3.0e-05", "90", "99.0%"),
    ]
    assert unlike(read_report(run).health, *rows) == []


def test_verdict_of_use(tmp_path: Path) -> None:
    """By the exported file's figures; what the next level takes, by a curve a + b·tokens^−c."""
    kl, agreement = "evaluation.exported.kl", "evaluation.exported.agreement"
    for a, b, changes, rows in (
        # 0.1 + 0.3·(6000/t) is 0.25 at t = 12,000; 6,000 tokens took 12.5 s
        (
            0.1,
            0.3,
            {},
            [
                ("warning", "not usable yet: KL 0.400", "80.0%"),
                ("plain", "0.25"),
                (
                    "plain",
                    "Close would take about 6.",
                    "of training",
                    "tends to 0.10",
                ),
            ],
        ),
        (
            0.3,
            0.3,
            {},
            [
                ("warning", "not usable yet"),
                ("plain", "75%"),
                ("plain", "Close is not reachable by more training at this size", "0.300"),
            ],
        ),
        (
            0.1,
            0.3,
            {agreement: 0.024},
            [("warning", "not usable yet", "2.4%"), ("plain", "90%"), ("plain", "Close")],
        ),
        (0.0, 0.04, {agreement: 0.95}, [("good", "very close: KL 0.040"), ("plain", "0.05")]),
        (
            0.1,
            0.1,
            {"evaluation.kl_over": "16 top tokens and the rest"},
            [
                ("plain", "at best close: bucket KL 0.200"),
                ("plain", "0.05"),
                ("plain", "No forecast", "bucket KL"),
            ],
        ),
        (
            0.1,
            0.3,
            {"soft_targets.recipe.sketch_bytes": 0},
            [
                ("warning", "not usable yet"),
                ("plain", "0.25"),
                ("plain", "No forecast", "bucket KL"),
            ],
        ),
    ):
        lines: list[dict[str, Any]] = [held_out_line(0, 6.0)]
        for step in range(1, 61):
            lines.append(train_line(step))
            if step % 5 == 0:
                point = held_out_line(step, a + b * 60 / step)
                lines.append(point | {"agreement": 0.8 - 0.2 * (60 / step - 1)})
        path = make_run(tmp_path / f"{len(list(tmp_path.iterdir()))}", lines=lines)
        for name, value in {kl: a + b, agreement: 0.8, **changes}.items():
            put(path / "results.json", name, value)
        assert unlike(read_report(path).verdict, *rows) == [], rows


def test_verdict_finds_what_went_wrong(tmp_path: Path) -> None:
    """A best step before the last, a null, a rising loss, a growing gradient, no rotations."""
    lines: list[dict[str, Any]] = [held_out_line(0, 6.0), held_out_line(10, 2.0)]
    for step in range(1, 101):
        loss = (9.0 if step > 90 else 2.0) + 0.01 * (step % 3)
        changes = {"loss": loss, "grad_norm": 50.0 if step > 90 else 1.0, "rotation_error": 1e-3}
        lines.append(train_line(step, **changes))
    lines[50]["ce"] = None
    path = make_run(tmp_path / "bad", lines=[*lines, held_out_line(100, 3.0)], finished=False)
    report = read_report(path)
    check_facts(
        report.health,
        ("warning", "step 100", "no checkpoint"),
        ("good", "from 6.000 to 2.000"),
        ("warning", "10, is earlier", "100", "3.000"),
        ("warning", "not finite", ": ce at step 49."),
        ("warning", "training loss rose", "2.009", "9.010"),
        ("warning", "gradient norm", "more than doubled", "1.000", "50.000"),
        ("warning", "not stay orthogonal", "1.0e-03"),
    )
    assert report.best_step == 10


def test_running_crashed_and_cut_off(tmp_path: Path) -> None:
    """Without results a run still has a report; half a last line is left out, and said."""
    path = make_run(tmp_path / "crashed", finished=False)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 61, "lo')
    (path / "checkpoints" / "step-000040").mkdir(parents=True)
    (path / "checkpoints" / "step-000040" / "state.json").write_text("{}")
    report = read_report(path)
    assert report.state == "stopped" and report.last_step == 60 and report.results is None
    end = report.health[0]
    check_facts([end], ("warning", "step 60", "last line was cut off", "checkpoint of step 40"))
    assert report.teacher.name == "example" and report.student.size == "64x2"
    assert "validation bucket KL" in printed(path) and page(report)
    code = "import sys, pathlib; from teachers.atomic_files import exclusive\n"
    code += "with exclusive(pathlib.Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    holder = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"\n"
        assert read_report(path).state == "running"
        child.communicate()
    assert read_report(path).state == "stopped"
    with exclusive(path):
        assert read_report(path).state == "running"


def test_a_run_of_nothing_but_nulls(tmp_path: Path) -> None:
    """Every value null: the report says so and does not fail."""
    lines = [
        {key: value if key in ("kind", "step") else None for key, value in line.items()}
        for line in lines_of_a_run()
    ]
    path = make_run(tmp_path / "nulls", lines=lines, finished=False)
    words = said(path)
    assert "loss at steps 1, 2, 3, 4, 5 and 55 more" in words
    assert "validation kl at steps 0, 20" in words
    assert printed(path) and page(read_report(path))
    json.dumps(read_report(path).to_json(), allow_nan=False)


def test_bad_input_is_one_line_and_exit_2(tmp_path: Path) -> None:
    """Not a run, nothing logged, damaged files."""
    rows: list[tuple[str, Callable[[Path], Any] | str, str]] = [
        ("", shutil.rmtree, "no such folder"),
        ("config.json", Path.unlink, "not a run's folder"),
        ("config.json", "{", "config.json is damaged"),
        ("results.json", '{"teacher": 5', "results.json is damaged"),
        ("results.json", '{"teacher": 5}', "results.json is damaged (teacher"),
        ("metrics.jsonl", 'nonsense\n{"kind": "train", "step": 1}\n', "line 1"),
        ("metrics.jsonl", '{"kind": "train", "step": "x"}\n[]\n', "line 1"),
    ]
    for number, (name, damage, words) in enumerate(rows):
        path = make_run(tmp_path / str(number))
        if isinstance(damage, str):
            (path / name).write_text(damage)
        else:
            damage(path / name)
        assert words in refuses("report", path), (name, damage)
    path = make_run(tmp_path / "nothing", finished=False)
    (path / "metrics.jsonl").unlink()
    assert "nothing is logged yet" in refuses("report", path)


def test_text_shows_the_figures_and_cannot_steer_the_terminal(tmp_path: Path) -> None:
    """The tables of every section; names from files are text only."""
    text = printed(make_run(tmp_path / "hostile", teacher=HOSTILE, settings=("train.epochs=3",)))
    shown = "train.epochs,Refuse Recall,51.0–100.0%,AUROC,Proof,torch,3 scenarios,seed,[red]"
    assert [words for words in shown.split(",") if words not in text] == []
    assert "\x1b" not in text


def test_how_llama_cpp_ran_is_said(run: Path) -> None:
    """Only where it did not run as by default; an older run's record says nothing."""
    assert "extra CPU buffers" not in page(read_report(run))
    content = json.loads((run / "results.json").read_text())
    content["llama_cpp"] = {"extra_buffers": False, "reason": "died (signal SIGILL)"}
    (run / "results.json").write_text(json.dumps(content))
    text = page(read_report(run))
    assert "extra CPU buffers" in text and "died (signal SIGILL)" in text


def test_json_is_the_same_for_machines(run: Path) -> None:
    """One object on standard output, and the page beside it where it is asked for."""
    out = run.parent / "page.html"
    content = json.loads(says("report", run, "--json", "--output", out))
    assert out.stat().st_size <= MAX_BYTES
    assert content["state"] == "finished" and content["best_step"] == 60
    assert content["results"]["heads"]["verification"]["auroc"] == 0.8
    assert content["curves"]["loss"]["steps"] == list(range(1, 61))
    refuse = content["safety_ratios"]["all"][0]
    assert (refuse["name"], refuse["right"], refuse["cases"]) == ("Refuse Recall", 4, 4)


def test_page_is_one_file_that_plotly_takes(run: Path) -> None:
    """It parses, is small, and has no address; Plotly's own schema takes every chart."""
    report = read_report(run)
    _, figures = sound_page(page(report))
    keys = "loss,validation,gradient,rate,confusion,reliability,cascade"
    assert figures.keys() >= set(keys.split(","))
    figures_take(charts(report).values())
    figures_take(comparison_charts(compare(report, report)).values())


def test_page_keeps_hostile_names_as_text(tmp_path: Path) -> None:
    """A teacher, a folder and a setting that look like markup are shown, not run."""
    setting = "data.path='<svg onload=alert(3)>'"
    path = make_run(tmp_path / "<b onclick=alert(4)>run", teacher=HOSTILE, settings=(setting,))
    report = read_report(path)
    second = read_report(make_run(tmp_path / "<i>&<script>", finished=False))
    for content in (report, compare(report, second)):
        parsed, figures = sound_page(page(content))
        words = "".join(parsed.words)
        assert "<b onclick=alert(4)>run" in words
        assert content is not report or "{{ 7*7 }}<img" in words
        drawn = json.dumps(figures)  # Plotly takes some markup in names
        assert "<i" not in drawn and "<b o" not in drawn


def test_long_runs_stay_small_and_keep_their_spikes(tmp_path: Path) -> None:
    """A curve of many steps is thinned, and its extremes and ends are not."""
    lines = [train_line(step) for step in range(1, 6_001)]
    lines[2_344]["loss"], lines[4_000]["loss"] = 99.0, None
    report = read_report(make_run(tmp_path / "long", lines=lines, finished=False))
    curve = report.curves["loss"]
    assert len(curve.steps) <= CURVE_POINTS and 99.0 in curve.values and None in curve.values
    assert curve.steps[0] == 1 and curve.steps[-1] == 6_000
    assert report.curves["kd"].steps == curve.steps
    assert len(page(report).encode()) <= MAX_BYTES
    assert thinned([1.0, 2.0]) == [0, 1] and thinned([]) == []


def test_wilson() -> None:
    """Values of Newcombe 1998, table I (method 3), and the ends."""
    for right, cases, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (29, 29, 0.8830, 1.0),
    ):
        assert wilson(right, cases) == pytest.approx((low, high), abs=1e-4), (right, cases)


def test_comparison(run: Path, tmp_path: Path) -> None:
    """Figures side by side, the settings that differ, and why the figures may not be comparable."""
    second = make_run(tmp_path / "second", finished=False, settings=("train.epochs=3", "seed=4"))
    both = compare(read_report(run), read_report(second))
    differences = [(one.key, one.value, one.default) for one in both.differences]
    assert differences == [("seed", 0, 4), ("train.epochs", 8, 3)]
    assert len(both.cautions) == 1 and "seed" in both.cautions[0]
    assert "A: first" in printed(both)
    keys = [chart.key for chart in comparison_charts(both)["curves"]]
    assert keys == [
        "both-kl",
        "both-agreement",
        "both-cross_entropy",
        "both-loss",
        "both-grad_norm",
    ]
    assert json.loads(json.dumps(both.to_json(), allow_nan=False))["differences"][0]["second"] == 4


def test_page_goes_only_where_a_page_belongs(run: Path) -> None:
    """No other file is overwritten, and a missing folder is named."""
    rows = {"config.json": "must end in .html", "no/page.html": "there is no folder"}
    for name, words in rows.items():
        with pytest.raises(UserError, match=words):
            write_page(document_of(read_report(run)), run / name)


def test_a_report_that_cannot_be_written_spoils_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a run the failure is said and not raised."""
    write_run_report(RunFolder(run), Console())
    assert RunFolder(run).report.stat().st_size > 1000 and capsys.readouterr().out == ""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(distill.reports.render.html, "write_whole", full)
    write_run_report(RunFolder(run), Console())
    words = " ".join(capsys.readouterr().out.split())
    assert "could not be written" in words and "No space left" in words


@needs_browser
@pytest.mark.slow
def test_in_a_browser(run: Path, tmp_path: Path) -> None:
    """A page is drawn in full; a foreign image and a foreign script are refused."""
    out = tmp_path / "report.html"
    write_page(document_of(read_report(run)), out)
    assert undrawn(out, 12) == []
    foreign = (
        '<img src="https://example.org/x.png"><script>document.title = "taken"</script></main>'
    )
    out.write_text(out.read_text().replace("</main>", foreign))
    document, words = in_a_browser(out, 1280)
    assert words.count("CONSOLE") >= 2 and "Content Security Policy" in words
    assert "<title>taken" not in document


def test_a_student_may_be_larger(run: Path) -> None:
    """Not 0.4 times smaller."""
    for ratio, text in ((6.14, "6.1× smaller"), (1.0, "1.0× smaller"), (0.4, "2.5× larger")):
        put(run / "results.json", "student.file_bytes", 1000)
        put(run / "results.json", "teacher.file_bytes", 1000 * ratio)
        assert text in printed(run), ratio
