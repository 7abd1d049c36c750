"""Rows of the benchmark for the parts: particles and kNN."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import config as config_lib
from aps_jax.envs import atari
from aps_jax.ops import knn
from experiments.benchmark import setup
from experiments.benchmark.loops import matrix_product
from experiments.benchmark.setup import Size
from experiments.benchmark.table import Row, at_most, take_turns

NUM_NEIGHBORS = 12
_STACK_BYTES = math.prod(atari.OBSERVATION.shape)


def particles_rows(size: Size) -> list[Row]:
    """Measures an update, and its memory, at several numbers of particles."""
    config, counts = setup.main_config(size), size.particle_counts
    sessions = {
        count: setup.started(config_lib.replace_options(config, num_particles=count))
        for count in counts
    }
    memory = {}
    for count, session in sessions.items():
        used = session.compiled_update().memory_analysis()
        assert used is not None
        memory[count] = used.temp_size_in_bytes
    learns = {n: functools.partial(one.learn, 1) for n, one in sessions.items()}
    turns = take_turns(learns, repetitions=size.repetitions)
    rows = []
    for count in counts:
        case = f"an update with {count:,} / with {counts[0]:,}"
        rows.append(turns.times("particles", case, count, counts[0], "ms", scale=1e3))
        stacks = count * _STACK_BYTES
        grown = (memory[count] - memory[counts[0]]) / stacks
        goal = at_most(grown, 0.01) if count == counts[-1] else {"ratio": grown}
        case = f"temporary memory with {count:,}, growth / stacks of so many"
        rows.append(Row("particles", case, memory[count], stacks, "bytes", **goal))
    return rows


def knn_rows(size: Size) -> list[Row]:
    """Compares the search for neighbours with what the device could do."""
    rng = np.random.default_rng(seed=0)
    product, product_flops = matrix_product(size)
    array = jnp.ones((size.copy_floats,), jnp.float32)
    add_one = jax.jit(lambda x: x + 1.0)
    search = jax.jit(functools.partial(knn.knn_distances, k=NUM_NEIGHBORS))
    work = {"product": product_flops, "copy": 8.0 * size.copy_floats}
    rows: list[Row] = []
    for num_queries, num_particles, dim in size.knn_shapes:
        points = [
            rng.normal(size=(num, dim)).astype(np.float32)
            for num in (num_queries, num_particles)
        ]
        things: dict[str, Callable[[], Any]] = {
            "product": product,
            "copy": lambda: jax.block_until_ready(add_one(array)),
            "knn": functools.partial(_search, search, *jax.device_put(points)),
        }
        turns = take_turns(things, repetitions=size.repetitions, work=work)
        flops = 2.0 * num_queries * num_particles * dim
        num_bytes = 4.0 * (sum(x.size for x in points) + num_queries * NUM_NEIGHBORS)

        roofline = functools.partial(_roofline, flops, num_bytes)
        over_roofline = functools.partial(_over_roofline, flops, num_bytes)
        case = f"{num_queries}x{num_particles}x{dim}"
        times = 1e6 * turns.median("knn"), 1e6 * turns.ratio(roofline)
        goal = at_most(turns.ratio(over_roofline), 2.5)
        if setup.is_cpu():
            goal = {"ratio": goal["ratio"]}
        elif not rows:
            goal |= {"goal": "at most 30 us", "is_met": times[0] <= 30}
        rows.append(Row("knn", f"{case}: time / roofline", *times, "us", **goal))
    return rows


def _roofline(flops: float, num_bytes: float, t: Mapping[Any, float]) -> float:
    return max(flops * t["product"], num_bytes * t["copy"])


def _over_roofline(flops: float, num_bytes: float, t: Mapping[Any, float]) -> float:
    return t["knn"] / _roofline(flops, num_bytes, t)


def _search(search: Callable[..., jax.Array], *points: jax.Array) -> None:
    jax.block_until_ready(search(*points))
