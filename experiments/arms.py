"""Arms of a study: agents, and controls that lack one part of the method."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aps_jax import config as config_lib
from aps_jax.report import tables
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


def estimate(runs: Sequence[Sequence[Mapping[str, Any]]], column: str) -> str:
    """Returns the interquartile mean of all worlds' runs, with its 95 % interval."""
    scores = [[row[column] for row in rows] for rows in runs]
    found = estimates.bootstrap(estimates.interquartile_mean, scores, seed=0)
    return tables.format_estimate(found, lambda x: f"{x:.2f}")


def nested(found: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    """Returns what was found of each world and arm, as a file of JSON holds it."""
    of_worlds: dict[str, Any] = {}
    for (world, arm), rows in found.items():
        of_worlds.setdefault(world, {})[arm] = rows
    return of_worlds
