"""Teachers that everything is known of, and files of them."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType as Kind

from teachers import example_teacher
from teachers.base import (
    Floats,
    GenerationRequest,
    Keep,
    Progress,
    Sampling,
    Teacher,
    TeacherInfo,
    Tokens,
    whole_masks,
)
from teachers.gguf.file import Field, read_gguf, tokenizer_fields
from teachers.llama_cpp.teacher import GGUFTeacher
from teachers.targets.distributions import Arrays
from teachers.targets.recipe import Recipe
from teachers.targets.state_codec import Basis
from teachers.targets.stored_arrays import Answer, reduce

SHARED = Path(__file__).parents[3] / "shared"


def shared_file(name: str) -> Path:
    """A file of the shared folder beside the project; skips the test where there is none."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} from the shared folder beside the project, which is not here")
    return path


def certainty_of(logits: Sequence[float]) -> tuple[float, float]:
    """Log-odds of the most probable token, and how far its logit is above the second."""
    first, second, *rest = sorted(logits, reverse=True)
    return -math.log(sum(math.exp(value - first) for value in (second, *rest))), first - second


class BigramTeacher(Teacher):
    """Knows only the token before: its final state is a row of a random table.

    Its logits are that row times a matrix; ``layers`` further tables stand for the outputs of its
    layers. Exact and quick: stores, batches and training can be compared with it.
    """

    def __init__(self, vocab_size: int, width: int, layers: int = 2, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.tables = torch.randn(layers + 1, vocab_size, width, generator=draw)
        self.matrix = 2.0 * width**-0.5 * torch.randn(vocab_size, width, generator=draw)
        self.answers = self.tables[-1] @ self.matrix.T
        self.info = TeacherInfo(
            name="bigram",
            architecture="bigram",
            parameters=self.tables.numel() + self.matrix.numel(),
            file_bytes=0,
            vocab_size=vocab_size,
            width=width,
            layers=layers,
            context_length=1 << 16,
            bos=0,
            eos=None,
            end_tokens=(),
            add_bos=True,
            chat_template=None,
            sha256="",
            tokenizer_sha256="",
        )

    def states(
        self,
        sequences: Sequence[Tokens],
        layers: Sequence[int] = (),
        keep: Sequence[Keep] | None = None,
    ) -> Mapping[str, Floats]:
        """See ``Teacher.states``."""
        seen = _seen(sequences, keep)
        found = {"final": self.tables[-1][seen].numpy()}
        return found | {f"layer{layer}": self.tables[layer][seen].numpy() for layer in layers}

    def output_rows(self, start: int, stop: int) -> Floats:
        """See ``Teacher.output_rows``."""
        return self.matrix[start:stop].numpy()

    def logits(
        self,
        sequences: Sequence[Tokens],
        *,
        exact: bool = False,
        keep: Sequence[Keep] | None = None,
    ) -> Floats:
        """See ``Teacher.logits``."""
        return self.answers[_seen(sequences, keep)].numpy()

    def score(
        self,
        sequences: Sequence[Tokens],
        recipe: Recipe,
        bases: Mapping[str, Basis],
        progress: Progress = lambda done: None,
        keep: Sequence[Keep] | None = None,
    ) -> Arrays:
        """See ``Teacher.score``."""
        states = {
            name: torch.from_numpy(rows)
            for name, rows in self.states(sequences, recipe.layers, keep).items()
        }
        layers = {layer: states[f"layer{layer}"] for layer in recipe.layers}
        logits = torch.from_numpy(self.logits(sequences, keep=keep))
        return reduce(Answer(logits, states["final"], layers), recipe, bases)


class Bent:
    """A teacher whose logits are capped after the output matrix, as Gemma 2's are."""

    def __init__(self, teacher: GGUFTeacher) -> None:
        self.teacher = teacher
        self.info = teacher.info

    def logits(self, sequences: Sequence[Tokens], **how: Any) -> Floats:
        """Softly capped at ±10."""
        return 10.0 * np.tanh(self.teacher.logits(sequences, **how) / 10.0)

    def product_logits(self, sequences: Sequence[Tokens]) -> Floats:
        """The same: nothing else comes after the output matrix."""
        return self.logits(sequences)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)


class Peeking(Bent):
    """A teacher whose logits depend on all of a text, as an encoder's do."""

    def logits(self, sequences: Sequence[Tokens], *, exact: bool = False) -> Floats:
        """With what the whole text adds."""
        sums = [int(tokens.sum()) for tokens in sequences for _ in tokens[1:]]
        added = [np.random.default_rng(s).normal(size=self.info.vocab_size) for s in sums]
        return self.teacher.logits(sequences) + np.array(added, np.float32)


def _seen(sequences: Sequence[Tokens], keep: Sequence[Keep] | None) -> torch.Tensor:
    """The token that each wanted position follows, ``[N]``."""
    masks = whole_masks(sequences, keep)
    rows = [tokens[:-1][mask] for tokens, mask in zip(sequences, masks, strict=True)]
    return torch.from_numpy(np.concatenate(rows).astype(np.int64))


def begun(teacher: Teacher, *tokens: int) -> Tokens:
    """A forced segment that begins a text."""
    return np.array([teacher.info.bos, *tokens], dtype=np.int32)


