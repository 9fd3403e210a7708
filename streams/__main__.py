"""`python -m streams ...`: the nearline jobs, their supervisor, and publishing. Parses, calls once, maps errors to
sentences.

    supervise                              run everything a host needs; stop with Ctrl-C or SIGTERM
    ingest | histories                     one job (the supervisor starts these)
    encode | replicate | reconcile --generation G
    publish items|users|behaviours|models FILE...     JSONL, CSV or Parquet; - is JSONL from standard input
    model stage BUNDLE --generation G      publish a model event: make a generation of a bundle
    model activate|rollback|retire G       serve it (--share 0.05: to that share of the users); serve what was served
                                           before it; delete all of it
    status, or model status                what this host serves and how its jobs are
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from infra import running
from infra import settings as settings_module
from infra.kafka.broker import BrokerError
from infra.kafka.topics import TopicError
from infra.processes import ProcessError
from infra.settings import Settings, SettingsError
from infra.telemetry import configure_logging, start_metrics
from streams import rollout
from streams.rollout import Refused


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        settings = settings_module.load()
        if options.run in (_publish, _model, _status):  # a user's commands; jobs have their stack from the environment
            settings = running.addressed(settings)
        result = int(options.run(settings, options) or 0)
        sys.stdout.flush()
        return result
    except (SettingsError, BrokerError, TopicError, ProcessError, Refused) as error:
        print(error, file=sys.stderr)
    except BrokenPipeError:  # `| head`: nobody reads on, and Python would say so once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"A file could not be read or written: {where}{error.strerror or error}.", file=sys.stderr)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
    return 1


_COLUMNS = """\
JSONL has one event a line. CSV and Parquet have a column for each field, and features.<name> or attributes.<name> for
what lies inside; an empty cell is absent. A CSV cell that is JSON is read so (12, true, ["a", "b"]); any other is text,
and so are ids and times. "12" in a cell of its own quotes is the text 12:

    item_id,version,crosses,features.year,attributes.title
    42,7,"[""genre:Comedy"", ""genre:War""]",1997,A Day Out
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m streams", description="Nearline jobs and publishing.")
    commands = parser.add_subparsers(required=True, metavar="command")
    supervise = commands.add_parser("supervise", help="run everything this host needs; Ctrl-C stops it")
    supervise.add_argument("--without-retrieval", action="store_true", help="build no retrieval index")
    supervise.set_defaults(run=_supervise)
    for name in ("ingest", "histories"):
        commands.add_parser(name, help="one job; the supervisor starts it").set_defaults(run=_job, job=name)
    for name in ("encode", "replicate", "reconcile"):
        job = commands.add_parser(name, help="one job of a generation; the supervisor starts it")
        job.add_argument("--generation", required=True)
        job.set_defaults(run=_job, job=name)
    publish = commands.add_parser(
        "publish",
        help="send events from files",
        epilog=_COLUMNS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    publish.add_argument("kind", choices=["items", "users", "behaviours", "models"])
    publish.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="JSONL, CSV or Parquet; - is JSONL from stdin"
    )
    publish.add_argument(
        "--strict", action="store_true", help="check all rows first and send nothing if one is invalid"
    )
    publish.set_defaults(run=_publish)
    model = commands.add_parser("model", help="publish a model event")
    model.add_argument("action", choices=["stage", "activate", "rollback", "retire", "status"])
    model.add_argument("subject", nargs="?", help="folder of the bundle (stage), or the generation")
    model.add_argument("--generation", help="all but `status` need it, here or as the argument before")
    model.add_argument("--activate-when-complete", action="store_true")
    model.add_argument(
        "--share", type=_share, help="with activate: of the users, 0 .. 1; the others are served as before; 0: a shadow"
    )
    model.set_defaults(run=_model)
    commands.add_parser("status", help="what this host serves").set_defaults(run=_status)
    return parser


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:  # nor is NaN
        raise argparse.ArgumentTypeError(f"{text} is no share of the users: a number from 0 to 1 is")
    return share


