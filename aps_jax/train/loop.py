"""The host loop of every stage, and the jitted steps that it calls.

One iteration is `act -> send -> enqueue updates -> recv`: JAX dispatches the updates
and returns, so the device learns while the CPU cores emulate. Where the cores are the
device, `recv` comes before the updates: both at once would only take turns. Keys are
derived from the seed by `fold_in` with a stream and a step, so a resumed run continues
the same streams. The loop knows no agent: see `agents.base`. Letters: `E` environments.

Many seeds at once share one session, one pool and one device: every state has a leading
axis of seeds, over which the same steps are mapped (`map_seeds`).
"""

import contextlib
import dataclasses
import enum
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.agents import base
from aps_jax.envs import atari, games, worlds
from aps_jax.parallel import devices
from aps_jax.replay import buffer as buffer_lib
from aps_jax.replay import frames
from aps_jax.replay import priorities as priorities_lib
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
    ADAPT = 7
    EMBED = 8
    CALIBRATE = 9
    FOLLOW = 10


def stream_key(seed: int, stream: Stream) -> types.PRNGKey:
    """Returns the key of one random stream of a run."""
    return jax.random.fold_in(jax.random.key(seed), int(stream))


def stream_keys(
    seeds: Sequence[int], stream: Stream, mesh: devices.Mesh = None
) -> types.PRNGKey:
    """Returns the key of one seed, or keys `[S]` of many, on the devices."""
    keys = [stream_key(seed, stream) for seed in seeds]
    words = jax.device_get([jax.random.key_data(key) for key in keys])
    return jax.random.wrap_key_data(stack_seeds(words, mesh))


def map_seeds(
    step: Callable[..., Any], num_seeds: int, *, in_axes: Any = 0
) -> Callable[..., Any]:
    """Maps a step over `S` seeds (`jax.vmap`), each with a key of its own.

    The keys are arguments, not constants: all seeds share a compiled program.

    Args:
      step: Its first argument is a key.
      num_seeds: `S`.
      in_axes: Of its arguments, as `jax.vmap` takes them.

    Returns:
      The step; for many seeds arguments and results have a leading axis `[S]`.
    """
    return step if num_seeds == 1 else jax.vmap(step, in_axes=in_axes)


# Programs of each kind that are kept, so that a process makes each of them once: a run
# that goes on, or another seed, finds it there.
_PROGRAMS = 8


def stack_seeds(parts: Sequence[Any], mesh: devices.Mesh = None) -> Any:
    """Puts what is each seed's on the devices, many under a leading axis `[S]`."""
    if len(parts) == 1:
        return devices.device_put(parts[0], mesh)
    return devices.device_put(
        jax.jit(lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees))(*parts)
    )


