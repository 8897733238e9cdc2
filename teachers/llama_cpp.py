"""llama.cpp through llama-cpp-python's low-level calls: the only module that touches the native library.

It runs inside the worker process (``teachers.worker``), because llama.cpp may abort the process on a bad
file. Letters: N tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import llama_cpp.llama_cpp as native
import numpy as np
from numpy.typing import NDArray

LOGITS_BYTES = 256 << 20  # one batch's logits stay below this, whatever the vocabulary
MAX_BATCH_TOKENS = 2048
MIN_BATCH_TOKENS = 128
# Up to this size, threads that share one batch wait for each other longer than they compute: each core then
# runs a context of its own on its share of the sequences.
SMALL_MODEL_PARAMETERS = 50_000_000
FLASH_HEAD_WIDTH = 32
CACHE_BYTES = 1 << 30  # the KV cache stays below this (one sequence always fits)
CACHE_STEP = 256  # llama.cpp rounds each sequence's share of the cache up to this many tokens
MAX_LOG_LEVEL_IGNORED = 2  # ggml: 1 debug, 2 info, 3 warning, 4 error, 5 continuation of the line before

Tokens = NDArray[np.int32]


class LlamaError(RuntimeError):
    """llama.cpp refused a call; the message says which and carries its log."""


@dataclass(frozen=True)
class ContextShape:
    """What a llama.cpp context is built for: parallel sequences, tokens each, and how exactly it computes.

    ``exact`` selects a float32 KV cache without flash attention (4e-5 from PyTorch), which is also what a CPU
    computes fastest for small heads; otherwise llama.cpp's own defaults (float16 cache, flash attention).
    """

    sequences: int
    tokens: int
    exact: bool = False


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

    def __init__(self, path: str, *, threads: int, gpu_layers: int = 0) -> None:
        """Load the model at ``path``.

        Raises:
            LlamaError: llama.cpp cannot load the file.
        """
        native.llama_log_set(_forward_log, ctypes.c_void_p(0))
        native.llama_backend_init()
        parameters = native.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers
        self.model = native.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            raise LlamaError("llama.cpp cannot load the file")
        self.vocab = native.llama_model_get_vocab(self.model)
        self.vocab_size = int(native.llama_vocab_n_tokens(self.vocab))
        # The tokens with which the model ends its turn (end of text, end of turn, …).
        self.end_tokens = frozenset(
            token for token in range(self.vocab_size) if native.llama_vocab_is_eog(self.vocab, token)
        )
        self.threads = threads
        self.exact = gpu_layers == 0 or not native.llama_supports_gpu_offload()
        # llama.cpp's flash attention pays off from heads of this width on; narrower ones it slows down.
        heads = max(1, int(native.llama_model_n_head(self.model)))
        narrow = int(native.llama_model_n_embd(self.model)) // heads < FLASH_HEAD_WIDTH
        self.speaks_exactly = self.exact and narrow
        small = int(native.llama_model_n_params(self.model)) <= SMALL_MODEL_PARAMETERS
        self.lanes = threads if small and self.exact else 1
        self.batch_tokens = max(
            MIN_BATCH_TOKENS, min(MAX_BATCH_TOKENS, LOGITS_BYTES // (4 * self.vocab_size))
        )

    # -- vocabulary -----------------------------------------------------------------------------------

    def describe(self) -> dict[str, int | bool | list[int]]:
        """Facts about the vocabulary and the model that only llama.cpp knows; a missing token is -1."""
        return {
            "vocab_size": self.vocab_size,
            "bos": int(native.llama_vocab_bos(self.vocab)),
            "eos": int(native.llama_vocab_eos(self.vocab)),
            "end_tokens": sorted(self.end_tokens),
            "add_bos": bool(native.llama_vocab_get_add_bos(self.vocab)),
            "context_length": int(native.llama_model_n_ctx_train(self.model)),
            "layers": int(native.llama_model_n_layer(self.model)),
            "width": int(native.llama_model_n_embd(self.model)),
        }

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> Tokens:
        """Token ids of ``text``; ``parse_special`` reads control tokens written out in the text."""
        raw = text.encode("utf-8", errors="surrogateescape")
        room = len(raw) + 8
        while True:
            buffer = (native.llama_token * room)()
            count = native.llama_tokenize(self.vocab, raw, len(raw), buffer, room, add_special, parse_special)
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

    def __init__(self, model: LlamaModel, threads: int) -> None:
        self.model = model
        self.vocab_size = model.vocab_size
        self.batch_tokens = model.batch_tokens
        self.exact = model.exact
        self.threads = threads
        self._context: native.llama_context_p | None = None
        self._shape: ContextShape | None = None

    def prepare(self, shape: ContextShape) -> None:
        """Have an empty context of ``shape``; an existing one of the same shape is emptied and kept.

        Raises:
            LlamaError: llama.cpp cannot create it (usually memory).
        """
        if self._context is not None and self._shape == shape:
            native.llama_memory_clear(native.llama_get_memory(self._context), True)
            return
        self.release()
        parameters = native.llama_context_default_params()
        per_sequence = -(-shape.tokens // CACHE_STEP) * CACHE_STEP
        parameters.n_ctx = shape.sequences * per_sequence
        parameters.n_seq_max = shape.sequences
        parameters.n_batch = self.batch_tokens
        parameters.n_ubatch = min(512, self.batch_tokens)
        parameters.n_outputs_max_per_seq = 0  # no limit: every position's logits are wanted
        parameters.n_threads = parameters.n_threads_batch = self.threads
        if shape.exact:
            parameters.type_k = parameters.type_v = native.GGML_TYPE_F32
            parameters.flash_attn_type = native.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = native.llama_init_from_model(self.model.model, parameters)
        if not context:
            raise LlamaError(
                f"llama.cpp cannot make a context of {shape.sequences} sequences × {shape.tokens} tokens"
            )
        self._context, self._shape = context, shape

    def decode(
        self, tokens: Tokens, positions: Tokens, slots: Tokens, wanted: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Decode one batch (all arguments ``[N]``) and return the logits of the wanted tokens ``[n, V]``.

        ``slots`` says which of the context's sequences each token belongs to. The result is a view into
        llama.cpp's buffer and holds until the next call.

        Raises:
            LlamaError: llama.cpp reports a failure.
        """
        assert self._context is not None and self._shape is not None, "prepare() comes first"
        count = len(tokens)
        slot_numbers = np.arange(self._shape.sequences, dtype=np.int32)
        pointers = (slot_numbers.ctypes.data + 4 * slots.astype(np.int64)).astype(np.uintp)
        one_each = np.ones(count, dtype=np.int32)
        flags = wanted.astype(np.int8)
        tokens, positions = np.ascontiguousarray(tokens, np.int32), np.ascontiguousarray(positions, np.int32)
        batch = native.llama_batch(
            n_tokens=count,
            token=tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            embd=None,
            pos=positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=one_each.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        status = native.llama_decode(self._context, batch)
        if status != 0:
            raise LlamaError(f"llama_decode of {count} tokens answered {status}")
        outputs = int(flags.sum())
        pointer = native.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(outputs, self.vocab_size))

    def parallel(self, wanted: int, tokens: int) -> int:
        """How many sequences of ``tokens`` tokens to hold at once: ``wanted``, or what the cache allows."""
        model = self.model.model
        heads = max(1, int(native.llama_model_n_head(model)))
        width = int(native.llama_model_n_embd(model)) // heads * int(native.llama_model_n_head_kv(model))
        token_bytes = 2 * (4 if self.exact else 2) * width * int(native.llama_model_n_layer(model))
        rounded = -(-tokens // CACHE_STEP) * CACHE_STEP
        return max(
            1,
            min(wanted, self.batch_tokens, CACHE_BYTES // self.model.lanes // max(1, token_bytes * rounded)),
        )

    def forget(self, slot: int) -> None:
        """Empty one sequence of the context, so that its slot can hold another."""
        native.llama_memory_seq_rm(native.llama_get_memory(self._context), slot, -1, -1)

    def logits(self, sequences: Sequence[Tokens], *, exact: bool = False) -> Iterator[NDArray[np.float32]]:
        """Yield the next-token logits of every sequence, in order, as views of ``[n, V]`` rows.

        A sequence of n tokens gives n − 1 rows (what follows its last token is not known). Rows of one
        sequence may come in several pieces, and one piece may span several sequences; concatenated they are
        all rows in order. Each view holds until the next one is taken.
        """
        longest = max(len(tokens) for tokens in sequences)
        parallel = self.parallel(min(len(sequences), max(1, self.batch_tokens // longest)), longest)
        self.prepare(ContextShape(parallel, longest, exact or self.exact))
        flat = np.concatenate([tokens[:-1] for tokens in sequences])
        lengths = np.array([len(tokens) - 1 for tokens in sequences])
        positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
        owners = np.repeat(np.arange(len(sequences)), lengths)
        start = 0
        while start < len(flat):
            stop = self._batch_end(owners, start, parallel)
            for owner in np.unique(owners[start:stop]):
                if positions[start:stop][owners[start:stop] == owner][0] == 0:
                    self.forget(int(owner) % parallel)
            slots = (owners[start:stop] % parallel).astype(np.int32)
            wanted = np.ones(stop - start, dtype=np.bool_)
            yield self.decode(flat[start:stop], positions[start:stop], slots, wanted)
            start = stop

    def _batch_end(self, owners: NDArray[np.int64], start: int, parallel: int) -> int:
        """The end of the batch that begins at ``start``: full, or before a slot would be needed twice."""
        stop = min(len(owners), start + self.batch_tokens)
        return int(np.searchsorted(owners[:stop], owners[start] + parallel))

    def speed(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        """Measure prompt processing and generation of one sequence, both in tokens per second."""
        self.prepare(ContextShape(1, prompt_tokens + new_tokens + 1, self.exact))
        prompt = np.full(prompt_tokens, max(0, int(native.llama_vocab_bos(self.model.vocab))), dtype=np.int32)
        last = np.zeros(prompt_tokens, dtype=np.bool_)
        last[-1] = True
        slots = np.zeros(prompt_tokens, dtype=np.int32)
        self.decode(prompt[:1], slots[:1], slots[:1], last[-1:])  # first call allocates; not timed
        self.forget(0)
        begin = time.perf_counter()
        row = self.decode(prompt, np.arange(prompt_tokens, dtype=np.int32), slots, last)
        middle = time.perf_counter()
        for position in range(prompt_tokens, prompt_tokens + new_tokens):
            token = np.array([row[0].argmax()], dtype=np.int32)
            row = self.decode(token, np.array([position], dtype=np.int32), slots[:1], last[-1:])
        end = time.perf_counter()
        return prompt_tokens / (middle - begin), new_tokens / (end - middle)

    def release(self) -> None:
        """Free the context, if there is one."""
        if self._context is not None:
            native.llama_free(self._context)
            self._context = self._shape = None
