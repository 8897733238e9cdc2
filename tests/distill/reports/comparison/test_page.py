"""The page of a comparison: what it says, that it is one safe file, and that a browser draws it.

Over 400 lines because every part of the page is checked on the same comparison.
"""

from __future__ import annotations

import json
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
import torch

from distill.evaluation.pareto import front, quantizations, size_front, speed_front
from distill.evaluation.records import Comparison, Fidelity, ModelEvaluation, TaskScore
from distill.metrics.intervals import Figure, wilson
from distill.metrics.safety import SafetyScore, score_decisions
from distill.reports.comparison.charts import LETTER, LINE, charts, label_sides, labels
from distill.reports.comparison.facts import trade_facts, verdict_of
from distill.reports.comparison.report import document_of
from distill.reports.comparison.sections import harness_figure, sections
from distill.reports.render.html import write_page
from tests.support.report_runs import (
    HOSTILE,
    about,
    check_facts,
    figures_take,
    needs_browser,
    sound_page,
    undrawn,
    unlike,
)

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
    sure = 0.03 + 0.9 * torch.nn.functional.one_hot(said, 3).float()
    return score_decisions(sure, labels, said)


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
        environment={"python": "3.11.7", "packages": {"llama-cpp-python": "0.3.36"}},
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
        easy = {"acc": 0.52 - kl / 4, "acc_stderr": 0.02, "acc_norm": 0.5, "acc_norm_stderr": 0.02}
        harness = {"arc_easy": easy, "wikitext": {"word_perplexity": 31.0 + 10 * kl}}
        student = replace(student, task=task(38 - place), safety=safety(19 - place // 3))
        students.append(replace(student, fidelity=fidelity(kl), harness=harness))
    whole = comparison(students)
    own = {"arc_easy": {"acc": 0.61, "acc_stderr": 0.02}, "wikitext": {"word_perplexity": 24.0}}
    return replace(whole, teacher=replace(whole.teacher, task=task(44), harness=own))


def some_students() -> Comparison:
    """Three students on one sequence; only one has a safety head, only two did the task."""
    kinds = ((12_000_000, 0.9, 800.0), (40_000_000, 0.3, 290.0), (300_000_000, 0.002, 55.0))
    students = []
    for place, (size, kl, speed) in enumerate(kinds):
        student = model(f"a-rather-long-name-of-a-student-{place}", size, 12.0 + 9 * kl, speed)
        found = fidelity(kl)
        names = ("kl", "reverse_kl", "top1", "top5", "acceptance")
        bare = {name: Figure(getattr(found, name).value) for name in names}
        done, head = task(10 + place) if place else None, safety() if place == 1 else None
        student = replace(student, fidelity=replace(found, **bare), task=done, safety=head)
        students.append(replace(student, parameters=10_000_000 * (place + 1)))
    return comparison(students, sequences=1, positions=511, skipped=2)


CASES = {"one": one_student, "nine": nine_files, "some": some_students}


def cells(whole: Comparison, key: str) -> str:
    """All cells and notes of a section's tables, a line for each row."""
    lines = []
    for table in next(one for one in sections(whole) if one.key == key).tables:
        rows = [" | ".join(row) for row in (table.head, *table.rows)]
        lines += [table.title, *rows, table.note]
    return "\n".join(lines)


def test_verdict_of_one_student() -> None:
    """Size, speed and nearness against the teacher; nothing is compared that is not there."""
    verdict = [
        ("plain", "student is close: KL 0.215 (0.205–0.227)"),
        ("plain", "0.25", "0.05"),
    ]
    assert unlike(verdict_of(one_student().students).facts, *verdict) == []
    rows = [
        ("good", "student takes 38.0 MB, 15.7% of"),
        ("good", "student writes 300 tokens per second, 4.92 times"),
        ("plain", "Perplexity", "teacher's 11.200", "student's 14.900"),
        ("plain", "draft", "82.3% (81.7–83.0%)", "3.52 tokens per pass"),
    ]
    assert unlike(trade_facts(one_student()), *rows) == []


def test_verdict_of_nine_files() -> None:
    """What is nearest, smallest, fastest, what quantisation costs, which file nobody needs."""
    # 0.222 is above the low end of Q6_K (0.205) and Q5_K_M (0.214), not of Q4_K_M (0.255): five
    # files but the nearest.
    rivals = ", ".join(f"desk-512x4-{kind}.gguf" for kind in ("f16", "bf16", "q8_0"))
    smallest, nearest = "desk-512x4-q4_0.gguf", "desk-512x4-f32.gguf"
    free = "Q5_K_M has 18.3% of the bytes, and its KL is 0.014 higher: it is the smallest"
    verdict = [
        ("plain", f"{nearest} is close: KL 0.210 (0.200–0.222)"),
        ("plain", f"{rivals} and 2 more", "Not usable yet: desk-512x4-q4_k_m.gguf"),
        ("plain", "0.25"),
    ]
    assert unlike(verdict_of(nine_files().students).facts, *verdict) == []
    rows = [
        ("good", f"Smallest: {smallest}, 26.8 MB, 11.1% of"),
        ("good", f"Fastest: {smallest}, 410 tokens per second, 6.72 times"),
        ("plain", free, "Q4_0 has 14.6% of the bytes, and its KL is 0.130 higher."),
        ("plain", "Another student", "as near as desk-512x4-bf16.gguf."),
        ("plain", "Perplexity"),
        ("plain", "draft"),
        ("plain", f"(arithmetic.jsonl): {nearest} has 38 of 50 right, the teacher 44"),
        ("warning", "desk-512x4-iq4_nl.gguf refuses least: it refuses 85.0% (17 of 20)"),
    ]
    assert unlike(trade_facts(nine_files()), *rows) == []


def test_verdict_says_what_is_to_be_doubted() -> None:
    """One sequence, some left out; without intervals no overlap and no quantisation is claimed."""
    some = some_students()
    facts = [*verdict_of(some.students).facts, *trade_facts(some)]
    levels = [
        "good",
        "plain",
        "plain",
        "good",
        "good",
        "plain",
        "plain",
        "plain",
        "good",
        "warning",
        "warning",
    ]
    assert [fact.level for fact in facts] == levels
    check_facts(facts[-2:], ("warning", "on 1 sequence,"), ("warning", "Left out", "2 sequences."))
    assert not about(facts, "overlap") and not about(facts, "Quantisation")
    warned = trade_facts(replace(some, warnings=["is it busy?", "the text is short"]))
    rows = [("warning", "Is it busy?"), ("warning", "The text is short.")]
    check_facts([fact for fact in warned if fact not in facts], *rows)
    big = replace(model("big", 300_000_000, 11.0, 50.0), fidelity=fidelity(0.1))
    slow = trade_facts(comparison([big]))[:2]
    size, speed = "300.0 MB, 124.0% of", "50 tokens per second, 0.82 times"
    check_facts(slow, ("warning", size), ("warning", speed))


def test_quantisation_that_always_costs() -> None:
    """Where no interval meets the largest file's, that is said; where the smallest's does, too."""
    for kls, words in (
        ((0.10, 0.20, 0.30), "0.200 higher. No interval of the others overlaps."),
        ((0.10, 0.101, 0.102), "0.002 higher: its interval overlaps."),
    ):
        kinds = zip(("F16", "Q8_0", "Q4_0"), (9_000_000, 5_000_000, 3_000_000), kls, strict=True)
        students = [
            replace(model(kind, size, 12.0, 100.0, kind), fidelity=fidelity(kl))
            for kind, size, kl in kinds
        ]
        facts = about(trade_facts(comparison(students)), "Quantisation")
        check_facts(facts, ("plain", f"Q4_0 has 33.3% of the bytes, and its KL is {words}"))
    other = model("other", 4_000_000, 12.0, 100.0, "Q4_0")
    assert quantizations([other, replace(other, file_type="F16", parameters=6)]) == []
    assert quantizations([other, replace(other, name="b")]) == []  # of one type they are two models


def test_front_is_what_nobody_beats() -> None:
    """Against the definition, on random points with ties."""
    draw = torch.Generator().manual_seed(3)
    for _ in range(200):
        points = [(float(a), float(b)) for a, b in torch.randint(0, 6, (7, 2), generator=draw)]
        unbeaten = [
            place
            for place, (a, b) in enumerate(points)
            if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in points)
        ]
        kept = front(points)
        assert sorted(kept) == unbeaten, points
        firsts = [points[place][0] for place in kept]
        assert firsts == sorted(firsts), points
    students = nine_files().students
    fastest = " ".join(FILES[place][0] for place in speed_front(students))
    assert fastest == "Q4_0 Q4_K_M Q5_K_M Q6_K Q8_0 F16 F32"
    assert "BF16" not in [FILES[place][0] for place in size_front(students)]


def test_tables_have_all_figures() -> None:
    """Figures with their intervals, in the unit they say."""
    whole = nine_files()
    low, high = wilson(30, 50)
    bf16, q4 = (f"desk-512x4-{kind}.gguf" for kind in ("bf16", "q4_0"))
    teacher = (
        "desk teacher (teacher) | Q8_0 | 227.0 M | 242.0 MB (100.0%) | 366 | 61 | 726.0 MB | 0 | –"
    )
    for key, words in (
        ("trade", teacher),
        (
            "trade",
            f"{bf16} | BF16 | 46.1 M | 92.3 MB (38.1%) | 900 | 150 | 276.9 MB | 0.210 | close | "
            "neither",
        ),
        ("fidelity", f"{q4} | 0.340 (0.330–0.352) | 0.374 (0.364–0.386) | 69.6% (68.6–70.8%)"),
        ("fidelity", f"{q4} | 74.6% | 74.0–75.3% | 3.03 | 7.4 (5.4–9.8)"),
        ("text", f"{q4} | 14.620 | 14.220–15.100 | 1.305 | 0.021"),
        ("tasks", f"{q4} | 30 of 50 | 60.0% ({100 * low:.1f}–{high:.1%})"),
        ("safety", "Refuse Recall | 19 of 20 | 95.0% (76.4–99.1%)"),
        ("safety", "ESCALATE: 2 ALLOW, 18 ESCALATE, 0 REFUSE"),
        # 0.61 ± 1.96 · 0.02, and no interval where the harness gives no error
        ("harness", "arc_easy: acc | 0.610 (0.571–0.649)"),
        ("harness", "wikitext: word_perplexity | 24.000 | 33.100"),
        ("source", "cd" * 32),
        ("environment", "llama-cpp-python | 0.3.36"),
    ):
        assert words in cells(whole, key), words


def test_filters_of_the_harness_keep_their_own_errors() -> None:
    """``metric,filter`` belongs to ``metric_stderr,filter``."""
    metrics = {
        "exact_match,strict": 0.5,
        "exact_match_stderr,strict": 0.1,
        "exact_match,loose": 0.6,
    }
    scored = replace(one_student().teacher, harness={"gsm8k": metrics})
    strict, loose = (
        harness_figure(scored, "gsm8k", f"exact_match,{name}") for name in ("strict", "loose")
    )
    assert strict is not None and strict.low == pytest.approx(0.304, abs=1e-3)
    assert loose == Figure(0.6) and harness_figure(scored, "mmlu", "acc") is None


def test_what_is_missing_is_left_out() -> None:
    """No section or chart of an optional part, a dash for a figure, and no invented interval."""
    keys = [section.key for section in sections(one_student())]
    assert keys == ["trade", "fidelity", "text", "source", "environment"]
    assert charts(one_student()).keys() == {"trade", "fidelity", "text"}
    assert cells(one_student(), "fidelity").count("–\n") == 1  # written alike
    some = charts(some_students())
    tasks = [trace["y"] for trace in some["tasks"][0].figure["data"]]
    assert tasks == [["a-rather…student-1", "a-rather…student-2"]]
    assert "choices" not in some["safety"][0].figure
    bars = some["fidelity"][0]
    assert all(trace["error_x"] == {"visible": False} for trace in bars.figure["data"])
    assert "95" not in bars.words


def test_charts_show_the_figures() -> None:
    """Bars with intervals the right way round, the front apart, the teacher as a line."""
    found = charts(nine_files())
    top1 = found["fidelity"][0].figure["data"][0]
    first = nine_files().students[0].fidelity
    assert first is not None and top1["x"][0] == pytest.approx(first.top1.value, rel=1e-4)
    for side, width in (("arrayminus", 0.010), ("array", 0.012)):
        assert top1["error_x"][side][0] == pytest.approx(width), side
    size, speed = (chart.figure for chart in found["trade"])
    traces = {trace["name"]: trace for trace in size["data"]}
    assert traces["not on it"]["x"] == [92.3] and len(traces["on the front"]["x"]) == 8
    across, up = (traces["front"][axis] for axis in "xy")
    assert across == sorted(across) and up == sorted(up)[::-1]
    assert [one["layout"]["shapes"][0]["x0"] for one in (size, speed)] == [242.0, 61.0]
    assert size["layout"]["xaxis"]["type"] == "log"
    perplexity = found["text"][0].figure
    assert perplexity["layout"]["shapes"][0]["name"] == "teacher: 11.2"
    assert perplexity["data"][0]["x"][0] == 13.58
    confusion = found["safety"][0].figure
    assert len(confusion["choices"]) == 9 and confusion["data"][0]["text"][1] == ["2", "18", "0"]
    assert [trace["name"] for trace in found["harness"][0].figure["data"]][:2] == ["teacher", "F32"]


def test_no_error_bar_leaves_its_chart() -> None:
    """The axis of KL reaches from the lowest end of an interval to the highest, also below 0."""
    for make in (one_student, nine_files):
        whole = make()
        axis = charts(whole)["trade"][0].figure["layout"]["yaxis"]
        kls = [student.fidelity.kl for student in whole.students if student.fidelity is not None]
        low, high = axis["range"]
        assert axis["type"] == "linear" and low < min(kl.low for kl in kls if kl.low is not None)
        assert high > max(kl.high for kl in kls if kl.high is not None)
    same = replace(one_student().students[0], fidelity=fidelity(0.0))
    assert charts(comparison([same]))["trade"][0].figure["layout"]["yaxis"]["type"] == "linear"


def test_labels_are_short_and_different() -> None:
    """File types where these differ; else names, whose ends are kept."""
    assert labels(nine_files().students)[:2] == ["F32", "BF16"]
    alike = [
        model(f"runs-of-last-week-{place}-student-of-the-desk", 1, 1.0, 1.0) for place in range(3)
    ]
    found = labels(alike)
    assert len(set(found)) == 3 and all(len(name) <= 24 for name in found)
    twice = [model(name, 1, 1.0, 1.0) for name in ("student.gguf", "student-q5_k_m.gguf")]
    assert labels(twice) == ["student", "student-q5_k_m"]


def test_labels_do_not_cover_each_other() -> None:
    """Boxes of shown labels, worked out again, do not meet; only a crowd leaves some out."""
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


def test_page_is_one_file_that_plotly_takes(tmp_path: Path) -> None:
    """No address, no script but its own, every chart has its place, and everything is JSON."""
    for make in CASES.values():
        whole = make()
        write_page(document_of(whole), tmp_path / "page.html")
        sound_page((tmp_path / "page.html").read_text(encoding="utf-8"))
        figures_take(charts(whole).values())
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
    write_page(document_of(hostile), tmp_path / "page.html")
    parsed, figures = sound_page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert bad in "".join(parsed.words) and HOSTILE in "".join(parsed.words)
    for figure in figures.values():  # Plotly takes some markup in names, none in the buttons' words
        shown = json.dumps([figure["data"], figure["layout"]])
        for ours in ("<br>", "<extra></extra>", "<extra>%{fullData.name}</extra>"):
            shown = shown.replace(ours, "")
        assert "<" not in shown
    assert escape(students[0].name[:8], quote=False) in json.dumps(figures["agreement"])


def test_title_names_who_is_compared() -> None:
    """One student by its name, several by their number."""
    assert document_of(one_student()).title == "student and desk teacher"
    assert document_of(nine_files()).title == "9 students of desk teacher"


@needs_browser
@pytest.mark.slow
def test_in_a_browser(tmp_path: Path) -> None:
    """All charts are drawn, and the console stays empty."""
    for name, width in (("nine", 1280), ("some", 390)):
        whole = CASES[name]()
        write_page(document_of(whole), tmp_path / "page.html")
        assert undrawn(tmp_path / "page.html", sum(map(len, charts(whole).values())), [width]) == []
