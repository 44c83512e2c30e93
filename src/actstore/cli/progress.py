"""Progress on stderr: a bar with rate and time left on a terminal, sparse lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from actstore.cli.display import count_text, duration_text
from actstore.cli.output import error_console

__all__ = ["PhaseProgress"]

_PLAIN_SECONDS = 10.0
_PLAIN_SHARE = 0.1
_LEAST_SECONDS = 1.0

_TITLES = {
    "plan": "planning",
    "measure": "measuring",
    "forward": "forward passes",
    "encode": "encoding",
    "compact": "indexing",
    "verify": "verifying",
}


class PhaseProgress:
    """Shows how far each phase is; call it with (phase, done, total), total 0 if unknown.

    Use as a context manager. It also remembers when each phase was first and last heard
    of, for those who print how long it took.

    Args:
        unit: what is counted.
        quiet: show nothing.
    """

    def __init__(self, unit: str = "tokens", *, quiet: bool = False) -> None:
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._unit = unit
        self._console = error_console()
        self._live = (
            Progress(
                SpinnerColumn(finished_text=" "),
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[amount]}"),
                _RateColumn(unit),
                TimeElapsedColumn(),
                _TimeLeftColumn(compact=True),
                console=self._console,
                transient=True,
            )
            if self._console.is_terminal and not quiet
            else None
        )
        self._tasks: dict[str, TaskID] = {}
        self._plain = not quiet and self._live is None
        self._printed: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Note that ``done`` of ``total`` are done."""
        now = time.monotonic()
        self.first.setdefault(phase, now)
        self.last[phase] = now
        if self._live is not None:
            self._update(self._live, phase, done, total)
        elif self._plain:
            self._print(phase, done, total, now)

    def _update(self, live: Progress, phase: str, done: int, total: int) -> None:
        amount = f"{count_text(done)}{f' / {count_text(total)}' if total else ''} {self._unit}"
        if phase not in self._tasks:
            for task in self._tasks.values():
                live.update(task, visible=False)
            self._tasks[phase] = live.add_task(
                _TITLES.get(phase, phase), total=total or None, amount=amount
            )
        live.update(self._tasks[phase], completed=done, total=total or None, amount=amount)
        if phase == "forward" and done == total and "finish" not in self._tasks:
            self._tasks["finish"] = live.add_task(
                "writing, indexing, checking", total=None, amount=""
            )

    def _print(self, phase: str, done: int, total: int, now: float) -> None:
        at, before = self._printed.get(phase, (now, -1))
        is_new = before < 0
        is_due = now - at >= _PLAIN_SECONDS or (total > 0 and done - before >= _PLAIN_SHARE * total)
        is_told = is_new or done == total or (is_due and now - at >= _LEAST_SECONDS)
        if not is_told or done in (0, before):
            return
        self._printed[phase] = now, done
        elapsed = now - self.first[phase]
        of_total = (
            f" / {count_text(total)} {self._unit} ({done / total:.0%})"
            if total
            else (f" {self._unit}")
        )
        rate = ""
        if elapsed > 0 and done:
            speed = done / elapsed
            rate = f", {count_text(round(speed))} {self._unit}/s"
            if total > done:
                rate += f", {duration_text((total - done) / speed)} left"
        print(
            f"{_TITLES.get(phase, phase)}: {count_text(done)}{of_total}{rate}",
            file=sys.stderr,
            flush=True,
        )


class _RateColumn(ProgressColumn):
    """Done per second, lately."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{count_text(round(speed))} {self._unit}/s" if speed else "", style="cyan")


class _TimeLeftColumn(TimeRemainingColumn):
    """Time left, where a total is known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text("")
