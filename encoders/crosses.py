"""Which crosses a user's table keeps, and how the training form reads one: part of SIM(u, c) (DESIGN.md section 3).

A key is (user << 16 | slot). Letters in the shape comments are those of encoders/model.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from encoders.config import SKETCH, ModelConfig
from encoders.ranker import DAY

SIM_COUNTS = 2  # log1p(count) and recency stand before the mean token in SIM(u, c)


def sim_counts(count: Tensor, age: Tensor) -> Tensor:
    """The first columns of SIM(u, c): log1p(count), and recency = 1 / (1 + days since the newest) [..., 2]."""
    days = age.to(torch.float32) / DAY
    return torch.stack([torch.log1p(count), 1 / (1 + days)], dim=-1)


def kept_crosses(user: Tensor, count: Tensor, newest: Tensor, config: ModelConfig) -> Tensor:
    """Which crosses the users' tables keep, bool [keys]; the keys ascend by user, then slot. `fold` has it for one.

    A capped table keeps a user's first `cross_rows` crosses: "frequent" orders them by `count`, "recent" by the place
    of the `newest` behaviour; each breaks ties by the other, and then by slot.
    """
    size = torch.bincount(user)
    if config.cross_table not in ("frequent", "recent") or int(size.max()) <= config.cross_rows:
        return torch.ones(len(user), dtype=torch.bool, device=user.device)
    first, second = (count, newest) if config.cross_table == "frequent" else (newest, count)
    order = torch.argsort(first << 32 | second, descending=True, stable=True)
    order = order[torch.argsort(user[order], stable=True)]
    place = torch.arange(len(order), device=user.device) - (size.cumsum(0) - size)[user[order]]  # among the user's
    kept = torch.empty(len(order), dtype=torch.bool, device=user.device)
    kept[order] = place < config.cross_rows
    return kept


def looked_up(keys: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
    """Rows [keys + 1, h] of the wanted keys, the last one where there is none [B, K, C, h]."""
    place = torch.searchsorted(keys, wanted)
    met = functional.pad(keys, (0, 1), value=-1)[place] == wanted
    return rows[torch.where(met, place, len(keys))]


def sketched(keys: Tensor, rows: Tensor, user: Tensor, wanted: Tensor, size: int) -> Tensor:
    """The same out of a count sketch (Charikar et al., 2002) of `size` rows for each user: in each of a few small
    tables a cross is added to its bucket with its sign; what is read is the mean over the tables of bucket times sign,
    not their median, so that it stays linear. `rows` are less the default.
    """
    width = size // len(SKETCH)
    estimate = rows.new_zeros(*wanted.shape, rows.shape[1])
    for factor in SKETCH:
        bucket, sign = _hashed(keys & 0xFFFF, factor, width)
        table = rows.new_zeros(len(user) * width, rows.shape[1]).index_add(
            0, (keys >> 16) * width + bucket, sign[:, None] * rows
        )
        bucket, sign = _hashed(wanted, factor, width)
        estimate = estimate + sign[..., None] * table[(user >> 16) * width + bucket] / len(SKETCH)
    return estimate


def _hashed(slots: Tensor, factor: int, width: int) -> tuple[Tensor, Tensor]:
    """Bucket 0..width-1 and sign of each slot."""
    mixed = slots * factor & 0xFFFFFFFF
    return (mixed >> 17) * width >> 15, (1 - 2 * (mixed >> 16 & 1)).to(torch.float32)
