"""Memory of an adapted student's training: the estimate against the tensors, and its advice."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from torch.optim import AdamW
from transformers import BitsAndBytesConfig

from distill.base_models.memory_advice import how_to_fit
from distill.base_models.memory_check import memory_rows
from distill.base_models.memory_estimate import (
    LOGITS_COPIES,
    TrainingMemory,
    TrainingSettings,
    estimate,
    memory_of,
)
from distill.config.loading import parse_config
from distill.config.schema import RunConfig
from distill.config.units import parse_memory
from distill.losses.chunked_lm_head import chunked_head_loss
from distill.losses.fused import BLOCK_BYTES
from stability.snapshots import Keeper
from students.adapter.adapter import AdaptedStudent, adapt
from students.adapter.base_model import AdapterSettings
from tests.support.memory import Peak, saved_bytes, size_of, some_loss, state_tensors
from tests.support.students import KINDS, needs_nf4
from tests.support.tiny_models import SHAPE

CPU = torch.device("cpu")
VOCAB, RANK = 480, 4
SIZES = {
    "small": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2},
    "larger": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3},
}
QUANTS = ["plain", pytest.param("nf4", marks=needs_nf4), pytest.param("double", marks=needs_nf4)]
PHI_3_5_MINI = {  # of the published config.json; its longrope factors take no memory
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 131072,
}


def config_of(kind: str, **changes: Any) -> Any:
    shape = SHAPE | {"vocab_size": 512} | SIZES["small"]
    if kind in ("qwen3", "gemma3_text"):
        shape["head_dim"] = 48  # an attention output wider than the residual stream
    return transformers.AutoConfig.for_model(kind, **(shape | changes))


def student_of(config: Any, quant: str, folder: Path, dtype: torch.dtype) -> AdaptedStudent:
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quant != "plain":
        base.save_pretrained(folder)
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=quant == "double",
        )
        load = transformers.AutoModelForCausalLM.from_pretrained
        base = load(folder, dtype=dtype, quantization_config=nf4)
    settings = AdapterSettings(rank=RANK, alpha=8)
    return adapt(base, settings, VOCAB, seed=0, safety_head=True, verification_head=True).train()


def training_of(quant: str, dtype: torch.dtype, **changes: Any) -> TrainingSettings:
    known: dict[str, Any] = {
        "vocab_size": VOCAB,
        "rank": RANK,
        "load_in_4bit": quant != "plain",
        "double_quantization": quant == "double",
        "load_dtype": dtype,
        "safety_head": True,
        "verification_head": True,
    }
    return TrainingSettings(**(known | changes))


def one_step(student: AdaptedStudent) -> AdamW:
    optimizer = AdamW([one for one in student.parameters() if one.requires_grad], lr=1e-3)
    output = student(torch.arange(12)[None])
    heads = student.safety_head(output.last_hidden_state[:, -1]).sum()
    certain = torch.zeros(1, 12, 2)
    heads = heads + student.verification_head(output.last_hidden_state, certain).sum()
    (output.logits.float().square().mean() + heads).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("quant", QUANTS)
def test_weights_gradients_moments_and_snapshots_are_those_of_a_student(
    quant: str, tmp_path: Path
) -> None:
    """Base, adapters and gradients exactly; within 1 % what the optimizer and the guard keep."""
    dtype = torch.float32 if quant == "plain" else torch.bfloat16
    for kind in KINDS:
        changes: dict[str, Any] = {"tie_word_embeddings": kind.startswith("qwen")}
        if kind == "llama":
            changes |= {"attention_bias": True, "mlp_bias": True}
        config = config_of(kind, **SIZES["larger"], **changes)
        student = student_of(config, quant, tmp_path / kind, dtype)
        found = estimate(config, training_of(quant, dtype, snapshots=2))
        trained = [one for one in student.parameters() if one.requires_grad]
        frozen = [one for one in student.parameters() if not one.requires_grad]
        starts = [gate.start for gate in student.gates()]
        optimizer = one_step(student)
        gradients = [one.grad for one in trained if one.grad is not None]
        assert found.base_numbers == student.base_parameters(), kind
        assert found.trained_numbers == student.trainable_parameters(), kind
        assert found.base == size_of([*frozen, *state_tensors(student)]), kind
        assert found.trained == size_of([*trained, *starts]), kind
        assert found.gradients == size_of(gradients), kind
        moments = [value for state in optimizer.state.values() for value in state.values()]
        assert found.moments == pytest.approx(size_of(moments), rel=0.01), kind
        keeper = Keeper(student, optimizer, count=2)
        kept = []
        for step in range(2):
            keeper.take(step, None)
            taken = keeper.kept[-1]
            states = [value for state in taken.moments for value in state.values()]
            kept += [*taken.weights, *taken.buffers, *states]
        assert found.snapshots == pytest.approx(size_of(kept), rel=0.01), kind


class Case(NamedTuple):
    """A base and how it is computed with."""

    kind: str
    quant: str
    dtype: torch.dtype
    autocast: torch.dtype | None = None

    def narrow(self) -> AbstractContextManager[object]:
        """What its passes run under."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast("cpu", self.autocast)

    def estimate(self, config: Any, tokens: Tensor, checkpointing: bool) -> TrainingMemory:
        """Of a step with a batch of ``tokens``."""
        sequences, length = tokens.shape
        batch = {"sequences": sequences, "length": length, "checkpointing": checkpointing}
        return estimate(
            config, training_of(self.quant, self.dtype, autocast=self.autocast, **batch)
        )


