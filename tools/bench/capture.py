"""How fast soft targets are captured, against llama.cpp itself: ratios measured side by side in one
run.

    python -m tools.bench.capture [TEACHER.gguf]

Without a file, a random-weight teacher of 1024×8 in Q8_0 with 32,064 tokens is made in a temporary
folder. Every contender gets the same tokens; the contenders take turns, and the best of the rounds
counts.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import llama_cpp
import llama_cpp.llama_cpp as native
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from teachers.base import TeacherInfo
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.capture import CaptureError, fit_shared_codec, logit_rule
from teachers.targets.recipe import Recipe, compact_recipe
from teachers.targets.state_codec import Basis
from tools.checked_llama import llama_cpp_as_checked
from tools.models.random_teacher import shape_of, write

Tokens = NDArray[np.int32]
BARE = "llama_decode, all logits"


class Bare:
    """llama.cpp by itself: a batch of whole sequences, ``llama_decode``, all logits, its own
    defaults."""

    def __init__(
        self, path: Path, threads: int, batch: int, length: int, gpu_layers: int = 0
    ) -> None:
        options = native.llama_model_default_params()
        options.n_gpu_layers = gpu_layers
        self.model = native.llama_model_load_from_file(str(path).encode(), options)
        parameters = native.llama_context_default_params()
        self.rows, self.length = batch // length, length
        parameters.n_seq_max = self.rows
        parameters.n_ctx = self.rows * -(-length // 256) * 256
        parameters.n_batch = parameters.n_ubatch = batch
        parameters.n_outputs_max_per_seq = 0
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = native.llama_init_from_model(self.model, parameters)
        self.batch = native.llama_batch_init(batch, 0, 1)

    def decode(self, sequences: list[Tokens]) -> None:
        """Decode all sequences and touch the logits."""
        for start in range(0, len(sequences), self.rows):
            native.llama_memory_clear(native.llama_get_memory(self.context), True)
            place = 0
            for slot, tokens in enumerate(sequences[start : start + self.rows]):
                for position, token in enumerate(tokens[: self.length].tolist()):
                    self.batch.token[place], self.batch.pos[place] = token, position
                    self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, slot
                    self.batch.logits[place] = 1
                    place += 1
            self.batch.n_tokens = place
            assert native.llama_decode(self.context, self.batch) == 0
            native.llama_get_logits(self.context)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """llama.cpp's own messages go nowhere while it loads."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(null)
        os.close(saved)


def score(
    teacher: GGUFTeacher, data: list[Tokens], recipe: Recipe, bases: Mapping[str, Basis]
) -> None:
    """Capture and drop the result."""
    teacher.score(data, recipe, bases)


def best_times(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of each contender: the best of some rounds in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()  # the first call allocates
    for _ in range(rounds):
        for name, contender in contenders.items():
            begin = time.perf_counter()
            contender()
            times[name].append(time.perf_counter() - begin)
    return {name: min(values) for name, values in times.items()}


def capture_seconds(
    path: Path, rounds: int, sequences: int, length: int, gpu_layers: int = 0
) -> tuple[TeacherInfo, dict[str, float]]:
    """The teacher's facts, and each contender's seconds for so many sequences."""
    threads = torch.get_num_threads()
    random = np.random.default_rng(0)
    options = LoadOptions(gpu_layers)
    with GGUFTeacher(path, options, threads=threads) as teacher, quiet():
        info = teacher.info
        data: list[Tokens] = [
            random.integers(300, info.vocab_size, length + 1).astype(np.int32)
            for _ in range(sequences)
        ]
        recipes = {
            "compact, sketch": compact_recipe(16, info.vocab_size, info.width),
            "compact, no sketch": Recipe("compact", 16, 0),
            "hidden": Recipe("hidden"),
        }
        try:
            logit_rule(teacher, data[0])
        except CaptureError as error:
            Console().print(f"no sketch, no hidden states: {error}")
            recipes = {"compact, no sketch": recipes["compact, no sketch"]}
        bases = {
            name: fit_shared_codec(teacher, data, recipe).bases for name, recipe in recipes.items()
        }
        with llama_cpp_as_checked(path):
            bare = Bare(path, threads, 512, length, gpu_layers)
            high = llama_cpp.Llama(
                str(path),
                n_ctx=length + 1,
                n_batch=length + 1,
                logits_all=True,
                n_gpu_layers=gpu_layers,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )

        def evaluate_high() -> None:
            for tokens in data:
                high.reset()
                high.eval(tokens[:length].tolist())

        contenders: dict[str, Callable[[], None]] = {BARE: lambda: bare.decode(data)}
        for name, recipe in recipes.items():
            contenders[name] = functools.partial(score, teacher, data, recipe, bases[name])
        contenders["Llama(logits_all).eval"] = evaluate_high
        times = best_times(contenders, rounds)
        high.close()
    return info, times


def measure(path: Path, rounds: int, sequences: int, length: int) -> None:
    """Run all contenders and print the table."""
    info, times = capture_seconds(path, rounds, sequences, length)
    table = Table("capture", "tokens/s", "against llama_decode", "against Llama.eval")
    tokens = sequences * length
    for name, seconds in times.items():
        table.add_row(
            name,
            f"{tokens / seconds:,.0f}",
            f"{times[BARE] / seconds:.3f}",
            f"{times['Llama(logits_all).eval'] / seconds:.3f}",
        )
    console = Console()
    console.print(
        f"{path.name}: {info.parameters / 1e6:.0f} M parameters, {sequences} × {length} tokens, "
        f"{torch.get_num_threads()} threads"
    )
    console.print(table)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.teacher or Path(folder) / "random-1024x8.gguf"
        if options.teacher is None:
            write(path, shape_of("1024x8", 32064), "q8_0", 0)
        measure(path, options.rounds, options.sequences, options.length)


if __name__ == "__main__":
    main()
