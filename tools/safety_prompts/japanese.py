"""Forms of a Japanese verb phrase: ``盗む`` → 盗む, 盗みたい, 盗んで, 盗み(ます)."""

from __future__ import annotations

ICHIDAN = "*"  # behind a verb that loses its る: 開ける*
_STEMS = dict(zip("うつるむぶぬくぐす", "いちりみびにきぎし", strict=True))
_TE = {"う": "って", "つ": "って", "る": "って", "む": "んで", "ぶ": "んで", "ぬ": "んで"}
_TE |= {"く": "いて", "ぐ": "いで", "す": "して"}


def forms(phrase: str) -> dict[str, str]:
    """The phrase as dictionary form, -たい, -て and before -ます.

    Raises:
        ValueError: it does not end in a verb.
    """
    if phrase.endswith(ICHIDAN):
        phrase = phrase.removesuffix(ICHIDAN)
        stem, te = phrase[:-1], phrase[:-1] + "て"
    elif phrase.endswith("する"):
        stem = phrase[:-2] + "し"
        te = stem + "て"
    elif phrase.endswith(("行く", "いく")):
        stem, te = phrase[:-1] + "き", phrase[:-1] + "って"
    elif phrase[-1] in _STEMS:
        stem, te = phrase[:-1] + _STEMS[phrase[-1]], phrase[:-1] + _TE[phrase[-1]]
    else:
        raise ValueError(f"{phrase!r} does not end in a verb")
    return {"dict": phrase, "tai": stem + "たい", "te": te, "masu": stem, "vp": phrase}
