"""Every published format -> a prepared folder -> the Dataset it means. All rows here are made up."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders.data import amazon, files, kuairand, taobao
from encoders.data.dataset import NEVER, DataError, Dataset
from encoders.data.places import Collected, places
from encoders.data.prepared import open_prepared
from encoders.data.store import Store, prepare, price_band

AD = 1_494_000_000  # within the days of Ad Display, s
UB = 1_511_600_000  # within those of UserBehavior, s
KR = 1_650_000_000_000  # ms


def _write(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def form_ads(folder: Path) -> None:
    _write(
        folder / "raw_sample.csv",
        "user,time_stamp,adgroup_id,pid,nonclk,clk",
        f"7,{AD + 50},11,430548_1007,0,1",
        f"7,{AD + 10},12,430548_1007,1,0",
        f"3,{AD + 20},11,430539_1007,1,0",
        f"3,{AD + 30},99,430539_1007,1,0",  # an ad without features
        f"3,{AD - 10_000_000},11,430539_1007,1,0",  # another month
    )
    _write(
        folder / "ad_feature.csv",
        "adgroup_id,cate_id,campaign_id,customer,brand,price",
        "12,6406,83237,1,95471,170.0",
        "11,6406,83238,2,NULL,0.5",
    )
    _write(
        folder / "user_profile.csv",
        "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,occupation,"
        "new_user_class_level ",
        "7,0,5,2,5,,3,0,3",
    )
    _write(
        folder / "behavior_log.csv",
        "user,time_stamp,btag,cate,brand",
        f"7,{AD},pv,6406,95471",
        f"3,{AD + 5},buy,6406,",
        f"7,{AD + 5},cart,6406,95471",
        f"7,{AD + 6},hover,6406,95471",
        "7,-1,pv,6406,95471",
    )


def form_behaviours(folder: Path) -> None:
    hour = UB // 3600 * 3600
    _write(
        folder / "UserBehavior.csv",
        f"2,100,9,pv,{hour + 10}",
        f"1,101,9,pv,{hour + 20}",
        f"1,102,8,fav,{hour + 30}",
        f"1,102,8,pv,{hour + 3_600}",
        f"1,102,8,pv,{hour + 3_600}",  # twice
        f"2,101,7,buy,{hour + 3_700}",  # another category than the item's first
        f"2,103,7,pv,{hour + 7_300}",
        f"2,103,7,pv,{hour - 10_000_000}",
        f"2,103,7,look,{hour}",
    )


LOG = "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view"
SIGNS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view")


def _shown(user: int, video: int, time: int, *signs: str) -> str:
    return ",".join(map(str, [user, video, 20220421, 400, time, *(int(sign in signs) for sign in SIGNS)]))


def form_kuairand(folder: Path) -> None:
    data = folder / "data"
    data.mkdir()
    first = [LOG, _shown(1, 20, KR + 5, "is_click"), _shown(0, 20, KR + 1), _shown(0, 10, KR, "is_click", "is_like")]
    second = [LOG, _shown(0, 30, KR + 9, "is_hate"), _shown(0, 30, KR + 9, "is_hate"), _shown(1, 77, KR + 9)]
    _write(data / "log_standard_4_08_to_4_21_1k.csv", *first)
    _write(data / "log_standard_4_22_to_5_08_1k.csv", *second, _shown(1, 10, 7))
    profile = ["high_active", "0", "0", "1", '"(0,10]"', '"[1,10)"', "0", "730+", *map(str, range(18))]
    _write(data / "user_features_1k.csv", ",".join(["user_id", *kuairand._PROFILE]), ",".join(["1", *profile]))
    _write(
        data / "video_features_basic_1k.csv",
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
        "music_id,music_type,tag",
        '30,5,NORMAL,2022-04-01,ShortImport,1,17200.0,720,1280,99,4,"12,65"',
        "10,6,AD,2022-05-01,Web,1,,720,1280,,,3",
        "20,5,NORMAL,,Web,1,1000,720,1280,7,4,",
    )


def _objects(path: Path, rows: list[dict[str, Any]], dumps: Callable[[Any], str] = json.dumps) -> None:
    text = "".join(dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


REVIEWS = [("u", "B1", 5.0, 1_300_000_000), ("v", "B2", 3.0, 1_300_000_100), ("u", "B2", 4.0, 1_200_000_000)]


def form_2018(folder: Path) -> None:
    rows = [
        {"reviewerID": user, "asin": item, "overall": stars, "unixReviewTime": time, "reviewText": "fine"}
        for user, item, stars, time in [*REVIEWS, REVIEWS[0], ("v", "B9", 1.0, 1_300_000_000), ("v", "B1", 1.0, 5)]
    ]
    _objects(folder / "Toys.json.gz", rows)
    metadata = [
        {
            "asin": "B2",
            "title": "A <b>Kite</b> &amp; String",
            "brand": "Aero",
            "category": ["Toys", "Kites"],
            "price": "$1,012.50",
        },
        {"asin": "B1", "title": "Ball", "brand": "", "category": [], "price": ".a-box-inner{background:#fff}"},
        {"asin": "B2", "title": "another row of it", "brand": "Aero", "category": [], "price": ""},
        {"asin": "B3", "title": "nobody reviewed it", "category": ["Toys"]},
    ]
    _objects(folder / "meta_Toys.json.gz", metadata)


def form_2014(folder: Path) -> None:
    rows = [
        {"reviewerID": user, "asin": item, "overall": stars, "unixReviewTime": time}
        for user, item, stars, time in REVIEWS
    ]
    _objects(folder / "reviews_Toys.json", rows)
    metadata = [
        {"asin": "B2", "title": "A Kite & String", "brand": "Aero", "categories": [["Toys", "Kites"]], "price": 1012.5},
        {"asin": "B1", "title": "Ball's", "categories": [[]], "related": {"also_bought": ["B2"]}},
    ]
    _objects(folder / "meta_Toys.json", metadata, repr)  # Python literals, single quotes


def form_2023(folder: Path) -> None:
    rows = [
        {"user_id": user, "asin": "X", "parent_asin": item, "rating": stars, "timestamp": 1000 * time}
        for user, item, stars, time in REVIEWS
    ]
    _objects(folder / "Toys.jsonl", rows)
    metadata = [
        {
            "parent_asin": "B2",
            "title": "A Kite & String",
            "store": "Aero",
            "categories": ["Toys", "Kites"],
            "price": 1012.5,
        },
        {"parent_asin": "B1", "title": "Ball", "store": None, "categories": [], "price": None, "main_category": "Toys"},
    ]
    _objects(folder / "meta_Toys.jsonl", metadata)


Read = Callable[[Path, Store], None]
FORMS: dict[str, tuple[Callable[[Path], None], Read]] = {
    "ads": (form_ads, taobao.prepare_ads),
    "behaviours": (form_behaviours, partial(taobao.prepare_behaviours, seed=3)),
    "kuairand": (form_kuairand, kuairand.prepare),
    "2014": (form_2014, amazon.prepare),
    "2018": (form_2018, amazon.prepare),
    "2023": (form_2023, amazon.prepare),
}


def _prepared(name: str, folder: Path) -> tuple[Dataset, Store]:
    """The form's rows, prepared and opened."""
    source = folder / "source"
    source.mkdir()
    FORMS[name][0](source)
    store = prepare(FORMS[name][1], source, folder / "out")
    return open_prepared(folder / "out"), store


