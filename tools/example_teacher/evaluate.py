"""Measures the example teacher's GGUF file with llama.cpp, on requests kept out of its training.

Right answers are counted to the letter, by greedy decoding behind the file's own chat template.
"""

from __future__ import annotations

import ctypes
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import llama_cpp
import numpy as np
import numpy.typing as npt
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer

from tools.checked_llama import llama_cpp_as_checked
from tools.example_teacher.domain import Example, check_answer, examples
from tools.example_teacher.gguf import read_model
from tools.example_teacher.tokenizer import BOS_ID, EOS_ID, encode, turn_text

_F32: Final[int] = 0  # llama.cpp's number for float32, here the type of the key and value cache
_LONGEST_ANSWER: Final[int] = 220  # tokens
_SHOWN: Final[int] = 20  # wrong answers to print, at most


@dataclass(frozen=True)
class Outcome:
    """What the teacher answered to one request."""

    example: Example
    answer: str
    right: bool
    decision_right: bool


@dataclass(frozen=True)
class LogitComparison:
    """llama.cpp against PyTorch on the same weights, over all positions of some dialogues."""

    largest: float  # largest absolute difference of a logit
    mean: float  # mean absolute difference
    same_choice: float  # share of positions with the same most likely token


def open_teacher(path: Path) -> llama_cpp.Llama:
    """The teacher in llama.cpp, as exact as it gets: no flash attention, cache in float32.

    One thread, because a model this small gains nothing from more and loses much where cores are
    busy.
    """
    with llama_cpp_as_checked(path):
        return llama_cpp.Llama(
            str(path),
            n_ctx=512,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            flash_attn=False,
            type_k=_F32,
            type_v=_F32,
            verbose=False,
        )


def held_out_examples(seed: int, count: int) -> list[Example]:
    """``count`` different requests of which no key occurs in training."""
    result: dict[str, Example] = {}
    for example in examples(seed + 1, 20 * count, held_out=True):
        result.setdefault(example.prompt, example)
        if len(result) == count:
            return list(result.values())
    raise ValueError(f"only {len(result)} different held-out requests, not {count}")


def request_ids(teacher: llama_cpp.Llama, prompt: str) -> list[int]:
    """Token ids of a request, written by the chat template that stands in the file."""
    template = ImmutableSandboxedEnvironment().from_string(
        teacher.metadata["tokenizer.chat_template"]
    )
    messages = [{"role": "user", "content": prompt}]
    text = template.render(messages=messages, add_generation_prompt=True)
    return teacher.tokenize(text.encode("utf-8"), add_bos=True, special=True)


def token_bytes(teacher: llama_cpp.Llama, token: int) -> bytes:
    """The bytes of one token.

    ``Llama.detokenize`` of llama-cpp-python 0.3.36 has room for 32 bytes and silently leaves out
    longer tokens, of which a teacher may have a few.
    """
    room = ctypes.create_string_buffer(256)
    length = llama_cpp.llama_token_to_piece(teacher._model.vocab, token, room, len(room), 0, False)
    if length < 0:
        raise ValueError(f"token {token} is longer than {len(room)} bytes")
    return room.raw[:length]


def greedy_answer(teacher: llama_cpp.Llama, prompt: str) -> str:
    """The teacher's most likely answer, token by token."""
    answer: list[int] = []
    for token in teacher.generate(request_ids(teacher, prompt), temp=0.0, repeat_penalty=1.0):
        if token in (BOS_ID, EOS_ID) or len(answer) == _LONGEST_ANSWER:
            break
        answer.append(token)
    # A wrong answer may stop within a character of several bytes.
    return b"".join(token_bytes(teacher, token) for token in answer).decode(
        "utf-8", errors="replace"
    )


def ask_all(teacher: llama_cpp.Llama, asked: Sequence[Example], console: Console) -> list[Outcome]:
    """The teacher's answers to all requests."""
    outcomes = []
    for example in track(asked, "asking", console=console, refresh_per_second=1):
        answer = greedy_answer(teacher, example.prompt)
        decision = f": {example.decision}\n" in answer
        outcomes.append(Outcome(example, answer, check_answer(example, answer), decision))
    return outcomes


