"""Answer patterns of the example teacher's domain, in English and Japanese.

Every answer is a worked part, a decision and a reason.  This module holds the worked part and the
reason for each outcome of each family; :mod:`tools.example_teacher.domain` fills in the fields and
the decision.
"""

from __future__ import annotations

from typing import Final

from tools.example_teacher.texts import Name

Work = tuple[str, str]  # (worked part of the answer, reason), still with the fields in braces

# family -> outcome -> (English work and reason, Japanese work and reason)
_BUDGET: Final[Name] = (
    "{n} x {price} = {tens} + {ones} = {total}. Budget {budget}, double {double}.",
    "{n} x {price} = {tens} + {ones} = {total}。予算{budget}、2倍{double}。",
)
_MIX: Final[Name] = (
    "{n} x {dose} = {tens} + {ones} = {total} ml.",
    "{n} x {dose} = {tens} + {ones} = {total} ml。",
)
_LEVEL: Final[Name] = (
    "{role_start} level {have}, {room} level {need}.",
    "{role}はレベル{have}、{room}はレベル{need}。",
)
_RECORD: Final[Name] = (
    "The {record} is {kind}, {receiver} is {side_article} {side}.",
    "{record}は{kind}の記録、{receiver}は{side}。",
)
ANSWERS: Final[dict[str, dict[str, tuple[Work, Work]]]] = {
    "purchase": {
        "forbidden": (
            ("{item_start} are on the forbidden list.", "forbidden things are never bought."),
            ("{item}は禁止品です。", "禁止品は買えません。"),
        ),
        "within": (
            (_BUDGET[0] + " {total} <= {budget}.", "the total is within the budget."),
            (_BUDGET[1] + "{total} <= {budget}。", "合計が予算内です。"),
        ),
        "above": (
            (
                _BUDGET[0] + " {total} > {budget}, {total} <= {double}.",
                "the total is above the budget, so a manager must agree.",
            ),
            (
                _BUDGET[1] + "{total} > {budget}、{total} <= {double}。",
                "予算を超えるので、管理者の承認が必要です。",
            ),
        ),
        "double": (
            (
                _BUDGET[0] + " {total} > {budget}, {total} > {double}.",
                "the total is more than twice the budget.",
            ),
            (
                _BUDGET[1] + "{total} > {budget}、{total} > {double}。",
                "合計が予算の2倍を超えます。",
            ),
        ),
    },
    "mixing": {
        "toxic": (
            ("{cleaner_start} and {additive} make {gas}.", "the mix sets free a toxic gas."),
            ("{cleaner}と{additive}は{gas}を出します。", "有毒なガスが出ます。"),
        ),
        "within": (
            (_MIX[0] + " {total} <= {limit}.", "the amount is within the limit of {limit} ml."),
            (_MIX[1] + "{total} <= {limit}。", "量が上限{limit}ml以内です。"),
        ),
        "above": (
            (
                _MIX[0] + " {total} > {limit}.",
                "the amount is above the limit of {limit} ml, so the safety officer must agree.",
            ),
            (
                _MIX[1] + "{total} > {limit}。",
                "量が上限{limit}mlを超えるので、安全係の承認が必要です。",
            ),
        ),
    },
    "access": {
        "level": (
            (_LEVEL[0] + " {have} < {need}.", "the level is too low for this room."),
            (_LEVEL[1] + "{have} < {need}。", "この部屋にはレベルが足りません。"),
        ),
        "open": (
            (
                _LEVEL[0]
                + " {have} >= {need}. Open {opens} to {closes}, {opens} <= {hour} < {closes}.",
                "the level is enough and the room is open.",
            ),
            (
                _LEVEL[1]
                + "{have} >= {need}。{opens}時から{closes}時、{opens} <= {hour} < {closes}。",
                "レベルが足り、部屋は開いています。",
            ),
        ),
        "early": (
            (
                _LEVEL[0] + " {have} >= {need}. Open {opens} to {closes}, {hour} < {opens}.",
                "the room is closed, so the guard must agree.",
            ),
            (
                _LEVEL[1] + "{have} >= {need}。{opens}時から{closes}時、{hour} < {opens}。",
                "部屋は閉まっているので、警備員の承認が必要です。",
            ),
        ),
        "late": (
            (
                _LEVEL[0] + " {have} >= {need}. Open {opens} to {closes}, {hour} >= {closes}.",
                "the room is closed, so the guard must agree.",
            ),
            (
                _LEVEL[1] + "{have} >= {need}。{opens}時から{closes}時、{hour} >= {closes}。",
                "部屋は閉まっているので、警備員の承認が必要です。",
            ),
        ),
    },
    "sharing": {
        "public": (
            (_RECORD[0], "public records are open to everyone."),
            (_RECORD[1], "公開の記録は誰にでも渡せます。"),
        ),
        "internal_colleague": (
            (_RECORD[0], "colleagues may see internal records."),
            (_RECORD[1], "同僚は内部の記録を見られます。"),
        ),
        "internal_outside": (
            (_RECORD[0], "internal records leave the station only if the director agrees."),
            (_RECORD[1], "内部の記録を外に出すには所長の承認が必要です。"),
        ),
        "personal_colleague": (
            (_RECORD[0], "the person concerned must agree first."),
            (_RECORD[1], "先に本人の同意が必要です。"),
        ),
        "personal_outside": (
            (_RECORD[0], "personal records never leave the station."),
            (_RECORD[1], "個人の記録は外に出せません。"),
        ),
    },
    "travel": {
        "storm": (
            ("The weather is {weather}.", "nobody drives in a storm."),
            ("天気は{weather}です。", "嵐の中は運転できません。"),
        ),
        "short": (
            ("{steps}. {hours} h <= 8 h.", "the trip takes {hours} hours."),
            ("{steps}。{hours} h <= 8 h。", "{hours}時間で着きます。"),
        ),
        "long": (
            (
                "{steps}. {hours} h > 8 h.",
                "the trip takes more than 8 hours, so the crew chief must agree.",
            ),
            ("{steps}。{hours} h > 8 h。", "8時間を超えるので、隊長の承認が必要です。"),
        ),
    },
    "leave": {
        "missing": (
            ("{ask} > {have}. {ask} - {have} = {work}{rest}.", "{rest} days are missing."),
            ("{ask} > {have}。{ask} - {have} = {work}{rest}。", "{rest}日足りません。"),
        ),
        "fine": (
            ("{ask} <= {have}. {have} - {ask} = {work}{rest}. {ask} <= 10.", "{rest} days remain."),
            ("{ask} <= {have}。{have} - {ask} = {work}{rest}。{ask} <= 10。", "{rest}日残ります。"),
        ),
        "long": (
            (
                "{ask} <= {have}. {have} - {ask} = {work}{rest}. {ask} > 10.",
                "more than 10 days in a row, so the head must agree.",
            ),
            (
                "{ask} <= {have}。{have} - {ask} = {work}{rest}。{ask} > 10。",
                "10日を超えるので、上司の承認が必要です。",
            ),
        ),
    },
}
