"""A generation is verified before it can go live: by a job of the supervisor, on the real stack. What is wrong with it
ends it as `failed`, with the reason, while what is live serves on.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import torch
from kafka import KafkaProducer
from rocksdict import AccessType, Options, Rdict

from encoders.bundle import Bundle, load_bundle, manifest_sha256, save_bundle
from index.arena import arena_folder
from index.layout import RowLayout, aligned_empty
from index.n2o import DELETED, ROW, N2OWriter, RowBatch
from index.row_codec import HEADER
from infra import processes
from infra.kafka.topics import ensure_topics
from infra.settings import Settings, environment
from streams import events, rollout
from streams.events import partition_of
from streams.publish import Publisher
from streams.rollout import Verification
from tests.conftest import answered, wait_until
from tests.streams.chain import CONFIG, FEATURES, ROOT, Chain, check_rows, item_body, oracle
from tests.streams.test_supervisor import command, jobs, serving, state_of, supervised

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
DEADLINE_S = 120.0


def bodies_of(count: int) -> list[dict[str, object]]:
    random = np.random.default_rng(1)
    return [item_body(f"{at}" if at % 2 else f"sku-{at}", 1, random) for at in range(count)]


def changed(good: Path, folder: Path, change: Callable[[Any], object]) -> Path:
    """A bundle with other weights than the good one."""
    model = load_bundle(good).model
    with torch.no_grad():
        change(model)
    save_bundle(folder, model, CONFIG, FEATURES, "fp32")
    return folder


def stage(publisher: Publisher, bundle: Path, generation: str, activate: bool = True) -> None:
    event = {"action": "stage", "generation": generation, "uri": bundle.as_uri(), "sha256": manifest_sha256(bundle)}
    publisher.models([event | {"activate_when_complete": activate}])


def found_of(settings: Settings, generation: str) -> Verification:
    found = rollout.read_verification(settings.verification_file(generation))
    assert found is not None
    return found


def reason_of(settings: Settings, generation: str) -> str:
    wait_until(lambda: state_of(settings, generation) == "failed", f"{generation} has failed", DEADLINE_S)
    return serving(settings).generations[generation].reason


def verify_again(settings: Settings, generation: str) -> None:
    """As if it had just been filled; no supervisor may run."""
    known = serving(settings)
    state = msgspec.structs.replace(known.generations[generation], state="verifying")
    settings.verification_file(generation).unlink(missing_ok=True)
    changed = msgspec.structs.replace(known, generations={**known.generations, generation: state})
    rollout.write(settings.serving_file, changed)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@contextmanager
def api(settings: Settings) -> Iterator[httpx.Client]:
    with (settings.state / "api.out").open("ab") as log:
        environ = {**os.environ, **environment(settings), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "api", "serve"], cwd=ROOT, env=environ, stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{settings.api_port}", timeout=30.0) as client:
            wait_until(lambda: answered(lambda: client.get("/readyz").is_success), "the API is ready", DEADLINE_S)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def test_a_good_one_is_verified_however_often_its_verification_is_killed_and_a_diverged_one_fails(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path, tmp_path: Path
) -> None:
    host = settings(partitions=2)
    ensure_topics(host)
    bodies = [*bodies_of(300), {"item_id": "1", "version": 2, "deleted": True}, {"item_id": "unfit", "version": 1}]

    def diverge(model: Any) -> None:
        model.item_tower.outer.weight.mul_(1e4)
        model.item_tower.outer.bias.mul_(1e4)

    with supervised(host), Publisher(host) as publisher:
        publisher.items(bodies)
        wait_until(lambda: sum(Chain(host, bundle_path).end_offsets("items")) == 302, "ingest wrote items")
        stage(publisher, bundle_path, "good")
        for _ in range(2):
            wait_until(lambda: "verify-good" in jobs(host), "it is being verified", DEADLINE_S)
            assert (state_of(host, "good"), serving(host).active) == ("verifying", None)
            killed = jobs(host)["verify-good"]
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda killed=killed: jobs(host).get("verify-good") != killed, "it has ended")  # type: ignore[misc]
            assert not host.verification_file("good").exists()
        wait_until(lambda: serving(host).active == "good", "good is active", DEADLINE_S)
        found = found_of(host, "good")
        assert (found.verdict, found.reason, found.rows) == ("yes", "", 299)
        assert (found.drawn, found.compared, found.looked_at) == (301, 299, 299)
        assert (found.unencodable, found.error < 1) == (1, True)
        assert found.unsaid == ["no other generation is active"]
        assert "verified: 301 items drawn, 1 cannot be encoded; 299 rows compared" in command(host, "status").stdout
        wait_until(lambda: "verify-good" not in jobs(host), "the job is over")

        live = {name: pid for name, pid in jobs(host).items() if name.endswith("-good")}
        stage(publisher, changed(bundle_path, tmp_path / "diverged", diverge), "diverged")
        reason = reason_of(host, "diverged")
        assert "times that of the active generation, and at most 20 times" in reason
        assert (found_of(host, "diverged").norm or 0) > 100
        assert serving(host).active == "good"
        assert live.items() <= jobs(host).items()
    check_rows(Chain(host, bundle_path), "good", bundle, oracle(bodies))


def test_rows_that_are_missing_or_damaged_are_found_and_what_is_live_serves_on(
    settings: Callable[..., Settings], bundle_path: Path
) -> None:
    """Neither shows in counts and digests, which know ids and versions: a number of one row is another one, in the
    store from which the arena is made; and a row is deleted that the topic has."""
    host = settings(partitions=2)
    ensure_topics(host)
    with supervised(host) as supervisor, Publisher(host) as publisher:
        publisher.items(bodies_of(200))
        wait_until(lambda: sum(Chain(host, bundle_path).end_offsets("items")) == 200, "ingest wrote items")
        stage(publisher, bundle_path, "live")
        for name in ("damaged", "missing"):
            stage(publisher, bundle_path, name, activate=False)
            wait_until(lambda name=name: state_of(host, name) == "complete", f"{name} is complete", DEADLINE_S)  # type: ignore[misc]
        assert serving(host).active == "live"
        stop(supervisor)
    _damage(host, "damaged", "7")
    _delete(host, "missing", "sku-8")
    for name in ("damaged", "missing"):
        verify_again(host, name)
    with supervised(host), api(host) as client:
        request = {"user_id": "u1", "candidates": ["7", "sku-8"]}
        assert client.post("/v1/score", json=request).json()["generation"] == "live"
        damaged, missing = reason_of(host, "damaged"), reason_of(host, "missing")
        assert "the row of item 7 is not what the bundle makes of its record (`joint`); so it is with 1 of" in damaged
        assert "item sku-8 (partition " in missing
        assert "has no row; so it is with 1 of 200 that were drawn" in missing
        assert serving(host).active == "live"
        answer = client.post("/v1/score", json=request).json()
        assert (answer["generation"], answer["missing"]) == ("live", [])


def _damage(host: Settings, generation: str, item_id: str) -> None:
    folder = host.generation_dir(generation) / "n2o"
    rocks = Rdict(str(folder / "rocks"), Options(raw_mode=True), access_type=AccessType.read_write())
    value = bytearray(rocks[ROW + item_id.encode()])
    value[HEADER.itemsize : HEADER.itemsize + 4] = np.float32(0.123).tobytes()  # the first number of `joint`
    rocks[ROW + item_id.encode()] = bytes(value)
    rocks.close()
    shutil.rmtree(arena_folder(folder))


def _delete(host: Settings, generation: str, item_id: str) -> None:
    """In the index alone, and so that it takes the item's next record for known; which is then written."""
    folder = host.generation_dir(generation)
    layout = RowLayout.of_manifest(folder / "bundle" / "manifest.json")
    writer = N2OWriter(folder / "n2o", layout, host.partitions, host.hash_key.encode())
    try:
        before, partition = writer.progress(), partition_of(item_id.encode(), host.partitions)
        following = int(before.covered[partition]) + 1
        hot, cold = aligned_empty(1, layout.hot), aligned_empty(1, layout.cold)
        hot.view(np.uint8)[:], cold.view(np.uint8)[:] = 0, 0
        one = np.ones(1, np.uint64)
        kinds = np.array([DELETED], np.uint8)
        row = RowBatch(partition, following, [item_id], 9 * one, np.array([following]), kinds, hot, cold, [b"{}"])
        assert writer.apply([(row, int(before.rows_offset[partition]) - 1)]) == 1
        assert writer.progress().count.sum() == before.count.sum() - 1
    finally:
        writer.close()
    body = events.item_update(events.encode(item_body(item_id, 2, np.random.default_rng(2))), None, 0)
    with closing(KafkaProducer(bootstrap_servers=host.kafka_bootstrap)) as producer:
        sent = producer.send(host.topic("items"), events.encode(body), item_id.encode(), partition=partition)
        assert sent.get(10).offset == following


