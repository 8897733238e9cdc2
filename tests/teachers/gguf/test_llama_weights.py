"""A GGUF teacher read as a Llama: against llama.cpp's own answers; everything that is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.initialization.teacher_trace import embed, logits, trace
from teachers import example_teacher
from teachers.gguf.file import TeacherFileError, read_gguf
from teachers.gguf.llama_weights import LlamaWeights, NotALlama
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.support.teachers import shared_file
from tests.support.tiny_models import VOCABULARY, Tiny, canonical, stored, write_tiny

LENGTHS = (33, 2, 7)
TINY = {
    "llama": Tiny(),
    "llama, tied, biases, rotary factors": Tiny(tied=True, biases=True, rope_factors=True, seed=1),
    "llama, heads wider than the stream": Tiny(heads=6, kv_heads=3, seed=2),
    "phi3": Tiny("phi3", width=64, seed=3),
    "phi3, tied, short factors, scaled": Tiny(
        "phi3", width=64, tied=True, rope_factors=True, attention_factor=1.2, seed=4
    ),
    "qwen2": Tiny("qwen2", width=64, biases=True, seed=5),
    "qwen3": Tiny("qwen3", head_width=24, seed=6),
}


def some_sequences(vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> list[Any]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, vocab_size, length).astype(np.int32) for length in lengths]


@pytest.mark.needs_gguf
def test_forward_pass_is_llama_cpps(tmp_path: Path) -> None:
    """Float32 files: nothing but the order of additions lies between the two."""
    for name, tiny in TINY.items():
        path = write_tiny(tmp_path / "tiny.gguf", tiny)
        sequences = some_sequences(VOCABULARY)
        with GGUFTeacher(path, threads=1) as teacher:
            expected = teacher.logits(sequences, exact=True)
        found = logits(LlamaWeights(read_gguf(path)), sequences)
        assert expected.std() > 0.3, name
        np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=name)


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


def test_weights_are_the_canonical_ones(tmp_path: Path) -> None:
    """Splitting and reordering give back exactly what was written."""
    for name, tiny in TINY.items():
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
    weights = LlamaWeights(read_gguf(write_tiny(tmp_path / "trace.gguf", TINY["qwen2"])))
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
    ("llama", {"rope.scaling.factor": 4.0}, "scaled"),
    ("llama", {"attention.scale": 0.1}, "attention.scale"),
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
    ("qwen2", {"output.bias": np.zeros(VOCABULARY, np.float32)}, "output.bias"),
]


def test_other_files_are_refused(tmp_path: Path) -> None:
    """Metadata that makes no sense, tensors that a Llama has not or lacks, another architecture."""
    bad = tmp_path / "bad.gguf"
    with pytest.raises(NotALlama, match="gemma2"):
        LlamaWeights(read_gguf(write_tiny(bad, Tiny(), architecture="gemma2")))
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
