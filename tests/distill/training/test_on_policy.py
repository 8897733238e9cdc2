"""Texts that the student generates: sampling, the teacher's scores, what is learned."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from distill.config.schema import LossConfig, TrainConfig
from distill.errors import UserError
from distill.losses.batch import Batch
from distill.losses.divergences import IGNORE_INDEX
from distill.losses.objective import Objective, build_objective
from distill.runtime.launch_environment import require_trainable
from distill.training.data import TrainingData, load_batch, split
from distill.training.engine import TrainingJob, train
from distill.training.on_policy import OnPolicyBatches, continue_texts
from distill.training.summary import TrainingSummary
from students.model.decoder import SO8TForCausalLM
from teachers.base import Tokens
from teachers.store.store import SoftTargetStore
from teachers.targets.recipe import Recipe
from tests.support.stores import write_store
from tests.support.teachers import BigramTeacher
from tests.support.training import (
    TRAIN,
    VOCAB,
    WIDTH,
    Killed,
    fresh_student,
    killer,
    read_metrics,
    save_all_the_time,
)

RECIPES = {
    "buckets": Recipe(num_topk=8),
    "sketch": Recipe(num_topk=8, sketch_bytes=10, layers=(0, 1), layer_bytes=12),
    "hidden": Recipe("hidden"),
    "dense": Recipe("dense"),
}
TEACHER = BigramTeacher(VOCAB, WIDTH)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SoftTargetStore]:
    """What the teacher says about 24 random sequences, by kind of targets."""
    random = np.random.default_rng(0)
    lengths = (random.integers(4, 14) for _ in range(24))
    rows = [random.integers(0, VOCAB, size=length).astype(np.int32) for length in lengths]
    folder = tmp_path_factory.mktemp("stores")
    return {
        kind: write_store(folder / kind, TEACHER, rows, recipe, 10)
        for kind, recipe in RECIPES.items()
    }


@pytest.fixture
def store(stores: dict[str, SoftTargetStore]) -> SoftTargetStore:
    return stores["sketch"]


def on_policy(
    store: SoftTargetStore, share: float = 1.0, eos: int | None = None, seed: int = 3
) -> OnPolicyBatches:
    return OnPolicyBatches(TEACHER, store, share, 1.2, seed, eos)  # type: ignore[arg-type]


def prefixes_and_draws(count: int = 7) -> tuple[list[Tokens], list[NDArray[np.float64]]]:
    """Beginnings of 1 to 9 tokens, and 1 to 12 random numbers for each."""
    random = np.random.default_rng(5)
    lengths = (random.integers(1, 10) for _ in range(count))
    prefixes = [random.integers(0, VOCAB, length).astype(np.int32) for length in lengths]
    return prefixes, [random.random(random.integers(1, 13)) for _ in range(count)]


@torch.no_grad()
def written_slowly(
    student: SO8TForCausalLM,
    start: Tokens,
    draws: NDArray[np.float64],
    temperature: float,
    eos: int | None = None,
) -> list[int]:
    """One text, all computed again for each token: the first that cumulative probability passes."""
    tokens = start.tolist()
    for draw in draws:
        logits = student(torch.tensor([tokens])).logits[0, -1].double()
        reached = 0.0
        probabilities = (logits / temperature).softmax(-1).tolist()
        for token, probability in enumerate(probabilities):  # noqa: B007
            reached += probability
            if reached > draw:
                break
        tokens.append(token)
        if token == eos:
            break
    return tokens


def test_texts_are_those_of_a_slow_loop() -> None:
    """Beginnings of different length, together and with a cache: what each alone gives without."""
    student, (prefixes, draws) = fresh_student(), prefixes_and_draws()
    pairs = list(zip(prefixes, draws, strict=True))
    for temperature in (0.5, 1.0, 2.0):
        texts = continue_texts(student, prefixes, draws, temperature, None)
        found = [text.tolist() for text in texts]
        expected = [written_slowly(student, *pair, temperature) for pair in pairs]
        assert found == expected, temperature
        assert all(text.dtype == np.int32 for text in texts), temperature
        assert [len(text) for text in texts] == [len(s) + len(d) for s, d in pairs], temperature
        others = [1.0 - draw for draw in draws]
        texts = continue_texts(student, prefixes, others, temperature, None)
        assert [text.tolist() for text in texts] != expected, temperature
        for (start, draw), text in zip(pairs, found, strict=True):
            alone = continue_texts(student, [start], [draw], temperature, None)
            assert alone[0].tolist() == text, temperature


def test_a_text_ends_with_eos() -> None:
    """With it and nothing after it; one that was given already ends nothing; others go on."""
    student, (prefixes, draws) = fresh_student(), prefixes_and_draws()
    free = continue_texts(student, prefixes, draws, 1.0, None)
    long = max(range(len(draws)), key=lambda row: len(draws[row]))
    eos = int(free[long][len(prefixes[long]) + 1])
    other = long - 1
    prefixes[other] = np.append(prefixes[other], np.int32(eos))
    found = continue_texts(student, prefixes, draws, 1.0, eos)
    expected = [
        written_slowly(student, s, d, 1.0, eos) for s, d in zip(prefixes, draws, strict=True)
    ]
    assert [text.tolist() for text in found] == expected
    assert found[long].tolist() == free[long][: len(found[long])].tolist()
    assert found[long][-1] == eos and len(found[long]) <= len(prefixes[long]) + 2 < len(free[long])
    assert len(found[other]) > len(prefixes[other])
    assert sum(len(text) for text in found) > sum(len(start) for start in prefixes) + len(prefixes)


def test_writing_leaves_the_student_as_it_was() -> None:
    """Its mode, its weights, and no gradient."""
    for training in (True, False):
        student, (prefixes, draws) = fresh_student().train(training), prefixes_and_draws(2)
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        continue_texts(student, prefixes, draws, 1.0, None)
        assert student.training == training
        assert all(parameter.grad is None for parameter in student.parameters()), training
        for name, tensor in student.state_dict().items():
            assert torch.equal(tensor, before[name]), (training, name)


def rows_of(batch: Batch) -> list[tuple[list[int], int]]:
    """The tokens of each sequence of a batch, and how many of them are given."""
    given = batch.lengths if batch.given is None else batch.given
    rooms = batch.rooms
    places = batch.tokens if rooms is None else batch.tokens[0].split(rooms.tolist())
    rows = zip(places, batch.lengths.tolist(), given.tolist(), strict=True)
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
def test_what_is_written_is_scored_by_the_teacher(
    stores: dict[str, SoftTargetStore], kind: str
) -> None:
    """Each row keeps a beginning of its sequence; targets and layers are the teacher's for it.

    A share of nothing is the stored batch, tensor by tensor.
    """
    store, indices = stores[kind], [4, 1, 9, 16, 7, 20]
    expected = load_batch(store, indices, pack=True)
    stored = on_policy(store, share=0.0)(fresh_student(), indices, 2)
    assert_same_tensors(stored, expected)
    assert_same_tensors(stored.targets, expected.targets)
    assert stored.given is None and stored.layers.keys() == expected.layers.keys()
    shared_codec = store.shared_codec()
    bases = shared_codec.bases if shared_codec else {}
    for share in (0.5, 1.0):
        batch = on_policy(store, share)(fresh_student(), indices, step=5)
        rows = rows_of(batch)
        assert len(rows) == len(indices), share
        assert batch.count() == sum(len(row) - 1 for row, _ in rows), share
        originals = {index: store.tokens(index).tolist() for index in indices}
        start, own = 0, []
        for row, given in rows:
            (index,) = (i for i in originals if originals[i][:given] == row[:given])
            assert 1 <= given <= len(row) == len(originals.pop(index)), (share, row)
            own.append(given < len(row))
            arrays = TEACHER.score([np.array(row, np.int32)], store.manifest.recipe, bases)
            span = slice(start, start + len(row) - 1)
            assert_same_tensors(batch.targets.select(span), store.typed_targets(arrays), rtol=1e-5)
            for layer, states in store.typed_layers(arrays).items():
                torch.testing.assert_close(batch.layers[layer][span], states)
            labels = [token if at < given else IGNORE_INDEX for at, token in enumerate(row)]
            assert batch.labels[span].tolist() == labels[1:], (share, row)
            start = span.stop
        assert all(own) if share == 1.0 else 0 < sum(own) < len(own), share
        assert start == len(batch.labels), share
        assert set(batch.layers) == set(store.manifest.recipe.layers), share


def test_what_is_written_depends_on_seed_step_and_sequence_alone(store: SoftTargetStore) -> None:
    """Not on the batch it is in, nor on the order; another seed or step gives something else."""
    student, indices = fresh_student(), list(range(12))
    loader = on_policy(store, share=0.5)
    whole = sorted(rows_of(loader(student, indices, 5)))
    assert sorted(rows_of(loader(student, indices[::-1], 5))) == whole
    parts = [rows_of(loader(student, indices[at : at + 3], 5)) for at in range(0, 12, 3)]
    assert sorted(row for part in parts for row in part) == whole
    assert sorted(rows_of(loader(student, indices, 6))) != whole
    assert sorted(rows_of(on_policy(store, 0.5, seed=4)(student, indices, 5))) != whole


def alike(folder: Path, count: int, length: int) -> SoftTargetStore:
    """A store of sequences of one length."""
    rows = list(np.random.default_rng(1).integers(0, VOCAB, (count, length), dtype=np.int32))
    return write_store(folder, TEACHER, rows, RECIPES["dense"], count)


def test_the_share_is_kept_on_average(tmp_path: Path) -> None:
    """Over sequences and steps; of two tokens one is kept, the other written anew in each step."""
    store, student, steps = alike(tmp_path, 40, 2), fresh_student(), range(40)
    for share in (0.1, 0.5, 0.9):
        loader = on_policy(store, share)
        given = [
            [given for _, given in rows_of(loader(student, range(40), step))] for step in steps
        ]
        assert np.mean(np.array(given) == 1) == pytest.approx(share, abs=0.03), share
    first, second = (rows_of(on_policy(store)(student, range(12), step)) for step in (5, 6))
    assert all(one[0][0] == other[0][0] for one, other in zip(first, second, strict=True))
    assert sum(one != other for one, other in zip(first, second, strict=True)) > 8


def test_what_is_kept_is_of_every_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one token to all but one, by sequence and step."""

    def zeros(student: object, prefixes: Any, uniform: Any, *_: object) -> list[Tokens]:
        return [np.append(*pair).astype(np.int32) for pair in zip(prefixes, uniform, strict=True)]

    monkeypatch.setattr("distill.training.on_policy.continue_texts", zeros)
    loader = on_policy(alike(tmp_path, 10, 100))
    cuts = {
        given
        for step in range(10)
        for _, given in rows_of(loader(fresh_student(), range(10), step))
    }
    assert len(cuts) > 50 and min(cuts) >= 1 and max(cuts) <= 99


