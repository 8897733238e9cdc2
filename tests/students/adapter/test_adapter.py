"""The adapted student: starts as its base, and trains nothing of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from students.adapter.adapter import AdaptedStudent, adapt
from students.adapter.base_model import AdapterSettings
from students.adapter.gated_projection import GatedProjection, StartingGate, rotate, turn
from students.model import so8
from students.model.safety_head import SafetyHead, SafetyShape, shape_of
from students.weights import set_weights
from tests.support.students import (
    KINDS,
    MATRICES,
    ROWS,
    VOCAB,
    apart,
    base_bytes,
    base_of,
    disturb,
    disturbed,
    drawn,
    every_quant,
    in_nf4,
    loss_of,
    make_adapted,
    make_base,
    needs_nf4,
)

Weights = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def steady() -> None:
    torch.manual_seed(0)


def cloned(student: AdaptedStudent) -> dict[str, Tensor]:
    """Its own weights as they are now."""
    return {name: one.clone() for name, one in student.own_weights().items()}


def gradients(student: AdaptedStudent) -> dict[str, Tensor]:
    student.zero_grad(set_to_none=True)
    loss_of(student).backward()
    return gradients_of(student)


def gradients_of(student: AdaptedStudent) -> dict[str, Tensor]:
    named = student.named_parameters()
    return {name: one.grad.clone() for name, one in named if one.grad is not None}


def assert_equal(found: Weights, wanted: Weights, where: str = "") -> None:
    """The same names and, bit by bit, the same values."""
    assert found.keys() == wanted.keys(), where
    other = [name for name, one in wanted.items() if not torch.equal(found[name], one)]
    assert not other, (where, other)


@every_quant
def test_starts_as_its_base(quant: str, tmp_path: Path) -> None:
    """The base's states and logits, with left padding too, though no rotation is the identity."""
    mask = torch.ones_like(drawn())
    mask[1, :3] = 0
    for kind in KINDS:
        base = base_of(kind, quant, tmp_path / kind)
        with torch.no_grad():
            base.train()  # else bitsandbytes takes another, rougher way on some CPUs
            wanted = [base(drawn()).logits, base(drawn(), attention_mask=mask).logits]
            base.eval()
            student = make_adapted(base)
            found = [student(drawn()).logits, student(drawn(), attention_mask=mask).logits]
        for one, other in zip(wanted, found, strict=True):
            assert other.shape[-1] == VOCAB, kind
            assert apart(one[1:, 3:, :VOCAB], other[1:, 3:]) <= 1e-5, kind
        assert apart(wanted[0][..., :VOCAB], found[0]) <= 1e-5, kind
        assert apart(wanted[0][1], wanted[1][1]) > 1e-2, kind
        rotations = student.rotations().detach()
        width = student.layers()[0].self_attn.o_proj.projection.in_features
        assert rotations.shape == (2, 2, width // 8, 8, 8), kind
        assert float(so8.commutator_norm(rotations[:, 1], rotations[:, 0]).min()) > 1e-3, kind


def test_lora_is_in_every_matrix() -> None:
    """Four or seven matrices of a layer; names without wrappers; float32 over any base."""
    for kind, matrices in MATRICES.items():
        student = make_adapted(make_base(kind).to(torch.bfloat16))
        names = student.parameters_by_kind()
        short = [name + "_proj" for name in matrices.split()]
        assert {name.split(".")[4] for name in names["LoRA A"]} == set(short), kind
        assert len(names["LoRA A"]) == len(names["LoRA B"]) == 2 * len(short), kind
        assert "model.layers.1.self_attn.o_proj.lora_A.weight" in names["LoRA A"], kind
        assert "model.layers.1.self_attn.gate.safety" in names["gates"], kind
        assert {one.dtype for one in student.own_weights().values()} == {torch.float32}, kind
        plain = make_base(kind)
        assert set(names["base"]) == {name for name, _ in plain.named_parameters()}, kind
        assert student.base_parameters() == plain.num_parameters(), kind
        own = {name: one.numel() for name, one in student.own_weights().items()}
        trained = [size for name, size in own.items() if not name.endswith(".start")]
        assert student.trainable_parameters() == sum(trained), kind


@needs_nf4
def test_nf4_leaves_the_output_layer_and_counts_logically(tmp_path: Path) -> None:
    plain = make_base()
    student = make_adapted(in_nf4(plain, tmp_path))
    assert student.layers()[0].mlp.up_proj.base_layer.weight.quant_type == "nf4"
    assert student.base.lm_head.weight.dtype == torch.float32
    assert torch.equal(student.output_matrix(), plain.lm_head.weight[:VOCAB])
    assert student.base_parameters() == plain.num_parameters()


@every_quant
def test_gradients_with_and_without_checkpointing(
    quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same to the last bit; the base gets none; nobody complains of a cache."""
    warnings: list[str] = []
    monkeypatch.setattr("transformers.modeling_layers.logger.warning_once", warnings.append)
    for kind in KINDS:
        student = disturbed(base_of(kind, quant, tmp_path / kind)).train()
        plain = gradients(student)
        student.activation_checkpointing_enable({"use_reentrant": False})
        assert_equal(gradients(student), plain, kind)
        trained = {name for name, one in student.named_parameters() if one.requires_grad}
        assert set(plain) == trained, kind
        named = student.parameters_by_kind()
        assert len(plain) == sum(len(named[one]) for one in named if one != "base"), kind
        assert all(float(one.abs().max()) > 0 for one in plain.values()), kind
        student.activation_checkpointing_disable()
        left = [getattr(module, "gradient_checkpointing", False) for module in student.modules()]
        assert not any(left) and not warnings, kind


def test_a_pass_in_between_changes_nothing() -> None:
    """Recomputation uses the turns of its own forward pass, also after one without gradients."""
    student = disturbed().train()
    plain = gradients(student)
    student.gradient_checkpointing_enable()
    student.zero_grad(set_to_none=True)
    loss = loss_of(student)
    with torch.no_grad():
        student.eval()(drawn(1, 3))
    student.train()
    loss.backward()
    assert_equal(gradients_of(student), plain)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_would_lose_the_gradients() -> None:
    """The public bug with frozen embeddings and LoRA (no grad_fn), which cannot happen here."""
    student = make_adapted().train()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        student.activation_checkpointing_enable({"use_reentrant": True})
    for gate in student.gates():
        gate.requires_grad_(False)  # LoRA alone, as in the reports
    student.base._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=True))
    assert not student.base.model(drawn()).last_hidden_state.requires_grad
    for gate in student.gates():
        gate.requires_grad_(True)
    student.activation_checkpointing_enable()
    assert student.base.model(drawn()).last_hidden_state.grad_fn is not None
    lora = [one for name, one in gradients(student).items() if "lora_B" in name]
    assert all(float(one.abs().max()) > 0 for one in lora)


@every_quant
def test_the_base_stays(quant: str, tmp_path: Path) -> None:
    """Steps and evaluations in turn: the loss falls, and not a byte of the base changes."""
    student = make_adapted(base_of("qwen2", quant, tmp_path))
    before, own = base_bytes(student), cloned(student)
    trained = [one for one in student.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0.1)
    losses = []
    for _ in range(4):
        student.train()
        optimizer.zero_grad()
        loss = loss_of(student)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():  # some CPUs have bitsandbytes pack the matrices anew here
            student.eval()(drawn())
    assert losses[-1] < losses[0]
    assert base_bytes(student) == before
    for name, one in student.own_weights().items():
        assert torch.equal(one, own[name]) == name.endswith(".start"), name


@needs_nf4
def test_evaluation_packs_nothing(tmp_path: Path) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes packs for inference, and that passes no gradient.

    Gradients after an evaluation are those before it; a base with a packed matrix is refused.
    """
    student = disturbed(base_of("llama", "nf4", tmp_path))
    before = gradients(student)
    with torch.no_grad():
        student.eval()(drawn())
    assert_equal(gradients(student), before)
    base = base_of("llama", "nf4", tmp_path)
    base.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    message = r"packed model\.layers\.1\.mlp\.up_proj for inference .* load the base anew"
    with pytest.raises(ValueError, match=message):
        make_adapted(base)


def test_own_weights_round_trip() -> None:
    """Another student of the same base becomes the same; own weights are all that differs."""
    one, other = disturbed(), make_adapted(seed=2)
    with torch.no_grad():
        wanted = one(drawn()).logits
        assert not torch.allclose(other(drawn()).logits, wanted, atol=1e-2)
        kept = cloned(one)
        set_weights(other, kept)
        assert torch.equal(other(drawn()).logits, wanted)
    assert_equal(other.own_weights(), kept)
    assert not any("base_layer" in name or name.startswith("base.") for name in kept)


def test_a_fitted_safety_head_is_its_own_weight_too() -> None:
    """With its table of token runs; another student takes both, and one can do without."""
    shape = SafetyShape((0,), mean=True, buckets=8)
    students = [make_adapted() for _ in range(2)]
    for student in students:
        student.replace_safety_head(SafetyHead(student.config.hidden_size, shape))
    first, second = students
    assert first.safety_head.runs is not None
    first.safety_head.runs.normal_()
    set_weights(second, cloned(first))
    heads = [student.heads().safety for student in students]
    assert heads[0] is not None and heads[1] is not None and heads[1].runs is not None
    assert torch.equal(heads[1].runs, first.safety_head.runs)
    assert shape_of(second.config.safety_shape) == shape
    first.replace_safety_head(None)
    assert first.heads().safety is None
    assert not [name for name in first.own_weights() if name.startswith("safety_head")]


def test_foreign_weights_are_refused_whole() -> None:
    """A shape of another rank, a tensor too few; nothing of the rest is taken."""
    student = make_adapted()
    before = cloned(student)
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    odd = {key: one + 1 for key, one in before.items()} | {name: torch.zeros(3, 64)}
    with pytest.raises(ValueError, match=r"lora_A\.weight has shape \[3, 64\], not \[4, 64\]"):
        set_weights(student, odd)
    with pytest.raises(KeyError, match=rf"tensors do not match: \[.{re.escape(name)}.\]"):
        set_weights(student, {key: one for key, one in before.items() if key != name})
    assert_equal(student.own_weights(), before)


def test_a_seed_says_it_all() -> None:
    """The same student, with or without heads; the global generator is left alone."""
    *bases, last = [make_base() for _ in range(4)]
    state = torch.get_rng_state()
    one, same, other = map(make_adapted, bases, (1, 1, 2))
    bare = adapt(last, AdapterSettings(rank=4, alpha=8), VOCAB, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    mine = cloned(one)
    assert_equal(same.own_weights(), mine)
    assert not torch.equal(one.gates()[0].safety, other.gates()[0].safety)
    assert bare.heads().safety is None and bare.heads().verification is None
    assert all(torch.equal(mine[name], tensor) for name, tensor in bare.own_weights().items())
    twin = copy.deepcopy(one)
    disturb(twin)
    assert_equal(one.own_weights(), mine)
    assert not torch.equal(twin(drawn()).logits, one(drawn()).logits)


def test_what_cannot_be_adapted() -> None:
    """Bases that do not fit, and settings that make no adapter."""
    narrow = make_base(num_attention_heads=3, num_key_value_heads=1, head_dim=4, hidden_size=36)
    small = transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)
    other = "a gpt2 model cannot be adapted; use one of llama, phi3"
    cases = [
        (narrow, VOCAB, "12 wide"),
        (make_base(), ROWS + 1, "the base has 104 tokens, the teacher 105"),
        (make_adapted().base, VOCAB, "adapted already"),
        (transformers.GPT2LMHeadModel(small), 8, other),
    ]
    for base, vocab_size, message in cases:
        with pytest.raises(ValueError, match=message):
            pytest.fail(f"adapted: {message}, {make_adapted(base, vocab_size=vocab_size)}")
    for name, value in (("rank", 0), ("alpha", 0), ("dropout", 1.0)):
        with pytest.raises(ValueError, match=name):
            pytest.fail(f"taken: {AdapterSettings(**{name: value})}")


def test_the_gate_against_its_definition() -> None:
    """Block by block R_cmd R_safe R0ᵀ x, written out."""
    gate = StartingGate(2, 0.3).double()
    with torch.no_grad():
        gate.safety.add_(0.2)
    x = torch.randn(3, 16, dtype=torch.float64)
    safety, command = gate()
    blocks = [command[n] @ safety[n] @ gate.start[n].T @ x[:, 8 * n : 8 * n + 8].T for n in (0, 1)]
    wanted = torch.cat(blocks).T
    assert torch.allclose(rotate(x, turn(gate(), gate.start)), wanted, atol=1e-12)
    with pytest.raises(ValueError, match="the input is 24 wide; 2 rotations need 16"):
        rotate(torch.zeros(1, 24), gate.start)


def test_gate_gradient_by_finite_differences() -> None:
    """Through attention and LoRA in float64, as the norms around it round to float32."""
    student = disturbed().double()
    x, positions = torch.randn(2, 7, 64, dtype=torch.float64), torch.arange(7)[None]
    angles = student.base.model.rotary_emb(x, positions)
    for layer in student.layers():

        def loss(attention: Any = layer.self_attn) -> Tensor:
            return attention(x, position_embeddings=angles, attention_mask=None)[0].sin().sum()

        loss().backward()
        for parameter in (layer.self_attn.gate.safety, layer.self_attn.gate.command):
            direction = torch.randn(parameter.shape, dtype=torch.float64)
            slope = float((parameter.grad * direction).sum())
            with torch.no_grad():
                kept, step = parameter.clone(), 1e-5
                parameter.copy_(kept + step * direction)
                above = float(loss())
                parameter.copy_(kept - step * direction)
                below = float(loss())
                parameter.copy_(kept)
            assert abs(slope) > 1e-2
            assert slope == pytest.approx((above - below) / (2 * step), rel=1e-7)


def test_rotations_stay_exact_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 autocast reaches neither them nor their product with the attention output."""
    turned: list[tuple[Tensor, Tensor, Tensor]] = []

    def watched(x: Tensor, by: Tensor) -> Tensor:
        turned.append((x, by, rotate(x, by)))
        return turned[-1][-1]

    monkeypatch.setattr("students.adapter.gated_projection.rotate", watched)
    student = disturbed()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = student(drawn())
    assert output.rotations.dtype == torch.float32 and output.logits.dtype == torch.bfloat16
    assert float(so8.orthogonality_error(output.rotations).max()) < 1e-6
    assert len(turned) == 2
    for x, by, result in turned:
        assert by.dtype == torch.float32 and result.dtype == x.dtype
        blocks = x.double().unflatten(-1, (-1, 8))
        exact = torch.einsum("nij,btnj->btni", by.double(), blocks).flatten(2)
        rounding = 2**-8 if x.dtype == torch.bfloat16 else 1e-6
        assert float(((result - exact).abs() / exact.abs().clamp(min=1e-2)).max()) <= rounding
    bare = make_adapted(make_base().to(torch.bfloat16))
    assert bare(drawn()).logits.dtype == torch.bfloat16
    assert float(so8.orthogonality_error(bare.rotations().detach()).max()) < 1e-6


def test_states_and_logits_on_request() -> None:
    """Layer states before the final norm, logits of the last tokens or none, and a cache."""
    student = disturbed(make_base("qwen3"))
    ids = drawn()
    with torch.no_grad():
        whole = student(ids, layers_to_keep=(1,))
        assert list(whole.layer_states) == [1]
        assert torch.equal(student.base.model.norm(whole.layer_states[1]), whole.last_hidden_state)
        last = student(ids, logits_to_keep=2).logits
        assert torch.allclose(last, whole.logits[:, -2:], atol=1e-5)
        bare = student(ids, with_logits=False)
        assert bare.logits is None and bare.layer_states is None and bare.past_key_values is None
        assert torch.equal(F.linear(bare.last_hidden_state, student.output_matrix()), whole.logits)
        first = student(ids[:, :4], use_cache=True)
        rest = student(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
        parts = torch.cat((first.logits, rest.logits), dim=1)
        assert torch.allclose(parts, whole.logits, atol=1e-5)
        assert torch.equal(student.base.model(ids).last_hidden_state, whole.last_hidden_state)
    gated = [one for one in student.modules() if isinstance(one, GatedProjection)]
    assert gated and all(one.turn is None for one in gated)
