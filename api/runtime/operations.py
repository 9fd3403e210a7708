"""Torch's operations as values (nest.py).

Element-wise ones, look-ups, sums and views are computed where they are read; layers, softmax, layer norm and
concatenations are written to memory.
"""
# ruff: noqa: ARG001 - arguments are those of torch's operations, and of `Element`

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from llvmlite import ir
from torch import fx

from api.runtime import product
from api.runtime.nest import (
    ONE,
    START,
    ZERO,
    Buffer,
    Index,
    Nest,
    Place,
    Size,
    Value,
    aligned,
    contiguous,
    pieces,
    stored,
)
from api.runtime.nest import product as times
from api.runtime.writer import UnsupportedError, Writer, attribute
from infra.codegen import F32, I8, I64, Matrix

_ATEN = torch.ops.aten
_LONGEST = 1_024  # elements of a row that are held together (softmax, layer norm)

Maker = Callable[..., Value]  # of the writer, the node, and its arguments
MAKERS: dict[Any, Maker] = {}


def _of(*targets: Any) -> Callable[[Maker], Maker]:
    def noted(make: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(targets, make))
        return make

    return noted


def _combined(writer: Writer, node: fx.Node, parts: Sequence[Value], function: Callable[..., Any]) -> Value:
    """Element by element; `function(nest, *elements)` of elements that are all numbers or all vectors."""
    shape = writer.shape(node)
    return _each([writer.broadcast(one, shape) for one in parts], shape, writer.kind(node), function)


def _each(parts: Sequence[Value], shape: tuple[Size, ...], kind: Any, function: Callable[..., Any]) -> Value:
    """The same, of values of that shape."""

    def element(nest: Nest, index: Sequence[Index], lanes: int) -> Any:
        return function(nest, *nest.alike(*(one.element(nest, index, lanes) for one in parts)))

    reads = tuple(dict.fromkeys(buffer for one in parts for buffer in one.reads))
    lanes, depth = min(one.lanes for one in parts), 1 + max(one.depth for one in parts)
    return Value(shape, kind, reads, element, None, True, lanes, depth)


_ARITHMETIC: dict[Any, tuple[str, str]] = {
    _ATEN.add.Tensor: ("fadd", "add"),
    _ATEN.sub.Tensor: ("fsub", "sub"),
    _ATEN.mul.Tensor: ("fmul", "mul"),
    _ATEN.div.Tensor: ("fdiv", ""),
    _ATEN.rsub.Scalar: ("fsub", "sub"),
}


@_of(*_ARITHMETIC)
def _arithmetic(writer: Writer, node: fx.Node, a: Any, b: Any) -> Value:
    parts, kind = [writer.value(one) for one in (a, b)], writer.kind(node)
    if node.target is _ATEN.rsub.Scalar:
        parts.reverse()
    if kind == I8 or (kind == I64 and any(one.kind != I64 for one in parts)):
        raise UnsupportedError(node)
    name = _ARITHMETIC[node.target][kind == I64]
    if not name:
        raise UnsupportedError(node)

    def function(nest: Nest, a: Any, b: Any) -> Any:
        if kind == F32:
            a, b = nest.floating(a), nest.floating(b)
        return getattr(nest.build, name)(a, b)

    return _combined(writer, node, parts, function)


def _unary(function: Callable[[Nest, Any], Any]) -> Maker:
    def make(writer: Writer, node: fx.Node, one: Any) -> Value:
        if writer.kind(node) != F32 or writer.value(one).kind != F32:
            raise UnsupportedError(node)
        return _combined(writer, node, [writer.value(one)], function)

    return make


def _relu(nest: Nest, x: Any) -> Any:
    zero = ir.Constant(x.type, None)
    return nest.build.select(nest.build.fcmp_ordered("<", x, zero), zero, x)  # NaN stays


MAKERS[_ATEN.relu.default] = _unary(_relu)
MAKERS[_ATEN.sigmoid.default] = _unary(lambda nest, x: nest.map(nest.sigmoid, x))


