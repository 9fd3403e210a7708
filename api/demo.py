"""`python -m api demo`: the whole path on a catalogue, with commands and HTTP alone, said step by step.

What is there already is used again: a bundle, exported data, published events, a running broker, jobs and API. With a
data set of its own (DATA=folder) the stack has topics and state of its own, so that two catalogues never mix.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from api.stack import Stack, StackError, stack_of
from infra import processes, running
from infra.processes import ProcessError
from infra.settings import Settings

SYNTHETIC = "synthetic"
_FILL_S = 600.0
_VISIBLE_MS = 10_000  # as long as one may wait
_SHOWN = 10


class DemoError(RuntimeError):
    """A step did not give what it should; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The exported data set: what to publish, and whom to ask for."""

    folder: Path
    items: int
    users: int
    behaviours: int
    newest: str  # id of an item that is in the catalogue to the end
    user: str  # of the last behaviour
    seen: int  # that user's behaviours
    as_of: str  # time of the last behaviour: the moment the demo looks at


class Steps:
    """Numbered lines with what was done and how long it took; while a step runs, a terminal shows what is going on."""

    def __init__(self) -> None:
        self._count = 0
        self._terminal = sys.stdout.isatty()

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        self._count += 1
        step = Step(f"  {self._count:>2}  {name:<12}", self._terminal)
        began = time.perf_counter()
        step.now("...")
        yield step
        took = time.perf_counter() - began
        step.end(f"{took:6.1f} s" if took >= 0.05 else "")


@dataclasses.dataclass
class Step:
    head: str
    terminal: bool
    said: str = ""

    def now(self, text: str) -> None:
        """What is going on; only a terminal shows it."""
        if self.terminal:
            print(f"\r\x1b[K{self.head}{text}", end="", flush=True)

    def end(self, took: str) -> None:
        print("\r\x1b[K" * self.terminal + f"{self.head}{self.said:<72}{took}".rstrip(), flush=True)


def run(settings: Settings, data: str) -> int:
    """The exit status; what cannot work is said in one sentence on stderr."""
    try:
        _demo(settings, data or SYNTHETIC)
    except (StackError, ProcessError, DemoError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except httpx.HTTPError as error:
        print(f"\nThe API did not answer: {error or type(error).__name__}.", file=sys.stderr)
        return 1
    return 0


def _demo(settings: Settings, data: str) -> None:
    if data != SYNTHETIC and not Path(data).is_dir():
        raise DemoError(f"DATA={data} is not a folder.")
    if data != SYNTHETIC:
        _check_form(Path(data))
    name = "market" if data == SYNTHETIC else _slug(Path(data))
    stack = _switched(settings, data, name)
    stack.check_port()
    steps, work = Steps(), settings.state / "demo" / name
    print(f"\nForerank on {'a synthetic marketplace' if data == SYNTHETIC else data}\n")

    with stack.undone_on_failure():
        with steps.step("Kafka") as step:
            step.said = "started" if stack.broker_up() else "is running"
            stack.topics_up()
            step.said = f"{stack.settings.kafka_bootstrap} {step.said}; the topics are there"
        with steps.step("data") as step:
            catalogue = _catalogue(stack, data, work)
            step.said = f"{catalogue.items:,} items, {catalogue.users:,} users, {catalogue.behaviours:,} behaviours"
        with steps.step("model") as step:
            bundle, trained = _bundle(stack, data, work, step)
            generation = f"{name}-{hashlib.sha256((bundle / 'manifest.json').read_bytes()).hexdigest()[:8]}"
            step.said = f"generation {generation}, {'trained' if trained else 'trained before'}"
        with steps.step("jobs") as step:
            running.remember(stack.folder, stack.settings)
            step.said = "ingest, histories and supervisor " + ("started" if stack.jobs_up() else "are running")
        with steps.step("API") as step:
            step.said = f"{stack.url} " + ("started" if stack.api_up() else "is running")
            stack.jobs_ready()

    with httpx.Client(base_url=stack.url, timeout=30.0) as client:
        with steps.step("events") as step:
            step.said = _publish(stack, client, catalogue, generation, step)
        with steps.step("generation") as step:
            step.said = _activate(stack, client, bundle, generation, step)
        with steps.step("ready") as step:
            _wait_for_user(stack, client, catalogue, step)
            step.said = f"user {catalogue.user} with {catalogue.seen:,} behaviours, retrieval index"
        best = _recommend(client, catalogue)
        _score(client, catalogue, best)
        _change(client, catalogue, best)
    print(
        f"\nThe stack keeps running. Look at {stack.url}/#user={catalogue.user}&as_of={catalogue.as_of} (console) and "
        f"{stack.url}/docs (API).\nLogs are in {stack.folder}; `make down` stops it, `make demo` goes on from here."
    )


# ---- steps


def _check_form(folder: Path) -> None:
    """Before anything is stopped or started for it: whether it looks like a data set."""
    from encoders.data.dataset import DataError
    from encoders.data.movielens import check_form

    try:
        check_form(folder)
    except DataError as error:
        raise DemoError(f"DATA={folder} is not a data set in MovieLens' form: {error}.") from error


def _switched(settings: Settings, data: str, name: str) -> Stack:
    """The stack for this data set; one that runs for another is stopped first."""
    own = settings
    if data != SYNTHETIC:
        own = dataclasses.replace(
            settings, topic_prefix=f"{settings.topic_prefix}{name}.", state=settings.state / "demo" / name / "state"
        )
    wanted, other = Stack(own, running.folder_of(settings)), stack_of(settings)
    if other.settings.topic_prefix != own.topic_prefix and processes.listing(other.folder):
        print("Stopping the stack of another data set; its data stay.")
        for name_ in ("api", "supervise"):
            process = processes.find(name_, other.folder)
            if process is not None:
                processes.stop(process, 30.0)
        running.forget(other.folder)
    return wanted


def _catalogue(stack: Stack, data: str, work: Path) -> Catalogue:
    """Exports the data set unless that was done, and looks through it once."""
    summary = work / "catalogue.json"
    if not summary.exists():
        stack.command("encoders", "export-data", "--data", data, "--out", str(work / "data"))
        summary.write_text(json.dumps(_summary(work / "data")))
    return Catalogue(folder=work / "data", **json.loads(summary.read_text()))


def _summary(folder: Path) -> dict[str, Any]:
    alive: dict[str, bool] = {}
    for event in _lines(folder / "items.jsonl"):
        alive[event["item_id"]] = not event.get("deleted", False)
    seen: dict[str, int] = {}
    last: dict[str, Any] = {}
    for last in _lines(folder / "behaviours.jsonl"):
        seen[last["user_id"]] = seen.get(last["user_id"], 0) + 1
    return {
        "items": len(alive),
        "users": sum(1 for _ in _lines(folder / "users.jsonl")),
        "behaviours": sum(seen.values()),
        "newest": deque((name for name, there in alive.items() if there), maxlen=1)[0],
        "user": last["user_id"],
        "seen": seen[last["user_id"]],
        "as_of": last["event_time"],
    }


def _bundle(stack: Stack, data: str, work: Path, step: Step) -> tuple[Path, bool]:
    bundle = work / "bundle"
    if (bundle / "manifest.json").exists():
        return bundle, False
    step.now("training takes about a minute\n")
    stack.command("encoders", "train", "--data", data, "--out", str(bundle), "--minutes", "1", quiet=not step.terminal)
    return bundle, True


def _publish(stack: Stack, client: httpx.Client, catalogue: Catalogue, generation: str, step: Step) -> str:
    """Items, users and behaviours, unless the broker and this host have them."""
    if _is_published(client, catalogue, generation):
        return "published before"
    counts = []
    for kind in ("items", "users", "behaviours"):
        step.now(f"publishing {kind}\n")
        said = stack.command(
            "streams", "publish", kind, str(catalogue.folder / f"{kind}.jsonl"), quiet=not step.terminal
        )
        counts.append(f"{int(said.split()[0]):,} {kind}")
    return f"published {', '.join(counts)}"


def _is_published(client: httpx.Client, catalogue: Catalogue, generation: str) -> bool:
    known = {one["name"]: one["state"] for one in client.get("/v1/generations").json()["generations"]}
    if known.get(generation) != "active":
        return False
    found = client.get(f"/v1/items/{catalogue.newest}", params={"include": "event"})
    return found.is_success and found.json().get("event") is not None


def _activate(stack: Stack, client: httpx.Client, bundle: Path, generation: str, step: Step) -> str:
    """Stages the bundle unless that was done, and waits until it is served."""
    began = time.perf_counter()

    def known() -> dict[str, Any]:
        named = {one["name"]: one for one in client.get("/v1/generations").json()["generations"]}
        return dict(named.get(generation, {}))

    if not known():
        stack.command("streams", "model", "stage", str(bundle), "--generation", generation, "--activate-when-complete")

    def served() -> bool:
        status = known()
        if status.get("state") == "failed":
            raise DemoError(f"Generation {generation} has failed: {status['reason']}.")
        if status:
            step.now(f"{status['state']}, {100 * status['completeness']:.0f} % of the index")
        return bool(client.get("/v1/generations").json()["active"] == generation)

    stack.wait_for(served, _FILL_S, f"generation {generation} is active")
    took = time.perf_counter() - began
    return f"{known()['rows']:,} rows complete and active" + (f" {took:.1f} s after its event" if took > 1 else "")


def _wait_for_user(stack: Stack, client: httpx.Client, catalogue: Catalogue, step: Step) -> None:
    wanted = min(catalogue.seen, stack.settings.history_length)

    def there() -> bool:
        answer = client.post("/v1/recommend", json=_query(catalogue) | {"k": 1, "include": ["trace"]})
        if answer.status_code == 503:
            step.now(answer.json()["detail"])
            return False
        user = _checked(answer)["user"]
        count = user["behaviours_used"] + user["behaviours_without_row"]
        step.now(f"{count:,} of {wanted:,} behaviours")
        return bool(count >= wanted)

    stack.wait_for(there, _FILL_S, "the user's history is complete")


def _recommend(client: httpx.Client, catalogue: Catalogue) -> list[str]:
    """Prints the best items; returns their ids."""
    body = _query(catalogue) | {"k": _SHOWN, "exclude_seen": True, "include": ["attributes"]}
    _checked(client.post("/v1/recommend", json=body))  # the first request of a process pays for caches
    answer = _checked(client.post("/v1/recommend", json=body))
    stages = answer["stages_ms"]
    print(f"\nBest of {answer['candidates']:,} items for user {catalogue.user}, as of {catalogue.as_of}:\n")
    for rank, (item, score, attributes) in enumerate(
        zip(answer["ids"], answer["scores"], answer["attributes"], strict=True), 1
    ):
        print(f"  {rank:>2}  {score:8.4f}  {attributes.get('title', ''):<52.52}  {item}")
    print(
        f"\n  {stages['total']:.1f} ms in all: user {stages['user']:.1f} beside retrieval {stages['retrieval']:.1f}, "
        f"then rows {stages['gather']:.2f}, score {stages['score']:.2f}, top-k {stages['top_k']:.2f}"
    )
    return [str(item) for item in answer["ids"]]


def _score(client: httpx.Client, catalogue: Catalogue, best: list[str]) -> None:
    """The caller's own candidates, one of them unknown."""
    candidates = [*reversed(best), "no-such-item"]
    answer = _checked(client.post("/v1/score", json=_query(catalogue) | {"candidates": candidates, "k": 3}))
    print(
        f"\nThe caller's own {len(candidates)} candidates: the best are {', '.join(map(str, answer['ids']))}; "
        f"missing: {', '.join(map(str, answer['missing']))}; {answer['stages_ms']['total']:.1f} ms."
    )