@jax.jit
def _take(stacked: Any, index: jax.Array) -> Any:
    """Copies what is one seed's out of a pytree `[S, ...]`."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacked
    )


class Pool(Protocol):
    """The environments of a stage; `games.make_pool` makes them."""

    num_actions: int
    num_envs: int
    observation: types.ObservationSpec

    def reset(self) -> types.TimeStep: ...
    def send(self, actions: np.ndarray) -> None: ...
    def recv(self) -> types.TimeStep: ...
    def render(self, index: int) -> np.ndarray: ...
    def close(self) -> None: ...


@runtime_checkable
class ResumablePool(Protocol):
    """A pool whose state can be saved, so that a resumed run is the same run.

    `worlds.WorldPool` is one. EnvPool's emulators have no such state: a run on Atari
    begins new games.
    """

    def get_state(self) -> dict[str, Any]:
        """Returns all that the next steps depend on.

        Returns:
          JSON values: by name, a list with an entry per environment.
        """

    def set_state(self, state: dict[str, Any]) -> types.TimeStep:
        """Restores a state, and returns the time step at which it was taken."""


MakePool = Callable[..., Pool]


class EnvironmentFailure(RuntimeError):
    """The environments raised; the stage has saved what it had."""


class NonFinite(FloatingPointError):
    """A loss or reward is not finite.

    Attributes:
      batch: What it was computed from, as arrays by name.
    """

    def __init__(self, message: str, batch: dict[str, np.ndarray]):
        """Keeps the batch beside the message."""
        super().__init__(message)
        self.batch = batch


@contextlib.contextmanager
def environment_errors() -> Iterator[None]:
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
    constructor: MakePool = games.make_pool,
    *,
    part: slice = slice(None),
    run_seeds: Sequence[int] = (),
) -> Pool:
    """Starts the environments of one stage, with seeds of their own.

    Args:
      config: The run's values.
      num_envs: `E`, environments of all processes and pools together.
      stream: The stage's acting stream: no stage replays the games of another.
      constructor: Makes the pool, with the arguments of `games.make_pool`.
      part: Which of the `E` this pool has, with the seeds that they have among all.
      run_seeds: Seeds of the runs that share the pool, one after the other `num_envs`
        environments of each; by default the config's alone.

    Raises:
      ValueError: The game is unknown or an option is out of bounds.
    """
    environment = config.environment
    seeds: list[int] = []
    for seed in run_seeds or (config.seed,):
        of_run = atari.environment_seeds(seed, num_envs, stream=int(stream))
        seeds += of_run[part]
    return constructor(
        config.game,
        len(seeds),
        seeds=seeds,
        num_threads=environment.env_threads,
        noop_max=environment.noop_max,
        max_frames=environment.max_frames,
        sticky=environment.sticky,
        fire_reset=environment.fire_reset,
    )


# ---------------------------------------------------------------------------- acting


class ActorState(NamedTuple):
    """What acting remembers from step to step."""

    memory: Any  # the policy's, leading axis [E]
    stack: types.Array  # [E, *observation.shape] uint8, newest frame last
    lives: types.Array  # [E] int32, lives at the step before
    num_steps: types.Array  # [] int32, time steps acted; numbers the random stream


def init_actor(policy: base.Policy, num_envs: int) -> ActorState:
    """Returns the state of `E` environments before their first step."""
    return ActorState(
        memory=policy.init(num_envs),
        stack=frames.init_stack(policy.observation, num_envs),
        lives=jnp.zeros((num_envs,), jnp.int32),
        num_steps=jnp.zeros((), jnp.int32),
    )


def act_once(
    policy: base.Policy,
    key: types.PRNGKey,
    agent_state: base.AgentState,
    actor: ActorState,
    timestep: types.TimeStep,
) -> tuple[ActorState, base.Decision]:
    """Chooses an action in every environment.

    Args:
      policy: Chooses them.
      key: Key of the stream of actions; the number of the step is folded in.
      agent_state: What the agent has learned.
      actor: The state before.
      timestep: What the environments returned.
    """
    stack = frames.push_frame(actor.stack, timestep.frame, timestep.is_first)
    memory, decision = policy.act(
        agent_state,
        actor.memory,
        base.Observation(stack, timestep.is_first),
        jax.random.fold_in(key, actor.num_steps),
    )
    return ActorState(memory, stack, timestep.lives, actor.num_steps + 1), decision


class RolloutState(NamedTuple):
    """What playing carries from step to step; `act` alone changes it, in place."""

    actor: ActorState
    replay: buffer_lib.Buffer
    episodes: atari.EpisodeStats

    def prioritised(self, found: priorities_lib.Priorities | None) -> "RolloutState":
        """Returns the same with the priorities that an update has set, if any."""
        return self._replace(replay=self.replay._replace(priorities=found))


Act = Callable[
    [types.PRNGKey, base.AgentState, RolloutState, types.TimeStep],
    tuple[RolloutState, jax.Array],
]
Learn = Callable[
    [types.PRNGKey, base.AgentState, sums_lib.RunningSums, buffer_lib.Buffer],
    tuple[base.AgentState, sums_lib.RunningSums, priorities_lib.Priorities | None],
]

# What of a rollout is sharded with the environments.
_SHARDED: Any = devices.SHARDED
REPLAY_SPECS = buffer_lib.specs(_SHARDED)
ROLLOUT_SPECS = RolloutState(
    actor=ActorState(
        memory=_SHARDED,
        stack=_SHARDED,
        lives=_SHARDED,
        num_steps=devices.REPLICATED,  # type: ignore[arg-type]
    ),
    replay=REPLAY_SPECS,
    episodes=_SHARDED,
)


def replayed_extras(policy: base.Policy, agent_state: Any) -> dict[str, Any]:
    """Returns the shapes of what a policy wants replayed, of one environment."""

    def decide(agent_state: base.AgentState) -> base.Decision:
        actor = init_actor(policy, 1)
        observation = base.Observation(actor.stack, jnp.zeros((1,), bool))
        return policy.act(agent_state, actor.memory, observation, jax.random.key(0))[1]

    extras = jax.eval_shape(decide, agent_state).extras
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), extras)


def init_rollout(
    policy: base.Policy,
    agent_state: base.AgentState,
    *,
    num_envs: int,
    replay_size: int,
    is_prioritised: bool = False,
    mesh: devices.Mesh = None,
    num_seeds: int = 1,
) -> RolloutState:
    """Allocates a stage's rollout, the replay included, each part on its device."""
    sizes = num_envs, replay_size, num_seeds
    return _jit_init_rollout(policy, *sizes, is_prioritised, mesh)(agent_state)


