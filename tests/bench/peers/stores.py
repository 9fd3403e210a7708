"""The stores of peers (b) and (c), each filled from the same records and read for all candidates at once."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import feast
import numpy as np
import pandas as pd
import redis
import rocksdict
from feast.types import Bytes, Int64

from tests.bench.peers.data import Data
from tests.bench.peers.peer import U8

_BATCH = 10_000  # rows per write


class Store(ABC):
    """Records by id. What it keeps lies in a folder of its own, which `close` deletes."""

    settings: dict[str, Any]

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        atexit.register(self._held.close)  # also where a peer fails before it can be closed
        self.folder = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="forerank-peer-")))

    @abstractmethod
    def records(self, ids: U8) -> bytes:
        """The records of the ids, one behind the other."""

    def server_cpu_ms(self) -> float:
        return 0.0

    def close(self) -> None:
        self._held.close()


class Redis(Store):
    """Debian's redis-server behind a Unix socket, without persistence; MGET by chunks, all sent before any answer is
    read, so that the server looks up the next one while hiredis parses. Keys are the 8 bytes of the id.
    """

    chunk = 2_000

    def __init__(self, data: Data) -> None:
        super().__init__()
        socket = self.folder / "redis.sock"
        arguments = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
        self._server = subprocess.Popen(["redis-server", *arguments], cwd=self.folder, stdout=subprocess.DEVNULL)
        self._held.callback(_stopped, self._server)
        self._client = redis.Redis(unix_socket_path=str(socket), protocol=2)
        self._held.callback(self._client.close)
        _wait(self._client)
        for ids, values in _rows(data):
            self._client.mset(dict(zip(ids, values, strict=True)))
        self.settings = {
            "server": self._client.info("server")["redis_version"],
            "redis-py": redis.__version__,
            "parser": type(self._client.connection_pool.make_connection()._parser).__name__,
            "keys_per_mget": self.chunk,
        }

    def records(self, ids: U8) -> bytes:
        keys, size = _keys(ids), self.chunk
        pipeline = self._client.pipeline(transaction=False)
        for start in range(0, len(keys), size):
            pipeline.mget(keys[start : start + size])
        return b"".join([record for answer in pipeline.execute() for record in answer])

    def server_cpu_ms(self) -> float:
        used = self._client.info("cpu")
        return float(used["used_cpu_sys"] + used["used_cpu_user"]) * 1e3


class RocksDb(Store):
    """RocksDB through rocksdict in raw mode, read by `get(list)`, compacted and warm."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        self._db = rocksdict.Rdict(str(self.folder / "db"), _cuckoo())
        self._held.callback(self._db.close)
        for ids, values in _rows(data):
            batch = rocksdict.WriteBatch(raw_mode=True)
            for key, value in zip(ids, values, strict=True):
                batch.put(key, value)
            self._db.write(batch)
        self._db.flush()
        self._db.compact_range(None, None)
        for ids, _ in _rows(data):  # warms up
            self.read(ids)
        self.settings = {"rocksdict": version("rocksdict"), "table": "cuckoo, mapped"}

    def records(self, ids: U8) -> bytes:
        return b"".join(self.read(_keys(ids)))

    def read(self, keys: list[bytes]) -> list[bytes]:
        """The values of keys that are all there."""
        return cast("list[bytes]", self._db.get(cast("list[Any]", keys)))


class Feast(Store):
    """Feast's online store on SQLite, one bytes feature per item, read by one `get_online_features`.

    SQLite beats Feast's Redis store, which sends a command per item. The values are taken out of the answer's protobuf,
    without the dictionary that `to_dict` would make of them.
    """

    def __init__(self, data: Data) -> None:
        super().__init__()
        config = feast.RepoConfig(
            project="peers",
            provider="local",
            registry=str(self.folder / "registry.db"),
            online_store={"type": "sqlite", "path": str(self.folder / "online.db")},
            entity_key_serialization_version=3,
        )
        self._store = feast.FeatureStore(config=config)
        item = feast.Entity(name="item", join_keys=["item"], value_type=feast.ValueType.INT64)
        view = feast.FeatureView(
            name="rows",
            entities=[item],
            schema=[feast.Field(name="item", dtype=Int64), feast.Field(name="record", dtype=Bytes)],
            source=feast.FileSource(path=str(self.folder / "none.parquet"), timestamp_field="time"),
            ttl=None,
        )
        self._store.apply([item, view])
        now, start = datetime.datetime.now(datetime.UTC), 0
        for ids, values in _rows(data):
            numbers = np.arange(start, start + len(ids))
            self._store.write_to_online_store("rows", pd.DataFrame({"item": numbers, "record": values, "time": now}))
            start += len(ids)
        self.settings = {"feast": feast.__version__, "online_store": "sqlite"}

    def records(self, ids: U8) -> bytes:
        answer = self._store.get_online_features(["rows:record"], {"item": ids.tolist()}).proto
        at = list(answer.metadata.feature_names.val).index("record")
        return b"".join([value.bytes_val for value in answer.results[at].values])


def _cuckoo() -> rocksdict.Options:
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_compression_type(rocksdict.DBCompressionType.none())
    options.set_allow_mmap_reads(True)
    options.set_cuckoo_table_factory(rocksdict.CuckooTableOptions())
    return options


def _rows(data: Data) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """All keys and records, by batches."""
    size = data.layout.hot.itemsize
    for start in range(0, len(data.hot), _BATCH):
        raw = data.hot[start : start + _BATCH].tobytes()
        values = [raw[at : at + size] for at in range(0, len(raw), size)]
        yield _keys(np.arange(start, start + len(values), dtype=np.uint64)), values


def _keys(ids: U8) -> list[bytes]:
    raw = ids.astype(">u8").tobytes()
    return [raw[at : at + 8] for at in range(0, len(raw), 8)]


def _wait(client: redis.Redis) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            client.ping()
        except redis.ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _stopped(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
