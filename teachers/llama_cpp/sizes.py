"""How much is computed at once: tokens of a batch, sequences together, the key-value cache.

On the processor by constants, which were measured; on a GPU by its free memory. Pure functions of a
model's shape and of bytes: they ask no library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from teachers.errors import SettingRefused
from teachers.gguf.file import GGUFFile
from teachers.gguf.output import output_name
from teachers.llama_cpp.library.kernels import LoadOptions, ModelShape

CACHE_STEP = 256  # llama.cpp rounds each sequence's share of the cache up to this many tokens
VALUE_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}  # types of the cache
MIN_BATCH_TOKENS = 128
# On the processor.
LOGITS_BYTES = 64 << 20  # one batch's logits stay near this, whatever the vocabulary
MAX_BATCH_TOKENS = 512  # llama.cpp's own
CACHE_BYTES = 512 << 20  # the KV caches stay below this (one sequence of each context always fits)
# On a GPU.
GPU_BATCHES = (2048, 1024, 512, 256, MIN_BATCH_TOKENS)
GPU_LOGITS_BYTES = 512 << 20  # of a batch: all of them go to main memory too
GPU_RESERVE = 512 << 20  # for the driver's libraries, and what is lost between blocks
BATCHES_CACHED = 8  # where the cache would hold fewer batches, a smaller batch is taken
MAX_COUNT = 1 << 20  # heads or widths that a real model may have


class CachePool(NamedTuple):
    """Memory for a part of the cache, and how many numbers a token leaves there."""

    room: int
    values: int


@dataclass(frozen=True)
class Sizes:
    """What is computed at once.

    ``pools``: where the cache lies, on the GPU first. ``reserved``: bytes of each GPU for all but
    weights and cache; ``score_bytes``: what attention takes for each cached token besides, with a
    float32 cache. ``gpus``: their names; none: the processor, whose memory is taken to do.
    """

    batch_tokens: int
    pools: tuple[CachePool, ...]
    reserved: int = 0
    score_bytes: int = 0
    gpus: str = ""

    def within(self, gpus: Sequence[GPU]) -> Sizes:
        """The same where no more is free than now, with the weights on the GPUs."""
        first, *others = self.pools
        room = min(first.room, _room(gpus, self.reserved))
        return replace(self, pools=(first._replace(room=room), *others))

    def sequences(self, tokens: int, cache_type: str, contexts: int = 1) -> int:
        """How many sequences of ``tokens`` tokens the cache of one of ``contexts`` holds.

        Raises:
            SettingRefused: a GPU has no room for one.
        """
        rounded = -(-tokens // CACHE_STEP) * CACHE_STEP
        scores = self.score_bytes * rounded if cache_type == "f32" else 0
        each = [int(VALUE_BYTES[cache_type] * pool.values) * rounded for pool in self.pools]
        left = [(pool.room - scores) // contexts for pool in self.pools]
        if self.gpus and left[0] < each[0]:
            raise SettingRefused(
                f"a sequence of {tokens} tokens does not fit: its cache takes {_gb(each[0])} on "
                f"{self.gpus}, where {_gb(left[0])} are left. Make sequences shorter "
                "(data.max_length), set teacher.cache_type=q8_0, or give fewer gpu_layers or "
                "teacher.batch_tokens"
            )
        return max(1, min(room // max(1, size) for room, size in zip(left, each, strict=True)))


class GPU(NamedTuple):
    """A GPU: bytes that this process may take there, and the share of the layers it gets."""

    name: str
    free: int
    share: float = 1.0


def processor_sizes(vocab_size: int, cache_values: int, batch_tokens: int | None = None) -> Sizes:
    """The sizes on the processor; ``cache_values``: of a token, over all layers."""
    fitting = LOGITS_BYTES // (4 * vocab_size)
    usual = max(MIN_BATCH_TOKENS, min(MAX_BATCH_TOKENS, fitting))
    return Sizes(batch_tokens or usual, (CachePool(CACHE_BYTES, cache_values),))


def gpu_sizes(shape: ModelShape, gpus: Sequence[GPU], options: LoadOptions) -> Sizes:
    """The sizes with ``options.gpu_layers`` on ``gpus``, where no weights are yet.

    Raises:
        SettingRefused: that does not fit.
    """
    sizes = _fitting(shape, gpus, options, options.gpu_layers)
    if sizes is not None:
        return sizes
    layers, weights = on_gpu(shape, options.gpu_layers)
    batch = options.batch_tokens or MIN_BATCH_TOKENS
    fewer = range(layers, 0, -1)  # the output layer counts
    fits = next((count for count in fewer if _fitting(shape, gpus, options, count)), 0)
    raise SettingRefused(
        f"the model does not fit on {_names(gpus)}: {layers} of its {shape.layers} layers and the "
        f"output take {_gb(weights)}, a batch of {batch} tokens {_gb(compute_bytes(shape, batch))} "
        f"besides the cache and {_gb(GPU_RESERVE)} in reserve, and "
        f"{_gb(sum(gpu.free for gpu in gpus))} are free. gpu_layers={fits} "
        + ("fits" if fits else "computes on the processor")
        + "; or take another GPU (teacher.main_gpu), several (teacher.tensor_split), or a smaller "
        "file"
    )


def shares_by_memory(shape: ModelShape, free: Sequence[int]) -> list[float]:
    """The share of the layers on each of several GPUs: by what is left where a batch is
    computed."""
    least = GPU_RESERVE + compute_bytes(shape, MIN_BATCH_TOKENS)
    left = [max(0, room - least) for room in free]
    if not any(left):
        return [1 / len(free)] * len(free)  # nothing fits, which is said elsewhere
    return [room / sum(left) for room in left]


def compute_bytes(shape: ModelShape, batch_tokens: int) -> int:
    """What computing a batch takes on a GPU besides weights and cache, at most: its logits, three
    feed-forward and a few other states, and a half-precision copy of the output matrix."""
    states = shape.vocab_size + 3 * shape.ffn_width + 8 * shape.width
    return 4 * batch_tokens * states + 2 * shape.vocab_size * shape.width


def on_gpu(shape: ModelShape, gpu_layers: int) -> tuple[int, int]:
    """How many of the model's layers are on a GPU, and the bytes of weights there. llama.cpp counts
    the output as a layer too, which goes there first, and takes the last ones of the others."""
    layers = shape.layers if gpu_layers < 0 else min(shape.layers, gpu_layers - 1)
    return layers, sum(shape.layer_bytes[shape.layers - layers :]) + shape.output_bytes


def shape_of(file: GGUFFile) -> ModelShape:
    """A model's shape by its header; what no model has counts as what Llama has."""

    def stated(key: str, default: int) -> int:
        value = file.value(f"{file.architecture}.{key}")
        counts = value if isinstance(value, list) else [value]  # some have one for each layer
        real = [one for one in counts if type(one) is int and 1 <= one <= MAX_COUNT]
        return max(real, default=default)

    output = file.tensors[output_name(file)]
    width = output.shape[-1]
    heads = stated("attention.head_count", 1)
    kv_heads = stated("attention.head_count_kv", heads)
    even = max(1, width // heads)
    lengths = (stated(f"attention.{part}_length", even) for part in ("key", "value"))
    layers = [0] * stated("block_count", 1)
    for name, tensor in file.tensors.items():
        kind, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if kind == "blk" and number.isdigit() and int(number) < len(layers):
            layers[int(number)] += tensor.nbytes
    return ModelShape(
        vocab_size=output.shape[0],
        width=width,
        ffn_width=stated("feed_forward_length", 4 * width),
        heads=heads,
        cache_values=kv_heads * sum(lengths),
        layer_bytes=tuple(layers),
        output_bytes=output.nbytes,
    )


def _fitting(
    shape: ModelShape, gpus: Sequence[GPU], options: LoadOptions, gpu_layers: int
) -> Sizes | None:
    """The sizes with so many layers on the GPUs; nothing where these do not fit."""
    layers, weights = on_gpu(shape, gpu_layers)
    values = shape.cache_values * layers
    token_bytes = int(VALUE_BYTES[options.cache_type or "f16"] * values)
    batches = [
        tokens
        for tokens in GPU_BATCHES
        if tokens == MIN_BATCH_TOKENS or 4 * shape.vocab_size * tokens <= GPU_LOGITS_BYTES
    ]
    if options.batch_tokens:
        batches = [options.batch_tokens]
    for tokens in batches:
        reserved = GPU_RESERVE + compute_bytes(shape, tokens)
        room = _room(gpus, reserved) - weights
        cached = CACHE_STEP if tokens == batches[-1] else BATCHES_CACHED * tokens
        if room >= token_bytes * cached and room > 0:
            on_processor = shape.cache_values * (shape.layers - layers)
            pools = [CachePool(room, values)]
            pools += [CachePool(CACHE_BYTES, on_processor)] * bool(on_processor)
            scores = 8 * shape.heads * tokens
            return Sizes(tokens, tuple(pools), reserved, scores, _names(gpus))
    return None


def _room(gpus: Sequence[GPU], reserved: int) -> int:
    """Bytes for weights and cache on all GPUs together, the layers divided as they are."""
    return min(int((gpu.free - reserved) / gpu.share) for gpu in gpus)


def _names(gpus: Sequence[GPU]) -> str:
    return " and ".join(dict.fromkeys(gpu.name for gpu in gpus))


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
