"""A PyTorch module -> operators with their data dependencies: the units that the scheduler places.

`torch.export` gives the module's ATen operations for any number of rows (candidates). Operations without rows are the
user's part; most take less time than to place one, so they are grouped: in an order in which the branches of the graph
lie one after the other, consecutive operations are one operator until they have taken `grain_s` together. Operations
with rows are, where no row depends on another, one operator that runs on blocks of rows (blocks.py), which several
lanes, and other queries in between, share. A light user's part is inside of it: each lane that takes blocks computes it
first, once. Where rows depend on each other they are grouped as the user's part is. Blocks depend on the number of rows
alone, so results are the same under every schedule.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.passes.split_module import split_module

from api.runtime import blocks, forms
from api.runtime.blocks import Blocked
from api.runtime.lower import lowered

GRAIN_S = 300e-6  # some twenty times what placing an operator costs
BLOCKS = (8, 16, 32, 64, 96)
TAKE_S = 30e-6  # what one more operator costs on busy lanes: the interpreter's own memory has left the cache
ONCE_S = 200e-6  # that each lane which shares a query may take for its user's part, so that none waits for another
PLACE_S = 10e-6  # what one more block costs where another lane reads weights too
_TIMED = 5  # runs of an example, of which the median counts
_SMALLER = 0.02  # what a smaller block may cost, for others wait less long for its end
_SLOWER = 1.2  # by how much two measurements of the same may differ, one after the other
_ROW_ERROR = 1e-4  # between a row computed alone and among others


Chosen = dict[str, tuple[Callable[..., Any], float]]  # of each group its form, and the seconds that takes


class GraphError(ValueError):
    """A module that cannot be made into operators; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """`run` takes the values in `inputs` and gives those in `outputs`."""

    run: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    cost: float  # s
    rows: int = 0  # of which that is the cost; 0: it does not depend on them
    blocks: bool = False  # runs on blocks of the rows: `run` is a Blocked

    def made(self, found: Any) -> tuple[Any, ...]:
        """What `run` has given, by output."""
        if len(self.outputs) == 1:
            return (found,)
        if len(found) != len(self.outputs):
            raise ValueError(f"an operator gave {len(found)} values instead of {len(self.outputs)}")
        return tuple(found)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """Operators in an order in which they may run. Values are numbered, the module's inputs first."""

    inputs: int
    operators: tuple[Operator, ...]
    outputs: tuple[int, ...]
    single: bool  # the module gives one tensor, not a tuple
    rows: tuple[int | None, ...] = ()  # of each input the dimension that differs from query to query
    block: int | None = None  # rows of a usual block; None: no operator runs in blocks
    bytes: tuple[float, float] = (0.0, 0.0)  # of a query's values: whatever its rows, and for each of them

    def rows_of(self, inputs: Sequence[Any]) -> int:
        """The rows of a query; 1 where the module has none. Raises GraphError where inputs disagree."""
        return _rows(inputs, self.rows)

    def bytes_of(self, rows: int) -> int:
        """What the values of a query may take, inputs and answer included."""
        return math.ceil(self.bytes[0] + self.bytes[1] * rows)

    def blocks_of(self, rows: int) -> int:
        """In which the one operator that runs in blocks, if there is one, does."""
        return 1 if self.block is None else blocks.count(rows, self.block)

    @functools.cached_property
    def parted(self) -> int:
        """The operator that runs in blocks; -1: none."""
        return next((at for at, one in enumerate(self.operators) if one.blocks), -1)

    @functools.cached_property
    def before(self) -> list[tuple[int, ...]]:
        """Of each operator those that it waits for."""
        made = {value: at for at, one in enumerate(self.operators) for value in one.outputs}
        return [tuple(sorted({made[value] for value in one.inputs if value in made})) for one in self.operators]

    @functools.cached_property
    def then(self) -> list[list[int]]:
        """Of each operator those that wait for it."""
        return [[at for at, own in enumerate(self.before) if one in own] for one in range(len(self.operators))]

    @functools.cached_property
    def waits(self) -> list[int]:
        """Of each operator: for how many."""
        return [len(own) for own in self.before]

    @functools.cached_property
    def first(self) -> list[int]:
        """Operators that wait for none."""
        return [at for at, own in enumerate(self.before) if not own]

    @functools.cached_property
    def onward(self) -> list[tuple[int, list[int]]]:
        """Operators that others wait for, the last one first, with those."""
        return [(at, then) for at, then in enumerate(self.then) if then][::-1]

    @functools.cached_property
    def uses(self) -> list[int]:
        """Of each value: how many operators, and outputs, read it."""
        last = max([self.inputs - 1, *self.outputs, *(value for one in self.operators for value in one.outputs)])
        found = [0] * (last + 1)
        for read in (self.outputs, *(one.inputs for one in self.operators)):
            for value in read:
                found[value] += 1
        return found

    def begun(self, inputs: Sequence[Any], rows: int) -> list[Any]:
        """The values of a query before its first operator runs, with memory for what is made in blocks."""
        values = [*inputs, *[None] * (len(self.uses) - self.inputs)]
        if self.parted >= 0:
            own = self.operators[self.parted]
            assert isinstance(own.run, Blocked)
            for value in own.inputs:
                if value < self.inputs:
                    values[value] = values[value].contiguous()  # once, not by each lane
            for value, memory in zip(own.outputs, own.run.outputs(rows), strict=True):
                values[value] = memory
        return values

    def result(self, values: Sequence[Any]) -> Any:
        return values[self.outputs[0]] if self.single else tuple([values[one] for one in self.outputs])

    def run(self, *inputs: Any) -> Any:
        """One operator after the other: what every schedule gives."""
        return self.result(self.run_values(inputs))

    def run_values(self, inputs: Sequence[Any]) -> list[Any]:
        """All values of a query."""
        _rows(inputs, self.rows)
        values = [*inputs, *[None] * (len(self.uses) - self.inputs)]
        for one in self.operators:
            for value, own in zip(one.outputs, one.made(one.run(*[values[at] for at in one.inputs])), strict=True):
                values[value] = own
        return values


