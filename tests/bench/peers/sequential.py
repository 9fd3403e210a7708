"""Peer (a): sequential execution. Once the candidates are known, their features are looked up and the training form
runs.

Features lie in this process's arrays, by id, and those of a few distinct items stand for all, so that most lie in the
cache: both in the peer's favour. What does not depend on the candidates runs once and not per chunk of them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoders import lsh
from tests.bench.peers.data import Data
from tests.bench.peers.networks import (
    Arrays,
    TrainingForm,
    User,
    UserInputs,
    UserSide,
    int8_product,
    onnx_int8_product,
)
from tests.bench.peers.peer import F4, U8, Lap, Peer
from tests.bench.peers.runtime import Session
from tests.bench.peers.stack import used_columns


class Sequential(Peer):
    tolerance = 1e-4
    chunk: int  # candidates per run of the network

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self._users = UserInputs(data)
        self._signatures = data.hot["signature"].copy()
        self._crosses = np.ascontiguousarray(data.hot["crosses"][:, : used_columns(data)])
        self.settings = {"torch": torch.__version__, "candidates_per_run": self.chunk}

    def scores(self, user: int, ids: U8, lap: Lap) -> F4:
        data, which = self.data, self.data.source[ids]
        columns: Arrays = {
            "ids": data.features.ids[which],
            "numerics": data.features.numerics[which],
            "dense": data.features.dense[which],
            "bits": np.unpackbits(self._signatures[ids], axis=1, bitorder="little"),
            "crosses": self._crosses[ids],
        }
        lap("fetch")
        inputs = self._users.of(data.profiles[user], data.users[user])
        columns["crosses"] = inputs.places[columns["crosses"]]
        self.user_side(inputs)
        lap("user")
        out = np.empty(len(ids), np.float32)
        for start in range(0, len(ids), self.chunk):
            chunk = slice(start, start + self.chunk)
            out[chunk] = self.joined({name: column[chunk] for name, column in columns.items()})
        lap("model")
        return out

    @abstractmethod
    def user_side(self, user: User) -> None:
        """Keep what `joined` needs of the user."""

    @abstractmethod
    def joined(self, columns: Arrays) -> NDArray[Any]:
        """Scores of a chunk of candidates."""


class SequentialTorch(Sequential):
    chunk = 512

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        model = data.bundle.model
        self._side = UserSide(model)
        self._form = TrainingForm(model, data.bags, int8_product)
        self._user: list[Tensor] = []

    @torch.inference_mode()
    def user_side(self, user: User) -> None:
        side = self._side(*(torch.from_numpy(array) for array in user.inputs.values()))
        self._user = [*side, torch.from_numpy(_signs(user))]

    @torch.inference_mode()
    def joined(self, columns: Arrays) -> NDArray[Any]:
        scores = self._form(*(torch.from_numpy(column) for column in columns.values()), *self._user)
        out: NDArray[Any] = scores.numpy()
        return out


class SequentialOnnx(Sequential):
    chunk = 512

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        model = data.bundle.model
        user = self._users.of(data.profiles[0], data.users[0])
        varying = dict.fromkeys(("means", "counts", "kinds"), "crosses_met")
        self._side = Session(UserSide(model), user.inputs, UserSide.outputs, varying)
        features = data.features
        columns: Arrays = {
            "ids": features.ids[:2],
            "numerics": features.numerics[:2],
            "dense": features.dense[:2],
            "bits": np.unpackbits(self._signatures[:2], axis=1, bitorder="little"),
            "crosses": user.places[self._crosses[:2]],
        }
        self.user_side(user)
        self._join = Session(
            TrainingForm(model, data.bags, onnx_int8_product),
            {**columns, **self._user},
            ["scores"],
            dict.fromkeys(columns, "candidates") | {"G": "rows"},
        )

    def user_side(self, user: User) -> None:
        self._user: Arrays = {**self._side(user.inputs), "history": _signs(user)}

    def joined(self, columns: Arrays) -> NDArray[Any]:
        return self._join({**columns, **self._user})["scores"]


def _signs(user: User) -> NDArray[np.int8]:
    """Signs of the history's signatures [b, L]."""
    return np.ascontiguousarray(lsh.signs(user.signatures).T, np.int8)