@_of(_ATEN.leaky_relu.default)
def _leaky_relu(writer: Writer, node: fx.Node, x: Any, slope: float = 0.01) -> Value:
    value = writer.value(x)

    def function(nest: Nest, x: Any) -> Any:
        build, zero = nest.build, ir.Constant(x.type, None)
        (by, _) = nest.alike(F32(slope), x)
        return build.select(build.fcmp_ordered(">", x, zero), x, build.fmul(x, by))

    if value.kind != F32:
        raise UnsupportedError(node)
    return _combined(writer, node, [value], function)


@_of(_ATEN.bitwise_not.default, _ATEN.logical_not.default)
def _not(writer: Writer, node: fx.Node, x: Any) -> Value:
    value = writer.value(x)
    if value.kind != I8:
        raise UnsupportedError(node)
    return _combined(writer, node, [value], lambda nest, x: nest.build.xor(x, nest.alike(I8(1), x)[0]))


@_of(_ATEN.masked_fill.Scalar)
def _masked_fill(writer: Writer, node: fx.Node, x: Any, mask: Any, fill: float) -> Value:
    if not isinstance(fill, int | float):
        raise UnsupportedError(node)
    parts = writer.value(x), writer.value(mask), writer.value(float(fill))
    if writer.kind(node) != F32 or parts[1].kind != I8:
        raise UnsupportedError(node)
    return _combined(writer, node, parts, lambda nest, x, mask, fill: nest.build.select(nest.true(mask), fill, x))


# views


def _dim(dim: int, shape: Sequence[Size]) -> int:
    if not shape:
        raise UnsupportedError(shape)
    return dim % len(shape)


def _turned(writer: Writer, node: fx.Node, x: Any, order: Sequence[int]) -> Value:
    """`order`: of each dimension of the view, which one it is."""
    order = [dim % len(order) for dim in order]
    return writer.value(x).view(writer.shape(node), [(order.index(dim), 0) for dim in range(len(order))])


@_of(_ATEN.permute.default)
def _permute(writer: Writer, node: fx.Node, x: Any, order: Sequence[int]) -> Value:
    return _turned(writer, node, x, order)


@_of(_ATEN.transpose.int, _ATEN.t.default)
def _transpose(writer: Writer, node: fx.Node, x: Any, a: int = 0, b: int = -1) -> Value:
    order = list(range(len(writer.shape(node))))
    if order:
        order[a], order[b] = order[b], order[a]
    return _turned(writer, node, x, order)


@_of(_ATEN.unsqueeze.default)
def _unsqueeze(writer: Writer, node: fx.Node, x: Any, dim: int) -> Value:
    shape = writer.shape(node)
    new = _dim(dim, shape)
    return writer.value(x).view(shape, [(at + (at >= new), 0) for at in range(len(shape) - 1)])


@_of(_ATEN.squeeze.dim)
def _squeeze(writer: Writer, node: fx.Node, x: Any, dim: int) -> Value:
    value = writer.value(x)
    own = _dim(dim, value.shape)
    return _without(writer, node, value, own, 0) if value.shape[own] == ONE else value


@_of(_ATEN.select.int)
def _select(writer: Writer, node: fx.Node, x: Any, dim: int, place: int) -> Value:
    value = writer.value(x)
    own = _dim(dim, value.shape)
    if not isinstance(place, int) or value.shape[own].each:
        raise UnsupportedError(node)
    return _without(writer, node, value, own, place % value.shape[own].fixed)


def _without(writer: Writer, node: fx.Node, value: Value, dim: int, place: int) -> Value:
    """At one place of a dimension."""
    sources = [(None, place) if at == dim else (at - (at > dim), 0) for at in range(len(value.shape))]
    return value.view(writer.shape(node), sources)


@_of(_ATEN.slice.Tensor)
def _slice(
    writer: Writer, node: fx.Node, x: Any, dim: int = 0, begin: Any = 0, end: Any = None, step: int = 1
) -> Value:
    value, begin = writer.value(x), begin or 0
    own = _dim(dim, value.shape)
    size = value.shape[own]
    if not isinstance(begin, int) or step != 1 or (size.each and begin):
        raise UnsupportedError(node)
    begin = max(0, begin + size.fixed) if begin < 0 else begin
    return value.view(writer.shape(node), [(at, begin if at == own else 0) for at in range(len(value.shape))])


