"""A transformers checkpoint folder as a ``Teacher``: bfloat16 on a GPU that has it, else float32.

Letters: N positions over all sequences (a sequence of n tokens has n − 1: its last token is never
fed), V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from stability.precision import has_bfloat16
from teachers.base import (
    Floats,
    GenerationRequest,
    Keep,
    LogitRule,
    Progress,
    Teacher,
    TeacherInfo,
    TeacherShape,
    Tokens,
    no_progress,
    whole_masks,
)
from teachers.errors import RequestRefused, TeacherError
from teachers.gguf.file import TeacherFileError
from teachers.huggingface.checkpoint import load_model
from teachers.huggingface.device import batch_room, free_bytes, teacher_device
from teachers.huggingface.folder import ModelFolder, check_folder
from teachers.huggingface.generation import Decoder, GenerationError, generate
from teachers.huggingface.model import LoadedModel, batches, require_finite
from teachers.huggingface.tokenizer import FolderTokenizer
from teachers.targets.distributions import Arrays
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import Basis
from teachers.targets.stored_arrays import reduce

UNLIMITED = 1 << 20  # context length of a model that states none


def _shape(config: Any) -> TeacherShape:
    """The layers' shape by a model's configuration, as Llama-like models name it."""
    heads = getattr(config, "num_attention_heads", None)
    even = config.hidden_size // heads if type(heads) is int and heads > 0 else None
    rotary = getattr(config, "rope_parameters", None)
    return TeacherShape.from_untrusted(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or even,
        ffn_width=getattr(config, "intermediate_size", None),
        rope_theta=rotary.get("rope_theta") if isinstance(rotary, dict) else None,
        rms_norm_eps=getattr(config, "rms_norm_eps", None),
    )


class HuggingFaceTeacher(Teacher):
    """Runs a local transformers checkpoint. Use as a context manager."""

    def __init__(
        self,
        path: Path,
        *,
        load_in_4bit: bool = False,
        main_gpu: int | None = None,
        batch_tokens: int | None = None,
        sequences: int | None = None,
    ) -> None:
        """Check the folder's files, then load them; ``load_in_4bit``: in NF4 (bitsandbytes).

        ``main_gpu``: none: the process's own. ``batch_tokens`` of a forward pass, ``sequences``
        written together, at most; none: by the memory.

        Raises:
            TeacherFileError: the folder cannot be used; the message says why and what to do.
            SettingRefused: there is no such GPU.
        """
        self.folder: ModelFolder = check_folder(path)
        self.load_in_4bit = load_in_4bit
        self.batch_tokens, self.sequences = batch_tokens, sequences
        device = teacher_device(main_gpu)
        narrow = device.type == "cuda" and has_bfloat16(device)
        dtype = torch.bfloat16 if narrow else torch.float32
        model = load_model(self.folder, device, dtype, load_in_4bit=load_in_4bit)
        try:
            self._loaded: LoadedModel | None = LoadedModel(model)
        except ValueError as error:
            raise TeacherFileError(f"{self.folder.path}: {error}") from None
        self._tokenizer = FolderTokenizer(self.folder, self.model.vocab_size)
        self.info = self._info()

    @property
    def model(self) -> LoadedModel:
        """The checkpoint in memory.

        Raises:
            TeacherError: the teacher was closed.
        """
        if self._loaded is None:
            raise TeacherError(f"{self.folder.path}: this teacher was closed")
        return self._loaded

    def _info(self) -> TeacherInfo:
        model, config = self.model.model, self.model.config
        generation = model.generation_config
        return self._tokenizer.info(
            generation.bos_token_id,
            generation.eos_token_id,
            architecture=model.config.model_type,
            parameters=model.num_parameters(),
            file_bytes=self.folder.weight_bytes,
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            context_length=getattr(config, "max_position_embeddings", None) or UNLIMITED,
            sha256=self.folder.sha256(load_in_4bit=self.load_in_4bit),
            shape=_shape(config),
        )

    def close(self) -> None:
        self._loaded = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- text

    def tokenize(
        self, texts: Sequence[str], *, add_special: bool, parse_special: bool
    ) -> list[Tokens]:
        return self._tokenizer.tokenize(texts, add_special=add_special, parse_special=parse_special)

    def detokenize(self, sequences: Sequence[Tokens]) -> list[str]:
        return self._tokenizer.detokenize(sequences)

    def generate(
        self, request: GenerationRequest, progress: Progress = no_progress
    ) -> list[Tokens]:
        try:
            return generate(
                self.model.model, request, self.info.end_tokens, progress, self.sequences
            )
        except GenerationError as error:
            raise TeacherError(f"{self.folder.path}: {error}") from None

    @property
    def runtime(self) -> str:
        device, kind = self.model.model.device.type, self.model.model.dtype
        return (
            f"transformers {version('transformers')}, torch {version('torch')}"
            + f", {kind} on {device}" * (device != "cpu")
        )

    def memory(self) -> int:
        """See ``Teacher.memory``; the teacher shares this process."""
        return int(psutil.Process().memory_info().rss)

    # -- answers

    def score(
        self,
        sequences: Sequence[Tokens],
        recipe: Recipe,
        bases: Mapping[str, Basis],
        progress: Progress = no_progress,
        keep: Sequence[Keep] | None = None,
    ) -> Arrays:
        bases = {name: basis.to(self.model.model.device) for name, basis in bases.items()}
        needs = {"logits": recipe.needs_logits, "states": recipe.needs_states}

        def arrays(batch: list[Tokens], keep: Sequence[Keep] | None) -> Arrays:
            answer = self.model.answer(batch, **needs, layers=recipe.layers, keep=keep)
            return reduce(answer, recipe, bases)

        return self._rows(sequences, arrays, keep, progress)

    def states(
        self,
        sequences: Sequence[Tokens],
        layers: Sequence[int] = (),
        *,
        keep: Sequence[Keep] | None = None,
    ) -> Mapping[str, Floats]:

        def arrays(batch: list[Tokens], keep: Sequence[Keep] | None) -> Arrays:
            answer = self.model.answer(batch, logits=False, states=True, layers=layers, keep=keep)
            assert answer.states is not None and answer.layers is not None
            named = {f"layer{layer}": answer.layers[layer] for layer in layers}
            named["final"] = answer.states
            return {name: require_finite(values).cpu().numpy() for name, values in named.items()}

        return self._rows(sequences, arrays, keep)

    def logits(
        self,
        sequences: Sequence[Tokens],
        *,
        exact: bool = False,
        keep: Sequence[Keep] | None = None,
    ) -> Floats:
        """See ``Teacher.logits``; they are always as exact as this model computes."""

        def arrays(batch: list[Tokens], keep: Sequence[Keep] | None) -> Arrays:
            answer = self.model.answer(batch, logits=True, states=False, keep=keep)
            assert answer.logits is not None
            return {"logits": require_finite(answer.logits, excluded=True).cpu().numpy()}

        return self._rows(sequences, arrays, keep)["logits"]

    def output_rows(self, start: int, stop: int) -> Floats:
        try:
            return self.model.output_rows(start, stop)
        except ValueError as error:
            raise RequestRefused(str(self.folder.path), str(error)) from None

    def logit_rules(self) -> Sequence[LogitRule]:
        return self.model.logit_rules()

    def _rows(
        self,
        sequences: Sequence[Tokens],
        work: Callable[[list[Tokens], list[Keep] | None], Any],
        keep: Sequence[Keep] | None,
        progress: Progress = no_progress,
    ) -> dict[str, Any]:
        """``work`` on batches of like length; its rows of all sequences, ``[N, …]``, in order."""
        for number, tokens in enumerate(sequences):
            self._check(number, tokens)
        lengths = [len(tokens) - 1 for tokens in sequences]
        masks = whole_masks(sequences, keep)
        counts = [int(mask.sum()) for mask in masks]
        starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        result: dict[str, Any] = {}
        done = 0
        model = self.model
        free = free_bytes(model.model.device)
        room = batch_room(model.config, model.vocab_size, max(lengths, default=1), free)
        room = self.batch_tokens or room
        for batch in batches(lengths, room):
            try:
                some = None if keep is None else [masks[index] for index in batch]
                arrays = work([sequences[index] for index in batch], some)
            except ValueError as error:
                raise TeacherError(f"{self.folder.path}: {error}") from None
            taken = 0
            for index in batch:
                for name, values in arrays.items():
                    if name not in result:
                        result[name] = np.empty((int(starts[-1]), *values.shape[1:]), values.dtype)
                    part = values[taken : taken + counts[index]]
                    result[name][starts[index] : starts[index + 1]] = part
                taken += counts[index]
            done += sum(lengths[index] for index in batch)
            progress(done)
        return result

    def _check(self, number: int, tokens: Tokens) -> None:
        info, what = self.info, f"{self.folder.path}: sequence {number} has"
        if len(tokens) < 2:
            raise TeacherError(f"{what} {len(tokens)} tokens, needs at least 2")
        if len(tokens) - 1 > info.context_length:
            raise TeacherError(
                f"{what} {len(tokens)} tokens, more than the context of {info.context_length}; "
                "make sequences shorter"
            )
        if tokens.min() < 0 or tokens.max() >= info.vocab_size:
            raise TeacherError(
                f"{what} tokens from {tokens.min()} to {tokens.max()}, the vocabulary is 0 to "
                f"{info.vocab_size - 1}; were they made with this teacher's tokenizer?"
            )

    def speed(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        model, first = self.model.model, 0 if self.info.bos is None else self.info.bos
        prompt = torch.full((1, prompt_tokens), first, dtype=torch.int64)
        one = torch.ones(1, 1, dtype=torch.int64)
        Decoder(model).feed(prompt[:, :1], one)  # allocates; not timed
        decoder = Decoder(model)
        start = time.perf_counter()
        row = decoder.feed(prompt, torch.ones_like(prompt))
        middle = time.perf_counter()
        for _ in range(new_tokens):
            row = decoder.feed(torch.tensor([[int(row[0].argmax())]]), one)
        end = time.perf_counter()
        return prompt_tokens / (middle - start), new_tokens / (end - middle)
