"""The token of those who may change what is served: what a caller of the roll-out's HTTP routes has to bear.

It is the setting `admin_token`; where there is none it is made once per host and kept in the state folder, where the
user who runs the host, and nobody else, can read it.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from infra.settings import Settings, SettingsError, is_token, variable


def admin_token(settings: Settings) -> str:
    """The token; made by whichever process asks first. Raises SettingsError where the file holds none, or OSError."""
    if settings.admin_token:
        return settings.admin_token
    path = settings.admin_token_file
    if not path.exists():
        _make(path)
    token = path.read_text().strip()
    if not is_token(token):
        raise SettingsError(f"{path} holds no token: delete it, or set {variable('admin_token')}.")
    return token


def _make(path: Path) -> None:
    """Whole or not at all, and never in the stead of one that another process has made meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    file = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(file, "w") as text:
            text.write(secrets.token_urlsafe(32) + "\n")
            text.flush()
            os.fsync(text.fileno())
        with suppress(FileExistsError):
            path.hardlink_to(own)
    finally:
        own.unlink()
