"""Several teachers as one: a mixture of distributions, checked against float64; and what a mixture refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from teachers import ensemble
from teachers.base import Sampling, Teacher, TeacherInfo, Tokens
from teachers.ensemble import EnsembleError, EnsembleTeacher
from teachers.gguf_teacher import GGUFTeacher
from teachers.huggingface import HuggingFaceTeacher
from teachers.recipe import Recipe
from teachers.records import typed
from tests.tiny_checkpoint import BOS, make_folder, save_tokenizer, texts

VOCAB = 300
WEIGHTS = (3.0, 1.0, 0.5)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[HuggingFaceTeacher]:
    """Three models with one tokenizer."""
    folder = tmp_path_factory.mktemp("ensemble")
    return [
        HuggingFaceTeacher(make_folder(folder / f"member{seed}", seed=seed, vocab_size=VOCAB))
        for seed in range(3)
    ]


def mixture(members: Sequence[Teacher], weights: Sequence[float], sequences: list[Tokens]) -> np.ndarray:
    """log Σ w p by the definition, in float64."""
    total = 0.0
    for member, weight in zip(members, weights, strict=True):
        powers = np.exp(member.logits(sequences).astype(np.float64))
        total = total + weight / sum(weights) * powers / powers.sum(axis=-1, keepdims=True)
    return np.log(total)


def test_mixes_distributions(members: list[HuggingFaceTeacher]) -> None:
    """Logits are log Σ w p: neither a mean of logits nor one member's."""
    sequences = texts(5)
    found = EnsembleTeacher(members, WEIGHTS).logits(sequences)
    expected = mixture(members, WEIGHTS, sequences)
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-4
    assert np.allclose(np.exp(found.astype(np.float64)).sum(axis=-1), 1.0, atol=1e-5)
    assert np.abs(EnsembleTeacher(members, (1, 1, 1)).logits(sequences) - expected).max() > 0.05


def test_one_teacher_is_itself(members: list[HuggingFaceTeacher]) -> None:
    """Weight 1, or any other alone; two of the same, whatever their weights."""
    sequences = texts(4, seed=1)
    own = torch.from_numpy(members[0].logits(sequences)).double().log_softmax(-1).numpy()
    for same, weights in (([members[0]], [1.0]), ([members[0]], [7.0]), ([members[0]] * 2, [0.3, 5.0])):
        assert np.abs(EnsembleTeacher(same, weights).logits(sequences) - own).max() < 1e-5
    alone = members[0].score(sequences, Recipe("compact", num_topk=8), {})
    mixed = EnsembleTeacher([members[0]] * 2, [1, 2]).score(sequences, Recipe("compact", num_topk=8), {})
    assert np.array_equal(alone["topk_ids"], mixed["topk_ids"])
    assert np.allclose(alone["topk_logits"].astype(float), mixed["topk_logits"].astype(float), atol=2e-2)
    assert np.allclose(alone["tail"].astype(float), mixed["tail"].astype(float), atol=1e-4)


def test_order_of_members_does_not_matter(members: list[HuggingFaceTeacher]) -> None:
    """Weights go with their teachers."""
    sequences = texts(3, seed=2)
    one = EnsembleTeacher(members, WEIGHTS).logits(sequences)
    two = EnsembleTeacher(members[::-1], WEIGHTS[::-1]).logits(sequences)
    assert np.abs(one - two).max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_soft_targets_are_the_mixtures(members: list[HuggingFaceTeacher], temperature: float) -> None:
    """compact and dense give softmax(log p / T) of the mixture; rows in the sequences' order."""
    sequences = texts(6, seed=3)
    logits = torch.from_numpy(mixture(members, WEIGHTS, sequences))
    expected = (logits / temperature).log_softmax(-1)
    teacher = EnsembleTeacher(members, WEIGHTS)
    for recipe in (Recipe("dense"), Recipe("compact", num_topk=VOCAB)):
        arrays = teacher.score(sequences, recipe, {})
        found = typed(arrays, recipe, VOCAB, None, None).log_probs(temperature)
        assert (found - expected)[expected > -8].abs().max() < 0.02
    recipe = Recipe("compact", num_topk=8)
    targets = typed(teacher.score(sequences, recipe, {}), recipe, VOCAB, None, None)
    kept = expected.topk(8).values
    assert torch.allclose(targets.tail_mass(temperature).double(), 1 - kept.exp().sum(-1), atol=1e-3)


