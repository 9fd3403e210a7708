"""The exact fold: item rows on the nearline side, user blocks on the request's side, the head; and the oracle of both.

`ItemFold` runs in encode workers, `UserFold` in the API's user inference; RTP joins their arrays:

    z = joint_i + P + C w_i + D s_i + T log1p(hist_ui) + mean_c G[c]          s_i in {-1,+1}^b      score = MLP(relu(z))

Guarantee: that score equals `reference_scores`, the training form's forward pass on the same inputs, within 1e-5 (fp32
arrays), where SimTier's window holds no more than `lsh.COUNTED` behaviours; of a longer one a sample is counted.
`join_scores` is the join in plain NumPy, the oracle of faster ones. What the config switches off is zero in
these arrays, and dot products of users and items are part of C and D. Arrays are float32 unless their line says
otherwise.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from encoders import lsh, user_ir
from encoders.bundle import Bundle, BundleError
from encoders.config import ModelConfig
from encoders.features import FeatureError, Item, ItemEncoder, ProfileEncoder
from encoders.inputs import NO_CROSS, Candidates, Features, Users
from encoders.model import AIF
from encoders.ranker import DAY, RECENCY_EDGES

F4 = npt.NDArray[np.float32]
U1 = npt.NDArray[np.uint8]
U2 = npt.NDArray[np.uint16]
I8 = npt.NDArray[np.int64]

_LIMITS = {"fp16": float(np.finfo(np.float16).max), "fp32": float(np.finfo(np.float32).max)}
_NO_SLOTS: U2 = np.empty(0, np.uint16)
_REFERENCE_CHUNK = 1_024  # candidates per forward pass of the reference


@dataclasses.dataclass(frozen=True)
class EncodedItems:
    """Columns of n rows, before they are narrowed to the row's precision. Rows with an error must not be stored."""

    joint: F4  # [n, h]
    bridge: F4  # [n, bridges]
    signature: U1  # [n, b / 8]
    vector: F4  # [n, d]
    crosses: U2  # [n, C], slots, 0 = none
    attributes: F4  # [n, A], NaN = absent
    errors: list[str | None]


@dataclasses.dataclass(frozen=True)
class Behaviours:
    """A user's behaviours whose items have a row, oldest first; the first three columns are those of the rows, and may
    be views of them."""

    vectors: F4 | npt.NDArray[np.float16]  # [L, d]
    signatures: U1  # [L, b / 8]
    crosses: U2  # [L, C]
    actions: U1  # [L], codes of the bundle (FeatureSpec.action_codes)
    times: I8  # [L], milliseconds since the epoch, ascending

    def __len__(self) -> int:
        return len(self.times)

    def until(self, as_of: int, longest: int) -> Behaviours:
        """The newest `longest` of those not after `as_of`."""
        end = int(np.searchsorted(self.times, as_of, side="right"))
        cut = slice(max(0, end - longest), end)
        return Behaviours(
            self.vectors[cut], self.signatures[cut], self.crosses[cut], self.actions[cut], self.times[cut]
        )


@dataclasses.dataclass(frozen=True)
class Crosses:
    """A user's SIM cross features, folded; valid for one generation and one point in time."""

    G: F4  # [c + 1, h]; row 0 = a cross that the user never met, and an item without crosses
    slots: U2  # [c], by kind; slot k belongs to row k + 1 of G
    generation: str
    as_of: int


