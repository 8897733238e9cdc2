"""The tokenizer of a checkpoint folder: texts to ids and back, and what it says of a teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from teachers.base import TeacherInfo, Tokens
from teachers.gguf.file import TeacherFileError
from teachers.huggingface.checkpoint import load_tokenizer
from teachers.huggingface.folder import TOKENIZER, ModelFolder
from teachers.names import one_line_name, ordinary_name

_ANCHOR = "a"


class FolderTokenizer:
    """``tokenizer.json`` of a folder that was checked."""

    def __init__(self, folder: ModelFolder, vocab_size: int) -> None:
        """``vocab_size``: of the model that it is for.

        Raises:
            TeacherFileError: see ``load_tokenizer``.
        """
        self.folder, self.vocab_size = folder, vocab_size
        self._tokenizer: Any = load_tokenizer(folder, vocab_size)

    def info(self, bos: int | None, stops: int | list[int] | None, **facts: Any) -> TeacherInfo:
        """What is known of a teacher with this tokenizer; ``facts``: of the model. ``bos`` and
        ``stops`` (what ends a turn): by its ``generation_config.json``.

        Raises:
            TeacherFileError: a special token is outside the vocabulary.
        """
        tokenizer = self._tokenizer
        bos, eos, end_tokens = self._special_tokens(bos, stops)
        template = tokenizer.chat_template
        named = template if isinstance(template, dict) else {"default": template}
        template = named.get("default") or None  # an empty one is none
        encoded = tokenizer.backend_tokenizer.encode(_ANCHOR, add_special_tokens=True).ids
        digest = hashlib.sha256((self.folder.path / TOKENIZER).read_bytes())
        digest.update(
            repr((template, bos, eos, end_tokens, encoded)).encode("utf-8", errors="surrogatepass")
        )
        return TeacherInfo(
            name=one_line_name(ordinary_name(self.folder.path.resolve().name), ""),
            vocab_size=self.vocab_size,
            bos=bos,
            eos=eos,
            end_tokens=end_tokens,
            add_bos=bos is not None and encoded[:1] == [bos],
            chat_template=template,
            tokenizer_sha256=digest.hexdigest(),
            tool_template=named.get("tool_use") or None,
            special_tokens=tokenizer.special_tokens_map,
            **facts,
        )

    def _special_tokens(
        self, bos: int | None, stops: int | list[int] | None
    ) -> tuple[int | None, int | None, tuple[int, ...]]:
        """BOS, EOS, all tokens that end a turn: by the tokenizer, then generation_config.json."""
        tokenizer = self._tokenizer
        ends: list[int] = [] if stops is None else (stops if isinstance(stops, list) else [stops])
        bos = bos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        eos = next(iter(ends), None) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        end_tokens = tuple(sorted({*ends, *([] if eos is None else [eos])}))
        for token in (*end_tokens, *([] if bos is None else [bos])):
            if not 0 <= token < self.vocab_size:
                raise TeacherFileError(
                    f"{self.folder.path}: special token {token} is outside the vocabulary of "
                    f"{self.vocab_size}; correct generation_config.json or tokenizer_config.json"
                )
        return bos, eos, end_tokens

    def tokenize(
        self, texts: Sequence[str], *, add_special: bool, parse_special: bool
    ) -> list[Tokens]:
        """See ``Teacher.tokenize``."""
        backend = self._tokenizer.backend_tokenizer
        backend.encode_special_tokens = not parse_special
        # A lone surrogate, which no tokenizer knows, becomes a question mark.
        clean = [text.encode("utf-8", errors="replace").decode("utf-8") for text in texts]
        encoded = backend.encode_batch(clean, add_special_tokens=add_special)
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def detokenize(self, sequences: Sequence[Tokens]) -> list[str]:
        """See ``Teacher.detokenize``."""
        backend = self._tokenizer.backend_tokenizer
        # Many decoders strip a text's first space, which may be the first token's own. So every
        # sequence is decoded behind a letter, and the letter taken off.
        anchor = backend.encode(_ANCHOR, add_special_tokens=False).ids
        before = len(backend.decode(anchor, skip_special_tokens=False))
        anchored = [[*anchor, *tokens.tolist()] for tokens in sequences]
        return [text[before:] for text in backend.decode_batch(anchored, skip_special_tokens=False)]
