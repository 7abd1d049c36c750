r"""Writes the parts of pages that are made from code and results, never typed.

  python -m experiments.pages          writes them
  python -m experiments.pages --check  says which are stale, and fails if any is

They stand between two comments in the page, which name what makes them.
"""

import contextlib
import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from aps_jax.report import by_reward, report, tables
from aps_jax.runs import folders, metrics
from experiments.benchmark import table as bench_table
from experiments.maze import grid

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = pathlib.Path("results", "cpu_sweep")

# Rows of the benchmark that the page on scaling shows; all others are on performance's.
_ON_SCALING = ("devices", "particles", "seeds")
# Rows, and cases by a part of them, that were measured once and are no more.
_GONE = ("knn_accuracy", "knn_memory", "recompilation")
_GONE_CASES = ("first sketch", "host replay", "bytes per step", "memory of ")

_CHECK = flags.DEFINE_bool(
    "check", False, "Whether to compare only, and write nothing."
)


def results_table() -> str:
    """Returns the README's table of the first measured results, as `report` makes it."""
    # Seen from the root: notices name folders, and pages no machine's.
    with contextlib.chdir(ROOT):
        built = report.report([RESULTS], systems=("APS",))
    text = tables.results_markdown(built)
    if rows := by_reward.collect(ROOT / RESULTS):
        tasks = by_reward.table(rows)
        lines = [f"**{tasks.title}**", "", *tables.markdown_table(tasks), ""]
        text += "\n" + "\n".join([*lines, *tasks.notes]) + "\n"
    made = json.loads((ROOT / RESULTS / "sweep.json").read_text(encoding="utf-8"))
    hours = made["wall_seconds"] / 3600
    return text + (
        f"\nMade in {hours:.1f} hours on {made['machine']['cores']} cores "
        f"({made['machine']['cpu']}, no GPU) at commit "
        f"{', '.join(commit[:12] for commit in made['git_commits'])}. Every result and "
        f"command: [`{RESULTS}`]({RESULTS}/sweep.json).\n"
    )


def maze_table() -> str:
    """Returns the maze's tables, without the arm that was measured wrongly."""
    result = folders.read_json(ROOT / "results/maze/maze.json")
    result["agents"] = [agent for agent in result["agents"] if agent != "apt"]
    return grid.format_table({**result, "table": grid.summarise(result)})


def ablation_table() -> str:
    """Returns the choices of the maze's agent, as the ablation measured them."""
    text = (ROOT / "results/maze_ablation/ablation.md").read_text(encoding="utf-8")
    first = text.split("\n\n")[0].splitlines()
    return "\n".join(line for line in first if "intercept" not in line)


def measured_rows(is_shown: Callable[[str], bool]) -> Callable[[], str]:
    """Returns what makes the table of some rows of the benchmark, as it was measured."""

    def is_gone(row: bench_table.Row) -> bool:
        return row.row in _GONE or any(words in row.case for words in _GONE_CASES)

    def make() -> str:
        path = ROOT / "results/benchmark_cpu/benchmark.json"
        measured = json.loads(path.read_text(encoding="utf-8"))
        rows = [bench_table.Row(**row) for row in measured["rows"]]
        return bench_table.to_markdown(
            [row for row in rows if is_shown(row.row) and not is_gone(row)],
            measured["machine"],
        )

    return make


# Page -> name of the part -> what makes it.
PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "docs/maze.md": {"maze": maze_table, "ablation": ablation_table},
    "docs/metrics.md": {"metrics": metrics.to_markdown},
    "docs/performance.md": {
        "benchmark": measured_rows(lambda name: name not in _ON_SCALING),
    },
    "docs/scaling.md": {name: measured_rows(name.__eq__) for name in _ON_SCALING},
    "README.md": {"results": results_table},
}


def updated(page: str) -> str:
    """Returns a page's text with its made parts as they should be.

    Raises:
      ValueError: The page lacks the comments around a part.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, make in PARTS[page].items():
        begin, end = f"<!-- made: {name} -->", f"<!-- end: {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        if not re.search(pattern, text, flags=re.DOTALL):
            raise ValueError(f"{page} has no part between {begin} and {end}.")
        part = f"{begin}\n\n{make().strip()}\n\n{end}"
        # A function, so that backslashes in the part are left alone.
        text = re.sub(pattern, lambda _, part=part: part, text, flags=re.DOTALL)
    return text


def main(argv: Sequence[str]) -> None:
    """Writes or compares every page."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected words: {argv[1:]}")
    stale = [page for page in PARTS if updated(page) != (ROOT / page).read_text()]
    if _CHECK.value and stale:
        print(f"stale: {', '.join(stale)}; run python -m experiments.pages")
        sys.exit(1)
    for page in stale:
        (ROOT / page).write_text(updated(page), encoding="utf-8")
        print(f"written: {page}")


if __name__ == "__main__":
    app.run(main)
