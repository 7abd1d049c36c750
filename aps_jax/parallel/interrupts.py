"""Requests to stop: SIGTERM and SIGINT, noticed at once and obeyed between two steps."""

import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn, Self

# What a scheduler reads as "try again": EX_TEMPFAIL of sysexits.h.
EXIT_CODE = 75

# XLA compiles for many seconds in one call, in which Python runs nothing. What such a
# call is given to end before the process is ended from a thread, so that a checkpoint can
# be saved after it: less than the 30 seconds that Slurm and spot machines leave.
_PATIENCE_SECONDS = 20.0


class Interrupted(Exception):
    """A stage was asked to stop, and has saved what it had."""


class StopRequests:
    """Listens for SIGTERM and SIGINT while it is entered, in the main thread.

    A thread says at once that a request was noticed; `check`, which stages call in every
    step, raises. A second Ctrl-C stops the process at once.
    """

    def __init__(
        self,
        *,
        is_told: Callable[[], bool] = lambda: False,
        patience_seconds: float = _PATIENCE_SECONDS,
    ):
        """Listens to nothing yet.

        Args:
          is_told: Whether somebody else was asked to stop, and this process with them.
          patience_seconds: How long a request may wait for `check` before the process
            is ended. What is lost is what came after the last checkpoint, which stays
            whole.
        """
        self._is_told = is_told
        self._patience = patience_seconds
        self._requested = threading.Event()
        self._noticed = threading.Event()
        self._previous: dict[signal.Signals, object] = {}
        self._reader = self._writer = -1

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_fd = signal.set_wakeup_fd(
            self._writer, warn_on_full_buffer=False
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._noticed.set()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._writer)  # Ends the thread.

    def check(self) -> None:
        """Raises `Interrupted` if a stop was requested.

        Raises:
          Interrupted: The stage should save and end.
        """
        if self.is_requested() or self._is_told():
            self.obey()

    def is_requested(self) -> bool:
        """Returns whether this process was asked to stop."""
        return self._requested.is_set()

    def obey(self) -> NoReturn:
        """Stops.

        Raises:
          Interrupted: Always.
        """
        self._noticed.set()
        raise Interrupted("stopped as asked; the same command continues")

    def _handle(self, number: int, frame: object) -> None:
        del number, frame
        self._requested.set()

    def _watch(self) -> None:
        """Waits for a signal's byte, which arrives even while Python runs nothing."""
        deadline: float | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._reader, selectors.EVENT_READ)
            while True:
                if self._noticed.is_set():
                    left = None
                else:
                    left = deadline and max(deadline - time.monotonic(), 0.0)
                if selector.select(left):
                    received = os.read(self._reader, 1)
                    if not received:
                        break
                    number = received[0]
                    if number not in (signal.SIGTERM, signal.SIGINT):
                        continue
                    if deadline is None:
                        deadline = time.monotonic() + self._patience
                        _say(
                            f"{signal.Signals(number).name} noticed: stopping at the "
                            "next step; a second Ctrl-C stops at once"
                        )
                    elif number == signal.SIGINT:
                        os._exit(EXIT_CODE)
                elif not self._noticed.is_set():
                    _say(
                        "stopped within a long computation; the same command continues "
                        "from the last checkpoint"
                    )
                    os._exit(EXIT_CODE)
        os.close(self._reader)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
