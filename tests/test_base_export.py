"""Exported bases against llama.cpp itself: the same logits as PyTorch, or a refusal before anything is written.

Measured on a CPU over 300 tokens: at most 1.4e-4 apart in float32, 0.016 in float16 and 0.47 in Q8_0 (60 tokens), with
logits that spread by 1.6, or by 8 where tied; without permutation or rope scaling they are 8 to 11 apart.
"""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from distill.exporting import tokenizer_entries
from students import base_export
from students.architectures import ARCHITECTURES, context_length, require_exportable
from students.base_export import write_base_gguf
from students.export import ExportError, ExportNames
from students.gguf_names import UnmappedTensor
from students.heads import Heads, SafetyHead, VerificationHead, head_values, read_heads
from students.rope_scaling import RopeScaling
from teachers import example_teacher
from teachers.gguf_file import read_gguf
from teachers.llama_weights import half_split

NAMES = ExportNames("tested base", {"base_name": "tiny"})
CONFIGS = {"llama": LlamaConfig, "phi3": Phi3Config, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
ORIGINAL = 256  # llama.cpp rounds a context's room up to multiples of this
MAX_DIFFERENCE = 1e-3

# A process of its own, as llama.cpp may abort it; without PyTorch, which takes a second to load.
_CHILD = """
import sys
import numpy as np
from teachers.llama_cpp import ContextShape, LlamaContext, LlamaModel
from teachers.way import Way
path, tokens, room, answer = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
model = LlamaModel(path, Way(processor_only=True, extra_buffers=False), threads=1)
context = LlamaContext(model, 1)
context.prepare(ContextShape(1, room, exact=True))
rows = []
for start in range(0, len(tokens), model.batch_tokens):
    part = tokens[start : start + model.batch_tokens]
    positions = np.arange(start, start + len(part), dtype=np.int32)
    wanted = np.ones(len(part), dtype=bool)
    rows.append(context.decode(part, positions, np.zeros_like(part), wanted).logits.copy())
np.save(answer, np.concatenate(rows))
context.release()
model.close()
"""


def scaled(kind: str, **parameters: Any) -> dict[str, Any]:
    """Rotary parameters of one kind of scaling."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **parameters}}


LINEAR = scaled("linear", factor=4.0)
LLAMA3 = scaled(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
YARN = scaled("yarn", factor=4.0, original_max_position_embeddings=64)
LONGROPE = {
    "original_max_position_embeddings": ORIGINAL,
    **scaled(
        "longrope",
        short_factor=np.linspace(1.0, 2.0, 8).tolist(),
        long_factor=np.linspace(1.0, 20.0, 8).tolist(),
    ),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama wide heads": ("llama", {"head_dim": 24}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama", LINEAR),
    "llama llama3": ("llama", LLAMA3),
    "llama yarn": ("llama", YARN),
    "phi3": ("phi3", {}),
    "phi3 tied partial": (
        "phi3",
        {"tie_word_embeddings": True, **scaled("default", partial_rotary_factor=0.75)},
    ),
    "phi3 longrope": ("phi3", LONGROPE),
    "qwen2": ("qwen2", {}),
    "qwen2 tied linear": ("qwen2", {"tie_word_embeddings": True, **LINEAR}),
    "qwen2 yarn": ("qwen2", scaled("yarn", **(YARN["rope_parameters"] | {"attention_factor": 1.4}))),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 tied yarn": (
        "qwen3",
        {
            "tie_word_embeddings": True,
            "head_dim": 16,
            **scaled("yarn", **(YARN["rope_parameters"] | {"mscale": 1.0, "mscale_all_dim": 0.5})),
        },
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> dict:
    return tokenizer_entries(read_gguf(example_teacher()))


@pytest.fixture(scope="module")
def vocab_size(tokenizer: dict) -> int:
    return len(tokenizer["tokenizer.ggml.tokens"][0])


def configure(kind: str, vocab_size: int, **changes: Any) -> Any:
    """A configuration of a tiny model with grouped heads."""
    return CONFIGS[kind](
        **{
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": False,
            **changes,
        }
    )


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


def made(case: str, vocab_size: int) -> PreTrainedModel:
    kind, changes = CASES[case]
    return build(configure(kind, vocab_size, **changes))


def text(count: int, vocab_size: int) -> NDArray[np.int32]:
    return np.random.default_rng(count).integers(3, vocab_size, size=count).astype(np.int32)


def in_llama_cpp(path: Path, tokens: NDArray[np.int32], room: int | None = None) -> NDArray[np.float32]:
    """Every position's logits ``[N, V]`` in float32 without flash attention, in a context with room for ``room``."""
    asked, answer = path.with_suffix(".tokens.npy"), path.with_suffix(".logits.npy")
    np.save(asked, tokens)
    command = [sys.executable, "-c", _CHILD, str(path), str(asked), str(room or len(tokens)), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    found: NDArray[np.float32] = np.load(answer)
    return found


@torch.no_grad()
def difference(model: PreTrainedModel, path: Path, count: int = 300, room: int | None = None) -> float:
    """How far apart the two are at most, over all positions and tokens."""
    tokens = text(count, model.config.vocab_size)
    expected = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    return float(np.abs(expected - in_llama_cpp(path, tokens, room)).max())


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_pytorch_computes(
    tmp_path: Path, tokenizer: dict, vocab_size: int, case: str
) -> None:
    """Every architecture, tied and untied, with its biases, norms and rope scalings: the same logits in float32."""
    model = made(case, vocab_size)
    write_base_gguf(model, tmp_path / "b.gguf", "f32", tokenizer, NAMES, {})
    assert difference(model, tmp_path / "b.gguf") <= MAX_DIFFERENCE


@pytest.mark.parametrize("case", ["llama linear", "llama llama3", "llama yarn", "phi3 longrope"])
def test_a_file_without_its_rope_scaling_is_another_model(
    tmp_path: Path, tokenizer: dict, vocab_size: int, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts are long enough for the scaling to show."""
    monkeypatch.setattr(base_export, "rope_scaling", lambda config, dimensions: RopeScaling())
    model = made(case, vocab_size)
    write_base_gguf(model, tmp_path / "b.gguf", "f32", tokenizer, NAMES, {})
    assert difference(model, tmp_path / "b.gguf") > 0.5


@pytest.mark.parametrize("rows", ["weights", "biases"])
def test_rows_and_biases_that_are_not_permuted_are_another_model(
    tmp_path: Path, tokenizer: dict, vocab_size: int, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Query and key rows of a llama, and the biases that belong to them, each have to be in pairs."""
    permute = base_export.permute_for_rope

    def partly(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
        return permute(weight, heads) if (weight.shape[1] == 1) == (rows == "weights") else weight

    monkeypatch.setattr(base_export, "permute_for_rope", partly)
    model = made("llama biases", vocab_size)
    write_base_gguf(model, tmp_path / "b.gguf", "f32", tokenizer, NAMES, {})
    assert difference(model, tmp_path / "b.gguf") > 0.5


def test_longrope_changes_its_factors_where_the_room_exceeds_the_original_context(
    tmp_path: Path, tokenizer: dict, vocab_size: int
) -> None:
    """transformers goes by the text, llama.cpp by the room: they agree where both are on the same side."""
    model = made("phi3 longrope", vocab_size)
    write_base_gguf(model, tmp_path / "b.gguf", "f32", tokenizer, NAMES, {})
    assert difference(model, tmp_path / "b.gguf", ORIGINAL, room=ORIGINAL) <= MAX_DIFFERENCE
    assert difference(model, tmp_path / "b.gguf", ORIGINAL + 1, room=1024) <= MAX_DIFFERENCE
    assert difference(model, tmp_path / "b.gguf", ORIGINAL, room=1024) > 0.5


def test_a_window_that_llama_cpp_does_not_apply_becomes_the_context(
    tmp_path: Path, tokenizer: dict, vocab_size: int
) -> None:
    """Within phi3's window both see all tokens; beyond it llama.cpp sees more than the model does."""
    model = build(configure("phi3", vocab_size, sliding_window=128))
    path = tmp_path / "b.gguf"
    write_base_gguf(model, path, "f32", tokenizer, NAMES, {})
    file = read_gguf(path)
    assert file.value("phi3.context_length") == file.value("phi3.attention.sliding_window") == 128
    assert difference(model, path, 128) <= MAX_DIFFERENCE
    assert difference(model, path, 300) > 0.5
    assert context_length(configure("phi3", vocab_size, sliding_window=2048)) == 1024


@pytest.mark.parametrize(("quant", "limit"), [("f16", 0.1), ("q8_0", 1.0)])
@pytest.mark.parametrize(("kind", "width"), [("llama", 64), ("phi3", 64), ("qwen2", 72), ("qwen3", 64)])
def test_smaller_formats_load(
    tmp_path: Path, tokenizer: dict, vocab_size: int, kind: str, width: int, quant: str, limit: float
) -> None:
    """Half precision and Q8_0 (float16 where rows do not divide into its blocks) stay near the model."""
    model = build(configure(kind, vocab_size, hidden_size=width, head_dim=width // 4))
    write_base_gguf(model, tmp_path / "b.gguf", quant, tokenizer, NAMES, {})
    assert difference(model, tmp_path / "b.gguf", 60) <= limit


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_written_once_and_reads_back(
    tmp_path: Path, tokenizer: dict, vocab_size: int, case: str
) -> None:
    """The file's tensors are the model's, by the inverse table and to the bit; a tied output is left out."""
    model = made(case, vocab_size)
    write_base_gguf(model, tmp_path / "b.gguf", "f32", tokenizer, NAMES, {})
    file, architecture = read_gguf(tmp_path / "b.gguf"), ARCHITECTURES[model.config.model_type]
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    names = {name: architecture.from_gguf_name(name) for name in file.tensors if not name.startswith("rope_")}
    assert sorted(names.values()) == sorted(state)
    for theirs, ours in names.items():
        found = file.tensor(theirs)
        if architecture.permuted and "q_proj" in ours:
            found = half_split(found, model.config.num_attention_heads)
        elif architecture.permuted and "k_proj" in ours:
            found = half_split(found, model.config.num_key_value_heads)
        assert np.array_equal(found, state[ours]) and architecture.to_gguf_name(ours) == theirs


def test_metadata_and_extras(tmp_path: Path, tokenizer: dict, vocab_size: int) -> None:
    """Shape, tokenizer, origin and heads stand in the file as they were given."""
    heads = Heads(SafetyHead(64), VerificationHead(64), (0.25, 0.75), 0.625)
    extras = {**head_values(heads), "so8t.rank": 8, "so8t.scale": 0.5, "so8t.layers": [0.0, 1.5]}
    path = tmp_path / "b.gguf"
    write_base_gguf(made("qwen3", vocab_size), path, "q8_0", tokenizer, NAMES, extras)
    file = read_gguf(path)
    expected = {
        "context_length": 1024,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
        "rope.freq_base": 10000.0,
        "vocab_size": vocab_size,
    }
    assert {key: file.value(f"qwen3.{key}") for key in expected} == expected
    assert file.value("general.architecture") == "qwen3" and file.value("general.file_type") == 7
    assert tokenizer_entries(file) == tokenizer and file.value("so8t.base_name") == "tiny"
    assert [file.value(f"so8t.{key}") for key in ("rank", "scale", "layers")] == [8, 0.5, [0.0, 1.5]]
    found = read_heads({key: field.value for key, field in file.fields.items()}, 64)
    assert found.safety is not None and found.thresholds == (0.25, 0.75) and found.trust == 0.625
    assert torch.equal(found.safety.linear.weight, heads.safety.linear.weight)  # type: ignore[union-attr]


def test_one_tensor_at_a_time_is_converted(tmp_path: Path, tokenizer: dict, vocab_size: int) -> None:
    """Writing takes a small part of the model's own memory, whatever the number of layers."""
    model = build(
        configure("llama", vocab_size, hidden_size=128, intermediate_size=512, num_hidden_layers=12)
    )
    tracemalloc.start()
    try:
        write_base_gguf(model, tmp_path / "b.gguf", "f16", tokenizer, NAMES, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * model.num_parameters() / 6


def test_an_output_that_is_no_longer_tied_is_written(
    tmp_path: Path, tokenizer: dict, vocab_size: int
) -> None:
    """What an adapter on the output matrix leaves behind counts, not what the configuration says."""
    model = made("qwen2 tied linear", vocab_size)
    model.lm_head.weight = torch.nn.Parameter(0.5 * model.lm_head.weight.detach().flip(0))
    write_base_gguf(model, tmp_path / "b.gguf", "f32", tokenizer, NAMES, {})
    assert "output.weight" in read_gguf(tmp_path / "b.gguf").tensors
    assert difference(model, tmp_path / "b.gguf") <= MAX_DIFFERENCE


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", scaled("dynamic", factor=2.0), "'dynamic'.*default, linear, llama3, yarn can"),
        ("llama", scaled("default", partial_rotary_factor=0.5), "turn 8 of 16"),
        ("llama", scaled("linear", factor=float("nan")), "factor .* is nan"),
        ("llama", {"num_key_value_heads": 3}, "4 heads do not divide among 3"),
        ("qwen2", {"head_dim": 32}, "4 heads of width 32 do not fill the model's 64"),
        ("phi3", {"head_dim": 32}, "do not fill"),
        ("qwen2", LLAMA3, "'llama3' of a qwen2 model"),
        ("qwen2", scaled("yarn", **(YARN["rope_parameters"] | {"beta_fast": 16.0})), "beta_fast .* is 16.0"),
        ("qwen2", scaled("yarn", **(YARN["rope_parameters"] | {"truncate": False})), "truncate"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "windows of 64",
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "windows of 64",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias is set"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_at_the_start(
    kind: str, changes: dict[str, Any], message: str
) -> None:
    """From the configuration alone, in one line."""
    with pytest.raises(ExportError, match=message) as refusal:
        require_exportable(configure(kind, 1024, **changes))
    assert "\n" not in str(refusal.value)


def test_other_models_are_refused() -> None:
    """The message names those that can be exported."""
    with pytest.raises(
        ExportError, match="'mistral' cannot be exported to GGUF; llama, phi3, qwen2, qwen3 can"
    ):
        require_exportable(MistralConfig())
    config = configure("phi3", 1024, **LONGROPE)
    config.rope_parameters["long_factor"] = [1.0] * 7
    with pytest.raises(ExportError, match="8 positive numbers"):
        require_exportable(config)


def test_weights_that_cannot_be_written_leave_no_file(
    tmp_path: Path, tokenizer: dict, vocab_size: int
) -> None:
    """Other types, values that are not finite, unknown names, another vocabulary, an unknown format."""
    path, small = tmp_path / "b.gguf", build(configure("llama", 96))
    with pytest.raises(ExportError, match="96 tokens, the tokenizer 1024"):
        write_base_gguf(small, path, "f32", tokenizer, NAMES, {})
    model = made("llama", vocab_size)
    with pytest.raises(ExportError, match="q2_k"):
        write_base_gguf(model, path, "q2_k", tokenizer, NAMES, {})
    small.config.vocab_size = vocab_size
    with pytest.raises(ExportError, match=r"\[96\] rows, the configuration 1024 tokens"):
        write_base_gguf(small, path, "f32", tokenizer, NAMES, {})
    model.model.norm.register_parameter("adapter", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(UnmappedTensor, match=r"model\.norm\.adapter"):
        write_base_gguf(model, path, "f32", tokenizer, NAMES, {})
    del model.model.norm.adapter
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        write_base_gguf(model, path, "f32", tokenizer, NAMES, {})
    with pytest.raises(ExportError, match=r"torch\.bfloat16; only float32"):
        write_base_gguf(model.bfloat16(), path, "f32", tokenizer, NAMES, {})
    assert not list(tmp_path.iterdir())
