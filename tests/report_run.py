"""Folders of runs as a report reads them, made by hand; and a page as a parser and as a browser see it."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console as RichConsole
from safetensors.torch import save_file

from distill.config import load_config
from distill.reports.report import read_report
from distill.reports.text import print_report

HOSTILE = "</script><script>alert(1)</script>{{ 7*7 }}<img src=x onerror=alert(2)> [red]\x1b[31m"
MAX_BYTES = 6_000_000
STEPS = 60


def train_line(step: int, **changes: float | None) -> dict[str, Any]:
    """One line of a healthy training."""
    loss = 5.0 * math.exp(-step / 30) + 1.0 + 0.05 * math.sin(7 * step)
    line = {"loss": loss, "kd": 0.7 * loss, "ce": 0.3 * loss - 0.01, "pet": 0.01, "safety": 0.0}
    line |= {"second_difference": 0.3, "grad_norm": 2.0 + 0.1 * math.cos(step), "learning_rate": 1e-3 / step}
    line |= {"rotation_error": 2e-7, "min_commutator": 0.05, "mean_commutator": 0.07, "rotation_drift": 1e-4}
    return {"kind": "train", "step": step, **line, "tokens_seen": 100 * step, **changes}


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


def safety_score(confusion: list[list[int]]) -> dict[str, Any]:
    count = sum(map(sum, confusion))
    right = sum(confusion[place][place] for place in range(3))
    ratio = {
        f"{name}_{kind}": 0.5 for name in ("refuse", "escalate", "allow") for kind in ("recall", "precision")
    }
    score = {"labels": ["ALLOW", "ESCALATE", "REFUSE"], "prompts": count, "accuracy": right / count}
    return {**score, **ratio, "refuse_recall": 0.98, "calibration_error": 0.1, "confusion": confusion}


def results_of_a_run(teacher: str) -> dict[str, Any]:
    """A ``results.json`` as ``distill.results`` writes it."""
    score = {"kl": 1.5, "agreement": 0.4, "cross_entropy": 1.5, "perplexity": 4.5}
    cascade = [
        {"escalated": x / 10, "agreement": min(1.0, 0.4 + 0.075 * x), "threshold": x / 10} for x in range(11)
    ]
    held_out = [line for line in lines_of_a_run() if line["kind"] == "held_out"]
    return {
        "teacher": {"name": teacher, "architecture": "phi3", "parameters": 4_787_456, "file_bytes": 5_133_792}
        | {"vocab_size": 1024, "width": 256, "layers": 6, "sha256": "ab" * 32, "shape": {"heads": 4}},
        "student": {"size": "64x2", "parameters": 177_700, "file_bytes": 238_500, "quant": "q8_0"},
        "soft_targets": {
            "folder": "/tmp/store",
            "sequences": 40,
            "tokens": 4000,
            "bytes": 90_000,
            "reused": True,
        }
        | {"recipe": {"kind": "compact", "num_topk": 16}},
        "training": {"steps": STEPS, "planned_steps": STEPS, "best_step": STEPS, "tokens_seen": 6000}
        | {"seconds": 12.5, "continued_from_step": 0, "precision": "fp32", "held_out": held_out},
        "evaluation": {"against": "teacher", "positions": 100, "kl_over": "whole vocabulary"}
        | {"teacher": {"cross_entropy": 0.2, "perplexity": 1.2, "approximate": False}}
        | {"before": score, "after": score, "exported": score},
        "heads": {
            "safety": {
                "labels_from": "builtin",
                "prompts_sha256": "cd" * 32,
                "prompts": {"train": 30, "validation": 10, "test": 12},
                "scenarios": {"train": 9, "validation": 3, "test": 3},
                "thresholds": {"refuse": 0.3, "allow": 0.5},
                "test": safety_score([[1, 1, 2], [0, 2, 2], [0, 0, 4]]),
                "languages": {"en": safety_score([[1, 0, 1], [0, 1, 1], [0, 0, 2]])},
            },
            "verification": {
                "trust": 0.6,
                "positions": 100,
                "agreement": 0.4,
                "auroc": 0.8,
                "cascade": cascade,
            }
            | {
                "calibration_error": 0.05,
                "reliability": [{"count": 9, "mean_probability": 0.5, "share_true": 0.4}],
            },
        },
        "proof": {"quant": "q8_0", "positions": 90, "max_logit_difference": 0.1, "mean_kl": 3e-5}
        | {"agreement": 0.99, "token_lines": 64},
        "rotations": {
            "max_orthogonality_error": 2e-7,
            "min_commutator_norm": 0.05,
            "mean_commutator_norm": 0.07,
        },
        "tokens_per_second": {"student": {"prompt": 1000.0, "generation": 500.0}},
        "stage_seconds": {"Train": 12.5},
        "environment": {"python": "3.11.7", "machine": "x86_64", "cpu": "AVX2", "threads": 2}
        | {"packages": {"torch": "2.13.0", "numpy": "2.4.6"}},
    }


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
    logged = lines_of_a_run() if lines is None else lines
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    if finished:
        (path / "results.json").write_text(json.dumps(results_of_a_run(teacher)))
    return path


def said(path: Path) -> str:
    return "\n".join(f"{fact.level}: {fact.text}" for fact in read_report(path).verdict)


def printed(path: Path) -> str:
    console = RichConsole(file=io.StringIO(), width=200, highlight=False)
    print_report(read_report(path), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


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


def in_a_browser(path: Path, width: int) -> tuple[str, str]:
    """The page as headless Chromium has built it, and what the browser said; no name is resolved meanwhile."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("Chromium is not installed: the page was not opened in a browser")
    names = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync "
        "disable-component-update enable-logging=stderr virtual-time-budget=20000 dump-dom"
    )
    options = [f"--{name}" for name in names.split()]
    options += [f"--user-data-dir={path.parent / f'profile-{width}'}", f"--window-size={width},900"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", path.as_uri()]
    done = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


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
    """Figures of each weight: norms grow with the step, later ones faster, and ranks fall a little."""
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
    line: dict[str, Any] = {"kind": "probe", "step": step, "information": told, "output_entropy": 6.0 - told}
    for layer in range(layers):
        line[f"hidden_rank:model.layers.{layer}"] = 30.0 - layer - 0.02 * step
        line[f"attention_entropy:model.layers.{layer}.self_attn"] = 2.0 - 0.1 * layer - 0.001 * step
        line[f"dead_units:model.layers.{layer}.mlp.down_proj"] = min(0.9, 0.02 * layer + 0.0005 * step)
    return line


def event_line(step: int, action: str, **changes: Any) -> dict[str, Any]:
    """Something that the guard did."""
    words = {
        "clip": "The gradient was longer than usual.",
        "rollback": "The loss leapt; back to the last good state.",
    }
    line = {"kind": "event", "step": step, "action": action, "signal": "gradient norm", "tensor": None}
    line |= {"value": 12.5, "limit": 3.0, "to_step": None, "batch": None}
    return {**line, "words": words.get(action, f"{action} happened."), **changes}


def guarded_lines(steps: int = 200, layers: int = 6) -> list[dict[str, Any]]:
    """A run with a clip, a skipped step, and a rollback from step 125 to 100 whose steps come again."""
    down = "model.layers.3.mlp.down_proj.weight"
    lines: list[dict[str, Any]] = []

    def log(step: int, loss: float | None = None) -> None:
        changes = {} if loss is None else {"loss": loss, "kd": loss, "ce": 0.0, "grad_norm": 40.0}
        if step:
            lines.append(train_line(step, **{"update_ratio": 2e-3 / step**0.5, "clip_limit": 2.5, **changes}))
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
            lines.append(
                event_line(60, "skip_step", batch=[17, 18, 19, 20], signal="non-finite gradient", tensor=down)
            )
    for step in range(101, 126):
        log(step, loss=9.0 + step / 100)
    lines.append(event_line(125, "rollback", to_step=100, tensor=down, batch=[33, 34], signal="loss"))
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
        rows = 4 * width if "embed" in name else 2 * width if "gate_" in name or "up_" in name else width
        columns = 2 * width if "down" in name else width
        plain = torch.randn(rows, columns, generator=draw)
        scale = torch.arange(1, columns + 1) ** -0.4
        found[name] = plain * scale / width**0.5
    return found
