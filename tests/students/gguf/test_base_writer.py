"""Exported bases against llama.cpp: PyTorch's logits, or a refusal before anything is written.

Measured on a CPU over 300 tokens: at most 1.4e-4 apart in float32, 0.016 in float16 and 0.47 in
Q8_0 (60 tokens), with logits that spread by 1.6, or by 8 where tied; without permutation or rope
scaling they are 8 to 11 apart.
"""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import MistralConfig, PreTrainedModel

from distill.capture.temporary_files.tokenizer_only import tokenizer_entries
from distill.errors import ProofFailed
from distill.export.proof import expected_of, prove
from distill.runs.folder import HeldOut, TokenizedLines
from students.gguf import writer
from students.gguf.architectures import ARCHITECTURES, UnmappedTensor
from students.gguf.config_values import context_length, require_exportable
from students.gguf.metadata import ExportError
from students.gguf.rope_scaling import RopeScaling
from students.gguf.table_gelu import computed_as_llama_cpp, uses_table
from students.mapped_tensors import MappedTensors
from students.model.heads import Heads, VerificationHead, head_values, read_heads
from students.model.safety_head import SafetyHead
from teachers.gguf.file import read_gguf
from teachers.gguf.llama_weights import half_split
from tests.support.tiny_models import (
    CASES,
    LLAMA3,
    LONGROPE,
    ORIGINAL,
    TOKENIZER,
    VOCAB,
    build,
    configure,
    export,
    gemma3,
    made,
    scaled,
    yarn,
)

MAX_DIFFERENCE = 1e-3

# A process of its own, as llama.cpp may abort it; without PyTorch, which takes a second to load.
_CHILD = """
import sys
import numpy as np
from teachers.llama_cpp.context import ContextShape, LlamaContext, LlamaModel
from teachers.llama_cpp.library.kernels import LoadOptions
for job in sys.argv[1:]:
    path, _, room = job.split("|")
    print(job, file=sys.stderr, flush=True)
    tokens = np.load(f"{job}.tokens.npy")
    model = LlamaModel(path, LoadOptions(extra_buffers=False), threads=1)
    context = LlamaContext(model, 1)
    context.prepare(ContextShape(1, int(room), "f32"))
    rows = []
    for start in range(0, len(tokens), model.batch_tokens):
        part = tokens[start : start + model.batch_tokens]
        positions = np.arange(start, start + len(part), dtype=np.int32)
        wanted = np.ones(len(part), dtype=bool)
        rows.append(context.decode(part, positions, np.zeros_like(part), wanted).logits.copy())
    np.save(f"{job}.logits.npy", np.concatenate(rows))
    context.release()
    model.close()
"""


@dataclass(frozen=True)
class Job:
    """A file to compare with its model over ``count`` tokens, in a context of ``room``."""

    model: PreTrainedModel
    path: Path
    count: int = 300
    room: int = 0

    @property
    def name(self) -> str:
        """Also the prefix of its files' names."""
        return f"{self.path}|{self.count}|{self.room or self.count}"

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Random ones."""
        draw = np.random.default_rng(self.count)
        return draw.integers(3, VOCAB, size=self.count).astype(np.int32)

    def logits(self) -> NDArray[np.float32]:
        """PyTorch's."""
        logits: NDArray[np.float32] = (
            self.model(torch.from_numpy(self.tokens)[None]).logits[0].numpy()
        )
        return logits