@functools.lru_cache(_PROGRAMS)
def _jit_init_rollout(
    policy: base.Policy,
    num_envs: int,
    replay_size: int,
    num_seeds: int,
    is_prioritised: bool,
    mesh: devices.Mesh,
) -> Callable[[base.AgentState], RolloutState]:
    def init(agent_state: base.AgentState) -> RolloutState:
        if num_seeds > 1:
            agent_state = jax.eval_shape(_take, agent_state, np.int32(0))
        extras = replayed_extras(policy, agent_state)
        rollout = RolloutState(
            actor=init_actor(policy, num_envs),
            replay=buffer_lib.init(
                policy.observation,
                extras,
                num_envs=num_envs,
                size=replay_size,
                is_prioritised=is_prioritised,
            ),
            episodes=atari.init_episode_stats(num_envs),
        )
        if num_seeds == 1:
            return rollout
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x, (num_seeds, *x.shape)), rollout
        )

    return jax.jit(init, out_shardings=devices.shardings(mesh, ROLLOUT_SPECS))


def make_act(policy: base.Policy) -> Act:
    """Makes the step in which a policy acts, and that stores and counts.

    Returns:
      `act(key, agent_state, rollout, timestep) -> rollout, action [E]`, with the key of
      the stage's acting stream.
    """

    def act(
        key: types.PRNGKey,
        agent_state: base.AgentState,
        rollout: RolloutState,
        timestep: types.TimeStep,
    ) -> tuple[RolloutState, jax.Array]:
        before = rollout.actor
        actor, decision = act_once(policy, key, agent_state, before, timestep)
        num_envs = timestep.frame.shape[0]
        step = buffer_lib.Step(
            frame=timestep.frame,
            action=decision.action,
            reward=timestep.reward,
            terminated=timestep.terminated,
            is_first=timestep.is_first,
            life_lost=(timestep.lives < before.lives) & ~timestep.is_first,
            id=before.num_steps * num_envs + jnp.arange(num_envs, dtype=jnp.int32),
            extras=decision.extras,
        )
        rollout = RolloutState(
            actor=actor,
            replay=buffer_lib.add(rollout.replay, step),
            episodes=atari.update_episode_stats(rollout.episodes, timestep),
        )
        return rollout, decision.action

    return act


@functools.lru_cache(_PROGRAMS)
def jit_act(
    policy: base.Policy, *, num_seeds: int = 1, mesh: devices.Mesh = None
) -> Act:
    """Compiles the step of `make_act`; the rollout is donated."""
    return jax.jit(
        map_seeds(make_act(policy), num_seeds),
        donate_argnums=2,
        out_shardings=devices.shardings(mesh, (ROLLOUT_SPECS, devices.SHARDED)),
    )


# -------------------------------------------------------------------------- learning

# Draws the batch of an update: key, agent state, replay, number of the update.
Draw = Callable[
    [types.PRNGKey, base.AgentState, buffer_lib.Buffer, jax.Array], base.Batch
]


def _on_each_device(
    function: Callable[..., Any], mesh: devices.Mesh, in_specs: Any
) -> Callable[..., Any]:
    """Makes a function of one device's part of the replay one of the whole.

    Args:
      function: Takes `axis_name`, the devices' axis; None on one device.
      mesh: The stage's devices.
      in_specs: A spec per positional argument, or a pytree prefix of specs.
    """
    if mesh is None:
        return functools.partial(function, axis_name=None)
    return jax.shard_map(
        functools.partial(function, axis_name=devices.AXIS),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=devices.SHARDED,
        check_vma=False,  # Flashbax's and Flax's functions do not say what varies.
    )


def make_draw_states(
    num_states: int, observation: types.ObservationSpec, mesh: devices.Mesh = None
) -> Callable[..., Any]:
    """Makes a function that draws single states, as an agent sees them.

    Returns:
      `draw(replay, key)` returns windows `[N, 1, ...]`, `N` at least `num_states` and
      the same number from every device. The key is consumed.
    """
    draw = functools.partial(
        buffer_lib.sample,
        observation=observation,
        num_windows=devices.round_up(num_states, mesh),
        num_states=1,
    )
    return _on_each_device(draw, mesh, (REPLAY_SPECS, devices.REPLICATED))