def capture(
    module: nn.Module,
    example: tuple[Tensor, ...],
    rows: Sequence[int | None] = (),
    grain_s: float = GRAIN_S,
    blocks: Sequence[int] = BLOCKS,
    exact: bool = False,
) -> Graph:
    """`rows`: of each input the dimension that differs from query to query (the number of candidates), None for none.
    `example` is timed, so it is best of a usual size. `blocks`: sizes to choose from, none to run all rows at once.
    `exact`: the module's own operations on all rows at once, so that results are its bits. Raises GraphError.
    """
    number = Dim("rows", min=2)
    shapes = tuple(None if at is None else {at: number} for at in rows) or None
    try:
        program = export(module.eval(), example, dynamic_shapes=shapes)
    except Exception as error:  # whatever torch finds that it cannot follow
        raise GraphError(f"torch.export cannot follow the module: {str(error).splitlines()[0]}") from error
    return capture_program(program, example, grain_s, blocks, exact)


def capture_program(
    program: ExportedProgram,
    example: tuple[Tensor, ...],
    grain_s: float = GRAIN_S,
    blocks: Sequence[int] = BLOCKS,
    exact: bool = False,
) -> Graph:
    """`capture` of what torch.export has given. `example`: the leaves of its inputs. Where more than one size differs
    from query to query, no operator runs in blocks.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a lane, and so that this thread's CPU time is all that an operation takes
    try:
        return _captured(program, example, grain_s, blocks, exact)
    finally:
        torch.set_num_threads(threads)


def _captured(
    program: ExportedProgram, example: tuple[Tensor, ...], grain_s: float, blocks: Sequence[int], exact: bool
) -> Graph:
    whole = program.module(check_guards=False)
    assert isinstance(whole, fx.GraphModule)
    whole.graph.eliminate_dead_code()
    whole.recompile()
    rows = tuple(_dynamic(node) for node in whole.graph.nodes if node.op == "placeholder")
    single = program.call_spec.out_spec.is_leaf()
    order = _branches(whole)
    for node in reversed(whole.graph.nodes):
        if node.op not in ("placeholder", "get_attr", "output") and node not in order:
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                raise GraphError("the module changes a value by a view of it; make it functional (run_decompositions)")
            whole.graph.erase_node(node)  # a check of what the capture has assumed
    whole.recompile()
    with torch.inference_mode():
        costs = _costs(whole, example)
        of_rows = _with_rows(whole)
        user = [node for node in order if node.name not in of_rows]
        item = [node for node in order if node.name in of_rows]
        groups, known = _of_user(whole, user, item, costs, grain_s, example, exact)
        first = 1 + max(groups.values(), default=-1)
        count = _rows(example, rows)
        on_host = not any(one.is_cuda for one in example)  # a GPU has all rows at once
        if blocks and item and not exact and on_host and all(at in (0, None) for at in rows):
            parted = _split(whole, groups | dict.fromkeys((node.name for node in item), first))
            found = _in_blocks(parted, first, example, blocks)
            if found is not None:
                blocked, block, seconds = found
                chosen = _chosen(parted, example, exact, known | {f"submod_{first}": (blocked, seconds)})
                of_users = sum(own for _, own in chosen.values()) - seconds
                if user and of_users < min(ONCE_S, grain_s):
                    together = _split(whole, dict.fromkeys((node.name for node in (*user, *item)), 0))
                    apart = of_users + seconds * blocked.count(count)
                    one, size, block_s = _in_blocks(together, 0, example, blocks) or found
                    if one.once and one is not blocked and block_s * one.count(count) < _SLOWER * (apart + TAKE_S):
                        one.once_s = of_users
                        block_s = max(block_s - of_users / one.count(count), block_s / 10)
                        return _graph(together, {"submod_0": (one, block_s)}, example, rows, single, {0: size})
                return _graph(parted, chosen, example, rows, single, {first: block})
        groups |= _grouped(item, costs, grain_s, first)
        split = _split(whole, groups)
        with_rows = dict.fromkeys((groups[node.name] for node in item), count)
        return _graph(split, _chosen(split, example, exact, known), example, rows, single, with_rows, blocks=False)


def _of_user(
    whole: fx.GraphModule,
    user: Sequence[fx.Node],
    item: Sequence[fx.Node],
    costs: Mapping[str, float],
    grain_s: float,
    example: tuple[Tensor, ...],
    exact: bool,
) -> tuple[dict[str, int], Chosen]:
    """The groups of operations without rows, and the forms that are known of these: generated functions take less than
    torch's operations, so as one group they may take no longer than one should."""
    groups = _grouped(user, costs, grain_s, 0)
    if exact or not grain_s or not any(groups.values()):
        return groups, {}
    alone = dict.fromkeys(groups, 0)
    split = _split(whole, alone | dict.fromkeys((node.name for node in item), 1))
    chosen = _chosen(split, example, exact, {"submod_1": (split, 0.0)})  # of the first one alone
    (_, seconds) = own = chosen["submod_0"]
    if seconds <= grain_s:
        return alone, {"submod_0": own}
    return _grouped(user, costs, grain_s * sum(costs[node.name] for node in user) / seconds, 0), {}