def test_generation_begins_where_a_token_is_learnt(tmp_path: Path) -> None:
    """Of masked sequences; the beginning keeps its mask, all that is written counts."""
    random = np.random.default_rng(2)
    rows = list(random.integers(0, VOCAB, (10, 12), dtype=np.int32))
    for number, row in enumerate(rows):
        row[0] = number
    keep = [random.random(11) < 0.3 for _ in rows]
    for mask in keep:
        mask[5] = True
    store = write_store(tmp_path, TEACHER, rows, RECIPES["sketch"], 4, keep)
    for step in range(4):
        batch = on_policy(store, share=0.7)(fresh_student(), list(range(10)), step)
        originals = {int(row[0]): n for n, row in enumerate(rows)}
        assert batch.keep is not None and len(batch.targets.best()) == batch.count()
        expected: list[bool] = []
        for row, given in rows_of(batch):
            mask = keep[originals[row[0]]]
            assert given == len(row) or mask[given - 1]
            expected += [bool(mask[at]) or at >= given - 1 for at in range(len(row) - 1)]
        assert batch.keep.tolist() == expected


def test_texts_that_end_early_are_short(store: SoftTargetStore) -> None:
    """With a token that ends a text: rows may be shorter, and those end with that one."""
    student = fresh_student()
    free = rows_of(on_policy(store)(student, list(range(24)), 0))
    written = np.concatenate([row[given:] for row, given in free])
    eos = int(np.bincount(written).argmax())
    rows = rows_of(on_policy(store, eos=eos)(student, list(range(24)), 0))
    pairs = [(row, before) for (row, _), (before, _) in zip(rows, free, strict=True)]
    shorter = [row for row, before in pairs if len(row) < len(before)]
    assert shorter and all(row[-1] == eos for row in shorter)
    assert all(row == before[: len(row)] for row, before in pairs)


