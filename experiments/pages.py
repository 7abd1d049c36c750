r"""Writes the parts of pages that are made from code and results, never typed.

  python -m experiments.pages          writes them
  python -m experiments.pages --check  names those that are stale, and fails if any is

They stand between two comments in the page, which name what makes them.
"""

import contextlib
import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from aps_jax import agents
from aps_jax import config as config_lib
from aps_jax.envs import atari
from aps_jax.report import by_reward, published, report, tables
from aps_jax.runs import folders, metrics
from aps_jax.types import Metric
from experiments.benchmark import table as bench_table

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = pathlib.Path("results", "cpu_sweep")

# Rows of the benchmark that the page on scaling shows; all others are on performance's.
_ON_SCALING = ("devices", "particles", "seeds")

_CHECK = flags.DEFINE_bool(
    "check", False, "Whether to compare only, and write nothing."
)


def results_table() -> str:
    """Returns the README's tables: what was run, what it scored, what was gained."""
    # Seen from the root: notices name folders, and pages no machine's.
    with contextlib.chdir(ROOT):
        built = report.report([RESULTS], systems=("APS",))
    shown = [t for t in tables.tables(built) if not t.title.startswith("Human")]
    lines = [line for table in shown for line in tables.table_lines(table, "**{}**")]
    lines.append(
        "APS in capitals: published, with budgets and networks far beyond these "
        "(docs/protocol.md).\n"
    )
    lines += [f"- {notice}" for notice in built.notices] + [""]
    if table := by_reward.table(ROOT / RESULTS):
        lines += tables.table_lines(table, "**{}**")
    made = json.loads((ROOT / RESULTS / "sweep.json").read_text(encoding="utf-8"))
    lines.append(
        f"Made in {made['wall_seconds'] / 3600:.1f} hours on "
        f"{made['machine']['cores']} cores ({made['machine']['cpu']}, no GPU) at "
        "commit "
        f"{', '.join(commit[:12] for commit in made['git_commits'])}. Every result "
        f"and command: [`{RESULTS}`]({RESULTS}/sweep.json).\n"
    )
    # Each note once, under the first of its tables.
    notes = [line for line in lines if line.endswith("\n")]
    return "\n".join(
        line
        for number, line in enumerate(lines)
        if line not in notes or line not in lines[:number]
    )


def atari100k_table() -> str:
    """Returns known agents beside their published scores."""
    folder = ROOT / "results" / "atari100k"
    shown = {}
    if any(folder.rglob("result.json")):
        shown = {table.title: table for table in tables.tables(report.report([folder]))}
    if published.TITLE not in shown:
        return "No runs are kept yet: `make atari100k` makes them."
    return "\n".join(tables.table_lines(shown[published.TITLE], "**{}**"))


def measured_rows(is_shown: Callable[[str], bool]) -> Callable[[], str]:
    """Returns what makes the table of some rows of the benchmark as measured."""

    def make() -> str:
        measured = folders.read_json(ROOT / "results/benchmark_cpu/benchmark.json")
        rows = [bench_table.Row(**row) for row in measured["rows"]]
        shown = [row for row in rows if is_shown(row.row)]
        return bench_table.to_markdown(shown, measured["machine"])

    return make


def metrics_tables() -> str:
    """Returns the metrics of all agents, each group once, under its agents."""
    groups: dict[tuple[str, tuple[Metric, ...]], list[str]] = {}
    for name in agents.AGENTS:
        agent = config_lib.preset_config("smoke", name).make_agent(2, atari.OBSERVATION)
        phases = {"Pretraining": agent.pretrain, "Learning from reward": agent.finetune}
        for stage, phase in phases.items():
            if phase is not None:
                groups.setdefault((stage, phase.learner.metrics), []).append(name)
    sections: dict[str, Sequence[Metric]] = {
        "Progress, in every stage": metrics.COUNTERS,
        **{f"{s}: {', '.join(who)}": learned for (s, learned), who in groups.items()},
        "Evaluations, in the rows after full games": metrics.EVALUATION,
    }
    lines = []
    for heading, group in sections.items():
        lines += [f"## {heading}", "", "| metric | unit | meaning |", "|---|---|---|"]
        lines += [f"| `{m.name}` | {m.unit} | {m.meaning} |" for m in group]
        lines.append("")
    return "\n".join(lines)


# Page -> name of the part -> what makes it.
PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "docs/metrics.md": {"metrics": metrics_tables},
    "docs/performance.md": {
        "benchmark": measured_rows(lambda name: name not in _ON_SCALING),
    },
    "docs/scaling.md": {name: measured_rows(name.__eq__) for name in _ON_SCALING},
    "docs/value_agents.md": {"atari100k": atari100k_table},
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
        part = part.replace("\\", r"\\")  # Backslashes of the part stay as they are.
        text = re.sub(pattern, part, text, flags=re.DOTALL)
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
