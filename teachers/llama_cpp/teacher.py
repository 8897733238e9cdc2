"""A GGUF file as a ``Teacher``: the parent's side of the llama.cpp worker."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import psutil
from gguf import GGUFValueType

from teachers.base import (
    Floats,
    GenerationRequest,
    Keep,
    LogitRule,
    Progress,
    Sampling,
    Teacher,
    TeacherInfo,
    TeacherShape,
    Tokens,
    last_predictions,
    no_progress,
)
from teachers.gguf.file import GGUFFile, read_gguf, tokenizer_sha256
from teachers.gguf.output import logit_rules, output_name, output_rows, rounded_states
from teachers.gguf.split import model_stem
from teachers.llama_cpp.interrupts import uninterrupted
from teachers.llama_cpp.library.kernels import LoadOptions
from teachers.llama_cpp.wire import Arrays, pack_ragged, unpack_ragged
from teachers.llama_cpp.worker import Worker
from teachers.names import one_line_name, ordinary_name
from teachers.tokenizer.gguf_metadata import chat_templates, special_tokens
from teachers.vocabulary.reduced import ReducedVocabulary

if TYPE_CHECKING:
    from teachers.targets.recipe import Recipe
    from teachers.targets.state_codec import Basis


def shape_in(file: GGUFFile, width: int) -> TeacherShape:
    """The layers' shape by the metadata of a model of ``width``; llama.cpp's keys and defaults."""

    def stated(key: str, default: object = None) -> object:
        field = file.fields.get(f"{file.architecture}.{key}")
        if field is None:
            return default
        if field.type != GGUFValueType.FLOAT32:
            return field.value
        return float(str(np.float32(field.value)))  # as written: 1e-05, not 9.999999747378752e-06

    heads = stated("attention.head_count")
    even = width // heads if type(heads) is int and heads > 0 and width % heads == 0 else None
    head_width = stated("attention.key_length", even)
    return TeacherShape.from_untrusted(
        heads=heads,
        kv_heads=stated("attention.head_count_kv", heads),
        head_width=head_width if stated("attention.value_length", even) == head_width else None,
        ffn_width=stated("feed_forward_length"),
        rope_theta=stated("rope.freq_base", 10000.0),
        rms_norm_eps=stated("attention.layer_norm_rms_epsilon"),
    )


def info_of(file: GGUFFile, model: Mapping[str, Any], sha256: str) -> TeacherInfo:
    """Facts about the teacher in ``file``, of which llama.cpp says ``model``
    (``LlamaModel.describe``)."""
    template, tool_template = chat_templates(file.fields)
    return TeacherInfo(
        name=one_line_name(file.value("general.name"), ordinary_name(model_stem(file.path))),
        architecture=file.architecture,
        parameters=file.parameters,
        file_bytes=file.size,
        vocab_size=model["vocab_size"],
        width=model["width"],
        layers=model["layers"],
        context_length=model["context_length"],
        bos=model["bos"] if model["bos"] >= 0 else None,
        eos=model["eos"] if model["eos"] >= 0 else None,
        end_tokens=tuple(model["end_tokens"]),
        add_bos=model["add_bos"],
        chat_template=template,
        sha256=sha256,
        tokenizer_sha256=tokenizer_sha256(file),
        shape=shape_in(file, model["width"]),
        tool_template=tool_template,
        special_tokens=special_tokens(file.fields),
    )


def _usual_threads() -> int:
    """PyTorch's count: the physical cores that this process may use, which suits llama.cpp too."""
    import torch  # takes seconds: only once the file has been checked

    return torch.get_num_threads()


class Asked(Protocol):
    """What answers: a ``Worker``, or one behind a server (``teachers.remote``)."""

    def ask(
        self,
        operation: str,
        arguments: dict[str, Any] | None = None,
        arrays: Arrays | None = None,
        progress: Callable[[int], None] = ...,
    ) -> tuple[dict[str, Any], Arrays]:
        """The answer to one request of ``teachers.llama_cpp.server``."""
        ...

    def close(self) -> None:
        """Free everything; safe to call twice."""
        ...


