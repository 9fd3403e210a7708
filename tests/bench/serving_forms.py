"""The serving form of every model in `encoders.baselines.MODELS`: what must run once the candidates are known.

Everything that depends on the user alone or on the item alone is done before and not timed. Each rival has the best
ready-made form that was found for it, often several, of which the quickest counts:

    aif                   look-up and gather in a real arena, and the kernel of `index.kernels`
    dssm                  normalised item matrix times user vector, by which temperature and bias are folded in
    inttower              item heads times the heads of all user layers, maxima, sum
    cold                  item groups and their half of the gates are ready, and each user group has been through the
                          first layer; or each item group has, too
    din, din-plain        AIF's kernel for the frame; attention whose first layer is one matrix per candidate,
                          (We + Wd) + Wp diag(x_i), in tiles that stay in the cache
    eta                   the same over the nearest behaviours: popcounts, and a partition of 32-bit numbers
    sdim                  the user's bucket sums, normalised and multiplied by W1d, are rows that a candidate adds up
    aif-dots              AIF's kernel, and the user's matrix times the item vectors

In favour of the rivals: their items are found by position, without an id table, and bf16 counts where the error stays
below 5 % of the scores' standard deviation. Against those in AIF's frame: the kernel adds a D of zeros (some 0.05 us).
Every form is held against its model's forward pass before it is timed. One thread; CPU time, so that other work on the
machine matters little.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoders.baselines import COLD, DIN, DSSM, ETA, MODELS, SDIM, IntTower, ItemDots, TargetAttention, build
from encoders.config import ModelConfig
from encoders.inputs import Candidates, Features, Users
from encoders.model import AIF, Frame
from encoders.ranker import Ranker
from index import kernels
from index.keys import keys_of_ints
from index.layout import RowLayout
from tests.bench.scene import F4, I8, Rows, Scene, arena_of, array_of, bundle_of, tables_of

CATALOGUE = 60_000
CANDIDATES = 10_000
LENGTH = 1_000
FEWER = {"din": 256, "din-plain": 256, "eta": 2_000}  # candidates per repetition of the slow ones
CHECKED = 256  # candidates that each form is held against the forward pass with
EXACT, NARROW = 2e-3, 0.05  # most error of fp32 and of narrower forms, in standard deviations of the scores


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to serve a model: `scores` gives f4[n] of the items at places i8[n] of the catalogue."""

    name: str
    scores: Callable[[I8], F4]
    most_error: float = EXACT


# ---- the forms


def forms(model: Ranker, scene: Scene, folder: Path) -> list[Form]:
    """All serving forms of a model; `folder` is an empty one for stores. Raises TypeError for a model without one."""
    match model:
        case ETA() | SDIM() | DIN():
            return _frame(model, scene)
        case ItemDots():
            return _item_dots(model, scene)
        case AIF():
            return _aif(model, scene, folder)
        case COLD():
            return _cold(model, scene)
        case DSSM():
            return _dssm(model, scene)
        case IntTower():
            return _int_tower(model, scene)
    raise TypeError(f"no serving form is known of {type(model).__name__}")


def _aif(model: AIF, scene: Scene, folder: Path) -> list[Form]:
    bundle = bundle_of(model, scene, "fp16")
    layout = RowLayout.from_json(bundle.manifest.row)
    rows = Rows.of(model, scene)
    arena = arena_of(rows, layout, folder)
    user, head = tables_of(bundle, scene, rows)
    kernels.warm_up(layout, head)

    def scores(places: I8) -> F4:
        return kernels.score(arena.gather(keys_of_ints(places.astype(np.uint64))).hot, user, head)

    return [Form("arena and kernel, fp16 rows", scores, NARROW)]