def _log(data: Dataset) -> list[tuple[str, str, str, int]]:
    log = data.log
    columns = zip(log.user.tolist(), log.item.tolist(), log.action.tolist(), log.time.tolist(), strict=True)
    return [
        (data.profiles.ids[user], data.items.ids[item], data.actions[action], time)
        for user, item, action, time in columns
    ]


def _examples(data: Dataset) -> list[tuple[str, str, bool, int]]:
    rows = data.examples
    columns = zip(rows.user.tolist(), rows.item.tolist(), rows.clicked.tolist(), rows.time.tolist(), strict=True)
    return [(data.profiles.ids[user], data.items.ids[item], clicked, time) for user, item, clicked, time in columns]


def _ms(seconds: int) -> int:
    return seconds * 1000


def test_ad_display(tmp_path: Path) -> None:
    data, store = _prepared("ads", tmp_path)
    assert list(data.items.ids) == ["11", "12", "c6406b95471", "c6406b"]
    assert _examples(data) == [
        ("3", "11", False, _ms(AD + 20)), ("7", "12", False, _ms(AD + 10)), ("7", "11", True, _ms(AD + 50)),
    ]  # fmt: skip
    assert _log(data) == [
        ("3", "c6406b", "buy", _ms(AD + 5)),
        ("7", "c6406b95471", "pv", _ms(AD)),
        ("7", "c6406b95471", "cart", _ms(AD + 5)),
        ("7", "11", "click", _ms(AD + 50)),
    ]
    assert data.items.features[1] == {
        "item": "12", "category": "6406", "brand": "95471", "campaign": "83237", "customer": "1", "price_band": "7",
        "price": 170.0,
    }  # fmt: skip
    assert data.items.features[0].keys() >= {"price"}
    assert "brand" not in data.items.features[0]
    assert set(data.items.crosses[2]) == {"category:6406", "brand:95471", "category+brand:6406/95471"}
    assert set(data.items.crosses[2]) < set(data.items.crosses[1])  # so that the log speaks of the ads
    assert dict(zip(data.profiles.ids, data.profiles.features, strict=True)) == {
        "3": {},
        "7": {
            "cms_segid": "0", "cms_group_id": "5", "final_gender_code": "2", "age_level": "5", "shopping_level": "3",
            "occupation": "0", "new_user_class_level": "3",
        },
    }  # fmt: skip
    assert data.items.added.tolist() == [_ms(AD + 20), _ms(AD + 10), _ms(AD), _ms(AD + 5)]
    assert store.skipped == {
        "impression of an ad without features": 1,
        "impression: time outside the days that the data set covers": 1,
        "behaviour of an unknown type": 1,
        "behaviour: time outside the days that the data set covers": 1,
    }
    assert store.noted == {"users without a profile": 1}
    near = data.items.embeddings @ data.items.embeddings[1]
    assert near[2] > near[0] > 0.2  # category and brand tell more than the category alone


