"""What the proof of an exported file measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Proof:
    """What was compared (``against``: PyTorch or the F32 file), and the differences.

    ``max_logit_difference`` over all positions and tokens; ``mean_kl``: KL(that ‖ this file), nats
    per token; ``agreement``: share of positions with the same most probable token; ``token_lines``:
    texts that this file's tokenizer encodes as the teacher's. Speeds of one sequence in tokens per
    second, the median of three (0: not measured); ``unsteady_speed``: the fastest generation trial
    over the slowest.
    """

    quant: str
    positions: int
    max_logit_difference: float
    mean_kl: float
    agreement: float
    token_lines: int
    against: str = "PyTorch"
    prompt_speed: float = 0.0
    generation_speed: float = 0.0
    unsteady_speed: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """For ``results.json``: what is the same in every run. Speeds stand elsewhere."""
        return {name: value for name, value in asdict(self).items() if not name.endswith("_speed")}
