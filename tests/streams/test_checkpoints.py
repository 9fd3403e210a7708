"""Checkpoints in a store: what is restored, what is passed over and why. One suite for all kinds of stores; with
FORERANK_TEST_STORE for one of yours too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import msgspec
import numpy as np
import pytest

from index.arena import ArenaReader
from index.keys import digest_of, keys_of
from index.layout import RowLayout
from index.n2o import FillProof, N2OReader, N2OWriter
from infra.settings import Settings
from streams import checkpoints
from streams.checkpoints import CheckpointError, Checkpoints, Manifest, forget
from tests.index.log import Change, block
from tests.index.rows import LAYOUT

CLUSTER, STARTS = "a cluster", [0, 0]
KEY = Settings().hash_key.encode()


OTHER = os.environ.get("FORERANK_TEST_STORE", "")  # a place of any other kind, for instance s3://bucket


@pytest.fixture(params=["file", "memory", *filter(None, [OTHER])])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    places = {"file": f"file://{tmp_path}/store", "memory": f"memory://{tmp_path.name}"}
    found = places.get(request.param, f"{request.param}/{uuid.uuid4().hex}")
    yield found
    store, root = fsspec.core.url_to_fs(found)
    if store.exists(root):
        store.rm(root, recursive=True)


class Host:
    """One host's folder of generation `one`, its index included."""

    def __init__(self, uri: str, folder: Path, name: str, bundle: str = "{}") -> None:
        self.settings = Settings(checkpoint_uri=uri, state=folder / name, host=name, topic_prefix="p.", partitions=2)
        self.folder = self.settings.generation_dir("one")
        (self.folder / "bundle").mkdir(parents=True)
        (self.folder / "bundle" / "manifest.json").write_text(bundle)
        self.checkpoints = Checkpoints(self.settings, "one", CLUSTER)
        self.rows = 0

    def writer(self) -> N2OWriter:
        return N2OWriter(self.folder / "n2o", LAYOUT, 2, KEY)

    def write(self, rows: int) -> str:
        """So many rows more, and a checkpoint of all of them."""
        writer = self.writer()
        try:
            self.add(writer, rows)
            name = self.checkpoints.write(writer)
        finally:
            writer.close()
        assert name is not None
        return name

    def add(self, writer: N2OWriter, rows: int) -> None:
        changes = [Change(item, 1, item, False) for item in range(self.rows, self.rows + rows)]
        self.rows += rows
        following = max(0, int(writer.rows_offsets()[0]))
        empty = block(1, [], -1, FillProof(0, 0))
        writer.apply([(block(0, changes, self.rows - 1, proof(self.rows)), following), (empty, following)])

    def restore(self, starts: list[int] = STARTS) -> str | None:
        return self.checkpoints.restore(starts, LAYOUT)

    def ids(self) -> set[str]:
        reader = N2OReader(self.folder / "n2o")
        try:
            return set(reader.ids())
        finally:
            reader.close()


def proof(rows: int) -> FillProof:
    keys = keys_of([Change(item, 1, item, False).item_id for item in range(rows)], KEY)
    return FillProof(rows, int(digest_of(keys, np.ones(rows, np.uint64)).sum(dtype=np.uint64)))


def expected(rows: int) -> set[str]:
    return {Change(item, 1, item, False).item_id for item in range(rows)}


class Stored:
    """The store from outside."""

    def __init__(self, uri: str) -> None:
        self.files, self.root = fsspec.core.url_to_fs(f"{uri}/p.one")

    def names(self) -> list[str]:
        return sorted(str(path).rpartition("/")[2] for path in self.files.ls(self.root, detail=False))

    def path(self, name: str, file: str) -> str:
        return f"{self.root}/{name}/{file}"

    def manifest(self, name: str) -> Manifest:
        return msgspec.json.decode(self.files.cat(self.path(name, "manifest.json")), type=Manifest)

    def change(self, name: str, **changes: object) -> None:
        changed = msgspec.structs.replace(self.manifest(name), **changes)
        self.files.pipe(self.path(name, "manifest.json"), msgspec.json.encode(changed))


