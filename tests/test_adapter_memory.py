"""Memory of an adapted student's training: the estimate against the tensors themselves, and what it advises."""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BitsAndBytesConfig

from distill.adapter_memory import (
    LOGITS_COPIES,
    NOTHING_FITS,
    AdapterMemory,
    AdapterTraining,
    estimate,
    how_to_fit,
    memory_of,
    memory_rows,
)
from distill.config import RunConfig, parse_config, parse_memory
from distill.head_loss import chunked_head_loss
from stability.snapshot import Keeper
from students.adapter import AdaptedStudent, adapt
from students.adapter_base import AdapterSettings

CPU = torch.device("cpu")
KINDS = ("llama", "phi3", "qwen2", "qwen3")
VOCAB, RANK = 480, 4
SIZES = {
    "small": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2},
    "larger": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3},
}
nf4_alone = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
QUANTS = ["plain", pytest.param("nf4", marks=nf4_alone), pytest.param("double", marks=nf4_alone)]
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
    shape: dict[str, Any] = {
        "vocab_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        **SIZES["small"],
    }
    if kind == "qwen3":
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
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=nf4)
    settings = AdapterSettings(rank=RANK, alpha=8)
    return adapt(base, settings, VOCAB, seed=0, safety_head=True, verification_head=True).train()


def training_of(quant: str, dtype: torch.dtype, **changes: Any) -> AdapterTraining:
    known = {
        "vocab_size": VOCAB,
        "rank": RANK,
        "load_in_4bit": quant != "plain",
        "double_quantisation": quant == "double",
        "load_dtype": dtype,
        "safety_head": True,
        "verification_head": True,
    }
    return AdapterTraining(**(known | changes))


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def state_tensors(module: nn.Module) -> list[Tensor]:
    """What bitsandbytes keeps beside NF4 weights."""
    found = []
    for parameter in module.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            found += [state.absmax, state.code]
            if state.nested:
                found += [state.state2.absmax, state.state2.code, state.offset]
    return found


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
@pytest.mark.parametrize("kind", KINDS)
def test_weights_gradients_moments_and_snapshots_are_those_of_a_student(
    kind: str, quant: str, tmp_path: Path
) -> None:
    """Exactly the base, the adapters and the gradients; within 1 % what the optimizer and the guard keep."""
    dtype = torch.float32 if quant == "plain" else torch.bfloat16
    tied = kind.startswith("qwen")
    changes: dict[str, Any] = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    config = config_of(kind, tie_word_embeddings=tied, **SIZES["larger"], **changes)
    student = student_of(config, quant, tmp_path, dtype)
    found = estimate(config, training_of(quant, dtype, snapshots=2))
    trained = [one for one in student.parameters() if one.requires_grad]
    frozen = [one for one in student.parameters() if not one.requires_grad]
    assert found.base_numbers == student.base_parameters()
    assert found.trained_numbers == student.trainable_parameters()
    assert found.base == size_of([*frozen, *state_tensors(student)])
    assert found.adapters == size_of([*trained, *(gate.start for gate in student.gates())])
    optimizer = one_step(student)
    assert found.gradients == size_of(one.grad for one in trained if one.grad is not None)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert found.moments == pytest.approx(size_of(moments), rel=0.01)
    keeper = Keeper(student, optimizer, None, None, 2)
    kept = []
    for step in range(2):
        keeper.take(step, None)
        taken = keeper.kept[-1]
        states = [value for state in taken.moments for value in state.values()]
        kept += [*taken.weights, *taken.buffers, *states]
    assert found.snapshots == pytest.approx(size_of(kept), rel=0.01)


class Saved:
    """Counts what a forward pass saves for its backward pass, without the student's own parameters and buffers."""

    def __init__(self, student: AdaptedStudent) -> None:
        own = [*student.parameters(), *student.buffers(), *state_tensors(student)]
        self.own = {one.untyped_storage().data_ptr() for one in own}
        self.tensors: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self.own:
            self.tensors.append(tensor)  # kept, so that its place is not used again
        return tensor


def saved_bytes(student: AdaptedStudent, tokens: Tensor, autocast: torch.dtype | None) -> int:
    saved = Saved(student)
    narrow = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda one: one), narrow:
        output = student(tokens, with_logits=False)
    assert output.last_hidden_state is not None
    return size_of([*saved.tensors, output.last_hidden_state])


CASES = [
    ("llama", "plain", torch.float32, None),
    ("qwen2", "plain", torch.float32, torch.bfloat16),
    ("phi3", "plain", torch.bfloat16, torch.bfloat16),
    pytest.param("phi3", "double", torch.bfloat16, torch.bfloat16, marks=nf4_alone),
    pytest.param("qwen3", "nf4", torch.bfloat16, None, marks=nf4_alone),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "quant", "dtype", "autocast"), CASES)
