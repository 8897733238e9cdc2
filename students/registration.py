"""Register SO8T with transformers on ``import students``, without importing transformers.

``AutoModelForCausalLM.from_pretrained`` then loads a student, whichever of the two was imported
first. Registering needs transformers and PyTorch, which take seconds to import, and much of this
package does without them. So a finder on ``sys.meta_path`` waits for the import of transformers and
then imports the decoder, which registers itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

DECODER = "students.model.decoder"
AWAITED = "transformers"
# Modules of this package are awaited too: where one of them imports transformers, the decoder,
# which may need it, has to wait until it is complete.
OURS = "students."


def register_with_transformers() -> None:
    """Import the decoder now if transformers is there already, else as soon as it is."""
    if AWAITED in sys.modules:
        importlib.import_module(DECODER)
    elif not any(isinstance(finder, _Awaiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiting())


class _Awaiting(MetaPathFinder):
    """Finds the awaited modules through the other finders; stays until they are imported."""

    def __init__(self) -> None:
        self.unfinished = 0  # awaited modules that are being imported, one within the other

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec, with a loader that registers the decoder."""
        if fullname != AWAITED and not fullname.startswith(OURS):
            return None
        others = [one for one in sys.meta_path if one is not self and hasattr(one, "find_spec")]
        specs = (one.find_spec(fullname, path, target) for one in others)
        spec = next((one for one in specs if one is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            self.unfinished += 1
            try:
                execute(module)
            finally:
                self.unfinished -= 1
            if self.unfinished == 0 and AWAITED in sys.modules:
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
                importlib.import_module(DECODER)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
