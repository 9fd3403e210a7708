"""Which rows of some blocks change the index, and what its progress is afterwards: the rules, without the stores.

1. A row at or below its partition's covered offset was applied before: skipped.
2. A row replaces (or removes) the item's row only when its (version, items offset) is newer, within the blocks too.
   A removed row leaves no version behind: an item that is made again may begin with any (ingest guards the order).
3. Count and digest of the partition follow every accepted row. 4. After a block the partition is covered to the
block's offset. A fill proof is compared when nothing beyond it is covered.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, uint64

from index.table import PUT, REMOVE


@njit(cache=True, nogil=True)
def plan(
    starts: Any,
    partitions: Any,
    covered_to: Any,
    rows_next: Any,
    proven: Any,
    proof_counts: Any,
    proof_digests: Any,
    keys: Any,
    versions: Any,
    offsets: Any,
    deleted: Any,
    digests: Any,
    stored: Any,
    stored_versions: Any,
    stored_digests: Any,
    covered: Any,
    rows_offset: Any,
    count: Any,
    digest: Any,
    filled: Any,
    mismatch: Any,
    kinds: Any,
) -> None:
    """Block m has rows starts[m]:starts[m + 1]. Per row: key, version, items offset, deleted, digest, and whether, in
    which version and with which digest the index holds the item. Sets kinds u1[n] (PUT, REMOVE, or 0 = leave it) and
    changes the progress arrays (covered ... mismatch) in place."""
    size = 4
    while size < 2 * keys.shape[0]:
        size *= 2
    latest = np.full(size, -1, np.int64)  # open addressing: the last accepted row of a key
    mask = uint64(size - 1)
    for m in range(partitions.shape[0]):
        p = partitions[m]
        for i in range(starts[m], starts[m + 1]):
            kinds[i] = 0
            if offsets[i] <= covered[p]:
                continue
            at = ((keys[i, 0] ^ keys[i, 1]) * uint64(0x9E3779B97F4A7C15) >> uint64(20)) & mask
            while latest[at] >= 0 and (keys[latest[at], 0] != keys[i, 0] or keys[latest[at], 1] != keys[i, 1]):
                at = (at + uint64(1)) & mask
            j = latest[at]
            if j >= 0:
                exists, old = not deleted[j], digests[j]
                stale = offsets[i] <= offsets[j] or (not deleted[j] and versions[i] < versions[j])
            else:
                exists, old = stored[i], stored_digests[i]
                stale = exists and versions[i] < stored_versions[i]  # its offset is covered, so it is older
            if stale:
                continue
            if j >= 0:
                kinds[j] = 0
            latest[at] = i
            if exists:
                count[p] -= 1
                digest[p] -= old
            if not deleted[i]:
                count[p] += 1
                digest[p] += digests[i]
                kinds[i] = PUT
            elif stored[i]:
                kinds[i] = REMOVE
        covered[p] = max(covered[p], covered_to[m])
        rows_offset[p] = max(rows_offset[p], rows_next[m])
        if proven[m] and covered_to[m] == covered[p]:
            filled[p] = proof_counts[m] == count[p] and proof_digests[m] == digest[p]
            mismatch[p] = not filled[p]
