"""What requests and responses look like: the types that bodies are decoded into and encoded from, once each.

They are msgspec structs, so 10,000 candidates cost 0.3 ms and no object each; the OpenAPI page is generated from them.
Columns that come from NumPy are encoded beforehand (`column`) and embedded as they are.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from msgspec import Meta, Raw, Struct, UnsetType, field

Id = int | str
Time = Annotated[
    int | str,
    Meta(description="milliseconds since the epoch, or RFC 3339 with a zone, as `2026-01-31T12:00:00Z`"),
]
Count = Annotated[int, Meta(ge=1)]
Numbers = Annotated[Raw, Meta(extra_json_schema={"type": "array", "items": {"type": ["number", "null"]}})]
Integers = Annotated[Raw, Meta(extra_json_schema={"type": "array", "items": {"type": "integer"}})]
Ids = Annotated[Raw, Meta(extra_json_schema={"type": "array", "items": {"type": ["integer", "string"]}})]
Include = Literal["trace", "attributes"]
DEADLINE_MAX_MS = 60_000
Deadline = Annotated[
    float,
    Meta(
        gt=0,
        le=DEADLINE_MAX_MS,
        description="what the request may take; decides how long crosses of a feature service are waited for, and "
        "which request goes first; default: the setting of the service",
    ),
]


def column(values: np.ndarray[Any, Any] | list[Any]) -> Raw:
    """The JSON array of `values`; NaN becomes null."""
    try:
        return Raw(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY))
    except TypeError:  # a caller's integer beyond 64 bits: no item's id, but an answer names it
        return Raw(json.dumps(values).encode())


# ---- requests


class Comparison(Struct, forbid_unknown_fields=True):
    """All given bounds hold. Values are compared as float32, as rows store them; an absent attribute never matches."""

    eq: float | bool | None = None
    ne: float | bool | None = None
    lt: float | bool | None = None
    lte: float | bool | None = None
    gt: float | bool | None = None
    gte: float | bool | None = None


class InlineBehaviour(Struct, forbid_unknown_fields=True):
    item_id: Id
    event_time: Time
    action: str = "click"


class InlineUser(Struct, forbid_unknown_fields=True):
    """A user sent along instead of taken from the stores. Behaviours in any order; the newest L are used."""

    features: dict[str, str | float | list[str]] = field(default_factory=dict)
    behaviours: list[InlineBehaviour] = field(default_factory=list)


class Query(Struct, forbid_unknown_fields=True, kw_only=True):
    """What /v1/score and /v1/recommend share."""

    user_id: Annotated[Id | None, Meta(description="one of `user_id` and `user` is needed")] = None
    user: InlineUser | None = None
    as_of: Annotated[Time | None, Meta(description="the moment the user is seen at; default now")] = None
    filters: Annotated[
        dict[str, Comparison],
        Meta(description="numeric row attribute -> bounds; candidates that fail one are left out"),
    ] = field(default_factory=dict)
    order: Annotated[
        str,
        Meta(
            description="`score`, or `score*<attribute>`: the probability 1/(1+exp(-score)) times that row attribute; "
            "items without the attribute come last"
        ),
    ] = "score"
    include: list[Include] = field(default_factory=list)
    deadline_ms: Deadline | None = None


class ScoreOptions(Query, kw_only=True):
    """/v1/score without its candidates."""

    k: Annotated[
        Count | None, Meta(description="only the best k, best first; default: all, in the request's order")
    ] = None


class ScoreRequest(ScoreOptions, kw_only=True):
    candidates: Annotated[list[Id], Meta(description='item ids; the integer k is the same item as the string "k"')]


class RecommendRequest(Query, kw_only=True):
    k: Count = 20
    retrieve: Annotated[
        Count | None,
        Meta(description="how many candidates retrieval brings; default 2000, or the most that is allowed"),
    ] = None
    exclude_seen: Annotated[bool, Meta(description="leave out the items of the user's own behaviours")] = False


class PrefetchRequest(Struct, forbid_unknown_fields=True):
    as_of: Time | None = None


class StageRequest(Struct, forbid_unknown_fields=True, omit_defaults=True):
    uri: Annotated[str, Meta(description="file:// URL of the bundle's folder, as the hosts see it")]
    sha256: Annotated[str, Meta(description="of its manifest.json")]
    activate_when_complete: bool = False


class ActivateRequest(Struct, forbid_unknown_fields=True, omit_defaults=True):
    share: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(
            description="of the users, the same ones on every host; the others are served as before; 0: scored, but "
            "served to nobody; default all"
        ),
    ] = None


class ActionRequest(Struct, forbid_unknown_fields=True):
    """No options: the path says all."""


# ---- responses

_DEGRADED = Meta(
    description="what was served with less than it should have: `crosses` = without cross features, `old crosses` = "
    "with some past their time, anything else in words"
)


class Stages(Struct):
    """Milliseconds of wall time. `user` and `retrieval` run at the same time, so they do not add up to `total`."""

    user: float
    retrieval: float
    gather: float
    score: float
    top_k: float
    total: float


class UserSeen(Struct):
    """What the user side was made from. `cold`: neither a profile nor a behaviour was found."""

    cold: bool
    profile: bool
    source: Annotated[
        Literal["store", "inline", "prefetched", "cached"],
        Meta(description="store: inferred for this request; cached: for an earlier one, or one at the same time"),
    ]
    behaviours_used: int
    behaviours_without_row: int


class HistoryTrace(Struct):
    position: Annotated[
        int,
        Meta(
            description="highest offset of `behaviours` applied for the user; an erasure leaves it as it is; "
            "-1 without any, -2 for a user sent along"
        ),
    ]
    used: int
    missing: int


class Trace(Struct):
    """Enough to compute the same scores again elsewhere."""

    as_of: int
    history: HistoryTrace
    versions: Annotated[Integers, Meta(description="row version of each returned candidate, in the order of `ids`")]


class Ranked(Struct, omit_defaults=True):
    """Columns of equal length: `ids`, `scores`. Ties: numeric ids by number, then the others by their UTF-8 bytes."""

    generation: str
    as_of: int
    ids: Ids | UnsetType
    scores: Annotated[Numbers | UnsetType, Meta(description="the logit")]
    missing: Annotated[Ids, Meta(description="candidates without a row, as the request named them")]
    filtered: Annotated[int, Meta(description="candidates left out by `filters`")]
    candidates: int
    degraded: Annotated[list[str], _DEGRADED]
    user: UserSeen
    stages_ms: Stages
    attributes: Annotated[list[dict[str, Any]] | None, Meta(description="with include=attributes")] = None
    trace: Annotated[Trace | None, Meta(description="with include=trace")] = None


class Prefetching(Struct):
    generation: str
    state: Literal["started", "in flight", "ready"]
    ttl_s: float


class Contribution(Struct):
    """`z`: what the block adds to the first layer [h]. `logit`: its share of the logit along the active units."""

    block: str
    logit: float
    norm: float
    z: Numbers


class Tier(Struct):
    """Behaviours of the window whose signature agrees with the item's in `low`..`high` bits, both included; and how
    many of the newest (config `short_window`) do. Of a window above 2,048 behaviours `count` is an estimate
    from a sample.
    """

    low: int
    high: int
    count: int
    newest: int


class Explanation(Struct):
    """The shares of the contributions and `constant` add up to `score`, since the head is linear along its active
    units.
    """

    generation: str
    as_of: int
    item_id: str
    score: float
    constant: float
    contributions: list[Contribution]
    tiers: list[Tier]
    crosses: list[str]
    row_version: int
    user: UserSeen
    degraded: Annotated[list[str], _DEGRADED]


class ItemRow(Struct):
    """A row as the index holds it. `offset` is the item's place in its partition of `items`. Times in ms since the
    epoch.
    """

    generation: str
    item_id: str
    version: int
    partition: int
    offset: int
    event_time: int
    publish_time: int
    encode_time: int
    visible_time: int
    age_ms: int
    update_to_visible_ms: int
    signature: Annotated[str, Meta(description="hexadecimal")]
    crosses: Annotated[list[int], Meta(description="slots; 0 = unused")]
    attributes: dict[str, Any]
    event: Annotated[
        dict[str, Any] | None,
        Meta(description="with include=event: the record on `items`, its embedding as numbers; null where it is gone"),
    ] = None


class GenerationStatus(Struct, kw_only=True):
    """`completeness`: 0..1 of the `items` offsets taken at staging. `retrieval_built`: ms since the epoch."""

    name: str
    state: str
    reason: str
    loaded: bool
    completeness: float
    covered: Annotated[list[int], Meta(description="last `items` offset covered, per partition")]
    rows: int = 0
    rate: Annotated[float, Meta(description="`items` records that its encoder on this host handles a second")] = 0.0
    lag: Annotated[int, Meta(description="`items` records that wait for it")] = 0
    eta_s: Annotated[float | None, Meta(description="until none would wait at that rate, while it fills")] = None
    arena_bytes: int = 0
    last_change: Annotated[
        int | None, Meta(description="when rows last changed, as this process saw it, ms; null: not since it started")
    ] = None
    retrieval_built: int | None = None
    retrieval_items: int = 0


class CanaryStatus(Struct):
    """Serves this share of the users, 0 .. 1."""

    generation: str
    share: float


class Generations(Struct):
    active: str | None
    previous: str | None
    next: Annotated[str | None, Meta(description="is served once all API processes of the host have loaded it")]
    canary: CanaryStatus | None
    ready: bool
    reason: str
    generations: list[GenerationStatus]


class Accepted(Struct):
    accepted: int
    topic: str


class Health(Struct):
    status: str
    reason: str = ""
    generation: str | None = None
