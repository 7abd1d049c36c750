r"""Measures what each choice of the maze agent is worth, one changed at a time.

  python -m experiments.maze_ablation --workdir=runs/maze_ablation

pretrains APS in every maze with the default settings and with each change in turn, and
writes `ablation.json` (every run) and `ablation.md` (the tables) after each. The same
command continues a run that was stopped. See docs/maze.md for the results.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from aps_jax.envs import maze
from aps_jax.runs import folders
from aps_jax.scores import estimates
from experiments import maze_agent, maze_evaluation, maze_grid

_NAME = "ablation.json"
# Each as `--set` of the maze takes it, but for `intercept`, which is the test's.
CHANGES = (
    "",
    "intercept=false",
    "td_form=split",
    "td_form=vector",
    "td_form=scalar",
    "task_hold=10",
    "task_hold=4",
    "num_iterations=75",
    "num_iterations=300",
    "num_updates=4",
    "target_period=3",
    "target_period=10",
    "feature_dim=10",
    "feature_dim=20",
    "feature_dim=60",
    "num_heads=8",
    "num_heads=64",
    "num_steps=1",
    "unit_values=false",
    "num_particles=32",
    "num_particles=1024",
    "entropy_weight=0.0",
)

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for ablation.json and ablation.md.", required=True
)
_CHANGES = flags.DEFINE_list(
    "changes", list(CHANGES), "Changes to measure; an empty one is the default agent."
)
_NUM_SEEDS = flags.DEFINE_integer("num_seeds", 3, "Seeds per maze.", lower_bound=1)
_FIRST_SEED = flags.DEFINE_integer("first_seed", 200, "The first.", lower_bound=0)
_REWARDS = flags.DEFINE_integer("rewards", 20, "Rewards per run.", lower_bound=1)


def configs_of(
    change: str, num_rewards: int
) -> tuple[maze_agent.AgentConfig, maze_evaluation.TestConfig]:
    """Returns the settings of one change.

    Raises:
      ValueError: there is no such setting, or its value is wrong.
    """
    test = maze_evaluation.TestConfig(num_rewards=num_rewards, sample_sizes=(100,))
    if change == "intercept=false":
        return maze_agent.AgentConfig(), dataclasses.replace(test, intercept=False)
    return maze_agent.agent_config_from([change] if change else []), test


def measure(
    change: str, seeds: Sequence[int], num_rewards: int
) -> list[dict[str, Any]]:
    """Pretrains and tests one changed agent in every maze; returns its runs."""
    agent_config, test_config = configs_of(change, num_rewards)
    boxes = jnp.asarray(maze.box_masks(10, 10))

    def run_one(key: jax.Array, world: maze.Maze) -> tuple[Any, ...]:
        k_pretrain, k_test, _, _ = jax.random.split(key, 4)
        result = maze_agent.make_pretrain(agent_config)(k_pretrain, world)
        asked = (k_test, world, boxes, result, agent_config, test_config)
        scores, _ = maze_evaluation.zero_shot(*asked)
        return scores, maze_evaluation.unseen_cells(*asked)

    run = jax.jit(
        lambda keys, world: jax.lax.map(lambda key: run_one(key, world), keys)
    )
    keys = jnp.stack([jax.random.key(seed, impl="rbg") for seed in seeds])
    runs = []
    for name in maze.MAPS:
        world = maze.parse_maze(maze.MAPS[name])
        scores, unseen = jax.device_get(run(keys, world))
        for index, seed in enumerate(seeds):
            numbers = {
                field: round(float(getattr(scores, field)[index, -1]), 4)
                for field in ("improved", "alone", "bound")
            } | {
                f"unseen_{field}": round(float(value[index]), 4)
                for field, value in unseen._asdict().items()
            }
            runs.append({"change": change, "maze": name, "seed": seed, **numbers})
    return runs


def _interval(runs: Sequence[dict[str, Any]], field: str) -> str:
    """Formats the interquartile mean of a field and its 95 % interval."""
    by_maze = [
        np.array([run[field] for run in runs if run["maze"] == name])
        for name in maze.MAPS
    ]
    estimate = estimates.bootstrap(
        estimates.interquartile_mean, by_maze, seed=0, num_resamples=5_000
    )
    value, low, high = (float(end) for end in estimate)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def format_tables(runs: Sequence[dict[str, Any]]) -> str:
    """Writes the choices, and what unseen cells cost, as two Markdown tables."""
    changes = list(dict.fromkeys(run["change"] for run in runs))
    choices = [
        "| change | zero-shot | without GPI | bound | cells |",
        "| --- | --- | --- | --- | --- |",
    ]
    unseen = [
        "| change | unseen | rewards known | seen, features | all, features | psi |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for change in changes:
        of_change = [run for run in runs if run["change"] == change]
        name = f"`{change}`" if change else "none"
        share = np.mean([run["unseen_share"] for run in of_change])
        fields = [_interval(of_change, f) for f in ("improved", "alone", "bound")]
        choices.append(f"| {name} | {' | '.join(fields)} | {1 - share:.0%} |")
        if change in ("", "entropy_weight=0.0"):
            fields = [
                _interval(of_change, f"unseen_{f}")
                for f in ("known", "silent", "believed", "acted")
            ]
            unseen.append(f"| {name} | {share:.0%} | {' | '.join(fields)} |")
    return "\n".join([*choices, "", *unseen, ""])


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    changes = _CHANGES.value or [""]
    for change in changes:
        try:
            configs_of(change, _REWARDS.value)
        except ValueError as error:
            raise app.UsageError(f"--changes: {error}") from error
    seeds = list(range(_FIRST_SEED.value, _FIRST_SEED.value + _NUM_SEEDS.value))
    asked = {"seeds": seeds, "num_rewards": _REWARDS.value}
    workdir = pathlib.Path(_WORKDIR.value)
    try:
        earlier = maze_grid.open_workdir(workdir, _NAME, asked)
    except (OSError, ValueError) as error:
        raise app.UsageError(f"--workdir={workdir}: {error}") from error
    runs: list[dict[str, Any]] = earlier["runs"] if earlier else []
    known = {run["change"] for run in runs}
    for change in changes:
        if change in known:
            continue
        runs += measure(change, seeds, _REWARDS.value)
        folders.write_json(
            workdir / _NAME,
            {
                "schema": 1,
                **asked,
                "agent_config": maze_grid.describe(
                    [], seeds, *configs_of("", _REWARDS.value)
                )["agent_config"],
                "git_commit": folders.git_commit(),
                "versions": folders.versions(),
                "runs": runs,
            },
        )
        folders.write_text(workdir / "ablation.md", format_tables(runs))
        logging.info("Measured %s.", change or "the default agent")
    print(format_tables(runs))


if __name__ == "__main__":
    app.run(main)
