"""The page of a comparison: what it says, that it is one safe file, and that a browser draws it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import escape
from pathlib import Path

import plotly.graph_objects as go
import pytest
import torch

from distill.errors import UserError
from distill.evaluation.charts import LETTER, LINE, charts, label_sides, labels
from distill.evaluation.front import front, quantisations, size_front, speed_front
from distill.evaluation.page import told, write_page
from distill.evaluation.page_tables import harness_figure, sections
from distill.evaluation.page_verdict import verdict
from distill.evaluation.records import Comparison, Fidelity, Figure, ModelEvaluation, TaskScore
from distill.reports.report import wilson
from distill.safety_metrics import SafetyScore, score_decisions
from tests.report_run import HOSTILE, Page, in_a_browser

MAX_BYTES = 6_000_000

# file type, bytes, KL, writing speed: about what one student of 46 M parameters gave
FILES = [
    ("F32", 184_000_000, 0.2100, 95.0),
    ("BF16", 92_300_000, 0.2103, 150.0),
    ("F16", 92_200_000, 0.2101, 160.0),
    ("Q8_0", 49_000_000, 0.2112, 260.0),
    ("Q6_K", 38_000_000, 0.2150, 300.0),
    ("Q5_K_M", 33_600_000, 0.2240, 330.0),
    ("Q4_K_M", 28_900_000, 0.2650, 380.0),
    ("IQ4_NL", 27_100_000, 0.2900, 340.0),
    ("Q4_0", 26_800_000, 0.3400, 410.0),
]


def near(value: float, width: float) -> Figure:
    """A figure with an interval, a little wider above."""
    return Figure(value, value - width, value + 1.2 * width)


def safety(refused: int = 19) -> SafetyScore:
    """Twenty prompts of each decision, ``refused`` of the last refused."""
    labels = torch.arange(3).repeat_interleave(20)
    said = labels.clone()
    said[:3], said[20:22], said[40 + refused :] = 1, 0, 1
    return score_decisions(torch.nn.functional.one_hot(said, 3).float() * 0.9 + 0.03, labels, (0.5, 0.5))


def fidelity(kl: float, width: float = 0.01) -> Fidelity:
    """A student that is ``kl`` away."""
    accepted = 1 / (1 + kl)
    return Fidelity(
        kl=near(kl, width),
        reverse_kl=near(1.1 * kl, width),
        top1=near(accepted - 0.05, 0.01),
        top5=near(accepted - 0.02, 0.005),
        acceptance=near(accepted, 0.006),
        tokens_per_pass=sum(accepted**power for power in range(5)),
        draft_length=4,
        greedy_prefix=near(20 / (1 + 5 * kl), 2.0),
        prefix_length=64,
    )


def task(right: int) -> TaskScore:
    return TaskScore("arithmetic.jsonl", right, 50, Figure(right / 50, *wilson(right, 50)))


def model(
    name: str, file_bytes: int, perplexity: float, speed: float, file_type: str = ""
) -> ModelEvaluation:
    return ModelEvaluation(
        name=name,
        path=f"runs/desk/{name}.gguf",
        sha256="ab" * 32,
        architecture="llama",
        file_type=file_type,
        parameters=46_100_000,
        file_bytes=file_bytes,
        perplexity=near(perplexity, 0.4),
        calibration_error=0.021,
        prompt_speed=6 * speed,
        generation_speed=speed,
        peak_memory=3 * file_bytes,
    )


def comparison(students: list[ModelEvaluation], **changes: object) -> Comparison:
    """These students beside a teacher of 242 MB."""
    teacher = replace(model("desk teacher", 242_000_000, 11.2, 61.0, "Q8_0"), architecture="phi3")
    whole = Comparison(
        teacher=replace(teacher, parameters=227_000_000),
        students=students,
        text="held-out text of the run desk",
        text_sha256="cd" * 32,
        sequences=102,
        positions=24_817,
        skipped=0,
        seed=0,
        environment={
            "python": "3.11.7",
            "cpu": "AVX2",
            "threads": 2,
            "packages": {"llama-cpp-python": "0.3.36"},
        },
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def one_student() -> Comparison:
    """One student, without any optional part."""
    student = model("student", 38_000_000, 14.9, 300.0, "Q6_K")
    return comparison([replace(student, fidelity=replace(fidelity(0.215), greedy_prefix=None))])


def nine_files() -> Comparison:
    """One student in nine file types, with every optional part."""
    students = []
    for place, (kind, size, kl, speed) in enumerate(FILES):
        student = model(f"desk-512x4-{kind.lower()}.gguf", size, 13.5 + 8 * (kl - 0.2), speed, kind)
        harness = {
            "arc_easy": {"acc": 0.52 - kl / 4, "acc_stderr": 0.02, "acc_norm": 0.5, "acc_norm_stderr": 0.02},
            "wikitext": {"word_perplexity": 31.0 + 10 * kl},
        }
        parts = {"task": task(38 - place), "safety": safety(19 - place // 3), "harness": harness}
        students.append(replace(student, fidelity=fidelity(kl), **parts))  # type: ignore[arg-type]
    whole = comparison(students)
    own = {"arc_easy": {"acc": 0.61, "acc_stderr": 0.02}, "wikitext": {"word_perplexity": 24.0}}
    return replace(whole, teacher=replace(whole.teacher, task=task(44), harness=own))


def some_students() -> Comparison:
    """Three different students; only one has a safety head, only two did the task, and one sequence is all."""
    kinds = ((12_000_000, 0.9, 800.0), (40_000_000, 0.3, 290.0), (300_000_000, 0.002, 55.0))
    students = []
    for place, (size, kl, speed) in enumerate(kinds):
        student = model(f"a-rather-long-name-of-a-student-{place}", size, 12.0 + 9 * kl, speed)
        found = fidelity(kl)
        bare = {
            name: Figure(getattr(found, name).value)
            for name in ("kl", "reverse_kl", "top1", "top5", "acceptance")
        }
        parts = {"task": task(10 + place) if place else None, "safety": safety() if place == 1 else None}
        shape = {"parameters": 10_000_000 * (place + 1)}
        students.append(replace(student, fidelity=replace(found, **bare), **parts, **shape))  # type: ignore[arg-type]
    return comparison(students, sequences=1, positions=511, skipped=2)


CASES = {"one": one_student, "nine": nine_files, "some": some_students}


def said(whole: Comparison) -> str:
    """The verdict, a line for each fact."""
    return "\n".join(f"{fact.level}: {fact.text}" for fact in verdict(whole))


def cells(whole: Comparison, key: str) -> str:
    """All cells and notes of a section's tables."""
    section = next(one for one in sections(whole) if one.key == key)
    return "\n".join(
        "\n".join([table.title, " | ".join(table.head), *(" | ".join(row) for row in table.rows), table.note])
        for table in section.tables
    )


