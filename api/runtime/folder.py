"""Models of a folder: every `<name>.pt2` that `torch.export.save` wrote, as the runtime takes it.

The file says all there is to know. Inputs have the names of `forward`'s parameters, outputs the keys of the dict that
it gives, else `output0`, `output1` ...; sizes and their bounds are those of the export; its example inputs are timed.
With an extra file `exact`, of any content, answers are the module's bits, else they may be rounded otherwise. A file
that cannot be served is named in one sentence, and harms no other.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from api.runtime.graph import BLOCKS, capture_program
from api.runtime.model import Model

LOG = logging.getLogger(__name__)
DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
EXACT = "exact"
_ROWS, _MANY_ROWS = 127, 1_023  # that a model is timed with, if its example has fewer; one that needs less than:
_LIGHT_S = 5e-4  # so that a block takes 4 ms at most, which is how long others may wait for it
_ERROR = 1e-4  # of an output of 32 bits, relative to its largest value
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class ModelError(ValueError):
    """A file that cannot be served; the message is one sentence."""


class ShapeError(ValueError):
    """Inputs that the model was not exported for; `name` is the input's."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.name = name


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output. A dimension that differs from query to query is an expression of sympy."""

    name: str
    dtype: torch.dtype
    dims: tuple[Any, ...]

    @property
    def shape(self) -> list[int]:
        """-1: a dimension that differs."""
        return [dim if isinstance(dim, int) else -1 for dim in self.dims]


@dataclasses.dataclass(frozen=True)
class Served:
    """A model as callers see it."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    bounds: Mapping[Any, tuple[int, float]]  # of each symbol in `inputs`
    model: Model

    def check(self, shapes: Sequence[Sequence[int]]) -> None:
        """Of the inputs, in their order. Raises ShapeError."""
        sizes: dict[Any, int] = {}
        derived: list[tuple[str, int, Any, int]] = []
        for port, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != len(port.dims):
                raise ShapeError(port.name, f"it has {len(shape)} dimensions; expected {port.shape}")
            for at, (dim, size) in enumerate(zip(port.dims, shape, strict=True)):
                if isinstance(dim, int):
                    if size != dim:
                        raise ShapeError(port.name, f"dimension {at} is {size}; expected {port.shape}")
                elif dim not in self.bounds:
                    derived.append((port.name, at, dim, size))
                elif sizes.setdefault(dim, size) != size:
                    raise ShapeError(port.name, f"dimension {at} is {size}, and the same one is {sizes[dim]} elsewhere")
                elif not self.bounds[dim][0] <= size <= self.bounds[dim][1]:
                    low, high = self.bounds[dim]
                    raise ShapeError(port.name, f"dimension {at} is {size}; the model takes {low} to {high}")
        for name, at, dim, size in derived:
            if (should := int(dim.subs(sizes))) != size:
                raise ShapeError(name, f"dimension {at} is {size}; by the other inputs it is {should}")


