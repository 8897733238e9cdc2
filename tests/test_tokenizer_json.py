"""tokenizer.json made from GGUF metadata: llama.cpp's own ids on a thousand odd lines, malformed metadata refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.exporting import metadata_entries
from students.builder import build_student, student_config
from students.export import ExportNames, write_gguf
from students.shape import parse_size
from teachers import example_teacher
from teachers.chat_template import render_chat
from teachers.gguf_file import Field, read_gguf, tokenizer_fields
from teachers.gguf_teacher import GGUFTeacher
from teachers.tokenizer_json import TokenizerConversionError, build_tokenizer, write_tokenizer_folder
from teachers.tokenizer_pretokenizers import PRE_TOKENIZERS
from tests.conftest import shared_file

Fields = dict[str, Field]

TEXT = r"""The quick brown fox doesn't won't I'LL we've they'Re jumped over 42 lazy dogs. Hello, world!
naïve café Straße ΑΘΗΝΑ ώρα Привет мир שלום مرحبا हिन्दी ไทย 한국어 中文字符 𐐀𐐁 ⅔ ² Ⅷ ٣٤٥ １２３
日本語 の テキスト です。 これは、ペンです！ カタカナ ｶﾀｶﾅ 「引用」 ー〜 東京都 ㈱ 々 😀 🎉🎉 👍🏽 🇯🇵
def f(x): return x**2 { } [] <= >= != -> => // /* */ # @ $ % ^ & | ~ ` " \ ; ::: ... --- ~~~ ~é
camelCase HTTPServer snake_case 3.14 1,000,000 0xFF 12345678901 1e-9 user@example.org https://a.b/c?d=e&f
▁ ▁▁lower <0x0A> <0xE3> [PAD32011] <unk> Ġ Ċ"""
ODD = (
    *(
        "👩\u200d👩\u200d👧\u200d👦",
        "❤\ufe0f",
        "e\u0301",
        "a\u0308\u0323",
        "Z\u0351\u036b",
        "\u200d",
        "\u200b",
        "\ufeff",
    ),
    *("\u00ad", "\ufffd", "\u0085x", "\x7f", "\x01", "\x00", "\uffff", "\U0010ffff", "\ue000", "\u0378"),
)
WORDS = (*TEXT.split(), *ODD)
BLANKS = (
    *("", " ", "  ", "   ", " " * 7, " " * 19, "\t", "\t\t", "\n", "\n\n", "\r\n", " \n ", "\n  \n"),
    *("\u00a0", "\u3000", "\u3000\u3000", "\u2003", "\u2028", "\x0b", "\x0c"),
)
SPECIALS = (
    "<s>",
    "</s>",
    "<|end|>",
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|",
    "<|im_end|>",
    "< |end|>",
)
EDGES = (
    *("", " ", "  ", "\n", "a", " a", "a ", "  a  ", "\u3000", "<s>", " <s> <s>", "<|end|>\n\n a", "\n" * 5),
    *(" " * 70, "\t" * 9, "aaa" * 9, "<s><|end|></s>", "<|endoftext|> <|endoftext|>"),
)
# Where a single random character comes from: not where Unicode 16 added letters, which llama.cpp does not know yet.
ANY = (
    (0, 0x1C80),
    (0x2000, 0xA7C0),
    (0xA840, 0xD800),
    (0xE000, 0x10500),
    (0x1D000, 0x1E000),
    (0x1F000, 0x30000),
)


def mixed_lines(count: int) -> list[str]:
    """Texts of every kind that is easily tokenised wrongly, the same ones every time."""
    draw = random.Random(0)
    lines = list(EDGES)
    while len(lines) < count:
        parts = []
        for _ in range(draw.randint(1, 12)):
            parts.append(draw.choice(WORDS))
            if draw.random() < 0.06:
                parts.append(draw.choice(SPECIALS))
            if draw.random() < 0.05:
                parts.append(chr(draw.randrange(*draw.choice(ANY))))
            parts.append(draw.choice(BLANKS) if draw.random() < 0.4 else " ")
        lines.append("".join(parts[: -1 if draw.random() < 0.7 else None]))
    return lines


LINES = mixed_lines(1000)


def edited(fields: Mapping[str, Field], **values: Any) -> Fields:
    """Metadata with other values in it, ``None`` to leave an entry out."""
    new = dict(fields)
    for name, value in values.items():
        key = f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}"
        new.pop(key, None)
        if isinstance(value, list):
            kinds = {str: GGUFValueType.STRING, int: GGUFValueType.INT32, float: GGUFValueType.FLOAT32}
            new[key] = Field(value, GGUFValueType.ARRAY, kinds[type(value[0])])
        elif value is not None:
            kinds = {bool: GGUFValueType.BOOL, str: GGUFValueType.STRING, int: GGUFValueType.UINT32}
            new[key] = Field(value, kinds[type(value)])
    return new


def example_fields() -> Fields:
    return tokenizer_fields(read_gguf(example_teacher()))


def trained(text: list[str], special: list[str], *, byte_level: bool) -> tuple[list[str], list[str]]:
    """Tokens (``special`` first) and merges learnt from ``text`` across words, so that every wrong cut shows."""
    tokenizer = Tokenizer(models.BPE())
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else sorted(set("".join(text)) - set("\0"))
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=3000,
            initial_alphabet=alphabet,
            show_progress=False,
            max_token_length=6,
            min_frequency=2,
        ),
    )
    model = json.loads(tokenizer.to_str())["model"]
    learnt = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return special + [token for token in learnt if "\0" not in token], [
        " ".join(pair) for pair in model["merges"]
    ]


@functools.lru_cache
def learnt_bytes() -> tuple[list[str], list[str]]:
    return trained(LINES, ["<|endoftext|>", "<|end|>"], byte_level=True)


def byte_level_fields(**values: Any) -> Fields:
    """A byte-level teacher's metadata with a vocabulary that joins across words."""
    tokens, merges = learnt_bytes()
    merges = [
        merge for number, merge in enumerate(merges) if number % 9
    ]  # some tokens are reached only where merges are ignored
    kinds = [3, 3] + [1] * (len(tokens) - 2)
    made = {"tokens": tokens, "merges": merges, "token_type": kinds, "bos_token_id": 0, "eos_token_id": 1}
    absent = {"eot_token_id": None, "padding_token_id": None, "add_bos_token": None, "chat_template": None}
    return edited(example_fields(), **{**made, **absent, **values})


