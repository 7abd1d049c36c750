"""Requests to stop, by a signal or a clock: noticed at once, obeyed between steps."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, Self

# What a scheduler reads as "try again": EX_TEMPFAIL of sysexits.h.
EXIT_CODE = 75

# What schedulers, containers and terminals send to end a job: kill, Docker, Kubernetes,
# Slurm (TERM); Ctrl-C; a closed terminal (HUP); submitit, LSF and Grid Engine before a
# time limit (USR1, USR2); a limit of processor time (XCPU).
SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)

# XLA compiles for many seconds in one call, in which Python runs nothing. How long to
# wait for such a call, so that a checkpoint can be saved after it, before the process
# is ended: less than the 30 seconds that Slurm and spot machines leave.
_PATIENCE_SECONDS = 20.0


class Interrupted(Exception):
    """A stage was asked to stop, and has saved what it had."""


_active: "StopRequests | None" = None  # A process has one set of signal handlers.


def is_requested() -> bool:
    """Returns whether this process was asked to stop, as far as anybody listens."""
    return _active is not None and _active.is_requested()


class StopRequests:
    """Listens for `SIGNALS` and a time limit while it is entered, in the main thread.

    A thread says at once that a request was noticed; `check`, which stages call in
    every step, raises. A second Ctrl-C ends the process at once. `SIGHUP` stays ignored
    where it is, as under nohup.
    """

    def __init__(
        self,
        *,
        is_other_stopped: Callable[[], bool] = lambda: False,
        patience_seconds: float = _PATIENCE_SECONDS,
        max_minutes: float | None = None,
    ):
        """Listens to nothing yet.

        Args:
          is_other_stopped: Whether another process of the run was asked to stop.
          patience_seconds: How long a request may wait for `check` before the process
            is ended. What came after the last checkpoint is then lost.
          max_minutes: Time from entering on after which a stop is requested; None for
            no limit.
        """
        self._is_other_stopped = is_other_stopped
        self._patience = patience_seconds
        self._max_minutes = max_minutes
        self._limit: threading.Timer | None = None
        self._requested = threading.Event()
        self._noticed = threading.Event()
        self._previous: dict[signal.Signals, Any] = {}
        self._reader = self._writer = -1

    def __enter__(self) -> Self:
        global _active
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_fd = signal.set_wakeup_fd(
            self._writer, warn_on_full_buffer=False
        )
        for number in SIGNALS:
            is_ignored = signal.getsignal(number) == signal.SIG_IGN
            if not (number == signal.SIGHUP and is_ignored):
                self._previous[number] = signal.signal(number, self._handle)
        self._outer, _active = _active, self
        threading.Thread(target=self._watch, daemon=True).start()
        if self._max_minutes is not None:
            self._limit = _start_timer(60 * self._max_minutes, self._run_out)
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _active
        _active = self._outer
        self._noticed.set()
        if self._limit is not None:
            self._limit.cancel()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._writer)  # Ends the thread.

    def check(self) -> None:
        """Raises `Interrupted` if a stop was requested: the stage saves and ends."""
        if self.is_requested() or self._is_other_stopped():
            self.obey()

    def is_requested(self) -> bool:
        """Returns whether this process was asked to stop."""
        return self._requested.is_set()

    def obey(self) -> NoReturn:
        """Stops: raises `Interrupted`."""
        self._noticed.set()
        raise Interrupted("stopped as asked; the same command continues")

    def _handle(self, number: int, frame: object) -> None:
        del number, frame
        self._requested.set()

    def _run_out(self) -> None:
        self._requested.set()
        self._notice(
            f"--max_minutes={self._max_minutes:g} are over: stopping at the next step"
        )

    def _notice(self, text: str) -> None:
        """Says that a request was noticed, and waits for somebody to obey it."""
        _start_timer(self._patience, self._end_if_unnoticed)
        say(text)

    def _watch(self) -> None:
        """Waits for a signal's byte, which arrives even while Python runs nothing."""
        is_first = True
        while received := os.read(self._reader, 1):
            number = received[0]
            if number not in self._previous:
                continue
            if is_first:
                is_first = False
                name = signal.Signals(number).name
                self._notice(
                    f"{name} noticed: stopping at the next step; a second Ctrl-C stops "
                    "at once"
                )
            elif number == signal.SIGINT:
                os._exit(EXIT_CODE)
        os.close(self._reader)

    def _end_if_unnoticed(self) -> None:
        if not self._noticed.is_set():
            say(
                "stopped within a long computation; the same command continues from "
                "the last checkpoint"
            )
            os._exit(EXIT_CODE)


def _start_timer(seconds: float, function: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()
    return timer


def say(text: str) -> None:
    """Prints to standard error, or not if that is closed or full."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
