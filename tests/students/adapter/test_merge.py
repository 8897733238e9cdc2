"""A plain model of an adapted student: the same logits, nothing left of what made it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from students.adapter.merge import merge
from students.model.fold import FoldError
from tests.support.students import (
    KINDS,
    VOCAB,
    apart,
    base_bytes,
    base_of,
    disturbed,
    drawn,
    every_quant,
    in_nf4,
    make_adapted,
    make_base,
    needs_nf4,
)


@every_quant
def test_merged_equals_adapted(quant: str, tmp_path: Path) -> None:
    """A plain model of the base's class: same logits, its names, no trace of what made it."""
    for kind in KINDS:
        folder = tmp_path / kind
        student = disturbed(base_of(kind, quant, folder / "base"))
        before = base_bytes(student)
        plain = merge(student)
        assert base_bytes(student) == before, kind
        fresh = type(plain)(make_base(kind, vocab_size=VOCAB).config)
        assert type(plain) is type(student.base) and plain.config.vocab_size == VOCAB, kind
        weights, expected = plain.state_dict(), fresh.state_dict()
        shapes = [(name, one.shape) for name, one in weights.items()]
        assert shapes == [(name, one.shape) for name, one in expected.items()], kind
        assert {one.dtype for one in weights.values()} == {torch.float32}, kind
        classes = {type(module) for module in plain.modules()}
        assert classes == {type(module) for module in fresh.modules()}, kind
        with torch.no_grad():
            wanted, result = student(drawn()).logits, plain(drawn()).logits
            initial = make_base(kind)(drawn()).logits[..., :VOCAB]
            assert apart(result, wanted) <= 1e-4 < 0.1 < apart(wanted, initial), kind
            plain.save_pretrained(folder / "plain")
            config = json.loads((folder / "plain" / "config.json").read_text())
            assert "quantization_config" not in config, kind
            assert str(tmp_path) not in json.dumps(config), kind
            read = transformers.AutoModelForCausalLM.from_pretrained(folder / "plain")
            assert torch.equal(read(drawn()).logits, result), kind


@needs_nf4
def test_merging_what_computes_in_bfloat16(tmp_path: Path) -> None:
    """The plain model differs by bfloat16 rounding alone: in float32 they agree."""
    student = disturbed(in_nf4(make_base("phi3"), tmp_path, torch.bfloat16))
    with torch.no_grad():
        rough = student(drawn()).logits
        assert rough.dtype == torch.bfloat16
        assert apart(merge(student)(drawn()).logits, rough) <= 0.2  # logits reach 5
        for module in student.base.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = torch.float32
        for parameter in student.base.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        exact = student(drawn()).logits
        assert apart(merge(student)(drawn()).logits, exact) <= 1e-4
        assert apart(exact, rough) <= 0.2


@every_quant
def test_tied_embeddings(quant: str, tmp_path: Path) -> None:
    """One matrix before and after; cut to the vocabulary once."""
    student = disturbed(base_of("qwen2", quant, tmp_path, tie_word_embeddings=True))
    assert student.config.tie_word_embeddings and not student.output_matrix().requires_grad
    plain = merge(student)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.lm_head.weight.shape == (VOCAB, 64)
    with torch.no_grad():
        assert apart(plain(drawn()).logits, student(drawn()).logits) <= 1e-4


def test_what_cannot_be_merged() -> None:
    """A start that is no rotation, a weight that is not finite, of the base's too."""
    student = make_adapted()
    start = student.own_weights()["model.layers.1.self_attn.gate.start"]
    kept = start.clone()
    off = r"layer 1: rotation is off"
    for change, message in (
        (lambda: start[0].mul_(1.001), off),
        (lambda: start[0, 0].neg_(), off),
        (lambda: start[0].fill_(torch.nan), rf"{off}|gate\.start has values"),
    ):
        change()
        with pytest.raises(FoldError, match=message):
            pytest.fail(f"merged: {start[0]}, {merge(student)}")
        start.copy_(kept)
    for name, tensor, value in (
        ("model.layers.0.self_attn.gate.safety", student.gates()[0].safety, torch.inf),
        ("model.norm.weight", student.base.model.norm.weight, torch.nan),
    ):
        before = tensor.detach().clone()
        tensor.data.view(-1)[3] = value
        with pytest.raises(FoldError, match=rf"{re.escape(name)} has values that are not finite"):
            pytest.fail(f"merged: {name}, {merge(student)}")
        tensor.data.copy_(before)
