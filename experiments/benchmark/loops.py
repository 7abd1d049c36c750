"""Rows of the benchmark for the loop: acting, learning, scaling."""

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from aps_jax import config as config_lib
from experiments.benchmark import setup
from experiments.benchmark.setup import FRAME_SKIP, Size
from experiments.benchmark.table import (
    Row,
    Turns,
    at_least,
    take_turns,
)


def matrix_product(size: Size) -> tuple[Callable[[], Any], float]:
    """Returns a product of matrices on the device, and its operations."""
    side = size.product_side
    matrix = jnp.ones((side, side), jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    product = jax.jit(functools.partial(jnp.matmul, precision=highest))
    return lambda: jax.block_until_ready(product(matrix, matrix)), 2.0 * side**3


def _loop_turns(config: config_lib.Config, size: Size, *, learns: bool) -> Turns:
    """Times the loop and its parts alone, in seconds per agent step."""
    session = setup.started(config)
    things: dict[str, Callable[[], Any]] = {
        "loop": lambda: session.play(size.iterations, learns=learns),
        "env": lambda: session.step_environments(size.iterations),
        "act": lambda: session.act(size.iterations),
    }
    work = dict.fromkeys(things, float(size.iterations * session.num_envs))
    if learns:
        things["learn"] = lambda: session.learn(size.updates)
        work["learn"] = size.updates / session.updates_per_step
        things["product"], flops = matrix_product(size)
        cost = session.compiled_update().cost_analysis()
        assert cost is not None
        # Agent steps whose updates have as many operations.
        work["product"] = flops / cost["flops"] / session.updates_per_step
    return take_turns(things, repetitions=size.repetitions, work=work)


def acting_rows(size: Size) -> list[Row]:
    """Compares acting and storing with the environments alone."""
    turns = _loop_turns(setup.main_config(size), size, learns=False)
    own = turns.ratio(lambda t: (t["env"] + t["act"]) / t["loop"])
    return [
        turns.rates(
            "acting",
            "acting loop / raw EnvPool",
            "loop",
            "env",
            "agent steps/s",
            goal=None if setup.is_cpu() else 0.93,
        ),
        Row(
            "acting",
            "acting loop / 1 / (t_env + t_act)",
            1.0 / turns.median("loop"),
            1.0 / (turns.median("env") + turns.median("act")),
            "agent steps/s",
            **(at_least(own, 0.9) if setup.is_cpu() else {"ratio": own}),
        ),
    ]


def full_rows(size: Size) -> list[Row]:
    """Compares pretraining with the limit from its parts, measured alone."""
    rows = []
    is_cpu = setup.is_cpu()
    configs = {"main preset": setup.main_config(size)}
    if is_cpu:
        configs["Nature encoder"] = setup.nature_config(size)

    def limit(t):
        if is_cpu:
            return t["env"] + t["act"] + t["learn"]
        return max(t["env"], t["learn"])

    for name, config in configs.items():
        turns = _loop_turns(config, size, learns=True)
        ratio = turns.ratio(lambda t: limit(t) / t["loop"])
        rows.append(
            Row(
                "full",
                f"{name}: pretraining / the limit from its parts",
                FRAME_SKIP / turns.median("loop"),
                FRAME_SKIP / turns.ratio(limit),
                "frames/s",
                **at_least(ratio, 0.9 if is_cpu else 0.88),
            )
        )
        cases = {
            "a matrix product of an update's operations / the update": "product",
            **{f"{part} alone / the loop": part for part in ("env", "act", "learn")},
        }
        rows += [
            turns.times(
                "full",
                f"{name}: {case}",
                part,
                "learn" if part == "product" else "loop",
                "us/agent step",
                scale=1e6,
            )
            for case, part in cases.items()
        ]
    return rows


def scaling_rows(size: Size) -> list[Row]:
    """Measures acting at several numbers of environments."""
    config = setup.main_config(size)
    things: dict[int, Callable[[], None]] = {}
    work: dict[int, float] = {}
    with contextlib.ExitStack() as held:
        for num_envs in size.env_counts:
            options = {"num_envs": num_envs, "replay_size": num_envs * 40}
            changed = config_lib.replace_options(config, **options)
            session = setup.Setup(changed, learns=False)
            held.callback(session.close)
            count = max(3, size.iterations * config.pretrain.num_envs // num_envs // 4)
            things[num_envs] = functools.partial(session.play, count, learns=False)
            work[num_envs] = float(count * num_envs)
        turns = take_turns(things, repetitions=size.repetitions, work=work)
    return [
        turns.rates(
            "scaling",
            f"acting loop, {more} environments / {fewer}",
            more,
            fewer,
            "frames/s",
            scale=FRAME_SKIP,
            goal=0.9,
        )
        for fewer, more in itertools.pairwise(size.env_counts)
    ]
