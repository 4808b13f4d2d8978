"""What a store's runs have come to: `ptuning status`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ptuning.store import Store


def print_status(console: Console, store: Store) -> None:
    """One line per run, newest last."""
    runs = [run for run in store.list("runs") if store.exists(f"runs/{run}/config.yaml")]
    if not runs:
        console.print(f"no runs in {store.root}; begin with: ptuning run --data PATH")
        return
    table = Table(title=store.root, title_justify="left")
    for column in ("run", "state", "users", "trained", "promoted", "failed", "nll base → own"):
        is_text = column in ("run", "state")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=is_text)
    for run in runs:
        table.add_row(run, *_row(store, run))
    console.print(table)


def _row(store: Store, run: str) -> list[str]:
    if store.exists(f"runs/{run}/summary.json"):
        summary = store.read_json(f"runs/{run}/summary.json")
        users, nll = summary["users"], summary["nll"]
        losses = (
            f"{nll['base']:.3f} → {nll['candidate']:.3f}"
            if nll.get("base") is not None and nll.get("candidate") is not None
            else ""
        )
        counts = [str(users[key]) for key in ("total", "trained", "promoted", "failed")]
        return ["done", *counts, losses]
    if not store.exists(f"runs/{run}/plan.json"):
        return ["begun", "", "", "", "", ""]
    plan = store.read_json(f"runs/{run}/plan.json")
    done = len([name for name in store.list(f"runs/{run}/done") if name.endswith(".json")])
    users = sum(len(pack["users"]) for pack in plan["packs"])
    return [f"unfinished: {done} of {len(plan['packs'])} packs", str(users), "", "", "", ""]
