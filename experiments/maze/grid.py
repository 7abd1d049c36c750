"""Runs the grid of mazes, agents and seeds, and sums it up; knows no flags.

Letters: `I` iterations, `S` cells, `R` runs of one maze and agent.
"""

import dataclasses
import functools
import math
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from aps_jax.envs import maze
from aps_jax.runs import folders
from aps_jax.scores import estimates
from experiments import maze_agent, maze_evaluation

# Weights of the skill and of the entropy reward: the only difference between agents.
AGENT_WEIGHTS = {"aps": (1.0, 1.0), "visr": (1.0, 0.0), "apt": (0.0, 1.0)}
RANDOM = "random"
_SEEDS_AT_ONCE = 2
_COVERAGE_POINTS = 20  # Points of the curve of cells reached over pretraining.


def open_workdir(
    workdir: pathlib.Path, name: str, description: dict[str, Any]
) -> dict[str, Any] | None:
    """Makes the folder, and returns the result of a run that was stopped in it, if any.

    Args:
      workdir: The folder.
      name: Of the result's file.
      description: What this run will write of itself there.

    Raises:
      OSError: It cannot be made, read or written.
      ValueError: Its file is damaged, or of a run with another description.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise PermissionError("the folder cannot be written.")
    path = workdir / name
    if not path.exists():
        return None
    earlier = folders.read_json(path)
    differing = [key for key in description if earlier.get(key) != description[key]]
    if differing:
        raise ValueError(
            f"holds a run that differs in {', '.join(differing)}; give another folder."
        )
    return earlier


def run_grid(
    mazes: Sequence[str],
    agents: Sequence[str],
    seeds: Sequence[int],
    agent_config: maze_agent.AgentConfig,
    test_config: maze_evaluation.TestConfig,
    earlier: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Pretrains and tests every agent in every maze, all seeds at once.

    Yields the result so far after each maze, so that a long grid can be looked at, and
    stopped, at any time. It goes on after the last whole maze.

    Args:
      mazes: names in `maze.MAPS`.
      agents: names in `AGENT_WEIGHTS`, or `random`.
      seeds: roots of the runs' random streams. The reward functions of a seed are the
        same for all agents.
      agent_config: shared by all agents, but for the two reward weights.
      test_config: what is asked of them.
      earlier: what a stopped run of the same settings yielded last; its mazes are not
        run again.

    Yields:
      The contents of `maze.json`, without its table.
    """
    description = describe(agents, seeds, agent_config, test_config)
    if earlier is None:
        earlier = {"mazes": {}, "runs": [], "wall_seconds": 0.0, "cpu_seconds": 0.0}
    runs, by_maze = list(earlier["runs"]), dict(earlier["mazes"])
    mazes = [name for name in mazes if name not in by_maze]
    if not mazes:
        yield earlier
        return

    boxes = jnp.asarray(maze.box_masks(10, 10))
    horizon = agent_config.episode_length
    # The default generator, unrolled wherever it is used, would double the compile time.
    keys = jnp.stack([jax.random.key(seed, impl="rbg") for seed in seeds])
    over_seeds = functools.partial(jax.vmap, in_axes=(0, None, None))

    def run_one(key, world, skill_weight, entropy_weight):
        config = dataclasses.replace(
            agent_config, skill_weight=skill_weight, entropy_weight=entropy_weight
        )
        k_pretrain, k_test, _, _ = jax.random.split(key, 4)
        result = maze_agent.make_pretrain(config)(k_pretrain, world)
        scores, example = maze_evaluation.zero_shot(
            k_test, world, boxes, result, config, test_config
        )
        return result, scores, example

    @jax.jit
    def run(keys, world, *weights):
        # Few seeds at a time: the tables of all of them would not fit into a cache.
        return jax.lax.map(
            lambda key: run_one(key, world, *weights), keys, batch_size=_SEEDS_AT_ONCE
        )

    # Apart from the zero-shot test, for the reason given there.
    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, 0, 0, None))
    def fine_tune(key, world, feature_params, successor_params, is_pretrained):
        _, _, k_few, _ = jax.random.split(key, 4)
        return maze_evaluation.few_shot(
            k_few,
            world,
            boxes,
            feature_params,
            successor_params,
            agent_config,
            test_config,
            is_pretrained=is_pretrained,
        )

    @jax.jit
    @over_seeds
    def fresh(key, world, _):
        _, _, _, k_init = jax.random.split(key, 4)
        return maze_agent.init_params(k_init, world, agent_config)

    @jax.jit
    @over_seeds
    def bounds(key, world, _):
        _, k_test, _, _ = jax.random.split(key, 4)
        rewards = jax.vmap(
            lambda k: maze.sample_reward(jax.random.split(k, 4)[0], world, boxes)
        )(jax.random.split(k_test, test_config.num_rewards))
        return (
            maze_evaluation.feature_bound(
                world, rewards, feature_dim=agent_config.feature_dim, horizon=horizon
            ),
            maze_evaluation.discount_bound(
                world, rewards, discount=agent_config.discount, horizon=horizon
            ),
        )

    @jax.jit
    @over_seeds
    def random_visits(key, world, _):
        k_pretrain, _, _, _ = jax.random.split(key, 4)
        return maze_agent.random_visits(k_pretrain, world, agent_config)

    started, cpu_started = time.time(), time.process_time()
    done, total = 0, len(mazes) * len(agents)
    for name in mazes:
        world = maze.parse_maze(maze.MAPS[name])
        features_best, discounted = jax.device_get(bounds(keys, world, 0))
        by_maze[name] = {
            "map": list(maze.MAPS[name]),
            "feature_bound": _rounded(features_best),
            "discount_bound": _rounded(discounted),
            # The scratch arm meets the rewards of the others: they share the key.
            "few_shot_scratch": _rounded(
                jax.device_get(
                    fine_tune(keys, world, *fresh(keys, world, 0), np.bool_(False))
                )
            ),
        }
        for agent in agents:
            if agent == RANDOM:
                visits = jax.device_get(random_visits(keys, world, 0))
                results = [{} for _ in seeds]
            else:
                weights = [jnp.float32(w) for w in AGENT_WEIGHTS[agent]]
                pretrained, scores, examples = jax.block_until_ready(
                    run(keys, world, *weights)
                )
                visits, scores, examples = jax.device_get(
                    (pretrained.visits, scores, examples)
                )
                few = jax.device_get(
                    fine_tune(
                        keys,
                        world,
                        pretrained.feature_params,
                        pretrained.successor_params,
                        np.bool_(True),
                    )
                )
                results = [
                    {
                        "zero_shot": _per_seed(scores, index),
                        "few_shot": _rounded(few[index]),
                        "example": _per_seed(examples, index) if index == 0 else None,
                    }
                    for index in range(len(seeds))
                ]
            for index, (seed, result) in enumerate(zip(seeds, results, strict=True)):
                coverage = _coverage(visits[index], np.asarray(world.is_free))
                runs.append(
                    {"maze": name, "agent": agent, "seed": seed, **coverage, **result}
                )
            done += 1
            elapsed = time.time() - started
            logging.info(
                "%d of %d: %s in %s, %d seeds, %.0f s so far, about %.0f s to go",
                done,
                total,
                agent,
                name,
                len(seeds),
                elapsed,
                elapsed / done * (total - done),
            )
        yield {
            **description,
            "mazes": dict(by_maze),
            "runs": list(runs),
            "wall_seconds": round(earlier["wall_seconds"] + time.time() - started, 1),
            "cpu_seconds": round(
                earlier["cpu_seconds"] + time.process_time() - cpu_started, 1
            ),
        }


