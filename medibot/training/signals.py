"""Take a signal as a request to come to a good end."""

import signal
import time
from collections.abc import Callable
from typing import Any


class Signals:
    """Call `first` at SIGTERM, SIGINT or SIGHUP; from a second later on, another calls `again`, or ends the process."""

    def __init__(self, first: Callable[[], None] = lambda: None, again: Callable[[], None] | None = None) -> None:
        self.first, self.again, self.received, self.since = first, again, 0, 0.0

    def __enter__(self) -> "Signals":
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        # An ignored one stays so, as nohup wants it
        handled = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.note) for number in handled}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _: Any) -> None:
        if not self.received:
            self.received, self.since = number, time.monotonic()
            self.first()
        # Whoever signals a process group often reaches a process twice
        elif time.monotonic() - self.since > 1 and self.again:
            self.again()
        elif time.monotonic() - self.since > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
