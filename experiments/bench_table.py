"""Rows of the benchmark: what was measured, the goal, and how turns are timed."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

NOT_MEASURED = "not measured"


class Row(NamedTuple):
    """One line of the table."""

    row: str  # Name of the row, as `--rows` takes it.
    case: str  # What was measured.
    measured: float | None = None
    limit: float | None = None  # What it is compared with, in the same unit.
    unit: str = ""
    ratio: float | None = None
    goal: str = ""  # In words; empty if this line has none on this device.
    is_met: bool | None = None  # None where there is no goal or nothing was measured.
    note: str = ""


def at_least(ratio: float | None, goal: float) -> dict[str, Any]:
    """Returns the last fields of a row whose ratio must reach a goal."""
    return {
        "ratio": ratio,
        "goal": f"at least {goal:g}",
        "is_met": None if ratio is None else ratio >= goal,
    }


def at_most(ratio: float | None, goal: float) -> dict[str, Any]:
    """Returns the last fields of a row whose ratio must stay under a goal."""
    return {
        "ratio": ratio,
        "goal": f"at most {goal:g}",
        "is_met": None if ratio is None else ratio <= goal,
    }


class Turns:
    """Seconds per unit of work of several things that take turns.

    A busy machine slows neighbouring turns alike, so that ratios within a repetition
    hold where the seconds do not.
    """

    def __init__(self, seconds: Mapping[str, Sequence[float]]):
        self.seconds = seconds

    def median(self, name: str) -> float:
        """Returns the median seconds of one thing."""
        return statistics.median(self.seconds[name])

    def rate(self, name: str) -> float:
        """Returns units of work per second."""
        return 1.0 / self.median(name)

    def ratio(self, function: Callable[[Mapping[str, float]], float]) -> float:
        """Returns the median over repetitions of a function of their seconds."""
        names = list(self.seconds)
        repetitions = zip(*(self.seconds[name] for name in names), strict=True)
        return statistics.median(
            function(dict(zip(names, values, strict=True))) for values in repetitions
        )


def take_turns(
    things: Mapping[str, Callable[[], Any]],
    *,
    repetitions: int,
    work: Mapping[str, float] | None = None,
) -> Turns:
    """Times things that take turns, after one turn of each that nobody times.

    Args:
      things: functions that return when their work is done.
      repetitions: turns of each.
      work: units of work of one call, 1 by default.
    """
    for thing in things.values():
        thing()
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(repetitions):
        for name, thing in things.items():
            start = time.perf_counter()
            thing()
            duration = time.perf_counter() - start
            seconds[name].append(duration / (work or {}).get(name, 1.0))
    return Turns(seconds)


def describe_machine() -> dict[str, Any]:
    """Returns what the figures were measured on."""
    device = jax.devices()[0]
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "device": device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": _torch_version(),
        "utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _torch_version() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.__version__


HEADER = ("row", "case", "measured", "limit", "unit", "ratio", "goal", "met")


def cells(row: Row) -> tuple[str, ...]:
    """Returns a row as the table shows it."""
    met = {True: "yes", False: "**no**", None: "-"}[row.is_met]
    measured = "-" if row.measured is None else f"{row.measured:,.4g}"
    if row.measured is not None and abs(row.measured) >= 1000:
        measured = f"{row.measured:,.0f}"
    limit = "-" if row.limit is None else f"{row.limit:,.4g}"
    if row.limit is not None and abs(row.limit) >= 1000:
        limit = f"{row.limit:,.0f}"
    ratio = "-" if row.ratio is None else f"{row.ratio:.3g}"
    case = f"{row.case} ({row.note})" if row.note else row.case
    return (row.row, case, measured, limit, row.unit, ratio, row.goal or "-", met)


def to_markdown(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    """Returns the table as Markdown, under a line that describes the machine."""
    torch = machine["torch"] or "not installed"
    description = (
        f"{machine['cores']} cores of {machine['cpu']}, device {machine['device']} "
        f"({machine['platform']}), {machine['utc']} UTC, load average before the run "
        f"{machine['load_average']:.1f}, Python {machine['python']}, JAX "
        f"{machine['jax']}, PyTorch {torch}, commit {machine['commit']}, size "
        f"{machine['size']}."
    )
    lines = [
        description,
        "",
        "| " + " | ".join(HEADER) + " |",
        "| " + " | ".join("---" for _ in HEADER) + " |",
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def to_text(rows: Sequence[Row]) -> str:
    """Returns the table with columns of fixed width, for a terminal."""
    table = [HEADER, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
        for line in table
    )
