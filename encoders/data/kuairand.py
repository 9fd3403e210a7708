"""KuaiRand (1K, 27K or Pure: the columns are the same) in its published format -> a prepared folder.

Files and columns as in the README of github.com/chongminggao/KuaiRand (Gao et al., CIKM 2022); the files lie in the
folder or in its `data`:

| file | what is read |
|---|---|
| log_standard_*.csv (all parts) | user_id, video_id, time_ms, long_view, is_{click,like,follow,comment,forward,hate} |
| user_features_*.csv | user_id, degree of activity, what the user is, the published ranges and one-hot features |
| video_features_basic_*.csv | video_id, author_id, upload_dt, video_duration (ms), music_id, tag ("12,65"), types |

Every impression of the standard log is an example, its label `is_click`. An impression with any signal is one
behaviour, its action the rarest signal, in the order of `ACTIONS`. Not read: log_random_* (videos shown by chance,
0.4 %), and video_features_statistic_*: those are averages over the whole month, the test days included, so they would
tell the future. User features are a snapshot of the data set's making; its date is not published.

A video is added at the day of its upload (Beijing), or when it is first shown if that is earlier or the day is not
known. There are no texts or pictures: embeddings are hashed words (tags, author, music, types, length, the video
itself), which stand in for multi-modal vectors. Memory: 8 bytes per user, 20 per video (id, row, first seen) and as
much again while ids are merged, and the table of users; logs and the table of videos are not held.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from encoders.data.dataset import DataError
from encoders.data.files import Column, Part, csv_parts, found, found_one
from encoders.data.places import Collected, places
from encoders.data.sorting import Records, distinct, records
from encoders.data.store import Item, Profile, Store

ACTIONS = ("click", "long_view", "like", "follow", "comment", "forward", "hate")  # a later one names the behaviour

_SIGNALS = ("is_click", "long_view", "is_like", "is_follow", "is_comment", "is_forward", "is_hate")
_TIMES = (946_684_800_000, 4_102_444_800_000)  # 2000 .. 2099, ms
_BEIJING = datetime.timezone(datetime.timedelta(hours=8))
_TAGS = 3  # of a video that become crosses

_WHOLE, _SOME_TEXT = Column("whole"), Column("text", required=False)
_LOG = dict.fromkeys(("user_id", "video_id", "time_ms", *_SIGNALS), _WHOLE)
_PROFILE = (
    "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author", "follow_user_num_range",
    "fans_user_num_range", "friend_user_num_range", "register_days_range", *(f"onehot_feat{k}" for k in range(18)),
)  # fmt: skip
_VIDEO = {
    "video_id": _WHOLE,
    **dict.fromkeys(
        ("author_id", "video_type", "upload_dt", "upload_type", "music_id", "music_type", "tag"), _SOME_TEXT
    ),
    "video_duration": Column("number", required=False),
}


def prepare(folder: Path, store: Store) -> None:
    """Raises DataError; counts impressions of unknown videos, impossible times and rows that stand twice as skipped."""
    logs, table = found(folder, "log_standard_*.csv"), found_one(folder, "user_features_*.csv")
    basic = found_one(folder, "video_features_basic_*.csv")
    users, videos, impressions = Collected(), Collected(), 0
    profiles = _profiles(table)
    users.add(profiles["user_id"].to_numpy())
    for part in csv_parts(basic, _VIDEO):
        videos.add(part.array("video_id"))
    for path in logs:
        for part in csv_parts(path, _LOG):
            users.add(part.array("user_id"))
            impressions += len(part.frame)
    (user_ids,), (video_ids,) = users.result(), videos.result()
    if len(video_ids) != videos.rows:
        raise DataError(f"{basic.name}: {videos.rows - len(video_ids)} video ids stand twice")
    store.note("users without a profile", len(user_ids) - len(profiles))
    order = _order(basic, video_ids)  # items are written in the order of the file
    with store.sorter("impressions", len(user_ids), impressions) as sorter:
        for path in logs:
            for part in csv_parts(path, _LOG):
                sorter.add(_impressions(part, user_ids, video_ids, order, store))

        def once(count: bool) -> Iterator[Records]:
            for ordered in sorter.parts():
                kept = distinct(ordered)
                if count:
                    store.skip("impression that stands twice", len(ordered) - len(kept))
                yield kept

        store.behaviours((_behaviours(part) for part in once(count=True)), len(video_ids))
        store.examples((_examples(part) for part in once(count=False)), len(video_ids))
    store.users(_users(profiles, user_ids), dict.fromkeys(_PROFILE, pl.String))
    text = dict.fromkeys(("item", "author", "video_type", "upload_type", "music", "music_type"), pl.String)
    store.items(
        _videos(basic, store),
        {**text, "tags": pl.List(pl.String), "seconds": pl.Float64},
        {"title": pl.String, "seconds": pl.Float64},
    )
    store.finish("kuairand", "kuairand", ACTIONS)


def _order(basic: Path, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Place among the ascending ids -> row of the file."""
    rows, at = np.empty(len(ids), dtype=np.int32), 0
    for part in csv_parts(basic, {"video_id": _WHOLE}):
        rows[places(ids, part.array("video_id"))] = np.arange(at, at + len(part.frame))
        at += len(part.frame)
    return rows


