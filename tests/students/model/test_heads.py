"""The two heads: what they compute, what decides, and their keys in a GGUF file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distill.capture.temporary_files.tokenizer_only import tokenizer_entries
from distill.config.loading import load_config
from distill.initialization.shape import student_shape
from students.gguf.metadata import ExportNames
from students.gguf.writer import write_gguf
from students.model.build import build_student
from students.model.decoder import SO8TForCausalLM
from students.model.fold import fold, to_llama
from students.model.head_decisions import COSTS
from students.model.heads import (
    GREATEST_LEAD,
    HeadError,
    Heads,
    VerificationHead,
    certainty,
    head_values,
    read_heads,
    rounded_runs,
)
from students.model.safety_head import (
    SafetyHead,
    SafetyShape,
)
from teachers import example_teacher
from teachers.gguf.file import read_gguf
from teachers.llama_cpp.teacher import GGUFTeacher
from tests.support.references import case
from tests.support.students import make_student
from tests.support.teachers import certainty_of

pytestmark = pytest.mark.usefixtures("llama_here")
WIDTH = 64
SHAPE = SafetyShape((1,), mean=True, buckets=96)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lively(heads: Heads) -> Heads:
    """The same heads with every weight drawn, trust off its default."""
    generator = torch.Generator().manual_seed(5)
    assert heads.safety is not None and heads.verification is not None
    for parameter in (*heads.safety.parameters(), *heads.verification.parameters()):
        parameter.data.normal_(generator=generator)
    return Heads(heads.safety, heads.verification, 0.71)


@pytest.fixture(scope="module")
def student() -> SO8TForCausalLM:
    """A student with both heads and the example teacher's vocabulary."""
    tokens = read_gguf(example_teacher()).value("tokenizer.ggml.tokens")
    made = make_student(WIDTH, 2, len(tokens), heads=True)
    head = SafetyHead(WIDTH, SHAPE)
    head.runs.copy_(torch.mul(*rounded_runs(drawn(SHAPE.buckets, 3, seed=8))))
    made.replace_safety_head(head)
    made.config.trust = 0.71
    return made


def export(student: SO8TForCausalLM, path: Path, quant: str = "f32") -> Path:
    tokenizer = tokenizer_entries(read_gguf(example_teacher()))
    write_gguf(student, path, quant, tokenizer, ExportNames("judge", {"teacher_name": "example"}))
    return path


def keys_of(path: Path) -> dict[str, Any]:
    fields = read_gguf(path).fields.items()
    return {key: field.value for key, field in fields if key.startswith("so8t.")}


# -- what they compute ---------------------------------------------------------------------------


def test_heads_against_plain_products() -> None:
    """W x + b for decisions; w · silu(V x + c) + d + u · certainty for verification."""
    heads = lively(Heads(SafetyHead(8), VerificationHead(8, 5)))
    assert heads.safety is not None and heads.verification is not None
    states = drawn(2, 3, 8, seed=1)
    logits_of = 3.0 * drawn(2, 3, 11, seed=2)
    certain = torch.tensor([[certainty_of(row) for row in rows] for rows in logits_of.tolist()])
    weight, bias = (p.detach().double().numpy() for p in heads.safety.parameters())
    named = {name: p.detach().double().numpy() for name, p in heads.verification.named_parameters()}
    decided, verified = heads.safety(states).detach(), heads.verification(states, certain).detach()
    assert decided.shape == (2, 3, 3) and verified.shape == (2, 3)
    for index in np.ndindex(2, 3):
        x = states[index].double().numpy()
        logits = weight @ x + bias
        assert decided[index].tolist() == pytest.approx(logits.tolist(), rel=1e-5, abs=1e-5)
        units = named["hidden.weight"] @ x + named["hidden.bias"]
        active = units / (1.0 + np.exp(-units))
        wanted = float(named["output.weight"][0] @ active + named["output.bias"][0])
        wanted += float(named["certainty"] @ certainty_of(logits_of[index].tolist()))
        assert float(verified[index]) == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        chances = np.exp(logits) / np.exp(logits).sum()
        assert heads.probabilities(states)[index].tolist() == pytest.approx(chances, abs=1e-6)
        chance = 1.0 / (1.0 + math.exp(-wanted))
        assert float(heads.agreement(states, logits_of)[index]) == pytest.approx(chance, abs=1e-5)


