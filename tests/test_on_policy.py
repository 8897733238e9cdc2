"""Texts in the student's own words: how they are written, what the teacher says of them, and learning from them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distill.batches import load_batch, split
from distill.config import LossConfig, TrainConfig
from distill.engine import TrainingData, TrainingSummary, train
from distill.errors import UserError
from distill.launched import require_trainable
from distill.losses import IGNORE_INDEX
from distill.objective import Batch, Objective, build_objective
from distill.on_policy import OwnWords, continue_texts
from students.model import SO8TForCausalLM
from teachers.base import Tokens
from teachers.recipe import Recipe
from teachers.store import SoftTargetStore
from tests.conftest import BigramTeacher, make_student, write_store
from tests.test_engine import TRAIN, Killed, read_metrics, save_all_the_time

VOCAB, WIDTH = 48, 16
RECIPES = {
    "buckets": Recipe(num_topk=8),
    "sketch": Recipe(num_topk=8, sketch_bytes=10, layers=(0, 1), layer_bytes=12),
    "hidden": Recipe("hidden"),
    "dense": Recipe("dense"),
}
TEACHER = BigramTeacher(VOCAB, WIDTH)


def make_store(folder: Path, kind: str = "sketch") -> SoftTargetStore:
    """What the teacher says about 24 random sequences."""
    random = np.random.default_rng(0)
    rows = [random.integers(0, VOCAB, size=random.integers(4, 14)).astype(np.int32) for _ in range(24)]
    return write_store(folder, TEACHER, rows, RECIPES[kind], 10)


def own_words(store: SoftTargetStore, share: float = 1.0, eos: int | None = None, seed: int = 3) -> OwnWords:
    return OwnWords(TEACHER, store, share, 1.2, seed, eos)  # type: ignore[arg-type]


def fresh_student() -> SO8TForCausalLM:
    return make_student(16, 2, VOCAB)


# -- writing -----------------------------------------------------------------------------------------------


def starts_and_draws(count: int = 7) -> tuple[list[Tokens], list[NDArray[np.float64]]]:
    """Beginnings of 1 to 9 tokens, and 1 to 12 random numbers for each."""
    random = np.random.default_rng(5)
    starts = [random.integers(0, VOCAB, random.integers(1, 10)).astype(np.int32) for _ in range(count)]
    return starts, [random.random(random.integers(1, 13)) for _ in range(count)]


@torch.no_grad()
def written_slowly(
    student: SO8TForCausalLM,
    start: Tokens,
    draws: NDArray[np.float64],
    temperature: float,
    eos: int | None = None,
) -> list[int]:
    """One text, everything computed again for each token: the first one whose cumulative probability is passed."""
    tokens = start.tolist()
    for draw in draws:
        logits = student(torch.tensor([tokens])).logits[0, -1].double()
        reached = 0.0
        for token, probability in enumerate((logits / temperature).softmax(-1).tolist()):  # noqa: B007
            reached += probability
            if reached > draw:
                break
        tokens.append(token)
        if token == eos:
            break
    return tokens


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_texts_are_those_of_a_slow_loop(temperature: float) -> None:
    """Beginnings of different length, together and with a cache: the same tokens as one by one without."""
    student, (starts, draws) = fresh_student(), starts_and_draws()
    found = continue_texts(student, starts, draws, temperature, None)
    expected = [
        written_slowly(student, start, draw, temperature) for start, draw in zip(starts, draws, strict=True)
    ]
    assert [text.tolist() for text in found] == expected
    assert all(text.dtype == np.int32 for text in found)
    assert [len(text) for text in found] == [len(s) + len(d) for s, d in zip(starts, draws, strict=True)]
    other = continue_texts(student, starts, [1.0 - draw for draw in draws], temperature, None)
    assert [text.tolist() for text in other] != expected


def test_company_does_not_matter() -> None:
    """Each text alone is what it is among others."""
    student, (starts, draws) = fresh_student(), starts_and_draws()
    together = continue_texts(student, starts, draws, 1.0, None)
    for start, draw, text in zip(starts, draws, together, strict=True):
        assert continue_texts(student, [start], [draw], 1.0, None)[0].tolist() == text.tolist()


def test_a_text_ends_with_eos() -> None:
    """With it and nothing after it; one that was given already ends nothing; others go on."""
    student, (starts, draws) = fresh_student(), starts_and_draws()
    free = continue_texts(student, starts, draws, 1.0, None)
    long = max(range(len(draws)), key=lambda row: len(draws[row]))
    eos = int(free[long][len(starts[long]) + 1])
    other = long - 1
    starts[other] = np.append(starts[other], np.int32(eos))
    found = continue_texts(student, starts, draws, 1.0, eos)
    expected = [written_slowly(student, s, d, 1.0, eos) for s, d in zip(starts, draws, strict=True)]
    assert [text.tolist() for text in found] == expected
    assert found[long].tolist() == free[long][: len(found[long])].tolist()
    assert found[long][-1] == eos and len(found[long]) <= len(starts[long]) + 2 < len(free[long])
    assert len(found[other]) > len(starts[other])
    assert sum(len(text) for text in found) > sum(len(start) for start in starts) + len(starts)


@pytest.mark.parametrize("training", [True, False])
def test_writing_leaves_the_student_as_it_was(training: bool) -> None:
    """Its mode, its weights, and no gradient."""
    student, (starts, draws) = fresh_student().train(training), starts_and_draws(2)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    continue_texts(student, starts, draws, 1.0, None)
    assert student.training == training and all(p.grad is None for p in student.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


# -- batches -----------------------------------------------------------------------------------------------


def rows_of(batch: Batch) -> list[tuple[list[int], int]]:
    """The tokens of each sequence of a batch, and how many of them are given."""
    given = batch.lengths if batch.given is None else batch.given
    rows = zip(batch.tokens, batch.lengths.tolist(), given.tolist(), strict=True)
    return [(tokens[:length].tolist(), known) for tokens, length, known in rows]


def assert_same_tensors(found: object, expected: object, rtol: float = 0.0) -> None:
    """Every tensor of two records of the same kind."""
    assert type(found) is type(expected)
    compared = 0
    for field in fields(expected):  # type: ignore[arg-type]
        mine, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol)
            compared += 1
    assert compared


@pytest.mark.parametrize("kind", RECIPES)
def test_a_share_of_nothing_is_the_stored_batch(tmp_path: Path, kind: str) -> None:
    """Tensor by tensor."""
    store = make_store(tmp_path, kind)
    found, expected = own_words(store, share=0.0)(fresh_student(), [4, 1, 9], 2), load_batch(store, [4, 1, 9])
    assert_same_tensors(found, expected)
    assert_same_tensors(found.targets, expected.targets)
    assert found.given is None and found.layers.keys() == expected.layers.keys()


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_what_is_written_is_scored_by_the_teacher(tmp_path: Path, kind: str, share: float) -> None:
    """Each row keeps a beginning of its sequence; targets and layer states are the teacher's for the row."""
    store, indices = make_store(tmp_path, kind), [4, 1, 9, 16, 7, 20]
    batch = own_words(store, share)(fresh_student(), indices, step=5)
    rows = rows_of(batch)
    assert len(rows) == len(indices) and batch.count() == sum(len(row) - 1 for row, _ in rows)
    originals = {index: store.tokens(index).tolist() for index in indices}
    places = {}
    for place, (row, given) in enumerate(rows):
        (index,) = (i for i in indices if i not in places and originals[i][:given] == row[:given])
        places[index] = place
        assert 1 <= given <= len(row) == len(originals[index])
    own = [given < len(row) for row, given in rows]
    assert all(own) if share == 1.0 else 0 < sum(own) < len(own)

    companion = store.companion()
    bases = companion.bases if companion else {}
    start, labels = 0, batch.labels
    for row, given in rows:
        arrays = TEACHER.score([np.array(row, np.int32)], store.manifest.recipe, bases)
        span = slice(start, start + len(row) - 1)
        assert_same_tensors(batch.targets.select(span), store.typed_targets(arrays), rtol=1e-5)
        for layer, states in store.typed_layers(arrays).items():
            torch.testing.assert_close(batch.layers[layer][span], states)
        expected = [token if at < given else IGNORE_INDEX for at, token in enumerate(row)]
        assert labels[span].tolist() == expected[1:]
        start = span.stop
    assert start == len(labels) and set(batch.layers) == set(store.manifest.recipe.layers)