def test_user_behavior(tmp_path: Path) -> None:
    data, store = _prepared("behaviours", tmp_path)
    hour = UB // 3600 * 3600
    assert _log(data) == [
        ("1", "101", "pv", _ms(hour + 20)),
        ("1", "102", "fav", _ms(hour + 30)),
        ("1", "102", "pv", _ms(hour + 3_600)),
        ("2", "100", "pv", _ms(hour + 10)),
        ("2", "101", "buy", _ms(hour + 3_700)),
        ("2", "103", "pv", _ms(hour + 7_300)),
    ]
    assert store.skipped == {
        "behaviour of an unknown type": 1,
        "behaviour: time outside the days that the data set covers": 1,
        "row that stands twice": 1,
    }
    assert store.noted["rows with another category than the item's first"] == 1
    assert store.noted["clicks without a click in the hour before, which are no examples"] == 2
    assert data.items.features[1] == {"item": "101", "category": "9"}
    examples = _examples(data)
    assert [row for row in examples if row[2]] == [
        ("1", "102", True, _ms(hour + 3_600)),
        ("2", "103", True, _ms(hour + 7_300)),
    ]
    drawn = [row for row in examples if not row[2]]
    assert len(drawn) == 2 * taobao.NEGATIVES
    assert {row[1] for row in drawn if row[0] == "1"} <= {
        "100",
        "101",
    }  # clicked in the hour before; 102 was a favourite
    assert {row[1] for row in drawn if row[0] == "2"} == {"102"}


def _many(folder: Path, rows: int = 6_000) -> None:
    random = np.random.default_rng(1)
    user, item = random.integers(0, 60, rows), random.integers(0, 90, rows)
    time, kind = random.integers(taobao.DAYS[0], taobao.DAYS[0] + 20_000, rows), random.integers(0, 4, rows)
    lines = [
        f"{u},{i},{i % 7},{taobao.ACTIONS[k]},{t}" for u, i, k, t in zip(user, item, kind, time, strict=True)
    ]  # fmt: skip
    _write(folder / "UserBehavior.csv", *lines)


