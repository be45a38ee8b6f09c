"""Take a signal as a request to come to a good end."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any


def end_process(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class Signals:
    """Call `first` at SIGTERM, SIGINT or SIGHUP, and `again` at another one a second later."""

    def __init__(self, first: Callable[[], None] = lambda: None, again: Callable[[int], None] = end_process) -> None:
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
        elif time.monotonic() - self.since > 1:
            self.again(number)
