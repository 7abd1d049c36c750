"""Reports what pretrained agents did on several tasks, without and with learning.

Reads the folders of a sweep: `GAME/AGENT/seed_N/tasks` holds the zero-shot results of an
agent (`evaluate --task=...`), `GAME/AGENT/seed_N/pretrained_TASK` what it reached after
fine-tuning on one of the tasks (`pretrained` for the score).
"""

import functools
import os
import pathlib
from typing import NamedTuple

import numpy as np

from aps_jax.envs import reward_functions
from aps_jax.report import tables
from aps_jax.runs import folders
from aps_jax.scores import estimates


class TaskRow(NamedTuple):
    """One task of one game: means over seeds, with intervals over seeds."""

    game: str
    agent: str
    task: str
    num_seeds: int
    random: estimates.Estimate  # Return of random play.
    zero_shot: estimates.Estimate
    finetuned: estimates.Estimate | None  # None where no seed was fine-tuned.
    r_squared: estimates.Estimate
    num_samples: float  # Rewards regressed.
    num_nonzero: float  # Of those, not 0.


def collect(folder: str | os.PathLike, *, num_resamples: int = 10_000) -> list[TaskRow]:
    """Reads the tasks of a sweep.

    Args:
      folder: Of the sweep, or what its `--keep` kept.
      num_resamples: Bootstrap resamples behind each interval.

    Returns:
      A row for each game, agent and task, in this order.
    """
    found: dict[tuple[str, str, str], list[dict]] = {}
    for path in sorted(pathlib.Path(folder).glob("*/*/seed_*/tasks/result.json")):
        result = folders.read_json(path)
        for one in result["tasks"]:
            suffix = task_suffix(one["name"])
            tuned = path.parents[1] / f"pretrained{suffix}" / folders.RESULT_NAME
            key = (result["game"], result["agent"], one["name"])
            found.setdefault(key, []).append(
                {
                    "random": one["random"]["return_mean"],
                    "zero_shot": one["zero_shot"]["return_mean"],
                    "r_squared": one["inferred"]["r_squared"],
                    "num_samples": one["inferred"]["num_samples"],
                    "num_nonzero": one["inferred"]["num_nonzero"],
                    "finetuned": (
                        folders.read_json(tuned)["return_mean"]
                        if tuned.exists()
                        else None
                    ),
                }
            )
    bootstrap = functools.partial(
        estimates.bootstrap, estimates.mean, seed=0, num_resamples=num_resamples
    )
    rows = []
    for (game, agent, task), seeds in found.items():

        def over_seeds(name: str, seeds=seeds) -> estimates.Estimate | None:
            values = [one[name] for one in seeds if one[name] is not None]
            return bootstrap([np.array(values, np.float64)]) if values else None

        rows.append(
            TaskRow(
                game,
                agent,
                task,
                len(seeds),
                over_seeds("random"),
                over_seeds("zero_shot"),
                over_seeds("finetuned"),
                over_seeds("r_squared"),
                float(np.mean([one["num_samples"] for one in seeds])),
                float(np.mean([one["num_nonzero"] for one in seeds])),
            )
        )
    return rows


def task_suffix(task: str) -> str:
    """Returns what a folder's name ends with if its run learned another task."""
    return "" if task == reward_functions.SCORE else "_" + task.replace(":", "_")


def table(rows: list[TaskRow]) -> tables.Table:
    """Words the rows."""

    def points(estimate: estimates.Estimate | None) -> str:
        if estimate is None:
            return ""
        return tables.format_estimate(estimate, lambda value: f"{value:,.1f}")

    return tables.Table(
        "One pretrained agent, several tasks",
        (
            "game",
            "task",
            "seeds",
            "random play",
            "zero-shot",
            "after fine-tuning",
            "R^2",
            "rewards (not 0)",
        ),
        tuple(
            (
                row.game,
                row.task.rpartition(":")[2],
                str(row.num_seeds),
                points(row.random),
                points(row.zero_shot),
                points(row.finetuned),
                f"{row.r_squared.value:.3f}",
                f"{row.num_samples:,.0f} ({row.num_nonzero:,.0f})",
            )
            for row in rows
        ),
        (
            (
                "Returns of the task itself, in full games: mean over seeds [95 % "
                "bootstrap interval over seeds]. Zero-shot: no gradient step has seen a "
                "reward. Tasks are explained in docs/tasks.md and examples/tasks.py."
            ),
        ),
    )
