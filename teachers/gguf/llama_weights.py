"""A GGUF teacher's weights as those of one Llama, whatever the layout of its architecture.

Files hold much the same network in different ways (``teachers.gguf.features``). Here all come out
with the names of transformers' Llama, half-split, in float32, one layer at a time, beside the facts
of what is computed with them. Anything else is refused with the reason: weights read wrongly look
like weights.

Letters: D width, H heads, K key/value heads, W head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from teachers.base import MAX_COUNT, Floats
from teachers.gguf.features import FEATURES
from teachers.gguf.file import GGUFFile, TeacherFileError

EMBEDDING, OUTPUT, OUTPUT_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
# Metadata that changes what the network computes; only these values leave it a plain Llama.
PLAIN = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}


class NotALlama(TeacherFileError):
    """A teacher whose weights cannot be read as a Llama's; says what is different."""


@dataclass(frozen=True)
class LlamaFacts:
    """The shape of a Llama and its constants. ``context``: tokens it was made for, 0 if unknown.

    ``rotary_factors`` ``[W / 2]``: what the angle of each rotary pair is divided by, as llama.cpp
    does within the context the model was first trained for; ``rotary_scale``: what cosine and sine
    are multiplied by. ``tied``: the output matrix is the embedding, before ``embedding_scale``.
    Attention scores are divided by the root of ``query_width``; ``caps``: soft caps of the scores
    and of the logits, 0 for none. ``window``, ``window_period``, ``window_theta``, ``gelu``: see
    ``teachers.gguf.features.Features``.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    vocab_size: int
    rope_theta: float
    rms_eps: float
    tied: bool
    rotary_factors: tuple[float, ...]
    rotary_scale: float
    embedding_scale: float
    gelu: bool
    query_width: int
    caps: tuple[float, float]
    window: int
    window_period: int
    window_theta: float | None
    context: int

    def window_of(self, layer: int) -> int | None:
        """How many of the latest tokens a layer attends to; ``None``: all."""
        if not self.window or layer % self.window_period == self.window_period - 1:
            return None
        return self.window

    def frequencies(self, layer: int) -> Floats:
        """Angle per position of each rotary pair of a layer, in radians, ``[W / 2]``."""
        exponents = np.arange(0, self.head_width, 2, dtype=np.float64) / self.head_width
        if self.window_theta is not None and self.window_of(layer) is not None:
            return (self.window_theta**-exponents).astype(np.float32)
        return (self.rope_theta**-exponents / np.array(self.rotary_factors)).astype(np.float32)


@dataclass(frozen=True)
class LayerWeights:
    """One layer in float32 with transformers' names (rows are outputs), rotary pairs half-split.

    Biases ``[H·W]``, ``[K·W]``, head norms ``[W]`` and ``o_norm`` and ``down_norm`` ``[D]``, of
    what attention and feed-forward add to the stream, are ``None`` where the teacher has none.
    """

    input_norm: Floats
    q_proj: Floats
    k_proj: Floats
    v_proj: Floats
    o_proj: Floats
    post_norm: Floats
    gate_proj: Floats
    up_proj: Floats
    down_proj: Floats
    q_bias: Floats | None = None
    k_bias: Floats | None = None
    v_bias: Floats | None = None
    q_norm: Floats | None = None
    k_norm: Floats | None = None
    o_norm: Floats | None = None
    down_norm: Floats | None = None


def half_split(rows: Floats, heads: int) -> Floats:
    """Reorder query or key rows ``[heads · W, …]`` from rotary pairs (2i, 2i+1) to (i, i + W/2)."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


# GGUF's name of each of a layer's tensors, and ``LayerWeights``'.
LAYER_NAMES = {
    **{"attn_norm.weight": "input_norm", "ffn_norm.weight": "post_norm"},
    **{f"attn_{name}.weight": f"{name}_proj" for name in "qkv"},
    **{f"attn_{name}.bias": f"{name}_bias" for name in "qkv"},
    **{f"attn_{name}_norm.weight": f"{name}_norm" for name in "qk"},
    **{f"ffn_{name}.weight": f"{name}_proj" for name in ("gate", "up", "down")},
    "attn_output.weight": "o_proj",
    **{"post_attention_norm.weight": "o_norm", "post_ffw_norm.weight": "down_norm"},
}