def make_draw(
    phase: base.Phase, *, reward_free: bool, mesh: devices.Mesh = None
) -> Draw:
    """Makes the function that draws the batch of an update, sharded over the devices.

    The number of the update is folded into the key, so that its batch can be drawn
    again. In a reward-free phase batches have no reward: an agent that touches it fails
    when it is traced.
    """
    spec, encode = phase.learner.batch, phase.learner.encode
    observation = phase.policy.observation

    def hide_reward(windows: buffer_lib.Window) -> buffer_lib.Window:
        return windows._replace(reward=None) if reward_free else windows

    def particles_of(
        state: base.AgentState,
        replay: buffer_lib.Buffer,
        particle_key: types.PRNGKey,
        axis_name: str | None,
    ) -> Any:
        def reduce(windows: buffer_lib.Window) -> Any:
            windows = hide_reward(windows)
            return windows if encode is None else encode(state, windows)

        return buffer_lib.map_sample(
            reduce,
            replay,
            particle_key,
            observation=observation,
            num_windows=spec.num_particles,
            num_states=1,
            axis_name=axis_name,
        )

    shape: Any = {"observation": observation, "states": spec.states}
    shape |= {"num_windows": spec.num_windows, "num_states": spec.num_states}
    sample = functools.partial(buffer_lib.sample, **shape)
    draw_windows = _on_each_device(sample, mesh, (REPLAY_SPECS, devices.REPLICATED))
    draw_particles = _on_each_device(
        particles_of, mesh, (devices.REPLICATED, REPLAY_SPECS, devices.REPLICATED)
    )

    def draw(
        key: types.PRNGKey,
        state: base.AgentState,
        replay: buffer_lib.Buffer,
        number: jax.Array,
    ) -> base.Batch:
        window_key = jax.random.fold_in(key, number)
        particles = None
        if spec.num_particles:
            window_key, particle_key = jax.random.split(window_key)
            particles = draw_particles(state, replay, particle_key)
        if spec.priorities is None:
            return base.Batch(hide_reward(draw_windows(replay, window_key)), particles)
        beta = spec.priorities.importance(number)
        windows, places, weight = buffer_lib.sample_prioritised(
            replay, window_key, importance=beta, **shape
        )
        return base.Batch(hide_reward(windows), particles, weight, places)

    return draw


def _place(replay: buffer_lib.Buffer) -> dict[str, jax.Array]:
    """Returns what a batch was drawn from, beside the number of its update."""
    return {"current_index": replay.current_index, "is_full": replay.is_full}


def init_sums(names: Sequence[str]) -> sums_lib.RunningSums:
    """Returns sums of no update, for metrics of these names."""
    place: dict[str, Any] = {"current_index": np.int32(0), "is_full": np.bool_(False)}
    return sums_lib.init_sums(names, place)


def no_sums(names: Sequence[str], num_seeds: int, mesh: devices.Mesh = None) -> Any:
    """Returns the sums of every seed on the devices, of no update."""
    return stack_seeds([init_sums(names)] * num_seeds, mesh)


def make_learn(learner: base.Learner, draw: Draw) -> Learn:
    """Makes the update: draw, learn, sum the metrics.

    Args:
      learner: The agent's learner.
      draw: From `make_draw`.

    Returns:
      `learn(key, state, sums, replay) -> state, sums, priorities`, with the key of the
      stage's learning stream; no priorities are None.
    """
    wanted = learner.batch.priorities

    def learn(
        key: types.PRNGKey,
        state: base.AgentState,
        sums: sums_lib.RunningSums,
        replay: buffer_lib.Buffer,
    ) -> tuple[base.AgentState, sums_lib.RunningSums, priorities_lib.Priorities | None]:
        number = state.num_updates
        batch = draw(key, state, replay, number)
        # Another stream than the draw's, whose keys are folded once.
        update_key = jax.random.fold_in(jax.random.fold_in(key, number), 1)
        state, values, found = learner.update(state, batch, update_key)
        sums = sums_lib.add_to_sums(sums, values, update=number, extras=_place(replay))
        if wanted is None or found is None or batch.places is None:
            return state, sums, replay.priorities
        assert replay.priorities is not None
        env, place = batch.places
        changed = priorities_lib.update(
            replay.priorities, env, place, found, exponent=wanted.exponent
        )
        return state, sums, changed

    return learn


@functools.lru_cache(_PROGRAMS)
def jit_learn(
    phase: base.Phase,
    *,
    reward_free: bool,
    num_seeds: int = 1,
    mesh: devices.Mesh = None,
) -> Learn:
    """Compiles the update of `make_learn`; state and sums are donated."""
    draw = make_draw(phase, reward_free=reward_free, mesh=mesh)
    return jax.jit(
        map_seeds(make_learn(phase.learner, draw), num_seeds),
        donate_argnums=(1, 2),
        out_shardings=devices.sharding(mesh),
    )


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


# States from which an agent's statistics are measured: means are then known to 3 % of
# a standard deviation. And states of a picture.
CALIBRATION_STATES = 1024
EMBEDDED_STATES = 256


