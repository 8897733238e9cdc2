"""The decoder against a float64 reference in loops; causality, saving, generation, gradients, names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from students.builder import build_student
from students.config import SO8TConfig
from students.model import SO8TForCausalLM
from tests.conftest import make_student
from tests.test_so8 import reference_skew, spectral_exponential

Array = NDArray[np.float64]
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


def grouped_student(
    seed: int = 0, layers: int = 2, tied: bool = True, head_dim: int | None = None
) -> SO8TForCausalLM:
    """A student with fewer key/value than query heads and every parameter lively, norms too."""
    config = SO8TConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        rope_theta=50.0,
        initializer_range=0.3,
        rotation_init_std=1.0,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    student = build_student(config, seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return student


def weights_of(student: SO8TForCausalLM) -> dict[str, Array]:
    """Every tensor of a student in float64."""
    return {name: tensor.detach().double().numpy() for name, tensor in student.state_dict().items()}


def drawn_ids(*shape: int, seed: int = 0, vocab_size: int = 40) -> Tensor:
    """Seeded token ids."""
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def norm(x: Array, weight: Array, eps: float) -> Array:
    """x / √(mean x² + ε) · weight for one token."""
    return x / np.sqrt((x**2).sum() / len(x) + eps) * weight


def turned(x: Array, position: int, theta: float) -> Array:
    """Rotary embedding of one head's vector: pair (i, i + W/2) turns by position · θ^(−2i/W)."""
    half = len(x) // 2
    out = np.zeros_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
        out[i + half] = x[i] * np.sin(angle) + x[i + half] * np.cos(angle)
    return out


