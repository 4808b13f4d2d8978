"""The benchmark's results file (one JSON line per finished cell), and what is made from it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Record = dict[str, Any]

TITLES = {
    "e2e": "E2E, table to text",
    "lama": "LAMA T-REx, cloze",
}
METRICS = {"bleu": "BLEU", "exact_match": "exact match", "first_word_match": "first word right"}


def read_records(path: Path) -> tuple[list[Record], str | None]:
    """A results file's lines, and a message if its last one is half-written (a killed run's).

    Raises ValueError on a damaged line elsewhere: that is no accident of a kill.
    """
    if not path.is_file():
        return [], None
    records: list[Record] = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return records, f"ignored the half-written last line of {path}"
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        records.append(record)
    return records, None


class Results:
    """A results file open for appending, by one process at a time."""

    def __init__(self, path: Path) -> None:
        """Raises BlockingIOError where another process has it open."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.records, self.message = read_records(path)
        self._file.seek(0)
        data = self._file.read()
        if self.message:  # the next line must not be joined to half of one
            self._file.truncate(data.rfind(b"\n") + 1)
        elif data and not data.endswith(b"\n"):
            self._file.write(b"\n")

    def append(self, record: Record) -> None:
        """Once this returns, a kill or a power cut loses nothing of it."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)

    def close(self) -> None:
        self._file.close()


def agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two measurements have the same method and training, as far as both say."""
    for part in ("method", "train"):
        left, right = one[part] or {}, other[part] or {}
        if any(left[name] != right[name] for name in left.keys() & right.keys()):
            return False
    return True