def test_heads_are_float32_whatever_surrounds_them() -> None:
    """Under autocast, and from bfloat16, they and the certainty of logits lose nothing."""
    heads = lively(Heads(SafetyHead(8), VerificationHead(8)))
    states = drawn(4, 8, seed=1)
    logits = drawn(4, 50, seed=2)
    assert heads.safety is not None and heads.verification is not None
    certain = certainty(logits)
    computed: tuple[tuple[Callable[..., Tensor], Tensor, tuple[Tensor, ...]], ...] = (
        (heads.safety, states, ()),
        (heads.verification, states, (certain,)),
        (certainty, logits, ()),
    )
    for compute, given, more in computed:
        with case(compute):
            with torch.autocast("cpu", torch.bfloat16):
                inside, narrow = compute(given, *more), compute(given.bfloat16(), *more)
            assert inside.dtype == narrow.dtype == torch.float32
            assert torch.equal(inside, compute(given, *more))
            assert torch.equal(narrow, compute(given.bfloat16().float(), *more))


# -- how certain a student is --------------------------------------------------------------------

SUREST = 13.815509  # log-odds of what a doubt of 1e-6 leaves


def test_certainty_against_its_definition() -> None:
    """log p/(1 − p) of the best token, and the difference of the two greatest logits.

    Whatever is added to all logits and wherever the token is.
    """
    for vocab_size, spread in product((2, 3, 50, 5000), (0.0, 0.1, 1.0, 3.0)):
        logits = spread * drawn(4, 5, vocab_size, seed=vocab_size)
        result = certainty(logits)
        with case(vocab_size, spread):
            assert result.shape == (4, 5, 2) and result.dtype == torch.float32
            ranked = np.sort(logits.double().numpy(), axis=-1)
            best = np.exp(ranked[..., -1]) / np.exp(ranked).sum(axis=-1)
            odds, ahead = result.numpy()[..., 0], result.numpy()[..., 1]
            np.testing.assert_allclose(odds, np.log(best / (1.0 - best)), rtol=1e-4, atol=1e-5)
            differences = ranked[..., -1] - ranked[..., -2]
            np.testing.assert_allclose(ahead, differences, rtol=1e-6, atol=1e-6)
            shared = [[certainty_of(row) for row in rows] for rows in logits.tolist()]
            np.testing.assert_allclose(result, shared, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(certainty(logits + 7.0), result, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(certainty(logits.flip(-1)), result, rtol=1e-5, atol=1e-5)


def test_logits_without_one_best_token() -> None:
    """Uniform ones: −log(V − 1). Of two or three best each has its share; none is ahead."""
    for vocab_size, level in product((2, 3, 1000, 150_000), (0.0, -30.0, 1e3)):
        odds, ahead = certainty(torch.full((vocab_size,), level)).tolist()
        most = 2e-4 if level == 1e3 else 1e-4
        wanted = pytest.approx(-math.log(vocab_size - 1), rel=1e-4, abs=most)
        assert odds == wanted and ahead == 0.0, (vocab_size, level)
    logits = torch.full((3, 40), -60.0)
    logits[0, [3, 17]] = 5.0
    logits[1, [0, 1, 39]] = 5.0
    logits[2] = torch.linspace(-1.0, 1.0, 40)
    logits[2, 38] = logits[2, 39]
    odds, ahead = certainty(logits).T
    wanted = [0.0, -math.log(2.0), certainty_of(logits[2].tolist())[0]]
    assert ahead.tolist() == [0.0] * 3 and odds.tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_certain_token_and_large_logits_are_finite() -> None:
    """However certain, the log-odds end at those of a doubt of 1e-6; more certain is never less."""
    result = []
    for ahead in (0.0, 2.0, 5.0, 9.0, 12.0, 15.0, 25.0, 60.0, 1e3, 1e6, 1e30):
        logits = torch.zeros(20)
        logits[7] = ahead
        odds, difference = certainty(logits).tolist()
        wanted = min(ahead - math.log(19), SUREST)
        assert odds == pytest.approx(wanted, abs=1e-4), ahead
        assert difference == pytest.approx(min(ahead, GREATEST_LEAD))
        result.append(odds)
    assert result == sorted(result) and result[-1] == pytest.approx(SUREST, abs=1e-4)
    rows = [[1e30, -1e30, 0.0], [-1e30, -1e30, -1e30], [3e4, 3e4, -3e4], [-1e4, -1e4 - 1, -2e4]]
    far = torch.tensor(rows)
    assert certainty(far).isfinite().all()
    assert certainty(far)[:, 1].tolist() == pytest.approx([GREATEST_LEAD, 0.0, 0.0, 1.0])
    heads = Heads(None, VerificationHead(8))
    assert heads.agreement(torch.randn(4, 8), far).isfinite().all()


def test_the_head_starts_as_the_log_odds_of_the_top_token(example_gguf: GGUFTeacher) -> None:
    """Exactly so without a correction, which is small in a built student."""
    head, states, logits = VerificationHead(8), drawn(30, 8, seed=4), 2.0 * drawn(30, 12, seed=5)
    assert head.certainty.tolist() == [1.0, 0.0]
    head.output.weight.data.zero_()
    head.output.bias.data.zero_()
    assert torch.equal(head(states, certainty(logits)), certainty(logits)[:, 0])
    result = Heads(None, head).agreement(states, logits).double()
    top = logits.double().softmax(dim=-1).amax(dim=-1)
    torch.testing.assert_close(result, top, rtol=0, atol=1e-6)
    config = load_config(None, {"student.size": "32x1"}, [])
    student = build_student(student_shape(config, example_gguf.info), 0)
    assert student.verification_head.certainty.tolist() == [1.0, 0.0]
    with torch.no_grad():
        output = student(torch.tensor([[3, 9, 27, 81]]))
    chances = student.heads().agreement(output.last_hidden_state[0], output.logits[0])
    top = output.logits[0].double().softmax(dim=-1).max(dim=-1).values
    assert torch.allclose(chances.double(), top, rtol=0.1)


# -- in the student ------------------------------------------------------------------------------


def test_other_weights_are_the_same_with_and_without_heads() -> None:
    """What a seed draws for the decoder does not depend on the heads."""
    plain = make_student(heads=False)
    without, together = plain.state_dict(), make_student(heads=True).state_dict()
    assert all(torch.equal(together[name], tensor) for name, tensor in without.items())
    added = together.keys() - without.keys()
    assert {name.split(".")[0] for name in added} == {"safety_head", "verification_head"}
    assert len(added) == 7
    assert plain.heads().safety is None and plain.heads().verification is None
    again = make_student(heads=True).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in together.items())


def test_a_weight_of_zero_leaves_the_head_out(tiny_teacher: GGUFTeacher) -> None:
    """The settings decide which heads the student has; the rest of it is the same."""
    for settings, has in (
        ([], (True, True)),
        (["loss.lambda_safety=0"], (False, True)),
        (["safety.labels=none"], (False, True)),
        (["loss.lambda_verification=0"], (True, False)),
        (["safety.labels=none", "loss.lambda_verification=0"], (False, False)),
    ):
        config = load_config(None, {"student.size": "32x1"}, settings)
        student = build_student(student_shape(config, tiny_teacher.info), 0)
        heads = student.heads()
        assert (heads.safety is not None, heads.verification is not None) == has, settings
        names = {name.split(".")[0] for name in student.state_dict()}
        assert ("safety_head" in names, "verification_head" in names) == has, settings


def test_a_saved_student_keeps_its_heads(student: SO8TForCausalLM, tmp_path: Path) -> None:
    """Weights, thresholds and trust, through transformers' own loader."""
    student.save_pretrained(tmp_path)
    heads = AutoModelForCausalLM.from_pretrained(tmp_path).heads()
    assert (heads.thresholds, heads.costs, heads.trust) == (None, COSTS, 0.71)
    assert heads.safety is not None and heads.safety.shape == SHAPE
    assert head_values(heads) == head_values(student.heads())


def test_fold_and_llama_know_nothing_of_heads(student: SO8TForCausalLM) -> None:
    """The folded weights are those of the same student without heads."""
    plain = make_student(WIDTH, 2, student.config.vocab_size)
    torch.testing.assert_close(fold(student), fold(plain), rtol=0, atol=0)
    ids = torch.tensor([[3, 9, 27, 81]])
    with torch.no_grad():
        assert torch.equal(to_llama(student)(ids).logits, to_llama(plain)(ids).logits)


# -- their keys ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_a_file_carries_both_heads_to_the_bit(
    student: SO8TForCausalLM, tmp_path: Path, quant: str
) -> None:
    """Written and read again: the same numbers, whatever the weights were rounded to."""
    ours = student.heads()
    heads = read_heads(keys_of(export(student, tmp_path / "s.gguf", quant)), WIDTH)
    for mine, kept in ((ours.safety, heads.safety), (ours.verification, heads.verification)):
        assert mine is not None and kept is not None
        weights, result = mine.state_dict(), kept.state_dict()
        assert all(torch.equal(result[name], tensor) for name, tensor in weights.items())
    assert heads.trust == float(np.float32(0.71)) and heads.costs == COSTS
    states, logits = drawn(5, WIDTH, seed=2), drawn(5, 40, seed=3)
    prompts = [np.arange(count, dtype=np.int32) for count in range(1, 6)]
    seen = drawn(5, SHAPE.features(WIDTH), seed=4), prompts
    assert torch.equal(heads.probabilities(*seen), ours.probabilities(*seen))
    assert torch.equal(heads.agreement(states, logits), ours.agreement(states, logits))


