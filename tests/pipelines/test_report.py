"""The end of a run: summary.json, the users table, the terminal and the page."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipelines.report.page import DUMBBELLS_SHOWN, USERS_SHOWN, html_report
from pipelines.report.progress import RunProgress
from pipelines.report.summary import (
    STAGES,
    USERS_SCHEMA,
    RunFacts,
    make_summary,
    print_report,
    users_table,
)
from ptuning.errors import RunError
from ptuning.types import Decision, Gate, SplitLosses, UserReport, user_key

HOSTILE = '<script>alert("1")</script>&\'x'


def losses(
    base: float, own: float, other: float | None = None, test: float | None = None
) -> dict[str, dict[str, SplitLosses]]:
    """Losses of 100 validation tokens, and of 50 test tokens where `test` is given."""
    found = {"base": base, "candidate": own} | ({"other": other} if other is not None else {})
    result = {
        who: {"valid": SplitLosses(nats=(value * 60, value * 40), tokens=(60, 40))}
        for who, value in found.items()
    }
    if test is not None:
        result["base"]["test"] = SplitLosses(nats=(base * 50,), tokens=(50,))
        result["candidate"]["test"] = SplitLosses(nats=(test * 50,), tokens=(50,))
    return result


def trained_user(user_id: str, base: float, own: float, **extra: float) -> tuple[str, UserReport]:
    decision: Decision = "promoted" if own < base else "rejected"
    report = UserReport(
        user_key=user_key(user_id),
        status="trained",
        decision=decision,
        digest="ab" * 32,
        steps=24,
        tokens=900,
        losses=losses(base, own, **extra),
        gate=Gate(decision=decision, reason=f"{decision} for {user_id}"),
    )
    return user_id, report


def failed_user(user_id: str, error: str, stage: str | None = "tune") -> tuple[str, UserReport]:
    key = user_key(user_id)
    return user_id, UserReport(user_key=key, status="failed", error=error, stage=stage)


def user_with_too_few_rows(user_id: str) -> tuple[str, UserReport]:
    return user_id, UserReport(user_key=user_key(user_id), status="too_few")


def facts_of(*users: tuple[str | None, UserReport]) -> RunFacts:
    return RunFacts(
        run_id="20250101-ab12",
        users=users,
        users_total=len(users),
        rows_read=500,
        rows_kept=497,
        rows_quarantined=3,
        tokens_trained=9000,
        seconds={"partition": 2.0, "tune": 90.0, "evaluate": 10.0},
        split_rows={user_key("ann"): {"train": 32, "valid": 8, "test": 0}},
        options=["--model", "owner/model"],
        store="./my store",
        registry_uri="sqlite:///store/mlflow.db",
        report_path="store/runs/x/report.html",
    )


@pytest.fixture
def facts() -> RunFacts:
    return facts_of(
        trained_user("ann", 3.0, 2.5, other=2.8),
        trained_user("bob", 4.0, 3.0, other=2.9),
        trained_user("cyd", 3.5, 3.6, other=3.7),
        user_with_too_few_rows("dan"),
        failed_user("eve", "loss of 'eve' is not finite"),
    )


def print_to_text(facts: RunFacts) -> str:
    stream = io.StringIO()
    print_report(Console(file=stream, width=100), facts)
    return stream.getvalue()


# ---------------------------------------------------------------- summary.json


def test_summary_has_every_key_of_the_contract(facts: RunFacts) -> None:
    result = json.loads(json.dumps(make_summary(facts), allow_nan=False))
    assert result == {
        "run_id": "20250101-ab12",
        "users": {
            "total": 5,
            "trained": 3,
            "unchanged": 0,
            "too_few": 1,
            "retired": 0,
            "failed": 1,
            "promoted": 2,
            "rejected": 1,
            "pending": 0,
        },
        "judged_again": {"promoted": 0, "rejected": 0, "pending": 0},
        "rows": {"read": 500, "kept": 497, "quarantined": 3},
        "tokens_trained": 9000,
        "seconds": {
            **dict.fromkeys(STAGES, 0.0),
            "partition": 2.0,
            "tune": 90.0,
            "evaluate": 10.0,
            "total": 102.0,
        },
        "nll": {"base": pytest.approx(3.5), "candidate": pytest.approx(3.0)},
        "failures": [
            {
                "user_key": user_key("eve"),
                "stage": "tune",
                "error": "loss of '<user>' is not finite",
            }
        ],
    }


def test_summary_of_an_empty_run_keeps_its_keys() -> None:
    result = make_summary(facts_of())
    assert result["users"]["total"] == 0
    assert result["nll"] == {"base": None, "candidate": None}
    assert result["failures"] == []


def test_test_losses_are_there_only_with_test_rows(facts: RunFacts) -> None:
    assert "nll_test" not in make_summary(facts)
    with_test = make_summary(facts_of(*facts.users, trained_user("fay", 3.0, 2.5, test=2.6)))
    assert with_test["nll_test"] == {"base": pytest.approx(3.0), "candidate": pytest.approx(2.6)}


def test_a_loss_that_is_not_finite_is_no_part_of_a_median() -> None:
    users = trained_user("ann", 3.0, float("nan")), trained_user("bob", 4.0, 3.0)
    assert make_summary(facts_of(*users))["nll"]["candidate"] == pytest.approx(3.0)


def test_a_user_without_a_report_stops_the_summary(facts: RunFacts) -> None:
    with pytest.raises(RunError, match="total 6, trained 3") as caught:
        make_summary(replace(facts, users_total=6))
    assert caught.value.fields["run_id"] == facts.run_id


def test_a_trained_user_without_a_decision_stops_the_summary(facts: RunFacts) -> None:
    facts.users[0][1].decision = None
    with pytest.raises(RunError, match="trained must be promoted"):
        make_summary(facts)


def test_a_report_under_another_users_id_stops_the_summary() -> None:
    _, report = trained_user("ann", 3.0, 2.5)
    with pytest.raises(RunError, match="another user's id"):
        make_summary(facts_of(("bob", report)))
    with pytest.raises(RunError, match="two reports"):
        make_summary(facts_of(("ann", report), ("ann", report)))


def retired_user(user_id: str | None, name: str) -> tuple[str | None, UserReport]:
    return user_id, UserReport(user_key=user_key(name), status="retired")


def user_judged_again(user_id: str, decision: Decision) -> tuple[str | None, UserReport]:
    _, report = trained_user(user_id, 3.0, 2.5)
    report.status, report.decision = "unchanged", decision
    report.steps = report.tokens = 0
    return user_id, report


def test_retired_users_and_users_judged_again_add_up(facts: RunFacts) -> None:
    more = [
        retired_user("fay", "fay"),
        retired_user(None, "gil"),
        user_judged_again("hal", "rejected"),
    ]
    found = facts_of(*facts.users, *more)
    counts = make_summary(found)["users"]
    assert (counts["total"], counts["retired"], counts["unchanged"]) == (8, 2, 1)
    assert counts["rejected"] == 1, "only of users who trained"
    assert make_summary(found)["judged_again"] == {"promoted": 0, "rejected": 1, "pending": 0}
    rows = users_table(found).to_pylist()
    assert [row["user_id"] for row in rows[-3:]] == ["fay", None, "hal"]
    assert rows[-2]["reason"].startswith("the rows are gone")


@dataclass(frozen=True)
class Bad:
    """A file as the partition describes it."""

    file: str = "b.csv"
    rows: int = 4
    reasons: tuple[tuple[str, int], ...] = (("user_id is missing", 4),)


def test_both_reports_say_who_retired_and_what_was_skipped() -> None:
    found = replace(
        facts_of(retired_user("fay", "fay"), user_judged_again("hal", "promoted")),
        notices=["the input is a snapshot", "b.tsv was not read"],
        bad_files=[Bad()],
    )
    for text in (print_to_text(found), html_report(found)):
        assert "the input is a snapshot" in text
        assert "b.tsv was not read" in text
        assert "b.csv: 4 rows quarantined, most often user_id is missing (4)" in text
    assert "1 retired" in html_report(found)
    assert "retired" in print_to_text(found)
    assert "judged again by a changed gate: 1 promoted" in print_to_text(found)


def test_a_summary_keeps_a_hundred_failures_and_counts_them_all() -> None:
    result = make_summary(facts_of(*(failed_user(f"u{n}", "no") for n in range(120))))
    assert len(result["failures"]) == 100
    assert result["users"]["failed"] == 120


def test_reports_are_matched_by_the_stores_own_keys() -> None:
    _, report = trained_user("ann", 3.0, 2.5)
    of_store = facts_of(("ann", replace(report, user_key="salted")))
    assert make_summary(replace(of_store, key_of=lambda _: "salted"))["users"]["total"] == 1
    with pytest.raises(RunError, match="another user's id"):
        make_summary(of_store)


def test_a_stage_that_the_contract_does_not_have_stops_the_summary(facts: RunFacts) -> None:
    with pytest.raises(RunError, match="tuning"):
        make_summary(replace(facts, seconds={"tuning": 1.0}))


# ---------------------------------------------------------------- the users table


def test_users_table_has_one_row_per_user_with_losses(facts: RunFacts) -> None:
    table = users_table(facts)
    assert table.schema == USERS_SCHEMA
    ann = table.to_pylist()[0]
    assert (ann["user_id"], ann["user_key"]) == ("ann", user_key("ann"))
    assert (ann["rows_train"], ann["rows_valid"], ann["rows_test"]) == (32, 8, 0)
    assert ann["nll_base_valid"] == pytest.approx(3.0)
    assert ann["nll_candidate_valid"] == pytest.approx(2.5)
    assert ann["nll_other_valid"] == pytest.approx(2.8)
    assert ann["nll_champion_valid"] is None
    assert ann["reason"] == "promoted for ann"
    assert table.to_pylist()[4]["reason"] == "tune: loss of 'eve' is not finite"


def test_users_table_of_an_empty_run_has_the_same_schema_on_disk(tmp_path: Path) -> None:
    pq.write_table(users_table(facts_of()), tmp_path / "users.parquet")
    assert pq.read_table(tmp_path / "users.parquet").schema.equals(USERS_SCHEMA)


# ---------------------------------------------------------------- the terminal


def test_terminal_report_says_outcomes_losses_time_and_where_to_look(facts: RunFacts) -> None:
    text = print_to_text(facts)
    assert "2 promoted, 1 rejected, 0 pending" in text
    assert "3.500" in text
    assert "67 %" in text  # two of three beat the base model, and two beat another user's prefix
    assert "100 tokens/s" in text
    assert "ptuning serve --store './my store' --model owner/model" in text
    assert "ptuning generate --store './my store' --model owner/model --user ID" in text
    assert "mlflow ui --backend-store-uri sqlite:///store/mlflow.db" in text


def test_terminal_report_shows_an_error_as_it_is() -> None:
    text = print_to_text(facts_of(failed_user("eve", "seen [bold]3[/bold] [/nothing]")))
    assert "seen [bold]3[/bold] [/nothing]" in text


def test_terminal_report_cuts_a_long_list_of_failures() -> None:
    text = print_to_text(facts_of(*(failed_user(f"u{number}", "no") for number in range(8))))
    assert text.count("in tune: no") == 5
    assert "and 3 more" in text


def test_reports_never_print_the_registrys_password(facts: RunFacts) -> None:
    secret = replace(facts, registry_uri="postgresql://me:hunter2@db:5432/mlflow")
    assert "hunter2" not in print_to_text(secret)
    assert "hunter2" not in html_report(secret)


# ---------------------------------------------------------------- report.html


class Page(HTMLParser):
    """Collects the tags, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name.endswith(("src", "href"))]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_one_file_without_scripts_or_outside_resources(facts: RunFacts) -> None:
    page = Page(html_report(facts))
    assert "svg" in page.tags
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert "3.500 → 3.000" in page.text


