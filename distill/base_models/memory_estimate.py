"""What training takes in memory, estimated before anything is loaded.

Over 400 lines because each part stands beside the words that say what is counted.

Letters: n tokens of a micro-batch, V vocabulary, D width, L layers, H heads of width W, K key/value
heads, A = H·W, I feed-forward width, r rank, N = A / 8 blocks of a gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState

from distill.config.schema import USUAL_LENGTH, RunConfig, TargetsConfig
from distill.losses.chunked_lm_head import LOGITS_BYTES, chunk_size, logits_bytes
from distill.losses.fused import BLOCK_BYTES
from distill.runtime.device import base_dtype, choose_precision
from students.gguf.architectures import architecture_of
from students.gguf.config_values import head_width
from students.model.head_decisions import DECISIONS
from students.model.heads import VERIFICATION_UNITS
from students.model.shape import GROUP, PARAMETERS_PER_BLOCK
from teachers.targets.recipe import compact_recipe

NF4_BLOCK = 64  # numbers that share a scale
SCALE_BLOCK = 256  # scales that share a scale, with double quantization
NF4_TABLES, SCALE_TABLES = 4 * 16, 4 * 256 + 4  # bytes for each matrix
DIRECTIONS = 2.5  # of a sketch, for each of its bytes, where it is not fitted yet
LOGITS_COPIES = 5  # float32 buffers of a chunk: logits, the teacher's, and those of the losses
# Matrices that a gate's exponential keeps for the backward pass: seven, and one for each halving;
# two are usual for its first angles (``students.model.so8``).
EXPONENTIAL = 7 + 2
PROMPT_TOKENS = 64  # of one of the safety head's prompts, roughly
SNAPSHOT_COPIES = 3  # weights and two moments
# Of a number of a matrix that is merged: float64 twice, float32; of a table, which is only checked.
MERGED_BYTES, TABLE_BYTES = 20, 9
TRAINING_COPIES = 4  # float32 weights, gradients and two moments: the very least


def snapshot_bytes(config: RunConfig, trained: int) -> int:
    """Main memory that the guard's snapshots of so many parameters take, in float32."""
    return 4 * trained * SNAPSHOT_COPIES * _snapshots(config)


def least_memory(config: RunConfig, trained: int) -> int:
    """Bytes that training a new student of so many parameters takes at the very least."""
    return 4 * trained * TRAINING_COPIES + snapshot_bytes(config, trained)


def _snapshots(config: RunConfig) -> int:
    return config.train.guard.snapshots if config.train.guard.enabled else 0


@dataclass(frozen=True)
class TrainingSettings:
    """What the estimate depends on beside the base's own shape.

    ``load_dtype``: of the base's embeddings, norms and biases, and of its matrices unless
    ``load_in_4bit``. ``autocast``: the narrow dtype, or none. ``sequences`` of at most ``length``
    tokens make a micro-batch; ``prompt_tokens`` are the safety head's beside them. ``vocab_size``:
    the teacher's. ``on_cpu``: main memory is all there is. ``logits_bytes``: of a chunk of logits
    at most. ``head_columns``: of the matrix that makes logits of the sketches of compact targets.
    """

    vocab_size: int
    rank: int = 16
    dropout: float = 0.0
    load_in_4bit: bool = False
    double_quantization: bool = True
    load_dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    sequences: int = 1
    length: int = 256
    prompt_tokens: int = 0
    checkpointing: bool = True
    snapshots: int = 0
    safety_head: bool = False
    verification_head: bool = False
    on_cpu: bool = True
    logits_bytes: int = LOGITS_BYTES
    head_columns: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, n."""
        return self.sequences * self.length

    @property
    def load_bytes(self) -> int:
        """Bytes of a number as it is loaded."""
        return self.load_dtype.itemsize

    @property
    def base_bytes(self) -> int:
        """Bytes of what the base's matrices compute."""
        return (self.autocast or self.load_dtype).itemsize

    @property
    def lora_bytes(self) -> int:
        """Bytes of what LoRA computes."""
        return (self.autocast or torch.float32).itemsize


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes, by what they are for; see ``estimate``, and ``new_student_memory`` of a new student.

    ``snapshots`` lie in main memory. ``merging``: main memory of making one plain matrix, at the
    end. ``base_numbers`` and ``trained_numbers`` count parameters, ``largest`` those of the largest
    matrix.
    """

    base: int
    trained: int
    gradients: int
    moments: int
    activations: int
    temporary: int
    loss: int
    snapshots: int
    merging: int
    base_numbers: int
    trained_numbers: int
    largest: int
    on_cpu: bool

    @property
    def total(self) -> int:
        """All that has to fit where it trains: on a CPU with the guard's snapshots, elsewhere
        without."""
        computing = self.activations + self.temporary + self.loss
        kept = self.base + self.trained + self.gradients + self.moments
        return kept + computing + (self.snapshots if self.on_cpu else 0)


@dataclass(frozen=True)
class _Shape:
    """A base's sizes, and of a layer: (rows, columns) of its ``matrices``, how many ``norms`` of D
    there are, the numbers of all ``vectors``."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    rows: int
    tied: bool
    fused: bool
    head_norms: bool
    norms: int
    matrices: tuple[tuple[int, int], ...]
    vectors: int

    @property
    def attention(self) -> int:
        """Width of the attention output, A."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Width of all keys, or all values."""
        return self.kv_heads * self.head_width

    @property
    def numbers(self) -> int:
        """Parameters of the base."""
        layer = sum(rows * columns for rows, columns in self.matrices) + self.vectors
        return self.layers * layer + self.rows * self.width * (1 if self.tied else 2) + self.width

    @property
    def gates(self) -> int:
        """Numbers of one of a gate's matrices, over all layers: L·N·64."""
        return self.layers * self.attention * GROUP

    def lora(self, rank: int) -> int:
        """Numbers of all A and B."""
        return self.layers * sum(rank * (rows + columns) for rows, columns in self.matrices)


