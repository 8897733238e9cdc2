"""Whether training a base model fits in this machine's memory."""

from __future__ import annotations

import psutil
import torch

from distill.base_models.base_model import Base
from distill.base_models.memory_advice import how_to_fit
from distill.base_models.memory_estimate import memory_of
from distill.config.schema import USUAL_LENGTH, RunConfig
from distill.errors import UserError
from distill.runtime.device import training_device
from distill.runtime.format import human_bytes, human_count
from distill.runtime.progress import Console
from students.gguf.architectures import architecture_of


def describe_base(base: Base, config: RunConfig, vocab_size: int, console: Console) -> None:
    """Print what the student is made of."""
    memory = memory_of(base.config, config, vocab_size)
    kind = "in NF4" if base.load_in_4bit else "as it is"
    console.note(
        f"student: {base.folder.path.name} ({base.config.model_type}, "
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


def judge_base(
    base: Base, config: RunConfig, vocab_size: int, longest: int, console: Console
) -> None:
    """Print how large the student is, before anything of that size is allocated, and see that
    training fits into this machine, merging into main memory, and sequences into the base's
    window. ``longest``: tokens of a sequence.

    Raises:
        UserError: one of them does not; names what would.
    """
    data = config.data.model_copy(update={"max_length": longest})
    config = config.model_copy(update={"data": data})
    describe_base(base, config, vocab_size, console)
    memory = memory_of(base.config, config, vocab_size)
    window = getattr(base.config, "sliding_window", None)
    ignored = architecture_of(base.config).ignores_window
    if ignored and window is not None and window < longest:
        raise UserError(
            f"{base.folder.path} looks back {window} tokens (sliding_window), which llama.cpp does "
            f"not do for {base.config.model_type}; sequences have up to {longest}; set "
            f"data.max_length={window} or less"
        )
    main = psutil.virtual_memory().total
    if memory.at_the_end > main:
        raise UserError(
            f"merging {base.folder.path} at the end takes about {human_bytes(memory.at_the_end)} "
            f"of main memory, this machine has {human_bytes(main)}; choose a smaller base"
        )
    limit, where = available_memory()
    if memory.total > limit:
        ways = how_to_fit(limit, base.config, config, vocab_size)
        raise UserError(
            f"training {base.folder.path} takes about {human_bytes(memory.total)}, {where} has "
            f"{human_bytes(limit)}: {'; '.join(ways)}"
        )


def available_memory() -> tuple[int, str]:
    """Bytes of memory where this process trains, and what has them."""
    device = training_device()
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, "this GPU"
    return psutil.virtual_memory().total, "this machine"
