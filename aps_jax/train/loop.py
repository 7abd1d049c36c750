"""The host loop of every stage, and the jitted functions that it calls.

One iteration is `act -> send -> enqueue updates -> recv`: JAX dispatches the updates and
returns, so the device learns while the CPU cores emulate. Where the cores are the
device, `recv` comes before the updates: both at once would only take turns. Keys are
derived from the seed by `fold_in` with a stream and a step, so a resumed run continues
the same streams.
"""

import contextlib
import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.agents import aps as agent_lib
from aps_jax.envs import atari
from aps_jax.ops import tasks
from aps_jax.parallel import devices
from aps_jax.replay import buffer
from aps_jax.runs import metrics
from aps_jax.train import sums as sums_lib


class Stream(enum.IntEnum):
    """Random streams of a run; each number is folded into the seed's key."""

    INIT = 0
    PRETRAIN_ACT = 1
    PRETRAIN_LEARN = 2
    INFER_ACT = 3
    FINETUNE_ACT = 4
    FINETUNE_LEARN = 5
    EVALUATE = 6
    FALLBACK_TASK = 7
    SNAPSHOT = 8
    CALIBRATE = 9


def stream_key(seed: int, stream: Stream) -> types.PRNGKey:
    """Returns the key of one random stream of a run."""
    return jax.random.fold_in(jax.random.key(seed), int(stream))


class Pool(Protocol):
    """The environments of a stage; `envs.AtariPool` is one."""

    num_actions: int
    num_envs: int

    def reset(self) -> types.TimeStep: ...
    def send(self, actions: np.ndarray) -> None: ...
    def recv(self) -> types.TimeStep: ...
    def render(self, index: int) -> np.ndarray: ...
    def close(self) -> None: ...


@runtime_checkable
class ResumablePool(Protocol):
    """A pool whose state can be saved, so that a resumed run is the same run.

    EnvPool's emulators have no such state: a run on Atari begins new games.
    """

    def get_state(self) -> dict[str, Any]:
        """Returns all that the next steps depend on.

        Returns:
          JSON values: by name, a list with an entry per environment.
        """

    def set_state(self, state: dict[str, Any]) -> types.TimeStep:
        """Goes on from a state, and returns the time step at which it was taken."""


MakePool = Callable[..., Pool]


class EnvironmentFailure(RuntimeError):
    """The environments raised; the stage has saved what it had."""


class NonFinite(FloatingPointError):
    """A loss or reward is not finite.

    Attributes:
      batch: What it was computed from, as arrays by name.
      seed: Whose it was, where a session has many seeds.
    """

    def __init__(
        self,
        message: str,
        batch: dict[str, np.ndarray],
        *,
        seed: int | None = None,
    ):
        """Keeps the batch beside the message."""
        super().__init__(message)
        self.batch = batch
        self.seed = seed