def test_what_is_written_depends_on_seed_step_and_sequence_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on the batch it is in, nor on the order; another seed, step or sequence gives something else."""
    store, student, indices = make_store(tmp_path), fresh_student(), list(range(12))
    words = own_words(store, share=0.5)
    whole = sorted(rows_of(words(student, indices, 5)))
    assert sorted(rows_of(words(student, indices[::-1], 5))) == whole
    parts = [rows_of(words(student, indices[at : at + 3], 5)) for at in range(0, 12, 3)]
    assert sorted(row for part in parts for row in part) == whole
    assert sorted(rows_of(words(student, indices, 6))) != whole
    assert sorted(rows_of(own_words(store, 0.5, seed=4)(student, indices, 5))) != whole
    cuts = {words._cut(100, index, step) for index in range(10) for step in range(10)}
    assert len(cuts) > 50 and min(cuts) >= 1 and max(cuts) <= 99
    monkeypatch.setattr(OwnWords, "_cut", lambda *_: 1)  # the same beginnings, other words
    first, second = (rows_of(own_words(store)(student, indices, step)) for step in (5, 6))
    assert all(one[0][0] == other[0][0] for one, other in zip(first, second, strict=True))
    assert sum(one != other for one, other in zip(first, second, strict=True)) > 8


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_is_kept_on_average(tmp_path: Path, share: float) -> None:
    """Over many sequences and steps, whatever the batch."""
    words = own_words(make_store(tmp_path), share)
    chosen = [words._is_chosen(index, step) for index in range(40) for step in range(40)]
    assert np.mean(chosen) == pytest.approx(share, abs=0.03)
    assert words._cut(2, 0, 0) == 1  # the shortest sequence keeps one token, and one is written


def test_texts_that_end_early_are_short(tmp_path: Path) -> None:
    """With a token that ends a text: rows may be shorter, and the last token of those is that one."""
    store, student = make_store(tmp_path), fresh_student()
    free = rows_of(own_words(store)(student, list(range(24)), 0))
    written = np.concatenate([row[given:] for row, given in free])
    eos = int(np.bincount(written).argmax())
    rows = rows_of(own_words(store, eos=eos)(student, list(range(24)), 0))
    shorter = [row for (row, _), (before, _) in zip(rows, free, strict=True) if len(row) < len(before)]
    assert shorter and all(row[-1] == eos for row in shorter)
    assert all(row == before[: len(row)] for (row, _), (before, _) in zip(rows, free, strict=True))


def test_the_students_words_are_not_imitated(tmp_path: Path) -> None:
    """Cross-entropy of the given tokens alone; the divergence of every position."""
    store, student = make_store(tmp_path), fresh_student()
    batch = own_words(store)(student, list(range(12)), 1)
    config = LossConfig(lambda_so8t=0.0, gamma=0.0, temperature=1.0)
    _, parts = Objective(config)(student, batch, total=batch.count(), share=1.0, fraction=0.0)
    surprise = 0.0
    for row, given in rows_of(batch):
        with torch.no_grad():
            log_probs = student(torch.tensor([row])).logits[0].double().log_softmax(-1)
        surprise -= sum(float(log_probs[place - 1, row[place]]) for place in range(1, given))
    assert float(parts["ce"]) == pytest.approx(config.beta * surprise / batch.count(), rel=1e-5)
    everything = replace(batch, given=None)
    _, others = Objective(config)(student, everything, total=batch.count(), share=1.0, fraction=0.0)
    assert others["kd"] == parts["kd"] and float(others["ce"]) > float(parts["ce"]) > 0


# -- training ----------------------------------------------------------------------------------------------


def run(
    store: SoftTargetStore, folder: Path, share: float = 0.5, kill_at: int = -1, epochs: int = 3
) -> tuple[SO8TForCausalLM, TrainingSummary]:
    """A training run with the student's own words."""
    student = fresh_student()
    folder.mkdir(exist_ok=True)

    def report(step: int, text: str) -> None:
        if step == kill_at:
            raise Killed

    data = TrainingData(store, split(store, 0.2, 0), 0)
    objective = build_objective(LossConfig(temperature=2.0), store, student, 2, 0)
    config = TRAIN.model_copy(update={"on_policy": share, "epochs": epochs})
    return student, train(student, data, objective, config, folder, report, own_words(store, share))


