"""Model and tokenizer of a checkpoint folder that ``teachers.huggingface.folder`` has checked.

The folder is untrusted. Only JSON and safetensors are read: no pickle, no code that comes with a
model, and nothing from the network.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from teachers.gguf.file import TeacherFileError
from teachers.huggingface.folder import CONFIG, TOKENIZER, ModelFolder


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading is announced by whoever asked for it."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_model(
    folder: ModelFolder,
    device: torch.device,
    dtype: torch.dtype,
    *,
    load_in_4bit: bool,
    double_quantization: bool = False,
) -> Any:
    """The folder's causal language model, for inference; ``load_in_4bit`` rounds its matrices to
    NF4, with ``double_quantization`` the scales of their blocks too (Dettmers et al. 2023).

    Raises:
        TeacherFileError: transformers cannot load it; bitsandbytes or weights are missing.
    """
    quantization = _nf4(folder, dtype, double_quantization) if load_in_4bit else None
    try:
        with _no_progress_bars():
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder.path,
                local_files_only=True,
                use_safetensors=True,
                dtype=dtype,
                device_map={"": device},
                output_loading_info=True,
                **({} if quantization is None else {"quantization_config": quantization}),
            )
    except Exception as error:  # a configuration of untrusted values fails in every way there is
        raise TeacherFileError(
            f"transformers cannot load {folder.path}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would have made them up
        raise TeacherFileError(
            f"{folder.path} lacks {len(missing)} tensors that its {CONFIG} asks for, first "
            f"{missing[0]!r}; download or copy the whole checkpoint"
        )
    if model.get_output_embeddings() is None:
        raise TeacherFileError(
            f"{folder.path} ({model.config.model_type}) has no output layer over tokens"
        )
    return model.eval().requires_grad_(False)


def _nf4(folder: ModelFolder, dtype: torch.dtype, double: bool) -> Any:
    if "quantization_config" in folder.config:
        raise TeacherFileError(f"{folder.path} is quantized already; load it without load_in_4bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TeacherFileError(
            "load_in_4bit needs bitsandbytes, which is not installed; run "
            f"{sys.executable} -m pip install bitsandbytes, or load without load_in_4bit"
        )
    # On some CPUs it advises a package that fetches compiled code from the network.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double,
    )


def load_tokenizer(folder: ModelFolder, vocab_size: int) -> Any:
    """The folder's tokenizer: ``tokenizer.json`` as it stands, special tokens and chat template
    beside it.

    Not ``AutoTokenizer``: the class that ``tokenizer_config.json`` names may rebuild the tokenizer
    differently.

    Raises:
        TeacherFileError: it cannot be read, or has more tokens than the model.
    """
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder.path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise TeacherFileError(
            f"{folder.path / TOKENIZER} cannot be used: {type(error).__name__}: "
            f"{_first_line(error)}"
        ) from error
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > vocab_size:
        raise TeacherFileError(
            f"{folder.path / TOKENIZER} has {size} tokens, the model's output only {vocab_size}; "
            "use the tokenizer that belongs to this model, or resize the model's embeddings"
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), "no reason given")
