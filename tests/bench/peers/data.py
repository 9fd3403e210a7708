"""The data that Forerank and its peers answer from, as one folder: written once, read by every process.

`bundle/`; by id 0, 1, ...: `hot.npy` u1 [items, 192] (records of `RowLayout.hot`), `vector.npy` f2 [items, d] and
`source.npy` i4 [items], the distinct item that an id is a copy of; by distinct item: its encoded features `ids.npy`
i8 [m, categories' ids], `numerics.npy` f4 and `dense.npy` f4 [m, e]; by user: `seen.npy`, `actions.npy`, `times.npy`
[users, L] and `profiles.json`; `requests.npy` u8 [requests, candidates]; `world.json` with the sizes.

The first `DISTINCT` ids are items of their own. Those behind are copies under signatures drawn at random, because
encoding a million events would take minutes: whoever needs a signature takes it from `hot.npy`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders.bundle import Bundle, load_bundle, seeded_bundle
from encoders.features import ItemEncoder
from encoders.fold import Behaviours, ItemFold
from index.layout import RowLayout, aligned_empty
from tests.bench.world import World, as_of, ms

DISTINCT = 20_000
_BATCH = 1_000
_COPIED = ("joint", "bridge", "crosses")  # of a hot record


def write_world(folder: Path, items: int, users: int, length: int, seed: int, candidates: int, requests: int) -> None:
    """Write the data of `items` items, `users` users with `length` behaviours each, and `requests` requests for
    `candidates` different items each. Equal arguments give equal data."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle = seeded_bundle(folder / "bundle", seed=seed, precision="fp16")
    random, world = np.random.default_rng(seed), World(items, seed)
    bags = _write_items(folder, bundle, world, random)
    _write_users(folder, bundle, world, users, length)
    drawn = np.stack([random.choice(items, candidates, replace=False) for _ in range(requests)])
    np.save(folder / "requests.npy", drawn.astype(np.uint64))
    sizes = {"items": items, "users": users, "length": length, "seed": seed, "bags": bags}
    (folder / "world.json").write_text(json.dumps(sizes))


def _write_items(folder: Path, bundle: Bundle, world: World, random: np.random.Generator) -> list[int]:
    """Gives the number of ids in each category, the same for every item of a `World`."""
    config, spec = bundle.manifest.config, bundle.manifest.features
    layout = RowLayout.from_json(bundle.manifest.row)
    distinct = min(DISTINCT, world.items)
    fold, encoder = ItemFold(bundle), ItemEncoder(spec, config.embedding_dim, config.crosses)
    hot = aligned_empty(world.items, layout.hot)
    hot.view(np.uint8)[:] = 0
    vector = np.empty((world.items, config.dim), np.float16)
    features = []
    for start in range(0, distinct, _BATCH):
        batch = [world.inputs(number, 1) for number in range(start, min(start + _BATCH, distinct))]
        rows, into = fold.encode(batch), slice(start, start + len(batch))
        assert not any(rows.errors)
        for name in (*_COPIED, "signature"):
            hot[name][into] = getattr(rows, name)
        vector[into] = rows.vector
        features.append(encoder.columns(batch).features)
    source = np.arange(world.items, dtype=np.int32)
    source[distinct:] = random.integers(0, distinct, world.items - distinct)
    for name in _COPIED:
        hot[name] = hot[name][source]
    vector = vector[source]
    hot["signature"][distinct:] = random.integers(0, 256, (world.items - distinct, config.bits // 8), np.uint8)
    np.save(folder / "hot.npy", hot.view(np.uint8).reshape(world.items, -1))
    np.save(folder / "vector.npy", vector)
    np.save(folder / "source.npy", source)
    np.save(folder / "ids.npy", np.concatenate([part.ids.numpy() for part in features]).reshape(distinct, -1))
    np.save(folder / "numerics.npy", np.concatenate([part.numerics.numpy() for part in features]))
    np.save(folder / "dense.npy", np.concatenate([part.dense.numpy() for part in features]))
    return _bags(features, len(spec.item_categories))


def _bags(features: list[Any], categories: int) -> list[int]:
    sizes = [np.diff(part.offsets.numpy(), append=len(part.ids)).reshape(-1, categories) for part in features]
    assert all((part == sizes[0][0]).all() for part in sizes), "items differ in the number of ids of a category"
    return [int(size) for size in sizes[0][0]]


def _write_users(folder: Path, bundle: Bundle, world: World, users: int, length: int) -> None:
    histories = [world.history(user, length) for user in range(users)]
    spec = bundle.manifest.features
    seen = [[int(one["item_id"]) for one in history] for history in histories]
    actions = [spec.action_codes([one["action"] for one in history]) for history in histories]
    times = [[ms(one["event_time"]) for one in history] for history in histories]
    np.save(folder / "seen.npy", np.array(seen, np.int64))
    np.save(folder / "actions.npy", np.array(actions, np.uint8))
    np.save(folder / "times.npy", np.array(times, np.int64))
    (folder / "profiles.json").write_text(json.dumps([world.profile(user) for user in range(users)]))


@dataclasses.dataclass(frozen=True)
class ItemFeatures:
    """Encoded features of the distinct items, as columns."""

    ids: NDArray[np.int64]  # rows of the item tower's table, category after category
    numerics: NDArray[np.float32]
    dense: NDArray[np.float32]


class Data:
    """A folder that `write_world` has written, in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bundle = folder, load_bundle(folder / "bundle")
        sizes = json.loads((folder / "world.json").read_text())
        self.seed, self.bags = int(sizes["seed"]), tuple(sizes["bags"])
        self.world = World(int(sizes["items"]), self.seed)
        self.requests: NDArray[np.uint64] = np.load(folder / "requests.npy")
        self.profiles: list[dict[str, Any]] = json.loads((folder / "profiles.json").read_text())
        self._seen, self._actions, self._times = (
            np.load(folder / f"{name}.npy") for name in ("seen", "actions", "times")
        )
        self.users = [self._behaviours(user) for user in range(len(self.profiles))]

    @functools.cached_property
    def layout(self) -> RowLayout:
        return RowLayout.from_json(self.bundle.manifest.row)

    @functools.cached_property
    def hot(self) -> NDArray[np.void]:
        """Records [items]."""
        rows = np.load(self.folder / "hot.npy", mmap_mode="r")
        out: NDArray[np.void] = rows.view(self.layout.hot)[:, 0]
        return out

    @functools.cached_property
    def vector(self) -> NDArray[np.float16]:
        """Item vectors [items, d]."""
        out: NDArray[np.float16] = np.load(self.folder / "vector.npy", mmap_mode="r")
        return out

    @functools.cached_property
    def source(self) -> NDArray[np.int32]:
        """The distinct item of each id [items]."""
        out: NDArray[np.int32] = np.load(self.folder / "source.npy")
        return out

    @functools.cached_property
    def features(self) -> ItemFeatures:
        return ItemFeatures(*(np.load(self.folder / f"{name}.npy") for name in ("ids", "numerics", "dense")))

    def user(self, place: int) -> int:
        """Whose request stands at this place."""
        return place % len(self.users)

    def _behaviours(self, user: int) -> Behaviours:
        rows, seen = self.hot[self._seen[user]], self._seen[user]
        return Behaviours(
            self.vector[seen], rows["signature"].copy(), rows["crosses"].copy(), self._actions[user], self._times[user]
        )

    def seen(self, user: int) -> NDArray[np.int64]:
        """Ids of the user's items, oldest first."""
        out: NDArray[np.int64] = self._seen[user]
        return out

    @property
    def as_of(self) -> int:
        return as_of()