@pytest.mark.parametrize("kind", RECIPES)
def test_the_student_learns_from_its_own_words(tmp_path: Path, kind: str) -> None:
    """The held-out KL on other people's text falls, though the student never sees a whole one in training."""
    _, summary = run(make_store(tmp_path / "store", kind), tmp_path / "run", share=1.0, epochs=8)
    assert summary.scores[-1][1].kl < 0.93 * summary.scores[0][1].kl


def test_a_killed_run_goes_on_with_the_same_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights and the same log as without the kill; other weights than without own words."""
    save_all_the_time(monkeypatch)
    store = make_store(tmp_path / "store")
    student, summary = run(store, tmp_path / "whole")
    with pytest.raises(Killed):
        run(store, tmp_path / "cut", kill_at=7)
    continued, second = run(store, tmp_path / "cut")
    assert second.continued_from == 6 and second.scores == summary.scores
    assert second.tokens_seen == summary.tokens_seen
    assert read_metrics(tmp_path / "cut" / "metrics.jsonl") == read_metrics(
        tmp_path / "whole" / "metrics.jsonl"
    )
    for one, other in zip(student.parameters(), continued.parameters(), strict=True):
        assert torch.equal(one, other)
    reader, _ = run(store, tmp_path / "reader", share=0.0)
    assert not torch.equal(reader.model.embed_tokens.weight, student.model.embed_tokens.weight)


def test_several_processes_are_refused() -> None:
    """One teacher scores for one process; the setting is named."""
    require_trainable(TrainConfig(on_policy=0.5), 1)
    require_trainable(TrainConfig(), 2)
    with pytest.raises(UserError, match=r"train\.on_policy = 0\.5 works in one process, not in 2"):
        require_trainable(TrainConfig(on_policy=0.5), 2)
