"""What runs inside the worker process: answers the parent's requests with llama.cpp.

Heavy modules are imported by the operations that need them: the process is there, and a bad file
found out, before PyTorch is loaded.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO

from teachers.llama_cpp.library.kernels import Way
from teachers.llama_cpp.wire import Arrays, pack_ragged, read_frame, unpack_ragged, write_frame

if TYPE_CHECKING:
    from teachers.llama_cpp.context import Outputs
    from teachers.targets.recipe import Recipe
    from teachers.targets.state_codec import Basis


PARENT_SECONDS = 2.0  # how often a worker sees whether its parent is there
Answer = tuple[dict[str, Any], Arrays]


class Server:
    """Answers requests inside the child; one method per operation."""

    def __init__(self, output: BinaryIO) -> None:
        self.output = output
        self.model: Any = None
        self.lanes: list[Any] = []
        self._stream: Iterator[list[int]] | None = None
        self._streams = 0
        self._done = 0
        self._reporting = threading.Lock()

    def report(self, more: int) -> None:
        """Tell the parent that ``more`` units are done; lanes call this from their own threads."""
        with self._reporting:
            self._done += more
            write_frame(self.output, {"progress": self._done})

    def lanes_of(self, count: int) -> list[Any]:
        """So many contexts on the model, which share its threads; kept until another number is
        asked for."""
        from teachers.llama_cpp.context import LlamaContext

        self._stream = None  # whoever asks for them clears what it was computed in
        if len(self.lanes) != count:
            for lane in self.lanes:
                lane.release()
            each = max(1, self.model.threads // count)
            self.lanes = [LlamaContext(self.model, each, count) for _ in range(count)]
        return self.lanes

    def load(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        try:
            import llama_cpp.llama_cpp as native

            import teachers.llama_cpp.library.ggml  # noqa: F401
        except Exception as error:
            # The package or its shared library is missing or damaged in whatever way: no file is to
            # blame.
            return {"library": " ".join(str(error).split()) or type(error).__name__}, {}
        try:
            from teachers.llama_cpp.context import LlamaModel

            self.model = LlamaModel(
                request["path"], Way(**request["way"]), threads=request["threads"]
            )
            return self.model.describe(), {}
        except AttributeError as error:
            if error.obj is not native:
                raise
            return {
                "library": f"its package has no {error.name}: another version than this project "
                "needs"
            }, {}

    def first_decode(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        """Logits ``[N, V]`` of a few given tokens, in a context of their own: does this library
        run this file?"""
        from teachers.llama_cpp.context import LlamaContext

        context = LlamaContext(self.model, self.model.threads)
        try:
            return {}, {"logits": context.first_decode(request["tokens"], exact=request["exact"])}
        finally:
            context.release()

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

    def speak(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        import numpy as np
        import torch

        from teachers.base import Sampling
        from teachers.llama_cpp.generation import Speaker, Wanted
        from teachers.targets.stored_arrays import reduce

        segments = unpack_ragged(arrays, "segments")
        requests, taken = [], 0
        for count in arrays["segment_counts"].tolist():
            requests.append(segments[taken : taken + count])
            taken += count
        sampling = Sampling(**request["sampling"])

        recipe, bases = _recipe(request, arrays)
        wanted = Wanted(
            None if recipe is None else lambda answer: reduce(answer, recipe, bases),
            recipe is not None and recipe.needs_states,
        )
        lanes = self.lanes_of(self.model.speech_lanes)[: len(requests)]
        edges = [len(requests) * place // len(lanes) for place in range(len(lanes) + 1)]

        def work(lane: Any, start: int, stop: int) -> Any:
            torch.set_num_threads(lane.threads)  # of this lane's thread
            numbers = [request["first_index"] + index for index in range(start, stop)]
            return Speaker(lane, sampling, wanted).speak(requests[start:stop], numbers, self.report)

        with ThreadPoolExecutor(len(lanes)) as pool:
            said = list(pool.map(work, lanes, edges, edges[1:]))
        kept = {
            name: np.concatenate([part.arrays[name] for part in said]) for name in said[0].arrays
        }
        return {}, pack_ragged(
            [tokens for part in said for tokens in part.sequences], "tokens"
        ) | kept

    def stream(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        from teachers.base import Sampling
        from teachers.llama_cpp.generation import Speaker, Wanted

        # The first of the lanes that `speak` would take, so that the same numbers come out to the
        # last bit.
        lane = self.lanes_of(self.model.speech_lanes)[0]
        speaker = Speaker(lane, Sampling(**request["sampling"]), Wanted())
        self._stream = speaker.stream(unpack_ragged(arrays, "tokens")[0], request["number"])
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
        assert recipe is not None
        shape = ContextShape(
            1, 1, logits=recipe.needs_logits, states=recipe.needs_states, layers=recipe.layers
        )
        scorer = Scorer(unpack_ragged(arrays, "tokens"), shape)
        threads = max(1, self.model.threads // self.model.score_lanes)

        def reduced(outputs: Outputs) -> Arrays:
            torch.set_num_threads(threads)  # of this lane's thread
            return reduce(as_answer(outputs), recipe, bases)

        return {}, scorer.run(self, reduced)

    def states(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        from teachers.llama_cpp.context import ContextShape
        from teachers.llama_cpp.scoring import Scorer, as_arrays

        layers = tuple(request["layers"])
        shape = ContextShape(1, 1, exact=request["exact"], logits=False, states=True, layers=layers)
        return {}, Scorer(unpack_ragged(arrays, "tokens"), shape, request["last"]).run(
            self, as_arrays
        )

    def logits(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        from teachers.llama_cpp.context import ContextShape
        from teachers.llama_cpp.scoring import Scorer, as_arrays

        shape = ContextShape(1, 1, exact=request["exact"])
        return {}, Scorer(unpack_ragged(arrays, "tokens"), shape, request["last"]).run(
            self, as_arrays
        )

    def speed(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        from teachers.llama_cpp.context import LlamaContext

        # All threads on one sequence, as a user runs it.
        context = LlamaContext(self.model, self.model.threads)
        try:
            prompt, generation = context.speed(request["prompt_tokens"], request["new_tokens"])
        finally:
            context.release()
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
                write_frame(self.output, {"error": str(error) or type(error).__name__})
                continue
            write_frame(self.output, answer, answer_arrays)


def _recipe(request: dict[str, Any], arrays: Arrays) -> tuple[Recipe | None, dict[str, Basis]]:
    """What a request wants to be kept, and how hidden states are encoded for it."""
    from teachers.targets.recipe import Recipe
    from teachers.targets.state_codec import Basis

    if request.get("recipe") is None:
        return None, {}
    recipe = Recipe.from_json(request["recipe"])
    names = ["final", *(f"layer{layer}" for layer in recipe.layers)]
    found = {name: Basis.from_arrays(arrays, name) for name in names}
    return recipe, {name: basis for name, basis in found.items() if basis is not None}


def _end_with(parent: int) -> None:
    """End this process when its parent has been killed: busy in llama.cpp, it would not see the
    closed pipe."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def serve() -> None:
    """Answer requests until the parent closes the pipe. Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    # llama.cpp's libraries may print to standard output; keep the protocol on a descriptor of its
    # own.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    Server(output).run(sys.stdin.buffer)