def test_a_file_with_one_head(student: SO8TForCausalLM) -> None:
    """The other one is not there, and its settings are the defaults."""
    for missing in ("safety", "verification"):
        values = {k: v for k, v in head_values(student.heads()).items() if f".{missing}." not in k}
        heads = read_heads(values, WIDTH)
        gone = (missing == "safety", missing == "verification")
        assert (heads.safety is None, heads.verification is None) == gone
        assert heads.costs == COSTS and (heads.trust == 0.5) == gone[1]
    empty = read_heads({"so8t.teacher_name": "x"}, WIDTH)
    assert empty.safety is None and empty.verification is None


def test_llama_cpp_loads_a_file_with_heads_and_computes_the_same(
    student: SO8TForCausalLM, tmp_path: Path
) -> None:
    """Its logits are those of the file without them, to the bit; so are states of any length."""
    plain = make_student(WIDTH, 2, student.config.vocab_size)
    room = student.config.max_position_embeddings
    longest = np.random.default_rng(0).integers(3, 300, size=room)
    rows = ([3, 9, 27, 81, 243, 5], [7, 8], [9], longest)
    prompts = [np.asarray(row, dtype=np.int32) for row in rows]
    sequences = prompts[:2]
    path = export(student, tmp_path / "0.gguf")
    assert any(key.startswith("so8t.safety.") for key in keys_of(path))
    with GGUFTeacher(path, threads=1) as loaded:
        assert loaded.info.context_length == room
        logits = loaded.logits(sequences, exact=True)
        states = loaded.states(sequences, exact=True)["final"]
        last = loaded.last_states(prompts)
    path = export(plain, tmp_path / "1.gguf")
    assert not any(key.startswith("so8t.safety.") for key in keys_of(path))
    with GGUFTeacher(path, threads=1) as loaded:
        assert np.array_equal(loaded.logits(sequences, exact=True), logits)
    with torch.no_grad():
        ids = [torch.from_numpy(tokens.astype(np.int64))[None] for tokens in prompts]
        ours = [student(row).last_hidden_state[0] for row in ids]
    for row, final, most in zip(last, ours, (1e-4, 1e-4, 1e-3, 1e-3), strict=True):
        assert np.abs(row - final[-1].numpy()).max() < most, len(final)
    before = torch.cat([final[:-1] for final in ours[:2]]).numpy()
    assert np.abs(states - before).max() < 1e-4


