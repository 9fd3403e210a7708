"""The AIF network: user tower, BEA, LSH-DIN, SimTier, SIM cross features and the head, in training form. The towers of
items and profiles, which its rivals have too, stand in encoders/ranker.py.

Training runs `AIF.forward` on users with candidates; serving runs `encoders.fold`, which computes the same score from
pieces folded on either side (DESIGN.md section 3). Guarantees: every block that can be empty (no profile, no history,
no SimTier window, a cross the user never met, an item without cross, a missing feature) has a learned default, and no
input gives NaN. A component named in `ModelConfig.without` adds nothing to the score, in training and in serving, and
its weights do not learn.

Three classes, so that rivals (encoders/baselines.py) share what is not in dispute: `ranker.Ranker` has what every model
has (towers, tokens, LSH), `Frame` the first layer around a user's interest in an item, `AIF` the interest by BEA and
LSH-DIN. Which crosses a user's table keeps stands in encoders/crosses.py.

Letters in the shape comments: B users, K candidates per user, M distinct items, L behaviours (padded on the left,
oldest first), R newest `recent` of them, d dim, h width, n bridges, b bits, t tiers, C crosses per item.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from encoders import lsh
from encoders.config import ModelConfig, Sizes
from encoders.crosses import SIM_COUNTS, kept_crosses, looked_up, sim_counts, sketched
from encoders.inputs import NO_CROSS, Candidates, Users
from encoders.ranker import Ranker, noise

_KMEANS_ROUNDS = 25


class UserTower(nn.Module):
    """Profile and recent tokens -> user vector. A learned null token stands first, so attention always has a key.

    Without self-attention, the tokens stay as they are; without profile attention, its part of the vector is zero.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.dim
        self.heads = config.heads
        self.self_attention, self.profile_attention = config.has("self_attention"), config.has("profile_attention")
        self.null = nn.Parameter(noise(d))
        self.qkv = nn.Linear(d, 3 * d)
        self.mix = nn.Linear(d, d)
        self.norm1 = nn.LayerNorm(d)
        self.ffn_in = nn.Linear(d, config.hidden)
        self.ffn_out = nn.Linear(config.hidden, d)
        self.norm2 = nn.LayerNorm(d)
        self.query = nn.Linear(d, d)
        self.out = nn.Linear(3 * d, d)
        for layer in (self.qkv, self.mix, self.norm1, self.ffn_in, self.ffn_out, self.norm2):
            layer.requires_grad_(self.self_attention)
        self.query.requires_grad_(self.profile_attention)

    def forward(self, profile: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """profile [B, d], tokens [B, R, d], valid bool [B, R] -> [B, d]."""
        B, _, d = tokens.shape
        x = torch.cat([self.null.expand(B, 1, d), tokens], dim=1)  # [B, R + 1, d]
        keep = functional.pad(valid, (1, 0), value=True)  # [B, R + 1]
        if self.self_attention:
            x = self._attend(x, keep)
        weight = keep[:, :, None].to(x.dtype)
        pooled = (x * weight).sum(dim=1) / weight.sum(dim=1)  # [B, d]
        focused = self._focus(profile, x, keep) if self.profile_attention else torch.zeros_like(profile)
        out: Tensor = self.out(torch.cat([profile, pooled, focused], dim=1))
        return out

    def _attend(self, x: Tensor, keep: Tensor) -> Tensor:
        """One transformer layer over the tokens [B, R + 1, d]."""
        B, _, d = x.shape
        q, k, v = (
            self.qkv(x).view(B, -1, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        )  # [B, heads, R + 1, d / heads]
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
        x = self.norm1(x + self.mix(attended.transpose(1, 2).reshape(B, -1, d)))
        out: Tensor = self.norm2(x + self.ffn_out(functional.relu(self.ffn_in(x))))
        return out

    def _focus(self, profile: Tensor, x: Tensor, keep: Tensor) -> Tensor:
        """The tokens as the profile attends to them [B, d]."""
        affinity = (x @ self.query(profile)[:, :, None]).squeeze(2) / math.sqrt(x.shape[2])  # [B, R + 1]
        focus = torch.softmax(affinity.masked_fill(~keep, -math.inf), dim=1)
        return (focus[:, None, :] @ x).squeeze(1)


@dataclasses.dataclass(frozen=True)
class Meeting:
    """What either side has computed when users and candidates meet."""

    users: Users
    candidates: Candidates
    x: Tensor  # [M, d], item vectors
    profile: Tensor  # [B, d]
    user: Tensor  # [B, d], user vectors
    tokens: Tensor  # [B, L, d], zero where padded
    index: Tensor  # i8 [B, K], the candidates' places in x
    bits: int  # b

    @functools.cached_property
    def matches(self) -> Tensor:
        """Equal bits of every candidate's signature with every behaviour's [B, K, L]; exact, also under autocast.

        With directions for signatures, b (1 + cosine) / 2.
        """
        theirs, ours = self.candidates.signatures, self.users.signatures
        with torch.autocast(ours.device.type, enabled=False):
            return (self.bits + theirs[self.index] @ ours.transpose(1, 2)) / 2


class Frame(Ranker):
    """The user tower, SimTier, SIM, dot products, the first layer and the head, around a model's `interest`."""

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        h, d, t = config.width, config.dim, config.tiers * len(config.windows)
        simtier, sim = config.has("simtier"), config.has("sim")
        self.user_tower = UserTower(config)
        self.tier_table = nn.Parameter(noise(t, d, scale=0.05), requires_grad=simtier)
        self.no_window = nn.Parameter(torch.zeros(d), requires_grad=simtier)
        self.no_cross = nn.Parameter(torch.zeros(d + SIM_COUNTS), requires_grad=sim)
        # W1, the first layer, as blocks of columns.
        self.W1u = first_layer_block(h, d)
        self.W1x = first_layer_block(h, d)
        self.W1t = first_layer_block(h, d, learns=simtier)
        kinds = max(sizes.cross_kinds, default=0) + 1
        self.W1s = first_layer_block(kinds, h, d + SIM_COUNTS, learns=sim)
        self.cross_kinds = torch.tensor([0, *sizes.cross_kinds], device="cpu")  # by slot
        self.b1 = nn.Parameter(torch.zeros(h))
        signature = config.embedding_dim if config.lsh == "cosine" else config.bits
        self.dots = Dots(config.dots, signature, config, config.bits**-0.5) if config.dots else None
        self.head = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise([h, *config.head, 1]))

    def interest(self, meeting: Meeting) -> Tensor:
        """The first layer's part from the user's history and the item [B, K, h]."""
        raise NotImplementedError

    def forward(self, users: Users, candidates: Candidates) -> Tensor:
        """Logits [B, K]."""
        meeting, config = self._meet(users, candidates), self.config
        z = (
            (meeting.user @ self.W1u.T)[:, None, :]
            + (meeting.x @ self.W1x.T)[meeting.index]
            + self.interest(meeting)
            + self.b1
        )  # [B, K, h]
        if config.has("simtier"):
            z = z + self._simtier(meeting.matches, users.valid) @ self.W1t.T
        if config.has("sim"):
            z = z + self._sim(users, meeting.tokens, candidates.crosses[meeting.index])
        if self.dots:
            z = z + self.dots(meeting.user, candidates.signatures[meeting.index])
        for layer in self.head:
            z = layer(functional.relu(z))
        out: Tensor = z.squeeze(2)
        return out

    def serving_flops(self, length: int, window: int) -> float:
        """Of the folded frame: the first layer's sums, SimTier's popcounts and table, the crosses' rows, the dot
        products, the head.
        """
        config, h = self.config, self.config.width
        total = 2.0 * h  # joint_i + P_u, and the first ReLU
        if config.has("simtier"):
            words = config.bits / 64
            pair = 3 * words + 2 * (config.tiers - 1)  # XOR, popcount, add; compare with each edge and count
            short = sum(config.windows[1:])
            counted = min(length, window, lsh.COUNTED + short) + min(length, short)
            total += counted * pair + 2 * h * config.tiers * len(config.windows)
        if config.has("sim"):
            total += h * (config.crosses + 1)  # a row of G per cross, and the mean
        if self.dots:
            total += 2.0 * h * config.bits
        return total + sum(2.0 * a * b for a, b in itertools.pairwise([h, *config.head, 1]))

    def _meet(self, users: Users, candidates: Candidates) -> Meeting:
        R = self.config.recent
        tokens = self.history(users)
        profile = self.profiles(users.profile, users.known)
        return Meeting(
            users=users,
            candidates=candidates,
            x=self.item_vectors(candidates.features),
            profile=profile,
            user=self.user_tower(profile, tokens[:, -R:], users.valid[:, -R:]),
            tokens=tokens,
            index=candidates.index,
            bits=self.config.bits,
        )

    def _simtier(self, matches: Tensor, valid: Tensor) -> Tensor:
        """SimTier(u,i): log1p of the windows' histograms over tiers, times the tiers' embeddings [B, K, d]."""
        counts = torch.cat([self._tier_counts(matches[:, :, -w:], valid[:, -w:]) for w in self.config.windows], dim=2)
        known = valid.any(dim=1)[:, None, None]
        return torch.where(known, torch.log1p(counts) @ self.tier_table, self.no_window)

    def _tier_counts(self, matches: Tensor, valid: Tensor) -> Tensor:
        """Behaviours in each tier [B, K, t]."""
        inside = valid[:, None, :]
        at_least = [inside.sum(dim=2).expand(matches.shape[:2])]  # behaviours in tier >= 0, 1, ...; each [B, K]
        at_least += [((matches >= edge) & inside).sum(dim=2) for edge in self.config.tier_edges]
        reached = torch.stack([*at_least, torch.zeros_like(at_least[0])], dim=2)  # [B, K, t + 1]
        return (reached[:, :, :-1] - reached[:, :, 1:]).to(torch.float32)

    def _sim(self, users: Users, tokens: Tensor, wanted: Tensor) -> Tensor:
        """W1s SIM(u, c_i): mean over the item's crosses of the user's row of each [B, K, h].

        `wanted` [B, K, C]: slots of the items' crosses.
        """
        row = torch.arange(len(wanted), device=wanted.device)[:, None, None] << 16  # a key is (user, slot)
        used = (users.crosses != NO_CROSS) & users.valid[:, :, None]  # [B, L, C]
        absent = self.absent_cross()
        if not used.any():
            return absent.expand(*wanted.shape[:2], -1)
        found, order = torch.sort((row | users.crosses)[used], stable=True)
        keys, count = torch.unique_consecutive(found, return_counts=True)
        member = (torch.nonzero(used.flatten()).squeeze(1) // users.crosses.shape[2])[order]  # places in [B * L]
        newest = member[count.cumsum(0) - 1]  # behaviours stand oldest first
        mean = functional.embedding_bag(member, tokens.flatten(0, 1), count.cumsum(0) - count, mode="mean")
        counts = sim_counts(count.to(torch.float32), users.ages.flatten()[newest])
        rows = self.fold_crosses(keys & 0xFFFF, torch.cat([counts, mean], dim=1))  # [keys, h]
        if self.config.cross_table == "sketch":
            found_rows = sketched(keys, rows - absent, row, wanted, self.config.cross_rows) + absent
        else:
            kept = kept_crosses(keys >> 16, count, newest, self.config)
            found_rows = looked_up(keys[kept], torch.cat([rows[kept], absent[None, :]]), row | wanted)
        counted = (wanted != NO_CROSS).to(torch.float32)  # [B, K, C]
        mean = (counted[:, :, None, :] @ found_rows).squeeze(2) / counted.sum(dim=2, keepdim=True).clamp(min=1)
        return torch.where(counted.sum(dim=2, keepdim=True) > 0, mean, absent)

    def fold_crosses(self, slots: Tensor, summaries: Tensor) -> Tensor:
        """G_u [m, h]: W1s SIM(u, c) of summaries [m, d + 2] in the crosses `slots` i8 [m], by their kind's weights."""
        kinds = self.cross_kinds[torch.where(slots < len(self.cross_kinds), slots, 0)]
        order = torch.argsort(kinds, stable=True)
        parts = torch.split(summaries[order], torch.bincount(kinds, minlength=len(self.W1s)).tolist())
        rows = torch.cat([part @ W.T for part, W in zip(parts, self.W1s, strict=True)])
        return rows[torch.argsort(order)]

    def absent_cross(self) -> Tensor:
        """The row of a cross that the user never met, and of an item without crosses [h]."""
        return self.W1s[0] @ self.no_cross


class Dots(nn.Module):
    """Dot products of a user with an item's fixed representation r_i, as a block of the first layer: W1 Q_u r_i.

    Q_u [k, m] is linear in the user vector. The block is linear in r_i, so it folds into one matrix per user [h, m]
    that meets r_i anyway (D_u for signatures, C_u for bridge weights): no byte per item and no work per candidate more.
    """

    def __init__(self, count: int, size: int, config: ModelConfig, scale: float) -> None:
        """`count` dot products with representations of `size` numbers; `scale` brings them to a variance near 1."""
        super().__init__()
        self.count, self.scale = count, scale
        self.query = nn.Linear(config.dim, count * size)
        self.W1 = first_layer_block(config.width, count)

    def queries(self, user: Tensor) -> Tensor:
        """Q_u, scaled [B, k, m]."""
        out: Tensor = self.scale * self.query(user).unflatten(1, (self.count, -1))
        return out

    def forward(self, user: Tensor, items: Tensor) -> Tensor:
        """user [B, d], items [B, K, m] -> the first layer's part [B, K, h]."""
        return items @ self.queries(user).transpose(1, 2) @ self.W1.T

    def fold(self, user: Tensor) -> Tensor:
        """user [d] -> the matrix that r_i is multiplied with [h, m]."""
        return self.W1 @ self.queries(user[None])[0]


class AIF(Frame):
    """The network that is served: the user's interest in an item by BEA and LSH-DIN."""

    def __init__(self, config: ModelConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        h, d = config.width, config.dim
        bea, din = config.has("bea"), config.has("lsh_din")
        self.bridges = nn.Parameter(noise(config.bridges, d, scale=1.0), requires_grad=bea or config.bridge_dots > 0)
        self.no_din = nn.Parameter(torch.zeros(d), requires_grad=din)
        self.W1b = first_layer_block(h, d, learns=bea)
        self.W1d = first_layer_block(h, d, learns=din)
        self.bridge_dots = Dots(config.bridge_dots, config.bridges, config, 1.0) if config.bridge_dots else None

    # Item side ------------------------------------------------------------------------------------------------------

    def bridge_weights(self, x: Tensor) -> Tensor:
        """w_i = softmax(temperature B x_i / sqrt d) [M, n], over the `bridge_top` best where that is set."""
        config = self.config
        affinity = self._affinity(x)
        if self.training and config.bridge_dropout:
            affinity = affinity.masked_fill(self._dropped(), -math.inf)
        if config.bridge_top:
            worst = affinity.topk(config.bridge_top, dim=1).values[:, -1:]
            affinity = affinity.masked_fill(affinity < worst, -math.inf)
        return torch.softmax(affinity, dim=1)

    # User side ------------------------------------------------------------------------------------------------------

    def bridge_values(self, profile: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """V_u = softmax(temperature B U^T / sqrt d) U [B, n, d], U = recent tokens and the profile."""
        U = torch.cat([profile[:, None, :], tokens], dim=1)  # [B, 1 + R, d]
        keep = functional.pad(valid, (1, 0), value=True)
        affinity = self._affinity(U).transpose(1, 2)  # [B, n, 1 + R]
        return torch.softmax(affinity.masked_fill(~keep[:, None, :], -math.inf), dim=2) @ U

    def _affinity(self, x: Tensor) -> Tensor:
        """x [..., d] with every bridge [..., n]."""
        return x @ self.bridges.T * (self.config.bridge_temperature / math.sqrt(self.config.dim))

    # Where both meet ------------------------------------------------------------------------------------------------

    def interest(self, meeting: Meeting) -> Tensor:
        """BEA and LSH-DIN, through their blocks of the first layer [B, K, h]."""
        config, R, index = self.config, self.config.recent, meeting.index
        tokens, valid = meeting.tokens, meeting.users.valid
        z = self.b1.new_zeros(*index.shape, config.width)
        if config.has("bea") or self.bridge_dots:
            w = self.bridge_weights(meeting.x)[index]  # [B, K, n]
            if config.has("bea"):
                V = self.bridge_values(meeting.profile, tokens[:, -R:], valid[:, -R:])  # [B, n, d]
                z = z + (w @ V) @ self.W1b.T
            if self.bridge_dots:
                z = z + self.bridge_dots(meeting.user, w)
        if config.has("lsh_din"):
            z = z + self.long_interest(meeting) @ self.W1d.T
        return z

    def long_interest(self, meeting: Meeting) -> Tensor:
        """DIN(u,i): mean over the history of similarity times token [B, K, d]."""
        config, valid = self.config, meeting.users.valid
        similarity = config.din_scale * (meeting.matches / config.bits - config.din_shift)  # [B, K, L]
        count = valid.sum(dim=1)[:, None, None]  # [B, 1, 1]
        mean = similarity @ meeting.tokens / count.clamp(min=1)  # padded tokens are zero
        return torch.where(count > 0, mean, self.no_din)

    def training_forward(
        self, users: Users, candidates: Candidates, clicked: Tensor, counted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Ranker`; the penalty is that of bridges which point the same way."""
        logits, penalty = super().training_forward(users, candidates, clicked, counted)
        if self.config.bridge_diversity and self.config.bridges > 1:
            unit = functional.normalize(self.bridges, dim=1)
            cosine = (unit @ unit.T).fill_diagonal_(0.0)
            pairs = len(unit) * (len(unit) - 1)
            penalty = penalty + self.config.bridge_diversity * cosine.square().sum() / pairs
        return logits, penalty

    def serving_flops(self, length: int, window: int) -> float:
        """Of the folded form: the frame, C_u w_i and D_u s_i; that is `fold.join_scores` with the head."""
        config, total = self.config, super().serving_flops(length, window)
        if config.has("bea") or self.bridge_dots:
            total += 2.0 * config.width * config.bridges
        return total + self.long_flops(length) if config.has("lsh_din") else total

    def long_flops(self, length: int) -> float:  # noqa: ARG002  does not depend on it
        """Of `long_interest`, per candidate: D_u s_i, which the dot products share."""
        return 0.0 if self.dots else 2.0 * self.config.width * self.config.bits

    @torch.no_grad()
    def start_bridges(self, vectors: Tensor) -> None:
        """Start the bridges at the k-means centres of item vectors [M, d], M >= n, taken before training.

        Only the centres' differences matter to a softmax, so they are centred; their length is that of random bridges,
        or all affinities would start near zero. Draws from torch's random state. Raises ValueError for too few vectors.
        """
        centres = _kmeans(vectors, self.config.bridges)
        centres = centres - vectors.mean(dim=0)
        self.bridges.copy_(functional.normalize(centres, dim=1) * math.sqrt(self.config.dim))

    def _dropped(self) -> Tensor:
        """Which bridges this training step does without, bool [n]; never all of them."""
        chance = torch.rand(self.config.bridges, device=self.bridges.device)
        return (chance < self.config.bridge_dropout) & (chance < chance.max())


def first_layer_block(*shape: int, learns: bool = True) -> nn.Parameter:
    """Columns of W1, [h, columns] or several of them, scaled so that six blocks together keep the variance of their
    inputs.
    """
    return nn.Parameter(noise(*shape, scale=1 / math.sqrt(3 * shape[-1])), requires_grad=learns)


def _kmeans(vectors: Tensor, count: int) -> Tensor:
    """Centres [count, d] by Lloyd's rounds from k-means++ seeds; a centre that loses all its vectors stays."""
    if len(vectors) < count:
        raise ValueError(f"{len(vectors)} vectors are too few for {count} centres")
    chosen = [int(torch.randint(len(vectors), ()))]
    nearest = (vectors - vectors[chosen[0]]).square().sum(dim=1)
    while len(chosen) < count:
        weights = nearest if bool(nearest.sum() > 0) else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(weights, 1)))
        nearest = torch.minimum(nearest, (vectors - vectors[chosen[-1]]).square().sum(dim=1))
    centres = vectors[chosen].clone()
    for _ in range(_KMEANS_ROUNDS):
        owner = torch.cdist(vectors, centres).argmin(dim=1)
        size = torch.bincount(owner, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, owner, vectors)
        centres = torch.where(size[:, None] > 0, sums / size.clamp(min=1)[:, None], centres)
    return centres