def _shape(base: Any, vocab_size: int) -> _Shape:
    width, inner, one = base.hidden_size, base.intermediate_size, head_width(base)
    heads, kv_heads = base.num_attention_heads, base.num_key_value_heads
    attention, keys = heads * one, kv_heads * one
    names = architecture_of(base).layer_names
    fused, head_norms = "self_attn.qkv_proj.weight" in names, "self_attn.q_norm.weight" in names
    if fused:
        inputs, hidden = [(attention + 2 * keys, width)], [(2 * inner, width)]
    else:
        inputs, hidden = [(attention, width), (keys, width), (keys, width)], [(inner, width)] * 2
    norms = sum("layernorm" in name for name in names)
    vectors = norms * width + 2 * one * head_norms
    if "self_attn.q_proj.bias" in names and "self_attn.o_proj.bias" not in names:  # always there
        vectors += attention + 2 * keys
    elif getattr(base, "attention_bias", False):
        vectors += attention + 2 * keys + width
    if getattr(base, "mlp_bias", False):
        vectors += 2 * inner + width
    return _Shape(
        width=width,
        layers=base.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_width=one,
        feed_forward=inner,
        rows=max(base.vocab_size, vocab_size),  # rows for the teacher's padding tokens are added
        tied=bool(base.tie_word_embeddings),
        fused=fused,
        head_norms=head_norms,
        norms=norms,
        matrices=(*inputs, (width, attention), *hidden, (width, inner)),
        vectors=vectors,
    )


