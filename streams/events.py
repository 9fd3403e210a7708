"""Event types: what may stand on `item-updates`, `items`, `behaviours`, `users`, `models` and `hosts`.

First step of every path: whatever arrives from a topic, a file or HTTP becomes one of these types, or an EventError
with a kind (the `error_type` of a dead letter), a message, and the field at fault. No other exception leaves a
decode function, whatever the bytes. Fields that are not ours are refused: a misspelt `event_tiem` would otherwise
be lost in silence. Of a key given twice in one object the last one counts, as everywhere in JSON. Knows no Kafka
client: key, value, headers and partition are plain values.
"""

from __future__ import annotations

import array
import datetime
import re
import struct
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

ID_BYTES = 128  # of a user, item or event id, in UTF-8
MAX_EVENT_BYTES = 256 << 10  # written again it may be 2.7 times as long ("1," becomes 5.3 bytes); a message has 1 MB
PACK = "forerank-pack"  # header of a message of `item-updates` that holds several events: how many
MAX_PACK = 512  # events
MAX_ITEM_BYTES = 704 << 10  # of a record of `items` that patches have grown
_MAX_CROSSES = 256
_SKEW_MS = 300_000  # by how much a publisher's clock may be ahead
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MS = datetime.timedelta(milliseconds=1)

Header = tuple[str, bytes]
ErrorKind = Literal["malformed", "key_mismatch", "wrong_partition", "too_large", "not_encodable", "no_such_item"]

Time = Annotated[datetime.datetime, msgspec.Meta(tz=True)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=ID_BYTES)]
Version = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Generation = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Whole = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Crosses = Annotated[list[Text], msgspec.Meta(max_length=_MAX_CROSSES)]
Features = dict[str, str | float | list[str]]
Attributes = dict[str, str | bool | Whole | float | list[str] | None]


class EventError(ValueError):
    """An event that cannot be accepted. `kind`: the reason for dead letters; `field`: the place ("" = all of it)."""

    def __init__(self, kind: ErrorKind, message: str, field: str = "") -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind
        self.message = message
        self.field = field


