"""What the layers of each architecture have beyond, or other than, a plain Llama's."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Features:
    """One architecture as llama.cpp computes it; the defaults are a Llama without biases.

    ``rotary_factors``: the tensor of divisors of the rotary angles, which may be absent;
    ``paired``: rotary pairs are rows (2i, 2i+1); ``fused``: query, key and value are one tensor,
    gate and up too; ``biases``: queries, keys and values may have some; ``head_norms``: query and
    key heads are normalized; ``output_norms``: so is what attention and feed-forward add to the
    stream; ``gelu``: tanh-GELU instead of SiLU; ``scaled_embedding``: by √D.

    ``window_period``: of so many layers all but the last attend to the latest ``window`` tokens
    alone (0: to all), with ``window_theta`` as their rotary base and no linear scaling (``None``:
    as all layers); metadata may say otherwise. ``caps``: soft caps of attention scores and logits
    where metadata names none (0: there are none). ``wide_query_layers``: a model
    of this depth divides attention scores by √(D/H), not √W.
    """

    rotary_factors: str = ""
    paired: bool = False
    fused: bool = False
    biases: bool = False
    head_norms: bool = False
    output_norms: bool = False
    gelu: bool = False
    scaled_embedding: bool = False
    window_period: int = 0
    window: int = 0
    window_theta: float | None = None
    caps: tuple[float, float] = (0.0, 0.0)
    wide_query_layers: int = 0


_GEMMA = Features(gelu=True, scaled_embedding=True)
FEATURES = {
    "llama": Features("rope_freqs.weight", paired=True, biases=True),
    "phi3": Features("rope_factors_short.weight", fused=True),
    "qwen2": Features(biases=True),
    "qwen3": Features(head_norms=True),
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA,
        output_norms=True,
        window_period=2,
        window=4096,
        caps=(50.0, 30.0),
        wide_query_layers=46,
    ),
    "gemma3": replace(
        _GEMMA,
        head_norms=True,
        output_norms=True,
        window_period=6,
        window_theta=10000.0,
        wide_query_layers=62,
    ),
}