def describe(
    agents: Sequence[str],
    seeds: Sequence[int],
    agent_config: maze_agent.AgentConfig,
    test_config: maze_evaluation.TestConfig,
) -> dict[str, Any]:
    """Returns what `maze.json` says of a grid's settings, as JSON reads them."""
    agent_fields = {
        key: value.value if isinstance(value, maze_agent.TDForm) else value
        for key, value in dataclasses.asdict(agent_config).items()
        if key not in ("skill_weight", "entropy_weight")
    }
    test_fields = dataclasses.asdict(test_config)
    test_fields["sample_sizes"] = list(test_config.sample_sizes)
    return {
        "schema": 2,
        "agent_config": agent_fields,
        "agent_weights": {a: list(AGENT_WEIGHTS[a]) for a in agents if a != RANDOM},
        "test_config": test_fields,
        "seeds": list(seeds),
        "agents": list(agents),
        "sample_sizes": [*test_config.sample_sizes, "all"],
    }


def _rounded(array: np.ndarray) -> Any:
    """Turns an array into numbers JSON can hold, of four decimals; NaN into null."""
    array = np.asarray(array)
    if array.dtype.kind in "iub":
        return array.tolist()
    if array.ndim:
        return [_rounded(row) for row in array]
    return round(float(array), 4) if math.isfinite(array) else None