def test_recorded_requests_are_scored_by_both_and_scores_that_ran_away_fail_it(
    settings: Callable[..., Settings], bundle_path: Path, tmp_path: Path
) -> None:
    host = settings(partitions=2, record_per_s=1000.0)
    ensure_topics(host)
    bodies = bodies_of(300)
    ids = [body["item_id"] for body in bodies]

    def run_away(model: Any) -> None:
        model.head[1].bias.add_(1e4)

    with supervised(host), Publisher(host) as publisher:
        publisher.items(bodies)
        wait_until(lambda: sum(Chain(host, bundle_path).end_offsets("items")) == 300, "ingest wrote items")
        stage(publisher, bundle_path, "live")
        wait_until(lambda: serving(host).active == "live", "live is active", DEADLINE_S)
        with api(host) as client:
            inline = {"behaviours": [{"item_id": "1", "event_time": 1_780_000_000_000}]}
            for at in range(5):
                user = {"user_id": f"u{at}"} if at else {"user": inline}
                answer = client.post("/v1/score", json=user | {"candidates": ids})
                assert answer.status_code == 200, answer.text
            wait_until(lambda: len(list(host.requests_dir.glob("*.req"))) == 5, "five requests are recorded")
            stage(publisher, changed(bundle_path, tmp_path / "away", run_away), "away")
            assert "standard deviations from the active generation's" in reason_of(host, "away")
            found = found_of(host, "away")
            assert (found.requests, found.norm) == (5, pytest.approx(1.0))
            assert (found.shift or 0) > 1e3
            assert found.spread == pytest.approx(1, rel=0.05)  # float32 of 10,000 and a little
            assert client.post("/v1/score", json={"user_id": "u1", "candidates": ids}).json()["generation"] == "live"

            stage(publisher, bundle_path, "same")
            wait_until(lambda: serving(host).active == "same", "same is active", DEADLINE_S)
            found = found_of(host, "same")
            assert (found.verdict, found.requests, found.unsaid) == ("yes", 6, [])
            assert (found.shift, found.spread, found.overlap) == (pytest.approx(0, abs=1e-6), pytest.approx(1), 1.0)
            told = command(host, "status").stdout
            assert "6 requests, mean score +0.00 deviations, spread 1.00 times, best 100 100% the same" in told
            _shadowed(host, publisher, client, bundle_path, ids)


