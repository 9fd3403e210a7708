"""Peers (b) and (c): columns of the items from a store, then user side, join and head in ONNX Runtime.

What the store holds is a record of 192 bytes, the item side folded as Forerank's is; so is the user side, in the graph.
Both are in the peers' favour, as is that SimTier is counted by numba and not by the graph (tests/bench/peers/tiers.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.bench.peers.data import Data
from tests.bench.peers.networks import FoldedForm, FoldedSide, User, UserInputs
from tests.bench.peers.peer import F4, U8, Lap, Peer
from tests.bench.peers.runtime import Session
from tests.bench.peers.stores import Store
from tests.bench.peers.tiers import Tiers

CHUNK = 1_024  # candidates per run of the graph


class Stack(Peer):
    tolerance = 5e-3

    def __init__(self, data: Data, store: Store) -> None:
        super().__init__(data)
        self.store, self.settings = store, {**store.settings, "candidates_per_run": CHUNK}
        config, model = data.bundle.manifest.config, data.bundle.model
        self._users, self._tiers = UserInputs(data), Tiers(config.tier_edges, config.windows, config.bits)
        self._crosses = used_columns(data)
        user = self._users.of(data.profiles[0], data.users[0])
        varying = dict.fromkeys(("means", "counts", "kinds"), "crosses_met")
        self._side = Session(FoldedSide(model), user.inputs, FoldedSide.outputs, varying)
        side = self._side(user.inputs)
        columns = self._columns(data.hot[:2], user)
        example = {name: {**side, **columns}[name] for name in FoldedForm.inputs}
        self._join = Session(
            FoldedForm(model), example, ["scores"], dict.fromkeys(columns, "candidates") | {"G": "rows"}
        )

    def scores(self, user: int, ids: U8, lap: Lap) -> F4:
        records = np.frombuffer(self.store.records(ids), self.data.layout.hot)
        lap("fetch")
        inputs = self._users.of(self.data.profiles[user], self.data.users[user])
        side = self._side(inputs.inputs)
        lap("user")
        columns = self._columns(records, inputs)
        lap("columns")
        out = np.empty(len(ids), np.float32)
        for start in range(0, len(ids), CHUNK):
            chunk = slice(start, start + CHUNK)
            out[chunk] = self._join({**side, **{name: column[chunk] for name, column in columns.items()}})["scores"]
        lap("model")
        return out

    def _columns(self, records: NDArray[np.void], user: User) -> dict[str, NDArray[Any]]:
        signatures = np.ascontiguousarray(records["signature"])
        return {
            "joint": records["joint"],
            "bridge": records["bridge"],
            "bits": np.unpackbits(signatures, axis=1, bitorder="little"),
            "crosses": user.places[records["crosses"][:, : self._crosses]],
            "tiers": self._tiers(signatures, user.signatures),
        }

    def server_cpu_ms(self) -> float:
        return self.store.server_cpu_ms()

    def close(self) -> None:
        self.store.close()


def used_columns(data: Data) -> int:
    """Crosses that any item has: the columns behind are empty, and no user of a stack would carry them along."""
    return max(1, int(np.count_nonzero(data.hot["crosses"].any(axis=0))))
