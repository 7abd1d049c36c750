"""Requests to stop: SIGTERM and SIGINT, noticed between two steps and obeyed."""

import os
import signal
import sys
import threading
from typing import Self

# What a scheduler reads as "try again": EX_TEMPFAIL of sysexits.h.
EXIT_CODE = 75

# XLA compiles for many seconds in one call, in which Python runs no handler: a
# request that no step has noticed by then ends the process from a thread. What is
# lost is less than the time since the last checkpoint, which stays whole.
_PATIENCE_SECONDS = 1.5


class Interrupted(Exception):
    """A stage was asked to stop, and has saved what it had."""


class StopRequests:
    """Listens for SIGTERM and SIGINT while it is entered, in the main thread.

    The first request is noticed by `check`, which stages call in every step. A second
    Ctrl-C stops the process at once.
    """

    def __init__(self) -> None:
        """Listens to nothing yet."""
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
        if self._requested.is_set():
            self._noticed.set()
            raise Interrupted

    def _handle(self, number: int, frame: object) -> None:
        del frame
        if self._requested.is_set() and number == signal.SIGINT:
            os._exit(EXIT_CODE)
        self._requested.set()

    def _watch(self) -> None:
        """Waits for a signal's byte, which arrives even while Python runs nothing."""
        while received := os.read(self._reader, 1):
            if received[0] not in (signal.SIGTERM, signal.SIGINT):
                continue
            if self._noticed.is_set() or self._noticed.wait(_PATIENCE_SECONDS):
                continue
            print(
                "stopped within a long computation; the same command continues from "
                "the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_CODE)
        os.close(self._reader)
