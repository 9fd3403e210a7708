"""The supervisor as a process: from stage event to serving, bad bundles, refusals, killed jobs, and an orderly end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import groupby
from pathlib import Path

import msgspec
import numpy as np
import pytest
from kafka import KafkaProducer

from encoders.bundle import Bundle, manifest_sha256, seeded_bundle
from index.lock import WriterLock
from infra import priority, processes
from infra.kafka.broker import Broker, admin_of
from infra.kafka.topics import ensure_topics
from infra.settings import Settings, environment
from streams import events, rollout
from streams.blocks import REFUSED
from streams.heartbeat import read_heartbeat
from streams.publish import Publisher
from streams.supervisor import Supervisor
from streams.worker import BAD_BUNDLE
from tests.conftest import JARS, free_ports, wait_until
from tests.streams.chain import CONFIG, FEATURES, ROOT, Chain, check_rows, item_body, oracle, running_chain

pytestmark = pytest.mark.e2e
SLOW_S = 180.0  # until something happens for which processes must start


def command(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streams", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment(settings)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def start(settings: Settings) -> subprocess.Popen[bytes]:
    settings.state.mkdir(parents=True, exist_ok=True)
    with (settings.state / "supervisor.out").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "streams", "supervise", "--without-retrieval"],
            cwd=ROOT,
            env={**os.environ, **environment(settings)},
            stdout=log,
            stderr=log,
        )


@contextmanager
def supervised(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    process = start(settings)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)
        for job in processes.listing(settings.state / "logs"):
            processes.stop(job, 0.0)


def serving(settings: Settings) -> rollout.Serving:
    return rollout.read(settings.serving_file)


def state_of(settings: Settings, generation: str) -> str:
    known = serving(settings).generations.get(generation)
    return known.state if known else "unknown"


def jobs(settings: Settings) -> dict[str, int]:
    return {process.name: process.pid for process in processes.listing(settings.state / "logs")}


def running(settings: Settings, job: str) -> bool:
    beat = read_heartbeat(settings.heartbeat_dir, job)
    return beat is not None and beat.state == "running" and beat.pid == jobs(settings).get(job)


def piped(bundle_path: Path, folder: Path) -> tuple[Path, Path]:
    """A bundle that takes as long to read as the test likes, and the pipe in it."""
    shutil.copytree(bundle_path, folder)
    tensors = folder / "model.safetensors"
    tensors.unlink()
    os.mkfifo(tensors)
    return folder, tensors


def wait_for_reader(pipe: Path) -> int:
    """The end to write to, once somebody reads the other one."""
    found: list[int] = []

    def read_from() -> bool:
        with suppress(OSError):  # nobody reads yet
            found.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(found)

    wait_until(read_from, "the bundle is read")
    return found[0]


def test_generations_come_and_go_and_jobs_are_kept_alive(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path, tmp_path: Path
) -> None:
    host = settings(partitions=2)
    random = np.random.default_rng(1)
    bodies = [item_body(f"{k}", 1, random) for k in range(100)]
    broken = _broken_bundles(bundle_path, tmp_path)
    with supervised(host) as supervisor:
        wait_until(lambda: {"ingest", "histories"} <= set(jobs(host)), "the jobs run")
        refused = command(host, "supervise")
        assert refused.returncode == 1
        assert refused.stderr.strip() == f"Another supervisor already runs on {host.state}."

        with Publisher(host) as publisher:
            publisher.items(bodies)
            publisher.models([{"action": "activate", "generation": "never"}])
        done = command(host, "model", "stage", str(bundle_path), "--generation", "a", "--activate-when-complete")
        assert done.returncode == 0, done.stderr
        wait_until(lambda: serving(host).active == "a", "a is active")
        chain = Chain(host, bundle_path)
        wait_until(lambda: sum(chain.end_offsets("items")) == 100, "ingest wrote items")
        ends = chain.end_offsets("items")
        wait_until(lambda: (chain.arena("a").progress().covered + 1).tolist() == ends, "a is up to date")
        check_rows(chain, "a", bundle, oracle(bodies))
        assert "never staged" in str(serving(host).refused)

        # bundles that must not be used fail with their reason; what is live does not notice
        live = {name: pid for name, pid in jobs(host).items() if name.endswith("-a")}
        for name, (path, reason) in broken.items():
            event = {"action": "stage", "generation": name, "uri": path.as_uri(), "activate_when_complete": True}
            sha = manifest_sha256(path) if path.exists() else "0" * 64
            with Publisher(host) as publisher:
                publisher.models([event | {"sha256": sha if name != "other-manifest" else "0" * 64}])
            wait_until(lambda name=name: state_of(host, name) == "failed", f"{name} has failed")  # type: ignore[misc]
            assert reason in serving(host).generations[name].reason
        assert chain.read("items.dlq") == []
        assert serving(host).active == "a"
        assert live.items() <= jobs(host).items()

        # what is no model event is a dead letter, once
        with closing(KafkaProducer(bootstrap_servers=host.kafka_bootstrap)) as producer:
            producer.send(host.topic("models"), b'{"action": "stage"}', b"a", headers=[("ce_id", b"7")], partition=0)
        wait_until(lambda: len(chain.read("models.dlq")) == 1, "a dead letter")
        (dead,) = chain.read("models.dlq")
        assert (dead.key, dead.value) == (b"a", b'{"action": "stage"}')
        assert {"error_type": b"malformed", "ce_id": b"7"}.items() <= dict(dead.headers).items()

        # an explicit activation waits until the generation is complete, and the name is not used again
        with Publisher(host) as publisher:
            stage = {"action": "stage", "generation": "b", "uri": bundle_path.as_uri(), "sha256": bundle.sha256}
            publisher.models([stage, {"action": "activate", "generation": "b"}, stage | {"sha256": "1" * 64}])
        wait_until(lambda: serving(host).active == "b", "b is active")
        (reused,) = [reason for reason in serving(host).refused.values() if "generation b" in reason]
        assert "never used twice" in reused
        assert "  b: active, 100%, 100 rows" in command(host, "model", "status").stdout
        assert (serving(host).previous, state_of(host, "a")) == ("a", "former")
        check_rows(chain, "b", bundle, oracle(bodies))

        # back, by the log alone, and forth again, while another bundle is being copied
        slow, pipe = piped(bundle_path, tmp_path / "slow")
        with Publisher(host) as publisher:  # the command would read the pipe itself
            publisher.models([stage | {"generation": "slow", "uri": slow.as_uri()}])
        writing = wait_for_reader(pipe)
        assert command(host, "model", "rollback", "--generation", "b").returncode == 0
        wait_until(lambda: serving(host).active == "a", "a is active again")
        assert (serving(host).previous, state_of(host, "b")) == ("b", "former")
        assert command(host, "model", "activate", "--generation", "b").returncode == 0
        wait_until(lambda: serving(host).active == "b", "b is active once more")
        for name, reason in (("b", "is the one to be served"), ("a", "is the one that a rollback from b would go to")):
            refused = command(host, "model", "retire", name)
            assert refused.returncode == 1
            assert f"Not published: generation {name} {reason}; activate another one" in refused.stderr

        known = serving(host).generations["slow"]
        assert (known.state, known.reason) == ("staged", "its bundle is being copied")

        # a killed job comes back; so does the supervisor, to the same jobs, and copies anew
        ingest = jobs(host)["ingest"]
        os.kill(ingest, signal.SIGKILL)
        wait_until(lambda: jobs(host).get("ingest", ingest) != ingest, "ingest is started again")
        before = jobs(host)
        assert os.getpriority(os.PRIO_PROCESS, before["ingest"]) == priority.JOB, "requests go first"
        supervisor.kill()
        supervisor.wait(10)
        os.close(writing)
        with Publisher(host) as publisher:
            publisher.models([{"action": "activate", "generation": "a"}])
        again = start(host)
        try:
            wait_until(lambda: serving(host).active == "a", "the event that came meanwhile is acted upon")
            assert jobs(host) == before
            assert "serving: a" in command(host, "status").stdout
            writing = wait_for_reader(pipe)
            again.send_signal(signal.SIGTERM)
            assert again.wait(30) == 0
            os.close(writing)
        finally:
            again.kill()
            again.wait(10)
        assert jobs(host) == {}
        assert len(chain.read("models.dlq")) == 1
        assert command(host, "status").returncode == 1
        reports = [msgspec.json.decode(record.value, type=events.HostReport) for record in chain.read("hosts")]
        told = [(report.generation, report.state) for report in reports]
        of_b = [state for state, _ in groupby(state for name, state in told if name == "b")]  # told each minute
        assert of_b[-5:] == ["complete", "active", "former", "active", "former"]
        last = [report for report in reports if report.generation == "b"][-1]
        assert sum(last.counts) == 100


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_generation_whose_jobs_rested_is_served_only_with_what_came_meanwhile(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    host = settings(partitions=2)
    random = np.random.default_rng(1)
    bodies = [item_body(f"{k}", 1, random) for k in range(40)]
    later = [item_body(f"{k}", 2, random) for k in range(20)]
    stage = {"action": "stage", "uri": bundle_path.as_uri(), "sha256": bundle.sha256}
    with supervised(host), Publisher(host) as publisher:
        publisher.items(bodies)
        publisher.models([stage | {"generation": "a"}])
        wait_until(lambda: state_of(host, "a") == "complete", "a is complete", SLOW_S)
        publisher.models([stage | {"generation": "b", "activate_when_complete": True}])
        wait_until(lambda: serving(host).active == "b", "b is active", SLOW_S)
        wait_until(lambda: not {"encode-a", "replicate-a"} & set(jobs(host)), "nobody needs a", SLOW_S)
        assert state_of(host, "a") == "staged"
        assert "a: staged, 100%, 40 rows (is not kept fresh" in command(host, "status").stdout
        publisher.items(later)
        chain = Chain(host, bundle_path)
        wait_until(lambda: sum(chain.end_offsets("items")) == 60, "ingest wrote items", SLOW_S)
        ends = chain.end_offsets("items")
        told = command(host, "model", "activate", "a")
        assert (told.returncode, "is served once it is complete" in told.stdout) == (0, True)
        wait_until(lambda: serving(host).active == "a", "a is active", SLOW_S)
        assert (chain.arena("a").progress().covered + 1).tolist() == ends
        check_rows(chain, "a", bundle, oracle(bodies + later))

        # two rollbacks in a row: b, which was served before, rests since c is served
        publisher.models([stage | {"generation": "c", "activate_when_complete": True}])
        wait_until(lambda: serving(host).active == "c", "c is active", SLOW_S)
        wait_until(lambda: not {"encode-b", "replicate-b"} & set(jobs(host)), "nobody needs b", SLOW_S)
        newest = [item_body(f"{k}", 3, random) for k in range(10)]
        publisher.items(newest)
        wait_until(lambda: sum(chain.end_offsets("items")) == 70, "ingest wrote items", SLOW_S)
        ends = chain.end_offsets("items")
        assert command(host, "model", "rollback", "c").returncode == 0
        wait_until(lambda: serving(host).active == "a", "a is active again", SLOW_S)
        assert state_of(host, "b") == "former"
        assert command(host, "model", "rollback", "a").returncode == 0
        wait_until(lambda: serving(host).active == "b", "b is active again", SLOW_S)
        assert (chain.arena("b").progress().covered + 1).tolist() == ends
        check_rows(chain, "b", bundle, oracle(bodies + later + newest))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_generation_whose_encoder_runs_apart_is_served_fails_and_is_retired(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path, tmp_path: Path
) -> None:
    """The encoder shares nothing with the host but Kafka and the place where bundles are."""
    host = settings(partitions=2, encoders="apart", session_timeout_ms=2_000)
    lost, apart = (dataclasses.replace(host, host=f"encoder-{n}", state=tmp_path / f"encoder-{n}") for n in (1, 2))
    random = np.random.default_rng(5)
    bodies = [item_body(f"{k}", 1, random) for k in range(100)]
    unfit = seeded_bundle(tmp_path / "unfit", dataclasses.replace(CONFIG, embedding_dim=9), features=FEATURES)
    stage = {"action": "stage", "uri": bundle_path.as_uri(), "sha256": bundle.sha256}
    chain = Chain(host, bundle_path)
    with (
        supervised(host),
        Publisher(host) as publisher,
        running_chain(lost, bundle_path) as first,
        running_chain(apart, bundle_path) as encoders,
    ):
        publisher.items(bodies)
        wait_until(lambda: sum(chain.end_offsets("items")) == 100, "ingest wrote items", SLOW_S)
        never = command(apart, "encode", "--generation", "g")
        assert (never.returncode, never.stderr.splitlines()[-1]) == (1, "encode-g: generation g was never staged")

        publisher.models([stage | {"generation": "g", "activate_when_complete": True}])
        wait_until(lambda: "replicate-g" in jobs(host), "the host waits for rows", SLOW_S)
        first.start("encode:g")
        wait_until(
            lambda: serving(host).active == "g", "g is active", SLOW_S, alive=lambda: _assert_runs(first, "encode:g")
        )
        check_rows(chain, "g", bundle, oracle(bodies))
        assert "encode-g" not in jobs(host)

        # its machine is lost; another one takes its place, under another name
        wait_until(lambda: first.running("encode:g"), "encode is in its group", SLOW_S)
        first.kill("encode:g")
        encoders.start("encode:g")

        # what an encoder says of a bundle whose fill is proven changes nothing: a later one of another version, perhaps
        with closing(KafkaProducer(bootstrap_servers=host.kafka_bootstrap)) as producer:
            for place in range(2):
                refusal = [(REFUSED, b"bad bundle: too new")]
                producer.send(host.topic("rows.g"), b"", headers=refusal, partition=place)
        later = [item_body(f"{k}", 2, random) for k in range(50)]
        publisher.items(later)
        wait_until(lambda: sum(chain.end_offsets("items")) == 150, "ingest wrote items", SLOW_S)
        ends = chain.end_offsets("items")
        wait_until(
            lambda: (chain.arena("g").progress().covered + 1).tolist() == ends, "the updates reach the rows", SLOW_S
        )
        check_rows(chain, "g", bundle, oracle(bodies + later))

        publisher.models([stage | {"generation": "bad", "uri": (tmp_path / "unfit").as_uri(), "sha256": unfit.sha256}])
        wait_until(lambda: state_of(host, "bad") == "filling", "bad is staged", SLOW_S)
        encoders.start("encode:bad")
        wait_until(lambda: encoders.ended("encode:bad") == BAD_BUNDLE, "its encoder ends", SLOW_S)
        wait_until(lambda: state_of(host, "bad") == "failed", "bad has failed", SLOW_S)
        assert serving(host).generations["bad"].reason.startswith("bad bundle: it cannot encode 100 of the first 100")

        publisher.models([stage | {"generation": "h"}])
        wait_until(lambda: state_of(host, "h") == "filling", "h is staged", SLOW_S)
        encoders.start("encode:h")
        wait_until(lambda: state_of(host, "h") == "complete", "h is complete", SLOW_S)
        wait_until(lambda: encoders.running("encode:h"), "its encoder is in its group", SLOW_S)
        assert command(host, "model", "retire", "h").returncode == 0
        kept = f"(its topic is kept until its encoder has ended ({apart.host}-{host.topic('encode-h')}))"
        wait_until(
            lambda: f"h: retired, 100% {kept}" in command(host, "status").stdout, "retirement waits for it", SLOW_S
        )

        def shared() -> set[str]:
            with admin_of(host.kafka_bootstrap) as admin:
                groups = {found["group_id"] for found in admin.list_groups()}
                return {host.topic("rows.h"), host.topic("encode-h")} & (set(admin.list_topics()) | groups)

        assert shared() == {host.topic("rows.h"), host.topic("encode-h")}
        assert encoders.kill("encode:h", signal.SIGTERM) == 0
        wait_until(lambda: not shared(), "nothing is left of h in Kafka", SLOW_S)
        wait_until(lambda: serving(host).generations["h"].reason == "", "and nothing is waited for", SLOW_S)
        again = command(apart, "encode", "--generation", "h")
        assert again.returncode == 1
        assert "encode-h: generation h was retired, so nobody needs its encoder" in again.stderr
        assert (serving(host).active, running(host, "replicate-g")) == ("g", True)


def _assert_runs(chain: Chain, job: str) -> None:
    assert chain.ended(job) is None, chain.log(job).read_text()


def test_a_generation_that_loses_its_folder_while_it_is_filled_gets_it_again_or_fails(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path, tmp_path: Path
) -> None:
    host = settings(partitions=2)
    host.state.mkdir()
    bodies = [item_body(f"{k}", 1, np.random.default_rng(k)) for k in range(40)]
    source = tmp_path / "source"
    shutil.copytree(bundle_path, source)
    stage = {"action": "stage", "uri": source.as_uri(), "sha256": bundle.sha256, "activate_when_complete": True}

    def round_until(name: str, state: str) -> None:
        def there() -> bool:
            supervisor.round()
            return state_of(host, name) == state

        wait_until(there, f"{name} is {state}", SLOW_S)

    with Supervisor(host, retrieval=False) as supervisor, Publisher(host) as publisher:
        publisher.items(bodies)
        publisher.models([stage | {"generation": "a"}])
        round_until("a", "filling")
        shutil.rmtree(host.generation_dir("a"))
        round_until("a", "active")
        chain = Chain(host, bundle_path)
        publisher.models([stage | {"generation": "b"}])
        round_until("b", "filling")
        shutil.rmtree(host.generation_dir("b"))
        source.rename(tmp_path / "elsewhere")
        round_until("b", "failed")
        assert "there is no bundle at" in serving(host).generations["b"].reason
        assert serving(host).active == "a"

        # one that is retired while its bundle is copied is deleted after that, and its bundle with it
        slow, pipe = piped(bundle_path, tmp_path / "slow")
        publisher.models([stage | {"generation": "c", "uri": slow.as_uri(), "activate_when_complete": False}])
        round_until("c", "staged")
        writing = wait_for_reader(pipe)
        publisher.models([{"action": "retire", "generation": "c"}])
        round_until("c", "retiring")
        supervisor.round()
        assert state_of(host, "c") == "retiring"
        pipe.unlink()
        shutil.copyfile(bundle_path / pipe.name, pipe)
        os.set_blocking(writing, True)
        os.write(writing, pipe.read_bytes())
        os.close(writing)
        round_until("c", "retired")
        assert not host.generation_dir("c").exists()
        assert len(chain.read("rows.a")) > 0


def _broken_bundles(good: Path, folder: Path) -> dict[str, tuple[Path, str]]:
    """Bundles that must not be used, and what is said about each."""
    out = {"missing": (folder / "nowhere", "there is no bundle"), "other-manifest": (good, "the event names")}
    tensors = folder / "tensors"
    shutil.copytree(good, tensors)
    with (tensors / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    out["other-tensors"] = (tensors, "is not the file that manifest.json names")
    future = folder / "future"
    shutil.copytree(good, future)
    manifest = json.loads((future / "manifest.json").read_bytes())
    (future / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    out["future-format"] = (future, "bad bundle")
    cut = folder / "cut"
    shutil.copytree(good, cut)
    raw = (cut / "model.safetensors").read_bytes()[:-100]
    (cut / "model.safetensors").write_bytes(raw)
    tensors_of = manifest["tensors"] | {"sha256": hashlib.sha256(raw).hexdigest()}
    (cut / "manifest.json").write_text(json.dumps(manifest | {"tensors": tensors_of}))
    out["cut-tensors"] = (cut, "bad bundle")
    seeded_bundle(folder / "other-spec", dataclasses.replace(CONFIG, embedding_dim=9), features=FEATURES)
    unfit = "cannot encode 100 of the first 100 items, the first: embedding has 8 values, the bundle needs 9"
    out["other-spec"] = (folder / "other-spec", unfit)
    return out


def test_a_generation_without_room_fails_with_what_it_needs_before_anything_is_copied(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path, tmp_path: Path
) -> None:
    """Rows of 4 MB, and as many records on `items` as make them more than is free on this disk; of 2 MB, there is room
    for one generation, but not for another one while its bundle is being copied.
    """
    host = settings(partitions=2)
    large, half = tmp_path / "large", tmp_path / "half"
    for path, attributes in ((large, 1_000_000), (half, 500_000)):
        shutil.copytree(bundle_path, path)
        manifest = json.loads((path / "manifest.json").read_bytes())
        manifest["row"]["attributes"] = [f"a{number}" for number in range(attributes)]
        (path / "manifest.json").write_text(json.dumps(manifest))
    slow, pipe = piped(half, tmp_path / "slow")
    ensure_topics(host)
    with closing(KafkaProducer(bootstrap_servers=host.kafka_bootstrap, linger_ms=20)) as producer:
        for _ in range(shutil.disk_usage(tmp_path).free // 10_000_000):
            producer.send(host.topic("items"), None, b"1", partition=0)
    with supervised(host) as supervisor, Publisher(host) as publisher:
        stage = {"action": "stage", "activate_when_complete": True}
        publisher.models([stage | {"generation": "a", "uri": large.as_uri(), "sha256": manifest_sha256(large)}])
        wait_until(lambda: state_of(host, "a") == "failed", "a has failed")
        reason = serving(host).generations["a"].reason
        assert re.fullmatch(r"needs [\d.]+ GB of disk, [\d.]+ GB free", reason)
        assert f"a: failed, 0% ({reason})" in command(host, "status").stdout
        assert not host.generation_dir("a").exists()
        with admin_of(host.kafka_bootstrap) as admin:
            assert host.topic("rows.a") not in admin.list_topics()
        publisher.models(
            [{"action": "stage", "generation": "c", "uri": slow.as_uri(), "sha256": manifest_sha256(slow)}]
        )
        writing = wait_for_reader(pipe)
        publisher.models(
            [{"action": "stage", "generation": "d", "uri": half.as_uri(), "sha256": manifest_sha256(half)}]
        )
        wait_until(lambda: state_of(host, "d") == "failed", "d has failed")
        reason = serving(host).generations["d"].reason
        assert re.fullmatch(r"needs [\d.]+ GB of disk, [\d.]+ GB free, [\d.]+ GB of it for fills under way", reason)
        assert state_of(host, "c") == "staged"
        os.close(writing)  # an empty file
        wait_until(lambda: state_of(host, "c") == "failed", "c has failed")
        assert "is not the file that manifest.json names" in serving(host).generations["c"].reason
        publisher.models([stage | {"generation": "b", "uri": bundle_path.as_uri(), "sha256": bundle.sha256}])
        wait_until(lambda: serving(host).active == "b", "b, for which there is room, is active")
        assert supervisor.poll() is None


def test_an_activation_that_waits_for_the_retrieval_index_says_so(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path
) -> None:
    host = settings(partitions=2, retrieval_interval_s=0.1)
    indexing = WriterLock(host.generation_dir("a") / "retrieval")  # no builder can
    with Supervisor(host, retrieval=True) as supervisor, Publisher(host) as publisher:
        publisher.items([item_body(f"{k}", 1, np.random.default_rng(k)) for k in range(20)])
        stage = {"action": "stage", "generation": "a", "uri": bundle_path.as_uri(), "sha256": bundle.sha256}
        publisher.models([stage | {"activate_when_complete": True}])

        def told(state: str, reason: str) -> bool:
            supervisor.round()
            known = supervisor.serving.generations.get("a")
            return known is not None and (known.state, known.reason) == (state, reason)

        wait_until(
            lambda: told("complete", "its retrieval index is being built"), "it waits, and says for what", SLOW_S
        )
        indexing.release()
        wait_until(lambda: told("active", ""), "it is served", SLOW_S)


def test_without_a_broker_there_is_one_sentence(settings: Callable[..., Settings]) -> None:
    (port,) = free_ports(1)
    done = command(settings(kafka_bootstrap=f"127.0.0.1:{port}"), "supervise")
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
    assert f"The Kafka broker at 127.0.0.1:{port} cannot be reached" in done.stderr


def test_state_of_another_cluster_is_refused(settings: Callable[..., Settings]) -> None:
    host = settings(partitions=2)
    ensure_topics(host)
    host.state.mkdir(parents=True)
    mine = {"cluster": "another", "prefix": host.topic_prefix, "partitions": 2}
    (host.state / "cluster.json").write_text(json.dumps(mine))
    done = command(host, "supervise")
    assert done.returncode == 1
    assert "belongs to other topics" in done.stderr


@pytest.mark.parametrize("arguments", [["status"], ["supervise"], ["ingest"]])
def test_a_state_folder_that_cannot_be_used_is_one_sentence(
    settings: Callable[..., Settings], arguments: list[str]
) -> None:
    nowhere = command(settings(state=Path("/dev/null/x")), *arguments)
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (1, 1), nowhere.stderr
    assert "/dev/null/x" in nowhere.stderr


def test_a_serving_file_of_another_version_is_one_sentence(settings: Callable[..., Settings]) -> None:
    host = settings()
    host.state.mkdir(parents=True)
    host.serving_file.write_text('{"format": 99}')
    for argument in ("status", "supervise"):
        done = command(host, argument)
        assert done.returncode == 1
        assert done.stderr.strip() == f"{host.serving_file} has format 99; this version reads 1"


@pytest.mark.slow
def test_a_broker_that_is_away_while_staging_neither_stops_the_jobs_nor_uses_the_name_up(
    settings: Callable[..., Settings], bundle: Bundle, bundle_path: Path, tmp_path: Path
) -> None:
    """The bundle's tensors are a pipe at first: while the supervisor waits at it, the broker goes away."""
    ports = free_ports(2)
    own = Broker(tmp_path / "kafka", ports[0], ports[1], jars=JARS)
    host = settings(partitions=2, kafka_bootstrap=own.bootstrap, kafka_port=own.port)
    slow, tensors = piped(bundle_path, tmp_path / "slow")
    with own, supervised(host) as supervisor:
        for job in ("ingest", "histories"):
            wait_until(lambda job=job: running(host, job), f"{job} runs")  # type: ignore[misc]
        before = jobs(host)
        stage = {"action": "stage", "generation": "a", "uri": slow.as_uri(), "sha256": bundle.sha256}
        with Publisher(host) as publisher:  # the command would read the pipe itself
            publisher.models([stage | {"activate_when_complete": True}])
        pipe = wait_for_reader(tensors)
        own.down()
        tensors.unlink()
        shutil.copyfile(bundle_path / tensors.name, tensors)
        os.set_blocking(pipe, True)
        os.write(pipe, tensors.read_bytes())
        os.close(pipe)
        wait_until(lambda: "cannot be reached" in serving(host).generations["a"].reason, "it waits for the broker")
        assert state_of(host, "a") == "staged"
        assert supervisor.poll() is None
        assert jobs(host) == before
        own.up()
        wait_until(lambda: serving(host).active == "a", "a is active", 90)
        assert serving(host).generations["a"].reason == ""
        assert supervisor.poll() is None
