"""How much faster a teacher speaks when many sequences are decoded together: ratios of one run.

python -m tools.bench.generation [TEACHER.gguf] [--together 32]
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
from rich.console import Console
from rich.table import Table

from teachers import example_teacher
from teachers.base import GenerationRequest, Sampling, Tokens
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.capture import fit_shared_codec
from teachers.targets.recipe import compact_recipe
from teachers.tokenizer.conversation import opening_segments
from tools.bench.capture import quiet
from tools.checked_llama import llama_cpp_as_checked


def rate(generate: Callable[[], list[Tokens]], forced: int) -> float:
    """Written tokens per second, the better of two rounds."""
    best = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        said = generate()
        best = max(
            best, sum(len(tokens) - forced for tokens in said) / (time.perf_counter() - begin)
        )
    return best


def high_level(path: Path, opening: Tokens, sampling: Sampling, threads: int) -> list[Tokens]:
    """Eight sequences, one after another, as llama-cpp-python's own interface writes them."""
    with quiet(), llama_cpp_as_checked(path):
        model = llama_cpp.Llama(
            str(path),
            n_ctx=sampling.max_length,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        said = []
        for _ in range(8):
            model.reset()
            tokens = opening.tolist()
            for token in model.generate(
                opening.tolist(), temp=1.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0
            ):
                tokens.append(token)
                if token == model.token_eos() or len(tokens) >= sampling.max_length:
                    break
            said.append(np.array(tokens, dtype=np.int32))
        model.close()
    return said


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, nargs="?", default=example_teacher())
    parser.add_argument("--together", type=int, default=32)
    options = parser.parse_args()
    sampling = Sampling(max_length=128)
    table = Table(
        "the teacher writes", "tokens/s", "against one at a time", "against Llama.generate"
    )
    with GGUFTeacher(options.teacher) as teacher:
        opening = opening_segments(teacher)
        if opening is None:
            raise SystemExit(f"{options.teacher} has no token to start from")
        forced = len(opening[0])
        request = GenerationRequest([opening] * options.together, sampling)
        info = teacher.info
        recipe = compact_recipe(16, info.vocab_size, info.width)
        bases = fit_shared_codec(teacher, teacher.generate(request), recipe).bases
        one = rate(
            lambda: [
                teacher.generate(GenerationRequest([opening], sampling, i))[0] for i in range(8)
            ],
            forced,
        )
        greedy = max(teacher.speed(16, 64)[1] for _ in range(2))
        high = rate(
            functools.partial(high_level, options.teacher, opening[0], sampling, teacher.threads),
            forced,
        )
        together = rate(lambda: teacher.generate(request), forced)
        kept = rate(lambda: teacher.generate_and_score(request, recipe, bases)[0], forced)

        def two_passes() -> list[Tokens]:
            said = teacher.generate(request)
            teacher.score(said, recipe, bases)
            return said

        twice = rate(two_passes, forced)
    for name, value in (
        ("one sequence at a time", one),
        ("one at a time, llama-cpp-python's Llama.generate", high),
        ("one sequence, greedy, llama.cpp alone with all threads", greedy),
        (f"{options.together} together", together),
        (f"{options.together} together, soft targets kept on the way", kept),
        (f"{options.together} together, soft targets in a second pass", twice),
    ):
        table.add_row(name, f"{value:,.0f}", f"{value / one:.1f}", f"{value / high:.1f}")
    Console().print(f"{info.name}, {teacher.threads} threads", table)


if __name__ == "__main__":
    main()
