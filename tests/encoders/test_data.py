"""Every form gives the same Dataset; bad rows are named. All rows here are made up."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from encoders.data import movielens, text
from encoders.data.dataset import DataError, Dataset
from encoders.data.source import open_dataset

# Three made-up films, two made-up people. Ties: the two ratings at second 1000 keep the order of the file.
RATINGS = [("7", "11", "4", "2000"), ("9", "12", "3", "1000"), ("7", "13", "5", "1000"), ("9", "11", "1", "3000")]


def form_typed(folder: Path) -> None:
    _write(
        folder / "films.inter",
        ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *map("\t".join, RATINGS)],
    )
    _write(
        folder / "films.item",
        [
            "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
            "11\tThe Blue Kettle\t1971\tDrama War",
            "12\tÀ Bicycle, Twice\t1988\tComedy",
            "13\tNameless\t\t",
        ],
    )
    _write(
        folder / "films.user",
        [
            "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
            "7\t31\tF\tbaker\t45678",
            "9\t64\tM\tpilot\tT8X9",
        ],
    )


def form_100k(folder: Path) -> None:
    _write(folder / "u.data", map("\t".join, RATINGS))
    flags = {"Comedy": 5, "Drama": 8, "War": 17}

    def movie(place: str, title: str, *genres: str) -> str:
        marks = ["1" if k in {flags[genre] for genre in genres} else "0" for k in range(19)]
        return "|".join([place, title, "01-Jan-1970", "", "http://example.invalid/", *marks])

    movies = [
        movie("11", "The Blue Kettle (1971)", "Drama", "War"),
        movie("12", "À Bicycle, Twice (1988)", "Comedy"),
        movie("13", "Nameless"),
    ]
    _write(folder / "u.item", movies, "latin-1")
    _write(folder / "u.user", ["7|31|F|baker|45678", "9|64|M|pilot|T8X9"])


def form_1m(folder: Path) -> None:
    _write(folder / "ratings.dat", map("::".join, RATINGS))
    movies = ["11::The Blue Kettle (1971)::Drama|War", "12::À Bicycle, Twice (1988)::Comedy", "13::Nameless::"]
    _write(folder / "movies.dat", movies, "latin-1")
    _write(folder / "users.dat", ["7::F::31::baker::45678", "9::M::64::pilot::T8X9"])


def form_csv(folder: Path) -> None:
    _write(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *map(",".join, RATINGS)])
    movies = [
        "movieId,title,genres",
        "11,The Blue Kettle (1971),Drama|War",
        '12,"À Bicycle, Twice (1988)",Comedy',
        "13,Nameless,(no genres listed)",
    ]
    _write(folder / "movies.csv", movies)


FORMS = {"typed": form_typed, "100k": form_100k, "1m": form_1m, "csv": form_csv}


def _write(path: Path, lines: object, encoding: str = "utf-8") -> None:
    path.write_text("\n".join(lines) + "\n", encoding=encoding)  # type: ignore[arg-type, call-overload]


@pytest.fixture(params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    FORMS[request.param](tmp_path)
    return tmp_path


def test_every_form_reads_the_same(folder: Path) -> None:
    data = movielens.read(folder)
    ids = [data.profiles.ids[k] for k in data.log.user]
    assert list(zip(ids, [data.items.ids[k] for k in data.log.item], strict=True)) == [
        ("7", "13"), ("7", "11"), ("9", "12"), ("9", "11"),
    ]  # fmt: skip
    assert data.log.time.tolist() == [1_000_000, 2_000_000, 1_000_000, 3_000_000]
    assert data.examples.clicked.tolist() == [True, True, False, False]
    assert [data.actions[k] for k in data.log.action] == ["click", "click", "rate", "rate"]
    items = data.items
    assert items.ids == ["11", "12", "13"]
    assert items.features[0] == {
        "movie": "11", "title": ["the", "blue", "kettle"], "genres": ["Drama", "War"], "year": 1971,
    }  # fmt: skip
    assert items.attributes[1] == {"title": "À Bicycle, Twice", "genres": "Comedy", "year": 1988}
    assert items.features[2] == {"movie": "13", "title": ["nameless"], "genres": []}
    assert items.crosses == [["genre:Drama", "genre:War"], ["genre:Comedy"], []]
    profiles = dict(zip(data.profiles.ids, data.profiles.features, strict=True))
    if (folder / "ratings.csv").exists():
        assert profiles == {"7": {}, "9": {}}
    else:
        assert profiles["9"] == {"age": 64.0, "gender": "M", "occupation": "pilot", "zip_code": "T"}
        assert profiles["7"] == {"age": 31.0, "gender": "F", "occupation": "baker", "zip_code": "4"}


def _break(file: str, line: int, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        encoding = "latin-1" if file in ("u.item", "movies.dat") else "utf-8"
        lines = (folder / file).read_text(encoding).split("\n")
        lines[line - 1] = change(lines[line - 1])
        (folder / file).write_text("\n".join(lines), encoding)

    return apply


BREAKS: list[tuple[str, Callable[[Path], None], str]] = [
    ("typed", _break("films.inter", 3, lambda s: s + "\t1"), r"films.inter:3: 5 fields, 4 are needed"),
    ("typed", _break("films.inter", 1, lambda s: "user_id"), r"films.inter:1: the first line must name"),
    ("typed", _break("films.inter", 1, lambda s: s.replace("rating", "stars")), r"films.inter:1: no column rating"),
    ("typed", _break("films.inter", 2, lambda s: s.replace("11", "99")), r"films.inter:2: movie '99' is not among"),
    ("typed", _break("films.inter", 2, lambda s: s.replace("7", "8")), r"films.inter:2: user '8' is not among"),
    ("typed", _break("films.inter", 4, lambda s: s.replace("5", "five")), r"films.inter:4: rating 'five' is not a num"),
    ("typed", _break("films.inter", 4, lambda s: s.replace("1000", "nan")), r"films.inter:4: timestamp 'nan' is out"),
    ("typed", _break("films.item", 4, lambda s: s.replace("13", "12")), r"films.item:4: the id '12' stands twice"),
    ("typed", _break("films.item", 4, lambda s: s.replace("13", "")), r"films.item:4: the id is empty"),
    ("typed", _break("films.user", 2, lambda s: s.replace("31", "young")), r"films.user:2: age 'young' is not a num"),
    ("typed", lambda folder: (folder / "films.item").unlink(), r"films.item cannot be read"),
    ("typed", lambda folder: (folder / "films.item").write_bytes(b"a:token\n\xff\xff\n"), r"films.item cannot be read"),
    ("typed", lambda folder: (folder / "more.inter").write_text(""), "several data sets"),
    ("100k", _break("u.data", 2, lambda s: s.replace("\t", " ")), r"u.data:2: 1 fields, 4 are needed"),
    ("100k", _break("u.item", 1, lambda s: s + "|1"), r"u.item:1: 25 fields, 24 are needed"),
    ("1m", _break("movies.dat", 2, lambda s: s.replace("::", ":")), r"movies.dat:2: 1 fields, 3 are needed"),
    ("1m", _break("ratings.dat", 4, lambda s: s.replace("3000", "late")), r"ratings.dat:4: timestamp 'late'"),
    ("csv", _break("ratings.csv", 1, lambda s: "a,b,c,d"), r"ratings.csv:1: the first line must be userId,movieId"),
    ("csv", _break("ratings.csv", 3, lambda s: s + ",9"), r"ratings.csv:3: 5 fields, 4 are needed"),
    ("csv", _break("movies.csv", 3, lambda s: s.replace('"', "", 1)), r"movies.csv"),
    ("csv", lambda folder: (folder / "ratings.csv").unlink(), "holds neither"),
    ("csv", lambda folder: (folder / "movies.csv").unlink(), "movies.csv cannot be read"),
]


@pytest.mark.parametrize(("form", "damage", "message"), BREAKS)
def test_bad_rows_are_named(tmp_path: Path, form: str, damage: Callable[[Path], None], message: str) -> None:
    FORMS[form](tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        movielens.read(tmp_path)


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    form_csv(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(movielens.read(tmp_path).log) == 4


def test_ratings_may_be_empty(tmp_path: Path) -> None:
    form_csv(tmp_path)
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n")
    data = movielens.read(tmp_path)
    assert len(data.log) == 0
    assert data.end == 0
    assert [update["item_id"] for update in data.item_updates()] == ["11", "12", "13"]


def test_events_have_the_form_of_the_topics(folder: Path) -> None:
    data = movielens.read(folder)
    update = next(data.item_updates())
    assert set(update) == {"item_id", "version", "event_time", "crosses", "features", "embedding", "attributes"}
    assert update["version"] == 1
    assert len(update["embedding"]) == 128
    behaviours = list(data.behaviours())
    assert behaviours[0] == {
        "event_id": f"{data.name}-0", "user_id": "7", "item_id": "13", "action": "click",
        "event_time": "1970-01-01T00:16:40.000Z",
    }  # fmt: skip
    assert len({behaviour["event_id"] for behaviour in behaviours}) == 4
    assert list(data.behaviours()) == behaviours  # ids follow from the data
    users = list(data.users())
    assert {user["user_id"] for user in users} == {"7", "9"}
    assert all(user["event_time"] == "1970-01-01T00:16:40.000Z" for user in users)


def check_events(data: Dataset) -> None:
    """What holds for the events of every data set, and that they are the data that training sees."""
    alive: dict[str, dict[str, object]] = {}
    times = []
    for update in data.item_updates():
        json.dumps(update, allow_nan=False)
        times.append(datetime.datetime.fromisoformat(update["event_time"]))
        if update.get("deleted"):
            assert update["version"] == alive[update["item_id"]]["version"] + 1  # type: ignore[operator]
        else:
            assert update["item_id"] not in alive
            place = data.items.ids.index(update["item_id"])
            np.testing.assert_array_equal(np.array(update["embedding"], dtype="f4"), data.items.embeddings[place])
        alive[update["item_id"]] = update
    assert times == sorted(times)
    norm = np.linalg.norm(data.items.embeddings, axis=1)
    np.testing.assert_allclose(norm, 1, atol=1e-3)
    stamps = [datetime.datetime.fromisoformat(event["event_time"]).timestamp() * 1000 for event in data.behaviours()]
    assert stamps == sorted(data.log.time.tolist())
    assert stamps == sorted(stamps)


def test_real_data(ml100k: Path) -> None:
    data = open_dataset(str(ml100k))
    assert (len(data.items.ids), len(data.profiles.ids), len(data.log)) == (1_682, 943, 100_000)
    assert (np.diff(data.log.user) >= 0).all()
    assert max(len(crosses) for crosses in data.items.crosses) > 1
    check_events(data)


def test_text_embeddings() -> None:
    one, other, far = text.embed([{"red": 1.0, "shoe": 1.0}, {"red": 1.0, "boot": 1.0}, {"novel": 1.0}], 64)
    assert abs(one @ other - 0.5) < 0.25
    assert abs(one @ far) < 0.4
    np.testing.assert_array_equal(text.embed([{"red": 1.0, "shoe": 1.0}], 64)[0], one)
    assert np.isfinite(text.embed([{}], 8)).all()
    assert text.words("À Bicycle, Twice!") == ["à", "bicycle", "twice"]


def test_unknown_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        open_dataset(str(tmp_path / "none"))
    with pytest.raises(DataError, match="holds neither"):
        open_dataset(str(tmp_path))
