"""The two heads: what they compute, what decides, and their keys in a GGUF file that nobody has to trust."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.config import load_config
from distill.exporting import tokenizer_entries
from distill.new_student import student_shape
from students.builder import build_student
from students.decisions import ALLOW, DECISIONS, ESCALATE, REFUSE
from students.export import ExportNames, write_gguf
from students.fold import fold, to_llama
from students.heads import (
    GREATEST_LEAD,
    HeadError,
    Heads,
    SafetyHead,
    VerificationHead,
    certainty,
    decide,
    head_values,
    read_heads,
)
from students.model import SO8TForCausalLM
from teachers import example_teacher
from teachers.gguf_file import read_gguf
from teachers.gguf_teacher import GGUFTeacher
from tests.conftest import certainty_of, make_student

WIDTH = 64


def lively(heads: Heads) -> Heads:
    """The same heads with every weight drawn, thresholds and trust off their defaults."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for head in (heads.safety, heads.verification):
            for parameter in () if head is None else head.parameters():
                parameter.normal_(generator=generator)
    return Heads(heads.safety, heads.verification, (0.31, 0.62), 0.71)


@pytest.fixture(scope="module")
def student() -> SO8TForCausalLM:
    """A student with both heads and the example teacher's vocabulary."""
    made = make_student(
        WIDTH, 2, len(read_gguf(example_teacher()).value("tokenizer.ggml.tokens")), heads=True
    )
    made.config.decision_thresholds, made.config.trust = [0.31, 0.62], 0.71
    return made


def export(student: SO8TForCausalLM, path: Path, quant: str = "f32") -> Path:
    tokenizer = tokenizer_entries(read_gguf(example_teacher()))
    write_gguf(student, path, quant, tokenizer, ExportNames("judge", {"teacher_name": "example"}))
    return path


def keys_of(path: Path) -> dict[str, Any]:
    return {key: field.value for key, field in read_gguf(path).fields.items() if key.startswith("so8t.")}


# -- what they compute -------------------------------------------------------------------------------------


def test_heads_against_plain_products() -> None:
    """W x + b for the decisions; w · silu(V x + c) + d + u · certainty for the verification, one state at a time."""
    heads = lively(Heads(SafetyHead(8), VerificationHead(8, 5)))
    assert heads.safety is not None and heads.verification is not None
    states = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    logits_of = 3.0 * torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(2))
    certain = torch.tensor([[certainty_of(row) for row in rows] for rows in logits_of.tolist()])
    weight, bias = (p.detach().double().numpy() for p in heads.safety.parameters())
    named = {name: p.detach().double().numpy() for name, p in heads.verification.named_parameters()}
    inner, c, outer, d = (
        named[name] for name in ("hidden.weight", "hidden.bias", "output.weight", "output.bias")
    )
    decided, verified = heads.safety(states).detach(), heads.verification(states, certain).detach()
    assert decided.shape == (2, 3, 3) and verified.shape == (2, 3)
    for place in np.ndindex(2, 3):
        x = states[place].double().numpy()
        logits = np.array([sum(row * x) for row in weight]) + bias
        assert decided[place].tolist() == pytest.approx(logits.tolist(), rel=1e-5, abs=1e-5)
        units = [sum(row * x) + offset for row, offset in zip(inner, c, strict=True)]
        active = [unit / (1.0 + math.exp(-unit)) for unit in units]
        wanted = float(
            outer[0] @ active + d[0] + named["certainty"] @ certainty_of(logits_of[place].tolist())
        )
        assert float(verified[place]) == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        chances = np.exp(logits) / np.exp(logits).sum()
        assert heads.probabilities(states)[place].tolist() == pytest.approx(chances.tolist(), abs=1e-6)
        chance = 1.0 / (1.0 + math.exp(-wanted))
        assert float(heads.agreement(states, logits_of)[place]) == pytest.approx(chance, abs=1e-5)


def test_heads_are_float32_whatever_surrounds_them() -> None:
    """Under autocast, and from states in bfloat16, they lose nothing; nor does the certainty of logits."""
    heads = lively(Heads(SafetyHead(8), VerificationHead(8)))
    states = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    assert heads.safety is not None and heads.verification is not None
    for head, certain in ((heads.safety, ()), (heads.verification, (certainty(logits),))):
        with torch.autocast("cpu", torch.bfloat16):
            inside, narrow = head(states, *certain), head(states.bfloat16(), *certain)
        assert inside.dtype == narrow.dtype == torch.float32
        assert torch.equal(inside, head(states, *certain))
        assert torch.equal(narrow, head(states.bfloat16().float(), *certain))
    with torch.autocast("cpu", torch.bfloat16):
        inside, narrow = certainty(logits), certainty(logits.bfloat16())
    assert inside.dtype == narrow.dtype == torch.float32
    assert torch.equal(inside, certainty(logits))
    assert torch.equal(narrow, certainty(logits.bfloat16().float()))


