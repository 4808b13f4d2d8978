"""The benchmark's results file (one JSON line per finished cell), its tables and its plot."""

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
    """A results file's records, and a message if its last line is incomplete (the run was killed).

    Raises ValueError on any other damaged line: a killed run does not explain it.
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
                return records, f"ignored the incomplete last line of {path}"
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        records.append(record)
    return records, None


class Results:
    """A results file, open for appending by one process at a time."""

    def __init__(self, path: Path) -> None:
        """Raises BlockingIOError if another process has it open."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.records, self.message = read_records(path)
        self._file.seek(0)
        data = self._file.read()
        if self.message:  # the next line must start a new line
            self._file.truncate(data.rfind(b"\n") + 1)
        elif data and not data.endswith(b"\n"):
            self._file.write(b"\n")

    def append(self, record: Record) -> None:
        """Append a record. Once this returns, neither a kill nor a power failure loses it."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)

    def close(self) -> None:
        self._file.close()


def agree(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two measurements have equal method and training settings, in the fields that both
    have."""
    for part in ("method", "train"):
        left, right = first[part] or {}, second[part] or {}
        if any(left[name] != right[name] for name in left.keys() & right.keys()):
            return False
    return True


def select_newest(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records to report for each (task, setting): one per seed, of the group (equal settings
    except the seed) that was measured last."""
    by_setting: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        by_setting[record["task"], record["setting"]].append(record)
    chosen = {}
    for key, runs in by_setting.items():
        last = runs[-1]
        same = [
            record for record in runs if record["group"] == last["group"] and agree(record, last)
        ]
        by_seed = {record["seed"]: record for record in same}
        chosen[key] = [by_seed[seed] for seed in sorted(by_seed)]
    return chosen


def estimate_seconds_left(
    todo: Sequence[tuple[str, str]], records: Sequence[Record]
) -> float | None:
    """Estimate the seconds for cells, given as (task, setting), from the mean of that setting's
    records or else of the task's. None if a task has no record yet."""
    total = 0.0
    for task, setting in todo:
        same_task = [record for record in records if record["task"] == task]
        same = [record for record in same_task if record["setting"] == setting] or same_task
        if not same:
            return None
        total += mean(record["seconds"]["total"] for record in same)
    return total


def format_cell(record: Record) -> str:
    """A finished cell as one line of a log."""
    figures = [f"{name}={record[name]:g}" for name in METRICS if record.get(name) is not None]
    losses = [f"{split} {nats:.4f}" for split, nats in record["loss"].items() if nats is not None]
    failed = f" FAILED {record['failed']}" if record.get("failed") else ""
    return (
        f"{record['name']}: loss {', '.join(losses) or 'none'}; {' '.join(figures) or '-'}; "
        f"{record['parameters']} parameters, {record['seconds']['total']:.0f} s{failed}"
    )


def format_tables(records: Sequence[Record], order: Sequence[str] = ()) -> str:
    """Markdown: per task a table of the means over seeds, and what they were measured on."""
    chosen = select_newest(records)
    parts = []
    for task in sorted({task for task, _ in chosen}):
        known = [name for name in order if (task, name) in chosen]
        others = [name for of, name in chosen if of == task and name not in order]
        settings = [chosen[task, name] for name in known + others]
        title = f"### {TITLES.get(task, task)}"
        parts.append("\n\n".join([title, _format_task(settings), _format_footer(settings)]))
    return "\n\n".join(parts) + "\n" if parts else "No results.\n"


def format_overview(records: Sequence[Record], order: Sequence[str]) -> str:
    """One Markdown table with the tasks side by side, as in infra/docs/benchmarks.md."""
    chosen = select_newest(records)
    tasks = sorted({task for task, _ in chosen})
    metric = {
        task: next(name for name in METRICS if name in runs[0])
        for (task, _), runs in chosen.items()
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
            runs = cells.get(task, [])
            line += [
                _format_mean([record["loss"]["test"] for record in runs], 3),
                _format_mean(
                    [record.get(metric[task]) for record in runs], 1, _scale_of(metric[task])
                ),
            ]
        rates = [_format_rate(cells.get(task, [])) for task in tasks]
        seeds = [str(len(cells.get(task, [])) if first["method"] else "-") for task in tasks]
        cpu = [_format_seconds(cells.get(task, []), "train_cpu") for task in tasks]
        lines.append([*line, " / ".join(rates), " / ".join(seeds), " / ".join(cpu)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _scale_of(metric: str) -> float:
    """The factor to percent. BLEU is already a percentage."""
    return 1.0 if metric == "bleu" else 100.0


def _format_task(settings: Sequence[Sequence[Record]]) -> str:
    metrics = [name for name in METRICS if any(name in runs[0] for runs in settings)]
    head = ["setting", "seeds", "learning rate", "parameters per user", "values kept", "test loss"]
    head += [*(METRICS[name] for name in metrics), "training s", "CPU s"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for runs in settings:
        lines.append(
            [
                runs[0]["label"],
                str(len(runs)) if runs[0]["method"] else "-",
                _format_rate(runs),
                f"{runs[0]['parameters']:,}",
                f"{runs[0]['values_kept']:,}",
                _format_mean([record["loss"]["test"] for record in runs], 3),
                *(
                    _format_mean([record.get(name) for record in runs], 1, _scale_of(name))
                    for name in metrics
                ),
                _format_seconds(runs, "train"),
                _format_seconds(runs, "train_cpu"),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _format_mean(values: Sequence[float | None], digits: int, scale: float = 1.0) -> str:
    """`12.3 ± 0.4`: the mean and, for more than one seed, the sample standard deviation."""
    known = [value * scale for value in values if value is not None]
    if len(known) < len(values):
        return f"failed ({len(values) - len(known)} of {len(values)})" if known else "-"
    if not known:
        return "-"
    text = f"{mean(known):.{digits}f}"
    return f"{text} ± {stdev(known):.{digits}f}" if len(known) > 1 else text


def _format_rate(runs: Sequence[Record]) -> str:
    """A setting's learning rate, equal for all seeds."""
    return f"{runs[0]['train']['learning_rate']:g}" if runs and runs[0]["train"] else "-"


def _format_seconds(settings: Sequence[Record], part: str) -> str:
    """The first seed's seconds; later seeds may have run on other machines."""
    if not settings:
        return "-"
    return f"{min(settings, key=lambda record: record['seed'])['seconds'][part]:.0f}"


def _format_footer(settings: Sequence[Sequence[Record]]) -> str:
    """Notes on the figures and the machines they were measured on, each kind named once."""
    records = [record for runs in settings for record in runs]
    notes = []
    metrics = {name for record in records for name in METRICS if record.get(name) is not None}
    if metrics - {"bleu"}:
        notes.append("Matches in percent.")
    commonest = [record["commonest_match"] for record in records if "commonest_match" in record]
    if commonest:
        notes.append(
            f"Always giving a user's commonest train answer: {100 * mean(commonest):.1f} exact."
        )
    if any(len(runs) > 1 for runs in settings):
        notes.append("Mean ± standard deviation over seeds, which draw train rows and start.")
        notes.append("Seconds are the first seed's.")
    on = sorted({_describe_measurement(record) for record in records})
    return " ".join([*notes, f"Measured on {'; '.join(on)}."])


def _describe_measurement(record: Record) -> str:
    machine, versions = record["machine"], record["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    kernels = " by fp32 kernels" if record.get("kernels") else ""
    return f"{machine['cpu']}, {threads}, {record['dtype']}{kernels}, {named}"


def plot(records: Sequence[Record], path: Path) -> None:
    """Plot test loss against trained parameters per user, one panel per task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = select_newest(records)
    tasks = sorted({task for task, _ in chosen})
    figure, panels = pyplot.subplots(
        1, len(tasks), figsize=(8 * len(tasks), 6), squeeze=False, layout="constrained"
    )
    colors = {"prefix": "tab:blue", "prompt": "tab:orange", "ptuning": "tab:green"}
    for panel, task in zip(panels[0], tasks, strict=True):
        panel.set_title(TITLES.get(task, task))
        for (of, _), runs in chosen.items():
            losses = [record["loss"]["test"] for record in runs]
            if of != task or None in losses:
                continue
            first = runs[0]
            if not first["method"]:  # its loss is so high that it would squeeze the others
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


def format_rates(records: Sequence[Record]) -> str:
    """A Markdown table of sweeps: validation loss by setting and learning rate, the best one bold.
    Each number of train rows and epochs has a separate line."""
    losses: dict[tuple[str, str, str], dict[float, float | None]] = defaultdict(dict)
    restarted = set()
    for record in records:
        size = f"{record['rows']['train']} x {record['train']['epochs']}"
        key, rate = (
            (record["task"], record["setting"], size),
            float(f"{record['train']['learning_rate']:g}"),
        )
        losses[key][rate] = record["loss"]["valid"]
        if record["resets"]:
            restarted.add((key, rate))
    rates = sorted({rate for by_rate in losses.values() for rate in by_rate})
    head = ["task", "setting", "rows x epochs", *(f"{rate:g}" for rate in rates)]
    lines = [head, ["---", "---", *["---:"] * (len(rates) + 1)]]
    for key, by_rate in losses.items():
        best = min((value for value in by_rate.values() if value is not None), default=None)
        cells = []
        for rate in rates:
            value = by_rate.get(rate)
            text = "" if rate not in by_rate else "failed" if value is None else f"{value:.4f}"
            text = f"**{text}**" if value is not None and value == best else text
            cells.append(f"{text} (restarted)" if (key, rate) in restarted else text)
        lines.append([*key, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def describe_machine(threads: int) -> Mapping[str, object]:
    return {"cpu": _read_cpu_model(), "threads": threads}


def _read_cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