def test_groups_change_nothing(members: list[HuggingFaceTeacher], monkeypatch: pytest.MonkeyPatch) -> None:
    """Few sequences at a time give the same rows; progress counts positions to their number."""
    sequences = texts(12, seed=4)
    teacher = EnsembleTeacher(members[:2], (1, 1))
    whole = teacher.score(sequences, Recipe("dense"), {})["logits"]
    monkeypatch.setattr(ensemble, "GROUP_BYTES", 4 * VOCAB * 30)
    groups = list(teacher._groups(sequences))
    assert len(groups) > 4 and [len(t) for group in groups for t in group] == [len(t) for t in sequences]
    assert all(len(group) == 1 or sum(len(t) - 1 for t in group) <= 30 for group in groups)
    reports: list[int] = []
    assert np.allclose(
        teacher.score(sequences, Recipe("dense"), {}, reports.append)["logits"], whole, atol=1e-4
    )
    assert len(reports) == len(groups) and reports == sorted(reports) and reports[-1] == len(whole)


def test_vanishing_probabilities_stay_apart() -> None:
    """Logits hundreds apart mix without overflow; a token that all exclude stays excluded."""
    one, two = fake([500.0, 0.0, -np.inf, -np.inf]), fake([-500.0, 0.0, 1.0, -np.inf])
    found = EnsembleTeacher([one, two], [1, 1]).logits([np.zeros(2, np.int32)])[0]
    e = np.log1p(np.exp(-1.0))  # of the second's softmax over its two likely tokens
    assert np.allclose(found[:3], np.log(0.5) + np.array([0.0, -1 - e, -e]), atol=1e-5)
    assert found[3] == -np.inf


def test_what_a_mixture_lacks_is_refused(members: list[HuggingFaceTeacher]) -> None:
    """It has no hidden state: each refusal names the remedy."""
    teacher = EnsembleTeacher(members[:2], (1, 1))
    for recipe, what in (
        (Recipe("hidden"), "targets of kind hidden"),
        (Recipe("compact", sketch_bytes=32), "a sketch"),
        (Recipe("dense", layers=(0,)), "layers"),
    ):
        with pytest.raises(ValueError, match=rf"{what} cannot be kept: member0 \+ member1 .*sketch_bytes=0"):
            teacher.score(texts(2), recipe, {})
        with pytest.raises(ValueError, match=f"{what} cannot be kept"):
            teacher.speak_and_score([], Sampling(), recipe, {})
    with pytest.raises(ValueError, match="no hidden state; use --targets compact"):
        teacher.states(texts(2))
    with pytest.raises(ValueError, match="no hidden state; use --targets compact"):
        teacher.output_rows(0, 1)


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [
        (0, [], "at least one teacher"),
        (2, [1.0], "2 teachers have 1 weights"),
        (2, [1.0, 0.0], "member1 has weight 0; give a positive number"),
        (2, [1.0, -2.0], "member1 has weight -2"),
        (2, [float("nan"), 1.0], "member0 has weight nan"),
        (2, [float("inf"), 1.0], "member0 has weight inf"),
    ],
)
def test_bad_weights_are_refused(
    members: list[HuggingFaceTeacher], count: int, weights: list[float], message: str
) -> None:
    """The message names the teacher and its weight."""
    with pytest.raises(EnsembleError, match=message):
        EnsembleTeacher(members[:count], weights)


def test_damaged_members_are_named(members: list[HuggingFaceTeacher], tmp_path: Path) -> None:
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


# -- vocabularies -------------------------------------------------------------------------------------------


