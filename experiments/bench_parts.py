"""Rows of the benchmark for the parts: replay, kNN and encoders."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import config as config_lib
from aps_jax.ops import knn, rewards
from aps_jax.replay import buffer
from aps_jax.train import loop
from experiments import bench_encoders, bench_loop
from experiments.bench_table import Row, at_least, at_most, take_turns

NUM_NEIGHBORS = 12
_NO_TORCH = "PyTorch is not installed"


def replay_rows(size: bench_loop.Size) -> list[Row]:
    """Compares updates from the replay with updates from a batch that is at hand."""
    parts = bench_loop.started(bench_loop.main_config(size), size)
    session = parts.session
    sample = jax.jit(session.sample.drawn)
    # As many as there are updates in a turn: some batches take less time than others.
    batches = [
        sample(session.memory.replay, session.state.num_updates + number)
        for number in range(size.updates)
    ]

    @functools.partial(jax.jit, donate_argnames=("state", "sums"))
    def learn_from_batch(state, sums, batch, replay_state):
        # The update of the loop itself, with its `sample` replaced.
        at_hand = loop.Sample(
            windows=lambda *_: batch["windows"],
            map_particles=lambda encode, params, *_: encode(params, batch["particles"]),
        )
        return bench_loop.learn_function(parts, at_hand)(state, sums, replay_state)

    def from_replay() -> None:
        for _ in range(size.updates):
            session.state, session.sums = parts.learn(
                session.state, session.sums, session.memory.replay
            )
        jax.block_until_ready(session.state)

    def from_batch() -> None:
        for batch in batches:
            session.state, session.sums = learn_from_batch(
                session.state, session.sums, batch, session.memory.replay
            )
        jax.block_until_ready(session.state)

    turns = take_turns(
        {"replay": from_replay, "batch": from_batch},
        repetitions=size.repetitions,
        work={"replay": size.updates, "batch": size.updates},
    )
    rows = [
        Row(
            "replay",
            "update from the replay / from a resident batch",
            1e3 * turns.median("replay"),
            1e3 * turns.median("batch"),
            "ms",
            **at_most(turns.ratio(lambda t: t["replay"] / t["batch"]), 1.06),
        )
    ]
    pretrain = config_lib.preset_config("paper").pretrain
    ring = buffer.make_replay(
        num_envs=pretrain.num_envs, size=pretrain.replay_size, feature_dim=5
    )
    num_steps = pretrain.replay_size // pretrain.num_envs * pretrain.num_envs
    num_bytes = ring.num_bytes / num_steps
    rows.append(
        Row(
            "replay",
            "bytes per step / bytes of its frame",
            num_bytes,
            7056,
            "bytes",
            **at_most(num_bytes / 7056, 1.01),
        )
    )
    memory = jax.eval_shape(lambda: session.memory.replay)
    step = jax.eval_shape(
        lambda r: jax.tree.map(lambda x: x[:, 0], r.experience), memory
    )
    compiled = jax.jit(parts.ring.add, donate_argnums=0).lower(memory, step).compile()
    analysis = compiled.memory_analysis()
    temporary, aliased = analysis.temp_size_in_bytes, analysis.alias_size_in_bytes
    is_in_place = aliased >= parts.ring.num_bytes
    rows.append(
        Row(
            "replay",
            "temporary memory of add / the ring",
            temporary,
            parts.ring.num_bytes,
            "bytes",
            **at_most(temporary / parts.ring.num_bytes, 0.01),
            note="in place" if is_in_place else "NOT in place",
        )
    )
    if not is_in_place:
        rows[-1] = rows[-1]._replace(is_met=False)
    return rows


def _points(rng: np.random.Generator, num: int, dim: int) -> np.ndarray:
    return rng.normal(size=(num, dim)).astype(np.float32)


def _rates(size: bench_loop.Size) -> tuple[Callable[[], None], Callable[[], None], ...]:
    """Returns a matrix product and a copy on the device, with their work."""
    product, flops = bench_loop.matrix_product(size)
    array = jnp.ones((size.copy_floats,), jnp.float32)
    add_one = jax.jit(lambda x: x + 1.0)
    return (
        product,
        lambda: jax.block_until_ready(add_one(array)),
        flops,
        8.0 * size.copy_floats,
    )


def knn_rows(size: bench_loop.Size) -> list[Row]:
    """Compares the search for neighbours with what the device could do."""
    torch = bench_encoders.torch
    is_cpu = jax.default_backend() == "cpu"
    rng = np.random.default_rng(seed=0)
    product, copy, product_flops, copy_bytes = _rates(size)
    rows = []
    for index, (num_queries, num_particles, dim) in enumerate(size.knn_shapes):
        queries = jax.device_put(_points(rng, num_queries, dim))
        particles = jax.device_put(_points(rng, num_particles, dim))
        search = jax.jit(functools.partial(knn.knn_distances, k=NUM_NEIGHBORS))
        things = {
            "product": product,
            "copy": copy,
            "knn": functools.partial(_search, search, queries, particles),
        }
        if torch is not None:
            things["torch"] = _torch_search(queries, particles)
        turns = take_turns(
            things,
            repetitions=size.repetitions,
            work={"product": product_flops, "copy": copy_bytes},
        )
        flops = 2.0 * num_queries * num_particles * dim
        num_bytes = 4.0 * (
            (num_queries + num_particles) * dim + num_queries * NUM_NEIGHBORS
        )

        def roofline(seconds, flops=flops, num_bytes=num_bytes):
            return max(flops * seconds["product"], num_bytes * seconds["copy"])

        case = f"{num_queries}x{num_particles}x{dim}"
        micros = 1e6 * turns.median("knn")
        to_roofline = turns.ratio(lambda t, r=roofline: t["knn"] / r(t))
        limit = 1e6 * turns.ratio(roofline)
        goals = {"ratio": to_roofline}
        if not is_cpu:
            goals = at_most(to_roofline, 2.5)
            if index == 0:
                goals = {
                    "ratio": to_roofline,
                    "goal": "at most 30 us",
                    "is_met": micros <= 30,
                }
        rows.append(
            Row("knn", f"{case}: time / roofline", micros, limit, "us", **goals)
        )
        speedup, torch_micros, note = None, None, _NO_TORCH
        if torch is not None:
            speedup = turns.ratio(lambda t: t["torch"] / t["knn"])
            torch_micros, note = 1e6 * turns.median("torch"), ""
        goals = at_least(speedup, 1.0) if is_cpu else {"ratio": speedup}
        rows.append(
            Row(
                "knn",
                f"{case}: PyTorch's cdist and topk on the CPU / ours",
                micros,
                torch_micros,
                "us",
                **goals,
                note=note,
            )
        )
    return rows


def _search(search: Callable, queries: jax.Array, particles: jax.Array) -> None:
    jax.block_until_ready(search(queries, particles))


def _torch_search(queries: jax.Array, particles: jax.Array) -> Callable[[], None]:
    torch = bench_encoders.torch
    bench_encoders.use_all_cores()
    q, p = (torch.from_numpy(np.array(x)) for x in (queries, particles))

    def search() -> None:
        torch.topk(torch.cdist(q, p), NUM_NEIGHBORS, largest=False, sorted=True)

    return search


def _hard_points(
    rng: np.random.Generator, kind: str, num: int, centres: np.ndarray
) -> np.ndarray:
    """Draws points that lie much closer together than to the origin."""
    noise = rng.normal(size=(num, centres.shape[1]))
    if kind == "clustered":
        points = centres[rng.integers(0, len(centres), num)] + 1e-3 * noise
    else:
        points = 100.0 + 1e-2 * noise
    return points.astype(np.float32)


def accuracy_rows(size: bench_loop.Size) -> list[Row]:
    """Compares rewards with float64, where float32 has few digits to spare."""
    num_queries, num_particles = size.accuracy_shape
    rng = np.random.default_rng(seed=0)
    rows = []
    for path, dim, tile_size in (
        ("unrolled", 5, None),
        ("unrolled, tiled", 5, 64),
        ("product", 128, None),
        ("product, tiled", 128, 64),
    ):
        centres = 10.0 * rng.normal(size=(8, dim))
        for kind in ("clustered", "offset"):
            queries, particles = (
                _hard_points(rng, kind, num, centres)
                for num in (num_queries, num_particles)
            )
            found = jax.jit(
                functools.partial(
                    knn.knn_distances, k=NUM_NEIGHBORS, tile_size=tile_size
                )
            )(queries, particles)
            exact = np.stack(
                [
                    np.sort(
                        np.linalg.norm(np.float64(particles) - np.float64(q), axis=1)
                    )
                    for q in queries
                ]
            )[:, :NUM_NEIGHBORS]
            sigma = np.mean(exact)
            reward = jax.vmap(
                functools.partial(rewards.particle_entropy_reward, sigma=sigma)
            )(found)
            expected = np.log(
                1.0 + np.mean(np.maximum(exact / sigma - 1e-4, 0.0), axis=1)
            )
            error = float(np.max(np.abs(np.float64(reward) - expected)))
            rows.append(
                Row(
                    "knn_accuracy",
                    f"{kind}, {path}: largest error of a reward",
                    error,
                    1e-5,
                    "",
                    **at_most(error / 1e-5, 1.0),
                )
            )
    return rows


def knn_memory_rows(size: bench_loop.Size) -> list[Row]:
    """Compares the memory that compiled searches take, without running them."""
    num_queries, num_particles, dim = size.knn_memory_shape
    peaks, temporary = [], []
    for share in (4, 1):
        shapes = [
            jax.ShapeDtypeStruct((num, dim), jnp.float32)
            for num in (num_queries, num_particles // share)
        ]
        search = jax.jit(functools.partial(knn.knn_distances, k=NUM_NEIGHBORS))
        analysis = search.lower(*shapes).compile().memory_analysis()
        both = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
        temporary.append(analysis.temp_size_in_bytes)
        peaks.append((both + analysis.temp_size_in_bytes) / both)
    flat = temporary[1] / temporary[0]
    case = f"{num_queries}x{num_particles}x{dim}"
    return [
        Row(
            "knn_memory",
            f"{case}: temporary / that of a quarter of the particles",
            temporary[1],
            temporary[0],
            "bytes",
            **at_most(flat, 1.05),
        ),
        Row(
            "knn_memory",
            f"{case}: peak / (inputs + outputs)",
            unit="",
            ratio=peaks[1],
        ),
    ]


def encoder_rows(size: bench_loop.Size) -> list[Row]:
    """Compares the encoders with PyTorch's on the same cores."""
    if jax.default_backend() != "cpu":
        return [Row("encoder", "all", note="compared on CPUs only")]
    if bench_encoders.torch is None:
        return [Row("encoder", "all", **at_least(None, 1.0), note=_NO_TORCH)]
    rows = []
    measured = bench_encoders.measure(
        size.encoders,
        size.encoder_batches,
        repetitions=size.repetitions,
        seconds=size.encoder_seconds,
        forms=("chosen",),
    )
    for row in measured:
        if row.form != "chosen":
            continue
        rows.append(
            Row(
                "encoder",
                f"{row.encoder}, batch {row.batch}, forward and backward",
                row.images_per_second,
                row.images_per_second / row.ratio_to_torch,
                "images/s",
                **at_least(row.ratio_to_torch, 1.0),
            )
        )
    return rows
