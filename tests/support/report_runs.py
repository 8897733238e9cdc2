"""Finished runs, written by hand, that reports and cards are made of.

Over 400 lines because runs, pages and cards are read by the same helpers.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
import yaml
from gguf import GGUFWriter
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console as RichConsole
from safetensors.torch import save_file

from distill.config.loading import load_config
from distill.reports.build import Content, document_of
from distill.reports.document import Chart, Fact
from distill.reports.render.html import render
from distill.reports.render.terminal import print_report
from distill.reports.run.report import read_report
from distill.runs.folder import RunFolder


def write_file(path: Path, **general: str) -> Path:
    """A GGUF file of 4 × 32 weights with these ``general.*`` keys (``__`` stands for a dot)."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("a student")
    writer.add_token_list(["a", "b", "c", "d"])
    for key, text in general.items():
        writer.add_string(f"general.{key.replace('__', '.')}", text)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def finished_run(path: Path) -> RunFolder:
    """A finished run without a Modelfile, further exports, a transformers folder or a log."""
    folder = RunFolder(make_run(path))
    write_file(folder.gguf)
    return folder


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def put(path: Path, dotted: str, value: Any) -> None:
    """Set one entry of a JSON file."""
    *places, last = dotted.split(".")

    def edit(tree: dict[str, Any]) -> None:
        for place in places:
            tree = tree[place]
        tree[last] = value

    change(path, edit)


def parsed(card: str) -> tuple[dict[str, Any], list[Token]]:
    """Front matter and Markdown, as YAML's and CommonMark's own parsers see them, with tables."""
    _, front, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front), MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(
        body
    )


def text_of(card: str) -> str:
    """What a reader of the rendered page sees, each paragraph and cell in one line."""
    lines = []
    for token in parsed(card)[1]:
        if token.type == "inline":
            lines.append("".join(one.content for one in token.children or ()))
        elif token.type == "fence":
            lines.append(token.content)
    return "\n".join(lines)


def structure(card: str) -> list[str]:
    """The kinds of everything on the page, in order."""
    kinds = []
    for token in parsed(card)[1]:
        kinds.append(token.type + token.tag)
        kinds += [one.type for one in token.children or () if one.type != "text"]
    return kinds


def headings(card: str) -> list[str]:
    """The titles of the card's sections."""
    tokens = parsed(card)[1]
    return [
        follower.content
        for token, follower in itertools.pairwise(tokens)
        if token.type == "heading_open" and token.tag == "h2"
    ]


def section(card: str, title: str) -> str:
    """The Markdown under one heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def row(card: str, first: str) -> list[str]:
    """The cells of the table row that begins with this."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


HOSTILE = "</script><script>alert(1)</script>{{ 7*7 }}<img src=x onerror=alert(2)> [red]\x1b[31m"
MAX_BYTES = 6_000_000
STEPS = 60


def train_line(step: int, **changes: float | None) -> dict[str, Any]:
    """One line of a healthy training."""
    loss = 5.0 * math.exp(-step / 30) + 1.0 + 0.05 * math.sin(7 * step)
    line = {"loss": loss, "kd": 0.7 * loss, "ce": 0.3 * loss - 0.01, "pet": 0.01, "safety": 0.0}
    line |= {"second_difference": 0.3, "rotation_error": 2e-7, "rotation_drift": 1e-4}
    line |= {"grad_norm": 2.0 + 0.1 * math.cos(step), "learning_rate": 1e-3 / step}
    line |= {"min_commutator": 0.05, "mean_commutator": 0.07, "tokens_seen": 100 * step}
    return {"kind": "train", "step": step, **line, **changes}


def held_out_line(step: int, kl: float | None) -> dict[str, Any]:
    agreement = None if kl is None else 1 / (1 + kl)
    return {"kind": "held_out", "step": step, "kl": kl, "agreement": agreement, "cross_entropy": kl}


def lines_of_a_run(steps: int = STEPS) -> list[dict[str, Any]]:
    """Training with a held-out score every twenty steps."""
    lines = [held_out_line(0, 6.0)]
    for step in range(1, steps + 1):
        lines.append(train_line(step))
        if step % 20 == 0:
            lines.append(held_out_line(step, 6.0 / (1 + step / 20)))
    return lines


