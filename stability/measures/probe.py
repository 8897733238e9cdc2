"""What a model does with some fixed text: figures that show a collapse which the loss may hide.

``ModuleProbe`` takes them from any module through forward hooks; a caller that knows its model may build readings of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stability.measures.spectrum import effective_rank, fast_singular_values
from stability.measures.step import dead_units, output_figures

ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.SiLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.Mish,
    nn.Hardswish,
    nn.Softplus,
    nn.Sigmoid,
    nn.Tanh,
)


def hidden_rank(states: Tensor) -> float:
    """Effective rank of states ``[n, D]`` around their mean: near 0 where all positions look alike."""
    centred = states.float() - states.float().mean(dim=0)
    return float(effective_rank(fast_singular_values(centred)))


@dataclass(frozen=True)
class ProbeReading:
    """Figures on the fixed text. ``information`` and ``output_entropy`` in nats (see ``stability.measures.step``); ``loss``:
    whatever says how wrong the model is there; ``hidden_rank``: effective rank of a module's output;
    ``attention_entropy``: as a share of the most possible; ``dead_units``: as a share of all."""

    information: float
    output_entropy: float
    loss: float | None = None
    hidden_rank: dict[str, float] = field(default_factory=dict)
    attention_entropy: dict[str, float] = field(default_factory=dict)
    dead_units: dict[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """All of it by name, such as ``hidden_rank:layers.0``."""
        found = {"information": self.information, "output_entropy": self.output_entropy}
        if self.loss is not None:
            found["loss"] = self.loss
        for kind in ("hidden_rank", "attention_entropy", "dead_units"):
            found |= {f"{kind}:{name}": value for name, value in getattr(self, kind).items()}
        return found


Probe = Callable[[], ProbeReading]


class ModuleProbe:
    """Readings of any module.

    ``run``: calls the model on the fixed input and returns its logits ``[..., V]``, or those and a loss.
    Hidden states are the outputs of the members of every ``nn.ModuleList`` and ``nn.Sequential`` named in ``hidden``
    (none: all there are), units those that an activation module puts out.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[], Tensor | tuple[Tensor, Tensor]],
        hidden: tuple[str, ...] = (),
    ) -> None:
        self.model, self.run = model, run
        lists = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList | nn.Sequential) and (not hidden or name in hidden)
        ]
        self._hidden = {
            f"{name}.{key}".lstrip("."): one for name, many in lists for key, one in many.named_children()
        }
        self._units = {name: one for name, one in model.named_modules() if isinstance(one, ACTIVATIONS)}

    @torch.no_grad()
    def __call__(self) -> ProbeReading:
        """Run the model in evaluation mode, without gradients, and read it."""
        outputs: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, _: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                outputs[module] = rows(tensor)

        with ExitStack() as stack:
            for module in {*self._hidden.values(), *self._units.values()}:
                stack.callback(module.register_forward_hook(keep).remove)
            stack.enter_context(evaluating(self.model))
            result = self.run()
        logits, loss = result if isinstance(result, tuple) else (result, None)
        information, entropy = output_figures(rows(logits))
        return ProbeReading(
            information=float(information),
            output_entropy=float(entropy),
            loss=None if loss is None else float(loss),
            hidden_rank={
                name: hidden_rank(outputs[one]) for name, one in self._hidden.items() if one in outputs
            },
            dead_units={
                name: float(dead_units(outputs[one])) for name, one in self._units.items() if one in outputs
            },
        )


def rows(tensor: Tensor) -> Tensor:
    """``[..., D]`` as ``[n, D]``."""
    return tensor.detach().reshape(-1, tensor.shape[-1])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode meanwhile; afterwards every part is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
