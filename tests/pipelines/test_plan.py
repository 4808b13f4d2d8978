"""Planning is pure: every user trains once, packs are bounded, work is shared evenly."""

from __future__ import annotations

import json
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pipelines.plan import Plan, PlannedUser, assign, make_packs


def _users(tokens: list[int], buckets: int = 4) -> list[PlannedUser]:
    return [
        PlannedUser(
            user_key=f"user{n:04d}",
            bucket=n % buckets,
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


@given(_tokens, st.integers(1, 8))
def test_every_pack_goes_to_exactly_one_worker(tokens: list[int], workers: int) -> None:
    packs = make_packs(_users(tokens), 4, workers)
    shares = assign(packs, workers)
    assert len(shares) == workers
    assert Counter(p.pack_id for share in shares for p in share) == Counter(
        p.pack_id for p in packs
    )


@given(_tokens, st.integers(1, 8))
def test_no_worker_has_more_than_the_lpt_bound(tokens: list[int], workers: int) -> None:
    packs = make_packs(_users(tokens), 4, workers)
    loads = [sum(pack.tokens for pack in share) for share in assign(packs, workers)]
    heaviest = max((pack.tokens for pack in packs), default=0)
    assert max(loads) <= sum(loads) / workers + heaviest


def test_packs_have_about_equal_tokens_where_users_have() -> None:
    packs = make_packs(_users([100] * 64), 16, 1)
    assert [len(pack.users) for pack in packs] == [16, 16, 16, 16]


def test_a_plan_survives_json() -> None:
    plan = Plan(packs=make_packs(_users([5, 6, 7]), 2, 1), skipped={"x": "too_few"})
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_pack_id_follows_what_is_trained() -> None:
    first, second = _users([5, 6]), _users([5, 6])
    changed = [second[0], PlannedUser(**{**second[1].__dict__, "training_digest": "other"})]
    assert make_packs(first, 2, 1)[0].pack_id == make_packs(second, 2, 1)[0].pack_id
    assert make_packs(first, 2, 1)[0].pack_id != make_packs(changed, 2, 1)[0].pack_id
