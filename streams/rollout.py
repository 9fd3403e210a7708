"""The roll-out of generations on one host: a pure state machine, and the file in which the API reads its result.

Between the `models` topic and the API: the supervisor reduces `models` here, moves each generation through

    staged -> filling -> verifying -> complete -> active -> former
                                                         (any -> failed; any but active -> retiring -> retired;
                                                          filling .. complete -> staged where its jobs stop;
                                                          former -> staged where it is wished for without jobs)

and writes `serving.json`, whole and atomically. Readers see the old file or the new one, never a part. Knows no
Kafka and no Faust.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

import msgspec

from streams.events import ModelEvent

State = Literal["staged", "filling", "verifying", "complete", "active", "former", "failed", "retiring", "retired"]
FORMAT = 1
_RESTS = "is not kept fresh while nothing asks for it"
REMADE = "its rows are not all on this host, which is restoring them"
UNREADY: tuple[State, ...] = ("staged", "filling", "verifying")  # on the way to `complete`
GONE: tuple[State, ...] = ("retiring", "retired")  # what there is of it is being deleted, or is


class Refused(Exception):  # noqa: N818 - the outcome has a name of its own
    """A roll-out step that must not happen; the message says why in one sentence."""


class GenerationState(msgspec.Struct, frozen=True, kw_only=True):
    """One generation on this host. Lists have one entry per partition of `items`."""

    generation: str
    state: State
    offset: int  # of the stage event on `models`
    uri: str
    sha256: str
    reason: str = ""  # why it failed, or what it waits for
    staged_ends: list[int] = []  # end offsets of `items` taken at staging
    covered: list[int] = []
    progress: float = 0.0  # 0..1 of the offsets between nothing and `staged_ends`


class Canary(msgspec.Struct, frozen=True):
    """A generation that serves a share of the users, 0 <= share < 1, beside the one that serves the others. With a
    share of 0 it is a shadow: held ready, and scored beside what is served."""

    generation: str
    share: float


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """What this host serves. `decided`: first `models` offset whose event was not yet acted upon."""

    active: str | None = None
    previous: str | None = None
    next: str | None = None  # API processes load it, so that the switch to it finds it warm
    canary: Canary | None = None
    generations: dict[str, GenerationState] = {}
    decided: int = 0
    refused: dict[str, str] = {}  # offset of a refused `models` event -> reason
    format: int = FORMAT


class Verification(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What `python -m api verify` found of a generation: `verify.json` in its folder. None: could not be looked at, for
    the reason in `unsaid`.

    `verdict`: `again` where something other than the generation stood in the way.
    """

    verdict: Literal["yes", "no", "again"]
    reason: str = ""
    time: int = 0  # ms since the epoch
    rows: int = 0  # that this host has
    drawn: int = 0  # items of the topic that were looked up
    unencodable: int = 0  # of them without a row because the bundle cannot encode them
    compared: int = 0  # rows whose numbers were compared with the bundle run directly
    error: float = 0.0  # their largest deviation, as a share of what is allowed
    looked_at: int = 0  # rows whose numbers were checked to be finite
    norm: float | None = (
        None  # median length of `vector` over the active generation's, or `joint`'s where farther off 1
    )
    requests: int = 0  # recorded ones that both generations scored
    shift: float | None = None  # of the mean score, in standard deviations of the active generation's scores
    spread: float | None = None  # standard deviation of the scores over the active generation's
    overlap: float | None = None  # mean share of the best 100 that are the same
    unsaid: list[str] = []


class Shadow(msgspec.Struct, frozen=True, kw_only=True):
    """How far the scores of a generation that serves nobody are from those of the active one (`against`), by recorded
    requests: `shadow.json` in its folder. Figures as in `Verification`."""

    against: str
    time: int
    requests: int
    not_finite: int
    shift: float | None
    spread: float | None
    overlap: float | None


class Staged(msgspec.Struct, frozen=True):
    offset: int
    event: ModelEvent


class Desired(msgspec.Struct, frozen=True):
    """What `models` asks for in the end. `wishes`: (offset, generation) to activate, oldest first; the last one that is
    possible wins. `retired`: what no host may keep, but for one that still serves it. `canary` is never the newest
    wish."""

    staged: dict[str, Staged]
    wishes: list[tuple[int, str]]
    retired: set[str]
    refused: dict[int, str]
    canary: Canary | None = None