def _job(settings: Settings, options: argparse.Namespace) -> None:
    """Runs one job; the process ends inside."""
    start_metrics(settings)
    generation = getattr(options, "generation", None)
    configure_logging(settings, f"{options.job}-{generation}" if generation else options.job)
    if options.job == "ingest":
        from streams import ingest

        ingest.run(settings)
    elif options.job == "histories":
        from streams import replicate_histories

        replicate_histories.run(settings)
    elif options.job == "encode":
        from streams import encode

        encode.run(settings, options.generation)
    elif options.job == "reconcile":
        from streams import reconcile

        reconcile.run(settings, options.generation)
    else:
        from streams import replicate

        replicate.run(settings, options.generation)


def _supervise(settings: Settings, options: argparse.Namespace) -> int:
    from streams.supervisor import supervise

    configure_logging(settings, "supervisor")
    return supervise(settings, retrieval=not options.without_retrieval)


def _publish(settings: Settings, options: argparse.Namespace) -> int:
    from streams.publish import PublishError, publish_files

    try:
        return publish_files(settings, options.kind, options.files, strict=options.strict)
    except (PublishError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


def _model(settings: Settings, options: argparse.Namespace) -> int:
    from kafka.errors import KafkaError

    from streams import models
    from streams.bundles import BundleFileError, checked_hash
    from streams.events import EventError
    from streams.events import model as model_event
    from streams.publish import Publisher, PublishError, check

    if options.action == "status":
        return _status(settings, options)
    named = options.subject if options.action != "stage" else None
    generation = options.generation or named
    if named is not None and named != generation:
        print(f"`model {options.action}` is told {named} and --generation {generation}: which one?", file=sys.stderr)
        return 2
    if generation is None:
        print(f"`model {options.action}` needs --generation.", file=sys.stderr)
        return 2
    event: dict[str, object] = {"action": options.action, "generation": generation}
    if options.share is not None:
        event["share"] = options.share
    try:
        if options.action == "stage":
            if options.subject is None:
                print("`model stage` needs the folder of a bundle.", file=sys.stderr)
                return 2
            folder = Path(options.subject).resolve()
            event |= {"uri": folder.as_uri(), "sha256": checked_hash(folder)}
            if options.activate_when_complete:
                event["activate_when_complete"] = True
        value = check("models", event).value
        with Publisher(settings) as publisher:
            refusal = models.refusal(settings, model_event(value))
            if refusal:
                print(f"Not published: {refusal}.", file=sys.stderr)
                return 1
            publisher.models([value])
    except (BundleFileError, EventError, PublishError, models.ModelsError) as error:
        print(error, file=sys.stderr)
        return 1
    except KafkaError as error:
        print(f"The broker at {settings.kafka_bootstrap} refused to work: {error}.", file=sys.stderr)
        return 1
    print(f"Published: {options.action} generation {generation}; `python -m streams status` shows what follows.")
    return _activated(settings, generation, options.share) if options.action == "activate" else 0


def _activated(settings: Settings, generation: str, share: float | None) -> int:
    """Says what this host makes of it: 1 where it will not serve the generation. A machine may only publish."""
    if not settings.serving_file.exists():
        return 0
    serving = rollout.read(settings.serving_file)
    known = serving.generations.get(generation)
    if known is None or known.state in rollout.UNREADY or rollout.aged(serving, generation):
        reason = f" ({known.reason})" if known and known.reason else ""
        state = f"{known.state} here, {known.progress:.0%}{reason}" if known else "not staged here yet"
        print(f"It is {state}, and is served once it is complete.")
        return 0
    if share == 0:
        print("It serves nobody, and is scored beside what is served once API processes have loaded it.")
        return 0
    if share is not None and share < 1:
        print(f"It is served to {share:.2%} of the users once API processes have loaded it.")
        return 0
    try:
        rollout.activate(serving, generation)
    except Refused as error:
        print(f"This host will not serve it: {error}.", file=sys.stderr)
        return 1
    return 0


def _status(settings: Settings, _: argparse.Namespace) -> int:
    from streams.status import status

    return status(settings)


if __name__ == "__main__":
    sys.exit(main())