def _per_seed(fields: Any, index: int) -> dict[str, Any]:
    return {key: _rounded(value[index]) for key, value in fields._asdict().items()}


def _coverage(visits: np.ndarray, is_free: np.ndarray) -> dict[str, Any]:
    """Describes where pretraining went, from its visits `[I, S]` by iteration."""
    num_points = min(_COVERAGE_POINTS, len(visits))
    ends = np.linspace(0, len(visits), num_points + 1).round().astype(int)[1:]
    total = np.cumsum(visits, axis=0)[ends - 1]
    share = (total > 0).sum(axis=1) / is_free.sum()
    chunks = np.diff(total, axis=0, prepend=0)
    p = chunks / chunks.sum(axis=1, keepdims=True)
    entropy = -np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-30)), 0), axis=1)
    return {
        "coverage_iterations": ends.tolist(),
        "cells_reached": _rounded(share),
        # Of the visits since the last point; 1 is uniform over the free cells.
        "visit_entropy": _rounded(entropy / np.log(is_free.sum())),
        "visits": total[-1].astype(int).tolist(),
    }


def scores_by_maze(
    result: dict[str, Any], agent: str, field: str, size: int = -1
) -> list[np.ndarray]:
    """Collects one number per run: a vector over seeds for each maze.

    Args:
      result: the contents of `maze.json`.
      agent: its name; `random` scores 0 by definition.
      field: of `zero_shot`, such as `improved`.
      size: index of the reward sample's size, the last being all cells.
    """
    return [
        np.array(
            [
                0.0 if agent == RANDOM else run["zero_shot"][field][size]
                for run in result["runs"]
                if run["maze"] == name and run["agent"] == agent
            ]
        )
        for name in result["mazes"]
    ]


def summarise(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Computes a row per agent: interquartile means with 95 % intervals.

    The intervals are stratified bootstrap percentiles over the seeds of each maze.
    """
    rows = []
    for agent in result["agents"]:
        row = {"agent": agent}
        for field in ("improved", "alone", "bound"):
            estimate = estimates.bootstrap(
                estimates.interquartile_mean,
                scores_by_maze(result, agent, field),
                seed=0,
                num_resamples=5_000,
            )
            row[field] = [_rounded(end) for end in estimate]
        reached = [
            run["cells_reached"][-1] for run in result["runs"] if run["agent"] == agent
        ]
        row["cells_reached"] = _rounded(np.mean(reached))
        row["per_maze"] = {
            name: _rounded(np.mean(scores))
            for name, scores in zip(
                result["mazes"],
                scores_by_maze(result, agent, "improved"),
                strict=True,
            )
        }
        rows.append(row)
    return rows


def format_table(result: dict[str, Any]) -> str:
    """Writes the summary as a Markdown table."""

    def interval(numbers: Sequence[float | None]) -> str:
        value, low, high = numbers
        if low is None:
            return f"{value:.2f}"
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"

    names = list(result["mazes"])
    header = ["agent", "zero-shot", "without GPI", "bound", "cells", *names]
    lines = [
        "| " + " | ".join(header) + " |",
        "| " + " | ".join(["---"] * len(header)) + " |",
    ]
    for row in result["table"]:
        cells = [
            row["agent"],
            *(interval(row[field]) for field in ("improved", "alone", "bound")),
            f"{row['cells_reached']:.0%}",
            *(f"{row['per_maze'][name]:.2f}" for name in names),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