@_of(_ATEN.expand.default)
def _expand(writer: Writer, node: fx.Node, x: Any, sizes: Any) -> Value:
    return writer.broadcast(writer.value(x), writer.shape(node))


@_of(_ATEN.view.default, _ATEN.reshape.default, _ATEN.flatten.using_ints, _ATEN._unsafe_view.default)
def _reshape(writer: Writer, node: fx.Node, x: Any, *sizes: Any) -> Value:
    return writer.shaped(writer.value(x), writer.shape(node))


@_of(_ATEN.clone.default, _ATEN.contiguous.default, _ATEN.detach.default, _ATEN.alias.default)
def _same(writer: Writer, node: fx.Node, x: Any, memory_format: Any = None) -> Value:
    return writer.value(x)


# look-ups


def _looked_up(table: Value, places: Value) -> Value:
    """Rows of a table in memory: [...] -> [..., d]."""
    where = table.place
    assert where is not None

    def element(nest: Nest, index: Sequence[Index], lanes: int) -> Any:
        *outer, inner = index
        row = places.element(nest, outer, lanes)
        if not isinstance(row.type, ir.VectorType):
            return nest.load(where, [Index(row), inner], lanes)
        found = ir.Constant(ir.VectorType(F32, lanes), ir.Undefined)
        for lane in range(lanes):
            own = [Index(nest.build.extract_element(row, I64(lane))), Index(inner.value)]
            found = nest.build.insert_element(found, nest.load(where, own, 1), I64(lane))
        return found

    return Value((*places.shape, table.shape[1]), F32, (where.buffer, *places.reads), element)


@_of(_ATEN.embedding.default)
def _embedding(writer: Writer, node: fx.Node, weight: Any, x: Any, padding: int = -1) -> Value:
    table, ids = writer.placed(writer.value(weight)), writer.value(x)
    if table.kind != F32 or ids.kind != I64 or table.shape[0].each:
        raise UnsupportedError(node)
    return _looked_up(table, writer.checked(ids, table.shape[0]))


@_of(_ATEN.embedding_bag.padding_idx, _ATEN.embedding_bag.default)
def _embedding_bag(
    writer: Writer,
    node: fx.Node,
    weight: Any,
    x: Any,
    offsets: Any,
    scaled: bool = False,
    mode: int = 0,
    sparse: bool = False,
    weights: Any = None,
    last: bool = False,
    padding: int | None = None,
) -> Value:
    """Sums over equally many look-ups for each bag."""
    table, ids = writer.placed(writer.value(weight)), writer.value(x)
    regular = offsets.target is _ATEN.arange.start_step and offsets.args[0] == 0
    step = offsets.args[2] if regular and len(offsets.args) > 2 else None
    bags = writer.size(node.meta["val"][0].shape[0])
    if mode or weights is not None or last or padding is not None or not isinstance(step, int):
        raise UnsupportedError(node)
    if ids.shape != (bags * Size(0, step),) or table.kind != F32 or ids.kind != I64 or table.shape[0].each:
        raise UnsupportedError(node)
    places = writer.shaped(writer.checked(ids, table.shape[0]), (bags, Size(0, step)))
    return _summed(_looked_up(table, places), 1, (bags, table.shape[1]))


@_of(operator.getitem)
def _getitem(writer: Writer, node: fx.Node, x: Any, place: int) -> Value:
    """Of what embedding_bag gives."""
    if place != 0:
        raise UnsupportedError(node)
    return writer.value(x)