def gated(x: Array, safety: Array, command: Array) -> Array:
    """y = R_cmd · (R_safe · x), block by block, for one token's attention output."""
    out = np.zeros_like(x)
    for block in range(len(x) // 8):
        r_safe = spectral_exponential(reference_skew(safety[block]))
        r_cmd = spectral_exponential(reference_skew(command[block]))
        out[8 * block : 8 * block + 8] = r_cmd @ (r_safe @ x[8 * block : 8 * block + 8])
    return out


def attended(x: Array, w: dict[str, Array], at: str, config: SO8TConfig) -> Array:
    """Mixed values of all heads ``[T, H·W]``, before gate and output projection."""
    width, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    out = np.zeros((len(x), width * config.num_attention_heads))
    for head in range(config.num_attention_heads):
        mine = slice(width * head, width * head + width)
        shared = slice(width * (head // group), width * (head // group) + width)
        query = [turned((w[at + "q_proj.weight"] @ h)[mine], t, config.rope_theta) for t, h in enumerate(x)]
        key = [turned((w[at + "k_proj.weight"] @ h)[shared], t, config.rope_theta) for t, h in enumerate(x)]
        value = [(w[at + "v_proj.weight"] @ h)[shared] for h in x]
        for t in range(len(x)):
            scores = np.exp([query[t] @ key[s] / width**0.5 for s in range(t + 1)])
            out[t, mine] = sum(scores[s] / scores.sum() * value[s] for s in range(t + 1))
    return out


def reference_logits(w: dict[str, Array], config: SO8TConfig, ids: list[int]) -> Array:
    """The whole decoder for one sequence: ``[T, V]``."""
    eps = config.rms_norm_eps
    x = np.stack([w["model.embed_tokens.weight"][token] for token in ids])
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        normed = np.stack([norm(h, w[at + "input_layernorm.weight"], eps) for h in x])
        mixed = attended(normed, w, at + "self_attn.", config)
        gate = (w[at + "self_attn.gate.safety"], w[at + "self_attn.gate.command"])
        x = x + np.stack([w[at + "self_attn.o_proj.weight"] @ gated(h, *gate) for h in mixed])
        for t in range(len(ids)):
            h = norm(x[t], w[at + "post_attention_layernorm.weight"], eps)
            opened = w[at + "mlp.gate_proj.weight"] @ h
            opened = opened / (1 + np.exp(-opened)) * (w[at + "mlp.up_proj.weight"] @ h)
            x[t] = x[t] + w[at + "mlp.down_proj.weight"] @ opened
    return np.stack([w["lm_head.weight"] @ norm(h, w["model.norm.weight"], eps) for h in x])


@pytest.mark.parametrize(
    ("tied", "head_dim"), [(True, None), (False, None), (True, 6), (False, 2), (True, 10)]
)
def test_logits_equal_the_reference(tied: bool, head_dim: int | None) -> None:
    """Every logit of a batch, with the gate applied to each token as R_cmd · (R_safe · x); heads of any width."""
    student = grouped_student(tied=tied, head_dim=head_dim)
    assert student.config.head_dim == (head_dim or 4)
    ids = drawn_ids(2, 9)
    with torch.no_grad():
        logits = student(ids).logits.numpy()
    for row in range(2):
        expected = reference_logits(weights_of(student), student.config, ids[row].tolist())
        assert np.abs(expected).max() > 1.0
        np.testing.assert_allclose(logits[row], expected, atol=5e-5)


@pytest.mark.parametrize("change", ["swap", "no safety", "no command", "inverse"])
def test_reference_tells_other_gates_apart(change: str) -> None:
    """The comparison above is sharp: any other composition of the two rotations moves the logits."""
    student = grouped_student()
    weights = weights_of(student)
    expected = reference_logits(weights, student.config, [3, 1, 4, 1, 5])
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn.gate."
        safety, command = weights[at + "safety"], weights[at + "command"]
        weights[at + "safety"], weights[at + "command"] = {
            "swap": (command, safety),
            "no safety": (0 * safety, command),
            "no command": (safety, 0 * command),
            "inverse": (-safety, -command),
        }[change]
    assert np.abs(reference_logits(weights, student.config, [3, 1, 4, 1, 5]) - expected).max() > 1e-2


def test_gate_gradients_by_finite_differences() -> None:
    """Both rotations receive the gradient of the float64 reference, in every layer."""
    student, ids = grouped_student(), drawn_ids(5, seed=2)
    direction = np.random.default_rng(3).normal(size=(5, 40))
    (student(ids[None]).logits[0] * torch.from_numpy(direction).float()).sum().backward()
    weights, step = weights_of(student), 1e-5
    parameters = dict(student.named_parameters())
    for name in [name for name in parameters if "gate." in name and "mlp" not in name]:
        gradient = parameters[name].grad
        assert gradient is not None and float(gradient.abs().min()) > 0
        for place in ((0, 0), (1, 27), (0, 13)):
            moved = []
            for sign in (1, -1):
                changed = dict(weights, **{name: weights[name].copy()})
                changed[name][place] += sign * step
                moved.append((reference_logits(changed, student.config, ids.tolist()) * direction).sum())
            expected = (moved[0] - moved[1]) / (2 * step)
            assert float(gradient[place]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_later_token_never_changes_earlier_logits() -> None:
    """Causality, for every position; the position itself does change."""
    student, ids = grouped_student(), drawn_ids(1, 8, seed=4)
    with torch.no_grad():
        before = student(ids).logits[0]
        for place in range(8):
            changed = ids.clone()
            changed[0, place] = (ids[0, place] + 7) % 40
            after = student(changed).logits[0]
            torch.testing.assert_close(after[:place], before[:place], rtol=0, atol=1e-6)
            assert float((after[place] - before[place]).abs().max()) > 1e-2


@pytest.mark.parametrize("masked", [False, True])
def test_right_padding_does_not_matter(masked: bool) -> None:
    """Real tokens' logits are the same without padding, with any padding, and with a mask over it."""
    student, ids = grouped_student(), drawn_ids(1, 6, seed=5)
    padded = torch.cat((ids, drawn_ids(1, 4, seed=6)), dim=1)
    mask = (torch.arange(10)[None] < 6).long() if masked else None
    with torch.no_grad():
        torch.testing.assert_close(
            student(padded, attention_mask=mask).logits[:, :6], student(ids).logits, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("head_dim", [None, 6])
@pytest.mark.parametrize("cuts", [(1,), (5,), (3, 6), (1, 2, 3, 4)])
def test_cached_chunks_equal_one_pass(cuts: tuple[int, ...], head_dim: int | None) -> None:
    """A sequence fed in chunks through the cache gives the logits of one pass."""
    student, ids, cache, parts = grouped_student(head_dim=head_dim), drawn_ids(2, 9, seed=7), None, []
    with torch.no_grad():
        for part in torch.tensor_split(ids, cuts, dim=1):
            output = student(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), student(ids).logits, rtol=0, atol=2e-5)


def test_logits_on_demand() -> None:
    """``logits_to_keep`` keeps the last ones; without logits the hidden state still gives them."""
    student, ids = grouped_student(), drawn_ids(2, 5)
    with torch.no_grad():
        whole, last = student(ids), student(ids, logits_to_keep=2)
        bare = student(ids, with_logits=False)
        torch.testing.assert_close(last.logits, whole.logits[:, -2:])
        assert bare.logits is None
        torch.testing.assert_close(student.lm_head(bare.last_hidden_state), whole.logits)
        assert whole.rotations.shape == (2, 2, 2, 8, 8)
        assert torch.equal(whole.rotations, student.rotations())


@pytest.mark.parametrize("head_dim", [None, 10])
def test_saved_and_loaded_is_bit_identical(tmp_path: Path, head_dim: int | None) -> None:
    """``save_pretrained`` → ``AutoModelForCausalLM`` gives every tensor, setting and logit back."""
    student, ids = grouped_student(head_dim=head_dim), drawn_ids(2, 7)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is SO8TForCausalLM and loaded.config.rope_theta == 50.0
    ours, theirs = student.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, student(ids).logits)


def test_settings_of_older_students_still_load(tmp_path: Path) -> None:
    """A configuration written before heads had a width of their own has none: they divide the width evenly."""
    student, ids = grouped_student(), drawn_ids(2, 7)
    student.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("head_dim") == 4
    path.write_text(json.dumps(settings))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.head_dim == 4
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, student(ids).logits)


@pytest.mark.parametrize("head_dim", [2, 10])
def test_shapes_of_heads_of_their_own_width(head_dim: int) -> None:
    """Queries and output projection are as wide as all heads together; so is the gate."""
    student = grouped_student(head_dim=head_dim)
    shapes = {name: tuple(p.shape) for name, p in student.model.layers[0].self_attn.named_parameters()}
    assert shapes == {
        "q_proj.weight": (4 * head_dim, 16),
        "k_proj.weight": (2 * head_dim, 16),
        "v_proj.weight": (2 * head_dim, 16),
        "o_proj.weight": (16, 4 * head_dim),
        "gate.safety": (4 * head_dim // 8, 28),
        "gate.command": (4 * head_dim // 8, 28),
    }


def greedy(student: SO8TForCausalLM, prompt: list[int], count: int) -> list[int]:
    """Append the most probable token, one whole forward pass per token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(student(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_generate_equals_the_greedy_loop_with_left_padding() -> None:
    """Prompts of different length, padded on the left, continue as each does alone."""
    student = grouped_student(seed=2, tied=False)
    prompts = [drawn_ids(length, seed=length).tolist() for length in (7, 3, 1)]
    padded = torch.tensor([[9] * (7 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (7 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    together = student.generate(
        padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=9
    )
    for row, prompt in enumerate(prompts):
        expected = greedy(student, prompt, 8)
        assert len(set(expected)) > 1
        alone = student.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=9)
        assert alone[0, len(prompt) :].tolist() == expected
        assert together[row, 7:].tolist() == expected


def test_tied_weights_are_one_tensor() -> None:
    """Tied: one tensor, counted once; untied: two."""
    tied, untied = grouped_student(), grouped_student(tied=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert sum(p.numel() for p in untied.parameters()) == sum(p.numel() for p in tied.parameters()) + 40 * 16


def test_parameter_names_are_frozen() -> None:
    """Checkpoints and the fold depend on these names and shapes."""
    tied, untied = grouped_student(), grouped_student(tied=False)
    names = {f"model.layers.{layer}.{name}" for layer in range(2) for name in LAYER_NAMES}
    names |= {"model.embed_tokens.weight", "model.norm.weight"}
    assert {name for name, _ in tied.named_parameters()} == names
    assert {name for name, _ in untied.named_parameters()} == names | {"lm_head.weight"}
    shapes = {name: tuple(p.shape) for name, p in tied.named_parameters()}
    assert shapes["model.layers.0.self_attn.gate.safety"] == (2, 28)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (8, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 20}, "divisible by 8"),
        ({"hidden_size": 24, "num_attention_heads": 8}, "even width"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 3}, "not even"),
        ({"head_dim": 0}, "not even"),
        ({"head_dim": 6, "num_attention_heads": 2, "num_key_value_heads": 2}, "12 wide together"),
        ({"head_dim": 8, "num_attention_heads": 3, "num_key_value_heads": 3}, "not a multiple of num_att"),
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
    student = make_student().train()
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in student.model.layers:
        layer.compile(backend="aot_eager")
    for length in (5, 9, 12, 17):
        student(torch.randint(0, 96, (2, length))).logits.sum().backward()
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