def test_verdict_of_one_student() -> None:
    """Size, speed and nearness against the teacher; nothing is compared that is not there."""
    words = said(one_student())
    assert "plain: student is at a KL of 0.215 (0.205–0.227) nats per token" in words
    assert "good: student takes 38.0 MB, 15.7% of the teacher's file." in words
    assert "good: student writes 300 tokens per second, 4.92 times the teacher's." in words
    assert "the teacher's 11.200, the student's 14.900" in words
    assert not re.search(
        "Nearest|Smallest|Fastest|Quantisation|Another student|known answers|afety|little", words
    )


def test_verdict_of_nine_files() -> None:
    """Which is nearest, smallest and fastest, what quantisation costs, and which file nobody needs."""
    words = said(nine_files())
    assert "Nearest to the teacher: desk-512x4-f32.gguf, with a KL of 0.210 (0.200–0.222)" in words
    # 0.222 is above the low end of Q6_K (0.205) and Q5_K_M (0.214), not of Q4_K_M (0.255): five files but the nearest
    assert (
        "overlaps that of desk-512x4-f16.gguf, desk-512x4-bf16.gguf, desk-512x4-q8_0.gguf and 2 more" in words
    )
    assert "Smallest: desk-512x4-q4_0.gguf, 26.8 MB, 11.1% of" in words
    assert "Fastest: desk-512x4-q4_0.gguf, 410 tokens per second, 6.72 times" in words
    assert "Q5_K_M has 18.3% of the bytes, and its KL is 0.014 higher: it is the smallest whose" in words
    assert "Q4_0 has 14.6% of the bytes, and its KL is 0.130 higher." in words
    assert "at least as near as desk-512x4-bf16.gguf." in words and words.count("Another student") == 1
    assert "(arithmetic.jsonl): desk-512x4-f32.gguf has 38 of 50 right, the teacher 44" in words
    assert (
        "warning: Of the safety heads, that of desk-512x4-iq4_nl.gguf refuses least: it refuses 85.0% (17 of 20)"
        in words
    )


