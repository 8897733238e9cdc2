"""Memory that training a new student takes on a device: the estimate against the tensors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW

from distill.base_models.memory_estimate import LOGITS_COPIES, TrainingSettings
from distill.base_models.new_student_memory import estimate_new
from distill.losses.chunked_lm_head import chunked_head_loss
from distill.losses.fused import BLOCK_BYTES
from students.model import decoder
from students.model.config import SO8TConfig
from students.model.decoder import SO8TForCausalLM
from tests.support.memory import Peak, saved_bytes, size_of, some_loss

VOCAB = 480
SIZES = ((64, 2, 2, 2), (128, 3, 4, 2))  # width, layers, heads, key and value heads
NARROW = torch.bfloat16


def shape_of(size: tuple[int, int, int, int], tied: bool) -> SO8TConfig:
    width, layers, heads, kv_heads = size
    return SO8TConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=3 * width,
        tie_word_embeddings=tied,
        safety_head=True,
        verification_head=True,
    )


def settings(tokens: Tensor, autocast: torch.dtype | None, checkpointing: bool) -> TrainingSettings:
    return TrainingSettings(
        vocab_size=VOCAB,
        autocast=autocast,
        sequences=tokens.shape[0],
        length=tokens.shape[1],
        checkpointing=checkpointing,
        safety_head=True,
        verification_head=True,
        on_cpu=False,
    )


@pytest.fixture(autouse=True)
def attention_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's fused kernel, in the dtype of its inputs."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        mask, causal, grouped = rest
        options = {"attn_mask": mask, "is_causal": causal, "enable_gqa": grouped}
        return F.scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(decoder, "attend", attend)


def test_weights_gradients_and_moments_are_those_of_a_student() -> None:
    """Exactly, but for the optimizer's own counts."""
    tokens = torch.arange(12)[None]
    for size, tied in ((SIZES[0], True), (SIZES[1], False)):
        shape = shape_of(size, tied)
        student = SO8TForCausalLM(shape)
        found = estimate_new(shape, settings(tokens, None, False))
        optimizer = AdamW(student.parameters())
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        weights = list(student.parameters())
        moments = [value for state in optimizer.state.values() for value in state.values()]
        assert found.trained == found.gradients == size_of(weights), size
        assert found.moments == pytest.approx(size_of(moments), rel=0.01), size
        assert found.trained_numbers == student.parameter_count(), size


@pytest.mark.parametrize("autocast", [None, NARROW])
def test_activations_are_what_a_forward_pass_saves(autocast: torch.dtype | None) -> None:
    """Within a tenth; with checkpointing, the inputs and what one layer saves without it."""
    tokens = torch.arange(2 * 300).view(2, 300) % VOCAB
    for size in SIZES:
        shape = shape_of(size, tied=True)
        student = SO8TForCausalLM(shape).train()

        def saved(student: SO8TForCausalLM = student) -> int:
            narrow = torch.autocast("cpu", NARROW) if autocast else nullcontext()
            return saved_bytes(student, tokens, narrow)

        estimates = [estimate_new(shape, settings(tokens, autocast, on)) for on in (False, True)]
        whole = saved()
        assert estimates[0].activations == pytest.approx(whole, rel=0.1), size
        student.checkpoint_activations(True)
        inputs = saved()
        one_layer = (whole - inputs) / shape.num_hidden_layers
        assert estimates[1].activations == pytest.approx(inputs + one_layer, rel=0.2), size


@pytest.mark.parametrize("autocast", [None, NARROW])
def test_a_step_stays_below_the_estimate(autocast: torch.dtype | None) -> None:
    """The most that a step holds at once; of a loss's buffers, this one has two."""
    shape = shape_of(SIZES[1], tied=True)
    tokens = torch.arange(2 * 300).view(2, 300) % VOCAB
    for checkpointing in (False, True):
        student = SO8TForCausalLM(shape).train()
        student.checkpoint_activations(checkpointing)
        with Peak(student) as peak:
            with torch.autocast("cpu", NARROW) if autocast else nullcontext():
                states = student(tokens, with_logits=False).last_hidden_state.flatten(0, 1)
                matrix = student.output_matrix()
                loss = chunked_head_loss(states, matrix, some_loss)
            loss.backward()
        found = estimate_new(shape, settings(tokens, autocast, checkpointing))
        unused = LOGITS_COPIES * min(BLOCK_BYTES, 4 * tokens.numel() * VOCAB)
        allowed = found.activations + found.temporary + found.loss + found.gradients - unused
        assert 0.45 * allowed < peak.most <= allowed, f"checkpointing {checkpointing}"