def test_generated_tokens_are_no_labels(store: SoftTargetStore) -> None:
    """Cross-entropy of the given tokens alone; the divergence of every position."""
    student = fresh_student()
    batch = on_policy(store)(student, list(range(12)), 1)
    config = LossConfig(lambda_so8t=0.0, gamma=0.0, temperature=1.0)
    whole = {"total": batch.count(), "share": 1.0, "fraction": 0.0}
    _, parts = Objective(config)(student, batch, **whole)
    surprise = 0.0
    for row, given in rows_of(batch):
        with torch.no_grad():
            log_probs = student(torch.tensor([row])).logits[0].double().log_softmax(-1)
        surprise -= sum(float(log_probs[place - 1, row[place]]) for place in range(1, given))
    assert float(parts["ce"]) == pytest.approx(config.beta * surprise / batch.count(), rel=1e-5)
    _, others = Objective(config)(student, replace(batch, given=None), **whole)
    assert others["kd"] == parts["kd"] and float(others["ce"]) > float(parts["ce"]) > 0


def run(
    store: SoftTargetStore, folder: Path, share: float = 0.5, kill_at: int = -1, epochs: int = 3
) -> tuple[SO8TForCausalLM, TrainingSummary]:
    """A training run with generated text."""
    student = fresh_student()
    folder.mkdir(exist_ok=True)
    data = TrainingData(store, split(store, 0.2, 0), 0)
    objective = build_objective(LossConfig(temperature=2.0), store, student, 2)
    config = TRAIN.model_copy(update={"on_policy": share, "epochs": epochs})
    job = TrainingJob(student, data, objective, config, folder)
    return student, train(job, killer(kill_at), on_policy(store, share))


