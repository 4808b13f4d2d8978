"""Gangs are placed on nodes with room for a whole worker; the cluster's sum does not count."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipelines.gangs.places import (
    Node,
    Wanted,
    all_places,
    describe_nodes,
    describe_wanted,
    find_places,
)

GIB = float(1 << 30)


def node(
    name: str, cpus: float, *, free: float | None = None, gpus: float = 0, memory: float = 64
) -> Node:
    total = {"CPU": cpus, "GPU": gpus, "memory": memory * GIB}
    return Node(
        node_id=name,
        address=f"10.0.0.{name}",
        total=total,
        free=total | {"CPU": cpus if free is None else free},
    )


def sizes(nodes: list[Node], wanted: Wanted) -> list[tuple[str | None, int, float, float]]:
    return [(p.node_id, p.workers, p.cpus, p.gpus) for p in find_places(nodes, wanted)]


def test_one_worker_per_core_as_far_as_memory_lasts() -> None:
    wanted = Wanted(worker_bytes=8 * GIB)
    assert sizes([node("1", 4)], wanted) == [("1", 4, 1.0, 0.0)]
    assert sizes([node("1", 4, memory=17)], wanted) == [("1", 2, 2.0, 0.0)]
    assert sizes([node("1", 4, memory=1)], wanted) == [("1", 1, 4.0, 0.0)]


def test_every_node_gets_a_gang_of_its_own_size() -> None:
    nodes = [node("1", 1), node("2", 16), node("3", 0)]
    assert sizes(nodes, Wanted()) == [("2", 16, 1.0, 0.0), ("1", 1, 1.0, 0.0)]


def test_a_worker_of_more_cores_than_any_node_has_finds_no_place() -> None:
    """The cluster's sum would suffice, but Ray would wait for ever."""
    nodes = [node("1", 1), node("2", 1)]
    assert sizes(nodes, Wanted(workers=1, cpus=2)) == []
    assert "10.0.0.1: 1 of 1 CPUs free" in describe_nodes(nodes)
    assert describe_wanted(Wanted(workers=1, cpus=2)) == "1 worker of 2 CPUs"


def test_workers_that_were_asked_for_are_spread_over_the_nodes() -> None:
    nodes = [node("1", 1), node("2", 1)]
    assert sizes(nodes, Wanted(workers=2)) == [("1", 1, 1.0, 0.0), ("2", 1, 1.0, 0.0)]
    nodes = [node("1", 4), node("2", 4)]
    assert sizes(nodes, Wanted(workers=3, cpus=1)) == [("1", 2, 1.0, 0.0), ("2", 1, 1.0, 0.0)]


def test_more_workers_than_cores_share_them() -> None:
    assert sizes([node("1", 2)], Wanted(workers=3)) == [("1", 3, 0.6666, 0.0)]


def test_resources_in_use_are_no_room() -> None:
    nodes = [node("1", 4, free=0), node("2", 4, free=2)]
    assert sizes(nodes, Wanted(cpus=1)) == [("2", 2, 1.0, 0.0)]
    assert [place.workers for place in all_places(nodes, Wanted(cpus=1))] == [4, 4]


def test_gpus_are_used_where_the_cluster_has_any() -> None:
    nodes = [node("1", 16), node("2", 8, gpus=2)]
    assert sizes(nodes, Wanted()) == [("2", 2, 1.0, 1.0)]
    assert sizes(nodes, Wanted(gpus=0.5)) == [("2", 4, 1.0, 0.5)]
    assert sizes(nodes, Wanted(gpus=0, workers=1)) == [("1", 1, 16.0, 0)]


def test_no_gang_is_put_on_cpus_beside_others_on_gpus() -> None:
    """The node with GPUs already has a gang. The head node's CPUs must not get another."""
    head, cards = node("1", 16), node("2", 8, gpus=2)
    wanted = Wanted().resolve_gpus([head, cards])
    assert find_places([head], wanted) == []
    assert describe_wanted(wanted) == "at least one worker of 1 CPU and 1 GPU"


def test_workers_are_not_squeezed_into_what_happens_to_be_free() -> None:
    assert sizes([node("1", 16, free=1)], Wanted(workers=8)) == [("1", 1, 1.0, 0.0)]


def test_a_sharded_gang_is_one_over_all_nodes_or_none() -> None:
    nodes = [node("1", 1), node("2", 1)]
    assert sizes(nodes, Wanted(workers=2, sharded=True)) == [(None, 2, 1.0, 0.0)]
    assert sizes(nodes, Wanted(workers=3, cpus=1, sharded=True)) == []


def test_no_more_workers_than_there_are_packs() -> None:
    nodes = [node("1", 4), node("2", 4)]
    assert [place.workers for place in find_places(nodes, Wanted().limited_to(5))] == [3, 2]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 3)), max_size=5),
    st.none() | st.integers(1, 9),
    st.none() | st.sampled_from([0.5, 1.0, 2.0]),
    st.none() | st.sampled_from([0.0, 0.5, 1.0]),
    st.none() | st.integers(1, 9),
)
def test_no_node_is_asked_for_more_than_it_has_free(
    shapes: list[tuple[int, int, int]],
    workers: int | None,
    cpus: float | None,
    gpus: float | None,
    most: int | None,
) -> None:
    nodes = [
        node(str(n), max(total, free), free=free, gpus=cards)
        for n, (total, free, cards) in enumerate(shapes)
    ]
    by_id = {one.node_id: one for one in nodes}
    places = find_places(nodes, Wanted(workers=workers, cpus=cpus, gpus=gpus, most=most))
    assert len({place.node_id for place in places}) == len(places)
    for place in places:
        assert place.workers >= 1
        free = by_id[str(place.node_id)].free
        assert place.workers * place.cpus <= free["CPU"] + 1e-6
        assert place.workers * place.gpus <= free["GPU"] + 1e-6
    limit = min((n for n in (workers, most) if n is not None), default=None)
    if limit is not None:
        assert sum(place.workers for place in places) <= limit