def bucket(generation: str, user_id: str) -> float:
    """Where a user stands among all for this canary, 0 <= bucket < 1: he is of a share that is greater. So those of a
    share are of every greater one too, on every host, and each canary has users of its own.
    """
    digest = hashlib.blake2b(user_id.encode(), digest_size=8, key=generation.encode()).digest()
    return (int.from_bytes(digest) >> 11) / 2**53  # as many bits as a float has


def reduce_models(events: Iterable[tuple[int, ModelEvent]]) -> Desired:
    """The final state that `models` asks for, by the log alone: all hosts agree on it, however far each of them is."""
    staged: dict[str, Staged] = {}
    wishes: list[tuple[int, str]] = []
    errors: dict[int, str] = {}
    retired: set[str] = set()
    canary: Canary | None = None
    for offset, event in events:
        name = event.generation
        if event.action == "stage":
            if name in retired:
                errors[offset] = f"generation {name} was retired; generation names are never used twice"
            elif name in staged and (staged[name].event.uri, staged[name].event.sha256) != (event.uri, event.sha256):
                errors[offset] = (
                    f"generation {name} was staged before with another bundle; generation names are never used twice"
                )
            else:
                staged.setdefault(name, Staged(offset, event))
                if event.activate_when_complete:
                    wishes.append((offset, name))
        elif name not in staged:
            errors[offset] = f"generation {name} was never staged"
        elif event.action == "activate":
            if name in retired:
                errors[offset] = f"generation {name} was retired"
            elif event.share is None or event.share == 1:
                wishes.append((offset, name))
            elif why := _alone([wished for _, wished in wishes], name):
                errors[offset] = why
            else:
                canary = Canary(name, event.share)
        elif event.action == "retire":
            if why := _kept([wished for _, wished in wishes], name):
                errors[offset] = why
            else:
                retired.add(name)
                wishes = [wish for wish in wishes if wish[1] != name]
                canary = _other(canary, name)
        else:
            others = [wish for wish in wishes if wish[1] != name]
            if len(others) == len(wishes) and _other(canary, name) is canary:
                errors[offset] = f"generation {name} was not to be served, so there is nothing to go back from"
            elif others:
                wishes, canary = others, _other(canary, name)
            else:
                errors[offset] = f"there is nothing to go back to from generation {name}"
        if wishes:
            canary = _other(canary, wishes[-1][1])  # it is to serve all
    return Desired(staged, wishes, retired, errors, canary)


def stage(serving: Serving, offset: int, event: ModelEvent) -> Serving:
    """Adds the generation as `staged`. Raises Refused where the name was used for another bundle."""
    known = serving.generations.get(event.generation)
    if known is not None:
        if known.sha256 != event.sha256:
            raise Refused(f"generation {event.generation} was staged before; generation names are never used twice")
        return serving
    new = GenerationState(
        generation=event.generation, state="staged", offset=offset, uri=event.uri or "", sha256=event.sha256 or ""
    )
    return _with(serving, new)


def wait(serving: Serving, generation: str, reason: str) -> Serving:
    """The same state, and what it waits for; only of those that are prepared, loaded or deleted."""
    known = _expect(serving, generation, ("staged", "complete", "former", "retiring", "retired"), "prepared")
    return _with(serving, msgspec.structs.replace(known, reason=reason))


def fill(serving: Serving, generation: str, staged_ends: list[int]) -> Serving:
    """staged -> filling, up to these end offsets of `items`."""
    known = _expect(serving, generation, ("staged",), "filled")
    return _with(serving, msgspec.structs.replace(known, state="filling", staged_ends=staged_ends, reason=""))


def advance(serving: Serving, generation: str, covered: list[int], filled: list[bool]) -> Serving:
    """Takes over `covered` and `filled` as the arena reports them; filling -> verifying when all partitions
    are there.
    """
    known = serving.generations[generation]
    ends = known.staged_ends
    done = [min(reached + 1, end) for reached, end in zip(covered, ends, strict=True)]
    share = sum(done) / sum(ends) if sum(ends) else float(all(filled))
    complete = all(filled) and done == ends
    state: State = "verifying" if complete and known.state == "filling" else known.state
    missing = sum(not proven for proven in filled)
    waits = (
        "" if complete else f"{missing} of {len(ends)} partitions are without a proven fill" if missing else "filling"
    )
    reason = waits if known.state == "filling" else known.reason
    return _with(serving, msgspec.structs.replace(known, state=state, covered=covered, progress=share, reason=reason))


