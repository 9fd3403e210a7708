"""A process of our own that is killed after a numbered step of what it does, and no later."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

DEADLINE_S = 150.0


def killed_at(last: int) -> Callable[[int], None]:
    """A `step(number)` that kills its process after step `last`."""

    def step(number: int) -> None:
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)

    return step


def until_killed(work: Callable[..., object], *arguments: Any) -> None:
    """Runs `work` in a new process, which has to end by SIGKILL."""
    child = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    child.start()
    try:
        child.join(DEADLINE_S)
        assert child.exitcode == -signal.SIGKILL, f"{work.__name__}{arguments} ended with {child.exitcode}"
    finally:
        child.kill()
        child.join()