def estimate(base: Any, training: TrainingSettings) -> TrainingMemory:
    """Bytes that training an adapted student takes, from its base's ``transformers`` configuration.

    - base: matrices of layers at the load dtype, or in NF4 (half a byte, and a scale for 64
      numbers: a float32, or with double quantization a byte, and a float32 for 256 of those); all
      else, the output matrix too, at the load dtype.
    - adapters: LoRA, gates with where they began, heads, in float32; gradients once, moments twice
      what is trained.
    - snapshots: weights, moments and buffers of the guard's.
    - activations: with checkpointing one layer's (``_layer_activations``) and the L layers' inputs,
      n·D each; without, all layers'. And the last norm's input in float32 and output, the gates'
      rotations (for each block three float32 matrices of 8 × 8, and in float64 what two
      exponentials keep), narrowed LoRA.
    - temporary: of the backward pass of one layer: gradients on their way through the feed-forward
      part, 3·I + 2·D for each token, and the largest matrix as unpacked from NF4.
    - loss: a chunk of logits (``distill.losses.chunked_lm_head.chunk_size``) in ``LOGITS_COPIES``
      float32 buffers and once narrow, on a CPU twice narrow; the last states and their gradient,
      n·D each; narrow copies of states and matrix where they were not narrow; the matrix of the
      teacher's sketches.

    Not in it: CUDA's own, projectors of the hidden-state loss, keys and values while a student
    writes. Attention keeps no matrix of tokens × tokens (PyTorch's fused kernels).
    """
    shape = _shape(base, training.vocab_size)
    blocks = shape.layers * shape.attention // GROUP
    trained = shape.lora(training.rank) + 2 * blocks * PARAMETERS_PER_BLOCK
    trained += head_numbers(shape.width, training)
    starts, frequencies = 4 * shape.gates, 4 * shape.head_width  # buffers
    kept = SNAPSHOT_COPIES * 4 * trained + starts + frequencies
    largest = max(rows * columns for rows, columns in shape.matrices)
    table = shape.rows * shape.width
    return TrainingMemory(
        base=_base_bytes(shape, training),
        trained=4 * trained + starts,
        gradients=4 * trained,
        moments=8 * trained,
        activations=_activations(shape, training),
        temporary=_temporary(shape, training),
        loss=loss_bytes(shape.width, training),
        snapshots=training.snapshots * kept,
        merging=max(MERGED_BYTES * largest, TABLE_BYTES * table),
        base_numbers=shape.numbers,
        trained_numbers=trained,
        largest=max(largest, table),
        on_cpu=training.on_cpu,
    )


def head_numbers(width: int, training: TrainingSettings) -> int:
    """Parameters of the heads of a student of ``width``."""
    safety = len(DECISIONS) * (width + 1) if training.safety_head else 0
    return safety + (VERIFICATION_UNITS * (width + 2) + 3 if training.verification_head else 0)


def _base_bytes(shape: _Shape, training: TrainingSettings) -> int:
    if not training.load_in_4bit:
        return shape.numbers * training.load_bytes
    matrices = [rows * columns for rows, columns in shape.matrices]
    double = training.double_quantization
    packed = shape.layers * sum(_nf4_bytes(numbers, double) for numbers in matrices)
    return packed + (shape.numbers - shape.layers * sum(matrices)) * training.load_bytes


