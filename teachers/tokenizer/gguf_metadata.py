"""A GGUF file's tokenizer metadata, checked, and read as llama.cpp reads it.

The file is untrusted: whatever is malformed raises a ``TokenizerConversionError`` naming the key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gguf import GGUFValueType, TokenType

from teachers.gguf.file import Field
from teachers.tokenizer.chat_template import with_variables
from teachers.tokenizer.pre_tokenizers import PRE_TOKENIZERS

SENTENCEPIECE = "llama"
BYTE_LEVEL = "gpt2"
MAX_TOKEN = 4096  # characters; real vocabularies stay below a few hundred

# llama.cpp takes these for control tokens whatever type the file gives them: they end a turn, …
_END_OF_TURN = """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn>
    <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance>
    <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~["""
# … or mark code to be filled in, unless the file names the token of that role (by either key).
_INFILL = {
    ("fim_pre", "prefix"): """<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜>
        <PRE> ▁<PRE> <|code_prefix|> <|prefix|>""",
    ("fim_suf", "suffix"): """<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜>
        <SUF> ▁<SUF> <|code_suffix|> <|suffix|>""",
    ("fim_mid", "middle"): """<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜>
        <MID> ▁<MID> <|code_middle|> <|middle|>""",
    ("fim_pad",): "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    ("fim_rep",): "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    ("fim_sep",): "<|file_sep|>",
}
INFILL_TOKENS = frozenset(" ".join(_INFILL.values()).split())
_ALWAYS_USER_DEFINED = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))
# The format's own spelling of "separator" is wrong.
_ROLES = {
    **{"bos": "bos", "eos": "eos", "unknown": "unk"},
    **{"seperator": "sep", "padding": "pad", "mask": "mask"},
}
CHAT_TEMPLATE = "tokenizer.chat_template"
_SENTENCEPIECE_ROLES = {"bos": 1, "eos": 2, "unk": 0}  # where the file does not say


class TokenizerConversionError(ValueError):
    """A GGUF tokenizer that no tokenizer.json can stand for; says which part, and what to do."""


@dataclass(frozen=True)
class TokenizerMetadata:
    """A checked tokenizer. Tokens are known by their id, the index in ``tokens``.

    ``special`` are the ids parsed in a text only where control tokens are, ``user_defined`` those
    always parsed; ``strips_right`` are ids of either kind that absorb white space behind them.
    ``roles`` maps ``bos``, ``eos``, ``unk``, ``sep``, ``pad`` and ``mask`` to ids, as far as there
    are any. ``scores`` is empty for byte-level BPE, ``merges`` for SentencePiece.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[TokenType, ...]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]
    special: frozenset[int]
    user_defined: frozenset[int]
    strips_right: frozenset[int]
    roles: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None


def read_metadata(fields: Mapping[str, Field]) -> TokenizerMetadata:
    """Check a GGUF file's tokenizer metadata; ``general.name`` matters to ``strips_right``.

    Raises:
        TokenizerConversionError: something is missing, malformed or not supported.
    """
    model = _value(fields, "model", str, None)
    if model not in (SENTENCEPIECE, BYTE_LEVEL):
        raise TokenizerConversionError(
            f"tokenizer.ggml.model is {model!r}; supported are {SENTENCEPIECE!r} (SentencePiece) "
            f"and {BYTE_LEVEL!r} (byte-level BPE)"
        )
    pre = _value(fields, "pre", str, "") if model == BYTE_LEVEL else ""
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(filter(None, PRE_TOKENIZERS)))
        raise TokenizerConversionError(
            f"tokenizer.ggml.pre is {pre!r}, which is not supported; known are {known}"
        )
    tokens, kinds = read_tokens(fields)
    ids = {token: number for number, token in enumerate(tokens)}
    special, user_defined = _read_in_text(fields, ids, kinds)
    roles = read_roles(fields, len(tokens))
    bos_default = model == SENTENCEPIECE or PRE_TOKENIZERS[pre].add_bos
    add_bos = _value(fields, "add_bos_token", bool, bos_default)
    add_eos = _value(fields, "add_eos_token", bool, False)
    for role, added in (("bos", add_bos), ("eos", add_eos)):
        if added and role not in roles:
            raise TokenizerConversionError(
                f"tokenizer.ggml.add_{role}_token is set, but no token has that role; convert the "
                "model again"
            )
    return TokenizerMetadata(
        model=model,
        pre=pre,
        tokens=tokens,
        kinds=kinds,
        scores=_scores(fields, len(tokens)) if model == SENTENCEPIECE else (),
        merges=_merges(fields, ids) if model == BYTE_LEVEL else (),
        special=special,
        user_defined=user_defined,
        strips_right=_strips_right(fields, tokens, special | user_defined),
        roles=roles,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=model == SENTENCEPIECE and _value(fields, "add_space_prefix", bool, True),
        chat_template=_template(fields),
    )