def assert_greedy(teacher: Teacher, lengths: Sequence[int], max_length: int) -> None:
    """Decoding texts of so many forced tokens together gives what scoring each whole text gives."""
    starts = [begun(teacher, *range(5, 5 + n)) for n in lengths]
    sampling = Sampling(temperature=0, max_length=max_length)
    spoken = teacher.generate(GenerationRequest([[start] for start in starts], sampling))
    for start, tokens in zip(starts, spoken, strict=True):
        assert np.array_equal(tokens[: len(start)], start) and len(tokens) <= max_length
        rows = teacher.logits([tokens])
        assert np.array_equal(rows[len(start) - 1 :].argmax(axis=-1), tokens[len(start) :])


def assert_forced_segments_stand(teacher: Teacher, temperature: float) -> None:
    """A second segment stands where the first turn ended; no end inside a text, none too long."""
    request = [begun(teacher, 9), np.array([7, 8, 7, 8], np.int32)]
    sampling = Sampling(temperature=temperature, max_length=200, seed=1)
    reports: list[int] = []
    forced = 0
    for tokens in teacher.generate(GenerationRequest([request] * 40, sampling), reports.append):
        assert len(tokens) <= 200
        inner = tokens[:-1].tolist()
        ends = set(teacher.info.end_tokens) & set(inner[1:])
        assert not ends, "an end token stands inside a sequence"
        forced += any(inner[at : at + 4] == [7, 8, 7, 8] for at in range(len(inner)))
    assert forced > 0
    assert reports == sorted(set(reports)) and reports[-1] == 40


def assert_max_length_is_reached(teacher: Teacher) -> None:
    """Without an end token a sequence has exactly max_length tokens."""
    spoken = teacher.generate(
        GenerationRequest([[begun(teacher)]] * 8, Sampling(max_length=9, seed=2))
    )
    assert max(map(len, spoken)) == 9


Fields = dict[str, Field]

TEXT = r"""The quick brown fox doesn't won't I'LL we've they'Re jumped over 42 lazy dogs.
Hello, world! naïve café Straße ΑΘΗΝΑ ώρα Привет мир שלום مرحبا हिन्दी ไทย 한국어 中文字符 𐐀𐐁
⅔ ² Ⅷ ٣٤٥ １２３ 日本語 の テキスト です。
これは、ペンです！ カタカナ ｶﾀｶﾅ 「引用」 ー〜 東京都 ㈱ 々 😀 🎉🎉 👍🏽 🇯🇵
def f(x): return x**2 { } [] <= >= != -> => // /* */ # @ $ % ^ & | ~ ` " \ ; ::: ... --- ~~~ ~é
camelCase HTTPServer snake_case 3.14 1,000,000 0xFF 12345678901 1e-9 user@example.org
https://a.b/c?d=e&f ▁ ▁▁lower <0x0A> <0xE3> [PAD32011] <unk> Ġ Ċ"""
FAMILY = "👩\u200d👩\u200d👧\u200d👦"
ODD = (
    *(FAMILY, "❤\ufe0f", "e\u0301", "a\u0308\u0323", "Z\u0351\u036b", "\u200d", "\u200b", "\ufeff"),
    *("\u00ad", "\ufffd", "\u0085x", "\x7f", "\x01", "\x00", "\uffff", "\U0010ffff", "\ue000"),
    "\u0378",
)
WORDS = (*TEXT.split(), *ODD)
BLANKS = (
    *("", *(" " * count for count in (1, 2, 3, 7, 19)), "\t", "\t\t", "\n", "\n\n", "\r\n"),
    *(" \n ", "\n  \n", "\u00a0", "\u3000", "\u3000\u3000", "\u2003", "\u2028", "\x0b", "\x0c"),
)
SPECIALS = (
    *("<s>", "</s>", "<|end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<|im_end|>", "< |end|>"),
)
EDGES = (
    *("", " ", "  ", "\n", "a", " a", "a ", "  a  ", "\u3000", "<s>", " <s> <s>", "\n" * 5),
    *("<|end|>\n\n a", " " * 70, "\t" * 9, "aaa" * 9, "<s><|end|></s>"),
    "<|endoftext|> <|endoftext|>",
)
# Where a single random character comes from: not where Unicode 16 added letters, which llama.cpp
# does not know yet.
SPANS = "0 1C80,2000 A7C0,A840 D800,E000 10500,1D000 1E000,1F000 30000"
ANY = [[int(end, 16) for end in span.split()] for span in SPANS.split(",")]


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
            kinds = {str: Kind.STRING, int: Kind.INT32, float: Kind.FLOAT32}
            new[key] = Field(value, Kind.ARRAY, kinds[type(value[0])])
        elif value is not None:
            kinds = {bool: Kind.BOOL, str: Kind.STRING, int: Kind.UINT32}
            new[key] = Field(value, kinds[type(value)])
    return new


@functools.cache
def example_fields() -> Fields:
    """The example teacher's metadata."""
    return tokenizer_fields(read_gguf(example_teacher()))


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


def sequences_of(teacher: GGUFTeacher, lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Seeded sequences of the given numbers of tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(3, teacher.info.vocab_size, size=n).astype(np.int32) for n in lengths]


def rewrite(source: Path, target: Path, **changes: object) -> Path:
    """Copy a GGUF file with some of its metadata changed."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        element = field.types[1] if len(field.types) > 1 else None
        value = changes.pop(key, field.contents())
        writer.add_key_value(key, value, field.types[0], element)
    assert not changes
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
