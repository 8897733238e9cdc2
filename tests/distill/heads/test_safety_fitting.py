"""The safety head's fit: an optimum, calibrated on scenes left out, the same through llama.cpp."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.capture.temporary_files.tokenizer_only import tokenizer_entries
from distill.heads import safety_fitting
from distill.heads.gguf_heads import chances_of, heads_in
from distill.heads.prompt_set import PromptSet
from distill.heads.prompts import SafetyPrompt
from distill.heads.safety_data import SafetyData
from distill.heads.safety_fitting import (
    BUCKETS,
    affordable,
    fit_safety_head,
    read_prompts,
    reading_flops,
)
from students.gguf.metadata import ExportNames
from students.gguf.writer import write_gguf
from students.model.heads import Heads
from students.model.safety_head import token_runs
from teachers import example_teacher
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.support.students import make_student

VOCAB = 1024  # the example teacher's


def part(count: int, seed: int, rule: str, authors: bool = False) -> PromptSet:
    """Prompts of 20 scenes; ``rule``: whether the label is in the words, in the scene, or
    nowhere. ``authors``: the scene is an author's, who has many."""
    random = np.random.default_rng(seed)
    prompts, tokens = [], []
    for number in range(count):
        scene, kind = int(random.integers(20)), int(random.integers(3))
        row = random.integers(300, 900, size=random.integers(3, 9)).astype(np.int32)
        row[0] = 100 + scene
        if rule == "words":
            row[-2:] = (200 + kind, 210 + kind)
        label = {"words": kind, "scene": scene % 3, "nowhere": kind}[rule]
        one = [float(label == place) for place in range(3)]
        label_of, name = (one[0], one[1], one[2]), f"{number if authors else scene}"
        author = f"{scene}" if authors else ""
        prompts.append(SafetyPrompt(str(number), name, "", label_of, author=author))
        tokens.append(row)
    return PromptSet(prompts, tokens, 0)


def data_of(rule: str, train: int = 300, validation: int = 200) -> SafetyData:
    return SafetyData(rule, "0", part(train, 0, rule), part(validation, 1, rule), part(20, 2, rule))


def test_only_what_holds_for_other_scenes_and_authors_counts() -> None:
    """Words that mean the same everywhere are learnt. A label that is the scene's, or its author's
    of many scenes, would be known by heart if that were in training, so nothing is gained, and
    labels that are nowhere neither: then there is no head, and the reason is told."""
    student = make_student(16, 2, VOCAB, heads=True)
    fit = fit_safety_head(student, data_of("words"))
    assert fit.head is not None and not fit.left_out
    assert fit.cross_validation.accuracy > 0.95 and fit.cross_validation.calibration_error < 0.05
    only_scenes = data_of("scene", train=30)
    for prompt in only_scenes.train.prompts:
        assert prompt.scenario.isdigit()
    train = part(60, 3, "nowhere")
    by_author = part(200, 1, "scene", authors=True)
    for data in (
        SafetyData("x", "0", train, only_scenes.validation, only_scenes.test),
        SafetyData("x", "0", train, by_author, only_scenes.test),
        data_of("nowhere"),
    ):
        useless = fit_safety_head(student, data)
        score = useless.cross_validation
        assert useless.head is None and score.cost is not None
        assert score.cost == pytest.approx(score.cost_escalating or 0.0, abs=0.05)
        assert "no less than escalating everything" in useless.left_out


