"""The roll-out: reduction of `models`, the state machine, and the file the API reads."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams import rollout
from streams.events import ModelEvent
from streams.rollout import Refused, Serving, Verification


def stage(name: str, *, sha: str = "a", when_complete: bool = True) -> ModelEvent:
    return ModelEvent("stage", name, f"file:///{sha}", sha * 64, when_complete)


def activate(name: str, share: float | None = None) -> ModelEvent:
    return ModelEvent("activate", name, share=share)


def complete(serving: Serving, name: str) -> Serving:
    serving = rollout.advance(rollout.fill(serving, name, [10, 0]), name, [9, -1], [True, True])
    return rollout.verified(serving, name, Verification(verdict="yes"))


def staged(*names: str) -> Serving:
    serving = Serving()
    for offset, name in enumerate(names):
        serving = rollout.stage(serving, offset, stage(name))
    return serving


def test_one_generation_from_stage_to_serving_and_back() -> None:
    serving = staged("a", "b")
    assert serving.generations["a"].state == "staged"
    serving = rollout.activate(complete(serving, "a"), "a")
    assert (serving.active, serving.previous, serving.generations["a"].state) == ("a", None, "active")
    serving = rollout.activate(complete(serving, "b"), "b")
    assert (serving.active, serving.previous, serving.generations["a"].state) == ("b", "a", "former")
    serving = rollout.activate(serving, "a")
    assert (serving.active, serving.previous, serving.generations["b"].state) == ("a", "b", "former")


def test_what_is_filled_is_complete_once_it_is_verified_and_an_activation_waits_for_that(tmp_path: Path) -> None:
    serving = rollout.activate(complete(staged("a", "b"), "a"), "a")
    serving = rollout.advance(rollout.fill(serving, "b", [10, 0]), "b", [9, -1], [True, True])
    wishes = rollout.reduce_models([(0, stage("a")), (1, stage("b"))])
    assert (rollout.next_active(wishes, serving), rollout.pending(wishes, serving)) == (None, "b")
    assert rollout.running(serving) == ["a", "b"]
    with pytest.raises(Refused, match="verifying"):
        rollout.activate(serving, "b")
    later = rollout.verified(serving, "b", Verification(verdict="again", reason="the broker is away"))
    assert (later.generations["b"].state, later.generations["b"].reason) == ("verifying", "the broker is away")
    assert rollout.next_active(wishes, later) is None
    done = rollout.verified(later, "b", Verification(verdict="yes"))
    assert (done.generations["b"].state, done.generations["b"].reason) == ("complete", "")
    assert rollout.next_active(wishes, done) == "b"
    bad = rollout.verified(later, "b", Verification(verdict="no", reason="rows are missing"))
    assert (bad.generations["b"].state, bad.generations["b"].reason, bad.active) == ("failed", "rows are missing", "a")
    with pytest.raises(Refused, match="failed"):
        rollout.verified(bad, "b", Verification(verdict="yes"))

    path = tmp_path / "verify.json"
    assert rollout.read_verification(path) is None
    found = Verification(verdict="no", reason="x", rows=3, error=0.5, shift=-1.5, unsaid=["y"])
    rollout.write_beside(path, found)
    assert rollout.read_verification(path) == found
    path.write_text("{")
    torn = rollout.read_verification(path)
    assert torn is not None
    assert torn.verdict == "again"


def test_complete_needs_every_partition_covered_and_proven() -> None:
    serving = rollout.fill(staged("a"), "a", [10, 0])
    for covered, filled in (([8, -1], [True, True]), ([9, -1], [True, False]), ([-1, -1], [False, False])):
        found = rollout.advance(serving, "a", covered, filled).generations["a"]
        assert (found.state, bool(found.reason)) == ("filling", True)
    assert rollout.advance(serving, "a", [4, -1], [True, True]).generations["a"].progress == 0.5
    assert rollout.advance(serving, "a", [12, 3], [True, True]).generations["a"].state == "verifying"
    empty = rollout.fill(staged("a"), "a", [0, 0])
    assert rollout.advance(empty, "a", [-1, -1], [True, False]).generations["a"].state == "filling"
    assert rollout.advance(empty, "a", [-1, -1], [True, True]).generations["a"].state == "verifying"


def test_activation_is_refused_with_a_reason_unless_complete() -> None:
    serving = staged("a")
    for state, reason in ((serving, "staged"), (rollout.fill(serving, "a", [1, 1]), "filling")):
        with pytest.raises(Refused, match=reason):
            rollout.activate(state, "a")
    with pytest.raises(Refused, match="not staged"):
        rollout.activate(serving, "b")
    with pytest.raises(Refused, match=r"failed \(no such bundle\)"):
        rollout.activate(rollout.fail(serving, "a", "no such bundle"), "a")
    third = staged("a", "b", "c")
    for name in "abc":
        third = rollout.activate(complete(third, name), name)
    with pytest.raises(Refused, match="former and is not kept fresh"):
        rollout.activate(third, "a")


def test_what_is_never_served_here_is_told_from_what_may_be() -> None:
    serving = staged("a", "b", "c", "d")
    for name in "abc":
        assert rollout.never(serving, name) == ""
        serving = rollout.activate(complete(serving, name), name)
    found = {name: rollout.never(serving, name) for name in "abcde"}
    assert set(found.values()) == {""}  # a is filled up again first
    assert rollout.never(rollout.lose(serving, "b", [1, 1]), "b") == ""
    failed = rollout.fail(serving, "d", "bad bundle")
    assert rollout.never(failed, "d") == "generation d is failed (bad bundle) and cannot be activated"


def test_a_failure_never_takes_the_live_generation_away() -> None:
    serving = rollout.activate(complete(staged("a", "b"), "a"), "a")
    failed = rollout.fail(serving, "b", "bad bundle")
    assert (failed.active, failed.generations["b"].state, failed.generations["b"].reason) == (
        "a",
        "failed",
        "bad bundle",
    )
    assert rollout.running(failed) == ["a"]
    hurt = rollout.fail(serving, "a", "needs refill")
    assert (hurt.active, hurt.generations["a"].state, hurt.generations["a"].reason) == ("a", "active", "needs refill")


def test_names_are_never_used_twice() -> None:
    with pytest.raises(Refused, match="never used twice"):
        rollout.stage(staged("a"), 9, stage("a", sha="b"))
    assert rollout.stage(staged("a"), 9, stage("a")) == staged("a")  # the same event again
    desired = rollout.reduce_models([(0, stage("a")), (1, stage("a")), (2, stage("a", sha="b"))])
    assert list(desired.refused) == [2]
    assert {name for _, name in desired.wishes} == {"a"}


def test_a_bundle_that_is_staged_again_to_be_activated_is_wished_for() -> None:
    log = [(0, stage("a")), (1, stage("b", when_complete=False)), (2, stage("b"))]
    desired = rollout.reduce_models(log)
    assert (desired.wishes, desired.refused, desired.staged["b"].offset) == ([(0, "a"), (2, "b")], {}, 1)
    serving = rollout.activate(complete(complete(staged("a", "b"), "a"), "b"), "a")
    assert rollout.next_active(desired, serving) == "b"
    assert rollout.reduce_models([*log, (3, stage("b", when_complete=False))]).wishes == desired.wishes
    gone_back = [*log, (3, ModelEvent("rollback", "b")), (4, stage("b"))]
    assert rollout.reduce_models(gone_back).wishes == [(0, "a"), (4, "b")]


def test_staging_again_what_has_failed_here_is_no_use() -> None:
    serving = staged("a")
    assert (rollout.spent(serving, "a"), rollout.spent(serving, "b")) == ("", "")
    said = rollout.spent(rollout.fail(serving, "a", "no room"), "a")
    assert said == "generation a is failed here (no room): stage the bundle under a new name"


def test_jobs_run_for_the_active_one_one_former_and_later_ones() -> None:
    serving = staged("a", "b", "c", "d")
    assert rollout.running(serving) == ["a", "b", "c", "d"]
    serving = rollout.activate(complete(serving, "c"), "c")
    assert rollout.running(serving) == ["c", "d"]
    serving = rollout.activate(complete(serving, "d"), "d")
    assert rollout.running(serving) == ["c", "d"]


def test_reduction_of_models() -> None:
    log = [
        (0, activate("z")),
        (1, stage("a")),
        (2, stage("b", when_complete=False)),
        (3, activate("b")),
        (4, ModelEvent("rollback", "a")),
        (5, stage("c")),
        (6, ModelEvent("retire", "a")),
        (7, activate("a")),
    ]
    desired = rollout.reduce_models(log)
    assert desired.wishes == [(3, "b"), (5, "c")]
    assert sorted(desired.refused) == [0, 7]


def test_a_rollback_goes_to_the_newest_other_wish_and_is_refused_where_there_is_none() -> None:
    log = [(0, stage("a")), (1, ModelEvent("rollback", "a")), (2, stage("b"))]
    assert rollout.reduce_models(log).refused == {1: "there is nothing to go back to from generation a"}
    never = rollout.reduce_models(
        [(0, stage("a")), (1, stage("b", when_complete=False)), (2, ModelEvent("rollback", "b"))]
    )
    assert never.refused == {2: "generation b was not to be served, so there is nothing to go back from"}
    serving = rollout.activate(complete(staged("a", "b"), "a"), "a")
    serving = rollout.activate(complete(serving, "b"), "b")
    log.append((3, ModelEvent("rollback", "b")))
    desired = rollout.reduce_models(log)
    assert desired.wishes == [(0, "a")]
    assert rollout.next_active(desired, serving) == "a"
    serving = rollout.activate(serving, "a")
    assert (serving.active, serving.previous) == ("a", "b")
    assert rollout.running(serving) == ["a", "b"]  # what was left stays fresh
    assert rollout.next_active(desired, serving) is None
    again = rollout.reduce_models([*log, (4, ModelEvent("rollback", "b")), (5, activate("b"))])
    assert rollout.next_active(again, serving) == "b"


def test_a_rollback_of_what_is_not_served_only_drops_the_wish() -> None:
    serving = rollout.activate(complete(staged("a", "b"), "a"), "a")
    desired = rollout.reduce_models([(0, stage("a")), (1, stage("b")), (2, ModelEvent("rollback", "b"))])
    assert (desired.wishes, desired.refused) == ([(0, "a")], {})
    assert rollout.next_active(desired, complete(serving, "b")) is None


def test_an_activation_waits_until_its_generation_is_complete() -> None:
    """Also of a generation staged before the active one, on a host that does not know it, and over a failure."""
    serving = rollout.activate(complete(staged("a", "b", "c"), "b"), "b")
    log = [(0, stage("a", when_complete=False)), (1, stage("b")), (2, stage("c")), (3, activate("a"))]
    desired = rollout.reduce_models(log)
    assert (rollout.pending(desired, serving), rollout.next_active(desired, serving)) == ("a", None)
    assert rollout.running(serving) == ["b", "c"]
    assert rollout.running(serving, ["a"]) == ["a", "b", "c"]
    elsewhere = rollout.activate(complete(rollout.stage(Serving(), 1, stage("b")), "b"), "b")
    assert rollout.wanted(desired, elsewhere) == ["a", "c"]
    assert rollout.pending(desired, rollout.fail(serving, "a", "bad")) == "c"
    assert rollout.next_active(desired, complete(serving, "a")) == "a"
    served = rollout.activate(complete(serving, "a"), "a")
    assert rollout.pending(desired, served) is None


@pytest.mark.parametrize("event", [ModelEvent("rollback", "b"), activate("a"), activate("a", 0.1)])
def test_what_was_served_long_ago_is_filled_up_before_it_is_served_again(event: ModelEvent) -> None:
    """Two rollbacks in a row, or what else wishes for it; what is served meanwhile goes on, and goes on being fresh."""
    serving = staged("a", "b", "c")
    for name in "abc":
        serving = rollout.activate(complete(serving, name), name)
    log = [(0, stage("a")), (1, stage("b")), (2, stage("c")), (3, ModelEvent("rollback", "c"))]
    desired = rollout.reduce_models(log)
    assert rollout.renew(desired, serving) == serving
    serving = rollout.activate(serving, rollout.next_active(desired, serving) or "")
    assert (serving.active, serving.previous, serving.generations["a"].state) == ("b", "c", "former")
    desired = rollout.reduce_models([*log, (4, event)])
    assert (rollout.next_active(desired, serving), rollout.canary_of(desired, serving)) == (None, None)
    renewed = rollout.renew(desired, serving)
    assert rollout.renew(desired, renewed) == renewed
    assert (renewed.active, renewed.previous, renewed.generations["a"].state) == ("b", "c", "staged")
    assert rollout.running(renewed, rollout.waiting(desired, renewed)) == ["a", "b", "c"]
    filled = complete(renewed, "a")
    if event.share is not None:
        assert rollout.canary_of(desired, filled) == rollout.Canary("a", 0.1)
        return
    assert rollout.next_active(desired, filled) == "a"
    assert rollout.wanted(desired, Serving()) == ["a", "b", "c"]  # a host that knows none of them comes to the same
    failed = rollout.fail(renewed, "a", "there is no bundle")
    assert rollout.pending(desired, failed) is None


def test_a_host_that_has_nothing_to_roll_back_to_says_why() -> None:
    log = [(0, stage("a")), (1, stage("b")), (2, ModelEvent("rollback", "b"))]
    desired = rollout.reduce_models(log)
    serving = rollout.activate(complete(rollout.fail(staged("a", "b"), "a", "bad"), "b"), "b")
    assert rollout.stuck(desired, serving, "b") == "generation a is failed (bad) and cannot be activated"
    assert (rollout.stuck(desired, serving, "a"), rollout.stuck(desired, Serving(), "b")) == ("", "")
    assert rollout.stuck(rollout.reduce_models([(0, stage("c")), *log[1:]]), serving, "b") == ""


def retire(name: str) -> ModelEvent:
    return ModelEvent("retire", name)


def test_what_is_to_be_served_and_what_a_rollback_would_go_to_are_not_retired() -> None:
    log = [(0, stage("a")), (1, stage("b")), (2, stage("c")), (3, stage("d", when_complete=False))]
    for name, said in (("c", "is the one to be served"), ("b", "a rollback from c would go to"), ("e", "never staged")):
        desired = rollout.reduce_models([*log, (4, retire(name))])
        assert said in desired.refused[4]
        assert (desired.retired, desired.wishes) == (set(), [(0, "a"), (1, "b"), (2, "c")])
    for name in ("a", "d"):
        desired = rollout.reduce_models([*log, (4, retire(name)), (5, retire(name))])
        assert (desired.retired, desired.refused) == ({name}, {})
    away = rollout.reduce_models([*log, (4, ModelEvent("rollback", "c")), (5, retire("c")), (6, retire("a"))])
    assert (away.retired, list(away.refused)) == ({"c"}, [6])
    alone = rollout.reduce_models([(0, stage("a")), (1, retire("a"))])
    assert "is the one to be served" in alone.refused[1]


def test_a_retired_name_is_never_used_again() -> None:
    log = [(0, stage("a")), (1, stage("b")), (2, stage("c")), (3, retire("a"))]
    desired = rollout.reduce_models([*log, (4, stage("a")), (5, activate("a")), (6, ModelEvent("rollback", "a"))])
    assert "never used twice" in desired.refused[4]
    assert desired.refused[5] == "generation a was retired"
    assert desired.wishes == [(1, "b"), (2, "c")]
    assert (
        rollout.wanted(rollout.reduce_models([(0, stage("a", when_complete=False)), (1, retire("a"))]), Serving()) == []
    )


def test_each_state_but_active_is_retired() -> None:
    """And only what the log retires; what was the one before is so no longer."""
    new = staged("a", "b")
    filling = rollout.fill(new, "a", [10, 0])
    failed = rollout.fail(filling, "a", "bad")
    former = rollout.activate(rollout.activate(complete(complete(new, "a"), "b"), "a"), "b")
    desired = rollout.reduce_models([(0, stage("a")), (1, stage("b")), (2, stage("c")), (3, retire("a"))])
    for serving in (new, filling, complete(new, "a"), failed, former):
        assert rollout.retiring(desired, serving) == ["a"]
        leaving = rollout.retire(serving, "a")
        assert (leaving.generations["a"].state, leaving.generations["a"].reason) == ("retiring", "")
        assert (leaving.active, leaving.previous) == (serving.active, None)
        assert "a" not in rollout.running(leaving)
        assert rollout.retiring(desired, rollout.wait(leaving, "a", "it is used")) == ["a"]
        gone = rollout.retired(rollout.wait(leaving, "a", "it is used"), "a")
        assert (gone.generations["a"].state, gone.generations["a"].reason) == ("retired", "")
        assert (rollout.retiring(desired, gone), rollout.next_active(desired, gone)) == (
            [],
            rollout.next_active(desired, serving),
        )
        with pytest.raises(Refused, match="retired and cannot be"):
            rollout.activate(gone, "a")
    with pytest.raises(Refused, match="cannot be called retired"):
        rollout.retired(new, "a")


def test_what_this_host_still_serves_is_retired_when_another_one_is_ready() -> None:
    serving = rollout.activate(complete(staged("a", "b", "c"), "a"), "a")
    desired = rollout.reduce_models([(0, stage("a")), (1, stage("b")), (2, stage("c")), (3, retire("a"))])
    assert (rollout.retiring(desired, serving), rollout.pending(desired, serving)) == ([], "c")
    with pytest.raises(Refused, match="is served and cannot be retired"):
        rollout.retire(serving, "a")
    serving = rollout.activate(complete(serving, "c"), "c")
    assert rollout.retiring(desired, serving) == ["a"]


def test_what_a_host_cannot_do_without_although_the_log_would_retire_it() -> None:
    """The two newest wishes have failed here."""
    log = [(0, stage("a")), (1, stage("b")), (2, stage("c")), (3, stage("d"))]
    desired = rollout.reduce_models(log)
    serving = staged("a", "b", "c", "d")
    for name in "ab":
        serving = rollout.activate(complete(serving, name), name)
    for name in "cd":
        serving = rollout.fail(serving, name, "bad")
    assert "is the one to be served" in rollout.kept(desired, serving, "b")
    assert "a rollback from b would go to" in rollout.kept(desired, serving, "a")
    assert (rollout.kept(desired, serving, "c"), rollout.kept(desired, Serving(), "a")) == ("", "")
    back = rollout.activate(serving, "a")
    assert rollout.kept(rollout.reduce_models([*log, (4, ModelEvent("rollback", "b"))]), back, "b") == ""


def test_a_new_host_stages_only_what_it_will_need() -> None:
    desired = rollout.reduce_models([(0, stage("a")), (1, stage("b")), (2, stage("c", when_complete=False))])
    assert rollout.wanted(desired, Serving()) == ["b", "c"]
    failed = rollout.fail(rollout.stage(Serving(), 1, stage("b")), "b", "bad")
    assert rollout.wanted(desired, failed) == ["a", "c"]
    assert rollout.wanted(rollout.reduce_models([(2, stage("c", when_complete=False))]), Serving()) == ["c"]


def test_the_newest_possible_wish_is_served() -> None:
    desired = rollout.reduce_models([(0, stage("a")), (1, stage("b")), (2, stage("c"))])
    serving = complete(staged("a", "b", "c"), "a")
    assert rollout.next_active(desired, serving) == "a"
    serving = rollout.activate(serving, "a")
    assert rollout.next_active(desired, serving) is None
    serving = complete(rollout.fail(serving, "c", "bad"), "b")
    assert rollout.next_active(desired, serving) == "b"
    serving = rollout.activate(serving, "b")
    assert rollout.next_active(desired, serving) is None
    back = rollout.reduce_models([(0, stage("a")), (1, stage("b")), (2, stage("c")), (3, activate("a"))])
    assert rollout.next_active(back, serving) == "a"


NAMES_USED = ["a", "b", "c"]
NAMES = st.sampled_from(NAMES_USED)
EVENTS = st.lists(
    st.one_of(
        st.builds(stage, NAMES, sha=st.sampled_from("xy"), when_complete=st.booleans()),
        st.builds(activate, NAMES, st.sampled_from([None, 0.1, 0.5, 1.0])),
        st.builds(ModelEvent, st.sampled_from(["rollback", "retire"]), NAMES),
    ),
    max_size=12,
)


@given(EVENTS, st.data())
def test_any_history_keeps_the_rules(log: list[ModelEvent], data: st.DataObject) -> None:
    """Random events and random progress: at most one active generation, it was complete before, and replay adds
    nothing.
    """
    serving, been_complete = Serving(), set()
    desired = rollout.reduce_models([])
    for end in range(1, len(log) + 1):
        desired = rollout.reduce_models(enumerate(log[:end]))
        for name in rollout.wanted(desired, serving):
            serving = rollout.stage(serving, desired.staged[name].offset, desired.staged[name].event)
        for name in rollout.running(serving, rollout.waiting(desired, serving)):
            step = data.draw(st.sampled_from(["stay", "complete", "fail"]))
            if step == "complete" and serving.generations[name].state == "staged":
                serving = complete(serving, name)
                been_complete.add(name)
            elif step == "fail":
                serving = rollout.fail(serving, name, "reason")
        chosen = rollout.next_active(desired, serving)
        if chosen != serving.previous:
            serving = rollout.prepare(serving, chosen)
        if chosen is not None and data.draw(st.booleans()):
            serving = rollout.activate(serving, chosen)
        if data.draw(st.booleans()):
            serving = msgspec.structs.replace(serving, canary=rollout.canary_of(desired, serving))
        serving = rollout.renew(desired, serving)
        serving = rollout.rest(serving, rollout.running(serving, rollout.waiting(desired, serving)))
        for name in rollout.retiring(desired, serving):
            serving = rollout.retire(serving, name)
            if data.draw(st.booleans()):
                serving = rollout.retired(serving, name)
        assert not set(rollout.running(serving)) & desired.retired - {serving.active}
        fresh = rollout.running(serving, rollout.waiting(desired, serving))
        assert {name for name, known in serving.generations.items() if known.state == "complete"} <= set(fresh)
        active = [name for name, known in serving.generations.items() if known.state == "active"]
        assert active == ([serving.active] if serving.active else [])
        assert set(active) <= been_complete
        assert serving.active is None or serving.active in rollout.running(serving)
        for name in (serving.next, serving.canary.generation if serving.canary else None):
            assert name is None or serving.generations[name].state in ("complete", "former")
        if serving.canary is not None:
            assert serving.canary.generation in rollout.running(serving)
            assert serving.canary.generation != serving.active
            assert serving.canary.generation in been_complete
    if (chosen := rollout.next_active(desired, serving)) is not None:
        serving = rollout.activate(serving, chosen)
    assert rollout.next_active(desired, serving) is None
    assert rollout.reduce_models(enumerate(log)) == desired

    for _ in range(len(NAMES_USED) + 1):  # where nothing fails any more, each pending wish comes true
        waits = rollout.pending(desired, serving)
        if waits is None:
            break
        serving = rollout.renew(desired, serving)
        assert waits in rollout.wanted(desired, serving) or waits in rollout.running(serving, [waits])
        if waits not in serving.generations:
            serving = rollout.stage(serving, desired.staged[waits].offset, desired.staged[waits].event)
        serving = rollout.activate(complete(serving, waits), waits)
    assert rollout.pending(desired, serving) is None


@given(EVENTS)
def test_what_the_log_says_of_shares(log: list[ModelEvent]) -> None:
    """A model of its own: who serves a share is whoever was given one last and has not been ended since."""
    desired, expected = rollout.reduce_models([]), None
    for offset, event in enumerate(log):
        before, desired = desired, rollout.reduce_models(enumerate(log[: offset + 1]))
        newest = desired.wishes[-1][1] if desired.wishes else None
        if offset not in desired.refused:
            if event.action == "activate" and event.share in (0.1, 0.5):
                expected = rollout.Canary(event.generation, event.share)
                assert before.wishes == desired.wishes
                assert newest not in (None, event.generation)
            elif expected is not None and expected.generation == event.generation and event.action != "stage":
                expected = None
        if expected is not None and expected.generation == newest:
            expected = None
        assert desired.canary == expected
        if offset in desired.refused:
            assert (desired.canary, desired.wishes) == (before.canary, before.wishes)
        assert desired.canary is None or desired.canary.generation in desired.staged.keys() - desired.retired


@given(st.from_regex(r"[a-z0-9][a-z0-9.-]{0,63}", fullmatch=True), st.text(max_size=40))
def test_every_user_has_a_place_that_no_share_moves(generation: str, user_id: str) -> None:
    """So whoever is of a share is of every greater one too."""
    place = rollout.bucket(generation, user_id)
    assert 0 <= place < 1
    assert place == rollout.bucket(generation, user_id)


def test_shares_are_as_large_as_they_say_and_canaries_have_users_of_their_own() -> None:
    users = [f"u{number}" for number in range(20_000)]
    places = np.array([[rollout.bucket(name, user) for name in ("g1", "g2")] for user in users])
    for share in (0.01, 0.05, 0.5, 0.99):
        deviation = np.sqrt(share * (1 - share) / len(users))
        assert np.abs((places < share).mean(0) - share).max() < 5 * deviation
    both = (places < 0.5).all(1).mean()
    assert abs(both - 0.25) < 5 * np.sqrt(0.25 * 0.75 / len(users))
    assert rollout.bucket("g1", "u1") == 0.2528561231566253  # for ever: a new version moves nobody


def test_a_share_ends_with_an_activation_for_all_a_rollback_or_a_retirement() -> None:
    log = [(0, stage("a")), (1, stage("b", when_complete=False)), (2, activate("b", 0.1))]
    assert rollout.reduce_models(log).canary == rollout.Canary("b", 0.1)
    assert rollout.reduce_models([*log, (3, activate("b", 0.3))]).canary == rollout.Canary("b", 0.3)
    for event in (activate("b"), activate("b", 1.0), ModelEvent("rollback", "b"), retire("b")):
        desired = rollout.reduce_models([*log, (3, event)])
        assert (desired.canary, desired.refused) == (None, {})
    other = [*log, (3, stage("c"))]
    assert rollout.reduce_models(other).canary == rollout.Canary("b", 0.1)  # beside c now
    assert rollout.reduce_models([*other, (4, activate("a", 0.1))]).canary == rollout.Canary("a", 0.1)

    refused = rollout.reduce_models([(0, stage("a", when_complete=False)), (1, activate("a", 0.1))]).refused
    assert refused == {1: "there is no generation beside which a could serve a share"}
    assert "is the one that serves all" in rollout.reduce_models([(0, stage("a")), (1, activate("a", 0.1))]).refused[1]
    # what becomes the newest wish by another one's rollback does not fall back to a share later
    log = [(0, stage("a")), (1, stage("b")), (2, activate("a", 0.1)), (3, ModelEvent("rollback", "b")), (4, stage("c"))]
    assert rollout.reduce_models(log).canary is None


def test_a_host_serves_a_share_when_it_can_and_until_the_same_serves_all() -> None:
    """Its jobs go on, also as a former generation and when it was staged before the active one."""
    log = [(0, stage("a", when_complete=False)), (1, stage("b")), (2, activate("a", 0.1))]
    desired = rollout.reduce_models(log)
    new = rollout.activate(complete(rollout.stage(Serving(), 1, stage("b")), "b"), "b")
    assert rollout.wanted(desired, new) == ["a"]
    serving = rollout.stage(new, 0, stage("a", when_complete=False))
    assert rollout.canary_of(desired, serving) is None
    assert rollout.running(serving, rollout.waiting(desired, serving)) == ["b", "a"]
    serving = complete(serving, "a")
    canary = rollout.Canary("a", 0.1)
    assert rollout.canary_of(desired, serving) == canary
    shared = msgspec.structs.replace(serving, canary=canary)
    assert rollout.running(shared) == ["b", "a"]

    all_users = rollout.reduce_models([*log, (3, activate("a"))])
    assert (all_users.canary, rollout.canary_of(all_users, shared)) == (None, canary)
    served = rollout.activate(shared, "a")
    assert (served.active, served.previous, served.canary) == ("a", "b", None)
    assert rollout.canary_of(desired, served) is None
    for ended in (rollout.fail(shared, "a", "bad"), rollout.retire(shared, "a")):
        assert (ended.active, ended.canary, rollout.canary_of(desired, ended)) == ("b", None, None)

    back = msgspec.structs.replace(served, canary=rollout.Canary("b", 0.5))  # of the one before
    shares = rollout.reduce_models([(0, stage("b")), (1, stage("a")), (2, activate("b", 0.5))])
    lost = rollout.lose(back, "b", [10, 0])
    assert (rollout.canary_of(shares, back), rollout.canary_of(shares, lost)) == (back.canary, None)
    assert rollout.prepare(rollout.renew(shares, rollout.prepare(lost, "b")), None) == lost  # its reason stays
    assert rollout.canary_of(shares, rollout.regain(lost, "b")) == back.canary
    third = rollout.activate(complete(rollout.stage(back, 5, stage("c")), "c"), "c")
    assert (third.previous, third.canary, third.generations["b"].state) == ("a", rollout.Canary("b", 0.5), "former")
    assert rollout.running(third) == ["b", "a", "c"]
    assert rollout.activate(third, "b").active == "b"


def test_what_has_no_jobs_is_complete_no_longer_and_fills_up_when_it_is_wanted() -> None:
    log = [(0, stage("a", when_complete=False)), (1, stage("b"))]
    serving = complete(complete(staged("a", "b"), "a"), "b")
    assert rollout.rest(serving, rollout.running(serving)) == serving  # nothing is served yet: both may be wanted
    serving = rollout.activate(serving, "b")
    serving = rollout.rest(serving, rollout.running(serving))
    assert serving.generations["a"].state == "staged"
    assert "not kept fresh" in serving.generations["a"].reason
    copied = rollout.wait(serving, "a", "its bundle is being copied")  # for the sake of a wish that is none any more
    assert rollout.rest(copied, rollout.running(copied)) == serving
    for event, canary in ((activate("a"), None), (activate("a", 0.1), rollout.Canary("a", 0.1))):
        desired = rollout.reduce_models([*log, (2, event)])
        assert (rollout.next_active(desired, serving), rollout.canary_of(desired, serving)) == (None, None)
        assert "a" in rollout.running(serving, rollout.waiting(desired, serving))
        filled = complete(serving, "a")
        assert filled.generations["a"].reason == ""
        wished = rollout.next_active(desired, filled), rollout.canary_of(desired, filled)
        assert wished == ("a" if canary is None else None, canary)


def test_the_file_is_replaced_whole_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "state" / "serving.json"
    assert rollout.read(path) == Serving()
    versions = [staged(*(f"g{k}" for k in range(size))) for size in (1, 300)]
    rollout.write(path, versions[0])
    stop = threading.Event()

    def keep_writing() -> None:
        for turn in range(10_000):
            rollout.write(path, versions[turn % 2])
            if stop.is_set():
                return

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        for _ in range(300):
            assert rollout.read(path) in versions
    finally:
        stop.set()
        writer.join()


def test_rows_that_are_lost_have_to_come_further_before_the_generation_is_ready_again() -> None:
    serving = rollout.activate(complete(staged("a", "b", "c"), "a"), "a")
    serving = complete(rollout.activate(complete(serving, "b"), "b"), "c")
    for name in "abc":
        serving = rollout.lose(serving, name, [20, 5])
    states = {name: (known.state, known.reason) for name, known in serving.generations.items()}
    assert states == {"a": ("former", rollout.REMADE), "b": ("active", rollout.REMADE), "c": ("filling", "")}
    assert (serving.active, serving.previous) == ("b", "a")
    with pytest.raises(Refused, match="generation a is not ready: its rows are not all on this host"):
        rollout.activate(serving, "a")
    log = [(0, stage("a")), (1, stage("b")), (2, stage("c", when_complete=False)), (3, ModelEvent("rollback", "b"))]
    desired = rollout.reduce_models(log)
    assert rollout.next_active(desired, serving) is None  # what is served goes on
    assert rollout.try_again(serving) == serving
    known = serving.generations["a"]
    for covered, filled in (([9, 4], [True, True]), ([19, 4], [True, False])):
        assert not rollout.whole(known, covered, filled)
    assert rollout.whole(known, [30, 4], [True, True])
    assert rollout.next_active(desired, rollout.regain(serving, "a")) == "a"
    assert rollout.advance(serving, "c", [19, 4], [True, True]).generations["c"].state == "verifying"


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "serving.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(Serving(), format=2)))
    with pytest.raises(Refused, match="format 2"):
        rollout.read(path)
    path.write_bytes(b"{")
    with pytest.raises(Refused, match="not a serving file"):
        rollout.read(path)


def test_the_reason_of_an_active_generation_lasts_until_its_jobs_try_again() -> None:
    serving = rollout.fail(rollout.activate(complete(staged("a"), "a"), "a"), "a", "needs refill")
    assert (serving.generations["a"].state, serving.generations["a"].reason) == ("active", "needs refill")
    assert rollout.try_again(serving).generations["a"].reason == ""
    failed = rollout.fail(staged("b"), "b", "bad bundle")
    assert rollout.try_again(failed) == failed


def test_what_a_staged_generation_waits_for_is_forgotten_when_it_fills() -> None:
    serving = rollout.wait(staged("a"), "a", "the broker is away")
    assert (serving.generations["a"].state, serving.generations["a"].reason) == ("staged", "the broker is away")
    assert rollout.fill(serving, "a", [1]).generations["a"].reason == ""
    with pytest.raises(Refused):
        rollout.wait(rollout.activate(complete(serving, "a"), "a"), "a", "the broker is away")


def test_the_next_generation_is_loaded_before_it_is_served() -> None:
    serving = rollout.activate(complete(staged("a", "b", "c"), "a"), "a")
    with pytest.raises(Refused, match="staged and cannot be loaded"):
        rollout.prepare(serving, "b")
    serving = complete(complete(serving, "b"), "c")
    waiting = rollout.wait(rollout.prepare(serving, "b"), "b", "API process 7 has not loaded it yet")
    assert (waiting.active, waiting.next, waiting.generations["b"].state) == ("a", "b", "complete")
    assert rollout.prepare(waiting, "b") == waiting
    served = rollout.activate(waiting, "b")
    assert (served.active, served.previous, served.next, served.generations["b"].reason) == ("b", "a", None, "")

    other = rollout.prepare(waiting, "c")  # the wish has changed meanwhile
    assert (other.next, other.generations["b"].reason) == ("c", "")
    assert rollout.prepare(waiting, None) == serving
    failed = rollout.fail(waiting, "b", "bad")
    assert (failed.next, failed.generations["b"].reason) == (None, "bad")
    assert rollout.fail(waiting, "c", "bad").next == "b"
    assert rollout.retire(waiting, "b").next is None


def test_a_file_of_before_there_was_a_next_generation_is_read(tmp_path: Path) -> None:
    path = tmp_path / "serving.json"
    path.write_text('{"active":"a","previous":null,"generations":{},"decided":3,"refused":{},"format":1}')
    assert rollout.read(path) == Serving(active="a", decided=3)
