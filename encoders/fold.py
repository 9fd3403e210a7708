"""The exact fold: item rows on the nearline side, user blocks on the request's side, the head; and the oracle of both.

`ItemFold` runs in encode workers, `UserFold` in the API's user inference; RTP joins their arrays:

    z = joint_i + P + C w_i + D s_i + T log1p(hist_ui) + mean_c G[c]          s_i in {-1,+1}^b      score = MLP(relu(z))

Guarantee: that score equals `reference_scores`, the training form's forward pass on the same inputs, within 1e-5 (fp32
arrays). `join_scores` is the join in plain NumPy, the oracle of faster ones. What the config switches off is zero in
these arrays, and dot products of users and items are part of C and D. Arrays are float32 unless their line says
otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from encoders import lsh
from encoders.bundle import Bundle, BundleError
from encoders.features import FeatureError, Item, ItemEncoder, ProfileEncoder
from encoders.model import (
    NO_CROSS,
    RECENCY_EDGES,
    Candidates,
    Features,
    ModelConfig,
    Users,
    kept_crosses,
    sim_counts,
)

F4 = npt.NDArray[np.float32]
U1 = npt.NDArray[np.uint8]
U2 = npt.NDArray[np.uint16]
I8 = npt.NDArray[np.int64]

_LIMITS = {"fp16": float(np.finfo(np.float16).max), "fp32": float(np.finfo(np.float32).max)}
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
    """A user's behaviours whose items have a row, oldest first; the first three columns are those of the rows."""

    vectors: F4  # [L, d]
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
class UserBlock:
    """The folded user side of the first layer, valid for one generation and one point in time."""

    P: F4  # [h]
    C: F4  # [h, bridges]
    D: F4  # [h, b]
    G: F4  # [c + 1, h]; row 0 = a cross that the user never met, and an item without crosses
    cross_slots: U2  # [c], ascending; slot k belongs to row k + 1 of G
    window: U1  # [Lw, b / 8], signatures of SimTier's window, the newest last
    lengths: tuple[int, ...]  # how many of its newest each histogram counts: Lw, and those of the short window
    generation: str
    as_of: int

    @property
    def windows(self) -> list[U1]:
        """What each histogram counts, the newest last."""
        return [self.window[len(self.window) - length :] for length in self.lengths]


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
    """Profile and behaviours -> user block. May be shared by threads; heavy steps release the GIL."""

    def __init__(self, bundle: Bundle, generation: str | None = None) -> None:
        """`generation` is what the blocks are stamped with, by default the bundle's version. Raises BundleError for a
        model that cannot be served.
        """
        _check_servable(bundle.manifest.config)
        model = bundle.model
        self._model, self._config = model, bundle.manifest.config
        self._profiles = ProfileEncoder(bundle.manifest.features)
        self._generation = generation or bundle.manifest.version
        self._token_table = _array(model.token_table())
        self._recency_edges = np.array(RECENCY_EDGES, dtype=np.int64)
        absent = model.absent_cross()
        self._absent = absent if model.config.has("sim") else torch.zeros_like(absent)  # [h]

    def block(self, profile: Mapping[str, Any] | None, behaviours: Behaviours, as_of: int) -> UserBlock:
        """The block of a user at `as_of` (ms); later behaviours do not enter, nor any before the config's `longest`. A
        profile without features is none. Raises FeatureError for a bad profile.
        """
        past = behaviours.until(as_of, self._config.longest)
        model = self._model
        with torch.inference_mode():
            tokens = self._tokens(past, as_of)  # [L, d]
            p, recent, user = self._user_side(profile, tokens)
            C = self._bridges(p, recent, user)
            D, constant = self._din(tokens, past.signatures, user)
            P = model.W1u @ user + constant
            if model.config.has("simtier") and not len(past):
                P = P + model.W1t @ model.no_window
            slots, G = self._sim(tokens, past, as_of)
        config = self._config
        size = config.window if config.has("simtier") else 0
        window = np.ascontiguousarray(past.signatures[max(0, len(past) - size) :])
        return UserBlock(
            P=_array(P),
            C=_array(C),
            D=_array(D),
            G=_array(G),
            cross_slots=slots,
            window=window,
            lengths=tuple(min(size, len(window)) for size in config.windows),
            generation=self._generation,
            as_of=as_of,
        )

    def _tokens(self, past: Behaviours, as_of: int) -> torch.Tensor:
        recency = np.searchsorted(self._recency_edges, as_of - past.times, side="right")
        known = np.where(past.actions < len(self._model.action_table), past.actions, 0).astype(np.int64)
        tokens = self._token_table[known * len(self._model.recency_table) + recency]
        tokens += past.vectors
        return torch.from_numpy(tokens)

    def _user_side(
        self, profile: Mapping[str, Any] | None, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Profile vector [1, d], recent tokens [1, R, d] and user vector [d]."""
        model = self._model
        features = self._profiles.features([profile])
        p = model.profiles(features, torch.tensor([bool(profile)]))
        recent = tokens[None, max(0, len(tokens) - self._config.recent) :]
        return p, recent, model.user_tower(p, recent, _all(recent))[0]

    def _bridges(self, p: torch.Tensor, recent: torch.Tensor, user: torch.Tensor) -> torch.Tensor:
        """C [h, bridges]: BEA's part and that of the dot products with the bridge weights."""
        model, config = self._model, self._config
        C = torch.zeros(config.width, config.bridges)
        if config.has("bea"):
            C = model.W1b @ model.bridge_values(p, recent, _all(recent))[0].T
        return C + model.bridge_dots.fold(user) if model.bridge_dots else C

    def _din(self, tokens: torch.Tensor, signatures: U1, user: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """D [h, b] with the dot products' part, and DIN's constant part [h].

        sim = scale * ((b + s_i . s_j) / 2b - shift) parts into the two.
        """
        config, model, L = self._config, self._model, len(tokens)
        D, constant = torch.zeros(config.width, config.bits), torch.zeros(config.width)
        if config.has("lsh_din"):
            if L:
                crossed = tokens.T @ torch.from_numpy(lsh.signs(signatures))  # [d, b]
                D = model.W1d @ crossed * (config.din_scale / (2 * config.bits * L))
                constant = model.W1d @ tokens.mean(dim=0) * (config.din_scale * (0.5 - config.din_shift))
            else:
                constant = model.W1d @ model.no_din
        return (D + model.dots.fold(user) if model.dots else D), constant

    def _sim(self, tokens: torch.Tensor, past: Behaviours, as_of: int) -> tuple[U2, torch.Tensor]:
        """Slots of the user's crosses that are kept [c] and G [c + 1, h]: W1s SIM(u, c) of each, the default first."""
        flat = past.crosses.ravel()
        used = np.flatnonzero(flat != NO_CROSS)
        if not (len(used) and self._config.has("sim")):
            return np.empty(0, dtype=np.uint16), self._absent[None, :]
        used = used[np.argsort(flat[used], kind="stable")]  # by slot, and oldest first within it
        start = np.flatnonzero(np.diff(flat[used], prepend=np.uint16(NO_CROSS)))
        count = np.diff(start, append=len(used))
        member = used // past.crosses.shape[1]  # behaviour of each
        newest = member[start + count - 1]
        age = as_of - past.times[newest]
        mean = functional.embedding_bag(
            torch.from_numpy(member), tokens, torch.from_numpy(start), mode="mean"
        )  # [c, d]
        counts = sim_counts(torch.from_numpy(count.astype(np.float32)), torch.from_numpy(age))
        kept = kept_crosses(
            torch.zeros(len(count), dtype=torch.int64), torch.from_numpy(count), torch.from_numpy(newest), self._config
        )
        slots = flat[used[start]][kept.numpy()]
        G = self._model.fold_crosses(torch.from_numpy(slots.astype(np.int64)), torch.cat([counts, mean], dim=1)[kept])
        return slots, torch.cat([self._absent[None, :], G])


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
    histograms = [lsh.tier_counts(lsh.matches(rows.signature, window), head.edges) for window in block.windows]
    counts = np.concatenate(histograms, axis=1)  # [n, tiers of every window]
    z = (
        rows.joint
        + block.P
        + rows.bridge @ block.C.T
        + lsh.signs(rows.signature) @ block.D.T
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
        vectors=torch.tensor(past.vectors)[None],
        signatures=torch.from_numpy(lsh.signs(past.signatures))[None],
        crosses=torch.from_numpy(past.crosses.astype(np.int64))[None],
        actions=torch.from_numpy(actions)[None],
        ages=torch.from_numpy(as_of - past.times)[None],
        valid=torch.ones(1, len(past), dtype=torch.bool),
    )


def _all(tokens: torch.Tensor) -> torch.Tensor:
    """The mask of tokens [1, R, d] none of which is padding."""
    return torch.ones(tokens.shape[:2], dtype=torch.bool)


def _array(tensor: torch.Tensor) -> F4:
    """A contiguous float32 array of the tensor's values."""
    out: F4 = np.ascontiguousarray(tensor.detach().numpy(), dtype=np.float32)
    return out
