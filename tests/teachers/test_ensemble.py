"""Several teachers as one: a mixture, checked against float64; and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from teachers import ensemble
from teachers.base import GenerationRequest, Sampling, Teacher, Tokens
from teachers.ensemble import EnsembleError, EnsembleTeacher
from teachers.huggingface.teacher import HuggingFaceTeacher
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.targets.recipe import Recipe
from teachers.targets.stored_arrays import typed
from tests.support.teachers import BigramTeacher
from tests.support.tiny_checkpoint import BOS, make_folder, save_tokenizer, texts

Members = list[HuggingFaceTeacher]
VOCAB = 300
WEIGHTS = (3.0, 1.0, 0.5)
INFO = replace(BigramTeacher(4, 4).info, name="fake")


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    """Three models with one tokenizer."""
    folder = tmp_path_factory.mktemp("ensemble")
    paths = [make_folder(folder / f"member{n}", seed=n, vocab_size=VOCAB) for n in range(3)]
    return [HuggingFaceTeacher(path) for path in paths]


def mixture(
    members: Sequence[Teacher], weights: Sequence[float], sequences: list[Tokens]
) -> np.ndarray:
    """log Σ w p by the definition, in float64."""
    total = 0.0
    for member, weight in zip(members, weights, strict=True):
        powers = np.exp(member.logits(sequences).astype(np.float64))
        total = total + weight / sum(weights) * powers / powers.sum(axis=-1, keepdims=True)
    return np.log(total)


def test_mixes_distributions(members: Members) -> None:
    """Logits are log Σ w p, not a mean of logits; weights go with their teachers, in any order."""
    sequences = texts(5)
    found = EnsembleTeacher(members, WEIGHTS).logits(sequences)
    expected = mixture(members, WEIGHTS, sequences)
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-4
    assert np.allclose(np.exp(found.astype(np.float64)).sum(axis=-1), 1.0, atol=1e-5)
    assert np.abs(EnsembleTeacher(members, (1, 1, 1)).logits(sequences) - expected).max() > 0.05
    turned = EnsembleTeacher(members[::-1], WEIGHTS[::-1]).logits(sequences)
    assert np.abs(found - turned).max() < 1e-5


def test_one_teacher_is_itself(members: Members) -> None:
    """Weight 1, or any other alone; two of the same, whatever their weights."""
    sequences, one, recipe = texts(4, seed=1), members[0], Recipe("compact", num_topk=8)
    own = torch.from_numpy(one.logits(sequences)).double().log_softmax(-1).numpy()
    for same, weights in (([one], [1.0]), ([one], [7.0]), ([one] * 2, [0.3, 5.0])):
        found = EnsembleTeacher(same, weights).logits(sequences)
        assert np.abs(found - own).max() < 1e-5, weights
    alone: Any = one.score(sequences, recipe, {})
    mixed: Any = EnsembleTeacher([one] * 2, [1, 2]).score(sequences, recipe, {})
    assert np.array_equal(alone["topk_ids"], mixed["topk_ids"])
    for name, atol in (("topk_logits", 2e-2), ("tail", 1e-4)):
        assert np.allclose(alone[name].astype(float), mixed[name].astype(float), atol=atol), name


def test_soft_targets_are_the_mixtures(members: Members) -> None:
    """compact and dense give softmax(log p / T) of the mixture; rows in the sequences' order."""
    sequences = texts(6, seed=3)
    logits = torch.from_numpy(mixture(members, WEIGHTS, sequences))
    teacher = EnsembleTeacher(members, WEIGHTS)
    for recipe in (Recipe("dense"), Recipe(num_topk=VOCAB), Recipe(num_topk=8)):
        targets: Any = typed(teacher.score(sequences, recipe, {}), recipe, VOCAB, None, None)
        for temperature in (1.0, 2.0):
            expected = (logits / temperature).log_softmax(-1)
            if targets.has_tail_shape:
                error = (targets.log_probs(temperature) - expected)[expected > -8].abs().max()
                assert error < 0.02, (recipe, temperature)
            else:
                outside = 1 - expected.topk(8).values.exp().sum(-1)
                found = targets.tail_mass(temperature).double()
                assert torch.allclose(found, outside, atol=1e-3), temperature


class Watched:
    """A teacher whose requests for logits are noted."""

    def __init__(self, teacher: HuggingFaceTeacher) -> None:
        self.teacher, self.info = teacher, teacher.info
        self.asked: list[list[int]] = []

    def logits(self, sequences: Sequence[Tokens], **how: Any) -> np.ndarray:
        """The positions of each sequence are noted."""
        self.asked.append([len(tokens) - 1 for tokens in sequences])
        return self.teacher.logits(sequences, **how)


