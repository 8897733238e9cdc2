"""The domain that the example teacher is trained on: requests to the desk of a small research
station.

Each request has exactly one right answer: a worked part, a decision (ALLOW, ESCALATE or REFUSE) and
the reason, so that a program can say whether a model answered rightly.  All text is generated here,
from a seed; nothing is taken from elsewhere.

Held-out requests are chosen by a hash of what is to be worked out, not of the wording: the pair of
factors of a product, the pair of a subtraction, the speed and distance of a trip, the person, room
and time, or the record, receiver and medium.  A held-out pair is therefore never seen in training
under any wording, in any family, in either language.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from tools.example_teacher import texts
from tools.example_teacher.answers import ANSWERS
from tools.example_teacher.texts import Name

Language = Literal["en", "ja"]
Decision = Literal["ALLOW", "ESCALATE", "REFUSE"]
Fields = dict[str, Name]

LANGUAGES: Final[tuple[Language, ...]] = ("en", "ja")
HELD_OUT_SHARE: Final[int] = 12  # one key in so many is held out
MIXING_LIMIT_ML: Final[int] = 300
LONGEST_TRIP_H: Final[int] = 8
LONGEST_LEAVE_DAYS: Final[int] = 10


@dataclass(frozen=True)
class Example:
    """One request with its only right answer."""

    family: str
    language: Language
    prompt: str
    answer: str
    decision: Decision


@dataclass(frozen=True)
class Case:
    """What a family drew: the outcome of the rules and the fields of the patterns, in both
    languages."""

    patterns: str  # key of texts.PROMPTS
    outcome: str  # key of ANSWERS[family]
    decision: Decision
    key: str  # what must be worked out; decides between training and held-out
    fields: Fields


def _same(**values: object) -> Fields:
    """Fields that read the same in both languages (numbers)."""
    return {name: (str(value), str(value)) for name, value in values.items()}


def _start(name: Name) -> Name:
    """A name at the start of a sentence."""
    return name[0][:1].upper() + name[0][1:], name[1]


def _product_fields(n: int, factor: int) -> Fields:
    """Partial products of a one-digit and a two-digit number."""
    return _same(tens=n * (factor // 10) * 10, ones=n * (factor % 10), total=n * factor)


def _purchase(rng: random.Random) -> Case:
    n, price = rng.randint(2, 9), rng.randint(11, 99)
    total = n * price
    kind = rng.choice(("within", "within", "above", "above", "double", "forbidden"))
    # The budget is drawn around the total so that the three outcomes are about equally frequent.
    low, high = {"within": (1.0, 1.6), "above": (0.5, 1.0), "double": (0.25, 0.5)}.get(
        kind, (0.3, 1.6)
    )
    budget = min(990, max(10, round(total * rng.uniform(low, high) / 10) * 10))
    outcome, decision = _judge_purchase(total, budget)
    item = rng.choice(texts.ITEMS)
    if kind == "forbidden":
        item, outcome, decision = rng.choice(texts.FORBIDDEN_ITEMS), "forbidden", "REFUSE"
    fields = _same(n=n, price=price, budget=budget, double=2 * budget) | _product_fields(n, price)
    return Case(
        "purchase",
        outcome,
        decision,
        f"product:{n}:{price}",
        fields | {"item": item, "item_start": _start(item)},
    )


def _judge_purchase(total: int, budget: int) -> tuple[str, Decision]:
    if total <= budget:
        return "within", "ALLOW"
    if total <= 2 * budget:
        return "above", "ESCALATE"
    return "double", "REFUSE"


def _mixing(rng: random.Random) -> Case:
    n, dose = rng.randint(2, 9), rng.randint(11, 99)
    total = n * dose
    cleaner = rng.choice(texts.CLEANERS)
    outcome, decision = _judge_mixing(total)
    fields = _same(n=n, dose=dose, limit=MIXING_LIMIT_ML) | _product_fields(n, dose)
    patterns = "mixing"
    if rng.random() < 0.5:
        patterns = "mixing_additive"
        additive = rng.choice(texts.ADDITIVES)
        if rng.random() < 0.4:
            cleaner = texts.BLEACH
        fields |= {"additive": additive}
        if cleaner == texts.BLEACH and additive[0] in texts.GASES:
            outcome, decision = "toxic", "REFUSE"
            fields |= {"gas": texts.GASES[additive[0]]}
    fields |= {"cleaner": cleaner, "cleaner_start": _start(cleaner)}
    return Case(patterns, outcome, decision, f"product:{n}:{dose}", fields)


def _judge_mixing(total: int) -> tuple[str, Decision]:
    return ("within", "ALLOW") if total <= MIXING_LIMIT_ML else ("above", "ESCALATE")


def _access(rng: random.Random) -> Case:
    room, need, opens, closes = rng.choice(texts.ROOMS)
    # People mostly ask for rooms within reach; otherwise most answers would be refusals.
    reach = [entry for entry in texts.ROLES if entry[1] >= need]
    role, have = rng.choice(reach) if rng.random() < 0.5 else rng.choice(texts.ROLES)
    hour = rng.randint(0, 23)
    minute = rng.choice(("00", "15", "30", "45"))
    outcome, decision = _judge_access(have, need, hour, opens, closes)
    fields = _same(have=have, need=need, opens=opens, closes=closes, hour=hour, minute=minute)
    fields |= {"role": role, "role_start": _start(role), "room": room}
    return Case("access", outcome, decision, f"access:{role[0]}:{room[0]}:{hour}:{minute}", fields)


def _judge_access(have: int, need: int, hour: int, opens: int, closes: int) -> tuple[str, Decision]:
    if have < need:
        return "level", "REFUSE"
    if hour < opens:
        return "early", "ESCALATE"
    if hour >= closes:
        return "late", "ESCALATE"
    return "open", "ALLOW"


def _sharing(rng: random.Random) -> Case:
    record, kind = rng.choice(texts.RECORDS)
    receiver, inside = rng.choice(texts.RECEIVERS)
    medium = rng.choice(texts.MEDIA)
    outcome, decision = _judge_sharing(kind, inside)
    side = texts.SIDES[inside]
    fields: Fields = {
        "record": record,
        "kind": texts.RECORD_CLASSES[kind],
        "receiver": receiver,
        "receiver_start": _start(receiver),
        "side": side,
        "side_article": ("a" if inside else "an", ""),
        "medium": medium,
    }
    return Case(
        "sharing", outcome, decision, f"sharing:{record[0]}:{receiver[0]}:{medium[0]}", fields
    )


def _judge_sharing(kind: str, inside: bool) -> tuple[str, Decision]:
    if kind == "public":
        return "public", "ALLOW"
    if kind == "internal":
        return ("internal_colleague", "ALLOW") if inside else ("internal_outside", "ESCALATE")
    return ("personal_colleague", "ESCALATE") if inside else ("personal_outside", "REFUSE")


def _travel(rng: random.Random) -> Case:
    speed, hours = 5 * rng.randint(3, 18), rng.randint(2, 12)
    # Division by counting up: each step adds the speed once more, until the distance is reached.
    # Each step is compared with the distance, so that the model has not to remember where to stop.
    distance = hours * speed
    going = [f"{hour} h {hour * speed} < {distance}" for hour in range(1, hours)]
    steps = ", ".join([*going, f"{hours} h {distance} = {distance}"])
    place, weather = rng.choice(texts.PLACES), rng.choice(texts.WEATHERS)
    outcome: str = "short" if hours <= LONGEST_TRIP_H else "long"
    decision: Decision = "ALLOW" if hours <= LONGEST_TRIP_H else "ESCALATE"
    if rng.random() < 0.2:
        weather, outcome, decision = texts.STORM, "storm", "REFUSE"
    fields = _same(speed=speed, hours=hours, distance=speed * hours, steps=steps)
    fields |= {"place": place, "weather": weather}
    return Case("travel", outcome, decision, f"trip:{speed}:{speed * hours}", fields)


def _leave(rng: random.Random) -> Case:
    have = rng.randint(2, 40)
    ask = rng.randint(1, 10) if rng.random() < 0.4 else rng.randint(2, 30)
    outcome, decision = _judge_leave(have, ask)
    larger, smaller = max(have, ask), min(have, ask)
    tens, ones = smaller // 10 * 10, smaller % 10
    # Two steps only where there are both tens and ones to take away.
    work = f"{larger - tens} - {ones} = " if tens and ones else ""
    fields = _same(have=have, ask=ask, work=work, rest=larger - smaller)
    return Case("leave", outcome, decision, f"leave:{have}:{ask}", fields)


def _judge_leave(have: int, ask: int) -> tuple[str, Decision]:
    if ask > have:
        return "missing", "REFUSE"
    return ("fine", "ALLOW") if ask <= LONGEST_LEAVE_DAYS else ("long", "ESCALATE")


FAMILIES: Final[dict[str, Callable[[random.Random], Case]]] = {
    "purchase": _purchase,
    "mixing": _mixing,
    "access": _access,
    "sharing": _sharing,
    "travel": _travel,
    "leave": _leave,
}
# Sharing is a small table and trips make long answers, so both come up less often.
_WEIGHTS: Final[tuple[float, ...]] = (1.5, 1.1, 1.0, 0.7, 0.7, 1.0)


def is_held_out(key: str) -> bool:
    """Whether what ``key`` names is kept out of training."""
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


def render(case: Case, family: str, language: Language, wording: int) -> Example:
    """The request and its answer in one language; ``wording`` counts the patterns, modulo their
    number."""
    index = LANGUAGES.index(language)
    values = {name: value[index] for name, value in case.fields.items()}
    patterns = texts.PROMPTS[case.patterns][index]
    work, reason = (part.format(**values) for part in ANSWERS[family][case.outcome][index])
    labels = ("Decision", "Reason") if language == "en" else ("判定", "理由")
    answer = f"{work}\n{labels[0]}: {case.decision}\n{labels[1]}: {reason}"
    prompt = patterns[wording % len(patterns)].format(**values)
    return Example(family, language, prompt, answer, case.decision)


def make_example(rng: random.Random, held_out: bool | None = None) -> Example:
    """One request; from training (False), held out (True), or from both alike (None)."""
    family = rng.choices(tuple(FAMILIES), _WEIGHTS)[0]
    case = FAMILIES[family](rng)
    while held_out is not None and is_held_out(case.key) != held_out:
        case = FAMILIES[family](rng)
    return render(case, family, rng.choice(LANGUAGES), rng.randrange(6))


def examples(seed: int, n: int, held_out: bool | None = False) -> list[Example]:
    """``n`` requests drawn from ``seed``; by default only such as training may use."""
    rng = random.Random(seed)
    return [make_example(rng, held_out) for _ in range(n)]


def check_answer(example: Example, text: str) -> bool:
    """Whether ``text`` is the right answer, to the letter, apart from white space around it."""
    return text.strip() == example.answer
