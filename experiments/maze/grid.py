"""Runs the grid of mazes, agents and seeds, and sums it up; knows no flags.

Letters: `I` iterations, `S` cells, `R` runs of one maze and agent.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.envs import maze
from aps_jax.runs import folders
from aps_jax.scores import estimates
from experiments.maze import agent as agent_lib
from experiments.maze import evaluation

RANDOM = "random"
_SEEDS_AT_ONCE = 2  # The tables of all would not fit into a cache.
_COVERAGE_POINTS = 20  # Points of the curve of cells reached over pretraining.


def keys_of(seeds: Sequence[int]) -> jax.Array:
    """Returns the roots of the seeds' random streams, `[R]`."""
    # The default generator, unrolled wherever it is used, would double compile time.
    return jnp.stack([jax.random.key(seed, impl="rbg") for seed in seeds])


def over_seeds(function: Callable[..., Any], keys: jax.Array, *batched: Any) -> Any:
    """Calls `function(key, *batched)` for all seeds, few at a time."""
    return jax.lax.map(
        lambda arguments: function(*arguments),
        (keys, *batched),
        batch_size=_SEEDS_AT_ONCE,
    )


_static = functools.partial(jax.jit, static_argnames=("agent_config", "test_config"))


@_static
def pretrain_and_test(
    keys: jax.Array,
    world: maze.Maze,
    weights: tuple[jax.Array, jax.Array],
    agent_config: agent_lib.AgentConfig,
    test_config: evaluation.TestConfig,
) -> tuple[agent_lib.Pretrained, evaluation.ZeroShot, evaluation.Example]:
    """Returns what each seed learned, its scores and its example, each `[R, ...]`."""
    skill_weight, entropy_weight = weights
    config = dataclasses.replace(
        agent_config, skill_weight=skill_weight, entropy_weight=entropy_weight
    )

    def one(key: jax.Array) -> tuple[Any, ...]:
        k_pretrain, k_test, _, _ = jax.random.split(key, 4)
        result = agent_lib.pretrain(k_pretrain, world, config)
        return result, *evaluation.zero_shot(
            k_test, world, _boxes(), result, config, test_config
        )

    return over_seeds(one, keys)


# Apart from the zero-shot test, for the reason given there.
@_static
def _fine_tune(
    keys: jax.Array,
    world: maze.Maze,
    parameters: Any,
    agent_config: agent_lib.AgentConfig,
    test_config: evaluation.TestConfig,
) -> jax.Array:
    is_pretrained = parameters is not None

    def one(key: jax.Array, parameters: Any) -> jax.Array:
        _, _, k_few, k_init = jax.random.split(key, 4)
        params, table = parameters or agent_lib.init_params(k_init, world, agent_config)
        config = (agent_config, test_config)
        asked = (k_few, world, _boxes(), params, table, *config)
        return evaluation.few_shot(*asked, is_pretrained=is_pretrained)

    return over_seeds(one, keys, parameters)


def _boxes() -> jax.Array:
    return jnp.asarray(maze.box_masks(10, 10))


def _run_agent(
    agent: str,
    keys: jax.Array,
    world: maze.Maze,
    agent_config: agent_lib.AgentConfig,
    test_config: evaluation.TestConfig,
) -> list[dict[str, Any]]:
    """Pretrains and tests one agent in one maze; returns a result for each seed."""
    is_free = np.asarray(world.is_free)
    configs = (agent_config, test_config)
    if agent == RANDOM:
        wander = functools.partial(
            agent_lib.random_visits, world=world, config=agent_config
        )
        return [_coverage(row, is_free) for row in np.asarray(over_seeds(wander, keys))]
    skill, entropy = map(jnp.float32, agent_lib.AGENTS[agent])
    pretrained, scores, examples = jax.block_until_ready(
        pretrain_and_test(keys, world, (skill, entropy), *configs)
    )
    parameters = (pretrained.feature_params, pretrained.table)
    few = _fine_tune(keys, world, parameters, *configs)
    visits, scores, examples, few = jax.device_get(
        (pretrained.visits, scores, examples, few)
    )
    return [
        {
            **_coverage(visits[index], is_free),
            "zero_shot": _per_seed(scores, index),
            "few_shot": _rounded(few[index]),
            "example": _per_seed(examples, index) if index == 0 else None,
        }
        for index in range(len(keys))
    ]


