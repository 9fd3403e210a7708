"""MovieLens in its published formats, and the tab-separated form with typed headers, found out from the folder's files.

| form | files |
|---|---|
| typed | `*.inter`, `*.item`, `*.user`: tab-separated, first line `name:type` |
| 100k | `u.data` (tabs), `u.item`, `u.user` (bars, Latin-1) |
| 1m, 10m | `ratings.dat`, `movies.dat`, `users.dat` (`::`, Latin-1); 10m has no users |
| csv | `ratings.csv`, `movies.csv` (20m, 25m, 32m, latest); no users |

A rating is an event with the action "click" from 4 stars on, else "rate"; the label is the same. Ratings are put into
time order; ties within a second keep the order of the file. A row that does not read is a DataError with file and line.
"""

from __future__ import annotations

import array
import csv
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from encoders.data import text
from encoders.data.dataset import NEVER, BehaviourLog, DataError, Dataset, Examples, Items, UserProfiles, by_user

ACTIONS = ("rate", "click")
CLICK_FROM = 4.0  # stars

_GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_TITLE_YEAR = re.compile(r"^(.*?)\s*\((\d{4})[^)]*\)\s*$")
_NO_GENRES = "(no genres listed)"

Row = list[str]
_Value = TypeVar("_Value")


@dataclasses.dataclass
class _Movie:
    title: str
    year: int | None
    genres: list[str]


@dataclasses.dataclass
class _Source:
    """What a form gives before it becomes columns; ids are as in the files."""

    movies: dict[str, _Movie]
    users: dict[str, dict[str, Any]]
    ratings: Iterator[tuple[str, str, str, str, str]]  # user, movie, stars, seconds, "file:line"


def read(folder: Path) -> Dataset:
    """Read the data set in `folder`, whichever form it has. Raises DataError."""
    name, source = _found(folder)
    return _dataset(name, source())


def check_form(folder: Path) -> None:
    """Raises DataError where `folder` has none of the forms; reads no row."""
    _found(folder)


