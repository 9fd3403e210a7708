from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoders.features import (
    MANY,
    Categorical,
    FeatureError,
    FeatureSpec,
    ItemEncoder,
    Numeric,
    ProfileEncoder,
    SpecError,
    cross_slots,
)

SPEC = FeatureSpec(
    item_categories=(Categorical("brand", 100), Categorical("words", 1_000)),
    item_numerics=(Numeric("price", 10.0, 2.0), Numeric("year", 2000.0, 10.0)),
    user_categories=(Categorical("segment", 10),),
    user_numerics=(Numeric("age", 40.0, 10.0),),
    crosses=("genre:a", "genre:b"),
    actions=("view", "click"),
    attributes=("bid", "in_stock"),
)


@dataclasses.dataclass
class SomeItem:
    features: Any = dataclasses.field(default_factory=dict)
    embedding: Any = (0.5, -1.0, 2.0)
    crosses: Any = ()
    attributes: Any = dataclasses.field(default_factory=dict)


def encode(*items: SomeItem, crosses: int = 3) -> Any:
    return ItemEncoder(SPEC, 3, crosses).columns(items)


GOOD = SomeItem(
    {"brand": "x", "words": ["red", "shoe"], "price": 12, "year": 1990.0, "unknown": {"any": "thing"}},
    [1, 2.5, True],
    ["genre:b", "genre:b", "other"],
    {"bid": 1.5, "in_stock": True, "title": "text"},
)


def test_columns_of_a_good_item() -> None:
    columns = encode(GOOD, SomeItem())
    assert columns.errors == [None, None]
    assert columns.embedding.tolist() == [[1.0, 2.5, 1.0], [0.5, -1.0, 2.0]]
    assert columns.features.offsets.tolist() == [0, 1, 3, 4]  # brand, two words; then one missing row each
    assert columns.features.ids[3:].tolist() == [0, 101]  # first row of each feature = missing
    assert columns.features.numerics[0].tolist() == [1.0, -1.0]
    assert columns.features.numerics[1].isnan().all()
    assert columns.crosses[0].tolist() == [2, cross_slots(SPEC, ["other"])[0], 0]  # equal slots once
    assert columns.attributes[0].tolist() == [1.5, 1.0]
    assert np.isnan(columns.attributes[1]).all()


