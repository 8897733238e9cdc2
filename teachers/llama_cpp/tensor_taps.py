"""Reading tensors out of llama.cpp's graph while it computes, and stopping it early.

llama.cpp calls back before each tensor of the graph is computed (``ask``: is it wanted?) and again
when a wanted one is there. Answering false the second time ends the computation of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable

import llama_cpp.llama_cpp as native
import numpy as np
from numpy.typing import NDArray

from teachers.llama_cpp.library.ggml import ggml_base

FINAL_STATE = "result_norm"  # llama.cpp's name for the hidden state after the last norm
TYPE_F32 = 0


def layer_output(layer: int) -> str:
    """llama.cpp's name for what a layer hands to the next."""
    return f"l_out-{layer}"


class TensorTaps:
    """Collects named tensors of width D for one context."""

    def __init__(self, names: Iterable[str], width: int, *, stop_after: str | None = None) -> None:
        """``stop_after``: nothing beyond this tensor is computed."""
        self.names = {name.encode() for name in names}
        self.width = width
        self.stop_after = stop_after.encode() if stop_after else None
        self._pieces: dict[bytes, list[NDArray[np.float32]]] = {}
        self.error: str | None = None
        self.callback = native.ggml_backend_sched_eval_callback(self._called)

    def _called(self, tensor: int, ask: bool, _: int) -> bool:
        name = ggml_base.ggml_get_name(tensor)
        if name not in self.names:
            return not ask
        if ask:
            return True
        size = int(ggml_base.ggml_nbytes(tensor))
        if size % (4 * self.width):
            self.error = (
                f"tensor {name.decode()} has {size} bytes, not rows of {self.width} float32"
            )
            return False
        rows = np.empty((size // (4 * self.width), self.width), dtype=np.float32)
        ggml_base.ggml_backend_tensor_get(tensor, rows.ctypes.data, 0, size)
        self._pieces.setdefault(name, []).append(rows)
        return name != self.stop_after

    def take(self, name: str, wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        """The rows ``[n, D]`` of a tensor since it was last taken, of those ``wanted``: in the last
        layer llama.cpp itself drops the others."""
        pieces = self._pieces.pop(name.encode(), [])
        rows = np.concatenate(pieces) if pieces else np.empty((0, self.width), dtype=np.float32)
        return rows[wanted] if len(rows) == len(wanted) else rows

    def clear(self) -> None:
        """Forget everything collected."""
        self._pieces.clear()
        self.error = None
