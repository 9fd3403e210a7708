"""A generated function under construction: values of a graph's nodes, the memory that some of them take, and the calls
that compute those.

Memory is one piece a lane (arena.py), used again when what is in it is read no more. Each call is of a nest of loops of
its own, or of a layer (product.py).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from llvmlite import ir
from torch import Tensor, fx

from api.runtime import product
from api.runtime.nest import ONE, ZERO, Buffer, Index, Nest, Place, Size, Value, aligned, contiguous, stored
from api.runtime.nest import product as times
from api.runtime.product import part
from infra.codegen import F32, I8, I64, Code

KINDS = {torch.float32: F32, torch.int64: I64, torch.bool: I8}
_BYTES = {F32: 4, I64: 8, I8: 1}
_LINE = 64  # bytes, where what is in memory begins


class UnsupportedError(Exception):
    """No function can be made of this operation."""


@dataclasses.dataclass
class _Task:
    """A call in the function."""

    reads: tuple[Buffer, ...]
    writes: Buffer
    call: Callable[[Code, Callable[[Buffer], Any]], None]  # given the function, and where buffers are


def _is_known(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in KINDS and value.device.type == "cpu"


class Writer:
    """Values of nodes, and the calls that compute those that are in memory."""

    def __init__(self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> None:
        self.nodes = set(nodes)
        self.symbol: Any = None
        self._keeps: list[Any] = []  # what the function points at
        self.values: dict[fx.Node, Value] = {}
        self._tasks: list[_Task] = []
        self._placed: dict[Value, Value] = {}
        self._constants: dict[Buffer, int] = {}
        self._outputs = list(outputs)
        self._flag = Buffer(I64, ONE)
        kinds = [self.kind(node) for node in (*inputs, *outputs)]
        self._arguments = [I8.as_pointer(), I64, *(kind.as_pointer() for kind in kinds)]
        self._code = Code("group", self._arguments, answers=True)
        self._ports: dict[Buffer, int] = {}  # inputs and outputs, in the order of arguments
        for place, node in enumerate(inputs):
            shape = self.shape(node)
            buffer = Buffer(self.kind(node), times(shape))
            self._ports[buffer] = place
            self.values[node] = stored(Place(buffer, contiguous(shape)), shape)

    # what nodes are like

    def kind(self, node: fx.Node) -> Any:
        if not _is_known(node):
            raise UnsupportedError(node)
        return KINDS[node.meta["val"].dtype]

    def shape(self, node: fx.Node) -> tuple[Size, ...]:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise UnsupportedError(node)
        try:
            found = tuple(self.size(one) for one in value.shape)
        except UnsupportedError as error:
            raise UnsupportedError(node) from error
        if sum(bool(one.each) for one in found) > 1 or ZERO in found:
            raise UnsupportedError(node)
        return found

    def size(self, size: Any) -> Size:
        if isinstance(size, int):
            return Size(0, size)
        expression = size.node.expr
        if expression.is_Integer:
            return Size(0, int(expression))
        (symbol, *more) = expression.free_symbols
        self.symbol = self.symbol or symbol
        each = expression.coeff(symbol)
        if more or symbol != self.symbol or expression != each * symbol or not each.is_Integer:
            raise UnsupportedError(size)
        return Size(int(each), 0)

    # values

    def value(self, one: Any) -> Value:
        """Of a node, or of a number."""
        if isinstance(one, fx.Node):
            if one not in self.values:
                raise UnsupportedError(one)
            return self.values[one]
        if isinstance(one, bool) or not isinstance(one, int | float):
            raise UnsupportedError(one)
        constant = ir.Constant(F32, float(one)) if isinstance(one, float) else I64(one)
        return Value((), constant.type, (), lambda *_: constant)

    def constant(self, tensor: Tensor) -> Value:
        if tensor.dtype not in KINDS or tensor.device.type != "cpu" or not tensor.numel():
            raise UnsupportedError(tensor)
        tensor = tensor.detach().contiguous()
        self._keeps.append(tensor)
        shape = tuple(Size(0, size) for size in tensor.shape)
        buffer = Buffer(KINDS[tensor.dtype], times(shape))
        self._constants[buffer] = tensor.data_ptr()
        return stored(Place(buffer, contiguous(shape)), shape)

    def broadcast(self, value: Value, shape: tuple[Size, ...]) -> Value:
        """As a part of that shape; what computes something is not computed twice."""
        if value.shape == shape:
            return value
        if value.works and times(value.shape) != times(shape):
            value = self.placed(value)
        return value.view(shape, aligned(value.shape, shape))

    def placed(self, value: Value) -> Value:
        """In memory."""
        if value.place is not None:
            return value
        if value not in self._placed:
            place = Place(Buffer(value.kind, times(value.shape)), contiguous(value.shape))
            self.write(value, place)
            self._placed[value] = stored(place, value.shape)
        return self._placed[value]

    def dense(self, value: Value) -> Value:
        """In memory, one element after the other."""
        value = self.placed(value)
        assert value.place is not None
        return value if value.place.is_contiguous(value.shape) else self.placed(dataclasses.replace(value, place=None))

    def shaped(self, value: Value, shape: tuple[Size, ...]) -> Value:
        """The same elements in another shape."""
        if value.shape == shape:
            return value
        place = self.dense(value).place
        assert place is not None
        return stored(Place(place.buffer, contiguous(shape), place.offset), shape)

    def write(self, value: Value, place: Place) -> None:
        def body(nest: Nest) -> None:
            def one(index: list[Index], lanes: int) -> None:
                nest.put(value.element(nest, index, lanes), place, index, lanes)

            nest.each(value.shape, value.lanes, one)

        self.nest(place.buffer, value.reads, body)

    def nest(self, writes: Buffer, reads: Iterable[Buffer], body: Callable[[Nest], None], *more: Buffer) -> None:
        """A call of a function of its own. `more`: buffers that it reads and writes."""
        reads = tuple(reads)
        nest = Nest(self._code, [writes, *reads, *more])
        nest.function.attributes.add("noinline")  # compiles in half the time
        body(nest)
        nest.build.ret_void()

        def call(code: Code, where: Callable[[Buffer], Any]) -> None:
            code.build.call(nest.function, [*map(where, nest.buffers), code.function.args[1]])

        self._tasks.append(_Task(reads, writes, call))

    def checked(self, ids: Value, table: Size) -> Value:
        """Places in a table of so many rows; those outside are 0, and the function says so."""
        place, flag = Place(Buffer(I64, times(ids.shape)), contiguous(ids.shape)), Place(self._flag, ())

        def body(nest: Nest) -> None:
            def one(index: list[Index], lanes: int) -> None:
                build = nest.build
                own = ids.element(nest, index, lanes)
                own, most = nest.alike(own, nest.number(table))
                inside = build.icmp_unsigned("<", own, most)
                nest.put(build.select(inside, own, ir.Constant(own.type, None)), place, index, lanes)
                outside = build.not_(inside)
                if isinstance(own.type, ir.VectorType):
                    outside = build.bitcast(outside, ir.IntType(own.type.count))
                outside = build.zext(build.icmp_unsigned("!=", outside, ir.Constant(outside.type, 0)), I64)
                nest.put(build.or_(nest.load(flag, (), 1), outside), flag, (), 1)

            nest.each(ids.shape, ids.lanes, one)

        self.nest(place.buffer, ids.reads, body, self._flag)
        return stored(place, ids.shape)

    def layer(self, x: Value, weight: Tensor, bias: Value, relu: bool, shape: tuple[Size, ...]) -> Value:
        """activation(x weight + bias), by product.py."""
        x, bias = self.dense(x), self.dense(bias)
        assert x.place is not None
        assert bias.place is not None
        own, rows = Place(Buffer(F32, times(shape)), contiguous(shape)), times(x.shape[:-1])
        places = x.place, bias.place, own

        def call(code: Code, where: Callable[[Buffer], Any]) -> None:
            columns, inner = weight.shape
            packed, run = product.packed(weight), cast(Any, product.product(inner, columns, relu))
            self._keeps += [packed, run]
            build, floats = code.build, F32.as_pointer()
            read, plus, out = (build.gep(where(one.buffer), [_number(code, one.offset)]) for one in places)
            function = ir.FunctionType(ir.VoidType(), [floats] * 4 + [I64]).as_pointer()
            given = read, build.inttoptr(I64(packed.data_ptr()), floats), plus, out, _number(code, rows)
            build.call(build.inttoptr(I64(run.address), function), given)

        self._tasks.append(_Task((x.place.buffer, bias.place.buffer), own.buffer, call))
        return stored(own, shape)

    # the function

    def functions(self) -> tuple[Callable[..., int], Callable[..., int], Size]:
        """int(scratch, rows, inputs, outputs): whether an index was outside of its table; the same for some blocks of
        the rows (`_some`); and the bytes of scratch, by rows of a call or block."""
        count = len(self._ports)
        for place, node in enumerate(self._outputs, count):
            own, shape = self.values[node].place, self.shape(node)
            if (
                own is None
                or own.buffer in self._ports
                or own.buffer in self._constants
                or not own.is_contiguous(shape)
                or own.buffer.size != times(shape)
            ):
                own = self.placed(dataclasses.replace(self.values[node], place=None)).place
                assert own is not None
            self._ports[own.buffer] = place
        fixed = self._fixed()
        parts = (
            [task for task in self._tasks if task.writes in fixed],
            [task for task in self._tasks if task.writes not in fixed],
        )
        slots, size = self._slots(*parts)
        once, each = (self._part(name, tasks, slots, size) for name, tasks in zip(("once", "each"), parts, strict=True))
        code = self._code
        wrong = [code.build.call(one.function, code.function.args) for one in (once, each)]
        code.build.ret(code.build.or_(*wrong))
        some = self._some(once, each)
        run: Any = code.compiled()
        run.keeps = self._keeps
        return (
            run,
            some.called(run.engine),
            Size(sum(one.each for one in size), sum(one.fixed + 2 * _LINE for one in size)),
        )

    def _fixed(self) -> set[Buffer]:
        """Buffers in memory that do not depend on what differs from row to row."""
        found = {one for one in (*self._ports, *self._constants) if not one.size.each}
        found |= {task.writes for task in self._tasks if not task.writes.size.each}
        while True:
            other = {task.writes for task in self._tasks if not found.issuperset(task.reads)} & found
            if not other:
                return found
            found -= other

    def _part(self, name: str, tasks: Sequence[_Task], slots: dict[Buffer, int], size: Sequence[Size]) -> Code:
        """A function of the same arguments that does some of the tasks."""
        code = Code(name, self._arguments, self._code, answers=True)
        code.function.attributes.add("noinline")
        build, starts, begin = code.build, [], I64(0)
        for slot in size:
            starts.append(begin)
            length = build.add(_number(code, slot), I64(2 * _LINE - 1))
            begin = build.add(begin, build.and_(length, I64(-_LINE)))
        flag = build.alloca(I64)
        build.store(I64(0), flag)

        def where(buffer: Buffer) -> Any:
            kind = buffer.kind.as_pointer()
            if buffer is self._flag:
                return flag
            if buffer in self._constants:
                return build.inttoptr(I64(self._constants[buffer]), kind)
            if buffer in self._ports:
                return code.function.args[2 + self._ports[buffer]]
            return build.bitcast(build.gep(code.function.args[0], [starts[slots[buffer]]]), kind)

        for task in tasks:
            task.call(code, where)
        build.ret(build.load(flag))
        return code

    def _some(self, once: Code, each: Code) -> Code:
        """int(scratch, rows, blocks, most, following, stop, inputs, outputs), that runs `once`, then `each` on blocks
        until there are no more, `most` have run, or the word at `stop` is not 0: how many it has run; -1 where an index
        was outside of its table. `following`: the address of the number of the next block."""
        memory, _, *kinds = self._arguments
        code = Code("some", [memory, *[I64] * 5, *kinds], self._code, answers=True)
        code.function.linkage = "external"
        scratch, rows, blocks, most, following, stop, *ports = code.function.args
        build, word = code.build, I64.as_pointer()
        draw, block, failed, after, end = (code.function.append_basic_block() for _ in range(5))
        wrong = build.call(once.function, [scratch, rows, *ports])
        begin = build.block
        build.cbranch(build.icmp_unsigned("==", wrong, I64(0)), draw, failed)
        build.position_at_end(draw)
        done = build.phi(I64)
        number = build.atomic_rmw("add", build.inttoptr(following, word), I64(1), "monotonic")
        build.cbranch(build.icmp_unsigned("<", number, blocks), block, end)
        build.position_at_end(block)
        first, height = part(code, rows, blocks, number)
        moved = list(ports)
        for buffer, place in self._ports.items():
            moved[place] = build.gep(ports[place], [build.mul(first, I64(buffer.size.each))])
        wrong = build.call(each.function, [scratch, height, *moved])
        build.cbranch(build.icmp_unsigned("==", wrong, I64(0)), after, failed)
        build.position_at_end(after)
        more = build.add(done, I64(1))
        told = build.load_atomic(build.inttoptr(stop, word), "monotonic", 8)
        goes_on = build.and_(build.icmp_unsigned("==", told, I64(0)), build.icmp_unsigned("<", more, most))
        build.cbranch(goes_on, draw, end)
        done.add_incoming(I64(0), begin)
        done.add_incoming(more, after)
        build.position_at_end(end)
        found = build.phi(I64)
        found.add_incoming(done, draw)
        found.add_incoming(more, after)
        build.ret(found)
        build.position_at_end(failed)
        build.ret(I64(-1))
        return code

    def _slots(self, once: Sequence[_Task], each: Sequence[_Task]) -> tuple[dict[Buffer, int], list[Size]]:
        """Of each buffer its place in the scratch memory, and the bytes of each: one that is read no more is the next
        one's. What is made once comes first and stays."""
        last = dict[Buffer, int]()
        for at, task in enumerate([*once, *each]):
            last |= dict.fromkeys((*task.reads, task.writes), at)
        found, size, until = dict[Buffer, int](), list[Size](), list[int]()
        for at, task in enumerate([*once, *each]):
            if at == len(once):
                until = [len(last) + len(once) + len(each)] * len(size)
            own = task.writes
            if own in found or own in self._ports:
                continue
            wanted = own.size * Size(0, _BYTES[own.kind])
            free = [slot for slot, read in enumerate(until) if read < at]
            if free:
                slot = max(free, key=lambda slot: size[slot])
                size[slot] = Size(*map(max, size[slot], wanted))
                until[slot] = last[own]
            else:
                slot = len(size)
                size.append(wanted)
                until.append(last[own])
            found[own] = slot
        return found, size


def _number(code: Code, size: Size) -> Any:
    rows = code.function.args[1]
    return code.build.add(code.build.mul(rows, I64(size.each)), I64(size.fixed))


def attribute(node: fx.Node) -> Tensor:
    found = operator.attrgetter(str(node.target))(node.graph.owning_module)
    if not isinstance(found, Tensor):
        raise UnsupportedError(node)
    return found
