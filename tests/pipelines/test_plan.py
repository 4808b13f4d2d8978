"""The plan: every user trains once, packs are bounded, work is spread evenly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.plan import IndexRow, Plan, PlannedUser, Rules, make_packs, plan_users
from ptuning.errors import RunError
from ptuning.registry.base import Current, Version


def _users(tokens: list[int]) -> list[PlannedUser]:
    return [
        PlannedUser(
            user_key=f"user{n:04d}",
            tokens=count,
            data_digest="d",
            training_digest=f"t{n}",
        )
        for n, count in enumerate(tokens)
    ]


_tokens = st.lists(st.integers(min_value=0, max_value=10_000), max_size=80)


@given(_tokens, st.integers(1, 20), st.integers(1, 6))
def test_every_user_is_in_exactly_one_pack_of_bounded_size(
    tokens: list[int], pack_users: int, workers: int
) -> None:
    users = _users(tokens)
    packs = make_packs(users, pack_users, workers)
    counted = Counter(user.user_key for pack in packs for user in pack.users)
    assert counted == Counter(user.user_key for user in users)
    assert all(1 <= len(pack.users) <= pack_users for pack in packs)
    assert len(packs) >= min(workers, len(users))
    assert len({pack.pack_id for pack in packs}) == len(packs)


@given(_tokens, st.integers(1, 20), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_the_index(
    tokens: list[int], pack_users: int, random: object
) -> None:
    users = _users(tokens)
    shuffled = list(users)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert make_packs(users, pack_users, 2) == make_packs(shuffled, pack_users, 2)


def test_packs_have_about_equal_tokens_where_users_have() -> None:
    packs = make_packs(_users([100] * 64), 16, 1)
    assert [len(pack.users) for pack in packs] == [16, 16, 16, 16]


def test_a_user_with_much_to_train_shares_the_pack_with_few() -> None:
    """Packs are split by tokens, not by users, while they have room."""
    packs = make_packs(_users([900, *[100] * 9]), 9, 2)
    assert [(len(pack.users), pack.tokens) for pack in packs] == [(1, 900), (9, 900)]


def test_the_pack_id_follows_what_is_trained() -> None:
    first, second = _users([5, 6]), _users([5, 6])
    changed = [second[0], PlannedUser(**{**second[1].__dict__, "training_digest": "other"})]
    assert make_packs(first, 2, 1)[0].pack_id == make_packs(second, 2, 1)[0].pack_id
    assert make_packs(first, 2, 1)[0].pack_id != make_packs(changed, 2, 1)[0].pack_id


# ---------------------------------------------------------------- who trains


RULES = Rules(
    identity=lambda key, data: f"{key}:{data}", gate_digest="gate", pack_users=4, workers=1
)


def _row(key: str, data: str = "rows", *, too_few: bool = False) -> IndexRow:
    return IndexRow(user_id=key, user_key=key, tokens=10, data_digest=data, too_few=too_few)


def _version(key: str, digest: str = "d", data: str = "rows", gate: str = "gate") -> Version:
    return Version(
        user_key=key,
        prefix_name="default",
        version="1",
        digest=digest,
        training_digest=f"{key}:{data}",
        data_digest=data,
        gate_digest=gate,
        run_id="monday",
        pack_id="p1",
    )


def _current(key: str, *, champion: bool = True, **candidate: str) -> Current:
    version = _version(key, **candidate)
    return Current(candidate=version, champion=version if champion else None)


def _plan(
    users: Sequence[tuple[IndexRow, Current | None]],
    served: Sequence[str] | None = None,
    rules: Rules = RULES,
    lost: Sequence[str] = (),
) -> Plan:
    if served is None:
        served = [row.user_key for row, now in users if now and now.champion]
    return plan_users(iter(users), iter(served), rules, lost)


def _trained_users(plan: Plan) -> list[str]:
    return [user.user_key for pack in plan.packs for user in pack.users]


def _judged_users(plan: Plan) -> list[str]:
    return [user.user_key for pack in plan.judged for user in pack.users]


def test_a_new_user_trains() -> None:
    plan = _plan([(_row("ann"), None)])
    assert (_trained_users(plan), dict(plan.skipped)) == (["ann"], {})


def test_a_user_with_new_rows_trains_against_the_current_champion() -> None:
    plan = _plan([(_row("ann", "more rows"), _current("ann", digest="old"))])
    (user,) = plan.packs[0].users
    assert (user.champion_digest, user.candidate_digest) == ("old", "old")


@pytest.mark.parametrize("champion", [True, False])
def test_a_user_whose_training_and_gate_are_the_same_is_unchanged(champion: bool) -> None:
    plan = _plan([(_row("ann"), _current("ann", champion=champion))])
    assert (_trained_users(plan), _judged_users(plan)) == ([], [])
    assert plan.skipped == {"ann": "unchanged"}


def test_a_user_whom_another_gate_judged_is_judged_again_and_not_trained() -> None:
    plan = _plan([(_row("ann"), _current("ann", gate="an older gate"))])
    assert (_trained_users(plan), _judged_users(plan), dict(plan.skipped)) == ([], ["ann"], {})
    (user,) = plan.judged[0].users
    assert (user.run_id, user.pack_id) == ("monday", "p1")


def test_a_user_without_stored_losses_trains_again_and_is_counted() -> None:
    other = _current("ann", gate="other"), _current("bob", gate="other")
    plan = _plan([(_row("ann"), other[0]), (_row("bob"), other[1])])
    plan = plan.train_instead(["bob"], RULES)
    assert (_trained_users(plan), _judged_users(plan)) == (["bob"], ["ann"])
    assert "1 users train again: the losses" in plan.notes[0]
    nameless = replace(_version("ann", gate="other"), run_id="")
    assert _trained_users(_plan([(_row("ann"), Current(candidate=nameless))])) == ["ann"]


def test_a_user_whose_prefix_file_is_lost_trains_again() -> None:
    plan = _plan([(_row("ann"), _current("ann")), (_row("bob"), _current("bob"))], lost=["ann"])
    assert (_trained_users(plan), dict(plan.skipped)) == (["ann"], {"bob": "unchanged"})
    assert "lost or damaged" in plan.notes[0]


def test_a_user_with_too_few_rows_and_no_champion_is_too_few() -> None:
    assert _plan([(_row("ann", too_few=True), None)]).skipped == {"ann": "too_few"}


ALL = replace(RULES, max_shrink=1.0)


def test_users_whose_rows_are_gone_or_too_few_retire() -> None:
    users = [(_row("ann", too_few=True), _current("ann")), (_row("bob"), _current("bob"))]
    plan = _plan(users, ["ann", "bob", "cyd"], ALL)
    assert plan.skipped == {"ann": "retired", "bob": "unchanged", "cyd": "retired"}
    assert plan.retired == ("ann", "cyd")


def test_users_with_too_few_rows_keep_their_prefix_with_on_shrink_keep() -> None:
    users = [(_row("ann", too_few=True), _current("ann"))]
    plan = _plan(users, ["ann", "cyd"], replace(RULES, on_shrink="keep"))
    assert (dict(plan.skipped), plan.retired, plan.kept) == ({"ann": "too_few"}, (), 2)


def test_a_run_that_would_retire_too_many_stops_and_says_how_many() -> None:
    users = [(_row(f"u{n}"), _current(f"u{n}")) for n in range(7)]
    served = [f"u{n}" for n in range(10)]
    with pytest.raises(RunError) as stopped:
        _plan(users, served)
    assert stopped.value.seen == "3 of 10 served users"
    assert "data.max_shrink = 0.2" in str(stopped.value.expected)
    assert "data.on_shrink=keep" in str(stopped.value.fix)
    assert len(_plan(users, served[:8]).retired) == 1  # one in eight is at most a fifth


def test_a_limit_on_users_retires_nobody() -> None:
    plan = _plan(
        [(_row("ann"), _current("ann"))], ["ann", "bob", "cyd"], replace(ALL, everybody=False)
    )
    assert plan.retired == ()
    assert "data.max_users" in plan.notes[0]


@given(st.lists(st.sampled_from(["new", "same", "gate", "few", "gone"]), max_size=30))
def test_every_user_has_exactly_one_outcome(kinds: list[str]) -> None:
    users, served = [], []
    for n, kind in enumerate(kinds):
        key = f"u{n:02d}"
        if kind != "new":
            served.append(key)
        if kind != "gone":
            now = None if kind == "new" else _current(key, gate="x" if kind == "gate" else "gate")
            users.append((_row(key, too_few=kind == "few"), now))
    plan = _plan(users, served, ALL)
    counted = Counter([*_trained_users(plan), *_judged_users(plan), *plan.skipped])
    assert counted == Counter(f"u{n:02d}" for n in range(len(kinds)))
