"""Commands: train a bundle, evaluate one, and write a data set as files for the publisher.

    python -m encoders train --data FOLDER|synthetic --out bundle/
    torchrun --nproc-per-node 2 -m encoders train --data FOLDER|synthetic --out bundle/
    python -m encoders evaluate bundle/ --against dssm,cold,din
    python -m encoders export-data --data FOLDER|synthetic --out DIR
    python -m encoders data prepare|check: see encoders.data.commands

Whatever cannot work ends with one sentence on stderr and status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from encoders.baselines import MODELS
from encoders.bundle import SERVED, BundleError, Loaded, load_model, manifest_sha256
from encoders.checkpoint import CheckpointError
from encoders.config import COMPONENTS, ModelConfig
from encoders.data.commands import add_commands, seed_of
from encoders.data.dataset import DataError, Dataset
from encoders.data.fingerprint import fingerprint
from encoders.data.source import SYNTHETIC, open_dataset
from encoders.distributed import PeerError, peers
from encoders.evaluate import Figures, check_split, evaluate
from encoders.rivals import against
from encoders.train import TrainingError, TrainOptions, train
from encoders.unseen import lines
from infra.settings import load


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # the matrices are small: a second thread gains little, and stalls when its core is busy
    try:
        options.command(options)
    except (BundleError, CheckpointError, DataError, TrainingError) as error:
        print(f"{options.name}: {error}", file=sys.stderr)
        return 1
    except PeerError as error:
        print(f"{options.name}: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # see peers
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"{options.name}: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = getattr(options, "checkpoint", None)
        left = f", the same command goes on from {kept}" if kept and kept.exists() else ""
        print(f"{options.name}: stopped{left}", file=sys.stderr)
        return 130
    return 0


def _train(options: argparse.Namespace) -> None:
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise BundleError(f"{options.out} is already there; choose another folder or remove it")
    wanted = _options(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written to shows now, not after the training
    with peers() as together:
        data = open_dataset(options.data, options.seed)
        metrics = train(
            data,
            options.out,
            wanted,
            precision=options.precision,
            checkpoint=options.checkpoint,
            log=options.log,
            report=_say,
            peers=together,
            source=options.data if options.data == SYNTHETIC else str(Path(options.data).resolve()),
        )
    if together.leads:
        _table(metrics["test"], metrics["counts"], metrics["unseen"])
        print(f"bundle {options.out} (manifest SHA-256 {manifest_sha256(options.out)})")


def _options(options: argparse.Namespace) -> TrainOptions:
    given = {name: getattr(options, name) for name in ("model", "seed", "minutes", "epochs", "distil", "autocast")}
    try:
        config = ModelConfig(without=_names(options.without))
        return TrainOptions(config=config, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise TrainingError(str(error)) from error


def _evaluate(options: argparse.Namespace) -> None:
    bundle, rivals = load_model(options.bundle), _names(options.against)
    if unknown := [name for name in rivals if name not in MODELS]:
        raise TrainingError(f"model {unknown[0]!r} is not known; known are {', '.join(MODELS)}")
    data = _data_of(bundle, options)
    check_split(bundle, data)
    own = fingerprint(data) if rivals else ""
    if rivals and bundle.manifest.metrics.get("fingerprint", own) != own:
        raise DataError("rivals are trained on these data, the bundle was on others: leave --against or --data out")
    found = evaluate(bundle, data)
    _table(found.figures, found.counts, found.unseen)
    if rivals or options.requests:
        cache = options.cache or load().state / "trials"
        print("\n".join(["", *against(bundle, data, own, rivals, cache, options.requests, _say)]))


def _data_of(bundle: Loaded, options: argparse.Namespace) -> Dataset:
    """The data asked for, or else those that the bundle was trained on."""
    metrics = bundle.manifest.metrics
    source = options.data or metrics.get("source")
    if source is None:
        raise DataError(f"{options.bundle} does not say what it was trained on: name the data with --data")
    try:
        data = open_dataset(source, metrics.get("seed", 0) if options.seed is None else options.seed)
    except DataError as error:
        if options.data:
            raise
        raise DataError(f"{error}; the bundle was trained on it: name the data with --data") from error
    if (name := metrics.get("data", data.name)) != data.name:
        print(f"{options.name}: the bundle was trained on {name}, these data are {data.name}", file=sys.stderr)
    return data


def _say(line: str) -> None:
    print(line, flush=True)  # whoever reads along through a pipe waits for each epoch


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _export(options: argparse.Namespace) -> None:
    data = open_dataset(options.data, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    _lines(options.out / "users.jsonl", data.users(), len(data.profiles.ids))
    _lines(options.out / "items.jsonl", data.item_updates(), len(data.items.ids))
    _lines(options.out / "behaviours.jsonl", data.behaviours(), len(data.log))


def _lines(path: Path, events: Iterable[Mapping[str, Any]], total: int) -> None:
    """One JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        for event in tqdm(events, total=total, desc=path.name, unit=" events", disable=not sys.stderr.isatty()):
            file.write(json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"wrote {path}")


