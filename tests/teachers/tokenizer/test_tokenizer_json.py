"""tokenizer.json made from GGUF metadata: llama.cpp's own ids on odd lines, or a refusal."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType as Kind
from gguf import TokenType
from transformers import AutoTokenizer

from teachers import example_teacher
from teachers.gguf.file import Field, read_gguf, tokenizer_fields
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.tokenizer.chat_template import render_chat
from teachers.tokenizer.gguf_metadata import TokenizerConversionError as Refusal
from teachers.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from teachers.tokenizer.tokenizer_json import build_tokenizer, write_tokenizer_folder
from tests.support.llama.tokenizers import (
    byte_level_fields,
    loaded_tokenizer,
    sentencepiece_fields,
    teacher_of,
)
from tests.support.teachers import (
    LINES,
    different,
    edited,
    example_fields,
    shared_file,
)


@pytest.mark.parametrize("name", ["", "wikiphi-q8_0", "stories260K"])
def test_real_teachers_give_the_same_ids(tmp_path: Path, name: str) -> None:
    """A thousand lines, whole; the ids turn back into the lines."""
    path = shared_file(f"teachers/{name}.gguf") if name else example_teacher()
    loaded = loaded_tokenizer(tokenizer_fields(read_gguf(path)), tmp_path)
    with GGUFTeacher(path, threads=1) as teacher:
        assert len(LINES) == 1000 and different(loaded, teacher, LINES) == []
        ids = teacher.tokenize(LINES, add_special=False, parse_special=False)
        decoded = [loaded.decode(row.tolist()) for row in ids]
    # SentencePiece cannot tell the two apart.
    assert decoded == ([line.replace("▁", " ") for line in LINES] if name else LINES)


def test_every_pre_tokenizer_cuts_like_llama_cpp(tmp_path: Path) -> None:
    """With a vocabulary that joins across words, so that ids show the cuts; a name of each kind."""
    for pre in {kind: name for name, kind in PRE_TOKENIZERS.items()}.values():
        fields = byte_level_fields(pre=pre or None)
        with teacher_of(fields, tmp_path) as teacher:
            assert different(loaded_tokenizer(fields, tmp_path), teacher, LINES[:200]) == [], pre


def test_bytes_that_are_no_tokens(tmp_path: Path) -> None:
    """llama.cpp drops them, and joins nothing over the gap."""
    whole = byte_level_fields()
    tokens, merges = (
        [text for text in whole[f"tokenizer.ggml.{name}"].value if not {"q", "ã"} & set(text)]
        for name in ("tokens", "merges")
    )
    merges.append("e u")  # of "equ"
    fields = edited(
        whole, tokens=[*tokens, "eu"], merges=merges, token_type=[3, 3] + [1] * (len(tokens) - 1)
    )
    with teacher_of(fields, tmp_path) as teacher:
        assert (
            different(
                loaded_tokenizer(fields, tmp_path), teacher, ["equ", "aqua あq", *LINES[:150]]
            )
            == []
        )


MORE = {
    "<|user|>": TokenType.CONTROL,
    "<|end|>": TokenType.CONTROL,
    "<|im_end|>": TokenType.NORMAL,  # llama.cpp knows better
    "<|endoftext|>": TokenType.USER_DEFINED,  # and here
    "lower": TokenType.USER_DEFINED,
}
SPACES = dict.fromkeys(("  ", "   ", "\n\n", "\t"), TokenType.USER_DEFINED)


def runs(*counts: int) -> dict[str, TokenType]:
    return {"▁" * count: TokenType.NORMAL for count in counts}


def test_sentencepiece(tmp_path: Path) -> None:
    """Types that llama.cpp overrules, tokens of spaces, no prefix, runs of spaces of one score."""
    no_prefix = {"add_space_prefix": False, "add_bos_token": False, "eos_token_id": None}
    rows: list[tuple[dict[str, TokenType], dict[str, Any]]] = [
        (MORE, {}),
        ({**MORE, **SPACES}, {"add_eos_token": True}),
        (MORE, no_prefix),
        (runs(*range(2, 17)), {}),
        (runs(2, 4, 8, 16), {}),
    ]
    for more, values in rows:
        fields = sentencepiece_fields(more, **values)
        with teacher_of(fields, tmp_path) as teacher:
            wrong = different(loaded_tokenizer(fields, tmp_path), teacher, LINES[:300])
            assert wrong == [], (list(more), values)


def test_phi3_tokens_swallow_white_space(tmp_path: Path) -> None:
    """By the model's name alone; ASCII's white space is swallowed on both sides."""
    fields = sentencepiece_fields(MORE, eos_token_id=0)
    others = set("\u00a0\u3000\u2003\u2028\u0085\u1680")
    lines = [line for line in LINES if not others & set(line)]
    with teacher_of(fields, tmp_path, "Phi-3 of ours") as teacher:
        whole = fields | {"general.name": Field("Phi-3 of ours", Kind.STRING)}
        assert different(loaded_tokenizer(whole, tmp_path), teacher, lines) == []
        assert different(loaded_tokenizer(fields, tmp_path), teacher, lines)


def test_roles_and_chat_template(tmp_path: Path) -> None:
    """The roles have the teacher's ids; a conversation reads as this package renders it."""
    fields = example_fields()
    loaded = loaded_tokenizer(fields, tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 4, 0)
    assert loaded.unk_token_id is None and len(loaded) == len(fields["tokenizer.ggml.tokens"].value)
    messages = [{"role": "user", "content": " hello\r\n"}, {"role": "assistant", "content": "hi"}]
    template = fields["tokenizer.chat_template"].value
    said = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert said == render_chat(template, messages, add_generation_prompt=True).text
    loaded_tokenizer(edited(fields, chat_template=None), tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()


def test_a_model_beside_it_does_not_change_it(tmp_path: Path) -> None:
    """AutoTokenizer keeps tokenizer.json as it stands where config.json says llama."""
    fields = example_fields()
    write_tokenizer_folder(fields, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    ours = build_tokenizer(fields).encode_batch(LINES)
    assert AutoTokenizer.from_pretrained(tmp_path)(LINES)["input_ids"] == [row.ids for row in ours]


def replaced(name: str, place: int, value: Any) -> dict[str, Any]:
    values = list(example_fields()[f"tokenizer.ggml.{name}"].value)
    values[place] = value
    return {name: values}


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"model": "bert"}, r"model is 'bert'"),
    ({"model": None}, r"model is None"),
    ({"pre": "kimi-k2"}, r"pre is 'kimi-k2', which is not supported; known are .*qwen2"),
    ({"tokens": None}, r"tokens is missing"),
    ({"tokens": "all of them"}, r"tokens is not an array of str"),
    ({"tokens": [1, 2]}, r"tokens is not an array of str"),
    (replaced("tokens", 9, "!"), r"tokens: '!' occurs twice, the second time as 9"),
    (replaced("tokens", 9, "\udce3"), r"tokens: token 9 is '\\udce3', which is not UTF-8"),
    (replaced("tokens", 9, "x" * 5000), r"tokens: token 9 has 5000 characters"),
    (replaced("token_type", 9, 7), r"token_type: token 9 has type 7; types are 1 to 6"),
    (replaced("token_type", 9, -1), r"token_type: token 9 has type -1"),
    ({"token_type": [1, 1]}, r"token_type has 2 entries for 1024 tokens"),
    ({"token_type": [1.0] * 1024}, r"token_type is not an array of int"),
    ({"merges": None}, r"merges is missing"),
    (replaced("merges", 3, "ab"), r"merges: merge 3, 'ab', is not two tokens"),
    (replaced("merges", 3, ""), r"merges: merge 3, '', is not two tokens"),
    (replaced("merges", 3, "a "), r"merges: merge 3, 'a ', is not two tokens"),
    (
        replaced("merges", 3, "a nowhere"),
        r"merges: merge 3, 'a nowhere', names 'nowhere', which is",
    ),
    (replaced("merges", 3, '! "'), r"merges: merge 3, .* names '!\"', which is no token"),
    (replaced("merges", 3, "ã ģ"), r"merges: merge 3, 'ã ģ', occurs twice"),
    ({"bos_token_id": "first"}, r"bos_token_id is 'first', not of type int"),
    ({"bos_token_id": None}, r"add_bos_token is set, but no token has that role"),
    ({"bos_token_id": 5000}, r"add_bos_token is set, but no token has that role"),
    ({"add_bos_token": 1}, r"add_bos_token is 1, not of type bool"),
    ({"model": "llama"}, r"scores is missing"),
    ({"model": "llama", "scores": [0.0]}, r"scores has 1 entries for 1024 tokens"),
    ({"model": "llama", "scores": [float("nan")] * 1024}, r"scores: token 0 has nan"),
    ({"chat_template": 5}, r"chat_template is not a UTF-8 text"),
    ({"chat_template": "\udcff"}, r"chat_template is not a UTF-8 text"),
]