def _shadowed(host: Settings, publisher: Publisher, client: httpx.Client, bundle: Path, ids: list[object]) -> None:
    """`activate` with a share of 0: scored by a job, served to nobody, until the share ends."""
    stage(publisher, bundle, "shade", activate=False)
    publisher.models([{"action": "activate", "generation": "shade", "share": 0}])
    wait_until(lambda: "shadow-shade" in jobs(host), "its shadow runs", DEADLINE_S)

    def compared() -> bool:
        answer = client.post("/v1/score", json={"user_id": "u9", "candidates": ids}).json()
        assert answer["generation"] == "same"
        found = rollout.read_shadow(host.shadow_file("shade"))
        return found is not None and found.requests > 6

    wait_until(compared, "it has scored what is asked for", DEADLINE_S)
    found = rollout.read_shadow(host.shadow_file("shade"))
    assert found is not None
    assert (found.against, found.overlap, found.not_finite) == ("same", 1.0, 0)
    assert "shadow of same: " in command(host, "status").stdout
    publisher.models([{"action": "rollback", "generation": "shade"}])
    wait_until(lambda: "shadow-shade" not in jobs(host), "its shadow is over", DEADLINE_S)
    assert serving(host).active == "same"


def test_a_broker_that_is_away_is_no_fault_of_the_generation(
    settings: Callable[..., Settings], bundle_path: Path
) -> None:
    host = settings(partitions=2)
    ensure_topics(host)
    with supervised(host) as supervisor, Publisher(host) as publisher:
        publisher.items(bodies_of(20))
        stage(publisher, bundle_path, "a")
        wait_until(lambda: serving(host).active == "a", "a is active", DEADLINE_S)
        stop(supervisor)
    environ = {**os.environ, **environment(host), "KAFKA_BOOTSTRAP": "127.0.0.1:9"}
    arguments = [sys.executable, "-m", "api", "verify", "--generation", "a"]
    done = subprocess.run(arguments, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("not verified yet: ")
    assert found_of(host, "a").verdict == "again"
    assert processes.listing(host.state / "logs") == []