def sentencepiece_fields(more: Mapping[str, TokenType] | None = None, **values: Any) -> Fields:
    """A SentencePiece teacher's metadata: bytes, characters of ASCII and kana, what was learnt, and ``more`` tokens."""
    plain = [line.replace(" ", "▁") for line in (*TEXT.splitlines(), "▁▁▁▁▁▁▁▁ ｶﾀ") for _ in range(2)]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens, _ = trained(plain, first, byte_level=False)
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    kinds += [TokenType.NORMAL] * (len(tokens) - len(kinds))
    more = {token: kind for token, kind in (more or {}).items() if token not in tokens}
    # Spaces and what is added later have one score in common, as in Llama's own vocabulary.
    scores = [-1e9 if set(token) == {"▁"} and len(token) > 1 else -float(n) for n, token in enumerate(tokens)]
    made = {
        "model": "llama",
        "pre": None,
        "merges": None,
        "chat_template": None,
        "tokens": tokens + list(more),
        "token_type": [int(kind) for kind in (*kinds, *more.values())],
        "scores": scores + [-1e9] * len(more),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "eot_token_id": None,
        "padding_token_id": None,
    }
    return edited(example_fields(), **{**made, **values})


@contextmanager
def teacher_of(fields: Mapping[str, Field], folder: Path, name: str = "made up") -> Iterator[GGUFTeacher]:
    """llama.cpp with this tokenizer, in the smallest model there is."""
    count = len(fields["tokenizer.ggml.tokens"].value)
    shape = student_config(parse_size("32x1"), vocab_size=count, context_length=128)
    entries = {key: entry for key, entry in metadata_entries(fields).items() if key.startswith("tokenizer.")}
    write_gguf(build_student(shape, 0), folder / "teacher.gguf", "f16", entries, ExportNames(name, {}))
    with GGUFTeacher(folder / "teacher.gguf", threads=1) as teacher:
        yield teacher


def different(loaded: Any, teacher: GGUFTeacher, lines: list[str]) -> list[str]:
    """The lines for which ids differ, with and without the ends and control tokens."""
    wrong = []
    for add_special, parse_special in ((True, True), (True, False), (False, True)):
        theirs = teacher.tokenize(lines, add_special=add_special, parse_special=parse_special)
        options = {"add_special_tokens": add_special, "split_special_tokens": not parse_special}
        ours = loaded(lines, **options)["input_ids"]
        pairs = zip(lines, ours, theirs, strict=True)
        wrong += [line for line, mine, other in pairs if mine != other.tolist()]
    return wrong