def _item_dots(model: ItemDots, scene: Scene) -> list[Form]:
    twin = AIF(model.config, scene.spec.sizes)
    twin.load_state_dict(model.state_dict(), strict=False)
    bundle = bundle_of(twin.eval().requires_grad_(False), scene, "fp32")
    layout = RowLayout.from_json(bundle.manifest.row)
    rows = Rows.of(twin, scene)
    hot, x = rows.hot(layout), torch.from_numpy(rows.vector)
    user, head = tables_of(bundle, scene, rows)
    kernels.warm_up(layout, head)
    users = scene.users(model)
    tokens = model.history(users)[:, -model.config.recent :]
    profile = model.profiles(users.profile, users.known)
    matrix = model.item_dots.fold(model.user_tower(profile, tokens, users.valid[:, -model.config.recent :])[0]).T

    def scores(places: I8) -> F4:
        chosen = hot.take(places)
        chosen["joint"] += (x.index_select(0, torch.from_numpy(places)) @ matrix).numpy()
        return kernels.score(chosen, user, head)

    return [Form("kernel and torch", scores)]


def _dssm(model: DSSM, scene: Scene) -> list[Form]:
    users = scene.users(model)
    joined = torch.cat([model.profiles(users.profile, users.known), model.recent(users)], dim=1)
    user = torch.nn.functional.normalize(model.user_mlp(joined), dim=1)[0] * model.log_scale.exp()
    items = dssm_items(model, scene.columns.features)
    bias, rows, vector = float(model.bias), items.numpy(), user.numpy()

    def in_numpy(places: I8) -> F4:
        out: F4 = rows[places] @ vector + bias
        return out

    def in_torch(places: I8) -> F4:
        return array_of(items.index_select(0, torch.from_numpy(places)) @ user + bias)

    narrow, narrow_user = items.bfloat16(), user.bfloat16()[:, None]

    def in_bf16(places: I8) -> F4:
        return array_of((narrow.index_select(0, torch.from_numpy(places)) @ narrow_user)[:, 0].float() + bias)

    return [Form("numpy", in_numpy), Form("torch", in_torch), Form("torch, bf16", in_bf16, NARROW)]


def dssm_items(model: DSSM, features: Features) -> Tensor:
    """The item side: unit vectors [M, d]."""
    return torch.nn.functional.normalize(model.item_mlp(model.item_vectors(features)), dim=1)


def _int_tower(model: IntTower, scene: Scene) -> list[Form]:
    config = model.config
    size = config.dim // config.heads
    everything = Candidates(scene.columns.features, torch.empty(0), torch.empty(0), torch.empty(0))
    heads = model.item_heads(model._item(everything))  # [M, heads * size]
    layers = model._user(scene.users(model))
    ours = torch.cat([one(layer).reshape(-1, size) for layer, one in zip(layers, model.user_heads, strict=True)])

    def of(items: Tensor, user: Tensor) -> Callable[[I8], F4]:
        # All pairs of heads as one product: the user's heads stand once per item head, on the diagonal of blocks.
        blocks = torch.kron(torch.eye(config.heads), user.T.float().contiguous()).to(
            user.dtype
        )  # [heads * size, heads * user heads]

        def scores(places: I8) -> F4:
            products = items.index_select(0, torch.from_numpy(places)) @ blocks
            best = products.view(len(places), config.heads, -1).amax(dim=1)
            return array_of(best.sum(dim=1, dtype=torch.float32) + model.bias)

        return scores

    def by_head(places: I8) -> F4:
        products = heads.index_select(0, torch.from_numpy(places)).view(-1, size) @ ours.T
        return array_of(products.view(len(places), config.heads, -1).amax(dim=1).sum(dim=1) + model.bias)

    return [
        Form("torch, head by head", by_head),
        Form("torch, blocks", of(heads, ours)),
        Form("torch, blocks, bf16", of(heads.bfloat16(), ours.bfloat16()), NARROW),
    ]


# COLD ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ColdUser:
    """COLD's user side: its half of the gates' layer [groups], and its groups through the first layer [groups_u, h]."""

    gates: Tensor
    first: Tensor

    @classmethod
    def of(cls, model: COLD, users: Users) -> ColdUser:
        profile = model.profiles(users.profile, users.known)
        bags = model.profile_tower.inputs(users.profile)[0].flatten(1) * users.known[:, None]
        user = torch.cat([profile, model.recent(users), bags], dim=1)[0]
        wide = len(user)
        W = _linear(model.mlp[0]).weight[:, :wide]
        parts = zip(_split(user, model.user_groups), _split(W, model.user_groups, 1), strict=True)
        gates = torch.addmv(model.gates.bias, model.gates.weight[:, :wide], user)
        return cls(gates, torch.stack([weight @ group for group, weight in parts]))


