"""Rows of the benchmark for the loop: acting, learning, other loops, scaling."""

import contextlib
import dataclasses
import functools
import resource
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import config as config_lib
from aps_jax.agents import aps as agent_lib
from aps_jax.config import FRAME_SKIP
from aps_jax.parallel import devices
from aps_jax.replay import buffer
from aps_jax.train import loop
from experiments import cost_model
from experiments.bench_table import (
    NOT_MEASURED,
    Row,
    Turns,
    at_least,
    at_most,
    take_turns,
)

# The first sketch of the loop on two quiet cores, agent steps per second with learning:
# the figures that the speed goals of the CPU start from.
_SKETCH = {"small": 409.0, "nature": 95.0}
_SPEEDUP = {"small": 2.5, "nature": 3.0}
# A fiftieth of what the temporaries of the updates of one iteration would cost if the
# allocator gave them back to the kernel: 7,000 pages of 4 KiB with the cpu preset.
_FEW_FAULTS = 140.0


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured."""

    name: str
    repetitions: int  # Turns of each thing.
    iterations: int  # Of the loop in one turn.
    updates: int  # In one turn.
    long_iterations: int  # Of the loop, for recompilations.
    single_steps: int  # Of a loop with one environment, in one turn.
    env_counts: tuple[int, ...]
    memory_steps: tuple[int, int]
    encoders: tuple[str, ...]
    encoder_batches: tuple[int, ...]
    encoder_seconds: float
    knn_shapes: tuple[tuple[int, int, int], ...]
    knn_memory_shape: tuple[int, int, int]
    accuracy_shape: tuple[int, int]
    product_side: int
    copy_floats: int
    starts: int  # Processes started with and without a cache.
    seed_counts: tuple[int, ...]  # Seeds at once.
    device_counts: tuple[int, ...]  # First is one.
    particle_counts: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]  # Of the configs, over their presets.


FULL = Size(
    name="full",
    repetitions=5,
    iterations=60,
    updates=15,
    long_iterations=1000,
    single_steps=100,
    env_counts=(8, 32, 128, 512),
    memory_steps=(100_000, 1_000_000),
    encoders=("small", "nature", "paper"),
    encoder_batches=(32, 256),
    encoder_seconds=0.3,
    knn_shapes=((1024, 1024, 5), (512, 4096, 512), (4096, 65536, 512)),
    knn_memory_shape=(4096, 65536, 512),
    accuracy_shape=(256, 2048),
    product_side=1024,
    copy_floats=2**24,
    starts=5,
    seed_counts=(2, 4),
    device_counts=(1, 2, 4, 8),
    particle_counts=(512, 4096, 65_536),
    options=(),
)
# Seconds: every row runs, and no figure means anything.
SMOKE = Size(
    name="smoke",
    repetitions=2,
    iterations=3,
    updates=1,
    long_iterations=5,
    single_steps=3,
    env_counts=(2, 4),
    memory_steps=(1_000, 10_000),
    encoders=("small",),
    encoder_batches=(2,),
    encoder_seconds=0.0,
    knn_shapes=((16, 64, 5), (16, 64, 32)),
    knn_memory_shape=(16, 65536, 5),
    accuracy_shape=(8, 128),
    product_side=32,
    copy_floats=64,
    starts=1,
    seed_counts=(2,),
    device_counts=(1, 2),
    particle_counts=(16,),
    options=(
        ("num_envs", 4),
        ("hidden_units", 16),
        ("num_particles", 16),
        ("batch_size", 8),
        ("window_targets", 4),
        ("n_steps", 3),
        ("replay_size", 400),
        ("warmup_agent_steps", 40),
    ),
)


def main_config(size: Size) -> config_lib.Config:
    """Returns the config that most rows run: the preset of this kind of device."""
    is_cpu = jax.default_backend() == "cpu"
    config = config_lib.preset_config("cpu" if is_cpu else "gpu")
    options = {"replay_size": 50_000 if is_cpu else 200_000, **dict(size.options)}
    return config_lib.replace_options(config, **options)


def nature_config(size: Size, **options: Any) -> config_lib.Config:
    """Returns `main_config` with the Nature encoder, at the paper's batch on CPUs."""
    config = main_config(size)
    if size.options:  # Of the smallest size nothing is learned but that it runs.
        return config
    options = {"encoder": "nature", **options}
    if jax.default_backend() == "cpu":
        options = {"batch_size": 32, "hidden_units": 512, **options}
    return config_lib.replace_options(config, **options)


