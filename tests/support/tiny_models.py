"""Tiny transformers models and their GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from distill.capture.temporary_files.tokenizer_only import tokenizer_entries
from students.gguf.metadata import ExportNames
from students.gguf.writer import write_base_gguf
from teachers import example_teacher
from teachers.gguf.file import read_gguf, tokenizer_fields
from teachers.tokenizer.tokenizer_json import write_tokenizer_folder

SHAPE: dict[str, Any] = {  # of a tiny model with grouped heads
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def make_base(
    folder: Path,
    teacher: Path,
    kind: str = "qwen2",
    *,
    extra_rows: int = 0,
    seed: int = 0,
    **settings: object,
) -> Path:
    """Write the folder and return it; ``extra_rows``: of padding beyond the vocabulary."""
    file = read_gguf(teacher)
    tokens = len(file.fields["tokenizer.ggml.tokens"].value)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = SHAPE | ids | {"vocab_size": tokens + extra_rows, "initializer_range": 0.1} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    model.save_pretrained(folder)
    write_tokenizer_folder(file.fields, folder)
    return folder


Array = NDArray[np.float32]
VOCABULARY = 1024


@dataclass(frozen=True)
class Tiny:
    """Sizes of a tiny teacher; ``rank``: directions its residual stream uses; ``rope_scale``: what
    angles are divided by; ``window``: latest tokens that a Gemma's local layers see; ``caps``: soft
    caps of attention scores and logits."""

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
    rope_scale: float = 1.0
    window: int | None = None
    caps: tuple[float, float] | None = None
    rank: int | None = None
    seed: int = 0


TEACHERS = {
    "llama": Tiny(),
    "llama, tied, biases, rotary factors": Tiny(tied=True, biases=True, rope_factors=True, seed=1),
    "llama, heads wider than the stream": Tiny(heads=6, kv_heads=3, seed=2),
    "phi3": Tiny("phi3", width=64, seed=3),
    "phi3, tied, short factors, scaled": Tiny(
        "phi3", width=64, tied=True, rope_factors=True, attention_factor=1.2, seed=4
    ),
    "qwen2": Tiny("qwen2", width=64, biases=True, seed=5),
    "qwen3": Tiny("qwen3", head_width=24, seed=6),
    "llama, linear scaling": Tiny(rope_scale=4.0, seed=7),
    "gemma": Tiny("gemma", tied=True, kv_heads=1, seed=8),
    "gemma2, windows, caps": Tiny(
        "gemma2", tied=True, layers=4, window=8, caps=(3.0, 4.0), head_width=24, seed=9
    ),
    "gemma3, windows, two rotary bases": Tiny(
        "gemma3", tied=True, layers=7, kv_heads=1, window=8, rope_scale=8.0, seed=10
    ),
    "gemma3, no windows": Tiny("gemma3", tied=True, seed=11),
}
# llama.cpp looks tanh-GELU up in a table of 16-bit floats.
TOLERANCE = {"gemma": 0.02, "gemma2": 0.02, "gemma3": 0.02}


def canonical(tiny: Tiny) -> dict[str, Array]:
    """Random weights named as transformers' Llama; none could be left out unnoticed."""
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
        if tiny.architecture in ("gemma2", "gemma3"):
            own |= {"o_norm": gain(tiny.width), "down_norm": gain(tiny.width)}
        if tiny.architecture in ("qwen3", "gemma3"):
            own |= {"q_norm": gain(tiny.head_width), "k_norm": gain(tiny.head_width)}
        found |= {f"{layer}.{name}": values for name, values in own.items()}
    return found


def paired(rows: Array, width: int) -> Array:
    """Rows whose rotary pairs are (i, i + W/2) in the order of a ``llama`` file."""
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
        layer_names = [key for key in ours if key.startswith(f"{layer}.")]
        own = {key.partition(".")[2]: ours[key] for key in layer_names}
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
            queries = [own[f"{name}_proj"] for name in "qkv"]
            layers["attn_qkv.weight"] = np.concatenate(queries)
            layers["ffn_up.weight"] = np.concatenate([own["gate_proj"], own["up_proj"]])
        else:
            layers |= {f"attn_{name}.weight": own[f"{name}_proj"] for name in "qkv"}
            layers |= {"ffn_gate.weight": own["gate_proj"], "ffn_up.weight": own["up_proj"]}
        if "o_norm" in own:
            layers["post_attention_norm.weight"] = own["o_norm"]
            layers["post_ffw_norm.weight"] = own["down_norm"]
        for name in "qkv":
            for ending, key in ((".bias", f"{name}_bias"), ("_norm.weight", f"{name}_norm")):
                if key in own:
                    layers[f"attn_{name}{ending}"] = own[key]
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
    if tiny.rope_scale != 1.0:
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": tiny.rope_scale}
    if tiny.window is not None:
        found["attention.sliding_window"] = tiny.window
    if tiny.caps is not None:
        names = ("attn_logit_softcapping", "final_logit_softcapping")
        found |= dict(zip(names, tiny.caps, strict=True))
    return found


