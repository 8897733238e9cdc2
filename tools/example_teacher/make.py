"""Makes the embedded example teacher: ``python -m tools.example_teacher.make`` trains it and writes
the GGUF file.

``--evaluate`` measures the file that is there, with llama.cpp, on held-out requests.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from rich.console import Console
from tokenizers import Tokenizer

from tools.example_teacher.domain import examples
from tools.example_teacher.gguf import write_gguf
from tools.example_teacher.tokenizer import train_tokenizer
from tools.example_teacher.training import Settings, train

DEFAULT_PATH: Final[Path] = (
    Path(__file__).resolve().parents[2] / "teachers" / "example" / "teacher.gguf"
)
TOKENIZER_EXAMPLES: Final[int] = 20000


def make_tokenizer(settings: Settings) -> Tokenizer:
    """The tokenizer, trained on requests and answers that training may use."""
    drawn = examples(settings.seed, TOKENIZER_EXAMPLES)
    lines = [text for example in drawn for text in (example.prompt, example.answer)]
    return train_tokenizer(lines, settings.vocab_size)


def make_teacher(path: Path, settings: Settings, console: Console) -> None:
    """Trains tokenizer and model and writes them to ``path``."""
    start = time.monotonic()
    tokenizer = make_tokenizer(settings)
    console.print(
        f"tokenizer: {tokenizer.get_vocab_size()} tokens, {time.monotonic() - start:.0f} s"
    )
    model, tokens = train(tokenizer, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(path, model, tokenizer, settings.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"parameters: {parameters}, tokens seen: {tokens}, {time.monotonic() - start:.0f} s"
    )
    console.print(f"{path.name}: {path.stat().st_size} bytes, sha256 {file_digest(path)}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _arguments() -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m tools.example_teacher.make", description=__doc__
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_PATH, help="the GGUF file to write or to measure"
    )
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, help="seed of text, weights and order"
    )
    parser.add_argument("--steps", type=int, default=defaults.steps, help="steps of training")
    parser.add_argument(
        "--threads", type=int, default=defaults.threads, help="threads; they change the bytes"
    )
    parser.add_argument("--evaluate", action="store_true", help="train nothing, measure the file")
    parser.add_argument(
        "--prompts", type=int, default=600, help="held-out requests to measure with"
    )
    return parser.parse_args()


def main() -> None:
    """Entry point of the command line."""
    arguments = _arguments()
    console = Console(soft_wrap=True)
    settings = replace(
        Settings(), seed=arguments.seed, steps=arguments.steps, threads=arguments.threads
    )
    if not arguments.evaluate:
        make_teacher(arguments.out, settings, console)
        return
    # Only measuring needs llama.cpp.
    from tools.example_teacher.evaluate import evaluate, held_out_examples

    console.print(
        f"{arguments.out.name}: {arguments.out.stat().st_size} bytes, sha256 "
        f"{file_digest(arguments.out)}"
    )
    asked = held_out_examples(settings.seed, arguments.prompts)
    evaluate(arguments.out, make_tokenizer(settings), asked, console)


if __name__ == "__main__":
    main()
