"""A GGUF teacher read as a Llama: against llama.cpp's and transformers' own answers; everything
that is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distill.initialization.teacher_trace import embed, logits, trace
from teachers import example_teacher
from teachers.gguf.file import TeacherFileError, read_gguf
from teachers.gguf.llama_weights import LlamaWeights, NotALlama
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.support.real import real_teacher
from tests.support.teachers import shared_file
from tests.support.tiny_models import (
    TEACHERS,
    TOLERANCE,
    VOCABULARY,
    Tiny,
    canonical,
    stored,
    write_tiny,
)

LENGTHS = (33, 2, 7)


# transformers' names of the norms in Gemma 2 and 3, and in Gemma
SANDWICH = {
    "o_norm": "post_attention_layernorm",
    "post_norm": "pre_feedforward_layernorm",
    "down_norm": "post_feedforward_layernorm",
}
NORMS = {
    "input_norm": "input_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


def gemma(tiny: Tiny) -> PreTrainedModel:
    """transformers' model with the canonical weights of ``tiny``."""
    full = {"rope_type": "default", "rope_theta": tiny.rope_theta}
    if tiny.rope_scale != 1.0:
        full |= {"rope_type": "linear", "factor": tiny.rope_scale}
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": tiny.width,
        "intermediate_size": tiny.feed_forward,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.kv_heads,
        "head_dim": tiny.head_width,
        "rms_norm_eps": 1e-5,
        "rope_parameters": full,
    }
    if tiny.architecture != "gemma":
        settings |= {
            "query_pre_attn_scalar": tiny.head_width,
            "sliding_window": tiny.window or 4096,
            "attn_logit_softcapping": None if tiny.caps is None else tiny.caps[0],
            "final_logit_softcapping": None if tiny.caps is None else tiny.caps[1],
        }
    if tiny.architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": 10000.0}
        settings["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
        if tiny.window is None:
            settings["layer_types"] = ["full_attention"] * tiny.layers
    kind = "gemma3_text" if tiny.architecture == "gemma3" else tiny.architecture
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **settings), attn_implementation="eager", dtype=torch.float32
    ).eval()
    ours = canonical(tiny)
    weights = {
        "model.embed_tokens.weight": ours.pop("embed"),
        "model.norm.weight": ours.pop("norm"),
    }
    weights["model.norm.weight"] = weights["model.norm.weight"] - 1
    sandwich = SANDWICH if "0.o_norm" in ours else {"post_norm": "post_attention_layernorm"}
    for key, values in ours.items():
        layer, _, part = key.partition(".")
        norm = (NORMS | sandwich).get(part)
        owner = "mlp" if part.startswith(("gate", "up", "down")) else "self_attn"
        name = f"model.layers.{layer}.{norm or f'{owner}.{part}'}.weight"
        weights[name] = values if norm is None else values - 1
    given = {name: torch.from_numpy(values) for name, values in weights.items()}
    missing, unexpected = model.load_state_dict(given, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    return model


def some_sequences(vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> list[Any]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, vocab_size, length).astype(np.int32) for length in lengths]


@pytest.mark.needs_gguf
def test_forward_pass_is_llama_cpps(tmp_path: Path) -> None:
    """Float32 files: nothing but the order of additions lies between the two."""
    for name, tiny in TEACHERS.items():
        path = write_tiny(tmp_path / "tiny.gguf", tiny)
        sequences = some_sequences(VOCABULARY)
        with GGUFTeacher(path, threads=1) as teacher:
            expected = teacher.logits(sequences, exact=True)
        found = logits(LlamaWeights(read_gguf(path)), sequences)
        assert expected.std() > 0.3, name
        tolerance = TOLERANCE.get(tiny.architecture, 1e-3)
        np.testing.assert_allclose(found, expected, atol=tolerance, err_msg=name)


@torch.no_grad()
def test_forward_pass_of_gemmas_is_transformers(tmp_path: Path) -> None:
    """In float32 to the order of additions; its norms keep their gain less one."""
    for name, tiny in TEACHERS.items():
        if not tiny.architecture.startswith("gemma"):
            continue
        model = gemma(tiny)
        sequences = some_sequences(VOCABULARY)
        expected = [model(torch.from_numpy(row)[None].long()).logits[0, :-1] for row in sequences]
        found = logits(LlamaWeights(read_gguf(write_tiny(tmp_path / "tiny.gguf", tiny))), sequences)
        np.testing.assert_allclose(found, torch.cat(expected), atol=1e-3, err_msg=name)