@functools.cache
def started(config: config_lib.Config, size: Size) -> loop.Pretraining:
    """Returns a session of pretraining that has warmed up, compiled and learned."""
    del size
    num_envs = config.pretrain.num_envs
    pool = loop.make_pool(config, num_envs, loop.Stream.PRETRAIN_ACT)
    parts = loop.make_pretraining(config, pool, devices.make_mesh(config.num_devices))
    while parts.session.agent_steps <= parts.schedule.start + 2 * num_envs:
        parts.session.step(parts.act)
    state, sums = parts.learn(
        parts.session.state, parts.session.sums, parts.session.memory.replay
    )
    parts.session.state, parts.session.sums = state, sums
    return parts


def close_sessions() -> None:
    """Forgets the sessions; their environments end with them."""
    started.cache_clear()


def learn_function(parts: loop.Pretraining, sample: loop.Sample) -> loop.Learn:
    """Returns the update of a session, drawing its batches by another function."""
    return loop.make_pretrain_learn(parts.agent, sample)


def _updates_per_step(config: config_lib.Config) -> float:
    return config.pretrain.samples_per_step / config.learner.batch_size


def play(parts: loop.Pretraining, iterations: int, *, learns: bool) -> None:
    """Runs the real loop and waits for all that it enqueued."""
    session = parts.session
    for _ in range(iterations):
        if learns:
            session.step(parts.act, parts.learn, parts.schedule)
        else:
            session.step(parts.act)
    jax.block_until_ready((session.state, session.memory))


def _step_randomly(parts: loop.Pretraining, iterations: int) -> None:
    """Steps the session's environments alone."""
    session = parts.session
    rng = np.random.default_rng(0)
    for _ in range(iterations):
        actions = rng.integers(0, session.pool.num_actions, session.pool.num_envs)
        session.pool.send(actions.astype(np.int32))
        session.timestep = session.pool.recv()


def _act_alone(parts: loop.Pretraining, iterations: int) -> None:
    """Acts and stores, without the environments."""
    session = parts.session
    for _ in range(iterations):
        session.memory, action = parts.act(
            session.state.params, session.memory, devices.device_put(session.timestep)
        )
        jax.device_get(action)
    jax.block_until_ready(session.memory)


def learn_alone(parts: loop.Pretraining, updates: int) -> None:
    session = parts.session
    for _ in range(updates):
        session.state, session.sums = parts.learn(
            session.state, session.sums, session.memory.replay
        )
    jax.block_until_ready(session.state)


def matrix_product(size: Size) -> tuple[Callable[[], None], float]:
    """Returns a product of matrices on the device, and its operations."""
    side = size.product_side
    matrix = jnp.ones((side, side), jnp.float32)
    product = jax.jit(
        functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    )
    return lambda: jax.block_until_ready(product(matrix, matrix)), 2.0 * side**3


def _loop_turns(
    config: config_lib.Config, size: Size, *, learns: bool, **others: Callable
) -> Turns:
    """Times the loop, its parts alone and others, in seconds per agent step."""
    parts = started(config, size)
    steps = size.iterations * config.pretrain.num_envs
    things = {
        "loop": lambda: play(parts, size.iterations, learns=learns),
        "env": lambda: _step_randomly(parts, size.iterations),
        "act": lambda: _act_alone(parts, size.iterations),
        **others,
    }
    work = dict.fromkeys(things, float(steps))
    if learns:
        things["learn"] = lambda: learn_alone(parts, size.updates)
        updates_per_step = _updates_per_step(config)
        work["learn"] = size.updates / updates_per_step
        things["product"], flops = matrix_product(size)
        flops_per_update = cost_model.update_flops(
            config.learner, parts.session.pool.num_actions
        )
        # Agent steps whose updates have as many operations.
        work["product"] = flops / flops_per_update / updates_per_step
    return take_turns(things, repetitions=size.repetitions, work=work)


def acting_rows(size: Size) -> list[Row]:
    """Compares acting and storing with the environments alone."""
    turns = _loop_turns(main_config(size), size, learns=False)
    raw = turns.ratio(lambda t: t["env"] / t["loop"])
    own = turns.ratio(lambda t: (t["env"] + t["act"]) / t["loop"])
    limit = 1.0 / (turns.median("env") + turns.median("act"))
    is_cpu = jax.default_backend() == "cpu"
    return [
        Row(
            "acting",
            "acting loop / raw EnvPool",
            turns.rate("loop"),
            turns.rate("env"),
            "agent steps/s",
            **({"ratio": raw} if is_cpu else at_least(raw, 0.93)),
        ),
        Row(
            "acting",
            "acting loop / 1 / (t_env + t_act)",
            turns.rate("loop"),
            limit,
            "agent steps/s",
            **(at_least(own, 0.9) if is_cpu else {"ratio": own}),
        ),
    ]