def test_sampling_looks_back_only_and_does_not_depend_on_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _many(tmp_path)
    read = partial(taobao.prepare_behaviours, seed=5)
    prepare(read, tmp_path, tmp_path / "whole")
    pieces = files._pieces
    monkeypatch.setattr(files, "_pieces", lambda path, _: pieces(path, 1_000))
    prepare(read, tmp_path, tmp_path / "parts", in_memory=500)
    one, other = open_prepared(tmp_path / "whole"), open_prepared(tmp_path / "parts")
    assert _log(one) == _log(other)
    assert _examples(one) == _examples(other)

    clicks = [(item, time // 3_600_000) for _, item, action, time in _log(one) if action == "pv"]
    negatives = [(item, time // 3_600_000) for _, item, clicked, time in _examples(one) if not clicked]
    shown = set(clicks)
    assert len(negatives) > 3 * len(_examples(one)) / 5
    assert all((item, hour - 1) in shown for item, hour in negatives)
    labels = one.examples.clicked
    first = np.flatnonzero(np.diff(one.examples.time, prepend=-1) != 0)
    assert 0.1 < labels[first].mean() < 0.35  # the positive stands anywhere among its negatives


def test_kuairand(tmp_path: Path) -> None:
    data, store = _prepared("kuairand", tmp_path)
    assert list(data.items.ids) == ["30", "10", "20"]
    assert _examples(data) == [
        ("0", "10", True, KR), ("0", "20", False, KR + 1), ("0", "30", False, KR + 9), ("1", "20", True, KR + 5),
    ]  # fmt: skip
    assert _log(data) == [("0", "10", "like", KR), ("0", "30", "hate", KR + 9), ("1", "20", "click", KR + 5)]
    assert data.items.features[0] == {
        "item": "30", "author": "5", "tags": ["12", "65"], "music": "99", "video_type": "NORMAL",
        "upload_type": "ShortImport", "music_type": "4", "seconds": 17.2,
    }  # fmt: skip
    assert data.items.crosses[0] == ["author:5", "tag:12", "tag:65", "tag+length:12/5"]
    assert data.items.features[2]["tags"] == []
    day = 1_648_742_400_000  # 2022-04-01 in Beijing
    assert data.items.added.tolist() == [day, KR, KR + 1]  # uploaded; shown before the upload's day; no day
    assert (data.items.removed == NEVER).all()
    profiles = dict(zip(data.profiles.ids, data.profiles.features, strict=True))
    assert profiles["0"] == {}
    assert profiles["1"]["follow_user_num_range"] == "(0,10]"
    assert profiles["1"]["onehot_feat17"] == "17"
    assert store.skipped == {
        "impression of a video without features": 1,
        "impression: time out of range": 1,
        "impression that stands twice": 1,
    }
    assert store.noted == {"users without a profile": 1}


@pytest.mark.parametrize("edition", ["2014", "2018", "2023"])
def test_amazon(tmp_path: Path, edition: str) -> None:
    data, store = _prepared(edition, tmp_path)
    assert list(data.items.ids) == ["B2", "B1"]
    expected = [("u", "B2", True, 1_200_000_000), ("u", "B1", True, 1_300_000_000), ("v", "B2", False, 1_300_000_100)]
    assert _examples(data) == [(user, item, clicked, _ms(time)) for user, item, clicked, time in expected]
    assert [(row[1], row[2]) for row in _log(data)] == [("B2", "click"), ("B1", "click"), ("B2", "rate")]
    assert data.items.features[0] == {
        "item": "B2", "title": ["a", "kite", "string"], "categories": ["Toys", "Kites"], "brand": "Aero",
        "price": 1012.5, "price_band": "9",
    }  # fmt: skip
    assert data.items.attributes[0] == {
        "title": "A Kite & String", "brand": "Aero", "categories": "Toys, Kites", "price": 1012.5,
    }  # fmt: skip
    assert data.items.crosses[0] == [
        "category:Kites", "brand:Aero", "category+brand:Kites/Aero", "price:9", "category+price:Kites/9",
    ]  # fmt: skip
    assert "price" not in data.items.features[1]
    assert data.items.added.tolist() == [_ms(1_200_000_000), _ms(1_300_000_000)]
    if edition == "2018":
        assert store.skipped == {
            "metadata of an item that came before": 1,
            "review of an item without metadata": 1,
            "review: time out of range": 1,
            "review that stands twice": 1,
        }
        assert store.noted == {
            "items without a review, which are left out": 1,
            "prices that are no number, taken as absent": 1,
        }
    else:
        assert not store.skipped


def _change(file: str, line: int, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = next(folder.rglob(file))
        lines = path.read_bytes().split(b"\n")
        lines[line - 1] = change(lines[line - 1])
        path.write_bytes(b"\n".join(lines))

    return apply


def _remove(file: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.rglob(file)).unlink()


def _empty(file: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.rglob(file)).write_bytes(b"")


BASIC, LOGGED = "video_features_basic_1k.csv", "log_standard_4_08_to_4_21_1k.csv"
BREAKS: list[tuple[str, Callable[[Path], None], str]] = [
    ("ads", _remove("ad_feature.csv"), r"holds no ad_feature.csv"),
    ("ads", _change("raw_sample.csv", 1, lambda s: s.replace(b"adgroup_id", b"ad")), r"csv:1: no column adgroup_id"),
    ("ads", _change("raw_sample.csv", 3, lambda s: s + b",1"), r"raw_sample.csv:3: 7 fields, 6 are needed"),
    ("ads", _change("raw_sample.csv", 3, lambda s: s[:-2]), r"raw_sample.csv:3: 5 fields, 6 are needed"),
    ("ads", _change("raw_sample.csv", 4, lambda s: s.replace(b"3,", b"x,", 1)), r"csv:4: user 'x' is not a whole"),
    ("ads", _change("raw_sample.csv", 2, lambda s: s[:-1] + b"2"), r"raw_sample.csv:2: clk 2 is neither 0 nor 1"),
    ("ads", _change("ad_feature.csv", 2, lambda s: s.replace(b"170.0", b"cheap")), r"csv:2: price 'cheap' is not a"),
    ("ads", _change("ad_feature.csv", 2, lambda s: s.replace(b"170.0", b"inf")), r"csv:2: price 'inf' is not a fin"),
    ("ads", _change("ad_feature.csv", 2, lambda s: s.replace(b"170.0", b"-1")), r"ad_feature.csv:2: price is negative"),
    ("ads", _change("ad_feature.csv", 2, lambda s: s.replace(b"6406", b"")), r"csv:2: column cate_id is empty"),
    ("ads", _change("ad_feature.csv", 3, lambda s: s.replace(b"11,", b"12,", 1)), r"line 3: the id 12 stands twice"),
    ("ads", _change("user_profile.csv", 2, lambda s: s + b"\n" + s), r"user_profile.csv: 1 user ids stand twice"),
    ("ads", _change("behavior_log.csv", 2, lambda s: s.replace(b"pv", b"\xff\xfe")), r"behavior_log.csv:2: not UTF-8"),
    ("ads", _empty("behavior_log.csv"), r"behavior_log.csv"),
    ("behaviours", _remove("UserBehavior.csv"), r"holds no UserBehavior.csv"),
    ("behaviours", _empty("UserBehavior.csv"), r"UserBehavior.csv holds no rows"),
    ("behaviours", _change("UserBehavior.csv", 5, lambda s: b"user,item,c,d,e"), r"csv:5: user 'user' is not a"),
    ("kuairand", _remove("user_features_1k.csv"), r"holds no user_features_\*.csv"),
    ("kuairand", _change(LOGGED, 2, lambda s: s[:-1] + b"7"), rf"{LOGGED}:2: long_view 7 is neither"),
    ("kuairand", _change(BASIC, 2, lambda s: s.replace(b'65"', b"65")), rf"{BASIC}:2:"),
    ("kuairand", _change(BASIC, 2, lambda s: s.replace(b"2022-04-01", b"spring")), rf"{BASIC}:2: upload_dt 'spring'"),
    ("kuairand", _change(BASIC, 3, lambda s: s.replace(b"10,", b"30,", 1)), rf"{BASIC}: 1 video ids stand twice"),
    ("kuairand", _change("user_features_1k.csv", 2, lambda s: s + b"\n" + s), r"csv: the user 1 stands twice"),
    ("2014", _remove("meta_Toys.json"), r"holds no meta_"),
    ("2014", _change("reviews_Toys.json", 2, lambda s: s[:-1]), r"reviews_Toys.json:2: not a JSON object"),
    ("2014", _change("reviews_Toys.json", 2, lambda s: b"[1]"), r"reviews_Toys.json:2: not a JSON object"),
    ("2014", _change("reviews_Toys.json", 2, lambda s: s.replace(b"asin", b"item")), r"reviews_Toys.json:2: no asin"),
    ("2014", _change("reviews_Toys.json", 3, lambda s: s.replace(b"4.0", b"9.0")), r"json:3: a rating of 9 stars"),
    ("2014", _change("reviews_Toys.json", 3, lambda s: s.replace(b"4.0", b'"good"')), r"overall 'good' is not a"),
    ("2023", _change("Toys.jsonl", 1, lambda s: s.replace(b'"u"', b"7")), r"Toys.jsonl:1: user_id 7 is not a text"),
    ("2018", lambda folder: (folder / "Toys.json.gz").write_bytes(b"\x1f\x8b\x08 no"), r"Toys.json.gz cannot be read"),
    ("2018", lambda folder: (folder / "More.json.gz").write_bytes(b""), r"must hold one file of reviews"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "damage", "message"), BREAKS)
def test_bad_input_is_named(tmp_path: Path, form: str, damage: Callable[[Path], None], message: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    FORMS[form][0](source)
    damage(source)
    with pytest.raises(DataError, match=message):
        prepare(FORMS[form][1], source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]  # nothing half done stays


@pytest.mark.parametrize("form", ["ads", "behaviours", "kuairand"])
def test_gzip_windows_lines_and_empty_lines(tmp_path: Path, form: str) -> None:
    plain, _ = _prepared(form, tmp_path)
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in (tmp_path / "source").rglob("*.csv"):
        text = path.read_bytes().replace(b"\n", b"\r\n").replace(b"\r\n", b"\r\n\r\n", 2)
        (packed / f"{path.name}.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.rstrip()))
    prepare(FORMS[form][1], packed, tmp_path / "again")
    again = open_prepared(tmp_path / "again")
    assert _log(again) == _log(plain)
    assert _examples(again) == _examples(plain)
    assert list(again.items.features) == list(plain.items.features)


def test_line_numbers_across_pieces(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    _write(path, "a,b", "1,2", "", '"3",4', "5,6", "7,8", "x,9")
    for piece in (1, 5, 9, 1_000):
        rows: list[tuple[int, int]] = []
        with pytest.raises(DataError, match=r"rows.csv:7: a 'x' is not a whole number"):
            _gather(path, piece, rows)
        assert rows == [(2, 1), (4, 3), (5, 5), (6, 7)][: len(rows)]
        assert len(rows) == 4 or piece > 5


def _gather(path: Path, piece: int, rows: list[tuple[int, int]]) -> None:
    for part in files.csv_parts(path, {"a": files.Column("whole")}, piece=piece):
        rows += zip(part.lines.tolist(), part.frame["a"].to_list(), strict=True)


def test_places() -> None:
    ids = Collected(1)
    ids.add(np.array([5, 3, 5]), np.array([50, 30, 51]))
    ids.add(np.array([3, 9]), np.array([31, 90]))
    known, values = ids.result()
    assert (known.tolist(), values.tolist(), ids.rows) == ([3, 5, 9], [30, 50, 90], 5)
    assert places(known, np.array([9, 4, 3, 100, -1])).tolist() == [2, -1, 0, -1, -1]


def test_price_bands() -> None:
    assert [price_band(price) for price in (0, 0.99, 1, 3, 170)] == ["0", "0", "1", "2", "7"]