class PatchBody(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What a patch writes: each named feature and attribute by itself, crosses and embedding as a whole."""

    crosses: Crosses | None = None
    features: Features = {}
    embedding: list[float] | None = None
    attributes: Attributes = {}


class ItemUpdate(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """An item as published. With `deleted` only id, version and time count; the rest is dropped. With `patch`, which
    has only these beside it, what the patch does not name stays as it is."""

    item_id: Text
    version: Version
    event_time: Time | None = None  # absent: `ce_time`, else the record's time
    crosses: Crosses = []
    features: Features = {}
    embedding: list[float] | None = None
    attributes: Attributes = {}
    deleted: bool = False
    patch: PatchBody | None = None


class Item(msgspec.Struct, omit_defaults=True, gc=False):  # it is in no cycle
    """An item as ingest wrote it to `items`; times are ms since the epoch.

    `embedding` is 32-bit little-endian floats, in JSON their base64, which is read five times as fast as numbers.
    What is no finite float in 32 bits is infinite, which the encoder refuses. Lists were written formerly.

    `version` is the newest that anything of the item has. Where that is a patch's, `base` is the version of the last
    whole update, or of the deletion, and `versions` those of the leaves that patches wrote since: `crosses`,
    `embedding`, `features.<name>`, `attributes.<name>`. A deleted item keeps these leaves, for an update between.
    """

    item_id: str
    version: int
    event_time: int
    publish_time: int
    deleted: bool = False
    crosses: list[str] = []
    features: Features = {}
    embedding: bytes | list[float] | None = None
    attributes: Attributes = {}
    base: int | None = None
    versions: dict[str, int] = {}


class ItemPatch(msgspec.Struct):
    """A patch as ingest takes it; times are ms since the epoch. None and absent names: no change."""

    item_id: str
    version: int
    event_time: int
    publish_time: int
    crosses: list[str] | None
    features: Features
    embedding: bytes | None
    attributes: Attributes


class BehaviourBody(msgspec.Struct, forbid_unknown_fields=True):
    event_id: Text
    user_id: Text
    item_id: Text
    action: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.:-]{1,32}\Z")]
    event_time: Time | None = None


class Behaviour(msgspec.Struct):
    """One behaviour; times in ms since the epoch."""

    event_id: str
    user_id: str
    item_id: str
    action: str
    event_time: int
    publish_time: int


class UserBody(msgspec.Struct, forbid_unknown_fields=True):
    """A profile (`features`), or an erasure (`erased_at`): profile and all behaviours *published* until then are gone,
    whenever they happened, and stay so. Never both; `erased_at` is not in the future."""

    user_id: Text
    features: Features | None = None
    event_time: Time | None = None
    erased_at: Time | None = None


class User(msgspec.Struct):
    """A profile (`features`), or, with `erased_at`, the order to forget the user; times in ms since the epoch."""

    user_id: str
    features: Features | None
    event_time: int
    erased_at: int | None
    publish_time: int


class ModelEvent(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    action: Literal["stage", "activate", "rollback", "retire"]
    generation: Generation
    uri: Annotated[str, msgspec.Meta(max_length=4096)] | None = None
    sha256: Sha256 | None = None
    activate_when_complete: bool = False
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = (
        None  # of the users, with activate; None: all, 0: a shadow
    )


class HostReport(msgspec.Struct, omit_defaults=True):
    """What a host says on `hosts` about one generation (key: host/generation), or, without one, that it is there (key:
    host). Lists have one entry per partition.
    """

    host: str
    generation: str
    state: str
    time: int
    reason: str = ""
    covered: list[int] = []
    counts: list[int] = []
    digests: list[str] = []  # hexadecimal: a JSON number would lose bits


_DECODERS: dict[type, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (ItemUpdate, Item, BehaviourBody, UserBody, ModelEvent)
}
_RAW_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_ENCODER = msgspec.json.Encoder()
encode = _ENCODER.encode
_PATH = re.compile(r" - at `\$\.?(.*)`$")


def _decode(kind: type, value: bytes | None) -> Any:
    if value is None:
        raise EventError("malformed", "the record has no value")
    if len(value) > MAX_EVENT_BYTES and kind is not Item:
        raise EventError("too_large", f"{len(value)} bytes; at most {MAX_EVENT_BYTES} are accepted")
    try:
        return _DECODERS[kind].decode(value)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _PATH.search(text)
        field = found.group(1) if found else text.partition("field `")[2].rstrip("`")
        raise EventError("malformed", text, field) from None
    except (ValueError, RecursionError, OverflowError) as error:  # msgspec.DecodeError, UnicodeDecodeError
        raise EventError("malformed", str(error)) from None


def check_id(text: str, field: str) -> bytes:
    """The id's UTF-8. Raises EventError where it is empty, longer than 128 bytes, or holds control characters."""
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise EventError("malformed", f"`{field}` is not valid UTF-8", field) from None
    if not 1 <= len(raw) <= ID_BYTES:
        raise EventError("malformed", f"`{field}` has {len(raw)} bytes; 1 to {ID_BYTES} are allowed", field)
    if _CONTROL.search(text):
        raise EventError("malformed", f"`{field}` holds a control character", field)
    return raw


def to_ms(time: datetime.datetime) -> int:
    """Milliseconds since the epoch, rounded down."""
    return (time - _EPOCH) // _MS


def to_rfc3339(ms: int) -> str:
    return (_EPOCH + ms * _MS).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _resolve(
    time: datetime.datetime | None, headers: Mapping[str, bytes] | Iterable[Header] | None, default: int
) -> int:
    return to_ms(time) if time is not None else cloud_time(headers, default)


def pack(values: Sequence[bytes]) -> bytes:
    """One body of several, which are JSON objects."""
    return b"[" + b",".join(values) + b"]"


def unpacked(value: bytes | None, headers: Mapping[str, bytes] | Iterable[Header] | None) -> list[bytes] | None:
    """The bodies of a pack; None of a message without the header. Raises EventError where it is not what that says."""
    said = header(headers, PACK)
    if said is None:
        return None
    try:
        found = _RAW_LIST.decode(value or b"")
    except (ValueError, RecursionError) as error:
        raise EventError("malformed", f"a pack that is no JSON array: {error}") from None
    if len(found) > MAX_PACK:
        raise EventError("too_large", f"a pack of {len(found)} events; at most {MAX_PACK} are accepted")
    if str(len(found)).encode() != said:
        raise EventError("malformed", f"a pack of {len(found)} events whose header `{PACK}` says {said[:20]!r}")
    return [bytes(raw) for raw in found]


def item_update(
    value: bytes | None, headers: Mapping[str, bytes] | Iterable[Header] | None, publish_time: int
) -> Item | ItemPatch:
    """What `items` will hold for this body, or the patch that it is. `publish_time`: the record's time, ms."""
    body: ItemUpdate = _decode(ItemUpdate, value)
    check_id(body.item_id, "item_id")
    event_time = _resolve(body.event_time, headers, publish_time)
    if body.patch is not None:
        return _patch(body, body.patch, event_time, publish_time)
    if body.deleted:
        return Item(body.item_id, body.version, event_time, publish_time, True)
    return Item(
        body.item_id,
        body.version,
        event_time,
        publish_time,
        False,
        body.crosses,
        body.features,
        _floats(body.embedding),
        body.attributes,
    )


def _patch(body: ItemUpdate, patch: PatchBody, event_time: int, publish_time: int) -> ItemPatch:
    if body.deleted or body.crosses or body.features or body.embedding is not None or body.attributes:
        raise EventError("malformed", "beside `patch` only item_id, version and event_time may stand", "patch")
    if patch == PatchBody():
        raise EventError("malformed", "`patch` names nothing to change", "patch")
    return ItemPatch(
        body.item_id,
        body.version,
        event_time,
        publish_time,
        patch.crosses,
        patch.features,
        _floats(patch.embedding),
        patch.attributes,
    )


def _floats(embedding: list[float] | None) -> bytes | None:
    return None if embedding is None else array.array("f", embedding).tobytes()


plain_item = _DECODERS[Item].decode  # `item` where all goes well; raises whatever msgspec does


def item(value: bytes | None) -> Item:
    """A record of `items` (not a tombstone)."""
    found: Item = _decode(Item, value)
    return found


def behaviour(
    value: bytes | None, headers: Mapping[str, bytes] | Iterable[Header] | None, publish_time: int
) -> Behaviour:
    body: BehaviourBody = _decode(BehaviourBody, value)
    for name in ("event_id", "user_id", "item_id"):
        check_id(getattr(body, name), name)
    event_time = _resolve(body.event_time, headers, publish_time)
    return Behaviour(body.event_id, body.user_id, body.item_id, body.action, event_time, publish_time)


def user(value: bytes | None, headers: Mapping[str, bytes] | Iterable[Header] | None, publish_time: int) -> User:
    body: UserBody = _decode(UserBody, value)
    check_id(body.user_id, "user_id")
    if (body.features is None) == (body.erased_at is None):
        raise EventError("malformed", "exactly one of `features` and `erased_at` is needed", "features")
    event_time = _resolve(body.event_time, headers, publish_time)
    erased_at = None if body.erased_at is None else to_ms(body.erased_at)
    if erased_at is not None and erased_at > publish_time + _SKEW_MS:
        raise EventError("malformed", "`erased_at` lies in the future: it would shut the user out", "erased_at")
    return User(body.user_id, body.features, event_time, erased_at, publish_time)


def erasure(user_id: str, erased_at: int) -> bytes:
    """The body that a null on `users` is rewritten to. Raises EventError where no body can hold the time."""
    try:
        return encode({"user_id": user_id, "erased_at": to_rfc3339(erased_at)})
    except OverflowError:
        raise EventError("malformed", f"the record's time, {erased_at} ms, lies outside the years 1 to 9999") from None


def model(value: bytes | None) -> ModelEvent:
    event: ModelEvent = _decode(ModelEvent, value)
    if event.action == "stage" and (event.uri is None or event.sha256 is None):
        missing = "uri" if event.uri is None else "sha256"
        raise EventError("malformed", f"a stage event needs `{missing}`", missing)
    if event.share is not None and event.action != "activate":
        raise EventError("malformed", "`share` goes with activate alone", "share")
    return event


def check_key(key: bytes | None, id_bytes: bytes, partition: int, partitions: int) -> None:
    """Raises EventError unless the record's key is the id and its partition is the key's."""
    if key != id_bytes:
        shown = "no key" if key is None else f"key {key[:ID_BYTES]!r}"
        raise EventError("key_mismatch", f"{shown}; the id in the body is {id_bytes!r}")
    expected = partition_of(id_bytes, partitions)
    if partition != expected:
        raise EventError(
            "wrong_partition",
            f"on partition {partition}, belongs on {expected} of {partitions}: "
            "librdkafka clients need partitioner=murmur2_random",
        )


def murmur2(data: bytes) -> int:
    """MurmurHash2 with Kafka's seed, as the Java client and kafka-python compute it."""
    m, mask, length = 0x5BD1E995, 0xFFFFFFFF, len(data)
    h = 0x9747B28C ^ length
    for k in struct.unpack_from(f"<{length >> 2}I", data):
        k = k * m & mask
        h = (h * m & mask) ^ ((k ^ k >> 24) * m & mask)
    if length & 3:
        h = (h ^ int.from_bytes(data[length & ~3 :], "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15


def partition_of(key: bytes, partitions: int) -> int:
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def header(headers: Mapping[str, bytes] | Iterable[Header] | None, name: str) -> bytes | None:
    """The value of one header. Clients hand headers over as a list of pairs or as a mapping."""
    if not headers:
        return None
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return next((value for found, value in pairs if found == name), None)


def header_list(headers: Mapping[str, bytes] | Iterable[Header] | None) -> list[Header]:
    if not headers:
        return []
    return list(headers.items()) if isinstance(headers, Mapping) else list(headers)


def fitting_headers(headers: Iterable[Header], room: int) -> list[Header]:
    """The first of them that take at most `room` bytes in a record."""
    out = []
    for name, value in headers:
        room -= len(name.encode()) + len(value or b"") + 10  # the lengths take up to five bytes each
        if room < 0:
            break
        out.append((name, value))
    return out


def cloud_time(headers: Mapping[str, bytes] | Iterable[Header] | None, default: int) -> int:
    """`ce_time` in ms, or `default` where there is none."""
    raw = header(headers, "ce_time")
    if raw is None:
        return default
    try:
        return to_ms(msgspec.convert(raw.decode(), Time))
    except (msgspec.ValidationError, UnicodeDecodeError):
        raise EventError("malformed", "the header `ce_time` is not an RFC 3339 time", "ce_time") from None


def cloud_headers(kind: str, event_id: str, source: str, time_ms: int) -> list[Header]:
    """CloudEvents 1.0 in Kafka's binary mode; `kind` is the last part of `ce_type`."""
    return [
        ("content-type", b"application/json"),
        ("ce_specversion", b"1.0"),
        ("ce_id", event_id.encode()),
        ("ce_source", source.encode()),
        ("ce_type", b"forerank." + kind.encode()),
        ("ce_time", to_rfc3339(time_ms).encode()),
    ]


def new_event_id() -> str:
    return uuid.uuid4().hex


def dead_letter_headers(topic: str, partition: int, offset: int, error: EventError) -> list[Header]:
    return [
        ("source_topic", topic.encode()),
        ("source_partition", str(partition).encode()),
        ("source_offset", str(offset).encode()),
        ("error_type", error.kind.encode()),
        ("message", error.message[:1000].encode("utf-8", "replace")),
    ]
