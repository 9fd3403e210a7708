"""Machine level of the arena: what is done with its memory, in which order. Addresses are those of mapped files.

Table entry, 32 bytes: key low u8, key high u8, word u8, unused u8. The word is `slot_version << 32 | slot`; 0 = never
used, DELETED = was used. An entry never changes its key within one table, so whoever sees a word sees its key.

Publication of a row, in this order (writer):
 1. take a free slot; make its record's `slot_version` odd; release fence
 2. write the hot and the cold record
 3. make `slot_version` even (release): the record is whole
 4. for a new key, write the key into an entry whose word is 0
 5. store the entry's word (release): the row is visible
 6. make the old slot's `slot_version` odd, so that every word that still names it is void; free the slot
A deletion stores DELETED instead of 5.

A reader loads the word (acquire), copies the record, and after an acquire fence loads `slot_version` again: only if it
is the word's was the copy whole and of that key. Otherwise it starts again at the table. Nothing depends on how long a
reader pauses.

Plain loads and stores are not enough here: the optimiser hoisted one and deleted another in a trial.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, int64, njit, types, uint32, uint64

from index.keys import DIGEST_KEY, siphash64_words

ENTRY = 32  # bytes of a table entry
LOAD = 0.3  # most used entries per entry
DELETED = 1  # no row's word: a published slot_version is even and not 0
AHEAD = 32  # how many keys ahead of its use memory is asked for
WALK_AHEAD = 64  # the same in table entries, most of which are empty

intrinsic: Callable[[Callable[..., Any]], Any] = extending.intrinsic  # numba has no types for it

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_LINE = ir.VectorType(_I64, 8)


# --- loads and stores of the machine; an address is a u8 integer


@intrinsic
def load64(_typing: Any, _address: Any) -> Any:
    """The u8 at an address, with acquire order."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], _I64.as_pointer()), "acquire", 8)

    return types.uint64(types.uint64), generate


@intrinsic
def load32(_typing: Any, _address: Any) -> Any:
    """The u4 at an address, with acquire order."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], _I32.as_pointer()), "acquire", 4)

    return types.uint32(types.uint64), generate


@intrinsic
def store64(_typing: Any, _address: Any, _value: Any) -> Any:
    """Stores a u8, with release order."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], builder.inttoptr(arguments[0], _I64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), generate


@intrinsic
def store32(_typing: Any, _address: Any, _value: Any) -> Any:
    """Stores a u4, with release order."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], builder.inttoptr(arguments[0], _I32.as_pointer()), "release", 4)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint32), generate


@intrinsic
def fence_acquire(_typing: Any) -> Any:
    """No later load or store moves before the loads above."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("acquire")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def fence_release(_typing: Any) -> Any:
    """No earlier load or store moves behind the stores below."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("release")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def copy_line(_typing: Any, _target: Any, _source: Any) -> Any:
    """Copies the 64 bytes at `source` to `target`; both are multiples of 64."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        line = builder.load(builder.inttoptr(arguments[1], _LINE.as_pointer()), align=64)
        builder.store(line, builder.inttoptr(arguments[0], _LINE.as_pointer()), align=64)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), generate


@intrinsic
def prefetch(_typing: Any, _address: Any) -> Any:
    """Asks for the cache line of an address; any address is allowed."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte = _I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        name = "llvm.prefetch.p0"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        builder.call(function, [builder.inttoptr(arguments[0], byte), _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.uint64), generate


@njit(cache=True, nogil=True)
def load_word(address: Any) -> Any:
    """`load64` for Python code."""
    return load64(uint64(address))


@njit(cache=True, nogil=True)
def load_word_after(address: Any) -> Any:
    """`load64` that stays behind all loads before it: the second look of a double buffer's reader."""
    fence_acquire()
    return load64(uint64(address))


@njit(cache=True, nogil=True)
def hold_stores() -> None:
    """No later store becomes visible before the stores above: the first step of a double buffer's writer, whose other
    half readers of the word before the last may still look at."""
    fence_release()


@njit(cache=True, nogil=True)
def store_word(address: Any, value: Any) -> None:
    """`store64` for Python code."""
    store64(uint64(address), uint64(value))


# --- the id table


