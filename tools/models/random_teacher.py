"""Writes a GGUF teacher of any size with random weights: what speed and memory are measured on.

Its text means nothing, but every tensor has the shape, the quantisation and the statistics that a
real one would have. Tensors are written one after another, so memory stays small whatever the size.

    python -m tools.models.random_teacher big.gguf --shape 1024x8 --quant q8_0
    python -m tools.models.random_teacher phi.gguf --preset phi-3.5-mini --quant q4_0
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

QUANTS = {
    "f16": (GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# Standard deviation of the stored integers when all are equally likely, by block type.
INTEGER_SPREAD = {GGMLQuantizationType.Q8_0: 73.6, GGMLQuantizationType.Q4_0: 4.61}
ROWS_AT_ONCE = 4096
FIRST_CHARACTER, SURROGATES = 0x3400, 0xD800  # 0x800 of these, which are no characters


@dataclass(frozen=True)
class Shape:
    """Sizes of the network, as ``phi3`` has them."""

    width: int
    layers: int
    feed_forward: int
    heads: int
    vocab_size: int = 32064
    context_length: int = 2048


PRESETS = {"phi-3.5-mini": Shape(3072, 32, 8192, 32, context_length=4096)}


def shape_of(text: str, vocab_size: int) -> Shape:
    """A shape from WIDTHxLAYERS: heads of 64, a feed-forward part of 2.75 widths."""
    width, layers = (int(part) for part in text.split("x"))
    return Shape(width, layers, 32 * round(2.75 * width / 32), max(1, width // 64), vocab_size)


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape (rows first) of every tensor; input and output embedding are two."""
    yield "token_embd.weight", (shape.vocab_size, shape.width)
    for layer in range(shape.layers):
        name = f"blk.{layer}"
        yield f"{name}.attn_norm.weight", (shape.width,)
        yield f"{name}.attn_qkv.weight", (3 * shape.width, shape.width)
        yield f"{name}.attn_output.weight", (shape.width, shape.width)
        yield f"{name}.ffn_norm.weight", (shape.width,)
        yield f"{name}.ffn_up.weight", (2 * shape.feed_forward, shape.width)
        yield f"{name}.ffn_down.weight", (shape.width, shape.feed_forward)
    yield "output_norm.weight", (shape.width,)
    yield "output.weight", (shape.vocab_size, shape.width)


def random_rows(
    rows: int, columns: int, kind: GGMLQuantizationType, spread: float, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Rows of a matrix whose entries have standard deviation ``spread``, as the file's bytes."""
    if kind == GGMLQuantizationType.F16:
        values = (spread * random.standard_normal((rows, columns), np.float32)).astype(np.float16)
        return values.view(np.uint8)
    block, size = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows, columns // block, size), np.uint8)
    if kind == GGMLQuantizationType.Q8_0:
        blocks[..., 2:][blocks[..., 2:] == 128] = 0  # -128 does not occur in a real file
    scale = np.array([spread / INTEGER_SPREAD[kind]], np.float16).view(np.uint8)
    blocks[..., :2] = scale
    return blocks.reshape(rows, -1)


def vocabulary(size: int) -> tuple[list[str], list[float], list[int]]:
    """A SentencePiece vocabulary: three control tokens, 256 bytes, and single characters, which
    transformers can have too."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    types += [gguf.TokenType.BYTE] * 256
    codes = range(FIRST_CHARACTER, FIRST_CHARACTER + size - len(tokens))
    tokens += [chr(code if code < SURROGATES else code + 0x800) for code in codes]
    types += [gguf.TokenType.NORMAL] * (size - len(types))
    return tokens, [-float(index) for index in range(size)], [int(kind) for kind in types]


def write(path: Path, shape: Shape, quant: str, seed: int) -> None:
    """Write the file at ``path``."""
    kind, file_type = QUANTS[quant]
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_name(f"random {shape.width}x{shape.layers}")
    writer.add_context_length(shape.context_length)
    writer.add_rope_scaling_orig_ctx_len(shape.context_length)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_sliding_window(0)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(file_type)
    tokens, scores, types = vocabulary(shape.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    _add_tensors(writer, shape, kind, seed)


def _add_tensors(
    writer: gguf.GGUFWriter, shape: Shape, kind: GGMLQuantizationType, seed: int
) -> None:
    block, size = GGML_QUANT_SIZES[kind]
    for name, dimensions in tensors(shape):
        if len(dimensions) == 1:
            writer.add_tensor_info(name, dimensions, np.dtype(np.float32), 4 * dimensions[0])
        else:
            stored = (dimensions[0], dimensions[1] // block * size)
            nbytes = stored[0] * stored[1]
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(seed)
    for name, dimensions in tensors(shape):
        if len(dimensions) == 1:
            writer.write_tensor_data(np.ones(dimensions, np.float32))
            continue
        # The last layers' outputs keep a spread near 1; the output matrix gives logits of a spread
        # of 2.
        spread = (2.0 if name == "output.weight" else 1.0) / np.sqrt(dimensions[1])
        pieces = [
            random_rows(
                min(ROWS_AT_ONCE, dimensions[0] - start), dimensions[1], kind, spread, random
            )
            for start in range(0, dimensions[0], ROWS_AT_ONCE)
        ]
        writer.write_tensor_data(np.concatenate(pieces))
    writer.close()


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--shape", default="1024x8", help="WIDTHxLAYERS")
    which.add_argument("--preset", choices=sorted(PRESETS))
    parser.add_argument("--vocab", type=int, default=32064)
    parser.add_argument("--quant", choices=sorted(QUANTS), default="q8_0")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = PRESETS[options.preset] if options.preset else shape_of(options.shape, options.vocab)
    write(options.path, shape, options.quant, options.seed)
    print(f"{options.path}: {options.path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
