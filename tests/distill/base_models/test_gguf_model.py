"""A base read from a GGUF file: against llama.cpp's own answers, or a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.base_models.gguf_model import configuration, load_weights
from distill.base_models.source import BaseSource, base_source
from distill.errors import UserError
from students.gguf.config_values import require_exportable
from teachers import example_teacher
from teachers.gguf.llama_weights import LlamaWeights
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.support.real import real_teacher
from tests.support.tiny_models import TEACHERS, TOLERANCE, VOCABULARY, write_tiny

CPU = torch.device("cpu")
REFUSED = {
    "llama, tied, biases, rotary factors": "stretches its rotary embeddings",
    "phi3, tied, short factors, scaled": "stretches its rotary embeddings",
    "gemma": "is a gemma, of which no student can be made; .*, qwen2, qwen3 can",
    "gemma2, windows, caps": "is a gemma2",
}


def read(path: Path) -> LlamaWeights:
    source: BaseSource = base_source(path, load_in_4bit=False)
    assert isinstance(source, LlamaWeights)
    return source


@pytest.mark.needs_gguf
def test_it_computes_what_llama_cpp_computes(tmp_path: Path) -> None:
    """Every architecture that is exported, and an exact way back from what was refused."""
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 33).astype(np.int32)
    read_in = 0
    for name, tiny in TEACHERS.items():
        path = write_tiny(tmp_path / "tiny.gguf", tiny)
        if name in REFUSED:
            with pytest.raises(UserError, match=REFUSED[name]):
                read(path)
            continue
        with GGUFTeacher(path, threads=1) as teacher:
            expected = teacher.logits([tokens], exact=True)
        model = load_weights(read(path), CPU, torch.float32)
        require_exportable(model.config)
        with torch.no_grad():
            found = model(torch.from_numpy(tokens[:-1]).long()[None]).logits[0].numpy()
        far = float(np.abs(found - expected).max())
        assert far <= TOLERANCE.get(tiny.architecture, 1e-3) < 0.3 < expected.std(), (name, far)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == tiny.tied and not any(one.requires_grad for one in model.parameters()), name
        read_in += 1
    assert read_in == len(TEACHERS) - len(REFUSED)


def test_some_biases_are_zeros(tmp_path: Path) -> None:
    """transformers' llama has a bias at the output projection too, or none at all."""
    biased = TEACHERS["llama, tied, biases, rotary factors"]
    no_factors = {"rope_freqs.weight": None, "blk.1.attn_k.bias": None}
    path = write_tiny(tmp_path / "tiny.gguf", biased, no_factors)
    model = load_weights(read(path), CPU, torch.float32)
    attention = model.model.layers[1].self_attn
    assert not attention.o_proj.bias.any() and not attention.k_proj.bias.any()
    assert bool(attention.q_proj.bias.all())


def test_a_real_gemma_is_read_whole() -> None:
    """Its six-layer rhythm of windows, its two rotary bases, its wide heads."""
    config = configuration(read(real_teacher("gemma3")))
    kinds = [kind == "full_attention" for kind in config.layer_types]
    assert [place for place, full in enumerate(kinds) if full] == [5, 11, 17]
    rotary = {kind: one["rope_theta"] for kind, one in config.rope_parameters.items()}
    assert rotary == {"full_attention": 1e6, "sliding_attention": 1e4}
    assert (config.head_dim, config.sliding_window, config.query_pre_attn_scalar) == (256, 512, 256)
    require_exportable(config)


def test_what_a_file_cannot_be(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(40))
    short = write_tiny(tmp_path / "short.gguf", TEACHERS["qwen3"], values={"context_length": 0})
    odd = write_tiny(tmp_path / "odd.gguf", TEACHERS["qwen3"], values={"context_length": "many"})
    for path, four_bits, words in (
        (short, False, "does not state its context_length"),
        (odd, False, "context_length is 'many'"),
        (damaged, False, "damaged.gguf"),
        (tmp_path / "nowhere.gguf", False, "does not exist; give .* GGUF file"),
        (example_teacher(), True, "--load-in-4bit cannot read the GGUF file"),
    ):
        with pytest.raises(UserError, match=words):
            base_source(path, four_bits)