@contextlib.contextmanager
def blaming_environment() -> Iterator[None]:
    """Turns what the environments raise into an `EnvironmentFailure`."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise EnvironmentFailure(f"the environment raised {reason}") from error


def make_pool(
    config: config_lib.Config,
    num_envs: int,
    stream: Stream,
    constructor: MakePool = atari.AtariPool,
    mesh: devices.Mesh = None,
    *,
    run_seeds: Sequence[int] = (),
) -> Pool:
    """Starts the environments of one stage, with seeds of their own.

    Args:
      config: The run's values.
      num_envs: `E`, environments of all processes together.
      stream: The stage's acting stream: no stage replays the games of another.
      constructor: Makes the pool, with the arguments of `envs.AtariPool`.
      mesh: The stage's devices. Of several processes each starts its share, with the
        seeds that these environments would have in one process.
      run_seeds: Seeds of the runs that share the pool, one after the other `num_envs`
        environments of each; by default the config's alone.

    Raises:
      ValueError: The game is unknown or an option is out of bounds.
    """
    environment = config.environment
    seeds: list[int] = []
    for seed in run_seeds or (config.seed,):
        of_run = atari.environment_seeds(seed, num_envs, stream=int(stream))
        seeds += of_run[devices.share(num_envs, mesh)]
    return constructor(
        config.game,
        len(seeds),
        seeds=seeds,
        num_threads=environment.env_threads,
        frame_skip=config_lib.FRAME_SKIP,
        noop_max=environment.noop_max,
        max_frames=environment.max_frames,
        sticky=environment.sticky,
        fire_reset=environment.fire_reset,
    )


class Memory(NamedTuple):
    """What acting carries from step to step; `act` alone changes it, in place."""

    actor: agent_lib.ActorState
    replay: buffer.ReplayState
    episodes: atari.EpisodeStats
    regression: tasks.RegressionMoments  # no samples while nothing is inferred


Act = Callable[[types.Params, Memory, types.TimeStep], tuple[Memory, jax.Array]]
Learn = Callable[
    [agent_lib.AgentState, sums_lib.RunningSums, buffer.ReplayState],
    tuple[agent_lib.AgentState, sums_lib.RunningSums],
]


# What of the replay, and of all the memory, is sharded with the environments.
_REPLAY_SPECS = buffer.ReplayState(
    experience=devices.SHARDED,
    current_index=devices.EVERYWHERE,
    is_full=devices.EVERYWHERE,
)
_MEMORY_SPECS = Memory(
    actor=agent_lib.ActorState(
        stack=devices.SHARDED,
        task=devices.SHARDED,
        steps_left=devices.SHARDED,
        lives=devices.SHARDED,
        num_steps=devices.EVERYWHERE,
    ),
    replay=_REPLAY_SPECS,
    episodes=devices.SHARDED,
    regression=devices.EVERYWHERE,
)


def init_state(
    agent: agent_lib.Agent, seed: int, mesh: devices.Mesh = None
) -> agent_lib.AgentState:
    """Returns the state of an untrained agent, on every device."""
    return devices.put(jax.jit(agent.init)(stream_key(seed, Stream.INIT)), mesh)


def init_replay(ring: buffer.Replay, mesh: devices.Mesh = None) -> buffer.ReplayState:
    """Allocates an empty replay, each part on its device."""
    return jax.jit(ring.init, out_shardings=devices.shardings(mesh, _REPLAY_SPECS))()


def init_memory(
    agent: agent_lib.Agent,
    ring: buffer.Replay,
    *,
    num_envs: int,
    feature_dim: int,
    mesh: devices.Mesh = None,
) -> Memory:
    """Allocates the memory of a stage, the replay included, each part on its device."""

    def init() -> Memory:
        return Memory(
            actor=agent.init_actor(num_envs),
            replay=ring.init(),
            episodes=atari.init_episode_stats(num_envs),
            regression=tasks.init_regression_moments(feature_dim),
        )

    return jax.jit(init, out_shardings=devices.shardings(mesh, _MEMORY_SPECS))()


def pin_task(memory: Memory, task: jax.Array, mesh: devices.Mesh = None) -> Memory:
    """Gives every environment one task `[D]` and keeps it."""
    pin = jax.jit(
        agent_lib.pin_task, out_shardings=devices.shardings(mesh, _MEMORY_SPECS.actor)
    )
    return memory._replace(actor=pin(memory.actor, np.asarray(task)))


def make_act(
    agent: agent_lib.Agent,
    ring: buffer.Replay,
    key: types.PRNGKey,
    *,
    epsilon: float,
    explore: bool,
    regress_clip: float | None = None,
    mesh: devices.Mesh = None,
) -> Act:
    """Makes the jitted step that acts, stores and counts.

    Args:
      agent: The agent that acts.
      ring: The replay that stores.
      key: Key of the stage's acting stream.
      epsilon: Probability of a random action.
      explore: Whether the value of the entropy reward counts.
      regress_clip: If given, each transition enters the regression of (clipped)
        rewards on the features of the state reached.
      mesh: The devices, each of which acts for its environments.

    Returns:
      `act(params, memory, timestep) -> memory, action [E]`; `memory` is donated.
    """

    def act(
        params: types.Params, memory: Memory, timestep: types.TimeStep
    ) -> tuple[Memory, jax.Array]:
        actor, step = agent.act(
            params,
            memory.actor,
            timestep,
            key,
            epsilon=epsilon,
            explore=explore,
            use_gpi=False,
        )
        regression = memory.regression
        if regress_clip is not None:
            regression = tasks.update_regression_moments(
                regression,
                agent.features(params, actor.stack).phi,
                agent_lib.clip_rewards(timestep.reward, regress_clip),
                ~timestep.is_first,
            )
        memory = Memory(
            actor=actor,
            replay=ring.add(memory.replay, step),
            episodes=atari.update_episode_stats(memory.episodes, timestep),
            regression=regression,
        )
        return memory, step.action

    return jax.jit(
        act,
        donate_argnames="memory",
        out_shardings=devices.shardings(mesh, (_MEMORY_SPECS, devices.SHARDED)),
    )


def make_draw(
    ring: buffer.Replay,
    *,
    num_windows: int,
    num_states: int,
    mesh: devices.Mesh = None,
) -> Callable[[buffer.ReplayState, types.PRNGKey], buffer.Window]:
    """Makes the function that draws windows, each device from its part of the replay.

    Returns:
      `draw(replay_state, key)` returns `[num_windows]` windows of `num_states` states,
      sharded, the same whatever the number of devices. The key is consumed.
    """
    draw = functools.partial(
        ring.sample, num_windows=num_windows, num_states=num_states
    )
    return devices.spread(
        draw,
        mesh,
        in_specs=(_REPLAY_SPECS, devices.EVERYWHERE),
        out_specs=devices.SHARDED,
    )


class Sample(NamedTuple):
    """What an update learns from, drawn by the number of the update: so it can be drawn again.

    `windows(replay_state, num_updates)` returns `[B]` windows.
    `map_particles(function, params, replay_state, num_updates)` returns
    `function(params, particles)` of `[P]` windows of one state, for a function that treats
    each by itself: no more of them than `replay.CHUNK_SIZE` exist at a time.
    """

    windows: Callable[[buffer.ReplayState, jax.Array], buffer.Window]
    map_particles: Callable[..., Any] | None  # None where nothing needs them

    def drawn(
        self, replay_state: buffer.ReplayState, num_updates: jax.Array
    ) -> dict[str, buffer.Window]:
        """Returns all that an update learned from, by its name."""
        batch = {"windows": self.windows(replay_state, num_updates)}
        if self.map_particles is not None:
            batch["particles"] = self.map_particles(
                lambda _, window: window, (), replay_state, num_updates
            )
        return batch


def make_sample(
    ring: buffer.Replay,
    learner: config_lib.AgentConfig,
    key: types.PRNGKey,
    *,
    with_particles: bool,
    mesh: devices.Mesh = None,
) -> Sample:
    """Makes the functions that draw the batch of one update, sharded."""
    draw_windows = make_draw(
        ring,
        num_windows=learner.num_windows,
        num_states=learner.window_states,
        mesh=mesh,
    )

    def keys(num_updates: jax.Array) -> tuple[types.PRNGKey, types.PRNGKey]:
        """Returns the key of the windows and that of the particles."""
        update_key = jax.random.fold_in(key, num_updates)
        if not with_particles:
            return update_key, update_key
        window_key, particle_key = jax.random.split(update_key)
        return window_key, particle_key

    def windows(
        replay_state: buffer.ReplayState, num_updates: jax.Array
    ) -> buffer.Window:
        return draw_windows(replay_state, keys(num_updates)[0])

    def map_particles(
        function: Callable[[types.Params, buffer.Window], Any],
        params: types.Params,
        replay_state: buffer.ReplayState,
        num_updates: jax.Array,
    ) -> Any:
        def share(
            params: types.Params,
            replay_state: buffer.ReplayState,
            particle_key: types.PRNGKey,
            axis_name: str | None = None,
        ) -> Any:
            return ring.map_sample(
                functools.partial(function, params),
                replay_state,
                particle_key,
                num_windows=learner.num_particles,
                num_states=1,
                axis_name=axis_name,
            )

        mapped = devices.spread(
            share,
            mesh,
            in_specs=(devices.EVERYWHERE, _REPLAY_SPECS, devices.EVERYWHERE),
            out_specs=devices.SHARDED,
        )
        return mapped(params, replay_state, keys(num_updates)[1])

    return Sample(windows, map_particles if with_particles else None)


def _add_to_sums(
    sums: sums_lib.RunningSums,
    values: dict[str, jax.Array],
    update: jax.Array,
    replay_state: buffer.ReplayState,
) -> sums_lib.RunningSums:
    return sums_lib.add_to_sums(
        sums, values, update=update, extras=_place(replay_state)
    )


def _place(replay_state: buffer.ReplayState) -> dict[str, jax.Array]:
    """Returns what tells where the replay writes next, and whether it was filled."""
    return {
        "replay_index": replay_state.current_index,
        "replay_is_full": replay_state.is_full,
    }


def init_sums(names: Sequence[str]) -> sums_lib.RunningSums:
    """Returns sums of nothing, which remember the replay's place too."""
    return sums_lib.init_sums(
        names, {"replay_index": np.int32(0), "replay_is_full": np.bool_(False)}
    )


