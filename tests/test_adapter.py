"""The adapted student: begins as its base, learns in what it was given alone, and leaves a plain model behind."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distill.checkpoint import set_weights
from students import so8
from students.adapter import AdaptedStudent, adapt
from students.adapter_base import AdapterSettings
from students.gated_projection import GatedProjection, StartingGate, rotate, turn
from students.heads import certainty
from teachers.huggingface_folder import load_model
from teachers.model_folder import ModelFolder

KINDS = ("llama", "phi3", "qwen2", "qwen3")
ROWS, VOCAB = 104, 96  # the bases have more rows than the teacher has tokens
NAMES = {
    "llama": ("Llama", "q k v o gate up down"),
    "phi3": ("Phi3", "qkv o gate_up down"),
    "qwen2": ("Qwen2", "q k v o gate up down"),
    "qwen3": ("Qwen3", "q k v o gate up down"),
}
QUANTS = [
    "plain",
    pytest.param(
        "nf4",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
        ),
    ),
]
every_base = pytest.mark.parametrize("kind", KINDS)
every_quant = pytest.mark.parametrize("quant", QUANTS)


@pytest.fixture(autouse=True)
def steady() -> None:
    torch.manual_seed(0)


def make_base(kind: str = "llama", **changes: Any) -> Any:
    """A small model with lively weights, untied unless asked for."""
    shape: dict[str, Any] = {
        "vocab_size": ROWS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    if kind == "qwen3":
        shape["head_dim"] = 32  # an attention output wider than the residual stream
    name = NAMES[kind][0]
    config = getattr(transformers, f"{name}Config")(**(shape | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def in_nf4(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same in NF4, as a teacher's or base's folder is loaded."""
    model.to(dtype).save_pretrained(folder)
    found = ModelFolder(folder, json.loads((folder / "config.json").read_text()), ())
    return load_model(found, torch.device("cpu"), dtype, load_in_4bit=True)


def base_of(kind: str, quant: str, folder: Path, **changes: Any) -> Any:
    model = make_base(kind, **changes)
    return in_nf4(model, folder) if quant == "nf4" else model


def make_adapted(base: Any = None, seed: int = 0, vocab_size: int = VOCAB) -> AdaptedStudent:
    settings = AdapterSettings(rank=4, alpha=8)
    base = make_base() if base is None else base
    return adapt(base, settings, vocab_size, seed=seed, safety_head=True, verification_head=True)


def drawn(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))


def disturb(student: AdaptedStudent, size: float = 0.1) -> None:
    """Other values in everything that is trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in student.own_weights().items():
            if not name.endswith(".start"):
                tensor.add_(size * torch.randn(tensor.shape, generator=generator))


def loss_of(student: AdaptedStudent) -> Tensor:
    """A loss that everything has a part in, with every second layer's state."""
    output = student(drawn(), layers_to_keep=[0])
    assert output.logits is not None and output.last_hidden_state is not None
    assert output.rotations is not None and output.layer_states is not None
    states = output.last_hidden_state
    told = student.safety_head(states[:, -1])
    agreed = student.verification_head(states, certainty(output.logits))
    return (
        F.cross_entropy(output.logits[:, :-1].flatten(0, 1), drawn()[:, 1:].flatten())
        + F.cross_entropy(told, torch.tensor([0, 2]))
        + F.softplus(agreed).mean()
        + output.layer_states[0].square().mean()
        + so8.commutator_norm(output.rotations[:, 1], output.rotations[:, 0]).mean()
    )


def gradients(student: AdaptedStudent) -> dict[str, Tensor]:
    student.zero_grad(set_to_none=True)
    loss_of(student).backward()
    return {name: one.grad.clone() for name, one in student.named_parameters() if one.grad is not None}


def base_bytes(student: AdaptedStudent) -> dict[str, bytes]:
    kept = student.parameters_by_kind()["base"]
    return {name: one.detach().view(torch.uint8).numpy().tobytes() for name, one in kept.items()}


