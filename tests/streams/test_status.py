"""`python -m streams status`, and `model` beside it: which stack is meant, what answers, and how each job is."""

from __future__ import annotations

import fcntl
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from kafka import KafkaProducer

from index.layout import RowLayout, aligned_empty
from index.n2o import N2OWriter
from infra import processes
from infra.kafka.topics import ensure_topics
from infra.running import folder_of, remember
from infra.settings import Settings, environment
from streams import rollout
from streams.__main__ import main
from streams.events import HostReport, ModelEvent
from streams.heartbeat import Heartbeat
from streams.rollout import Verification
from streams.status import status
from tests.conftest import free_ports
from tests.rows import batch_of
from tests.streams.chain import ROOT


@pytest.fixture
def away(tmp_path: Path) -> Settings:
    """A host whose broker and API are away."""
    broker, api = free_ports(2)
    return Settings(kafka_bootstrap=f"127.0.0.1:{broker}", api_port=api, state=tmp_path / "state")


@pytest.fixture
def job(away: Settings) -> Iterator[Callable[[str], processes.Process]]:
    """`job(name)`: a process with that name among the host's jobs."""
    started: list[processes.Process] = []

    def start(name: str) -> processes.Process:
        argv = [sys.executable, "-c", "import time; time.sleep(600)"]
        started.append(processes.start(name, argv, away.state / "logs"))
        return started[-1]

    yield start
    for process in started:
        processes.stop(process, 0.0)


@contextmanager
def healthy(port: int) -> Iterator[None]:
    class Healthz(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", port), Healthz) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def test_a_host_on_which_nothing_runs(away: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(away) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"stack: state {away.state}, topics without prefix"
    assert lines[1].startswith("No supervisor is running")
    assert lines[2] == f"Kafka: {away.kafka_bootstrap} does not answer"
    assert lines[3] == f"API: http://127.0.0.1:{away.api_port} does not answer"
    assert lines[4:] == ["serving: no generation"]


@pytest.mark.e2e
def test_a_host_on_which_all_runs(settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]) -> None:
    host = settings()
    host.state.mkdir(parents=True)
    with (host.state / "supervisor.lock").open("w") as lock, healthy(host.api_port):
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert status(host) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"stack: state {host.state}, topics {host.topic_prefix}*",
        "supervisor: running",
        f"Kafka: {host.kafka_bootstrap} answers",
        f"API: http://127.0.0.1:{host.api_port} answers",
        "serving: no generation",
    ]