def test_groups_change_nothing(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few sequences at a time give the same rows; progress counts positions to their number."""
    sequences = texts(12, seed=4)
    watched: Any = Watched(members[0])
    teacher = EnsembleTeacher([watched, members[1]], (1, 1))
    whole = teacher.score(sequences, Recipe("dense"), {})["logits"]
    monkeypatch.setattr(ensemble, "GROUP_BYTES", 4 * VOCAB * 30)
    watched.asked.clear()
    reports: list[int] = []
    found = teacher.score(sequences, Recipe("dense"), {}, reports.append)["logits"]
    groups: list[list[int]] = watched.asked
    assert len(groups) > 4 and [*chain(*groups)] == [len(tokens) - 1 for tokens in sequences]
    assert all(len(group) == 1 or sum(group) <= 30 for group in groups)
    assert np.allclose(found, whole, atol=1e-4)
    assert reports == np.cumsum([sum(group) for group in groups]).tolist()
    assert reports[-1] == len(whole)


def test_vanishing_probabilities_stay_apart() -> None:
    """Logits hundreds apart mix without overflow; a token that all exclude stays excluded."""
    one, two = fake([500.0, 0.0, -np.inf, -np.inf]), fake([-500.0, 0.0, 1.0, -np.inf])
    found = EnsembleTeacher([one, two], [1, 1]).logits([np.zeros(2, np.int32)])[0]
    e = np.log1p(np.exp(-1.0))  # of the second's softmax over its two likely tokens
    assert np.allclose(found[:3], np.log(0.5) + np.array([0.0, -1 - e, -e]), atol=1e-5)
    assert found[3] == -np.inf


def test_what_a_mixture_lacks_is_refused(members: Members) -> None:
    """It has no hidden state: each refusal names the remedy."""
    teacher = EnsembleTeacher(members[:2], (1, 1))
    for recipe, what in (
        (Recipe("hidden"), "targets of kind hidden"),
        (Recipe("compact", sketch_bytes=32), "a sketch"),
        (Recipe("dense", layers=(0,)), "layers"),
    ):
        message = rf"{what} cannot be kept: member0 \+ member1 .*sketch_bytes=0"
        with pytest.raises(ValueError, match=message):
            teacher.score(texts(2), recipe, {})
        with pytest.raises(ValueError, match=f"{what} cannot be kept"):
            teacher.generate_and_score(GenerationRequest([], Sampling()), recipe, {})
    with pytest.raises(ValueError, match="no hidden state; use --targets compact"):
        teacher.states(texts(2))
    with pytest.raises(ValueError, match="no hidden state; use --targets compact"):
        teacher.output_rows(0, 1)


def test_bad_weights_are_refused(members: Members) -> None:
    """The message names the teacher and its weight."""
    for weights, message in (
        ([], "at least one teacher"),
        ([1.0], "2 teachers have 1 weights"),
        ([1.0, 0.0], "member1 has weight 0; give a positive number"),
        ([1.0, -2.0], "member1 has weight -2"),
        ([float("nan"), 1.0], "member0 has weight nan"),
        ([float("inf"), 1.0], "member0 has weight inf"),
    ):
        with pytest.raises(EnsembleError, match=message):
            EnsembleTeacher(members[:2] if weights else [], weights)


def test_damaged_members_are_named(members: Members, tmp_path: Path) -> None:
    """A NaN in one member's weights, or in its answer."""
    folder = make_folder(tmp_path / "rotten", vocab_size=VOCAB)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][7] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    teacher = EnsembleTeacher([members[0], HuggingFaceTeacher(folder)], [1, 1])
    with pytest.raises(ValueError, match=r"rotten: .* not finite"):
        teacher.score(texts(2), Recipe("compact"), {})
    with pytest.raises(EnsembleError, match="answer of fake is not finite"):
        EnsembleTeacher([fake([0.0, np.nan])], [1]).logits([np.zeros(2, np.int32)])


# --- vocabularies


def fake(logits: Sequence[float], tokens: Sequence[str] | None = None, sha256: str = "") -> Teacher:
    """A teacher that always says the same; ``tokens`` are the texts of its vocabulary."""
    info = replace(INFO, vocab_size=len(logits), tokenizer_sha256=sha256)
    row = np.array(logits, dtype=np.float32)

    def detokenize(sequences: Sequence[Tokens]) -> list[str]:
        assert tokens is not None, "nobody should look"
        return ["".join(tokens[token] for token in sequence) for sequence in sequences]

    def answer(sequences: Sequence[Tokens], **how: Any) -> np.ndarray:
        return np.tile(row, (sum(len(t) - 1 for t in sequences), 1))

    return SimpleNamespace(info=info, detokenize=detokenize, logits=answer)


