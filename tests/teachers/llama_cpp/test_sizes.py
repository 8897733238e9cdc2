"""How much is computed at once: within the memory of every card, and as before on a processor."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from teachers.errors import SettingRefused
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.library.kernels import LoadOptions, ModelShape
from teachers.llama_cpp.sizes import (
    GPU,
    GPU_RESERVE,
    compute_bytes,
    gpu_sizes,
    on_gpu,
    processor_sizes,
    shape_of,
    shares_by_memory,
)

GB = 10**9
# By their headers: vocabulary, width, feed-forward width, heads, key and value numbers of a token
# and layer, weights of each layer and of the output layer.
MODELS = {
    "Phi-3.5-mini Q4_K_M": ModelShape(32064, 3072, 8192, 32, 6144, (70_000_000,) * 32, 80_800_000),
    "Phi-3.5-mini F16": ModelShape(32064, 3072, 8192, 32, 6144, (226_500_000,) * 32, 197_000_000),
    "Gemma-3-270M Q4_K_M": ModelShape(262144, 640, 2048, 4, 512, (3_800_000,) * 18, 178_300_000),
    "SmolLM2-135M Q4_1": ModelShape(49152, 576, 1536, 9, 384, (2_220_000,) * 30, 30_100_000),
}
CARDS = (8, 12, 24, 80)
ALL = LoadOptions(gpu_layers=-1)


def test_everything_fits_on_every_card_that_is_large_enough() -> None:
    """Weights, a batch's numbers, and the cache of all sequences together; more on larger cards."""
    for name, shape in MODELS.items():
        before = (0, 0)
        for card in CARDS:
            free = card * GB - GB // 2
            if name == "Phi-3.5-mini F16" and card == 8:
                continue  # see below
            sizes = gpu_sizes(shape, [GPU("a card", free)], ALL)
            weights = sum(shape.layer_bytes) + shape.output_bytes
            for tokens in (256, 1000, 2048):
                for kind, bytes_each in (("f16", 2), ("f32", 4)):
                    each = shape.cache_values * shape.layers * bytes_each * 256 * -(-tokens // 256)
                    together = sizes.sequences(tokens, kind)
                    used = weights + together * each + compute_bytes(shape, sizes.batch_tokens)
                    assert used + GPU_RESERVE <= free, (name, card, tokens, kind)
            now = sizes.batch_tokens, sizes.sequences(256, "f16")
            assert now >= before and now[1] > before[1], (name, card)
            assert 4 * shape.vocab_size * now[0] <= 1 << 29 or now[0] == 128, (name, card)
            before = now
        # No card leaves a GPU with batches for a processor, or 5 sequences of Phi.
        assert before[0] >= 512 and before[1] > 500, name
    assert (
        gpu_sizes(MODELS["Phi-3.5-mini Q4_K_M"], [GPU("a card", 23 * GB)], ALL).sequences(
            256, "f16"
        )
        > 128
    )


def test_what_does_not_fit_is_said_with_what_would() -> None:
    """The number of layers that the message gives is the greatest that fits."""
    shape, card = MODELS["Phi-3.5-mini F16"], [GPU("a card", 7_500_000_000)]
    with pytest.raises(SettingRefused) as refused:
        gpu_sizes(shape, card, ALL)
    said = str(refused.value)
    assert "a card" in said and "7.50 GB are free" in said and "7.45 GB" in said
    fits = int(said.partition("gpu_layers=")[2].split()[0])
    assert gpu_sizes(shape, card, LoadOptions(gpu_layers=fits)).sequences(256, "f16") >= 1
    with pytest.raises(SettingRefused):
        gpu_sizes(shape, card, LoadOptions(gpu_layers=fits + 1))
    with pytest.raises(SettingRefused, match=r"gpu_layers=0 computes on the processor"):
        gpu_sizes(shape, [GPU("a card", GB // 2)], ALL)
    sizes = gpu_sizes(shape, card, LoadOptions(gpu_layers=fits))
    with pytest.raises(SettingRefused, match=r"sequence of 9000 tokens.*max_length"):
        sizes.sequences(9000, "f16")
    # What others have taken since the model was loaded is not there any more.
    with pytest.raises(SettingRefused, match="sequence of 256 tokens"):
        sizes.within([GPU("a card", sizes.reserved)]).sequences(256, "f16")
    assert sizes.within([GPU("a card", 80 * GB)]) == sizes


def test_settings_of_the_sizes() -> None:
    """The batch as set, a smaller type of cache, and few layers: the rest lies in main memory."""
    shape, card = MODELS["Phi-3.5-mini Q4_K_M"], [GPU("a card", 11 * GB)]
    assert gpu_sizes(shape, card, replace(ALL, batch_tokens=96)).batch_tokens == 96
    with pytest.raises(SettingRefused, match="batch of 65536 tokens"):
        gpu_sizes(shape, card, replace(ALL, batch_tokens=1 << 16))
    sizes = gpu_sizes(shape, card, ALL)
    assert 1.8 < sizes.sequences(256, "q8_0") / sizes.sequences(256, "f16") < 1.95
    # The output layer counts, and goes to the GPU first: of 5 layers 4 are others.
    few = gpu_sizes(shape, card, LoadOptions(gpu_layers=5))
    on_processor = 28 * shape.cache_values * 2 * 256
    assert few.sequences(256, "f16") == (512 << 20) // on_processor
    assert on_gpu(shape, 5) == (4, 4 * shape.layer_bytes[0] + shape.output_bytes)
    assert on_gpu(shape, 1) == (0, shape.output_bytes)
    assert on_gpu(shape, 99) == on_gpu(shape, -1) == (32, 32 * 70_000_000 + shape.output_bytes)


def test_several_gpus_are_filled_by_what_is_left_of_them() -> None:
    """No GPU gets more than it has, whatever its share; one with no room gets nothing."""
    shape = MODELS["Phi-3.5-mini F16"]
    for free in ([24, 24], [24, 8], [24, 0.4], [6, 6]):
        rooms = [int(one * GB) for one in free]
        shares = shares_by_memory(shape, rooms)
        assert math.isclose(sum(shares), 1.0) and (shares[1] == 0) == (free[1] == 0.4), free
        pairs = list(zip(rooms, shares, strict=True))
        gpus = [GPU("a card", room, share) for room, share in pairs if share]
        sizes = gpu_sizes(shape, gpus, ALL)
        cache = sizes.sequences(256, "f16") * shape.cache_values * 32 * 2 * 256
        weights = sum(shape.layer_bytes) + shape.output_bytes
        for gpu in gpus:
            used = gpu.share * (weights + cache) + compute_bytes(shape, sizes.batch_tokens)
            assert used + GPU_RESERVE <= gpu.free, free


def test_on_the_processor_sizes_are_what_was_measured() -> None:
    """Batches by the vocabulary; caches of 512 MB, which holds five sequences of Phi; at least
    one sequence always."""
    for vocab, batch in ((1024, 512), (32064, 512), (49152, 341), (262144, 128)):
        assert processor_sizes(vocab, 1).batch_tokens == batch, vocab
    phi = processor_sizes(32064, 6144 * 32)
    assert (phi.sequences(256, "f16"), phi.sequences(256, "f32"), phi.sequences(9000, "f16")) == (
        5,
        2,
        1,
    )
    assert phi.sequences(256, "f16", contexts=2) == 2
    assert processor_sizes(32064, 1, 77).batch_tokens == 77


def test_a_shape_by_the_header(tiny_teacher_path: Path) -> None:
    """Every tensor of a layer counts; heads' own width, and what is no count is passed over."""
    file = read_gguf(tiny_teacher_path)
    shape = shape_of(file)
    blocks = sum(one.nbytes for name, one in file.tensors.items() if name.startswith("blk."))
    assert sum(shape.layer_bytes) == blocks and all(shape.layer_bytes) and shape.layers == 2
    assert (shape.vocab_size, shape.width) == file.tensors["token_embd.weight"].shape
    assert shape.output_bytes == 4 * shape.vocab_size * shape.width
    heads, kv_heads = (file.value(f"llama.attention.head_count{kind}") for kind in ("", "_kv"))
    assert shape.cache_values == 2 * kv_heads * shape.width // heads
    changes = {"key_length": 256, "head_count_kv": [-3, 0]}
    fields = {
        f"llama.attention.{key}": replace(file.fields["llama.block_count"], value=value)
        for key, value in changes.items()
    }
    odd = shape_of(replace(file, fields=file.fields | fields))
    assert odd.cache_values == heads * (256 + shape.width // heads)
