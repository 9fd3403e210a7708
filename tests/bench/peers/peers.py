"""The peers by name."""

from __future__ import annotations

from collections.abc import Callable

from tests.bench.peers.attention import AttentionOnnx, AttentionTorch
from tests.bench.peers.data import Data
from tests.bench.peers.peer import Peer
from tests.bench.peers.sequential import SequentialOnnx, SequentialTorch
from tests.bench.peers.stack import Stack
from tests.bench.peers.stores import Feast, Redis, RocksDb

PEERS: dict[str, Callable[[Data], Peer]] = {
    "sequential-torch": SequentialTorch,
    "sequential-onnx": SequentialOnnx,
    "redis-onnx": lambda data: Stack(data, Redis(data)),
    "rocksdb-onnx": lambda data: Stack(data, RocksDb(data)),
    "feast-onnx": lambda data: Stack(data, Feast(data)),
    "attention-torch": AttentionTorch,
    "attention-onnx": AttentionOnnx,
}
