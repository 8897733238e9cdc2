"""The whole SO8T decoder: a Llama whose attention output passes through two exact SO(8) rotations.

Letters: B batch, T tokens, V vocabulary, D width, H heads, K key/value heads, W head width, G = 8,
N = H·W / G blocks. In every layer the attention output x is gated as y = R_cmd · (R_safe · x); both
rotations are applied to the output projection once per step (W_o · blockdiag(R_cmd R_safe)), so a
gate costs nothing per token, and folding it away at export is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from stability.precision import full_precision
from students.model import so8
from students.model.config import SO8TConfig
from students.model.gate import SO8Gate
from students.model.heads import VerificationHead
from students.model.interface import SO8TOutput, Student
from students.model.packing import BlockAttention, PackedRow, attend_packed, has_bfloat16_products
from students.model.safety_head import SafetyHead, shape_of

# Tokens up to which attention is computed without a fused kernel on a CPU (docs/benchmarks.md)
SHORT_ON_CPU = 256
Mask = Tensor | PackedRow | None
"""What each token may look at beside what stands before it: nothing more to say for ``None``."""


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of ``x [..., D]``; the result keeps the dtype of ``x``."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            normed: Tensor = _RMSNormOnCpu.apply(x, self.weight, self.eps)
            return normed
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class _RMSNormOnCpu(torch.autograd.Function):
    """The same in half of the passes over the tokens that PyTorch's takes there, where it has no
    kernel of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x, ctx.dtype = x.to(wide), x.dtype
        mean_square = torch.linalg.vecdot(x, x).div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()[..., None]
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return (unit * weight.to(wide)).to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, inverse, weight = ctx.saved_tensors
        grad, gain = grad.to(unit.dtype), weight.to(unit.dtype)
        along = grad * unit
        of_weight = along.flatten(0, -2).sum(dim=0).to(weight.dtype)
        radial = (along @ gain).div_(unit.shape[-1])[..., None]
        of_x = (grad * gain).addcmul_(unit, radial, value=-1.0).mul_(inverse)
        return of_x.to(ctx.dtype), of_weight, None


