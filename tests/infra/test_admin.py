"""The admin token: made once, by whoever asks first, for one user's eyes."""

from __future__ import annotations

import multiprocessing
import stat
from pathlib import Path

import pytest

from infra.admin import admin_token
from infra.settings import Settings, SettingsError


def test_the_setting_counts_and_no_file_is_made(tmp_path: Path) -> None:
    settings = Settings(state=tmp_path / "state", admin_token="t0ken")
    assert admin_token(settings) == "t0ken"
    assert not settings.state.exists()


def test_processes_that_ask_at_once_agree(tmp_path: Path) -> None:
    settings = Settings(state=tmp_path / "state")
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        found = pool.map(admin_token, [settings] * 32, chunksize=1)
    assert set(found) == {admin_token(settings)}
    assert len(found[0]) >= 32
    assert stat.S_IMODE(settings.admin_token_file.stat().st_mode) == 0o600
    assert [path.name for path in settings.state.iterdir()] == ["admin_token"]


@pytest.mark.parametrize("text", ["", "\n", "two words"])
def test_a_file_without_a_token_lets_nobody_in(tmp_path: Path, text: str) -> None:
    (tmp_path / "admin_token").write_text(text)
    with pytest.raises(SettingsError, match="holds no token"):
        admin_token(Settings(state=tmp_path))
