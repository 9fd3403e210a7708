"""Folders that are in use: any number of users, or somebody who deletes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from index.errors import StoreLockedError, StoreMissingError
from index.lock import UserLock, unused


def test_a_folder_in_use_is_not_deleted(tmp_path: Path) -> None:
    users = [UserLock(tmp_path), UserLock(tmp_path)]
    for user in users:
        with pytest.raises(StoreLockedError, match="is in use"), unused(tmp_path):
            pass
        user.release()
    with unused(tmp_path), pytest.raises(StoreMissingError, match="is being deleted"):
        UserLock(tmp_path)
    UserLock(tmp_path).release()


def test_a_folder_that_is_not_there_has_no_users(tmp_path: Path) -> None:
    with pytest.raises(StoreMissingError, match="there is no"):
        UserLock(tmp_path / "nowhere")
    with unused(tmp_path / "nowhere"):
        pass


def test_what_fails_while_a_folder_is_deleted_is_not_mistaken_for_a_user(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), unused(tmp_path):
        raise BlockingIOError
    UserLock(tmp_path).release()


def test_a_killed_process_uses_nothing_any_more(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from index.lock import UserLock; UserLock(Path({str(tmp_path)!r}))"
    command = [sys.executable, "-c", f"{code}; print('held', flush=True); import signal; signal.pause()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "held\n"
        with pytest.raises(StoreLockedError), unused(tmp_path):
            pass
        user.send_signal(signal.SIGKILL)
        user.wait(10)
    with unused(tmp_path):
        pass
