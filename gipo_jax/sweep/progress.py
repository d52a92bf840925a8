"""What a sweep says while it runs: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

LINE_SECONDS = 5.0
"""Least time between two plain lines."""


class Reporter:
    """Shows runs x steps done, environment steps a second, time left, median returns."""

    def __init__(self, total: int, done: int, show: bool = True, stream: TextIO | None = None):
        """Starts.

        Args:
            total: environment steps of all runs together.
            done: those of them that an earlier execution made.
            show: false shows nothing.
            stream: where to; standard error by default.
        """
        self._total, self._done = total, done
        self._show = show
        self._console = Console(file=stream or sys.stderr, soft_wrap=True, highlight=False)
        self._live: Progress | None = None
        self._timed, self._seconds = 0, 0.0
        self._last_line = 0.0
        if show and self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.percentage:3.0f}% {task.fields[text]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._live.start()
            self._task = self._live.add_task("sweep", total=total, completed=done, text="")

    def say(self, text: str) -> None:
        """One line that stays."""
        if self._show:
            self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """One line that is never kept back."""
        self._console.print(f"warning: {text}", markup=False)

    def advance(
        self, steps: int, seconds: float, what: str, env: str, medians: Mapping[str, float]
    ) -> None:
        """Takes note of progress.

        Args:
            steps: environment steps, of all runs together, since the last call.
            seconds: time they took.
            what: where the sweep is.
            env: environment of the returns: those of several have no common median.
            medians: current median return on it by objective.
        """
        self._done += steps
        self._timed += steps
        self._seconds += seconds
        rate = self._timed / max(self._seconds, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        returns = ", ".join(f"{name} {value:.1f}" for name, value in medians.items())
        text = f"{rate:,.0f} env-steps/s, {duration(left)} left"
        text += f"; median return on {env}: {returns or '-'}"
        if self._live is not None:
            self._live.update(self._task, completed=self._done, description=what, text=text)
        elif time.monotonic() - self._last_line >= LINE_SECONDS or self._done >= self._total:
            self._last_line = time.monotonic()
            share = 100 * self._done / max(self._total, 1)
            self.say(f"{share:5.1f}% {self._done:,}/{self._total:,} steps, {what}: {text}")

    def close(self) -> None:
        """Takes the bar down."""
        if self._live is not None:
            self._live.stop()


def duration(seconds: float) -> str:
    """``1h02m``, ``3m20s`` or ``45s``."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
