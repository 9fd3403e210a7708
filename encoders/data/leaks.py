"""Shows that no label and nothing of the future builds an input: change them, build the inputs again, and compare.

For every request checked: (1) its history lies strictly before it; (2) with every label of the data inverted its inputs
stay the same, bit for bit; (3) with everything from a time on changed (behaviours dropped, moved and of other items,
impressions of other items, labels inverted) the inputs of all requests up to that time stay the same. The requests' own
candidates are what is asked about, so they stay; their labels do not.

What it cannot see: a leak that was built into a table before the data set was opened (KuaiRand's statistics of videos
are one, and are therefore not read).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from encoders.batches import Batch
from encoders.bundle import new_model
from encoders.config import ModelConfig
from encoders.data.dataset import BehaviourLog, DataError, Dataset, Examples, by_user, iso
from encoders.evaluate import split_of
from encoders.spec import material_of

REQUESTS = 256  # of the validation and test slices
CUTS = (0.3, 0.7, 1.0)  # quantiles of the requests' times from which on everything is changed

Inputs = Callable[[Dataset], Iterable[Batch]]  # batches of one group each, the same groups for the same examples
_Found = dict[str, torch.Tensor]
_Request = tuple[int, int]  # user, place of the first example


class LeakError(DataError):
    """An input holds a label or something of the future; the message names the tensor and the request."""


@dataclasses.dataclass(frozen=True)
class Checked:
    groups: int
    cuts: int


def check(data: Dataset, inputs: Inputs, seed: int = 0) -> Checked:
    """Check the inputs that `inputs` builds. Raises LeakError; DataError where there is nothing to check."""
    honest: dict[_Request, _Found] = {}
    rows: list[int] = []  # of the examples
    for batch in inputs(data):
        request, size = _request(batch)
        _demand_past(data, batch)
        honest[request] = _tensors(batch)
        rows += range(request[1], request[1] + size)
    if not honest:
        raise DataError("there is no request to check")
    asked = np.zeros(len(data.examples), dtype=bool)
    asked[rows] = True
    _demand_same(data, honest, inputs(_inverted(data)), "every label is inverted: a label builds it")
    times = np.array([_as_of(data, request) for request in honest])
    cuts = np.unique(np.quantile(times, CUTS, method="inverted_cdf"))
    for cut in cuts.tolist():
        past = {request: found for request, found in honest.items() if _as_of(data, request) <= cut}
        changed = inputs(_changed(data, cut, asked, np.random.default_rng(seed)))
        _demand_same(
            data, past, changed, f"everything from {iso(cut)} on is changed: something of the future builds it"
        )
    return Checked(len(honest), len(cuts))


def model_inputs(data: Dataset) -> Iterator[Batch]:
    """The inputs of training and evaluation, for some requests of the validation and test slices."""
    split = split_of(data)
    material = material_of(data, split, ModelConfig(), seed=0)
    model = new_model(material.config, material.spec, 0).eval()
    groups = material.batches.groups(split.validation, split.end)
    for place in np.sort(np.random.default_rng(0).permutation(len(groups))[:REQUESTS]):
        yield material.batches.batch(groups.select(np.array([place])), model)


def _request(batch: Batch) -> tuple[_Request, int]:
    if len(batch.groups) != 1:
        raise ValueError("the check needs batches of one group each")
    return (int(batch.groups.user[0]), int(batch.groups.first[0])), int(batch.groups.size[0])


def _as_of(data: Dataset, request: _Request) -> int:
    return int(data.examples.time[request[1]])


def _demand_past(data: Dataset, batch: Batch) -> None:
    request, _ = _request(batch)
    ages = batch.users.ages[batch.users.valid]
    if bool((ages <= 0).any()):
        raise LeakError(
            f"users.ages of {_name(data, request)}: the history holds a behaviour of the request's time or later"
        )
    last = int(batch.groups.history[0]) - 1
    if last >= 0 and data.log.user[last] == request[0] and data.log.time[last] >= _as_of(data, request):
        raise LeakError(f"groups.history of {_name(data, request)}: it reaches to the request's time or later")


def _demand_same(data: Dataset, honest: Mapping[_Request, _Found], again: Iterable[Batch], when: str) -> None:
    left = set(honest)
    for batch in again:
        request, _ = _request(batch)
        if request not in honest:
            continue
        left.discard(request)
        found = _tensors(batch)
        for name, tensor in honest[request].items():
            other = found.get(name)
            if other is None or not _equal(tensor, other):
                raise LeakError(f"{name} of {_name(data, request)} is another when {when}")
    if left:
        raise LeakError(f"the request of {_name(data, min(left))} is gone when {when}")


def _name(data: Dataset, request: _Request) -> str:
    return f"user {data.profiles.ids[request[0]]!r} as of {iso(_as_of(data, request))}"


def _tensors(batch: Batch) -> _Found:
    """Every input of a batch by its name; the labels are none."""
    sides = {"candidates": batch.candidates, "users": batch.users, "counted": batch.counted}
    return {name: tensor for side, value in sides.items() for name, tensor in _named(value, side)}


def _named(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, np.ndarray):
        yield name, torch.from_numpy(value)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _named(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, tuple):
        for place, part in enumerate(value):
            yield from _named(part, f"{name}[{place}]")


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, NaN equal to itself."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.detach().contiguous().numpy().tobytes() == other.detach().contiguous().numpy().tobytes()
    )


def _inverted(data: Dataset) -> Dataset:
    examples = dataclasses.replace(data.examples, clicked=~np.asarray(data.examples.clicked))
    return dataclasses.replace(data, examples=examples)


def _changed(data: Dataset, cut: int, asked: npt.NDArray[np.bool_], random: np.random.Generator) -> Dataset:
    """Another future: nothing before `cut` differs, and nothing of the impressions in `asked` but their labels."""
    return dataclasses.replace(
        data,
        log=_other_log(data, cut, random),
        examples=_other_examples(data, cut, asked, random),
    )


def _other_log(data: Dataset, cut: int, random: np.random.Generator) -> BehaviourLog:
    log = data.log
    late = np.asarray(log.time >= cut)
    kept = ~late | (random.random(len(log)) < 0.5)
    user, item = np.array(log.user[kept]), np.array(log.item[kept])
    action, time = np.array(log.action[kept]), np.array(log.time[kept])
    late = late[kept]
    count = int(late.sum())
    if count:
        item[late] = _other(item[late], len(data.items.ids), random)
        action[late] = _other(action[late], len(data.actions), random)
        time[late] = random.integers(cut, int(time.max()) + 1, count)
    order = by_user(user, time)
    return BehaviourLog(user[order], item[order], action[order], time[order])


def _other_examples(data: Dataset, cut: int, asked: npt.NDArray[np.bool_], random: np.random.Generator) -> Examples:
    examples = data.examples
    late = np.asarray(examples.time >= cut)
    item, moved = np.array(examples.item), late & ~asked
    item[moved] = _other(item[moved], len(data.items.ids), random)
    return dataclasses.replace(examples, item=item, clicked=np.asarray(examples.clicked) ^ late)


def _other(values: npt.NDArray[np.integer], count: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Another of `count` values each, where there is another."""
    return (values.astype(np.int64) + random.integers(1, max(2, count), len(values))) % count