def write_tiny(
    path: Path,
    tiny: Tiny,
    tensors: dict[str, Array | None] | None = None,
    values: dict[str, Any] | None = None,
    architecture: str | None = None,
    *,
    types: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    per_part: int = 0,
) -> Path:
    """Write the teacher with the example teacher's tokenizer; ``tensors`` and ``values`` replace or
    add some, ``None`` leaves them out. ``types``: of tensors given as quantized bytes.
    ``per_part``: tensors in each part of a split file, whose first part's path is returned."""
    name = architecture or tiny.architecture
    writer = gguf.GGUFWriter(path, name, split_max_tensors=per_part)
    for key, value in (metadata(tiny) | (values or {})).items():
        if value is None:
            continue
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        key = key if key.startswith("tokenizer.") else f"{name}.{key}"
        (writer.add_array if isinstance(value, list) else add[type(value)])(key, value)
    for key, field in tokenizer_fields(read_gguf(example_teacher())).items():
        if field.value != []:
            writer.add_key_value(key, field.value, field.type, field.element_type)
    for key, array in (stored(tiny) | (tensors or {})).items():
        if array is not None:
            writer.add_tensor(key, array, raw_dtype=(types or {}).get(key))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0] if per_part else path


NAMES = ExportNames("tested base", {"base_name": "tiny"})
CONFIGS = {
    "llama": LlamaConfig,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma3": Gemma3TextConfig,
}
ORIGINAL = 256  # llama.cpp rounds a context's room up to multiples of this


def scaled(kind: str, **parameters: Any) -> dict[str, Any]:
    """Rotary parameters of one kind of scaling."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **parameters}}


def yarn(**parameters: Any) -> dict[str, Any]:
    """Rotary parameters of YaRN."""
    return scaled("yarn", factor=4.0, original_max_position_embeddings=64, **parameters)


LINEAR = scaled("linear", factor=4.0)
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = scaled("llama3", factor=8.0, original_max_position_embeddings=64, **BANDS)
TIED = {"tie_word_embeddings": True}
FACTORS = {
    f"{which}_factor": np.linspace(1.0, most, 8).tolist()
    for which, most in (("short", 2.0), ("long", 20.0))
}
LONGROPE = {"original_max_position_embeddings": ORIGINAL, **scaled("longrope", **FACTORS)}
PARTIAL = scaled("default", partial_rotary_factor=0.75)


def gemma3(**changes: Any) -> dict[str, Any]:
    """Settings of a Gemma 3 with seven layers, of which the sixth has no window."""
    rotary = {
        "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2000.0},
    }
    sizes = {"num_hidden_layers": 7, "head_dim": 24, "query_pre_attn_scalar": 24}
    windows = {"sliding_window": 64, "rope_parameters": rotary, "pad_token_id": None}
    return sizes | windows | changes


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", TIED),
    "llama wide heads": ("llama", {"head_dim": 24}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama", LINEAR),
    "llama llama3": ("llama", LLAMA3),
    "llama yarn": ("llama", yarn()),
    "phi3": ("phi3", {}),
    "phi3 tied partial": ("phi3", TIED | PARTIAL),
    "phi3 longrope": ("phi3", LONGROPE),
    "qwen2": ("qwen2", {}),
    "qwen2 tied linear": ("qwen2", TIED | LINEAR),
    "qwen2 yarn": ("qwen2", yarn(attention_factor=1.4)),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma3 tied": ("gemma3", gemma3() | TIED),
    "gemma3 no window": ("gemma3", gemma3(layer_types=["full_attention"] * 7)),
    "qwen3 tied yarn": ("qwen3", TIED | {"head_dim": 16} | yarn(mscale=1.0, mscale_all_dim=0.5)),
}
TOKENIZER = tokenizer_entries(read_gguf(example_teacher()))
VOCAB = len(TOKENIZER["tokenizer.ggml.tokens"][0])


def configure(kind: str, **changes: Any) -> Any:
    """A configuration of a tiny model with grouped heads."""
    sizes = {"vocab_size": VOCAB, "intermediate_size": 96, "max_position_embeddings": 1024}
    return CONFIGS[kind](**(SHAPE | sizes | changes))


def build(config: Any) -> PreTrainedModel:
    """A model with lively weights, and norms and biases that could not be left out unnoticed."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5, generator=draw)
            elif name.endswith("bias"):
                parameter.normal_(generator=draw)
            else:
                parameter.uniform_(0.5, 1.5, generator=draw)
        model.get_input_embeddings().weight.normal_(generator=draw)
    return model


def made(case: str) -> PreTrainedModel:
    """The model of a case."""
    kind, changes = CASES[case]
    return build(configure(kind, **changes))


def export(
    model: PreTrainedModel, path: Path, quant: str = "f32", extras: Mapping[str, Any] | None = None
) -> Path:
    """Write ``model`` to ``path``, which is returned."""
    write_base_gguf(model, path, quant, TOKENIZER, NAMES, extras or {})
    return path
