"""Folding: the same logits without a gate, refusal of what cannot be, and the table of names."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from students.gguf.architectures import UnmappedTensor, from_gguf_name, to_gguf_name
from students.model import so8
from students.model.config import SO8TConfig
from students.model.decoder import SO8TForCausalLM
from students.model.fold import FoldError, fold, to_llama
from tests.support.pretended_gpu import DEVICE, to_gpu
from tests.support.pretended_gpu.arithmetic import without_float64
from tests.support.references import case
from tests.support.students import drawn_ids, gated, grouped_student, make_student, weights_of

LAYER_TABLE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        return model(ids).logits


def assert_equal(result: Tensor, expected: Tensor) -> None:
    """The same logits to 2e-5."""
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


def test_folded_llama_equals_the_gated_student() -> None:
    """transformers' own Llama, without any gate, gives the same logits: 1e-4 asked, 2e-5 held."""
    ids = drawn_ids(3, 12)
    for tied, (layers, head_dim) in product((True, False), ((1, None), (3, None), (2, 2), (2, 10))):
        with case(tied, layers, head_dim):
            student = grouped_student(layers=layers, tied=tied, head_dim=head_dim)
            expected = logits_of(student, ids)
            assert float(expected.abs().max()) > 1.0
            assert float((logits_of(to_llama(student), ids) - expected).abs().max()) <= 2e-5
    student, ids = make_student(64, 2), drawn_ids(2, 16, vocab_size=96)  # as the builder shapes it
    assert_equal(logits_of(to_llama(student), ids), logits_of(student, ids))


def test_folds_where_there_is_no_float64() -> None:
    """To the same bits, on the student's device."""
    expected = fold(make_student(32, 2))
    with without_float64():
        folded = fold(to_gpu(make_student(32, 2)))
        for name, tensor in expected.items():
            assert folded[name].device == DEVICE and torch.equal(folded[name].cpu(), tensor), name


def test_a_config_without_special_tokens_becomes_a_llama() -> None:
    """A student whose configuration names no bos or eos folds like any other."""
    config = SO8TConfig(hidden_size=16, vocab_size=40, num_attention_heads=2, num_key_value_heads=1)
    assert to_llama(SO8TForCausalLM(config)).config.hidden_size == 16


def test_folded_projection_against_the_definition() -> None:
    """The folded W_o applied to x is W_o · (R_cmd · (R_safe · x)), rounded once from float64."""
    student = grouped_student()
    weights, folded = weights_of(student), fold(student)
    x = np.random.default_rng(0).normal(size=16)
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn."
        turned = gated(x, weights[at + "gate.safety"], weights[at + "gate.command"])
        expected = weights[at + "o_proj.weight"] @ turned
        got = folded[at + "o_proj.weight"].double().numpy() @ x
        np.testing.assert_allclose(got, expected, atol=5e-7)


def test_fold_leaves_the_student_and_other_weights_alone() -> None:
    """Only o_proj changes, and only of that there is a copy."""
    student = grouped_student()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    for name, tensor in fold(student).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name]) == ("o_proj" not in name)
        same = tensor.data_ptr() == student.state_dict()[name].data_ptr()
        assert same == ("o_proj" not in name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_fold_names_are_a_llamas() -> None:
    """No gate, and an output matrix only where it is not the embedding."""
    layers = {f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in LAYER_TABLE}
    common = layers | {"model.embed_tokens.weight", "model.norm.weight"}
    assert set(fold(grouped_student(tied=True))) == common
    assert set(fold(grouped_student(tied=False))) == common | {"lm_head.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_refused(dtype: torch.dtype) -> None:
    """Weights that are not float32 do not fold exactly, not even one of them."""
    with pytest.raises(FoldError, match="only float32"):
        fold(grouped_student().to(dtype))
    student = grouped_student()
    student.model.layers[1].mlp.up_proj.to(dtype)
    with pytest.raises(FoldError, match=r"layers\.1\.mlp\.up_proj"):
        fold(student)


def test_non_finite_weights_are_refused() -> None:
    """One NaN or infinity anywhere is enough."""
    student = grouped_student()
    indices = {
        "command": student.model.layers[1].self_attn.gate.command[0],
        "safety": student.model.layers[0].self_attn.gate.safety[0],
        "embedding": student.model.embed_tokens.weight[0],
        "norm": student.model.norm.weight,
    }
    for (name, weights), value in product(indices.items(), (math.nan, math.inf, -math.inf)):
        kept = weights[0].item()
        weights.data[0] = value
        with case(name, value), pytest.raises(FoldError, match="not finite"):
            fold(student)
        weights.data[0] = kept
    assert fold(student)


def test_inexact_rotation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation off by more than 1e-5 names its layer; so does one that is NaN."""
    student = grouped_student()
    exact = so8.rotation
    for broken in (lambda p: exact(p) * 1.0001, lambda p: exact(p) * float("nan")):
        monkeypatch.setattr(so8, "rotation", broken)
        with pytest.raises(FoldError, match="layer 0: rotation is off"):
            fold(student)
    monkeypatch.setattr(so8, "rotation", exact)
    assert fold(student)


def test_names_are_llama_cpps() -> None:
    """The table, written out again; every tensor of a student has a name of its own in it."""
    assert to_gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert to_gguf_name("model.norm.weight") == "output_norm.weight"
    assert to_gguf_name("lm_head.weight") == "output.weight"
    for layer in (0, 7, 10, 123):
        for ours, theirs in LAYER_TABLE.items():
            name = f"model.layers.{layer}.{ours}.weight"
            assert to_gguf_name(name) == f"blk.{layer}.{theirs}.weight"
            assert from_gguf_name(f"blk.{layer}.{theirs}.weight") == name
    names = list(fold(grouped_student(tied=False, layers=11)))
    mapped = [to_gguf_name(name) for name in names]
    assert len(set(mapped)) == len(names) == 11 * 9 + 3
    assert [from_gguf_name(name) for name in mapped] == names


def test_unknown_names_raise() -> None:
    """A name outside the table is refused, in both directions; nothing is dropped silently."""
    ours = (
        "",
        "model.layers.0.self_attn.gate.safety",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.x.self_attn.q_proj.weight",
        "model.layers.00.self_attn.q_proj.weight",
        "model.layers.-1.self_attn.q_proj.weight",
        "model_layers_0_self_attn_q_proj_weight",
        "xmodel.norm.weight",
        "model.norm.weight\n",
        "token_embd.weight",
    )
    theirs = ("model.norm.weight", "blk.0.attn_q.bias", "blk.01.attn_q.weight", "blk.0.x")
    for translate, names in ((to_gguf_name, ours), (from_gguf_name, theirs)):
        for name in names:
            with case(name), pytest.raises(UnmappedTensor, match="no counterpart"):
                translate(name)