def cold_items(model: COLD, features: Features) -> Tensor:
    """COLD's item groups [M, sum of sizes]."""
    return torch.cat([model.item_vectors(features), model.item_tower.inputs(features)[0].flatten(1)], dim=1)


class ColdJoin:
    """COLD once user and item groups are there: gates, the first layer's sum, and the layers behind it."""

    def __init__(self, model: COLD, dtype: torch.dtype = torch.float32) -> None:
        wide = sum(model.user_groups)
        first = _linear(model.mlp[0])
        self._dtype, self._owners = dtype, len(model.user_groups)
        self._group = model.group[wide:] - len(model.user_groups)  # of each column of the item's groups
        self._sizes = model.item_groups
        self._gates = model.gates.weight[:, wide:].T.contiguous()
        self._first, self._bias = first.weight[:, wide:].T.contiguous(), first.bias
        self._rest = [_linear(layer) for layer in model.mlp if isinstance(layer, torch.nn.Linear)][1:]
        self._narrow = [(layer.weight.T.to(dtype), layer.bias.to(dtype)) for layer in self._rest]
        self._wide = self._first.to(dtype)

    def halves(self, items: Tensor) -> Tensor:
        """The item's half of the gates' layer [M, groups]."""
        return items @ self._gates

    def multiplied(self, items: Tensor) -> Tensor:
        """Each item group through the first layer [M, groups_i, h]."""
        parts = zip(_split(items, self._sizes, 1), _split(self._first, self._sizes), strict=True)
        return torch.stack([group @ weight for group, weight in parts], dim=1)

    def scores(self, user: ColdUser, items: Tensor, halves: Tensor) -> Tensor:
        """From item groups [K, sum of sizes] and their halves of the gates [K, groups] -> [K]."""
        gates = torch.sigmoid(halves + user.gates)
        mine, theirs = gates[:, : self._owners], gates[:, self._owners :]
        gated = (items * theirs.index_select(1, self._group).to(items.dtype)).to(self._dtype)
        z = torch.addmm(self._bias, mine, user.first)
        return self._layers(z.to(self._dtype).addmm_(gated, self._wide))

    def scores_of_multiplied(self, user: ColdUser, multiplied: Tensor, halves: Tensor) -> Tensor:
        """The same from item groups [K, groups_i, h] that have been through the first layer."""
        gates = torch.sigmoid(halves + user.gates)
        mine, theirs = gates[:, : self._owners], gates[:, self._owners :].to(multiplied.dtype)
        z = torch.addmm(self._bias, mine, user.first)
        return self._layers(torch.bmm(theirs[:, None, :], multiplied)[:, 0].to(self._dtype) + z.to(self._dtype))

    def _layers(self, z: Tensor) -> Tensor:
        for weight, bias in self._narrow:
            z = torch.addmm(bias, z.relu_(), weight)
        return z[:, 0].float()


def _cold(model: COLD, scene: Scene) -> list[Form]:
    items = cold_items(model, scene.columns.features)
    user = ColdUser.of(model, scene.users(model))

    def of(dtype: torch.dtype) -> Iterator[Form]:
        join = ColdJoin(model, dtype)
        halves = join.halves(items)
        groups, multiplied = items.to(dtype), join.multiplied(items).to(dtype)

        def grouped(places: I8) -> F4:
            which = torch.from_numpy(places)
            return array_of(join.scores(user, groups.index_select(0, which), halves.index_select(0, which)))

        def ready(places: I8) -> F4:
            which = torch.from_numpy(places)
            chosen = multiplied.index_select(0, which)
            return array_of(join.scores_of_multiplied(user, chosen, halves.index_select(0, which)))

        name = str(dtype).removeprefix("torch.")
        error = EXACT if dtype == torch.float32 else NARROW
        yield Form(f"item groups, {name}", grouped, error)
        yield Form(f"item groups through the first layer, {name}", ready, error)

    return [*of(torch.float32), *of(torch.bfloat16)]


# Rivals in AIF's frame ----------------------------------------------------------------------------------------------


