"""The streams' bundle, here too."""

from tests.streams.conftest import bundle, bundle_path

__all__ = ["bundle", "bundle_path"]