def _impressions(
    part: Part,
    users: npt.NDArray[np.int64],
    videos: npt.NDArray[np.int64],
    order: npt.NDArray[np.int32],
    store: Store,
) -> Records:
    """Records whose code has bit k set where the impression has signal k."""
    code = np.zeros(len(part.frame), dtype=np.uint8)
    for bit, name in enumerate(_SIGNALS):
        values = part.array(name)
        if ((values != 0) & (values != 1)).any():
            row = int(((values != 0) & (values != 1)).argmax())
            raise DataError(f"{part.where(row)}: {name} {values[row]} is neither 0 nor 1")
        code |= (values << bit).astype(np.uint8)
    time, video = part.array("time_ms"), places(videos, part.array("video_id"))
    inside = (time >= _TIMES[0]) & (time < _TIMES[1])
    store.skip("impression of a video without features", (video < 0).sum())
    store.skip("impression: time out of range", ((video >= 0) & ~inside).sum())
    rows = records(places(users, part.array("user_id")), order[video], time, code)
    return rows[(video >= 0) & inside]


def _behaviours(part: Records) -> Records:
    rows: Records = part[part["code"] != 0]
    rows["code"] = np.floor(np.log2(rows["code"])).astype(np.uint8)  # the highest bit
    return rows


def _examples(part: Records) -> Records:
    rows = part.copy()
    rows["code"] &= 1
    return rows


def _profiles(path: Path) -> pl.DataFrame:
    columns = {"user_id": _WHOLE, **dict.fromkeys(_PROFILE, _SOME_TEXT)}
    table = pl.concat(part.frame for part in csv_parts(path, columns)).sort("user_id", maintain_order=True)
    again = table["user_id"].is_duplicated()
    if again.any():
        raise DataError(f"{path.name}: the user {table['user_id'][int(again.arg_max() or 0)]} stands twice")
    return table


def _users(profiles: pl.DataFrame, ids: npt.NDArray[np.int64]) -> Iterator[Profile]:
    known = iter(profiles.iter_rows(named=True))
    row = next(known, None)
    for user in ids.tolist():
        if row is not None and row["user_id"] == user:
            yield Profile(str(user), {name: row[name] for name in _PROFILE})
            row = next(known, None)
        else:
            yield Profile(str(user), {})


def _videos(basic: Path, store: Store) -> Iterator[Item]:
    place = 0
    for part in csv_parts(basic, _VIDEO):
        for row, video in enumerate(part.frame.iter_rows(named=True)):
            yield _video(video, part.where(row), store.first_seen(place))
            place += 1


def _video(row: dict[str, Any], where: str, seen: int) -> Item:
    name, author, tags = str(row["video_id"]), row["author_id"], (row["tag"] or "").split(",")
    tags = [tag.strip() for tag in tags if tag.strip()]
    music = row["music_id"]
    kinds = {key: row[key] for key in ("video_type", "upload_type", "music_type")}
    features: dict[str, Any] = {"item": name, "author": author, "tags": tags, "music": music, **kinds}
    crosses = [f"author:{author}"] if author else []
    crosses += [f"tag:{tag}" for tag in tags[:_TAGS]]
    words = {f"video {name}": 0.4, **{f"tag {tag}": 1.0 for tag in tags}}
    words |= {f"{key} {value}": 0.2 for key, value in kinds.items() if value}
    attributes: dict[str, Any] = {"title": f"video {name}" + (f", tags {', '.join(tags)}" if tags else "")}
    if author:
        words[f"author {author}"] = 0.7
    if music:
        words[f"music {music}"] = 0.3
    if row["video_duration"] is not None and row["video_duration"] >= 0:
        seconds = row["video_duration"] / 1000
        features["seconds"] = attributes["seconds"] = seconds
        length = int(seconds + 1).bit_length()
        words[f"length {length}"] = 0.3
        crosses += [f"tag+length:{tag}/{length}" for tag in tags[:1]]
    return Item(name, features, crosses, attributes, words, added=_added(row["upload_dt"], where, seen))


def _added(day: str | None, where: str, seen: int) -> int | None:
    if day is None:
        return None
    try:
        start = datetime.datetime.fromisoformat(day).replace(tzinfo=_BEIJING)
    except ValueError:
        raise DataError(f"{where}: upload_dt {day!r} is not a date") from None
    return min(int(start.timestamp() * 1000), seen)
