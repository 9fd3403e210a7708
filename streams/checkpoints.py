"""Checkpoints: whole copies of an index in a store that all hosts see (a directory, or whatever fsspec opens), from
which a host without an index starts, so that it replays only what came later.

Written by replicate, beside its batches:

    <checkpoint_uri>/<prefix><generation>/<ms>-<host>/<file>          RocksDB's files
    <checkpoint_uri>/<prefix><generation>/<ms>-<host>/manifest.json   last: what they are, and each one's SHA-256

A folder without its manifest is unfinished, or half deleted, and is never read. Each host keeps its newest two. The
manifest decides whether a copy fits (same cluster and topics, same bundle, the blocks that follow it still in Kafka),
and then it is proven: every file's size and hash, and rows that agree in count and digest with the progress stored
among them. A copy that fails is passed over with its reason, and the next one is tried; it never becomes the index.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import msgspec

from index.arena import Progress
from index.errors import StoreError
from index.layout import RowLayout
from index.n2o import N2OWriter
from infra.settings import Settings
from infra.telemetry import counter, gauge
from streams import bundles

LOG = logging.getLogger(__name__)
FORMAT = 1
MANIFEST = "manifest.json"
KEPT = 2
_FILE = re.compile(r"\w[\w.-]*", re.ASCII)
_NAME = re.compile(r"\d{13}-.+")
_LEFT_OUT = ("LOCK", "LOG")  # of RocksDB's files: what it makes itself
_CHUNK = 4 << 20
_AGAIN_S = 60.0  # after a failure


class CheckpointError(Exception):
    """A checkpoint cannot be written, or not be used; the message is one sentence."""


class File(msgspec.Struct, frozen=True):
    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Lists have one entry per partition of `items`, as Progress has them."""

    cluster: str
    prefix: str
    bundle: str  # SHA-256 of the bundle's manifest
    covered: list[int]
    rows_offset: list[int]
    count: list[int]
    digest: list[int]
    files: dict[str, File]
    format: int = FORMAT


class Checkpoints:
    """Those of one generation, as one host writes and reads them."""

    def __init__(self, settings: Settings, generation: str, cluster: str) -> None:
        """`cluster`: the id of the Kafka cluster whose offsets these are."""
        self._settings, self._cluster = settings, cluster
        self._generation, self._folder = generation, settings.generation_dir(generation)

    def write(self, writer: N2OWriter) -> str | None:
        """A new one of this host, and away with its older ones; gives its name. None while the index is not proven
        whole: nobody would gain by a copy of it. Raises CheckpointError.
        """
        if not writer.progress().filled.all():
            return None
        local = self._folder / "checkpoint"
        try:
            shutil.rmtree(local, ignore_errors=True)
            progress = writer.checkpoint(local)
            store, root = _place(self._settings, self._generation)
            name = f"{time.time_ns() // 1_000_000:013d}-{self._settings.host}"
            self._upload(store, f"{root}/{name}", local, progress)
            self._clean(store, root, name)
        except Exception as error:  # whatever a store raises
            raise CheckpointError(f"no checkpoint was written: {_told(error)}") from error
        finally:
            shutil.rmtree(local, ignore_errors=True)
        return name

    def restore(self, starts: Sequence[int], layout: RowLayout) -> str | None:
        """Puts the newest usable one in the place of this host's index, which no writer may hold, and gives its name;
        None where there is none, and nothing has changed then. `starts`: first offsets of `rows.<generation>`.
        """
        new, old, index = (self._folder / name for name in ("n2o.new", "n2o.old", "n2o"))
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)
        for name in self._names():
            try:
                store, root = _place(self._settings, self._generation)
                manifest = self._usable(store, f"{root}/{name}", starts)
                self._download(store, f"{root}/{name}", new / "rocks", manifest)
                self._prove(new, layout, manifest)
                if index.exists():
                    index.rename(old)
                new.rename(index)
            except Exception as error:  # also what nobody has thought of: the next one may do, and Kafka is there
                LOG.warning("checkpoint %s of %s is passed over: %s", name, self._generation, _told(error))
                continue
            finally:
                shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
            return name
        return None

    def age_s(self) -> float | None:
        """Of the newest one of this host; None where there is none, or nobody knows."""
        own = self._own()
        return max(0.0, time.time() - int(own[0].partition("-")[0]) / 1000) if own else None

    def _names(self) -> list[str]:
        """The newest first; empty where the store cannot be read."""
        try:
            store, root = _place(self._settings, self._generation)
            store.invalidate_cache()
            found = store.ls(root, detail=False) if store.exists(root) else []
        except Exception as error:
            LOG.warning("checkpoints of %s cannot be listed: %s", self._generation, _told(error))
            return []
        names = (str(path).rstrip("/").rpartition("/")[2] for path in found)
        return sorted((name for name in names if _NAME.fullmatch(name)), reverse=True)

    def _own(self) -> list[str]:
        """Those of this host."""
        return [name for name in self._names() if name.partition("-")[2] == self._settings.host]

    def _upload(self, store: Any, folder: str, local: Path, progress: Progress) -> None:
        store.makedirs(folder, exist_ok=True)
        files = {}
        for path in sorted(local.iterdir()):
            if not path.name.startswith(_LEFT_OUT):
                with path.open("rb") as source, store.open(f"{folder}/{path.name}", "wb") as target:
                    files[path.name] = _copy(source, target)
        manifest = Manifest(
            cluster=self._cluster,
            prefix=self._settings.topic_prefix,
            bundle=self._bundle(),
            covered=progress.covered.tolist(),
            rows_offset=progress.rows_offset.tolist(),
            count=progress.count.tolist(),
            digest=progress.digest.tolist(),
            files=files,
        )
        with store.open(f"{folder}/{MANIFEST}", "wb") as target:
            target.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))

    def _clean(self, store: Any, root: str, newest: str) -> None:
        """Away with what this host has left unfinished, and with its older ones but the newest of them."""
        own = [name for name in self._own() if name < newest]
        finished = [name for name in own if store.exists(f"{root}/{name}/{MANIFEST}")]
        for name in own:
            if name not in finished[: KEPT - 1]:
                with suppress(FileNotFoundError):
                    store.rm(f"{root}/{name}/{MANIFEST}")  # first: nobody begins to read what is going
                store.rm(f"{root}/{name}", recursive=True)

    def _usable(self, store: Any, folder: str, starts: Sequence[int]) -> Manifest:
        """The manifest, of a checkpoint that fits. Raises CheckpointError."""
        try:
            with store.open(f"{folder}/{MANIFEST}", "rb") as file:
                manifest = msgspec.json.decode(file.read(), type=Manifest)
        except FileNotFoundError:
            raise CheckpointError("it is unfinished") from None
        except msgspec.DecodeError as error:
            raise CheckpointError(f"its manifest cannot be read: {error}") from None
        if manifest.format != FORMAT:
            raise CheckpointError(f"it has format {manifest.format}; this version reads {FORMAT}")
        if (manifest.cluster, manifest.prefix) != (self._cluster, self._settings.topic_prefix):
            raise CheckpointError("it is of another cluster, or other topics")
        if manifest.bundle != self._bundle():
            raise CheckpointError("it was made with another bundle")
        if len(manifest.rows_offset) != len(starts):
            raise CheckpointError(f"it has {len(manifest.rows_offset)} partitions, not {len(starts)}")
        for partition, (following, start) in enumerate(zip(manifest.rows_offset, starts, strict=True)):
            if max(0, following) < start:
                raise CheckpointError(
                    f"it continues at offset {following} of partition {partition}, which begins at {start} by now"
                )
        if not all(_FILE.fullmatch(name) for name in manifest.files):
            raise CheckpointError("its manifest names what is no file of RocksDB")
        return manifest

    def _download(self, store: Any, folder: str, target: Path, manifest: Manifest) -> None:
        target.mkdir(parents=True)
        for name, wanted in manifest.files.items():
            with store.open(f"{folder}/{name}", "rb") as source, (target / name).open("wb") as copy:
                if _copy(source, copy) != wanted:
                    raise CheckpointError(f"{name} is not the file that its manifest names")

    def _prove(self, folder: Path, layout: RowLayout, manifest: Manifest) -> None:
        """Makes the arena, for which all rows are read: their count and digest are those stored, or StoreError."""
        settings = self._settings
        writer = N2OWriter(folder, layout, settings.partitions, settings.hash_key.encode())
        try:
            found = writer.progress()
        finally:
            writer.close()
        named = [manifest.covered, manifest.rows_offset, manifest.count, manifest.digest]
        if [getattr(found, name).tolist() for name in ("covered", "rows_offset", "count", "digest")] != named:
            raise CheckpointError("its rows are not as far as its manifest says")

    def _bundle(self) -> str:
        return hashlib.sha256((self._folder / "bundle" / bundles.MANIFEST).read_bytes()).hexdigest()