@pytest.mark.needs_gguf
@pytest.mark.parametrize("name", ["stories260K", "stories260K-q8_0", "wikiphi-q8_0", "example"])
def test_forward_pass_of_real_teachers(name: str) -> None:
    """Logits move by nothing in float32 files, by some percent of their spread in Q8_0.

    There, llama.cpp rounds the activations that the weights meet to eight bits too.
    """
    error = 1e-3 if name == "stories260K" else 0.1
    path = example_teacher() if name == "example" else shared_file(f"teachers/{name}.gguf")
    weights = LlamaWeights(read_gguf(path))
    sequences = some_sequences(min(500, weights.facts.vocab_size))
    with GGUFTeacher(path, threads=1) as teacher:
        expected = teacher.logits(sequences, exact=True)
    found = logits(weights, sequences)
    assert np.sqrt(np.mean((found - expected) ** 2)) < error * 0.3 * expected.std()
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > (0.999 if error < 0.01 else 0.8)


@pytest.mark.needs_gguf
def test_forward_pass_of_gemma_3() -> None:
    """Q4_K to Q8_0; llama.cpp rounds activations to eight bits (without BOS that is chaotic)."""
    path = real_teacher("gemma3")
    rows = some_sequences(262_144, (20,))
    rows[0][0] = 2
    with GGUFTeacher(path, threads=1) as teacher:
        expected = teacher.logits(rows, exact=True)
    error = logits(LlamaWeights(read_gguf(path)), rows) - expected
    assert np.sqrt(np.mean(error**2)) < 0.1 * expected.std()


def test_weights_are_the_canonical_ones(tmp_path: Path) -> None:
    """Splitting and reordering give back exactly what was written."""
    for name, tiny in TEACHERS.items():
        weights = LlamaWeights(read_gguf(write_tiny(tmp_path / "tiny.gguf", tiny)))
        expected = canonical(tiny)
        for layer in range(tiny.layers):
            for part, values in vars(weights.layer(layer)).items():
                wanted, row = expected.get(f"{layer}.{part}"), f"{name}: {layer}.{part}"
                assert (values is None) == (wanted is None), row
                if wanted is not None:
                    np.testing.assert_array_equal(values, wanted, err_msg=row)
        head = expected["embed" if tiny.tied else "lm_head"]
        np.testing.assert_array_equal(weights.output_rows(5, 9), head[5:9], err_msg=name)
        np.testing.assert_array_equal(weights.final_norm(), expected["norm"], err_msg=name)
        assert weights.facts.tied == tiny.tied, name
        assert weights.facts.head_width == tiny.head_width, name


def test_trace_is_consistent(tmp_path: Path) -> None:
    """Each layer begins where the one before ended, sequences are apart, and parts add up."""
    weights = LlamaWeights(read_gguf(write_tiny(tmp_path / "trace.gguf", TEACHERS["qwen2"])))
    sequences = some_sequences(VOCABULARY)
    alone = list(trace(weights, sequences[:1]))
    before = embed(weights, sequences)
    for layer, single in zip(trace(weights, sequences), alone, strict=True):
        np.testing.assert_array_equal(layer.before, before)
        written = layer.mixed.numpy() @ layer.weights.o_proj.T
        np.testing.assert_allclose(layer.middle - layer.before, written, atol=1e-4)
        np.testing.assert_allclose(layer.after[: LENGTHS[0]], single.after, atol=1e-4)
        before = layer.after
    with pytest.raises(IndexError, match="vocabulary"):
        embed(weights, [np.array([VOCABULARY], dtype=np.int32)])