def test_malformed_metadata_is_refused() -> None:
    """In one line that names the entry."""
    for values, message in MALFORMED:
        place = r"tokenizer\." if "chat_template" in values else r"tokenizer\.ggml\."
        with pytest.raises(Refusal, match=place + message) as refusal:
            build_tokenizer(edited(example_fields(), **values))
            pytest.fail(f"accepted, where it should say {message}")
        assert "\n" not in str(refusal.value), message


def test_a_token_of_characters_that_are_none_is_refused() -> None:
    """llama.cpp makes 😀! of 😀, which it would otherwise write in bytes; no list of merges can."""
    with pytest.raises(Refusal, match="'😱!', is made with '😱', which is no token"):
        build_tokenizer(sentencepiece_fields({"😱!": TokenType.NORMAL}))


def test_random_damage_never_escapes() -> None:
    """Values exchanged for any others give a tokenizer or a clear refusal, nothing else."""
    draw = random.Random(0)
    junk = (
        *(None, 0, -1, 1 << 40, 1.5, True, "", "x", "\0", "\udc80", "<|end|>", "$A:0"),
        *([], ["a"], [0], {"a": 1}),
    )
    refused = 0
    for base in (example_fields(), sentencepiece_fields(MORE)):
        for _ in range(60):
            fields = dict(base)
            key = draw.choice(list(fields))
            value = draw.choice(junk)
            if isinstance(fields[key].value, list) and draw.random() < 0.7:
                value = list(fields[key].value)
                value[draw.randrange(len(value))] = draw.choice(junk)
            fields[key] = dataclasses.replace(fields[key], value=value)
            try:
                build_tokenizer(fields).encode(LINES[40])
            except Refusal:
                refused += 1
    assert 40 < refused < 120