def _jit_learn(learn: Learn, mesh: devices.Mesh) -> Learn:
    return jax.jit(
        learn,
        donate_argnames=("state", "sums"),
        out_shardings=devices.sharding(mesh),
    )


def make_pretrain_learn(
    agent: agent_lib.Agent, sample: Sample, mesh: devices.Mesh = None
) -> Learn:
    """Makes the jitted reward-free update: sample, learn, sum the metrics.

    Returns:
      `learn(state, sums, replay_state) -> state, sums`; `state` and `sums` are donated.
    """
    update = devices.spread(
        agent.update,
        mesh,
        in_specs=(devices.EVERYWHERE, devices.SHARDED, devices.SHARDED),
        out_specs=devices.EVERYWHERE,
    )

    def learn(
        state: agent_lib.AgentState,
        sums: sums_lib.RunningSums,
        replay_state: buffer.ReplayState,
    ) -> tuple[agent_lib.AgentState, sums_lib.RunningSums]:
        number = state.num_updates
        windows = sample.windows(replay_state, number)
        particles = sample.map_particles(
            agent.particles, state.params, replay_state, number
        )
        state, values = update(state, windows, particles)
        return state, _add_to_sums(sums, values, number, replay_state)

    return _jit_learn(learn, mesh)


def make_finetune_learn(
    agent: agent_lib.Agent,
    sample: Sample,
    *,
    task: jax.Array,
    reward_scale: jax.Array,
    mesh: devices.Mesh = None,
) -> Learn:
    """Makes the jitted update from the game's reward for one task `[D]`.

    Returns:
      `learn(state, sums, replay_state) -> state, sums`; `state` and `sums` are donated.
    """
    update = devices.spread(
        agent.finetune_update,
        mesh,
        in_specs=(
            devices.EVERYWHERE,
            devices.SHARDED,
            devices.EVERYWHERE,
            devices.EVERYWHERE,
        ),
        out_specs=devices.EVERYWHERE,
    )

    def learn(
        state: agent_lib.AgentState,
        sums: sums_lib.RunningSums,
        replay_state: buffer.ReplayState,
    ) -> tuple[agent_lib.AgentState, sums_lib.RunningSums]:
        number = state.num_updates
        windows = sample.windows(replay_state, number)
        state, values = update(state, windows, task, reward_scale)
        return state, _add_to_sums(sums, values, number, replay_state)

    return _jit_learn(learn, mesh)


