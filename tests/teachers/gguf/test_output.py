"""From hidden states back to llama.cpp's own logits: rounding, logit scales, soft caps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize

from teachers.base import LogitRule
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.store.capture import fit_shared_codec, logit_rule, require_causal
from teachers.store.shared import SharedCodec
from teachers.targets.recipe import Recipe
from teachers.targets.stored_arrays import typed
from tests.support.real import real_teacher
from tests.support.teachers import sequences_of
from tests.support.tiny_models import Tiny, stored, write_tiny

TINY = Tiny(head_width=12)
BLOCKS = range(TINY.layers)
GAIN = np.ones(TINY.width, np.float32)
TIED: dict[str, Any] = {"output.weight": None}
SANDWICH = {
    f"blk.{i}.post_{part}_norm.weight": GAIN for i in BLOCKS for part in ("attention", "ffw")
}
LAYER_NORM = {"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": 1e-5}
PARALLEL: dict[str, Any] = {f"blk.{i}.ffn_norm.weight": None for i in BLOCKS}
NONE: dict[str, Any] = dict.fromkeys(name for name in stored(TINY) if name.startswith("blk."))
DRAW = np.random.default_rng(3)
RECURRENT = {"conv_kernel": 4, "inner_size": 96, "state_size": 16, "time_step_rank": 3}
MAMBA = {
    f"blk.{i}.{name}": (0.3 * DRAW.standard_normal(shape)).astype(np.float32)
    for i in BLOCKS
    for name, shape in {
        **{"attn_norm.weight": 48, "ssm_in.weight": (192, 48), "ssm_out.weight": (48, 96)},
        **{"ssm_conv1d.weight": (96, 4), "ssm_conv1d.bias": 96, "ssm_x.weight": (35, 96)},
        **{"ssm_dt.weight": (96, 3), "ssm_dt.bias": 96, "ssm_d": 96},
    }.items()
} | {f"blk.{i}.ssm_a": -np.ones((96, 16), np.float32) for i in BLOCKS}
# Architecture, other tensors, other metadata, and what llama.cpp's source does with the product.
MADE: dict[str, tuple[str, dict[str, Any], dict[str, Any], LogitRule]] = {
    "plain": ("llama", {}, {}, LogitRule()),
    "multiplied": (
        *("command-r", TIED | PARALLEL, LAYER_NORM | {"logit_scale": 0.25}),
        LogitRule(0.25),
    ),
    "divided": ("granite", {}, {"logit_scale": 3.0}, LogitRule(1 / 3.0)),
    "by width": ("minicpm", {}, {}, LogitRule(48 / 256)),
    "recurrent": (
        *("mamba", NONE | MAMBA, {f"ssm.{key}": size for key, size in RECURRENT.items()}),
        LogitRule(),
    ),
    "capped": (
        *("gemma2", TIED | SANDWICH, {"final_logit_softcapping": 4.0}),
        LogitRule(1.0, 4.0),
    ),
}


def mean_kl(logits: np.ndarray, log_probs: torch.Tensor) -> float:
    """Mean KL in nats of rebuilt distributions from those of ``logits [N, V]``."""
    true = torch.from_numpy(logits).double().log_softmax(dim=-1)
    return float((true.exp() * (true - log_probs.double())).sum(dim=-1).mean())


@pytest.mark.usefixtures("llama_here")
def test_scales_and_caps_are_followed(tmp_path: Path) -> None:
    """Metadata gives the numbers, a measurement their meaning; targets read from a store's arrays
    are llama.cpp's distributions, from the whole hidden state and from a code of it."""
    for name, (architecture, tensors, values, rule) in MADE.items():
        path = write_tiny(tmp_path / f"{name}.gguf", TINY, tensors, values, architecture)
        with GGUFTeacher(path, threads=1) as teacher:
            texts = sequences_of(teacher, [40] * 8)
            require_causal(teacher, texts[0])
            found = logit_rule(teacher, texts[0])
            assert (found.scale, found.cap) == pytest.approx(tuple(rule), rel=1e-6), name
            logits = teacher.logits(texts)
            if rule.cap:
                assert np.abs(logits).max() > 0.9 * rule.cap, "the cap is felt"
            for recipe, most in (
                (Recipe("hidden"), 1e-3),
                (Recipe(num_topk=8, sketch_bytes=40), 0.01),
            ):
                codec = fit_shared_codec(teacher, texts, recipe)
                codec = SharedCodec.from_arrays(codec.arrays(), recipe)
                arrays: Any = teacher.score(texts, recipe, codec.bases)
                basis = codec.bases.get("final")
                targets = typed(arrays, recipe, teacher.info.vocab_size, basis, codec.head)
                kl = mean_kl(logits, targets.log_probs(1.0))
                assert kl < most, (name, recipe.kind, kl)


@pytest.mark.usefixtures("llama_here")
def test_states_are_rounded_as_llama_cpp_does(tmp_path: Path) -> None:
    """For every type of output matrix the product comes much nearer than with exact states."""
    tiny = Tiny(width=64)
    matrix = stored(tiny)["output.weight"]
    for kind in (Type.F16, Type.BF16, Type.Q8_0, Type.Q4_1, Type.Q5_0):
        path = tmp_path / f"{kind.name}.gguf"
        write_tiny(
            path, tiny, {"output.weight": quantize(matrix, kind)}, types={"output.weight": kind}
        )
        with GGUFTeacher(path, threads=1) as teacher:
            texts = sequences_of(teacher, [60])
            states, logits = teacher.states(texts)["final"], teacher.logits(texts)
            rows = teacher.output_rows(0, teacher.info.vocab_size)
            exact, ours = (
                float((x @ rows.T - logits).std()) for x in (states, teacher.rounded_states(states))
            )
            assert ours < 0.2 * exact and ours < 1e-3 * logits.std(), (kind.name, ours, exact)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_teachers_have_a_sketch(name: str) -> None:
    """Measured on text, the product explains their logits to a fraction of a percent."""
    with GGUFTeacher(real_teacher(name), threads=1) as teacher:
        text = "The capital of France is Paris, which lies on the river Seine. " * 5
        tokens = teacher.tokenize([text], add_special=True, parse_special=False)[0]
        assert logit_rule(teacher, tokens) == LogitRule()
        states = teacher.rounded_states(teacher.states([tokens])["final"])
        logits = teacher.logits([tokens])[:, :4096]
        error = states @ teacher.output_rows(0, 4096).T - logits
        assert error.std() < 0.005 * logits.std()