def test_verdict_says_what_is_to_be_doubted() -> None:
    """One sequence, sequences left out; no overlap is claimed without intervals, and no quantisation either."""
    words = said(some_students())
    assert "warning: All is measured on 1 sequence, which is little" in words
    assert "warning: Left out, longer than a model's context holds: 2 sequences." in words
    assert "overlap" not in words and "Quantisation" not in words
    words = said(replace(some_students(), warnings=["is it busy?", "the text is short"]))
    assert (
        "warning: Is it busy?" in words.splitlines() and "warning: The text is short." in words.splitlines()
    )
    big = model("big", 300_000_000, 11.0, 50.0)
    words = said(comparison([replace(big, fidelity=fidelity(0.1))]))
    assert "warning: big takes 300.0 MB, 124.0% of the teacher's file." in words
    assert "warning: big writes 50 tokens per second, 0.82 times the teacher's." in words


def test_quantisation_that_always_costs() -> None:
    """Where no interval meets the largest file's, that is said; where the smallest's does, too."""
    found = []
    for kls in ((0.10, 0.20, 0.30), (0.10, 0.101, 0.102)):
        kinds = zip(("F16", "Q8_0", "Q4_0"), (9_000_000, 5_000_000, 3_000_000), kls, strict=True)
        students = [
            replace(model(kind, size, 12.0, 100.0, kind), fidelity=fidelity(kl)) for kind, size, kl in kinds
        ]
        found.append(said(comparison(students)))
    assert (
        "Q4_0 has 33.3% of the bytes, and its KL is 0.200 higher. No interval of the others overlaps."
        in found[0]
    )
    assert "Q4_0 has 33.3% of the bytes, and its KL is 0.002 higher: its interval overlaps." in found[1]
    other = replace(model("other", 4_000_000, 12.0, 100.0, "Q4_0"), parameters=5, fidelity=fidelity(0.2))
    assert quantisations([other, replace(other, name="b", file_type="F16", parameters=6)]) == []
    assert quantisations([other, replace(other, name="b")]) == []  # of one type they are two models


def test_front_is_what_nobody_beats() -> None:
    """Against the definition, on random points with ties."""
    draw = torch.Generator().manual_seed(3)
    for _ in range(200):
        points = [(float(a), float(b)) for a, b in torch.randint(0, 6, (7, 2), generator=draw)]
        unbeaten = {
            place
            for place, (a, b) in enumerate(points)
            if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in points)
        }
        kept = front(points)
        assert set(kept) == unbeaten and len(kept) == len(unbeaten)
        assert [points[place][0] for place in kept] == sorted(points[place][0] for place in kept)
    students = nine_files().students
    assert [FILES[place][0] for place in speed_front(students)] == [
        "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16", "F32",
    ]  # fmt: skip
    assert "BF16" not in [FILES[place][0] for place in size_front(students)]


def test_tables_have_all_figures() -> None:
    """Figures with their intervals, in the unit they say."""
    whole = nine_files()
    assert (
        "desk teacher (teacher) | Q8_0 | 227.0 M | 242.0 MB (100.0%) | 366 | 61 | 726.0 MB | 0 | –"
        in cells(whole, "trade")
    )
    assert (
        "desk-512x4-bf16.gguf | BF16 | 46.1 M | 92.3 MB (38.1%) | 900 | 150 | 276.9 MB | 0.210 | neither"
        in cells(whole, "trade")
    )
    near_words = cells(whole, "fidelity")
    assert (
        "desk-512x4-q4_0.gguf | 0.340 (0.330–0.352) | 0.374 (0.364–0.386) | 69.6% (68.6–70.8%)" in near_words
    )
    assert "desk-512x4-q4_0.gguf | 74.6% | 74.0–75.3% | 3.03 | 7.4 (5.4–9.8)" in near_words
    assert "desk-512x4-q4_0.gguf | 14.620 | 14.220–15.100 | 1.305 | 0.021" in cells(whole, "text")
    low, high = wilson(30, 50)
    assert f"desk-512x4-q4_0.gguf | 30 of 50 | 60.0% ({100 * low:.1f}–{high:.1%})" in cells(whole, "tasks")
    assert "Refuse Recall | 19 of 20 | 95.0% (76.4–99.1%)" in cells(whole, "safety")
    assert "ESCALATE: 2 ALLOW, 18 ESCALATE, 0 REFUSE" in cells(whole, "safety")
    # 0.61 ± 1.96 · 0.02, and no interval where the harness gives no error
    assert "arc_easy: acc | 0.610 (0.571–0.649)" in cells(whole, "harness")
    assert "wikitext: word_perplexity | 24.000 | 33.100" in cells(whole, "harness")
    assert "cd" * 32 in cells(whole, "source") and "llama-cpp-python | 0.3.36" in cells(whole, "environment")


