"""Readings of a model on a probe text, which show a collapse that the loss may hide.

``ModuleProbe`` reads any module through forward hooks; a caller may build readings of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stability.measures.activations import dead_units, hidden_rank, output_stats

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Hardswish)
ACTIVATIONS = (*RECTIFIERS, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh)


@dataclass(frozen=True)
class ProbeReading:
    """Statistics on the probe text.

    ``information`` and ``output_entropy``: see ``output_stats``; ``loss``: any loss there;
    ``hidden_rank``: effective rank of a module's output; ``attention_entropy``: divided by its
    maximum; ``dead_units``: as a share of all.
    """

    information: float
    output_entropy: float
    loss: float | None = None
    hidden_rank: dict[str, float] = field(default_factory=dict)
    attention_entropy: dict[str, float] = field(default_factory=dict)
    dead_units: dict[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """All values by name, such as ``hidden_rank:layers.0``."""
        values: dict[str, float] = {}
        for kind, value in vars(self).items():
            if isinstance(value, dict):
                values |= {f"{kind}:{name}": one for name, one in value.items()}
            elif value is not None:
                values[kind] = value
        return values


Probe = Callable[[], ProbeReading]


class ModuleProbe:
    """Reads any module.

    ``run``: calls the model on the probe text and returns its logits ``[..., V]``, or those and a
    loss. Hidden states are the outputs of the members of every ``nn.ModuleList`` and
    ``nn.Sequential`` named in ``hidden`` (default: all), units the outputs of activation modules.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[], Tensor | tuple[Tensor, Tensor]],
        *,
        hidden: tuple[str, ...] = (),
    ) -> None:
        self.model, self.run = model, run
        lists = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList | nn.Sequential) and (not hidden or name in hidden)
        ]
        children = [(name, *child) for name, many in lists for child in many.named_children()]
        self._hidden = {f"{name}.{key}".lstrip("."): one for name, key, one in children}
        modules = model.named_modules()
        self._units = {name: one for name, one in modules if isinstance(one, ACTIVATIONS)}

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
        information, entropy = output_stats(rows(logits))
        hidden = {name: outputs[one] for name, one in self._hidden.items() if one in outputs}
        units = {name: outputs[one] for name, one in self._units.items() if one in outputs}
        return ProbeReading(
            information=float(information),
            output_entropy=float(entropy),
            loss=None if loss is None else float(loss),
            hidden_rank={name: hidden_rank(states) for name, states in hidden.items()},
            dead_units={name: float(dead_units(values)) for name, values in units.items()},
        )


def rows(tensor: Tensor) -> Tensor:
    """``[..., D]`` as ``[n, D]``."""
    return tensor.detach().reshape(-1, tensor.shape[-1])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and every module back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