def _value(fields: Mapping[str, Field], name: str, kind: type, default: Any) -> Any:
    """A scalar ``tokenizer.ggml`` entry of the given Python type."""
    key = f"tokenizer.ggml.{name}"
    if key not in fields:
        return default
    value = fields[key].value
    if type(value) is not kind:
        raise TokenizerConversionError(
            f"{key} is {value!r}, not of type {kind.__name__}; convert the model again"
        )
    return value


def _array(fields: Mapping[str, Field], name: str, kind: type, count: int | None) -> list[Any]:
    """A ``tokenizer.ggml`` array of the given Python type, with ``count`` entries if given."""
    key = f"tokenizer.ggml.{name}"
    if key not in fields:
        raise TokenizerConversionError(
            f"{key} is missing; convert the model again with its tokenizer"
        )
    values = fields[key].value
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        problem = f"is not an array of {kind.__name__}"
    elif count is not None and len(values) != count:
        problem = f"has {len(values)} entries for {count} tokens"
    else:
        return values
    raise TokenizerConversionError(f"{key} {problem}; convert the model again")


def read_tokens(fields: Mapping[str, Field]) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    """Every token's text as llama.cpp has it (see ``token_text``), and its type, by id.

    Raises:
        TokenizerConversionError: missing or malformed, not UTF-8, or a token that occurs twice.
    """
    tokens: dict[str, None] = {}
    key = "tokenizer.ggml.tokens"
    for number, text in enumerate(_array(fields, "tokens", str, None)):
        token = token_text(text, number)
        if not _encodable(token):
            raise TokenizerConversionError(
                f"{key}: token {number} is {token!r}, which is not UTF-8; no tokenizer.json can "
                "hold it"
            )
        if len(token) > MAX_TOKEN:  # every way to cut it in two is tried
            raise TokenizerConversionError(
                f"{key}: token {number} has {len(token)} characters; more than {MAX_TOKEN} are "
                "damage"
            )
        if token in tokens:
            raise TokenizerConversionError(
                f"{key}: {token!r} occurs twice, the second time as {number}; convert the model "
                "again"
            )
        tokens[token] = None
    if not tokens:
        raise TokenizerConversionError(
            f"{key} is empty; convert the model again with its tokenizer"
        )
    return tuple(tokens), _kinds(fields, len(tokens))


def read_roles(fields: Mapping[str, Field], count: int) -> dict[str, int]:
    """Ids of ``bos``, ``eos``, ``unk``, ``sep``, ``pad``, ``mask`` among ``count`` tokens, if any.

    As in llama.cpp, an id beyond the vocabulary names none, and SentencePiece files need not name
    the usual ones. (For byte-level files that name none llama.cpp takes token 11, whatever that is;
    here they have none.)

    Raises:
        TokenizerConversionError: an id is not a number.
    """
    model = fields["tokenizer.ggml.model"].value if "tokenizer.ggml.model" in fields else None
    roles = dict(_SENTENCEPIECE_ROLES) if model == SENTENCEPIECE else {}
    for key, role in _ROLES.items():
        number = _value(fields, f"{key}_token_id", int, count)
        if 0 <= number < count:
            roles[role] = number
    return {role: number for role, number in roles.items() if number < count}


def special_tokens(fields: Mapping[str, Field]) -> dict[str, str]:
    """Tokens with a role beside BOS and EOS, by the names of chat templates (``pad_token``)."""
    tokens = fields["tokenizer.ggml.tokens"].value
    return {
        f"{role}_token": token_text(tokens[number], number)
        for role, number in read_roles(fields, len(tokens)).items()
        if role not in ("bos", "eos")
    }


def chat_templates(fields: Mapping[str, Field]) -> tuple[str | None, str | None]:
    """The chat template, and the one for conversations with tools if that is another; an empty one
    is none."""
    keys = (CHAT_TEMPLATE, f"{CHAT_TEMPLATE}.default"), (f"{CHAT_TEMPLATE}.tool_use",)
    stated = ([fields[key].value for key in each if key in fields] for each in keys)
    texts = ((one for one in each if isinstance(one, str) and one.strip()) for each in stated)
    default, tool_use = (next(each, None) for each in texts)
    return default, tool_use


def with_template_variables(
    fields: Mapping[str, Field], variables: Mapping[str, Any]
) -> dict[str, Field]:
    """Metadata whose chat templates have ``variables`` (see ``with_variables``)."""
    return {
        key: replace(field, value=with_variables(field.value, variables))
        if key.startswith(CHAT_TEMPLATE) and isinstance(field.value, str) and field.value.strip()
        else field
        for key, field in fields.items()
    }