def test_hash_is_the_same_for_ever() -> None:
    """Values fixed by hand: a bundle written today must read the same strings tomorrow."""
    columns = encode(SomeItem({"brand": "x", "words": ["red", "é"]}, crosses=["other"]))
    assert columns.features.ids.tolist() == [1 + 0x8CDC1683 % 100, 102 + 0xFA615F8F % 1000, 102 + 0x0E048D3E % 1000]
    assert columns.crosses[0, 0] == 3 + 0xD9583520 % (65_536 - 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": None}, "embedding is missing"),
        ({"embedding": [1.0, 2.0]}, "embedding has 2 values, the bundle needs 3"),
        ({"embedding": [1.0] * 4}, "embedding has 4 values, the bundle needs 3"),
        ({"embedding": ["1", 2.0, 3.0]}, "embedding holds a value that is not a number"),
        ({"embedding": [None, 2.0, 3.0]}, "embedding holds a value that is not a number"),
        ({"embedding": [math.nan, 2.0, 3.0]}, "embedding holds a value that is not finite in 32 bits"),
        ({"embedding": [math.inf, 2.0, 3.0]}, "embedding holds a value that is not finite in 32 bits"),
        ({"embedding": [1e300, 2.0, 3.0]}, "embedding holds a value that is not finite in 32 bits"),
        ({"embedding": [10**400, 2.0, 3.0]}, "embedding holds a value that is not a number"),
        ({"embedding": b""}, "embedding has 0 values, the bundle needs 3"),
        ({"embedding": bytes(16)}, "embedding has 4 values, the bundle needs 3"),
        ({"embedding": bytes(11)}, "embedding has 11 bytes, which are no 32-bit values"),
        ({"embedding": b"\0\0\x80\x7f" * 3}, "embedding holds a value that is not finite in 32 bits"),
        ({"embedding": b"\0\0\xc0\x7f" * 3}, "embedding holds a value that is not finite in 32 bits"),
        ({"features": {"brand": 7}}, "feature 'brand' is neither a string nor a list of strings"),
        ({"features": {"brand": False}}, "feature 'brand' is neither a string nor a list of strings"),
        ({"features": {"words": ["a", 7]}}, "feature 'words' holds a value that is not a string"),
        ({"features": {"words": ["a", ["b"]]}}, None),
        ({"features": {"price": "12"}}, "feature 'price' is not a number"),
        ({"features": {"price": True}}, "feature 'price' is not a number"),
        ({"features": {"price": math.nan}}, "feature 'price' is not finite"),
        ({"features": {"price": 10**400}}, None),
        ({"features": ["brand"]}, None),
        ({"crosses": [1]}, "crosses hold a value that is not a string"),
        ({"crosses": "genre:a"}, "crosses are not a list of strings"),
        ({"attributes": {"bid": 1e300}}, "an attribute does not fit 32 bits"),
        ({"attributes": {"bid": 10**400}}, None),
    ],
)
def test_a_bad_item_is_said_and_spoils_nothing(change: dict[str, Any], message: str | None) -> None:
    bad = dataclasses.replace(GOOD, **change)
    columns, alone = encode(GOOD, bad, SomeItem(), GOOD), encode(GOOD)
    assert [error is None for error in columns.errors] == [True, False, True, True]
    if message is not None:
        assert columns.errors[1] == message
    assert columns.embedding[1].tolist() == [0, 0, 0] or message == "an attribute does not fit 32 bits"
    for row in (0, 3):
        assert columns.embedding[row].tolist() == alone.embedding[0].tolist()
        assert columns.crosses[row].tolist() == alone.crosses[0].tolist()
        assert columns.attributes[row].tolist() == alone.attributes[0].tolist()
        assert columns.features.numerics[row].tolist() == alone.features.numerics[0].tolist()
    offsets, ids = columns.features.offsets.tolist(), columns.features.ids.tolist()
    assert len(offsets) == 8
    assert ids[: offsets[2]] == ids[offsets[6] :] == alone.features.ids.tolist()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["brand", "words", "price", "year", "bid", "x"])


@given(
    items=st.lists(
        st.builds(
            SomeItem,
            features=st.dictionaries(names, json_values, max_size=4),
            embedding=json_values | st.lists(st.floats(), min_size=3, max_size=3) | st.binary(max_size=16),
            crosses=st.lists(json_values, max_size=4),
            attributes=st.dictionaries(names, json_values, max_size=3),
        ),
        max_size=5,
    )
)
def test_whatever_arrives_is_encoded_or_refused(items: list[SomeItem]) -> None:
    columns = encode(*items)
    assert len(columns.errors) == len(items)
    assert len(columns.features.offsets) == 2 * len(items)
    assert np.isfinite(columns.embedding).all()
    assert not np.isinf(columns.attributes).any()
    assert columns.features.numerics.abs().nan_to_num(0).max() <= 8 if items else True
    alone = [encode(item).errors[0] for item in items]
    assert alone == columns.errors


words = st.sampled_from(["", "a", "b", "c", "genre:a", "genre:b"])


