"""Rows of the benchmark for the parts: replay, kNN, encoders and particles."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import config as config_lib
from aps_jax.ops import knn, rewards
from experiments.benchmark import encoders, setup
from experiments.benchmark.loops import matrix_product
from experiments.benchmark.setup import Size
from experiments.benchmark.table import Row, at_least, at_most, take_turns

NUM_NEIGHBORS = 12
_NO_TORCH = "PyTorch is not installed"
_FRAME_BYTES = 84 * 84


def replay_rows(size: Size) -> list[Row]:
    """Compares updates from the replay with updates from a batch that is at hand."""
    session = setup.started(setup.main_config(size))
    turns = take_turns(
        {
            "replay": lambda: session.learn(size.updates),
            "batch": session.make_learn_from_batches(size.updates),
        },
        repetitions=size.repetitions,
        work={"replay": size.updates, "batch": size.updates},
    )
    pretrain = config_lib.preset_config("paper").pretrain
    replay = setup.make_replay(pretrain.num_envs, pretrain.replay_size)
    num_steps = pretrain.replay_size // pretrain.num_envs * pretrain.num_envs
    num_bytes = replay.num_bytes / num_steps
    compiled, replay_bytes = session.compiled_add()
    analysis = compiled.memory_analysis()
    temporary = analysis.temp_size_in_bytes
    is_in_place = analysis.alias_size_in_bytes >= replay_bytes
    added = at_most(temporary / replay_bytes, 0.01)
    return [
        Row(
            "replay",
            "update from the replay / from a resident batch",
            1e3 * turns.median("replay"),
            1e3 * turns.median("batch"),
            "ms",
            **at_most(turns.ratio(lambda t: t["replay"] / t["batch"]), 1.06),
        ),
        Row(
            "replay",
            "bytes per step / bytes of its frame",
            num_bytes,
            _FRAME_BYTES,
            "bytes",
            **at_most(num_bytes / _FRAME_BYTES, 1.01),
        ),
        Row(
            "replay",
            "temporary memory of add / the replay",
            temporary,
            replay_bytes,
            "bytes",
            **{**added, "is_met": added["is_met"] and is_in_place},
            note="in place" if is_in_place else "NOT in place",
        ),
    ]


def _points(rng: np.random.Generator, num: int, dim: int) -> np.ndarray:
    return rng.normal(size=(num, dim)).astype(np.float32)


def _make_search(tile_size: int | None = None) -> Callable[..., jax.Array]:
    search = functools.partial(knn.knn_distances, k=NUM_NEIGHBORS, tile_size=tile_size)
    return jax.jit(search)


def knn_rows(size: Size) -> list[Row]:
    """Compares the search for neighbours with what the device could do."""
    torch, is_cpu = encoders.torch(), setup.is_cpu()
    rng = np.random.default_rng(seed=0)
    product, product_flops = matrix_product(size)
    array = jnp.ones((size.copy_floats,), jnp.float32)
    add_one, search = jax.jit(lambda x: x + 1.0), _make_search()
    work = {"product": product_flops, "copy": 8.0 * size.copy_floats}
    rows = []
    for num_queries, num_particles, dim in size.knn_shapes:
        points = _points(rng, num_queries, dim), _points(rng, num_particles, dim)
        queries, particles = jax.device_put(points)
        things = {
            "product": product,
            "copy": lambda: jax.block_until_ready(add_one(array)),
            "knn": lambda q=queries, p=particles: jax.block_until_ready(search(q, p)),
        }
        if torch is not None:
            encoders.use_all_cores()
            things["torch"] = functools.partial(
                _torch_search, *(torch.from_numpy(x) for x in points)
            )
        turns = take_turns(things, repetitions=size.repetitions, work=work)
        flops = 2.0 * num_queries * num_particles * dim
        num_bytes = 4.0 * (
            (num_queries + num_particles) * dim + num_queries * NUM_NEIGHBORS
        )

        def roofline(t, flops=flops, num_bytes=num_bytes):
            return max(flops * t["product"], num_bytes * t["copy"])

        case = f"{num_queries}x{num_particles}x{dim}"
        micros, limit = 1e6 * turns.median("knn"), 1e6 * turns.ratio(roofline)
        goal = at_most(turns.ratio(lambda t, r=roofline: t["knn"] / r(t)), 2.5)
        if is_cpu:
            goal = {"ratio": goal["ratio"]}
        elif not rows:
            goal |= {"goal": "at most 30 us", "is_met": micros <= 30}
        rows.append(Row("knn", f"{case}: time / roofline", micros, limit, "us", **goal))
        speedup, torch_micros = None, None
        if torch is not None:
            speedup = turns.ratio(lambda t: t["torch"] / t["knn"])
            torch_micros = 1e6 * turns.median("torch")
        rows.append(
            Row(
                "knn",
                f"{case}: PyTorch's cdist and topk on the CPU / ours",
                micros,
                torch_micros,
                "us",
                **(at_least(speedup, 1.0) if is_cpu else {"ratio": speedup}),
                note="" if torch else _NO_TORCH,
            )
        )
    return rows


def _torch_search(queries, particles) -> None:
    torch = encoders.torch()
    distances = torch.cdist(queries, particles)
    torch.topk(distances, NUM_NEIGHBORS, largest=False, sorted=True)


def accuracy_rows(size: Size) -> list[Row]:
    """Compares rewards with float64, where float32 has few digits to spare."""
    rng = np.random.default_rng(seed=0)
    rows = []
    for path, dim in (("unrolled", 5), ("product", 128)):
        centres = 10.0 * rng.normal(size=(8, dim))
        for kind in ("clustered", "offset"):
            points = []
            for num in size.accuracy_shape:  # Queries, particles.
                noise = rng.normal(size=(num, dim))
                clustered = centres[rng.integers(0, 8, num)] + 1e-3 * noise
                far = 100.0 + 1e-2 * noise
                points.append(np.float32(clustered if kind == "clustered" else far))
            queries, particles = np.float64(points[0]), np.float64(points[1])
            exact = [np.linalg.norm(particles - q, axis=1) for q in queries]
            exact = np.sort(exact, axis=1)[:, :NUM_NEIGHBORS]
            sigma = np.mean(exact)
            excess = np.maximum(exact / sigma - 1e-4, 0.0)
            expected = np.log(1.0 + np.mean(excess, axis=1))
            for tiled, tile_size in (("", None), (", tiled", 64)):
                reward = jax.vmap(
                    functools.partial(rewards.particle_entropy_reward, sigma=sigma)
                )(_make_search(tile_size)(*points))
                error = float(np.max(np.abs(np.float64(reward) - expected)))
                case = f"{kind}, {path}{tiled}: largest error of a reward"
                goal = at_most(error / 1e-5, 1.0)
                rows.append(Row("knn_accuracy", case, error, 1e-5, **goal))
    return rows


def knn_memory_rows(size: Size) -> list[Row]:
    """Compares the memory that compiled searches take, without running them."""
    num_queries, num_particles, dim = size.knn_memory_shape
    temporary = []
    for share in (4, 1):
        shapes = [
            jax.ShapeDtypeStruct((num, dim), jnp.float32)
            for num in (num_queries, num_particles // share)
        ]
        analysis = _make_search().lower(*shapes).compile().memory_analysis()
        temporary.append(analysis.temp_size_in_bytes)
    both = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    case = f"{num_queries}x{num_particles}x{dim}"
    return [
        Row(
            "knn_memory",
            f"{case}: temporary / that of a quarter of the particles",
            temporary[1],
            temporary[0],
            "bytes",
            **at_most(temporary[1] / temporary[0], 1.05),
        ),
        Row(
            "knn_memory",
            f"{case}: peak / (inputs + outputs)",
            ratio=(both + temporary[1]) / both,
        ),
    ]


def encoder_rows(size: Size) -> list[Row]:
    """Compares the encoders with PyTorch's on the same cores."""
    if not setup.is_cpu():
        return [Row("encoder", "all", note="compared on CPUs only")]
    if encoders.torch() is None:
        return [Row("encoder", "all", **at_least(None, 1.0), note=_NO_TORCH)]
    rows = []
    for encoder in size.encoders:
        for batch in size.encoder_batches:
            turns = take_turns(
                encoders.make_steps(encoder, batch),
                repetitions=size.repetitions,
                seconds=size.encoder_seconds,
            )
            faster = min("torch", "torch channels last", key=turns.median)
            rows.append(
                Row(
                    "encoder",
                    f"{encoder}, batch {batch}, forward and backward",
                    batch * turns.rate("ours"),
                    batch * turns.rate(faster),
                    "images/s",
                    **at_least(turns.ratio(lambda t, f=faster: t[f] / t["ours"]), 1.0),
                )
            )
    return rows


