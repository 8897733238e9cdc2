"""Names of models, which come from files of others."""

from __future__ import annotations

import re

MOST_NAME = 100  # characters
# llama.cpp reads a tokenizer in a way of its own where the file's general.name has this in it.
_TREATED = re.compile("(phi)-?(3)|(modern)-(bert)", re.IGNORECASE)


def one_line_name(value: object, default: str, most: int = MOST_NAME) -> str:
    """A name from elsewhere, or ``default``, on one line and not too long; what cannot be printed
    is shown (``␛``, ``\\u202e``), a byte that is not UTF-8 is a question mark."""
    text = value if isinstance(value, str) and value.strip() else default
    text = " ".join(text.encode("utf-8", errors="replace").decode("utf-8").split())
    return "".join(one if one.isprintable() else _shown(ord(one)) for one in text)[:most]


def _shown(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"


def ordinary_name(name: str) -> str:
    """The name without what changes how llama.cpp reads a tokenizer."""
    return _TREATED.sub(lambda result: " ".join(filter(None, result.groups())), name)
