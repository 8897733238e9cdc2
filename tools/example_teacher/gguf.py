"""Writes the example teacher as a GGUF file of the ``phi3`` architecture of llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import Phi3Config, Phi3ForCausalLM

from tools.example_teacher.tokenizer import BOS_ID, CHAT_TEMPLATE, EOS_ID, SPECIAL_TOKENS

# The name must not contain "phi3" or "phi-3": llama.cpp would then strip the line break after each
# special token, as the published Phi-3 files want it, and give other ids than the tokenizer here.
MODEL_NAME: Final[str] = "distill example desk"
DESCRIPTION: Final[str] = (
    "Small teacher of the Phi-3 architecture, trained from scratch on generated requests to the "
    "desk of a "
    "research station, in English and Japanese"
)

_GLOBAL_NAMES: Final[dict[str, str]] = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
# llama.cpp keeps q, k, v and gate, up fused just as transformers does, in the same order.
_LAYER_NAMES: Final[dict[str, str]] = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.qkv_proj.weight": "attn_qkv.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a parameter of ``Phi3ForCausalLM``."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    head, layer, rest = name.removeprefix("model.").split(".", 2)
    if head != "layers":
        raise ValueError(f"no GGUF name is known for parameter {name!r}")
    return f"blk.{layer}.{_LAYER_NAMES[rest]}"


def _add_architecture(writer: gguf.GGUFWriter, config: Phi3Config) -> None:
    """Sizes of the network, in tokens, channels and layers."""
    head_dim = config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_sliding_window(0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Vocabulary, merges, special tokens and chat template; free ids are filled with unused
    tokens."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = {index: token for token, index in ids.items()}
    names, types = [], []
    for index in range(vocab_size):
        name = tokens.get(index, f"<|unused{index}|>")
        kind = gguf.TokenType.NORMAL if index in tokens else gguf.TokenType.UNUSED
        names.append(name)
        types.append(gguf.TokenType.CONTROL if name in SPECIAL_TOKENS else kind)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_eot_token_id(EOS_ID)
    writer.add_pad_token_id(BOS_ID)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_weights(writer: gguf.GGUFWriter, model: Phi3ForCausalLM) -> None:
    """Matrices (rows, columns) in Q8_0, norms (channels,) in F32."""
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().numpy()
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values.astype(np.float32))
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)


def write_gguf(path: Path, model: Phi3ForCausalLM, tokenizer: Tokenizer, seed: int) -> None:
    """Writes model and tokenizer to ``path``; the file appears there whole or not at all."""
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, "phi3")
    writer.add_name(MODEL_NAME)
    writer.add_description(DESCRIPTION)
    writer.add_license("Apache-2.0")
    writer.add_languages(["en", "ja"])
    writer.add_uint32("distill.seed", seed)
    _add_architecture(writer, model.config)
    _add_tokenizer(writer, tokenizer, model.config.vocab_size)
    _add_weights(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)


def read_model(path: Path) -> Phi3ForCausalLM:
    """The model in ``path`` for PyTorch, in float32, with the weights just as Q8_0 has rounded
    them."""
    reader = gguf.GGUFReader(path)

    def number(key: str) -> float:
        field = reader.get_field(key)
        if field is None:
            raise ValueError(f"{path.name} has no {key}")
        return float(field.contents())

    config = Phi3Config(
        vocab_size=int(number("phi3.vocab_size")),
        hidden_size=int(number("phi3.embedding_length")),
        intermediate_size=int(number("phi3.feed_forward_length")),
        num_hidden_layers=int(number("phi3.block_count")),
        num_attention_heads=int(number("phi3.attention.head_count")),
        num_key_value_heads=int(number("phi3.attention.head_count_kv")),
        max_position_embeddings=int(number("phi3.context_length")),
        original_max_position_embeddings=int(number("phi3.context_length")),
        rms_norm_eps=number("phi3.attention.layer_norm_rms_epsilon"),
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=None,
    )
    model = Phi3ForCausalLM(config)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = stored[gguf_name(name)]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            parameter.copy_(torch.from_numpy(np.array(values, dtype=np.float32)))
    return model.eval()
