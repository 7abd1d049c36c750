"""One line that says how a stage goes: phase, frames, rate, time left, last return."""

import math
import sys
import time
from typing import Self, TextIO

import rich.progress
from absl import logging

from aps_jax.runs import console

_SAMPLE_SECONDS = 0.25  # between looks at the rate, and at the line on a terminal
_LOG_SECONDS = 10.0  # between lines where the output is a file or a pipe


class Silent:
    """Shows nothing, and is what functions use that are given nothing to show with."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def start(
        self, phase: str, *, total: int, done: int = 0, unit: str = "frames"
    ) -> None:
        """Begins a phase that counts from `done` to `total`."""

    def tick(self, done: int, last_return: float | None = None) -> None:
        """Says how far the phase is; loops may call it in every step."""

    def say(self, text: str) -> None:
        """Prints a line of its own."""

    def warn(self, text: str) -> None:
        """Prints a warning, or logs it where nothing is shown."""
        logging.warning("%s", text)


SILENT = Silent()


class Progress(Silent):
    """Shows progress in place on a terminal, elsewhere as a line every ten seconds.

    Used as a context manager around one command. Whether the stream is a terminal
    decides, and no environment variable but `TERM=dumb`.
    """

    def __init__(self, stream: TextIO | None = None):
        """Writes to `stream`, standard error by default."""
        self._stream = console.BestEffort(stream or sys.stderr)
        self._is_live = self._stream.is_live
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=20),
            console=console.make_console(self._stream),
            auto_refresh=False,
            disable=not self._is_live,
            get_time=time.monotonic,
        )
        self._phase = self._unit = ""
        self._first = self._shown = self._total = 0
        self._started = self._sampled = self._said = 0.0
        self._last_return = "-"

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def start(
        self, phase: str, *, total: int, done: int = 0, unit: str = "frames"
    ) -> None:
        for task in self._bar.tasks:
            self._bar.remove_task(task.id)
        self._bar.add_task(phase, total=total, completed=done)
        self._phase, self._unit, self._last_return = phase, unit, "-"
        self._first, self._shown, self._total = done, done, total
        self._started = self._sampled = self._said = time.monotonic()

    def tick(self, done: int, last_return: float | None = None) -> None:
        if last_return is not None and not math.isnan(last_return):
            self._last_return = f"{last_return:.1f}"
        now, is_end = time.monotonic(), done >= self._total
        is_sample = is_end or now - self._sampled >= _SAMPLE_SECONDS
        if done == self._shown or not is_sample:
            return
        self._sampled = now
        (task,) = self._bar.tasks
        self._bar.update(task.id, completed=done)
        if not (self._is_live or is_end or now - self._said >= _LOG_SECONDS):
            return
        self._said, self._shown = now, done
        # Of the last half a minute; of the whole phase while that has but one sample.
        rate = task.speed or (done - self._first) / max(now - self._started, 1e-9)
        line = self._line(done, rate)
        if self._is_live:
            self._bar.update(task.id, description=line, refresh=True)
        else:
            self.say(line)

    def say(self, text: str) -> None:
        if self._is_live:
            self._bar.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def _line(self, done: int, rate: float) -> str:
        left = (self._total - done) / rate if rate > 0 else math.inf
        # As many digits as tell something.
        per_second = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"
        return (
            f"{self._phase}: {done:,} of {self._total:,} {self._unit}, {per_second} "
            f"{self._unit}/s, ETA {duration(left)}, last return {self._last_return}"
        )


def duration(seconds: float) -> str:
    """Writes a number of seconds as hours, minutes and seconds."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
