"""Reports what pretrained agents did for several reward functions, tuned or not.

Reads the folders of a sweep: `GAME/AGENT/seed_N/rewards` holds the zero-shot results of
an agent (`evaluate --reward=...`), `GAME/AGENT/seed_N/pretrained_NAME` what it reached
after fine-tuning on one of the reward functions (`pretrained` for the score).
"""

import functools
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from aps_jax.envs import reward_functions
from aps_jax.report import tables
from aps_jax.runs import folders
from aps_jax.scores import estimates


class RewardRow(NamedTuple):
    """One reward function of one game: means over seeds, with intervals over seeds."""

    game: str
    agent: str
    reward: str
    num_seeds: int
    random: estimates.Estimate  # Return of random play.
    zero_shot: estimates.Estimate
    finetuned: estimates.Estimate | None  # None where no seed was fine-tuned.
    r_squared: estimates.Estimate
    num_samples: float  # Rewards regressed.
    num_nonzero: float  # Of those, not 0.


def collect(
    folder: str | os.PathLike, *, num_resamples: int = 10_000
) -> list[RewardRow]:
    """Returns a row for each game, agent and reward function, in this order.

    Args:
      folder: Of the sweep, or what its `--keep` kept.
      num_resamples: Bootstrap resamples behind each interval.
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
    over_seeds = functools.partial(
        estimates.bootstrap, estimates.mean, seed=0, num_resamples=num_resamples
    )
    rows = []
    for key, seeds in found.items():
        ones = [one for one, _ in seeds]
        tuned_means = [score for _, score in seeds if score is not None]
        adapted = [one["adapted"] for one in ones]
        rows.append(
            RewardRow(
                *key,
                len(seeds),
                over_seeds([[one["random"]["return_mean"] for one in ones]]),
                over_seeds([[one["zero_shot"]["return_mean"] for one in ones]]),
                over_seeds([tuned_means]) if tuned_means else None,
                over_seeds([[one["r_squared"] for one in adapted]]),
                float(np.mean([one["num_samples"] for one in adapted])),
                float(np.mean([one["num_nonzero"] for one in adapted])),
            )
        )
    return rows


def folder_suffix(reward: str) -> str:
    """Returns what a folder's name ends with if its run learned another reward."""
    return "" if reward == reward_functions.SCORE else "_" + reward.replace(":", "_")


def table(rows: list[RewardRow]) -> tables.Table:
    """Formats the rows."""

    def returns(estimate: estimates.Estimate | None) -> str:
        return tables.format_estimate(estimate, "{:,.1f}".format)

    cells = (
        {
            "game": row.game,
            "agent": row.agent,
            "reward": row.reward.rpartition(":")[2],
            "seeds": str(row.num_seeds),
            "random play": returns(row.random),
            "zero-shot": returns(row.zero_shot),
            "after fine-tuning": returns(row.finetuned),
            "R^2": f"{row.r_squared.value:.3f}",
            "rewards (not 0)": f"{row.num_samples:,.0f} ({row.num_nonzero:,.0f})",
        }
        for row in rows
    )
    return tables.make_table(
        "One pretrained agent, several reward functions",
        cells,
        "Returns of the reward function itself, in full games: mean over seeds [95 % "
        "bootstrap interval over seeds]. Zero-shot: no gradient step has seen a "
        "reward. docs/rewards.md and examples/rewards.py explain the reward functions.",
    )
