"""Peer (d): target attention, the published DIN over the whole history, in the place of BEA and LSH-DIN.

The model is `encoders.baselines.DIN` with seeded weights, so its scores are its own. All but the attention is done as
Forerank does it, by its fold and its kernel, from rows in this process's memory: what remains is the attention, in the
best form known of it (tests/bench/serving_forms.py), in PyTorch or in ONNX Runtime.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from encoders.baselines import DIN, build
from encoders.config import ModelConfig
from encoders.fold import Behaviours, UserFold
from index import kernels
from index.layout import RowLayout
from tests.bench.peers.data import DISTINCT, Data
from tests.bench.peers.peer import F4, U8, Lap, Peer
from tests.bench.peers.runtime import Session
from tests.bench.scene import Rows, Scene, bundle_of, head_of, user_tables_of
from tests.bench.serving_forms import Attention, twin_of

I8 = NDArray[np.int64]


class _Scene(Scene):
    """The distinct items of a `Data`, with its users in turn."""

    def __init__(self, data: Data) -> None:
        super().__init__(min(DISTINCT, data.world.items), 1, ModelConfig(), data.seed)
        self._data = data
        self.turn(0)

    def turn(self, user: int) -> None:
        """Make this the scene's user."""
        past = self._data.users[user]
        self.seen = self._data.source[self._data.seen(user)].astype(np.int64)
        self.actions, self.times, self.profile = past.actions, past.times, self._data.profiles[user]


class AttentionPeer(Peer):
    """The frame around the attention; rows of the distinct items."""

    tolerance = 5e-3

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.scene = _Scene(data)
        model = build("din", ModelConfig(), self.scene.spec.sizes, data.seed).eval().requires_grad_(False)
        assert isinstance(model, DIN)
        self.model, twin = model, twin_of(model, self.scene)
        bundle = bundle_of(twin, self.scene, "fp32")
        self._rows, self._layout = Rows.of(twin, self.scene), RowLayout.from_json(bundle.manifest.row)
        self._hot, self._x = self._rows.hot(self._layout), torch.from_numpy(self._rows.vector)
        self._fold, self._head = UserFold(bundle), head_of(bundle)
        kernels.warm_up(self._layout, self._head)
        self.settings = {"torch": torch.__version__}

    def scores(self, user: int, ids: U8, lap: Lap) -> F4:
        data, places = self.data, self.data.source[ids].astype(np.int64)
        rows, x = self._hot.take(places), self._x.index_select(0, torch.from_numpy(places))
        lap("fetch")
        self.scene.turn(user)
        past = self.scene.behaviours(self._rows)
        block = self._fold.block(data.profiles[user], past, data.as_of)
        tables = user_tables_of(block, data.bundle)
        tokens = self._tokens(past)
        lap("user")
        rows["joint"] += (self.attended(tokens, x) @ self.model.W1d.T).numpy()
        lap("model")
        out: F4 = kernels.score(rows, tables, self._head)
        lap("frame")
        return out

    def expected(self, user: int, ids: U8) -> F4:
        self.scene.turn(user)
        out: F4 = self.scene.forward(self.model, self.data.source[ids].astype(np.int64))
        return out

    def _tokens(self, past: Behaviours) -> Tensor:
        """The user's tokens [L, d]."""
        ages = torch.from_numpy(self.data.as_of - past.times)
        actions = torch.from_numpy(past.actions.astype(np.int64))
        return self.model.tokens(torch.from_numpy(past.vectors), actions, ages)

    @abstractmethod
    def attended(self, tokens: Tensor, x: Tensor) -> Tensor:
        """All tokens [L, d] as each of x [K, d] attends to them [K, d]."""


class AttentionTorch(AttentionPeer):
    """bf16, which the processor multiplies at twice the rate, in tiles that stay in the cache."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self._attention = Attention(self.model.attention, torch.bfloat16)
        self.tolerance = 0.05
        self.settings |= {"type": "bfloat16"}

    def attended(self, tokens: Tensor, x: Tensor) -> Tensor:
        return self._attention.over_all(tokens, x)


class AttentionOnnx(AttentionPeer):
    """fp32, as ONNX Runtime has no bf16 for processors; the same equations and tiles."""

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        example = {"tokens": np.zeros((len(data.users[0]), self._x.shape[1]), np.float32), "x": self._x[:2].numpy()}
        self._session = Session(
            _Tile(Attention(self.model.attention, torch.float32)), example, ["attended"], {"x": "candidates"}
        )
        self.settings |= {"type": "float32", "tile": Attention.tile}

    def attended(self, tokens: Tensor, x: Tensor) -> Tensor:
        array, out = tokens.numpy(), []
        for part in torch.split(x, Attention.tile):
            out.append(self._session({"tokens": array, "x": part.numpy()})["attended"])
        return torch.from_numpy(np.concatenate(out))


class _Tile(nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._attention = attention

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        return self._attention.one_tile(tokens, tokens, x)
