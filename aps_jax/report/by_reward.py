"""Reports what pretrained agents did for several reward functions, tuned or not.

Reads the folders of a sweep: `GAME/AGENT/seed_N/rewards` holds the zero-shot results of
an agent (`evaluate --reward=...`), `GAME/AGENT/seed_N/pretrained_NAME` what it reached
after fine-tuning on one of the reward functions (`pretrained` for the score).
"""

import os
import pathlib
from typing import Any

import numpy as np

from aps_jax.envs import reward_functions
from aps_jax.report import tables
from aps_jax.runs import folders
from aps_jax.scores import estimates

_NOTE = (
    "Returns of the reward function itself, in full games: mean over seeds [95 % "
    "bootstrap interval over seeds]. Zero-shot: no gradient step has seen a reward. "
    "Random tasks: the same agent, each game for a task drawn at random. "
    "docs/rewards.md and examples/rewards.py explain the reward functions."
)


def table(folder: str | os.PathLike) -> tables.Table | None:
    """Returns a row for each game, agent and reward function; None if there is none.

    Args:
      folder: Of the sweep, or what its `--keep` kept.
    """
    found: dict[tuple[str, str, str], list[tuple[Any, float | None]]] = {}
    for path in sorted(pathlib.Path(folder).glob("*/*/seed_*/rewards/result.json")):
        result = folders.read_json(path)
        for one in result["rewards"]:
            name = f"pretrained{folder_suffix(one['reward'])}"
            tuned = path.parents[1] / name / folders.RESULT_NAME
            score = folders.read_json(tuned)["return_mean"] if tuned.exists() else None
            key = (result["game"], result["agent"], one["reward"])
            found.setdefault(key, []).append((one, score))
    rows = []
    for (game, agent, reward), seeds in found.items():
        ones = [one for one, _ in seeds]
        tuned_means = [score for _, score in seeds if score is not None]
        r_squared, samples, nonzero = (
            np.mean([one["adapted"][name] for one in ones])
            for name in ("r_squared", "num_samples", "num_nonzero")
        )
        rows.append(
            {
                "game": game,
                "agent": agent,
                "reward": reward.rpartition(":")[2],
                "seeds": str(len(seeds)),
                "random tasks": _over_seeds(
                    [o["random_tasks"]["return_mean"] for o in ones]
                    if all("random_tasks" in one for one in ones)
                    else []
                ),
                "random play": _over_seeds([o["random"]["return_mean"] for o in ones]),
                "zero-shot": _over_seeds([o["zero_shot"]["return_mean"] for o in ones]),
                "after fine-tuning": _over_seeds(tuned_means),
                "R^2": f"{r_squared:.3f}",
                "rewards (not 0)": f"{samples:,.0f} ({nonzero:,.0f})",
            }
        )
    title = "One pretrained agent, several reward functions"
    return tables.make_table(title, rows, _NOTE) if rows else None


def _over_seeds(returns: list[float]) -> str:
    """Formats the mean of a return for each seed, with its interval."""
    if not returns:
        return "-"
    estimate = estimates.bootstrap(estimates.mean, [returns], seed=0)
    return tables.format_estimate(estimate, "{:,.1f}".format)


def folder_suffix(reward: str) -> str:
    """Returns what a folder's name ends with if its run learned another reward."""
    return "" if reward == reward_functions.SCORE else "_" + reward.replace(":", "_")
