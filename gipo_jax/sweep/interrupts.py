"""SIGTERM and Ctrl-C as a wish to stop at the next good moment."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

EXIT_CODES = {"SIGTERM": 75, "SIGINT": 130}  # 75 is EX_TEMPFAIL: try again later


class Interrupted(RuntimeError):  # noqa: N818 - the name says what happened, not a fault
    """A sweep stopped and can go on. The message is one line and says how."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopSignals:
    """The number of the signal that came, or 0."""

    received = 0


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopSignals]:
    """Notes SIGTERM and the first Ctrl-C while entered; a second one acts as usual."""
    signals = StopSignals()
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        signals.received = number
        signal.signal(number, previous[number])

    # Only the main thread may set handlers; elsewhere the host program keeps its own.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, note)
    try:
        yield signals
    finally:
        for taken, handler in previous.items():
            signal.signal(taken, handler)
