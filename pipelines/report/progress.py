"""Show a run's progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipelines.report.summary import duration_text, number_text


class RunProgress:
    """Shows users done, tokens per second and time left, for one stage after another.

    On a terminal it is a live bar; elsewhere (a log, a pipe) plain lines, at most one every
    `interval_s` seconds, and one at the end of each stage.

        with RunProgress(console) as progress:
            progress.stage("tune", total=600)
            progress.update(done=12, tokens=48_000)
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console()
        self.interval_s = interval_s
        self._clock = clock
        self._name = ""
        self._unit = "users"
        self._total: int | None = None
        self._done = self._tokens = 0
        self._began = self._printed = 0.0
        self._task: TaskID | None = None
        self._bar = self._make_bar() if self.console.is_terminal else None

    def __enter__(self) -> RunProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_stage()
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str, total: int | None = None, *, unit: str = "users") -> None:
        """Begin a stage of `total` units (None: unknown)."""
        self._end_stage()
        self._name, self._total, self._unit = name, total, unit
        self._done = self._tokens = 0
        self._began = self._printed = self._clock()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=total, unit=unit, rate="")

    def update(self, done: int, tokens: int = 0) -> None:
        """Update the stage's progress. Both counts are from the start of the stage, so a repeated
        call does no harm."""
        self._done, self._tokens = done, tokens
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, rate=self._rate())
        elif self._clock() - self._printed >= self.interval_s:
            self._printed = self._clock()
            self._print_line(left=True)

    def note(self, text: str) -> None:
        """Print a line above the bar, about something that a person should know of."""
        self.console.print(Text(text), soft_wrap=True)

    def _end_stage(self) -> None:
        if self._name and self._bar is None:
            self._print_line(left=False)
        self._name, self._task = "", None

    def _elapsed(self) -> float:
        return self._clock() - self._began

    def _rate(self) -> str:
        elapsed = self._elapsed()
        return (
            f"{number_text(self._tokens / elapsed)} tokens/s"
            if self._tokens and elapsed > 0
            else ""
        )

    def _print_line(self, *, left: bool) -> None:
        of = f" of {self._total:,}" if self._total is not None else ""
        parts = [f"{self._name}: {self._done:,}{of} {self._unit}"]
        if rate := self._rate():
            parts.append(rate)
        if left and self._total and self._done:
            remaining = self._elapsed() * (self._total - self._done) / self._done
            parts.append(f"{duration_text(max(0.0, remaining))} left")
        elif not left:
            parts.append(duration_text(self._elapsed()))
        self.console.print(Text(", ".join(parts)), soft_wrap=True)

    def _make_bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}", markup=False),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
        )