def test_activations_are_what_a_forward_pass_saves(
    kind: str, quant: str, dtype: torch.dtype, autocast: torch.dtype | None, size: str, tmp_path: Path
) -> None:
    """Within a tenth; with checkpointing, one layer's worth is what one more layer saves without."""
    config = config_of(kind, **SIZES[size])
    student = student_of(config, quant, tmp_path, dtype)
    tokens = torch.arange(3 * 40).view(3, 40)

    def estimated(checkpointing: bool, **changes: Any) -> AdapterMemory:
        known = {"autocast": autocast, "sequences": 3, "length": 40, "checkpointing": checkpointing}
        return estimate(config, training_of(quant, dtype, **(known | changes)))

    whole = saved_bytes(student, tokens, autocast)
    assert estimated(False).activations == pytest.approx(whole, rel=0.1)
    student.checkpoint_activations(True)
    inputs = saved_bytes(student, tokens, autocast)
    one_layer = (whole - inputs) / config.num_hidden_layers
    assert estimated(True).activations == pytest.approx(inputs + one_layer, rel=0.2)
    assert estimated(True).activations < estimated(False).activations


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once, of what has been made since it was entered."""

    def __init__(self, student: AdaptedStudent) -> None:
        super().__init__()
        own = [*student.parameters(), *student.buffers(), *state_tensors(student)]
        self.known = {one.untyped_storage()._cdata for one in own}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
                self.most = max(self.most, self.now)
        return result

    def _gone(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "quant", "dtype", "autocast"), CASES)
def test_a_step_stays_below_the_estimate(
    kind: str,
    quant: str,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    checkpointing: bool,
    tmp_path: Path,
) -> None:
    """The most that a forward and backward pass hold at once; of a loss's buffers, this one has two."""
    config = config_of(kind, **SIZES["larger"])
    student = student_of(config, quant, tmp_path, dtype)
    student.checkpoint_activations(checkpointing)
    tokens = torch.arange(4 * 64).view(4, 64)
    narrow = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with Peak(student) as peak:
        with narrow:
            states = student(tokens, with_logits=False).last_hidden_state.flatten(0, 1)
            loss = chunked_head_loss(states, student.output_matrix(), lambda z, _: (z.sum(), z.softmax(-1)))
        loss.backward()
    changes = {"autocast": autocast, "sequences": 4, "length": 64, "checkpointing": checkpointing}
    found = estimate(config, training_of(quant, dtype, **changes))
    unused = (LOGITS_COPIES - 2) * 4 * 256 * VOCAB
    allowed = found.activations + found.temporary + found.loss + found.gradients - unused
    assert 0.5 * allowed < peak.most <= allowed


def test_dropout_keeps_more() -> None:
    config = config_of("llama")
    with_it, without = (
        estimate(config, training_of("plain", torch.float32, dropout=share)) for share in (0.1, 0.0)
    )
    assert with_it.activations > without.activations
    assert with_it.base == without.base


def phi(**changes: Any) -> AdapterMemory:
    config = transformers.Phi3Config(**PHI_3_5_MINI)
    known: dict[str, Any] = {
        "vocab_size": 32064,
        "load_in_4bit": True,
        "load_dtype": torch.bfloat16,
        "autocast": torch.bfloat16,
        "sequences": 16,
        "on_cpu": False,
    }
    return estimate(config, AdapterTraining(**(known | changes)))


def test_phi_3_5_mini_in_nf4_by_hand() -> None:
    """3.6 billion numbers of layers in half a byte with their scales, and two tables of 98.5 million in bfloat16."""
    layer = 9216 * 3072 + 3072 * 3072 + 16384 * 3072 + 3072 * 8192
    scales = layer / 64 * (1 + 4 / 256)
    tables = 2 * 32064 * 3072 + 65 * 3072
    by_hand = 32 * (layer / 2 + scales) + 2 * tables
    found = phi()
    assert found.base == pytest.approx(by_hand, rel=1e-3)  # bitsandbytes' tables are the rest
    assert 2.2 < found.base / 1e9 < 2.4
    assert found.base_numbers == 32 * layer + tables == 3_821_079_552
    assert phi(load_in_4bit=False).base == 2 * 3_821_079_552
    single = phi(double_quantisation=False).base
    assert single - found.base == pytest.approx(32 * layer / 64 * (4 - 1 - 4 / 256), rel=0.01)


def test_the_loss_counts_chunks_of_logits() -> None:
    """A chunk of 32 MiB of logits in its buffers and once narrow, and the last states with their gradient."""
    chunk = (32 << 20) // (4 * 32064)
    states = 2 * 2 * 16 * 256 * 3072
    assert phi().loss == chunk * 32064 * (4 * LOGITS_COPIES + 2) + states
    few = phi(sequences=1, length=10).loss
    assert few == 10 * 32064 * (4 * LOGITS_COPIES + 2) + 2 * 2 * 10 * 3072