@every_base
@every_quant
def test_begins_as_its_base(kind: str, quant: str, tmp_path: Path) -> None:
    """The same states and logits up to float32 rounding, with left padding too, though no rotation is the identity."""
    base = base_of(kind, quant, tmp_path)
    mask = torch.ones_like(drawn())
    mask[1, :3] = 0
    with torch.no_grad():
        base.train()  # else bitsandbytes takes another, rougher way on some CPUs
        wanted = [base(drawn()).logits, base(drawn(), attention_mask=mask).logits]
        base.eval()
        student = make_adapted(base)
        found = [student(drawn()).logits, student(drawn(), attention_mask=mask).logits]
    for one, other in zip(wanted, found, strict=True):
        assert other.shape[-1] == VOCAB
        assert float((one[1:, 3:, :VOCAB] - other[1:, 3:]).abs().max()) <= 1e-5
    assert float((wanted[0][..., :VOCAB] - found[0]).abs().max()) <= 1e-5
    assert float((wanted[0] - wanted[1])[1].abs().max()) > 1e-2
    rotations = student.rotations().detach()
    width = student.layers()[0].self_attn.o_proj.projection.in_features
    assert rotations.shape == (2, 2, width // 8, 8, 8)
    assert float(so8.commutator_norm(rotations[:, 1], rotations[:, 0]).min()) > 1e-3


@every_base
def test_lora_is_in_every_matrix(kind: str) -> None:
    """Seven matrices of a layer, four where they are fused; names without wrappers; float32 over any base."""
    student = make_adapted(make_base(kind).to(torch.bfloat16))
    names = student.parameters_by_kind()
    short = [name + "_proj" for name in NAMES[kind][1].split()]
    assert {name.split(".")[4] for name in names["LoRA A"]} == set(short)
    assert len(names["LoRA A"]) == len(names["LoRA B"]) == 2 * len(short)
    assert "model.layers.1.self_attn.o_proj.lora_A.weight" in names["LoRA A"]
    assert "model.layers.1.self_attn.gate.safety" in names["gates"]
    assert {tensor.dtype for tensor in student.own_weights().values()} == {torch.float32}
    plain = make_base(kind)
    assert set(names["base"]) == {name for name, _ in plain.named_parameters()}
    assert student.base_parameters() == plain.num_parameters()
    own = student.own_weights()
    starts = sum(own[name].numel() for name in own if name.endswith(".start"))
    assert student.trainable_parameters() == sum(one.numel() for one in own.values()) - starts


@pytest.mark.parametrize("quant", QUANTS[1:])
def test_nf4_leaves_the_output_layer_and_counts_logically(quant: str, tmp_path: Path) -> None:
    plain = make_base()
    student = make_adapted(in_nf4(plain, tmp_path))
    assert student.layers()[0].mlp.up_proj.base_layer.weight.quant_type == "nf4"
    assert student.base.lm_head.weight.dtype == torch.float32
    assert torch.equal(student.output_matrix(), plain.lm_head.weight[:VOCAB])
    assert student.base_parameters() == plain.num_parameters()


@every_base
@every_quant
def test_gradients_with_and_without_checkpointing(
    kind: str, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything trainable gets the same gradient to the last bit; the base gets none; nobody complains of a cache."""
    said: list[str] = []
    monkeypatch.setattr("transformers.modeling_layers.logger.warning_once", said.append)
    student = make_adapted(base_of(kind, quant, tmp_path))
    disturb(student)
    student.train()
    plain = gradients(student)
    student.activation_checkpointing_enable({"use_reentrant": False})
    again = gradients(student)
    assert set(plain) == {name for name, one in student.named_parameters() if one.requires_grad}
    assert len(plain) == sum(
        len(named) for one, named in student.parameters_by_kind().items() if one != "base"
    )
    assert all(float(one.abs().max()) > 0 for one in plain.values())
    assert set(again) == set(plain)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    student.activation_checkpointing_disable()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
    assert not said


def test_a_pass_in_between_changes_nothing() -> None:
    """Recomputation uses the turns of its own forward pass, also after another one without gradients."""
    student = make_adapted()
    disturb(student)
    student.train()
    plain = gradients(student)
    student.gradient_checkpointing_enable()
    student.zero_grad(set_to_none=True)
    loss = loss_of(student)
    with torch.no_grad():
        student.eval()(drawn(1, 3))
    student.train()
    loss.backward()
    found = {name: one.grad for name, one in student.named_parameters() if one.grad is not None}
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_would_lose_the_gradients() -> None:
    """The public bug (frozen embeddings, LoRA, reentrant checkpointing: no grad_fn), and that it cannot happen here."""
    student = make_adapted()
    student.train()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        student.activation_checkpointing_enable({"use_reentrant": True})
    gates = [gate.requires_grad_(False) for gate in student.gates()]  # LoRA alone, as in the reports
    student.base._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=True))
    assert not student.base.model(drawn()).last_hidden_state.requires_grad
    for gate in gates:
        gate.requires_grad_(True)
    student.activation_checkpointing_enable()
    assert student.base.model(drawn()).last_hidden_state.grad_fn is not None
    assert all(float(one.abs().max()) > 0 for name, one in gradients(student).items() if "lora_B" in name)


@every_quant
def test_the_base_stays(quant: str, tmp_path: Path) -> None:
    """Training steps and evaluations in turn: the loss falls, and not a byte of the base changes."""
    student = make_adapted(base_of("qwen2", quant, tmp_path))
    before, own = base_bytes(student), {name: one.clone() for name, one in student.own_weights().items()}
    optimizer = torch.optim.AdamW(
        [one for one in student.parameters() if one.requires_grad], 1e-2, weight_decay=0.1
    )
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
    assert base_bytes(student).keys() == before.keys()
    assert all(
        torch.equal(one, own[name]) == name.endswith(".start") for name, one in student.own_weights().items()
    )


@pytest.mark.parametrize("quant", QUANTS[1:])
def test_a_base_that_has_been_evaluated(quant: str, tmp_path: Path) -> None:
    """What bitsandbytes packed for inference, on CPUs with AVX512-BF16, passes no gradient; this is such a matrix."""
    base = base_of("llama", quant, tmp_path)
    base.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(
        ValueError, match=r"packed model\.layers\.1\.mlp\.up_proj for inference .* load the base anew"
    ):
        make_adapted(base)


@pytest.mark.parametrize("quant", QUANTS[1:])
def test_evaluation_packs_nothing(quant: str, tmp_path: Path) -> None:
    """Gradients after an evaluation are those before it, also on CPUs where bitsandbytes would pack."""
    student = make_adapted(base_of("llama", quant, tmp_path))
    disturb(student)
    before = gradients(student)
    with torch.no_grad():
        student.eval()(drawn())
    after = gradients(student)
    assert all(torch.equal(before[name], after[name]) for name in before | after)


def test_own_weights_round_trip() -> None:
    """Another student of the same base becomes the same; own weights are all that differs."""
    one, other = make_adapted(seed=1), make_adapted(seed=2)
    disturb(one)
    with torch.no_grad():
        wanted = one(drawn()).logits
        assert not torch.allclose(other(drawn()).logits, wanted, atol=1e-2)
        kept = {name: tensor.clone() for name, tensor in one.own_weights().items()}
        set_weights(other, kept)
        assert torch.equal(other(drawn()).logits, wanted)
    assert other.own_weights().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in other.own_weights().items())
    assert not any("base_layer" in name or name.startswith("base.") for name in kept)


def test_foreign_weights_are_refused_whole() -> None:
    student = make_adapted()
    before = {name: one.clone() for name, one in student.own_weights().items()}
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    with pytest.raises(ValueError, match=r"lora_A\.weight has shape \[3, 64\], not \[4, 64\]"):
        set_weights(student, {key: one + 1 for key, one in before.items()} | {name: torch.zeros(3, 64)})
    with pytest.raises(
        KeyError, match=r"tensors do not match: \[.model\.layers\.0\.mlp\.up_proj\.lora_A\.weight.\]"
    ):
        set_weights(student, {key: one for key, one in before.items() if key != name})
    assert all(torch.equal(one, before[name]) for name, one in student.own_weights().items())


def test_a_seed_says_it_all() -> None:
    """The same seed gives the same student, with or without heads; the global generator is left alone."""
    bases = [make_base() for _ in range(4)]
    state = torch.get_rng_state()
    one, same, other = (make_adapted(base, seed) for base, seed in zip(bases, (1, 1, 2), strict=False))
    bare = adapt(bases[3], AdapterSettings(rank=4, alpha=8), VOCAB, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    mine, theirs = one.own_weights(), same.own_weights()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not torch.equal(one.gates()[0].safety, other.gates()[0].safety)
    assert bare.heads().safety is None and bare.heads().verification is None
    assert all(torch.equal(mine[name], tensor) for name, tensor in bare.own_weights().items())
    twin = copy.deepcopy(one)
    disturb(twin)
    assert torch.equal(one.own_weights()["safety_head.linear.bias"], mine["safety_head.linear.bias"])
    assert not torch.equal(twin(drawn()).logits, one(drawn()).logits)


def narrow(**changes: Any) -> Callable[[], Any]:
    return lambda: make_base(**changes)


@pytest.mark.parametrize(
    ("make", "vocab_size", "words"),
    [
        (narrow(num_attention_heads=3, num_key_value_heads=1, head_dim=4, hidden_size=36), VOCAB, "12 wide"),
        (narrow(), ROWS + 1, "the base has 104 tokens, the teacher 105"),
        (lambda: make_adapted().base, VOCAB, "adapted already"),
        (
            lambda: transformers.GPT2LMHeadModel(
                transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)
            ),
            8,
            "a gpt2 model cannot be adapted; use one of llama, phi3",
        ),
    ],
)
def test_bases_that_cannot_be_used(make: Callable[[], Any], vocab_size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_adapted(make(), vocab_size=vocab_size)


@pytest.mark.parametrize("values", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}])
def test_settings_are_checked(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        AdapterSettings(**values)


def test_the_gate_against_its_definition() -> None:
    """Block by block R_cmd R_safe R0ᵀ x, written out; the gradient against finite differences in float64."""
    gate = StartingGate(2, 0.3).double()
    with torch.no_grad():
        gate.safety.add_(0.2)
    x = torch.randn(3, 16, dtype=torch.float64)
    safety, command = gate()
    wanted = torch.stack(
        [
            torch.cat([command[n] @ safety[n] @ gate.start[n].T @ row[8 * n : 8 * n + 8] for n in range(2)])
            for row in x
        ]
    )
    assert torch.allclose(rotate(x, turn(gate(), gate.start)), wanted, atol=1e-12)
    with pytest.raises(ValueError, match="the input is 24 wide; 2 rotations need 16"):
        rotate(torch.zeros(1, 24), gate.start)


def test_gate_gradient_by_finite_differences() -> None:
    """Through attention and LoRA in float64 (the norms around it round to float32): relative error below 1e-7."""
    student = make_adapted()
    disturb(student)
    student.double()
    x, positions = torch.randn(2, 7, 64, dtype=torch.float64), torch.arange(7)[None]
    angles = student.base.model.rotary_emb(x, positions)
    for layer in student.layers():

        def loss(attention: Any = layer.self_attn) -> Tensor:
            return attention(hidden_states=x, position_embeddings=angles, attention_mask=None)[0].sin().sum()

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
    """bfloat16 autocast reaches neither the rotations nor their product with the attention output."""
    turned: list[tuple[Tensor, Tensor, Tensor]] = []

    def watched(x: Tensor, by: Tensor) -> Tensor:
        turned.append((x, by, rotate(x, by)))
        return turned[-1][-1]

    monkeypatch.setattr("students.gated_projection.rotate", watched)
    student = make_adapted()
    disturb(student)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = student(drawn())
    assert output.rotations.dtype == torch.float32 and output.logits.dtype == torch.bfloat16
    assert float(so8.orthogonality_error(output.rotations).max()) < 1e-6
    assert len(turned) == 2
    for x, by, result in turned:
        assert by.dtype == torch.float32 and result.dtype == x.dtype
        exact = torch.einsum("nij,btnj->btni", by.double(), x.double().unflatten(-1, (-1, 8))).flatten(2)
        rounding = 2**-8 if x.dtype == torch.bfloat16 else 1e-6
        assert float(((result - exact).abs() / exact.abs().clamp(min=1e-2)).max()) <= rounding
    bare = make_adapted(make_base().to(torch.bfloat16))
    assert bare(drawn()).logits.dtype == torch.bfloat16
    assert float(so8.orthogonality_error(bare.rotations().detach()).max()) < 1e-6


def test_states_and_logits_on_request() -> None:
    """Layer states before the final norm, logits of the last tokens or none, and a cache that changes nothing."""
    student = make_adapted(make_base("qwen3"))
    disturb(student)
    ids = drawn()
    with torch.no_grad():
        whole = student(ids, layers_to_keep=(1,))
        assert list(whole.layer_states) == [1]
        assert torch.equal(student.base.model.norm(whole.layer_states[1]), whole.last_hidden_state)
        assert torch.allclose(student(ids, logits_to_keep=2).logits, whole.logits[:, -2:], atol=1e-5)
        bare = student(ids, with_logits=False)
        assert bare.logits is None and bare.layer_states is None and bare.past_key_values is None
        assert torch.equal(F.linear(bare.last_hidden_state, student.output_matrix()), whole.logits)
        first = student(ids[:, :4], use_cache=True)
        rest = student(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
        assert torch.allclose(torch.cat((first.logits, rest.logits), dim=1), whole.logits, atol=1e-5)
        assert torch.equal(student.base.model(ids).last_hidden_state, whole.last_hidden_state)
    assert not any(isinstance(one, GatedProjection) and one.turn is not None for one in student.modules())