NARROW = torch.bfloat16
CASES = [
    Case("llama", "plain", torch.float32),
    Case("qwen2", "plain", torch.float32, NARROW),
    Case("phi3", "plain", NARROW, NARROW),
    Case("gemma3_text", "plain", torch.float32),
    pytest.param(Case("phi3", "double", NARROW, NARROW), marks=needs_nf4),
    pytest.param(Case("qwen3", "nf4", NARROW), marks=needs_nf4),
]
every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_activations_are_what_a_forward_pass_saves(case: Case, tmp_path: Path) -> None:
    """Within a tenth; with checkpointing, the inputs and what one layer saves without it."""
    tokens = torch.arange(3 * 40).view(3, 40)
    for size, changes in SIZES.items():
        config = config_of(case.kind, **changes)
        student = student_of(config, case.quant, tmp_path / size, case.dtype)
        without, with_it = (case.estimate(config, tokens, on).activations for on in (False, True))
        whole = saved_bytes(student, tokens, case.narrow())
        assert without == pytest.approx(whole, rel=0.1), size
        student.checkpoint_activations(True)
        inputs = saved_bytes(student, tokens, case.narrow())
        one_layer = (whole - inputs) / config.num_hidden_layers
        assert with_it == pytest.approx(inputs + one_layer, rel=0.2), size
        assert with_it < without, size


@every_case
def test_a_step_stays_below_the_estimate(case: Case, tmp_path: Path) -> None:
    """The most that a step holds at once; of a loss's buffers, this one has two."""
    config = config_of(case.kind, **SIZES["larger"])
    tokens = torch.arange(4 * 64).view(4, 64)
    for checkpointing in (False, True):
        student = student_of(config, case.quant, tmp_path, case.dtype)
        student.checkpoint_activations(checkpointing)
        with Peak(student) as peak:
            with case.narrow():
                states = student(tokens, with_logits=False).last_hidden_state.flatten(0, 1)
                matrix = student.output_matrix()
                loss = chunked_head_loss(states, matrix, some_loss)
            loss.backward()
        found = case.estimate(config, tokens, checkpointing)
        unused = LOGITS_COPIES * min(BLOCK_BYTES, 4 * tokens.numel() * VOCAB)
        allowed = found.activations + found.temporary + found.loss + found.gradients - unused
        assert 0.5 * allowed < peak.most <= allowed, f"checkpointing {checkpointing}"


def test_dropout_keeps_more() -> None:
    config, plain = config_of("llama"), partial(training_of, "plain", torch.float32)
    with_it, without = (estimate(config, plain(dropout=share)) for share in (0.1, 0.0))
    assert with_it.activations > without.activations
    assert with_it.base == without.base


def phi(**changes: Any) -> TrainingMemory:
    config = transformers.Phi3Config(**PHI_3_5_MINI)
    known: dict[str, Any] = {
        "vocab_size": 32064,
        "load_in_4bit": True,
        "load_dtype": torch.bfloat16,
        "autocast": torch.bfloat16,
        "sequences": 16,
        "on_cpu": False,
    }
    return estimate(config, TrainingSettings(**(known | changes)))


def test_phi_3_5_mini_in_nf4_by_hand() -> None:
    """3.6 billion numbers in half a byte with scales, two tables of 98.5 million in bfloat16."""
    layer = 9216 * 3072 + 3072 * 3072 + 16384 * 3072 + 3072 * 8192
    scales = layer / 64 * (1 + 4 / 256)
    tables = 2 * 32064 * 3072 + 65 * 3072
    by_hand = 32 * (layer / 2 + scales) + 2 * tables
    found = phi()
    assert found.base == pytest.approx(by_hand, rel=1e-3)  # bitsandbytes' tables are the rest
    assert 2.2 < found.base / 1e9 < 2.4
    assert found.base_numbers == 32 * layer + tables == 3_821_079_552
    assert phi(load_in_4bit=False).base == 2 * 3_821_079_552
    single = phi(double_quantization=False).base
    assert single - found.base == pytest.approx(32 * layer / 64 * (4 - 1 - 4 / 256), rel=0.01)


