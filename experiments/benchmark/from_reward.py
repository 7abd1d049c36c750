"""The row of the benchmark for `der` as it learns from reward, many seeds at once."""

import contextlib
import functools
from typing import Any, cast

import jax

from aps_jax import config as config_lib
from aps_jax.train import loop
from experiments.benchmark.setup import Size
from experiments.benchmark.table import Row, take_turns


def _started(config: config_lib.Config, num_seeds: int, held: Any) -> loop.Session:
    """Starts seeds at once, and plays on to the first update."""
    seeds = range(num_seeds)
    num_envs, stream = config.finetune.finetune_num_envs, loop.Stream.FINETUNE_ACT
    pool = loop.make_pool(config, num_envs, stream, run_seeds=seeds)
    held.callback(pool.close)
    agent = config.make_agent(pool.num_actions, pool.observation)
    plan = loop.finetune_plan(config, agent)
    state = loop.stack_seeds([loop.init_state(agent, seed) for seed in seeds])
    session = loop.start(config, plan, pool, state, seeds=seeds)
    schedule = cast(loop.Schedule, session.schedule)
    while not schedule.num_due(session.agent_steps):
        session.step()
    return session


def _play(session: loop.Session, iterations: int) -> None:
    for _ in range(iterations):
        session.step()
    jax.block_until_ready((session.state, session.rollout))


def from_reward_rows(size: Size) -> list[Row]:
    """Measures seeds x agent steps per second, by the number of seeds at once."""
    preset = "smoke" if size.options else "atari100k"
    config = config_lib.replace_options(
        config_lib.preset_config(preset, "der"),
        finetune_agent_steps=4_000,
        finetune_warmup_agent_steps=100,
    )
    counts = (1, 2) if size.options else (1, 5, 10)
    steps = size.iterations * config.finetune.finetune_num_envs
    with contextlib.ExitStack() as held:
        things = {
            num: functools.partial(_play, _started(config, num, held), size.iterations)
            for num in counts
        }
        work = {num: float(num * steps) for num in counts}
        turns = take_turns(things, repetitions=size.repetitions, work=work)
    unit = "seeds x agent steps/s"
    return [
        turns.rates("from_reward", f"der, {num} seeds at once / 1", num, 1, unit)
        for num in counts
    ]