def prepare(serving: Serving, generation: str | None) -> Serving:
    """Has API processes load it before it is served; None: nothing. Raises Refused where it is not complete."""
    if serving.next == generation:
        return serving
    out = serving
    left = serving.generations.get(serving.next or "")
    if left is not None and left.state in ("complete", "former") and left.reason != REMADE:
        out = _with(out, msgspec.structs.replace(left, reason=""))
    if generation is not None:
        _expect(serving, generation, ("complete", "former"), "loaded")
    return msgspec.structs.replace(out, next=generation)


def whole(known: GenerationState, covered: list[int], filled: list[bool]) -> bool:
    """Whether the rows are proven, and as far as they had to be."""
    return all(filled) and all(reached + 1 >= end for reached, end in zip(covered, known.staged_ends, strict=True))


def lose(serving: Serving, generation: str, ends: list[int]) -> Serving:
    """Its rows are not whole any more, and have to reach these end offsets of `items`: it is filled again, and, where
    it is served or a rollback would go to it, says why it is not ready.
    """
    known = serving.generations[generation]
    if known.state in ("active", "former"):
        return _with(serving, msgspec.structs.replace(known, staged_ends=ends, reason=REMADE))
    lost = msgspec.structs.replace(known, state="filling", staged_ends=ends, progress=0.0)
    return _without(_with(serving, lost), generation)


def regain(serving: Serving, generation: str) -> Serving:
    """Its rows are whole again."""
    return _with(serving, msgspec.structs.replace(serving.generations[generation], reason=""))


def verified(serving: Serving, generation: str, found: Verification) -> Serving:
    """verifying -> complete or failed, by the verdict."""
    known = _expect(serving, generation, ("verifying",), "judged")
    if found.verdict == "no":
        return fail(serving, generation, found.reason)
    state: State = "complete" if found.verdict == "yes" else "verifying"
    return _with(serving, msgspec.structs.replace(known, state=state, reason=found.reason))


def activate(serving: Serving, generation: str) -> Serving:
    """Makes it the served generation; the one before becomes `former`. Raises Refused where it is not complete."""
    if serving.active == generation:
        return serving
    known = _expect(serving, generation, ("complete", "former"), "activated")
    if aged(serving, generation):
        raise Refused(f"generation {generation} is former and {_RESTS}")
    if known.reason == REMADE:
        raise Refused(f"generation {generation} is not ready: {REMADE}")
    out = _with(serving, msgspec.structs.replace(known, state="active", reason=""))
    if serving.active is not None:
        out = _with(out, msgspec.structs.replace(out.generations[serving.active], state="former"))
    canary = _other(serving.canary, generation)
    return msgspec.structs.replace(out, active=generation, previous=serving.active, next=None, canary=canary)


def canary_of(desired: Desired, serving: Serving) -> Canary | None:
    """What this host should serve a share of the users from. One that is to serve all does so until it does."""
    wish, held = desired.canary, serving.canary
    if wish is None and held is not None and held.generation == pending(desired, serving):
        return held
    known = serving.generations.get(wish.generation) if wish is not None else None
    if known is None or serving.active in (None, known.generation) or not _possible(serving, known):
        return None
    return wish


def fail(serving: Serving, generation: str, reason: str) -> Serving:
    """Any state but active -> failed. The active generation keeps serving; only its reason is recorded."""
    known = serving.generations[generation]
    state: State = "active" if known.state == "active" else "failed"
    return _without(_with(serving, msgspec.structs.replace(known, state=state, reason=reason)), generation)


def retire(serving: Serving, generation: str) -> Serving:
    """Any state but active -> retiring: it has no jobs any more, and API processes drop it. Raises Refused."""
    known = serving.generations[generation]
    if known.state == "active":
        raise Refused(f"generation {generation} is served and cannot be retired")
    out = _without(_with(serving, msgspec.structs.replace(known, state="retiring", reason="")), generation)
    previous = None if serving.previous == generation else serving.previous
    return msgspec.structs.replace(out, previous=previous)