def full_rows(size: Size) -> list[Row]:
    """Compares pretraining with the limit from its parts, measured alone."""
    rows = []
    is_cpu = jax.default_backend() == "cpu"
    configs = {"main preset": main_config(size)}
    if is_cpu:
        configs["Nature encoder"] = nature_config(size)
    for name, config in configs.items():
        turns = _loop_turns(config, size, learns=True)

        def limit(t):
            if is_cpu:
                return t["env"] + t["act"] + t["learn"]
            return max(t["env"], t["learn"])

        ratio = turns.ratio(lambda t: limit(t) / t["loop"])
        rows.append(
            Row(
                "full",
                f"{name}: pretraining / the limit from its parts",
                FRAME_SKIP * turns.rate("loop"),
                FRAME_SKIP / turns.ratio(limit),
                "frames/s",
                **at_least(ratio, 0.9 if is_cpu else 0.88),
            )
        )
        rows.append(
            Row(
                "full",
                f"{name}: an update's operations at the rate of a matrix product / it",
                1e6 * turns.median("learn"),
                1e6 * turns.median("product"),
                "us/agent step",
                ratio=turns.ratio(lambda t: t["product"] / t["learn"]),
            )
        )
        for part in ("env", "act", "learn"):
            rows.append(
                Row(
                    "full",
                    f"{name}: {part} alone, share of the loop's time",
                    1e6 * turns.median(part),
                    1e6 * turns.median("loop"),
                    "us/agent step",
                    ratio=turns.ratio(lambda t, p=part: t[p] / t["loop"]),
                )
            )
        encoder = config.learner.encoder
        if is_cpu:
            speedup = turns.rate("loop") / _SKETCH[encoder]
            rows.append(
                Row(
                    "full",
                    f"{name}: agent steps/s / those of the first sketch",
                    turns.rate("loop"),
                    _SKETCH[encoder],
                    "agent steps/s",
                    **at_least(speedup, _SPEEDUP[encoder]),
                    note="not side by side: needs the sketch's two quiet cores",
                )
            )
    return rows


def raw_rows(size: Size) -> list[Row]:
    """Compares pretraining as DQN replays with the environments alone."""
    config = nature_config(size, samples_per_step=8.0)
    turns = _loop_turns(config, size, learns=True)
    ratio = turns.ratio(lambda t: t["env"] / t["loop"])
    row = Row(
        "raw",
        "Nature encoder, 8 samples per step: pretraining / raw EnvPool",
        FRAME_SKIP * turns.rate("loop"),
        FRAME_SKIP * turns.rate("env"),
        "frames/s",
        **at_least(ratio, 0.8),
    )
    if jax.default_backend() == "cpu":
        row = row._replace(goal=f"GPU: at least 0.8, {NOT_MEASURED}", is_met=None)
    return [row]


def _play_without_overlap(parts: loop.Pretraining, iterations: int) -> None:
    """Does one thing after the other, and waits for each."""
    session, pool = parts.session, parts.session.pool
    for _ in range(iterations):
        before = session.agent_steps
        session.memory, action = parts.act(
            session.state.params, session.memory, devices.device_put(session.timestep)
        )
        pool.send(jax.device_get(action))
        session.timestep = pool.recv()
        session.iteration += 1
        due = parts.schedule.num_due(session.agent_steps) - parts.schedule.num_due(
            before
        )
        for _ in range(due):
            session.state, session.sums = parts.learn(
                session.state, session.sums, session.memory.replay
            )
        jax.block_until_ready((session.state, session.memory))


def _make_scan(parts: loop.Pretraining, iterations: int) -> Callable[[], None]:
    """Makes the whole loop one jitted scan over EnvPool's own XLA interface."""
    session, schedule = parts.session, parts.schedule
    handle, env_step = session.pool.make_jitted_step()
    updates_per_iteration = (
        session.pool.num_envs * schedule.samples_per_step / schedule.batch_size
    )

    def iterate(carry, index):
        handle, state, sums, memory, timestep = carry
        memory, action = parts.act(state.params, memory, timestep)
        handle, timestep = env_step(handle, action)
        due = jnp.floor((index + 1) * updates_per_iteration) - jnp.floor(
            index * updates_per_iteration
        )
        state, sums = jax.lax.fori_loop(
            0,
            due.astype(jnp.int32),
            lambda _, both: parts.learn(*both, memory.replay),
            (state, sums),
        )
        return (handle, state, sums, memory, timestep), None

    @functools.partial(jax.jit, donate_argnums=0)
    def scan(carry):
        numbers = jnp.arange(iterations, dtype=jnp.float32)
        return jax.lax.scan(iterate, carry, numbers)[0]

    def play() -> None:
        nonlocal handle
        # All committed to the device alike, or the scan would be compiled twice.
        carry = devices.device_put(
            (
                handle,
                session.state,
                session.sums,
                session.memory,
                session.timestep,
            )
        )
        with jax.numpy_dtype_promotion("standard"):
            handle, *states, timestep = scan(carry)
        session.state, session.sums, session.memory = states
        session.timestep = jax.device_get(timestep)
        jax.block_until_ready(session.state)

    return play