@dataclasses.dataclass(frozen=True)
class UserBlock:
    """The folded user side of the first layer, valid for one generation and one point in time."""

    P: F4  # [h]
    C: F4  # [bridges, h], C_u transposed: a row is what a bridge adds
    D: F4  # [b, h], likewise
    G: F4  # [c + 1, h]; row 0 = a cross that the user never met, and an item without crosses
    cross_slots: U2  # [c], by kind; slot k belongs to row k + 1 of G
    window: U1  # [Lw, b / 8], signatures of SimTier's window, the newest last; a sample of a long one (`lsh.thinned`)
    lengths: tuple[int, ...]  # how many of its newest each histogram counts: Lw, and those of the short window
    weight: float  # how many behaviours each stands for that the short window has not
    generation: str
    as_of: int

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What `index.kernels.user_tables` takes."""
        return self.P, self.C, self.D, self.G, self.cross_slots, self.window, self.lengths, self.weight

    def with_crosses(self, crosses: Crosses) -> UserBlock:
        """This block with crosses that were made apart from it. Raises ValueError for those of another generation."""
        if crosses.generation != self.generation:
            raise ValueError(f"crosses of generation {crosses.generation} met a block of generation {self.generation}")
        return dataclasses.replace(self, G=crosses.G, cross_slots=crosses.slots)

    def histograms(self, signatures: U1, edges: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int32]]:
        """SimTier's counts [n, tiers] of items with these signatures [n, b / 8]: those of each window."""
        windows = [self.window[len(self.window) - length :] for length in self.lengths]
        counts = [lsh.tier_counts(lsh.matches(signatures, window), edges) for window in windows]
        exact = counts[1] if len(counts) > 1 else np.zeros_like(counts[0])
        return [exact + lsh.weighted(counts[0] - exact, self.weight), *counts[1:]]


@dataclasses.dataclass(frozen=True)
class Head:
    """What every request of a generation shares: SimTier's table and edges, and the MLP behind the first ReLU."""

    T: F4  # [h, tiers of every window]
    edges: npt.NDArray[np.int32]  # [tiers - 1], ascending
    weights: tuple[F4, ...]  # each [outputs, inputs]; the last has one output; ReLU stands before each
    biases: tuple[F4, ...]  # each [outputs]

    @classmethod
    def of(cls, bundle: Bundle) -> Head:
        model = bundle.model
        T = model.W1t @ model.tier_table.T
        return cls(
            T=_array(T if model.config.has("simtier") else torch.zeros_like(T)),
            edges=np.array(model.config.tier_edges, dtype=np.int32),
            weights=tuple(_array(layer.get_parameter("weight")) for layer in model.head),
            biases=tuple(_array(layer.get_parameter("bias")) for layer in model.head),
        )


class ItemFold:
    """Items -> rows. Not for use by two threads at once."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises BundleError for a model that cannot be served."""
        _check_servable(bundle.manifest.config)
        self._model, config = bundle.model, bundle.manifest.config
        self._encoder = ItemEncoder(bundle.manifest.features, config.embedding_dim, config.crosses)
        self._precision = bundle.manifest.precision

    def attributes(self, items: Sequence[Item]) -> tuple[F4, list[str | None]]:
        """f4[n, A] and `errors` as `encode` gives them for items of which nothing else has changed."""
        return self._encoder.attributes(items)

    def encode(self, items: Sequence[Item]) -> EncodedItems:
        """Rows of a batch; never raises for what an item holds: `errors[k]` says why item k has no row."""
        columns = self._encoder.columns(items)
        model = self._model
        with torch.inference_mode():
            x = model.item_vectors(columns.features)  # [n, d]
            bridge = _array(model.bridge_weights(x))
            joint = _array(torch.addmm(model.b1, x, model.W1x.T))
            vector = _array(x)
        limit = _LIMITS[self._precision]
        fits = (
            (np.abs(joint) <= limit).all(axis=1)
            & (np.abs(vector) <= limit).all(axis=1)
            & np.isfinite(bridge).all(axis=1)
        )
        errors = columns.errors
        for row in np.flatnonzero(~fits):
            errors[row] = errors[row] or f"the encoded row does not fit {self._precision}"
        return EncodedItems(
            joint=joint,
            bridge=bridge,
            signature=model.signatures(columns.embedding),
            vector=vector,
            crosses=columns.crosses,
            attributes=columns.attributes,
            errors=errors,
        )


