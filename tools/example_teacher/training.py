"""Trains the example teacher from scratch on generated dialogues, the same way on every run."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import Phi3Config, Phi3ForCausalLM

from tools.example_teacher.domain import make_example
from tools.example_teacher.tokenizer import BOS_ID, EOS_ID, Turn, dialogue_text

IGNORED = -100  # target of positions behind the end of a dialogue


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to 1 % of the peak."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


@dataclass(frozen=True)
class Settings:
    """Sizes of network and training; together with the seed they determine the file."""

    seed: int = 20250101
    steps: int = 3200
    tokens_per_step: int = 3072  # rows x longest row of a batch, at most
    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 640
    layers: int = 6
    heads: int = 4
    context: int = 512  # tokens
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    threads: int = 2


def make_model(settings: Settings) -> Phi3ForCausalLM:
    """An untrained model; the output layer shares the embedding's weights."""
    torch.manual_seed(settings.seed)
    config = Phi3Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        original_max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=None,
        use_cache=False,
        attn_implementation="eager",  # faster than "sdpa" at these lengths, on two cores
    )
    return Phi3ForCausalLM(config)


def training_turns(rng: random.Random) -> list[Turn]:
    """The turns of one dialogue: mostly one, sometimes two or three."""
    count = rng.choices((1, 2, 3), (0.85, 0.1, 0.05))[0]
    drawn = [make_example(rng, held_out=False) for _ in range(count)]
    return [(example.prompt, example.answer) for example in drawn]


def token_rows(tokenizer: Tokenizer, settings: Settings) -> Iterator[list[list[int]]]:
    """Batches of dialogues as token ids, of similar length within a batch, without end.

    No dialogue is drawn from a store: each is made anew, so hardly any is seen twice.
    """
    rng = random.Random(settings.seed)
    while True:
        texts = [dialogue_text(training_turns(rng)) for _ in range(2048)]
        rows = [encoding.ids[: settings.context] for encoding in tokenizer.encode_batch_fast(texts)]
        rows.sort(key=len)
        batches: list[list[list[int]]] = [[]]
        for row in rows:
            if (len(batches[-1]) + 1) * len(row) > settings.tokens_per_step:
                batches.append([])
            batches[-1].append(row)
        rng.shuffle(batches)
        yield from batches


def pad_batch(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both (rows, longest - 1); behind a row's end stand BOS and ``IGNORED``.

    Attention looks back only, so what stands behind the end needs no mask.
    """
    longest = max(map(len, rows))
    inputs = torch.tensor([row + [BOS_ID] * (longest - len(row)) for row in rows])
    targets = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in rows])
    return inputs[:, :-1], targets[:, 1:]


def make_optimizer(model: Phi3ForCausalLM, settings: Settings) -> torch.optim.AdamW:
    """AdamW; only the matrices decay, not the norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


def batch_loss(model: Phi3ForCausalLM, rows: list[list[int]]) -> torch.Tensor:
    """Mean loss per token over a batch, in nats; the matrix products run in bfloat16."""
    inputs, targets = pad_batch(rows)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=inputs).logits
    return functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED
    )


def train(tokenizer: Tokenizer, settings: Settings) -> tuple[Phi3ForCausalLM, int]:
    """The trained model and the number of tokens it saw (padding not counted)."""
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before writing it; filling all of it first costs a tenth of the
    # time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    model = make_model(settings)
    model.train()
    optimizer = make_optimizer(model, settings)
    batches = token_rows(tokenizer, settings)
    tokens = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, refresh_per_second=1) as progress:
        task = progress.add_task("training", total=settings.steps)
        for step in range(settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            rows = next(batches)
            tokens += sum(map(len, rows))
            loss = batch_loss(model, rows)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.advance(task)
            if step % 50 == 0 or step == settings.steps - 1:
                progress.update(task, description=f"loss {loss.item():.4f}")
                progress.console.print(
                    f"step {step:5d}  tokens {tokens:9d}  loss {loss.item():.4f}"
                )
    return model.eval(), tokens