class Schedule(NamedTuple):
    """When updates are due: a function of the agent steps alone, so that it resumes."""

    start: int  # agent steps before the first update
    samples_per_step: float  # TD targets replayed per agent step
    batch_size: int  # TD targets of one update

    def num_due(self, agent_steps: int) -> int:
        """Returns how many updates should have been made by then."""
        played = max(0, agent_steps - self.start)
        return math.floor(played * self.samples_per_step / self.batch_size)


def is_due(every: int, agent_steps: int, num_envs: int) -> bool:
    """Returns whether the last iteration reached or passed a multiple of `every`."""
    return agent_steps // every > (agent_steps - num_envs) // every


# Iterations between two looks at whether all updates so far were finite.
_LOOK_EVERY = 100


@jax.jit
def _copy_of(flag: jax.Array) -> jax.Array:
    """Copies an array that the next update will destroy."""
    return jnp.copy(flag)


@dataclasses.dataclass
class Session:
    """The host's side of a stage: the environments, and the newest of every state."""

    pool: Pool
    state: agent_lib.AgentState
    memory: Memory
    sums: sums_lib.RunningSums
    iteration: int = 0
    timestep: types.TimeStep | None = None  # None before the first step and a resume
    learn_from: int = 0  # agent steps before which nothing is learned after a resume
    sample: Sample | None = None  # what the updates draw, once there are any
    # On a CPU emulators and updates want the same cores: measured in docs/performance.md.
    overlaps: bool = dataclasses.field(
        default_factory=lambda: jax.default_backend() != "cpu"
    )
    mesh: devices.Mesh = None  # on which all states lie
    _flag: jax.Array | None = None  # of an update some iterations ago

    @property
    def num_envs(self) -> int:
        """Environments of all processes together."""
        return self.pool.num_envs * devices.num_processes(self.mesh)

    @property
    def agent_steps(self) -> int:
        """Agent steps of all environments together (a reset frame counts as one)."""
        return self.iteration * self.num_envs

    @property
    def num_finished(self) -> int:
        """Games that ended at the last step, in all processes."""
        is_last = self.timestep.terminated | self.timestep.truncated
        if devices.num_processes(self.mesh) > 1:
            is_last = devices.get(
                devices.put(is_last, self.mesh, devices.SHARDED), self.mesh
            )
        return int(np.sum(is_last))

    def step(
        self, act: Act, learn: Learn | None = None, schedule: Schedule | None = None
    ) -> None:
        """Makes one agent step in every environment and enqueues the updates due.

        Args:
          act: From `make_act`.
          learn: From `make_pretrain_learn` or `make_finetune_learn`; none by default.
          schedule: When to call it.

        Raises:
          EnvironmentFailure: The environments raised. The session can be saved, and
            resumes with new games.
          NonFinite: A loss or reward is not finite.
        """
        if self.timestep is None:
            with blaming_environment():
                self.timestep = self.pool.reset()
        timestep = devices.put(self.timestep, self.mesh, devices.SHARDED)
        self.memory, action = act(self.state.params, self.memory, timestep)
        action = devices.own(action)
        before, self.iteration = self.agent_steps, self.iteration + 1
        reached: types.TimeStep | None = None
        try:
            with blaming_environment():
                self.pool.send(action)
                if not self.overlaps:
                    reached = self.pool.recv()
        finally:  # The step is in the replay: its updates are made, come what may.
            if learn is not None and self.agent_steps > self.learn_from:
                start = max(before, self.learn_from)
                due = schedule.num_due(self.agent_steps) - schedule.num_due(start)
                for _ in range(due):
                    self.state, self.sums = learn(
                        self.state, self.sums, self.memory.replay
                    )
        if learn is not None and self.iteration % _LOOK_EVERY == 0:
            self._look()
        with blaming_environment():
            self.timestep = self.pool.recv() if reached is None else reached
        self._check_rewards(action, self.timestep)

    def _check_rewards(self, action: np.ndarray, timestep: types.TimeStep) -> None:
        """Raises a `NonFinite` that names the environment, unless rewards are finite."""
        if not np.isfinite(timestep.reward).all():
            (places,) = np.nonzero(~np.isfinite(timestep.reward))
            message = (
                f"The game's reward of environment {places[0]} is "
                f"{timestep.reward[places[0]]} at agent step {self.agent_steps}."
            )
            if devices.num_processes(self.mesh) > 1:  # The others know nothing of it.
                raise EnvironmentFailure(message)
            raise NonFinite(message, {"action": action, **timestep._asdict()})

    def forget_replay(self) -> None:
        """Frees the replay's place for one that is restored."""
        self.memory = self.memory._replace(replay=None)

    def _look(self) -> None:
        """Looks whether an update was not finite, without waiting for the device."""
        # Several processes must look at the same step, so that they wait if need be.
        is_waited_for = devices.num_processes(self.mesh) > 1
        if self._flag is not None and (is_waited_for or self._flag.is_ready()):
            if np.any(jax.device_get(self._flag) >= 0):
                self.check_finite()
            self._flag = None
        if self._flag is None:
            self._flag = _copy_of(self.sums.bad.update)

    def check_finite(self) -> None:
        """Checks that all updates since the last row were finite; waits for them.

        Raises:
          NonFinite: One was not, with its number, the metrics that were not finite, the
            parameters that are not now, and its batch.
        """
        bad = jax.device_get(self.sums.bad)
        if bad.update < 0:
            return
        names = [name for name, is_bad in bad.names.items() if is_bad]
        params = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree_util.tree_leaves_with_path(self.state.params)
            if not bool(jnp.all(jnp.isfinite(leaf)))
        ]
        message = (
            f"Not finite in update {bad.update}, noticed at agent step "
            f"{self.agent_steps}: {', '.join(names)}."
        )
        if params:
            few = ", ".join(params[:3])
            rest = f" and {len(params) - 3} more" if len(params) > 3 else ""
            message += f" Parameters that are not finite by now: {few}{rest}."
        batch: dict[str, np.ndarray] = {}
        if self.sample is not None:
            # The replay as it stood then; the newest rows may be of later steps.
            then = self.memory.replay.replace(
                current_index=devices.put(bad.extras["replay_index"], self.mesh),
                is_full=devices.put(bad.extras["replay_is_full"], self.mesh),
            )
            number = devices.put(bad.update, self.mesh)
            drawn = devices.get(jax.jit(self.sample.drawn)(then, number), self.mesh)
            for part, window in drawn.items():
                for name, value in window._asdict().items():
                    batch[f"{part}.{name}"] = value
        raise NonFinite(message, batch)

    def row(self) -> dict[str, float]:
        """Reads a row of metrics, empties the sums, and checks that all is finite.

        Raises:
          NonFinite: As `check_finite`.
        """
        self.check_finite()
        episodes = devices.get(self.memory.episodes, self.mesh)
        values = sums_lib.means(self.sums)
        self.sums = devices.put(init_sums(values), self.mesh)
        self._flag = None
        return {
            "agent_steps": self.agent_steps,
            "frames": self.agent_steps * config_lib.FRAME_SKIP,
            "updates": int(jax.device_get(self.state.num_updates)),
            "episodes": int(episodes.num_episodes.sum()),
            "episode_return": _mean_known(episodes.last_return),
            "episode_length": _mean_known(episodes.last_length),
            **values,
        }