def fake(logits: Sequence[float], tokens: Sequence[str] | None = None, sha256: str = "") -> Teacher:
    """A teacher that always says the same; ``tokens`` are the texts of its vocabulary."""
    info = TeacherInfo(
        "fake", "fake", 10, 20, len(logits), 8, 1, 64, None, None, (), False, None, "weights", sha256
    )
    row = np.array(logits, dtype=np.float32)

    def detokenize(sequences: Sequence[Tokens]) -> list[str]:
        assert tokens is not None, "nobody should look"
        return ["".join(tokens[token] for token in sequence) for sequence in sequences]

    def answer(sequences: Sequence[Tokens], *, exact: bool = False) -> np.ndarray:
        return np.tile(row, (sum(len(t) - 1 for t in sequences), 1))

    return SimpleNamespace(info=info, detokenize=detokenize, logits=answer)


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        ("abcd", "abce", "of 4 and 4 tokens: token 3 is 'd' to the first and 'e' to the second"),
        ("abcd", "abXde", "of 4 and 5 tokens: token 2 is 'c' to the first and 'X' to the second"),
        ("abcd", "abcde", "of 4 and 5 tokens: token 4 is 'e' to the second alone"),
        ("abcd", "abc", "of 4 and 3 tokens: token 3 is 'd' to the first alone"),
    ],
)
def test_different_vocabularies_are_refused(
    one: str, two: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sizes, the first token that differs, and its two texts, also beyond the first batch of tokens."""
    for together in (4096, 2):
        monkeypatch.setattr(ensemble, "TEXTS_TOGETHER", together)
        with pytest.raises(EnsembleError, match=message):
            EnsembleTeacher([fake([0.0] * len(t), t, sha256=t) for t in (one, two)], [1, 1])


def test_equal_vocabularies_are_accepted() -> None:
    """Told by their digest, or token by token; tokens without a text are padding."""
    for pair in (
        [fake([0.0] * 4, sha256="same"), fake([0.0] * 4, sha256="same")],
        [fake([0.0] * 4, "abcd", "one"), fake([0.0] * 4, "abcd", "two")],
        [fake([0.0] * 4, "abcd", "one"), fake([0.0] * 4, ["a", "b", "c", ""], "two")],
    ):
        mixed = EnsembleTeacher(pair, [1, 1])
        assert mixed.info.vocab_size == 4 and len(mixed.teachers) == 2


def test_real_tokenizers_are_compared(
    members: list[HuggingFaceTeacher], tiny_teacher: GGUFTeacher, tmp_path: Path
) -> None:
    """Other merges, another template only, and a GGUF file beside a folder."""
    other = make_folder(tmp_path / "other", vocab_size=VOCAB)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    changed = HuggingFaceTeacher(other)
    assert changed.info.tokenizer_sha256 != members[0].info.tokenizer_sha256
    assert EnsembleTeacher([members[0], changed], [1, 1]).info.vocab_size == VOCAB
    save_tokenizer(other, text="zebras in zoos zigzag " * 9)
    with pytest.raises(EnsembleError, match=r"of 300 and 300 tokens: token \d+ is '.+' to the first"):
        EnsembleTeacher([members[0], HuggingFaceTeacher(other)], [1, 1])
    with pytest.raises(EnsembleError, match=rf"of 300 and {tiny_teacher.info.vocab_size} tokens: token "):
        EnsembleTeacher([members[0], tiny_teacher], [1, 1])


# -- as a teacher -------------------------------------------------------------------------------------------


def test_info(members: list[HuggingFaceTeacher]) -> None:
    """Sums, the smallest context, the first one's tokenizer; the digest follows members and proportions."""
    infos = [member.info for member in members]
    teacher = EnsembleTeacher(members, WEIGHTS)
    info = teacher.info
    assert info.name == "member0 + member1 + member2"
    assert info.parameters == sum(i.parameters for i in infos)
    assert info.file_bytes == sum(i.file_bytes for i in infos)
    assert info == replace(
        infos[0], name=info.name, parameters=info.parameters, file_bytes=info.file_bytes, sha256=info.sha256
    )
    same = EnsembleTeacher(members, [2 * weight for weight in WEIGHTS]).info.sha256
    others = {
        EnsembleTeacher(members, (1, 1, 1)).info.sha256,
        EnsembleTeacher(members[1:], WEIGHTS[1:]).info.sha256,
        *(i.sha256 for i in infos),
    }
    assert same == info.sha256 and info.sha256 not in others
    narrow = fake([0.0], "a", "x")
    short = SimpleNamespace(info=replace(narrow.info, context_length=5), detokenize=narrow.detokenize)
    assert EnsembleTeacher([narrow, short], [1, 1]).info.context_length == 5
    as_teacher: Teacher = teacher
    assert as_teacher.info is info


def test_the_first_teacher_speaks_and_reads(members: list[HuggingFaceTeacher]) -> None:
    """Speech and tokens are the first member's."""
    teacher = EnsembleTeacher(members[:2], (1, 5))
    request, sampling = [[np.array([BOS], np.int32)]], Sampling(max_length=12, seed=3)
    reports: list[int] = []
    spoken = teacher.speak(request, sampling, first_index=4, progress=reports.append)
    assert np.array_equal(spoken[0], members[0].speak(request, sampling, first_index=4)[0])
    assert reports == [1]
    said, arrays = teacher.speak_and_score(request, sampling, Recipe("dense"), {}, first_index=4)
    assert np.array_equal(said[0], spoken[0])
    assert np.allclose(arrays["logits"], teacher.logits(spoken), atol=1e-5)
    (tokens,) = teacher.tokenize(["the cat</s>"], add_special=True, parse_special=True)
    assert teacher.detokenize([tokens]) == ["<s>the cat</s>"]
    assert min(teacher.speed(8, 2)) > 0


def test_closing_closes_all(tmp_path: Path) -> None:
    """Safe to call twice."""
    members = [HuggingFaceTeacher(make_folder(tmp_path / str(seed), seed=seed)) for seed in range(2)]
    with EnsembleTeacher(members, [1, 1]) as teacher:
        teacher.logits(texts(1))
    teacher.close()
    for member in members:
        with pytest.raises(ValueError, match="was closed"):
            member.logits(texts(1))
