"""Commands: train a bundle, evaluate one, and write a data set as files for the publisher.

    python -m encoders train --data FOLDER|synthetic --out bundle/
    python -m encoders evaluate bundle/ --data FOLDER|synthetic
    python -m encoders export-data --data FOLDER|synthetic --out DIR
    python -m encoders data prepare|check: see encoders.data.commands

Whatever cannot work ends with one sentence on stderr and status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from encoders.bundle import BundleError, load_bundle, manifest_sha256
from encoders.data.commands import add_commands
from encoders.data.dataset import DataError
from encoders.data.source import SYNTHETIC, open_dataset
from encoders.evaluate import Figures, evaluate
from encoders.train import TrainOptions, train


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # the matrices are small: a second thread gains little, and stalls when its core is busy
    try:
        options.command(options)
    except (BundleError, DataError) as error:
        print(f"{options.name}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{options.name}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{options.name}: stopped, nothing was written", file=sys.stderr)
        return 130
    return 0


def _train(options: argparse.Namespace) -> None:
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise BundleError(f"{options.out} is already there; choose another folder or remove it")
    data = open_dataset(options.data, options.seed)
    options_ = TrainOptions(seed=options.seed, minutes=options.minutes)
    metrics = train(data, options.out, options_, precision=options.precision)
    _table(metrics["test"])
    print(f"bundle {options.out} (manifest SHA-256 {manifest_sha256(options.out)})")


def _evaluate(options: argparse.Namespace) -> None:
    _table(evaluate(load_bundle(options.bundle), open_dataset(options.data, options.seed)))


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


def _table(rows: Mapping[str, Figures]) -> None:
    print(f"{'test slice':<12}{'GAUC':>9}{'AUC':>9}{'LogLoss':>9}{'examples':>10}")
    for name, row in rows.items():
        values = (f"{row[key]:>9.4f}" if row[key] is not None else f"{'-':>9}" for key in ("gauc", "auc", "logloss"))
        print(f"{name:<12}{''.join(values)}{row['examples']:>10}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m encoders", description="Train and evaluate bundles.")
    commands = parser.add_subparsers(dest="name", required=True)
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data", required=True, help=f"folder of MovieLens in any of its forms, or {SYNTHETIC!r}")
    data.add_argument("--seed", type=int, default=0, help="of the weights and of the synthetic data")

    command = commands.add_parser("train", parents=[data], help="train a model and write its bundle")
    command.add_argument("--out", type=Path, required=True, help="folder of the bundle; must not exist yet")
    command.add_argument("--precision", choices=("fp16", "fp32"), default="fp16", help="of the rows")
    command.add_argument("--minutes", type=float, default=1.0, help="training ends after this time at the latest")
    command.set_defaults(command=_train)

    command = commands.add_parser("evaluate", parents=[data], help="figures of a bundle on the data's last part")
    command.add_argument("bundle", type=Path)
    command.set_defaults(command=_evaluate)

    command = commands.add_parser("export-data", parents=[data], help="write items, users and behaviours as JSONL")
    command.add_argument("--out", type=Path, required=True, help="folder of the files")
    command.set_defaults(command=_export)

    add_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