def rotary_tables(config: SO8TConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[…, W]`` of rotary embeddings (Su et al. 2021) at ``positions […]``.

    Half-split layout.
    """
    width = config.head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angles = positions[..., None].float() * config.rope_theta**-exponents
    both = torch.cat((angles, angles), dim=-1)
    return both.cos(), both.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + W/2) of ``x [B, H, T, W]`` by the angles of its positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, grouped: bool
) -> Tensor:
    """Scaled dot-product attention of ``[B, H, T, W]`` over ``[B, K, T', W]``.

    On a CPU at least in float32 (PyTorch's bfloat16 kernel there takes several times as long), and
    for short sequences by two plain products, which are no slower. Where a processor multiplies
    bfloat16, plain products of it are the fastest.
    """
    inputs = (query, key, value)
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": causal, "enable_gqa": grouped}
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(*inputs, **options)
    narrow = query.dtype == torch.bfloat16 and has_bfloat16_products()
    if narrow and causal and mask is None and not torch.compiler.is_compiling():
        result: Tensor = BlockAttention.apply(*inputs)
        return result
    if query.dtype == torch.bfloat16:
        inputs = (query.float(), key.float(), value.float())
    kernels = [SDPBackend.MATH]
    if key.shape[2] > SHORT_ON_CPU:
        kernels.insert(0, SDPBackend.FLASH_ATTENTION)
    with full_precision(query), sdpa_kernel(kernels):
        mixed = F.scaled_dot_product_attention(*inputs, **options)
    return mixed.to(query.dtype)


class Attention(nn.Module):
    """Grouped-query causal attention whose output projection carries the SO(8) gate."""

    def __init__(self, config: SO8TConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width, key_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, config.attention_width, bias=False)
        self.k_proj = nn.Linear(width, key_width, bias=False)
        self.v_proj = nn.Linear(width, key_width, bias=False)
        self.o_proj = nn.Linear(config.attention_width, width, bias=False)
        self.gate = SO8Gate(config.num_blocks)
        self.grouped = config.num_key_value_heads != config.num_attention_heads

    def gated_output_weight(self, rotations: Tensor) -> Tensor:
        """W_o · blockdiag(R_cmd R_safe) ``[D, H·W]``, float32, from ``rotations [2, N, 8, 8]``."""
        with full_precision(rotations):
            return so8.rotate_columns(self.o_proj.weight, rotations[1] @ rotations[0])

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Attend over ``x [B, T, D]``; returns the gated output ``[B, T, D]`` and the rotations."""
        batch, tokens, _ = x.shape
        split = (batch, tokens, -1, self.head_dim)
        query = apply_rotary(self.q_proj(x).view(split).transpose(1, 2), *rotary)
        key = apply_rotary(self.k_proj(x).view(split).transpose(1, 2), *rotary)
        value = self.v_proj(x).view(split).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        if isinstance(mask, PackedRow):
            mixed = attend_packed(query, key, value, mask)
        else:
            # A plain bool: torch.compile would hand a symbolic one to the kernel, which refuses it.
            causal = True if mask is None and tokens > 1 and key.shape[2] == tokens else False  # noqa: SIM210
            mixed = attend(query, key, value, mask, causal, self.grouped)
        rotations = self.gate()
        weight = self.gated_output_weight(rotations).to(self.o_proj.weight.dtype)
        return F.linear(mixed.transpose(1, 2).flatten(2), weight), rotations


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x))."""

    def __init__(self, config: SO8TConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of ``x [B, T, D]`` on its own."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual layer: gated attention, then feed-forward."""

    def __init__(self, config: SO8TConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Return the layer's output ``[B, T, D]`` and the rotations its gate used."""
        attended, rotations = self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), rotations


class SO8TModel(nn.Module):
    """Embedding, layers and final norm, named as in transformers' Llama (see ``fold``)."""

    def __init__(self, config: SO8TConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class SO8TForCausalLM(PreTrainedModel, GenerationMixin, Student):
    """The SO8T student as transformers knows a model: saves, loads, generates."""

    config: SO8TConfig
    config_class = SO8TConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    packs = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' API)
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012

    def __init__(self, config: SO8TConfig) -> None:
        super().__init__(config)
        self.model = SO8TModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Last, and with nothing drawn yet, so that the other weights of a seed are the same with
        # and without them.
        with torch.random.fork_rng(devices=[]):
            if config.safety_head:
                self.safety_head = SafetyHead(config.hidden_size, shape_of(config.safety_shape))
            if config.verification_head:
                self.verification_head = VerificationHead(config.hidden_size)
        self.post_init()  # type: ignore[operator]  # of transformers

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize a module; residual outputs are scaled down by depth (Radford et al. 2019)."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, SO8Gate):
            nn.init.normal_(module.safety, std=self.config.rotation_init_std)
            nn.init.normal_(module.command, std=self.config.rotation_init_std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, DecoderLayer):
            residual_std = std / (2 * self.config.num_hidden_layers) ** 0.5
            nn.init.normal_(module.self_attn.o_proj.weight, std=residual_std)
            nn.init.normal_(module.mlp.down_proj.weight, std=residual_std)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **outputs: Any,  # ``Outputs``; transformers' generate adds others
    ) -> SO8TOutput:
        layers_to_keep = outputs.get("layers_to_keep", ())
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        x = self.model.embed_tokens(input_ids)
        mask: Mask = None
        if (lengths := outputs.get("lengths")) is not None:
            mask = PackedRow(lengths)
            if position_ids is None:
                position_ids = mask.positions().to(x.device)
        elif position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        if attention_mask is not None or (past and x.shape[1] > 1):
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        cos, sin = rotary_tables(self.config, position_ids)
        rotary = (cos[:, None], sin[:, None])  # one table for all heads
        rotations = []
        kept: dict[int, Tensor] = {}
        for number, layer in enumerate(self.model.layers):
            x, layer_rotations = layer(x, rotary, mask, past_key_values)
            rotations.append(layer_rotations)
            if number in layers_to_keep:
                kept[number] = x
        x = self.model.norm(x)
        last = x[:, -logits_to_keep:]  # all of them for 0
        return SO8TOutput(
            logits=self.lm_head(last) if outputs.get("with_logits", True) else None,
            past_key_values=past_key_values,
            last_hidden_state=x,
            rotations=torch.stack(rotations),
            layer_states=kept or None,
        )

    def rotations(self) -> Tensor:
        return torch.stack([gate() for gate in self.gates()])

    def gates(self) -> list[SO8Gate]:
        return [module for module in self.modules() if isinstance(module, SO8Gate)]

    def layers(self) -> nn.ModuleList:
        return self.model.layers

    def output_matrix(self) -> Tensor:
        return self.lm_head.weight

    def own_weights(self) -> dict[str, Tensor]:
        """All weights; a tied output matrix is left out, as it is the embedding."""
        weights: dict[str, Tensor] = self.state_dict()
        if self.config.tie_word_embeddings:
            weights.pop("lm_head.weight")
        return weights


# ``students.registration`` sees that this module is imported when transformers is.
AutoConfig.register("so8t", SO8TConfig)
AutoModelForCausalLM.register(SO8TConfig, SO8TForCausalLM)
