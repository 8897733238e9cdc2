"""``distill report`` on weights by themselves: safetensors, GGUF, checkpoint folders; two of them; and bad input."""

from __future__ import annotations

import io
import json
import math
import os
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console as RichConsole
from safetensors.torch import save_file

from distill.cli import main
from distill.console import Console
from distill.reports.html import page, write_page
from distill.reports.layers import Place, places_of
from distill.reports.telling import Content, tell
from distill.reports.text import print_report, read_content
from distill.reports.weight_comparison import WeightsComparison
from distill.reports.weights import WeightsReport
from teachers import example_teacher
from tests.report_run import (
    HOSTILE,
    MAX_BYTES,
    Page,
    in_a_browser,
    make_run,
    weights_of_a_student,
)
from tests.test_report_health import figures_take


def write_gguf(path: Path, weights: dict[str, np.ndarray[Any, Any]], kind: str = "F32") -> Path:
    """A GGUF file of these tensors and nothing else but its architecture."""
    writer = gguf.GGUFWriter(path, "llama")
    chosen = gguf.GGMLQuantizationType[kind]
    for name, values in weights.items():
        if values.ndim > 1 and kind != "F32":
            writer.add_tensor(name, gguf.quants.quantize(values, chosen), raw_dtype=chosen)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_safetensors(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    return path


def report_on(*paths: Path) -> Content:
    return read_content(list(paths))


def one(path: Path) -> WeightsReport:
    found = report_on(path)
    assert isinstance(found, WeightsReport)
    return found


def said(content: WeightsReport | WeightsComparison) -> str:
    return "\n".join(f"{fact.level}: {fact.text}" for fact in content.verdict)


def printed(content: Content, width: int = 200) -> str:
    console = RichConsole(file=io.StringIO(), width=width, highlight=False)
    print_report(content, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int | str | None:
    """The exit code of ``distill report`` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["distill", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_every_kind_of_path_gives_the_same_figures(tmp_path: Path) -> None:
    """A file, a checkpoint's folder, a sharded folder, and GGUF in float32 and half: the same tensors."""
    weights = weights_of_a_student(2, 32)
    plain = one(write_safetensors(tmp_path / "w.safetensors", weights))
    folder = write_safetensors(tmp_path / "step-000120" / "model.safetensors", weights).parent
    (folder / "config.json").write_text("{}")  # as a student's folder has one: still no run
    names = list(weights)
    shards = tmp_path / "sharded"
    for number, some in enumerate((names[:7], names[7:])):
        write_safetensors(shards / f"model-{number}.safetensors", {name: weights[name] for name in some})
    index = {name: f"model-{int(place >= 7)}.safetensors" for place, name in enumerate(names)}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    arrays = {name: value.numpy() for name, value in weights.items()}
    other = one(write_gguf(tmp_path / "w.gguf", arrays))
    expected = {each.name: each.figures for each in plain.tensors}
    assert expected.keys() == weights.keys() and plain.format == "safetensors"
    for report in (one(folder), one(shards), other):
        assert {each.name: each.figures for each in report.tensors} == expected
    assert other.format == "GGUF" and other.architecture == "llama"
    half = {name: value.half() for name, value in weights.items()}
    for each in one(write_safetensors(tmp_path / "half.safetensors", half)).tensors:
        assert each.stored_as == "F16" and each.figures.norm == pytest.approx(
            expected[each.name].norm, rel=1e-3
        )
    up = "model.layers.0.mlp.up_proj.weight"
    assert expected[up].norm == pytest.approx(float(weights[up].norm())) and expected[up].shape == (64, 32)


def test_the_example_teacher() -> None:
    """A quantised GGUF: all tensors, dequantised, by layer and kind, and a page that Plotly takes."""
    report = one(example_teacher())
    assert len(report.tensors) == 38 and report.parameters == 4_787_456
    assert {each.stored_as for each in report.tensors} == {"Q8_0", "F32"}
    assert "good: All 4.8 M values looked at are finite." in said(
        report
    ) and "No matrix has collapsed" in said(report)
    told = tell(report)
    spectra, layers = told.charts["weights"]
    assert [choice["label"] for choice in spectra.figure["choices"]][-1] == "outside the layers"
    assert len(spectra.figure["data"]) == 25 and layers.figure["data"][0]["y"] == list("012345")
    figures_take(report, told.charts.values())
    text = page(report)
    assert len(text.encode()) <= MAX_BYTES and len(Page(text).scripts) == 3
    assert "blk.5.ffn_down.weight" in printed(report, 80)


def test_what_is_broken_is_found(tmp_path: Path) -> None:
    """Values that are not finite, dead rows and columns, a collapsed matrix, zeros: each a warning with the name."""
    weights = weights_of_a_student(2, 64)
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = math.nan
    weights["model.layers.1.mlp.down_proj.weight"][:, [5, 6]] = 0.0
    weights["model.layers.1.mlp.down_proj.weight"][7] = 0.0
    weights["model.layers.1.self_attn.v_proj.weight"] = torch.outer(torch.arange(64.0), torch.arange(64.0))
    weights["model.layers.1.self_attn.gate.command"] = torch.zeros(8, 28)
    report = one(write_safetensors(tmp_path / "bad.safetensors", weights))
    words = said(report)
    assert "k values are not finite, in one tensor: model.layers.0.mlp.up_proj.weight" in words
    # The matrix of rank one has a row and a column of zeros, too.
    assert "2 rows and 3 columns are all zeros, in 2 tensors: model.layers.1.mlp.down_proj.weight" in words
    assert (
        "One tensor collapsed to less than 10% of the directions: model.layers.1.self_attn.v_proj.weight"
        in words
    )
    assert "plain: Nothing but zeros is in one tensor: model.layers.1.self_attn.gate.command" in words
    assert sum(line.startswith("warning") for line in words.splitlines()) == 3
    text = printed(report)
    assert "1 not finite" in text and "collapsed" in text and "all zeros" in text
    assert json.dumps(report.to_json(), allow_nan=False) and len(page(report)) > 0


def test_many_tensors_are_grouped_and_the_worst_come_first(tmp_path: Path) -> None:
    """Kinds with their spans, then the worst of all; the page has more, and what holds no weights is named."""
    weights = weights_of_a_student(6, 32)
    weights["model.layers.4.self_attn.k_proj.weight"][0, 0] = math.inf
    weights["model.layers.4.position_ids"] = torch.arange(9)
    text = printed(one(write_safetensors(tmp_path / "w.safetensors", weights)))
    assert "By kind" in text and "k_proj" in text and "25 more rows are on the page" in text
    worst = text[text.index("Tensors, worst first") :]
    assert worst.index("model.layers.4.self_attn.k_proj.weight") < worst.index("model.layers.0.")
    assert "Not looked at, whole numbers (packed, a table, or a counter): model.layers.4.position_ids" in text


def test_large_matrices_and_odd_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long smaller side goes by the Gram matrix, which is said; eight-bit floats, scalars and stacks are read."""
    monkeypatch.setattr("stability.weights.EXACT_CELLS", 1000)
    weights = {
        "a": torch.randn(40, 30),
        "b": torch.randn(20, 20).to(torch.float8_e4m3fn),
        "c": torch.tensor(3.0),
        "d": torch.randn(3, 4, 5),
        "e": torch.zeros(0, 3),
    }
    report = one(write_safetensors(tmp_path / "w.safetensors", weights))
    found = {each.name: each for each in report.tensors}
    assert found["a"].figures.spectrum is not None and found["a"].figures.spectrum.route == "gram"
    assert found["b"].figures.spectrum is not None and found["b"].stored_as == "F8_E4M3"
    assert [found[name].figures.no_spectrum for name in "cde"] == ["not a matrix", "not a matrix", "empty"]
    assert "come from the Gram matrix in float32" in said(report) and "by Gram matrix" in printed(report)
    assert page(report) and tell(report).charts["weights"][0].figure["data"]


def test_progress_is_shown_where_it_takes_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage with its title; not for little work, and not without a console."""
    path = write_safetensors(tmp_path / "w.safetensors", weights_of_a_student(1, 32))
    read_content([path], Console())
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("distill.reports.weights.WORTH_SHOWING", 1.0)
    read_content([path, path], Console())
    words = capsys.readouterr().out
    assert words.count("Weigh") == 2 and "Compare" in words and "10 tensors" in words
    read_content([path])
    assert capsys.readouterr().out == ""


def test_two_files(tmp_path: Path) -> None:
    """Norm ratios, distances where shapes are equal, ranks, and what only one of them has."""
    weights = weights_of_a_student(2, 32)
    changed = {name: value.clone() for name, value in weights.items()}
    changed["model.layers.0.mlp.up_proj.weight"] *= 1.5
    changed["model.layers.1.mlp.up_proj.weight"] = torch.randn(32, 32)
    del changed["model.norm.weight"]
    changed["lm_head.weight"] = torch.randn(16, 32)
    first = write_safetensors(tmp_path / "a.safetensors", weights)
    second = write_safetensors(tmp_path / "b.safetensors", changed)
    both = report_on(first, second)
    assert isinstance(both, WeightsComparison)
    pairs = {each.name: each for each in both.pairs}
    grown = pairs["model.layers.0.mlp.up_proj.weight"]
    assert grown.norm_ratio == pytest.approx(1.5) and grown.distance == pytest.approx(0.5)
    assert grown.rank_ratio == pytest.approx(1.0)
    assert pairs["model.layers.1.mlp.up_proj.weight"].distance is None
    assert pairs["model.layers.0.mlp.down_proj.weight"].distance == 0.0
    assert (both.only_first, both.only_second) == (["model.norm.weight"], ["lm_head.weight"])
    assert "15 of 16 tensors with the same shape are the same in both" in said(both)
    assert "farthest apart, relative to A: model.layers.0.mlp.up_proj.weight 50.0%" in said(both)
    assert "Only in B: lm_head.weight." in said(both)
    assert "A and B" in printed(both) and "50.00%" in printed(both)
    figures_take(both, tell(both).charts.values())
    content = json.loads(json.dumps(both.to_json(), allow_nan=False))
    assert (
        content["kind"] == "weights comparison" and len(content["files"]) == 2 and len(content["pairs"]) == 17
    )
    assert len(page(both).encode()) <= MAX_BYTES


def test_a_student_and_its_gguf_are_matched_by_the_table_of_names(tmp_path: Path) -> None:
    """Under their two names, without a distance, as rows may lie in another order."""
    values = torch.randn(32, 32)
    first = write_safetensors(tmp_path / "a.safetensors", {"model.layers.0.mlp.up_proj.weight": values})
    second = write_gguf(tmp_path / "b.gguf", {"blk.0.ffn_up.weight": values.numpy()}, "Q8_0")
    for both in (report_on(first, second), report_on(second, first)):
        assert isinstance(both, WeightsComparison) and both.translated
        assert both.pairs[0].norm_ratio == pytest.approx(1.0, rel=0.01) and both.pairs[0].distance is None
        assert "matched by GGUF's table of names" in said(both) and page(both)


def test_json_and_page_by_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One object on standard output and nothing else, and the page beside it."""
    path, out = (
        write_safetensors(tmp_path / "w.safetensors", weights_of_a_student(1, 32)),
        tmp_path / "page.html",
    )
    assert command(monkeypatch, path, "--json", "--output", out) == 0
    content = json.loads(capsys.readouterr().out)
    assert (
        content["kind"] == "weights" and content["parameters"] == 128 * 32 + 4 * 32**2 + 3 * 64 * 32 + 2 * 32
    )
    up = next(each for each in content["tensors"] if "up_proj" in each["figures"]["name"])
    assert len(up["figures"]["spectrum"]["values"]) == 32 and up["place"] == {"layer": 0, "kind": "up_proj"}
    assert out.stat().st_size <= MAX_BYTES


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    """In the terminal, on the page and in its charts, also bytes that are no UTF-8."""
    weights = {
        f"model.layers.0.{HOSTILE}.weight": np.ones((30, 32), np.float32),
        HOSTILE: np.ones(4, np.float32),
    }
    path = write_gguf(tmp_path / "w.gguf", weights)
    path.write_bytes(path.read_bytes().replace(b"onerror", b"\xff\xfe\xfferrr"))
    report = one(path)
    text = page(report)
    assert text.encode() and not {"img", "svg"} & {tag for tag, _ in Page(text).tags}
    figures = json.loads(Page(text).scripts[0])
    for figure in figures.values():
        for choice in figure["choices"]:
            del choice["label"]  # a button's text, which the page never takes as markup
    assert "<img" not in json.dumps(figures) and "\x1b" not in printed(report)
    json.dumps(report.to_json(), ensure_ascii=False).encode()


def empty_folder(path: Path) -> Path:
    (path / "empty").mkdir()
    return path / "empty"


def named(name: str, content: bytes) -> Any:
    def make(path: Path) -> Path:
        (path / name).write_bytes(content)
        return path / name

    return make


def cut(name: str, share: float) -> Any:
    def make(path: Path) -> Path:
        weights = weights_of_a_student(1, 32)
        file = path / name
        if name.endswith("gguf"):
            write_gguf(file, {key: value.numpy() for key, value in weights.items()})
        else:
            write_safetensors(file, weights)
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        return file

    return make


def lying_header(path: Path) -> Path:
    """A header that claims more bytes than there are."""
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 4_000_000]}}
    ).encode()
    (path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    return path / "w.safetensors"


def empty_tensor(path: Path) -> Path:
    """A GGUF tensor with a side of 0, which no reader can map."""
    file = write_gguf(path / "w.gguf", {"blk.0.w": np.ones((2, 32), np.float32)})
    data = bytearray(file.read_bytes())
    place = data.index(b"blk.0.w") + len(b"blk.0.w") + 4 + 8  # after the number of sides and the first one
    data[place : place + 8] = bytes(8)
    file.write_bytes(data)
    return file


def index_elsewhere(path: Path) -> Path:
    """An index that names a file outside its folder."""
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../../etc/x.safetensors"}}')
    return path


def fifo(path: Path) -> Path:
    os.mkfifo(path / "w.safetensors")
    return path / "w.safetensors"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (empty_folder, "no model.safetensors either"),
        (named("w.gguf", b"This is a text.\nIt only has the name.\n"), "is not a GGUF file"),
        (
            named("w.safetensors", b"This is a text.\nIt only has the name.\n"),
            "damaged or no safetensors file",
        ),
        (named("notes.txt", b"This is a text.\nIt has its own name.\n"), "no file of weights"),
        (named("w.safetensors", b""), "is empty"),
        (named("w.bin", b"PK\x03\x04"), "may be a pickle"),
        (named("w.gguf", b"GGUF"), "not a GGUF file"),
        (named("w.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64)), "no tensor in it"),
        (named("w.safetensors", struct.pack("<Q", 2) + b"{}"), "no tensor in it"),
        (named("w.safetensors", struct.pack("<Q", 1 << 60) + b"{}"), "damaged or no safetensors file"),
        (named("model.safetensors.index.json", b"["), "no file of weights"),
        (cut("w.gguf", 0.9), "truncated"),
        (cut("w.gguf", 0.01), "truncated"),
        (cut("w.safetensors", 0.9), "damaged or no safetensors file"),
        (lying_header, "damaged or no safetensors file"),
        (empty_tensor, "is damaged"),
        (index_elsewhere, "no safetensors file beside it"),
        (fifo, "not a regular file"),
        (lambda path: path / "none.gguf", "no such folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    tmp_path: Path, make: Any, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong, and nothing on standard output."""
    path = make(tmp_path)
    assert command(monkeypatch, path) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with weights, files without a common tensor, and three of anything."""
    run = make_run(tmp_path / "run")
    first = write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    second = write_safetensors(tmp_path / "b.safetensors", {"y": torch.ones(3)})
    for arguments, words in (
        ((run, first), "holds weights alone: they cannot be compared"),
        ((first, run), "holds weights alone: they cannot be compared"),
        ((first, second), "share no tensor by name"),
        ((first, second, run), "3 paths are too many"),
    ):
        assert command(monkeypatch, *arguments) == 2
        captured = capsys.readouterr()
        assert words in captured.err and captured.err.count("\n") == 1


def test_places_of_names() -> None:
    """Layer and kind in the ways that models are named; a kind is only as long as it must be."""
    names = {
        "blk.11.attn_q.weight": Place(11, "attn_q"),
        "model.layers.3.self_attn.q_proj.weight": Place(3, "q_proj"),
        "model.layers.3.self_attn.q_proj.bias": Place(3, "self_attn.q_proj.bias"),
        "model.layers.3.self_attn.k_proj.bias": Place(3, "self_attn.k_proj.bias"),
        "transformer.h.0.mlp.c_fc.weight": Place(0, "c_fc"),
        "output_norm.weight": Place(None, "output_norm"),
        "weight": Place(None, "weight"),
    }
    assert places_of(names) == names


def test_thousands_of_matrices_stay_small(tmp_path: Path) -> None:
    """As a mixture of experts has them: the page is under the limit."""
    draw = torch.Generator().manual_seed(0)
    weights = {
        f"model.layers.{layer}.experts.{expert}.up.weight": torch.randn(24, 24, generator=draw)
        for layer in range(30)
        for expert in range(40)
    }
    report = one(write_safetensors(tmp_path / "w.safetensors", weights))
    assert len(report.tensors) == 1200 and len(page(report).encode()) <= MAX_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(tmp_path: Path, width: int) -> None:
    """Both charts of the example teacher are drawn, and the console stays empty."""
    out = tmp_path / "report.html"
    write_page(one(example_teacher()), out)
    document, words = in_a_browser(out, width)
    assert 'data-drawn="2"' in document and document.count('class="main-svg"') >= 2
    assert "CONSOLE" not in words, words