def served_of(path: Path) -> Served:
    """Raises ModelError."""
    name = path.name.removesuffix(".pt2")
    if not _NAME.fullmatch(name):
        raise ModelError("its name is not made of letters, digits and ._- alone")
    program, exact = _loaded(path)
    inputs, outputs = _inputs(program), _outputs(program)
    bounds = _bounds(program, inputs)
    given = _example(program, inputs)
    example, blocks = _probe(inputs, given, bounds, _ROWS)
    try:
        if blocks and _seconds(program, example) < _LIGHT_S:
            example, blocks = _probe(inputs, given, bounds, _MANY_ROWS)
        model = Model(capture_program(program, example, blocks=blocks, exact=exact))
    except Exception as error:
        raise ModelError(f"it does not run on its example: {_first_line(error)}") from error
    if not model.graph.operators:
        raise ModelError("it computes nothing")
    served = Served(name, inputs, outputs, bounds, model)
    try:
        served.check([tensor.shape for tensor in example])
    except (ShapeError, TypeError) as error:  # TypeError: a size that no input has by itself
        raise ModelError(f"the sizes of its inputs cannot be told: {error}") from error
    _prove(program, served, example)
    sizes = zip(example, model.graph.rows, strict=True)
    fewer = [one if at is None else one.narrow(at, 0, one.shape[at] // 2) for one, at in sizes]
    with suppress(ShapeError):  # where so few rows are not taken
        served.check([tensor.shape for tensor in fewer])
        _prove(program, served, fewer)
    return served


def _prove(program: ExportedProgram, served: Served, given: Sequence[Tensor]) -> None:
    """Operators give what the program gives, and leave the inputs as they are. Raises ModelError."""
    arguments, named = pytree.tree_unflatten([one.clone() for one in given], program.call_spec.in_spec)
    kept = [one.clone() for one in given]
    try:
        with torch.inference_mode():
            ours, theirs = served.model.graph.run(*kept), program.module(check_guards=False)(*arguments, **named)
    except Exception as error:
        raise ModelError(f"it does not run on its example: {_first_line(error)}") from error
    found = (ours,) if served.model.graph.single else ours
    for port, one, other in zip(served.outputs, found, pytree.tree_leaves(theirs), strict=True):
        if not _alike(one, other):
            raise ModelError(f"its operators give another `{port.name}` than the whole of it")
    for port, one, other in zip(served.inputs, kept, given, strict=True):
        if not _alike(one, other):
            raise ModelError(f"its operators change `{port.name}`")


def _loaded(path: Path) -> tuple[ExportedProgram, bool]:
    """Without operations that change what others read: the order of operators is that of their inputs alone. Whether
    its answers are to be the module's bits.
    """
    extra: dict[str, Any] = {EXACT: None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch speaks of its own future
            program = torch.export.load(path, extra_files=extra)
            if any(_changes(node.target) for node in program.graph.nodes):
                program = program.run_decompositions({})
    except Exception as error:
        raise ModelError(f"torch.export.load cannot read it: {_first_line(error)}") from error
    signature = program.graph_signature
    if changed := [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]:
        raise ModelError(f"it changes `{changed[0]}`, so its answers would depend on other queries")
    return program, extra[EXACT] is not None


def _changes(operation: Any) -> bool:
    return isinstance(operation, torch._ops.OpOverload) and operation._schema.is_mutable


def _inputs(program: ExportedProgram) -> tuple[Port, ...]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    ports = []
    for name in program.graph_signature.user_inputs:
        if not isinstance(name, str) or not isinstance(values.get(name), Tensor):
            raise ModelError(f"its input {name!r} is no tensor")
        ports.append(_port(name, values[name]))
    return tuple(ports)


def _outputs(program: ExportedProgram) -> tuple[Port, ...]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    places = pytree.tree_unflatten(range(len(program.graph_signature.user_outputs)), program.call_spec.out_spec)
    keys = dict.fromkeys(range(len(program.graph_signature.user_outputs)), "")
    if isinstance(places, dict):
        keys |= {place: str(key) for key, place in places.items() if isinstance(place, int)}
    ports = []
    for at, name in enumerate(program.graph_signature.user_outputs):
        if not isinstance(name, str) or not isinstance(values.get(name), Tensor):
            raise ModelError(f"its output {keys[at] or at} is no tensor")
        ports.append(_port(keys[at] or f"output{at}", values[name]))
    return tuple(ports)


def _port(name: str, value: Tensor) -> Port:
    if value.device.type != "cpu":
        raise ModelError(f"`{name}` is on {value.device.type}; export it on the CPU")
    if value.dtype not in DTYPES:
        raise ModelError(f"`{name}` is of {value.dtype}, which the protocol does not know")
    dims = tuple(size if isinstance(size, int) else size.node.expr for size in value.shape)
    return Port(name, value.dtype, dims)


def _bounds(program: ExportedProgram, inputs: Sequence[Port]) -> dict[Any, tuple[int, float]]:
    ranges = program.range_constraints
    dims = {dim for port in inputs for dim in port.dims if not isinstance(dim, int) and dim.is_Symbol}
    out = {}
    for dim in dims:
        low, high = (ranges[dim].lower, ranges[dim].upper) if dim in ranges else (0, math.inf)
        out[dim] = (int(low), int(high) if getattr(high, "is_Integer", False) else math.inf)
    return out


def _example(program: ExportedProgram, inputs: Sequence[Port]) -> tuple[Tensor, ...]:
    if program.example_inputs is None:
        raise ModelError("it has no example inputs")
    leaves = pytree.tree_leaves(program.example_inputs)
    if len(leaves) != len(inputs) or not all(isinstance(one, Tensor) for one in leaves):
        raise ModelError("its example inputs are not its tensors")
    return tuple(leaves)


def _probe(
    inputs: Sequence[Port], example: tuple[Tensor, ...], bounds: Mapping[Any, tuple[int, float]], least: int
) -> tuple[tuple[Tensor, ...], Sequence[int]]:
    """What the model is timed with and, where no row depends on another, found out to be so: the example's rows in any
    order, at least so many, and not all alike. The sizes of blocks: none where that cannot be had.
    """
    free = {dim for port in inputs for dim in port.dims if not isinstance(dim, int)}
    if len(free) != 1 or any(free.intersection(port.dims[1:]) for port in inputs):
        return example, ()
    (size,) = free
    with_rows = [bool(port.dims) and port.dims[0] == size for port in inputs]
    count = max(least, *(len(one) for one, rows in zip(example, with_rows, strict=True) if rows))
    low, high = bounds.get(size, (0, 0))
    count = int(min(count, high))
    chance = torch.Generator().manual_seed(0)
    have = next(len(one) for one, rows in zip(example, with_rows, strict=True) if rows)
    if not have or count <= max(low, 2):
        return example, ()
    count -= 1 - count % 2  # odd: halves of other numbers of rows never have the same mean by chance
    order = torch.randint(have, (count,), generator=chance)
    order[: min(have, count)] = torch.randperm(have, generator=chance)[:count]
    found = [_varied(one[order], chance) if rows else one for one, rows in zip(example, with_rows, strict=True)]
    vary = all(bool((one != one[:1]).any()) for one, rows in zip(found, with_rows, strict=True) if rows)
    return tuple(found), BLOCKS if vary else ()


def _seconds(program: ExportedProgram, example: tuple[Tensor, ...]) -> float:
    arguments, named = pytree.tree_unflatten(example, program.call_spec.in_spec)
    module, took = program.module(check_guards=False), []
    with torch.inference_mode():
        for _ in range(5):
            began = time.thread_time()
            module(*arguments, **named)
            took.append(time.thread_time() - began)
    return min(took)


def _varied(rows: Tensor, chance: torch.Generator) -> Tensor:
    """Other values of the same kind, where all rows are alike."""
    if bool((rows != rows[:1]).any()):
        return rows
    if rows.is_floating_point():
        return rows + 0.1 * torch.rand(rows.shape, generator=chance).to(rows.dtype)
    low, high = (0, 1) if rows.dtype is torch.bool else (int(rows.min()), int(rows.max()))
    return torch.randint(low, high + 1, rows.shape, generator=chance).to(rows.dtype)


def _alike(one: Tensor, other: Tensor) -> bool:
    """But for rounding, which may change an integer that is made of floats."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not one.is_floating_point() or not one.numel():
        return True
    error = max(_ERROR, 4 * torch.finfo(one.dtype).eps)
    scale = float(other.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(one, other, rtol=error, atol=error * scale, equal_nan=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a process serves; read once, so that new processes serve what the folder holds then."""

    models: Mapping[str, Served]
    broken: Mapping[str, str]  # name -> why

    @classmethod
    def read(cls, path: Path) -> Folder:
        """Never fails: what is wrong is in `broken` and in the log."""
        models, broken = dict[str, Served](), dict[str, str]()
        files = sorted(path.glob("*.pt2"))
        if not files:
            LOG.error("there is no model to serve", extra={"folder": str(path)})
        for file in files:
            name, began = file.name.removesuffix(".pt2"), time.monotonic()
            try:
                models[name] = served_of(file)
            except ModelError as error:
                broken[name] = str(error)
                LOG.error("model %s is not served: %s", name, error)
                continue
            operators, seconds = len(models[name].model.graph.operators), round(time.monotonic() - began, 1)
            LOG.info("model %s is served", name, extra={"operators": operators, "seconds": seconds})
        gc.collect()  # programs, which are no longer needed
        return cls(models, broken)
