r"""Checks numbers and loop on the device at hand: a part of experiments.gpu_minutes.

  python -m experiments.gpu_checks --part=numerics --found=numerics.json [--small]

`numerics` compares the device with float64 and with this machine's CPU. `loop` counts
compilations and what a profile of 20 iterations says the device did.
"""

import collections
import functools
import gzip
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from aps_jax import config as config_lib
from aps_jax.agents import base
from aps_jax.networks import convolutions
from aps_jax.ops import knn, whitening
from aps_jax.replay import buffer
from aps_jax.runs import folders
from aps_jax.train import loop
from experiments import common_flags
from experiments.benchmark import setup, table

PARTS = ("numerics", "loop")
_PART = flags.DEFINE_enum("part", "numerics", PARTS, "What to check.")
_OUT = flags.DEFINE_string("found", None, "JSON file that gets what was found.")
_DRY = flags.DEFINE_bool("small", False, "Smallest sizes, for a CPU.")
_ITERATIONS = 20
_MOST_EVENTS = 40
_SEED = 0


def main(argv: Sequence[str]) -> None:
    """Makes the checks that the flags name; writes each as soon as it is known."""
    common_flags.reject_words(argv)
    if not _OUT.value:
        raise ValueError("--found=FILE is needed: the JSON file of what is found.")
    found: dict[str, Any] = {"machine": table.describe_machine()}
    found["machine"] |= {"commit": folders.git_commit()}
    checks = numerics if _PART.value == "numerics" else loop_checks
    for name, result in checks(_DRY.value):
        found[name] = result
        print(f"{name}: {json.dumps(result)[:300]}", flush=True)
        pathlib.Path(_OUT.value).write_text(json.dumps(found, indent=1) + "\n")


def verdict(error: float, limit: float) -> dict[str, Any]:
    """Returns a relative error with whether it is small enough."""
    return {"error": float(error), "limit": limit, "is_good": bool(error <= limit)}


def numerics(dry: bool) -> Iterator[tuple[str, Any]]:
    """Yields how far the device is from float64, and from the CPU."""
    device = jax.devices()[0]
    yield "memory", (device.platform != "cpu" and device.memory_stats()) or {}
    yield "replay of many elements", _large_replay(2**20 if dry else 2**31 + 2**24)
    for dim in (5, 64):
        yield f"knn, {dim} features in clusters", _knn_error(dim, dry)
    yield "whitening", _whitening_error()
    for name in base.IMAGE_ENCODERS:
        yield f"encoder {name} beside plain convolutions", _encoder_error(name, dry)
    for agent in ("aps",) if dry else ("aps", "dqn", "der", "spr"):
        for precision, error in _update_errors(agent).items():
            limit = 1e-3 if precision == "highest" else 5e-2  # As TF32 rounds.
            yield f"an update of {agent}, {precision} precision", verdict(error, limit)


def _relative(found: Any, expected: Any) -> float:
    """Returns the largest error over the largest value."""
    expected = np.asarray(expected, np.float64)
    errors = np.abs(np.asarray(found, np.float64) - expected)
    return float(np.max(errors) / max(np.max(np.abs(expected)), 1e-12))


def _knn_error(dim: int, dry: bool) -> dict[str, Any]:
    """Compares distances within clusters that are small against their distance."""
    rng = np.random.default_rng(_SEED)
    num, k = (128 if dry else 1024), 12
    centres = 10.0 * rng.normal(size=(8, dim))
    points = centres[rng.integers(0, 8, num)] + 1e-2 * rng.normal(size=(num, dim))
    points = points.astype(np.float32)
    search = jax.jit(functools.partial(knn.knn_distances, k=k))
    found = np.asarray(search(points, points), np.float64)
    wide = points.astype(np.float64)
    exact = [np.sort(np.linalg.norm(wide - one, axis=1))[:k] for one in wide]
    errors = np.abs(found - exact) / np.maximum(exact, 1e-9)
    text = search.lower(points, points).compile().as_text()
    return verdict(errors.max(), 1e-5) | {"uses TopK": "TopK" in (text or "")}


def _whitening_error() -> dict[str, Any]:
    """Compares the transform with NumPy's eigenvalues in float64."""
    h = np.random.default_rng(_SEED).normal(size=(1024, 5)) * np.arange(1, 6)
    moments = jax.jit(whitening.update_whitening)(
        whitening.init_whitening(5), h.astype(np.float32)
    )
    values, vectors = np.linalg.eigh(np.cov(h.T, ddof=0))
    expected = vectors @ np.diag(values**-0.5) @ vectors.T
    return verdict(_relative(moments.transform, expected), 1e-4)


def _encoder_error(name: str, dry: bool) -> dict[str, Any]:
    """Compares value and gradient with XLA's own convolutions on the CPU."""
    rng = np.random.default_rng(_SEED)
    images = rng.integers(0, 256, (2 if dry else 32, 84, 84, 4), np.uint8)
    encoder = base.ENCODERS[name]
    plain = convolutions.Plan((convolutions.convolve_xla,) * len(encoder.layers), None)
    cpu = jax.devices("cpu")[0]
    params = jax.device_put(jax.jit(encoder().init)(jax.random.key(_SEED), images), cpu)

    def apply(module: Any, params: Any, images: Any) -> Any:
        output, pull_back = jax.vjp(lambda p: module.apply(p, images), params)
        return output, pull_back(jnp.cos(output))

    with jax.default_matmul_precision("highest"):
        expected = jax.jit(functools.partial(apply, encoder(plan=plain)))(
            *jax.device_put((params, images), cpu)
        )
        found = jax.jit(functools.partial(apply, encoder()))(
            *jax.device_put((params, images), jax.devices()[0])
        )
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return verdict(max(_relative(x, y) for x, y in pairs), 1e-4)


