"""A PyTorch module -> operators with their data dependencies: the units that the scheduler places.

`torch.export` gives the module's ATen operations for any number of rows (candidates). Operations without rows are the
user's part; most take less time than to place one, so they are grouped: in an order in which the branches of the graph
lie one after the other, consecutive operations are one operator until they have taken `grain_s` together. Operations
with rows are, where no row depends on another, one operator that runs once for every block of rows: its intermediate
values stay in the core's cache, and the blocks of a query are what several lanes, and other queries in between, share.
Where rows depend on each other they are grouped as the user's part is. Blocks depend on the number of rows alone, so
results are the same under every schedule.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.passes.split_module import split_module

from api.runtime import forms
from api.runtime.lower import lowered

GRAIN_S = 300e-6  # some twenty times what placing an operator costs
BLOCKS = (8, 16, 32, 64, 96)
PLACE_S = 40e-6  # what one more operator costs on lanes that are busy: to place it, and to read its weights again
_PLANS = 256  # blocks of a query whose plan is kept; all of these take 13 MB
_TIMED = 5  # runs of an example, of which the median counts
_SMALLER = 0.02  # what a smaller block may cost, for others wait less long for its end
_ROW_ERROR = 1e-4  # between a row computed alone and among others


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
    blocks: bool = False  # runs once for every block of rows


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
    _plans: dict[int, Plan] = dataclasses.field(default_factory=dict)

    def rows_of(self, inputs: Sequence[Any]) -> int:
        """The rows of a query; 1 where the module has none. Raises GraphError where inputs disagree."""
        return _rows(inputs, self.rows)

    def bytes_of(self, rows: int) -> int:
        """What the values of a query may take, inputs and answer included."""
        return math.ceil(self.bytes[0] + self.bytes[1] * rows)

    def plan(self, rows: int) -> Plan:
        blocks = 1 if self.block is None else max(1, round(rows / self.block))
        plan = self._plans.get(blocks) or _plan(self, blocks)
        if blocks <= _PLANS:
            self._plans[blocks] = plan
        return plan

    def begun(self, inputs: Sequence[Any], plan: Plan) -> list[Any]:
        """The slots of a query before its first step."""
        slots: list[Any] = [None] * len(plan.uses)
        for place, value in enumerate(inputs):
            into = plan.places[place]
            if len(into) == 1:
                slots[into[0]] = value
            else:
                at = self.rows[place]
                assert at is not None
                for slot, part in zip(into, value.tensor_split(plan.blocks, at), strict=True):
                    slots[slot] = part
        return slots

    def result(self, slots: Sequence[Any], plan: Plan) -> Any:
        parts = [[slots[slot] for slot in plan.places[place]] for place in self.outputs]
        found = tuple(part[0] if len(part) == 1 else torch.cat(part) for part in parts)
        return found[0] if self.single else found

    def run(self, *inputs: Any) -> Any:
        """One step after the other: what every schedule gives."""
        return self.result(*self.run_slots(inputs))

    def run_slots(self, inputs: Sequence[Any]) -> tuple[list[Any], Plan]:
        """All values of a query."""
        plan = self.plan(self.rows_of(inputs))
        slots = self.begun(inputs, plan)
        for step in plan.steps:
            for slot, value in zip(step.outputs, step.run(slots), strict=True):
                slots[slot] = value
        return slots, plan


@dataclasses.dataclass(frozen=True)
class Step:
    """An operator of a query, on one of its blocks."""

    operator: int
    block: int
    call: Callable[..., Any]
    inputs: tuple[int, ...]  # slots
    outputs: tuple[int, ...]
    waits: tuple[int, ...]  # steps that must have run
    then: tuple[int, ...]  # steps that wait for this one

    def run(self, slots: Sequence[Any]) -> tuple[Any, ...]:
        return self.made(self.call(*[slots[slot] for slot in self.inputs]))

    def made(self, found: Any) -> tuple[Any, ...]:
        """What the call has given, by output."""
        if len(self.outputs) == 1:
            return (found,)
        if len(found) != len(self.outputs):
            raise ValueError(f"an operator gave {len(found)} values instead of {len(self.outputs)}")
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps of queries of so many blocks."""

    steps: tuple[Step, ...]
    places: tuple[tuple[int, ...], ...]  # of each value its slots: one, or one a block
    uses: tuple[int, ...]  # of each slot: how many steps, and outputs, read it
    blocks: int

    @functools.cached_property
    def waits(self) -> list[int]:
        """Of each step: for how many."""
        return [len(step.waits) for step in self.steps]

    @functools.cached_property
    def first(self) -> list[int]:
        """Steps that wait for none."""
        return [at for at, step in enumerate(self.steps) if not step.waits]

    @functools.cached_property
    def onward(self) -> list[tuple[int, tuple[int, ...]]]:
        """Steps that others wait for, the last one first, with those."""
        return [(at, step.then) for at, step in enumerate(self.steps) if step.then][::-1]

    def rows_of_block(self, block: int, rows: int) -> int:
        """As `torch.tensor_split` parts them: sizes differ by 1 at most."""
        return rows // self.blocks + (block < rows % self.blocks)


