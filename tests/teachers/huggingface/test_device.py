"""Where a transformers teacher runs, how much at once, and what crosses the bus."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from teachers.base import GenerationRequest, Sampling
from teachers.errors import SettingRefused
from teachers.huggingface import generation
from teachers.huggingface.device import batch_room, cache_room, teacher_device
from teachers.huggingface.teacher import HuggingFaceTeacher
from teachers.targets.fit_codec import fit_basis, tail_metric
from teachers.targets.recipe import Recipe
from tests.support.pretended_gpu import to_gpu, watch
from tests.support.tiny_checkpoint import BOS, make_folder, texts

VOCAB = 300
GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("device") / "tiny", vocab_size=VOCAB)


def test_what_is_kept_is_made_where_the_answer_is(folder: Path) -> None:
    """Top-k, tail, sketch and layers as on the processor; only they cross the bus."""
    sequences = texts(12, seed=4)
    teacher = HuggingFaceTeacher(folder)
    states = {
        name: torch.from_numpy(rows) for name, rows in teacher.states(sequences, (1,)).items()
    }
    metric = tail_metric(states["final"], teacher.output_rows, VOCAB)
    bases = {
        "final": fit_basis(states["final"], metric, 32),
        "layer1": fit_basis(states["layer1"], None, 32),
    }
    recipes = (
        Recipe("compact", num_topk=16, sketch_bytes=32, layers=(1,), layer_bytes=32),
        Recipe("hidden"),
        Recipe("dense"),
    )
    expected = [teacher.score(sequences, recipe, bases) for recipe in recipes]
    logits = teacher.logits(sequences)
    to_gpu(teacher.model.model)
    for recipe, arrays in zip(recipes, expected, strict=True):
        with watch() as seen:
            found = teacher.score(sequences, recipe, bases)
        assert set(found) == set(arrays)
        for name, rows in arrays.items():
            assert found[name].dtype == rows.dtype, name
            close = np.isclose(found[name].astype(float), rows.astype(float), rtol=1e-3, atol=1.01)
            assert close.mean() > 0.999, (recipe.kind, name)
        # Beside what is kept (ids twice as wide as stored): tokens, masks and the codec itself.
        kept = sum(rows.nbytes for rows in arrays.values())
        tokens, codec = sum(map(len, sequences)), 8 * 2 * 64 * 64 * 4
        assert sum(seen.bytes.values()) < 4 * kept + 64 * tokens + codec, recipe.kind
    assert np.allclose(teacher.logits(sequences), logits, atol=1e-5)
    assert set(teacher.states(sequences, (1,))) == {"final", "layer1"}


def test_a_pass_and_a_cache_fit_into_what_is_free() -> None:
    """Logits in float32, what top-k and tail are made of, and attention without a kernel of its
    own take at most what is free; on the processor all is as it was measured."""
    phi = SimpleNamespace(hidden_size=3072, intermediate_size=8192, num_attention_heads=32)
    small = SimpleNamespace(hidden_size=640, intermediate_size=2048, num_attention_heads=4)
    for config, vocab in ((phi, 32064), (small, 262144)):
        assert batch_room(config, vocab, 512, None) == min(2048, (64 << 20) // vocab)
        before = 0
        for card in (1, 4, 16, 72):
            room = batch_room(config, vocab, 512, card * GB)
            assert before < room <= 1 << 14 or before == room == 1 << 14, (vocab, card)
            scores = 2 * 4 * config.num_attention_heads * 512 * room
            assert 5 * 4 * vocab * room + scores < card * GB, (vocab, card)
            before = room
        assert batch_room(config, vocab, 1 << 17, GB) < batch_room(config, vocab, 512, GB)
    assert cache_room(None) == 2 << 30 and cache_room(20 * GB) == 10 * GB


def test_each_process_of_a_launch_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn where there are fewer; or the one that is set, if it is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"Card {number}")
    assert teacher_device(None) == torch.device("cuda:0")
    for rank, number in ((0, 0), (1, 1), (2, 0)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert teacher_device(None) == torch.device("cuda", number), rank
    assert teacher_device(0) == torch.device("cuda:0")
    with pytest.raises(SettingRefused, match=r"main_gpu = 5.*0: Card 0, 1: Card 1"):
        teacher_device(5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert teacher_device(None) == torch.device("cpu")
    with pytest.raises(SettingRefused, match=r"main_gpu = 0.*Leave it out"):
        teacher_device(0)


def test_sizes_can_be_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a pass and sequences written together."""
    teacher = HuggingFaceTeacher(folder, batch_tokens=40, sequences=3)
    fed: list[int] = []
    answer = teacher.model.answer

    def counted(batch, **wanted):  # type: ignore[no-untyped-def]
        fed.append(len(batch) * (max(map(len, batch)) - 1))
        return answer(batch, **wanted)

    monkeypatch.setattr(teacher.model, "answer", counted)
    sequences = [tokens[:20] for tokens in texts(9)]
    teacher.logits(sequences)
    assert max(fed) <= 40 and len(fed) > 2
    together: list[int] = []
    feed = generation.Decoder.feed

    def watched(self, tokens, mask):  # type: ignore[no-untyped-def]
        together.append(len(tokens))
        return feed(self, tokens, mask)

    monkeypatch.setattr(generation.Decoder, "feed", watched)
    prompts = [[np.array([BOS], dtype=np.int32)]] * 5
    teacher.generate(GenerationRequest(prompts, Sampling(max_length=6)))
    assert max(together) == 3
