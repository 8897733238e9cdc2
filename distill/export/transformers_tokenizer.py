"""The teacher's tokenizer in a plain transformers folder: the teacher's ids, also through
``apply_chat_template``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from distill.export.ollama_modelfile import adds_bos
from teachers.atomic_files import write_whole
from teachers.gguf.file import Field
from teachers.tokenizer.chat_template import ChatTemplateError, render_chat
from teachers.tokenizer.gguf_metadata import chat_templates
from teachers.tokenizer.tokenizer_json import write_tokenizer_folder

_TOKENS = ("bos", "eos", "unk", "sep", "pad", "mask")


def write_plain_tokenizer(fields: Mapping[str, Field], folder: Path) -> None:
    """Write the files of ``write_tokenizer_folder``, and ``special_tokens_map.json`` for programs
    that look there.

    llama.cpp puts BOS in front of a conversation where the GGUF file says so, and
    ``apply_chat_template`` does not; so a chat template without BOS gets it here.

    Raises:
        TokenizerConversionError: malformed metadata, or a tokenizer that cannot be carried over.
        OSError: the disk refuses.
    """
    write_tokenizer_folder(fields, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {key: config[key] for role in _TOKENS if (key := f"{role}_token") in config}
    content = json.dumps(special, ensure_ascii=False, indent=2) + "\n"
    write_whole(folder / "special_tokens_map.json", content.encode("utf-8"))
    template = chat_templates(fields)[0]
    if template is not None and adds_bos(fields):
        bos, eos = (special.get(f"{role}_token", "") for role in ("bos", "eos"))
        template = _starting_with(bos, eos, template)
        write_whole(folder / "chat_template.jinja", template.encode("utf-8"))


def _starting_with(bos: str, eos: str, template: str) -> str:
    """The template as it is if its text starts with BOS (or it shows none), else with BOS in
    front."""
    messages = [{"role": "user", "content": "words"}]
    try:
        text = render_chat(template, messages, add_generation_prompt=True, bos=bos, eos=eos).text
    except ChatTemplateError:
        return template
    if not bos or text.startswith(bos):
        return template
    # Blanks before a block that starts a line are dropped; behind something else they would not be.
    bare = template.lstrip(" \t")
    return "{{ bos_token }}" + (bare if bare.startswith("{%") else template)