def _plan(graph: Graph, blocks: int) -> Plan:
    parted = {place for place, at in enumerate(graph.rows) if at is not None and graph.block is not None}
    parted |= {place for one in graph.operators if one.blocks for place in one.outputs}
    values = 1 + max([graph.inputs - 1, *(place for one in graph.operators for place in one.outputs)], default=-1)
    places, count = [], 0
    for place in range(values):
        width = blocks if place in parted else 1
        places.append(tuple(range(count, count + width)))
        count += width
    steps: list[Step] = []
    made: dict[int, int] = {}  # slot -> step
    for number, one in enumerate(graph.operators):
        for block in range(blocks if one.blocks else 1):

            def slot(place: int, block: int = block) -> int:
                return places[place][block if len(places[place]) > 1 else 0]

            inputs, outputs = tuple(map(slot, one.inputs)), tuple(map(slot, one.outputs))
            waits = tuple(sorted({made[at] for at in inputs if at in made}))
            made |= dict.fromkeys(outputs, len(steps))
            steps.append(Step(number, block, one.run, inputs, outputs, waits, ()))
    then: list[list[int]] = [[] for _ in steps]
    uses = [0] * count
    for at, step in enumerate(steps):
        for before in step.waits:
            then[before].append(at)
        for read in step.inputs:
            uses[read] += 1
    for place in graph.outputs:
        for read in places[place]:
            uses[read] += 1
    steps = [dataclasses.replace(step, then=tuple(after)) for step, after in zip(steps, then, strict=True)]
    return Plan(tuple(steps), tuple(places), tuple(uses), blocks)


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
    with torch.inference_mode():
        costs = _costs(whole, example)
        of_rows = _with_rows(whole)
        user = [node for node in order if node.name not in of_rows]
        item = [node for node in order if node.name in of_rows]
        groups = _grouped(user, costs, grain_s, 0)
        first = 1 + max(groups.values(), default=-1)
        if blocks and item and not exact and all(at in (0, None) for at in rows):
            parted = _split(whole, groups | dict.fromkeys((node.name for node in item), first))
            found = _in_blocks(parted, first, example, blocks)
            if found is not None:
                form, block, seconds = found
                chosen = _chosen(parted, example, exact, {f"submod_{first}": (form, seconds)})
                return _graph(parted, chosen, example, rows, single, {first: block})
        groups |= _grouped(item, costs, grain_s, first)
        split = _split(whole, groups)
        count = _rows(example, rows)
        with_rows = dict.fromkeys((groups[node.name] for node in item), count)
        return _graph(split, _chosen(split, example, exact, {}), example, rows, single, with_rows, blocks=False)


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


Chosen = dict[str, tuple[Callable[..., Any], float]]


def _chosen(split: fx.GraphModule, example: tuple[Tensor, ...], exact: bool, known: Chosen) -> Chosen:
    """Of each group its fastest form, and the seconds that takes."""
    found = dict(known)
    for name, given in _values(split, example).items():
        if name not in found:
            module = split.get_submodule(name)
            assert isinstance(module, fx.GraphModule)
            made = [lowered(module, given)] if exact else forms.forms(module, given)
            found[name] = min(((form, forms.seconds(form, given)) for form in made), key=operator.itemgetter(1))
    return found


def _in_blocks(
    split: fx.GraphModule, group: int, example: tuple[Tensor, ...], sizes: Sequence[int]
) -> tuple[Callable[..., Any], int, float] | None:
    """The form of that group in blocks, the smallest about as fast as any, its rows and seconds; None where rows
    are not each on their own."""
    name = f"submod_{group}"
    given = _values(split, example)[name]
    (node,) = (node for node in split.graph.nodes if node.target == name)
    parted = [isinstance(one, fx.Node) and one.op == "placeholder" and _dynamic(one) is not None for one in node.args]
    count = next((len(value) for value, by_rows in zip(given, parted, strict=True) if by_rows), 0)
    module = split.get_submodule(name)
    assert isinstance(module, fx.GraphModule)
    if count < 2 or not _separable(module, given, _pieces(given, parted, -(-count // 2)), count):
        return None
    tried, made = [], forms.forms(module, given)
    for size in sorted({min(size, count) for size in (*sizes, count)}):
        parts = _pieces(given, parted, size)
        whole, form = min(((forms.seconds(form, *parts), form) for form in made), key=operator.itemgetter(0))
        if size > max(sizes) and whole > GRAIN_S:
            break  # all rows at once, which lanes could share
        tried.append((whole + PLACE_S * len(parts), form, size, forms.seconds(form, parts[0])))
    most = (1 + _SMALLER) * min(seconds for seconds, *_ in tried)
    return next((form, size, block) for seconds, form, size, block in tried if seconds <= most)


def _pieces(given: tuple[Any, ...], parted: Sequence[bool], size: int) -> list[tuple[Any, ...]]:
    """The calls that take so many rows each of the inputs that are parted."""
    number = max(1, round(next(len(value) for value, by_rows in zip(given, parted, strict=True) if by_rows) / size))
    parts = [value.tensor_split(number) if by_rows else None for value, by_rows in zip(given, parted, strict=True)]
    return [
        tuple(value if part is None else part[at] for value, part in zip(given, parts, strict=True))
        for at in range(number)
    ]


def _separable(module: nn.Module, given: tuple[Any, ...], parts: Iterable[tuple[Any, ...]], count: int) -> bool:
    """Whether rows computed among fewer others are the same."""

    def many(value: Any) -> tuple[Any, ...]:
        return tuple(value) if isinstance(value, tuple | list) else (value,)

    whole = many(module(*given))
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
    slots, plan = graph.run_slots(example)
    by_rows = {place for place, at in enumerate(graph.rows) if at is not None}
    by_rows |= {place for one in graph.operators if one.rows for place in one.outputs}
    fixed = each = 0.0
    for place, own in enumerate(plan.places):
        size = sum(slots[slot].nbytes for slot in own if isinstance(slots[slot], Tensor))
        size *= 2 if place in graph.outputs else 1  # joined
        fixed, each = (fixed, each + size) if place in by_rows else (fixed + size, each)
    return fixed, each / graph.rows_of(example)
