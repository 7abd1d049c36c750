r"""Measures what each choice of the maze agent is worth, one changed at a time.

  python -m experiments.maze.ablation --workdir=runs/maze_ablation

pretrains APS in every maze with the default settings and with each change in turn, and
writes `ablation.json` (every run) and `ablation.md` (the table) after each. The same
command continues a run that was stopped. See docs/maze.md for the results.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from aps_jax.envs import maze
from aps_jax.runs import folders
from experiments import common_flags
from experiments.maze import agent, evaluation, grid, options

_NAME = "ablation.json"
_NUM_SEEDS = 3
_SCORES = ("improved", "alone", "bound")
# Each an option with another value; `entropy_weight=0.0` is VISR.
CHANGES: dict[str, dict[str, Any]] = {
    f"{name}={value}": {name: value}
    for name, values in {
        "td_form": ("split", "vector", "scalar"),
        "task_hold": (10, 4),
        "num_iterations": (75, 300),
        "target_period": (3, 10),
        "feature_dim": (10, 20, 60),
        "num_heads": (8, 64),
        "num_steps": (1,),
        "unit_values": (False,),
        "num_particles": (32, 1024),
        "entropy_weight": (0.0,),
    }.items()
    for value in values
}
NO_CHANGE = "none"

_CHANGES = flags.DEFINE_list(
    "changes", [NO_CHANGE, *CHANGES], "Changes to measure, with commas between."
)


def measure(
    change: str, seeds: Sequence[int], num_rewards: int
) -> list[dict[str, Any]]:
    """Pretrains and tests one changed agent in every maze; returns its runs."""
    config = agent.AgentConfig(**CHANGES.get(change, {}))
    test_config = evaluation.TestConfig(num_rewards=num_rewards, sample_sizes=(100,))
    weights = jnp.float32(config.skill_weight), jnp.float32(config.entropy_weight)
    keys, runs = grid.keys_of(seeds), []
    for name, rows in maze.MAPS.items():
        world = maze.parse_maze(rows)
        result, scores, _ = jax.device_get(
            grid.pretrain_and_test(keys, world, weights, config, test_config)
        )
        is_met = result.visits.sum(axis=1)[:, np.asarray(world.is_free)] > 0
        for index, seed in enumerate(seeds):
            numbers = {of: getattr(scores, of)[index, -1] for of in _SCORES}
            numbers["unseen_share"] = 1 - is_met[index].mean()
            numbers = {key: round(float(value), 4) for key, value in numbers.items()}
            runs.append({"change": change, "maze": name, "seed": seed, **numbers})
    return runs


def format_table(runs: Sequence[dict[str, Any]]) -> str:
    """Writes interquartile means over mazes and seeds as a Markdown table."""
    rows = [["change", "zero-shot", "without GPI", "bound", "cells"]]
    for change in dict.fromkeys(run["change"] for run in runs):
        of_change = [run for run in runs if run["change"] == change]
        intervals = (
            grid.interval(
                [
                    np.array([run[field] for run in of_change if run["maze"] == name])
                    for name in maze.MAPS
                ]
            )
            for field in _SCORES
        )
        share = np.mean([run["unseen_share"] for run in of_change])
        label = change if change == NO_CHANGE else f"`{change}`"
        rows.append([label, *map(grid.format_interval, intervals), f"{1 - share:.0%}"])
    return grid.format_rows(rows)


def main(argv: Sequence[str]) -> None:
    """Measures the changes that the flags name."""
    common_flags.reject_words(argv)
    options.check_names("changes", _CHANGES.value, [NO_CHANGE, *CHANGES])
    if options.agent_config_from_flags() != agent.AgentConfig():
        raise ValueError("The changes are named by --changes; give no option beside.")
    seeds = options.seeds_from_flags(_NUM_SEEDS)
    asked = {"schema": 2, "seeds": seeds, "num_rewards": options.REWARDS.value}
    workdir, earlier = options.open_workdir(_NAME, asked)
    runs: list[dict[str, Any]] = earlier["runs"] if earlier else []
    known = {run["change"] for run in runs}
    for change in (name for name in _CHANGES.value if name not in known):
        print(f"measuring {change} ...", flush=True)
        runs += measure(change, seeds, options.REWARDS.value)
        about = {"git_commit": folders.git_commit(), "versions": folders.versions()}
        folders.write_json(workdir / _NAME, {**asked, **about, "runs": runs})
        folders.write_text(workdir / "ablation.md", format_table(runs))
    print(format_table(runs))


if __name__ == "__main__":
    common_flags.run(main, short=("workdir", "seed", "num_seeds"))