@pytest.mark.parametrize("kind", RECIPES)
def test_the_student_learns_from_generated_text(
    tmp_path: Path, stores: dict[str, SoftTargetStore], kind: str
) -> None:
    """The validation KL on other people's text falls, though it is never trained on a whole one."""
    _, summary = run(stores[kind], tmp_path, share=1.0, epochs=8)
    assert summary.scores[-1][1].kl < 0.93 * summary.scores[0][1].kl


def test_a_killed_run_continues_with_the_same_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: SoftTargetStore
) -> None:
    """The weights and log of no kill; other weights than without generated text."""
    save_all_the_time(monkeypatch)
    student, summary = run(store, tmp_path / "whole")
    with pytest.raises(Killed):
        run(store, tmp_path / "cut", kill_at=7)
    continued, second = run(store, tmp_path / "cut")
    assert second.continued_from == 6 and second.scores == summary.scores
    assert second.tokens_seen == summary.tokens_seen
    logs = [read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("cut", "whole")]
    assert logs[0] == logs[1]
    for (name, one), other in zip(student.named_parameters(), continued.parameters(), strict=True):
        assert torch.equal(one, other), name
    reader, _ = run(store, tmp_path / "reader", share=0.0)
    assert not torch.equal(reader.model.embed_tokens.weight, student.model.embed_tokens.weight)


def test_several_processes_are_refused() -> None:
    """One teacher scores for one process; the setting is named."""
    require_trainable(TrainConfig(on_policy=0.5), 1)
    require_trainable(TrainConfig(), 2)
    with pytest.raises(UserError, match=r"train\.on_policy = 0\.5 .* not in 2"):
        require_trainable(TrainConfig(on_policy=0.5), 2)