def _dynamic(node: fx.Node) -> int | None:
    """The dimension of an input that is not a number; None where the inputs have several such sizes."""
    found = _sizes(node)
    every = {str(size) for one in node.graph.nodes if one.op == "placeholder" for size in _sizes(one).values()}
    return next(iter(found)) if len(found) == len(every) == 1 else None


def _sizes(node: fx.Node) -> dict[int, Any]:
    """The dimensions of an input that are no numbers."""
    value = node.meta.get("val")
    return (
        {at: size for at, size in enumerate(value.shape) if not isinstance(size, int)}
        if isinstance(value, Tensor)
        else {}
    )


def _with_rows(whole: fx.GraphModule) -> set[str]:
    """The operations that see an input with rows, or what came of one."""
    found = set[fx.Node]()
    for node in whole.graph.nodes:
        if (node.op == "placeholder" and _dynamic(node) is not None) or found.intersection(node.all_input_nodes):
            found.add(node)
    return {node.name for node in found}


def _costs(whole: fx.GraphModule, example: tuple[Tensor, ...]) -> dict[str, float]:
    """Seconds of each operation."""
    found: dict[str, list[float]] = {}
    now = forms.clock(example)

    class Timed(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            began = now()
            value = super().run_node(n)
            found.setdefault(n.name, []).append(now() - began)
            return value

    for _ in range(_TIMED + 1):
        Timed(whole).run(*example, enable_io_processing=False)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def _branches(whole: fx.GraphModule) -> list[fx.Node]:
    """The operations in the order of a depth-first walk from the output: what one operation needs stands together."""
    order: dict[fx.Node, None] = {}
    stack: list[tuple[fx.Node, bool]] = [(node, False) for node in whole.graph.nodes if node.op == "output"]
    while stack:
        node, entered = stack.pop()
        if entered:
            order[node] = None
        elif node not in order:
            stack.append((node, True))
            stack += [(before, False) for before in reversed(node.all_input_nodes) if before not in order]
    return [node for node in order if node.op not in ("placeholder", "get_attr", "output")]


def _grouped(order: Sequence[fx.Node], costs: Mapping[str, float], grain_s: float, first: int) -> dict[str, int]:
    """Operation -> its group, from `first` on."""
    groups, group, spent = dict[str, int](), first, 0.0
    for node in order:
        if spent >= grain_s:
            group, spent = group + 1, 0.0
        groups[node.name] = group
        spent += costs[node.name]
    return groups


def _split(whole: fx.GraphModule, groups: Mapping[str, int]) -> fx.GraphModule:
    """A module with one submodule a group, which holds its own constants."""
    split = split_module(whole, None, lambda node: groups[node.name])  # type: ignore[arg-type]
    for node in list(split.graph.nodes):
        if node.op != "call_module":
            continue
        module = split.get_submodule(str(node.target))
        assert isinstance(module, fx.GraphModule)
        takes = [inner for inner in module.graph.nodes if inner.op == "placeholder"]
        for number, (inner, outer) in enumerate(zip(takes, node.args, strict=True)):
            if isinstance(outer, fx.Node) and outer.op == "get_attr":
                value = operator.attrgetter(str(outer.target))(split)
                module.register_buffer(f"constant_{number}", value.detach(), persistent=False)
                with module.graph.inserting_before(inner):
                    inner.replace_all_uses_with(module.graph.get_attr(f"constant_{number}"))
                module.graph.erase_node(inner)
        node.args = tuple(one for one in node.args if not (isinstance(one, fx.Node) and one.op == "get_attr"))
        module.recompile()
    split.recompile()
    return split


def _values(split: fx.GraphModule, example: tuple[Tensor, ...]) -> dict[str, tuple[Any, ...]]:
    """What each group of the example is given."""
    found: dict[str, tuple[Any, ...]] = {}

    class Noted(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            found[str(target)] = args
            return super().call_module(target, args, kwargs)

    Noted(split).run(*example)
    return found


def _chosen(split: fx.GraphModule, example: tuple[Tensor, ...], exact: bool, known: Chosen) -> Chosen:
    """Of each group its fastest form, and the seconds that takes."""
    found = dict(known)
    for name, given in _values(split, example).items():
        if name not in found:
            module = split.get_submodule(name)
            assert isinstance(module, fx.GraphModule)
            made = [lowered(module, given)] if exact else [form.call for form in forms.forms(module, given)]
            found[name] = min(zip(made, forms.seconds(made, given), strict=True), key=operator.itemgetter(1))
    return found


def _in_blocks(
    split: fx.GraphModule, group: int, example: tuple[Tensor, ...], sizes: Sequence[int]
) -> tuple[Blocked, int, float] | None:
    """The form of that group in blocks, the smallest about as fast as any, its rows and seconds; None where rows
    are not each on their own."""
    name = f"submod_{group}"
    given = _values(split, example)[name]
    (node,) = (node for node in split.graph.nodes if node.target == name)
    parted = [isinstance(one, fx.Node) and one.op == "placeholder" and _dynamic(one) is not None for one in node.args]
    count = next((len(value) for value, by_rows in zip(given, parted, strict=True) if by_rows), 0)
    module = split.get_submodule(name)
    assert isinstance(module, fx.GraphModule)
    if count < 2 or not _separable(module, given, parted, count):
        return None
    tried, made = [], [Blocked(form, given, parted, count) for form in forms.forms(module, given)]
    every = sorted({min(size, count) for size in (*sizes, count)})
    sized = [(blocked.sized(size), size) for size in every for blocked in made]
    for whole, (own, size) in zip(forms.seconds([own for own, _ in sized], given), sized, strict=True):
        if size <= max(sizes) or whole <= GRAIN_S:  # more at once is what lanes could share
            blocks = own.count(count)
            tried.append((size, whole + PLACE_S * blocks, own, whole / blocks))
    tried.sort(key=operator.itemgetter(0, 1))
    most = (1 + _SMALLER) * min(seconds for _, seconds, *_ in tried)
    return next((own, size, block) for size, seconds, own, block in tried if seconds <= most)


def _separable(module: nn.Module, given: tuple[Any, ...], parted: Sequence[bool], count: int) -> bool:
    """Whether rows computed among fewer others are the same."""

    def many(value: Any) -> tuple[Any, ...]:
        return tuple(value) if isinstance(value, tuple | list) else (value,)

    whole = many(module(*given))
    halves = [value.tensor_split(2) if by_rows else (value,) * 2 for value, by_rows in zip(given, parted, strict=True)]
    parts = [[half[at] for half in halves] for at in range(2)]
    if not all(isinstance(value, Tensor) and value.ndim and len(value) == count for value in whole):
        return False
    joined = [torch.cat(part) for part in zip(*(many(module(*part)) for part in parts), strict=True)]
    return all(
        one.shape == other.shape and torch.allclose(one, other, rtol=_ROW_ERROR, atol=_ROW_ERROR, equal_nan=True)
        for one, other in zip(whole, joined, strict=True)
    )


def _graph(
    split: fx.GraphModule,
    chosen: Chosen,
    example: tuple[Tensor, ...],
    rows: tuple[int | None, ...],
    single: bool,
    with_rows: Mapping[int, int],
    blocks: bool = True,
) -> Graph:
    """`with_rows`: of each group that has rows, of how many its seconds are."""
    operators: list[Operator] = []
    outputs: tuple[int, ...] = ()
    nodes = list(split.graph.nodes)
    places: dict[fx.Node, int] = {node: at for at, node in enumerate(n for n in nodes if n.op == "placeholder")}
    inputs_count = count = len(places)
    of_rows = {f"submod_{group}": number for group, number in with_rows.items()}
    for node in nodes:
        if node.op == "call_module":
            many = [user for user in node.users if user.target is operator.getitem]
            results = range(count, count + 1 + max((int(user.args[1]) for user in many), default=0))
            count += len(results)
            places |= {user: results[int(user.args[1])] for user in many} or {node: results[0]}
            name = str(node.target)
            form, seconds = chosen[name]
            inputs, number = tuple(places[one] for one in node.args), of_rows.get(name, 0)
            operators.append(Operator(form, inputs, tuple(results), seconds, number, bool(number) and blocks))
        elif node.op == "output":
            (last,) = node.args
            last = last if isinstance(last, tuple | list) else (last,)
            outputs = tuple(places[one] for one in last)
    block = next(iter(with_rows.values()), None) if blocks else None
    graph = Graph(inputs_count, tuple(operators), outputs, single, rows, block)
    return dataclasses.replace(graph, bytes=_bytes(graph, example))


def _rows(inputs: Sequence[Any], rows: Sequence[int | None]) -> int:
    """Of inputs with rows in those dimensions; 1 where none has them. Raises GraphError where they disagree."""
    found = {int(value.shape[at]) for value, at in zip(inputs, rows, strict=False) if at is not None}
    if len(found) > 1:
        raise GraphError(f"inputs have different numbers of rows: {sorted(found)}")
    return found.pop() if found else 1


def _bytes(graph: Graph, example: tuple[Tensor, ...]) -> tuple[float, float]:
    """Of inputs, of what operators give, and of the answer."""
    by_rows = {place for place, at in enumerate(graph.rows) if at is not None}
    by_rows |= {place for one in graph.operators if one.rows for place in one.outputs}
    fixed = each = 0.0
    for place, value in enumerate(graph.run_values(example)):
        size = value.nbytes if isinstance(value, Tensor) else 0
        fixed, each = (fixed, each + size) if place in by_rows else (fixed + size, each)
    return fixed, each / graph.rows_of(example)
