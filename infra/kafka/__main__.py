"""`python -m infra.kafka up|down|status|topics|logs|wipe`: what the kafka-* targets of the Makefile run.

With KAFKA_BOOTSTRAP in the environment the user's own broker is meant: `up` only checks that it answers, and nothing
here starts, stops or deletes anything.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import deque

from kafka import TopicPartition
from kafka.admin import OffsetSpec

from infra import settings as settings_module
from infra.kafka.broker import Broker, BrokerError, admin_of
from infra.kafka.jars import JarsError
from infra.kafka.java import JavaError
from infra.kafka.topics import TopicError, ensure_topics
from infra.kafka.wipe import wipe
from infra.processes import ProcessError
from infra.settings import Settings, SettingsError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.kafka", description="The local Apache Kafka node.")
    parser.add_argument("command", choices=["up", "down", "status", "topics", "logs", "wipe"])
    command = parser.parse_args(arguments).command
    try:
        settings = settings_module.load()
        if command == "topics":
            return _topics(settings)
        result = (_external if os.environ.get("KAFKA_BOOTSTRAP") else _local)(settings, command)
        sys.stdout.flush()
        return result
    except (BrokerError, JarsError, JavaError, TopicError, ProcessError, SettingsError) as error:
        print(error, file=sys.stderr)
    except BrokenPipeError:  # `| head`: nobody reads on, and Python would say so once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"Kafka's files could not be read or written: {error}.", file=sys.stderr)
    except KeyboardInterrupt:
        print("Stopped; run the same command again to go on.", file=sys.stderr)
    return 1


def broker_of(settings: Settings) -> Broker:
    """The local node that the settings describe."""
    return Broker(settings.kafka_dir, settings.kafka_port, settings.kafka_controller_port, settings.kafka_heap_mb)


def _local(settings: Settings, command: str) -> int:
    broker = broker_of(settings)
    if command == "up":
        broker.up()
        print(f"Kafka is running at {broker.bootstrap}; its data are in {broker.data}; `make kafka-down` stops it.")
    elif command == "down":
        print("Kafka is stopped; its data stay." if broker.down() else "Kafka was not running.")
    elif command == "wipe":
        derived = wipe(settings, broker)
        also = f", and what was derived from it in {', '.join(map(str, derived))}" if derived else ""
        print(f"Kafka is stopped and {broker.data} deleted{also}.")
    elif command == "logs":
        if not broker.log.exists():
            print(f"There is no log yet: {broker.log}.", file=sys.stderr)
            return 1
        with broker.log.open(errors="replace") as log:
            sys.stdout.writelines(deque(log, maxlen=200))
        print(f"(the end of {broker.log})", file=sys.stderr)
    else:
        process = broker.process()
        if process is None:
            print("Kafka is not running; `make kafka-up` starts it.")
            return 1
        with admin_of(broker.bootstrap) as admin:
            count = len(admin.list_topics())
        print(f"Kafka is running at {broker.bootstrap} (pid {process.pid}), {count} topics, data in {broker.data}.")
    return 0


def _external(settings: Settings, command: str) -> int:
    if command in ("up", "status"):
        with admin_of(settings.kafka_bootstrap) as admin:
            count = len(admin.list_topics())
        print(f"Your Kafka at {settings.kafka_bootstrap} answers ({count} topics).")
        return 0
    print(f"Nothing done: KAFKA_BOOTSTRAP={settings.kafka_bootstrap} is your own broker.", file=sys.stderr)
    return 0 if command == "down" else 1


def _topics(settings: Settings) -> int:
    ensure_topics(settings)
    with admin_of(settings.kafka_bootstrap) as admin:
        described = sorted(admin.describe_topics(), key=lambda topic: str(topic["name"]))
        ends = admin.list_partition_offsets(
            {
                TopicPartition(topic["name"], partition["partition_index"]): OffsetSpec.LATEST
                for topic in described
                for partition in topic["partitions"]
            }
        )
    for topic in described:
        name, count = topic["name"], len(topic["partitions"])
        written = sum(end.offset for partition, end in ends.items() if partition.topic == name)
        print(f"{name:40} {count:3} partitions {written:>12,} records written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
