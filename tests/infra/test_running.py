"""The record of the running stack: what a user's command is about when it names no stack."""

import dataclasses
from pathlib import Path

import pytest

from infra.running import addressed, folder_of, forget, remember, running
from infra.settings import Settings


@pytest.fixture
def base(tmp_path: Path) -> Settings:
    return Settings(state=tmp_path / "state")


@pytest.fixture
def demo(base: Settings) -> Settings:
    one = dataclasses.replace(base, topic_prefix="movies.", state=base.state / "demo" / "movies" / "state")
    remember(folder_of(base), one)
    return one


def test_without_a_record_the_settings_are_meant(base: Settings) -> None:
    assert running(base) == addressed(base, {}) == base


def test_the_recorded_stack_is_meant_until_it_is_forgotten(base: Settings, demo: Settings) -> None:
    assert running(base) == addressed(base, {"FORERANK_STATE": ""}) == demo
    forget(folder_of(base))
    assert running(base) == base


@pytest.mark.parametrize("name", ["FORERANK_STATE", "FORERANK_TOPIC_PREFIX"])
def test_a_stack_that_the_environment_names_is_meant(base: Settings, demo: Settings, name: str) -> None:
    assert addressed(base, {name: "another"}) == base


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"topic_prefix": "a"}', '{"topic_prefix": "a", "state": 1}'])
def test_a_record_that_does_not_read_is_none(base: Settings, text: str) -> None:
    folder_of(base).mkdir(parents=True)
    (folder_of(base) / "stack.json").write_text(text)
    assert running(base) == base