def newest(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """The lines to report of each (task, setting): one per seed, all of the group (the same
    settings but for the seed) that was measured last."""
    by_setting: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        by_setting[record["task"], record["setting"]].append(record)
    chosen = {}
    for key, own in by_setting.items():
        last = own[-1]
        same = [one for one in own if one["group"] == last["group"] and agree(one, last)]
        by_seed = {one["seed"]: one for one in same}
        chosen[key] = [by_seed[seed] for seed in sorted(by_seed)]
    return chosen


def seconds_left(todo: Sequence[tuple[str, str]], records: Sequence[Record]) -> float | None:
    """A guess for cells given as (task, setting): what the setting took in this file, else what
    the task's settings took; None where a task has no figure yet."""
    total = 0.0
    for task, setting in todo:
        same_task = [one for one in records if one["task"] == task]
        same = [one for one in same_task if one["setting"] == setting] or same_task
        if not same:
            return None
        total += mean(one["seconds"]["total"] for one in same)
    return total


def cell_line(record: Record) -> str:
    """A finished cell on one line of a log."""
    figures = [f"{name}={record[name]:g}" for name in METRICS if record.get(name) is not None]
    losses = [f"{split} {nats:.4f}" for split, nats in record["loss"].items() if nats is not None]
    failed = f" FAILED {record['failed']}" if record.get("failed") else ""
    return (
        f"{record['name']}: loss {', '.join(losses) or 'none'}; {' '.join(figures) or '-'}; "
        f"{record['parameters']} parameters, {record['seconds']['total']:.0f} s{failed}"
    )


def table(records: Sequence[Record], order: Sequence[str] = ()) -> str:
    """Markdown: per task a table of the means over seeds, and what they were measured on."""
    chosen = newest(records)
    parts = []
    for task in sorted({task for task, _ in chosen}):
        known = [name for name in order if (task, name) in chosen]
        others = [name for of, name in chosen if of == task and name not in order]
        own = [chosen[task, name] for name in known + others]
        parts.append(f"### {TITLES.get(task, task)}\n\n{_task_table(own)}\n\n{_footer(own)}")
    return "\n\n".join(parts) + "\n" if parts else "No results.\n"


def overview(records: Sequence[Record], order: Sequence[str]) -> str:
    """Markdown: one table with the tasks side by side, as the README has it."""
    chosen = newest(records)
    tasks = sorted({task for task, _ in chosen})
    metric = {
        task: next(name for name in METRICS if name in own[0]) for (task, _), own in chosen.items()
    }
    head = ["setting", "parameters per user"]
    for task in tasks:
        head += [f"{task.upper()} loss", METRICS[metric[task]]]
    lines = [[*head, "learning rate", "seeds", "CPU s"], ["---", *["---:"] * (len(head) + 2)]]
    for setting in order:
        cells = {task: chosen[task, setting] for task in tasks if (task, setting) in chosen}
        if not cells:
            continue
        first = next(iter(cells.values()))[0]
        line = [first["label"], f"{first['parameters']:,}"]
        for task in tasks:
            own = cells.get(task, [])
            line += [
                _mean([one["loss"]["test"] for one in own], 3),
                _mean([one.get(metric[task]) for one in own], 1, _percent(metric[task])),
            ]
        rates = [_rate(cells.get(task, [])) for task in tasks]
        seeds = [str(len(cells.get(task, [])) if first["method"] else "-") for task in tasks]
        cpu = [_seconds(cells.get(task, []), "train_cpu") for task in tasks]
        lines.append([*line, " / ".join(rates), " / ".join(seeds), " / ".join(cpu)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _percent(metric: str) -> float:
    """BLEU is in percent as it is."""
    return 1.0 if metric == "bleu" else 100.0


def _task_table(settings: Sequence[Sequence[Record]]) -> str:
    metrics = [name for name in METRICS if any(name in own[0] for own in settings)]
    head = ["setting", "seeds", "learning rate", "parameters per user", "values kept", "test loss"]
    head += [*(METRICS[name] for name in metrics), "training s", "CPU s"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for own in settings:
        lines.append(
            [
                own[0]["label"],
                str(len(own)) if own[0]["method"] else "-",
                _rate(own),
                f"{own[0]['parameters']:,}",
                f"{own[0]['values_kept']:,}",
                _mean([one["loss"]["test"] for one in own], 3),
                *(_mean([one.get(name) for one in own], 1, _percent(name)) for name in metrics),
                _seconds(own, "train"),
                _seconds(own, "train_cpu"),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(values: Sequence[float | None], digits: int, scale: float = 1.0) -> str:
    """`12.3 ± 0.4`: the mean and, of several seeds, the sample standard deviation."""
    known = [value * scale for value in values if value is not None]
    if len(known) < len(values):
        return f"failed ({len(values) - len(known)} of {len(values)})" if known else "-"
    if not known:
        return "-"
    text = f"{mean(known):.{digits}f}"
    return f"{text} ± {stdev(known):.{digits}f}" if len(known) > 1 else text


def _rate(own: Sequence[Record]) -> str:
    """A setting's learning rate, which all its seeds have."""
    return f"{own[0]['train']['learning_rate']:g}" if own and own[0]["train"] else "-"


def _seconds(settings: Sequence[Record], part: str) -> str:
    """Of the first seed: later ones may have run on other machines."""
    if not settings:
        return "-"
    return f"{min(settings, key=lambda one: one['seed'])['seconds'][part]:.0f}"


def _footer(settings: Sequence[Sequence[Record]]) -> str:
    """What the figures are, and what they were measured on, each kind of machine named once."""
    records = [one for own in settings for one in own]
    notes = []
    metrics = {name for one in records for name in METRICS if one.get(name) is not None}
    if metrics - {"bleu"}:
        notes.append("Matches in percent.")
    commonest = [one["commonest_match"] for one in records if "commonest_match" in one]
    if commonest:
        notes.append(
            f"Always giving a user's commonest train answer: {100 * mean(commonest):.1f} exact."
        )
    if any(len(own) > 1 for own in settings):
        notes.append("Mean ± standard deviation over seeds, which draw train rows and start.")
        notes.append("Seconds are the first seed's.")
    on = sorted({_measured_on(one) for one in records})
    return " ".join([*notes, f"Measured on {'; '.join(on)}."])


def _measured_on(record: Record) -> str:
    machine, versions = record["machine"], record["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    kernels = " by fp32 kernels" if record.get("kernels") else ""
    return f"{machine['cpu']}, {threads}, {record['dtype']}{kernels}, {named}"


def plot(records: Sequence[Record], path: Path) -> None:
    """Test loss against the parameters of a user, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = newest(records)
    tasks = sorted({task for task, _ in chosen})
    figure, panels = pyplot.subplots(
        1, len(tasks), figsize=(8 * len(tasks), 6), squeeze=False, layout="constrained"
    )
    colors = {"prefix": "tab:blue", "prompt": "tab:orange", "ptuning": "tab:green"}
    for panel, task in zip(panels[0], tasks, strict=True):
        panel.set_title(TITLES.get(task, task))
        for (of, _), own in chosen.items():
            losses = [one["loss"]["test"] for one in own]
            if of != task or None in losses:
                continue
            first = own[0]
            if not first["method"]:  # often so far above that a line would squeeze the rest
                panel.set_title(f"{panel.get_title()}; base model {mean(losses):.2f}")
                continue
            color = colors.get(first["method"]["type"], "black")
            at = first["parameters"], mean(losses)
            spread = stdev(losses) if len(losses) > 1 else 0.0
            panel.errorbar(*at, yerr=spread, fmt="o", color=color, capsize=2)
            panel.annotate(
                first["setting"], at, textcoords="offset points", xytext=(5, 3), fontsize=7
            )
        panel.set_xscale("log")
        panel.set_xlabel("trained parameters per user")
        panel.set_ylabel("test loss, nats per completion token")
        panel.margins(x=0.2)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def rates_table(records: Sequence[Record]) -> str:
    """Markdown of sweeps: validation loss by setting and learning rate, the best one bold; apart
    for each number of train rows and epochs."""
    losses: dict[tuple[str, str, str], dict[float, float | None]] = defaultdict(dict)
    again = set()
    for one in records:
        size = f"{one['rows']['train']} x {one['train']['epochs']}"
        key, rate = (one["task"], one["setting"], size), float(f"{one['train']['learning_rate']:g}")
        losses[key][rate] = one["loss"]["valid"]
        if one["resets"]:
            again.add((key, rate))
    rates = sorted({rate for own in losses.values() for rate in own})
    head = ["task", "setting", "rows x epochs", *(f"{rate:g}" for rate in rates)]
    lines = [head, ["---", "---", *["---:"] * (len(rates) + 1)]]
    for key, own in losses.items():
        best = min((value for value in own.values() if value is not None), default=None)
        cells = []
        for rate in rates:
            value = own.get(rate)
            text = "" if rate not in own else "failed" if value is None else f"{value:.4f}"
            text = f"**{text}**" if value is not None and value == best else text
            cells.append(f"{text} (began again)" if (key, rate) in again else text)
        lines.append([*key, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def machine(threads: int) -> Mapping[str, object]:
    return {"cpu": _cpu_model(), "threads": threads}


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