def _nf4_bytes(numbers: int, double: bool) -> int:
    """Bytes of one matrix in NF4."""
    blocks = -(-numbers // NF4_BLOCK)
    scales = blocks + 4 * -(-blocks // SCALE_BLOCK) + SCALE_TABLES if double else 4 * blocks
    return -(-numbers // 2) + scales + NF4_TABLES


def _activations(shape: _Shape, training: TrainingSettings) -> int:
    tokens = training.tokens + training.prompt_tokens
    last = tokens * (4 * (shape.width + 1) + shape.width * training.load_bytes)
    around = last + shape.gates * (2 * 8 * EXPONENTIAL + 3 * 4)
    if training.autocast is not None:
        around += training.lora_bytes * shape.lora(training.rank)
    if not training.checkpointing:
        return around + shape.layers * _layer_activations(shape, training, tokens)
    around += shape.layers * tokens * shape.width * training.load_bytes
    # Prompts go through by themselves, and are fewer.
    largest = max(training.tokens, training.prompt_tokens)
    return around + _layer_activations(shape, training, largest)


def _layer_activations(shape: _Shape, training: TrainingSettings, tokens: int) -> int:
    """What one layer keeps of its forward pass, in bytes.

    For each token: each norm's D + 1 float32 (and A + H + K·W + K where queries and keys have
    norms); attention 2·A + 2·K·W, and A + K·W where values are part of a fused projection, as the
    base computes, and H float32; the gate's input A in float32 where it was not; feed-forward 3·I;
    LoRA's inputs, the columns of all matrices, as each has its own copy (over a float32 base
    without autocast, or NF4 on a GPU, those of one input share it), and r for each matrix. For the
    layer: its matrices as autocast narrows them, unless in NF4.
    """
    narrow, lora = training.base_bytes, training.lora_bytes
    norms = 4 * shape.norms * (shape.width + 1)
    if shape.head_norms:
        norms += 4 * (shape.attention + shape.heads + shape.keys + shape.kv_heads)
    attention = (3 if shape.fused else 2) * (shape.attention + shape.keys)
    gate = 4 * shape.attention if narrow != 4 else 0
    columns = [columns for _, columns in shape.matrices]
    uncast = training.autocast is None or (training.load_in_4bit and not training.on_cpu)
    if uncast and training.load_bytes == lora and not training.dropout:
        inputs = 2 * shape.width + shape.attention + shape.feed_forward
    else:
        inputs = sum(columns)
    dropped = sum(columns) if training.dropout else 0  # a byte each: which were not
    each = norms + attention * narrow + 4 * shape.heads + gate + 3 * shape.feed_forward * narrow
    each += (inputs + training.rank * len(columns)) * lora + dropped
    narrowed = 0
    if not training.load_in_4bit and narrow != training.load_bytes:
        narrowed = narrow * sum(rows * columns for rows, columns in shape.matrices)
    return tokens * each + narrowed


def _temporary(shape: _Shape, training: TrainingSettings) -> int:
    gradients = training.tokens * (3 * shape.feed_forward + 2 * shape.width) * training.base_bytes
    if not training.load_in_4bit:
        return gradients
    return gradients + max(rows * columns for rows, columns in shape.matrices) * training.base_bytes


def loss_bytes(width: int, training: TrainingSettings) -> int:
    """What the loss takes over a student of ``width``, see ``estimate``."""
    tokens, vocab = training.tokens, training.vocab_size
    wide, narrow = training.load_bytes, training.base_bytes
    if training.on_cpu:  # the student's and the teacher's, and a few rows of them in float32
        rows = min(tokens, chunk_size(vocab, training.logits_bytes, narrow))
        chunk = 2 * narrow * rows * vocab + LOGITS_COPIES * min(BLOCK_BYTES, 4 * rows * vocab)
    else:
        rows = min(tokens, chunk_size(vocab, training.logits_bytes))
        chunk = (4 * LOGITS_COPIES + narrow) * rows * vocab
    narrowed = narrow if narrow != wide else 0
    chunk += 4 * vocab * training.head_columns
    return chunk + (2 * wide + narrowed) * tokens * width + narrowed * vocab * width


def memory_of(
    base: Any, config: RunConfig, vocab_size: int, device: torch.device | None = None
) -> TrainingMemory:
    """The estimate for a run's settings; ``base``: the ``transformers`` configuration of
    ``config.student.base``. Other arguments: see ``settings_of``."""
    return estimate(base, settings_of(config, base.hidden_size, vocab_size, device))


def settings_of(
    config: RunConfig, width: int, vocab_size: int, device: torch.device | None = None
) -> TrainingSettings:
    """What the estimate of a student of ``width`` takes from a run's settings.

    ``vocab_size``: the teacher's. ``device``: where it trains, else where this process would; each
    process of a launch takes as much.
    """
    processes = PartialState()
    device = device or processes.device
    on_cpu = device.type in ("cpu", "mps")  # nothing is trained on Metal
    train, student = config.train, config.student
    device = torch.device("cpu") if on_cpu else device
    precision = choose_precision(train, width, device)
    parts = train.accumulation * processes.num_processes
    prompts = -(-config.safety.together // parts) if config.safety_head else 0
    length = config.data.max_length or USUAL_LENGTH
    together = train.batch_size
    if train.batch_tokens is not None:
        together = max(1, train.batch_tokens // length)
    load_dtype = torch.float32
    if config.student.base is not None:
        load_dtype = base_dtype(device, load_in_4bit=student.load_in_4bit)
    return TrainingSettings(
        vocab_size=vocab_size,
        rank=student.lora_rank,
        dropout=student.lora_dropout,
        load_in_4bit=student.load_in_4bit,
        load_dtype=load_dtype,
        autocast=torch.bfloat16 if precision == "bf16" else None,
        sequences=-(-together // parts),
        length=length,
        prompt_tokens=prompts * PROMPT_TOKENS,
        checkpointing=train.gradient_checkpointing is not False,
        snapshots=_snapshots(config),
        safety_head=config.safety_head,
        verification_head=config.verification_head,
        on_cpu=on_cpu,
        logits_bytes=logits_bytes(device),
        head_columns=_head_columns(config.targets, vocab_size),
    )


def _head_columns(targets: TargetsConfig, vocab_size: int) -> int:
    if targets.kind != "compact":
        return 0
    usual = compact_recipe(targets.num_topk, vocab_size, width=vocab_size).sketch_bytes
    return round(DIRECTIONS * (usual if targets.sketch_bytes is None else targets.sketch_bytes))