def _log_probabilities(teacher: llama_cpp.Llama, ids: list[int]) -> npt.NDArray[np.float64]:
    """Log probability (tokens - 1,) of each token after the first, in nats."""
    teacher.reset()
    teacher.eval(ids)
    logits = teacher.scores[: len(ids) - 1].astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    normalizer = (top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True)))[:, 0]
    return logits[np.arange(len(ids) - 1), ids[1:]] - normalizer


def perplexities(teacher: llama_cpp.Llama, asked: Sequence[Example]) -> tuple[float, float]:
    """Perplexity per token of whole dialogues, and of the answers with their end token alone."""
    whole, answers = [], []
    for example in asked:
        text = turn_text(example.prompt, example.answer).encode("utf-8")
        scores = _log_probabilities(teacher, teacher.tokenize(text, add_bos=True, special=True))
        whole.append(scores)
        # The score at index i is that of token i + 1.
        answers.append(scores[len(request_ids(teacher, example.prompt)) - 1 :])
    return float(np.exp(-np.concatenate(whole).mean())), float(
        np.exp(-np.concatenate(answers).mean())
    )


def compare_logits(
    teacher: llama_cpp.Llama, path: Path, asked: Sequence[Example]
) -> LogitComparison:
    """llama.cpp and PyTorch on the same dialogues."""
    model = read_model(path)
    differences, same = [], []
    for example in asked:
        text = turn_text(example.prompt, example.answer).encode("utf-8")
        ids = teacher.tokenize(text, add_bos=True, special=True)
        teacher.reset()
        teacher.eval(ids)
        ours = teacher.scores[: len(ids)]
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([ids])).logits[0].numpy()
        differences.append(np.abs(ours - theirs))
        same.append(ours.argmax(axis=1) == theirs.argmax(axis=1))
    joined = np.concatenate(differences)
    return LogitComparison(
        float(joined.max()), float(joined.mean()), float(np.concatenate(same).mean())
    )


def count_token_mismatches(
    teacher: llama_cpp.Llama, tokenizer: Tokenizer, asked: Sequence[Example]
) -> int:
    """Dialogues to which llama.cpp gives other token ids than the tokenizer that training used."""
    wrong = 0
    for example in asked:
        text = turn_text(example.prompt, example.answer)
        ids = teacher.tokenize(text.encode("utf-8"), add_bos=True, special=True)
        wrong += ids != [BOS_ID, *encode(tokenizer, text)]
    return wrong


def rate_table(outcomes: Sequence[Outcome]) -> Table:
    """Right answers and right decisions: overall, by family, by language, by decision."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        example = outcome.example
        for name in (
            "all",
            example.family,
            f"language {example.language}",
            f"decision {example.decision}",
        ):
            groups[name].append(outcome)
    table = Table("requests", "number", "exactly right", "decision right")
    for name in sorted(groups, key=lambda group: (group != "all", " " in group, group)):
        members = groups[name]
        right = sum(outcome.right for outcome in members) / len(members)
        decision = sum(outcome.decision_right for outcome in members) / len(members)
        table.add_row(name, str(len(members)), f"{right:.1%}", f"{decision:.1%}")
    return table


def evaluate(path: Path, tokenizer: Tokenizer, asked: Sequence[Example], console: Console) -> None:
    """Measures the file and prints what it found, wrong answers included."""
    torch.set_num_threads(1)
    teacher = open_teacher(path)
    wrong_ids = count_token_mismatches(teacher, tokenizer, asked)
    console.print(
        f"tokens: llama.cpp differs from the tokenizer in {wrong_ids} of {len(asked)} dialogues"
    )
    logits = compare_logits(teacher, path, asked[:50])
    console.print(
        f"logits, llama.cpp against PyTorch: largest difference {logits.largest:.4f}, "
        f"mean {logits.mean:.5f}, same choice {logits.same_choice:.2%}"
    )
    whole, answers = perplexities(teacher, asked)
    console.print(f"perplexity per token: dialogues {whole:.4f}, answers alone {answers:.4f}")
    start = time.monotonic()
    outcomes = ask_all(teacher, asked, console)
    console.print(f"{len(asked)} answers in {time.monotonic() - start:.0f} s")
    for outcome in [outcome for outcome in outcomes if not outcome.right][:_SHOWN]:
        example = outcome.example
        text = f"\n{example.prompt}\nexpected: {example.answer}\nanswered: {outcome.answer}"
        console.print(text, markup=False)
    console.print(rate_table(outcomes))
