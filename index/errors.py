"""What can go wrong with a store of this host, so that callers need to know only these."""

from __future__ import annotations


class StoreError(RuntimeError):
    """A store cannot be opened or used; the message is one sentence for the operator."""


class StoreLockedError(StoreError):
    """Another process is the writer of this store."""


class StoreMissingError(StoreError):
    """There is no store here (yet), or it is being rebuilt; trying again later is right."""


class N2OError(StoreError):
    """The N2O index of a generation contradicts itself; the generation must be filled anew."""


class HistoriesError(StoreError):
    """The histories store cannot be used."""
