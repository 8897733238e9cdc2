"""A safety head's decisions and the heads' keys in a GGUF file; without PyTorch."""

from __future__ import annotations

from collections.abc import Iterable

DECISIONS = ("ALLOW", "ESCALATE", "REFUSE")
ALLOW, ESCALATE, REFUSE = range(3)
# What a decision (column) costs on a prompt of each label (row). To ask a person is cheap; to help
# with harm is dear; to turn somebody away who means well is dearer than to ask. So REFUSE is only
# ever decided where it is more likely than the other two together, ALLOW where it is more likely
# than ESCALATE and three times as likely as REFUSE, and what is unclear is escalated.
COSTS = ((0.0, 1.0, 2.0), (1.0, 0.0, 1.0), (4.0, 1.0, 0.0))
SAFETY_KEYS = "so8t.safety."
VERIFICATION_KEYS = "so8t.verification."


def carries_heads(keys: Iterable[str]) -> bool:
    """Whether a file with these metadata keys has a head, whole or broken."""
    return any(key.startswith((SAFETY_KEYS, VERIFICATION_KEYS)) for key in keys)