@njit(cache=True, nogil=True, inline="always")
def _home(high: Any, low: Any, mask: Any) -> Any:
    """The entry where the search for a key begins."""
    x = low ^ (high * uint64(0xFF51AFD7ED558CCD))
    x ^= x >> uint64(32)
    x *= uint64(0x9E3779B97F4A7C15)
    x ^= x >> uint64(29)
    return x & mask


@njit(cache=True, nogil=True, inline="always")
def _find(table: Any, mask: Any, high: Any, low: Any) -> Any:
    """(address of the key's entry, its word), or (address of the empty entry where the key would go, 0)."""
    at = _home(high, low, mask)
    while True:
        entry = table + at * uint64(ENTRY)
        word = load64(entry + uint64(16))
        if word == uint64(0) or (load64(entry) == low and load64(entry + uint64(8)) == high):
            return entry, word
        at = (at + uint64(1)) & mask


@njit(cache=True, nogil=True, inline="always")
def _ask_ahead(table: Any, at: Any, entries: Any, hot: Any, hot_size: Any, cold: Any, cold_size: Any) -> None:
    """For walks over the whole table: asks for the records of a later entry."""
    if at + WALK_AHEAD < entries:
        word = load64(table + uint64(at + WALK_AHEAD) * uint64(ENTRY) + uint64(16))
        if word > uint64(DELETED):
            slot = word & uint64(0xFFFFFFFF)
            for line in range(0, int64(hot_size), 64):
                prefetch(hot + slot * hot_size + uint64(line))
            for line in range(0, int64(cold_size), 64):
                prefetch(cold + slot * cold_size + uint64(line))


@njit(cache=True, nogil=True)
def copy_table(source: Any, source_entries: Any, target: Any, target_mask: Any) -> Any:
    """Puts all live entries into another, empty and unpublished table. Returns their number."""
    live = 0
    for at in range(source_entries):
        entry = source + uint64(at) * uint64(ENTRY)
        word = load64(entry + uint64(16))
        if word > uint64(DELETED):
            low, high = load64(entry), load64(entry + uint64(8))
            place, _ = _find(target, target_mask, high, low)
            store64(place, low)
            store64(place + uint64(8), high)
            store64(place + uint64(16), word)
            live += 1
    return live


# --- the writer

FREE, USED, LIVE = 0, 1, 2  # state: free slots on the list, used table entries, live rows
PUT, REMOVE = 1, 2  # kinds of operations; 0 = leave it


@njit(cache=True, nogil=True, inline="always")
def _void(slot_version: Any) -> None:
    """Ends the life of what a slot holds."""
    store32(slot_version, load32(slot_version) | uint32(1))


@njit(cache=True, nogil=True)
def apply_rows(
    table: Any,
    mask: Any,
    hot: Any,
    hot_size: Any,
    cold: Any,
    cold_size: Any,
    version_at: Any,
    free: Any,
    state: Any,
    keys: Any,
    kinds: Any,
    hot_rows: Any,
    cold_rows: Any,
) -> None:
    """Puts or removes the rows of keys u8[n, 2]. `hot_rows` and `cold_rows` are addresses of n records each; the field
    at `version_at` of the hot ones is overwritten. There must be n free slots and n free table entries."""
    for i in range(keys.shape[0]):
        if kinds[i] == 0:
            continue
        entry, word = _find(table, mask, keys[i, 0], keys[i, 1])
        if kinds[i] == PUT:
            state[FREE] -= 1
            slot = free[state[FREE]]
            record = hot + uint64(slot) * hot_size
            odd = load32(record + version_at) | uint32(1)
            even = uint32(odd + uint32(1))
            if even == uint32(0):
                even = uint32(2)
            store32(record + version_at, odd)
            fence_release()
            source = hot_rows + uint64(i) * hot_size
            store32(source + version_at, odd)  # travels with the copy
            for line in range(0, int64(hot_size), 64):
                copy_line(record + uint64(line), source + uint64(line))
            target, source = cold + uint64(slot) * cold_size, cold_rows + uint64(i) * cold_size
            for line in range(0, int64(cold_size), 64):
                copy_line(target + uint64(line), source + uint64(line))
            store32(record + version_at, even)
            if word == uint64(0):
                store64(entry, keys[i, 1])
                store64(entry + uint64(8), keys[i, 0])
                state[USED] += 1
            if word <= uint64(DELETED):
                state[LIVE] += 1
            store64(entry + uint64(16), (uint64(even) << uint64(32)) | uint64(slot))
        elif word > uint64(DELETED):
            store64(entry + uint64(16), uint64(DELETED))
            state[LIVE] -= 1
        if word > uint64(DELETED):
            old = word & uint64(0xFFFFFFFF)
            _void(hot + old * hot_size + version_at)
            free[state[FREE]] = old
            state[FREE] += 1