def run_grid(
    mazes: Sequence[str],
    agents: Sequence[str],
    seeds: Sequence[int],
    agent_config: agent_lib.AgentConfig,
    test_config: evaluation.TestConfig,
    earlier: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Pretrains and tests every agent in every maze, all seeds at once.

    Args:
      mazes: names in `maze.MAPS`.
      agents: names in `agent.AGENTS`, or `random`.
      seeds: roots of the runs' random streams. The reward functions of a seed are the
        same for all agents.
      agent_config: shared by all agents, but for the two reward weights.
      test_config: what is asked of them.
      earlier: what a stopped run of the same settings yielded last; its mazes are not
        run again.

    Yields:
      The contents of `maze.json` so far, without its table, after each maze.
    """
    result = earlier or {
        **describe(agents, seeds, agent_config, test_config),
        "mazes": {},
        "runs": [],
        "wall_seconds": 0.0,
        "cpu_seconds": 0.0,
    }
    if set(mazes) <= set(result["mazes"]):
        yield result
    keys, configs = keys_of(seeds), (agent_config, test_config)
    for name in mazes:
        if name in result["mazes"]:
            continue
        started, cpu_started = time.time(), time.process_time()
        world = maze.parse_maze(maze.MAPS[name])
        runs = [
            {"maze": name, "agent": agent, "seed": seed, **run}
            for agent in agents
            for seed, run in zip(
                seeds, _run_agent(agent, keys, world, *configs), strict=True
            )
        ]
        # The scratch arm meets the rewards of the others: they share the key.
        scratch = jax.device_get(_fine_tune(keys, world, None, *configs))
        about = {"map": list(maze.MAPS[name]), "few_shot_scratch": _rounded(scratch)}
        wall, cpu = time.time() - started, time.process_time() - cpu_started
        result = {
            **result,
            "mazes": {**result["mazes"], name: about},
            "runs": [*result["runs"], *runs],
            "wall_seconds": round(result["wall_seconds"] + wall, 1),
            "cpu_seconds": round(result["cpu_seconds"] + cpu, 1),
        }
        yield result


def describe(
    agents: Sequence[str],
    seeds: Sequence[int],
    agent_config: agent_lib.AgentConfig,
    test_config: evaluation.TestConfig,
) -> dict[str, Any]:
    """Returns what `maze.json` says of a grid's settings, as JSON reads them."""
    fields = dataclasses.asdict(agent_config)
    del fields["skill_weight"], fields["entropy_weight"]
    sizes = list(test_config.sample_sizes)
    return {
        "schema": 3,
        "agent_config": fields,
        "agent_weights": {a: list(agent_lib.AGENTS[a]) for a in agents if a != RANDOM},
        "test_config": {**dataclasses.asdict(test_config), "sample_sizes": sizes},
        "seeds": list(seeds),
        "agents": list(agents),
        "sample_sizes": [*sizes, "all"],
        "git_commit": folders.git_commit(),
    }


def _rounded(numbers: Any) -> Any:
    """Turns an array into numbers JSON can hold, of four decimals; NaN into null."""
    array = np.asarray(numbers)
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
        reached = [
            run["cells_reached"][-1] for run in result["runs"] if run["agent"] == agent
        ]
        improved = scores_by_maze(result, agent, "improved")
        means = zip(result["mazes"], map(np.mean, improved), strict=True)
        rows.append(
            {
                "agent": agent,
                **{
                    field: interval(scores_by_maze(result, agent, field))
                    for field in ("improved", "alone", "bound")
                },
                "cells_reached": _rounded(np.mean(reached)),
                "per_maze": {name: _rounded(mean) for name, mean in means},
            }
        )
    return rows


def interval(scores: Sequence[np.ndarray]) -> list[float | None]:
    """Returns the interquartile mean of scores by maze, and its 95 % interval."""
    return [
        _rounded(end)
        for end in estimates.bootstrap(
            estimates.interquartile_mean, scores, seed=0, num_resamples=5_000
        )
    ]


def format_interval(numbers: Sequence[float | None]) -> str:
    """Writes an estimate and its interval; one seed has none."""
    value, low, high = numbers
    if low is None:
        return f"{value:.2f}"
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def format_rows(rows: Sequence[Sequence[str]]) -> str:
    """Writes rows, the header first, as a Markdown table."""
    ruled = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(row) + " |\n" for row in ruled)


def format_table(result: dict[str, Any]) -> str:
    """Writes the summary, and scores by the size of the reward sample, in Markdown."""
    names = list(result["mazes"])
    scores = [["agent", "zero-shot", "without GPI", "bound", "cells", *names]]
    for row in result["table"]:
        intervals = (row[field] for field in ("improved", "alone", "bound"))
        means = (f"{row['per_maze'][name]:.2f}" for name in names)
        cells = f"{row['cells_reached']:.0%}"
        scores.append([row["agent"], *map(format_interval, intervals), cells, *means])
    sizes = result["sample_sizes"]
    labels = [["rewarded cells", *(str(size) for size in sizes)]]
    for agent in (a for a in result["agents"] if a != RANDOM):
        for field, label in (("improved", "zero-shot"), ("bound", "bound")):
            means = (
                np.mean(np.concatenate(scores_by_maze(result, agent, field, size)))
                for size in range(len(sizes))
            )
            labels.append([f"{agent}, {label}", *(f"{mean:.2f}" for mean in means)])
    return format_rows(scores) + ("\n" + format_rows(labels) if labels[1:] else "")
