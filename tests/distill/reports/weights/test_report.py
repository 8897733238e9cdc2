"""``distill report`` on weights by themselves: files, folders, two of them; and bad input."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distill.reports.build import document_of, read_content
from distill.reports.render.html import write_page
from distill.reports.weights.comparison import WeightsComparison
from distill.reports.weights.layers import Place, places_of
from distill.reports.weights.report import WeightsReport
from distill.runtime.progress import Console
from teachers import example_teacher
from tests.conftest import refuses, says
from tests.support.report_runs import (
    HOSTILE,
    MAX_BYTES,
    about,
    check_facts,
    figures_take,
    make_run,
    needs_browser,
    page,
    printed,
    sound_page,
    undrawn,
    weights_of_a_student,
)


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


def one(path: Path) -> WeightsReport:
    found = read_content([path])
    assert isinstance(found, WeightsReport)
    return found


def two(first: Path, second: Path) -> WeightsComparison:
    found = read_content([first, second])
    assert isinstance(found, WeightsComparison)
    return found


def test_every_kind_of_path_gives_the_same_figures(tmp_path: Path) -> None:
    """A file, a checkpoint's folder, a sharded folder, GGUF, half precision: the same tensors."""
    weights = weights_of_a_student(2, 32)
    plain = one(write_safetensors(tmp_path / "w.safetensors", weights))
    folder = write_safetensors(tmp_path / "step-000120" / "model.safetensors", weights).parent
    (folder / "config.json").write_text("{}")  # as a student's folder has one: still no run
    names = list(weights)
    shards = tmp_path / "sharded"
    for number, some in enumerate((names[:7], names[7:])):
        part = {name: weights[name] for name in some}
        write_safetensors(shards / f"model-{number}.safetensors", part)
    index = {name: f"model-{int(place >= 7)}.safetensors" for place, name in enumerate(names)}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    arrays = {name: value.numpy() for name, value in weights.items()}
    other = one(write_gguf(tmp_path / "w.gguf", arrays))
    expected = {each.name: each.figures for each in plain.tensors}
    assert expected.keys() == weights.keys() and plain.format == "safetensors"
    for report in (one(folder), one(shards), other):
        assert {each.name: each.figures for each in report.tensors} == expected, report.path
    assert other.format == "GGUF" and other.architecture == "llama"
    half = {name: value.half() for name, value in weights.items()}
    for each in one(write_safetensors(tmp_path / "half.safetensors", half)).tensors:
        norm = pytest.approx(expected[each.name].norm, rel=1e-3)
        assert each.stored_as == "F16" and each.figures.norm == norm, each.name
    up = "model.layers.0.mlp.up_proj.weight"
    assert expected[up].norm == pytest.approx(float(weights[up].norm()))
    assert expected[up].shape == (64, 32)


def test_the_example_teacher() -> None:
    """A quantised GGUF: all tensors by layer and kind, and a page that Plotly takes."""
    report = one(example_teacher())
    assert len(report.tensors) == 38 and report.parameters == 4_787_456
    assert {each.stored_as for each in report.tensors} == {"Q8_0", "F32"}
    check_facts(about(report.verdict, "finite"), ("good", "All 4.8 M values"))
    check_facts(about(report.verdict, "collapsed"), ("good", "No matrix"))
    told = document_of(report)
    spectra, layers = told.charts["weights"]
    assert [choice["label"] for choice in spectra.figure["choices"]][-1] == "outside the layers"
    assert len(spectra.figure["data"]) == 25 and layers.figure["data"][0]["y"] == list("012345")
    figures_take(told.charts.values())
    sound_page(page(report))
    assert "blk.5.ffn_down.weight" in printed(report, 80)


def test_what_is_broken_is_found(tmp_path: Path) -> None:
    """Not finite, dead rows and columns, a collapsed matrix, zeros: each with its name."""
    weights = weights_of_a_student(2, 64)
    up, layer = "model.layers.0.mlp.up_proj.weight", "model.layers.1."
    down, value, gate = (
        f"{layer}{one}" for one in ("mlp.down_proj.weight", "self_attn.v_proj.weight", "gate")
    )
    weights[up][3, 4] = math.nan
    weights[down][:, [5, 6]] = 0.0
    weights[down][7] = 0.0
    weights[value] = torch.outer(torch.arange(64.0), torch.arange(64.0))
    weights[gate] = torch.zeros(8, 28)
    # Rows of a hash table are no units: some stay empty.
    weights["safety_head.runs"] = torch.ones(64, 3).index_fill(0, torch.arange(9), 0.0)
    report = one(write_safetensors(tmp_path / "bad.safetensors", weights))
    check_facts(
        report.verdict[:4],
        ("warning", "1 of", "k values are not finite", f"one tensor: {up}"),
        ("plain", "zeros", f"one tensor: {gate}"),
        # The matrix of rank one has a row and a column of zeros, too.
        ("warning", "2 rows and 3 columns", f"2 tensors: {down}"),
        ("warning", "collapsed to less than 10%", value),
    )
    assert all(fact.level != "warning" for fact in report.verdict[4:])
    text = printed(report)
    assert "1 not finite" in text and "collapsed" in text and "all zeros" in text
    assert json.dumps(report.to_json(), allow_nan=False) and len(page(report)) > 0


