"""The user side of the first layer as one function, generated as LLVM IR for one network's sizes.

Why not torch: the arithmetic of a user with 1,000 behaviours takes a fraction of a millisecond, a hundred small
operators with their dispatch several times as long, and between them other threads wait for the GIL. What is computed
is the user side of `AIF` (encoders/model.py) for one user; encoders/fold.py makes a block of it.

Matrices lie so that a row is a vector register or a few: weights as [inputs, outputs], attention's scores with the
queries side by side (softmax goes down the rows), D and C transposed. Behaviours are read where they lie, through
their strides. `Plan` says where each weight and each intermediate stands; all of it is known when the code is made.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from infra.codegen import F32, HALF, I8, I16, I32, I64, Code, Matrix

_QUERIES = 64  # that attend together
_BUCKETS = 1 << 14  # bytes of LSH-DIN's buckets, which stay in the first cache
_LINE = 16  # floats of a cache line: every part begins at one


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the code is made for."""

    width: int  # h
    dim: int  # d
    bridges: int  # n
    bits: int  # b
    crosses: int  # C
    recent: int
    longest: int
    heads: int
    hidden: int
    dots: int
    bridge_dots: int
    actions: int  # rows of the action table
    recencies: int  # rows of the recency table
    kinds: int  # of crosses
    attends: bool  # is there self-attention?
    half: bool  # do vectors come as fp16?

    @property
    def summary(self) -> int:
        """Numbers of a cross: log1p of its count, its recency, its mean token."""
        return self.dim + 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """Places of named parts in a run of floats."""

    places: dict[str, int]
    size: int

    @classmethod
    def of(cls, parts: dict[str, int]) -> Plan:
        """Parts of so many floats one after the other, each at the beginning of a cache line."""
        places, at = {}, 0
        for name, count in parts.items():
            places[name] = at
            at += -(-count // _LINE) * _LINE
        return cls(places, at)

    def memory(self) -> NDArray[np.float32]:
        """Zeros for it, the first one at the beginning of a cache line."""
        more = np.zeros(self.size + _LINE, np.float32)
        first = -more.ctypes.data % (4 * _LINE) // 4
        return more[first : first + self.size]


@functools.lru_cache(maxsize=64)
def weights(sizes: Sizes) -> Plan:
    """What `user` and `crosses` read of the model. `W.dot`: weight of layer `dot`, [inputs, outputs]."""
    d, h, n, b = sizes.dim, sizes.width, sizes.bridges, sizes.bits
    attention = {
        "qkv.w": d * 3 * d,
        "qkv.b": 3 * d,
        "mix.w": d * d,
        "mix.b": d,
        "norm1.w": d,
        "norm1.b": d,
        "ffn_in.w": d * sizes.hidden,
        "ffn_in.b": sizes.hidden,
        "ffn_out.w": sizes.hidden * d,
        "ffn_out.b": d,
        "norm2.w": d,
        "norm2.b": d,
    }
    return Plan.of(
        {
            "tokens": sizes.actions * sizes.recencies * d,
            "null": d,
            **(attention if sizes.attends else {}),
            "query.w": d * d,  # by 1 / sqrt d
            "query.b": d,
            "out.w": 3 * d * d,
            "out.b": d,
            "bridges": d * n,  # by temperature / sqrt d
            "bea": d * h,
            "din": d * h,  # by din_scale / 2 b
            "din.mean": d * h,  # by din_scale (1/2 - din_shift)
            "user": d * h,
            "dots.query.w": d * sizes.dots * b,
            "dots.query.b": sizes.dots * b,
            "dots.w": sizes.dots * h,
            "bridge_dots.query.w": d * sizes.bridge_dots * n,
            "bridge_dots.query.b": sizes.bridge_dots * n,
            "bridge_dots.w": sizes.bridge_dots * h,
            "sim": sizes.kinds * sizes.summary * h,
        }
    )


@functools.lru_cache(maxsize=64)
def scratch(sizes: Sizes) -> Plan:
    """Intermediates of one user."""
    d, rows = sizes.dim, sizes.recent + 1
    together = _together(sizes)
    return Plan.of(
        {
            "tokens": (sizes.longest + 1) * d,  # the profile stands behind the last one
            "x": rows * d,
            "qkv": rows * 3 * d,
            "attended": max(rows, _QUERIES) * d,
            "hidden": rows * sizes.hidden,
            "queries": (d // sizes.heads) * _QUERIES,
            "scores": rows * _QUERIES,
            "query": d,
            "focus": rows,
            "joined": 3 * d,
            "user": d,
            "weights": rows * sizes.bridges,
            "values": sizes.bridges * d,
            "buckets": together * 32 * d,
            "crossed": sizes.bits * d,
            "mean": d,
            "dots": max(sizes.dots * sizes.bits, sizes.bridge_dots * sizes.bridges),
            "summaries": min(65_536, sizes.longest * sizes.crosses) * sizes.summary,
        }
    )


def _together(sizes: Sizes) -> int:
    """Bytes of a signature whose buckets are filled together: a divisor of its length."""
    size = sizes.bits // 8
    most = max(1, _BUCKETS // (32 * sizes.dim * 4))
    return max(count for count in range(1, size + 1) if size % count == 0 and count <= most)


@functools.lru_cache(maxsize=16)
def user(sizes: Sizes, edges: tuple[int, ...]) -> Callable[..., None]:
    """void user(weights, scratch, n, vectors, stride, signatures, stride, crosses, stride, actions u8[n], times i8[n],
    as_of, profile [d], places u2[65536], P [h], C [bridges, h], D [b, h], slots u2[.], counts i4[.], newest i4[.],
    sums [., d], found i8[1])

    Behaviours come oldest first, n <= longest. `edges`: of recency, ascending, ms. `places` is zero before and after.
    The `found` different crosses stand in the order of their newest behaviours.
    """
    return _User(sizes, edges).compiled()


@functools.lru_cache(maxsize=16)
def crosses(sizes: Sizes) -> Callable[..., None]:
    """void crosses(weights, scratch, numbers [., 2], sums [., d], shares [.], order i8[.], ends i8[kinds], G [., h])

    Rows of G in the given order of crosses, which is by kind; `ends`: where each kind ends. A cross's summary is its
    two numbers and its sum times its share.
    """
    floats, places = F32.as_pointer(), I64.as_pointer()
    code = Code("crosses", [floats, floats, floats, floats, floats, places, places, floats])
    W, S, numbers, sums, shares, order, ends, G = code.function.args
    h, size, dim = sizes.width, sizes.summary, ir.VectorType(F32, sizes.dim)
    summaries = Matrix(_at(code, S, scratch(sizes).places["summaries"]), size)

    def one_kind(kind: Any, values: list[Any]) -> list[Any]:
        build, begin = code.build, values[0]
        end = build.load(build.gep(ends, [kind]))
        count = build.sub(end, begin)

        def summarise(r: Any, _: list[Any]) -> list[Any]:
            build = code.build
            which = build.load(build.gep(order, [build.add(begin, r)]))
            target = summaries.row(build, r)
            code.store(code.vector(numbers, build.mul(which, I64(2)), ir.VectorType(F32, 2)), target, I64(0))
            share = code.spread(build.load(build.gep(shares, [which])), dim)
            total = code.vector(sums, build.mul(which, I64(sizes.dim)), dim)
            code.store(build.fmul(total, share), target, I64(2))
            return []

        def multiply(_: Any, __: list[Any]) -> list[Any]:
            build = code.build
            own = build.gep(W, [build.add(build.mul(kind, I64(size * h)), I64(weights(sizes).places["sim"]))])
            out = Matrix(build.gep(G, [build.mul(begin, I64(h))]), h)
            code.matmul(count, size, summaries, Matrix(own, h), out, h)
            return []

        code.loop(count, summarise, [])
        code.loop(code.build.zext(code.build.icmp_unsigned(">", count, I64(0)), I64), multiply, [])
        return [end]

    code.loop(sizes.kinds, one_kind, [I64(0)])
    return code.compiled()


def _at(code: Code, base: Any, place: int) -> Any:
    return code.build.gep(base, [I64(place)])


class _User:
    """Makes `user`, step by step."""

    def __init__(self, sizes: Sizes, edges: tuple[int, ...]) -> None:
        floats, bytes_ = F32.as_pointer(), I8.as_pointer()
        kinds = [floats, floats, I64, bytes_, I64, bytes_, I64, bytes_, I64, bytes_, I64.as_pointer(), I64, floats]
        kinds += [I16.as_pointer(), floats, floats, floats, I16.as_pointer(), I32.as_pointer(), I32.as_pointer()]
        self.code = code = Code("user", [*kinds, floats, I64.as_pointer()])
        self.sizes, self.edges = sizes, edges
        (
            W, S, self.n, self.vectors, self.vector_stride, self.signatures, self.signature_stride, self.slots,
            self.slot_stride, self.actions, self.times, self.as_of, self.profile, self.places, self.P, self.C, self.D,
            self.cross_slots, self.counts, self.newest, self.sums, self.found,
        ) = code.function.args  # fmt: skip
        self.W = {name: _at(code, W, place) for name, place in weights(sizes).places.items()}
        self.S = {name: _at(code, S, place) for name, place in scratch(sizes).places.items()}
        self.d = ir.VectorType(F32, sizes.dim)

    def compiled(self) -> Callable[..., None]:
        self.emit()
        return self.code.compiled()

    def emit(self) -> None:
        sizes, build = self.sizes, self.code.build
        d, h = sizes.dim, sizes.width
        total = self._tokens()
        few = build.icmp_unsigned("<", self.n, I64(sizes.recent))
        recent = build.select(few, self.n, I64(sizes.recent))
        rows = build.add(recent, I64(1))
        first = build.gep(self.S["tokens"], [build.mul(build.sub(self.n, recent), I64(d))])
        self._user_vector(first, recent, rows)
        user = Matrix(self.S["user"], d)
        self._layer(user, "user", self.P, d, h)
        self._bea(first, rows, user)
        self._din(total, user)
        self._sim()

    def _layer(
        self, x: Matrix, name: str, out: Any, inputs: int, outputs: int, start: Any = None, add: bool = False
    ) -> None:
        """out = start + x W for one row, or added to what is there."""
        self.code.matmul(1, inputs, x, Matrix(self.W[name], outputs), Matrix(out, outputs), outputs, start, add)

    def _tokens(self) -> Any:
        """Tokens of all behaviours, and the profile behind them, into scratch. Returns the tokens' sum."""
        code, sizes = self.code, self.sizes
        d, lanes = sizes.dim, -(-len(self.edges) // 8) * 8
        never = [(1 << 62)] * (lanes - len(self.edges))
        limits = ir.Constant(ir.VectorType(I64, lanes), [*self.edges, *never])
        mask = ir.IntType(lanes)
        kind = ir.VectorType(HALF if sizes.half else F32, d)

        def token(j: Any, values: list[Any]) -> list[Any]:
            build = code.build
            age = build.sub(self.as_of, build.load(build.gep(self.times, [j])))
            reached = build.icmp_signed(">=", code.spread(age, ir.VectorType(I64, lanes)), limits)
            bucket = build.zext(code.popcount(build.bitcast(reached, mask)), I64)
            action = build.zext(build.load(build.gep(self.actions, [j])), I64)
            known = build.icmp_unsigned("<", action, I64(sizes.actions))
            pair = build.add(build.mul(build.select(known, action, I64(0)), I64(sizes.recencies)), bucket)
            own = build.bitcast(build.gep(self.vectors, [build.mul(j, self.vector_stride)]), kind.element.as_pointer())
            vector = code.vector(own, I64(0), kind)
            vector = build.fpext(vector, self.d) if sizes.half else vector
            vector = build.fadd(vector, code.vector(self.W["tokens"], build.mul(pair, I64(d)), self.d))
            code.store(vector, self.S["tokens"], build.mul(j, I64(d)))
            return [build.fadd(values[0], vector)]

        (total,) = code.loop(self.n, token, [ir.Constant(self.d, None)])
        profile = code.vector(self.profile, I64(0), self.d)
        code.store(profile, self.S["tokens"], code.build.mul(self.n, I64(d)))
        return total

    def _user_vector(self, first: Any, recent: Any, rows: Any) -> None:
        """The user tower: the recent tokens and the null token, attended to, pooled and focused by the profile."""
        code, sizes = self.code, self.sizes
        d = sizes.dim
        x = Matrix(self.S["x"], d)
        code.store(code.vector(self.W["null"], I64(0), self.d), x.base, I64(0))

        def copy(r: Any, _: list[Any]) -> list[Any]:
            build = code.build
            token = code.vector(first, build.mul(r, I64(d)), self.d)
            code.store(token, x.base, build.mul(build.add(r, I64(1)), I64(d)))
            return []

        code.loop(recent, copy, [])
        if sizes.attends:
            self._attend(x, rows)
        profile, joined = Matrix(self.profile, d), self.S["joined"]

        def add(r: Any, values: list[Any]) -> list[Any]:
            return [code.build.fadd(values[0], code.vector(x.row(code.build, r), I64(0), self.d))]

        (total,) = code.loop(rows, add, [ir.Constant(self.d, None)])
        count = code.spread(code.build.uitofp(rows, F32), self.d)
        code.store(code.vector(self.profile, I64(0), self.d), joined, I64(0))
        code.store(code.build.fdiv(total, count), joined, I64(d))
        self._layer(profile, "query.w", self.S["query"], d, d, self.W["query.b"])
        focus = Matrix(self.S["focus"], 1)
        code.matmul(rows, d, x, Matrix(self.S["query"], 1), focus, 1)
        code.softmax_down(focus, rows, 1)
        code.matmul(1, rows, Matrix(focus.base, 0, 1), x, Matrix(_at(code, joined, 2 * d), d), d)
        self._layer(Matrix(joined, 3 * d), "out.w", self.S["user"], 3 * d, d, self.W["out.b"])

    def _attend(self, x: Matrix, rows: Any) -> None:
        """One transformer layer over x, in place."""
        code, sizes, S, W = self.code, self.sizes, self.S, self.W
        d, each = sizes.dim, sizes.dim // sizes.heads
        qkv = Matrix(S["qkv"], 3 * d)
        code.matmul(rows, d, x, Matrix(W["qkv.w"], 3 * d), qkv, 3 * d, W["qkv.b"])
        parts = code.build.udiv(code.build.add(rows, I64(_QUERIES - 1)), I64(_QUERIES))
        last = code.build.sub(rows, I64(1))

        def part(number: Any, _: list[Any]) -> list[Any]:
            first = code.build.mul(number, I64(_QUERIES))

            def head(which: Any, _: list[Any]) -> list[Any]:
                self._attend_head(qkv, first, last, rows, code.build.mul(which, I64(each)))
                return []

            code.loop(sizes.heads, head, [])
            return []

        code.loop(parts, part, [])
        attended, hidden = Matrix(S["attended"], d), Matrix(S["hidden"], sizes.hidden)
        mixed = Matrix(S["qkv"], d)  # what was there is used up
        code.matmul(rows, d, attended, Matrix(W["mix.w"], d), mixed, d, W["mix.b"])
        self._add_and_norm(x, mixed, rows, "norm1")
        code.matmul(rows, d, x, Matrix(W["ffn_in.w"], sizes.hidden), hidden, sizes.hidden, W["ffn_in.b"], relu=True)
        code.matmul(rows, sizes.hidden, hidden, Matrix(W["ffn_out.w"], d), mixed, d, W["ffn_out.b"])
        self._add_and_norm(x, mixed, rows, "norm2")

    def _attend_head(self, qkv: Matrix, first: Any, last: Any, rows: Any, offset: Any) -> None:
        """One head for up to 64 queries from `first`; `offset`: of the head in q, k and v."""
        code, sizes, build = self.code, self.sizes, self.code.build
        d, each = sizes.dim, sizes.dim // sizes.heads
        queries, scores = Matrix(self.S["queries"], _QUERIES), Matrix(self.S["scores"], _QUERIES)

        def turn(r: Any, _: list[Any]) -> list[Any]:
            build = code.build
            place = build.add(first, r)
            place = build.select(build.icmp_unsigned("<", place, last), place, last)
            own = build.gep(qkv.row(build, place), [offset])
            for c in range(each):
                value = build.fmul(build.load(build.gep(own, [I64(c)])), F32(each**-0.5))
                build.store(value, build.gep(queries.base, [build.add(r, I64(c * _QUERIES))]))
            return []

        code.loop(_QUERIES, turn, [])
        keys = Matrix(build.gep(code.build.gep(qkv.base, [offset]), [I64(d)]), 3 * d)
        code.matmul(rows, each, keys, queries, scores, _QUERIES)
        code.softmax_down(scores, rows, _QUERIES)
        build = code.build
        values = Matrix(build.gep(build.gep(qkv.base, [offset]), [I64(2 * d)]), 3 * d)
        left = build.sub(build.add(last, I64(1)), first)
        count = build.select(build.icmp_unsigned("<", left, I64(_QUERIES)), left, I64(_QUERIES))
        out = Matrix(build.gep(build.gep(self.S["attended"], [build.mul(first, I64(d))]), [offset]), d)
        code.matmul(count, rows, Matrix(scores.base, 1, _QUERIES), values, out, each)

    def _add_and_norm(self, x: Matrix, more: Matrix, rows: Any, name: str) -> None:
        """x = LayerNorm(x + more), in place."""
        code, d = self.code, self.sizes.dim

        def one(r: Any, _: list[Any]) -> list[Any]:
            build, place = code.build, x.row(code.build, r)
            value = build.fadd(code.vector(place, I64(0), self.d), code.vector(more.row(build, r), I64(0), self.d))
            mean = build.fmul(code.sum(value, F32(0)), F32(1 / d))
            value = build.fsub(value, code.spread(mean, self.d))
            variance = build.fmul(code.sum(build.fmul(value, value), F32(0)), F32(1 / d))
            scale = build.fdiv(F32(1), code.sqrt(build.fadd(variance, F32(1e-5))))
            factor = build.fmul(code.spread(scale, self.d), code.vector(self.W[f"{name}.w"], I64(0), self.d))
            code.store(
                code.multiply_add(value, factor, code.vector(self.W[f"{name}.b"], I64(0), self.d)), place, I64(0)
            )
            return []

        code.loop(rows, one, [])

    def _bea(self, first: Any, rows: Any, user: Matrix) -> None:
        """C: the bridges' values through their block of the first layer, and the dot products with bridge weights."""
        code, sizes = self.code, self.sizes
        d, h, n = sizes.dim, sizes.width, sizes.bridges
        U, affinity, values = Matrix(first, d), Matrix(self.S["weights"], n), Matrix(self.S["values"], d)
        C = Matrix(self.C, h)
        code.matmul(rows, d, U, Matrix(self.W["bridges"], n), affinity, n)
        code.softmax_down(affinity, rows, n)
        code.matmul(n, rows, Matrix(affinity.base, 1, n), U, values, d)
        code.matmul(n, d, values, Matrix(self.W["bea"], h), C, h)
        self._dots("bridge_dots", sizes.bridge_dots, n, user, C)

    def _dots(self, name: str, count: int, size: int, user: Matrix, out: Matrix) -> None:
        """out[size, h] += the fold of `count` dot products with vectors of `size` numbers."""
        if count:
            code, queries = self.code, self.S["dots"]
            self._layer(user, f"{name}.query.w", queries, self.sizes.dim, count * size, self.W[f"{name}.query.b"])
            h = self.sizes.width
            code.matmul(size, count, Matrix(queries, 1, size), Matrix(self.W[f"{name}.w"], h), out, h, add=True)

    def _din(self, total: Any, user: Matrix) -> None:
        """D, and LSH-DIN's constant part into P.

        Sum over behaviours of sign times token, for every bit: first every token goes into one of 16 buckets per four
        bits of its signature; a bit's sum is that of the buckets where it is set less that of the others. A quarter of
        the additions of the product with the matrix of signs.
        """
        code, sizes, build = self.code, self.sizes, self.code.build
        d, h, size, together = sizes.dim, sizes.width, sizes.bits // 8, _together(sizes)
        some = build.icmp_unsigned(">", self.n, I64(0))
        share = build.select(some, build.fdiv(F32(1), build.uitofp(self.n, F32)), F32(0))
        shares = code.spread(share, self.d)
        code.store(build.fmul(total, shares), self.S["mean"], I64(0))
        self._layer(Matrix(self.S["mean"], d), "din.mean", self.P, d, h, add=True)
        buckets, tokens = self.S["buckets"], self.S["tokens"]

        def part(number: Any, _: list[Any]) -> list[Any]:
            first = code.build.mul(number, I64(together))

            def clear(k: Any, _: list[Any]) -> list[Any]:
                code.store(ir.Constant(self.d, None), buckets, code.build.mul(k, I64(d)))
                return []

            def put(j: Any, _: list[Any]) -> list[Any]:
                build = code.build
                token = code.vector(tokens, build.mul(j, I64(d)), self.d)
                own = build.gep(self.signatures, [build.add(build.mul(j, self.signature_stride), first)])
                for at in range(together):
                    byte = build.zext(build.load(build.gep(own, [I64(at)])), I64)
                    for half, value in enumerate((build.and_(byte, I64(15)), build.lshr(byte, I64(4)))):
                        place = build.mul(build.add(value, I64(16 * (2 * at + half))), I64(d))
                        code.store(build.fadd(code.vector(buckets, place, self.d), token), buckets, place)
                return []

            def read(four: Any, _: list[Any]) -> list[Any]:
                build = code.build
                base = build.mul(four, I64(16 * d))
                held = [code.vector(buckets, build.add(base, I64(v * d)), self.d) for v in range(16)]
                for bit in range(4):
                    value = ir.Constant(self.d, None)
                    for v in range(16):
                        value = build.fadd(value, held[v]) if v >> bit & 1 else build.fsub(value, held[v])
                    row = build.add(build.mul(build.add(build.mul(first, I64(2)), four), I64(4)), I64(bit))
                    code.store(build.fmul(value, shares), self.S["crossed"], build.mul(row, I64(d)))
                return []

            code.loop(together * 32, clear, [])
            code.loop(self.n, put, [])
            code.loop(together * 2, read, [])
            return []

        code.loop(size // together, part, [])
        D = Matrix(self.D, h)
        code.matmul(sizes.bits, d, Matrix(self.S["crossed"], d), Matrix(self.W["din"], h), D, h)
        self._dots("dots", sizes.dots, sizes.bits, user, D)

    def _sim(self) -> None:
        """The user's different crosses, from the newest behaviour to the oldest: slot, count, newest, sum of tokens."""
        code, sizes = self.code, self.sizes
        d = sizes.dim

        def behaviour(number: Any, values: list[Any]) -> list[Any]:
            build = code.build
            j = build.sub(build.sub(self.n, I64(1)), number)
            token = code.vector(self.S["tokens"], build.mul(j, I64(d)), self.d)
            own = build.bitcast(build.gep(self.slots, [build.mul(j, self.slot_stride)]), I16.as_pointer())
            found = values[0]
            for c in range(sizes.crosses):
                slot = build.load(build.gep(own, [I64(c)]))
                used = build.zext(build.icmp_unsigned("!=", slot, I16(0)), I64)

                def meet(_: Any, values: list[Any], slot: Any = slot, token: Any = token, j: Any = j) -> list[Any]:
                    build = code.build
                    place = build.gep(self.places, [build.zext(slot, I64)])
                    known = build.zext(build.load(place), I64)
                    new = build.icmp_unsigned("==", known, I64(0))
                    which = build.select(new, values[0], build.sub(known, I64(1)))

                    def enter(_: Any, __: list[Any]) -> list[Any]:
                        build = code.build
                        build.store(build.trunc(build.add(which, I64(1)), I16), place)
                        build.store(slot, build.gep(self.cross_slots, [which]))
                        build.store(I32(0), build.gep(self.counts, [which]))
                        build.store(build.trunc(j, I32), build.gep(self.newest, [which]))
                        code.store(ir.Constant(self.d, None), self.sums, build.mul(which, I64(d)))
                        return []

                    fresh = build.zext(new, I64)
                    code.loop(fresh, enter, [])
                    build = code.build
                    count = build.gep(self.counts, [which])
                    build.store(build.add(build.load(count), I32(1)), count)
                    at = build.mul(which, I64(d))
                    code.store(build.fadd(code.vector(self.sums, at, self.d), token), self.sums, at)
                    return [build.add(values[0], fresh)]

                (found,) = code.loop(used, meet, [found])
                build = code.build
            return [found]

        (found,) = code.loop(self.n, behaviour, [I64(0)])

        def forget(k: Any, _: list[Any]) -> list[Any]:
            slot = code.build.load(code.build.gep(self.cross_slots, [k]))
            code.build.store(I16(0), code.build.gep(self.places, [code.build.zext(slot, I64)]))
            return []

        code.loop(found, forget, [])
        code.build.store(found, self.found)