@_of(_ATEN.index.Tensor)
def _index(writer: Writer, node: fx.Node, x: Any, asked: Sequence[Any]) -> Value:
    """By constants: of neighbouring dimensions, one list of places each, of one length."""
    value = writer.value(x)
    dims = [dim for dim, one in enumerate(asked) if one is not None]
    if not all(isinstance(asked[dim], fx.Node) and asked[dim].op == "get_attr" for dim in dims):
        raise UnsupportedError(node)
    lists = {dim: attribute(asked[dim]) for dim in dims}
    sound = all(
        own.ndim == 1
        and len(own) > 0
        and own.dtype == torch.int64
        and not value.shape[dim].each
        and int(own.min()) >= 0
        and int(own.max()) < value.shape[dim].fixed
        for dim, own in lists.items()
    )
    if not sound or dims != list(range(dims[0], dims[-1] + 1)) or len({len(own) for own in lists.values()}) != 1:
        raise UnsupportedError(node)
    places = {dim: writer.value(asked[dim]) for dim in dims}

    def element(nest: Nest, index: Sequence[Index], lanes: int) -> Any:
        own = list(index[: dims[0]])
        own += [Index(places[dim].element(nest, [index[dims[0]]], 1)) for dim in dims]
        return value.element(nest, [*own, *index[dims[0] + 1 :]], 1)

    reads = (*value.reads, *(buffer for one in places.values() for buffer in one.reads))
    return Value(writer.shape(node), value.kind, reads, element, None, value.works, 1)


# sums


def _summed(value: Value, dim: int, shape: tuple[Size, ...]) -> Value:
    """Over a dimension of known size, which is not in `shape`."""
    count, last = value.shape[dim], dim == len(value.shape) - 1
    if count.each or value.kind != F32:
        raise UnsupportedError(value)

    def across(nest: Nest, index: Sequence[Index], lanes: int) -> Any:
        return nest.summed(
            count.fixed, value.lanes, lambda begin, width: value.element(nest, [*index, Index(begin, width > 1)], width)
        )

    def down(nest: Nest, index: Sequence[Index], lanes: int) -> Any:
        def one(number: Any, sums: list[Any]) -> list[Any]:
            own = value.element(nest, [*index[:dim], Index(number), *index[dim:]], lanes)
            return [nest.build.fadd(sums[0], nest.wide(own, lanes) if lanes > 1 else own)]

        start = ir.Constant(ir.VectorType(F32, lanes), None) if lanes > 1 else F32(0)
        return nest.loop(count.fixed, one, [start])[0]

    return Value(shape, F32, value.reads, across if last else down, None, True, 1 if last else value.lanes)


@_of(_ATEN.sum.dim_IntList)
def _sum(writer: Writer, node: fx.Node, x: Any, dims: Sequence[int] | None, keep: bool = False) -> Value:
    value = writer.value(x)
    if dims is None or len(dims) != 1:
        raise UnsupportedError(node)
    dim = _dim(dims[0], value.shape)
    found = _summed(value, dim, tuple(size for at, size in enumerate(value.shape) if at != dim))
    shape = writer.shape(node)
    if found.shape == shape:
        return found
    return found.view(shape, [(at + (at >= dim), 0) for at in range(len(found.shape))])


def _pairs(a: Value, b: Value, shape: tuple[Size, ...], of_a: Sequence[int], of_b: Sequence[int]) -> Value:
    """Products of elements; of each dimension of a and b: which one of the products it is."""

    def element(nest: Nest, index: Sequence[Index], lanes: int) -> Any:
        found = [
            one.element(
                nest, [START if size == ONE else index[dim] for dim, size in zip(dims, one.shape, strict=True)], lanes
            )
            for one, dims in ((a, of_a), (b, of_b))
        ]
        return nest.build.fmul(*nest.alike(*found))

    return Value(shape, F32, (*a.reads, *b.reads), element, None, True, min(a.lanes, b.lanes))