def test_filters_of_the_harness_keep_their_own_errors() -> None:
    """``metric,filter`` belongs to ``metric_stderr,filter``."""
    metrics = {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "exact_match,loose": 0.6}
    scored = replace(one_student().teacher, harness={"gsm8k": metrics})
    strict, loose = (harness_figure(scored, "gsm8k", f"exact_match,{name}") for name in ("strict", "loose"))
    assert strict is not None and strict.low == pytest.approx(0.304, abs=1e-3)
    assert loose == Figure(0.6) and harness_figure(scored, "mmlu", "acc") is None


def test_what_is_missing_is_left_out() -> None:
    """No optional part: no section and no chart of it, a dash where there is no figure, and no interval is invented."""
    keys = [section.key for section in sections(one_student())]
    assert keys == ["trade", "fidelity", "text", "source", "environment"]
    assert charts(one_student()).keys() == {"trade", "fidelity", "text"}
    assert cells(one_student(), "fidelity").count("–\n") == 1  # written alike
    some = charts(some_students())
    assert [trace["y"] for trace in some["tasks"][0].figure["data"]] == [
        ["a-rather…student-1", "a-rather…student-2"]
    ]
    assert "choices" not in some["safety"][0].figure
    bars = some["fidelity"][0]
    assert (
        all(trace["error_x"] == {"visible": False} for trace in bars.figure["data"])
        and "95" not in bars.words
    )


def test_charts_show_the_figures() -> None:
    """Bars with their intervals the right way round, the front apart from the rest, the teacher as a line."""
    found = charts(nine_files())
    top1 = found["fidelity"][0].figure["data"][0]
    first = nine_files().students[0].fidelity
    assert first is not None and top1["x"][0] == pytest.approx(first.top1.value, rel=1e-4)
    assert top1["error_x"]["arrayminus"][0] == pytest.approx(0.010) and top1["error_x"]["array"][
        0
    ] == pytest.approx(0.012)
    size, speed = found["trade"]
    traces = {trace["name"]: trace for trace in size.figure["data"]}
    assert traces["not on it"]["x"] == [92.3] and len(traces["on the front"]["x"]) == 8
    assert (
        traces["front"]["x"] == sorted(traces["front"]["x"])
        and traces["front"]["y"] == sorted(traces["front"]["y"])[::-1]
    )
    assert (
        size.figure["layout"]["shapes"][0]["x0"] == 242.0
        and speed.figure["layout"]["shapes"][0]["x0"] == 61.0
    )
    assert size.figure["layout"]["xaxis"]["type"] == "log"
    perplexity = found["text"][0].figure
    assert (
        perplexity["layout"]["shapes"][0]["name"] == "teacher: 11.2"
        and perplexity["data"][0]["x"][0] == 13.58
    )
    confusion = found["safety"][0].figure
    assert len(confusion["choices"]) == 9 and confusion["data"][0]["text"][1] == ["2", "18", "0"]
    assert [trace["name"] for trace in found["harness"][0].figure["data"]][:2] == ["teacher", "F32"]


def test_no_error_bar_leaves_its_chart() -> None:
    """The axis of KL reaches from the lowest end of an interval to the highest, also where that is below 0."""
    for make in (one_student, nine_files):
        whole = make()
        axis = charts(whole)["trade"][0].figure["layout"]["yaxis"]
        kls = [student.fidelity.kl for student in whole.students if student.fidelity is not None]
        assert axis["type"] == "linear" and axis["range"][0] < min(kl.low for kl in kls if kl.low is not None)
        assert axis["range"][1] > max(kl.high for kl in kls if kl.high is not None)
    same = replace(one_student().students[0], fidelity=fidelity(0.0))
    assert charts(comparison([same]))["trade"][0].figure["layout"]["yaxis"]["type"] == "linear"


def test_labels_are_short_and_different() -> None:
    """File types where these differ; else names, whose ends are kept."""
    assert labels(nine_files().students)[:2] == ["F32", "BF16"]
    alike = [model(f"runs-of-last-week-{place}-student-of-the-desk", 1, 1.0, 1.0) for place in range(3)]
    found = labels(alike)
    assert len(set(found)) == 3 and all(len(name) <= 24 for name in found)
    twice = [model(name, 1, 1.0, 1.0) for name in ("student.gguf", "student-q5_k_m.gguf")]
    assert labels(twice) == ["student", "student-q5_k_m"]


