"""SIGTERM and Ctrl-C as a wish to stop at the next good moment."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_CODES = {"SIGTERM": 75, "SIGINT": 130}
"""Exit code after each signal. 75 is EX_TEMPFAIL: try again later."""


class Interrupted(RuntimeError):  # noqa: N818 - the name says what happened, not a fault
    """A sweep stopped and can go on. The message is one line and says how.

    Attributes:
        exit_code: what a command should exit with.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupts:
    """While entered, takes SIGTERM and the first SIGINT down instead of dying of them.

    Attributes:
        received: number of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # Only the main thread may set handlers; elsewhere the host program keeps its own.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        # A second Ctrl-C means now.
        signal.signal(number, self._previous[signal.Signals(number)])