def token_text(text: str, number: int) -> str:
    """A token's text in llama.cpp: it ends at the first NUL; an empty one gets a name."""
    return text.partition("\0")[0] or f"[EMPTY_{number}]"


def _encodable(text: str) -> bool:
    """Whether the file's bytes were UTF-8: the reader replaces others by lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _kinds(fields: Mapping[str, Field], count: int) -> tuple[TokenType, ...]:
    if "tokenizer.ggml.token_type" not in fields:
        return (TokenType.NORMAL,) * count
    numbers = _array(fields, "token_type", int, count)
    known = {0: TokenType.NORMAL}  # llama.cpp's "undefined"
    known |= {int(kind): kind for kind in TokenType}
    for token, number in enumerate(numbers):
        if number not in known:
            raise TokenizerConversionError(
                f"tokenizer.ggml.token_type: token {token} has type {number}; types are 1 to "
                f"{max(known)}"
            )
    return tuple(known[number] for number in numbers)


def _scores(fields: Mapping[str, Field], count: int) -> tuple[float, ...]:
    stated = fields.get("tokenizer.ggml.scores")
    whole = stated is not None and stated.element_type == GGUFValueType.INT32
    scores = [float(score) for score in _array(fields, "scores", int if whole else float, count)]
    for token, score in enumerate(scores):
        if not math.isfinite(score):
            raise TokenizerConversionError(
                f"tokenizer.ggml.scores: token {token} has {score}; scores are finite numbers"
            )
    return tuple(scores)


def _merges(fields: Mapping[str, Field], ids: Mapping[str, int]) -> tuple[tuple[str, str], ...]:
    merges: dict[tuple[str, str], None] = {}
    for number, text in enumerate(_array(fields, "merges", str, None)):
        cut = text.find(" ", 1)  # from 1: the first half may itself begin with a space
        left, right = text[:cut], text[cut + 1 :]
        if cut < 0 or not right:
            problem = "is not two tokens with a space between"
        elif missing := [part for part in (left, right, left + right) if part not in ids]:
            problem = f"names {missing[0]!r}, which is no token"
        elif (left, right) in merges:
            problem = "occurs twice"
        else:
            merges[left, right] = None
            continue
        raise TokenizerConversionError(
            f"tokenizer.ggml.merges: merge {number}, {text!r}, {problem}; convert the model again"
        )
    return tuple(merges)


def _read_in_text(
    fields: Mapping[str, Field], ids: Mapping[str, int], kinds: tuple[TokenType, ...]
) -> tuple[frozenset[int], frozenset[int]]:
    """Ids that are read as wholes: only where control tokens are to be, and always."""

    def of_type(*types: TokenType) -> set[int]:
        return {number for number, kind in enumerate(kinds) if kind in types}

    special = of_type(TokenType.CONTROL, TokenType.UNKNOWN)
    ends = {token for token in _END_OF_TURN.split() if token in ids}
    looks = set(ends)
    for keys, names in _INFILL.items():
        if not any(f"tokenizer.ggml.{key}_token_id" in fields for key in keys):
            looks |= {name for name in names.split() if name in ids}
    special |= {ids[token] for token in looks}
    plain = {ids[token] for token in _ALWAYS_USER_DEFINED if token in ids}
    # In the dialects of gpt-oss and Solar <|end|> ends a message, not the turn.
    if {"<|return|>", "<|call|>", "<|end|>"} <= ends or (
        {"<|flush|>", "<|end|>"} <= ends and ends & {"<|call|>", "<|calls|>"}
    ):
        plain.add(ids["<|end|>"])
    gemma4 = {"<|tool_response>", "</s>"} <= ends
    unread = {ids["</s>"]} if gemma4 else set()  # is plain text there
    special -= plain | unread
    user_defined = of_type(TokenType.USER_DEFINED) | plain
    return frozenset(special), frozenset(user_defined - special - unread)


def _strips_right(
    fields: Mapping[str, Field], tokens: tuple[str, ...], read_in_text: frozenset[int]
) -> frozenset[int]:
    """Phi-3's tokens absorb white space behind them; llama.cpp goes by the model's name alone."""
    name = fields["general.name"].value if "general.name" in fields else ""
    if not isinstance(name, str) or not any(phi in name.lower() for phi in ("phi-3", "phi3")):
        return frozenset()
    plain = {"<unk>", "<s>", "<|endoftext|>"}
    return frozenset(number for number in read_in_text if tokens[number] not in plain)


def _template(fields: Mapping[str, Field]) -> str | None:
    stated = fields.get(CHAT_TEMPLATE)
    if stated is not None and not (isinstance(stated.value, str) and _encodable(stated.value)):
        raise TokenizerConversionError(
            f"{CHAT_TEMPLATE} is not a UTF-8 text; convert the model again"
        )
    return chat_templates(fields)[0]
