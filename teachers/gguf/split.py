"""Names of a split GGUF model's parts: ``name-00001-of-00003.gguf``, as llama.cpp finds them."""

from __future__ import annotations

import re
from pathlib import Path

NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.ASCII | re.DOTALL)


def part_paths(path: Path) -> list[Path]:
    """Every part's path, by the name of one of them; ``path`` alone where it names no part."""
    match = NAME.fullmatch(path.name)
    if match is None:
        return [path]
    prefix, count = match[1], match[3]
    parts = range(1, int(count) + 1)
    return [path.with_name(f"{prefix}-{number:05d}-of-{count}.gguf") for number in parts]


def model_stem(path: Path) -> str:
    """The file's name without suffix and number of its part."""
    match = NAME.fullmatch(path.name)
    return path.stem if match is None else match[1]


def model_bytes(path: Path) -> int:
    """Bytes of the model in ``path``, over all its parts as far as they are files."""
    return sum(part.stat().st_size for part in part_paths(path) if part.is_file())