def twin_of(model: Frame, scene: Scene) -> AIF:
    """An AIF with the frame's weights and without LSH-DIN, whose fold is all of the model but its `interest`; of a
    frame that is no AIF, BEA and the dot products are left out too.
    """
    config = model.config
    without = (*config.without, "lsh_din") if config.has("lsh_din") else config.without
    if not isinstance(model, AIF):
        without = (*without, "bea") if config.has("bea") else without
        config = dataclasses.replace(config, bridge_dots=0)
    twin = AIF(dataclasses.replace(config, without=without), scene.spec.sizes)
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin.eval().requires_grad_(False)


def _frame(model: ETA | SDIM | DIN, scene: Scene) -> list[Form]:
    twin = twin_of(model, scene)
    bundle = bundle_of(twin, scene, "fp32")
    layout = RowLayout.from_json(bundle.manifest.row)
    rows = Rows.of(twin, scene)
    hot = rows.hot(layout)
    user, head = tables_of(bundle, scene, rows)
    kernels.warm_up(layout, head)

    def form(name: str, interest: Callable[[Tensor], Tensor], error: float = EXACT) -> Form:
        def scores(places: I8) -> F4:
            chosen = hot.take(places)
            chosen["joint"] += interest(torch.from_numpy(places)).numpy()
            return kernels.score(chosen, user, head)

        return Form(name, scores, error)

    if not model.config.has("lsh_din") and isinstance(model, AIF):
        return [Form("kernel", lambda places: kernels.score(hot.take(places), user, head))]
    x, users = torch.from_numpy(rows.vector), scene.users(model)
    if isinstance(model, SDIM):
        return [form("rows of the user's buckets", _buckets(model, users, x))]
    tokens = model.history(users)[0]
    attention = {dtype: Attention(model.attention, dtype) for dtype in (torch.float32, torch.bfloat16)}
    if isinstance(model, ETA):
        return [
            form(f"nearest behaviours, {str(dtype).removeprefix('torch.')}", _nearest(model, one, users, x, tokens), e)
            for (dtype, one), e in zip(attention.items(), (EXACT, NARROW), strict=True)
        ]
    W1d = model.W1d.T
    return [
        form(
            f"tiles, {str(dtype).removeprefix('torch.')}",
            lambda places, one=one: one.over_all(tokens, x.index_select(0, places)) @ W1d,  # type: ignore[misc]
            error,
        )
        for (dtype, one), error in zip(attention.items(), (EXACT, NARROW), strict=True)
    ]


class Attention:
    """`TargetAttention` of one user, with the first layer as one matrix per item, M_i = (We + Wd) + Wp diag(x_i), and
    sigmoid(z) as (1 + tanh(z / 2)) / 2, whose constants go into the weights; both exact, tanh being the quicker one.
    """

    tile: ClassVar[int] = 32  # candidates at a time: their first layer's output is 8 MB

    def __init__(self, attention: TargetAttention, dtype: torch.dtype) -> None:
        if attention.activation is not torch.sigmoid:
            raise TypeError("this form is of an attention with sigmoids")
        We, Wx, Wd, Wp = (0.5 * part for part in attention.first.weight.chunk(4, dim=1))
        self._both, self._Wp, self._item, self._bias = We + Wd, Wp, (Wx - Wd).T, 0.5 * attention.first.bias
        rest = [_linear(layer) for layer in attention.rest]
        factors = [0.5] * (len(rest) - 1) + [1.0]  # of a layer's output: what a tanh follows is halved
        self._rest = [
            ((factor / 2 * layer.weight.T).to(dtype), (factor * (_bias(layer) + layer.weight.sum(dim=1) / 2)).to(dtype))
            for factor, layer in zip(factors, rest, strict=True)
        ]
        self._softmax, self.dtype = attention.softmax, dtype

    def over_all(self, tokens: Tensor, x: Tensor) -> Tensor:
        """All tokens [L, d] for each of x [K, d] -> [K, d]."""
        narrow = tokens.to(self.dtype)
        return torch.cat([self.one_tile(tokens, narrow, x[at : at + self.tile]) for at in range(0, len(x), self.tile)])

    def over_own(self, tokens: Tensor, places: Tensor, x: Tensor) -> Tensor:
        """Tokens [L, d], in this attention's type, at places [K, top], each item's own, for x [K, d] -> [K, d]."""
        matrices, added = self._first(x)
        own = torch.nn.functional.embedding(places, tokens)  # [K, top, d]
        z = torch.baddbmm(added[:, None, :], own, matrices.transpose(1, 2))  # [K, top, a]
        weight = self._weights(z.flatten(0, 1)).view(places.shape).float()
        if self._softmax:
            weight = torch.softmax(weight, dim=1)
        return torch.bmm(weight[:, None, :].to(own.dtype), own)[:, 0].float()

    def one_tile(self, tokens: Tensor, narrow: Tensor, x: Tensor) -> Tensor:
        matrices, added = self._first(x)  # [T, a, d], [T, a]
        z = torch.addmm(added.flatten(), narrow, matrices.flatten(0, 1).T)  # [L, T * a]
        weight = self._weights(z.view(-1, matrices.shape[1])).view(len(tokens), x.shape[0]).float()
        if self._softmax:
            weight = torch.softmax(weight, dim=0)
        return weight.T @ tokens

    def _first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        matrices = torch.addcmul(self._both, x[:, None, :], self._Wp)
        return matrices.to(self.dtype), torch.addmm(self._bias, x, self._item).to(self.dtype)

    def _weights(self, z: Tensor) -> Tensor:
        for weight, bias in self._rest:
            z = torch.addmm(bias, z.tanh_(), weight)
        return z


