"""Tiny GGUF teachers with random F32 weights in the layouts of four architectures, for llama.cpp to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from teachers import example_teacher
from teachers.gguf_file import read_gguf, tokenizer_fields

Array = NDArray[np.float32]
VOCABULARY = 1024


@dataclass(frozen=True)
class Tiny:
    """Sizes of a tiny teacher and which peculiarities it has; ``rank``: directions its residual stream uses."""

    architecture: str = "llama"
    width: int = 48
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 16
    feed_forward: int = 80
    tied: bool = False
    biases: bool = False
    rope_factors: bool = False
    rope_theta: float = 5000.0
    attention_factor: float = 1.0
    rank: int | None = None
    seed: int = 0


def canonical(tiny: Tiny) -> dict[str, Array]:
    """Random weights named as transformers' Llama; norms and biases far from what could be left out unnoticed."""
    draw = np.random.default_rng(tiny.seed)
    queries, keys = tiny.heads * tiny.head_width, tiny.kv_heads * tiny.head_width

    def matrix(rows: int, columns: int) -> Array:
        return (1.5 * draw.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)

    rank = tiny.rank or tiny.width
    used = np.linalg.qr(draw.standard_normal((tiny.width, rank)))[0].astype(np.float32)

    def writes(columns: int) -> Array:
        return matrix(tiny.width, columns) if tiny.rank is None else used @ matrix(rank, columns)

    def gain(size: int) -> Array:
        return draw.uniform(0.5, 1.5, size).astype(np.float32)

    found = {
        "embed": draw.standard_normal((VOCABULARY, tiny.width)).astype(np.float32),
        "norm": gain(tiny.width),
    }
    if tiny.rank is not None:
        found["embed"] = found["embed"] @ used @ used.T
    if not tiny.tied:
        found["lm_head"] = matrix(VOCABULARY, tiny.width) * 2
    for layer in range(tiny.layers):
        own = {
            "input_norm": gain(tiny.width),
            "q_proj": matrix(queries, tiny.width),
            "k_proj": matrix(keys, tiny.width),
            "v_proj": matrix(keys, tiny.width),
            "o_proj": writes(queries),
            "post_norm": gain(tiny.width),
            "gate_proj": matrix(tiny.feed_forward, tiny.width),
            "up_proj": matrix(tiny.feed_forward, tiny.width),
            "down_proj": writes(tiny.feed_forward),
        }
        if tiny.biases:
            own |= {f"{name}_bias": draw.standard_normal(size).astype(np.float32)
                    for name, size in (("q", queries), ("k", keys), ("v", keys))}  # fmt: skip
        if tiny.architecture == "qwen3":
            own |= {"q_norm": gain(tiny.head_width), "k_norm": gain(tiny.head_width)}
        found |= {f"{layer}.{name}": values for name, values in own.items()}
    return found


def paired(rows: Array, width: int) -> Array:
    """Rows whose rotary pairs are (i, i + W/2) in the order of a ``llama`` file, written out one by one."""
    found = np.empty_like(rows)
    for head in range(len(rows) // width):
        for pair in range(width // 2):
            found[head * width + 2 * pair] = rows[head * width + pair]
            found[head * width + 2 * pair + 1] = rows[head * width + pair + width // 2]
    return found


def stored(tiny: Tiny) -> dict[str, Array]:
    """The canonical weights under the names and in the layout of the architecture."""
    ours = canonical(tiny)
    found = {"token_embd.weight": ours["embed"], "output_norm.weight": ours["norm"]}
    if not tiny.tied:
        found["output.weight"] = ours["lm_head"]
    if tiny.rope_factors:
        factors = np.linspace(1.0, 4.0, tiny.head_width // 2, dtype=np.float32)
        if tiny.architecture == "llama":
            found["rope_freqs.weight"] = factors
        else:
            found |= {"rope_factors_short.weight": factors, "rope_factors_long.weight": 3 * factors}
    for layer in range(tiny.layers):
        own = {key.partition(".")[2]: value for key, value in ours.items() if key.startswith(f"{layer}.")}
        if tiny.architecture == "llama":
            for name in {"q_proj", "k_proj", "q_bias", "k_bias"} & own.keys():
                own[name] = paired(own[name], tiny.head_width)
        layers = {
            "attn_norm.weight": own["input_norm"],
            "ffn_norm.weight": own["post_norm"],
            "attn_output.weight": own["o_proj"],
            "ffn_down.weight": own["down_proj"],
        }
        if tiny.architecture == "phi3":
            layers["attn_qkv.weight"] = np.concatenate([own["q_proj"], own["k_proj"], own["v_proj"]])
            layers["ffn_up.weight"] = np.concatenate([own["gate_proj"], own["up_proj"]])
        else:
            layers |= {f"attn_{name}.weight": own[f"{name}_proj"] for name in "qkv"}
            layers |= {"ffn_gate.weight": own["gate_proj"], "ffn_up.weight": own["up_proj"]}
        layers |= {f"attn_{name}.bias": own[f"{name}_bias"] for name in "qkv" if f"{name}_bias" in own}
        layers |= {f"attn_{name}_norm.weight": own[f"{name}_norm"] for name in "qk" if f"{name}_norm" in own}
        found |= {f"blk.{layer}.{name}": values for name, values in layers.items()}
    return found


def metadata(tiny: Tiny) -> dict[str, Any]:
    """What the file says about its sizes, without the architecture's name in front."""
    found: dict[str, Any] = {
        "context_length": 256,
        "embedding_length": tiny.width,
        "block_count": tiny.layers,
        "feed_forward_length": tiny.feed_forward,
        "attention.head_count": tiny.heads,
        "attention.head_count_kv": tiny.kv_heads,
        "attention.key_length": tiny.head_width,
        "attention.value_length": tiny.head_width,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": tiny.rope_theta,
        "rope.dimension_count": tiny.head_width,
        "vocab_size": VOCABULARY,
    }
    if tiny.architecture == "phi3":
        found |= {"rope.scaling.original_context_length": 256, "attention.sliding_window": 0}
    if tiny.attention_factor != 1.0:
        found["rope.scaling.attn_factor"] = tiny.attention_factor
    return found


def write_tiny(
    path: Path,
    tiny: Tiny,
    tensors: dict[str, Array | None] | None = None,
    values: dict[str, Any] | None = None,
    architecture: str | None = None,
) -> Path:
    """Write the teacher with the example teacher's tokenizer; ``tensors`` and ``values`` replace or add some, ``None``
    leaves them out."""
    name = architecture or tiny.architecture
    writer = gguf.GGUFWriter(path, name)
    for key, value in (metadata(tiny) | (values or {})).items():
        if value is None:
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        (writer.add_array if isinstance(value, list) else add[type(value)])(f"{name}.{key}", value)
    for key, field in tokenizer_fields(read_gguf(example_teacher())).items():
        if field.value != []:
            writer.add_key_value(key, field.value, field.type, field.element_type)
    for key, array in (stored(tiny) | (tensors or {})).items():
        if array is not None:
            writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
