"""A session of pretraining, as the benchmark's rows use it."""

import dataclasses
import functools
from typing import Any, cast

import jax
import numpy as np

from aps_jax import config as config_lib
from aps_jax.envs import atari
from aps_jax.parallel import devices
from aps_jax.train import loop

FRAME_SKIP = atari.FRAME_SKIP


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured."""

    name: str = "full"
    repetitions: int = 5  # Turns of each thing.
    iterations: int = 60  # Of the loop in one turn.
    updates: int = 15  # In one turn.
    env_counts: tuple[int, ...] = (8, 32, 128, 512)
    knn_shapes: tuple[tuple[int, int, int], ...] = (
        (1024, 1024, 5),
        (512, 4096, 512),
        (4096, 65536, 512),
    )
    product_side: int = 1024
    copy_floats: int = 2**24
    starts: int = 5  # Processes started with and without a cache.
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
    knn_shapes=((16, 64, 5), (16, 64, 32)),
    product_side=32,
    copy_floats=64,
    starts=1,
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


def nature_config(size: Size) -> config_lib.Config:
    """Returns `main_config` of a CPU with the Nature encoder and the paper's batch."""
    config = main_config(size)
    if size.options:  # The smallest size only shows that the row runs.
        return config
    return config_lib.replace_options(
        config, encoder="nature", batch_size=32, hidden_units=512
    )


class Setup:
    """Pretraining on Atari that has warmed up, compiled and learned.

    Each method does its work and waits for all that it enqueued.
    """

    def __init__(self, config: config_lib.Config, *, learns: bool = True):
        """Starts, and plays on to the first update if it `learns`."""
        self.num_envs = config.pretrain.num_envs
        samples = config.pretrain.samples_per_step
        self.updates_per_step = samples / config.learner.batch_size
        pool = loop.make_pool(config, self.num_envs, loop.Stream.PRETRAIN_ACT)
        mesh = devices.make_mesh(config.num_devices)
        agent = config.make_agent(pool.num_actions, pool.observation)
        plan = loop.pretrain_plan(config, agent)
        state = loop.init_state(agent, config.seed, mesh)
        # Types are not followed into the loop: without learning its fields are None.
        self._session = cast(Any, loop.start(config, plan, pool, state, mesh=mesh))
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

    def act(self, iterations: int) -> None:
        """Acts and stores, without the environments."""
        session = self._session
        for _ in range(iterations):
            timestep = devices.device_put(session.timestep)
            session.rollout, action = session.act(
                session.act_key, session.state, session.rollout, timestep
            )
            jax.device_get(action)
        jax.block_until_ready(session.rollout)

    def learn(self, updates: int) -> None:
        """Learns from the replay as it is."""
        session = self._session
        for _ in range(updates):
            session.state, session.sums, _ = self._learn_step(
                session.learn_key, session.state, session.sums, session.rollout.replay
            )
        jax.block_until_ready(session.state)

    def compiled_update(self) -> jax.stages.Compiled:
        """Returns the compiled update."""
        session = self._session
        return self._learn_step.lower(
            session.learn_key, session.state, session.sums, session.rollout.replay
        ).compile()


@functools.cache
def started(config: config_lib.Config) -> Setup:
    """Returns a setup that several rows share."""
    return Setup(config)
