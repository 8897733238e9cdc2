"""The decoder against a float64 reference; causality, saving, generation, gradients, names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from students.model.config import SO8TConfig
from students.model.decoder import SO8TForCausalLM
from tests.support.students import (
    Array,
    drawn_ids,
    gated,
    grouped_student,
    make_student,
    weights_of,
)

LAYER_NAMES = (
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "post_attention_layernorm.weight",
    "self_attn.gate.command",
    "self_attn.gate.safety",
    "self_attn.k_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_proj.weight",
    "self_attn.v_proj.weight",
)


def norm(x: Array, weight: Array, eps: float) -> Array:
    """x / √(mean x² + ε) · weight for each token."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def turned(x: Array, theta: float) -> Array:
    """Rotary embedding of ``[T, H, W]``: pair (i, i + W/2) turns by position · θ^(−2i/W)."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * theta ** (-2 * np.arange(half) / x.shape[-1])
    one, two, cos, sin = x[..., :half], x[..., half:], np.cos(angles), np.sin(angles)
    return np.concatenate((one * cos - two * sin, one * sin + two * cos), axis=-1)


def attended(x: Array, w: dict[str, Array], at: str, config: SO8TConfig) -> Array:
    """Mixed values of all heads ``[T, H·W]``, before gate and output projection."""
    length, heads, shared = len(x), config.num_attention_heads, config.num_key_value_heads
    query, key, value = (
        (x @ w[f"{at}{name}_proj.weight"].T).reshape(length, count, config.head_dim)
        for name, count in (("q", heads), ("k", shared), ("v", shared))
    )
    query, key = turned(query, config.rope_theta), turned(key, config.rope_theta)
    key, value = (states.repeat(heads // shared, axis=1) for states in (key, value))
    scores = np.exp(np.einsum("thw,shw->hts", query, key) / config.head_dim**0.5)
    scores *= np.tril(np.ones((length, length)))
    scores /= scores.sum(axis=-1, keepdims=True)
    return np.einsum("hts,shw->thw", scores, value).reshape(length, -1)


def reference_logits(w: dict[str, Array], config: SO8TConfig, ids: list[int]) -> Array:
    """The whole decoder for one sequence: ``[T, V]``."""
    eps = config.rms_norm_eps
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        h = norm(x, w[at + "input_layernorm.weight"], eps)
        mixed = attended(h, w, at + "self_attn.", config)
        mixed = gated(mixed, w[at + "self_attn.gate.safety"], w[at + "self_attn.gate.command"])
        x = x + mixed @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, w[at + "post_attention_layernorm.weight"], eps)
        opened = h @ w[at + "mlp.gate_proj.weight"].T
        opened = opened / (1 + np.exp(-opened)) * (h @ w[at + "mlp.up_proj.weight"].T)
        x = x + opened @ w[at + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


@pytest.mark.parametrize(
    ("tied", "head_dim"), [(True, None), (False, None), (True, 6), (False, 2), (True, 10)]
)
def test_logits_equal_the_reference(tied: bool, head_dim: int | None) -> None:
    """Every logit of a batch, with the gate as R_cmd · (R_safe · x); heads of any width."""
    student = grouped_student(tied=tied, head_dim=head_dim)
    assert student.config.head_dim == (head_dim or 4)
    ids = drawn_ids(2, 9)
    with torch.no_grad():
        logits = student(ids).logits.numpy()
    for row in range(2):
        expected = reference_logits(weights_of(student), student.config, ids[row].tolist())
        assert np.abs(expected).max() > 1.0
        np.testing.assert_allclose(logits[row], expected, atol=5e-5)


def test_reference_tells_other_gates_apart() -> None:
    """The comparison is sharp: any other composition of the two rotations moves the logits."""
    student = grouped_student()
    weights = weights_of(student)
    expected = reference_logits(weights, student.config, [3, 1, 4, 1, 5])
    for change, of_gate in {
        "swap": lambda safety, command: (command, safety),
        "no safety": lambda safety, command: (0 * safety, command),
        "no command": lambda safety, command: (safety, 0 * command),
        "inverse": lambda safety, command: (-safety, -command),
    }.items():
        changed = dict(weights)
        for layer in range(2):
            names = [f"model.layers.{layer}.self_attn.gate.{x}" for x in ("safety", "command")]
            changed |= zip(names, of_gate(*(weights[name] for name in names)), strict=True)
        result = reference_logits(changed, student.config, [3, 1, 4, 1, 5])
        assert np.abs(result - expected).max() > 1e-2, change


def test_gate_gradients_by_finite_differences() -> None:
    """Both rotations receive the gradient of the float64 reference, in every layer."""
    student, ids = grouped_student(), drawn_ids(5, seed=2)
    direction = np.random.default_rng(3).normal(size=(5, 40))
    (student(ids[None]).logits[0] * torch.from_numpy(direction).float()).sum().backward()
    weights, step = weights_of(student), 1e-5
    gates = {name: p for name, p in student.named_parameters() if "attn.gate." in name}
    assert len(gates) == 4
    for name, parameter in gates.items():
        gradient = parameter.grad
        assert gradient is not None and float(gradient.abs().min()) > 0
        for index in ((0, 0), (1, 27), (0, 13)):
            moved = []
            for sign in (1, -1):
                changed = dict(weights, **{name: weights[name].copy()})
                changed[name][index] += sign * step
                logits = reference_logits(changed, student.config, ids.tolist())
                moved.append((logits * direction).sum())
            expected = (moved[0] - moved[1]) / (2 * step)
            assert float(gradient[index]) == pytest.approx(expected, rel=1e-3, abs=1e-3), name


@torch.no_grad()
def test_a_later_token_never_changes_earlier_logits() -> None:
    """Causality at every position, which itself changes; padding on the right does not matter."""
    student, ids = grouped_student(), drawn_ids(1, 8, seed=4)
    before = student(ids).logits[0]
    for index in range(8):
        changed = ids.clone()
        changed[0, index] = (ids[0, index] + 7) % 40
        after = student(changed).logits[0]
        torch.testing.assert_close(after[:index], before[:index], rtol=0, atol=1e-6)
        assert float((after[index] - before[index]).abs().max()) > 1e-2
    padded = torch.cat((ids, drawn_ids(1, 4, seed=6)), dim=1)
    for mask in (None, (torch.arange(12)[None] < 8).long()):
        result = student(padded, attention_mask=mask).logits[0, :8]
        torch.testing.assert_close(result, before, rtol=0, atol=1e-5, msg=f"mask {mask}")


@torch.no_grad()
def test_cached_chunks_equal_one_pass() -> None:
    """A sequence fed in chunks through the cache gives the logits of one pass."""
    ids = drawn_ids(2, 9, seed=7)
    for head_dim in (None, 6):
        student = grouped_student(head_dim=head_dim)
        whole = student(ids).logits
        for cuts in ((1,), (5,), (3, 6), (1, 2, 3, 4)):
            cache, parts = None, []
            for part in torch.tensor_split(ids, cuts, dim=1):
                output = student(part, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.logits)
            result = torch.cat(parts, dim=1)
            torch.testing.assert_close(result, whole, rtol=0, atol=2e-5, msg=f"{head_dim} {cuts}")


@torch.no_grad()
def test_logits_on_demand() -> None:
    """``logits_to_keep`` keeps the last ones; without logits the hidden state still gives them."""
    student, ids = grouped_student(), drawn_ids(2, 5)
    whole, last = student(ids), student(ids, logits_to_keep=2)
    bare = student(ids, with_logits=False)
    torch.testing.assert_close(last.logits, whole.logits[:, -2:])
    assert bare.logits is None
    torch.testing.assert_close(student.lm_head(bare.last_hidden_state), whole.logits)
    assert whole.rotations.shape == (2, 2, 2, 8, 8)
    assert torch.equal(whole.rotations, student.rotations())


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [None, 10])
def test_saved_and_loaded_is_bit_identical(tmp_path: Path, head_dim: int | None) -> None:
    """``save_pretrained`` → ``AutoModelForCausalLM`` gives every tensor, setting and logit back.

    So do settings of before heads had a width of their own: they divide the width evenly.
    """
    student, ids = grouped_student(head_dim=head_dim), drawn_ids(2, 7)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is SO8TForCausalLM and loaded.config.rope_theta == 50.0
    ours, theirs = student.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    expected = student(ids).logits
    assert torch.equal(loaded(ids).logits, expected)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("head_dim") == (head_dim or 4)
    if head_dim is None:
        path.write_text(json.dumps(settings))
        older = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert older.config.head_dim == 4
        assert torch.equal(older(ids).logits, expected)


@torch.no_grad()
def greedy(student: SO8TForCausalLM, prompt: list[int], count: int) -> list[int]:
    """Append the most probable token, one whole forward pass per token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(student(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_generate_equals_the_greedy_loop_with_left_padding() -> None:
    """Prompts of different length, padded on the left, continue as each does alone."""
    student = grouped_student(seed=2, tied=False)
    prompts = [drawn_ids(length, seed=length).tolist() for length in (7, 3, 1)]
    padded = torch.tensor([[9] * (7 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (7 - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    greedily = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 9}
    together = student.generate(padded, attention_mask=mask, **greedily)
    for row, prompt in enumerate(prompts):
        expected = greedy(student, prompt, 8)
        assert len(set(expected)) > 1
        alone = student.generate(torch.tensor([prompt]), **greedily)
        assert alone[0, len(prompt) :].tolist() == expected
        assert together[row, 7:].tolist() == expected


def test_parameter_names_and_shapes_are_frozen() -> None:
    """Checkpoints and the fold depend on them. Tied matrices are one tensor."""
    tied, untied = grouped_student(), grouped_student(tied=False)
    names = {f"model.layers.{layer}.{name}" for layer in range(2) for name in LAYER_NAMES}
    names |= {"model.embed_tokens.weight", "model.norm.weight"}
    assert {name for name, _ in tied.named_parameters()} == names
    assert {name for name, _ in untied.named_parameters()} == names | {"lm_head.weight"}
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    one, two = (sum(p.numel() for p in student.parameters()) for student in (tied, untied))
    assert two == one + 40 * 16
    for head_dim in (4, 2, 10):
        attention = grouped_student(head_dim=head_dim).model.layers[0].self_attn
        shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
        assert shapes == {
            "q_proj.weight": (4 * head_dim, 16),
            "k_proj.weight": (2 * head_dim, 16),
            "v_proj.weight": (2 * head_dim, 16),
            "o_proj.weight": (16, 4 * head_dim),
            "gate.safety": (4 * head_dim // 8, 28),
            "gate.command": (4 * head_dim // 8, 28),
        }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 20}, "divisible by 8"),
        ({"hidden_size": 24, "num_attention_heads": 8}, "even width"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 3}, "not even"),
        ({"head_dim": 0}, "not even"),
        ({"head_dim": 6, "num_attention_heads": 2, "num_key_value_heads": 2}, "12 wide together"),
        (
            {"head_dim": 8, "num_attention_heads": 3, "num_key_value_heads": 3},
            "not a multiple of num",
        ),
    ],
)
def test_impossible_shapes_raise(settings: dict[str, int], message: str) -> None:
    """Widths without whole blocks, heads or groups are refused with the reason."""
    with pytest.raises(ValueError, match=message):
        SO8TConfig(**{"hidden_size": 32, "num_attention_heads": 4, **settings})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_are_whole_graphs(checkpointing: bool) -> None:
    """Nothing in a layer sends torch.compile back to Python, whatever the lengths."""
    counters.clear()
    torch._dynamo.reset()
    student = make_student(layers=1).train()
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    student.model.layers[0].compile(backend="aot_eager")
    for length in (5, 9, 12, 17):
        student(torch.randint(0, 96, (2, length))).logits.sum().backward()
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