def _update_errors(agent_name: str) -> dict[str, float]:
    """Makes one update on the device and on the CPU; compares all metrics."""
    config = config_lib.preset_config("smoke", agent_name)
    agent = config.make_agent(6, config.observation)
    make_plan = loop.pretrain_plan if agent.pretrain else loop.finetune_plan
    plan = make_plan(config, agent)
    state = jax.jit(agent.init)(jax.random.key(_SEED))
    if not agent.pretrain:
        state = jax.jit(agent.start_finetune)(state)
    key = jax.random.key(_SEED)
    draw = loop.make_draw(plan.phase, reward_free=plan.reward_free)
    batch = jax.jit(draw)(key, state, _random_replay(plan, state), jnp.int32(0))

    def metrics(device: Any, precision: str) -> dict[str, float]:
        with jax.default_matmul_precision(precision):
            there = jax.device_put((state, batch, key), device)
            return jax.device_get(jax.jit(plan.phase.learner.update)(*there).metrics)

    expected = metrics(jax.devices("cpu")[0], "highest")
    errors = {}
    for precision in ("highest", "default"):
        found = metrics(jax.devices()[0], precision)
        errors[precision] = max(
            abs(found[name] - expected[name]) / max(abs(expected[name]), 1e-3)
            for name in expected
            if math.isfinite(expected[name])
        )
    return errors


def _random_replay(plan: loop.Plan, state: base.AgentState) -> buffer.Buffer:
    """Returns a full replay of random steps."""
    rollout = loop.init_rollout(
        plan.phase.policy,
        state,
        num_envs=plan.num_envs,
        replay_size=plan.replay_size,
        is_prioritised=plan.phase.learner.batch.priorities is not None,
    )
    rng = np.random.default_rng(_SEED)
    held = rollout.replay.experience

    def of(x: Any, high: int) -> Any:
        return jnp.asarray(rng.integers(0, high, x.shape).astype(x.dtype))

    held = held._replace(
        frame=of(held.frame, 256),
        action=of(held.action, 6),
        reward=of(held.reward, 2),
        id=jnp.arange(held.id.size, dtype=jnp.int32).reshape(held.id.shape),
        extras=jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape).astype(x.dtype)), held.extras
        ),
    )
    return rollout.replay._replace(experience=held, is_full=jnp.bool_(True))


def _large_replay(num_elements: int) -> dict[str, Any]:
    """Writes and reads the last rows of bytes beyond what 32 bits can number."""
    num_rows = num_elements // (84 * 84)
    write = jax.jit(
        lambda x, i: x.at[i].set(jnp.full((84, 84), 7, jnp.uint8)), donate_argnums=0
    )
    read = jax.jit(lambda x, i: x[i])
    rows = write(jnp.zeros((num_rows, 84, 84), jnp.uint8), jnp.int32(num_rows - 1))
    last, before, first = np.asarray(
        read(rows, jnp.array([num_rows - 1, num_rows - 2, 0]))
    )
    is_good = bool((last == 7).all() and not before.any() and not first.any())
    return {"elements": num_rows * 84 * 84, "is_good": is_good}


def loop_checks(dry: bool) -> Iterator[tuple[str, Any]]:
    """Yields compilations and rate of the real loop, and its profile."""
    compiled: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    started = time.monotonic()
    session = setup.Setup(setup.main_config(setup.SMOKE if dry else setup.FULL))
    try:
        session.play(_ITERATIONS)
        yield "seconds to the first updates", time.monotonic() - started
        compiled.clear()
        with jax.transfer_guard("disallow"):
            started = time.monotonic()
            session.play(_ITERATIONS)
        seconds = time.monotonic() - started
        yield "compilations in 20 iterations", len(compiled)
        frames = _ITERATIONS * session.num_envs * setup.FRAME_SKIP
        yield "frames per second", frames / seconds
        yield "profile", _profile(lambda: session.play(_ITERATIONS))
    finally:
        session.close()


def _profile(function: Callable[[], None]) -> list[dict[str, Any]]:
    """Sums the times of what ran, by process and name, the longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            function()
        (path,) = pathlib.Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {
        event["pid"]: event["args"]["name"]
        for event in events
        if event.get("name") == "process_name"
    }
    times: dict[tuple[str, str], float] = collections.defaultdict(float)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for event in events:
        if event.get("ph") == "X":
            where = names.get(event["pid"], "")
            times[where, event["name"]] += event.get("dur", 0.0)
            counts[where, event["name"]] += 1
    longest = sorted(times, key=times.__getitem__, reverse=True)[:_MOST_EVENTS]
    return [
        {
            "where": where,
            "what": what[:80],
            "milliseconds": round(times[where, what] / 1e3, 3),
            "count": counts[where, what],
        }
        for where, what in longest
    ]


if __name__ == "__main__":
    common_flags.run(main, short=())