class UserFold:
    """Profile and behaviours -> user block, by the code of encoders/user_ir.py. Threads may share it; the GIL is
    released in all that takes longer than microseconds.
    """

    def __init__(self, bundle: Bundle, generation: str | None = None) -> None:
        """`generation` is what the blocks are stamped with, by default the bundle's version. Raises BundleError for a
        model that cannot be served.
        """
        _check_servable(bundle.manifest.config)
        model, config = bundle.model, bundle.manifest.config
        self._config = config
        self._generation = generation or bundle.manifest.version
        self._encoder = ProfileEncoder(bundle.manifest.features)
        self._tower = {name: _array(value) for name, value in model.profile_tower.state_dict().items()}
        self._no_profile = _array(model.no_profile)
        self._sizes = {half: _user_sizes(model, half) for half in (False, True)}
        self._weights = _user_weights(model, self._sizes[False])
        self._kinds = model.cross_kinds.numpy()
        absent = _array(model.absent_cross())
        self._absent = absent if config.has("sim") else np.zeros_like(absent)  # [h]
        alone = torch.zeros(config.width)  # part of P where there is no history
        if config.has("lsh_din"):
            alone = alone + model.W1d @ model.no_din
        if config.has("simtier"):
            alone = alone + model.W1t @ model.no_window
        self._alone = _array(alone)
        self._rooms = threading.local()

    def block(
        self, profile: Mapping[str, Any] | None, behaviours: Behaviours, as_of: int, *, crosses: bool = True
    ) -> UserBlock:
        """The block of a user at `as_of` (ms); later behaviours do not enter, nor any before the config's `longest`. A
        profile without features is none. Raises FeatureError for a bad profile, ValueError for columns of other shapes.

        The behaviours' columns may be views with strides, and vectors fp16. Without `crosses` it is that of a user who
        never met any, for `UserBlock.with_crosses`.
        """
        config, past = self._config, behaviours.until(as_of, self._config.longest)
        folded = self._folded(past, as_of, self._profile(profile))
        P = folded.P if len(past) else folded.P + self._alone
        size = config.window if config.has("simtier") else 0
        recent = np.ascontiguousarray(folded.signatures[max(0, len(past) - size) :])
        window, weight = lsh.thinned(recent, config.short_window)
        slots, G = self._sim(folded, as_of) if crosses else (_NO_SLOTS, self._absent[None, :])
        return UserBlock(
            P=P,
            C=folded.C,
            D=folded.D,
            G=G,
            cross_slots=slots,
            window=window,
            lengths=tuple(min(size, len(window)) for size in config.windows),
            weight=weight,
            generation=self._generation,
            as_of=as_of,
        )

    def crosses(self, behaviours: Behaviours, as_of: int) -> Crosses:
        """What `block` has of these behaviours' crosses, alone. Raises ValueError for columns of other shapes."""
        past = behaviours.until(as_of, self._config.longest)
        slots, G = self._sim(self._folded(past, as_of, self._no_profile), as_of)
        return Crosses(G, slots, self._generation, as_of)

    def _folded(self, past: Behaviours, as_of: int, profile: F4) -> _Folded:
        """Runs the generated code. What it says of crosses stands in this thread's room until its next run."""
        config = self._config
        _checked(past, config)
        vectors = _by_row(past.vectors, np.float32, np.float16)
        signatures, crosses = _by_row(past.signatures, np.uint8), _by_row(past.crosses, np.uint16)
        sizes, room = self._sizes[vectors.dtype == np.float16], self._room()
        P, C, D = (
            np.empty(config.width, np.float32),
            np.empty((config.bridges, config.width), np.float32),
            np.empty((config.bits, config.width), np.float32),
        )
        columns = [part for array in (vectors, signatures, crosses) for part in (array.ctypes.data, array.strides[0])]
        actions, times = np.ascontiguousarray(past.actions, np.uint8), np.ascontiguousarray(past.times, np.int64)
        user_ir.user(sizes, RECENCY_EDGES)(
            self._weights.ctypes.data,
            room.scratch.ctypes.data,
            len(past),
            *columns,
            actions.ctypes.data,
            times.ctypes.data,
            as_of,
            profile.ctypes.data,
            *(array.ctypes.data for array in (room.places, P, C, D)),
            *(array.ctypes.data for array in (room.slots, room.counts, room.newest, room.sums, room.found)),
        )
        return _Folded(P, C, D, signatures, times, room, sizes)

    def _room(self) -> _Room:
        """This thread's."""
        if not hasattr(self._rooms, "room"):
            self._rooms.room = _Room(self._sizes[False])
        room: _Room = self._rooms.room
        return room

    def _profile(self, profile: Mapping[str, Any] | None) -> F4:
        """Profile vector [d]: the tower, or the learned default."""
        features = self._encoder.features([profile])  # checks it
        if not profile:
            return self._no_profile
        tower, ids, starts = self._tower, features.ids.numpy(), features.offsets.numpy()
        numerics = features.numerics.numpy()[0]
        sizes = np.diff(starts, append=len(ids))[:, None]
        bags = np.add.reduceat(tower["table"][ids], starts) / sizes if len(starts) else np.empty(0, np.float32)
        known = np.where(np.isnan(numerics), tower["missing"], numerics)
        joined = np.concatenate([bags.ravel(), known, features.dense.numpy()[0]]).astype(np.float32)
        hidden = np.maximum(tower["inner.weight"] @ joined + tower["inner.bias"], 0)
        out: F4 = tower["outer.weight"] @ hidden + tower["outer.bias"]
        return out

    def _sim(self, folded: _Folded, as_of: int) -> tuple[U2, F4]:
        """Slots of the user's crosses that are kept [c] and G [c + 1, h]: W1s SIM(u, c) of each, the default first."""
        if not self._config.has("sim"):
            return _NO_SLOTS, self._absent[None, :]
        room, sizes = folded.room, folded.sizes
        found = int(room.found[0])
        slots, counts, newest = room.slots[:found], room.counts[:found], room.newest[:found]
        kept = _kept(slots, counts, newest, self._config)
        slots, counts, newest = slots[kept], counts[kept], newest[kept]
        kinds = self._kinds[np.where(slots < len(self._kinds), slots, 0)]
        order = np.argsort((kinds << 16) | slots)
        ends = np.cumsum(np.bincount(kinds, minlength=sizes.kinds))
        days = (as_of - folded.times[newest]).astype(np.float32) / np.float32(DAY)
        numbers = np.zeros((found, 2), np.float32)
        shares = np.zeros(found, np.float32)
        numbers[kept, 0], numbers[kept, 1], shares[kept] = (
            np.log1p(counts, dtype=np.float32),
            1 / (1 + days),
            1 / counts,
        )
        places = np.arange(found)[kept][order]
        G = np.empty((len(order) + 1, sizes.width), np.float32)
        G[0] = self._absent
        arrays = (numbers, room.sums, shares, places, ends, G[1:])
        user_ir.crosses(sizes)(
            self._weights.ctypes.data, room.scratch.ctypes.data, *(array.ctypes.data for array in arrays)
        )
        return slots[order], G