def test_the_loss_counts_chunks_of_logits() -> None:
    """128 MiB of logits in their buffers and once narrow, on a CPU in two narrow ones and rows of
    them in others; the last states with their gradient."""
    chunk = (128 << 20) // (4 * 32064)
    states = 2 * 2 * 16 * 256 * 3072
    assert phi().loss == chunk * 32064 * (4 * LOGITS_COPIES + 2) + states
    few = phi(sequences=1, length=10).loss
    assert few == 10 * 32064 * (4 * LOGITS_COPIES + 2) + 2 * 2 * 10 * 3072
    narrow = 2 * 2 * ((128 << 20) // (2 * 32064)) * 32064
    assert phi(on_cpu=True).loss == narrow + LOGITS_COPIES * BLOCK_BYTES + states


def test_snapshots_count_where_main_memory_is_all_there_is() -> None:
    on_gpu, on_cpu = phi(snapshots=2), phi(snapshots=2, on_cpu=True)
    assert on_gpu.snapshots > 0
    assert on_cpu.total - on_cpu.loss >= on_gpu.total - on_gpu.loss + on_gpu.snapshots
    last = ["together", "snapshots, in RAM"]
    assert [name for name, _ in memory_rows(on_gpu)][-2:] == last
    assert [name for name, _ in memory_rows(on_cpu)][-1] == "together"
    assert dict(memory_rows(on_gpu))["base weights"] == "2.26 GB"
    assert "snapshots, in RAM" not in dict(memory_rows(phi()))


def run_config(**tree: Any) -> RunConfig:
    return parse_config({"student": {"base": "base"}, **tree})


def test_a_runs_settings_are_taken() -> None:
    config = config_of("llama")

    def memory(vocab_size: int = VOCAB, device: torch.device = CPU, **tree: Any) -> TrainingMemory:
        return memory_of(config, run_config(**tree), vocab_size, device)

    first = memory()
    assert memory(train={"accumulation": 4}).activations < first.activations
    assert memory(train={"gradient_checkpointing": False}).activations > first.activations
    assert memory(train={"guard": {"enabled": False}}).snapshots == 0 < first.snapshots
    narrow = memory(device=torch.device("cuda"))
    assert narrow.base * 2 == first.base
    assert not narrow.on_cpu and first.on_cpu
    headless = memory(safety={"labels": "none"}, loss={"lambda_verification": 0.0})
    assert first.trained_numbers - headless.trained_numbers == 3 * 65 + 64 * 66 + 3
    assert memory(600).base - first.base == 4 * 2 * (600 - 512) * 64


def test_advice_makes_it_fit() -> None:
    """Followed, it gives what it says; the least harmful comes first, and no more than needed."""
    config = transformers.Phi3Config(**PHI_3_5_MINI)
    run = run_config(train={"gradient_checkpointing": False})
    gpu = torch.device("cuda")

    def total(settings: RunConfig) -> int:
        return memory_of(config, settings, 32064, gpu).total

    whole = total(run)
    assert how_to_fit(whole, run, total) == []
    (first,) = how_to_fit(whole - 1, run, total)
    assert first.startswith("train.gradient_checkpointing=true saves ")
    lines = how_to_fit(parse_memory("6GiB"), run, total)
    names = [line.split("=")[0] for line in lines]
    assert names == ["train.gradient_checkpointing", "train.accumulation", "student.load_in_4bit"]
    parts = int(lines[1].split("=")[1].split()[0])
    train = {"gradient_checkpointing": True, "accumulation": parts}
    settings = run_config(train=train, student={"base": "b", "load_in_4bit": True})
    followed = total(settings)
    assert followed <= 6 << 30
    assert lines[2].endswith(f"(then {followed / 1e9:.2f} GB)")


def test_advice_where_nothing_helps() -> None:
    config = config_of("llama")
    lines = how_to_fit(1000, run_config(), lambda one: memory_of(config, one, VOCAB, CPU).total)
    assert lines[-1] == "no change makes it fit; choose a smaller base"
    names = [line.split("=")[0] for line in lines[:-1]]
    assert names[:2] == ["train.accumulation", "train.guard.snapshots"]
    assert names[2:] == ["student.load_in_4bit", "student.lora_rank", "data.max_length"]
    assert lines[1].startswith("train.guard.snapshots=1 saves ")


def test_memory_in_words() -> None:
    """Amounts with a unit or in bytes; anything else is refused."""
    amounts = {"12GiB": 12 << 30, "1.5 GB": 1_500_000_000, "800mb": 800_000_000}
    amounts |= {" 2 TiB ": 2 << 40, "64KiB": 65536, "4096": 4096, "7 B": 7}
    assert {text: parse_memory(text) for text in amounts} == amounts
    none = ["", "GiB", "12 G", "0GB", "-1GB", "1e3GB", "0.1", "12 apples", "nan", "１GB"]
    words = "is no amount of memory; write a number above 0 and a unit"
    for text in [*none, "9" * 400 + "TB"]:
        with pytest.raises(ValueError, match=words):
            pytest.fail(f"{text!r} is taken as {parse_memory(text)} bytes")
