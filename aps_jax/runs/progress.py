"""One line that says how a stage goes: phase, frames, rate, time left, last return."""

import math
import sys
import time
from typing import NamedTuple, Self, TextIO

import rich.console
import rich.live
import rich.text

_TERMINAL_SECONDS = 0.25  # between redrawings of the line on a terminal
_LOG_SECONDS = 10.0  # between lines where the output is a file or a pipe


class _Mark(NamedTuple):
    done: int
    seconds: float


class Progress:
    """Shows progress on a terminal in place, elsewhere as a line every ten seconds.

    Used as a context manager around one command; stages call `start` for each phase
    and `tick` in their loops, which costs a clock reading.
    """

    def __init__(self, stream: TextIO | None = None):
        """Writes to `stream`, standard error by default."""
        self._console = rich.console.Console(file=stream or sys.stderr)
        self._live: rich.live.Live | None = None
        self._phase = ""
        self._unit = ""
        self._total = 0
        self._last_return: float | None = None
        self._started = self._shown = _Mark(0, time.monotonic())

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = rich.live.Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exc_info) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def start(
        self, phase: str, *, total: int, done: int = 0, unit: str = "frames"
    ) -> None:
        """Begins a phase that counts from `done` to `total`."""
        self._phase, self._total, self._unit = phase, total, unit
        self._last_return = None
        self._started = self._shown = _Mark(done, time.monotonic())

    def tick(self, done: int, last_return: float | None = None) -> None:
        """Says how far the phase is; shown when the last line is old enough."""
        if last_return is not None and not math.isnan(last_return):
            self._last_return = last_return
        now = time.monotonic()
        interval = _TERMINAL_SECONDS if self._live is not None else _LOG_SECONDS
        is_shown = self._shown.done == done
        if is_shown or (now - self._shown.seconds < interval and done < self._total):
            return
        text = self._line(done, now)
        self._shown = _Mark(done, now)
        if self._live is not None:
            self._live.update(rich.text.Text(text), refresh=True)
        else:
            self.say(text)

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        self._console.print(rich.text.Text(text), soft_wrap=True)

    def _line(self, done: int, now: float) -> str:
        seconds = max(now - self._started.seconds, 1e-9)
        rate = (done - self._started.done) / seconds
        left = (self._total - done) / rate if rate > 0 else math.inf
        last = "-" if self._last_return is None else f"{self._last_return:.1f}"
        return (
            f"{self._phase}: {done:,} of {self._total:,} {self._unit}, "
            f"{_rate(rate)} {self._unit}/s, ETA {duration(left)}, last return {last}"
        )


def _rate(per_second: float) -> str:
    """Writes a rate with as many digits as tell something."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2f}"


def duration(seconds: float) -> str:
    """Writes a number of seconds as hours, minutes and seconds."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