def test_different_vocabularies_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sizes, the first token that differs and its two texts, also beyond the first batch."""
    for other, message in (
        ("abce", "of 4 and 4 tokens: token 3 is 'd' to the first and 'e' to the second"),
        ("abXde", "of 4 and 5 tokens: token 2 is 'c' to the first and 'X' to the second"),
        ("abcde", "of 4 and 5 tokens: token 4 is 'e' to the second alone"),
        ("abc", "of 4 and 3 tokens: token 3 is 'd' to the first alone"),
    ):
        pair = [fake([0.0] * len(tokens), tokens, tokens) for tokens in ("abcd", other)]
        for together in (4096, 2):
            monkeypatch.setattr(ensemble, "TEXTS_TOGETHER", together)
            with pytest.raises(EnsembleError, match=message):
                EnsembleTeacher(pair, [1, 1])


def test_equal_vocabularies_are_accepted() -> None:
    """Told by their digest, or token by token; tokens without a text are padding."""
    rows: list[tuple[Any, Any]] = [
        ((None, "same"), (None, "same")),
        (("abcd", "one"), ("abcd", "two")),
        (("abcd", "one"), (["a", "b", "c", ""], "two")),
    ]
    for row in rows:
        mixed = EnsembleTeacher([fake([0.0] * 4, *vocabulary) for vocabulary in row], [1, 1])
        assert mixed.info.vocab_size == 4 and len(mixed.teachers) == 2


def test_real_tokenizers_are_compared(
    members: Members, tiny_teacher: GGUFTeacher, tmp_path: Path
) -> None:
    """Other merges, another template only, and a GGUF file beside a folder."""
    other = make_folder(tmp_path / "other", vocab_size=VOCAB)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    changed = HuggingFaceTeacher(other)
    assert changed.info.tokenizer_sha256 != members[0].info.tokenizer_sha256
    assert EnsembleTeacher([members[0], changed], [1, 1]).info.vocab_size == VOCAB
    save_tokenizer(other, text="zebras in zoos zigzag " * 9)
    for second, message in (
        (HuggingFaceTeacher(other), r"of 300 and 300 tokens: token \d+ is '.+' to the first"),
        (tiny_teacher, rf"of 300 and {tiny_teacher.info.vocab_size} tokens: token "),
    ):
        with pytest.raises(EnsembleError, match=message):
            EnsembleTeacher([members[0], second], [1, 1])


# --- as a teacher


def test_info(members: Members) -> None:
    """Sums, the smallest context, the first's tokenizer; the digest follows the proportions."""
    infos = [member.info for member in members]
    teacher: Teacher = EnsembleTeacher(members, WEIGHTS)
    info = teacher.info
    assert info == replace(
        infos[0],
        name="member0 + member1 + member2",
        parameters=sum(i.parameters for i in infos),
        file_bytes=sum(i.file_bytes for i in infos),
        sha256=info.sha256,
    )
    same = EnsembleTeacher(members, [2 * weight for weight in WEIGHTS]).info.sha256
    others = {
        EnsembleTeacher(members, (1, 1, 1)).info.sha256,
        EnsembleTeacher(members[1:], WEIGHTS[1:]).info.sha256,
        *(i.sha256 for i in infos),
    }
    assert same == info.sha256 and info.sha256 not in others
    narrow = fake([0.0], "a", "x")
    short = fake([0.0], "a", "x")
    short.info = replace(narrow.info, context_length=5)  # type: ignore[misc]
    assert EnsembleTeacher([narrow, short], [1, 1]).info.context_length == 5


def test_the_first_teacher_generates_and_tokenizes(members: Members) -> None:
    """Generation and tokens are the first member's."""
    teacher = EnsembleTeacher(members[:2], (1, 5))
    request, sampling = [[np.array([BOS], np.int32)]], Sampling(max_length=12, seed=3)
    reports: list[float] = []
    spoken = teacher.generate(GenerationRequest(request, sampling, 4), reports.append)
    assert np.array_equal(
        spoken[0], members[0].generate(GenerationRequest(request, sampling, 4))[0]
    )
    assert reports == sorted(reports) and reports[0] < 1 and reports[-1] == 1
    said, arrays = teacher.generate_and_score(
        GenerationRequest(request, sampling, 4), Recipe("dense"), {}
    )
    assert np.array_equal(said[0], spoken[0])
    assert np.allclose(arrays["logits"], teacher.logits(spoken), atol=1e-5)
    (tokens,) = teacher.tokenize(["the cat</s>"], add_special=True, parse_special=True)
    assert teacher.detokenize([tokens]) == ["<s>the cat</s>"]
    assert min(teacher.speed(8, 2)) > 0


def test_closing_closes_all(tmp_path: Path) -> None:
    """Twice, too."""
    members = [HuggingFaceTeacher(make_folder(tmp_path / str(n), seed=n)) for n in range(2)]
    with EnsembleTeacher(members, [1, 1]) as teacher:
        teacher.logits(texts(1))
    teacher.close()
    for member in members:
        with pytest.raises(ValueError, match="was closed"):
            member.logits(texts(1))
