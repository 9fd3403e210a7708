"""`python -m api serve|retrieval|verify|shadow|up|down|demo`: parses, calls once, and says errors in one sentence."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading

from infra import running, telemetry
from infra import settings as settings_module
from infra.processes import ProcessError
from infra.settings import Settings, SettingsError


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    settings = None
    try:
        settings = settings_module.load()
        return int(_COMMANDS[options.command](settings, options))
    except SettingsError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"`{options.command}` cannot go on: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        from api.stack import stack_of

        left = stack_of(settings).running() if settings else []
        kept = f" {', '.join(left)} keep running; `make down` stops them." if left else ""
        print(f"\nStopped.{kept}", file=sys.stderr)
        return 130
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m api", description="The HTTP side of Forerank.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="the API's processes, until SIGTERM or Ctrl-C")
    retrieval = commands.add_parser("retrieval", help="keep a generation's retrieval index up to date")
    retrieval.add_argument("--generation", required=True)
    retrieval.add_argument("--once", action="store_true", help="build it now, and end")
    verify = commands.add_parser("verify", help="whether a complete generation may be served; the supervisor runs it")
    verify.add_argument("--generation", required=True)
    shadow = commands.add_parser("shadow", help="score recorded requests with a generation that serves nobody")
    shadow.add_argument("--generation", required=True)
    commands.add_parser("up", help="broker, nearline jobs and API, without demo data")
    commands.add_parser("down", help="stop what up or demo started, and only that")
    demo = commands.add_parser("demo", help="the whole path on a catalogue, step by step")
    demo.add_argument("data", nargs="?", default="", help="DATA=folder in MovieLens' form; default: synthetic")
    return parser


def _serve(settings: Settings, _: argparse.Namespace) -> int:
    from api.serve import ServeError, serve

    try:
        serve(settings)
    except ServeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _retrieval(settings: Settings, options: argparse.Namespace) -> int:
    from api import rebuild
    from index.errors import StoreError
    from index.layout import LayoutError

    telemetry.configure_logging(settings, "retrieval")
    if not options.once:
        rebuild.follow(settings, options.generation)
    try:
        count = rebuild.once(settings, options.generation)
    except (StoreError, LayoutError, OSError) as error:
        print(f"No retrieval index was built: {error}", file=sys.stderr)
        return 1
    print(f"The retrieval index of {options.generation} has {count} items.")
    return 0


def _verify(settings: Settings, options: argparse.Namespace) -> int:
    telemetry.configure_logging(settings, f"verify-{options.generation}")
    from api.verify import verify
    from streams.rollout import Refused

    try:
        found = verify(settings, options.generation)
    except Refused as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Generation {options.generation} is verified." if found.verdict == "yes" else found.reason, flush=True)
    return 0 if found.verdict == "yes" else 1


def _shadow(settings: Settings, options: argparse.Namespace) -> int:
    telemetry.start_metrics(settings)
    telemetry.configure_logging(settings, f"shadow-{options.generation}")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    from api.shadow import follow

    follow(settings, options.generation, stop)
    return 0


def _up(settings: Settings, _: argparse.Namespace) -> int:
    from api import stack

    one = stack.stack_of(settings)
    try:
        with one.undone_on_failure():
            one.check_port()
            print("Kafka", "started," if one.broker_up() else "was running,", "making topics", flush=True)
            one.topics_up()
            running.remember(one.folder, one.settings)
            print("nearline jobs", "started" if one.jobs_up() else "were running", flush=True)
            print("API", "started" if one.api_up() else "was running", flush=True)
            one.jobs_ready()
    except (stack.StackError, ProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{one.url}/ is the console, {one.url}/docs the API; logs are in {one.folder}; `make down` stops all of it.")
    return 0


def _down(settings: Settings, _: argparse.Namespace) -> int:
    from api import stack

    one = stack.stack_of(settings)
    try:
        stopped = one.down()
    except (stack.StackError, ProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    running.forget(one.folder)
    print(f"Stopped {', '.join(stopped)}; data stay in {one.settings.state}." if stopped else "Nothing was running.")
    return 0


def _demo(settings: Settings, options: argparse.Namespace) -> int:
    from api.demo import run

    data = options.data.removeprefix("DATA=") or os.environ.get("DATA", "")
    return run(settings, data)


_COMMANDS = {
    "serve": _serve,
    "retrieval": _retrieval,
    "verify": _verify,
    "shadow": _shadow,
    "up": _up,
    "down": _down,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