class _HostLoop:
    """One environment, replay in NumPy arrays, as in common scripts of DQN."""

    def __init__(self, config: config_lib.Config):
        self._config = config_lib.replace_options(config, num_envs=1)
        self._pool = loop.make_pool(self._config, 1, loop.Stream.EVALUATE)
        learner = self._config.learner
        self._agent = agent_lib.make_agent(
            learner, self._config.finetune, num_actions=self._pool.num_actions
        )
        self._state = loop.init_state(self._agent, 0)
        self._actor = devices.device_put(self._agent.init_actor(1))
        self._steps: buffer.Step | None = None
        self._num_steps = 0
        self._rng = np.random.default_rng(0)
        self._key = jax.random.key(0)
        self._act = jax.jit(
            functools.partial(
                self._agent.act, epsilon=0.05, explore=True, use_gpi=False
            )
        )

        def update(state, windows, particles):
            stack = jax.vmap(buffer.stack_window)
            encoded = self._agent.particles(state.params, stack(particles))
            return self._agent.update(state, stack(windows), encoded)

        self._update = jax.jit(update, donate_argnums=0)
        self._timestep = self._pool.reset()
        minimum = 4 * learner.window_length
        while self._num_steps < minimum:
            self._step()
        self._learn()

    def _step(self) -> None:
        self._actor, step = self._act(
            self._state.params, self._actor, self._timestep, self._key
        )
        step = jax.tree.map(lambda x: x[0], jax.device_get(step))
        if self._steps is None:
            size = self._config.pretrain.replay_size
            self._steps = jax.tree.map(
                lambda x: np.zeros((size, *x.shape), x.dtype), step
            )
        place = self._num_steps % len(self._steps.action)
        for array, value in zip(self._steps, step, strict=True):
            array[place] = value
        self._num_steps += 1
        self._pool.send(np.asarray([step.action], np.int32))
        self._timestep = self._pool.recv()

    def _sample(self, num: int, length: int) -> buffer.Step:
        size = min(self._num_steps, len(self._steps.action))
        starts = self._rng.integers(0, size - length + 1, num)
        places = starts[:, None] + np.arange(length)
        return jax.tree.map(lambda x: x[places], self._steps)

    def _learn(self) -> None:
        learner = self._config.learner
        self._state, _ = self._update(
            self._state,
            self._sample(learner.num_windows, learner.window_length),
            self._sample(learner.num_particles, config_lib.STACK_SIZE),
        )

    def play(self, steps: int) -> None:
        """Plays agent steps, each update where it is due."""
        rate = _updates_per_step(self._config)
        for _ in range(steps):
            self._step()
            due = int(self._num_steps * rate) - int((self._num_steps - 1) * rate)
            for _ in range(due):
                self._learn()
        jax.block_until_ready(self._state)

    def close(self) -> None:
        """Ends the emulator."""
        self._pool.close()


def others_rows(size: Size) -> list[Row]:
    """Compares with three other ways to write the same loop."""
    config = main_config(size)
    parts = started(config, size)
    is_cpu = jax.default_backend() == "cpu"
    with contextlib.closing(_HostLoop(config)) as host:
        steps = size.iterations * config.pretrain.num_envs
        things = {
            "loop": lambda: play(parts, size.iterations, learns=True),
            "blocking": lambda: _play_without_overlap(parts, size.iterations),
            "scan": _make_scan(parts, size.iterations),
            "host": lambda: host.play(size.single_steps),
        }
        work = dict.fromkeys(things, float(steps))
        work["host"] = float(size.single_steps)
        turns = take_turns(things, repetitions=size.repetitions, work=work)
    goals = {"blocking": 1.4, "scan": 1.3, "host": 10.0}
    cases = {
        "blocking": "ours / a loop without overlap",
        "scan": "ours / EnvPool's XLA interface in one jitted scan",
        "host": "ours / one environment with host replay",
    }
    rows = []
    for name, goal in goals.items():
        ratio = turns.ratio(lambda t, n=name: t[n] / t["loop"])
        row = Row(
            "others",
            cases[name],
            FRAME_SKIP * turns.rate("loop"),
            FRAME_SKIP * turns.rate(name),
            "frames/s",
            **at_least(ratio, goal),
        )
        if is_cpu and name == "blocking":
            # There is no second device that could learn while the cores emulate.
            row = row._replace(goal=f"GPU: at least 1.4, {NOT_MEASURED}", is_met=None)
        rows.append(row)
    return rows


