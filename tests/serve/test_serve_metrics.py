"""The content of /metrics, and that only declared names can be counted."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from serving import prefix_file
from worlds import CHAT, Play, World, check_error

import serve
from ptuning.types import user_key
from serve.metrics import ENGINE_FAMILIES, FAMILIES, HTTP_FAMILIES, Metrics, render

# Written out here, since a changed or removed name breaks dashboards.
COUNTERS = {
    "ptuning_requests_total",
    "ptuning_stream_errors_total",
    "ptuning_tokens_generated_total",
    "ptuning_prompt_tokens_total",
    "ptuning_requests_cancelled_total",
    "ptuning_step_errors_total",
    "ptuning_row_errors_total",
    "ptuning_engine_deaths_total",
    "ptuning_prefix_cache_hits_total",
    "ptuning_prefix_cache_misses_total",
    "ptuning_prefix_errors_total",
    "ptuning_champions_errors_total",
}
GAUGES = {
    "ptuning_rows_in_use",
    "ptuning_rows_limit",
    "ptuning_queue_length",
    "ptuning_prefix_cache_bytes",
    "ptuning_champions_generation",
    "ptuning_champions_age_seconds",
    "ptuning_replicas",
}
HISTOGRAMS = {"ptuning_step_rows", "ptuning_time_to_first_token_seconds"}


def test_every_declared_family_is_exported_and_named_here(play: Play) -> None:
    async def story(world: World) -> None:
        await world.post()
        text = (await world.client.get("/metrics")).text
        shown = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
        assert shown == {name: kind for name, (kind, _) in FAMILIES.items()}
        for kind, names in (
            ("counter", COUNTERS),
            ("gauge", GAUGES),
            ("histogram", HISTOGRAMS),
        ):
            assert {name for name in shown if shown[name] == kind} == names
        assert set(re.findall(r"^# HELP (\S+) \S", text, re.M)) == set(shown)
        samples = {re.sub(r"_(bucket|sum|count)$", "", s) for s in await samples_of(world)}
        assert samples == set(shown)

    async def samples_of(world: World) -> set[str]:
        return {name.partition("{")[0] for name in await world.lines()}

    play(story)
    assert set(ENGINE_FAMILIES) | set(HTTP_FAMILIES) == set(FAMILIES)


def test_every_declared_counter_and_histogram_is_counted_somewhere() -> None:
    root = Path(serve.__file__ or next(iter(serve.__path__)) + "/x").parent
    sources = [path.read_text() for path in root.rglob("*.py") if path.name != "metrics.py"]
    for name in FAMILIES:
        assert any(f'"{name}"' in source for source in sources), name


@pytest.mark.parametrize(
    "name", ["ptuning_step_error_total", "step_errors_total", "ptuning_rows_in_use", ""]
)
def test_a_name_that_is_no_declared_counter_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="metrics"):
        Metrics().add(name)


def test_other_kinds_and_labels_are_refused_too() -> None:
    metrics = Metrics()
    for name in ("ptuning_step_row", "ptuning_step_errors_total"):
        with pytest.raises(ValueError, match="histogram"):
            metrics.observe(name, 1)
    with pytest.raises(ValueError, match="labels"):
        metrics.add("ptuning_requests_total", endpoint="chat")
    with pytest.raises(ValueError, match="labels"):
        metrics.add("ptuning_step_errors_total", user="alice")
    with pytest.raises(ValueError, match="gauge"):
        metrics.snapshot({"ptuning_rows": 1.0}, [])
    with pytest.raises(ValueError, match="metric"):
        metrics.snapshot({}, ["ptuning_rows"])


def test_errors_are_counted_and_said_in_one_line_each(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    replica = '{replica="local"}'

    async def story(world: World) -> None:
        prefix = prefix_file(world.backbone, "alice")
        world.promote(prefix)
        decode = world.service.engine.runner.decode

        def broken(*_arguments: object) -> torch.Tensor:
            raise RuntimeError("a secret")

        world.service.engine.runner.decode = broken  # type: ignore[assignment,method-assign]
        failed = await world.post(user="alice", prompt="a secret")
        check_error(failed, 500, "engine_error", None)
        world.service.engine.runner.decode = decode  # type: ignore[method-assign]
        lines = await world.lines()
        assert lines[f"ptuning_step_errors_total{replica}"] == 1
        assert lines['ptuning_requests_total{endpoint="completions",status="500"}'] == 1
        said = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
        request_id = failed.headers["x-ptuning-request-id"]
        assert all(request_id in line for line in said)
        assert any(prefix.digest in line for line in said)
        caplog.clear()

        # A prefix whose file is another user's.
        world.promote(prefix_file(world.backbone, "bob", seed=2), as_user=user_key("carol"))
        assert (await world.post(CHAT, user="carol")).status_code == 500
        assert (await world.lines())[f"ptuning_prefix_errors_total{replica}"] == 1
        assert any(r.levelno >= logging.ERROR for r in caplog.records)

    play(story)
    assert "secret" not in caplog.text
    assert "alice" not in caplog.text
    assert "carol" not in caplog.text


def test_a_value_of_each_process_is_a_sample_of_its_own() -> None:
    first, second = Metrics(), Metrics()
    first.add("ptuning_tokens_generated_total", 3)
    second.add("ptuning_tokens_generated_total", 4)
    names = ["ptuning_tokens_generated_total"]
    text = render(
        [first.snapshot({}, names, replica="a"), second.snapshot({}, names, replica='b"\n')]
    )
    assert 'ptuning_tokens_generated_total{replica="a"} 3' in text
    assert 'ptuning_tokens_generated_total{replica="b\\"\\n"} 4' in text
    assert text.count("# TYPE") == 1