def particles_rows(size: Size) -> list[Row]:
    """Measures an update, and its memory, at several numbers of particles."""
    config = setup.main_config(size)
    counts = size.particle_counts
    least, most = counts[0], counts[-1]
    sessions = {
        count: setup.started(config_lib.replace_options(config, num_particles=count))
        for count in counts
    }
    memory = {
        count: session.compiled_update().memory_analysis().temp_size_in_bytes
        for count, session in sessions.items()
    }
    turns = take_turns(
        {n: functools.partial(session.learn, 1) for n, session in sessions.items()},
        repetitions=size.repetitions,
    )
    rows = []
    for count in counts:
        stacks = count * _FRAME_BYTES * config_lib.STACK_SIZE
        grown = (memory[count] - memory[least]) / stacks
        rows += [
            Row(
                "particles",
                f"an update with {count:,} / with {least:,}",
                1e3 * turns.median(count),
                1e3 * turns.median(least),
                "ms",
                ratio=turns.ratio(lambda t, n=count: t[n] / t[least]),
            ),
            Row(
                "particles",
                f"temporary memory with {count:,}, growth / stacks of so many",
                memory[count],
                stacks,
                "bytes",
                **(at_most(grown, 0.01) if count == most else {"ratio": grown}),
            ),
        ]
    return rows
