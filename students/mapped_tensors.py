"""Tensors in a temporary file instead of main memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as PyTorch aligns what it allocates


class MappedTensors:
    """Copies of tensors, written one after another to a file that has no name, and mapped where
    they are used: the system keeps of them in main memory what there is room for.

    Use as a context manager. The file's space is free again once the last of its tensors is gone.
    """

    def __init__(self, folder: Path) -> None:
        """``folder``: on whose disk the file is."""
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by ``__exit__``)

    def __enter__(self) -> MappedTensors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor's copy, on the CPU; changes to it stay in memory.

        Raises:
            OSError: the disk refuses.
        """
        values = tensor.detach().cpu().contiguous()
        shape, dtype = values.shape, values.dtype
        start = -(-self._file.seek(0, 2) // ALIGNMENT) * ALIGNMENT
        self._file.seek(start)
        try:
            self._file.write(values.flatten().view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            error.filename = error.filename or str(self._folder)  # a failing write() does not say
            raise
        mapped = np.memmap(self._file, np.uint8, "c", start, (values.nbytes,))
        return torch.from_numpy(mapped).view(dtype).view(shape)
