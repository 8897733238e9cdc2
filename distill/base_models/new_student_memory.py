"""What training a new student takes in memory, on a device of its own.

Letters: n tokens of a micro-batch, V vocabulary, D width, L layers, H heads, A width of the
attention output, K width of all keys, F feed-forward width.
"""

from __future__ import annotations

import torch

from distill.base_models.memory_estimate import (
    MERGED_BYTES,
    SNAPSHOT_COPIES,
    TrainingMemory,
    TrainingSettings,
    head_numbers,
    loss_bytes,
    settings_of,
)
from distill.config.schema import RunConfig
from students.model.config import SO8TConfig
from students.model.shape import GROUP
from students.model.sizes import decoder_parameters, layer_parameters


def estimate_new(shape: SO8TConfig, training: TrainingSettings) -> TrainingMemory:
    """Bytes that training a new student takes.

    - weights, gates and heads in float32; gradients once, moments twice as much.
    - activations: of a layer, see ``_layer_activations``. With checkpointing one layer's, and the L
      layers' inputs, n·D each; without, all layers'. And the last norm's result, normalized and
      scaled.
    - temporary: of the backward pass of one layer: gradients on their way through the feed-forward
      part, 3·F + 2·D for each token, and the largest gradient before it is added; of a table that
      is input and output, a second gradient.
    - loss: as of an adapted student.
    """
    trained = decoder_parameters(shape, gates=True) + head_numbers(shape.hidden_size, training)
    width, inner, tokens = shape.hidden_size, shape.intermediate_size, training.tokens
    through = tokens * (3 * inner + 2 * width) * training.base_bytes
    table = 4 * training.vocab_size * width
    folded = shape.num_hidden_layers * width * shape.attention_width  # output projections, anew
    return TrainingMemory(
        base=0,
        trained=4 * trained,
        gradients=4 * trained,
        moments=8 * trained,
        activations=_activations(shape, training),
        temporary=through + (table if shape.tie_word_embeddings else 4 * inner * width),
        loss=loss_bytes(width, training),
        snapshots=training.snapshots * 4 * SNAPSHOT_COPIES * trained,
        merging=MERGED_BYTES * width * shape.attention_width + 4 * folded,
        base_numbers=decoder_parameters(shape),
        trained_numbers=trained,
        largest=max(training.vocab_size, inner) * width,
        on_cpu=training.on_cpu,
    )


def _activations(shape: SO8TConfig, training: TrainingSettings) -> int:
    tokens, layers, width = training.tokens, shape.num_hidden_layers, shape.hidden_size
    tokens += training.prompt_tokens
    around = tokens * (8 * width + 4)
    if not training.checkpointing:
        return around + layers * _layer_activations(shape, training, tokens)
    largest = max(training.tokens, training.prompt_tokens)
    inputs = layers * tokens * 4 * width
    return around + inputs + _layer_activations(shape, training, largest)


def _layer_activations(shape: SO8TConfig, training: TrainingSettings, tokens: int) -> int:
    """What one layer keeps of its forward pass, in bytes.

    For each token: norms 2·(D + 1) float32; inputs of products, 5·D where
    each has a narrow copy of its own, else 2·D; queries, keys, values and result of attention, 2·A
    + 2·K, and H float32; feed-forward 4·F. For the layer: its matrices as autocast narrows them, or
    the gated output matrix, D·A; the rotations in float64 and float32, A·8 numbers four times.
    """
    width, narrow = shape.hidden_size, training.base_bytes
    keys = shape.num_key_value_heads * shape.head_dim
    narrowed = training.autocast is not None
    each = 8 * (width + 1) + 4 * shape.num_attention_heads
    each += narrow * ((5 if narrowed else 2) * width + 2 * (shape.attention_width + keys))
    each += narrow * 4 * shape.intermediate_size
    matrices = layer_parameters(shape) - 2 * width
    fixed = narrow * (matrices if narrowed else width * shape.attention_width)
    return tokens * each + fixed + 32 * GROUP * shape.attention_width


def memory_of_new(
    shape: SO8TConfig, config: RunConfig, device: torch.device | None = None
) -> TrainingMemory:
    """The estimate for a run's settings (``device``: see ``settings_of``)."""
    settings = settings_of(config, shape.hidden_size, shape.vocab_size, device)
    return estimate_new(shape, settings)
