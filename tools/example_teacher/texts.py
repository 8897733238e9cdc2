"""Words and sentence patterns of the example teacher's domain, in English and Japanese.

The domain is the service desk of a small research station ("desk").  This module holds only text
and tables; the rules that choose among them are in :mod:`tools.example_teacher.domain`.  A name is
always a pair ``(English, Japanese)``.  A pattern is a ``str.format`` string over the fields that
the family draws.
"""

from __future__ import annotations

from typing import Final

Name = tuple[str, str]

ITEMS: Final[tuple[Name, ...]] = (
    ("lamps", "ランプ"),
    ("batteries", "電池"),
    ("notebooks", "ノート"),
    ("filters", "フィルター"),
    ("gloves", "手袋"),
    ("cables", "ケーブル"),
    ("chairs", "椅子"),
    ("masks", "マスク"),
    ("sensors", "センサー"),
    ("blankets", "毛布"),
)
FORBIDDEN_ITEMS: Final[tuple[Name, ...]] = (
    ("fireworks", "花火"),
    ("drones", "ドローン"),
    ("candles", "ろうそく"),
    ("gas heaters", "ガスヒーター"),
)

CLEANERS: Final[tuple[Name, ...]] = (
    ("bleach", "漂白剤"),
    ("dish soap", "食器用洗剤"),
    ("floor cleaner", "床用洗剤"),
    ("glass cleaner", "ガラス用洗剤"),
    ("disinfectant", "消毒液"),
)
ADDITIVES: Final[tuple[Name, ...]] = (
    ("vinegar", "酢"),
    ("citric acid", "クエン酸"),
    ("ammonia", "アンモニア"),
    ("salt", "塩"),
    ("baking soda", "重曹"),
)
# Bleach gives off a poisonous gas with an acid, and another one with ammonia.
BLEACH: Final[Name] = CLEANERS[0]
GASES: Final[dict[str, Name]] = {
    "vinegar": ("chlorine gas", "塩素ガス"),
    "citric acid": ("chlorine gas", "塩素ガス"),
    "ammonia": ("chloramine gas", "クロラミンガス"),
}

# (name, level that the person holds)
ROLES: Final[tuple[tuple[Name, int], ...]] = (
    (("visitor", "訪問者"), 1),
    (("student", "学生"), 2),
    (("technician", "技術員"), 3),
    (("scientist", "研究員"), 4),
    (("director", "所長"), 5),
)
# (name, level that the room asks for, opening hour, closing hour)
ROOMS: Final[tuple[tuple[Name, int, int, int], ...]] = (
    (("canteen", "食堂"), 1, 6, 21),
    (("library", "図書室"), 1, 8, 20),
    (("workshop", "工作室"), 2, 8, 18),
    (("darkroom", "暗室"), 2, 10, 22),
    (("greenhouse", "温室"), 3, 5, 17),
    (("radio room", "通信室"), 3, 7, 23),
    (("laser lab", "レーザー室"), 4, 9, 17),
    (("ice core store", "氷床庫"), 4, 7, 19),
    (("server room", "サーバー室"), 5, 9, 18),
    (("vault", "金庫室"), 5, 10, 16),
)

# (name, class of the record)
RECORD_CLASSES: Final[dict[str, Name]] = {
    "public": ("public", "公開"),
    "internal": ("internal", "内部"),
    "personal": ("personal", "個人"),
}
RECORDS: Final[tuple[tuple[Name, str], ...]] = (
    (("weather table", "気象表"), "public"),
    (("station map", "基地の地図"), "public"),
    (("annual report", "年次報告"), "public"),
    (("bus timetable", "バス時刻表"), "public"),
    (("draft paper", "論文の下書き"), "internal"),
    (("repair log", "修理記録"), "internal"),
    (("budget plan", "予算計画"), "internal"),
    (("door code list", "扉の暗証表"), "internal"),
    (("pay slip", "給与明細"), "personal"),
    (("health record", "健康記録"), "personal"),
    (("home address", "自宅の住所"), "personal"),
    (("phone number", "電話番号"), "personal"),
)
# (name, whether the receiver belongs to the station)
RECEIVERS: Final[tuple[tuple[Name, bool], ...]] = (
    (("a technician", "技術員"), True),
    (("the director", "所長"), True),
    (("our scientist", "当基地の研究員"), True),
    (("the night guard", "夜警"), True),
    (("the station cook", "基地の料理人"), True),
    (("a journalist", "記者"), False),
    (("a visitor", "訪問者"), False),
    (("a supplier", "業者"), False),
    (("another institute", "他の研究所"), False),
    (("a tourist", "旅行者"), False),
)
SIDES: Final[dict[bool, Name]] = {True: ("colleague", "同僚"), False: ("outsider", "外部")}
MEDIA: Final[tuple[Name, ...]] = (
    ("by mail", "メールで"),
    ("on paper", "紙で"),
    ("by phone", "電話で"),
    ("in a meeting", "会議で"),
)