RESULTS = """
teacher: {architecture: phi3, parameters: 4787456, file_bytes: 5133792, vocab_size: 1024,
  width: 256, layers: 6, shape: {heads: 4}}
student: {size: 64x2, parameters: 177700, file_bytes: 238500, quant: q8_0}
soft_targets: {folder: /tmp/store, sequences: 40, tokens: 4000, bytes: 90000, reused: true,
  recipe: {kind: compact, num_topk: 16}}
training: {tokens_seen: 6000, seconds: 12.5, continued_from_step: 0, precision: fp32}
evaluation: {against: teacher, positions: 100, kl_over: whole vocabulary,
  teacher: {cross_entropy: 0.2, perplexity: 1.2, approximate: false}}
heads:
  safety: {labels_from: builtin, prompts: {train: 30, validation: 10, test: 12},
    scenarios: {train: 9, validation: 3, test: 3}, costs: [[0, 1, 2], [1, 0, 1], [4, 1, 0]]}
  verification: {trust: 0.6, positions: 100, agreement: 0.4, auroc: 0.8, calibration_error: 0.05,
    reliability: [{count: 9, mean_probability: 0.5, share_true: 0.4}]}
proof: {quant: q8_0, positions: 90, max_logit_difference: 0.1, mean_kl: 3.0e-5, agreement: 0.99,
  token_lines: 64}
rotations: {max_orthogonality_error: 2.0e-7, min_commutator_norm: 0.05, mean_commutator_norm: 0.07}
tokens_per_second: {student: {prompt: 1000.0, generation: 500.0}}
stage_seconds: {Train: 12.5}
environment: {python: 3.11.7, machine: x86_64, cpu: AVX2, threads: 2,
  packages: {torch: 2.13.0, numpy: 2.4.6}}
"""


def safety_score(confusion: list[list[int]]) -> dict[str, Any]:
    count = sum(map(sum, confusion))
    right = sum(confusion[place][place] for place in range(3))
    names = ("refuse", "escalate", "allow")
    ratio = {f"{name}_{kind}": 0.5 for name in names for kind in ("recall", "precision")}
    score = {"labels": ["ALLOW", "ESCALATE", "REFUSE"], "prompts": count, "confusion": confusion}
    score |= {"accuracy": right / count, "calibration_error": 0.1}
    return {**score, **ratio, "refuse_recall": 0.98}


def results_of_a_run(teacher: str) -> dict[str, Any]:
    """A ``results.json`` as ``distill.pipeline.results`` writes it."""
    found: dict[str, Any] = yaml.safe_load(RESULTS)
    found["teacher"] |= {"name": teacher, "sha256": "ab" * 32}
    found["training"] |= dict.fromkeys(("steps", "planned_steps", "best_step"), STEPS)
    scores = [line for line in lines_of_a_run() if line["kind"] == "held_out"]
    found["training"]["held_out"] = scores
    score = {"kl": 1.5, "agreement": 0.4, "cross_entropy": 1.5, "perplexity": 4.5}
    found["evaluation"] |= dict.fromkeys(("before", "after", "exported"), score)
    safety, verification = (found["heads"][name] for name in ("safety", "verification"))
    safety["prompts_sha256"] = "cd" * 32
    safety["test"] = safety_score([[1, 1, 2], [0, 2, 2], [0, 0, 4]])
    safety["languages"] = {"en": safety_score([[1, 0, 1], [0, 1, 1], [0, 0, 2]])}
    shares = [(place / 10, min(1.0, 0.4 + 0.075 * place)) for place in range(11)]
    verification["cascade"] = [
        {"escalated": share, "agreement": right, "threshold": share} for share, right in shares
    ]
    return found


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    """A run's log of these lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_run(
    path: Path,
    *,
    lines: list[dict[str, Any]] | None = None,
    finished: bool = True,
    teacher: str = "example",
    settings: tuple[str, ...] = (),
) -> Path:
    """A run's folder with everything that a report reads."""
    path.mkdir(parents=True)
    config = load_config(None, {"student.size": "64x2"}, list(settings))
    (path / "config.json").write_text(config.model_dump_json())
    identity = {"teacher_name": teacher, "teacher_sha256": "ab" * 32, "soft_targets": "store-1"}
    (path / "identity.json").write_text(json.dumps(identity))
    write_lines(path / "metrics.jsonl", lines_of_a_run() if lines is None else lines)
    if finished:
        (path / "results.json").write_text(json.dumps(results_of_a_run(teacher)))
    return path


def said(path: Path) -> str:
    return "\n".join(f"{fact.level}: {fact.text}" for fact in read_report(path).health)


