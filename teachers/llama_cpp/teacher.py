"""A GGUF file as a ``Teacher``: the parent's side of the llama.cpp worker."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
from gguf import GGUFValueType
from numpy.typing import NDArray

from teachers.base import (
    Floats,
    Progress,
    Sampling,
    TeacherInfo,
    TeacherShape,
    Tokens,
    speak_then_score,
)
from teachers.errors import RequestRefused
from teachers.gguf.file import GGUFFile, file_sha256, read_gguf, tokenizer_sha256
from teachers.llama_cpp.interrupts import uninterrupted
from teachers.llama_cpp.wire import Arrays, pack_ragged, unpack_ragged
from teachers.llama_cpp.worker import Worker

if TYPE_CHECKING:
    from teachers.targets.recipe import Recipe
    from teachers.targets.state_codec import Basis


def readable(value: object, default: str) -> str:
    """Text of a metadata value for people; a byte that is not UTF-8 becomes a question mark."""
    if not isinstance(value, str) or not value.strip():
        return default
    return value.encode("utf-8", errors="replace").decode("utf-8")


def shape_in(file: GGUFFile, width: int) -> TeacherShape:
    """What the metadata of a model of ``width`` says of its layers' shape; keys and defaults are
    llama.cpp's."""

    def stated(key: str, default: object = None) -> object:
        field = file.fields.get(f"{file.architecture}.{key}")
        if field is None:
            return default
        # The decimal that was written: 1e-05, not 9.999999747378752e-06.
        return (
            float(str(np.float32(field.value)))
            if field.type == GGUFValueType.FLOAT32
            else field.value
        )

    heads = stated("attention.head_count")
    even = width // heads if type(heads) is int and heads > 0 and width % heads == 0 else None
    head_width = stated("attention.key_length", even)
    return TeacherShape.believed(
        heads=heads,
        kv_heads=stated("attention.head_count_kv", heads),
        head_width=head_width if stated("attention.value_length", even) == head_width else None,
        ffn_width=stated("feed_forward_length"),
        rope_theta=stated("rope.freq_base", 10000.0),
        rms_norm_eps=stated("attention.layer_norm_rms_epsilon"),
    )


def _quiet(done: int) -> None:
    """Progress that nobody watches."""


def _usual_threads() -> int:
    """PyTorch's count: the physical cores that this process may use, which suits llama.cpp too."""
    import torch  # not before a file that is none is refused: it takes seconds

    return torch.get_num_threads()