def retired(serving: Serving, generation: str) -> Serving:
    """retiring -> retired: this host keeps nothing of it but its name."""
    known = _expect(serving, generation, ("retiring",), "called retired")
    return _with(serving, msgspec.structs.replace(known, state="retired", reason=""))


def retiring(desired: Desired, serving: Serving) -> list[str]:
    """Generations that this host still has to retire. One that it serves waits until another one is ready here."""
    return [
        name
        for name, known in serving.generations.items()
        if name in desired.retired and known.state not in ("active", "retired")
    ]


def kept(desired: Desired, serving: Serving, generation: str) -> str:
    """Why this host cannot do without the generation: it is served, or a rollback would go to it; empty: it can."""
    known = (serving.generations.get(name) for _, name in desired.wishes if name != serving.active)
    ready = [one.generation for one in known if one is not None and one.state in ("complete", "former")]
    return _kept([*ready, serving.active] if serving.active is not None else ready, generation)


def spent(serving: Serving, generation: str) -> str:
    """Why staging the generation's bundle again is no use on this host; empty: it is not known here, or goes on."""
    why = _failure(serving, generation)
    return f"generation {generation} is failed here ({why}): stage the bundle under a new name" if why else ""


def never(serving: Serving, generation: str) -> str:
    """Why this host will never serve the generation, whatever is waited for; empty: it does, or may."""
    why = _failure(serving, generation)
    return f"generation {generation} is failed ({why}) and cannot be activated" if why else ""


def stuck(desired: Desired, serving: Serving, generation: str) -> str:
    """Why this host goes on serving the generation although it is wished for no longer: nothing else can be; empty: it
    does not.
    """
    whys = [never(serving, name) for _, name in desired.wishes]
    return whys[-1] if serving.active == generation and whys and all(whys) else ""


def aged(serving: Serving, generation: str) -> bool:
    """Whether it was served once and has had no jobs since, so that it has to be filled up before it is again."""
    known = serving.generations.get(generation)
    return known is not None and known.state == "former" and generation not in _fresh(serving)


def try_again(serving: Serving) -> Serving:
    """Forgets why the active generation is no longer kept fresh: its jobs start anew, and say it again if need be."""
    if serving.active is None or serving.generations[serving.active].reason == REMADE:
        return serving
    return _with(serving, msgspec.structs.replace(serving.generations[serving.active], reason=""))


def wanted(desired: Desired, serving: Serving) -> list[str]:
    """Staged generations that this host does not know yet and needs: those later than the active one and those that
    something waits for, or, where none is active, those from the newest wish on that has not failed."""
    failed = {name for name, known in serving.generations.items() if known.state == "failed"}
    if serving.active is not None:
        since = serving.generations[serving.active].offset + 1
    else:
        hopes = [desired.staged[name].offset for _, name in desired.wishes if name not in failed]
        since = hopes[-1] if hopes else 0
    waits = waiting(desired, serving)
    return [
        name
        for name, found in desired.staged.items()
        if (found.offset >= since or name in waits) and name not in serving.generations and name not in desired.retired
    ]


def next_active(desired: Desired, serving: Serving) -> str | None:
    """The generation to activate now: that of the newest wish which is possible, if it is not active already."""
    for _, name in reversed(desired.wishes):
        if name == serving.active:
            return None
        known = serving.generations.get(name)
        if known and _possible(serving, known):
            return name
    return None


def pending(desired: Desired, serving: Serving) -> str | None:
    """The generation of the newest wish that can still come true, complete or not; None where that one is active."""
    for _, name in reversed(desired.wishes):
        if name == serving.active:
            return None
        known = serving.generations.get(name)
        if known is None or known.state in UNREADY or _possible(serving, known) or aged(serving, name):
            return name
    return None


def waiting(desired: Desired, serving: Serving) -> list[str]:
    """What has to be kept fresh for the sake of a wish: the pending generation and the canary."""
    canary = desired.canary.generation if desired.canary is not None else None
    return [name for name in (pending(desired, serving), canary) if name is not None]


def renew(desired: Desired, serving: Serving) -> Serving:
    """former -> staged, of those that something waits for and that have had no jobs: they are filled up again."""
    for name in waiting(desired, serving):
        if aged(serving, name):
            known = msgspec.structs.replace(serving.generations[name], state="staged", reason=_RESTS)
            serving = _with(serving, known)
    return serving


