"""What /v1/generations says: the supervisor's view of the host's generations beside what this process has open."""

from __future__ import annotations

from api.generations import Generations
from api.retrieval import arena_of
from api.schemas import CanaryStatus, GenerationStatus
from api.schemas import Generations as Report
from index.arena import ArenaReader
from index.errors import StoreError
from index.layout import LayoutError
from infra.settings import Settings
from streams.heartbeat import read_heartbeat
from streams.rollout import GenerationState


def generations_of(settings: Settings, generations: Generations) -> Report:
    """All generations that the supervisor knows, the newest first."""
    serving, active = generations.serving, generations.active
    states = sorted(serving.generations.values(), key=lambda state: -state.offset)
    return Report(
        active=active.name if active else None,
        previous=serving.previous,
        next=serving.next,
        canary=CanaryStatus(serving.canary.generation, serving.canary.share) if serving.canary else None,
        ready=active is not None and not generations.stale,
        reason=generations.reason,
        generations=[_status(settings, generations, state) for state in states],
    )


def _status(settings: Settings, generations: Generations, state: GenerationState) -> GenerationStatus:
    active, view = generations.active, generations.retrieval
    name = state.generation
    held = generations.loaded(name)
    arena = held.arena if held is not None else _arena(settings, name)
    out = GenerationStatus(
        name=name,
        state=state.state,
        reason=state.reason,
        loaded=held is not None,
        completeness=state.progress,
        covered=state.covered,
    )
    beat = read_heartbeat(settings.heartbeat_dir, f"encode-{name}")
    if beat is not None and beat.state != "stopped":
        out.rate, out.lag = beat.rate, beat.lag
        if state.state == "filling" and beat.rate >= 1:
            out.eta_s = round(beat.lag / beat.rate, 1)
    if arena is not None:
        progress, size = arena.progress(), arena.size()
        out.rows = int(progress.count.sum())
        out.covered = progress.covered.tolist()
        out.arena_bytes = size.hot_bytes + size.cold_bytes + size.table_bytes
    if active is not None and active.name == name:
        out.last_change = generations.last_change
    if view is not None and view.generation == name:
        out.retrieval_built, out.retrieval_items = view.built, len(view.keys)
    return out


def _arena(settings: Settings, generation: str) -> ArenaReader | None:
    """The arena of a generation that this process does not serve."""
    try:
        return arena_of(settings, generation)
    except (OSError, LayoutError, StoreError):
        return None