@functools.lru_cache(_PROGRAMS)
def jit_calibrate(
    agent: base.Agent,
    num_states: int,
    *,
    num_seeds: int = 1,
    mesh: devices.Mesh = None,
) -> Callable[..., base.AgentState]:
    """Compiles the measurement of an agent's statistics over the replay.

    Returns:
      `calibrate(key, state, replay) -> state`, which is donated; the same key draws the
      same places.
    """
    draw = make_draw_states(num_states, agent.finetune.policy.observation, mesh)

    def calibrate(
        key: types.PRNGKey, state: base.AgentState, replay: buffer_lib.Buffer
    ) -> base.AgentState:
        return agent.calibrate(state, draw(replay, key))

    return jax.jit(
        map_seeds(calibrate, num_seeds),
        donate_argnums=1,
        out_shardings=devices.sharding(mesh),
    )


@functools.lru_cache(_PROGRAMS)
def jit_embed(
    agent: base.Agent,
    num_states: int,
    *,
    num_seeds: int = 1,
    mesh: devices.Mesh = None,
) -> Callable[..., dict[str, jax.Array]]:
    """Compiles the function that draws states for a picture of what was visited.

    Returns:
      `embed(key, state, replay, agent_steps)` returns arrays `[N, D]` float16 by name;
      the steps number the draw.
    """
    draw = make_draw_states(num_states, agent.finetune.policy.observation, mesh)

    def embed(
        key: types.PRNGKey,
        state: base.AgentState,
        replay: buffer_lib.Buffer,
        agent_steps: jax.Array,
    ) -> dict[str, jax.Array]:
        windows = draw(replay, jax.random.fold_in(key, agent_steps))
        shown = agent.embed(state, windows) if agent.embed else {}
        return {name: x.astype(jnp.float16) for name, x in shown.items()}

    return jax.jit(
        map_seeds(embed, num_seeds, in_axes=(0, 0, 0, None)),
        out_shardings=devices.sharding(mesh),
    )


# ------------------------------------------------------------------- on the device

# Iterations of one call: between two calls stops are looked at.
MOST_ITERATIONS = 128


@functools.lru_cache(_PROGRAMS)
def make_run(world: worlds.World, act: Act, learn: Learn | None) -> Callable[..., Any]:
    """Makes the loop over a world: acting, the world's step and updates in one program.

    Args:
      world: Its pure functions; of many seeds it steps all environments.
      act: From `jit_act`.
      learn: From `jit_learn`; None while nothing is learned.

    Returns:
      `run(keys, state, others, due, count)` returns the agent's state and the others:
      sums, rollout, world state and time step. The keys are those of acting and of
      learning; `due[i]` updates follow the i-th of `count` iterations.
    """

    def run(
        keys: Any, state: Any, others: Any, due: jax.Array, count: jax.Array
    ) -> Any:
        act_key, learn_key = keys

        def iterate(number: jax.Array, carry: Any) -> Any:
            state, (sums, rollout, world_state, timestep) = carry
            rollout, action = act(act_key, state, rollout, timestep)
            world_state, reached = world.step(world_state, action.reshape(-1))
            reached = jax.tree.map(lambda x, y: x.reshape(y.shape), reached, timestep)
            if learn is not None:

                def update(_: jax.Array, carry: Any) -> Any:
                    state, sums, rollout = carry
                    state, sums, found = learn(learn_key, state, sums, rollout.replay)
                    return state, sums, rollout.prioritised(found)

                state, sums, rollout = jax.lax.fori_loop(
                    0, due[number], update, (state, sums, rollout)
                )
            return state, (sums, rollout, world_state, reached)

        return jax.lax.fori_loop(0, count, iterate, (state, others))

    # What is not learned may belong to a caller.
    return jax.jit(run, donate_argnums=2 if learn is None else (1, 2))


