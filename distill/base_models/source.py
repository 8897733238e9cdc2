"""The model that is to become a student, a folder or a GGUF file, checked without PyTorch."""

from __future__ import annotations

from pathlib import Path

from distill.errors import UserError
from students.gguf.architectures import ARCHITECTURES
from teachers.gguf.file import TeacherFileError, read_gguf
from teachers.gguf.llama_weights import LlamaWeights
from teachers.huggingface.folder import ModelFolder, check_folder

BaseSource = ModelFolder | LlamaWeights


def base_source(path: Path, load_in_4bit: bool, what: str = "--student-base") -> BaseSource:
    """The model at ``path``, which errors call ``what``.

    Raises:
        UserError: it is none, is quantized by transformers, or its file says more than can be read
            from a GGUF file; names what can be done.
    """
    try:
        if path.is_file():
            return _weights(path, load_in_4bit)
        folder = check_folder(path)
    except TeacherFileError as error:
        raise UserError(f"{what}: {error}") from None
    if "quantization_config" in folder.config:
        raise UserError(
            f"{what} {path} is quantized already; give the folder of the model before that, and "
            "add --load-in-4bit"
        )
    return folder


def path_of(source: BaseSource) -> Path:
    """Where it is."""
    return source.file.path if isinstance(source, LlamaWeights) else source.path


def digest_of(source: BaseSource, load_in_4bit: bool) -> str:
    """SHA-256 of configuration, weights and how they are loaded."""
    if isinstance(source, LlamaWeights):
        return source.file.sha256
    return source.sha256(load_in_4bit=load_in_4bit)


def _weights(path: Path, load_in_4bit: bool) -> LlamaWeights:
    weights = LlamaWeights(read_gguf(path))
    folder = "give the folder of its transformers checkpoint"
    known = sorted(architecture.name for architecture in ARCHITECTURES.values())
    if weights.file.architecture not in known:
        raise TeacherFileError(
            f"{path} is a {weights.file.architecture}, of which no student can be made; "
            f"{', '.join(known)} can"
        )
    facts = weights.facts
    if len(set(facts.rotary_factors)) > 1 or facts.rotary_scale != 1.0:
        raise TeacherFileError(
            f"{path} stretches its rotary embeddings by factors from which their settings cannot "
            f"be told; {folder}"
        )
    if not facts.context:
        raise TeacherFileError(f"{path} does not state its context_length; convert it again")
    if load_in_4bit:
        raise TeacherFileError(f"--load-in-4bit cannot read the GGUF file {path}; {folder}")
    return weights
