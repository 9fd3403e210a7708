"""A generation's bundle on this host: fetched once, checked, and never changed again.

Between a stage event and the first job of the generation. Looks at files only and needs no torch: encode loads the
model and checks every tensor; what is checked here is that the bytes are those that the event named.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from index.layout import LayoutError, RowLayout

MANIFEST, TENSORS = "manifest.json", "model.safetensors"
_MANIFEST_BYTES = 256 << 20
_TENSORS_BYTES = 16 << 30


class BundleFileError(Exception):
    """The bundle cannot be had or is not the one that was named; the message is one sentence."""


def fetch(uri: str, sha256: str, target: Path) -> None:
    """Copies the bundle at `uri` (file://) to `target`, which appears whole or not at all. Raises BundleFileError."""
    if target.exists():
        if _hash(target / MANIFEST) != sha256:
            raise BundleFileError(f"{target} holds another bundle; generation names are never used twice")
        return
    source = _folder_of(uri)
    _check(source, sha256)
    new = target.with_name(target.name + ".new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for name in (MANIFEST, TENSORS):
            shutil.copyfile(source / name, new / name)
        _check(new, sha256)  # the copy: the source may have changed meanwhile
        new.rename(target)
    except OSError as error:
        raise BundleFileError(f"the bundle {uri} could not be copied: {error}") from error


def ahead(uri: str, target: Path) -> tuple[RowLayout, int]:
    """Layout of the rows, and the bytes that `fetch` would copy, from the manifest alone. Raises BundleFileError."""
    if target.exists():
        return layout_of(target), 0
    source = _folder_of(uri)
    try:
        return layout_of(source), sum((source / name).stat().st_size for name in (MANIFEST, TENSORS))
    except OSError as error:
        raise BundleFileError(f"{source} cannot be read: {error.strerror}") from error


def layout_of(bundle: Path) -> RowLayout:
    """Layout of the rows that this bundle makes. Raises BundleFileError."""
    try:
        return RowLayout.from_json(_manifest(bundle)["row"])
    except (LayoutError, TypeError, KeyError) as error:
        raise BundleFileError(f"{bundle / MANIFEST} does not describe rows: {error}") from error


def checked_hash(bundle: Path) -> str:
    """SHA-256 of `manifest.json`, which a stage event carries. Raises BundleFileError on a bundle that `fetch` or
    `layout_of` would refuse.
    """
    layout_of(bundle)
    found = _hash(bundle / MANIFEST)
    _check(bundle, found)
    return found


def _check(bundle: Path, sha256: str) -> None:
    found = _hash(bundle / MANIFEST)
    if found != sha256:
        raise BundleFileError(f"{MANIFEST} has SHA-256 {found[:12]}..., the event names {sha256[:12]}...")
    try:
        named = str(_manifest(bundle)["tensors"]["sha256"])
    except (KeyError, TypeError):
        raise BundleFileError(f"{MANIFEST} does not name the SHA-256 of {TENSORS}") from None
    if _hash(bundle / TENSORS) != named:
        raise BundleFileError(f"{TENSORS} is not the file that {MANIFEST} names")


def _folder_of(uri: str) -> Path:
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise BundleFileError(f"only file:// addresses of this host are supported, not {uri}")
    folder = Path(unquote(parts.path))
    if not folder.is_dir():
        raise BundleFileError(f"there is no bundle at {uri}")
    return folder


def _manifest(bundle: Path) -> dict[str, Any]:
    try:
        if (bundle / MANIFEST).stat().st_size > _MANIFEST_BYTES:
            raise BundleFileError(f"{bundle / MANIFEST} is too large for a manifest")
        found = json.loads((bundle / MANIFEST).read_bytes())
    except OSError as error:
        raise BundleFileError(f"{bundle / MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BundleFileError(f"{bundle / MANIFEST} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise BundleFileError(f"{bundle / MANIFEST} is not a JSON object")
    return found


def _hash(path: Path) -> str:
    try:
        if path.stat().st_size > _TENSORS_BYTES:
            raise BundleFileError(f"{path} is too large")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleFileError(f"{path} cannot be read: {error.strerror}") from error
