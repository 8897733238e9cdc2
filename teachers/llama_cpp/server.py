"""What runs inside the worker process: answers the parent's requests with llama.cpp.

Heavy modules are imported by the operations that need them: a bad file is refused before PyTorch
is loaded.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO

from teachers.errors import SettingRefused
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.wire import Arrays, pack_ragged, read_frame, unpack_ragged, write_frame

if TYPE_CHECKING:
    from teachers.llama_cpp.context import ContextShape, LlamaContext, Outputs
    from teachers.targets.recipe import Recipe
    from teachers.targets.state_codec import Basis


PARENT_SECONDS = 2.0  # how often a worker checks that its parent is there
Answer = tuple[dict[str, Any], Arrays]


class Server:
    """Answers requests inside the child; one method per operation."""

    def __init__(self, output: BinaryIO) -> None:
        self.output = output
        self.model: Any = None
        self.contexts: list[Any] = []
        self._stream: Iterator[list[int]] | None = None
        self._streams = 0
        self._done = 0
        self._reporting = threading.Lock()

    def report(self, more: int) -> None:
        """Report that ``more`` units are done; contexts' own threads call this."""
        with self._reporting:
            self._done += more
            write_frame(self.output, {"progress": self._done})

    def contexts_of(self, count: int) -> list[Any]:
        """So many contexts, which share the model's threads; kept until the number changes."""
        from teachers.llama_cpp.context import LlamaContext

        self._stream = None  # whoever asks for them clears what it was computed in
        if len(self.contexts) != count:
            for context in self.contexts:
                context.release()
            each = max(1, self.model.threads // count)
            self.contexts = [LlamaContext(self.model, each, count) for _ in range(count)]
        return self.contexts

    @contextmanager
    def _own_context(self) -> Iterator[LlamaContext]:
        """A context with all threads, for one request."""
        from teachers.llama_cpp.context import LlamaContext

        context = LlamaContext(self.model, self.model.threads)
        try:
            yield context
        finally:
            context.release()

    def load(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        try:
            import llama_cpp.llama_cpp as native

            import teachers.llama_cpp.library.ggml  # noqa: F401
        except Exception as error:
            # The package or its shared library is missing or damaged: no file is to blame.
            return {"library": " ".join(str(error).split()) or type(error).__name__}, {}
        try:
            from teachers.llama_cpp.context import LlamaModel

            options = LoadOptions.from_json(request["options"])
            self.model = LlamaModel(request["path"], options, threads=request["threads"])
            return self.model.describe(), {}
        except AttributeError as error:
            if error.obj is not native:
                raise
            missing = f"its package has no {error.name}: another version than this project needs"
            return {"library": missing}, {}

    def first_decode(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        """Logits ``[N, V]`` of a few given tokens: does this library run this file?"""
        with self._own_context() as context:
            return {}, {"logits": context.first_decode(request["tokens"], exact=request["exact"])}

    def tokenize(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        special = {"add_special": request["add_special"], "parse_special": request["parse_special"]}
        tokens = [self.model.tokenize(text, **special) for text in request["texts"]]
        return {}, pack_ragged(tokens, "tokens")

    def detokenize(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        texts = []
        for tokens in unpack_ragged(arrays, "tokens"):
            raw = b"".join(self.model.piece(token) for token in tokens.tolist())
            texts.append(raw.decode("utf-8", errors="replace"))
        return {"texts": texts}, {}

    def generate(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        import numpy as np
        import torch

        from teachers.base import GenerationRequest, Sampling
        from teachers.llama_cpp.generation import SequenceGenerator, Wanted
        from teachers.targets.stored_arrays import reduce

        segments, taken = unpack_ragged(arrays, "segments"), 0
        prompts = []
        for count in arrays["segment_counts"].tolist():
            prompts.append(segments[taken : taken + count])
            taken += count
        sampling, first = Sampling(**request["sampling"]), request["first_index"]
        keep = _keep(arrays)
        wanted = Wanted()
        if request.get("recipe") is not None:
            recipe, bases = _recipe(request, arrays)
            wanted = Wanted(lambda answer: reduce(answer, recipe, bases), recipe.needs_states)
        contexts = self.contexts_of(self.model.generation_contexts)[: len(prompts)]
        edges = [len(prompts) * part // len(contexts) for part in range(len(contexts) + 1)]

        def work(context: Any, start: int, stop: int) -> Any:
            torch.set_num_threads(context.threads)  # of this context's thread
            some = None if keep is None else keep[start:stop]
            own = GenerationRequest(prompts[start:stop], sampling, first + start, some)
            return SequenceGenerator(context, own, wanted).run(self.report)

        with ThreadPoolExecutor(len(contexts)) as pool:
            parts = list(pool.map(work, contexts, edges, edges[1:]))
        if self.model.gpus:  # what comes next, training too, may need the cache's memory
            for context in contexts:
                context.release()
        sequences = [tokens for some, _ in parts for tokens in some]
        kept = {name: np.concatenate([rows[name] for _, rows in parts]) for name in parts[0][1]}
        return {}, pack_ragged(sequences, "tokens") | kept

    def stream(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        from teachers.base import GenerationRequest, Sampling
        from teachers.llama_cpp.generation import SequenceGenerator

        # The first context that `generate` would take: the same numbers to the last bit.
        context = self.contexts_of(self.model.generation_contexts)[0]
        prompts, sampling = [unpack_ragged(arrays, "tokens")], Sampling(**request["sampling"])
        own = GenerationRequest(prompts, sampling, request["number"])
        self._stream = SequenceGenerator(context, own).stream()
        self._streams += 1
        return {"stream": self._streams}, {}

    def stream_next(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        if self._stream is None or request["stream"] != self._streams:
            raise RuntimeError("another request has ended the stream; begin it again")
        step = next(self._stream, None)
        tokens = step or []
        pieces = [self.model.piece(token).decode("latin-1") for token in tokens]
        return {"tokens": tokens, "pieces": pieces, "over": step is None}, {}

    def score(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        import torch

        from teachers.llama_cpp.context import ContextShape
        from teachers.llama_cpp.scoring import Scorer, as_answer
        from teachers.targets.stored_arrays import reduce

        recipe, bases = _recipe(request, arrays)
        shape = ContextShape(
            1, 1, "", logits=recipe.needs_logits, states=recipe.needs_states, layers=recipe.layers
        )
        threads = max(1, self.model.threads // self.model.scoring_contexts)

        def reduced(outputs: Outputs) -> Arrays:
            torch.set_num_threads(threads)  # of this context's thread
            return reduce(as_answer(outputs), recipe, bases)

        scorer = Scorer(unpack_ragged(arrays, "tokens"), shape, _keep(arrays))
        fold = _folding(arrays)
        return {}, scorer.run(self, lambda outputs: reduced(fold(outputs)))

    def states(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        from teachers.llama_cpp.context import ContextShape

        cache, layers = "f32" if request["exact"] else "", tuple(request["layers"])
        shape = ContextShape(1, 1, cache, logits=False, states=True, layers=layers)
        return self._rows(shape, request, arrays)

    def logits(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        from teachers.llama_cpp.context import ContextShape

        return self._rows(ContextShape(1, 1, "f32" if request["exact"] else ""), request, arrays)

    def _rows(self, shape: ContextShape, request: dict[str, Any], arrays: Arrays) -> Answer:
        from teachers.llama_cpp.scoring import Scorer, as_arrays

        scorer = Scorer(unpack_ragged(arrays, "tokens"), shape, _keep(arrays))
        fold = _folding(arrays)
        return {}, scorer.run(self, lambda outputs: as_arrays(fold(outputs)))

    def speed(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        # All threads on one sequence, as a user runs it.
        with self._own_context() as context:
            prompt, generation = context.speed(request["prompt_tokens"], request["new_tokens"])
        return {"prompt": prompt, "generation": generation}, {}

    def peak_memory(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        import resource  # not on Windows, where the parent knows

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"bytes": most if sys.platform == "darwin" else most << 10}, {}

    def run(self, source: BinaryIO) -> None:
        while True:
            try:
                request, arrays = read_frame(source)
            except EOFError:
                return
            self._done = 0
            try:
                operation = getattr(self, request.pop("operation"))
                answer, answer_arrays = operation(request, arrays)
            except (RuntimeError, ValueError, MemoryError, OSError) as error:
                setting = isinstance(error, SettingRefused)
                text = str(error) or type(error).__name__
                write_frame(self.output, {"error": text, "setting": setting})
                continue
            write_frame(self.output, answer, answer_arrays)


def _recipe(request: dict[str, Any], arrays: Arrays) -> tuple[Recipe, dict[str, Basis]]:
    """What a request wants to be kept, and how hidden states are encoded for it."""
    from teachers.targets.recipe import Recipe
    from teachers.targets.state_codec import bases_in

    recipe = Recipe.from_json(request["recipe"])
    return recipe, bases_in(arrays, recipe.layers)


def _keep(arrays: Arrays) -> list[Any] | None:
    """The masks that came with a request, if there are any."""
    if "keep" not in arrays:
        return None
    return [mask.astype("bool") for mask in unpack_ragged(arrays, "keep")]


def _folding(arrays: Arrays) -> Callable[[Outputs], Outputs]:
    """What folds a batch's logits into the reduced vocabulary of a request, if it has one."""
    from teachers.vocabulary.reduced import ReducedVocabulary

    vocabulary = ReducedVocabulary.in_arrays(arrays)

    def fold(outputs: Outputs) -> Outputs:
        if vocabulary is None or outputs.logits is None:
            return outputs
        return replace(outputs, logits=vocabulary.fold_logs(outputs.logits))

    return fold


def _end_with(parent: int) -> None:
    """End with a killed parent: busy in llama.cpp, this process would not see the closed pipe."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def serve() -> None:
    """Answer requests until the parent closes the pipe. Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    # llama.cpp's libraries may print to standard output; the protocol has its own descriptor.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    Server(output).run(sys.stdin.buffer)