def _nearest(model: ETA, attention: Attention, users: Users, x: Tensor, tokens: Tensor) -> Callable[[Tensor], Tensor]:
    ours = _words(users.vectors[0], model.hashes)  # [L, words]
    theirs = _words(x, model.hashes)  # [M, words]
    narrow, W1d, top, chunk = tokens.to(attention.dtype), model.W1d.T, min(model.top, len(tokens)), 128

    def interest(places: Tensor) -> Tensor:
        out = []
        for part in _split(places, chunk):
            near = torch.from_numpy(nearest(theirs[part.numpy()], ours, top))
            out.append(attention.over_own(narrow, near, x.index_select(0, part)))
        return torch.cat(out) @ W1d

    return interest


def nearest(theirs: NDArray[np.uint64], ours: NDArray[np.uint64], top: int) -> I8:
    """Places [K, top] of the behaviours' signatures [L, words] nearest to each of [K, words]; the older of equal ones.

    Distance and place are one number, because NumPy partitions numbers of 32 bits with vectors, but not places.
    """
    distance = np.bitwise_count(theirs[:, None, 0] ^ ours[None, :, 0]).astype(np.uint32)
    for word in range(1, theirs.shape[1]):
        distance += np.bitwise_count(theirs[:, None, word] ^ ours[None, :, word])
    shift = np.uint32(len(ours).bit_length())
    keyed = (distance << shift) | np.arange(len(ours), dtype=np.uint32)
    if top < len(ours):
        keyed = np.partition(keyed, top - 1, axis=1)[:, :top]
    places: I8 = (keyed & np.uint32((1 << int(shift)) - 1)).astype(np.int64)
    return places


def _words(vectors: Tensor, hashes: Tensor) -> NDArray[np.uint64]:
    """SimHash signatures [n, bits / 64] of vectors [n, d]."""
    packed = np.packbits((vectors @ hashes > 0).numpy(), axis=1, bitorder="little")
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))
    words: NDArray[np.uint64] = packed.view(np.uint64)
    return words


def _buckets(model: SDIM, users: Users, x: Tensor) -> Callable[[Tensor], Tensor]:
    theirs = model._buckets(x)  # [M, rounds]
    table = torch.zeros(model.rounds << model.bits_per_round, model.config.dim)
    for which in model._buckets(users.vectors[0]).unbind(1):
        table.index_add_(0, which, model.history(users)[0])
    rows = torch.nn.functional.normalize(table, dim=1) @ model.W1d.T / model.rounds  # [buckets, h]

    def interest(places: Tensor) -> Tensor:
        return torch.nn.functional.embedding_bag(theirs.index_select(0, places), rows, mode="sum")

    return interest


# ---- checked and timed