@_of(_ATEN.linear.default)
def _linear(writer: Writer, node: fx.Node, given: Any, by: Any, plus: Any = None) -> Value:
    x, weight, shape = writer.value(given), writer.value(by), writer.shape(node)
    bias = None if plus is None else writer.value(plus)
    if any(one is not None and one.kind != F32 for one in (x, weight, bias)) or len(weight.shape) != 2:
        raise UnsupportedError(node)
    wide, columns, inner = weight.shape[0], weight.shape[0].fixed, weight.shape[1].fixed
    if wide.each or weight.shape[1].each or (bias is not None and bias.shape != (wide,)):
        raise UnsupportedError(node)
    if by.op != "get_attr" or not product.fits(inner, columns):
        if columns > 1 and x.works:
            x = writer.placed(x)
        outer = len(shape) - 1
        pairs = _pairs(x, weight, (*shape, weight.shape[1]), [*range(outer), outer + 1], [outer, outer + 1])
        found = _summed(pairs, outer + 1, shape)
        return found if bias is None else _combined(writer, node, [found, bias], _plus)
    inside, follower = [node], _follower(writer, node)
    if follower is not None and follower.target is _ATEN.add.Tensor and not follower.kwargs:
        row = next((writer.values.get(one) for one in follower.all_input_nodes if one is not node), None)
        of_columns = row is not None and row.kind == F32 and (row.shape[-1:], times(row.shape)) == ((wide,), wide)
        if row is not None and of_columns and writer.shape(follower) == shape:
            flat = writer.shaped(row, (wide,))
            bias = flat if bias is None else _each([flat, bias], (wide,), F32, _plus)
            inside.append(follower)
            follower = _follower(writer, follower)
    relu = follower is not None and follower.target is _ATEN.relu.default
    if relu and follower is not None:
        inside.append(follower)
    if bias is None:
        bias = writer.constant(torch.zeros(columns))
    found = writer.layer(x, attribute(by).detach(), bias, relu, shape)
    for one in inside:
        writer.values[one] = found
    return found


def _plus(nest: Nest, a: Any, b: Any) -> Any:
    return nest.build.fadd(a, b)


