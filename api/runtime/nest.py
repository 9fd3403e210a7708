"""Tensors as expressions, and the loops that compute them: what native.py makes functions of.

A `Value` knows how any of its elements is computed: loaded from memory, or from elements of other values. Views of a
value (a transposed, sliced or broadcast one) are the same elements by other indices. A `Nest` is one generated function
that writes a value: loops over its outer dimensions, and vectors along the last one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from infra.codegen import F32, I8, I64, Code

LANES = 32  # elements of a vector: two registers of AVX-512, four of AVX2
UNROLLED = 4  # vectors, from which a loop goes over them


class Size(NamedTuple):
    """each * rows + fixed, of which one is 0."""

    each: int
    fixed: int

    def __mul__(self, other: Any) -> Size:
        assert not (self.each and other.each)
        return Size(self.each * other.fixed + self.fixed * other.each, self.fixed * other.fixed)

    def of(self, rows: int) -> int:
        return self.each * rows + self.fixed


ZERO, ONE = Size(0, 0), Size(0, 1)


def product(sizes: Sequence[Size]) -> Size:
    found = ONE
    for one in sizes:
        found *= one
    return found


def contiguous(shape: Sequence[Size]) -> tuple[Size, ...]:
    """Strides of what lies one after the other."""
    return tuple(product(shape[at + 1 :]) for at in range(len(shape)))


def aligned(own: Sequence[Size], shape: Sequence[Size]) -> list[tuple[int | None, int]]:
    """The sources (`Value.view`) of a value that is broadcast to a shape."""
    first = len(shape) - len(own)
    return [(None if size == ONE and shape[first + dim] != ONE else first + dim, 0) for dim, size in enumerate(own)]


@dataclasses.dataclass(eq=False)
class Buffer:
    """Memory of one kind (F32, I64, I8), in whatever place native.py finds for it."""

    kind: Any
    size: Size


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """Elements in memory; strides are in elements."""

    buffer: Buffer
    strides: tuple[Size, ...]
    offset: Size = ZERO

    def is_contiguous(self, shape: Sequence[Size]) -> bool:
        wanted = contiguous(shape)
        return all(size == ONE or own == other for size, own, other in zip(shape, self.strides, wanted, strict=True))


class Index(NamedTuple):
    """Of one dimension. The one that `moves` stands for as many elements as a vector has, from this one on."""

    value: Any
    moves: bool = False


START = Index(I64(0))
Element = Callable[["Nest", Sequence[Index], int], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """`element(nest, index, lanes)` is one number, or a vector of `lanes` along the dimension that moves; one number,
    too, where it is the same for all of them."""

    shape: tuple[Size, ...]
    kind: Any
    reads: tuple[Buffer, ...]
    element: Element
    place: Place | None = None
    works: bool = False  # computes something: not to be done twice
    lanes: int = LANES  # that it gives at most
    depth: int = 0  # of elements within elements

    def view(self, shape: tuple[Size, ...], sources: Sequence[tuple[int | None, int]]) -> Value:
        """Of each of its dimensions: which one of the view it is, None for one element of it; and where it begins."""

        def element(nest: Nest, index: Sequence[Index], lanes: int) -> Any:
            own = []
            for dim, begin in sources:
                one = START if dim is None else index[dim]
                own.append(Index(nest.build.add(one.value, I64(begin)), one.moves) if begin else one)
            return self.element(nest, own, lanes)

        place = None
        if self.place is not None:
            strides, offset = [ZERO] * len(shape), self.place.offset
            for (dim, begin), stride in zip(sources, self.place.strides, strict=True):
                if begin and (stride.each or offset.each):
                    break
                offset = Size(offset.each, offset.fixed + begin * stride.fixed)
                if dim is not None:
                    strides[dim] = stride
            else:
                place = Place(self.place.buffer, tuple(strides), offset)
        return Value(shape, self.kind, self.reads, element, place, self.works, self.lanes, self.depth)


def stored(place: Place, shape: tuple[Size, ...]) -> Value:
    """What is in memory."""

    def element(nest: Nest, index: Sequence[Index], lanes: int) -> Any:
        return nest.load(place, index, lanes)

    return Value(shape, place.buffer.kind, (place.buffer,), element, place)


class Nest(Code):
    """A function of its buffers, the one it writes first, and of the number of rows."""

    def __init__(self, caller: Code, buffers: Sequence[Buffer]) -> None:
        self.buffers = tuple(dict.fromkeys(buffers))
        super().__init__("nest", [*(one.kind.as_pointer() for one in self.buffers), I64], caller)
        *bases, self.rows = self.function.args
        self._bases = dict(zip(self.buffers, bases, strict=True))

    def number(self, size: Size) -> Any:
        if not size.each:
            return I64(size.fixed)
        return self.build.add(self.build.mul(self.rows, I64(size.each)), I64(size.fixed))

    def address(self, place: Place, index: Sequence[Index]) -> Any:
        at = self.number(place.offset)
        for one, stride in zip(index, place.strides, strict=True):
            if stride != ZERO and one is not START:
                at = self.build.add(at, self.build.mul(one.value, self.number(stride)))
        return self.build.gep(self._bases[place.buffer], [at])

    def load(self, place: Place, index: Sequence[Index], lanes: int) -> Any:
        base, stride = self.address(place, index), self._moving(place, index)
        if stride == ZERO:
            return self.build.load(base)
        kind = ir.VectorType(place.buffer.kind, lanes)
        if stride == ONE:
            return self.build.load(self.build.bitcast(base, kind.as_pointer()), align=1)
        found = ir.Constant(kind, ir.Undefined)
        for lane in range(lanes):
            found = self.build.insert_element(found, self.build.load(self._apart(base, lane, stride)), I64(lane))
        return found

    def put(self, value: Any, place: Place, index: Sequence[Index], lanes: int) -> None:
        base, stride = self.address(place, index), self._moving(place, index)
        if stride == ZERO:
            single = isinstance(value.type, ir.VectorType)
            self.build.store(self.build.extract_element(value, I64(0)) if single else value, base)
            return
        value = self.wide(value, lanes)
        if stride == ONE:
            self.build.store(value, self.build.bitcast(base, value.type.as_pointer()), align=1)
            return
        for lane in range(lanes):
            self.build.store(self.build.extract_element(value, I64(lane)), self._apart(base, lane, stride))

    def _moving(self, place: Place, index: Sequence[Index]) -> Size:
        """The stride of the dimension that moves; 0 where none does."""
        (stride,) = [stride for one, stride in zip(index, place.strides, strict=True) if one.moves] or [ZERO]
        return stride

    def _apart(self, base: Any, count: int, stride: Size) -> Any:
        return self.build.gep(base, [self.build.mul(I64(count), self.number(stride))])

    def wide(self, value: Any, lanes: int) -> Any:
        """As a vector."""
        if isinstance(value.type, ir.VectorType):
            return value
        return self.spread(value, ir.VectorType(value.type, lanes))

    def alike(self, *values: Any) -> list[Any]:
        """All as vectors where one of them is."""
        lanes = [one.type.count for one in values if isinstance(one.type, ir.VectorType)]
        return [self.wide(one, lanes[0]) for one in values] if lanes else list(values)

    def map(self, function: Callable[[Any], Any], value: Any) -> Any:
        """A function of vectors, of a number too."""
        if isinstance(value.type, ir.VectorType):
            return function(value)
        return self.build.extract_element(function(self.wide(value, 1)), I64(0))

    def floating(self, value: Any) -> Any:
        """A bool, or a number, as a float."""
        one = value.type.element if isinstance(value.type, ir.VectorType) else value.type
        if one == F32:
            return value
        kind = ir.VectorType(F32, value.type.count) if one is not value.type else F32
        return self.build.uitofp(value, kind) if one == I8 else self.build.sitofp(value, kind)

    def true(self, value: Any) -> Any:
        """Which bools are."""
        return self.build.icmp_unsigned("!=", value, ir.Constant(value.type, None))

    def each(self, shape: Sequence[Size], lanes: int, body: Callable[[list[Index], int], None]) -> None:
        """body(index, lanes) for all elements, so many at a time along the last dimension, where its size is known."""
        dims = [dim for dim, size in enumerate(shape) if size != ONE]

        def level(at: int, index: dict[int, Index]) -> None:
            if at == len(dims):
                body([index.get(dim, START) for dim in range(len(shape))], 1)
                return
            dim = dims[at]
            if at == len(dims) - 1 and lanes > 1 and not shape[dim].each:

                def vector(begin: Any, width: int) -> None:
                    own = index | {dim: Index(begin, width > 1)}
                    body([own.get(one, START) for one in range(len(shape))], width)

                self.along(shape[dim].fixed, lanes, vector)
                return

            def inside(number: Any, _: list[Any]) -> list[Any]:
                level(at + 1, index | {dim: Index(number)})
                return []

            self.loop(self.number(shape[dim]), inside, [])

        level(0, {})

    def along(self, count: int, lanes: int, body: Callable[[Any, int], None]) -> None:
        """body(first, lanes) for so many elements."""
        whole = count // lanes
        if whole > UNROLLED:

            def inside(number: Any, _: list[Any]) -> list[Any]:
                body(self.build.mul(number, I64(lanes)), lanes)
                return []

            self.loop(whole, inside, [])
        for begin, width in pieces(count, lanes):
            if whole <= UNROLLED or begin >= whole * lanes:
                body(I64(begin), width)

    def summed(self, count: int, lanes: int, body: Callable[[Any, int], Any]) -> Any:
        """The sum of the vectors' elements, or numbers, that body(first, lanes) gives, as one number."""
        whole, total = count // lanes, F32(0)

        def more(begin: Any, sums: list[Any]) -> list[Any]:
            return [self.build.fadd(sums[0], self.wide(body(begin, lanes), lanes))]

        if whole and lanes > 1:
            sums = [ir.Constant(ir.VectorType(F32, lanes), None)]
            if whole > UNROLLED:
                sums = self.loop(whole, lambda number, own: more(self.build.mul(number, I64(lanes)), own), sums)
            else:
                for number in range(whole):
                    sums = more(I64(number * lanes), sums)
            total = self.sum(sums[0], total)
            rest = [(begin, width) for begin, width in pieces(count, lanes) if begin >= whole * lanes]
        elif lanes == 1:
            return self.loop(count, lambda number, own: [self.build.fadd(own[0], body(number, 1))], [total])[0]
        else:
            rest = pieces(count, lanes)
        for begin, width in rest:
            own = body(I64(begin), width)
            total = self.sum(self.wide(own, width), total) if width > 1 else self.build.fadd(total, own)
        return total

    def sigmoid(self, x: Any) -> Any:
        """Of a vector; NaN stays."""
        build, kind = self.build, x.type
        low, high, one = (ir.Constant(kind, [number] * kind.count) for number in (-88.0, 88.0, 1.0))
        x = build.select(build.fcmp_ordered("<", x, low), low, x)
        x = build.select(build.fcmp_ordered(">", x, high), high, x)
        return build.fdiv(one, build.fadd(one, self.exp(build.fsub(ir.Constant(kind, [-0.0] * kind.count), x))))


def pieces(count: int, lanes: int) -> list[tuple[int, int]]:
    """First element and width of vectors that cover so many: whole ones, then halves."""
    found, begin = [], 0
    while begin < count:
        while lanes > count - begin:
            lanes //= 2
        found.append((begin, lanes))
        begin += lanes
    return found
