"""A session of pretraining, as the benchmark's rows use it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.envs import atari
from aps_jax.parallel import devices
from aps_jax.train import loop, seeds

FRAME_SKIP = types.FRAME_SKIP


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured."""

    name: str = "full"
    repetitions: int = 5  # Turns of each thing.
    iterations: int = 60  # Of the loop in one turn.
    updates: int = 15  # In one turn.
    env_counts: tuple[int, ...] = (8, 32, 128, 512)
    encoders: tuple[str, ...] = ("small", "nature", "paper")
    encoder_batches: tuple[int, ...] = (32, 256)
    encoder_seconds: float = 0.3
    knn_shapes: tuple[tuple[int, int, int], ...] = (
        (1024, 1024, 5),
        (512, 4096, 512),
        (4096, 65536, 512),
    )
    product_side: int = 1024
    copy_floats: int = 2**24
    starts: int = 5  # Processes started with and without a cache.
    seed_counts: tuple[int, ...] = (2, 4)  # Seeds at once.
    device_counts: tuple[int, ...] = (1, 2, 4, 8)  # First is one.
    particle_counts: tuple[int, ...] = (512, 4096, 65_536)
    options: tuple[tuple[str, Any], ...] = ()  # Of the configs, over their presets.


FULL = Size()
# Seconds: every row runs, and no figure means anything.
SMOKE = Size(
    name="smoke",
    repetitions=1,
    iterations=3,
    updates=1,
    env_counts=(2, 4),
    encoders=("small",),
    encoder_batches=(2,),
    encoder_seconds=0.0,
    knn_shapes=((16, 64, 5), (16, 64, 32)),
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


def is_cpu() -> bool:
    """Returns whether rows follow the CPU's preset and goals, or the GPU's."""
    return jax.default_backend() == "cpu"


def main_config(size: Size) -> config_lib.Config:
    """Returns the config that most rows run: the preset of this kind of device."""
    config = config_lib.preset_config("cpu" if is_cpu() else "gpu")
    options = {"replay_size": 50_000 if is_cpu() else 200_000, **dict(size.options)}
    return config_lib.replace_options(config, **options)


def nature_config(size: Size, **options: Any) -> config_lib.Config:
    """Returns `main_config` with the Nature encoder, at the paper's batch on CPUs."""
    config = main_config(size)
    if size.options:  # The smallest size only shows that the row runs.
        return config
    options = {"encoder": "nature", **options}
    if is_cpu():
        options = {"batch_size": 32, "hidden_units": 512, **options}
    return config_lib.replace_options(config, **options)


def make_jitted_step(pool: atari.AtariPool) -> tuple[jax.Array, Callable[..., Any]]:
    """Returns EnvPool's own step as a function of JAX, the baseline of `others`.

    Returns:
      A handle, and `step(handle, actions) -> handle, TimeStep` for use under jit.
    """
    handle, recv, send, _ = pool._pool.xla()
    env_ids = jnp.arange(pool.num_envs, dtype=jnp.int32)

    def step(handle: jax.Array, actions: jax.Array) -> tuple[jax.Array, types.TimeStep]:
        handle = send(handle, actions, env_ids)
        handle, (frame, _, terminated, truncated, info) = recv(handle)
        is_done = terminated | truncated
        is_game_over = info["terminated"] != 0
        return handle, types.TimeStep(
            frame=frame[:, 0],
            reward=info["reward"],
            terminated=is_done & is_game_over,
            truncated=is_done & ~is_game_over,
            is_first=info["elapsed_step"] == 0,
            lives=info["lives"],
            ram=info["ram"],
        )

    return jnp.asarray(handle), step


class Setup:
    """Pretraining on Atari that has warmed up, compiled and learned.

    Each method does its work and waits for all that it enqueued.
    """

    def __init__(
        self, config: config_lib.Config, *, num_seeds: int = 0, learns: bool = True
    ):
        """Starts.

        Args:
          config: The run's values.
          num_seeds: Seeds at once; 0 is a single run, without a seed axis.
          learns: Whether to play on to the first update.
        """
        self.num_envs = config.pretrain.num_envs
        samples, batch_size = (
            config.pretrain.samples_per_step,
            config.learner.batch_size,
        )
        self.updates_per_step = samples / batch_size
        run_seeds = range(config.seed, config.seed + num_seeds)
        stream = loop.Stream.PRETRAIN_ACT
        pool = loop.make_pool(config, self.num_envs, stream, run_seeds=run_seeds)
        # Types are not followed into the loop: without learning its fields are None.
        self._session: Any
        if num_seeds:
            self._session, _ = seeds.start_pretraining(config, run_seeds, pool)
        else:
            mesh = devices.make_mesh(config.num_devices)
            agent = config.make_agent(pool.num_actions)
            plan = loop.pretrain_plan(config, agent)
            state = loop.init_state(agent, config.seed, mesh)
            self._learner = plan.phase.learner
            self._session = loop.start(config, plan, pool, state, mesh=mesh)
        self._learn_step, self._schedule = self._session.learn, self._session.schedule
        while learns and not self._schedule.num_due(self._session.agent_steps):
            self._session.step()
        jax.block_until_ready(self._session.state)

    def close(self) -> None:
        """Ends the emulators."""
        self._session.pool.close()

    def play(self, iterations: int, *, learns: bool = True) -> None:
        """Runs the real loop."""
        self._session.learn = self._learn_step if learns else None
        for _ in range(iterations):
            self._session.step()
        jax.block_until_ready((self._session.state, self._session.rollout))

    def step_environments(self, iterations: int) -> None:
        """Steps the environments alone, with random actions."""
        pool = self._session.pool
        rng = np.random.default_rng(0)
        for _ in range(iterations):
            actions = rng.integers(0, pool.num_actions, pool.num_envs)
            pool.send(actions.astype(np.int32))
            self._session.timestep = pool.recv()

    def _act(self) -> np.ndarray:
        session = self._session
        session.rollout, action = session.act(
            session.state, session.rollout, devices.device_put(session.timestep)
        )
        return jax.device_get(action)

    def act(self, iterations: int) -> None:
        """Acts and stores, without the environments."""
        for _ in range(iterations):
            self._act()
        jax.block_until_ready(self._session.rollout)

    def _learn(self, learn: Callable[..., Any], *arguments: Any) -> None:
        session = self._session
        session.state, session.sums, _ = learn(
            session.state, session.sums, *arguments, session.rollout.replay
        )

    def learn(self, updates: int) -> None:
        """Learns from the replay as it is."""
        for _ in range(updates):
            self._learn(self._learn_step)
        jax.block_until_ready(self._session.state)

    def play_without_overlap(self, iterations: int) -> None:
        """Does one thing after the other, and waits for each."""
        session, pool = self._session, self._session.pool
        num_due = self._schedule.num_due
        for _ in range(iterations):
            before = session.agent_steps
            pool.send(self._act())
            session.timestep = pool.recv()
            session.iteration += 1
            self.learn(num_due(session.agent_steps) - num_due(before))
            jax.block_until_ready(session.rollout)

    def make_scan(self, iterations: int) -> Callable[[], None]:
        """Makes the whole loop one jitted scan over EnvPool's own XLA interface."""
        session, learn = self._session, self._learn_step
        handle, env_step = make_jitted_step(session.pool)
        rate = self.num_envs * self.updates_per_step

        def iterate(carry, index):
            handle, state, sums, rollout, timestep = carry
            rollout, action = session.act(state, rollout, timestep)
            handle, timestep = env_step(handle, action)
            due = jnp.floor((index + 1) * rate) - jnp.floor(index * rate)
            state, sums = jax.lax.fori_loop(
                0,
                due.astype(jnp.int32),
                lambda _, both: learn(*both, rollout.replay)[:2],
                (state, sums),
            )
            return (handle, state, sums, rollout, timestep), None

        @functools.partial(jax.jit, donate_argnums=0)
        def scan(carry):
            numbers = jnp.arange(iterations, dtype=jnp.float32)
            return jax.lax.scan(iterate, carry, numbers)[0]

        def play() -> None:
            nonlocal handle
            states = (session.state, session.sums, session.rollout, session.timestep)
            # All committed to the device alike, or the scan would be compiled twice.
            carry = devices.device_put((handle, *states))
            with jax.numpy_dtype_promotion("standard"):
                handle, session.state, session.sums, session.rollout, timestep = scan(
                    carry
                )
            session.timestep = jax.device_get(timestep)
            jax.block_until_ready(session.state)

        return play

    def make_learn_from_batches(self, updates: int) -> Callable[[], None]:
        """Returns what makes updates of batches that are drawn already."""
        session, learner = self._session, self._learner
        draw = jax.jit(session.draw)
        # As many as there are updates: some batches take less time than others.
        drawn_from = session.state, session.rollout.replay
        batches = [draw(*drawn_from, np.int32(number)) for number in range(updates)]

        @functools.partial(jax.jit, donate_argnames=("state", "sums"))
        def learn(state, sums, batch, replay):
            at_hand = loop.make_learn(learner, lambda *_: batch, jax.random.key(0))
            return at_hand(state, sums, replay)

        def learn_from_batches() -> None:
            for batch in batches:
                self._learn(learn, batch)
            jax.block_until_ready(session.state)

        return learn_from_batches

    def compiled_update(self) -> jax.stages.Compiled:
        """Returns the compiled update."""
        session = self._session
        return self._learn_step.lower(
            session.state, session.sums, session.rollout.replay
        ).compile()


@functools.cache
def started(config: config_lib.Config) -> Setup:
    """Returns a setup that several rows share."""
    return Setup(config)
