"""One request of AIF, of sequential COLD and of sequential DSSM on the same stores. Part of benchmark `cost`.

AIF is the product's own path: `api.prerank.Merger`, with user inference beside retrieval. The others wait for the
retrieval, then compute the user, then score; their item side lies in matrices by position, without an id table, which
is in their favour. All three read history and profile from the same LMDB store, order by the same `rtp.ranked`, and use
one thread for torch. HTTP and JSON are the same for all and left out.

COLD comes in two forms. `cold`: features of the 10,000 candidates are looked up and the whole network runs, item side
included. `cold_cached`: item groups and their half of the gates are ready (nearline, like AIF's rows), and the first
layer's user part is folded.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from api import rtp
from api.generations import Generation, Generations
from api.lanes import Lanes
from api.prerank import Candidates, Merger, Retrieved, gather
from api.schemas import RecommendRequest
from api.users import Users as UserInference
from api.users import infer
from encoders.baselines import COLD, DSSM, TwoSided, build
from encoders.config import ModelConfig
from encoders.features import ItemColumns, ProfileEncoder
from encoders.inputs import Features, Users
from encoders.ranker import Ranker
from index.histories import HistoriesReader
from index.keys import keys_of_ints
from infra.settings import Settings
from tests.bench.scene import Scene
from tests.bench.serving_forms import ColdJoin, ColdUser, cold_items, dssm_items
from tests.bench.world import as_of

F4 = NDArray[np.float32]
I8 = NDArray[np.int64]
Lap = Callable[[str], None]
Retrieve = Callable[[], NDArray[np.uint64]]

CANDIDATES = 10_000
K = 100  # of the answer
RETRIEVAL_S = 0.010


class System(ABC):
    """Answers requests: the ids of the K best of what `retrieve` brings."""

    name: str

    @abstractmethod
    def request(self, user_id: str, retrieve: Retrieve) -> NDArray[np.uint64]:
        """As it is served."""

    @abstractmethod
    def stages(self, user_id: str, ids: NDArray[np.uint64], lap: Lap) -> NDArray[np.uint64]:
        """The same work step by step in this thread; `lap(stage)` is called after each."""


class Aif(System):
    """The product."""

    name = "aif"

    def __init__(self, settings: Settings, generation: Generation, histories: HistoriesReader, lanes: Lanes) -> None:
        self._generation = generation
        self._users = UserInference(settings, lambda: histories, lanes)
        self._merger = Merger(settings, _Pinned(generation), self._users, lanes)

    def request(self, user_id: str, retrieve: Retrieve) -> NDArray[np.uint64]:
        ids: list[NDArray[np.uint64]] = []

        def candidates(*_: object) -> Callable[[], Retrieved]:
            ids.append(retrieve())
            return lambda: (Candidates.of_integers(ids[0]), [])

        answer = self._merger.prerank(_query(user_id), K, CANDIDATES, candidates)
        return ids[0][answer.places]

    def stages(self, user_id: str, ids: NDArray[np.uint64], lap: Lap) -> NDArray[np.uint64]:
        source = self._users.stored(user_id, as_of())
        lap("history")
        side = infer(self._generation, source)
        lap("user")
        candidates = Candidates.of_integers(ids)
        rows = gather(self._generation, candidates, _query(user_id), cold=False)
        lap("gather")
        scores = rtp.score(self._generation, side, rows.hot)
        lap("score")
        there = candidates.at(rows.places)
        best = rtp.ranked(scores, K, there.keys, there.names)
        lap("top_k")
        return ids[rows.places[best]]


class _Pinned(Generations):
    """Always the same generation."""

    def __init__(self, generation: Generation) -> None:
        self._active = generation


class Sequential(System):
    """Retrieval, then the user, then the scores; all in the request's thread."""

    def __init__(self, model: TwoSided, scene: Scene, histories: HistoriesReader) -> None:
        self.model, self._histories = model, histories
        self._profiles = ProfileEncoder(scene.spec)
        self._codes = scene.spec.action_codes(histories.actions()).astype(np.int64)

    @torch.inference_mode()
    def request(self, user_id: str, retrieve: Retrieve) -> NDArray[np.uint64]:
        return self.stages(user_id, retrieve(), lambda _: None)

    @torch.inference_mode()
    def stages(self, user_id: str, ids: NDArray[np.uint64], lap: Lap) -> NDArray[np.uint64]:
        history, profile = self._histories.history(user_id, as_of()), self._histories.profile(user_id)
        lap("history")
        recent = slice(-self.model.config.recent, None)
        vectors = self.vectors(history.keys[recent, 1].astype(np.int64))[None]
        count = vectors.shape[1]
        users = Users(
            profile=self._profiles.features([profile]),
            known=torch.tensor([bool(profile)]),
            vectors=vectors,
            signatures=torch.empty(1, count, 0),
            crosses=torch.empty(1, count, 0, dtype=torch.int64),
            actions=torch.from_numpy(self._codes[history.actions[recent]])[None],
            ages=torch.from_numpy(as_of() - history.times[recent])[None],
            valid=torch.ones(1, count, dtype=torch.bool),
        )
        self.user(users)
        lap("user")
        scores = self.scores(ids.astype(np.int64), lap)
        lap("score")
        best = rtp.ranked(scores, K, keys_of_ints(ids), lambda places: ids[places])
        lap("top_k")
        return ids[best]

    @abstractmethod
    def vectors(self, places: I8) -> torch.Tensor:
        """Item vectors [n, d] of the user's recent behaviours."""

    @abstractmethod
    def user(self, users: Users) -> None:
        """The user side; kept for `scores`."""

    @abstractmethod
    def scores(self, places: I8, lap: Lap) -> F4:
        """Of the items at these places; ends a stage `gather`."""


