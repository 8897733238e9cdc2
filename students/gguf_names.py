"""The one table between a folded student's tensor names and GGUF's, in both directions."""

from __future__ import annotations

import re

_TABLE = (
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
    ("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    ("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    ("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    ("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    ("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    ("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    ("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    ("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    ("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
)


class UnmappedTensor(KeyError):
    """A tensor name that the table does not know: exporting without it would lose weights silently."""

    def __str__(self) -> str:
        return str(self.args[0])


def to_gguf_name(name: str) -> str:
    """GGUF name of a folded student's tensor.

    Raises:
        UnmappedTensor: the table has no such name.
    """
    return _translate(name, [(ours, theirs) for ours, theirs in _TABLE])


def from_gguf_name(name: str) -> str:
    """The folded student's name of a GGUF tensor.

    Raises:
        UnmappedTensor: the table has no such name.
    """
    return _translate(name, [(theirs, ours) for ours, theirs in _TABLE])


def _translate(name: str, table: list[tuple[str, str]]) -> str:
    for source, target in table:
        pattern = re.escape(source).replace(r"\{\}", r"(0|[1-9]\d*)")
        if match := re.fullmatch(pattern, name):
            return target.format(*match.groups())
    raise UnmappedTensor(f"tensor {name!r} has no counterpart in the GGUF name table")
