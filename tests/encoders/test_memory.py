"""Peak memory of a fresh process does not grow with the rows: not of training on a prepared folder, not of preparing
one from any of the published logs. Each is measured at two sizes of the same users and items.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from encoders.data import kuairand, taobao
from encoders.data.sorting import Records, Sorter, records
from encoders.data.store import Item, Profile, Store, prepare
from encoders.metrics import I8
from tests.conftest import ROOT
from tests.encoders.small import OPTIONS

_PEAK = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))  # kB
"""


def _peak(script: str, *arguments: object) -> int:
    """Bytes of a fresh process that runs the script, at their highest."""
    command = [sys.executable, "-c", script + _PEAK, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return int(done.stdout.split()[-1]) * 1024


# Training -------------------------------------------------------------------------------------------------------------

USERS, ITEMS, BEHAVIOURS = 2_000, 3_000, 40_000
SPAN = 40 * 86_400_000  # ms
EXAMPLE_BYTES = 4 + 4 + 1 + 8  # columns of an example on disk
_FIT = """
import json, sys
from pathlib import Path
import torch
from encoders.data.prepared import open_prepared
from encoders.train import TrainOptions, fit
torch.set_num_threads(1)
fitted = fit(open_prepared(Path(sys.argv[1])), TrainOptions.from_json(json.loads(sys.argv[2])))
assert fitted.curve[0]["gauc"] > 0
"""


def _fill(store: Store, examples: int) -> None:
    """Requests of 30 impressions within a minute each, made a part at a time."""
    random = np.random.default_rng(5)

    def drawn(count: int, together: int) -> Records:
        user, begin = random.integers(0, USERS, count // together), random.integers(0, SPAN, count // together)
        time = np.repeat(begin, together) + random.integers(0, 60_000, count)
        return records(np.repeat(user, together), random.integers(0, ITEMS, count), time, random.random(count) < 0.3)

    def sorted_of(name: str, count: int, together: int) -> Sorter:
        sorter = store.sorter(name, USERS, count)
        for _ in range(0, count, 30_000):
            sorter.add(drawn(30_000, together))
        return sorter

    with sorted_of("behaviours", BEHAVIOURS, 1) as behaviours, sorted_of("examples", examples, 30) as shown:
        store.behaviours(behaviours.parts(), ITEMS)
        store.examples(shown.parts(), ITEMS)
    store.users((Profile(f"u{k}", {"segment": f"s{k % 7}"}) for k in range(USERS)), {"segment": pl.String})
    items = (Item(f"i{k}", {"kind": f"k{k % 9}"}, [f"kind:{k % 9}"], {}, {f"kind {k % 9}": 1.0}) for k in range(ITEMS))
    store.items(items, {"kind": pl.String}, {})
    store.finish("drawn", "drawn", ("view", "click"))


@pytest.mark.slow
def test_training_needs_no_more_than_the_columns_it_maps(tmp_path: Path) -> None:
    """Six times the examples, one epoch. A process' peak counts the pages of memory maps that it has read, which the
    system takes back when it needs them: 17 bytes per example. Beside these a training may take half as much again:
    32 bytes per request, and the scores of the validation slice.
    """
    options = json.dumps(dataclasses.replace(OPTIONS, epochs=1, batch_groups=512).to_json())
    peaks, counts = [], []
    for count in (300_000, 1_800_000):
        folder = tmp_path / str(count)
        prepare(lambda _, store, count=count: _fill(store, count), tmp_path, folder)  # type: ignore[misc]
        peaks.append(_peak(_FIT, folder, options))
        counts.append(json.loads((folder / "meta.json").read_text())["counts"]["examples"])
    assert counts == [300_000, 1_800_000]
    assert peaks[1] - peaks[0] < 1.5 * EXAMPLE_BYTES * (counts[1] - counts[0]), peaks


# Preparing ------------------------------------------------------------------------------------------------------------

_PREPARE = """
import sys
from encoders.__main__ import main
from encoders.data import amazon, files, store
whole = files._pieces  # buffers that the smaller input fills too
files._pieces = lambda path, _: whole(path, 1 << 18)
amazon._ROWS, store._ROW_GROUP, store.prepare.__defaults__ = 4_096, 20_000, (5_000,)
assert main(["data", "prepare", "--format", sys.argv[1], "--input", sys.argv[2], "--out", sys.argv[3]]) == 0
"""
RECORD_BYTES = 17  # of a behaviour or an example, held in memory
PEOPLE, GOODS = 60, 90


def _drawn(rows: int, start: int, end: int) -> tuple[list[int], list[int], list[int], np.random.Generator]:
    """Users, items and times of a log."""
    random = np.random.default_rng(1)
    columns: list[I8] = [random.integers(0, PEOPLE, rows), random.integers(0, GOODS, rows)]
    return columns[0].tolist(), columns[1].tolist(), random.integers(start, end, rows).tolist(), random


def _write(path: Path, header: str, rows: list[str]) -> None:
    path.write_text("\n".join([*([header] if header else []), *rows]) + "\n", encoding="utf-8")


def many_ads(folder: Path, rows: int) -> None:
    """Half of the rows are impressions, half are behaviours."""
    user, ad, time, random = _drawn(rows, *taobao.AD_DAYS)
    clicked, action = random.integers(0, 2, rows).tolist(), random.choice(taobao.AD_ACTIONS[:4], rows).tolist()
    log = list(zip(user, ad, time, clicked, action, strict=True))
    shown = [f"{u},{t},{a},430548_1007,{1 - c},{c}" for u, a, t, c, _ in log[: rows // 2]]
    _write(folder / "raw_sample.csv", "user,time_stamp,adgroup_id,pid,nonclk,clk", shown)
    met = [f"{u},{t},{b},{a % 7},{a % 5}" for u, a, t, _, b in log[rows // 2 :]]
    _write(folder / "behavior_log.csv", "user,time_stamp,btag,cate,brand", met)
    ads = [f"{a},{a % 7},{a % 11},{a % 13},{a % 5},{a}.5" for a in range(GOODS)]
    _write(folder / "ad_feature.csv", "adgroup_id,cate_id,campaign_id,customer,brand,price", ads)
    people = [f"{u},0,5,2,5,,3,0,3" for u in range(PEOPLE)]
    _write(folder / "user_profile.csv", ",".join(["userid", *taobao._PROFILE]) + " ", people)


def many_behaviours(folder: Path, rows: int) -> None:
    user, item, time, _ = _drawn(rows, taobao.DAYS[0], taobao.DAYS[0] + 20_000)
    lines = [f"{u},{i},{i % 7},pv,{t}" for u, i, t in zip(user, item, time, strict=True)]
    _write(folder / "UserBehavior.csv", "", lines)


def many_videos(folder: Path, rows: int) -> None:
    user, video, time, random = _drawn(rows, 1_650_000_000_000, 1_652_000_000_000)
    clicked = random.integers(0, 2, rows).tolist()
    lines = [
        f"{u},{v},20220421,400,{t},{c},0,0,0,0,0,{c}" for u, v, t, c in zip(user, video, time, clicked, strict=True)
    ]
    names = "is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view"
    _write(folder / "log_standard_1k.csv", f"user_id,video_id,date,hourmin,time_ms,{names}", lines)
    people = [",".join([str(u), *["1"] * len(kuairand._PROFILE)]) for u in range(PEOPLE)]
    _write(folder / "user_features_1k.csv", ",".join(["user_id", *kuairand._PROFILE]), people)
    videos = [f"{v},{v % 9},NORMAL,2022-04-01,Web,1,1000,720,1280,7,4,{v % 5}" for v in range(GOODS)]
    header = (
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
        "music_id,music_type,tag"
    )
    _write(folder / "video_features_basic_1k.csv", header, videos)


def many_reviews(folder: Path, rows: int) -> None:
    user, item, time, random = _drawn(rows, 1_200_000_000, 1_300_000_000)
    stars = random.integers(1, 6, rows).tolist()
    lines = [
        f'{{"reviewerID": "u{u}", "asin": "B{i}", "overall": {s}.0, "unixReviewTime": {t}, "reviewText": "fine"}}'
        for u, i, t, s in zip(user, item, time, stars, strict=True)
    ]
    _write(folder / "reviews_Toys.json", "", lines)
    goods = [f'{{"asin": "B{i}", "title": "toy {i}", "category": ["Toys", "c{i % 7}"]}}' for i in range(GOODS)]
    _write(folder / "meta_Toys.json", "", goods)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "make"),
    [
        ("taobao-ad", many_ads),
        ("taobao-user-behavior", many_behaviours),
        ("kuairand", many_videos),
        ("amazon", many_reviews),
    ],
)
def test_preparing_holds_no_log(tmp_path: Path, form: str, make: Callable[[Path, int], None]) -> None:
    """Six times the rows. The peak grows by less than half of what the rows take, in the file or as records."""
    peaks, held = [], []
    for rows in (100_000, 600_000):
        source, out = tmp_path / f"source{rows}", tmp_path / f"out{rows}"
        source.mkdir()
        make(source, rows)
        peaks.append(_peak(_PREPARE, form, source, out))
        counts = json.loads((out / "meta.json").read_text())["counts"]
        records_ = counts["behaviours"] + counts["examples"]
        held.append(sum(path.stat().st_size for path in source.iterdir()) + RECORD_BYTES * records_)
        assert records_ >= rows // 2
    assert peaks[1] - peaks[0] < (held[1] - held[0]) / 2, (peaks, held)
