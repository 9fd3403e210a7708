"""Settings: what a user can get wrong is named, and children get exactly the parent's."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.settings import Settings, SettingsError, environment, load, variable

_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)
_BY_TYPE: dict[type, st.SearchStrategy[object]] = {
    str: _TEXT,
    int: st.integers(1, 2**40),
    float: st.floats(0, 1e9),
    bool: st.booleans(),
    type(Path()): _TEXT.map(Path),
}


def test_defaults_without_environment() -> None:
    assert load({}) == Settings()


_PORT = st.integers(1, 65_535)
_BY_NAME = {field.name: _BY_TYPE[type(field.default)] for field in dataclasses.fields(Settings)} | {
    "kafka_port": _PORT,
    "kafka_controller_port": _PORT,
    "api_port": _PORT,
    "body_bytes": st.integers(16 << 20, 2**40),
    "cross_source": st.sampled_from(["", "http://features:9000", "https://features"]),
    "admin_token": st.from_regex(r"[A-Za-z0-9._~+/-]{1,20}={0,2}", fullmatch=True),
    "encoders": st.sampled_from(["local", "apart"]),
    "log_level": st.sampled_from(["debug", "info", "warning", "error", "INFO"]),
}


@given(st.builds(Settings, **_BY_NAME))  # type: ignore[arg-type]
def test_environment_and_back(settings: Settings) -> None:
    assert load(environment(settings)) == settings


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("API_PORT", "eighty"),
        ("FORERANK_PARTITIONS", "8.5"),
        ("FORERANK_PARTITIONS", "0"),
        ("FORERANK_TOMBSTONE_DAYS", "a week"),
        ("FORERANK_LOG_JSON", "maybe"),
        ("API_PROCESSES", "-1"),
        ("API_PORT", "99999"),
        ("API_PORT", "0"),
        ("FORERANK_KAFKA_PORT", "65536"),
        ("FORERANK_KAFKA_CONTROLLER_PORT", "-1"),
        ("FORERANK_LOG_LEVEL", "foo"),
        ("FORERANK_ENCODERS", "elsewhere"),
        ("FORERANK_CROSS_SOURCE", "features:9000"),
        ("FORERANK_CROSS_MISSES", "0"),
        ("FORERANK_BODY_BYTES", "16777215"),
        ("FORERANK_USER_MISSES", "0"),
    ],
)
def test_an_unusable_value_names_its_variable(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=name) as caught:
        load({name: text})
    assert text in str(caught.value)


@pytest.mark.parametrize("token", ["two words", "sécret", "line\n"])
def test_a_token_that_no_header_can_bear_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(SettingsError, match="FORERANK_ADMIN_TOKEN") as caught:
        load({"FORERANK_ADMIN_TOKEN": token})
    assert token not in str(caught.value)
    assert "s3cret" not in repr(load({"FORERANK_ADMIN_TOKEN": "s3cret"}))


def test_empty_counts_as_unset() -> None:
    assert load({"API_PORT": "", "KAFKA_BOOTSTRAP": ""}) == Settings()


def test_the_local_nodes_port_moves_its_address() -> None:
    settings = load({"FORERANK_KAFKA_PORT": "29092"})
    assert settings.kafka_bootstrap == "127.0.0.1:29092"
    assert "KAFKA_BOOTSTRAP" not in environment(settings)  # it would mean a broker that the user brought
    assert load({"FORERANK_KAFKA_PORT": "29092", "KAFKA_BOOTSTRAP": "other:9092"}).kafka_bootstrap == "other:9092"


def test_every_variable_is_distinct() -> None:
    names = [variable(field.name) for field in dataclasses.fields(Settings)]
    assert len(set(names)) == len(names)