class LlamaWeights:
    """The weights of the GGUF file ``file``, read when asked for."""

    def __init__(self, file: GGUFFile) -> None:
        """Check every value and every shape; no tensor is read but the rotary factors.

        Raises:
            NotALlama: another architecture, or metadata or tensors that are not a Llama's.
        """
        self.file = file
        if file.architecture not in FEATURES:
            known = ", ".join(FEATURES)
            raise self._refuse(f"its architecture is {file.architecture!r}, not one of {known}")
        self.features = FEATURES[file.architecture]
        self._require_plain()
        self.facts = self._read_facts()
        self._require_tensors()

    # -- reading

    def layer(self, number: int) -> LayerWeights:
        """All weights of one layer.

        Raises:
            TeacherFileError: a tensor is not finite, or of a type that cannot be read.
        """
        facts = self.facts
        get = {name: self._read(f"blk.{number}.{name}") for name in self._layer_tensors()}
        if self.features.fused:
            qkv, gate_up = get.pop("attn_qkv.weight"), get.pop("ffn_up.weight")
            assert qkv is not None and gate_up is not None
            queries, keys = facts.heads * facts.head_width, facts.kv_heads * facts.head_width
            parts = np.split(qkv, (queries, queries + keys))
            get |= {f"attn_{name}.weight": part for name, part in zip("qkv", parts, strict=True)}
            get["ffn_gate.weight"], get["ffn_up.weight"] = np.split(gate_up, 2)
        if self.features.paired:
            for name, heads in (("attn_q", facts.heads), ("attn_k", facts.kv_heads)):
                for part in (f"{name}.weight", f"{name}.bias"):
                    rows = get.get(part)
                    get[part] = None if rows is None else half_split(rows, heads)
        return LayerWeights(**{ours: get.get(name) for name, ours in LAYER_NAMES.items()})  # type: ignore[arg-type]

    def embedding_rows(self, start: int, stop: int, *, scaled: bool = True) -> Floats:
        """Rows of the token embedding as they enter the stream, ``[stop − start, D]``, or not
        ``scaled``, as the file has them."""
        rows = self._finite(EMBEDDING, self.file.rows(EMBEDDING, start, stop))
        if scaled:
            rows *= self.facts.embedding_scale
        return rows

    def output_rows(self, start: int, stop: int) -> Floats:
        """Rows of the output matrix, ``[stop − start, D]``; tied, the embedding's, not scaled."""
        name = EMBEDDING if self.facts.tied else OUTPUT
        return self._finite(name, self.file.rows(name, start, stop))

    def final_norm(self) -> Floats:
        """Gain of the norm before the output matrix, ``[D]``."""
        gain = self._read(OUTPUT_NORM)
        assert gain is not None
        return gain

    def _read(self, name: str) -> Floats | None:
        """A tensor in float32, or nothing where it may be absent and is."""
        if name not in self.file.tensors:
            return None
        return self._finite(name, self.file.tensor(name))

    def _finite(self, name: str, values: Floats) -> Floats:
        if not np.isfinite(values).all():
            raise TeacherFileError(
                f"{self.file.path}: tensor {name!r} has values that are not finite; download or "
                "convert it again"
            )
        return values

    # -- checking

    def _refuse(self, reason: str) -> NotALlama:
        return NotALlama(f"{self.file.path} cannot be read as a Llama: {reason}")

    def _stated(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own metadata."""
        return self.file.value(f"{self.file.architecture}.{key}", default)

    def _require_plain(self) -> None:
        for key, allowed in PLAIN.items():
            value = self._stated(key, allowed[0])
            if value not in allowed:
                raise self._refuse(f"{self.file.architecture}.{key} is {value!r}")
        scaling = self._stated("rope.scaling.type", "linear")
        if scaling not in ("none", "linear", "longrope"):
            raise self._refuse(f"its rotary embedding is scaled by {scaling!r}")

    def _read_facts(self) -> LlamaFacts:
        embedding, heads = self.file.tensors[EMBEDDING].shape, self._count("attention.head_count")
        width = self._count("embedding_length")
        if embedding[1] != width:
            raise self._refuse(
                f"embedding_length is {width}, the embedding has {embedding[1]} columns"
            )
        head_width = self._count("attention.key_length", width // heads)
        if self._count("attention.value_length", head_width) != head_width:
            raise self._refuse("keys and values differ in width")
        turned = self._count("rope.dimension_count", head_width)
        if turned != head_width or head_width % 2:
            raise self._refuse(
                f"its rotary embedding turns {turned} of {head_width} dimensions of a head"
            )
        kv_heads = self._count("attention.head_count_kv", heads)
        if heads % kv_heads:
            raise self._refuse(
                f"{heads} query heads do not divide among {kv_heads} key/value heads"
            )
        features, layers = self.features, self._count("block_count")
        return LlamaFacts(
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_width=head_width,
            feed_forward=self._count("feed_forward_length"),
            vocab_size=embedding[0],
            rope_theta=self._number("rope.freq_base", 1.0, 1e12, 10000.0),
            rms_eps=self._number("attention.layer_norm_rms_epsilon", 0.0, 0.1),
            tied=OUTPUT not in self.file.tensors,
            rotary_factors=self._rotary_factors(head_width // 2),
            rotary_scale=self._number("rope.scaling.attn_factor", 1e-3, 1e3, 1.0),
            embedding_scale=width**0.5 if features.scaled_embedding else 1.0,
            gelu=features.gelu,
            query_width=width // heads if layers == features.wide_query_layers else head_width,
            context=self._count("context_length", 0, 0),
            caps=(self._cap("attn", features.caps[0]), self._cap("final", features.caps[1])),
            **self._windows(),
        )

    def _cap(self, key: str, usual: float) -> float:
        """A soft cap, 0 for none; an architecture without any cannot name one."""
        return self._number(f"{key}_logit_softcapping", 0.0, 1e6 if usual else 0.0, usual)

    def _windows(self) -> dict[str, Any]:
        """Which layers attend to how many tokens, with which rotary base."""
        features = self.features
        if not features.window_period:
            return {"window": 0, "window_period": 1, "window_theta": None}
        theta, key = features.window_theta, "rope.freq_base_swa"
        if theta is not None or self._stated(key) is not None:
            theta = self._number(key, 1.0, 1e12, theta)
        period = self._count("attention.sliding_window_pattern", features.window_period)
        window = self._count("attention.sliding_window", features.window, 0)
        return {"window": window, "window_period": period, "window_theta": theta}

    def _rotary_factors(self, pairs: int) -> tuple[float, ...]:
        linear = 1.0
        if self._stated("rope.scaling.type") != "none":
            older = self._number("rope.scale_linear", 0.0, 1e6, 0.0)
            linear = self._number("rope.scaling.factor", 0.0, 1e6, older) or 1.0
        name = self.features.rotary_factors
        if name not in self.file.tensors:
            return (linear,) * pairs
        self._require_shape(name, (pairs,))
        factors = self.file.tensor(name)
        if not (np.isfinite(factors).all() and (factors > 0).all()):
            raise self._refuse(f"{name} has values that are no divisors of an angle")
        return tuple((linear * factors).tolist())

    def _count(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._stated(key, default)
        if type(value) is not int or not least <= value <= MAX_COUNT:
            raise self._refuse(f"{self.file.architecture}.{key} is {_short(value)}")
        return value

    def _number(self, key: str, least: float, most: float, default: float | None = None) -> float:
        value = self._stated(key, default)
        if type(value) not in (int, float) or not least <= value <= most:  # nor NaN
            raise self._refuse(f"{self.file.architecture}.{key} is {_short(value)}")
        return float(value)

    def _layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a layer can have; biases may be absent."""
        facts, features = self.facts, self.features
        width, forward = facts.width, facts.feed_forward
        queries, keys = facts.heads * facts.head_width, facts.kv_heads * facts.head_width
        rows = {"q": queries, "k": keys, "v": keys}
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (width,),
            "attn_output.weight": (width, queries),
            "ffn_norm.weight": (width,),
            "ffn_down.weight": (width, forward),
        }
        if features.output_norms:
            shapes |= {"post_attention_norm.weight": (width,), "post_ffw_norm.weight": (width,)}
        if features.head_norms:
            shapes |= {f"attn_{name}_norm.weight": (facts.head_width,) for name in "qk"}
        if features.biases:
            shapes |= {f"attn_{name}.bias": (count,) for name, count in rows.items()}
        if features.fused:
            fused = {"attn_qkv.weight": (queries + 2 * keys, width)}
            return shapes | fused | {"ffn_up.weight": (2 * forward, width)}
        shapes |= {f"attn_{name}.weight": (count, width) for name, count in rows.items()}
        return shapes | {f"ffn_{name}.weight": (forward, width) for name in ("gate", "up")}

    def _require_tensors(self) -> None:
        """Every tensor there has to be is there with its shape, and no other."""
        facts = self.facts
        expected: dict[str, tuple[int, ...]] = {
            EMBEDDING: (facts.vocab_size, facts.width),
            OUTPUT_NORM: (facts.width,),
            OUTPUT: (facts.vocab_size, facts.width),
        }
        factors = self.features.rotary_factors
        optional = {OUTPUT, factors, factors.replace("short", "long")}  # long: for longer contexts
        if factors:
            expected |= dict.fromkeys(optional - {OUTPUT}, (facts.head_width // 2,))
        for number in range(facts.layers):
            if f"blk.{number}.attn_norm.weight" not in self.file.tensors:  # before a million names
                raise self._refuse(f"tensor 'blk.{number}.attn_norm.weight' is missing")
            layer = self._layer_tensors()
            expected |= {f"blk.{number}.{name}": shape for name, shape in layer.items()}
        for name, shape in expected.items():
            if name in self.file.tensors:
                self._require_shape(name, shape)
            elif name not in optional and not name.endswith(".bias"):
                raise self._refuse(f"tensor {name!r} is missing")
        if unknown := sorted(self.file.tensors.keys() - expected.keys()):
            raise self._refuse(
                f"it has {len(unknown)} tensors that a Llama has not, such as {unknown[0]!r}"
            )

    def _require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        given = self.file.tensors[name].shape
        if given != shape:
            raise self._refuse(f"tensor {name!r} has the shape {given} where {shape} is needed")


def _short(value: object) -> str:
    """A value from an untrusted file, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
