"""The heads that a GGUF file carries in its metadata."""

from __future__ import annotations

from distill.errors import UserError
from students.model.heads import HeadError, Heads, read_heads
from teachers.gguf.file import GGUFFile


def heads_in(file: GGUFFile) -> Heads:
    """The heads that a GGUF file carries, if any; ``UserError`` if they are broken."""
    values = {key: field.value for key, field in file.fields.items() if key.startswith("so8t.")}
    try:
        return read_heads(values, file.tensors["token_embd.weight"].shape[1])
    except HeadError as error:
        raise UserError(
            f"{file.path} has broken heads: {error}; export the student again"
        ) from None