# --------------------------------------------------------------------------- session

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
    state: base.AgentState
    rollout: RolloutState
    sums: sums_lib.RunningSums
    act: Act
    act_key: types.PRNGKey
    learn_key: types.PRNGKey
    seeds: tuple[int, ...]  # whose states these are; of many each state is `[S, ...]`
    learn: Learn | None = None  # None while nothing is learned
    schedule: Schedule | None = None
    draw: Draw | None = None  # what `learn` draws, of one seed
    # State, replay -> state; before the agent is saved.
    calibrate: Callable[..., base.AgentState] | None = None
    mesh: devices.Mesh = None  # on which all states lie
    iteration: int = 0
    timestep: types.TimeStep | None = None  # None before the first step and a resume
    learn_from: int = 0  # agent steps before which nothing is learned after a resume
    # On a CPU emulators and updates want the same cores (docs/performance.md).
    overlaps: bool = dataclasses.field(
        default_factory=lambda: jax.default_backend() != "cpu"
    )
    _flag: jax.Array | None = None  # of an update some iterations ago

    @property
    def num_envs(self) -> int:
        """Environments of all processes together, of each seed."""
        own = self.pool.num_envs // len(self.seeds)
        return own * devices.num_processes(self.mesh)

    @property
    def agent_steps(self) -> int:
        """Agent steps of all of a seed's environments (a reset frame counts as one)."""
        return self.iteration * self.num_envs

    def parts(self, tree: Any) -> list[Any]:
        """Returns what is each seed's of a pytree of host arrays or templates."""
        if len(self.seeds) == 1:
            return [tree]
        places = range(len(self.seeds))
        return [jax.tree.map(operator.itemgetter(i), tree) for i in places]

    def part(self, tree: Any, place: int) -> Any:
        """Copies what is one seed's out of a pytree on the device."""
        return tree if len(self.seeds) == 1 else _take(tree, np.int32(place))

    def step(self, most: int = 1) -> None:
        """Makes agent steps in every environment and enqueues the updates due.

        Args:
          most: Steps that may be made before the caller looks again. Worlds make many
            at once, emulators one.

        Raises:
          EnvironmentFailure: The environments raised. The session can be saved, and
            resumes with new games.
          NonFinite: A loss or reward is not finite.
        """
        if self.timestep is None:
            with environment_errors():
                self.timestep = self.pool.reset()
        if isinstance(self.pool, worlds.WorldPool) and self.mesh is None:
            self._step_on_device(self.pool, min(most, MOST_ITERATIONS))
            return
        shown = self.timestep
        if len(self.seeds) > 1:  # The pool has the seeds one after the other.
            axes = (len(self.seeds), self.num_envs)
            shown = jax.tree.map(lambda x: x.reshape(*axes, *x.shape[1:]), shown)
        timestep = devices.device_put(shown, self.mesh, devices.SHARDED)
        self.rollout, action = self.act(
            self.act_key, self.state, self.rollout, timestep
        )
        sent = devices.local_rows(action).reshape(-1)
        before, self.iteration = self.agent_steps, self.iteration + 1
        reached: types.TimeStep | None = None
        try:
            with environment_errors():
                self.pool.send(sent)
                if not self.overlaps:
                    reached = self.pool.recv()
        finally:
            # Even if the environment raised: the step is in the replay, and the
            # counters of steps and updates must agree.
            self._make_updates(before)
        if self.learn is not None and self.iteration % _LOOK_EVERY == 0:
            self._look()
        with environment_errors():
            self.timestep = self.pool.recv() if reached is None else reached
        self._check_rewards(sent, self.timestep)

    def _step_on_device(self, pool: worlds.WorldPool, count: int) -> None:
        """Makes `count` iterations in one call."""
        world_state, timestep = pool.lend()
        if len(self.seeds) > 1:  # The pool has the seeds one after the other.
            axes = (len(self.seeds), self.num_envs)
            timestep = jax.tree.map(lambda x: x.reshape(*axes, *x.shape[1:]), timestep)
        due = np.zeros(MOST_ITERATIONS, np.int32)
        for number in range(count):
            before, self.iteration = self.agent_steps, self.iteration + 1
            due[number] = self._num_due(before)
        others = devices.device_put((self.sums, self.rollout, world_state, timestep))
        run = make_run(pool.world, self.act, self.learn)
        self.state, others = run(
            (self.act_key, self.learn_key),
            self.state,
            others,
            *jax.device_put((due, np.int32(count))),
        )
        self.sums, self.rollout, world_state, timestep = others
        if len(self.seeds) > 1:
            timestep = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), timestep)
        pool.take_back(world_state, timestep)
        self.timestep = timestep
        if self.learn is not None:
            self._look()

    def _num_due(self, before: int) -> int:
        """Returns the number of updates that are due since `before` agent steps."""
        if self.learn is None or self.agent_steps <= self.learn_from:
            return 0
        assert self.schedule is not None
        start = max(before, self.learn_from)
        return self.schedule.num_due(self.agent_steps) - self.schedule.num_due(start)

    def _make_updates(self, before: int) -> None:
        """Enqueues the updates that are due since `before` agent steps."""
        for _ in range(self._num_due(before)):
            assert self.learn is not None
            self.state, self.sums, found = self.learn(
                self.learn_key, self.state, self.sums, self.rollout.replay
            )
            self.rollout = self.rollout.prioritised(found)

    def _check_rewards(self, action: np.ndarray, timestep: types.TimeStep) -> None:
        """Raises a `NonFinite` that names the environment if a reward is not finite."""
        if not np.isfinite(timestep.reward).all():
            first = int(np.argmin(np.isfinite(timestep.reward)))
            seed, index = divmod(first, self.num_envs)
            message = (
                f"{self._of_seed(seed)}The game's reward of environment {index} is "
                f"{timestep.reward[first]} at agent step {self.agent_steps}."
            )
            if devices.num_processes(self.mesh) > 1:  # The others know nothing of it.
                raise EnvironmentFailure(message)
            raise NonFinite(message, {"action": action, **timestep._asdict()})

    def _of_seed(self, place: int) -> str:
        return f"Seed {self.seeds[place]}: " if len(self.seeds) > 1 else ""

    def prepare_save(self) -> None:
        """Brings the agent's statistics up to date, once it has begun to learn."""
        if self.calibrate is None or self.schedule is None:
            return
        if self.agent_steps >= self.schedule.start:
            self.state = self.calibrate(self.state, self.rollout.replay)

    def free_replay(self) -> None:
        """Frees the replay's memory for one that is restored."""
        self.rollout = self.rollout._replace(replay=None)  # type: ignore[arg-type]

    def _look(self) -> None:
        """Looks whether an update was not finite, without waiting for the device."""
        # Several processes must look at the same step, so that they wait if need be.
        is_waited_for = devices.num_processes(self.mesh) > 1
        if self._flag is not None and (
            is_waited_for or self._flag.is_ready()  # type: ignore[attr-defined]
        ):
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
        parts = self.parts(jax.device_get(self.sums.bad))
        found = [place for place, bad in enumerate(parts) if bad.update >= 0]
        if not found:
            return
        place, bad = found[0], parts[found[0]]
        names = [name for name, is_bad in bad.names.items() if is_bad]
        state = self.part(self.state, place)
        params = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
            if not bool(jnp.all(jnp.isfinite(leaf)))
        ]
        message = (
            f"{self._of_seed(place)}Not finite in update {bad.update}, noticed at "
            f"agent step {self.agent_steps}: {', '.join(names)}."
        )
        if params:
            few = ", ".join(params[:3])
            rest = f" and {len(params) - 3} more" if len(params) > 3 else ""
            message += f" Parameters that are not finite by now: {few}{rest}."
        raise NonFinite(message, self._batch_of(place, state, bad))

    def _batch_of(
        self, place: int, state: base.AgentState, bad: sums_lib.FirstBad
    ) -> dict[str, np.ndarray]:
        """Draws the batch of a seed's update again, as arrays by name."""
        if self.draw is None:
            return {}
        # The replay as it stood then; the newest rows may be of later steps.
        replay = self.part(self.rollout.replay, place)
        then = replay._replace(**devices.device_put(bad.extras, self.mesh))
        number = devices.device_put(np.int32(bad.update), self.mesh)
        key = self.part(self.learn_key, place)
        drawn = devices.fetch(jax.jit(self.draw)(key, state, then, number), self.mesh)
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(value)
            for path, value in jax.tree_util.tree_leaves_with_path(drawn)
        }

    def rows(self) -> list[dict[str, float]]:
        """Reads a row of metrics of each seed, and empties the sums.

        Raises:
          NonFinite: As `check_finite`.
        """
        self.check_finite()
        num_updates = int(np.max(jax.device_get(self.state.num_updates)))
        rows = []
        for episodes, sums in zip(
            self.parts(devices.fetch(self.rollout.episodes, self.mesh)),
            self.parts(jax.device_get(self.sums)),
            strict=True,
        ):
            rows.append(
                {
                    "agent_steps": self.agent_steps,
                    "frames": self.agent_steps * self.pool.observation.frame_skip,
                    "updates": num_updates,
                    "episodes": int(episodes.num_episodes.sum()),
                    "episode_return": _mean_known(episodes.last_return),
                    "episode_length": _mean_known(episodes.last_length),
                    "visited": atari.num_visited(episodes),
                    **sums_lib.means(sums),
                }
            )
        self.sums = no_sums(list(self.sums.totals), len(self.seeds), self.mesh)
        self._flag = None
        return rows


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