def test_what_one_host_wrote_another_one_starts_from(uri: str, tmp_path: Path) -> None:
    first, second = Host(uri, tmp_path, "first"), Host(uri, tmp_path, "second")
    assert second.restore() is None
    assert not (second.folder / "n2o").exists()
    name = first.write(100)
    manifest = Stored(uri).manifest(name)
    assert (manifest.count, manifest.rows_offset, manifest.covered) == ([100, 0], [1, 1], [99, -1])
    assert {"CURRENT"} < set(manifest.files)
    assert second.restore() == name
    writer = second.writer()
    assert writer.progress().count.tolist() == [100, 0]
    assert writer.progress().filled.all()
    assert writer.rows_offsets().tolist() == [1, 1]
    second.rows = 100
    second.add(writer, 10)  # it goes on
    writer.close()
    assert second.ids() == expected(110)
    assert first.ids() == expected(100)
    assert sorted(path.name for path in second.folder.iterdir()) == ["bundle", "n2o"]
    assert sorted(path.name for path in first.folder.iterdir()) == ["bundle", "n2o"]


def test_an_index_that_is_too_old_is_replaced_while_readers_have_it_open(uri: str, tmp_path: Path) -> None:
    first, second = Host(uri, tmp_path, "first"), Host(uri, tmp_path, "second")
    second.write(10)
    arena = ArenaReader.open(second.folder / "n2o", LAYOUT)
    first.write(50)
    name = first.write(50)
    assert not arena.replaced()
    assert second.restore([2, 2]) == name
    assert arena.replaced()
    keys = keys_of(sorted(expected(10)), KEY)
    assert arena.gather(keys).found.all()  # as it was
    new = ArenaReader.open(second.folder / "n2o", LAYOUT)
    assert new.size().items == 100
    assert second.ids() == expected(100)


def test_each_host_keeps_its_newest_two(uri: str, tmp_path: Path) -> None:
    first, second = Host(uri, tmp_path, "a"), Host(uri, tmp_path, "b-a")  # a name that ends like the other's
    other = second.write(5)
    names = [first.write(5) for _ in range(4)]
    assert Stored(uri).names() == sorted([other, *names[-2:]])
    unfinished = first.write(5)
    Stored(uri).files.rm(Stored(uri).path(unfinished, "manifest.json"))
    newest = first.write(5)
    assert Stored(uri).names() == sorted([other, names[-1], newest])
    age = first.checkpoints.age_s()
    assert age is not None
    assert age < 60
    forget(first.settings, "one")
    forget(first.settings, "one")
    assert first.restore() is None
    assert first.checkpoints.age_s() is None


def _cut(store: Stored, name: str) -> None:
    largest = max(store.manifest(name).files.items(), key=lambda pair: pair[1].size)[0]
    raw = store.files.cat(store.path(name, largest))
    store.files.pipe(store.path(name, largest), raw[:-1])