MATRICES = ("safety", "verification.hidden", "verification.output")
ARRAYS = [f"{matrix}.{kind}" for matrix in MATRICES for kind in ("weight", "bias")]
ARRAYS += ["safety.costs", "safety.runs.scale", "verification.certainty"]
ABSENT = object()


def damage(values: dict[str, Any]) -> Iterator[tuple[str, str, object]]:
    """The key that the error has to name, the key that is changed, and its value."""
    for key in ARRAYS:
        numbers = list(values[f"so8t.{key}"])
        middle = len(numbers) // 2
        for value in (ABSENT, [], 0.5, "0.5"):
            # Without costs a file is an older one, which has thresholds.
            named = "safety.thresholds" if key == "safety.costs" and value is ABSENT else key
            yield named, key, value
        if len(numbers) > 1:
            yield key, key, [0.5]
        for number in (math.nan, math.inf, 1e300, "x", 1, None):  # 1e300: infinite in float32
            yield key, key, [*numbers[:middle], number, *numbers[middle + 1 :]]
    turned, short = ["REFUSE", "ESCALATE", "ALLOW"], ["ALLOW", "REFUSE"]
    for value in (ABSENT, turned, short, "ALLOW", [1.0, 2.0, 3.0]):
        yield "safety.labels", "safety.labels", value
    yield "safety.costs", "safety.costs", [-1.0] * 9
    for value in ([-1], [1 << 17], [1.0], ["1"], "1", 1, [0] * (1 << 17)):
        yield "safety.layers", "safety.layers", value
    for value in (["mean"], "last", 2, []):
        yield "safety.positions", "safety.positions", value
    for value in ([], [1, 2], [1.0, 2.0, 3.0], [200, 0, 0], "x", [True, 0, 0]):
        yield "safety.runs", "safety.runs", value
    for value in (ABSENT, 0, -1, 1 << 17, 1 << 62, 64.0, "64", True, [64], None):
        yield "verification.units", "verification.units", value
    for units in (1 << 16, 63):
        yield "verification.hidden.weight", "verification.units", units
    for value in (ABSENT, math.nan, math.inf, "0.5", 1, [0.5], True):
        yield "verification.trust", "verification.trust", value


def test_damaged_keys_are_refused_by_name(
    student: SO8TForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing, of another width, not finite, of another kind, absurd: an error names the key."""
    whole: dict[str, Any] = dict(head_values(student.heads()))
    read_heads(whole, WIDTH)
    for width in (WIDTH - 8, WIDTH + 8, 2 * WIDTH):
        with pytest.raises(HeadError, match=r"safety\.weight has 768 values"):
            read_heads(whole, width)
    for named, key, value in damage(whole):
        values = whole | {f"so8t.{key}": value}
        if value is ABSENT:
            del values[f"so8t.{key}"]
        message = rf"so8t\.{re.escape(named)} "
        with case(key, str(value)[:60]), pytest.raises(HeadError, match=message):
            read_heads(values, WIDTH)

    def make(*_: object) -> Tensor:
        raise AssertionError("a head was made")

    # A few bytes of a file do not make anybody allocate gigabytes.
    monkeypatch.setattr("students.model.heads.VerificationHead", make)
    for units in (1 << 16, 1 << 40):
        values = whole | {"so8t.verification.units": units}
        with case(units), pytest.raises(HeadError, match=r"so8t\.verification"):
            read_heads(values, WIDTH)