def load(fields: Mapping[str, Field], folder: Path) -> Any:
    write_tokenizer_folder(fields, folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert type(loaded) is PreTrainedTokenizerFast
    return loaded


@pytest.mark.parametrize("name", ["", "wikiphi-q8_0", "stories260K"])
def test_real_teachers_give_the_same_ids(tmp_path: Path, name: str) -> None:
    """A thousand lines, whole; the ids turn back into the lines."""
    path = shared_file(f"teachers/{name}.gguf") if name else example_teacher()
    loaded = load(tokenizer_fields(read_gguf(path)), tmp_path)
    with GGUFTeacher(path, threads=1) as teacher:
        assert len(LINES) == 1000 and different(loaded, teacher, LINES) == []
        ids = teacher.tokenize(LINES, add_special=False, parse_special=False)
        decoded = [loaded.decode(row.tolist()) for row in ids]
    lines = (
        [line.replace("▁", " ") for line in LINES] if name else LINES
    )  # SentencePiece cannot tell the two apart
    assert decoded == lines


@pytest.mark.parametrize("pre", {kind: name for name, kind in PRE_TOKENIZERS.items()}.values())
def test_every_pre_tokenizer_cuts_like_llama_cpp(tmp_path: Path, pre: str) -> None:
    """With a vocabulary that joins across words, so that the ids show where they are cut; one name of each kind."""
    fields = byte_level_fields(pre=pre or None)
    with teacher_of(fields, tmp_path) as teacher:
        assert different(load(fields, tmp_path), teacher, LINES[:200]) == []


def test_bytes_that_are_no_tokens(tmp_path: Path) -> None:
    """llama.cpp drops them, and joins nothing over the gap."""
    whole = byte_level_fields()
    tokens = [
        token for token in whole["tokenizer.ggml.tokens"].value if "q" not in token and "ã" not in token
    ]
    merges = [
        merge for merge in whole["tokenizer.ggml.merges"].value if "q" not in merge and "ã" not in merge
    ]
    merges.append("e u")  # of "equ"
    fields = edited(whole, tokens=[*tokens, "eu"], merges=merges, token_type=[3, 3] + [1] * (len(tokens) - 1))
    with teacher_of(fields, tmp_path) as teacher:
        assert different(load(fields, tmp_path), teacher, ["equ", "aqua あq", *LINES[:150]]) == []


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


@pytest.mark.parametrize(
    ("more", "values"),
    [
        (MORE, {}),
        ({**MORE, **SPACES}, {"add_eos_token": True}),
        (MORE, {"add_space_prefix": False, "add_bos_token": False, "eos_token_id": None}),
        (runs(*range(2, 17)), {}),
        (runs(2, 4, 8, 16), {}),
    ],
    ids=["control", "spaces", "no-prefix", "runs", "powers"],
)
def test_sentencepiece(tmp_path: Path, more: dict[str, TokenType], values: dict[str, Any]) -> None:
    """Types that llama.cpp overrules, tokens of spaces, no prefix, runs of spaces whose tokens all score the same."""
    fields = sentencepiece_fields(more, **values)
    with teacher_of(fields, tmp_path) as teacher:
        assert different(load(fields, tmp_path), teacher, LINES[:300]) == []


def test_phi3_tokens_swallow_white_space(tmp_path: Path) -> None:
    """By the model's name alone; ASCII's white space is swallowed on both sides."""
    fields = sentencepiece_fields(MORE, eos_token_id=0)
    lines = [
        line for line in LINES if not any(blank in line for blank in ("\u00a0", "\u3000", "\u2003", "\u2028"))
    ]
    lines = [line for line in lines if "\u0085" not in line and "\u1680" not in line]
    with teacher_of(fields, tmp_path, "Phi-3 of ours") as teacher:
        whole = fields | {"general.name": Field("Phi-3 of ours", GGUFValueType.STRING)}
        assert different(load(whole, tmp_path), teacher, lines) == []
        assert different(load(fields, tmp_path), teacher, lines)


def test_roles_and_chat_template(tmp_path: Path) -> None:
    """The roles have the teacher's ids, and a conversation reads as this package itself renders it."""
    fields = example_fields()
    loaded = load(fields, tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 4, 0)
    assert loaded.unk_token_id is None and len(loaded) == len(fields["tokenizer.ggml.tokens"].value)
    messages = [{"role": "user", "content": " hello\r\n"}, {"role": "assistant", "content": "hi"}]
    template = fields["tokenizer.chat_template"].value
    said = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert said == render_chat(template, messages, add_generation_prompt=True)
    load(edited(fields, chat_template=None), tmp_path)
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "bert"}, r"tokenizer\.ggml\.model is 'bert'"),
        ({"model": None}, r"tokenizer\.ggml\.model is None"),
        ({"pre": "kimi-k2"}, r"tokenizer\.ggml\.pre is 'kimi-k2', which is not supported; known are .*qwen2"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"tokens": "all of them"}, r"tokenizer\.ggml\.tokens is not an array of str"),
        ({"tokens": [1, 2]}, r"tokenizer\.ggml\.tokens is not an array of str"),
        (replaced("tokens", 9, "!"), r"tokens: '!' occurs twice, the second time as 9"),
        (replaced("tokens", 9, "\udce3"), r"tokens: token 9 is '\\udce3', which is not UTF-8"),
        (replaced("tokens", 9, "x" * 5000), r"tokens: token 9 has 5000 characters"),
        (replaced("token_type", 9, 7), r"token_type: token 9 has type 7; types are 1 to 6"),
        (replaced("token_type", 9, -1), r"token_type: token 9 has type -1"),
        ({"token_type": [1, 1]}, r"token_type has 2 entries for 1024 tokens"),
        ({"token_type": [1.0] * 1024}, r"token_type is not an array of int"),
        ({"merges": None}, r"tokenizer\.ggml\.merges is missing"),
        (replaced("merges", 3, "ab"), r"merges: merge 3, 'ab', is not two tokens"),
        (replaced("merges", 3, ""), r"merges: merge 3, '', is not two tokens"),
        (replaced("merges", 3, "a "), r"merges: merge 3, 'a ', is not two tokens"),
        (replaced("merges", 3, "a nowhere"), r"merges: merge 3, 'a nowhere', names 'nowhere', which is no token"),
        (replaced("merges", 3, "! \""), r"merges: merge 3, .* names '!\"', which is no token"),
        (replaced("merges", 3, "ã ģ"), r"merges: merge 3, 'ã ģ', occurs twice"),
        ({"bos_token_id": "first"}, r"tokenizer\.ggml\.bos_token_id is 'first', not of type int"),
        ({"bos_token_id": None}, r"add_bos_token is set, but no token has that role"),
        ({"bos_token_id": 5000}, r"add_bos_token is set, but no token has that role"),
        ({"add_bos_token": 1}, r"tokenizer\.ggml\.add_bos_token is 1, not of type bool"),
        ({"chat_template": 5}, r"tokenizer\.chat_template is not a UTF-8 text"),
        ({"chat_template": "\udcff"}, r"tokenizer\.chat_template is not a UTF-8 text"),
        ({"model": "llama"}, r"tokenizer\.ggml\.scores is missing"),
        ({"model": "llama", "scores": [0.0]}, r"scores has 1 entries for 1024 tokens"),
        ({"model": "llama", "scores": [float("nan")] * 1024}, r"scores: token 0 has nan"),
    ],
)  # fmt: skip
def test_malformed_metadata_is_refused(values: dict[str, Any], message: str) -> None:
    """In one line that names the entry."""
    with pytest.raises(TokenizerConversionError, match=message) as refusal:
        build_tokenizer(edited(example_fields(), **values))
    assert "\n" not in str(refusal.value)


def test_a_token_of_characters_that_are_none_is_refused() -> None:
    """llama.cpp makes 😀! of 😀, which it would otherwise write in bytes; no list of merges can."""
    with pytest.raises(TokenizerConversionError, match="'😱!', is made with '😱', which is no token"):
        build_tokenizer(sentencepiece_fields({"😱!": TokenType.NORMAL}))


def test_random_damage_never_escapes() -> None:
    """Values exchanged for any others give a tokenizer or a clear refusal; nothing else is raised."""
    draw = random.Random(0)
    junk = (
        None,
        0,
        -1,
        1 << 40,
        1.5,
        True,
        "",
        "x",
        "\0",
        "\udc80",
        "<|end|>",
        "$A:0",
        [],
        ["a"],
        [0],
        {"a": 1},
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
            except TokenizerConversionError:
                refused += 1
    assert 40 < refused < 120
