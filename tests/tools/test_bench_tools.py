"""What the benchmark tools measure is what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tools.bench import packing, step
from tools.bench.step import StepJob, Trainee, make_material
from tools.machine import peak_memory
from tools.peers.headline import (
    DONE,
    ENDED,
    PROCESSOR,
    Job,
    Timing,
    sequences_of_text,
    stages_and_gaps,
)
from tools.peers.live_distillation import LiveJob, LlamaShape, live_loss, make_teacher, run

TINY = StepJob(size="32x1", batch=2, tokens=9, vocab_size=200, teacher_width=16, precision="fp32")


def live_job(folder: Path = Path(), **changes: Any) -> LiveJob:
    """A job with its files in a folder."""
    usual = LiveJob(
        tokens=str(folder / "tokens.npy"),
        teacher=str(folder / "teacher"),
        out=str(folder / "student"),
        marks=str(folder / "marks.json"),
        student=LlamaShape(60, 16, 1, 2, 2, 32, 32),
        epochs=2,
        batch_size=4,
        temperature=3.0,
        alpha=0.7,
        beta=0.3,
        learning_rate=0.01,
    )
    return replace(usual, **changes)


def test_both_steps_have_the_same_loss_and_gradient() -> None:
    """A teacher as wide as its sketch has directions: nothing but rounding lies between the two."""
    batch, probabilities = make_material(TINY)
    plain = step.plain_loss(TINY, batch.tokens, probabilities)
    losses = {"ours": step.our_loss(TINY, batch), "plain": plain}
    values, gradients = {}, {}
    for side, loss in losses.items():
        student = Trainee(TINY, loss).student
        value = loss(student)
        value.backward()
        values[side] = float(value.detach())
        found = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        gradients[side] = torch.cat(found)
    assert values["ours"] == pytest.approx(values["plain"], rel=1e-3)
    difference = (gradients["ours"] - gradients["plain"]).norm()
    assert difference < 0.02 * gradients["plain"].norm()


def test_live_loss_is_forward_kl_and_cross_entropy() -> None:
    """Against sums written out in float64; zero where both models say the same."""
    draw = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 2, 5, 60, generator=draw).double()
    tokens = torch.randint(0, 60, (2, 5), generator=draw)
    job = live_job()
    divergence, cross_entropy = live_loss(ours, theirs, tokens, job)
    p, q = (torch.softmax(logits[:, :-1] / 3.0, dim=-1) for logits in (theirs, ours))
    expected = 9.0 * (p * (p.log() - q.log())).sum(dim=-1).mean()
    plain = torch.softmax(ours[:, :-1], dim=-1).gather(-1, tokens[:, 1:, None])
    assert float(divergence) == pytest.approx(float(expected), rel=1e-4)
    assert float(cross_entropy) == pytest.approx(float(-plain.log().mean()), rel=1e-4)
    assert float(live_loss(ours, ours, tokens, job)[0]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("precision", ["autocast", "bf16", "fp32"])
def test_live_distillation_runs_and_saves(tmp_path: Path, precision: str) -> None:
    """Every part has its time, every step is done, the student can be loaded."""
    tokens = np.random.default_rng(0).integers(0, 60, (6, 8)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    job = live_job(tmp_path, precision=precision)
    make_teacher(LlamaShape(60, 32, 1, 2, 2, 64, 32), tmp_path / "teacher", precision)
    job.write(tmp_path / "job.json")
    assert LiveJob.read(tmp_path / "job.json") == job
    run(job)
    assert (tmp_path / "student" / "model.safetensors").exists()
    assert '"steps": 4' in (tmp_path / "marks.json").read_text()


class ByteTeacher:
    """Tokenises into bytes, after a space that it puts in front."""

    info = SimpleNamespace(add_bos=True, bos=1)

    def tokenize(
        self, texts: Sequence[str], *, add_special: bool, parse_special: bool
    ) -> list[Any]:
        """Two tokens of space, then one a character."""
        return [np.array([9, 9, *text.encode()], dtype=np.int32) for text in texts]


def test_sequences_have_exactly_the_length_asked_for() -> None:
    teacher: Any = ByteTeacher()
    texts, tokens = sequences_of_text(teacher, 5, 24)
    assert len(set(texts)) == 5 and all(len(ids) == 24 and ids[0] == 1 for ids in tokens)
    assert Job(teacher=teacher, samples=100, epochs=5, batch_size=4).steps == 125


def test_parts_add_up_to_the_whole() -> None:
    """Stages, what lies before each, and the end; the finished file lies within them."""
    timing = Timing(
        0.0, 9.5, {"✓ Train   2.0 s": 5.0, "✓ Export and prove   3.0 s  x": 9.6}, 11.0, 20.0
    )
    parts = stages_and_gaps({"Train": 2.0, "Export and prove": 3.0}, timing)
    assert parts["before: Train"] == pytest.approx(3.0)
    assert parts["before: Export and prove"] == pytest.approx(1.6)
    whole = sum(value for name, value in parts.items() if name not in (DONE, ENDED, PROCESSOR))
    assert whole == pytest.approx(11.0)
    assert parts[DONE] == 9.5 and parts[ENDED] == 11.0


def test_packed_and_padded_learn_the_same() -> None:
    """Every loss and the last score; batches of tokens pad no more, random ones much more."""
    job = packing.PackingJob("16x1", vocab_size=100, sequences=24, batch=4, precision="fp32")
    found = packing.compare(job, packing.SIDES, rounds=1)
    assert found["packed"]["largest_loss_difference"] < 1e-5
    assert found["packed"]["last_kl"] == pytest.approx(found["padded"]["last_kl"], rel=1e-5)
    shares = [found[side]["padding"] for side in ("packed", "padded", "in random order")]
    assert shares == sorted(shares) and found["by tokens"]["padding"] < shares[1]


def test_peak_memory_sees_what_a_block_needs() -> None:
    """Memory that was freed before does not count, memory that is freed within does."""
    torch.ones(32 << 20).sum()
    with peak_memory(torch.device("cpu")) as peak:
        torch.ones(16 << 20).sum()
    assert 64e6 <= peak.extra <= 80e6


def test_trainee_reads_what_was_saved(tmp_path: Path) -> None:
    """Both sides load and step; a step changes the student."""
    sizes = step.save_material(TINY, tmp_path)
    assert sizes["plain"]["positions"] == 4 * TINY.positions * TINY.vocab_size
    for side in ("ours", "plain"):
        one = step.trainee(side, TINY, tmp_path)
        before = one.student.lm_head.weight.detach().clone()
        assert torch.isfinite(one.step())
        assert not torch.equal(before, one.student.lm_head.weight)
