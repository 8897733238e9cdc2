"""A checkpoint folder, checked before anything is loaded; without PyTorch and transformers.

The folder is untrusted. Only JSON and the headers of safetensors are read: no pickle, no code that
comes with a model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from teachers.gguf.file import TeacherFileError, file_sha256

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADAPTER_CONFIG = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelFolder:
    """A checked checkpoint folder: ``config.json`` as read, and the files with the weights."""

    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the files with the weights."""
        return sum(file.stat().st_size for file in self.weights)

    def sha256(self, *, load_in_4bit: bool) -> str:
        """Digest of configuration and weights; another one for the quantized model."""
        digest = hashlib.sha256(b"nf4" if load_in_4bit else b"")
        for file in sorted((self.path / CONFIG, *self.weights)):
            digest.update(f"{file.name}:{file_sha256(file)}\n".encode())
        return digest.hexdigest()


GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class TokenizerFolder:
    """A folder's tokenizer without its model: what its files say, checked.

    ``bos`` and ``stops``: by ``generation_config.json``. ``width`` and ``layers``: 0 if unknown.
    """

    folder: ModelFolder
    vocab_size: int
    architecture: str
    width: int
    layers: int
    bos: int | None
    stops: list[int]


def check_tokenizer_folder(path: Path) -> TokenizerFolder:
    """A folder of which the tokenizer alone is wanted.

    Raises:
        TeacherFileError: something is missing or damaged, or would need code of its own.
    """
    folder = check_folder(path, weights=False)
    config = folder.config
    stated = _read_json(path / GENERATION_CONFIG) if (path / GENERATION_CONFIG).exists() else {}
    ends = stated.get("eos_token_id")
    counts = [config.get(key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")]
    vocab_size, width, layers = (
        count if type(count) is int and 0 < count < 1 << 31 else 0 for count in counts
    )
    if not vocab_size:
        raise TeacherFileError(f"{path / CONFIG} states no vocab_size; give a GGUF file instead")
    bos = stated.get("bos_token_id")
    return TokenizerFolder(
        folder,
        vocab_size,
        str(config.get("model_type", "unknown")),
        width,
        layers,
        bos if type(bos) is int else None,
        [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int],
    )


def check_folder(path: Path, *, weights: bool = True) -> ModelFolder:
    """Look at a folder's files without loading them; at its ``weights`` only where they are wanted.

    Raises:
        TeacherFileError: something is missing, damaged, a pickle, or would need code of its own.
    """
    if not path.exists():
        raise TeacherFileError(
            f"{path} does not exist; give the folder of a transformers checkpoint, or a GGUF file"
        )
    if not path.is_dir():
        raise TeacherFileError(
            f"{path} is not a folder; give the folder with its {CONFIG}, or a .gguf file"
        )
    if (path / ADAPTER_CONFIG).exists():
        raise TeacherFileError(
            f"{path} holds an adapter ({ADAPTER_CONFIG}), not a whole model; merge it into its "
            "base model (peft: merge_and_unload) and save that"
        )
    config = _read_json(path / CONFIG)
    for name in (CONFIG, TOKENIZER_CONFIG):
        content = _read_json(path / name) if (path / name).exists() else {}
        if "auto_map" in content:
            raise TeacherFileError(
                f"{path / name} has auto_map {content['auto_map']!r}: the model needs Python code "
                "of its own, which is never run; use a model that transformers supports by itself, "
                "or convert it to GGUF"
            )
    _read_json(path / TOKENIZER)
    folder = ModelFolder(path, config, _weight_files(path) if weights else ())
    for file in folder.weights:
        _check_weights(file)
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise TeacherFileError(
            f"{path.parent} has no {path.name}; give the folder of a transformers checkpoint "
            f"({CONFIG}, *.safetensors, {TOKENIZER})"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TeacherFileError(f"{path} cannot be read as JSON: {error}; copy it again") from None
    if not isinstance(content, dict):
        raise TeacherFileError(
            f"{path} holds a {type(content).__name__} instead of an object; copy it again"
        )
    return content


def _weight_files(path: Path) -> tuple[Path, ...]:
    """The files that transformers would read."""
    if (path / WEIGHTS).exists():
        return (path / WEIGHTS,)
    if not (path / WEIGHTS_INDEX).exists():
        pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickles:
            raise TeacherFileError(
                f"{path} has its weights only as {pickles[0]}, a pickle, which may run code when "
                "it is read; save it again with model.save_pretrained where you trust it, which "
                f"writes {WEIGHTS}"
            )
        raise TeacherFileError(f"{path} has no {WEIGHTS}; download or copy the whole checkpoint")
    names = _read_json(path / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise TeacherFileError(f"{path / WEIGHTS_INDEX} has no weight_map; copy it again")
    for name in names.values():
        plain = isinstance(name, str) and Path(name).name == name
        if not (plain and name.endswith(".safetensors")):
            raise TeacherFileError(
                f"{path / WEIGHTS_INDEX} names {name!r}, which is no safetensors file here"
            )
    return tuple(path / name for name in sorted(set(names.values())))


def _check_weights(file: Path) -> None:
    if not file.is_file():
        raise TeacherFileError(f"{file} is missing; download or copy the whole checkpoint")
    try:
        with safe_open(file, "numpy"):
            pass  # the header is read here and compared with the file's length
    except (SafetensorError, OSError) as error:
        raise TeacherFileError(
            f"{file} is truncated or damaged ({error}); download or copy it again"
        ) from None
