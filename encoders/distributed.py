"""Several processes that train one model together, each on its share of every batch (`torchrun -m encoders train`).

Guarantees: the gradient that all processes step with is that of the whole batch, as one process would compute it (but
for what a model takes from a batch itself: IntTower's contrastive negatives and the scale of learned signatures are
those of a process' share, and every process drops bridges of its own); all processes decide alike, because they see the
same numbers; a process that ends takes the others with it (`PeerError`),
at once where its connection closes, after `timeout_s` where it hangs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from encoders.batches import Groups

TIMEOUT_S = 600.0  # the others wait in it while the first validates


class PeerError(Exception):
    """Another process of this training does not answer; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Peers:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Does this process report, validate and write?"""
        return self.rank == 0

    def share(self, groups: Groups) -> Groups:
        """This process' part of a batch; may be empty."""
        return groups.select(np.arange(self.rank, len(groups), self.world))

    def add_up(self, weights: Sequence[nn.Parameter], numbers: Sequence[float]) -> list[float]:
        """Replace the weights' gradients by their sums over all processes, and give the sums of the numbers.

        A weight without gradient in every process has none afterwards. Raises PeerError.
        """
        if self.world == 1:
            return list(numbers)
        present = torch.tensor([float(weight.grad is not None) for weight in weights])
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        flat = torch.cat([torch.tensor(numbers, dtype=torch.float32), present, *(part.flatten() for part in gradients)])
        with _answered():
            torch.distributed.all_reduce(flat)
        sums, present, *parts = torch.split(flat, [len(numbers), len(weights), *(part.numel() for part in gradients)])
        for weight, there, part in zip(weights, present, parts, strict=True):
            weight.grad = part.view_as(weight) if there > 0 else None
        return [float(value) for value in sums]

    def agree(self, numbers: Sequence[float]) -> list[float]:
        """The numbers of the first process, in all. Raises PeerError."""
        if self.world == 1:
            return list(numbers)
        shared: Tensor = torch.tensor(numbers, dtype=torch.float64)
        with _answered():
            torch.distributed.broadcast(shared, src=0)
        return [float(value) for value in shared]


ALONE = Peers()


@contextlib.contextmanager
def peers(environ: Mapping[str, str] = os.environ, timeout_s: float = TIMEOUT_S) -> Iterator[Peers]:
    """Join the processes that torchrun started, over gloo; `ALONE` without torchrun. Raises PeerError.

    After a PeerError gloo is not taken apart, because that may abort the process; the caller ends it with `os._exit`.
    """
    if int(environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    with _answered():
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))
    lost = False
    try:
        yield Peers(torch.distributed.get_rank(), torch.distributed.get_world_size())
    except PeerError:
        lost = True
        raise
    finally:
        if not lost:
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's connection errors and timeouts are of no type of their own
        raise PeerError("another process of this training ended or does not answer, so this one stops") from error
