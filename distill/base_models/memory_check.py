"""Whether training a base model fits in this machine's memory."""

from __future__ import annotations

from collections.abc import Callable

import psutil

from distill.base_models.base_model import Base
from distill.base_models.memory_advice import how_to_fit
from distill.base_models.memory_estimate import TrainingMemory, memory_of
from distill.config.schema import USUAL_LENGTH, RunConfig
from distill.errors import UserError
from distill.runtime.device import device_memory, training_device
from distill.runtime.format import human_bytes, human_count
from distill.runtime.progress import Console
from students.gguf.architectures import architecture_of


def describe_base(base: Base, config: RunConfig, vocab_size: int, console: Console) -> None:
    """Print what the student is made of."""
    memory = memory_of(base.config, config, vocab_size)
    kind = "in NF4" if base.load_in_4bit else "as it is"
    console.note(
        f"student: {base.path.name} ({base.config.model_type}, "
        f"{human_count(memory.base_numbers)} parameters, {kind}) with LoRA of rank "
        f"{config.student.lora_rank} and SO(8) gates, {human_count(memory.trained_numbers)} "
        f"trained; about {human_bytes(memory.total)} of memory"
    )
    console.note(f"vocabulary: {base.match.describe()}")
    if base.no_tokenizer is not None:
        console.warn(f"the merged transformers folder will have no tokenizer: {base.no_tokenizer}")
    longest = config.data.max_length or USUAL_LENGTH
    if base.context_length < longest:
        console.warn(
            f"the exported file will be exact up to {base.context_length} tokens; sequences have "
            f"up to {longest} (data.max_length)"
        )


def judge_base(base: Base, config: RunConfig, vocab_size: int, console: Console) -> None:
    """Print how large the student is, before anything of that size is allocated, and see that
    training fits into memory, and sequences of ``data.max_length`` into the base's window.

    Raises:
        UserError: one of them does not; names what would.
    """
    longest = config.data.max_length or USUAL_LENGTH
    describe_base(base, config, vocab_size, console)
    window = getattr(base.config, "sliding_window", None)
    ignored = architecture_of(base.config).ignores_window
    if ignored and window is not None and window < longest:
        raise UserError(
            f"{base.path} looks back {window} tokens (sliding_window), which llama.cpp does "
            f"not do for {base.config.model_type}; sequences have up to {longest}; set "
            f"data.max_length={window} or less"
        )
    require_fit(
        f"training {base.path}",
        config,
        lambda settings: memory_of(base.config, settings, vocab_size),
    )


def require_fit(
    what: str, config: RunConfig, memory_with: Callable[[RunConfig], TrainingMemory]
) -> None:
    """See that ``what`` fits where it trains, and beside that the guard's snapshots into main
    memory. ``memory_with``: the estimate for some settings.

    Raises:
        UserError: it does not; names the device, and what would make it fit.
    """
    memory = memory_with(config)
    limit, where = device_memory(training_device())
    if memory.total > limit:
        ways = how_to_fit(limit, config, lambda settings: memory_with(settings).total)
        raise UserError(
            f"{what} takes about {human_bytes(memory.total)}, {where} has {human_bytes(limit)}: "
            f"{'; '.join(ways)}"
        )
    main = psutil.virtual_memory().total
    if not memory.on_cpu and memory.snapshots > main:
        raise UserError(
            f"{what} keeps {human_bytes(memory.snapshots)} of the guard's snapshots in main "
            f"memory, this machine has {human_bytes(main)}; set train.guard.snapshots=1, or choose "
            "a smaller student"
        )


def memory_rows(memory: TrainingMemory) -> list[tuple[str, str]]:
    """The estimate as rows of a table."""
    rows = [
        ("base weights", memory.base),
        ("LoRA, gates and heads" if memory.base else "weights", memory.trained),
        ("gradients", memory.gradients),
        ("optimizer's moments", memory.moments),
        ("activations", memory.activations),
        ("temporary", memory.temporary),
        ("loss", memory.loss),
    ]
    kept = ("snapshots" if memory.on_cpu else "snapshots, in RAM", memory.snapshots)
    total = ("together", memory.total)
    rows += [kept, total] if memory.on_cpu else [total, kept]
    return [(name, human_bytes(size)) for name, size in rows if size]