def test_the_head_is_the_optimum() -> None:
    """The gradient of the regularized loss, written out, is 0 at the fit; states that are not known
    count as 0."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(80, 6, generator=generator)
    states[20:50] = 0.0
    read = torch.tensor([*range(20), *range(50, 80)])
    rows = [torch.randperm(BUCKETS, generator=generator)[:9].sort().values] * 5
    rows += [torch.arange(9) + 9 * number for number in range(75)]
    labels = torch.rand(80, 3, generator=generator).softmax(dim=-1)
    weights = torch.rand(80, generator=generator)
    rarity = torch.rand(BUCKETS, generator=generator)
    runs = safety_fitting._sparse(rows, rarity)
    fit = safety_fitting._fit(safety_fitting._Examples(states[read], read, runs, labels, weights))
    dense = torch.zeros(80, BUCKETS)
    for number, row in enumerate(rows):
        dense[number, row] = rarity[row] / 3.0
    chances = (fit.bias + states @ fit.states + dense @ fit.runs).softmax(dim=-1)
    count = float(weights.sum())
    error = (chances - labels) * weights[:, None] / count
    for slope, weight, decay in (
        (states.T @ error, fit.states, safety_fitting.STATES_DECAY),
        (dense.T @ error, fit.runs, safety_fitting.RUNS_DECAY),
        (error.sum(dim=0, keepdim=True), fit.bias, 0.0),
    ):
        assert float((slope + 2 * decay * weight / count).abs().max()) < 2e-4


def test_the_exported_file_decides_alike(tmp_path: Path) -> None:
    """Through llama.cpp, from the file alone: the probabilities of PyTorch, to 1e-3 in F32."""
    student = make_student(64, 3, VOCAB, heads=True)
    data = data_of("words")
    fit = fit_safety_head(student, data)
    student.replace_safety_head(fit.head)
    assert fit.head is not None
    shape = fit.head.shape
    features = read_prompts(student, shape, data.test, lambda done: None)
    wanted = Heads(fit.head, None).probabilities(features, data.test.tokens)
    tokenizer = tokenizer_entries(read_gguf(example_teacher()))
    for quant, most in (("f32", 1e-3), ("q8_0", 2e-2)):
        path = tmp_path / f"{quant}.gguf"
        write_gguf(student, path, quant, tokenizer, ExportNames("judge", {}))
        with GGUFTeacher(path, threads=1) as model:
            heads = heads_in(model.file)
            found = chances_of(model, heads, data.test.tokens)
        assert heads.safety is not None and torch.equal(heads.safety.runs, fit.head.runs)
        assert float((found - wanted).abs().max()) < most, quant
        assert torch.equal(heads.decide(found), heads.decide(wanted)), quant


def test_the_same_prompts_give_the_same_head() -> None:
    """To the bit, whatever the order in which the student reads them."""
    student = make_student(16, 2, VOCAB, heads=True)
    first, again = (fit_safety_head(student, data_of("words", 60, 70)).head for _ in range(2))
    assert first is not None and again is not None
    weights = again.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in first.state_dict().items())


def test_a_large_student_reads_some_of_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as it may spend on them; the others are in no figure, but their words are learnt."""
    student, data = make_student(16, 2, VOCAB, heads=True), data_of("words")
    monkeypatch.setattr(safety_fitting, "READ_FLOPS", reading_flops(student, data) * 120.5)
    monkeypatch.setattr(safety_fitting, "LEAST_READ", 30)
    read: list[int] = []
    some = affordable(student, data)
    fit = fit_safety_head(student, data, read.append)
    assert fit.cross_validation.prompts == len(some.validation) == 120
    assert max(read) == len(some) == 240
    some = affordable(student, data, 30)
    parts = data.train.some(some.train), data.validation.some(some.validation)
    without = replace(data, train=parts[0], validation=parts[1])
    found = fit_safety_head(student, data, read=some).cross_validation
    assert found.prompts == 30 and found.accuracy == 1.0
    assert fit_safety_head(student, without).cross_validation.accuracy < 0.9


def test_rarity_is_in_the_heads_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's head weighs each run as the fit did, its rarity included: the same direction.
    Runs that no prompt has weigh nothing."""
    student, data = make_student(16, 2, VOCAB, heads=True), data_of("words", 60, 70)
    found = [token_runs(row, BUCKETS) for row in (*data.train.tokens, *data.validation.tokens)]
    present = torch.cat(found).unique()
    generator = torch.Generator().manual_seed(0)
    rarity = torch.rand(len(present), generator=generator) + 0.05
    fitted, fit = [], safety_fitting._fit
    monkeypatch.setattr(safety_fitting, "_rarity", lambda rows: rarity)
    monkeypatch.setattr(
        safety_fitting, "_fit", lambda *args: fitted.append(fit(*args)) or fitted[-1]
    )
    head = fit_safety_head(student, data).head
    assert head is not None and head.runs is not None
    wanted = torch.zeros(BUCKETS, 3).index_add(0, present, fitted[-1].runs * rarity[:, None])
    alike = torch.nn.functional.cosine_similarity(head.runs.flatten(), wanted.flatten(), dim=0)
    assert float(alike) > 0.995  # kept in 8 bits
    others = torch.ones(BUCKETS, dtype=torch.bool).index_fill(0, present, False)
    assert len(present) < BUCKETS / 2 and not head.runs[others].any()
