"""A safety head's decisions and the heads' keys in a GGUF file; without PyTorch."""

from __future__ import annotations

from collections.abc import Iterable

DECISIONS = ("ALLOW", "ESCALATE", "REFUSE")
ALLOW, ESCALATE, REFUSE = range(3)
SAFETY_KEYS = "so8t.safety."
VERIFICATION_KEYS = "so8t.verification."


def carries_heads(keys: Iterable[str]) -> bool:
    """Whether a file with these metadata keys has a head, whole or broken."""
    return any(key.startswith((SAFETY_KEYS, VERIFICATION_KEYS)) for key in keys)