def names_of(group: Sequence[types.Metric]) -> list[str]:
    """Returns the names of a group of metrics."""
    return [metric.name for metric in group]


class Plan(NamedTuple):
    """What a stage is made of, read from the run's config and the agent once."""

    phase: base.Phase
    num_envs: int
    replay_size: int
    samples_per_step: float
    warmup_agent_steps: int
    act_stream: Stream
    learn_stream: Stream
    reward_free: bool

    def schedule(self, start: int = 0) -> Schedule:
        """Returns when updates are due, from `start` agent steps on at the earliest."""
        spec = self.phase.learner.batch
        window_length = self.phase.policy.observation.stack - 1 + spec.num_states
        return Schedule(
            start=max(self.warmup_agent_steps, start, window_length * self.num_envs),
            samples_per_step=self.samples_per_step,
            batch_size=spec.num_samples,
        )


def pretrain_plan(config: config_lib.Config, agent: base.Agent) -> Plan:
    """Returns what the reward-free stage is made of.

    Raises:
      ValueError: The agent has no such stage.
    """
    if agent.pretrain is None:
        raise ValueError(
            f"Agent {config.agent} learns from reward alone: it has no pretraining."
        )
    values = config.pretrain
    return Plan(
        phase=agent.pretrain,
        num_envs=values.num_envs,
        replay_size=values.replay_size,
        samples_per_step=values.samples_per_step,
        warmup_agent_steps=values.warmup_agent_steps,
        act_stream=Stream.PRETRAIN_ACT,
        learn_stream=Stream.PRETRAIN_LEARN,
        reward_free=True,
    )


