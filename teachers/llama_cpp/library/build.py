"""Which llama.cpp is installed, on which processor, without loading it (which may end the process).

Together they are the key under which a self-check's result is remembered.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llama-cpp-python"
# What llama.cpp calls the processor's features, as it was built, and what Linux calls them.
_SAME = ("AVX", "AVX2", "F16C", "FMA", "BMI2", "AVX_VNNI", "AVX512_VNNI", "AVX512_BF16", "AMX_INT8")
FEATURES = {
    **{name: name.lower() for name in _SAME},
    **{"AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi"},
}
_WORTH_BUILDING_FOR = ("AVX2", "AVX512", "AVX512_VNNI", "AMX_INT8")


@dataclass(frozen=True)
class Processor:
    """The processor by the operating system; ``features`` as Linux names them, empty elsewhere."""

    name: str
    features: frozenset[str]


@functools.cache
def processor() -> Processor:
    """This machine's processor."""
    name, features = platform.processor() or platform.machine(), frozenset[str]()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux, or hidden: the name is all there is
        return Processor(name, features)
    facts: dict[str, str] = {}
    for line in text.split("\n\n", 1)[0].splitlines():
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    features = frozenset((facts.get("flags") or facts.get("Features") or "").split())
    return Processor(facts.get("model name") or name, features)


def library_folder() -> Path | None:
    """Where the package keeps llama.cpp's shared libraries; nothing where it is not installed."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    # The package's own way to be given another build of the library.
    other = os.environ.get("LLAMA_CPP_LIB_PATH")
    return Path(other) if other else Path(spec.origin).parent / "lib"


def library_version() -> str | None:
    """The installed package's version, or nothing."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


@functools.cache
def fingerprint() -> str:
    """SHA-256, as hex, of the library's files (name, size, time of change) and the processor."""
    folder = library_folder()
    files: list[tuple[str, int, int]] = []
    if folder is not None:
        # A folder that cannot be read is found out where the library is loaded.
        with suppress(OSError):
            for path in sorted(folder.iterdir()):
                stat = path.stat()
                files.append((path.name, stat.st_size, stat.st_mtime_ns))
    cpu = processor()
    parts = [library_version(), str(folder), files, cpu.name, sorted(cpu.features)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def unused_features(built_with: Collection[str]) -> list[str]:
    """Features of this processor that make llama.cpp much faster, and that it was built without."""
    has = processor().features
    worth = (name for name in _WORTH_BUILDING_FOR if FEATURES[name] in has)
    return [name for name in worth if name not in built_with]


def foreign_features(built_with: Collection[str]) -> list[str]:
    """Features that llama.cpp was built with and this processor is known to lack."""
    has = processor().features
    return [name for name in built_with if has and name in FEATURES and FEATURES[name] not in has]
