"""Tests of aps_jax.runs.progress and aps_jax.runs.console: what is shown, and where."""

import errno
import io
import math
import os
import pty

import pytest

from aps_jax.runs import console, progress


class Clock:
    """Stands in for `time.monotonic`."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def terminal(monkeypatch):
    """A stream to a terminal, and a function that returns what it has been sent."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    reader, writer = pty.openpty()
    with open(writer, "w", encoding="utf-8") as stream:
        yield stream, lambda: os.read(reader, 100_000).decode()
    os.close(reader)


def test_progress_says_phase_frames_rate_eta_and_return(clock):
    stream = io.StringIO()
    shown = progress.Progress(stream)
    shown.start("pretrain", total=1000)
    clock.now += 5.0
    shown.tick(100)  # Too early for a line in a file.
    clock.now += 15.0
    shown.tick(400, last_return=-20.5)
    assert stream.getvalue().split("\n")[0] == (
        "pretrain: 400 of 1,000 frames, 20 frames/s, ETA 30s, last return -20.5"
    )


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0s"), (59.6, "1m00s"), (3725, "1h02m"), (math.inf, "unknown")],
)
def test_durations_are_written_for_people(seconds, text):
    assert progress.duration(seconds) == text


def test_the_rate_is_of_what_this_process_did(clock):
    """Resumed at 600 of 1,000: 100 frames in 20 s, and 300 left."""
    stream = io.StringIO()
    shown = progress.Progress(stream)
    shown.start("pretrain", total=1000, done=600)
    clock.now += 20.0
    shown.tick(700)
    assert "700 of 1,000 frames, 5.00 frames/s, ETA 1m00s" in stream.getvalue()


def test_the_end_is_said_once_and_the_next_phase_begins_anew(clock):
    stream = io.StringIO()
    shown = progress.Progress(stream)
    for phase, total in (("pretrain", 8), ("evaluate", 2)):
        shown.start(phase, total=total, unit="games")
        clock.now += 1.0
        shown.tick(total, last_return=math.nan)
        shown.tick(total)
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "pretrain: 8 of 8 games",
        "evaluate: 2 of 2 games",
    ]


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_no_variable_makes_a_file_a_terminal(clock, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    stream = io.StringIO()
    with progress.Progress(stream) as shown:
        shown.start("pretrain", total=8)
        clock.now += 20.0
        shown.tick(4)
        shown.say("[bold]a line[/bold] of [1e-4]")
    console.make_console(stream).print("[bold]bold[/bold]")
    assert "\x1b" not in stream.getvalue()
    assert "[bold]a line[/bold] of [1e-4]\n" in stream.getvalue()


def test_a_terminal_has_one_line_that_is_drawn_anew(clock, terminal):
    stream, read = terminal
    with progress.Progress(stream) as shown:
        shown.start("pretrain", total=8)
        for done in (1, 2):
            clock.now += 1.0
            shown.tick(done)
        shown.say("[said]")
    sent = read()
    assert "pretrain: 1 of 8 frames" in sent and "pretrain: 2 of 8 frames" in sent
    assert "[said]" in sent and "\x1b[2K" in sent  # which clears the line


@pytest.mark.parametrize("term", ["", "dumb", "unknown"])
def test_a_terminal_without_a_cursor_has_plain_lines(
    clock, terminal, monkeypatch, term
):
    stream, read = terminal
    monkeypatch.setenv("TERM", term)
    with progress.Progress(stream) as shown:
        shown.start("pretrain", total=8)
        clock.now += 20.0
        shown.tick(4)
    assert read().startswith("pretrain: 4 of 8 frames")


class Refusing(io.StringIO):
    """A stream that takes nothing, not even questions."""

    def __init__(self, error):
        super().__init__()
        self._error = error

    def write(self, text):
        raise self._error

    def flush(self):
        raise self._error

    def isatty(self):
        raise self._error


@pytest.mark.parametrize(
    "stream",
    [
        None,  # A descriptor that was closed when Python began.
        Refusing(OSError(errno.ENOSPC, "No space left on device")),
        Refusing(OSError(errno.EIO, "Input/output error")),
        Refusing(BrokenPipeError()),
        Refusing(BlockingIOError()),
        Refusing(ValueError("I/O operation on closed file")),
        Refusing(RuntimeError("reentrant call inside")),
    ],
)
def test_a_stream_that_takes_nothing_is_no_trouble(clock, stream):
    stream = console.BestEffort(stream)
    assert not stream.isatty()
    with progress.Progress(stream) as shown:
        shown.start("pretrain", total=8)
        clock.now += 20.0
        shown.tick(4)
        shown.warn("it goes on")
    console.make_console(stream).print("a table")
    print("a result", file=stream, flush=True)


def test_what_an_encoding_lacks_is_escaped():
    written = io.BytesIO()
    with io.TextIOWrapper(written, encoding="ascii") as stream:
        print("caf\u00e9 \udcff", file=console.BestEffort(stream), flush=True)
        assert written.getvalue() == b"caf\\xe9 \\udcff\n"


def test_silence_logs_warnings_and_nothing_else(caplog):
    with progress.Silent() as shown:
        shown.start("pretrain", total=8)
        shown.tick(4)
        shown.say("nothing")
        shown.warn("100% full")
    assert [record.getMessage() for record in caplog.records] == ["100% full"]