def test_page_escapes_whatever_comes_from_data() -> None:
    users = (
        trained_user(HOSTILE, 3.0, 2.5),
        failed_user("eve", f"seen: {HOSTILE}", stage=HOSTILE),
        failed_user(HOSTILE + "2", f"of {HOSTILE}2, <b>"),
    )
    hostile = replace(facts_of(*users), run_id=HOSTILE, store=HOSTILE, registry_uri=HOSTILE)
    text = html_report(hostile)
    assert "<script" not in text
    assert f"seen: {HOSTILE}" in Page(text).text


def test_page_shows_keys_and_never_ids() -> None:
    users = (
        trained_user("ann@example.org", 3.0, 2.5),
        failed_user("eve@example.org", "of eve@example.org"),
    )
    text = html_report(facts_of(*users))
    assert "example.org" not in text
    assert user_key("ann@example.org")[:12] in text


def test_page_of_the_same_run_is_the_same_file(facts: RunFacts) -> None:
    assert html_report(facts) == html_report(facts)


def test_page_of_many_users_cuts_the_table_and_draws_gains() -> None:
    users = [trained_user(f"user {number}", 3.0, 2.9 - number / 999) for number in range(230)]
    page = Page(html_report(facts_of(*users)))
    assert f"The first {USERS_SHOWN} of 230." in page.text
    assert page.tags.count("tr") < 230
    assert len(users) > DUMBBELLS_SHOWN


