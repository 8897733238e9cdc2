"""A teacher over a part of its vocabulary: what it says, by the definition."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from distill.trimming.file import write_reduced
from distill.trimming.for_student import reduced
from teachers.base import GenerationRequest, Sampling
from teachers.gguf.file import read_gguf, tokenizer_fields
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.reduced import ReducedTeacher, cut_of
from teachers.store.capture import LINEAR_TOLERANCE, logit_rule
from teachers.targets.recipe import Recipe
from teachers.vocabulary.cut import VocabularyCut
from teachers.vocabulary.reduced import VocabularyError
from teachers.vocabulary.selection import Vocabulary
from teachers.vocabulary.size import VocabularySize

pytestmark = pytest.mark.usefixtures("llama_here")
TEXTS = ["The pump of line 7 stops. Äpfel, 猫 and\n  more", "def f(x):\n    return x + 12345"]


@pytest.fixture(scope="module")
def teacher(
    tiny_teacher_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ReducedTeacher]:
    """The tiny teacher over a third of its tokens, chosen at random."""
    file = read_gguf(tiny_teacher_path)
    whole = Vocabulary(tokenizer_fields(file))
    mass = np.random.default_rng(0).random(len(whole))
    vocabulary = whole.select(mass, VocabularySize.parse("33%"))
    path = tmp_path_factory.mktemp("reduced") / "teacher.gguf"
    write_reduced(file, vocabulary, path)
    cut = VocabularyCut(vocabulary, "33%", 0.5, 0.25, {"Greek": 0.125})
    with (
        GGUFTeacher(tiny_teacher_path, threads=1) as original,
        reduced(original, cut, path) as result,
    ):
        assert isinstance(result, ReducedTeacher)
        yield result


def folded(teacher: ReducedTeacher, logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of the new tokens, token by token."""
    shares = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    result = np.zeros((len(logits), len(teacher.vocabulary)))
    for old, new in enumerate(teacher.vocabulary.first_piece.tolist()):
        result[:, new] += shares[:, old]
    return np.log(result)


def test_its_text_is_the_same_in_other_tokens(teacher: ReducedTeacher) -> None:
    """Every text comes back; its ids are the original's kept tokens that spell it."""
    assert teacher.info.vocab_size == len(teacher.vocabulary) < teacher.original.info.vocab_size
    assert cut_of(teacher) is teacher.cut and cut_of(teacher.original) is None
    new = teacher.tokenize(TEXTS, add_special=False, parse_special=False)
    old = [teacher.vocabulary.kept[tokens].astype(np.int32) for tokens in new]
    assert teacher.detokenize(new) == teacher.original.detokenize(old)
    plain = teacher.original.tokenize(TEXTS, add_special=False, parse_special=False)
    assert teacher.detokenize(new) == teacher.original.detokenize(plain)
    assert sum(map(len, new)) > sum(map(len, plain))
    for name in ("bos", "eos"):
        ours, theirs = getattr(teacher.info, name), getattr(teacher.original.info, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or teacher.vocabulary.kept[ours] == theirs, name


def test_what_it_says_is_folded(teacher: ReducedTeacher) -> None:
    """Dense and compact targets against the definition, also where only some are wanted."""
    sequences = teacher.tokenize(TEXTS, add_special=False, parse_special=False)
    old = [teacher.vocabulary.kept[tokens].astype(np.int32) for tokens in sequences]
    expected = folded(teacher, teacher.original.logits(old, exact=True))

    def said(logits: np.ndarray) -> np.ndarray:
        wide = logits.astype(np.float64)
        most = wide.max(axis=-1, keepdims=True)
        return np.asarray(wide - most - np.log(np.exp(wide - most).sum(axis=-1, keepdims=True)))

    exact = said(teacher.logits(sequences, exact=True))
    np.testing.assert_allclose(exact, expected, atol=1e-5)
    keep = [np.arange(len(tokens) - 1) % 3 == 0 for tokens in sequences]
    some = said(teacher.logits(sequences, exact=True, keep=keep))
    np.testing.assert_allclose(some, expected[np.concatenate(keep)], atol=1e-5)
    arrays = teacher.score(sequences, Recipe("compact", 8), {})
    order = np.argsort(-expected, axis=-1, kind="stable")[:, :8]
    best = np.take_along_axis(expected, order, axis=-1)
    # Two tokens that are as probable may change places; their logits are the same all the same.
    np.testing.assert_allclose(arrays["topk_logits"], best - best[:, :1], atol=3e-2)
    tail = 1.0 - np.exp(best).sum(axis=-1)
    mass = np.exp(arrays["tail"][:, -1].astype(np.float64) + best[:, 0])
    np.testing.assert_allclose(mass, tail, rtol=2e-2, atol=1e-4)


def test_its_states_give_the_kept_logits(teacher: ReducedTeacher) -> None:
    """What a sketch needs: states times the kept rows are the logits before folding."""
    (tokens, _) = teacher.tokenize(TEXTS, add_special=False, parse_special=False)
    rule = logit_rule(teacher, tokens)
    states = teacher.states([tokens])["final"]
    product = rule.scale * states @ teacher.output_rows(0, teacher.info.vocab_size).T
    plain = teacher.product_logits([tokens])
    assert (
        np.std(product - plain, axis=-1).mean() < LINEAR_TOLERANCE * np.std(plain, axis=-1).mean()
    )


def test_what_it_writes_is_spelled_anew(teacher: ReducedTeacher) -> None:
    """The original's text, in kept tokens, of the length that was asked for at most."""
    prompt = teacher.tokenize(["The pump"], add_special=False, parse_special=False)[0]
    old = teacher.vocabulary.kept[prompt].astype(np.int32)
    sampling = Sampling(max_length=24, seed=3)
    written = teacher.generate(GenerationRequest([[prompt]] * 4, sampling))
    theirs = teacher.original.generate(GenerationRequest([[old]] * 4, sampling))
    for ours, whole in zip(written, theirs, strict=True):
        assert len(ours) <= 24 and ours[: len(prompt)].tolist() == prompt.tolist()
        text = teacher.detokenize([ours])[0].rstrip("\ufffd")
        assert teacher.original.detokenize([whole])[0].startswith(text)


def test_a_cut_comes_back_from_a_file(teacher: ReducedTeacher) -> None:
    """The same vocabulary and facts; damaged ones are refused."""
    arrays = teacher.cut.arrays()
    again = VocabularyCut.in_arrays(arrays)
    assert again is not None and again.key == teacher.cut.key
    assert again.facts() == teacher.cut.facts() and again.facts()["added_tokens"] == 0.25
    assert VocabularyCut.in_arrays({}) is None
    kept = arrays["kept"].copy()
    kept[0], kept[1] = kept[1], kept[0]
    facts = arrays["vocabulary_facts"][:-4]
    no_number = np.frombuffer(arrays["vocabulary_facts"].tobytes().replace(b"0.25", b"NaN "), "u1")
    for name, value in {"kept": kept, "vocabulary_facts": facts}.items():
        with pytest.raises(VocabularyError, match="damaged"):
            VocabularyCut.in_arrays(arrays | {name: value})
            pytest.fail(name)
    with pytest.raises(VocabularyError, match="damaged"):
        VocabularyCut.in_arrays(arrays | {"vocabulary_facts": no_number})
