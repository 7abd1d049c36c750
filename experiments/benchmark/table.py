"""Rows of the benchmark: what was measured, the goal, and how turns are timed."""

import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments.benchmark import encoders

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
    is_met = None if ratio is None else ratio >= goal
    return {"ratio": ratio, "goal": f"at least {goal:g}", "is_met": is_met}


def at_most(ratio: float | None, goal: float) -> dict[str, Any]:
    """Returns the last fields of a row whose ratio must stay under a goal."""
    is_met = None if ratio is None else ratio <= goal
    return {"ratio": ratio, "goal": f"at most {goal:g}", "is_met": is_met}


def only_on_gpu(row: Row) -> Row:
    """Returns a row whose goal does not count on a CPU."""
    if jax.default_backend() != "cpu":
        return row
    return row._replace(goal=f"GPU: {row.goal}, {NOT_MEASURED}", is_met=None)


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
        """Makes the row that compares the rates of two things.

        Args:
          row, case, unit: of the row.
          ours, other: names of the thing measured and of that compared with.
          scale: units in one unit of work.
          goal: that the ratio must reach, if any.
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
        return Row(row, case, *times, unit, ratio=ratio)


def take_turns(
    things: Mapping[Any, Callable[[], Any]],
    *,
    repetitions: int,
    work: Mapping[Any, float] | None = None,
    seconds: float = 0.0,
) -> Turns:
    """Times things that take turns, after one turn of each that nobody times.

    Args:
      things: functions that return when their work is done, by name.
      repetitions: turns of each.
      work: units of work of one call, 1 by default.
      seconds: that a turn takes at least, by as many calls as it needs.
    """
    for thing in things.values():
        thing()
    measured: dict[Any, list[float]] = {name: [] for name in things}
    for _ in range(repetitions):
        for name, thing in things.items():
            num_calls, start = 0, time.perf_counter()
            while not num_calls or time.perf_counter() - start < seconds:
                thing()
                num_calls += 1
            duration = (time.perf_counter() - start) / num_calls
            measured[name].append(duration / (work or {}).get(name, 1.0))
    return Turns(measured)


def describe_machine() -> dict[str, Any]:
    """Returns what the figures were measured on."""
    device, torch = jax.devices()[0], encoders.torch()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "device": device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__ if torch else None,
        "utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def _cpu_model() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    found = re.search(r"^model name\s*: (.*)$", text, flags=re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


HEADER = ("row", "case", "measured", "limit", "unit", "ratio", "goal", "met")


def cells(row: Row) -> tuple[str, ...]:
    """Returns a row as the table shows it."""

    def number(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"

    met = {True: "yes", False: "**no**", None: "-"}[row.is_met]
    measured, limit = number(row.measured), number(row.limit)
    ratio = "-" if row.ratio is None else f"{row.ratio:.3g}"
    case = f"{row.case} ({row.note})" if row.note else row.case
    return (row.row, case, measured, limit, row.unit, ratio, row.goal or "-", met)


def to_table(rows: Sequence[Row]) -> str:
    """Returns rows as a Markdown table."""
    lines = [HEADER, ["---"] * len(HEADER), *map(cells, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


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
    return f"{description}\n\n{to_table(rows)}"
