"""What the teacher would decide: against products of token probabilities, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from distill.config.loading import load_config
from distill.errors import UserError
from distill.heads import teacher_labels
from distill.heads.prompts import SafetyPrompt, built_in_prompts, read_safety_prompts
from distill.heads.safety_data import labelled_prompts
from distill.heads.teacher_labels import (
    OPENING,
    QUESTION,
    find_judgment,
    judge_prompts,
    keep_judgment,
)
from distill.runtime.progress import Console
from students.model.head_decisions import DECISIONS
from teachers.base import Floats, Tokens
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.manifest import read_manifest
from teachers.store.store import SoftTargetStore
from teachers.targets.recipe import Recipe
from teachers.tokenizer.conversation import conversation_tokens
from tests.support.stores import write_store
from tests.support.teachers import BigramTeacher

THIRD = (1 / 3, 1 / 3, 1 / 3)


def prompts(*texts: str) -> list[SafetyPrompt]:
    return [SafetyPrompt(text, text, "", THIRD) for text in texts]


class SpellingTeacher(BigramTeacher):
    """A bigram teacher that reads letter by letter; ``alike``: letters that are one token to it."""

    def __init__(self, alike: str = "") -> None:
        super().__init__(61, 8)
        self.answers = 0.2 * self.answers  # no letter is all but certain
        self.alike = alike
        self.asked: list[Tokens] = []

    def tokenize(
        self, texts: Sequence[str], *, add_special: bool, parse_special: bool
    ) -> list[Tokens]:
        assert not add_special

        def number(sign: str) -> int:
            return 60 if sign in self.alike else 1 + ord(sign) % 59

        return [np.array([number(sign) for sign in text], dtype=np.int32) for text in texts]

    def logits(self, sequences: Sequence[Tokens], **how: Any) -> Floats:
        self.asked += list(sequences)
        return super().logits(sequences, **how)


def shares(weights: Sequence[float]) -> NDArray[np.float64]:
    """Weights as probabilities."""
    return np.array(weights) / np.sum(weights)


def softmax(row: NDArray[np.float32]) -> NDArray[np.float64]:
    """In float64."""
    return shares(np.exp(row.astype(np.float64) - row.max()))


def test_products_of_token_probabilities() -> None:
    """Each word's letters after 'Decision: ', one after another, also where words begin alike."""
    for alike in ("", "AE", "ER", "AER"):
        teacher = SpellingTeacher(alike)
        found = judge_prompts(teacher, prompts("one", "two, longer"))  # type: ignore[arg-type]
        chances = []
        for name in DECISIONS:
            letters = teacher.tokenize([f" {name}"], add_special=False, parse_special=False)[0]
            answers = [softmax(teacher.answers[before].numpy()) for before in letters[:-1]]
            pairs = zip(answers, letters[1:], strict=True)
            chances.append(np.prod([row[letter] for row, letter in pairs]))
        for row in found:  # to a bigram teacher the request itself makes no difference
            assert row == pytest.approx(shares(chances), rel=1e-4), alike
        assert found.dtype == np.float32 and max(shares(chances)) < 0.999, alike


def test_the_question_is_asked_in_full() -> None:
    """BOS, the question with the request in it, the begun answer with each of the three words."""
    teacher = SpellingTeacher()
    judge_prompts(teacher, prompts("first", "second"))  # type: ignore[arg-type]
    expected = [
        [0, *teacher.tokenize([text], add_special=False, parse_special=False)[0].tolist()]
        for request in ("first", "second")
        for text in [QUESTION.format(request=request) + f"{OPENING} {name}" for name in DECISIONS]
    ]
    assert [tokens.tolist() for tokens in teacher.asked] == expected


def test_a_gguf_teacher_by_brute_force(tiny_teacher: GGUFTeacher) -> None:
    """Through its chat template: softmax of every position's logits, multiplied."""
    words = ["Where is the gate?", "どうやって鍵を開けますか", "x"]
    done: list[int] = []
    found = judge_prompts(tiny_teacher, prompts(*words), done.append)
    assert done == [3] and np.abs(found.sum(axis=1) - 1.0).max() < 1e-6
    texts = [f"Decision: {name}" for name in DECISIONS]
    endings = tiny_teacher.tokenize(texts, add_special=False, parse_special=False)
    same = 0
    while len({int(ending[same]) for ending in endings}) == 1:
        same += 1
    for word, row in zip(words, found, strict=True):
        message = {"role": "user", "content": QUESTION.format(request=word)}
        question = conversation_tokens(tiny_teacher, [message], answer=True)
        chances = []
        for ending in endings:
            tokens = np.concatenate((question, ending)).astype(np.int32)
            answers = map(softmax, tiny_teacher.logits([tokens])[len(question) + same - 1 :])
            said = tokens[len(question) + same :]
            chances.append(np.prod([p[token] for p, token in zip(answers, said, strict=True)]))
        assert row == pytest.approx(shares(chances), rel=2e-3, abs=1e-6), word
    assert found[0] != pytest.approx(found[1], abs=1e-3)


