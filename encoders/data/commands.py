"""Commands on data sets, below `python -m encoders data`:

    python -m encoders data prepare --format kuairand --input DIR --out DIR
    python -m encoders data check DATA

`prepare` turns a published format into a prepared folder (`prepared.py`), `check` shows that no label and nothing of
the future builds an input (`leaks.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from encoders.data import amazon, kuairand, leaks, movielens, synthetic, taobao
from encoders.data.dataset import DataError
from encoders.data.prepared import open_prepared
from encoders.data.source import SYNTHETIC, open_dataset
from encoders.data.store import Store, copy, prepare

Read = Callable[[Path, Store], None]


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `data` with its two commands; each sets `command`, a function of the parsed options."""
    data = commands.add_parser("data", help="prepare a published data set; check one for leaks")
    below = data.add_subparsers(dest="data_command", required=True)

    command = below.add_parser("prepare", help="turn a published format into a prepared folder")
    command.add_argument("--format", choices=tuple(readers(0)), required=True, help="what --input holds")
    command.add_argument("--input", type=Path, help="folder of the published files; not for synthetic")
    command.add_argument("--out", type=Path, required=True, help="folder to make; must not exist yet")
    command.add_argument("--seed", type=seed_of, default=0, help="of the sampled negatives and of the synthetic data")
    command.set_defaults(command=_prepare)

    command = below.add_parser("check", help="show that no label and nothing of the future builds an input")
    command.add_argument("data", help=f"prepared folder, folder of MovieLens, or {SYNTHETIC!r}")
    command.add_argument("--seed", type=seed_of, default=0, help="of the synthetic data and of the changes made")
    command.set_defaults(command=_check)


def seed_of(text: str) -> int:
    """The value of --seed. Raises ArgumentTypeError."""
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 63):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 to 2^63 - 1")
    return int(text)


def readers(seed: int) -> dict[str, Read]:
    """Format -> what writes it into a store."""
    return {
        "taobao-ad": taobao.prepare_ads,
        "taobao-user-behavior": partial(taobao.prepare_behaviours, seed=seed),
        "kuairand": kuairand.prepare,
        "amazon": amazon.prepare,
        "movielens": lambda folder, store: copy(movielens.read(folder), store, "movielens"),
        SYNTHETIC: lambda _, store: copy(synthetic.generate(seed=seed), store, SYNTHETIC),
    }


def _prepare(options: argparse.Namespace) -> None:
    if options.input is None and options.format != SYNTHETIC:
        raise DataError("--input is needed")
    store = prepare(readers(options.seed)[options.format], options.input or Path(), options.out)
    data = open_prepared(options.out)
    print(
        f"prepared {options.out}: {len(data.items.ids):,} items, {len(data.profiles.ids):,} users, "
        f"{len(data.log):,} behaviours, {len(data.examples):,} examples"
    )
    for reason, rows in store.skipped.items():
        print(f"skipped {rows:,} rows: {reason}")
    for what, count in store.noted.items():
        print(f"noted {count:,}: {what}")


def _check(options: argparse.Namespace) -> None:
    found = leaks.check(open_dataset(options.data, options.seed), leaks.model_inputs, seed=options.seed)
    print(
        f"no leak: the inputs of {found.groups} requests, at {found.cuts} times, stayed the same bit for bit when all "
        "labels, and everything later, were changed; every history lies before its request"
    )