@torch.no_grad()
def differences(*jobs: Job) -> list[float]:
    """How far each is from llama.cpp at most, in float32 without flash attention."""
    expected = [job.logits() for job in jobs]
    for job in jobs:
        np.save(f"{job.name}.tokens.npy", job.tokens)
    command = [sys.executable, "-c", _CHILD, *(job.name for job in jobs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    result = [np.load(f"{job.name}.logits.npy") for job in jobs]
    return [float(np.abs(a - b).max()) for a, b in zip(expected, result, strict=True)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Every case as a file."""
    folder, models = tmp_path_factory.mktemp("bases"), {case: made(case) for case in CASES}
    return {case: Job(one, export(one, folder / f"{case}.gguf")) for case, one in models.items()}


def test_llama_cpp_computes_what_pytorch_computes(exported: dict[str, Job]) -> None:
    """Every architecture, tied and untied, with its biases, norms and rope scalings."""
    jobs = {case: job for case, job in exported.items() if not uses_table(job.model.config)}
    result = dict(zip(jobs, differences(*jobs.values()), strict=True))
    assert len(result) == len(CASES) - 2 and max(result.values()) <= MAX_DIFFERENCE, result


@torch.no_grad()
def test_a_gelu_is_looked_up(exported: dict[str, Job]) -> None:
    """Gemma's in a table of 16-bit floats, which moves logits; PyTorch with the table is nearer to
    llama.cpp than PyTorch without, and windows, bases and scales, left out, are far beyond both."""
    for case in ("gemma3 tied", "gemma3 no window"):
        job, exact = exported[case], differences(exported[case])[0]
        without = job.logits()
        with computed_as_llama_cpp(job.model):
            moved = float(np.abs(job.logits() - without).max())
            found = differences(job)[0]
        assert found < 0.5 * exact and found < moved < 0.1, (case, found, exact, moved)
        assert np.array_equal(job.logits(), without), case


def test_a_gemma_is_proved_by_what_the_table_explains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_here: None
) -> None:
    """Its file passes; one whose norms are off by a thousandth does not."""
    model, kind = made("gemma3 tied"), ARCHITECTURES["gemma3_text"]
    path = export(model, tmp_path / "right.gguf")
    draw = np.random.default_rng(0)
    sequences = [draw.integers(3, VOCAB, size=200).astype(np.int32) for _ in range(3)]
    held_out = HeldOut(sequences, TokenizedLines([], []))
    with MappedTensors(tmp_path) as kept:
        expected = expected_of(model, sequences, kept)
        assert 1e-3 < expected.allowed[0] < 0.1
        prove(path, expected, held_out, kept, timed=False)
        monkeypatch.setitem(ARCHITECTURES, "gemma3_text", replace(kind, norm_offset=0.999))
        wrong = export(model, tmp_path / "wrong.gguf")
        with pytest.raises(ProofFailed, match="differ from PyTorch"):
            prove(wrong, expected, held_out, kept, timed=False)


def test_a_file_that_leaves_something_out_is_another_model(
    tmp_path: Path, exported: dict[str, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rope scaling, and pairs of rows or biases alone: the texts are long enough for it to show."""
    jobs = []
    with monkeypatch.context() as patch:
        patch.setattr(writer, "rope_scaling", lambda config, dimensions: RopeScaling())
        for case in ("llama linear", "llama llama3", "llama yarn", "phi3 longrope", "gemma3 tied"):
            model = exported[case].model
            jobs.append(Job(model, export(model, tmp_path / f"{case}.gguf")))
    permute, model = writer.permute_for_rope, exported["llama biases"].model
    for vectors in (False, True):

        def partly(weight: NDArray[np.float32], heads: int, alone: bool = vectors) -> Any:
            return permute(weight, heads) if (weight.shape[1] == 1) == alone else weight

        monkeypatch.setattr(writer, "permute_for_rope", partly)
        jobs.append(Job(model, export(model, tmp_path / f"biases alone {vectors}.gguf")))
    result = {job.path.stem: far for job, far in zip(jobs, differences(*jobs), strict=True)}
    assert len(result) == 7 and min(result.values()) > 0.5, result


def test_where_llama_cpp_and_transformers_part(tmp_path: Path, exported: dict[str, Job]) -> None:
    """longrope: transformers goes by the text, llama.cpp by the room. phi3's window becomes the
    context, as llama.cpp does not apply it."""
    longrope = exported["phi3 longrope"]
    model = build(configure("phi3", sliding_window=128))
    path = export(model, tmp_path / "window.gguf")
    file = read_gguf(path)
    assert file.value("phi3.context_length") == file.value("phi3.attention.sliding_window") == 128
    assert context_length(configure("phi3", sliding_window=2048)) == 1024
    *alike, other_side, beyond = differences(
        replace(longrope, count=ORIGINAL, room=ORIGINAL),
        replace(longrope, count=ORIGINAL + 1, room=1024),
        Job(model, path, 128),
        replace(longrope, count=ORIGINAL, room=1024),
        Job(model, path, 300),
    )
    assert max(alike) <= MAX_DIFFERENCE and min(other_side, beyond) > 0.5, alike


def test_smaller_formats_load(tmp_path: Path) -> None:
    """Half precision and Q8_0 (float16 where rows do not divide into blocks) stay near."""
    limits = {"f16": 0.1, "q8_0": 1.0}
    jobs = []
    kinds = {"llama": 64, "phi3": 64, "qwen2": 72, "qwen3": 64, "gemma3": 64}
    for kind, width in kinds.items():
        own = gemma3() if kind == "gemma3" else {"head_dim": width // 4}
        model = build(configure(kind, hidden_size=width, **own))
        paths = [export(model, tmp_path / f"{kind}.{quant}", quant) for quant in limits]
        jobs += [Job(model, path, 60) for path in paths]
    for job, difference in zip(jobs, differences(*jobs), strict=True):
        assert difference <= limits[job.path.suffix[1:]], job.name


def test_every_tensor_is_written_once_and_reads_back(exported: dict[str, Job]) -> None:
    """The model's tensors, by the inverse table and to the bit; a tied output is left out."""
    for case, job in exported.items():
        config = job.model.config
        file, architecture = read_gguf(job.path), ARCHITECTURES[config.model_type]
        state = {name: tensor.numpy() for name, tensor in job.model.state_dict().items()}
        if config.tie_word_embeddings:
            del state["lm_head.weight"]
        theirs = [name for name in file.tensors if not name.startswith("rope_")]
        names = {name: architecture.from_gguf_name(name) for name in theirs}
        assert sorted(names.values()) == sorted(state), case
        for their, our in names.items():
            result = file.tensor(their)
            if architecture.permuted and "q_proj" in our:
                result = half_split(result, config.num_attention_heads)
            elif architecture.permuted and "k_proj" in our:
                result = half_split(result, config.num_key_value_heads)
            offset = architecture.norm_offset if our.endswith("norm.weight") else 0.0
            assert np.array_equal(result, state[our] + np.float32(offset)), (case, our)
            assert architecture.to_gguf_name(our) == their, (case, our)


def test_metadata_and_extras(tmp_path: Path) -> None:
    """Shape, tokenizer, origin and heads stand in the file as they were given."""
    heads = Heads(SafetyHead(64), VerificationHead(64), 0.625, thresholds=(0.25, 0.75))
    extras = {**head_values(heads), "so8t.rank": 8, "so8t.scale": 0.5, "so8t.layers": [0.0, 1.5]}
    file = read_gguf(export(made("qwen3"), tmp_path / "b.gguf", "q8_0", extras))
    expected: dict[str, Any] = {"context_length": 1024, "vocab_size": VOCAB, "block_count": 2}
    expected |= {"embedding_length": 64, "feed_forward_length": 96, "rope.freq_base": 10000.0}
    expected |= {"attention.head_count": 4, "attention.head_count_kv": 2}
    widths = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    expected |= dict.fromkeys(widths, 32)
    assert {key: file.value(f"qwen3.{key}") for key in expected} == expected
    assert file.value("general.architecture") == "qwen3" and file.value("general.file_type") == 7
    assert tokenizer_entries(file) == TOKENIZER and file.value("so8t.base_name") == "tiny"
    values = {key: file.value(key) for key in ("so8t.rank", "so8t.scale", "so8t.layers")}
    assert values == {"so8t.rank": 8, "so8t.scale": 0.5, "so8t.layers": [0.0, 1.5]}
    result = read_heads({key: field.value for key, field in file.fields.items()}, 64)
    assert result.safety is not None and result.thresholds == (0.25, 0.75) and result.trust == 0.625
    assert heads.safety is not None
    assert torch.equal(result.safety.linear.weight, heads.safety.linear.weight)


def test_one_tensor_at_a_time_is_converted(tmp_path: Path) -> None:
    """Writing takes a small part of the model's own memory, whatever the number of layers."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12}
    model = build(configure("llama", **sizes))
    tracemalloc.start()
    try:
        export(model, tmp_path / "b.gguf", "f16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * model.num_parameters() / 6


def test_an_output_that_is_no_longer_tied_is_written(tmp_path: Path) -> None:
    """What an adapter on the output matrix leaves behind counts, not the configuration."""
    model = made("qwen2 tied linear")
    model.lm_head.weight = torch.nn.Parameter(0.5 * model.lm_head.weight.detach().flip(0))
    path = export(model, tmp_path / "b.gguf")
    assert "output.weight" in read_gguf(path).tensors
    assert differences(Job(model, path))[0] <= MAX_DIFFERENCE


def test_what_llama_cpp_computes_otherwise_is_refused_at_the_start() -> None:
    """From the configuration alone, in one line."""
    windows = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    odd = scaled("dynamic", factor=2.0)
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    stretched_windows = {"full_attention": linear, "sliding_attention": linear}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", odd, "'dynamic'.*default, linear, llama3, yarn can"),
        ("llama", scaled("default", partial_rotary_factor=0.5), "turn 8 of 16"),
        ("llama", scaled("linear", factor=float("nan")), "factor .* is nan"),
        ("llama", {"num_key_value_heads": 3}, "4 heads do not divide among 3"),
        ("qwen2", {"head_dim": 32}, "4 heads of width 32 do not fill the model's 64"),
        ("phi3", {"head_dim": 32}, "do not fill"),
        ("qwen2", LLAMA3, "'llama3' of a qwen2 model"),
        ("qwen2", yarn(beta_fast=16.0), "beta_fast .* is 16.0"),
        ("qwen2", yarn(truncate=False), "truncate"),
        ("qwen2", windows, "windows of 64"),
        ("qwen3", windows, "windows of 64"),
        ("qwen3", {"attention_bias": True}, "attention_bias is set"),
        ("gemma3", gemma3(hidden_activation="silu"), "hidden_activation is 'silu'"),
        ("gemma3", gemma3(final_logit_softcapping=30.0), "final_logit_softcapping is set"),
        ("gemma3", gemma3(query_pre_attn_scalar=16), "query_pre_attn_scalar is 16.* with 24"),
        ("gemma3", gemma3(num_hidden_layers=62), "scalar is 24; .* 62 layers can .* with 16"),
        ("gemma3", gemma3(layer_types=["sliding_attention"] * 7), "all but every 6th"),
        ("gemma3", gemma3(rope_parameters=stretched_windows), "sliding window are .*linear"),
    ]
    for kind, changes, message in cases:
        with pytest.raises(ExportError, match=message) as refusal:
            require_exportable(configure(kind, **changes))
            pytest.fail(f"{kind} with {changes} is not refused")
        assert "\n" not in str(refusal.value), message


def test_other_models_are_refused() -> None:
    """The message names those that can be exported."""
    can = "'mistral' cannot be exported to GGUF; llama, phi3, qwen2, qwen3, gemma3_text can"
    with pytest.raises(ExportError, match=can):
        require_exportable(MistralConfig())
    config = configure("phi3", **LONGROPE)
    config.rope_parameters["long_factor"] = [1.0] * 7
    with pytest.raises(ExportError, match="8 positive numbers"):
        require_exportable(config)


def test_weights_that_cannot_be_written_leave_no_file(tmp_path: Path) -> None:
    """Another vocabulary or type, an unknown format or name, values that are not finite."""
    path, model = tmp_path / "b.gguf", made("llama")
    small = build(configure("llama", vocab_size=96))
    with pytest.raises(ExportError, match="96 tokens, the tokenizer 1024"):
        export(small, path)
    with pytest.raises(ExportError, match="q2_k"):
        export(model, path, "q2_k")
    small.config.vocab_size = VOCAB
    with pytest.raises(ExportError, match=r"\[96\] rows, the configuration 1024 tokens"):
        export(small, path)
    model.model.norm.register_parameter("adapter", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(UnmappedTensor, match=r"model\.norm\.adapter"):
        export(model, path)
    del model.model.norm.adapter
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    pattern = r"layers\.1\.mlp\.up_proj\.weight has values that are not finite"
    with pytest.raises(ExportError, match=pattern):
        export(model, path)
    with pytest.raises(ExportError, match=r"torch\.bfloat16; only float32"):
        export(model.bfloat16(), path)
    assert not list(tmp_path.iterdir())