def test_many_prompts_are_judged_like_each_alone(tiny_teacher: GGUFTeacher) -> None:
    """Across the border of what is asked together."""
    some = [p for p in built_in_prompts() if p.language == "en" and len(p.text) < 60]
    some = some[: teacher_labels.TOGETHER + 2]
    together = judge_prompts(tiny_teacher, some)
    assert together.shape == (len(some), 3)
    for index in (0, len(some) - 3, len(some) - 1):
        alone = judge_prompts(tiny_teacher, [some[index]])
        assert together[index] == pytest.approx(alone[0], abs=2e-3), index


def test_a_question_that_does_not_fit_is_refused(tiny_teacher: GGUFTeacher) -> None:
    """Named by its beginning, before llama.cpp is asked."""
    message = r"prompt 'long long .*…' has \d+ tokens with .* it, the teacher's context is 256"
    with pytest.raises(UserError, match=message):
        judge_prompts(tiny_teacher, prompts("long " * 600))


@pytest.fixture
def store(tmp_path: Path) -> SoftTargetStore:
    rows = [np.arange(1, 5, dtype=np.int32)] * 3
    return write_store(tmp_path / "store", BigramTeacher(61, 8), rows, Recipe(num_topk=4), 3)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts the teacher has been asked, each time; it decides by the prompt's number."""
    seen: list[int] = []

    def judge(
        teacher: object, some: list[SafetyPrompt], progress: object = None
    ) -> NDArray[np.float32]:
        seen.append(len(some))
        chosen = np.array([int(prompt.text) % 3 for prompt in some])
        return np.where(np.eye(3)[chosen] > 0, 0.5, 0.25).astype(np.float32)

    monkeypatch.setattr(teacher_labels, "judge_prompts", judge)
    return seen


MANY = prompts(*map(str, range(30)))
NOBODY: GGUFTeacher = None  # type: ignore[assignment]


def test_a_judgment_is_kept_and_used_again(store: SoftTargetStore, asked: list[int]) -> None:
    """Asked once; then from the store, also by another process, for these prompts alone."""
    assert find_judgment(MANY, store) is None
    first = keep_judgment(NOBODY, MANY, store, Console())
    assert [prompt.decision for prompt in first] == [n % 3 for n in range(30)]
    labels = {prompt.label for prompt in first}
    assert labels == {(0.5, 0.25, 0.25), (0.25, 0.5, 0.25), (0.25, 0.25, 0.5)}
    again = SoftTargetStore(store.folder, read_manifest(store.folder))
    assert keep_judgment(NOBODY, MANY, again, Console()) == first == find_judgment(MANY, again)
    assert asked == [30]
    assert find_judgment(MANY[:-1], store) is None
    keep_judgment(NOBODY, MANY[:-1], store, Console())
    assert asked == [30, 29] and find_judgment(MANY, store) == first


def test_another_question_is_another_judgment(
    store: SoftTargetStore, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer to what was asked differently is not used."""
    keep_judgment(NOBODY, MANY, store, Console())
    monkeypatch.setattr(teacher_labels, "QUESTION", QUESTION + " Think.")
    assert find_judgment(MANY, store) is None


def test_a_damaged_judgment_is_asked_for_again(store: SoftTargetStore, asked: list[int]) -> None:
    """Whatever happened to the file; then it is whole again."""
    first = keep_judgment(NOBODY, MANY, store, Console())
    (path,) = store.folder.glob("judgment-*.safetensors")
    whole = path.read_bytes()
    labels = np.full((30, 3), 1 / 3, dtype=np.float32)
    harm: dict[str, bytes | dict[str, NDArray[np.float32]]] = {
        "flip": whole[:-3] + bytes([whole[-3] ^ 64]) + whole[-2:],
        "cut": whole[:-5],
        "empty": b"",
        "text": b"not a file of tensors, just words",
        "shape": {"labels": labels[:-1]},
        "nan": {"labels": np.full_like(labels, np.nan)},
        "name": {"else": labels},
    }
    for number, (name, content) in enumerate(harm.items()):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            store.write_file(path.name, content)
        assert find_judgment(MANY, store) is None, name
        assert keep_judgment(NOBODY, MANY, store, Console()) == first, name
        assert asked == [30] * (number + 2) and path.read_bytes() == whole, name


def test_a_teacher_that_sees_no_difference_is_refused(store: SoftTargetStore) -> None:
    """There is nothing to learn where it decides alike on everything."""
    teacher = SpellingTeacher()
    teacher.info = replace(teacher.info, context_length=4096)
    with pytest.raises(UserError, match=r"as the teacher judges them: no example of \w+ and \w+"):
        keep_judgment(teacher, MANY, store, Console())  # type: ignore[arg-type]


def test_without_the_teacher_its_judgment_must_be_there(
    store: SoftTargetStore, asked: list[int]
) -> None:
    """Training from a store says what to do; other labels need no teacher."""
    config = load_config(None, {}, ["safety.labels=teacher"])
    with pytest.raises(
        UserError, match=r"does not hold its judgment of these prompts; run `distill capture`"
    ):
        labelled_prompts(config, MANY, None, store, Console())
    teacher: Any = SpellingTeacher()
    kept = labelled_prompts(config, MANY, teacher, store, Console())
    assert labelled_prompts(config, MANY, None, store, Console()) == kept and asked == [30]
    plain = load_config(None, {}, [])
    built_in = read_safety_prompts(plain)
    assert labelled_prompts(plain, built_in, None, store, Console()) is built_in
    assert labelled_prompts(config, None, None, store, Console()) is None