def _follower(writer: Writer, node: fx.Node) -> fx.Node | None:
    """The operation of the same function that alone reads it."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0] in writer.nodes else None


@_of(_ATEN.matmul.default, _ATEN.bmm.default)
def _matmul(writer: Writer, node: fx.Node, left: Any, right: Any) -> Value:
    a, b, shape = writer.value(left), writer.value(right), writer.shape(node)
    if min(len(a.shape), len(b.shape)) < 2 or {a.kind, b.kind} != {F32} or a.shape[-1].each:
        raise UnsupportedError(node)
    outer = len(shape) - 2
    a, b = (writer.placed(one) for one in (a, b))
    left, right = (
        one.view(
            (*shape[:outer], *one.shape[-2:]), [*aligned(one.shape[:-2], shape[:outer]), (outer, 0), (outer + 1, 0)]
        )
        for one in (a, b)
    )
    assert left.place is not None
    assert right.place is not None
    if right.place.strides[-1] != ONE:
        pairs = _pairs(
            left, right, (*shape, left.shape[-1]), [*range(outer + 1), outer + 2], [*range(outer), outer + 2, outer + 1]
        )
        return _summed(pairs, outer + 2, shape)
    place = Place(Buffer(F32, times(shape)), contiguous(shape))
    rows = outer  # the dimension whose elements are the rows of one product: all of them share b
    if shape[outer] == ONE:
        shared = [dim for dim in range(outer) if shape[dim] != ONE and right.place.strides[dim] == ZERO]
        rows = shared[0] if shared else outer
    down = [one.strides[rows] for one in (left.place, place)]
    across, below = left.place.strides[-1], right.place.strides[-2]
    if any(one.each for one in (*down, across, below)) or shape[-1].each:
        raise UnsupportedError(node)

    def body(nest: Nest) -> None:
        def one(index: list[Index], lanes: int) -> None:
            bases = [
                nest.address(where, [*index, START]) for where in (left.place, right.place, place) if where is not None
            ]
            nest.matmul(
                nest.number(shape[rows]),
                left.shape[-1].fixed,
                Matrix(bases[0], down[0].fixed, across.fixed),
                Matrix(bases[1], below.fixed),
                Matrix(bases[2], down[1].fixed),
                shape[-1].fixed,
            )

        nest.each([ONE if dim == rows else size for dim, size in enumerate(shape[:-1])], 1, one)

    writer.nest(place.buffer, (*left.reads, *right.reads), body)
    return stored(place, shape)


# rows as a whole


@_of(_ATEN.cat.default)
def _cat(writer: Writer, node: fx.Node, every: Sequence[Any], at: int = 0) -> Value:
    parts, shape = [writer.value(one) for one in every], writer.shape(node)
    dim = _dim(at, shape)
    if any(one.kind != writer.kind(node) for one in parts) or shape[dim].each:
        raise UnsupportedError(node)
    whole, begin = Place(Buffer(writer.kind(node), times(shape)), contiguous(shape)), 0
    for one in parts:
        offset = Size(0, begin) * whole.strides[dim]
        writer.write(one, Place(whole.buffer, whole.strides, offset))
        begin += one.shape[dim].fixed
    return stored(whole, shape)


def _rowwise(
    writer: Writer,
    node: fx.Node,
    value: Value,
    more: Sequence[Value],
    rule: Callable[[Nest, list[Any], list[Any]], list[Any]],
) -> Value:
    """A rule of all vectors of a row, and of those of `more`, to as many."""
    shape = value.shape
    if value.kind != F32 or shape[-1].each or shape[-1].fixed > _LONGEST:
        raise UnsupportedError(node)
    place, parts = Place(Buffer(F32, times(shape)), contiguous(shape)), pieces(shape[-1].fixed, value.lanes)
    if len(parts) > _LONGEST // 8:
        raise UnsupportedError(node)

    def body(nest: Nest) -> None:
        def one(index: list[Index], _: int) -> None:
            spans = [(Index(I64(begin), width > 1), width) for begin, width in parts]
            own = [nest.wide(value.element(nest, [*index, span], width), width) for span, width in spans]
            others = [[nest.wide(row.element(nest, [span], width), width) for span, width in spans] for row in more]
            for (span, width), result in zip(spans, rule(nest, own, others), strict=True):
                nest.put(result, place, [*index, span], width)

        nest.each(shape[:-1], 1, one)

    writer.nest(place.buffer, (*value.reads, *(buffer for row in more for buffer in row.reads)), body)
    return stored(place, shape)


def _total(nest: Nest, row: Sequence[Any]) -> Any:
    total = F32(0)
    for one in row:
        total = nest.sum(one, total)
    return total


@_of(_ATEN.softmax.int, _ATEN._softmax.default)
def _softmax(writer: Writer, node: fx.Node, x: Any, dim: int, other: Any = None) -> Value:
    value = writer.value(x)
    if _dim(dim, value.shape) != len(value.shape) - 1 or other:  # `other`: another type
        raise UnsupportedError(node)

    def rule(nest: Nest, row: list[Any], _: list[Any]) -> list[Any]:
        build, top = nest.build, None
        for one in row:
            own = nest.highest(one)
            top = own if top is None else build.select(build.fcmp_ordered(">", own, top), own, top)
        raised = [nest.exp(build.fsub(one, nest.wide(top, one.type.count))) for one in row]
        share = build.fdiv(F32(1), _total(nest, raised))
        return [build.fmul(one, nest.wide(share, one.type.count)) for one in raised]

    return _rowwise(writer, node, value, (), rule)


@_of(_ATEN.layer_norm.default)
def _layer_norm(
    writer: Writer,
    node: fx.Node,
    given: Any,
    sizes: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    epsilon: float = 1e-5,
    cudnn: bool = False,
) -> Value:
    value, more = writer.value(given), [writer.placed(writer.value(one)) for one in (weight, bias) if one is not None]
    if len(sizes) != 1 or (bias is not None and weight is None) or any(one.kind != F32 for one in more):
        raise UnsupportedError(node)
    count = value.shape[-1].fixed

    def rule(nest: Nest, row: list[Any], others: list[Any]) -> list[Any]:
        build, part = nest.build, F32(1 / max(1, count))
        mean = build.fmul(_total(nest, row), part)
        row = [build.fsub(one, nest.wide(mean, one.type.count)) for one in row]
        spread = build.fmul(_total(nest, [build.fmul(one, one) for one in row]), part)
        by = build.fdiv(F32(1), nest.sqrt(build.fadd(spread, F32(epsilon))))
        row = [build.fmul(one, nest.wide(by, one.type.count)) for one in row]
        for own, combine in zip(others, (build.fmul, build.fadd), strict=False):
            row = [combine(one, other) for one, other in zip(row, own, strict=True)]
        return row

    return _rowwise(writer, node, value, more, rule)
