"""The host loop of every stage, and the jitted functions that it calls.

One iteration is `act -> send -> enqueue updates -> recv`: JAX dispatches the updates and
returns, so the device learns while the CPU cores emulate. Keys are derived from the seed
by `fold_in` with a stream and a step, so a resumed run continues the same streams.
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from aps_jax import agent as agent_lib
from aps_jax import config as config_lib
from aps_jax import envs, metrics, replay, tasks, types


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


def stream_key(seed: int, stream: Stream) -> types.PRNGKey:
    """Returns the key of one random stream of a run."""
    return jax.random.fold_in(jax.random.key(seed), int(stream))


def put(tree: Any) -> Any:
    """Copies a pytree to the device on which stages run, and commits it there.

    All that enters a jitted step is committed alike: a mixture (restored arrays are
    committed, computed ones are not) would compile the same step twice.
    """
    return jax.device_put(tree, jax.local_devices()[0])


class Pool(Protocol):
    """The environments of a stage; `envs.AtariPool` is one."""

    num_actions: int
    num_envs: int

    def reset(self) -> types.TimeStep: ...
    def send(self, actions: np.ndarray) -> None: ...
    def recv(self) -> types.TimeStep: ...
    def render(self, index: int) -> np.ndarray: ...
    def close(self) -> None: ...


MakePool = Callable[..., Pool]


def make_pool(
    config: config_lib.Config,
    num_envs: int,
    stream: Stream,
    constructor: MakePool = envs.AtariPool,
) -> Pool:
    """Starts the environments of one stage, with seeds of their own.

    Args:
      config: The run's values.
      num_envs: `E`, environments.
      stream: The stage's acting stream: no stage replays the games of another.
      constructor: Makes the pool, with the arguments of `envs.AtariPool`.

    Raises:
      ValueError: The game is unknown or an option is out of bounds.
    """
    environment = config.environment
    # Neither stages nor the processes of several hosts share a stream of games.
    number = int(stream) + len(Stream) * jax.process_index()
    return constructor(
        config.game,
        num_envs,
        seeds=envs.environment_seeds(config.seed, num_envs, process_index=number),
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
    replay: replay.ReplayState
    episodes: envs.EpisodeStats
    regression: tasks.RegressionMoments  # no samples while nothing is inferred


Act = Callable[[types.Params, Memory, types.TimeStep], tuple[Memory, jax.Array]]
Learn = Callable[
    [agent_lib.AgentState, metrics.RunningSums, replay.ReplayState],
    tuple[agent_lib.AgentState, metrics.RunningSums],
]


def init_state(agent: agent_lib.Agent, seed: int) -> agent_lib.AgentState:
    """Returns the state of an untrained agent, on the device."""
    return put(jax.jit(agent.init)(stream_key(seed, Stream.INIT)))


def init_memory(
    agent: agent_lib.Agent, ring: replay.Replay, *, num_envs: int, feature_dim: int
) -> Memory:
    """Allocates the memory of a stage, the replay included, on the device."""

    def init() -> Memory:
        return Memory(
            actor=agent.init_actor(num_envs),
            replay=ring.init(),
            episodes=envs.init_episode_stats(num_envs),
            regression=tasks.init_regression_moments(feature_dim),
        )

    return put(jax.jit(init)())


def make_act(
    agent: agent_lib.Agent,
    ring: replay.Replay,
    key: types.PRNGKey,
    *,
    epsilon: float,
    explore: bool,
    regress_clip: float | None = None,
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
            episodes=envs.update_episode_stats(memory.episodes, timestep),
            regression=regression,
        )
        return memory, step.action

    return jax.jit(act, donate_argnames="memory")


def make_pretrain_learn(
    agent: agent_lib.Agent,
    ring: replay.Replay,
    learner: config_lib.AgentConfig,
    key: types.PRNGKey,
) -> Learn:
    """Makes the jitted reward-free update: sample, learn, sum the metrics.

    Returns:
      `learn(state, sums, replay_state) -> state, sums`; `state` and `sums` are donated.
    """

    def learn(
        state: agent_lib.AgentState,
        sums: metrics.RunningSums,
        replay_state: replay.ReplayState,
    ) -> tuple[agent_lib.AgentState, metrics.RunningSums]:
        window_key, particle_key = jax.random.split(
            jax.random.fold_in(key, state.num_updates)
        )
        windows = ring.sample(
            replay_state,
            window_key,
            num_windows=learner.num_windows,
            num_states=learner.window_states,
        )
        particles = ring.sample(
            replay_state,
            particle_key,
            num_windows=learner.num_particles,
            num_states=1,
        )
        state, values = agent.update(state, windows, particles)
        return state, metrics.add_to_sums(sums, values)

    return jax.jit(learn, donate_argnames=("state", "sums"))


def make_finetune_learn(
    agent: agent_lib.Agent,
    ring: replay.Replay,
    learner: config_lib.AgentConfig,
    key: types.PRNGKey,
    *,
    task: jax.Array,
    reward_scale: jax.Array,
) -> Learn:
    """Makes the jitted update from the game's reward for one task `[D]`.

    Returns:
      `learn(state, sums, replay_state) -> state, sums`; `state` and `sums` are donated.
    """

    def learn(
        state: agent_lib.AgentState,
        sums: metrics.RunningSums,
        replay_state: replay.ReplayState,
    ) -> tuple[agent_lib.AgentState, metrics.RunningSums]:
        windows = ring.sample(
            replay_state,
            jax.random.fold_in(key, state.num_updates),
            num_windows=learner.num_windows,
            num_states=learner.window_states,
        )
        state, values = agent.finetune_update(state, windows, task, reward_scale)
        return state, metrics.add_to_sums(sums, values)

    return jax.jit(learn, donate_argnames=("state", "sums"))


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


@dataclasses.dataclass
class Session:
    """The host's side of a stage: the environments, and the newest of every state."""

    pool: Pool
    state: agent_lib.AgentState
    memory: Memory
    sums: metrics.RunningSums
    iteration: int = 0
    timestep: types.TimeStep | None = None  # None before the first step and a resume

    @property
    def agent_steps(self) -> int:
        """Agent steps of all environments together (a reset frame counts as one)."""
        return self.iteration * self.pool.num_envs

    @property
    def num_finished(self) -> int:
        """Games that ended at the last step."""
        return int(np.sum(self.timestep.terminated | self.timestep.truncated))

    def step(
        self, act: Act, learn: Learn | None = None, schedule: Schedule | None = None
    ) -> None:
        """Makes one agent step in every environment and enqueues the updates due.

        Args:
          act: From `make_act`.
          learn: From `make_pretrain_learn` or `make_finetune_learn`; none by default.
          schedule: When to call it.
        """
        if self.timestep is None:
            self.timestep = self.pool.reset()
        self.memory, action = act(self.state.params, self.memory, put(self.timestep))
        self.pool.send(jax.device_get(action))
        before, self.iteration = self.agent_steps, self.iteration + 1
        if learn is not None:
            num_updates = schedule.num_due(self.agent_steps) - schedule.num_due(before)
            for _ in range(num_updates):
                self.state, self.sums = learn(self.state, self.sums, self.memory.replay)
        self.timestep = self.pool.recv()

    def row(self) -> dict[str, float]:
        """Reads a row of metrics, empties the sums, and checks that all is finite.

        Raises:
          FloatingPointError: A mean over updates is not finite.
        """
        episodes = jax.device_get(self.memory.episodes)
        values = metrics.means(self.sums)
        count = int(jax.device_get(self.sums.count))
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if count and bad:
            raise FloatingPointError(
                f"Not finite within the {count} updates before agent step "
                f"{self.agent_steps}: {', '.join(bad)}."
            )
        self.sums = put(metrics.init_sums(values))
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