def test_many_tensors_are_grouped_and_the_worst_come_first(tmp_path: Path) -> None:
    """Kinds with their spans, then the worst of all; what holds no weights is named."""
    weights = weights_of_a_student(6, 32)
    weights["model.layers.4.self_attn.k_proj.weight"][0, 0] = math.inf
    weights["model.layers.4.position_ids"] = torch.arange(9)
    text = printed(one(write_safetensors(tmp_path / "w.safetensors", weights)))
    assert "By kind" in text and "k_proj" in text and "25 more rows" in text
    worst = text[text.index("Tensors, worst first") :]
    assert worst.index("model.layers.4.self_attn.k_proj.weight") < worst.index("model.layers.0.")
    assert ": model.layers.4.position_ids" in text[text.index("Not looked at") :]


def test_large_matrices_and_odd_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long smaller side goes by the Gram matrix; eight-bit floats and odd shapes are read."""
    monkeypatch.setattr("stability.measures.weights.EXACT_CELLS", 1000)
    weights = {
        "a": torch.randn(40, 30),
        "b": torch.randn(20, 20).to(torch.float8_e4m3fn),
        "c": torch.tensor(3.0),
        "d": torch.randn(3, 4, 5),
        "e": torch.zeros(0, 3),
    }
    report = one(write_safetensors(tmp_path / "w.safetensors", weights))
    found = {each.name: each for each in report.tensors}
    spectra = [found[name].figures.spectrum for name in "ab"]
    assert spectra[0] is not None and spectra[0].route == "gram"
    assert spectra[1] is not None and found["b"].stored_as == "F8_E4M3"
    reasons = [found[name].figures.no_spectrum for name in "cde"]
    assert reasons == ["not a matrix", "not a matrix", "empty"]
    check_facts(about(report.verdict, "Gram matrix"), ("plain", "one tensor", "0.0005"))
    assert "by Gram matrix" in printed(report)
    assert page(report) and document_of(report).charts["weights"][0].figure["data"]


def test_progress_is_shown_where_it_takes_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage with its title; not for little work, and not without a console."""
    path = write_safetensors(tmp_path / "w.safetensors", weights_of_a_student(1, 32))
    read_content([path], Console())
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("distill.reports.weights.report.WORTH_SHOWING", 1.0)
    read_content([path, path], Console())
    words = capsys.readouterr().out
    assert words.count("Weigh") == 2 and "Compare" in words and "10 tensors" in words
    read_content([path])
    assert capsys.readouterr().out == ""


def test_two_files(tmp_path: Path) -> None:
    """Norm ratios, distances where shapes are equal, ranks, and what only one of them has."""
    weights = weights_of_a_student(2, 32)
    changed = {name: value.clone() for name, value in weights.items()}
    up, other = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    changed[up] *= 1.5
    changed[other] = torch.randn(32, 32)
    del changed["model.norm.weight"]
    changed["lm_head.weight"] = torch.randn(16, 32)
    first = write_safetensors(tmp_path / "a.safetensors", weights)
    both = two(first, write_safetensors(tmp_path / "b.safetensors", changed))
    pairs = {each.name: each for each in both.pairs}
    grown = pairs[up]
    assert grown.norm_ratio == pytest.approx(1.5) and grown.distance == pytest.approx(0.5)
    assert grown.rank_ratio == pytest.approx(1.0)
    assert pairs[other].distance is None
    assert pairs["model.layers.0.mlp.down_proj.weight"].distance == 0.0
    assert (both.only_first, both.only_second) == (["model.norm.weight"], ["lm_head.weight"])
    check_facts(
        both.verdict,
        ("plain", "15 of 16 tensors", f"relative to A: {up} 50.0%"),
        ("plain", "Norms", "1.000 (", f"({other})"),
        ("plain", "Only in A: model.norm.weight."),
        ("plain", "Only in B: lm_head.weight."),
    )
    assert "A and B" in printed(both) and "50.00%" in printed(both)
    figures_take(document_of(both).charts.values())
    content = json.loads(json.dumps(both.to_json(), allow_nan=False))
    assert content["kind"] == "weights comparison"
    assert len(content["files"]) == 2 and len(content["pairs"]) == 17
    sound_page(page(both))


def test_a_student_and_its_gguf_are_matched_by_the_table_of_names(tmp_path: Path) -> None:
    """Under their two names, without a distance, as rows may lie in another order."""
    values = torch.randn(32, 32)
    first = write_safetensors(
        tmp_path / "a.safetensors", {"model.layers.0.mlp.up_proj.weight": values}
    )
    second = write_gguf(tmp_path / "b.gguf", {"blk.0.ffn_up.weight": values.numpy()}, "Q8_0")
    for both in (two(first, second), two(second, first)):
        pair = both.pairs[0]
        assert both.translated and pair.distance is None, pair.name
        assert pair.norm_ratio == pytest.approx(1.0, rel=0.01), pair.name
        assert about(both.verdict, "table of names") and page(both), pair.name