PLACES: Final[tuple[Name, ...]] = (
    ("the coast", "海岸"),
    ("the glacier", "氷河"),
    ("the airfield", "飛行場"),
    ("the north camp", "北キャンプ"),
    ("the harbour", "港"),
    ("the summit", "山頂"),
)
WEATHERS: Final[tuple[Name, ...]] = (("calm", "晴れ"), ("cloudy", "曇り"), ("windy", "強風"))
STORM: Final[Name] = ("stormy", "嵐")

# family -> (English patterns, Japanese patterns)
PROMPTS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "purchase": (
        (
            "Can I buy {n} {item} at {price} credits each? The budget is {budget} credits.",
            "I would like {n} {item}. One costs {price} credits and my budget is {budget} credits.",
            "Please order {n} {item} for {price} credits apiece. We have {budget} credits.",
        ),
        (
            "{item}を1つ{price}クレジットで{n}個買えますか。予算は{budget}クレジットです。",
            "予算{budget}クレジットで、{price}クレジットの{item}を{n}個注文したいです。",
            "{item}が{n}個必要です。単価は{price}クレジット、予算は{budget}クレジットです。",
        ),
    ),
    "mixing": (
        (
            "How much {cleaner} do I need for {n} litres of water at {dose} ml per litre?",
            "I want to clean with {n} litres of water and {cleaner}, {dose} ml for each litre.",
        ),
        (
            "水{n}リットルに{cleaner}を1リットルあたり{dose}ml入れると、何mlですか。",
            "{cleaner}を使います。水は{n}リットル、濃さは1リットルにつき{dose}mlです。",
        ),
    ),
    "mixing_additive": (
        (
            "May I mix {cleaner} with {additive}? I use {n} litres of water and {dose} ml per "
            "litre.",
            "I want to add {additive} to {cleaner}: {n} litres of water, {dose} ml for each litre.",
        ),
        (
            "{cleaner}と{additive}を混ぜてもいいですか。水{n}リットル、1リットルあたり{dose}mlです。",
            "{cleaner}に{additive}を加えたいです。水は{n}リットル、1リットルにつき{dose}mlです。",
        ),
    ),
    "access": (
        (
            "May a {role} enter the {room} at {hour}:{minute}?",
            "I am a {role}. Can I go into the {room} at {hour}:{minute}?",
            "It is {hour}:{minute} and a {role} asks for the key to the {room}.",
        ),
        (
            "{role}は{hour}:{minute}に{room}に入れますか。",
            "私は{role}です。{hour}:{minute}に{room}を使えますか。",
            "今は{hour}:{minute}です。{role}が{room}の鍵を求めています。",
        ),
    ),
    "sharing": (
        (
            "May I give the {record} to {receiver} {medium}?",
            "Can the {record} be shared {medium} with {receiver}?",
            "{receiver_start} asks for the {record} {medium}. What should I do?",
        ),
        (
            "{record}を{receiver}に{medium}渡してもいいですか。",
            "{medium}{receiver}に{record}を共有できますか。",
            "{receiver}が{medium}{record}を求めています。どうすればいいですか。",
        ),
    ),
    "travel": (
        (
            "How long is the trip to {place}? It is {distance} km at {speed} km/h and the sky is "
            "{weather}.",
            "We drive {distance} km to {place} at {speed} km/h in {weather} weather. Is that fine?",
            "The weather is {weather}. "
            "May I drive to {place}, {distance} km away, at {speed} km/h?",
        ),
        (
            "{place}まで{distance}kmを時速{speed}kmで行きます。天気は{weather}です。何時間かかりますか。",
            "天気は{weather}です。時速{speed}kmで{distance}km先の{place}へ行けますか。",
            "{place}へ車で行きたいです。距離{distance}km、時速{speed}km、天気は{weather}です。",
        ),
    ),
    "leave": (
        (
            "I have {have} days of leave. Can I take {ask} days?",
            "May I be away for {ask} days? My leave account shows {have} days.",
            "Please book {ask} days off for me. I still have {have} days.",
        ),
        (
            "休暇が{have}日あります。{ask}日休めますか。",
            "{ask}日の休暇を取りたいです。残りは{have}日です。",
            "残りの休暇は{have}日です。{ask}日の休みをお願いします。",
        ),
    ),
}