def check(model: Ranker, scene: Scene, form: Form, count: int = CHECKED) -> float:
    """The form's largest error against the forward pass on `count` items, in standard deviations of the scores; raises
    AssertionError where that is too much. ETA takes any of equally near behaviours, so it is checked where it takes
    all (a scene of at most `top` behaviours); `nearest` is tested apart.
    """
    places = np.random.default_rng(3).choice(len(scene), min(count, len(scene)), replace=False)
    wanted, found = scene.forward(model, places), form.scores(places)
    spread = float(wanted.std())
    error = float(np.abs(found - wanted).max()) / spread
    name = type(model).__name__
    assert spread > 1e-4, f"{name}: the sample's scores do not differ"
    assert error <= form.most_error, f"{name}, {form.name}: off by {error:.2g} standard deviations"
    return error


def measure(
    name: str,
    candidates: int = CANDIDATES,
    length: int = LENGTH,
    *,
    config: ModelConfig | None = None,
    repetitions: int = 15,
) -> list[float]:
    """Microseconds of CPU per candidate of the model's quickest form, one per repetition."""
    return measure_all({name: (name, config or ModelConfig())}, candidates, length, repetitions=repetitions)[name]


@torch.inference_mode()
def measure_all(
    contenders: Mapping[str, tuple[str, ModelConfig]],
    candidates: int = CANDIDATES,
    length: int = LENGTH,
    *,
    repetitions: int = 15,
    catalogue: int = CATALOGUE,
) -> dict[str, list[float]]:
    """`measure` of several (model, config) under one name each, interleaved: every repetition times all of them on
    candidates drawn anew. The slow ones get fewer candidates (`FEWER`); the cost per candidate is the same.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(one_thread())
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="forerank-forms-")))
        ready: dict[str, list[Form]] = {}
        scenes: dict[tuple[int, int], Scene] = {}  # by all of a config that a scene depends on
        for label, (name, config) in contenders.items():
            key = (config.embedding_dim, config.crosses)
            if key not in scenes:
                scenes[key] = Scene(catalogue, length, config)
            ready[label] = checked_forms(name, config, scenes[key], folder / str(len(ready)))
        random = np.random.default_rng(5)
        spent: dict[tuple[str, str], list[float]] = {}
        for repetition in range(repetitions + 1):  # the first warms up
            drawn = random.permutation(catalogue)[:candidates]
            for label, forms_ in ready.items():
                places = np.ascontiguousarray(drawn[: FEWER.get(contenders[label][0], candidates)])
                for form in forms_:
                    took = _cpu_us(form, places) / len(places)
                    if repetition:
                        spent.setdefault((label, form.name), []).append(took)
    best: dict[str, list[float]] = {}
    for (label, _), samples in spent.items():
        if label not in best or statistics.median(samples) < statistics.median(best[label]):
            best[label] = samples
    return best


def checked_forms(name: str, config: ModelConfig, scene: Scene, folder: Path) -> list[Form]:
    """Forms of an untrained model that agree with its forward pass; narrower ones that do not are left out."""
    model = build(name, config, scene.spec.sizes).eval().requires_grad_(False)
    if isinstance(model, ETA):  # whose choice among equally near behaviours is free
        few = Scene(4 * CHECKED, model.top, config)
        for form in _frame(model, few):
            check(model, few, form)
        return forms(model, scene, folder)
    kept = []
    for form in forms(model, scene, folder):
        try:
            check(model, scene, form)
        except AssertionError:
            if form.most_error == EXACT or isinstance(model, AIF):
                raise
            continue
        kept.append(form)
    return kept


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu_us(form: Form, places: I8) -> float:
    began = time.thread_time()
    form.scores(places)
    return (time.thread_time() - began) * 1e6


def _linear(layer: torch.nn.Module) -> torch.nn.Linear:
    assert isinstance(layer, torch.nn.Linear)
    return layer


def _bias(layer: torch.nn.Linear) -> Tensor:
    """Zero where it has none."""
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias


def _split(tensor: Tensor, sizes: int | list[int], dim: int = 0) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = torch.split(tensor, sizes, dim)
    return out


if __name__ == "__main__":
    for label, samples in measure_all({name: (name, ModelConfig()) for name in MODELS}).items():
        print(f"{label:<12} {statistics.median(samples):9.3f} us  [{min(samples):.3f} .. {max(samples):.3f}]")