def test_json_and_page_by_the_command_line(tmp_path: Path) -> None:
    """One object on standard output and nothing else, and the page beside it."""
    path = write_safetensors(tmp_path / "w.safetensors", weights_of_a_student(1, 32))
    out = tmp_path / "page.html"
    content = json.loads(says("report", path, "--json", "--output", out))
    assert content["kind"] == "weights"
    assert content["parameters"] == 128 * 32 + 4 * 32**2 + 3 * 64 * 32 + 2 * 32
    up = next(each for each in content["tensors"] if "up_proj" in each["figures"]["name"])
    assert len(up["figures"]["spectrum"]["values"]) == 32
    assert up["place"] == {"layer": 0, "kind": "up_proj"}
    assert out.stat().st_size <= MAX_BYTES


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    """In the terminal, on the page and in its charts, also bytes that are no UTF-8."""
    weights = {f"model.layers.0.{HOSTILE}.weight": np.ones((30, 32), np.float32)}
    path = write_gguf(tmp_path / "w.gguf", weights | {HOSTILE: np.ones(4, np.float32)})
    path.write_bytes(path.read_bytes().replace(b"onerror", b"\xff\xfe\xfferrr"))
    report = one(path)
    _, figures = sound_page(page(report))
    for figure in figures.values():
        for choice in figure["choices"]:
            del choice["label"]  # a button's text, which the page never takes as markup
    assert "<img" not in json.dumps(figures) and "\x1b" not in printed(report)
    json.dumps(report.to_json(), ensure_ascii=False).encode()


def cut(file: Path, share: float) -> None:
    """Leave only this share of a file of weights."""
    weights = weights_of_a_student(1, 32)
    if file.suffix == ".gguf":
        write_gguf(file, {key: value.numpy() for key, value in weights.items()})
    else:
        write_safetensors(file, weights)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def lying_header(file: Path) -> None:
    """A header that claims more bytes than there are."""
    claim = {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 4_000_000]}
    header = json.dumps({"w": claim}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


def empty_tensor(file: Path) -> None:
    """A GGUF tensor with a side of 0, which no reader can map."""
    write_gguf(file, {"blk.0.w": np.ones((2, 32), np.float32)})
    data = bytearray(file.read_bytes())
    place = data.index(b"blk.0.w") + len(b"blk.0.w") + 4 + 8  # behind the first of two sides
    data[place : place + 8] = bytes(8)
    file.write_bytes(data)


def index_elsewhere(folder: Path) -> None:
    """An index that names a file outside its folder."""
    folder.mkdir()
    index = '{"weight_map": {"w": "../../etc/x.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(index)


def test_bad_input_is_one_line_and_exit_2(tmp_path: Path) -> None:
    """What is wrong, and nothing on standard output."""
    text, damaged = b"This is a text.\nIt has a name.\n", "damaged or no safetensors file"
    rows: list[tuple[str, bytes | Callable[[Path], object], str]] = [
        ("empty", Path.mkdir, "no model.safetensors either"),
        ("w.gguf", text, "is not a GGUF file"),
        ("w.safetensors", text, damaged),
        ("notes.txt", text, "no file of weights"),
        ("w.safetensors", b"", "is empty"),
        ("w.bin", b"PK\x03\x04", "may be a pickle"),
        ("w.gguf", b"GGUF", "not a GGUF file"),
        ("w.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64), "no tensor in it"),
        ("w.safetensors", struct.pack("<Q", 2) + b"{}", "no tensor in it"),
        ("w.safetensors", struct.pack("<Q", 1 << 60) + b"{}", damaged),
        ("model.safetensors.index.json", b"[", "no file of weights"),
        ("w.gguf", lambda file: cut(file, 0.9), "truncated"),
        ("w.gguf", lambda file: cut(file, 0.01), "truncated"),
        ("w.safetensors", lambda file: cut(file, 0.9), damaged),
        ("w.safetensors", lying_header, damaged),
        ("w.gguf", empty_tensor, "is damaged"),
        ("folder", index_elsewhere, "no safetensors file beside it"),
        ("w.safetensors", os.mkfifo, "not a regular file"),
        ("none.gguf", lambda file: None, "no such folder"),
    ]
    for number, (name, content, words) in enumerate(rows):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)
        assert words in refuses("report", path), (number, name)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    """A run with weights, files without a common tensor, and three of anything."""
    run = make_run(tmp_path / "run")
    first = write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    second = write_safetensors(tmp_path / "b.safetensors", {"y": torch.ones(3)})
    alone, shared = "holds weights alone: they cannot be compared", "share no tensor by name"
    rows = {(run, first): alone, (first, run): alone, (first, second): shared}
    rows |= {(first, second, run): "3 paths are too many"}
    for arguments, words in rows.items():
        assert words in refuses("report", *arguments), arguments


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


@needs_browser
@pytest.mark.slow
def test_in_a_browser(tmp_path: Path) -> None:
    """Both charts of the example teacher are drawn, and the console stays empty."""
    write_page(document_of(one(example_teacher())), tmp_path / "report.html")
    assert undrawn(tmp_path / "report.html", 2) == []