def _mean_known(values: np.ndarray) -> float:
    """Averages what is not NaN; NaN if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a row as JSON can hold it: None for NaN."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in values.items()
    }


def names_of(group: Sequence[metrics.Metric]) -> list[str]:
    """Returns the names of a group of metrics."""
    return [metric.name for metric in group]


# States from which the features' moments are measured: their means are then known to
# 3 % of a standard deviation.
_CALIBRATION_STATES = 1024


def make_calibrate(
    agent: agent_lib.Agent,
    ring: buffer.Replay,
    key: types.PRNGKey,
    mesh: devices.Mesh = None,
) -> Callable[[types.Params, buffer.ReplayState], types.Params]:
    """Makes the jitted measurement of the features' moments over the replay.

    Args:
      agent: The agent's functions.
      ring: The replay's; it must hold a window by the time of the measurement.
      key: Key of the stream of measurements; every one draws the same places.
      mesh: The devices that hold it.

    Returns:
      `calibrate(params, replay_state) -> params`, whose features are white.
    """
    draw = make_draw(
        ring,
        num_windows=devices.round_up(_CALIBRATION_STATES, mesh),
        num_states=1,
        mesh=mesh,
    )
    measure = devices.spread(
        agent.calibrate,
        mesh,
        in_specs=(devices.EVERYWHERE, devices.SHARDED),
        out_specs=devices.EVERYWHERE,
    )

    def calibrate(
        params: types.Params, replay_state: buffer.ReplayState
    ) -> types.Params:
        windows = draw(replay_state, key)
        return measure(params, windows.observation[:, 0])

    return jax.jit(calibrate, out_shardings=devices.sharding(mesh))


def pretrain_schedule(config: config_lib.Config) -> Schedule:
    """Returns when the updates of pretraining are due."""
    values, learner = config.pretrain, config.learner
    return Schedule(
        start=max(values.warmup_agent_steps, learner.window_length * values.num_envs),
        samples_per_step=values.samples_per_step,
        batch_size=learner.batch_size,
    )


class Pretraining(NamedTuple):
    """All that the loop of pretraining needs."""

    agent: agent_lib.Agent
    ring: buffer.Replay
    session: Session
    act: Act
    learn: Learn
    schedule: Schedule


def make_pretraining(
    config: config_lib.Config, pool: Pool, mesh: devices.Mesh = None
) -> Pretraining:
    """Makes a new session of pretraining, and its jitted steps.

    Args:
      config: The run's values.
      pool: Environments, not yet reset, as many as the config says.
      mesh: The devices that share the work.
    """
    values, learner = config.pretrain, config.learner
    num_envs = values.num_envs
    agent = agent_lib.make_agent(learner, config.finetune, num_actions=pool.num_actions)
    ring = buffer.make_replay(
        num_envs=num_envs, size=values.replay_size, feature_dim=learner.feature_dim
    )
    sample = make_sample(
        ring,
        learner,
        stream_key(config.seed, Stream.PRETRAIN_LEARN),
        with_particles=True,
        mesh=mesh,
    )
    session = Session(
        pool=pool,
        state=init_state(agent, config.seed, mesh),
        memory=init_memory(
            agent,
            ring,
            num_envs=num_envs,
            feature_dim=learner.feature_dim,
            mesh=mesh,
        ),
        sums=devices.put(
            init_sums(names_of(metrics.LEARNING + metrics.PRETRAINING)), mesh
        ),
        sample=sample,
        mesh=mesh,
    )
    act = make_act(
        agent,
        ring,
        stream_key(config.seed, Stream.PRETRAIN_ACT),
        epsilon=values.pretrain_epsilon,
        explore=True,
        mesh=mesh,
    )
    learn = make_pretrain_learn(agent, sample, mesh)
    return Pretraining(agent, ring, session, act, learn, pretrain_schedule(config))