class WorkerTeacher(Teacher):
    """A GGUF teacher that ``worker`` runs; ``file``: its tokenizer, embeddings and output."""

    file: GGUFFile
    worker: Asked

    @property
    def computed(self) -> GGUFFile:
        """The file that llama.cpp computes with."""
        return self.file

    def tokenize(
        self, texts: Sequence[str], *, add_special: bool, parse_special: bool
    ) -> list[Tokens]:
        request = {"texts": list(texts), "add_special": add_special, "parse_special": parse_special}
        return unpack_ragged(self.worker.ask("tokenize", request)[1], "tokens")

    def detokenize(self, sequences: Sequence[Tokens]) -> list[str]:
        answer = self.worker.ask("detokenize", arrays=pack_ragged(sequences, "tokens"))[0]
        return list(answer["texts"])

    def generate(
        self, request: GenerationRequest, progress: Progress = no_progress
    ) -> list[Tokens]:
        return self._generate(request, {}, {}, progress)[0]

    def generate_and_score(
        self,
        request: GenerationRequest,
        recipe: Recipe,
        bases: Mapping[str, Basis],
        progress: Progress = no_progress,
    ) -> tuple[list[Tokens], Arrays]:
        """See ``Teacher.generate_and_score``; in one pass, but for layers."""
        if recipe.layers:
            return super().generate_and_score(request, recipe, bases, progress)
        return self._generate(request, {"recipe": recipe.to_json()}, _packed(bases), progress)

    def _generate(
        self,
        request: GenerationRequest,
        more: dict[str, object],
        arrays: Arrays,
        progress: Progress,
    ) -> tuple[list[Tokens], Arrays]:
        segments = [segment for prompt in request.prompts for segment in prompt]
        counts = np.array([len(prompt) for prompt in request.prompts], dtype=np.int64)
        arrays = arrays | pack_ragged(segments, "segments") | {"segment_counts": counts}
        arrays |= _packed_keep(request.keep)
        sampling = asdict(request.sampling)
        message = {"sampling": sampling, "first_index": request.first_index, **more}
        longest = request.sampling.max_length
        answer = self.worker.ask(
            "generate", message, arrays, lambda done: progress(done / longest)
        )[1]
        kept = {name: rows for name, rows in answer.items() if not name.startswith("tokens")}
        return unpack_ragged(answer, "tokens"), kept

    def stream(
        self, tokens: Tokens, sampling: Sampling, *, number: int = 0
    ) -> Iterator[tuple[int, bytes]]:
        """Go on from ``tokens`` as ``generate`` does with ``first_index=number``, token by token.

        Yields each new token, the end of its turn too, and the bytes it stands for: a character may
        be spread over several. The worker computes only what is asked for, so the iterator may be
        left at any time, also by Ctrl-C; any other request that computes something ends it.

        Raises:
            TeacherError: the worker failed, or another request came between.
        """
        request = {"sampling": asdict(sampling), "number": number}
        with uninterrupted():
            started = self.worker.ask("stream", request, pack_ragged([tokens], "tokens"))[0]
        while True:
            with uninterrupted():
                step = self.worker.ask("stream_next", started)[0]
            if step["over"]:
                return
            for token, piece in zip(step["tokens"], step["pieces"], strict=True):
                yield token, piece.encode("latin-1")

    def score(
        self,
        sequences: Sequence[Tokens],
        recipe: Recipe,
        bases: Mapping[str, Basis],
        progress: Progress = no_progress,
        keep: Sequence[Keep] | None = None,
        vocabulary: ReducedVocabulary | None = None,
    ) -> Arrays:
        """See ``Teacher.score``; ``vocabulary``: what logits are folded into first."""
        arrays = pack_ragged(sequences, "tokens") | _packed(bases) | _packed_keep(keep)
        arrays |= _packed_vocabulary(vocabulary)
        return self.worker.ask("score", {"recipe": recipe.to_json()}, arrays, progress)[1]

    def states(
        self,
        sequences: Sequence[Tokens],
        layers: Sequence[int] = (),
        *,
        exact: bool = False,
        keep: Sequence[Keep] | None = None,
    ) -> Mapping[str, Floats]:
        """See ``Teacher.states``; ``exact``: with a float32 KV cache and without flash
        attention."""
        request = {"layers": list(layers), "exact": exact}
        tokens = pack_ragged(sequences, "tokens") | _packed_keep(keep)
        arrays = self.worker.ask("states", request, tokens)[1]
        return {name: values.astype(np.float32, copy=False) for name, values in arrays.items()}

    def output_rows(self, start: int, stop: int) -> Floats:
        return output_rows(self.computed, start, stop)

    def logit_rules(self) -> Sequence[LogitRule]:
        return logit_rules(self.computed, self.info.width)

    def rounded_states(self, states: Floats) -> Floats:
        kind = self.computed.tensors[output_name(self.computed)].type
        return rounded_states(states, kind)

    def last_states(self, prompts: Sequence[Tokens]) -> Floats:
        """Exact final hidden states ``[P, D]`` of the last tokens of P prompts of ≥ 1 token."""
        # What follows a sequence's last token is never computed, so each gets one more.
        longer = [np.append(tokens, tokens[-1]).astype(np.int32) for tokens in prompts]
        return self.states(longer, exact=True, keep=last_predictions(longer, 1))["final"]

    def logits(
        self,
        sequences: Sequence[Tokens],
        *,
        exact: bool = False,
        keep: Sequence[Keep] | None = None,
        vocabulary: ReducedVocabulary | None = None,
    ) -> Floats:
        """See ``Teacher.logits``; ``exact`` as in ``states``, ``vocabulary`` as in ``score``."""
        tokens = pack_ragged(sequences, "tokens") | _packed_keep(keep)
        tokens |= _packed_vocabulary(vocabulary)
        arrays = self.worker.ask("logits", {"exact": exact}, tokens)[1]
        return arrays["logits"].astype(np.float32, copy=False)

    def speed(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        request = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        answer = self.worker.ask("speed", request)[0]
        return answer["prompt"], answer["generation"]

    def close(self) -> None:
        """See ``Teacher.close``."""
        self.worker.close()


@dataclass(frozen=True)
class Widened:
    """A copy of a teacher's file whose matrices are of floating-point type ``kind``, and what
    removes it."""

    path: Path
    kind: str
    remove: Callable[[], None]


class GGUFTeacher(WorkerTeacher):
    """Runs a GGUF file through llama.cpp in a process of its own. Use as a context manager."""

    worker: Worker

    def __init__(
        self,
        path: Path,
        options: LoadOptions | None = None,
        *,
        threads: int | None = None,
        widened: Widened | None = None,
    ) -> None:
        """Check the file's header, then load it; without ``options`` on the processor alone, as
        whatever is to be exact needs it. ``widened``: what llama.cpp computes with in its place.

        Raises:
            TeacherFileError: the header is missing, damaged or not a language model's.
            TeacherError: llama.cpp cannot load the file.
            LibraryError: llama.cpp does not work on this machine.
        """
        self.file = read_gguf(path)
        self.threads = threads or _usual_threads()
        self.options = options or LoadOptions()
        self.widened = widened
        self._computed = self.file if widened is None else read_gguf(widened.path)
        path = self.computed.path  # a split model's first part, which llama.cpp wants
        self.worker = Worker(path, threads=self.threads, options=self.options, file=self.computed)
        self.info = info_of(self.file, self.worker.description, self.file.sha256)

    @property
    def runtime(self) -> str:
        cache = self.options.cache_type
        made = f"llama-cpp-python {version('llama-cpp-python')}"
        made += f", {cache} cache" if cache else ""
        return made + (f", weights as {self.widened.kind}" if self.widened else "")

    @property
    def computed(self) -> GGUFFile:
        return self._computed

    def close(self) -> None:
        """See ``Teacher.close``."""
        super().close()
        if self.widened is not None:
            self.widened.remove()

    def memory(self) -> int:
        return int(psutil.Process(self.worker.process_id).memory_info().rss)

    def peak_memory(self) -> int:
        """The most bytes of main memory the teacher's process has had, mapped files included."""
        # Not getrusage on Linux: its count begins at what the parent had.
        if platform.system() == "Linux":
            path = Path(f"/proc/{self.worker.process_id}/status")
            lines = path.read_text(encoding="ascii", errors="replace").splitlines()
            peaks = [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")]
            return peaks[0] if peaks else self.memory()  # some containers' kernels do not say
        if platform.system() == "Windows":
            return int(psutil.Process(self.worker.process_id).memory_info().peak_wset)
        return int(self.worker.ask("peak_memory")[0]["bytes"])


def _packed_keep(keep: Sequence[Keep] | None) -> Arrays:
    if keep is None:
        return {}
    return pack_ragged([mask.astype(np.int32) for mask in keep], "keep")


def _packed_vocabulary(vocabulary: ReducedVocabulary | None) -> Arrays:
    return {} if vocabulary is None else vocabulary.arrays()


def _packed(bases: Mapping[str, Basis]) -> Arrays:
    from teachers.targets.state_codec import bases_arrays  # with PyTorch: see _usual_threads

    return bases_arrays(bases)