BAD_VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attention.head_count": 0}, "head_count is 0"),
    ("llama", {"attention.head_count": True}, "head_count is True"),
    ("llama", {"attention.head_count": [4, 4, 4]}, r"head_count is \[4, 4, 4\]"),
    ("llama", {"attention.head_count_kv": 3}, "do not divide"),
    ("llama", {"block_count": 1 << 30}, "block_count"),
    ("llama", {"block_count": 1 << 19}, "blk.3.attn_norm.weight' is missing"),
    ("llama", {"block_count": None}, "block_count is None"),
    ("llama", {"block_count": 2}, "tensors that a Llama has not"),
    ("llama", {"embedding_length": 50}, "embedding_length"),
    ("llama", {"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
    ("llama", {"attention.layer_norm_rms_epsilon": -1.0}, "epsilon is -1.0"),
    ("llama", {"attention.layer_norm_rms_epsilon": None}, "epsilon is None"),
    ("llama", {"rope.freq_base": 0.0}, "freq_base"),
    ("llama", {"rope.dimension_count": 8}, "turns 8 of 16"),
    ("llama", {"attention.value_length": 8}, "differ in width"),
    ("llama", {"expert_count": 8}, "expert_count is 8"),
    ("llama", {"rope.scaling.type": "yarn"}, "yarn"),
    ("llama", {"rope.scaling.factor": -4.0}, "scaling.factor is -4.0"),
    ("llama", {"attention.scale": 0.1}, "attention.scale"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("gemma3", {"attention.sliding_window_pattern": [1, 0]}, r"window_pattern is \[1, 0\]"),
    ("gemma3", {"attention.sliding_window_pattern": 0}, "window_pattern is 0"),
    ("gemma2", {"attention.sliding_window": True}, "sliding_window is True"),
    ("gemma3", {"rope.freq_base_swa": 0.0}, "freq_base_swa is 0.0"),
    ("llama", {"feed_forward_length": 64}, r"shape \(48, 80\)"),
    ("phi3", {"feed_forward_length": 64}, "shape"),
]
BAD_TENSORS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"blk.1.attn_k.weight": None}, "blk.1.attn_k.weight' is missing"),
    ("llama", {"blk.2.ffn_norm.weight": None}, "ffn_norm.weight' is missing"),
    ("llama", {"output_norm.weight": None}, "output_norm.weight' is missing"),
    ("llama", {"blk.1.attn_output.bias": np.zeros(48, np.float32)}, "attn_output.bias"),
    ("llama", {"blk.0.ffn_gate_inp.weight": np.zeros((8, 48), np.float32)}, "ffn_gate_inp"),
    ("llama", {"blk.0.attn_q.weight": np.zeros((48, 64), np.float32)}, r"shape \(48, 64\)"),
    ("llama", {"blk.0.attn_q.bias": np.zeros(63, np.float32)}, r"shape \(63,\)"),
    ("llama", {"rope_freqs.weight": np.zeros(8, np.float32)}, "divisors"),
    ("llama", {"rope_freqs.weight": np.ones(7, np.float32)}, "shape"),
    ("qwen3", {"blk.0.attn_q_norm.weight": None}, "attn_q_norm.weight' is missing"),
    ("qwen3", {"blk.0.attn_q.bias": np.zeros(64, np.float32)}, "attn_q.bias"),
    ("phi3", {"blk.0.attn_qkv.weight": None}, "attn_qkv.weight' is missing"),
    ("gemma3", {"blk.0.post_ffw_norm.weight": None}, "post_ffw_norm.weight' is missing"),
    ("gemma2", {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}, "attn_q_norm"),
    ("gemma2", {"blk.1.post_attention_norm.weight": np.ones(7, np.float32)}, r"shape \(7,\)"),
    ("gemma", {"blk.0.post_ffw_norm.weight": np.ones(48, np.float32)}, "post_ffw_norm"),
    ("llama", {"rope_factors_long.weight": np.ones(8, np.float32)}, "rope_factors_long"),
    ("qwen2", {"output.bias": np.zeros(VOCABULARY, np.float32)}, "output.bias"),
]


def test_other_files_are_refused(tmp_path: Path) -> None:
    """Metadata that makes no sense, tensors that a Llama has not or lacks, another architecture."""
    bad = tmp_path / "bad.gguf"
    with pytest.raises(NotALlama, match="falcon"):
        LlamaWeights(read_gguf(write_tiny(bad, Tiny(), architecture="falcon")))
    rows = [(kind, {}, values, reason) for kind, values, reason in BAD_VALUES]
    rows += [(kind, tensors, {}, reason) for kind, tensors, reason in BAD_TENSORS]
    for kind, tensors, values, reason in rows:
        path = write_tiny(bad, Tiny(kind), tensors, values=values)
        with pytest.raises(NotALlama, match=reason):
            LlamaWeights(read_gguf(path))
            pytest.fail(f"a {kind} is accepted with {tensors or values}")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Wherever one stands."""
    tiny = replace(Tiny(), layers=2)
    for name in ("blk.1.attn_v.weight", "token_embd.weight", "output_norm.weight"):
        values = stored(tiny)[name].copy()
        values.flat[7] = np.nan
        path = write_tiny(tmp_path / "bad.gguf", tiny, {name: values})
        with pytest.raises(TeacherFileError, match="not finite"):
            logits(LlamaWeights(read_gguf(path)), [np.arange(3, 9, dtype=np.int32)])
            pytest.fail(f"NaN in {name} passes")
