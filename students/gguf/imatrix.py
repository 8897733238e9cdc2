"""How much each column of a student's matrices matters, for llama.cpp's quantizer: its importance
matrix.

A quantizer that knows the mean square of what a column is multiplied with rounds the columns that
count more exactly. The figures are those of ``llama-imatrix`` (sum of squares over tokens, and the
tokens), in the same GGUF format, so that the file works with ``llama-quantize --imatrix`` too. They
are taken with PyTorch, which needs no hold on llama.cpp's graph: both compute the same products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

SUMS, COUNTS = ".in_sum2", ".counts"
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Importance:
    """Sums of squares ``[columns]`` float64 by the matrix's name in the GGUF file, over ``tokens``
    tokens of ``sequences`` sequences."""

    sums: dict[str, NDArray[np.float64]]
    tokens: int
    sequences: int

    def mean_squares(self) -> dict[str, NDArray[np.float32]]:
        """What the quantizer takes: the mean square of each column's input, to the bit as the
        file gives it back."""
        tokens = np.float32(self.tokens)
        return {name: values.astype(np.float32) / tokens for name, values in self.sums.items()}


@torch.no_grad()
def measure_importance(
    model: PreTrainedModel,
    sequences: Iterable[NDArray[np.int32]],
    gguf_name: Callable[[str], str],
    progress: Callable[[int], None] = lambda done: None,
) -> Importance:
    """Run ``model`` over token sequences (of ≥ 1 token each, one sequence at least).

    ``gguf_name``: from the name of a weight to its name in the file. An output matrix that is the
    embedding goes by the embedding's name, as in the file. ``progress`` gets the sequences done.
    """
    settings: Any = model.config
    sums: dict[str, NDArray[np.float64]] = {}
    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        theirs = gguf_name(f"{name}.weight")
        if theirs == OUTPUT and settings.tie_word_embeddings:
            theirs = EMBEDDING
        sums[theirs] = np.zeros(module.in_features)
        handles.append(module.register_forward_pre_hook(_adder(sums[theirs])))
    tokens = done = 0
    try:
        for sequence in sequences:
            model(
                torch.from_numpy(sequence.astype(np.int64))[None].to(model.device), use_cache=False
            )
            tokens += len(sequence)
            done += 1
            progress(done)
    finally:
        for handle in handles:
            handle.remove()
    return Importance(sums, tokens, done)


def _adder(total: NDArray[np.float64]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds the squares of a layer's input to ``total``."""

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().reshape(-1, len(total)).double()
        total[:] += rows.square().sum(dim=0).cpu().numpy()

    return add


def write_importance(importance: Importance, path: Path, datasets: Sequence[str]) -> None:
    """Write it as ``llama-imatrix`` does; ``datasets``: where the tokens are from, in words.

    Raises:
        OSError: the disk refuses.
    """
    writer = GGUFWriter(
        path, ""
    )  # this kind of file has no architecture, and an empty text is not written
    try:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(datasets))
        writer.add_uint32("imatrix.chunk_count", importance.sequences)
        writer.add_uint32(
            "imatrix.chunk_size", max(1, round(importance.tokens / importance.sequences))
        )
        for name, values in sorted(importance.sums.items()):
            writer.add_tensor(name + SUMS, values.astype(np.float32)[None])
            writer.add_tensor(name + COUNTS, np.full((1, 1), importance.tokens, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_mean_squares(tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The mean squares in the tensors of such a file.

    Raises:
        ValueError: it is something else, or has figures that are no mean squares.
    """
    found = {}
    for name, sums in tensors.items():
        if not name.endswith(SUMS):
            continue
        matrix = name.removesuffix(SUMS)
        counts = tensors.get(matrix + COUNTS)
        if counts is None or counts.size != 1 or not counts.reshape(-1)[0] > 0:
            raise ValueError(f"{matrix}: no count of tokens")
        values = sums.reshape(-1) / counts.reshape(-1)[0]
        if not bool(np.isfinite(values).all()) or bool((values < 0).any()):
            raise ValueError(f"{matrix}: values that are no mean squares")
        found[matrix] = values.astype(np.float32)
    if not found:
        raise ValueError(f"no tensor *{SUMS}")
    return found
