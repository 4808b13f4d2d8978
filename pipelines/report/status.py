"""The state of a store's runs: `ptuning status`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.run_folder import RunFolder, all_runs
from ptuning.errors import ConfigError
from ptuning.store import Store

_STYLES = {"finished": "green", "running": "cyan", "stopped": "red", "unfinished": "yellow"}


def run_states(store: Store) -> list[dict[str, Any]]:
    """One entry per run, oldest first: `run_id`, `state`, `packs` {done, total}, `summary`.

    `packs` is None before there is a plan, and `summary` before the run is finished. Raises
    ConfigError if there is no store: a mistyped path must not look like a store without runs.
    """
    if not _exists(store):
        raise ConfigError(
            "there is no store there",
            seen=store.root,
            expected="a directory or prefix written by `ptuning run`",
            fix="check --store, or start with: ptuning run --data PATH",
        )
    return [_entry(folder) for folder in all_runs(store)]


def _exists(store: Store) -> bool:
    return bool(store.list(".")) if store.is_local else bool(store.list("runs"))


def _entry(folder: RunFolder) -> dict[str, Any]:
    plan = folder.read_plan_header()
    packs = None
    if plan is not None:
        done = folder.settled_packs() - folder.split_packs()
        ids = [*plan["packs"], *plan["judged"]]
        packs = {"done": sum(pack in done for pack in ids), "total": len(ids)}
    return {
        "run_id": folder.run_id,
        "state": folder.state(),
        "packs": packs,
        "summary": folder.read_summary(),
    }


def print_status(console: Console, store: str, states: list[dict[str, Any]]) -> None:
    """One line per run, newest last, in less than 80 columns."""
    if not states:
        console.print(f"no runs in {store}; start with: ptuning run --data PATH", soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("run", "state", "users", "trained", "promoted", "failed", "nll"):
        side = "left" if column in ("run", "state") else "right"
        table.add_column(column, justify=side, no_wrap=True, overflow="ignore")  # type: ignore[arg-type]
    for state in states:
        table.add_row(*_row(state))
    # Better too wide than truncated; a pipe has no width.
    needed = console.measure(table).maximum
    console.print(table, soft_wrap=True, width=max(console.width, needed))


def _row(state: dict[str, Any]) -> list[str | Text]:
    style = _STYLES[state["state"]]
    summary, packs = state["summary"], state["packs"]
    if summary is None:
        text = state["state"] if packs is None else f"{state['state']} {_share(packs)}"
        return [state["run_id"], Text(text, style=style), "", "", "", "", ""]
    users, nll = summary["users"], summary["nll"]
    counts = [_short(users[key]) for key in ("total", "trained", "promoted", "failed")]
    losses = ""
    if nll["base"] is not None and nll["candidate"] is not None:
        losses = f"{nll['base']:.2f}→{nll['candidate']:.2f}"
    return [state["run_id"], Text(state["state"], style=style), *counts, losses]


def _share(packs: dict[str, int]) -> str:
    return f"{100 * packs['done'] // max(1, packs['total'])} %"


def _short(count: int) -> str:
    """The count in at most five characters: 999,999 is `1000k`."""
    if count < 100_000:
        return str(count)
    return f"{count / 1000:.0f}k" if count < 10_000_000 else f"{count / 1e6:.0f}M"