def unlike(facts: Sequence[Fact], *rows: tuple[str, ...]) -> list[object]:
    """What keeps facts from being ``rows`` in their order: of each its level, words of its text."""
    if [fact.level for fact in facts] != [row[0] for row in rows]:
        return list(facts)
    pairs = zip(facts, rows, strict=True)
    return [(value, fact) for fact, row in pairs for value in row[1:] if value not in fact.text]


def check_facts(facts: Sequence[Fact], *rows: tuple[str, ...]) -> None:
    """Exactly these facts."""
    assert unlike(facts, *rows) == []


def about(facts: Sequence[Fact], word: str) -> list[Fact]:
    """The facts that name something."""
    return [fact for fact in facts if word in fact.text]


def printed(told: Path | Content, width: int = 200) -> str:
    """What the terminal shows of a run's folder, or of what else is reported on."""
    file = io.StringIO()
    content = read_report(told) if isinstance(told, Path) else told
    print_report(document_of(content), RichConsole(file=file, width=width, highlight=False))
    return file.getvalue()


class Page(HTMLParser):
    """Tags with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"{self._open} are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "img"):
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.words.append(data)


def page(content: Content) -> str:
    """The HTML page of what is reported on."""
    return render(document_of(content))


def sound_page(text: str) -> tuple[Page, dict[str, Any]]:
    """The page and its figures: one small file that asks for nothing and places every chart."""
    assert len(text.encode()) <= MAX_BYTES and text.count("* plotly.js v") == 1
    parsed = Page(text)
    assert len(parsed.scripts) == 3
    policy, places = "", set()
    for tag, attributes in parsed.tags:
        if attributes.get("http-equiv") == "Content-Security-Policy":
            policy = attributes["content"] or ""
        if "data-chart" in attributes:
            places.add(attributes["data-chart"])
        assert tag not in ("iframe", "object", "embed", "base", "form", "img", "svg", "b", "i"), tag
        for name in ("src", "href", "action", "srcset"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("#", "data:")), (tag, name, value)
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2
    assert "connect-src" not in policy
    ours = text.replace(parsed.scripts[1], "")
    assert "http" not in ours.replace("http-equiv", "")
    assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|import\(|url\(|@import", ours)
    figures = json.loads(parsed.scripts[0])
    assert places == figures.keys()
    return parsed, figures


def figures_take(drawn: Iterable[Sequence[Chart]]) -> None:
    """Plotly's own schema takes every chart and every combination of buttons."""
    for chart in (one for some in drawn for one in some):
        text = json.dumps(chart.figure, allow_nan=False)
        for name, scale in (("heat", "Blues"), ("deep", "Blues"), ("change", "RdBu")):
            text = text.replace(f'"@{name}"', f'"{scale}"')
        figure = json.loads(re.sub(r'"@[a-z]+(:[0-9.]+)?"', '"#000000"', text))
        built = go.Figure({key: figure[key] for key in ("data", "layout")})
        for change in [*figure.get("choices", []), *figure.get("combined", {}).values()]:
            layout = {key.replace(".", "_"): value for key, value in change["layout"].items()}
            built.update_layout(layout)
            for key, values in change["data"].items():
                assert len(values) in (1, len(built.data)), (chart.key, key)
                built.data[0].update({key.replace(".", "_"): values[0]})


BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or ""
needs_browser = pytest.mark.skipif(not BROWSER, reason="Chromium is not installed")


def in_a_browser(path: Path, width: int) -> tuple[str, str]:
    """The page as headless Chromium has built it, and what it said; no name is resolved."""
    names = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-sync disable-component-update enable-logging=stderr virtual-time-budget=20000 "
        "dump-dom"
    )
    options = [f"--{name}" for name in names.split()]
    options += [f"--user-data-dir={path.parent / f'profile-{width}'}", f"--window-size={width},900"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", path.as_uri()]
    done = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


def undrawn(path: Path, charts: int, widths: Sequence[int] = (1280, 390)) -> list[tuple[int, str]]:
    """Widths at which a chart is not drawn, or the console has words (a refused request has)."""
    found = []
    for width in widths:
        document, words = in_a_browser(path, width)
        drawn = re.search(rf'<html[^>]* data-drawn="{charts}"', document) is not None
        if not drawn or document.count('class="main-svg"') < charts or "CONSOLE" in words:
            found.append((width, words[-2000:]))
    return found


def names_of_weights(layers: int) -> list[str]:
    """Names of a student's weights, as the guard logs them."""
    names = ["model.embed_tokens.weight"]
    for layer in range(layers):
        start = f"model.layers.{layer}."
        names += [f"{start}self_attn.{kind}_proj.weight" for kind in "qkvo"]
        names += [f"{start}mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")]
        names += [f"{start}input_layernorm.weight"]
    return [*names, "model.norm.weight"]


