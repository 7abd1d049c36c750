"""Rows of the benchmark for the parts: replay, particles, kNN and encoders."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import config as config_lib
from aps_jax.envs import atari
from aps_jax.ops import knn
from experiments.benchmark import encoders, setup
from experiments.benchmark.loops import matrix_product
from experiments.benchmark.setup import Size
from experiments.benchmark.table import Row, at_least, at_most, take_turns

NUM_NEIGHBORS = 12
_NO_TORCH = "PyTorch is not installed"
_STACK_BYTES = math.prod(atari.OBSERVATION.shape)


def replay_rows(size: Size) -> list[Row]:
    """Compares updates from the replay with updates from a batch that is at hand."""
    session = setup.started(setup.main_config(size))
    things = {
        "replay": lambda: session.learn(size.updates),
        "batch": session.make_learn_from_batches(size.updates),
    }
    work = dict.fromkeys(things, size.updates)
    turns = take_turns(things, repetitions=size.repetitions, work=work)
    case = "update from the replay / from a resident batch"
    row = turns.times("replay", case, "replay", "batch", "ms", scale=1e3)
    return [row._replace(**at_most(row.ratio, 1.06))]


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
    torch, is_cpu = encoders.torch(), setup.is_cpu()
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
        if torch is not None:
            encoders.use_all_cores()
            tensors = (torch.from_numpy(x) for x in points)
            things["torch"] = functools.partial(_torch_search, *tensors)
        turns = take_turns(things, repetitions=size.repetitions, work=work)
        flops = 2.0 * num_queries * num_particles * dim
        num_bytes = 4.0 * (sum(x.size for x in points) + num_queries * NUM_NEIGHBORS)

        roofline = functools.partial(_roofline, flops, num_bytes)
        over_roofline = functools.partial(_over_roofline, flops, num_bytes)
        case = f"{num_queries}x{num_particles}x{dim}"
        times = 1e6 * turns.median("knn"), 1e6 * turns.ratio(roofline)
        goal = at_most(turns.ratio(over_roofline), 2.5)
        if is_cpu:
            goal = {"ratio": goal["ratio"]}
        elif not rows:
            goal |= {"goal": "at most 30 us", "is_met": times[0] <= 30}
        rows.append(Row("knn", f"{case}: time / roofline", *times, "us", **goal))
        case += ": ours / PyTorch's cdist and topk on the CPU"
        row = Row("knn", case, note=_NO_TORCH, **at_least(None, 1.0))
        if torch is not None:
            least = 1.0 if is_cpu else None
            row = turns.rates("knn", case, "knn", "torch", "searches/s", goal=least)
        rows.append(row)
    return rows


def _roofline(flops: float, num_bytes: float, t: Mapping[Any, float]) -> float:
    return max(flops * t["product"], num_bytes * t["copy"])


def _over_roofline(flops: float, num_bytes: float, t: Mapping[Any, float]) -> float:
    return t["knn"] / _roofline(flops, num_bytes, t)


def _search(search: Callable[..., jax.Array], *points: jax.Array) -> None:
    jax.block_until_ready(search(*points))


def _torch_search(queries: Any, particles: Any) -> None:
    torch = encoders.torch()
    distances = torch.cdist(queries, particles)
    torch.topk(distances, NUM_NEIGHBORS, largest=False, sorted=True)


def encoder_rows(size: Size) -> list[Row]:
    """Compares the encoders with PyTorch's on the same cores."""
    if not setup.is_cpu():
        return [Row("encoder", "all", note="compared on CPUs only")]
    if encoders.torch() is None:
        return [Row("encoder", "all", **at_least(None, 1.0), note=_NO_TORCH)]
    rows = []
    for encoder, batch in itertools.product(size.encoders, size.encoder_batches):
        steps = encoders.make_steps(encoder, batch)
        turns = take_turns(
            steps,
            repetitions=size.repetitions,
            work=dict.fromkeys(steps, float(batch)),
            seconds=size.encoder_seconds,
        )
        faster = min("torch", "torch channels last", key=turns.median)
        case = f"{encoder}, batch {batch}, forward and backward"
        rows.append(turns.rates("encoder", case, "ours", faster, "images/s", goal=1.0))
    return rows