@pytest.mark.parametrize("users", [(), (user_with_too_few_rows("dan"),)])
def test_page_of_a_run_that_trained_nobody_says_so(users: tuple[tuple[str, UserReport]]) -> None:
    assert "No user was trained." in html_report(facts_of(*users))


def test_page_draws_users_who_gained_nothing() -> None:
    users = [trained_user(f"user {number}", 3.0, 3.0) for number in range(DUMBBELLS_SHOWN + 1)]
    assert "<svg" in html_report(facts_of(*users))


# ---------------------------------------------------------------- progress


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_in_a_log_prints_at_most_one_line_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    with RunProgress(Console(file=stream, width=100), clock=clock) as progress:
        progress.stage("tune", total=100)
        for done in range(1, 26):
            clock.now += 1.0
            progress.update(done, tokens=done * 500)
    assert stream.getvalue().splitlines() == [
        "tune: 10 of 100 users, 500 tokens/s, 1 min 30 s left",
        "tune: 20 of 100 users, 500 tokens/s, 1 min 20 s left",
        "tune: 25 of 100 users, 500 tokens/s, 25.0 s",
    ]


def test_progress_ends_each_stage_with_a_line_and_starts_the_next_at_zero() -> None:
    stream, clock = io.StringIO(), Clock()
    with RunProgress(Console(file=stream, width=100), clock=clock) as progress:
        progress.stage("partition", unit="rows")
        progress.update(300)
        progress.stage("tune", total=2)
    assert stream.getvalue().splitlines() == [
        "partition: 300 rows, 0.0 s",
        "tune: 0 of 2 users, 0.0 s",
    ]


def test_progress_on_a_terminal_shows_a_bar() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with RunProgress(console) as progress:
        progress.stage("tune", total=4)
        progress.update(3, tokens=100)
    assert "3/4" in stream.getvalue()


def test_progress_stops_its_bar_when_the_run_fails() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    progress = RunProgress(console)

    def fail() -> None:
        with progress:
            progress.stage("tune", total=4)
            raise RunError("stop")

    with pytest.raises(RunError):
        fail()
    with RunProgress(console):  # a console has one live bar at a time, so the first one has ended
        pass