def test_decide_by_definition() -> None:
    """REFUSE from its threshold on; else ALLOW from its share of the rest on; both thresholds belong to it."""
    chances = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)).double()
    chances /= chances.sum(dim=1, keepdim=True)
    seen = set()
    for refuse, allow in ((0.5, 0.5), (0.1, 0.9), (0.7, 0.2)):
        for row, taken in zip(chances.tolist(), decide(chances, (refuse, allow)).tolist(), strict=True):
            rest = row[ALLOW] + row[ESCALATE]
            wanted = REFUSE if row[REFUSE] >= refuse else ALLOW if row[ALLOW] / rest >= allow else ESCALATE
            assert taken == wanted
            seen.add(taken)
    assert seen == {0, 1, 2} and DECISIONS[REFUSE] == "REFUSE" and DECISIONS[ALLOW] == "ALLOW"
    edge = torch.tensor([[0.25, 0.25, 0.5], [0.375, 0.375, 0.25], [0.0, 0.0, 1.0]])
    assert decide(edge, (0.5, 0.5)).tolist() == [REFUSE, ALLOW, REFUSE]


# -- how certain a student is ------------------------------------------------------------------------------

SUREST = 13.815509  # log-odds of what a doubt of 1e-6 leaves


@pytest.mark.parametrize("vocab_size", [2, 3, 50, 5000])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 3.0])
def test_certainty_against_its_definition(vocab_size: int, spread: float) -> None:
    """log p/(1 − p) of the most probable token, and the difference of the two greatest logits; whatever is added to all
    logits and wherever the token is."""
    logits = spread * torch.randn(4, 5, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    found = certainty(logits)
    assert found.shape == (4, 5, 2) and found.dtype == torch.float32
    for place in np.ndindex(4, 5):
        chances = np.exp(logits[place].double().numpy())
        chances /= chances.sum()
        best = float(chances.max())
        second, first = np.sort(logits[place].double().numpy())[-2:]
        assert found[place][0].item() == pytest.approx(math.log(best / (1.0 - best)), rel=1e-4, abs=1e-5)
        assert found[place][1].item() == pytest.approx(first - second, rel=1e-6, abs=1e-6)
        assert found[place].tolist() == pytest.approx(
            certainty_of(logits[place].tolist()), rel=1e-4, abs=1e-5
        )
    torch.testing.assert_close(certainty(logits + 7.0), found, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(certainty(logits.flip(-1)), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [2, 3, 1000, 150_000])
def test_uniform_logits_are_certain_of_nothing(vocab_size: int) -> None:
    """−log(V − 1), and no token before another; also of large logits."""
    for level in (0.0, -30.0, 1e3):
        odds, ahead = certainty(torch.full((vocab_size,), level)).tolist()
        assert odds == pytest.approx(-math.log(vocab_size - 1), rel=1e-4, abs=2e-4 if level == 1e3 else 1e-4)
        assert ahead == 0.0


def test_ties_of_the_best() -> None:
    """Of two or three equal ones each has its share, and none is ahead of the other."""
    logits = torch.full((3, 40), -60.0)
    logits[0, [3, 17]] = 5.0
    logits[1, [0, 1, 39]] = 5.0
    logits[2] = torch.linspace(-1.0, 1.0, 40)
    logits[2, 38] = logits[2, 39]
    found = certainty(logits)
    assert found[:, 1].tolist() == [0.0, 0.0, 0.0]
    assert found[:2, 0].tolist() == pytest.approx([0.0, -math.log(2.0)], abs=1e-5)
    assert found[2, 0].item() == pytest.approx(certainty_of(logits[2].tolist())[0], abs=1e-5)


def test_a_certain_token_and_large_logits_are_finite() -> None:
    """However certain, the log-odds end at those of a doubt of 1e-6; more certain is never less."""
    found = []
    for ahead in (0.0, 2.0, 5.0, 9.0, 12.0, 15.0, 25.0, 60.0, 1e3, 1e6, 1e30):
        logits = torch.zeros(20)
        logits[7] = ahead
        odds, difference = certainty(logits).tolist()
        wanted = min(ahead - math.log(19), SUREST)
        assert odds == pytest.approx(wanted, abs=1e-4), ahead
        assert difference == pytest.approx(min(ahead, GREATEST_LEAD))
        found.append(odds)
    assert found == sorted(found) and found[-1] == pytest.approx(SUREST, abs=1e-4)
    far = torch.tensor([[1e30, -1e30, 0.0], [-1e30, -1e30, -1e30], [3e4, 3e4, -3e4], [-1e4, -1e4 - 1, -2e4]])
    assert certainty(far).isfinite().all()
    assert certainty(far)[:, 1].tolist() == pytest.approx([GREATEST_LEAD, 0.0, 0.0, 1.0])
    heads = Heads(None, VerificationHead(8))
    assert heads.agreement(torch.randn(4, 8), far).isfinite().all()


def test_the_head_begins_as_the_log_odds_of_the_top_token() -> None:
    """Without a correction what it says is the top token's own probability, whatever the state."""
    head = VerificationHead(8)
    assert head.certainty.tolist() == [1.0, 0.0]
    with torch.no_grad():
        head.output.weight.zero_()
        head.output.bias.zero_()
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(30, 8, generator=generator)
    logits = 2.0 * torch.randn(30, 12, generator=generator)
    assert torch.equal(head(states, certainty(logits)), certainty(logits)[:, 0])
    chances = np.exp(logits.double().numpy())
    top = (chances / chances.sum(axis=1, keepdims=True)).max(axis=1)
    assert Heads(None, head).agreement(states, logits).tolist() == pytest.approx(top.tolist(), abs=1e-6)


def test_a_students_head_begins_near_the_log_odds_of_its_top_token() -> None:
    """A built student's correction is small, and its ``certainty`` is not drawn."""
    config = load_config(None, {"student.size": "32x1"}, [])
    with GGUFTeacher(example_teacher(), threads=1) as teacher:
        student = build_student(student_shape(config, teacher.info), 0)
    assert student.verification_head.certainty.tolist() == [1.0, 0.0]
    with torch.no_grad():
        output = student(torch.tensor([[3, 9, 27, 81]]))
    chances = student.heads().agreement(output.last_hidden_state[0], output.logits[0])
    top = output.logits[0].double().softmax(dim=-1).max(dim=-1).values
    assert torch.allclose(chances.double(), top, rtol=0.1)


# -- in the student ----------------------------------------------------------------------------------------


def test_other_weights_are_the_same_with_and_without_heads() -> None:
    """What a seed draws for the decoder does not depend on the heads; without them nothing is left of them."""
    plain, headed = make_student(heads=False), make_student(heads=True)
    without, together = plain.state_dict(), headed.state_dict()
    assert all(torch.equal(together[name], tensor) for name, tensor in without.items())
    added = together.keys() - without.keys()
    assert {name.split(".")[0] for name in added} == {"safety_head", "verification_head"} and len(added) == 7
    assert plain.heads().safety is None and plain.heads().verification is None
    again = make_student(heads=True).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in together.items())


@pytest.mark.parametrize(
    ("settings", "safety", "verification"),
    [
        ([], True, True),
        (["loss.lambda_safety=0"], False, True),
        (["safety.labels=none"], False, True),
        (["loss.lambda_verification=0"], True, False),
        (["safety.labels=none", "loss.lambda_verification=0"], False, False),
    ],
)
def test_a_weight_of_zero_leaves_the_head_out(
    tiny_teacher: GGUFTeacher, settings: list[str], safety: bool, verification: bool
) -> None:
    """The settings decide which heads the student has; the rest of it is the same."""
    config = load_config(None, {"student.size": "32x1"}, settings)
    student = build_student(student_shape(config, tiny_teacher.info), 0)
    heads = student.heads()
    assert (heads.safety is not None, heads.verification is not None) == (safety, verification)
    names = {name.split(".")[0] for name in student.state_dict()} - {"model", "lm_head"}
    assert ("safety_head" in names, "verification_head" in names) == (safety, verification)


def test_a_saved_student_keeps_its_heads(student: SO8TForCausalLM, tmp_path: Path) -> None:
    """Weights, thresholds and trust, through transformers' own loader."""
    student.save_pretrained(tmp_path)
    heads = AutoModelForCausalLM.from_pretrained(tmp_path).heads()
    assert (heads.thresholds, heads.trust) == ((0.31, 0.62), 0.71)
    assert head_values(heads) == head_values(student.heads())


def test_fold_and_llama_know_nothing_of_heads(student: SO8TForCausalLM) -> None:
    """The folded weights are those of the same student without heads."""
    plain = make_student(WIDTH, 2, student.config.vocab_size)
    with_heads, without = fold(student), fold(plain)
    assert with_heads.keys() == without.keys()
    assert all(torch.equal(with_heads[name], tensor) for name, tensor in without.items())
    ids = torch.tensor([[3, 9, 27, 81]])
    with torch.no_grad():
        assert torch.equal(to_llama(student)(ids).logits, to_llama(plain)(ids).logits)


# -- their keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_a_file_carries_both_heads_to_the_bit(student: SO8TForCausalLM, tmp_path: Path, quant: str) -> None:
    """Written and read again: the same numbers, whatever the weights were rounded to."""
    heads = read_heads(keys_of(export(student, tmp_path / "s.gguf", quant)), WIDTH)
    assert heads.safety is not None and heads.verification is not None
    for name, tensor in student.state_dict().items():
        if name.startswith(("safety_head.", "verification_head.")):
            head, rest = name.split(".", 1)
            kept = {"safety_head": heads.safety, "verification_head": heads.verification}[head]
            assert torch.equal(kept.state_dict()[rest], tensor)
    as_float32 = [float(np.float32(value)) for value in (0.31, 0.62, 0.71)]
    assert [*heads.thresholds, heads.trust] == as_float32
    states = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
    assert torch.equal(heads.probabilities(states), student.heads().probabilities(states))
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(heads.agreement(states, logits), student.heads().agreement(states, logits))


@pytest.mark.parametrize("missing", ["safety", "verification"])
def test_a_file_with_one_head(student: SO8TForCausalLM, missing: str) -> None:
    """The other one is not there, and its settings are the defaults."""
    values = {key: v for key, v in head_values(student.heads()).items() if f".{missing}." not in key}
    heads = read_heads(values, WIDTH)
    assert (heads.safety is None, heads.verification is None) == (
        missing == "safety",
        missing == "verification",
    )
    assert (heads.thresholds == (0.5, 0.5)) == (missing == "safety")
    assert (heads.trust == 0.5) == (missing == "verification")
    empty = read_heads({"so8t.teacher_name": "x"}, WIDTH)
    assert empty.safety is None and empty.verification is None


def test_llama_cpp_loads_a_file_with_heads_and_computes_the_same(
    student: SO8TForCausalLM, tmp_path: Path
) -> None:
    """Stock llama.cpp does not mind the keys: its logits are those of the file without them, to the bit."""
    plain = make_student(WIDTH, 2, student.config.vocab_size)
    sequences = [np.array([3, 9, 27, 81, 243, 5], dtype=np.int32), np.array([7, 8], dtype=np.int32)]
    logits = []
    for number, model in enumerate((student, plain)):
        path = export(model, tmp_path / f"{number}.gguf")
        assert any(key.startswith("so8t.safety.") for key in keys_of(path)) == (number == 0)
        with GGUFTeacher(path, threads=1) as loaded:
            logits.append(loaded.logits(sequences, exact=True))
            if number == 0:
                states = loaded.states(sequences, exact=True)["final"]
                last = loaded.last_states(sequences)
    assert np.array_equal(logits[0], logits[1])
    with torch.no_grad():
        for at, tokens in ((0, sequences[0]), (1, sequences[1])):
            final = student(torch.from_numpy(tokens.astype(np.int64))[None]).last_hidden_state[0].numpy()
            assert np.abs(last[at] - final[-1]).max() < 1e-4
            first = 0 if at == 0 else len(sequences[0]) - 1
            assert np.abs(states[first : first + len(tokens) - 1] - final[:-1]).max() < 1e-4


def test_last_states_of_one_token_and_of_a_full_context(student: SO8TForCausalLM, tmp_path: Path) -> None:
    """The shortest and the longest prompt there can be."""
    room = student.config.max_position_embeddings
    longest = np.random.default_rng(0).integers(3, 300, size=room).astype(np.int32)
    prompts = [np.array([9], dtype=np.int32), longest]
    with GGUFTeacher(export(student, tmp_path / "s.gguf"), threads=1) as loaded:
        assert loaded.info.context_length == room
        found = loaded.last_states(prompts)
    with torch.no_grad():
        for row, tokens in zip(found, prompts, strict=True):
            final = student(torch.from_numpy(tokens.astype(np.int64))[None]).last_hidden_state[0, -1]
            assert np.abs(row - final.numpy()).max() < 1e-3


Harm = Callable[[dict[str, Any]], object]


def put(key: str, value: object) -> Harm:
    return lambda values: values.update({f"so8t.{key}": value})


def drop(key: str) -> Harm:
    return lambda values: values.pop(f"so8t.{key}")


def spoil(key: str, value: object) -> Harm:
    """Replace one number in the middle of a list."""

    def harm(values: dict[str, Any]) -> None:
        numbers = list(values[f"so8t.{key}"])
        numbers[len(numbers) // 2] = value
        values[f"so8t.{key}"] = numbers

    return harm


ARRAYS = [
    "safety.weight",
    "safety.bias",
    "safety.thresholds",
    "verification.hidden.weight",
    "verification.hidden.bias",
    "verification.output.weight",
    "verification.output.bias",
    "verification.certainty",
]
DAMAGE: list[tuple[str, Harm]] = [
    *((key, drop(key)) for key in ARRAYS),
    *((key, put(key, [0.5])) for key in ARRAYS if key != "verification.output.bias"),
    *((key, put(key, [])) for key in ARRAYS),
    *((key, put(key, 0.5)) for key in ARRAYS),
    *((key, put(key, "0.5")) for key in ARRAYS),
    *((key, spoil(key, math.nan)) for key in ARRAYS),
    *((key, spoil(key, math.inf)) for key in ARRAYS),
    *((key, spoil(key, 1e300)) for key in ARRAYS),  # of a float64 array: infinite in float32
    *((key, spoil(key, "x")) for key in ARRAYS),
    *((key, spoil(key, 1)) for key in ARRAYS),
    *((key, spoil(key, None)) for key in ARRAYS),
    ("safety.labels", drop("safety.labels")),
    ("safety.labels", put("safety.labels", ["REFUSE", "ESCALATE", "ALLOW"])),
    ("safety.labels", put("safety.labels", ["ALLOW", "REFUSE"])),
    ("safety.labels", put("safety.labels", "ALLOW")),
    ("safety.labels", put("safety.labels", [1.0, 2.0, 3.0])),
    ("verification.units", drop("verification.units")),
    *(
        ("verification.units", put("verification.units", value))
        for value in (0, -1, 1 << 17, 1 << 62, 64.0, "64", True, [64], None)
    ),
    ("verification.hidden.weight", put("verification.units", 1 << 16)),
    ("verification.hidden.weight", put("verification.units", 63)),
    ("verification.trust", drop("verification.trust")),
    *(
        ("verification.trust", put("verification.trust", value))
        for value in (math.nan, math.inf, "0.5", 1, [0.5], True)
    ),
]


@pytest.mark.parametrize(("key", "harm"), DAMAGE)
def test_damaged_keys_are_refused_by_name(student: SO8TForCausalLM, key: str, harm: Harm) -> None:
    """Missing, too short, not finite, of another kind, absurd: one error that names the key."""
    values: dict[str, Any] = dict(head_values(student.heads()))
    read_heads(values, WIDTH)
    harm(values)
    with pytest.raises(HeadError, match=rf"so8t\.{key.replace('.', chr(92) + '.')} "):
        read_heads(values, WIDTH)


def test_an_absurd_size_is_refused_before_it_is_made(
    student: SO8TForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few bytes of a file do not make anybody allocate gigabytes."""

    def make(*_: object) -> Tensor:
        raise AssertionError("a head was made")

    values: dict[str, Any] = dict(head_values(student.heads()))
    monkeypatch.setattr("students.heads.VerificationHead", make)
    for units in (1 << 16, 1 << 40):
        put("verification.units", units)(values)
        with pytest.raises(HeadError, match=r"so8t\.verification"):
            read_heads(values, WIDTH)


def test_heads_of_another_width_are_refused(student: SO8TForCausalLM) -> None:
    """They would be read row by row into a wrong shape."""
    values = head_values(student.heads())
    for width in (WIDTH - 8, WIDTH + 8, 2 * WIDTH):
        with pytest.raises(HeadError, match=r"safety\.weight has 192 values"):
            read_heads(values, width)