def test_labels_do_not_cover_each_other() -> None:
    """Boxes of the labels that are shown, worked out again, do not meet; a crowd leaves some out, a lone point none."""
    names = [f"Q{place}_K_M" for place in range(9)]
    apart = [(0.1 * place + 0.1, 1 - 0.1 * place) for place in range(9)]
    assert all(label_sides(apart, names))
    crowd = [(0.5 + 0.02 * place, 0.5 + 0.02 * (place % 3)) for place in range(9)]
    sides = label_sides(crowd, names)
    assert "" in sides and any(sides)
    boxes = []
    for (x, y), side, name in zip(crowd, sides, names, strict=True):
        if side:
            vertical, horizontal = side.split()
            left = x if horizontal == "right" else x - LETTER * len(name)
            boxes.append((left, y if vertical == "top" else y - LINE, left + LETTER * len(name)))
    for place, (left, low, right) in enumerate(boxes):
        for other_left, other_low, other_right in boxes[:place]:
            assert right <= other_left or other_right <= left or abs(low - other_low) >= LINE * 0.99


@pytest.mark.parametrize("name", CASES)
def test_figures_are_plotlys(name: str) -> None:
    """Plotly's own schema takes every chart, once colours have the page's names put in."""
    for some in charts(CASES[name]()).values():
        for chart in some:
            text = json.dumps({key: chart.figure[key] for key in ("data", "layout")}, allow_nan=False)
            figure = json.loads(re.sub(r'"@[a-z]+"', '"#000000"', text.replace('"@heat"', '"Blues"')))
            assert len(go.Figure(figure).data) == len(chart.figure["data"])


@pytest.mark.parametrize("name", CASES)
def test_page_is_one_file_that_asks_for_nothing(name: str, tmp_path: Path) -> None:
    """No address, no script but its own, every chart has its place, and everything is JSON."""
    whole = CASES[name]()
    write_page(whole, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert len(text.encode()) <= MAX_BYTES and len(parsed.scripts) == 3
    figures, plotly, _ = parsed.scripts
    ours = text.replace(plotly, "")
    assert "http" not in ours.replace("http-equiv", "")
    drawn = {attributes["data-chart"] for _, attributes in parsed.tags if "data-chart" in attributes}
    assert drawn == json.loads(figures).keys()
    policy = (
        next(a["content"] for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    )
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2
    assert json.loads(json.dumps(whole.to_json(), allow_nan=False))["kind"] == "evaluation"


def test_page_keeps_hostile_names_as_text(tmp_path: Path) -> None:
    """Names of models, files, texts, tasks and metrics that look like markup are shown, not run."""
    whole = nine_files()
    bad = "</script><b onclick=alert(1)>@blue"
    students = [
        replace(student, name=f"{place} {HOSTILE}", file_type=bad)
        for place, student in enumerate(whole.students)
    ]
    students[0] = replace(students[0], harness={bad: {bad: 0.5}}, path=bad, architecture=bad)
    assert students[1].task is not None
    students[1] = replace(students[1], task=replace(students[1].task, name=bad))
    hostile = replace(whole, students=students, text=bad, environment={bad: {bad: bad}})
    hostile = replace(hostile, teacher=replace(hostile.teacher, name=HOSTILE))
    write_page(hostile, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert len(parsed.scripts) == 3 and not {"img", "svg", "b", "i"} & {tag for tag, _ in parsed.tags}
    assert bad in "".join(parsed.words) and HOSTILE in "".join(parsed.words)
    figures = json.loads(parsed.scripts[0])
    for figure in figures.values():  # Plotly takes some markup in names; the buttons' words are set as text
        shown = (
            json.dumps([figure["data"], figure["layout"]]).replace("<br>", "").replace("<extra></extra>", "")
        )
        assert "<" not in shown.replace("<extra>%{fullData.name}</extra>", "")
    assert escape(students[0].name[:8], quote=False) in json.dumps(figures["agreement"])


def test_page_goes_only_where_a_page_belongs(tmp_path: Path) -> None:
    """No other file is overwritten, and a missing folder is named."""
    for path, words in (
        (tmp_path / "a.json", "must end in .html"),
        (tmp_path / "no" / "a.html", "there is no folder"),
    ):
        with pytest.raises(UserError, match=words):
            write_page(one_student(), path)


def test_title_names_who_is_compared() -> None:
    """One student by its name, several by their number."""
    assert told(one_student()).title == "student and desk teacher"
    assert told(nine_files()).title == "9 students of desk teacher"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), [("nine", 1280), ("some", 390)])
def test_in_a_browser(name: str, width: int, tmp_path: Path) -> None:
    """All charts are drawn, and the console stays empty."""
    out = tmp_path / "page.html"
    whole = CASES[name]()
    write_page(whole, out)
    document, words = in_a_browser(out, width)
    count = sum(len(some) for some in charts(whole).values())
    assert re.search(rf'<html[^>]* data-drawn="{count}"', document), words[-2000:]
    assert document.count('class="main-svg"') >= count and "CONSOLE" not in words, words
