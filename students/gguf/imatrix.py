"""The importance matrix of llama.cpp's quantizer: the mean square of each matrix column's input.

Columns that count more are rounded more exactly. The statistics are those of ``llama-imatrix`` (sum
of squares over tokens, and the tokens), in the same GGUF format, so that the file works with
``llama-quantize --imatrix`` too. PyTorch, which computes the same products, takes them by hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from numerics.precision import float64
from students.gguf.architectures import EMBEDDING, OUTPUT
from students.gguf.metadata import small_gguf

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """Sums of squares ``[columns]`` float64 by the matrix's name in the GGUF file, over ``tokens``
    tokens of ``sequences`` sequences."""

    sums: dict[str, NDArray[np.float64]]
    tokens: int
    sequences: int

    def mean_squares(self) -> dict[str, NDArray[np.float32]]:
        """What the quantizer takes, to the bit as the file gives it back."""
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
            ids = torch.from_numpy(sequence.astype(np.int64))[None]
            model(ids.to(model.device), use_cache=False)
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
        rows = float64(inputs[0].detach().reshape(-1, len(total)))
        total[:] += rows.square().sum(dim=0).cpu().numpy()

    return add


def write_importance(importance: Importance, path: Path, datasets: Sequence[str]) -> None:
    """Write it as ``llama-imatrix`` does; ``datasets``: where the tokens are from.

    Raises:
        OSError: the disk refuses.
    """
    # This kind of file has no architecture, and an empty text is not written.
    with small_gguf(path, "") as writer:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(datasets))
        writer.add_uint32("imatrix.chunk_count", importance.sequences)
        length = max(1, round(importance.tokens / importance.sequences))
        writer.add_uint32("imatrix.chunk_size", length)
        for name, values in sorted(importance.sums.items()):
            writer.add_tensor(name + SUMS, values.astype(np.float32)[None])
            writer.add_tensor(name + COUNTS, np.full((1, 1), importance.tokens, dtype=np.float32))


def read_mean_squares(tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The mean squares in the tensors of such a file.

    Raises:
        ValueError: it is something else, or has values that are no mean squares.
    """
    result = {}
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
        result[matrix] = values.astype(np.float32)
    if not result:
        raise ValueError(f"no tensor *{SUMS}")
    return result
