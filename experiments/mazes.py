r"""Pretrains agents and controls in mazes, and scores them exactly without learning.

  python -m experiments.mazes --mazes=open,four_rooms --seeds=3 --workdir=runs/mazes
  python -m experiments.mazes --mazes=large --seeds=10 --workdir=runs/large

Every arm is the agent file that runs on Atari with some options changed. Seeds of an
arm learn at once. The same command goes on where it stopped. Ends with tables, and
writes them, scores.json and pictures to WORKDIR/report. docs/worlds.md says what the
columns are.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from aps_jax.envs import maze
from aps_jax.report import maze_pictures, tables
from aps_jax.runs import folders, metrics
from aps_jax.train import maze_scores, recorders, stages
from experiments import arms, common_flags

# A long way to the goal needs a long memory of it.
_LARGE = {"discount": 0.99, "pretrain_frames": 300_000}
_GROUPS = {"small": tuple(maze.SMALL), "large": tuple(maze.LARGE)}
_MAZES = flags.DEFINE_list(
    "mazes", ["small"], f"Some of {', '.join(maze.MAPS)}; small or large for all such."
)
_ARMS = flags.DEFINE_list(
    "maze_arms",
    list(arms.ARMS),
    f"Some of {', '.join(arms.ARMS)}, separated by commas.",
)
_NUM_REWARDS = 50
_LABELS = (10, 30, 100, 300)
_VISITED_STEPS = 20_000  # agent steps of behaviour after pretraining, for heat maps
_NUM_ENVS = 32


def main(argv: Sequence[str]) -> None:
    """Runs what is missing, and reports."""
    common_flags.reject_words(argv)
    workdir = common_flags.workdir_from_flags()
    report = workdir / "report"
    found = arms.run(workdir, make_cells(workdir), run_cell, make_tables)
    maze_pictures.save_heat_maps(
        report / "visits.png",
        {key: np.asarray(rows[0]["visits"]) for key, rows in found.items()},
    )
    maze_pictures.save_curves(
        report / "skill_following.png",
        {key: [row["curve"] for row in rows] for key, rows in found.items()},
        "skill_following",
    )


def make_cells(workdir: pathlib.Path) -> list[arms.Cell]:
    """Returns what the flags ask for, maze by maze.

    Raises:
      ValueError: A maze or an arm does not exist, or an option is of one arm's own.
    """
    names = [name for word in _MAZES.value for name in _GROUPS.get(word, (word,))]
    arms.check_known("maze", names, list(maze.MAPS))
    arms.check_known("arm", _ARMS.value, list(arms.ARMS))
    asked = {name: arms.ARMS[name] for name in _ARMS.value}
    return arms.make_cells(
        workdir, "maze", names, asked, lambda name: _LARGE if name in maze.LARGE else {}
    )


def run_cell(cell: arms.Cell, **watched: Any) -> list[dict[str, Any]]:
    """Pretrains the seeds of an arm in a maze, and scores those without scores.

    Args:
      cell: The arm.
      **watched: As for `stages.pretrain_runs`; so are the errors.
    """
    runs = recorders.make_runs(cell.config, cell.folder, cell.seeds)
    # What is finished returns at once; a folder of other values is refused.
    results = stages.pretrain_runs(runs, **watched)
    paths = [folder / "scores.json" for folder in runs.configs]
    tester = None
    for folder, result, path in zip(runs.configs, results, paths, strict=True):
        if path.exists():
            continue
        trained = stages.load_pretrained(folder, warn=common_flags.warn)
        if tester is None:
            tester = maze_scores.Tester(cell.config.game, trained.agent)
        scored = score(tester, trained.state, trained.config.seed)
        rows = metrics.read_metrics(folder / metrics.FILE_NAME)
        # Skill following is measured for each checkpoint, not in every row.
        names = ("agent_steps", "skill_following")
        pairs = zip(*(rows[name] for name in names), strict=True)
        known = [pair for pair in pairs if np.isfinite(pair[1])]
        curve = dict(zip(names, zip(*known, strict=True), strict=True))
        scored |= {
            "skill_following": result["skill_following"]["mean"],
            "predicted": result["skill_following"]["predicted"],
            "met": result["skill_following"]["met"],
            "coverage": rows["visited"][-1] / len(tester.free),
            "curve": curve,
        }
        folders.write_json(path, scored)
    return [folders.read_json(path) for path in paths]


def score(tester: maze_scores.Tester, state: Any, seed: int) -> dict[str, Any]:
    """Returns all that is measured of one pretrained agent."""
    rewards = maze_scores.box_rewards(tester.tables, _NUM_REWARDS, seed=1_000 + seed)
    of_all = tester.scores(state, rewards, seed=seed)
    found = {name: float(np.mean(values)) for name, values in of_all._asdict().items()}
    for num in _LABELS:
        of_few = tester.scores(state, rewards, num_labels=num, seed=seed)
        found[f"labels_{num}"] = float(np.mean(of_few.zero_shot))
    found["obedience"] = float(np.mean(tester.obedience(state, seed=seed)))
    visits = tester.visits(
        state,
        jax.random.key(seed),
        num_steps=_VISITED_STEPS // _NUM_ENVS,
        num_envs=_NUM_ENVS,
    )
    return {**found, "visits": visits.tolist()}


_COLUMNS = {
    "zero_shot": "zero-shot",
    "without_gpi": "without GPI",
    "best_of_task": "best for its task",
    "random_task": "random task",
    "obedience": "obedience",
    "skill_following": "skill following",
    "predicted": "predicted",
    "met": "met",
    "coverage": "states visited",
    **{f"labels_{num}": f"{num} labels" for num in _LABELS},
}


def make_tables(found: arms.Found) -> list[tables.Table]:
    """Makes a table of arms for each group of mazes, and one for each maze."""
    mazes = list(dict.fromkeys(name for name, _ in found))
    groups = {
        f"All {len(names)} {group} mazes": names
        for group, known in _GROUPS.items()
        if len(names := [name for name in mazes if name in known]) > 1
    }
    groups |= {name: [name] for name in mazes}
    return [arms.make_table(title, n, _COLUMNS, found) for title, n in groups.items()]


if __name__ == "__main__":
    common_flags.run(main, short=(*common_flags.SHORT, "seeds"))