@njit(cache=True, nogil=True)
def versions_of(
    table: Any, mask: Any, cold: Any, cold_size: Any, version_in_cold: Any, keys: Any, versions: Any, exists: Any
) -> None:
    """The rows' versions, as the one writer sees them."""
    for i in range(keys.shape[0]):
        if i + AHEAD < keys.shape[0]:
            prefetch(table + _home(keys[i + AHEAD, 0], keys[i + AHEAD, 1], mask) * uint64(ENTRY))
        _, word = _find(table, mask, keys[i, 0], keys[i, 1])
        exists[i] = word > uint64(DELETED)
        versions[i] = uint64(0)
        if exists[i]:
            versions[i] = load64(cold + (word & uint64(0xFFFFFFFF)) * cold_size + version_in_cold)


@njit(cache=True, nogil=True)
def take_over(
    table: Any,
    entries: Any,
    hot: Any,
    hot_size: Any,
    cold: Any,
    cold_size: Any,
    version_at: Any,
    version_in_cold: Any,
    capacity: Any,
    free: Any,
    state: Any,
) -> Any:
    """What a new writer learns from the memory of the former one: sets free list and state. Returns (sound, digest of
    all rows); unsound is a slot that two words name or that does not exist, and a record that is not its word's."""
    taken = np.zeros(capacity, np.bool_)
    digest = uint64(0)
    state[USED] = 0
    state[LIVE] = 0
    k0, k1 = uint64(DIGEST_KEY[0]), uint64(DIGEST_KEY[1])
    for at in range(entries):
        _ask_ahead(table, at, entries, hot, hot_size, cold, cold_size)
        entry = table + uint64(at) * uint64(ENTRY)
        word = load64(entry + uint64(16))
        if word == uint64(0):
            continue
        state[USED] += 1
        if word == uint64(DELETED):
            continue
        slot = word & uint64(0xFFFFFFFF)
        if int64(slot) >= capacity or taken[slot]:
            return False, digest
        if uint64(load32(hot + slot * hot_size + version_at)) != word >> uint64(32):
            return False, digest
        taken[slot] = True
        state[LIVE] += 1
        version = load64(cold + slot * cold_size + version_in_cold)
        digest += siphash64_words(load64(entry + uint64(8)), load64(entry), version, k0, k1)
    state[FREE] = 0
    for backwards in range(capacity):
        slot = uint64(capacity - 1 - backwards)
        if not taken[slot]:
            if load32(hot + slot * hot_size + version_at) != uint32(0):
                _void(hot + slot * hot_size + version_at)  # the former writer may have stopped before 6
            free[state[FREE]] = slot
            state[FREE] += 1
    return True, digest


# --- readers


@njit(cache=True, nogil=True)
def gather(
    table: Any,
    mask: Any,
    hot: Any,
    hot_size: Any,
    version_at: Any,
    data: Any,
    data_size: Any,
    capacity: Any,
    keys: Any,
    start: Any,
    words: Any,
    out: Any,
) -> Any:
    """Copies the `data` records (hot or cold) of keys[start:] to address `out`; `words` u8[n] gets the words, 0 = not
    found. Returns n when done, else the index of a key that changed twice meanwhile: the mapping may be out of date."""
    n = keys.shape[0]
    for i in range(start, n):
        j = min(i + AHEAD, n - 1)
        prefetch(table + _home(keys[j, 0], keys[j, 1], mask) * uint64(ENTRY))
        _, words[i] = _find(table, mask, keys[i, 0], keys[i, 1])
    for i in range(start, n):
        ahead = (words[min(i + AHEAD, n - 1)]) & uint64(0xFFFFFFFF)
        for line in range(0, int64(data_size), 64):
            prefetch(data + ahead * data_size + uint64(line))
        if data != hot:
            prefetch(hot + ahead * hot_size + version_at)
        target = out + uint64(i) * data_size
        tries = 0
        while words[i] > uint64(DELETED):
            slot = words[i] & uint64(0xFFFFFFFF)
            if slot >= capacity:
                return i
            for line in range(0, int64(data_size), 64):
                copy_line(target + uint64(line), data + slot * data_size + uint64(line))
            fence_acquire()
            if uint64(load32(hot + slot * hot_size + version_at)) == words[i] >> uint64(32):
                break
            tries += 1
            if tries == 2:
                return i
            _, words[i] = _find(table, mask, keys[i, 0], keys[i, 1])
        if words[i] <= uint64(DELETED):
            words[i] = uint64(0)
            _zero(target, data_size)
    return n


