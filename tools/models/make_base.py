"""Writes a checkpoint folder such as an existing smaller model comes in, with a teacher's
vocabulary. Over 400 lines because both kinds of base share their settings and writing.

    python -m tools.models.make_base OUT --kind llama       a few million parameters
    python -m tools.models.make_base OUT --kind qwen2 --teacher x.gguf --text some.txt
    python -m tools.models.make_base OUT --shape phi3.5     its sizes, random weights, 7.6 GB

The small one knows half of the kinds of request that the example teacher answers, so that
distillation has something to gain. The large one is what memory and speed are measured on; it is
written layer by layer, so that main memory holds one layer at a time.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from teachers import example_teacher
from teachers.gguf.file import Field, TeacherFileError, read_gguf, tokenizer_fields
from teachers.tokenizer.gguf_metadata import TokenizerConversionError, read_metadata
from teachers.tokenizer.tokenizer_json import build_tokenizer, write_tokenizer_folder
from tools.example_teacher.domain import make_example
from tools.example_teacher.tokenizer import SPECIAL_TOKENS, Turn, dialogue_text
from tools.example_teacher.training import (
    IGNORED,
    Settings,
    learning_rate,
    make_optimizer,
    pad_batch,
)

Kind = Literal["llama", "phi3", "qwen2", "qwen3"]
Rope = Literal["default", "longrope"]

SMALL_WIDTH, SMALL_LAYERS, STEPS = 192, 4, 400
KNOWN = ("purchase", "mixing", "access")  # families of tools.example_teacher.domain
CONTEXT, ORIGINAL_CONTEXT = 1024, 512  # tokens; the second only with longrope
LONGEST = 256  # tokens of a row in training
SETTINGS = Settings(tokens_per_step=1024, learning_rate=2e-3, warmup_steps=20)
POOL = 512  # documents sorted by length together
PHI_WIDTH, PHI_LAYERS, PHI_HEADS = 3072, 32, 32
PHI_CONTEXT, PHI_ORIGINAL_CONTEXT = 131072, 4096  # tokens
SPREAD = 0.02  # of random weights


def make_base(
    folder: Path,
    kind: Kind,
    *,
    teacher: Path | None = None,
    width: int = SMALL_WIDTH,
    layers: int = SMALL_LAYERS,
    steps: int = STEPS,
    seed: int = 0,
    extra_rows: int = 0,
    text: Path | None = None,
    rope: Rope = "default",
    losses: list[float] | None = None,
) -> Path:
    """Write a small causal language model and its tokenizer as a ``transformers`` folder; the same
    seed gives the same bytes on the same machine.

    Args:
        folder: where to; made where it is missing. teacher: GGUF file whose vocabulary it has; the
        example teacher where none is given. steps: of training; 0 leaves the weights random.
        extra_rows: rows of the embedding that have no token. text: what it is trained on, documents
        parted by blank lines; only the example teacher has text of its own. rope: ``longrope``, for
        ``phi3`` alone, as its models with long contexts have it. losses: gets the loss of every
        step, in nats per token.

    Returns:
        ``folder``.

    Raises:
        ValueError: sizes that do not fit together, or no text to train on.
        TeacherFileError, TokenizerConversionError: the teacher has no vocabulary that can be used.
        OSError: the text cannot be read, or the disk refuses.
    """
    fields = _vocabulary_of(teacher)
    config = small_config(kind, fields, width, layers, extra_rows, rope)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(
                    ".bias"
                ):  # which transformers begins at 0: nobody would see that one is left out
                    parameter.normal_(std=SPREAD)
        if steps:
            result = train(
                model, _documents(fields, text, seed), replace(SETTINGS, seed=seed, steps=steps)
            )
            if losses is not None:
                losses += result
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer_folder(fields, folder)
    return folder


def small_config(
    kind: Kind, fields: Mapping[str, Field], width: int, layers: int, extra_rows: int, rope: Rope
) -> Any:
    """The configuration of a small model: heads of 32 that share keys and values; the Qwens' tables
    are tied.

    Raises:
        ValueError: sizes that do not fit together.
    """
    if width < 64 or width % 32:
        raise ValueError(
            f"width {width} cannot be divided into heads of 32; choose a multiple of 32, from 64"
        )
    if layers < 1:
        raise ValueError(f"{layers} layers are not at least 1")
    if rope == "longrope" and kind != "phi3":
        raise ValueError(f"longrope is phi3's, not {kind}'s; leave --rope out or use --kind phi3")
    heads = width // 32
    shape: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 64 * round(2.75 * width / 64),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": next(n for n in range(heads // 2, 0, -1) if heads % n == 0),
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": kind in ("qwen2", "qwen3"),
    }
    if kind == "qwen3":
        shape["head_dim"] = 64  # an attention output wider than the model, as the real ones have it
    if rope == "longrope":
        shape |= _longrope(32, CONTEXT, ORIGINAL_CONTEXT)
    elif kind == "phi3":
        shape["original_max_position_embeddings"] = CONTEXT
    return AutoConfig.for_model(kind, **shape, **_vocabulary_settings(fields, extra_rows))


def phi_config(
    fields: Mapping[str, Field],
    *,
    width: int = PHI_WIDTH,
    layers: int = PHI_LAYERS,
    extra_rows: int = 0,
) -> Any:
    """Phi-3.5-mini's configuration with the teacher's vocabulary, or one of the same proportions.

    Raises:
        ValueError: sizes that do not fit together.
    """
    if width < 192 or width % 192:
        raise ValueError(
            f"width {width} does not keep Phi-3.5-mini's proportions; choose a multiple of 192"
        )
    if layers < 1:
        raise ValueError(f"{layers} layers are not at least 1")
    return AutoConfig.for_model(
        "phi3",
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=PHI_HEADS,
        num_key_value_heads=PHI_HEADS,
        max_position_embeddings=PHI_CONTEXT,
        sliding_window=2 * PHI_CONTEXT,
        tie_word_embeddings=False,
        architectures=["Phi3ForCausalLM"],
        dtype=torch.bfloat16,
        **_longrope(width // PHI_HEADS, PHI_CONTEXT, PHI_ORIGINAL_CONTEXT),
        **_vocabulary_settings(fields, extra_rows),
    )


def _longrope(head_width: int, context: int, original: int) -> dict[str, Any]:
    """Settings of made-up factors of a sensible size: pairs that turn slowly are stretched most."""
    last = max(1, head_width // 2 - 1)
    stretch = context / original
    places = [place / last for place in range(head_width // 2)]
    return {
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [round(1 + 0.5 * place, 4) for place in places],
            "long_factor": [round(1 + (2 * stretch - 1) * place**2, 4) for place in places],
        },
    }


def _vocabulary_of(teacher: Path | None) -> dict[str, Field]:
    """The tokenizer's metadata of a GGUF file, and its name, which says how a Phi-3's tokens are
    read."""
    model = read_gguf(teacher or example_teacher())
    named = {"general.name": model.fields["general.name"]} if "general.name" in model.fields else {}
    return tokenizer_fields(model) | named


def _vocabulary_settings(fields: Mapping[str, Field], extra_rows: int) -> dict[str, Any]:
    if extra_rows < 0:
        raise ValueError(f"{extra_rows} extra rows are fewer than none")
    metadata = read_metadata(fields)
    roles = {f"{role}_token_id": metadata.roles.get(role) for role in ("bos", "eos", "pad")}
    return {"vocab_size": len(metadata.tokens) + extra_rows, **roles}


def _documents(fields: Mapping[str, Field], text: Path | None, seed: int) -> Iterator[list[int]]:
    """Token ids of one document after another, without end; each of at least two tokens.

    Raises:
        ValueError: there is no text for this teacher, or none in the file.
    """
    if text is None and read_metadata(fields).tokens[: len(SPECIAL_TOKENS)] != SPECIAL_TOKENS:
        raise ValueError(
            "only the example teacher has text of its own; give --text FILE, or --steps 0"
        )
    tokenizer = build_tokenizer(fields)
    if text is None:
        return _dialogues(tokenizer, seed)
    pieces = [piece.strip() for piece in re.split(r"\n\s*\n", text.read_text(encoding="utf-8"))]
    rows = [
        encoding.ids for encoding in tokenizer.encode_batch_fast([one for one in pieces if one])
    ]
    cut = [row[start : start + LONGEST] for row in rows for start in range(0, len(row), LONGEST)]
    kept = [row for row in cut if len(row) > 1]
    if not kept:
        raise ValueError(
            f"{text} has no text to train on; give a file of documents parted by blank lines"
        )
    return _shuffled(kept, seed)


def _dialogues(tokenizer: Tokenizer, seed: int) -> Iterator[list[int]]:
    rng = random.Random(seed)
    while True:
        texts = [dialogue_text(_turns(rng)) for _ in range(POOL)]
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield encoding.ids[:LONGEST]


def _turns(rng: random.Random) -> list[Turn]:
    """The turns of one dialogue, one or two, all of families that the base is to know."""
    turns: list[Turn] = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        drawn = make_example(rng, held_out=False)
        while drawn.family not in KNOWN:
            drawn = make_example(rng, held_out=False)
        turns.append((drawn.prompt, drawn.answer))
    return turns


def _shuffled(rows: list[list[int]], seed: int) -> Iterator[list[int]]:
    rng = random.Random(seed)
    while True:
        yield from rng.sample(rows, len(rows))


def _batches(documents: Iterator[list[int]], settings: Settings) -> Iterator[list[list[int]]]:
    """Documents of similar length together, in random order."""
    rng = random.Random(settings.seed)
    while True:
        pool = sorted((next(documents) for _ in range(POOL)), key=len)
        batches: list[list[list[int]]] = [[]]
        for row in pool:
            if batches[-1] and (len(batches[-1]) + 1) * len(row) > settings.tokens_per_step:
                batches.append([])
            batches[-1].append(row)
        rng.shuffle(batches)
        yield from batches


def train(model: Any, documents: Iterator[list[int]], settings: Settings) -> list[float]:
    """Train with cross-entropy, in place; returns the loss of every step, in nats per token."""
    model.train()
    model.set_attn_implementation("eager")  # faster than "sdpa" at these lengths
    optimizer = make_optimizer(model, settings)
    losses = []
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # several gain little here, lose much where cores are shared, and change the bytes
    try:
        for step, rows in zip(range(settings.steps), _batches(documents, settings), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            losses.append(_train_step(model, optimizer, rows))
    finally:
        torch.set_num_threads(threads)
    model.eval()
    return losses


def _train_step(model: Any, optimizer: torch.optim.Optimizer, rows: list[list[int]]) -> float:
    inputs, targets = pad_batch(rows)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def make_large(
    folder: Path,
    *,
    teacher: Path | None = None,
    width: int = PHI_WIDTH,
    layers: int = PHI_LAYERS,
    seed: int = 0,
    extra_rows: int = 0,
) -> Path:
    """Write a model of Phi-3.5-mini's shape with random weights in bfloat16, a file for each layer.

    Arguments, result and errors otherwise as for ``make_base``.
    """
    fields = _vocabulary_of(teacher)
    config = phi_config(fields, width=width, layers=layers, extra_rows=extra_rows)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in empty.named_parameters():
        result = re.match(r"model\.layers\.\d+\.", name)
        groups.setdefault(result[0] if result else "", {})[name] = parameter.shape
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, str] = {}
    for number, shapes in enumerate(groups.values(), 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        weights = {name: _random(shape, generator) for name, shape in shapes.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shapes, file)
    total = 2 * sum(math.prod(shape) for shapes in groups.values() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    write_tokenizer_folder(fields, folder)
    return folder


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A norm's weight or a matrix, in bfloat16."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=SPREAD, generator=generator)


def main(
    out: Path,
    kind: Annotated[Kind | None, typer.Option(help="architecture of a small model")] = None,
    shape: Annotated[
        Literal["phi3.5"] | None, typer.Option(help="a real model's, random weights")
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="GGUF file whose vocabulary it gets")] = None,
    width: Annotated[int | None, typer.Option(help="192, or the shape's")] = None,
    layers: Annotated[int | None, typer.Option(help="4, or the shape's")] = None,
    steps: Annotated[
        int | None, typer.Option(help="of training a small model: 200; 0: random")
    ] = None,
    seed: int = 0,
    extra_rows: Annotated[int, typer.Option(help="rows of the embedding that have no token")] = 0,
    text: Annotated[Path | None, typer.Option(help="what a small model is trained on")] = None,
    rope: Annotated[Rope | None, typer.Option(help="of a small phi3: default or longrope")] = None,
) -> None:
    """Write a checkpoint folder with a teacher's vocabulary: a small model (--kind), or a large
    one (--shape)."""
    if (kind is None) == (shape is None):
        raise typer.BadParameter("give one of --kind and --shape")
    sizes = {
        name: size for name, size in (("width", width), ("layers", layers)) if size is not None
    }
    losses: list[float] = []
    try:
        if kind is None:
            small = {"--steps": steps, "--text": text, "--rope": rope}
            if given := [name for name, value in small.items() if value is not None]:
                raise typer.BadParameter(
                    f"{', '.join(given)}: for --kind alone; --shape is not trained"
                )
            make_large(out, teacher=teacher, seed=seed, extra_rows=extra_rows, **sizes)
        else:
            make_base(
                out,
                kind,
                teacher=teacher,
                steps=STEPS if steps is None else steps,
                seed=seed,
                extra_rows=extra_rows,
                text=text,
                rope=rope or "default",
                losses=losses,
                **sizes,
            )
    except (TeacherFileError, TokenizerConversionError, ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    trained = f"; loss {losses[0]:.2f} → {losses[-1]:.2f} nats per token" if losses else ""
    Console().print(f"{out}: {size / 1e6:,.1f} MB{trained}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
