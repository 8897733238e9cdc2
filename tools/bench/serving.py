"""How fast soft targets come from a server on this machine, against the file itself, and how right
the tail is that a server's top-k leaves to be estimated.

    python -m tools.bench.serving [TEACHER.gguf] [--text FILE]

Without a file, the example teacher. `distill serve` runs in a process of its own; it and the
teacher here take turns with the same tokens, and the best of the rounds counts. Without a text, the
teacher writes it.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from teachers import example_teacher
from teachers.base import GenerationRequest, Sampling, Tokens
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.remote.connection import Address, Connection
from teachers.remote.tail import estimated_tail
from teachers.remote.teacher import ServedTeacher
from teachers.store.capture import fit_shared_codec
from teachers.targets.distributions import CompactTargets
from teachers.targets.recipe import NODES, compact_recipe
from tools.bench.capture import best_times

TOPK = 16
TEMPERATURES = (1.0, 1.5, 2.0, 3.0)
TAIL_POSITIONS = 4096
GREETING = re.compile(r"http://\S+:\d+")


@contextmanager
def served(path: Path) -> Iterator[Connection]:
    """``distill serve`` with this file, in a process of its own."""
    token = secrets.token_hex(16)
    words = [sys.executable, "-m", "distill", "serve", str(path), "--port", "0"]
    environment = os.environ | {"DISTILL_TEACHER_TOKEN": token, "COLUMNS": "200"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            said = next(filter(None, map(GREETING.search, process.stdout)))
            yield Connection(Address.parse(said[0]), token)
        finally:
            process.terminate()


def some_text(teacher: GGUFTeacher, text: Path | None, count: int, length: int) -> list[Tokens]:
    """So many sequences of so many tokens, one more each: what follows the last is not known."""
    if text is None:
        start = np.array([teacher.info.bos or 0], np.int32)
        sampling = Sampling(max_length=length + 1)
        written = teacher.generate(GenerationRequest([[start]] * count, sampling))
        return [np.resize(tokens, length + 1) for tokens in written]
    words = text.read_text(encoding="utf-8")[: 16 * count * (length + 1)]
    (tokens,) = teacher.tokenize([words], add_special=False, parse_special=False)
    return list(np.resize(tokens, (count, length + 1)))


def throughput(teacher: GGUFTeacher, server: Connection, text: list[Tokens], rounds: int) -> Table:
    """Tokens per second, directly, through the server, and through its OpenAI route."""
    remote, info = ServedTeacher(server), teacher.info
    recipe = compact_recipe(TOPK, info.vocab_size, info.width)
    bases = fit_shared_codec(teacher, text, recipe).bases if recipe.has_sketch else {}
    request = {"max_tokens": 0, "prompt_logprobs": TOPK}
    request["prompt"] = [tokens.tolist() for tokens in text]  # type: ignore[assignment]
    contenders: dict[str, Callable[[], object]] = {
        "file": lambda: teacher.score(text, recipe, bases),
        "distill serve": lambda: remote.score(text, recipe, bases),
        "its /v1/completions": lambda: server.post("/v1/completions", request),
    }
    direct, other = (one.score(text, recipe, bases) for one in (teacher, remote))
    assert all(np.array_equal(direct[name], other[name]) for name in direct)
    times = best_times(contenders, rounds)  # type: ignore[arg-type]
    tokens = sum(len(one) - 1 for one in text)
    table = Table("capture", "tokens/s", "against the file", title=f"{info.name}, {tokens} tokens")
    for name, seconds in times.items():
        table.add_row(name, f"{tokens / seconds:,.0f}", f"{times['file'] / seconds:.3f}")
    return table


def tails(teacher: GGUFTeacher, text: list[Tokens]) -> Table:
    """Mass outside the top-k at several temperatures, and the mean error of what stands for it."""
    rows, vocab_size = [], teacher.info.vocab_size
    for tokens in text:
        rows.append(torch.from_numpy(teacher.logits([tokens])))
        if sum(map(len, rows)) * vocab_size > 1 << 27 or sum(map(len, rows)) > TAIL_POSITIONS:
            break
    logits = torch.cat(rows)
    exact = CompactTargets.from_logits(logits, TOPK)
    logprobs = logits.log_softmax(-1).gather(1, exact.topk_ids).double().numpy()
    guess = CompactTargets(
        exact.topk_ids, exact.topk_logits, torch.from_numpy(estimated_tail(logprobs, vocab_size)),
        vocab_size,
    )  # fmt: skip
    # All tokens of the tail alike: the most mass that it can have.
    rest = vocab_size - TOPK
    log_mass = np.log(np.maximum(1e-12, 1.0 - np.exp(logprobs).sum(axis=1)) / rest)
    even = [node * (log_mass - logprobs[:, 0]) + np.log(rest) for node in NODES]
    flat_tail = torch.from_numpy(np.stack(even, axis=1)).float()
    flat = CompactTargets(exact.topk_ids, exact.topk_logits, flat_tail, vocab_size)
    table = Table(
        "T", "mass of the tail", "error: power law", "none", "all alike",
        title=f"outside the top {TOPK} of {vocab_size}, {len(logits)} positions",
    )  # fmt: skip
    for temperature in TEMPERATURES:
        mass = exact.tail_mass(temperature)
        errors = [
            f"{float((one - mass).abs().mean()):.4f}"
            for one in (
                guess.tail_mass(temperature), torch.zeros_like(mass), flat.tail_mass(temperature)
            )
        ]  # fmt: skip
        table.add_row(f"{temperature:g}", f"{float(mass.mean()):.4f}", *errors)
    return table


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, nargs="?", default=example_teacher())
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as `distill` has it, here and there
    with GGUFTeacher(options.teacher) as teacher, served(options.teacher) as server:
        text = some_text(teacher, options.text, options.sequences, options.length)
        Console().print(throughput(teacher, server, text, options.rounds))
        Console().print(tails(teacher, text))


if __name__ == "__main__":
    main()
