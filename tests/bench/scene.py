"""A catalogue and a user that every model can take, and the rows, bundle and tables that AIF's frame makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoders import lsh
from encoders.bundle import SAMPLE_SPEC, Bundle, Manifest, Precision
from encoders.config import ModelConfig
from encoders.features import ItemColumns, ItemEncoder, ProfileEncoder
from encoders.fold import Behaviours, Head, UserBlock, UserFold
from encoders.inputs import Candidates, Features, Users
from encoders.model import AIF
from encoders.ranker import Ranker
from index import kernels
from index.arena import ArenaReader
from index.layout import RowLayout, aligned_empty
from index.n2o import N2OWriter
from tests.bench.world import World, as_of, ms
from tests.rows import batch_of

F4 = NDArray[np.float32]
I8 = NDArray[np.int64]

_HASH_KEY = b"bench"


class Scene:
    """A catalogue and one user with `length` behaviours, as columns that every model can take."""

    def __init__(self, items: int, length: int, config: ModelConfig, seed: int = 7) -> None:
        self.world, self.config, self.spec = World(items, seed), config, SAMPLE_SPEC
        self.columns = self.encoded(np.arange(items))
        behaviours = self.world.history(0, length)
        self.seen = np.array([int(behaviour["item_id"]) for behaviour in behaviours], np.int64)
        codes = {name: code for code, name in enumerate(self.spec.actions, 1)}
        self.actions = np.array([codes[behaviour["action"]] for behaviour in behaviours], np.uint8)
        self.times = np.array([ms(behaviour["event_time"]) for behaviour in behaviours], np.int64)
        self.profile = self.world.profile(0)

    def __len__(self) -> int:
        return self.world.items

    def encoded(self, places: I8) -> ItemColumns:
        """Columns of the items at these places."""
        encoder = ItemEncoder(self.spec, self.config.embedding_dim, self.config.crosses)
        return encoder.columns(_Items(self.world, places))

    def signatures(self, model: Ranker, columns: ItemColumns) -> NDArray[np.uint8]:
        return lsh.signatures(columns.embedding, model.centre.numpy(), model.projection.numpy())

    def profile_features(self) -> Features:
        return ProfileEncoder(self.spec).features([self.profile])

    def behaviours(self, rows: Rows) -> Behaviours:
        return Behaviours(
            rows.vector[self.seen], rows.signature[self.seen], rows.crosses[self.seen], self.actions, self.times
        )

    def users(self, model: Ranker) -> Users:
        """The user in training form, B = 1."""
        columns = self.encoded(self.seen)
        return Users(
            profile=self.profile_features(),
            known=torch.tensor([True]),
            vectors=model.item_vectors(columns.features)[None],
            signatures=torch.from_numpy(lsh.signs(self.signatures(model, columns)))[None],
            crosses=torch.from_numpy(columns.crosses.astype(np.int64))[None],
            actions=torch.from_numpy(self.actions.astype(np.int64))[None],
            ages=torch.from_numpy(as_of() - self.times)[None],
            valid=torch.ones(1, len(self.seen), dtype=torch.bool),
        )

    def forward(self, model: Ranker, places: I8) -> F4:
        """The model's own scores of the items at these places: what every form is held against."""
        columns = self.encoded(places)
        candidates = Candidates(
            features=columns.features,
            signatures=torch.from_numpy(lsh.signs(self.signatures(model, columns))),
            crosses=torch.from_numpy(columns.crosses.astype(np.int64)),
            index=torch.arange(len(places))[None],
        )
        return array_of(model(self.users(model), candidates)[0])


class _Items(Sequence[SimpleNamespace]):
    """Items of a world, made when they are looked at: a catalogue of event objects would fill the memory."""

    def __init__(self, world: World, places: I8) -> None:
        self._world, self._places = world, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> SimpleNamespace:  # type: ignore[override]  # never sliced
        return self._world.inputs(int(self._places[place]), 1)


# ---- rows of AIF's frame


@dataclasses.dataclass(frozen=True)
class Rows:
    """The item side of a frame for the whole catalogue, as `ItemFold` computes it."""

    joint: F4  # [M, h]
    bridge: F4  # [M, n]
    signature: NDArray[np.uint8]  # [M, b / 8]
    crosses: NDArray[np.uint16]  # [M, C]
    vector: F4  # [M, d]

    @classmethod
    def of(cls, model: AIF, scene: Scene) -> Rows:
        x = model.item_vectors(scene.columns.features)
        return cls(
            array_of(torch.addmm(model.b1, x, model.W1x.T)),
            array_of(model.bridge_weights(x)),
            scene.signatures(model, scene.columns),
            scene.columns.crosses,
            array_of(x),
        )

    def hot(self, layout: RowLayout) -> NDArray[np.void]:
        out = aligned_empty(len(self.joint), layout.hot)
        out.view(np.uint8)[:] = 0
        for name in ("joint", "bridge", "signature", "crosses"):
            out[name] = getattr(self, name)
        return out

    def cold(self, layout: RowLayout) -> NDArray[np.void]:
        out = aligned_empty(len(self.joint), layout.cold)
        out.view(np.uint8)[:] = 0
        out["vector"] = self.vector
        return out


def bundle_of(model: AIF, scene: Scene, precision: Precision) -> Bundle:
    """The model as a bundle that was never written."""
    return Bundle(Manifest("bench", model.config, scene.spec, precision, {}), model, "")


def arena_of(rows: Rows, layout: RowLayout, folder: Path) -> ArenaReader:
    """A real arena that holds the rows under the integer ids 0, 1, ..."""
    writer = N2OWriter(folder, layout, 1, _HASH_KEY)
    ids = [str(number) for number in range(len(rows.joint))]
    writer.apply([(batch_of(ids, 0, rows.hot(layout), rows.cold(layout)), 0)])
    writer.close()
    return ArenaReader.open(folder, layout)


def tables_of(bundle: Bundle, scene: Scene, rows: Rows) -> tuple[kernels.UserTables, kernels.HeadTables]:
    """What the kernel needs of the scene's user and of the model."""
    block = UserFold(bundle).block(scene.profile, scene.behaviours(rows), as_of())
    return user_tables_of(block, bundle), head_of(bundle)


def user_tables_of(block: UserBlock, bundle: Bundle) -> kernels.UserTables:
    return kernels.user_tables(*block.arrays, narrow=bundle.manifest.precision == "fp16")


def head_of(bundle: Bundle) -> kernels.HeadTables:
    head = Head.of(bundle)
    return kernels.head_tables(head.T, head.edges, head.weights, head.biases)


def array_of(tensor: Tensor) -> F4:
    out: F4 = np.ascontiguousarray(tensor.detach().numpy(), dtype=np.float32)
    return out