def _found(folder: Path) -> tuple[str, Callable[[], _Source]]:
    """The data set's name, and what reads it."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    typed = sorted(folder.glob("*.inter"))
    if len(typed) > 1:
        raise DataError(f"{folder} holds several data sets: {', '.join(path.name for path in typed)}")
    if typed:
        return typed[0].stem, lambda: _typed(typed[0])
    for name, form in (("u.data", _form_100k), ("ratings.dat", _form_1m), ("ratings.csv", _form_csv)):
        if (folder / name).is_file():
            return folder.resolve().name, partial(form, folder)
    raise DataError(f"{folder} holds neither *.inter nor u.data nor ratings.dat nor ratings.csv")


def _dataset(name: str, source: _Source) -> Dataset:
    movie_ids, user_ids = list(source.movies), list(source.users)
    movie_places = {movie: place for place, movie in enumerate(movie_ids)}
    user_places = {user: place for place, user in enumerate(user_ids)}
    users, movies = array.array("i"), array.array("i")
    stars, times = array.array("d"), array.array("q")
    for user, movie, rating, seconds, where in source.ratings:
        if movie not in movie_places:
            raise DataError(f"{where}: movie {movie!r} is not among the movies")
        if user not in user_places:
            if source.users:
                raise DataError(f"{where}: user {user!r} is not among the users")
            user_places[user] = len(user_ids)
            user_ids.append(user)
        users.append(user_places[user])
        movies.append(movie_places[movie])
        stars.append(_number(rating, "rating", where))
        times.append(int(_number(seconds, "timestamp", where) * 1000))
    columns = np.array(users, dtype=np.int32), np.array(times, dtype=np.int64)
    order = by_user(*columns)
    by, item, time = columns[0][order], np.array(movies, dtype=np.int32)[order], columns[1][order]
    clicked = np.array(stars)[order] >= CLICK_FROM
    return Dataset(
        name=name,
        items=_items(source.movies, int(time.min()) if len(time) else 0),
        profiles=UserProfiles(user_ids, [source.users.get(user, {}) for user in user_ids]),
        log=BehaviourLog(by, item, clicked.astype(np.uint8), time),
        examples=Examples(by, item, clicked, time),
        actions=ACTIONS,
    )


def _items(movies: dict[str, _Movie], start: int) -> Items:
    features, attributes, texts = [], [], []
    for movie_id, movie in movies.items():
        title_words = text.words(movie.title)
        feature: dict[str, Any] = {"movie": movie_id, "title": title_words, "genres": movie.genres}
        attribute: dict[str, Any] = {"title": movie.title, "genres": ", ".join(movie.genres)}
        weights = {f"genre {genre}": 1.0 for genre in movie.genres}
        weights |= {f"title {word}": 0.3 for word in title_words}
        if movie.year is not None:
            feature["year"] = attribute["year"] = movie.year
            weights[f"decade {movie.year // 10}"] = 0.7
        features.append(feature)
        attributes.append(attribute)
        texts.append(weights)
    return Items(
        ids=list(movies),
        features=features,
        crosses=[[f"genre:{genre}" for genre in movie.genres] for movie in movies.values()],
        attributes=attributes,
        embeddings=text.embed(texts),
        added=np.full(len(movies), start, dtype=np.int64),
        removed=np.full(len(movies), NEVER, dtype=np.int64),
    )


# The forms ------------------------------------------------------------------------------------------------------------


def _typed(inter: Path) -> _Source:
    movies: dict[str, _Movie] = {}
    columns, rows = _typed_rows(inter.with_suffix(".item"))
    title_at = _column(columns, inter.with_suffix(".item"), "movie_title", "title")
    genres_at = _column(columns, inter.with_suffix(".item"), "class", "genres", "genre")
    year_at = columns.index("release_year") if "release_year" in columns else None
    id_at = _column(columns, inter.with_suffix(".item"), "item_id")
    for where, row in rows:
        year = _year(row[year_at]) if year_at is not None else None
        _add(movies, row[id_at], _Movie(row[title_at], year, row[genres_at].split()), where)

    users: dict[str, dict[str, Any]] = {}
    if inter.with_suffix(".user").is_file():
        columns, rows = _typed_rows(inter.with_suffix(".user"))
        id_at = _column(columns, inter.with_suffix(".user"), "user_id")
        for where, row in rows:
            fields = dict(zip(columns, row, strict=True))
            _add(users, row[id_at], _profile(where, fields), where)

    columns, rows = _typed_rows(inter)
    places = [_column(columns, inter, name) for name in ("user_id", "item_id", "rating", "timestamp")]
    return _Source(movies, users, _ratings(rows, places))


def _form_100k(folder: Path) -> _Source:
    movies: dict[str, _Movie] = {}
    for where, row in _rows(folder / "u.item", "|", 24, "latin-1"):
        title, year = _split_title(row[1])
        genres = [genre for genre, flag in zip(_GENRES_100K, row[5:], strict=True) if flag == "1"]
        _add(movies, row[0], _Movie(title, year, genres), where)
    users: dict[str, dict[str, Any]] = {}
    for where, row in _rows(folder / "u.user", "|", 5, "latin-1"):
        fields = dict(zip(("user_id", "age", "gender", "occupation", "zip_code"), row, strict=True))
        _add(users, row[0], _profile(where, fields), where)
    return _Source(movies, users, _ratings(_rows(folder / "u.data", "\t", 4, "latin-1"), [0, 1, 2, 3]))


def _form_1m(folder: Path) -> _Source:
    movies: dict[str, _Movie] = {}
    for where, row in _rows(folder / "movies.dat", "::", 3, "latin-1"):
        title, year = _split_title(row[1])
        _add(movies, row[0], _Movie(title, year, _genres(row[2])), where)
    users: dict[str, dict[str, Any]] = {}
    if (folder / "users.dat").is_file():
        for where, row in _rows(folder / "users.dat", "::", 5, "latin-1"):
            fields = dict(zip(("user_id", "gender", "age", "occupation", "zip_code"), row, strict=True))
            _add(users, row[0], _profile(where, fields), where)
    return _Source(movies, users, _ratings(_rows(folder / "ratings.dat", "::", 4, "latin-1"), [0, 1, 2, 3]))


def _form_csv(folder: Path) -> _Source:
    movies: dict[str, _Movie] = {}
    for where, row in _csv_rows(folder / "movies.csv", ("movieId", "title", "genres")):
        title, year = _split_title(row[1])
        _add(movies, row[0], _Movie(title, year, _genres(row[2])), where)
    rows = _csv_rows(folder / "ratings.csv", ("userId", "movieId", "rating", "timestamp"))
    return _Source(movies, {}, _ratings(rows, [0, 1, 2, 3]))


# Lines ----------------------------------------------------------------------------------------------------------------


def _lines(path: Path, encoding: str) -> Iterator[tuple[str, str]]:
    """("file:line", text) of each line that is not empty."""
    try:
        with path.open(encoding=encoding, newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if stripped := line.rstrip("\r\n"):
                    yield f"{path.name}:{number}", stripped
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} cannot be read: {error}") from error


def _rows(path: Path, separator: str, fields: int, encoding: str) -> Iterator[tuple[str, Row]]:
    for where, line in _lines(path, encoding):
        row = line.split(separator)
        if len(row) != fields:
            raise DataError(f"{where}: {len(row)} fields, {fields} are needed")
        yield where, row


def _typed_rows(path: Path) -> tuple[list[str], Iterator[tuple[str, Row]]]:
    lines = _lines(path, "utf-8-sig")
    where, header = next(lines, (f"{path.name}:1", ""))
    names = header.split("\t")
    if not all(re.fullmatch(r"\w+:(token|token_seq|float|float_seq)", name) for name in names):
        raise DataError(f"{where}: the first line must name every column as name:type")
    columns = [name.split(":")[0] for name in names]

    def rows() -> Iterator[tuple[str, Row]]:
        for at, line in lines:
            row = line.split("\t")
            if len(row) != len(columns):
                raise DataError(f"{at}: {len(row)} fields, {len(columns)} are needed")
            yield at, row

    return columns, rows()


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if header[: len(columns)] != list(columns):
                raise DataError(f"{path.name}:1: the first line must be {','.join(columns)}")
            for row in reader:
                where = f"{path.name}:{reader.line_num}"
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(f"{where}: {len(row)} fields, {len(header)} are needed")
                yield where, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path.name} cannot be read: {error}") from error


def _ratings(rows: Iterator[tuple[str, Row]], places: Sequence[int]) -> Iterator[tuple[str, str, str, str, str]]:
    user, movie, rating, seconds = places
    for where, row in rows:
        yield row[user], row[movie], row[rating], row[seconds], where


def _column(columns: Sequence[str], path: Path, *names: str) -> int:
    for name in names:
        if name in columns:
            return columns.index(name)
    raise DataError(f"{path.name}:1: no column {' or '.join(names)}")


# Values ---------------------------------------------------------------------------------------------------------------


def _add(table: dict[str, _Value], key: str, value: _Value, where: str) -> None:
    if not key:
        raise DataError(f"{where}: the id is empty")
    if key in table:
        raise DataError(f"{where}: the id {key!r} stands twice")
    table[key] = value


def _profile(where: str, fields: dict[str, str]) -> dict[str, Any]:
    read: dict[str, Callable[[str], Any]] = {
        "age": lambda value: _number(value, "age", where),
        "gender": str,
        "occupation": str,
        "zip_code": lambda value: value[:1],  # the first digit: a part of the country
    }
    return {name: read[name](fields[name]) for name in read if fields.get(name)}


def _number(value: str, name: str, where: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise DataError(f"{where}: {name} {value!r} is not a number") from None
    if not abs(number) < 1e12:
        raise DataError(f"{where}: {name} {value!r} is out of range")
    return number


def _year(value: str) -> int | None:
    """None where the data does not know it: the published typed form has a word there for one movie."""
    return int(value[:4]) if re.fullmatch(r"\d{4}(\.0)?", value) else None


def _split_title(title: str) -> tuple[str, int | None]:
    found = _TITLE_YEAR.match(title)
    return (found[1], int(found[2])) if found else (title, None)


def _genres(value: str) -> list[str]:
    return [] if value in ("", _NO_GENRES) else value.split("|")
