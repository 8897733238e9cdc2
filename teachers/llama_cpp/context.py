"""llama.cpp through llama-cpp-python's low-level calls, which are made nowhere else.

Runs inside the worker process, because llama.cpp may abort the process on a bad file. Letters: N
tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as native
import numpy as np
import psutil
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from teachers.gguf.split import model_bytes
from teachers.launch import own_cores
from teachers.llama_cpp.library.ggml import built_with
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.placement import place
from teachers.llama_cpp.sizes import CACHE_STEP, processor_sizes
from teachers.llama_cpp.tensor_taps import FINAL_STATE, TensorTaps, layer_output

CONTEXTS_BYTES = 1 << 30  # for the logits of all contexts, in llama.cpp's two buffers
# Up to this size, threads that share one batch wait for each other longer than they compute: each
# core then runs a context of its own on its share of the sequences.
SMALL_MODEL_PARAMETERS = 50_000_000
FLASH_HEAD_WIDTH = 32
MAPPED_SHARE = 0.5  # of the memory: a larger file is mapped, so that it need not fit
TOKEN_STRIDE = 7919  # a prime: the tokens of a first decode lie all over the vocabulary
MAX_LOG_LEVEL_IGNORED = 2  # ggml: 1 debug, 2 info, 3 warning, 4 error, 5 continues the line before

Tokens = NDArray[np.int32]


class LlamaError(RuntimeError):
    """llama.cpp refused a call; the message says which and carries its log."""


@dataclass(frozen=True)
class ContextShape:
    """What a llama.cpp context is built for: parallel sequences, tokens each, and precision.

    ``cache``: the type of the KV cache; empty: the model's own. f32 comes without flash attention
    (4e-5 from PyTorch), which is also what a CPU computes fastest for small heads; f16 with it is
    llama.cpp's own default. ``logits``, ``states`` and ``layers`` are what is wanted of each token;
    without logits the output layer is not computed. ``masked``: not every token may be wanted.
    """

    sequences: int
    tokens: int
    cache: str = "f16"
    logits: bool = True
    states: bool = False
    layers: tuple[int, ...] = ()
    masked: bool = False

    @property
    def embeddings(self) -> bool:
        """Whether llama.cpp itself gives the final states, which it does for every token only."""
        return self.states and self.logits and not self.masked


@dataclass(frozen=True)
class Outputs:
    """One decoded batch's result for its wanted tokens, as views valid until the next one.

    ``logits [n, V]``, ``states [n, D]`` (after the last norm), ``layers``: each chosen layer's
    output ``[n, D]``.
    """

    logits: NDArray[np.float32] | None
    states: NDArray[np.float32] | None
    layers: dict[int, NDArray[np.float32]]


_last_level = 0


@native.llama_log_callback
def _forward_log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """Let warnings and errors through to stderr, where the parent process reads them."""
    global _last_level
    if level != 5:
        _last_level = level
    if _last_level > MAX_LOG_LEVEL_IGNORED:
        sys.stderr.write(text.decode("utf-8", errors="replace"))
        sys.stderr.flush()


class LlamaModel:
    """One loaded GGUF model: its weights and its vocabulary."""

    def __init__(self, path: str, options: LoadOptions, *, threads: int) -> None:
        """Load the model at ``path``.

        Raises:
            LlamaError: llama.cpp cannot load the file.
        """
        native.llama_log_set(_forward_log, ctypes.c_void_p(0))
        native.llama_backend_init()
        parameters = native.llama_model_default_params()
        self.placement, sizes = place(options)
        self.gpus = self.placement.gpus
        parameters.n_gpu_layers = options.gpu_layers if self.gpus else 0
        parameters.use_extra_bufts = options.extra_buffers
        alive = self.placement.apply(parameters)
        small_file = model_bytes(Path(path)) < MAPPED_SHARE * psutil.virtual_memory().total
        if small_file and not options.mapped:
            # llama.cpp keeps a rearranged copy of some quantizations: mapped too, a file would take
            # its size twice.
            parameters.load_mode = native.LLAMA_LOAD_MODE_NONE
        self.model = native.llama_model_load_from_file(os.fsencode(path), parameters)
        del alive
        if not self.model:
            raise LlamaError("llama.cpp cannot load the file")
        self.vocab = native.llama_model_get_vocab(self.model)
        self.vocab_size = int(native.llama_vocab_n_tokens(self.vocab))
        # The tokens with which the model ends its turn (end of text, end of turn, …).
        ends = (native.llama_vocab_is_eog(self.vocab, token) for token in range(self.vocab_size))
        self.end_tokens = frozenset(token for token, is_end in enumerate(ends) if is_end)
        self.width = int(native.llama_model_n_embd(self.model))
        self.layers = int(native.llama_model_n_layer(self.model))
        self.head_width = self.width // max(1, int(native.llama_model_n_head(self.model)))
        # llama.cpp's own default, a float16 cache with flash attention, is how people run the
        # model; but it slows a CPU down where the heads are narrow.
        narrow = not self.gpus and self.head_width < FLASH_HEAD_WIDTH
        self.cache = options.cache_type or ("f32" if narrow else "f16")
        values = 2 * self.head_width * int(native.llama_model_n_head_kv(self.model)) * self.layers
        self.sizes = sizes or processor_sizes(self.vocab_size, values, options.batch_tokens)
        self.batch_tokens = self.sizes.batch_tokens
        self.most_sequences = options.sequences
        self.threads = max(threads, own_cores()) if self.gpus else threads
        # Several contexts work side by side, each with its share of the threads and the sequences.
        # Scoring computes whole batches, so a core of its own for each context is best whatever the
        # model; what is done to one context's logits then overlaps the other's decode. Generation
        # reads all weights at every step, which only a small model can afford once per context.
        small = int(native.llama_model_n_params(self.model)) <= SMALL_MODEL_PARAMETERS
        affordable = max(1, CONTEXTS_BYTES // (8 * self.batch_tokens * self.vocab_size))
        self.scoring_contexts = 1 if self.gpus else min(threads, affordable)
        self.generation_contexts = threads if small and not self.gpus else 1

    def describe(self) -> dict[str, Any]:
        """What only llama.cpp knows of the vocabulary and the model; a missing token is -1."""
        return {
            "vocab_size": self.vocab_size,
            "bos": int(native.llama_vocab_bos(self.vocab)),
            "eos": int(native.llama_vocab_eos(self.vocab)),
            "end_tokens": sorted(self.end_tokens),
            "add_bos": bool(native.llama_vocab_get_add_bos(self.vocab)),
            "context_length": int(native.llama_model_n_ctx_train(self.model)),
            "layers": self.layers,
            "width": self.width,
            "gpus": [gpu.name for gpu in self.gpus],
            "built_with": built_with(),
        }

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> Tokens:
        """Token ids of ``text``; ``parse_special`` reads control tokens written out in the text."""
        raw = text.encode("utf-8", errors="surrogateescape")
        room = len(raw) + 8
        while True:
            buffer = (native.llama_token * room)()
            count = native.llama_tokenize(
                self.vocab, raw, len(raw), buffer, room, add_special, parse_special
            )
            if count >= 0:
                return np.frombuffer(buffer, dtype=np.int32, count=count).copy()
            room = -count

    def piece(self, token: int) -> bytes:
        """The bytes one token stands for, control tokens written out."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = native.llama_token_to_piece(self.vocab, token, buffer, room, 0, True)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def close(self) -> None:
        """Free the model; its contexts must be released before."""
        if self.model:
            native.llama_model_free(self.model)
            self.model = None


