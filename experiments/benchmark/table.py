"""Rows of the benchmark: what was measured, the goal, and how turns are timed."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from aps_jax.runs import machine


class Row(NamedTuple):
    """One line of the table."""

    row: str  # Name of the row, as `--rows` takes it.
    case: str  # What was measured.
    measured: float
    limit: float  # What it is compared with, in the same unit.
    unit: str
    ratio: float
    goal: str = ""  # In words; empty if this line has none on this device.
    is_met: bool | None = None  # None where there is no goal.


def at_least(ratio: float, goal: float) -> dict[str, Any]:
    """Returns the last fields of a row whose ratio must reach a goal."""
    return {"ratio": ratio, "goal": f"at least {goal:g}", "is_met": ratio >= goal}


def at_most(ratio: float, goal: float) -> dict[str, Any]:
    """Returns the last fields of a row whose ratio must stay under a goal."""
    return {"ratio": ratio, "goal": f"at most {goal:g}", "is_met": ratio <= goal}


class Turns:
    """Seconds per unit of work of several things that take turns.

    A busy machine slows neighbouring turns alike, so that ratios within a repetition
    hold where the seconds do not.
    """

    def __init__(self, seconds: Mapping[Any, Sequence[float]]):
        self.seconds = seconds

    def median(self, name: Any) -> float:
        """Returns the median seconds of one thing."""
        return statistics.median(self.seconds[name])

    def ratio(self, function: Callable[[Mapping[Any, float]], float]) -> float:
        """Returns the median over repetitions of a function of their seconds."""
        names = list(self.seconds)
        repetitions = zip(*(self.seconds[name] for name in names), strict=True)
        return statistics.median(
            function(dict(zip(names, values, strict=True))) for values in repetitions
        )

    def rates(
        self,
        row: str,
        case: str,
        ours: Any,
        other: Any,
        unit: str,
        *,
        scale: float = 1.0,
        goal: float | None = None,
    ) -> Row:
        """Makes the row that compares the rates of two things, in units of the row.

        A unit of work is `scale` units of the row. The ratio must reach the goal.
        """
        ratio = self.ratio(lambda t: t[other] / t[ours])
        last = {"ratio": ratio} if goal is None else at_least(ratio, goal)
        rates = scale / self.median(ours), scale / self.median(other)
        return Row(row, case, *rates, unit, **last)

    def times(
        self, row: str, case: str, ours: Any, other: Any, unit: str, *, scale: float
    ) -> Row:
        """Makes the row that compares the times of two things, without a goal."""
        ratio = self.ratio(lambda t: t[ours] / t[other])
        times = scale * self.median(ours), scale * self.median(other)
        return Row(row, case, *times, unit, ratio)


def take_turns(
    things: Mapping[Any, Callable[[], Any]],
    *,
    repetitions: int,
    work: Mapping[Any, float] | None = None,
) -> Turns:
    """Times things that take turns, after one turn of each that nobody times.

    Args:
      things: functions that return when their work is done, by name.
      repetitions: turns of each.
      work: units of work of one call, 1 by default.
    """
    for thing in things.values():
        thing()
    measured: dict[Any, list[float]] = {name: [] for name in things}
    for _ in range(repetitions):
        for name, thing in things.items():
            start = time.perf_counter()
            thing()
            duration = time.perf_counter() - start
            measured[name].append(duration / (work or {}).get(name, 1.0))
    return Turns(measured)


def describe_machine() -> dict[str, Any]:
    """Returns what the figures were measured on."""
    device = jax.devices()[0]
    return {
        "cpu": machine.cpu_fact("model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "device": device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


HEADER = ("row", "case", "measured", "limit", "unit", "ratio", "goal", "met")


def cells(row: Row) -> tuple[str, ...]:
    """Returns a row as the table shows it."""

    def number(value: float) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"

    met = {True: "yes", False: "**no**", None: "-"}[row.is_met]
    measured, limit = number(row.measured), number(row.limit)
    ratio = f"{row.ratio:.3g}"
    return (row.row, row.case, measured, limit, row.unit, ratio, row.goal or "-", met)


def to_table(rows: Sequence[Row]) -> str:
    """Returns rows as a Markdown table."""
    lines = [HEADER, ["---"] * len(HEADER), *map(cells, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def to_markdown(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    """Returns the table as Markdown, under a line that describes the machine."""
    description = (
        f"{machine['cores']} cores of {machine['cpu']}, device {machine['device']} "
        f"({machine['platform']}), {machine['utc']} UTC, load average before the run "
        f"{machine['load_average']:.1f}, Python {machine['python']}, JAX "
        f"{machine['jax']}, commit {machine['commit']}, size {machine['size']}."
    )
    return f"{description}\n\n{to_table(rows)}"