class SequentialDssm(Sequential):
    """Item vectors are ready; the user's tower, then inner products."""

    name = "dssm"
    model: DSSM

    def __init__(self, model: DSSM, scene: Scene, histories: HistoriesReader) -> None:
        super().__init__(model, scene, histories)
        self._items = dssm_items(model, scene.columns.features)
        self._vectors = model.item_vectors(scene.columns.features)

    def vectors(self, places: I8) -> torch.Tensor:
        return self._vectors.index_select(0, torch.from_numpy(places))

    def user(self, users: Users) -> None:
        model = self.model
        joined = torch.cat([model.profiles(users.profile, users.known), model.recent(users)], dim=1)
        unit = torch.nn.functional.normalize(model.user_mlp(joined), dim=1)[0]
        self._user = unit * model.log_scale.exp()

    def scores(self, places: I8, lap: Lap) -> F4:
        items = self._items.index_select(0, torch.from_numpy(places))
        lap("gather")
        return (items @ self._user + self.model.bias).numpy()


class SequentialCold(Sequential):
    """Features of the candidates are looked up, then the whole network runs."""

    name = "cold"
    model: COLD

    def __init__(self, model: COLD, scene: Scene, histories: HistoriesReader) -> None:
        super().__init__(model, scene, histories)
        self._features = FeatureStore(scene.columns)
        self._join = ColdJoin(model)

    def vectors(self, places: I8) -> torch.Tensor:
        return self.model.item_vectors(self._features.take(places))

    def user(self, users: Users) -> None:
        self._user = ColdUser.of(self.model, users)

    def scores(self, places: I8, lap: Lap) -> F4:
        features = self._features.take(places)
        lap("gather")
        items = cold_items(self.model, features)
        lap("items")
        return self._join.scores(self._user, items, self._join.halves(items)).numpy()


class CachedCold(Sequential):
    """Item groups and their half of the gates' layer are ready."""

    name = "cold_cached"
    model: COLD

    def __init__(self, model: COLD, scene: Scene, histories: HistoriesReader) -> None:
        super().__init__(model, scene, histories)
        self._join = ColdJoin(model)
        self._items = cold_items(model, scene.columns.features)
        self._halves = self._join.halves(self._items)

    def vectors(self, places: I8) -> torch.Tensor:  # the first group
        return self._items.index_select(0, torch.from_numpy(places))[:, : self.model.config.dim]

    def user(self, users: Users) -> None:
        self._user = ColdUser.of(self.model, users)

    def scores(self, places: I8, lap: Lap) -> F4:
        which = torch.from_numpy(places)
        items, halves = self._items.index_select(0, which), self._halves.index_select(0, which)
        lap("gather")
        return self._join.scores(self._user, items, halves).numpy()


class FeatureStore:
    """Encoded features of a catalogue, by position."""

    def __init__(self, columns: ItemColumns) -> None:
        features, rows = columns.features, len(columns.embedding)
        self._ids, starts = features.ids.numpy(), features.offsets.numpy()
        self._starts = starts.reshape(rows, -1)
        self._sizes = np.diff(starts, append=len(self._ids)).reshape(rows, -1)
        self._numerics, self._dense = features.numerics, features.dense

    def take(self, places: I8) -> Features:
        starts, sizes = self._starts[places].ravel(), self._sizes[places].ravel()
        offsets = np.cumsum(sizes) - sizes
        ids = self._ids[np.repeat(starts - offsets, sizes) + np.arange(sizes.sum())]
        which = torch.from_numpy(places)
        numerics, dense = self._numerics.index_select(0, which), self._dense.index_select(0, which)
        return Features(torch.from_numpy(ids), torch.from_numpy(offsets), numerics, dense)


def untrained(name: str, config: ModelConfig, scene: Scene) -> Ranker:
    return build(name, config, scene.spec.sizes).eval().requires_grad_(False)


def slept(ids: NDArray[np.uint64]) -> Retrieve:
    """A stand-in for a remote retrieval that answers after RETRIEVAL_S."""

    def retrieve() -> NDArray[np.uint64]:
        time.sleep(RETRIEVAL_S)
        return ids

    return retrieve


def _query(user_id: str) -> RecommendRequest:
    return RecommendRequest(user_id=user_id, as_of=as_of(), k=K)