class LlamaContext:
    """At any time one llama.cpp context on a model, used by one thread."""

    def __init__(self, model: LlamaModel, threads: int, contexts: int = 1) -> None:
        """``contexts``: how many share the memory for caches."""
        self.model = model
        self.contexts = contexts
        self.vocab_size = model.vocab_size
        self.batch_tokens = model.batch_tokens
        self.threads = threads
        self._context: native.llama_context_p | None = None
        self._shape: ContextShape | None = None
        self._taps: TensorTaps | None = None

    def prepare(self, shape: ContextShape) -> None:
        """Have an empty context of ``shape``; one of the same shape is emptied and kept.

        Raises:
            LlamaError: llama.cpp cannot create it (usually memory), or the model is an encoder.
        """
        if self._context is not None and self._shape == shape:
            # What the cache held is masked, not wiped: that would write all of it for every batch.
            native.llama_memory_clear(native.llama_get_memory(self._context), False)
            return
        self.release()
        parameters = native.llama_context_default_params()
        per_sequence = -(-shape.tokens // CACHE_STEP) * CACHE_STEP
        parameters.n_ctx = shape.sequences * per_sequence
        parameters.n_seq_max = shape.sequences
        parameters.n_batch = self.batch_tokens
        parameters.n_ubatch = self.batch_tokens
        parameters.n_outputs_max_per_seq = 0  # no limit: every position's logits are wanted
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.type_k = parameters.type_v = GGMLQuantizationType[shape.cache.upper()]
        if shape.cache == "f32":
            parameters.flash_attn_type = native.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # By default a GPU computes large products of weights in main memory.
        if not self.model.gpus:
            parameters.op_offload = parameters.offload_kqv = False
        parameters.embeddings = shape.embeddings
        self._taps = self._taps_for(shape)
        if self._taps is not None:
            parameters.cb_eval = self._taps.callback
        context = native.llama_init_from_model(self.model.model, parameters)
        if not context:
            raise LlamaError(
                f"llama.cpp cannot make a context of {shape.sequences} sequences × {shape.tokens} "
                f"tokens with a {shape.cache} cache (teacher.cache_type) and batches of "
                f"{self.batch_tokens} (teacher.batch_tokens)"
            )
        self._context, self._shape = context, shape
        if not native.llama_get_memory(context):
            raise LlamaError(
                "it keeps nothing of earlier tokens, so it is no causal language model, which a "
                "teacher must be"
            )

    def _taps_for(self, shape: ContextShape) -> TensorTaps | None:
        """What to read out of the graph: layers, and the final state where nothing else has it."""
        final = shape.states and not shape.embeddings
        names = [layer_output(layer) for layer in shape.layers] + [FINAL_STATE] * final
        last = None if shape.logits else FINAL_STATE
        return TensorTaps(names, self.model.width, stop_after=last) if names else None

    def decode(
        self, tokens: Tokens, positions: Tokens, slots: Tokens, wanted: NDArray[np.bool_]
    ) -> Outputs:
        """Decode one batch (all arguments ``[N]``, N ≤ ``batch_tokens``): the wanted tokens' rows.

        ``slots``: which of the context's sequences each token belongs to; where layers, or states
        of some tokens, are asked for, the sequences have equally many. At least one token is
        wanted. The result consists of views into llama.cpp's buffers, valid until the next call.

        Raises:
            LlamaError: llama.cpp reports a failure.
        """
        assert self._context is not None and self._shape is not None, "prepare() comes first"
        count = len(tokens)
        slot_numbers = np.arange(self._shape.sequences, dtype=np.int32)
        pointers = (slot_numbers.ctypes.data + 4 * slots.astype(np.int64)).astype(np.uintp)
        one_each = np.ones(count, dtype=np.int32)
        flags = wanted.astype(np.int8)
        tokens = np.ascontiguousarray(tokens, np.int32)
        positions = np.ascontiguousarray(positions, np.int32)
        integers, pointer = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER
        batch = native.llama_batch(
            n_tokens=count,
            token=tokens.ctypes.data_as(integers),
            embd=None,
            pos=positions.ctypes.data_as(integers),
            n_seq_id=one_each.ctypes.data_as(integers),
            seq_id=pointers.ctypes.data_as(pointer(integers)),
            logits=flags.ctypes.data_as(pointer(ctypes.c_int8)),
        )
        if self._taps is not None:
            self._taps.clear()
        status = native.llama_decode(self._context, batch)
        if status != 0:
            raise LlamaError(f"llama_decode of {count} tokens answered {status}")
        return self._outputs(wanted)

    def _outputs(self, wanted: NDArray[np.bool_]) -> Outputs:
        """The result of the batch just decoded."""
        assert self._shape is not None
        shape, count = self._shape, int(wanted.sum())
        logits = states = None
        if shape.logits:
            logits = _view(native.llama_get_logits(self._context), (count, self.vocab_size))
        if shape.embeddings:
            states = _view(native.llama_get_embeddings(self._context), (count, self.model.width))
        layers: dict[int, NDArray[np.float32]] = {}
        if self._taps is not None:
            native.llama_synchronize(self._context)
            if shape.states and not shape.embeddings:
                states = self._taps.take(FINAL_STATE, wanted)
            layers = {one: self._taps.take(layer_output(one), wanted) for one in shape.layers}
            rows = [len(part) for part in (states, *layers.values()) if part is not None]
            if self._taps.error or set(rows) - {count}:
                raise LlamaError(
                    self._taps.error
                    or f"this architecture names no such hidden states: {count} rows were wanted, "
                    f"{rows} found"
                )
        return Outputs(logits, states, layers)

    def parallel(self, wanted: int, tokens: int, cache: str, *, shared: bool) -> int:
        """How many sequences of ``tokens`` tokens to decode together: ``wanted``, or what the cache
        allows; with ``shared``, besides a slot that keeps what they begin with.

        Raises:
            SettingRefused: a GPU has no room for one.
        """
        sizes = self.model.sizes
        if self.model.gpus:  # others may have come since the model was loaded, a student too
            sizes = sizes.within(self.model.placement.now())
        fitting = sizes.sequences(tokens, cache, self.contexts) - shared
        most = min(wanted, self.batch_tokens - shared, self.model.most_sequences or wanted)
        return max(1, min(most, fitting))

    def start(self, slot: int, like: int | None = None) -> None:
        """Have a slot hold nothing, or what slot ``like`` holds, for a new sequence."""
        memory = native.llama_get_memory(self._context)
        native.llama_memory_seq_rm(memory, slot, -1, -1)
        if like is not None:
            native.llama_memory_seq_cp(memory, like, slot, -1, -1)

    def first_decode(self, count: int, *, exact: bool) -> NDArray[np.float32]:
        """Logits ``[N, V]`` of ``count`` tokens spread over the vocabulary, always the same ones.

        Fewer where the model's context is shorter.
        """
        count = max(1, min(count, int(native.llama_model_n_ctx_train(self.model.model))))
        self.prepare(ContextShape(1, count, "f32" if exact else "f16"))
        spread = np.arange(1, count + 1, dtype=np.int64) * TOKEN_STRIDE % self.vocab_size
        positions, slots = np.arange(count, dtype=np.int32), np.zeros(count, dtype=np.int32)
        outputs = self.decode(spread.astype(np.int32), positions, slots, np.ones(count, np.bool_))
        assert outputs.logits is not None
        return outputs.logits.copy()

    def speed(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        """Measure prompt processing and generation of one sequence, both in tokens per second."""
        self.prepare(ContextShape(1, prompt_tokens + new_tokens + 1, self.model.cache))
        bos = max(0, int(native.llama_vocab_bos(self.model.vocab)))
        prompt = np.full(prompt_tokens, bos, dtype=np.int32)
        last = np.zeros(prompt_tokens, dtype=np.bool_)
        last[-1] = True
        slots = np.zeros(prompt_tokens, dtype=np.int32)
        self.decode(prompt[:1], slots[:1], slots[:1], last[-1:])  # first call allocates; not timed
        self.start(0)
        start = time.perf_counter()
        row = self._last_row(prompt, np.arange(prompt_tokens, dtype=np.int32), slots, last)
        middle = time.perf_counter()
        for position in range(prompt_tokens, prompt_tokens + new_tokens):
            token = np.array([row.argmax()], dtype=np.int32)
            row = self._last_row(token, np.array([position], dtype=np.int32), slots[:1], last[-1:])
        end = time.perf_counter()
        return prompt_tokens / (middle - start), new_tokens / (end - middle)

    def _last_row(
        self, tokens: Tokens, positions: Tokens, slots: Tokens, wanted: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """The logits of the last token, ``[V]``, computed in batches."""
        for start in range(0, len(tokens), self.batch_tokens):
            span = slice(start, start + self.batch_tokens)
            outputs = self.decode(tokens[span], positions[span], slots[span], wanted[span])
        assert outputs.logits is not None
        row: NDArray[np.float32] = outputs.logits[-1]
        return row

    def release(self) -> None:
        """Free the context, if there is one."""
        if self._context is not None:
            native.llama_free(self._context)
            self._context = self._shape = self._taps = None


def _view(pointer: object, shape: tuple[int, int]) -> NDArray[np.float32]:
    """llama.cpp's buffer as an array, without a copy."""
    if not pointer:
        raise LlamaError("llama.cpp gives no such output for this model")
    return np.ctypeslib.as_array(pointer, shape=shape)