def forget(settings: Settings, generation: str) -> None:
    """Deletes those of all hosts. Raises CheckpointError."""
    try:
        store, root = _place(settings, generation)
        if store.exists(root):
            store.rm(root, recursive=True)
    except Exception as error:
        raise CheckpointError(f"the checkpoints of {generation} could not be deleted: {_told(error)}") from error


def _place(settings: Settings, generation: str) -> tuple[Any, str]:
    """The store, a file system of fsspec, and the generation's folder in it."""
    store, root = fsspec.core.url_to_fs(settings.checkpoint_uri)
    return store, f"{root.rstrip('/')}/{settings.topic_prefix}{generation}"


async def keep_writing(
    checkpoints: Checkpoints, writer: N2OWriter, interval_s: float, wanted: asyncio.Event, generation: str
) -> None:
    """Writes one whenever this host's newest is older than the interval, and when `wanted` is set. In a thread: batches
    go on meanwhile. A failure is counted and tried again; it stops nothing.
    """
    outcomes = counter("forerank_checkpoints", "Checkpoints of this host's indexes", ("generation", "outcome"))
    newest = gauge("forerank_checkpoint_time_seconds", "When the newest checkpoint was written", ("generation",))
    age, wait = await asyncio.to_thread(checkpoints.age_s), 0.0
    if age is not None:
        newest.labels(generation).set(time.time() - age)
        wait = max(0.0, interval_s - age)
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await wanted.wait()
        wanted.clear()
        wait = min(interval_s, _AGAIN_S)
        try:
            name = await asyncio.to_thread(checkpoints.write, writer)
        except CheckpointError as error:
            LOG.error("generation %s: %s", generation, error)
            outcomes.labels(generation, "failed").inc()
            continue
        if name is not None:
            LOG.info("generation %s: checkpoint %s", generation, name)
            outcomes.labels(generation, "written").inc()
            newest.labels(generation).set(time.time())
            wait = interval_s


def _copy(source: BinaryIO, target: BinaryIO) -> File:
    """Copies all of it; its size and hash."""
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(lambda: source.read(_CHUNK)):
        target.write(chunk)
        digest.update(chunk)
        size += len(chunk)
    return File(size, digest.hexdigest())


def _chunks(read: Callable[[], bytes]) -> Iterator[bytes]:
    while chunk := read():
        yield chunk


def _told(error: Exception) -> str:
    """CheckpointError and StoreError are sentences; of all else the type says what it is."""
    known = isinstance(error, CheckpointError | StoreError)
    return str(error) if known else f"{type(error).__name__}: {error}"
