"""A loaded transformers model's answer: logits, final states, outputs of chosen layers.

Letters: B sequences of one forward pass, T fed tokens of the longest, N positions of all, V
vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from numerics.precision import ieee_float32
from teachers.base import Floats, Keep, LogitRule, Tokens
from teachers.targets.stored_arrays import Answer

HEAD_ROWS = 8192  # of the output matrix, in float32 together
PADDING = 0  # any token: it is masked, and no position before it sees it
# Settings by which architectures change logits after the output matrix.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap")
PROBE_TOKENS = 8  # of the text on which a model is tried
PROBE_ERROR = 1e-3  # of the largest logit: what is more is no rounding


class FloatHead(nn.Module):
    """An output layer in float32: in bfloat16 a logit of 20 would be rounded to eighths."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.out_features: int = head.out_features

    @ieee_float32()
    def forward(self, states: Tensor) -> Tensor:
        """``[..., D]`` → ``[..., V]``, float32."""
        states = states.float()
        logits = states.new_empty(*states.shape[:-1], self.out_features)
        for start in range(0, self.out_features, HEAD_ROWS):
            rows = self.weight[start : start + HEAD_ROWS].float()
            logits[..., start : start + len(rows)] = states @ rows.T
        return logits if self.bias is None else logits.add_(self.bias.float())


class LoadedModel:
    """A causal language model and its parts."""

    def __init__(self, model: Any) -> None:
        """Find the parts.

        Raises:
            ValueError: the model sees tokens to come.
        """
        self.model = model
        self.config = model.config.get_text_config()
        self.head: Any = model.get_output_embeddings()
        if self.head.weight.dtype in (torch.bfloat16, torch.float16):
            self.head = FloatHead(self.head)
            model.set_output_embeddings(self.head)
        self.vocab_size = int(self.head.out_features)
        self.layers = _decoder_layers(model, self.config.num_hidden_layers)
        self._require_causal()

    def _require_causal(self) -> None:
        """An encoder loads as if it were causal; its answers would know what they predict."""
        probe = np.arange(PROBE_TOKENS + 1, dtype=np.int32) % self.vocab_size
        other = probe.copy()
        other[-2] = (other[-2] + 1) % self.vocab_size  # the last token that is fed
        logits = self.answer([probe, other], logits=True, states=False).logits
        assert logits is not None
        one, two = logits.view(2, PROBE_TOKENS, -1)[:, :-1]
        if float((one - two).abs().max()) > PROBE_ERROR * float(one.abs().max()):
            raise ValueError(
                f"a {self.model.config.model_type} model with this configuration sees tokens to "
                "come; give one that predicts the next token from those before it"
            )

    def answer(
        self,
        batch: Sequence[Tokens],
        *,
        logits: bool,
        states: bool,
        layers: Sequence[int] = (),
        keep: Sequence[Keep] | None = None,
    ) -> Answer:
        """The model's answer about every position of ``batch`` (each of at least two tokens), or
        those that the masks ``keep`` want, on the model's device.

        Without ``logits`` the output layer is not computed.

        Raises:
            ValueError: a layer that does not exist.
        """
        for layer in layers:
            if not 0 <= layer < len(self.layers):
                raise ValueError(
                    f"layer {layer} does not exist; the teacher's are 0 to {len(self.layers) - 1}"
                )
        device = self.model.device
        tokens, mask = (part.to(device) for part in padded([one[:-1] for one in batch]))
        given = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
        wanted = (mask if keep is None else padded(keep)[0].to(device)).bool()
        only = None if keep is None else wanted
        with torch.no_grad(), self._hooked(layers, final=states and logits, only=only) as outputs:
            if logits:
                outputs["logits"] = self.model(**given).logits
            else:
                outputs["final"] = self.model.base_model(**given).last_hidden_state

        def rows(name: str) -> Tensor:
            values = outputs[name]
            alone = name == "logits" and only is not None
            return (values[0] if alone else values[wanted]).float()  # [N, …] without padding

        return Answer(
            logits=rows("logits") if logits else None,
            states=rows("final") if states else None,
            layers={layer: rows(f"layer{layer}") for layer in layers},
        )

    @contextmanager
    def _hooked(
        self, layers: Sequence[int], *, final: bool, only: Tensor | None
    ) -> Iterator[dict[str, Tensor]]:
        """Keep outputs of chosen layers, before the final norm, and the output layer's input; give
        that layer the positions ``only [B, T]`` alone, as one sequence."""
        outputs: dict[str, Tensor] = {}

        def keep_output(name: str) -> Any:
            def hook(module: nn.Module, given: Any, output: Any) -> None:
                outputs[name] = output[0] if isinstance(output, tuple) else output

            return hook

        def keep_input(module: nn.Module, given: Any) -> None:
            outputs["final"] = given[0]

        handles = [self.layers[i].register_forward_hook(keep_output(f"layer{i}")) for i in layers]
        if final:
            handles.append(self.head.register_forward_pre_hook(keep_input))
        if only is not None:
            handles.append(
                self.head.register_forward_pre_hook(lambda _, given: (given[0][only][None],))
            )
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def output_rows(self, start: int, stop: int) -> Floats:
        """Rows of the output matrix, float32 ``[stop − start, D]``.

        Raises:
            ValueError: the output layer has a bias, or its matrix is quantized.
        """
        bias, kind = getattr(self.head, "bias", None), self.head.weight.dtype
        if bias is not None or not kind.is_floating_point:
            raise ValueError(
                f"its output layer is no plain matrix (bias: {bias is not None}, {kind}); use "
                "--targets compact --set targets.sketch_bytes=0, or --targets dense"
            )
        rows: Floats = self.head.weight[start:stop].float().cpu().numpy()
        return rows

    def logit_rules(self) -> list[LogitRule]:
        """What the settings may mean for the product with that matrix."""
        scale, cap = (
            next((value for name in names if (value := getattr(self.config, name, None))), None)
            for names in (SCALES, CAPS)
        )
        return LogitRule.candidates(scale, cap)


def _decoder_layers(model: Any, count: int) -> list[nn.Module]:
    """The decoder's layers in order; empty where they cannot be identified."""
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def padded(
    sequences: Sequence[Sequence[int] | Tokens | Keep], *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens and their mask, both int64 ``[B, T]``; ``left``: the sequences' ends are flush."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), PADDING, dtype=torch.int64)
    mask = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, tokens in enumerate(sequences):
        start = longest - len(tokens) if left else 0
        ids[row, start : start + len(tokens)] = torch.from_numpy(np.array(tokens, dtype=np.int64))
        mask[row, start : start + len(tokens)] = 1
    return ids, mask


def batches(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Sequences that share a forward pass of at most ``room`` padded tokens, longest first."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= room:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def require_finite(values: Tensor, *, excluded: bool = False) -> Tensor:
    """``values``, which must be finite; ``excluded`` tokens may have a logit of −∞."""
    broken = torch.isnan(values) | torch.isposinf(values) if excluded else ~torch.isfinite(values)
    if bool(broken.any()):
        raise ValueError("the teacher's answer is not finite; its weights are damaged")
    return values