@given(
    items=st.lists(
        st.builds(
            SomeItem,
            features=st.fixed_dictionaries(
                {},
                optional={
                    "brand": words | st.none() | st.lists(words, max_size=3),
                    "words": st.lists(words, max_size=3) | st.tuples(words),
                    "price": st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
                },
            ),
            embedding=st.just((1, 2, 3)) | st.binary(min_size=12, max_size=12),
            crosses=st.lists(words, max_size=6) | st.just(()),
            attributes=st.none() | st.dictionaries(names, json_values, max_size=3),
        ),
        min_size=1,
        max_size=4,
    ),
    odd=st.none() | st.dictionaries(st.sampled_from(["features", "embedding", "crosses", "attributes"]), json_values),
)
def test_of_many_items_each_is_as_alone(items: list[SomeItem], odd: dict[str, Any] | None) -> None:
    items = items if odd is None else [*items, dataclasses.replace(items[0], **odd)]
    many = encode(*(items * MANY)[: MANY + 1])
    bags = np.split(many.features.ids.numpy(), many.features.offsets.numpy()[1:])
    for row, item in enumerate(items):
        alone = encode(item)
        assert many.errors[row] == alone.errors[0]
        for name in ("embedding", "crosses", "attributes"):
            np.testing.assert_array_equal(getattr(many, name)[row], getattr(alone, name)[0])
        np.testing.assert_array_equal(many.features.numerics[row], alone.features.numerics[0])
        own = np.split(alone.features.ids.numpy(), alone.features.offsets.numpy()[1:])
        assert [bag.tolist() for bag in bags[2 * row : 2 * row + 2]] == [bag.tolist() for bag in own]


def test_an_embedding_in_bytes_is_that_of_the_numbers() -> None:
    numbers = [0.1, 1 / 3, -2.5e-41]
    packed = encode(SomeItem(embedding=np.array(numbers, "<f4").tobytes()))
    np.testing.assert_array_equal(packed.embedding, encode(SomeItem(embedding=numbers)).embedding)


def test_array_embedding() -> None:
    assert encode(SomeItem(embedding=np.array([1, 2, 3], dtype=np.float32))).embedding.tolist() == [[1, 2, 3]]


def test_first_crosses_are_kept() -> None:
    slots = encode(SomeItem(crosses=["genre:b", "y", "genre:a", "z"]), crosses=2).crosses[0]
    assert slots.tolist() == cross_slots(SPEC, ["genre:b", "y"]).tolist()


@given(st.lists(st.text(min_size=1), max_size=20))
def test_unknown_crosses_never_take_a_slot_of_the_vocabulary(crosses: list[str]) -> None:
    for name, slot in zip(crosses, cross_slots(SPEC, crosses).tolist(), strict=True):
        assert 3 <= slot <= 65_535 or name in SPEC.crosses


def test_profiles() -> None:
    features = ProfileEncoder(SPEC).features([{"segment": "s", "age": 50}, None, {}])
    assert features.numerics[0].item() == 1.0
    assert features.numerics[1:].isnan().all()
    assert features.ids.tolist()[1:] == [0, 0]
    with pytest.raises(FeatureError, match="'segment'"):
        ProfileEncoder(SPEC).features([{"segment": 1}])


def test_action_codes() -> None:
    assert SPEC.action_codes(["click", "buy", "view"]).tolist() == [2, 0, 1]
    assert SPEC.action_codes([]).dtype == np.uint8


def test_spec_survives_json() -> None:
    assert FeatureSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC
    for fields in ({}, {**SPEC.to_json(), "item_categories": [{"name": "x"}]}, {**SPEC.to_json(), "crosses": None}):
        with pytest.raises(SpecError):
            FeatureSpec.from_json(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"crosses": ("a", "a")},
        {"actions": tuple(map(str, range(256)))},
        {"item_categories": (Categorical("a", 0),)},
        {"item_numerics": (Numeric("a", 0.0, 0.0),)},
        {"item_numerics": (Numeric("a", math.nan, 1.0),)},
        {"item_categories": (Categorical("a", 1),), "item_numerics": (Numeric("a", 0.0, 1.0),)},
        {"crosses": tuple(map(str, range(65_535)))},
    ],
)
def test_bad_specs(fields: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        FeatureSpec(**fields)
