"""The SO8T student: SO(8) gates, the decoder, its construction, folding and GGUF export.

Importing this package registers the architecture with transformers (``students.registration``).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from students.registration import register_with_transformers

if TYPE_CHECKING:
    from students.model.config import SO8TConfig
    from students.model.decoder import SO8TForCausalLM


# On some CPUs bitsandbytes, which transformers loads through peft, advises a package that fetches
# compiled code from the network.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = ["SO8TConfig", "SO8TForCausalLM"]

register_with_transformers()


def __getattr__(name: str) -> Any:
    """The package's two classes, imported when they are asked for (PEP 562)."""
    if name in __all__:
        from students.model import decoder

        return getattr(decoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