def weights_line(step: int, layers: int, growth: float = 0.002) -> dict[str, Any]:
    """Figures of each weight: norms grow, later ones faster, and ranks fall a little."""
    line: dict[str, Any] = {"kind": "weights", "step": step}
    for place, name in enumerate(names_of_weights(layers)):
        grown = 1 + growth * step * (1 + place / 20) * (-0.3 if "q_proj" in name else 1.0)
        line[f"norm:{name}"] = 4.0 * grown
        line[f"spread:{name}"] = 0.02 * grown
        if "norm" not in name:
            line[f"rank:{name}"] = 50.0 - 0.05 * step
    return line


def probe_line(step: int, layers: int, information: float | None = None) -> dict[str, Any]:
    """What the probe sees on its fixed text."""
    told = 3.0 * (1 - math.exp(-step / 40)) if information is None else information
    line: dict[str, Any] = {"kind": "probe", "step": step}
    line |= {"information": told, "output_entropy": 6.0 - told}
    for layer in range(layers):
        line[f"hidden_rank:model.layers.{layer}"] = 30.0 - layer - 0.02 * step
        line[f"attention_entropy:model.layers.{layer}.self_attn"] = 2.0 - 0.1 * layer - 0.001 * step
        dead = min(0.9, 0.02 * layer + 0.0005 * step)
        line[f"dead_units:model.layers.{layer}.mlp.down_proj"] = dead
    return line


def event_line(step: int, action: str, **changes: Any) -> dict[str, Any]:
    """Something that the guard did."""
    words = {"clip": "The gradient was longer than usual."}
    words |= {"rollback": "The loss leapt; back to the last good state."}
    line = {"kind": "event", "step": step, "action": action, "signal": "gradient norm"}
    line |= {"tensor": None, "value": 12.5, "limit": 3.0, "to_step": None, "batch": None}
    return {**line, "words": words.get(action, f"{action} happened."), **changes}


def guarded_lines(steps: int = 200, layers: int = 6) -> list[dict[str, Any]]:
    """A run with a clip, a skipped step, and a rollback from step 125 to 100."""
    down = "model.layers.3.mlp.down_proj.weight"
    lines: list[dict[str, Any]] = []

    def log(step: int, loss: float | None = None) -> None:
        changes = {} if loss is None else {"loss": loss, "kd": loss, "ce": 0.0, "grad_norm": 40.0}
        if step:
            changes |= {"update_ratio": 2e-3 / step**0.5, "clip_limit": 2.5}
            lines.append(train_line(step, **changes))
        if step % 40 == 0:
            lines.append(held_out_line(step, 6.0 / (1 + step / 40)))
        if step % 20 == 0:
            lines.append(probe_line(step, layers))
        if step % 10 == 0:
            lines.append(weights_line(step, layers))

    for step in range(0, 101):
        log(step)
        if step == 30:
            lines.append(event_line(30, "clip"))
        if step == 60:
            skipped = {"batch": [17, 18, 19, 20], "signal": "non-finite gradient"}
            lines.append(event_line(60, "skip_step", tensor=down, **skipped))
    for step in range(101, 126):
        log(step, loss=9.0 + step / 100)
    back = {"to_step": 100, "tensor": down, "signal": "loss"}
    lines.append(event_line(125, "rollback", batch=[33, 34], **back))
    lines.append(event_line(125, "set_aside", batch=[33, 34]))
    for step in range(101, steps + 1):
        log(step)
    return lines


def add_student(path: Path, layers: int = 6, width: int = 64) -> Path:
    """Put a student's weights into a run's folder."""
    (path / "student").mkdir(parents=True, exist_ok=True)
    file = path / "student" / "model.safetensors"
    save_file(weights_of_a_student(layers, width), file)
    return file


def weights_of_a_student(layers: int, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under a student's names; matrices of falling singular values."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name in names_of_weights(layers):
        if "norm" in name:
            found[name] = 1.0 + 0.1 * torch.randn(width, generator=draw)
            continue
        rows = width * (4 if "embed" in name else 2 if "gate_" in name or "up_" in name else 1)
        columns = 2 * width if "down" in name else width
        scale = torch.arange(1, columns + 1) ** -0.4
        found[name] = torch.randn(rows, columns, generator=draw) * scale / width**0.5
    return found