def _flipped(store: Stored, name: str) -> None:
    largest = max(store.manifest(name).files.items(), key=lambda pair: pair[1].size)[0]
    raw = bytearray(store.files.cat(store.path(name, largest)))
    raw[len(raw) // 2] ^= 1
    store.files.pipe(store.path(name, largest), bytes(raw))


def _other_rows(store: Stored, name: str) -> None:
    """Files that are what the manifest says, of an index that is not: half of RocksDB's own manifest is gone."""
    folder = f"{store.root}/{name}"
    files = {file: store.files.cat(f"{folder}/{file}") for file in store.manifest(name).files}
    current = next(file for file in files if file.startswith("MANIFEST"))
    files[current] = files[current][: len(files[current]) // 2]
    for file, raw in files.items():
        store.files.pipe(f"{folder}/{file}", raw)
    marks = {file: checkpoints.File(len(raw), hashlib.sha256(raw).hexdigest()) for file, raw in files.items()}
    store.change(name, files=marks)


WRONG: dict[str, tuple[Callable[[Stored, str], object], str]] = {
    "unfinished": (lambda store, name: store.files.rm(store.path(name, "manifest.json")), "it is unfinished"),
    "no manifest": (
        lambda store, name: store.files.pipe(store.path(name, "manifest.json"), b'{"cluster"'),
        "its manifest cannot be read",
    ),
    "format": (lambda store, name: store.change(name, format=9), "it has format 9; this version reads 1"),
    "cluster": (lambda store, name: store.change(name, cluster="other"), "it is of another cluster"),
    "topics": (lambda store, name: store.change(name, prefix="q."), "it is of another cluster, or other topics"),
    "bundle": (lambda store, name: store.change(name, bundle="0" * 64), "it was made with another bundle"),
    "partitions": (lambda store, name: store.change(name, rows_offset=[1]), "it has 1 partitions, not 2"),
    "names": (
        lambda store, name: store.change(name, files={"../../x": checkpoints.File(1, "0")}),
        "its manifest names what is no file of RocksDB",
    ),
    "file gone": (lambda store, name: store.files.rm(store.path(name, "CURRENT")), "FileNotFoundError"),
    "file cut": (_cut, "is not the file that its manifest names"),
    "bit flipped": (_flipped, "is not the file that its manifest names"),
    "rows": (_other_rows, ""),  # RocksDB, or the count, says so
    "progress": (lambda store, name: store.change(name, count=[99, 0]), "its rows are not as far as its manifest says"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_broken_or_does_not_fit_is_passed_over_with_its_reason(
    uri: str, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The one before it is restored; without one, nothing is."""
    first, second = Host(uri, tmp_path, "first"), Host(uri, tmp_path, "second")
    good, bad = first.write(50), first.write(50)
    change, reason = WRONG[what]
    change(Stored(uri), bad)
    with caplog.at_level(logging.WARNING):
        assert second.restore() == good
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"checkpoint {bad} of one is passed over: ")
    assert reason in told
    assert second.ids() == expected(50)
    forgotten = Stored(uri)
    forgotten.files.rm(f"{forgotten.root}/{good}", recursive=True)
    shutil.rmtree(second.folder / "n2o")
    assert second.restore() is None
    assert sorted(path.name for path in second.folder.iterdir()) == ["bundle"]


def test_one_whose_next_blocks_are_gone_is_passed_over(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Host(uri, tmp_path, "first"), Host(uri, tmp_path, "second")
    first.write(50)
    with caplog.at_level(logging.WARNING):
        assert second.restore([0, 2]) is None
    assert "it continues at offset 1 of partition 1, which begins at 2 by now" in caplog.text
    assert second.restore([1, 1]) is not None


def test_rows_under_another_hash_key_or_layout_are_passed_over(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Host(uri, tmp_path, "first"), Host(uri, tmp_path, "second")
    first.write(5)
    with caplog.at_level(logging.WARNING):
        assert second.checkpoints.restore(STARTS, RowLayout(width=32)) is None
    assert "was made with another layout" in caplog.text


def test_an_unproven_index_is_not_copied_and_a_store_that_fails_is_said(uri: str, tmp_path: Path) -> None:
    host = Host(uri, tmp_path, "first")
    writer = host.writer()
    try:
        writer.apply([(block(1, [], -1), 0)])
        assert host.checkpoints.write(writer) is None
        host.add(writer, 5)
        (tmp_path / "no folder").write_text("a file")
        for nowhere in (f"file://{tmp_path}/no folder/x", "nosuchkind://x"):
            broken = Host(nowhere, tmp_path, f"host-{len(nowhere)}")
            with pytest.raises(CheckpointError, match="no checkpoint was written: "):
                broken.checkpoints.write(writer)
            assert broken.restore() is None
            assert not (broken.folder / "checkpoint").exists()
    finally:
        writer.close()


def test_it_is_written_beside_the_batches(uri: str, tmp_path: Path) -> None:
    """What is restored from each is a prefix of what was applied, and goes on."""
    host = Host(uri, tmp_path, "first")
    writer = host.writer()
    stop = threading.Event()

    def apply() -> None:
        while not stop.is_set():
            host.add(writer, 20)

    host.add(writer, 20)
    thread = threading.Thread(target=apply)
    thread.start()
    try:
        names = [host.checkpoints.write(writer) for _ in range(3)]
    finally:
        stop.set()
        thread.join()
        writer.close()
    second = Host(uri, tmp_path, "second")
    assert second.restore() == names[-1]
    found = len(second.ids())
    assert second.ids() == expected(found)
    assert 20 <= found <= host.rows