def running(serving: Serving, waits: Collection[str] = ()) -> list[str]:
    """Generations that need jobs: the active one, one former, the canary, those staged later than the active one, and
    those that something `waits` for.
    """
    since = serving.generations[serving.active].offset if serving.active else -1
    served = {serving.active, serving.previous, serving.canary.generation if serving.canary else None}
    return [
        name
        for name, known in serving.generations.items()
        if name in served or (known.state in (*UNREADY, "complete") and (known.offset > since or name in waits))
    ]


def rest(serving: Serving, running: Collection[str]) -> Serving:
    """-> staged, of those without jobs: their rows age, so whoever is wanted later fills up first."""
    for name, known in serving.generations.items():
        if known.state in (*UNREADY, "complete") and name not in running:
            serving = _with(serving, msgspec.structs.replace(known, state="staged", reason=_RESTS))
    return serving


def read(path: Path) -> Serving:
    """The file's content; an empty Serving where there is no file. Raises Refused on one of another format."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Serving)
    except FileNotFoundError:
        return Serving()
    except msgspec.DecodeError as error:
        raise Refused(f"{path} is not a serving file: {error}") from None
    if found.format != FORMAT:
        raise Refused(f"{path} has format {found.format}; this version reads {FORMAT}")
    return found


def read_verification(path: Path) -> Verification | None:
    """None where there is none yet."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Verification)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        return Verification(verdict="again", reason=f"{path} is no verification: {error}")


def read_shadow(path: Path) -> Shadow | None:
    """None where there is none that can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Shadow)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def write_beside(path: Path, found: Verification | Shadow) -> None:
    """Replaces the file in one step."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    new.replace(path)


def write(path: Path, serving: Serving) -> None:
    """Replaces the file in one step, on disk before the step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(serving), indent=1))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _possible(serving: Serving, known: GenerationState) -> bool:
    """Whether it can be activated now: its rows are all there, and kept fresh."""
    if known.state == "former":
        return not aged(serving, known.generation) and known.reason != REMADE
    return known.state == "complete"


def _failure(serving: Serving, generation: str) -> str:
    """Why it has failed here; empty: it has not."""
    known = serving.generations.get(generation)
    return known.reason if known is not None and known.state == "failed" else ""


def _fresh(serving: Serving) -> set[str | None]:
    """Which former generations still have jobs."""
    return {serving.previous, serving.canary.generation if serving.canary else None}


def _other(canary: Canary | None, generation: str) -> Canary | None:
    """The canary, unless it is this generation."""
    return None if canary is not None and canary.generation == generation else canary


def _alone(wished: list[str], generation: str) -> str:
    """Why the generation cannot serve a share, by what was wished for (oldest first); empty: it can."""
    if not wished:
        return f"there is no generation beside which {generation} could serve a share"
    if wished[-1] == generation:
        return f"generation {generation} is the one that serves all; activate another one before it serves a share"
    return ""


def _kept(wished: list[str], generation: str) -> str:
    """Why the generation must not be retired, by what was wished for (oldest first); empty: it may be."""
    newest = wished[-1] if wished else ""
    if generation == newest:
        return f"generation {generation} is the one to be served; activate another one before it is retired"
    if generation == next((name for name in reversed(wished) if name != newest), None):
        what = f"generation {generation} is the one that a rollback from {newest} would go to"
        return f"{what}; activate another one, or roll back from {generation}, before it is retired"
    return ""


def _without(serving: Serving, generation: str) -> Serving:
    """It is neither to be loaded nor to serve a share."""
    next_one = None if serving.next == generation else serving.next
    return msgspec.structs.replace(serving, next=next_one, canary=_other(serving.canary, generation))


def _with(serving: Serving, generation: GenerationState) -> Serving:
    return msgspec.structs.replace(serving, generations={**serving.generations, generation.generation: generation})


def _expect(serving: Serving, generation: str, states: tuple[State, ...], done: str) -> GenerationState:
    known = serving.generations.get(generation)
    if known is None:
        raise Refused(f"generation {generation} is not staged on this host")
    if known.state not in states:
        why = f" ({known.reason})" if known.reason else ""
        raise Refused(f"generation {generation} is {known.state}{why} and cannot be {done}")
    return known
