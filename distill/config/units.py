"""Values of the command line: amounts of memory, durations and lists of file types."""

from __future__ import annotations

import math
import re

from distill.config.schema import Quant
from distill.errors import UserError
from students.gguf.file_types import FILE_TYPES, Quantization

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


_NUMBER = r"(\d{1,8}(?:\.\d{1,9})?)"
_DURATION = "".join(rf"\s*(?:{_NUMBER}\s*{unit})?" for unit in "hms") + r"\s*"


def parse_quants(text: str) -> tuple[Quant, ...]:
    """File types separated by commas, each once; ``all``: every one. ``UserError`` if unknown."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    names = [one for name in asked for one in (FILE_TYPES if name.lower() == "all" else (name,))]
    if not names:
        raise UserError(
            f"--quant {text!r} names no file type; choose from {', '.join(FILE_TYPES)}, or all"
        )
    try:
        return tuple(dict.fromkeys(str(Quantization.parse(name)) for name in names))
    except ValueError as error:
        raise UserError(f"--quant {error}") from None


def parse_memory(text: str) -> int:
    """Bytes of a size such as ``12GiB``, ``1.5 GB`` or ``800``; ``ValueError`` if it is none."""
    match = re.fullmatch(
        r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII
    )
    unit = None if match is None else _UNITS.get(match[2].lower())
    size = 0 if match is None or unit is None else math.floor(float(match[1]) * unit)
    if size < 1:
        raise ValueError(
            f"{text!r} is no amount of memory; write a number above 0 and a unit, such as 12GiB or "
            "800MB (kB, MB, GB, TB; KiB, MiB, GiB, TiB)"
        )
    return size


def parse_duration(text: str) -> float:
    """Seconds of a time such as ``90s``, ``20m``, ``1h`` or ``1h30m``; ``ValueError`` if it is
    none."""
    match = re.fullmatch(_DURATION, text, re.IGNORECASE | re.ASCII)
    parts = [] if match is None else [float(part or 0) for part in match.groups()]
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if seconds <= 0:
        raise ValueError(f"{text!r} is no time; write for example 90s, 20m, 1h or 1h30m")
    return seconds
