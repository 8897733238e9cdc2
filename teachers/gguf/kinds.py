"""What a GGUF file is that is no causal language model: by its metadata, before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping

TYPES = {  # general.type
    "adapter": "is a LoRA adapter; merge it into its base model (llama-export-lora) and give that",
    "imatrix": "is an importance matrix; give the model that it was measured on",
    "mmproj": "is the image or audio part of a multimodal model; give its language model's file",
}
ENCODER = "is an encoder, whose answer to a token depends on later ones"
DIFFUSION = "is a diffusion language model, whose answer to a token depends on later ones"
SPEECH = "is a part of a speech model"
DRAFT = "is a draft head, which needs another model's hidden states"
IMAGES = "is an image or video model"
ARCHITECTURES = {
    **dict.fromkeys(("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert"), ENCODER),
    **dict.fromkeys(("jina-bert-v2", "jina-bert-v3", "eurobert", "t5encoder"), ENCODER),
    **dict.fromkeys(("gemma-embedding", "llama-embed"), ENCODER),
    **dict.fromkeys(("llada", "llada-moe", "dream", "rnd1", "diffusion-gemma"), DIFFUSION),
    "t5": "is an encoder-decoder, which answers a text that it has read as a whole",
    **dict.fromkeys(("wavtokenizer-dec", "qwen3tts", "pockettts"), SPEECH),
    **dict.fromkeys(("eagle3", "dflash", "gemma4-assistant"), DRAFT),
    **dict.fromkeys(("flux", "sd1", "sd2", "sd3", "sdxl", "aura", "hidream", "lumina2"), IMAGES),
    **dict.fromkeys(("qwen_image", "cosmos", "hyvid", "ltxv", "wan"), IMAGES),
    "clip": TYPES["mmproj"],
    "controlvector": "is a control vector; give the model that it was made for",
}


def why_no_teacher(
    values: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Why a file with these metadata ``values`` and tensors is no causal language model with its
    tokenizer, going on from the file's name; ``None`` where it is one."""
    if kind := _other_kind(values):
        return f"{kind} (a teacher is a causal language model)"
    tokens = values.get("tokenizer.ggml.tokens")
    embedding = shapes.get("token_embd.weight", ())
    if not isinstance(values.get("general.architecture"), str):
        return "names no architecture; is it a language model?"
    if not shapes:
        return "holds a vocabulary and no tensors; give a whole model"
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        return "carries no tokenizer; convert it again with its tokenizer"
    if len(embedding) != 2:
        return "has no token embedding; is it a language model?"
    if embedding[0] != len(tokens):
        return (
            f"is damaged: its tokenizer has {len(tokens)} tokens, its embedding {embedding[0]} rows"
        )
    return None


def _other_kind(values: Mapping[str, object]) -> str | None:
    kind, name = values.get("general.type"), values.get("general.architecture")
    if "adapter.type" in values:  # older files say no general.type
        kind = "adapter"
    if isinstance(kind, str) and kind in TYPES:
        return TYPES[kind]
    if not isinstance(name, str):
        return None
    pooling = values.get(f"{name}.pooling_type")
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if "diffusion.shift_logits" in values:
        return DIFFUSION
    if type(pooling) is int and pooling > 0:
        return f"gives embeddings or ranks, not words ({name}.pooling_type is {pooling})"
    return ENCODER if values.get(f"{name}.attention.causal") is False else None