@njit(cache=True, nogil=True)
def words_of(table: Any, mask: Any, keys: Any, words: Any) -> None:
    """The words of keys u8[n, 2] into u8[n], 0 = no row."""
    n = keys.shape[0]
    for i in range(n):
        j = min(i + AHEAD, n - 1)
        prefetch(table + _home(keys[j, 0], keys[j, 1], mask) * uint64(ENTRY))
        _, word = _find(table, mask, keys[i, 0], keys[i, 1])
        words[i] = word if word > uint64(DELETED) else uint64(0)


@njit(cache=True, nogil=True, inline="always")
def _zero(target: Any, size: Any) -> None:
    for at in range(0, int64(size), 8):
        store64(target + uint64(at), uint64(0))


@njit(cache=True, nogil=True)
def scan(
    table: Any,
    entries: Any,
    hot: Any,
    hot_size: Any,
    version_at: Any,
    cold: Any,
    cold_size: Any,
    capacity: Any,
    keys: Any,
    out: Any,
) -> Any:
    """All live keys and copies of their cold records. Returns their number, or -1 when the mapping is out of date."""
    count = 0
    for at in range(entries):
        _ask_ahead(table, at, entries, hot, hot_size, cold, cold_size)
        entry = table + uint64(at) * uint64(ENTRY)
        word = load64(entry + uint64(16))
        tries = 0
        while word > uint64(DELETED):
            slot = word & uint64(0xFFFFFFFF)
            if slot >= capacity or tries == 16 or count == keys.shape[0]:
                return -1
            target = out + uint64(count) * cold_size
            for line in range(0, int64(cold_size), 64):
                copy_line(target + uint64(line), cold + slot * cold_size + uint64(line))
            fence_acquire()
            if uint64(load32(hot + slot * hot_size + version_at)) == word >> uint64(32):
                keys[count, 0] = load64(entry + uint64(8))
                keys[count, 1] = load64(entry)
                count += 1
                break
            tries += 1
            word = load64(entry + uint64(16))
    return count


@njit(cache=True, nogil=True)
def keys_at(table: Any, places: Any, keys: Any) -> Any:
    """The keys of the live rows among the entries at these places. Returns their number."""
    count = 0
    for at in places:
        entry = table + uint64(at) * uint64(ENTRY)
        if load64(entry + uint64(16)) > uint64(DELETED):
            keys[count, 0] = load64(entry + uint64(8))
            keys[count, 1] = load64(entry)
            count += 1
    return count


@njit(cache=True, nogil=True)
def least(
    table: Any,
    entries: Any,
    hot: Any,
    hot_size: Any,
    version_at: Any,
    cold: Any,
    cold_size: Any,
    capacity: Any,
    field_at: Any,
) -> Any:
    """(sound, the least i8 at `field_at` of the live rows' cold records, the greatest there is without a row); unsound
    when the mapping is out of date. Reads that one field of each row and copies nothing."""
    found = int64(0x7FFFFFFFFFFFFFFF)
    for at in range(entries):
        if at + WALK_AHEAD < entries:
            ahead = load64(table + uint64(at + WALK_AHEAD) * uint64(ENTRY) + uint64(16))
            if ahead > uint64(DELETED):
                prefetch(hot + (ahead & uint64(0xFFFFFFFF)) * hot_size + version_at)
                prefetch(cold + (ahead & uint64(0xFFFFFFFF)) * cold_size + field_at)
        entry = table + uint64(at) * uint64(ENTRY)
        word = load64(entry + uint64(16))
        tries = 0
        while word > uint64(DELETED):
            slot = word & uint64(0xFFFFFFFF)
            if slot >= capacity or tries == 16:
                return False, found
            value = int64(load64(cold + slot * cold_size + field_at))
            fence_acquire()
            if uint64(load32(hot + slot * hot_size + version_at)) == word >> uint64(32):
                found = min(found, value)
                break
            tries += 1
            word = load64(entry + uint64(16))
    return True, found
