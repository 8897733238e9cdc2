"""A plain model of an adapted student: the same logits, nothing left of what made it, refusal where that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from students.adapter_merge import merge
from students.fold import FoldError
from tests.test_adapter import (
    QUANTS,
    VOCAB,
    base_bytes,
    base_of,
    disturb,
    drawn,
    every_base,
    every_quant,
    in_nf4,
    make_adapted,
    make_base,
)


@every_base
@every_quant
def test_merged_equals_adapted(kind: str, quant: str, tmp_path: Path) -> None:
    """A plain model of the base's class: same logits, its names, no trace of what made it; also saved and read."""
    student = make_adapted(base_of(kind, quant, tmp_path / "base"))
    disturb(student)
    with torch.no_grad():
        wanted, beginning = student(drawn()).logits, make_base(kind)(drawn()).logits[..., :VOCAB]
    before = base_bytes(student)
    plain = merge(student)
    assert base_bytes(student) == before
    fresh = type(plain)(make_base(kind, vocab_size=VOCAB).config)
    assert type(plain) is type(student.base) and plain.config.vocab_size == VOCAB
    assert list(plain.state_dict()) == list(fresh.state_dict())
    assert all(one.shape == plain.state_dict()[name].shape for name, one in fresh.state_dict().items())
    assert {one.dtype for one in plain.state_dict().values()} == {torch.float32}
    assert {type(module) for module in plain.modules()} == {type(module) for module in fresh.modules()}
    with torch.no_grad():
        found = plain(drawn()).logits
        assert float((found - wanted).abs().max()) <= 1e-4
        assert float((wanted - beginning).abs().max()) > 0.1
        plain.save_pretrained(tmp_path / "plain")
        config = json.loads((tmp_path / "plain" / "config.json").read_text())
        assert "quantization_config" not in config and str(tmp_path) not in json.dumps(config)
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        assert torch.equal(read(drawn()).logits, found)


@pytest.mark.parametrize("quant", QUANTS[1:])
def test_merging_what_computes_in_bfloat16(quant: str, tmp_path: Path) -> None:
    """The plain model differs from the student by bfloat16 rounding alone: in float32 they agree."""
    student = make_adapted(in_nf4(make_base("phi3"), tmp_path, torch.bfloat16))
    disturb(student)
    with torch.no_grad():
        rough = student(drawn()).logits
        assert rough.dtype == torch.bfloat16
        assert float((merge(student)(drawn()).logits - rough).abs().max()) <= 0.2  # logits reach 5
        for module in student.base.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = torch.float32
        for parameter in student.base.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        exact = student(drawn()).logits
        assert float((merge(student)(drawn()).logits - exact).abs().max()) <= 1e-4
        assert float((exact - rough).abs().max()) <= 0.2


@every_quant
def test_tied_embeddings(quant: str, tmp_path: Path) -> None:
    """One matrix before and after; cut to the vocabulary once."""
    student = make_adapted(base_of("qwen2", quant, tmp_path, tie_word_embeddings=True))
    disturb(student)
    assert student.config.tie_word_embeddings and not student.output_matrix().requires_grad
    plain = merge(student)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.lm_head.weight.shape == (VOCAB, 64)
    with torch.no_grad():
        assert float((plain(drawn()).logits - student(drawn()).logits).abs().max()) <= 1e-4


def test_what_cannot_be_merged() -> None:
    """A start that is no rotation (stretched, or a reflection), a weight that is not finite, of the base's too."""
    student = make_adapted()
    start = student.own_weights()["model.layers.1.self_attn.gate.start"]
    kept = start.clone()
    for change in (
        lambda: start[0].mul_(1.001),
        lambda: start[0, 0].neg_(),
        lambda: start[0].fill_(torch.nan),
    ):
        change()
        with pytest.raises(FoldError, match=r"layer 1: rotation is off|gate\.start has values"):
            merge(student)
        start.copy_(kept)
    with torch.no_grad():
        student.gates()[0].safety[0, 0] = torch.inf
        with pytest.raises(
            FoldError, match=r"layers\.0\.self_attn\.gate\.safety has values that are not finite"
        ):
            merge(student)
        student.gates()[0].safety[0, 0] = 0.0
        student.base.model.norm.weight[3] = torch.nan
        with pytest.raises(FoldError, match=r"model\.norm\.weight has values that are not finite"):
            merge(student)
