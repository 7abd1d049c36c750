"""Output that cannot end a run: what a stream does not take is dropped."""

import contextlib
import io
import os
import sys
from typing import Any, TextIO, cast

import rich.console

# A full disk, a closed pipe, a lost terminal; a closed or detached stream; a stream in
# the midst of a write that a signal's handler interrupted.
_TROUBLE = (OSError, ValueError, RuntimeError)


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


class BestEffort:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: "TextIO | BestEffort | None"):
        """Wraps `stream`; None is what Python has where a descriptor was closed."""
        self._stream = stream or _Nowhere()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes `text`, with escapes for what the stream's encoding lacks."""
        with contextlib.suppress(*_TROUBLE):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                code = self._stream.encoding or "ascii"
                self._stream.write(text.encode(code, "backslashreplace").decode(code))
        return len(text)

    def flush(self) -> None:
        """Flushes what can be."""
        with contextlib.suppress(*_TROUBLE):
            self._stream.flush()

    def isatty(self) -> bool:
        """Returns whether it is an open terminal."""
        with contextlib.suppress(*_TROUBLE):
            return self._stream.isatty()
        return False

    @property
    def is_live(self) -> bool:
        """Whether it is a terminal on which a line can be drawn anew."""
        return self.isatty() and os.environ.get("TERM", "") not in _DUMB


_DUMB = ("", "dumb", "unknown")  # values of TERM that know no cursor


def protect() -> None:
    """Makes standard output and standard error best effort, until the process ends."""
    for name in ("stdout", "stderr"):
        setattr(sys, name, BestEffort(getattr(sys, name)))


def make_console(stream: TextIO | BestEffort | None = None) -> rich.console.Console:
    """Makes a console of rich; whether `stream` is a terminal decides on colours.

    Rich alone would follow FORCE_COLOR into files, and end the process where a pipe is
    closed. The default is standard output.
    """
    shown = BestEffort(stream or sys.stdout)
    return rich.console.Console(
        file=cast(TextIO, shown),
        force_terminal=shown.isatty(),
        force_interactive=shown.is_live,
    )