def test_snapshots_count_where_main_memory_is_all_there_is() -> None:
    on_gpu, on_cpu = phi(snapshots=2), phi(snapshots=2, on_cpu=True)
    assert on_gpu.snapshots > 0
    assert on_cpu.total >= on_gpu.total + on_gpu.snapshots
    merging = "merging, at the end (main memory)"
    last = ["together", "guard's snapshots (main memory)", merging]
    assert [name for name, _ in memory_rows(on_gpu)][-3:] == last
    assert [name for name, _ in memory_rows(on_cpu)][-2:] == ["together", merging]
    # A float32 model; on a CPU the base in NF4 is in main memory too.
    assert on_gpu.at_the_end == 4 * on_gpu.base_numbers
    assert on_cpu.at_the_end == 4 * on_cpu.base_numbers + on_cpu.base
    assert dict(memory_rows(on_gpu))["base weights"] == "2.26 GB"
    assert "guard's snapshots (main memory)" not in dict(memory_rows(phi()))


def run_config(**tree: Any) -> RunConfig:
    return parse_config({"student": {"base": "base"}, **tree})


def test_a_runs_settings_are_taken() -> None:
    config = config_of("llama")
    first = memory_of(config, run_config(), VOCAB, CPU)
    accumulated = memory_of(config, run_config(train={"accumulation": 4}), VOCAB, CPU)
    assert accumulated.activations < first.activations
    kept = memory_of(config, run_config(train={"gradient_checkpointing": False}), VOCAB, CPU)
    assert kept.activations > first.activations
    unguarded = memory_of(config, run_config(train={"guard": {"enabled": False}}), VOCAB, CPU)
    assert unguarded.snapshots == 0 < first.snapshots
    narrow = memory_of(config, run_config(), VOCAB, torch.device("cuda"))
    assert narrow.base * 2 == first.base
    assert not narrow.on_cpu and first.on_cpu
    bare = {"safety": {"labels": "none"}, "loss": {"lambda_verification": 0.0}}
    headless = memory_of(config, run_config(**bare), VOCAB, CPU)
    assert first.trained_numbers - headless.trained_numbers == 3 * 65 + 64 * 66 + 3
    assert memory_of(config, run_config(), 600, CPU).base - first.base == 4 * 2 * (600 - 512) * 64


def test_advice_makes_it_fit() -> None:
    """Followed, the advice gives what it says; the least harmful comes first, and no more than is needed."""
    config = transformers.Phi3Config(**PHI_3_5_MINI)
    run = run_config(train={"gradient_checkpointing": False})
    gpu = torch.device("cuda")
    whole = memory_of(config, run, 32064, gpu).total
    assert how_to_fit(whole, config, run, 32064, gpu) == []
    (first,) = how_to_fit(whole - 1, config, run, 32064, gpu)
    assert first.startswith("train.gradient_checkpointing=true saves ")
    lines = how_to_fit(parse_memory("6GiB"), config, run, 32064, gpu)
    names = [line.split("=")[0] for line in lines]
    assert names == ["train.gradient_checkpointing", "train.accumulation", "student.load_in_4bit"]
    settings = {"train": {"gradient_checkpointing": True}, "student": {"base": "b", "load_in_4bit": True}}
    settings["train"]["accumulation"] = int(lines[1].split("=")[1].split()[0])
    followed = memory_of(config, parse_config(settings), 32064, gpu).total
    assert followed <= 6 << 30
    assert lines[2].endswith(f"(then {followed / 1e9:.2f} GB)")


def test_advice_where_nothing_helps() -> None:
    config = config_of("llama")
    lines = how_to_fit(1000, config, run_config(), VOCAB, CPU)
    assert lines[-1] == NOTHING_FITS
    names = [line.split("=")[0] for line in lines[:-1]]
    assert names == [
        "train.accumulation",
        "train.guard.snapshots",
        "student.load_in_4bit",
        "student.lora_rank",
        "data.max_length",
    ]
    assert lines[1].startswith("train.guard.snapshots=1 saves ")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 << 30),
        ("1.5 GB", 1_500_000_000),
        ("800mb", 800_000_000),
        (" 2 TiB ", 2 << 40),
        ("64KiB", 65536),
        ("4096", 4096),
        ("7 B", 7),
    ],
)
def test_memory_in_words(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "12 G", "0GB", "-1GB", "1e3GB", "0.1", "12 apples", "9" * 400 + "TB", "nan", "１GB"]
)
def test_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no amount of memory; write a number above 0 and a unit"):
        parse_memory(text)
