"""Rows of the input embedding that never occur: left out of training, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.losses.objective import Objective
from distill.training import data as data_module
from distill.training import engine
from distill.training.data import TrainingData
from distill.training.embedding_rows import UsedRows, only_used_rows, used_tokens
from students.model.decoder import SO8TForCausalLM
from tests.support.stores import write_store
from tests.support.students import make_student
from tests.support.teachers import BigramTeacher
from tests.support.training import (
    LOSS,
    RECIPES,
    TRAIN,
    VOCAB,
    WIDTH,
    Killed,
    killer,
    save_all_the_time,
)

USED = (3, 7, 8, 20, 47)


def make_data(folder: Path) -> TrainingData:
    """A store in which only the tokens ``USED`` occur."""
    random = np.random.default_rng(0)
    lengths = (random.integers(4, 14) for _ in range(24))
    rows = [random.choice(USED, size=length).astype(np.int32) for length in lengths]
    store = write_store(folder, BigramTeacher(VOCAB, WIDTH), rows, RECIPES["buckets"], 10)
    return TrainingData(store, data_module.Split(np.arange(20), np.arange(20, 24)), 0)


def untied() -> SO8TForCausalLM:
    """A small student with an output matrix of its own, always the same."""
    return make_student(WIDTH, 2, VOCAB, tied=False)


def train(data: TrainingData, folder: Path, kill_at: int = -1) -> SO8TForCausalLM:
    """An untied student after training."""
    student = untied()
    folder.mkdir(exist_ok=True)
    job = engine.TrainingJob(student, data, Objective(LOSS), TRAIN, folder)
    engine.train(job, killer(kill_at))
    return student


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def lean(data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> SO8TForCausalLM:
    """A student after a training without the rows that never occur."""
    return train(data, tmp_path_factory.mktemp("lean"))


def test_used_tokens(data: TrainingData, tmp_path: Path) -> None:
    """Every token of every sequence, ascending, and 0 for padding; of each shard, and once is
    enough."""
    assert used_tokens(data.store).tolist() == data.used_tokens().tolist() == [0, *USED]
    prompts = [np.array([46, 3], np.int32), np.array([5], np.int32)]
    assert used_tokens(data.store, prompts).tolist() == sorted({0, 5, 46, *USED})
    rows = [np.array([first, 3, 3], np.int32) for first in (9, 4, 40)]
    once = write_store(tmp_path, BigramTeacher(VOCAB, WIDTH), rows, RECIPES["buckets"], 1)
    assert used_tokens(once).tolist() == [0, 3, 4, 9, 40]


def test_the_same_student_as_with_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: TrainingData, lean: SO8TForCausalLM
) -> None:
    """Used rows learn what they learn anyway; the others stay as they began, to the bit."""
    monkeypatch.setattr(data_module, "used_tokens", lambda store, prompts: torch.arange(VOCAB))
    whole = train(data, tmp_path)
    for (name, one), other in zip(lean.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=name)
    embedding, before = lean.model.embed_tokens.weight, untied().model.embed_tokens.weight
    changed = (embedding != before).any(dim=-1).nonzero().flatten().tolist()
    assert changed == list(USED)
    assert isinstance(lean.model.embed_tokens, torch.nn.Embedding)


def test_an_interrupted_run_continues_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: TrainingData, lean: SO8TForCausalLM
) -> None:
    """Checkpoints hold the rows that are trained; what comes of them is the whole student."""
    save_all_the_time(monkeypatch)
    with pytest.raises(Killed):
        train(data, tmp_path, kill_at=5)
    found = train(data, tmp_path).state_dict()
    for name, tensor in lean.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_the_embedding_comes_back_after_an_error(data: TrainingData) -> None:
    """Whatever ends the training, the student has its own embedding again, with what was learnt."""
    student = untied()
    whole = student.model.embed_tokens
    with pytest.raises(RuntimeError, match="stop"), only_used_rows(student, data.used_tokens()):
        rows = student.model.embed_tokens
        assert isinstance(rows, UsedRows) and rows.weight.shape == (len(USED) + 1, WIDTH)
        tokens = torch.tensor([[3, 47], [8, 0]])
        assert torch.equal(rows(tokens), whole(tokens))
        with torch.no_grad():
            rows.weight[1] = 5.0
        raise RuntimeError("stop")
    assert student.model.embed_tokens is whole and bool((whole.weight[3] == 5.0).all())


def test_tied_students_keep_all_rows(data: TrainingData) -> None:
    """Where the embedding is the output matrix too, every row has a gradient."""
    student = untied()
    student.config.tie_word_embeddings = True
    whole = student.model.embed_tokens
    with only_used_rows(student, data.used_tokens()):
        assert student.model.embed_tokens is whole