class _Room:
    """A thread's own memory for the intermediates of one user."""

    def __init__(self, sizes: user_ir.Sizes) -> None:
        most = min(1 << 16, max(1, sizes.longest * sizes.crosses))  # different crosses
        self.scratch = user_ir.scratch(sizes).memory()
        self.places = np.zeros(1 << 16, np.uint16)  # zero between users
        self.slots = np.empty(most, np.uint16)
        self.counts, self.newest = np.empty(most, np.int32), np.empty(most, np.int32)
        self.sums = np.empty((most, sizes.dim), np.float32)
        self.found = np.zeros(1, np.int64)


class _Folded(NamedTuple):
    """What the generated code has made of a user, and of which columns."""

    P: F4
    C: F4
    D: F4
    signatures: U1
    times: I8
    room: _Room
    sizes: user_ir.Sizes


def _checked(past: Behaviours, config: ModelConfig) -> None:
    """The generated code reads memory by these sizes. Raises ValueError."""
    L = len(past)
    wanted = {
        "vectors": (L, config.dim),
        "signatures": (L, config.bits // 8),
        "crosses": (L, config.crosses),
        "actions": (L,),
        "times": (L,),
    }
    for name, shape in wanted.items():
        if getattr(past, name).shape != shape:
            raise ValueError(f"the behaviours' {name} are {getattr(past, name).shape}, not {shape}")


def _by_row(array: npt.NDArray[Any], *kinds: type[np.generic]) -> npt.NDArray[Any]:
    """The array as the generated code reads it: of one of these kinds, else the first; any distance between rows, none
    within a row."""
    usable = array.dtype in kinds and array.strides[1] == array.itemsize and array.strides[0] > 0
    return array if usable else np.ascontiguousarray(array, array.dtype if array.dtype in kinds else kinds[0])


def _kept(slots: U2, counts: npt.NDArray[np.int32], newest: npt.NDArray[np.int32], config: ModelConfig) -> Any:
    """Which of a user's crosses its table keeps: `kept_crosses`, of one user."""
    if config.cross_table not in ("frequent", "recent") or len(slots) <= config.cross_rows:
        return slice(None)
    first, second = (counts, newest) if config.cross_table == "frequent" else (newest, counts)
    worth = first.astype(np.uint64) << np.uint64(40) | second.astype(np.uint64) << np.uint64(16)
    worth |= np.uint64(0xFFFF) - slots.astype(np.uint64)
    return np.argpartition(worth, len(worth) - config.cross_rows)[len(worth) - config.cross_rows :]


def _user_sizes(model: AIF, half: bool) -> user_ir.Sizes:
    config = model.config
    return user_ir.Sizes(
        width=config.width,
        dim=config.dim,
        bridges=config.bridges,
        bits=config.bits,
        crosses=config.crosses,
        recent=config.recent,
        longest=config.longest,
        heads=config.heads,
        hidden=config.hidden,
        dots=config.dots,
        bridge_dots=config.bridge_dots,
        actions=len(model.action_table),
        recencies=len(model.recency_table),
        kinds=len(model.W1s),
        attends=config.has("self_attention"),
        half=half,
    )


def _user_weights(model: AIF, sizes: user_ir.Sizes) -> F4:
    """The model's weights as `user_ir.weights` places them; zero for what is switched off."""
    config, tower = model.config, model.user_tower
    root = config.dim**-0.5
    parts = {
        "tokens": model.token_table(),
        "null": tower.null,
        "query.w": tower.query.weight.T * root,
        "query.b": tower.query.bias * root,
        "out.w": tower.out.weight.T,
        "out.b": tower.out.bias,
        "bridges": model.bridges.T * (config.bridge_temperature * root),
        "user": model.W1u.T,
        "sim": model.W1s.transpose(1, 2),
    }
    if not config.has("profile_attention"):
        parts["out.w"] = torch.cat([parts["out.w"][: 2 * config.dim], torch.zeros(config.dim, config.dim)])
    if config.has("bea"):
        parts["bea"] = model.W1b.T
    if config.has("lsh_din"):
        parts["din"] = model.W1d.T * (config.din_scale / (2 * config.bits))
        parts["din.mean"] = model.W1d.T * (config.din_scale * (0.5 - config.din_shift))
    for name in ("dots", "bridge_dots"):
        if (dots := getattr(model, name)) is not None:
            parts[f"{name}.query.w"] = dots.query.weight.T * dots.scale
            parts[f"{name}.query.b"] = dots.query.bias * dots.scale
            parts[f"{name}.w"] = dots.W1.T
    if sizes.attends:
        for name, layer in (
            ("qkv", tower.qkv),
            ("mix", tower.mix),
            ("ffn_in", tower.ffn_in),
            ("ffn_out", tower.ffn_out),
        ):
            parts[f"{name}.w"], parts[f"{name}.b"] = layer.weight.T, layer.bias
        for name, norm in (("norm1", tower.norm1), ("norm2", tower.norm2)):
            parts[f"{name}.w"], parts[f"{name}.b"] = norm.weight, norm.bias
    plan = user_ir.weights(sizes)
    out = plan.memory()
    for name, part in parts.items():
        flat = _array(part).ravel()
        out[plan.places[name] : plan.places[name] + len(flat)] = flat
    return out


def cross_bytes(config: ModelConfig, met: int) -> int:
    """Bytes of G and `cross_slots` in the block of a user who met `met` different crosses, at most.

    Only the exact table grows with `met` without end. Where crosses are pooled ("hashed"), those that meet in one row
    take less. A count sketch would have all its rows for every user.
    """
    row = 4 * config.width
    if config.cross_table == "sketch":
        return (1 + config.cross_rows) * row
    rows = met if config.cross_table == "exact" else min(met, config.cross_rows)
    return (1 + rows) * row + 2 * rows


def join_scores(block: UserBlock, head: Head, rows: EncodedItems) -> F4:
    """Scores [n] of rows for a user: the join and the head in NumPy."""
    table = np.zeros(1 << 16, dtype=np.int64)  # slot -> row of G
    table[block.cross_slots] = np.arange(1, len(block.cross_slots) + 1)
    used = (rows.crosses != NO_CROSS)[:, :, None]  # [n, C, 1]
    cross = (block.G[table[rows.crosses]] * used).sum(axis=1) / np.maximum(used.sum(axis=1), 1)
    cross = np.where(used.any(axis=1), cross, block.G[0])
    counts = np.concatenate(block.histograms(rows.signature, head.edges), axis=1)  # [n, tiers of every window]
    z = (
        rows.joint
        + block.P
        + rows.bridge @ block.C
        + lsh.signs(rows.signature) @ block.D
        + np.log1p(counts.astype(np.float32)) @ head.T.T
        + cross
    )
    for weight, bias in zip(head.weights, head.biases, strict=True):
        z = np.maximum(z, 0) @ weight.T + bias
    out: F4 = z[:, 0].astype(np.float32)
    return out


def reference_scores(
    bundle: Bundle,
    profile: Mapping[str, Any] | None,
    behaviours: Behaviours,
    items: Sequence[Item],
    as_of: int,
) -> F4:
    """Logits [n] of the training form on the same inputs: the oracle of every parity test.

    Raises FeatureError, naming the item's place, where an item cannot be encoded.
    """
    spec, config = bundle.manifest.features, bundle.manifest.config
    columns = ItemEncoder(spec, config.embedding_dim, config.crosses).columns(items)
    for place, error in enumerate(columns.errors):
        if error is not None:
            raise FeatureError(f"item {place}: {error}")
    packed = bundle.model.signatures(columns.embedding)
    users = _one_user(bundle, profile, behaviours.until(as_of, config.longest), as_of)
    scores = []
    with torch.inference_mode():
        for at in range(0, len(items), _REFERENCE_CHUNK):
            chunk = slice(at, at + _REFERENCE_CHUNK)
            candidates = Candidates(
                features=ItemEncoder(spec, config.embedding_dim, config.crosses).columns(items[chunk]).features,
                signatures=torch.from_numpy(lsh.signs(packed[chunk])),
                crosses=torch.from_numpy(columns.crosses[chunk].astype(np.int64)),
                index=torch.arange(len(packed[chunk]))[None, :],
            )
            scores.append(_array(bundle.model(users, candidates)[0]))
    return np.concatenate(scores) if scores else np.empty(0, dtype=np.float32)


def _check_servable(config: ModelConfig) -> None:
    if config.unservable:
        raise BundleError(config.unservable)


def _one_user(bundle: Bundle, profile: Mapping[str, Any] | None, past: Behaviours, as_of: int) -> Users:
    known = len(bundle.model.action_table)
    actions = np.where(past.actions < known, past.actions, 0).astype(np.int64)
    features: Features = ProfileEncoder(bundle.manifest.features).features([profile])
    return Users(
        profile=features,
        known=torch.tensor([bool(profile)]),
        vectors=torch.tensor(past.vectors, dtype=torch.float32)[None],
        signatures=torch.from_numpy(lsh.signs(past.signatures))[None],
        crosses=torch.from_numpy(past.crosses.astype(np.int64))[None],
        actions=torch.from_numpy(actions)[None],
        ages=torch.from_numpy(as_of - past.times)[None],
        valid=torch.ones(1, len(past), dtype=torch.bool),
    )


def _array(tensor: torch.Tensor) -> F4:
    """A contiguous float32 array of the tensor's values."""
    out: F4 = np.ascontiguousarray(tensor.detach().numpy(), dtype=np.float32)
    return out
