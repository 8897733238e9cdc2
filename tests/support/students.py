"""Small students with lively weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from students.adapter.adapter import AdaptedStudent, adapt
from students.adapter.base_model import AdapterSettings
from students.model import so8
from students.model.build import build_student, student_config
from students.model.config import SO8TConfig
from students.model.decoder import SO8TForCausalLM
from students.model.heads import certainty
from students.model.shape import StudentSize
from teachers.huggingface.checkpoint import load_model
from teachers.huggingface.folder import ModelFolder
from tests.support.references import reference_skew, spectral_exponential
from tests.support.tiny_models import SHAPE


def make_student(
    width: int = 32,
    layers: int = 2,
    vocab_size: int = 96,
    seed: int = 0,
    *,
    tied: bool = True,
    heads: bool = False,
) -> SO8TForCausalLM:
    """A small student with lively weights, so that differences between computations show."""
    config = student_config(
        StudentSize(width, layers),
        vocab_size=vocab_size,
        context_length=256,
        tie_embeddings=tied,
        bos=0,
        eos=1,
    )
    config.safety_head = config.verification_head = heads
    student = build_student(config, seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "gate." in name or ("_head." in name and parameter.ndim == 1):
                parameter.normal_(generator=generator)
            elif parameter.ndim == 2:
                parameter.mul_(4.0)
    return student


ROWS, VOCAB = 104, 96  # the bases have more rows than the teacher has tokens
SPLIT = "q k v o gate up down"
MATRICES = {
    "llama": SPLIT,
    "phi3": "qkv o gate_up down",
    "qwen2": SPLIT,
    "qwen3": SPLIT,
    "gemma3_text": SPLIT,
}
KINDS = tuple(MATRICES)
needs_nf4 = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
every_base = pytest.mark.parametrize("kind", KINDS)
every_quant = pytest.mark.parametrize("quant", ["plain", pytest.param("nf4", marks=needs_nf4)])


def make_base(kind: str = "llama", **changes: Any) -> Any:
    """A small model with lively weights, untied unless asked for."""
    shape = SHAPE | {"vocab_size": ROWS}
    if kind in ("qwen3", "gemma3_text"):
        shape["head_dim"] = 32  # an attention output wider than the residual stream
    config = transformers.AutoConfig.for_model(kind, **(shape | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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


def disturbed(base: Any = None) -> AdaptedStudent:
    student = make_adapted(base)
    disturb(student)
    return student


def apart(one: Tensor, other: Tensor) -> float:
    """How far at most."""
    return float((one - other).abs().max())


def loss_of(student: AdaptedStudent) -> Tensor:
    """A loss that everything has a part in, with every second layer's state."""
    tokens = drawn().to(student.device)
    output = student(tokens, layers_to_keep=[0])
    assert output.logits is not None and output.last_hidden_state is not None
    assert output.rotations is not None and output.layer_states is not None
    states = output.last_hidden_state
    told = student.safety_head(states[:, -1])
    agreed = student.verification_head(states, certainty(output.logits))
    return (
        F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        + F.cross_entropy(told, torch.tensor([0, 2], device=told.device))
        + F.softplus(agreed).mean()
        + output.layer_states[0].square().mean()
        + so8.commutator_norm(output.rotations[:, 1], output.rotations[:, 0]).mean()
    )


def base_bytes(student: AdaptedStudent) -> dict[str, bytes]:
    kept = student.parameters_by_kind()["base"]
    return {name: one.detach().view(torch.uint8).numpy().tobytes() for name, one in kept.items()}


Array = NDArray[np.float64]


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
    for name, parameter in student.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return student


def weights_of(student: SO8TForCausalLM) -> dict[str, Array]:
    """Every tensor of a student in float64."""
    return {name: tensor.detach().double().numpy() for name, tensor in student.state_dict().items()}


def drawn_ids(*shape: int, seed: int = 0, vocab_size: int = 40) -> Tensor:
    """Seeded token ids."""
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def gated(x: Array, safety: Array, command: Array) -> Array:
    """y = R_cmd · (R_safe · x), block by block, for attention outputs ``[..., D]``."""
    out = np.zeros_like(x)
    for block in range(x.shape[-1] // 8):
        r_safe = spectral_exponential(reference_skew(safety[block]))
        r_cmd = spectral_exponential(reference_skew(command[block]))
        span = slice(8 * block, 8 * block + 8)
        out[..., span] = (x[..., span] @ r_safe.T) @ r_cmd.T
    return out