class GGUFTeacher:
    """Runs a GGUF file through llama.cpp in a process of its own. Use as a context manager."""

    def __init__(self, path: Path, *, gpu_layers: int = 0, threads: int | None = None) -> None:
        """Check the file's header, then load it.

        Raises:
            TeacherFileError: the header is missing, damaged or not a language model's.
            TeacherError: llama.cpp cannot load the file.
            LibraryError: llama.cpp does not work on this machine.
        """
        self.file: GGUFFile = read_gguf(path)
        self.threads = threads or _usual_threads()
        self.gpu_layers = gpu_layers
        types = {tensor.type.name for tensor in self.file.tensors.values()}
        self.worker = Worker(path, threads=self.threads, gpu_layers=gpu_layers, types=types)
        self.info = self._info()

    def _info(self) -> TeacherInfo:
        said = self.worker.description
        template = self.file.value("tokenizer.chat_template")
        return TeacherInfo(
            name=readable(self.file.value("general.name"), self.file.path.stem),
            architecture=self.file.architecture,
            parameters=self.file.parameters,
            file_bytes=self.file.size,
            vocab_size=said["vocab_size"],
            width=said["width"],
            layers=said["layers"],
            context_length=said["context_length"],
            bos=said["bos"] if said["bos"] >= 0 else None,
            eos=said["eos"] if said["eos"] >= 0 else None,
            end_tokens=tuple(said["end_tokens"]),
            add_bos=said["add_bos"],
            chat_template=template if isinstance(template, str) else None,
            sha256=file_sha256(self.file.path),
            tokenizer_sha256=tokenizer_sha256(self.file),
            shape=shape_in(self.file, said["width"]),
        )

    @property
    def runtime(self) -> str:
        """See ``Teacher.runtime``."""
        return (
            f"llama-cpp-python {version('llama-cpp-python')}, {self.threads} threads, "
            f"gpu_layers {self.gpu_layers}"
        )

    def memory(self) -> int:
        """See ``Teacher.memory``."""
        return int(psutil.Process(self.worker.process_id).memory_info().rss)

    def peak_memory(self) -> int:
        """The most bytes of main memory that the teacher's process has had since it began.

        What pages of a mapped file it has touched is among them.
        """
        # Not getrusage on Linux: what it says of a process begins at what its parent had.
        if platform.system() == "Linux":
            status = Path(f"/proc/{self.worker.process_id}/status").read_text(
                encoding="ascii", errors="replace"
            )
            peaks = [
                int(line.split()[1]) << 10
                for line in status.splitlines()
                if line.startswith("VmHWM:")
            ]
            return peaks[0] if peaks else self.memory()  # some containers' kernels do not say
        if platform.system() == "Windows":
            return int(psutil.Process(self.worker.process_id).memory_info().peak_wset)
        return int(self.worker.ask("peak_memory")[0]["bytes"])

    def __enter__(self) -> GGUFTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokenize(
        self, texts: Sequence[str], *, add_special: bool, parse_special: bool
    ) -> list[Tokens]:
        """See ``Teacher.tokenize``."""
        request = {"texts": list(texts), "add_special": add_special, "parse_special": parse_special}
        return unpack_ragged(self.worker.ask("tokenize", request)[1], "tokens")

    def detokenize(self, sequences: Sequence[Tokens]) -> list[str]:
        """See ``Teacher.detokenize``."""
        return list(
            self.worker.ask("detokenize", arrays=pack_ragged(sequences, "tokens"))[0]["texts"]
        )

    def speak(
        self,
        requests: Sequence[Sequence[Tokens]],
        sampling: Sampling,
        *,
        first_index: int = 0,
        progress: Progress = _quiet,
    ) -> list[Tokens]:
        """See ``Teacher.speak``."""
        arrays = self._requests(requests)
        message = {"sampling": asdict(sampling), "first_index": first_index}
        return unpack_ragged(self.worker.ask("speak", message, arrays, progress)[1], "tokens")

    def stream(
        self, tokens: Tokens, sampling: Sampling, *, number: int = 0
    ) -> Iterator[tuple[int, bytes]]:
        """Go on from ``tokens`` as ``speak`` does with ``first_index=number``, token by token.

        Yields each new token, the end of its turn too, and the bytes it stands for: a character may
        be spread over several. The worker computes only what is asked for, so the iterator may be
        left at any time, also by Ctrl-C; any other request that computes something ends it.

        Raises:
            TeacherError: the worker failed, or another request came between.
        """
        request = {"sampling": asdict(sampling), "number": number}
        with uninterrupted():
            begun = self.worker.ask("stream", request, pack_ragged([tokens], "tokens"))[0]
        while True:
            with uninterrupted():
                step = self.worker.ask("stream_next", begun)[0]
            if step["over"]:
                return
            for token, piece in zip(step["tokens"], step["pieces"], strict=True):
                yield token, piece.encode("latin-1")

    def speak_and_score(
        self,
        requests: Sequence[Sequence[Tokens]],
        sampling: Sampling,
        recipe: Recipe,
        bases: Mapping[str, Basis],
        *,
        first_index: int = 0,
        progress: Progress = _quiet,
    ) -> tuple[list[Tokens], Arrays]:
        """See ``Teacher.speak_and_score``; layers are not kept on the way, so they take a second
        pass."""
        if recipe.layers:
            return speak_then_score(
                self, requests, sampling, recipe, bases, first_index=first_index, progress=progress
            )
        arrays = self._requests(requests)
        for name, basis in bases.items():
            arrays |= basis.arrays(name)
        message = {
            "sampling": asdict(sampling),
            "first_index": first_index,
            "recipe": recipe.to_json(),
        }
        answer = self.worker.ask("speak", message, arrays, progress)[1]
        tokens = unpack_ragged(answer, "tokens")
        return tokens, {
            name: values for name, values in answer.items() if not name.startswith("tokens")
        }

    @staticmethod
    def _requests(requests: Sequence[Sequence[Tokens]]) -> Arrays:
        """Requests to speak as the worker takes them."""
        arrays = pack_ragged([segment for segments in requests for segment in segments], "segments")
        return arrays | {
            "segment_counts": np.array([len(segments) for segments in requests], dtype=np.int64)
        }

    def score(
        self,
        sequences: Sequence[Tokens],
        recipe: Recipe,
        bases: Mapping[str, Basis],
        progress: Progress = _quiet,
    ) -> Arrays:
        """See ``Teacher.score``."""
        arrays: Arrays = dict(pack_ragged(sequences, "tokens"))
        for name, basis in bases.items():
            arrays |= basis.arrays(name)
        return self.worker.ask("score", {"recipe": recipe.to_json()}, arrays, progress)[1]

    def states(
        self,
        sequences: Sequence[Tokens],
        layers: Sequence[int] = (),
        *,
        exact: bool = False,
        last: int | None = None,
    ) -> Mapping[str, Floats]:
        """See ``Teacher.states``; ``exact`` uses a float32 KV cache without flash attention.
        ``last``: no more than so many positions of each sequence, those at its end; the others
        never leave the worker."""
        request = {"layers": list(layers), "exact": exact, "last": last}
        arrays = self.worker.ask("states", request, pack_ragged(sequences, "tokens"))[1]
        return {name: values.astype(np.float32, copy=False) for name, values in arrays.items()}

    def output_rows(self, start: int, stop: int) -> Floats:
        """See ``Teacher.output_rows``."""
        if "output.bias" in self.file.tensors:
            raise RequestRefused(
                str(self.file.path), "its output layer has a bias besides the matrix"
            )
        name = "output.weight" if "output.weight" in self.file.tensors else "token_embd.weight"
        return self.file.rows(name, start, stop)

    def last_states(self, prompts: Sequence[Tokens]) -> Floats:
        """The final hidden state of each prompt's last token, exactly computed, ``[P, D]``;
        prompts of ≥ 1 token."""
        # What follows a sequence's last token is never computed, so each gets one more, which
        # nothing looks at.
        longer = [np.append(tokens, tokens[-1]).astype(np.int32) for tokens in prompts]
        return self.states(longer, exact=True, last=1)["final"]

    def logits(
        self, sequences: Sequence[Tokens], *, exact: bool = False, last: int | None = None
    ) -> NDArray[np.float32]:
        """See ``Teacher.logits``; ``exact`` and ``last`` as in ``states``."""
        arrays = self.worker.ask(
            "logits", {"exact": exact, "last": last}, pack_ragged(sequences, "tokens")
        )[1]
        return arrays["logits"].astype(np.float32, copy=False)

    def speed(self, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        """See ``Teacher.speed``."""
        answer = self.worker.ask(
            "speed", {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        )[0]
        return answer["prompt"], answer["generation"]

    def close(self) -> None:
        """End the worker process."""
        self.worker.close()