@contextlib.contextmanager
def _counted_compilations() -> Iterator[list[str]]:
    """Collects the compilations that happen inside."""
    events: list[str] = []
    is_open = True

    def listen(name: str, seconds: float, **_: Any) -> None:
        del seconds
        if is_open and name.endswith("backend_compile_duration"):
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        is_open = False


def recompilation_rows(size: Size) -> list[Row]:
    """Counts compilations and implicit transfers of the loop after warm-up."""
    parts = started(main_config(size), size)
    # Everything that is compiled late has been compiled by then.
    play(parts, min(size.long_iterations, 250), learns=True)
    num_transfers, note = 0, ""
    with _counted_compilations() as events:
        try:
            with jax.transfer_guard("disallow"):
                play(parts, size.long_iterations, learns=True)
        except jax.errors.JaxRuntimeError as error:
            if "transfer" not in str(error):
                raise
            num_transfers, note = 1, str(error).splitlines()[0]
    case = f"in {size.long_iterations:,} iterations of the loop"
    return [
        Row(
            "recompilation",
            f"compilations {case}",
            len(events),
            0,
            "",
            goal="0",
            is_met=not events,
        ),
        Row(
            "recompilation",
            f"implicit transfers {case}",
            num_transfers,
            0,
            "",
            goal="0",
            is_met=num_transfers == 0,
            note=note,
        ),
    ]


def page_faults_rows(size: Size) -> list[Row]:
    """Counts the pages that the kernel must hand out to the loop after warm-up."""
    parts = started(main_config(size), size)
    play(parts, size.iterations, learns=True)

    def count() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    before = count()
    play(parts, size.iterations, learns=True)
    per_iteration = (count() - before) / size.iterations
    return [
        Row(
            "page_faults",
            "page faults per iteration of the loop",
            per_iteration,
            _FEW_FAULTS,
            "",
            **at_most(per_iteration / _FEW_FAULTS, 1.0),
        )
    ]


def scaling_rows(size: Size) -> list[Row]:
    """Measures acting at several numbers of environments, and the replay's memory."""
    things, work = {}, {}
    with contextlib.ExitStack() as held:
        for num_envs in size.env_counts:
            config = main_config(size)
            config = config_lib.replace_options(
                config, num_envs=num_envs, replay_size=num_envs * 40
            )
            pool = loop.make_pool(config, num_envs, loop.Stream.PRETRAIN_ACT)
            held.callback(pool.close)
            parts = loop.make_pretraining(config, pool)
            count = max(3, size.iterations * config.pretrain.num_envs // num_envs // 4)
            if size.options:
                count = size.iterations
            things[str(num_envs)] = functools.partial(play, parts, count, learns=False)
            work[str(num_envs)] = float(count * num_envs)
        turns = take_turns(things, repetitions=size.repetitions, work=work)
    rows = []
    names = list(things)
    for index, name in enumerate(names):
        goals = {}
        if index:
            previous = names[index - 1]
            ratio = turns.ratio(lambda t, n=name, p=previous: t[p] / t[n])
            goals = at_least(ratio, 0.9)
        rows.append(
            Row(
                "scaling",
                f"acting loop, {name} environments / the row above",
                FRAME_SKIP * turns.rate(name),
                FRAME_SKIP * turns.rate(names[index - 1]) if index else None,
                "frames/s",
                **goals,
            )
        )
    few, many = size.memory_steps
    taken = []
    for steps in (few, many):
        ring = buffer.make_replay(num_envs=4, size=steps, feature_dim=5)
        analysis = jax.jit(ring.init).lower().compile().memory_analysis()
        taken.append(analysis.output_size_in_bytes + analysis.temp_size_in_bytes)
    rows.append(
        Row(
            "scaling",
            f"memory of {many:,} steps of replay / {many // few} times {few:,}",
            taken[1],
            taken[0] * many / few,
            "bytes",
            **at_most(taken[1] / (taken[0] * many / few), 1.01),
        )
    )
    return rows
