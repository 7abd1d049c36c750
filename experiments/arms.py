"""Arms of a study: agents, and controls that lack one part of the method."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aps_jax import config as config_lib
from aps_jax.report import tables
from aps_jax.runs import folders
from aps_jax.scores import estimates
from experiments import common_flags

# Every arm is the agent file that runs on Atari with some options changed.
ARMS: dict[str, dict[str, Any]] = {
    "aps": {},
    "visr": {"agent": "visr"},
    "entropy": {"agent": "entropy"},
    "random play": {"pretrain_epsilon": 1.0},
    "frozen features": {"feature_learning_rate": 0.0},
    "both": {"pretrain_epsilon": 1.0, "feature_learning_rate": 0.0},
    "permuted bonus": {"permuted": "entropy"},
    "permuted tasks": {"permuted": "task"},
}


Scores = Sequence[Mapping[str, Any]]  # of each seed, by column
Found = Mapping[tuple[str, str], Scores]  # by world and arm


@dataclasses.dataclass(frozen=True)
class Cell:
    """An arm in a world."""

    world: str
    arm: str
    config: config_lib.Config
    folder: pathlib.Path
    seeds: tuple[int, ...]


def check_known(kind: str, asked: Sequence[str], known: Sequence[str]) -> None:
    """Checks names that flags give.

    Raises:
      ValueError: One is not known.
    """
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(
            f"Unknown {kind} {unknown[0]!r}: give some of {', '.join(known)}."
        )


def make_cells(
    workdir: pathlib.Path,
    family: str,
    worlds: Sequence[str],
    arms: Mapping[str, Mapping[str, Any]],
    options_of: Callable[[str], Mapping[str, Any]],
) -> list[Cell]:
    """Returns the cells of a study, world by world, for the seeds of the flags.

    Args:
      workdir: Of the study.
      family: The worlds' family and preset, such as `maze`.
      worlds: Their names in it.
      arms: By name the options in which each differs.
      options_of: Options of all arms in a world; flags go before them.

    Raises:
      ValueError: A flag gives an option in which arms differ.
    """
    given = common_flags.given_options()
    if own := {key for arm in arms.values() for key in arm} & set(given):
        raise ValueError(f"--{min(own)} is what the arms differ in: leave it out.")
    seeds = tuple(common_flags.seeds_of_runs() or (given.get("seed", 0),))
    cells = []
    for world in dict.fromkeys(worlds):
        for name, changed in arms.items():
            config = config_lib.preset_config(family, changed.get("agent", "aps"))
            options = {"game": f"{family}/{world}", **changed, **options_of(world)}
            options |= {**given, "seed": seeds[0]}
            config = config_lib.replace_options(config, **options)
            folder = workdir / world / name.replace(" ", "_")
            cells.append(Cell(world, name, config, folder, seeds))
    return cells


def run(
    workdir: pathlib.Path,
    cells: Sequence[Cell],
    run_cell: Callable[..., Scores],
    make_tables: Callable[[Found], list[tables.Table]],
) -> Found:
    """Runs what is missing of a study, and reports in `WORKDIR/report`.

    Args:
      workdir: Of the study.
      cells: Of `make_cells`.
      run_cell: Runs one, watched by `common_flags.watched`, and returns its scores.
      make_tables: Makes tables of all.

    Returns:
      What was found of each world and arm.
    """
    report, found = workdir / "report", {}
    of_worlds: dict[str, dict[str, Scores]] = {}
    with common_flags.watched() as watched:
        for cell in cells:
            print(f"{cell.world}, {cell.arm}:", flush=True)
            scores = run_cell(cell, **watched)
            found[cell.world, cell.arm] = scores
            of_worlds.setdefault(cell.world, {})[cell.arm] = scores
            report.mkdir(parents=True, exist_ok=True)
            folders.write_json(report / "scores.json", of_worlds)
    made = make_tables(found)
    tables.show_tables(made)
    lines = [line for one in made for line in (*tables.table_lines(one, "## {}"), "")]
    (report / "report.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"Written to {report}.")
    return found


def make_table(
    title: str, worlds: Sequence[str], columns: Mapping[str, str], found: Found
) -> tables.Table:
    """Makes a table of all arms in some worlds; "-" where an arm lacks a column."""
    rows = []
    for arm in dict.fromkeys(arm for _, arm in found):
        runs = [found[world, arm] for world in worlds]
        rows.append({"arm": arm})
        for column, shown in columns.items():
            rows[-1][shown] = "-"
            if column in runs[0][0]:
                scores = [[row[column] for row in of_seeds] for of_seeds in runs]
                rows[-1][shown] = estimate(estimates.interquartile_mean, scores)
    over = f"{len(worlds)} worlds and " if len(worlds) > 1 else ""
    note = f"Interquartile means over {over}{len(runs[0])} seeds, 95 % intervals."
    return tables.make_table(title, rows, note)


def estimate(statistic: Callable[..., Any], *scores: Any) -> str:
    """Returns a statistic of scores by world and run, with its 95 % interval."""
    found = estimates.bootstrap(statistic, *scores, seed=0)
    return tables.format_estimate(found, lambda x: f"{x:.2f}")
