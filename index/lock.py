"""Locks that the kernel gives back when their process ends, however it ends: one writer per store, and the folders that
are in use.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from index.errors import StoreLockedError, StoreMissingError


class WriterLock:
    """Held from construction to `release`. Raises StoreLockedError when another process holds it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise StoreLockedError(f"{folder} already has a writer") from error

    def release(self) -> None:
        os.close(self._file)


class UserLock:
    """Says that a folder is in use, from construction to `release`; any number may hold it. Raises StoreMissingError
    where there is no such folder or it is about to be deleted.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise StoreMissingError(f"there is no {folder}") from error
        try:
            fcntl.flock(self._folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._folder)
            raise StoreMissingError(f"{folder} is being deleted") from error

    def release(self) -> None:
        os.close(self._folder)


@contextmanager
def unused(folder: Path) -> Iterator[None]:
    """Keeps users out of a folder, which may be missing, in order to delete it. Raises StoreLockedError while one holds
    a UserLock.
    """
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreLockedError(f"{folder} is in use") from error
        yield
    finally:
        os.close(held)