def _change(client: httpx.Client, catalogue: Catalogue, best: list[str]) -> None:
    """Gives the best item the description of the last one, watches the score follow, and takes it back."""
    item, other = (
        _checked(client.get(f"/v1/items/{name}", params={"include": "event"})) for name in (best[0], best[-1])
    )
    before, version = _score_of(client, catalogue, best[0])
    described = {name: other["event"].get(name) for name in ("features", "crosses", "embedding")}
    print(f"\nItem {best[0]} gets the description of {best[-1]}, and then its own again:\n")
    for what, event in (("changed", item["event"] | described), ("restored", item["event"])):
        took = _update(client, best[0], event, version + 1)
        after, version = _score_of(client, catalogue, best[0])
        print(f"  {what:<9} score {before:8.4f} -> {after:8.4f}   visible after {took:5.0f} ms   version {version}")
        before = after


def _update(client: httpx.Client, item: str, event: dict[str, Any], version: int) -> float:
    """Publishes a new version; returns the milliseconds until scores are made from it."""
    body = {name: value for name, value in event.items() if not name.endswith("_time") and value is not None}
    began = time.perf_counter()
    _checked(client.post("/v1/events/items", json=body | {"version": version}))
    answer = client.get(f"/v1/items/{item}", params={"wait_for": version, "timeout_ms": _VISIBLE_MS})
    if answer.status_code == 504:
        raise DemoError(f"The new version of item {item} has not become visible: {answer.json()['detail']}.")
    _checked(answer)
    return (time.perf_counter() - began) * 1e3


def _score_of(client: httpx.Client, catalogue: Catalogue, item: str) -> tuple[float, int]:
    """Score and row version."""
    body = _query(catalogue) | {"candidates": [item], "include": ["trace"]}
    answer = _checked(client.post("/v1/score", json=body))
    if not answer["scores"]:
        raise DemoError(f"Item {item} has no row any more.")
    return float(answer["scores"][0]), int(answer["trace"]["versions"][0])


def _query(catalogue: Catalogue) -> dict[str, Any]:
    return {"user_id": catalogue.user, "as_of": catalogue.as_of}


def _checked(response: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = response.json()
    if not response.is_success:
        raise DemoError(f"{response.request.url.path} answered {response.status_code}: {found.get('detail', '')}.")
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        yield from map(json.loads, file)


def _slug(folder: Path) -> str:
    """A name for topics and generations from a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")[:40] or "data"