@pytest.mark.e2e
def test_other_hosts_and_rows_that_differ_from_theirs(
    settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    host, now = settings(), time.time_ns() // 1_000_000
    ensure_topics(host)

    def said(
        name: str,
        generation: str,
        state: str,
        digests: str = "",
        covered: tuple[int, ...] = (7, 9),
        **more: str,
    ) -> None:
        rows = {"covered": list(covered), "counts": [2, 3], "digests": list(digests)} if digests else {}
        report = HostReport(host=name, generation=generation, state=state, time=now - 60_000, **rows, **more)  # type: ignore[arg-type]
        producer.send(host.topic("hosts"), msgspec.json.encode(report), f"{name}/{generation}".encode(), partition=0)

    with closing(KafkaProducer(bootstrap_servers=host.kafka_bootstrap)) as producer:
        said(host.host, "g1", "active", "ab")
        said("same", "", "up")
        said("same", "g1", "active", "ab")
        said("same", "g0", "retired")
        said("differs", "g1", "former", "ac")
        said("behind", "g1", "filling", "cc")
        said("busy", "g1", "active", "dc", covered=(8, 9))
        said("earlier", "g1", "active", "ac")
        said("earlier", "g1", "active", "ef", covered=(8, 12))
        said("differed", "g1", "active", "ac")
        said("remade", "g1", "active", "ac", (7, 11))
        said("remade", "g1", "active", "cc", (7, 9), reason=rollout.REMADE)
        said("remade", "g1", "active", "ab", (7, 11))
        said(host.host, "g1", "active", "gh", covered=(10, 11))
        said("differed", "g1", "active", "gh", covered=(9, 11))
        said("remade", "g1", "active", "gh", covered=(10, 11))
    status(host)
    told = {
        line.split(",")[0]: line.split(": ", 1)[1]
        for line in capsys.readouterr().out.splitlines()
        if "heard of 6" in line
    }
    assert told == {
        "host same": "g1 active",
        "host differs": "g1 former, WITH OTHER ROWS THAN HERE in partition 1",
        "host behind": "g1 filling",
        "host busy": "g1 active, WITH OTHER ROWS THAN HERE in partition 1",
        "host earlier": "g1 active, WITH OTHER ROWS THAN HERE in partition 1",
        "host differed": "g1 active",
        "host remade": "g1 active",
    }


def test_what_each_job_says_and_how_old_it_is(
    away: Settings, job: Callable[[str], processes.Process], capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, silent, new, builder = (job(name) for name in ("encode-a", "ingest", "replicate-a", "retrieval-a"))
    for process in (fresh, silent):
        Heartbeat(process.name, process.pid, state="running", handled=7, lag=2, lag_s=41.6, rate=3.4, dead=3).write(
            away.heartbeat_dir
        )
    Heartbeat("replicate-a", new.pid + 1, state="running").write(away.heartbeat_dir)  # of the process before
    beat = Heartbeat("ingest", silent.pid, state="running")
    past = time.time_ns() // 1_000_000 - 90_000
    path = away.heartbeat_dir / "ingest.json"
    beat.write(away.heartbeat_dir)
    path.write_text(path.read_text().replace(f'"time":{beat.time}', f'"time":{past}'))
    status(away)
    told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": pid " in line)
    assert told["encode-a"] == (
        f"pid {fresh.pid}, running, 7 records handled (3/s), 2 waiting for up to 42 s, 3 dead letters"
    )
    assert told["ingest"].startswith(f"pid {silent.pid}, silent for 9")
    assert "waiting" not in told["ingest"]
    assert told["replicate-a"] == f"pid {new.pid}, starting"
    assert told["retrieval-a"] == f"pid {builder.pid}"


def run(folder: Path, environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """A user's command, given in `folder` with these variables alone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FORERANK_", "KAFKA_", "API_"))}
    return subprocess.run(
        [sys.executable, "-m", "streams", *arguments],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.e2e
def test_a_users_commands_are_about_the_running_stack(settings: Callable[..., Settings], tmp_path: Path) -> None:
    demo = settings(partitions=2)
    ensure_topics(demo)
    environ = environment(demo) | {"KAFKA_BOOTSTRAP": demo.kafka_bootstrap}
    for name in ("FORERANK_TOPIC_PREFIX", "FORERANK_STATE"):
        del environ[name]
    base = Settings(state=tmp_path / ".local" / "state")  # the default, as seen from tmp_path
    remember(folder_of(base), demo)
    (tmp_path / "rows.jsonl").write_text('{"item_id":"1","version":1}\n')
    published = run(tmp_path, environ, "publish", "items", "rows.jsonl")
    assert published.stdout == f"1 items published to {demo.topic('item-updates')}.\n", published.stderr
    assert run(tmp_path, environ, "status").stdout.startswith(f"stack: state {demo.state}, topics {demo.topic_prefix}*")
    named = run(tmp_path, environ | {"FORERANK_STATE": "other"}, "status")
    assert named.stdout.startswith("stack: state other, topics without prefix")


def test_nobody_reads_the_status_to_its_end(away: Settings) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "streams", "status"],
            cwd=ROOT,
            env={**os.environ, **environment(away), "KAFKA_BOOTSTRAP": away.kafka_bootstrap},
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.stderr == ""


def test_a_share_that_is_none_is_a_sentence_and_nothing_is_published(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("nan", "inf", "-inf", "-0.1", "1.1", "some"):
        with pytest.raises(SystemExit) as ended:
            main(["model", "activate", "g", f"--share={text}"])
        assert ended.value.code == 2
        said = f"argument --share: {text} is no share of the users: a number from 0 to 1 is"
        assert capsys.readouterr().err.splitlines()[-1].endswith(said)


def test_a_generation_that_is_named_twice_differently_is_asked_about(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("activate", "rollback", "retire"):
        assert main(["model", action, "g0", "--generation", "g2"]) == 2
        assert capsys.readouterr().err == f"`model {action}` is told g0 and --generation g2: which one?\n"


@pytest.mark.e2e
def test_model_checks_the_bundle_and_knows_the_hosts_generations(
    settings: Callable[..., Settings], bundle_path: Path, tmp_path: Path
) -> None:
    host = settings(partitions=2)
    ensure_topics(host)
    environ = environment(host) | {"KAFKA_BOOTSTRAP": host.kafka_bootstrap}
    broken = tmp_path / "broken"
    shutil.copytree(bundle_path, broken)
    with (broken / "model.safetensors").open("ab") as file:
        file.write(b"x")
    done = run(tmp_path, environ, "model", "stage", str(broken), "--generation", "a")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == "model.safetensors is not the file that manifest.json names"
    done = run(tmp_path, environ, "model", "stage", "nowhere", "--generation", "a")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == f"{tmp_path / 'nowhere' / 'manifest.json'} cannot be read: No such file or directory"
    assert run(tmp_path, environ, "model", "stage", str(bundle_path), "--generation", "a").returncode == 0

    activate = ("model", "activate", "--generation")
    assert run(tmp_path, environ, *activate, "a").returncode == 0  # this machine serves nothing: it only publishes
    rollout.write(host.serving_file, rollout.Serving())
    for action in ("activate", "rollback"):
        done = run(tmp_path, environ, "model", action, "--generation", "nope")
        assert (done.returncode, done.stderr) == (1, "Not published: generation nope was never staged.\n")
    done = run(tmp_path, environ, "model", "activate")
    assert (done.returncode, done.stderr) == (2, "`model activate` needs --generation.\n")

    staged = rollout.stage(rollout.Serving(), 0, ModelEvent("stage", "a", "file:///a", "a" * 64))
    filling = rollout.fill(rollout.wait(staged, "a", "the broker is away"), "a", [10])
    half = rollout.advance(filling, "a", [4], [False])
    for serving, said in (
        (rollout.Serving(), "It is not staged here yet, and is served once it is complete."),
        (
            rollout.wait(staged, "a", "no broker"),
            "It is staged here, 0% (no broker), and is served once it is complete.",
        ),
        (half, "It is filling here, 50% (1 of 1 partitions are without a proven fill), and is served once"),
    ):
        rollout.write(host.serving_file, serving)
        done = run(tmp_path, environ, *activate, "a")
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
    filled = rollout.advance(filling, "a", [9], [True])
    rollout.write(host.serving_file, filled)
    assert "It is verifying here, 100%, and is served once" in run(tmp_path, environ, *activate, "a").stdout
    rollout.write(host.serving_file, rollout.verified(filled, "a", Verification(verdict="yes")))
    done = run(tmp_path, environ, *activate, "a")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    rollout.write(host.serving_file, rollout.fail(half, "a", "bad bundle"))
    done = run(tmp_path, environ, *activate, "a")
    assert done.returncode == 1
    assert done.stderr == "Not published: generation a is failed (bad bundle) and cannot be activated.\n"
    done = run(tmp_path, environ, "model", "stage", str(bundle_path), "--generation", "a", "--activate-when-complete")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Not published: generation a is failed here (bad bundle): stage the bundle under a")


@pytest.mark.e2e
def test_model_without_its_topic_is_one_sentence(settings: Callable[..., Settings], tmp_path: Path) -> None:
    host = settings()
    environ = environment(host) | {"KAFKA_BOOTSTRAP": host.kafka_bootstrap}
    done = run(tmp_path, environ, "model", "rollback", "--generation", "a")
    assert done.returncode == 1
    assert done.stderr == f"There is no topic {host.topic('models')}: `make kafka-topics` makes it.\n"


def test_status_has_the_rows_of_each_generation_and_what_it_waits_for(
    away: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    serving = rollout.Serving()
    for offset, name in enumerate("ab"):
        serving = rollout.stage(serving, offset, ModelEvent("stage", name, f"file:///{name}", name * 64))
    layout, folder = RowLayout(), away.generation_dir("a")
    (folder / "bundle").mkdir(parents=True)
    (folder / "bundle" / "manifest.json").write_text(json.dumps({"row": layout.to_json()}))
    hot, cold = aligned_empty(3, layout.hot), aligned_empty(3, layout.cold)
    for records in (hot, cold):
        records.view(np.uint8)[:] = 0
    with closing(N2OWriter(folder / "n2o", layout, 1, b"key")) as writer:
        writer.apply([(batch_of(["1", "2", "3"], 0, hot, cold), 0)])
    rollout.write(away.serving_file, rollout.wait(rollout.fill(serving, "a", [4]), "b", "no broker"))
    status(away)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["  a: filling, 0%, 3 rows", "  b: staged, 0% (no broker)"]
    Heartbeat("encode-a", 1, state="filling", lag=5_000, rate=1_000.0).write(away.heartbeat_dir)
    status(away)
    assert "  a: filling, 0%, 3 rows, 1000/s, 5000 waiting, 5 s to go" in capsys.readouterr().out.splitlines()
