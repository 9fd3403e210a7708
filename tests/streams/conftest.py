"""One small bundle for all tests of the streams."""

from __future__ import annotations

import pytest

from encoders.bundle import Bundle, load_bundle
from tests.streams.chain import make_bundle


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    make_bundle(path)
    return path


@pytest.fixture(scope="session")
def bundle(bundle_path) -> Bundle:  # type: ignore[no-untyped-def]
    return load_bundle(bundle_path)