def _table(rows: Mapping[str, Figures], counts: Mapping[str, int], new: Mapping[str, int]) -> None:
    """Figures on the test slice, and what they leave out or are not about."""
    print(f"{'test slice':<12}{'GAUC':>9}{'AUC':>9}{'LogLoss':>9}{'examples':>10}")
    for name, row in rows.items():
        values = (f"{row[key]:>9.4f}" if row[key] is not None else f"{'-':>9}" for key in ("gauc", "auc", "logloss"))
        print(f"{name:<12}{''.join(values)}{row['examples']:>10}")
    print(
        f"GAUC is over {counts['users'] - counts['users of one class']} of {counts['users']} users; the others have "
        f"examples of one class only, {counts['users without a click']} of them no click"
    )
    print(*lines(new, "test"), sep="\n", end="\n" if new else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m encoders", description="Train and evaluate bundles.")
    commands = parser.add_subparsers(dest="name", required=True)
    named = f"prepared folder, folder of MovieLens in any of its forms, or {SYNTHETIC!r}"
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data", required=True, help=named)
    data.add_argument("--seed", type=seed_of, default=0, help="of the weights and of the synthetic data")

    command = commands.add_parser("train", parents=[data], help="train a model and write its bundle")
    command.add_argument("--out", type=Path, required=True, help="folder of the bundle; must not exist yet")
    command.add_argument("--precision", choices=("fp16", "fp32"), default="fp16", help="of the rows")
    command.add_argument("--model", choices=tuple(MODELS), default=SERVED, help=f"only {SERVED} can be served")
    command.add_argument("--without", default="", metavar="PART,...", help=f"switched off, of {', '.join(COMPONENTS)}")
    command.add_argument("--minutes", type=float, help="training ends after this time at the latest")
    command.add_argument("--epochs", type=int, help="training ends after as many at the latest")
    command.add_argument("--distil", type=float, help="weight of the loss towards the upper bound, trained beside")
    command.add_argument("--autocast", action="store_true", help="bfloat16 in the forward pass")
    command.add_argument("--checkpoint", type=Path, help="file to go on from after a kill, or with more epochs")
    command.add_argument("--log", type=Path, help="CSV file of loss and validation figures")
    command.set_defaults(command=_train)

    command = commands.add_parser("evaluate", help="figures of a bundle on the data's last part")
    command.add_argument("bundle", type=Path)
    command.add_argument("--data", help=f"{named}; default: what the bundle was trained on")
    command.add_argument("--seed", type=seed_of, help="of the synthetic data; default: the bundle's")
    command.add_argument("--against", default="", metavar="MODEL,...", help=f"trained alike, of {', '.join(MODELS)}")
    command.add_argument("--requests", type=int, default=0, metavar="N", help="also rank the catalogue for so many")
    command.add_argument("--cache", type=Path, help="folder of trained models; default: trials/ below the state folder")
    command.set_defaults(command=_evaluate)

    command = commands.add_parser("export-data", parents=[data], help="write items, users and behaviours as JSONL")
    command.add_argument("--out", type=Path, required=True, help="folder of the files")
    command.set_defaults(command=_export)

    add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
