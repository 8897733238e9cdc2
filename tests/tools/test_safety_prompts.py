"""The safety head's prompts: packed as the grammar writes them, balanced, without leaks."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from itertools import combinations

import pytest

from distill.heads.prompts import built_in_prompts, split_by_scenario
from tools.safety_prompts.grammar import WORLDS, written
from tools.safety_prompts.japanese import forms
from tools.safety_prompts.make import RUN, TARGET, packed


def test_the_packed_file_is_what_the_grammar_writes() -> None:
    """Row by row: whoever changes a text has to pack it again (python -m
    tools.safety_prompts.make)."""
    kept, made = (gzip.decompress(data).decode() for data in (TARGET.read_bytes(), packed()))
    assert kept == made
    rows = [json.loads(line) for line in kept.splitlines()]
    assert [row["prompt"] for row in rows] == [prompt.text for prompt in built_in_prompts()]


def test_parts_are_large_and_balanced() -> None:
    """At least 6,000 to learn from, as many of each label and language as of any other."""
    for part, prompts in split_by_scenario(built_in_prompts()).items():
        counts = Counter((prompt.decision, prompt.language) for prompt in prompts)
        assert len(counts) == 6 and max(counts.values()) <= 1.15 * min(counts.values()), part
        assert len(prompts) >= {"train": 6000, "validation": 16000, "test": 150}[part]
        assert len({prompt.text for prompt in prompts}) >= 0.98 * len(prompts), part


def test_no_scene_and_no_run_of_words_is_in_two_parts() -> None:
    """Counted here by plain loops over the packed prompts; of the grammar's worlds what is wanted
    is compared, as the frames around it belong to all."""
    parts = split_by_scenario(built_in_prompts())
    scenes = {part: {prompt.scenario for prompt in prompts} for part, prompts in parts.items()}
    found: dict[object, set[tuple[str, ...]]] = defaultdict(set)
    for part, prompts in parts.items():
        for prompt in prompts:
            found[part] |= spans(prompt.text, prompt.language)
    for one, other in combinations(parts, 2):
        assert not scenes[one] & scenes[other]
        assert not found[one] & found[other], (one, other)
    texts = {prompt.text for prompt in parts["train"]}
    worlds: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for prompt in written(20):
        if prompt.text in texts:
            worlds[prompt.world] |= spans(prompt.wanted, prompt.language)
    assert len(worlds) == WORLDS + 1
    for world, other in combinations(worlds, 2):
        assert not worlds[world] & worlds[other], (world, other)


def spans(text: str, language: str) -> set[tuple[str, ...]]:
    """All stretches of so many words, or Japanese characters."""
    words = re.findall(r"[^\W_]+" if language == "en" else r"[^\W_]", text.lower().replace("'", ""))
    length = RUN[language]
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}


def test_every_label_has_the_same_frames_and_words_of_the_others() -> None:
    """Contrast sets: neutral phrases under every label; harmful ones in all three too."""
    kinds = defaultdict(set)
    for prompt in written(60):
        kinds[prompt.kind].add((prompt.label, prompt.language))
    both = {
        (label, language) for label in ("ALLOW", "ESCALATE", "REFUSE") for language in ("en", "ja")
    }
    assert kinds["neutral"] == kinds["vp"] == kinds["s"] == both
    assert {label for label, _ in kinds["guard"]} == {"ALLOW"}
    assert {label for label, _ in kinds["incident"]} == {"ESCALATE"}


def test_japanese_verbs() -> None:
    """One of each class, and what is no verb."""
    for phrase, tai, te in (
        ("金を盗む", "盗みたい", "盗んで"),
        ("扉を開ける*", "開けたい", "開けて"),
        ("資料を売る", "売りたい", "売って"),
        ("鍵を隠す", "隠したい", "隠して"),
        ("家へ行く", "行きたい", "行って"),
        ("名を書く", "書きたい", "書いて"),
        ("席を選ぶ", "選びたい", "選んで"),
        ("所長を脅迫する", "脅迫したい", "脅迫して"),
        ("金を払う", "払いたい", "払って"),
    ):
        found = forms(phrase)
        assert found["tai"].endswith(tai) and found["te"].endswith(te), phrase
        assert found["dict"] == phrase.rstrip("*")
    with pytest.raises(ValueError, match="does not end in a verb"):
        forms("証拠を残さない")