def finetune_plan(config: config_lib.Config, agent: base.Agent) -> Plan:
    """Returns what the stage with reward is made of."""
    values = config.finetune
    num_envs = values.finetune_num_envs
    return Plan(
        phase=agent.finetune,
        num_envs=num_envs,
        # Rounded up, so that nothing is overwritten.
        replay_size=-(-values.finetune_agent_steps // num_envs) * num_envs,
        samples_per_step=values.finetune_samples_per_step,
        warmup_agent_steps=values.finetune_warmup_agent_steps,
        act_stream=Stream.FINETUNE_ACT,
        learn_stream=Stream.FINETUNE_LEARN,
        reward_free=False,
    )


def start(
    config: config_lib.Config,
    plan: Plan,
    pool: Pool,
    state: base.AgentState,
    *,
    mesh: devices.Mesh = None,
    seeds: Sequence[int] = (),
) -> Session:
    """Makes a new session of a stage.

    Args:
      config: The run's values.
      plan: The stage's.
      pool: Environments, not yet reset; those of many seeds one after the other.
      state: The agent at the start, on the mesh; of many seeds from `stack_seeds`.
      mesh: The devices that share the work.
      seeds: By default the config's alone.
    """
    seeds = tuple(seeds) or (config.seed,)
    policy, learner = plan.phase
    shape: Any = {"num_seeds": len(seeds), "mesh": mesh}
    return Session(
        pool=pool,
        state=state,
        rollout=init_rollout(
            policy,
            state,
            num_envs=plan.num_envs,
            replay_size=plan.replay_size,
            is_prioritised=learner.batch.priorities is not None,
            **shape,
        ),
        sums=no_sums(names_of(learner.metrics), len(seeds), mesh),
        act=jit_act(policy, **shape),
        act_key=stream_keys(seeds, plan.act_stream, mesh),
        learn_key=stream_keys(seeds, plan.learn_stream, mesh),
        seeds=seeds,
        learn=jit_learn(plan.phase, reward_free=plan.reward_free, **shape),
        schedule=plan.schedule(),
        draw=make_draw(plan.phase, reward_free=plan.reward_free, mesh=mesh),
        mesh=mesh,
    )


def init_state(
    agent: base.Agent, seed: int, mesh: devices.Mesh = None
) -> base.AgentState:
    """Returns the state of an untrained agent, on every device."""
    return devices.device_put(jax.jit(agent.init)(stream_key(seed, Stream.INIT)), mesh)


@functools.partial(jax.jit, static_argnums=1)
def _rewards_of(
    replay: buffer_lib.Buffer, steps: int
) -> tuple[types.Array, types.Array]:
    """Returns rewards and first steps `[T, E]` of the oldest steps."""
    held = replay.experience
    return held.reward[:, :steps].T, held.is_first[:, :steps].T


def play_rollouts(session: Session, place: int = 0) -> base.Rollouts:
    """Returns all that the seed at a place has played, for an agent to adapt to.

    Every process gets the same; the replay must hold the whole session.
    """
    steps, mesh = session.iteration, session.mesh
    replay = session.part(session.rollout.replay, place)

    reward, is_first = devices.fetch(_rewards_of(replay, steps), mesh)

    def encode(function: Callable[..., Any], state: base.AgentState) -> Any:
        def of_all(state: base.AgentState, replay: buffer_lib.Buffer) -> Any:
            return buffer_lib.map_all(
                functools.partial(function, state),
                replay,
                observation=session.pool.observation,
                num_steps=steps,
            )

        encoded = devices.fetch(jax.jit(of_all)(state, replay), mesh)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), encoded)

    return base.Rollouts(reward.reshape(-1), is_first.reshape(-1), encode)
