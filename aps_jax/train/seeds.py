"""Many seeds at once: each state has a leading axis of seeds, and one pool serves all.

The jitted steps of `loop` are mapped over that axis (`jax.vmap`), each seed with its
own keys, so that a seed does what it would do alone, up to rounding. What is written of
a seed is taken out of the states that they share. Letters: `S` seeds, `E` environments
of each.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.agents import base
from aps_jax.parallel import devices, processes
from aps_jax.train import loop
from aps_jax.train import sums as sums_lib


def check_configs(configs: Sequence[config_lib.Config]) -> None:
    """Checks that runs can be trained at once.

    Raises:
      ValueError: They differ in more than the seed, share one, or ask for what one
        device or one process cannot do for many.
    """
    first = configs[0]
    seeds = [config.seed for config in configs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"Seeds at once must differ, got {seeds}.")
    alike = {config_lib.replace_options(config, seed=0) for config in configs}
    if len(alike) > 1:
        raise ValueError("Runs at once may differ in their seed alone.")
    if first.num_devices > 1:
        raise ValueError(
            "Many seeds at once share one device, got num_devices="
            f"{first.num_devices}: leave it out, or give --seeds for --num_seeds."
        )
    if processes.num_processes() > 1:
        raise ValueError(
            "Many seeds at once are for one process: give --seeds for --num_seeds."
        )
    if first.report.wandb:
        raise ValueError(
            "Weights & Biases takes one run of a process at a time: give --nowandb, or "
            "--seeds in place of --num_seeds."
        )


def stream_keys(seeds: Sequence[int], stream: loop.Stream) -> jax.Array:
    """Returns the keys `[S]` of one random stream of each seed."""
    return jax.numpy.stack([loop.stream_key(seed, stream) for seed in seeds])


def over_seeds(
    make: Callable[[types.PRNGKey], Callable[..., Any]],
    keys: jax.Array,
    *,
    in_axes: Any = 0,
    donate_argnums: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Maps a jitted step of one seed over all.

    Args:
      make: Makes the step from a seed's key.
      keys: `[S]` keys.
      in_axes: Of the step's arguments, as `jax.vmap` takes them.
      donate_argnums: Arguments to donate.

    Returns:
      The jitted step, whose arguments and results have a leading axis `[S]`.
    """

    def step(key: types.PRNGKey, args: tuple[Any, ...]) -> Any:
        return make(key)(*args)

    def all_steps(*args: Any) -> Any:
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        return jax.vmap(step, in_axes=(0, axes))(keys, args)

    return jax.jit(
        all_steps, donate_argnums=donate_argnums, out_shardings=devices.sharding(None)
    )


@jax.jit
def _take(stacked: Any, index: jax.Array) -> Any:
    """Copies what is one seed's out of a pytree `[S, ...]`."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacked
    )


@functools.partial(jax.jit, donate_argnames="stacked")
def _put(stacked: Any, one: Any, index: jax.Array) -> Any:
    """Writes what is one seed's into a pytree `[S, ...]`, in place."""
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, axis=0),
        stacked,
        one,
    )


def _stack(parts: Sequence[Any]) -> Any:
    """Stacks pytrees of single seeds."""
    return jax.jit(lambda *trees: jax.tree.map(lambda *x: jax.numpy.stack(x), *trees))(
        *parts
    )


def _repeat(one: Any, num_seeds: int) -> Any:
    """Gives every seed the same."""

    def repeat(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.numpy.broadcast_to(x[None], (num_seeds, *x.shape)), tree
        )

    return jax.jit(repeat)(one)


class SeedsPool:
    """A pool of `S E` environments, shown with leading axes `[S, E]`.

    To the loop it has `E` environments, as many as each seed has.
    """

    def __init__(self, pool: loop.Pool, num_seeds: int):
        """Takes a pool, not yet reset, of `num_seeds` times as many environments."""
        self._pool = pool
        self.num_seeds = num_seeds
        self.num_envs = pool.num_envs // num_seeds
        self.num_actions = pool.num_actions
        self.observation = pool.observation

    def reset(self) -> types.TimeStep:
        """Begins a new episode in every environment."""
        return self._split(self._pool.reset())

    def send(self, actions: np.ndarray) -> None:
        """Takes the next actions, `[S, E]` int32."""
        self._pool.send(actions.reshape(-1))

    def recv(self) -> types.TimeStep:
        """Returns what the actions led to."""
        return self._split(self._pool.recv())

    def render(self, index: int) -> np.ndarray:
        """Draws one of the `S E` environments."""
        return self._pool.render(index)

    def close(self) -> None:
        """Ends the environments of all seeds."""
        self._pool.close()

    def of_seed(self, index: int) -> "SeedPool":
        """Returns what a checkpoint of one seed needs of its environments."""
        is_resumable = isinstance(self._pool, loop.ResumablePool)
        return (ResumableSeedPool if is_resumable else SeedPool)(self, index)

    def get_states(self) -> dict[str, Any]:
        """Returns the state of all environments, where there is one."""
        return self._pool.get_state()  # type: ignore[attr-defined]

    def set_states(self, state: dict[str, Any]) -> types.TimeStep:
        """Goes on from a state of all environments."""
        return self._split(self._pool.set_state(state))  # type: ignore[attr-defined]

    def _split(self, timestep: types.TimeStep) -> types.TimeStep:
        shape = (self.num_seeds, self.num_envs)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), timestep)


class SeedPool:
    """The environments of one seed, which step together with those of all others."""

    def __init__(self, pool: SeedsPool, index: int):
        """Shows the environments of the seed at place `index`."""
        self._shared = pool
        self._index = index
        self.num_envs = pool.num_envs
        self.num_actions = pool.num_actions
        self.observation = pool.observation


class ResumableSeedPool(SeedPool):
    """The same where environments have a state (`loop.ResumablePool`)."""

    def get_state(self) -> dict[str, Any]:
        """Returns the state of this seed's environments."""
        return {
            name: values[self._places]
            for name, values in self._shared.get_states().items()
        }

    def set_state(self, state: dict[str, Any]) -> types.TimeStep:
        """Takes this seed's environments to a state, and leaves the others."""
        states = self._shared.get_states()
        for name, values in states.items():
            values[self._places] = state[name]
        timestep = self._shared.set_states(states)
        return jax.tree.map(lambda x: x[self._index], timestep)

    @property
    def _places(self) -> slice:
        start = self._index * self.num_envs
        return slice(start, start + self.num_envs)


class _SeedRollout:
    """A rollout of one seed, whose parts are copied out when they are asked for.

    A row of metrics needs no copy of a replay.
    """

    def __init__(self, rollout: loop.RolloutState, index: jax.Array):
        self._rollout = rollout
        self._index = index

    def __getattr__(self, name: str) -> Any:
        return _take(getattr(self._rollout, name), self._index)


class SeedSession(loop.Session):
    """One seed of a session of many: reads and writes its part of what they share.

    It is what rows and checkpoints are made of; only the session of all can step.
    """

    def __init__(self, everyone: "SeedsSession", index: int, draw: loop.Draw):
        """Shows the seed at place `index`.

        Args:
          everyone: The session of all.
          index: The place of the seed in it.
          draw: Draws the batches of the seed's updates from its replay.
        """
        self._everyone = everyone
        self._index = devices.device_put(np.int32(index))
        self._place = index
        self._flag = None
        self.pool = everyone.pool.of_seed(index)  # type: ignore[attr-defined]
        self.draw = draw
        self.calibrate = None  # The session of all does it for every seed.
        self.schedule = everyone.schedule
        self.mesh = None

    @property
    def seed(self) -> int:
        """The number that the run's random streams begin from."""
        return self._everyone.seeds[self._place]

    @property
    def state(self) -> base.AgentState:
        return _take(self._everyone.state, self._index)

    @state.setter
    def state(self, value: base.AgentState) -> None:
        self._everyone.state = _put(self._everyone.state, value, self._index)

    @property
    def sums(self) -> sums_lib.RunningSums:
        return _take(self._everyone.sums, self._index)

    @sums.setter
    def sums(self, value: sums_lib.RunningSums) -> None:
        self._everyone.sums = _put(self._everyone.sums, value, self._index)

    @property  # type: ignore[override]
    def rollout(self) -> _SeedRollout:
        return _SeedRollout(self._everyone.rollout, self._index)

    @rollout.setter
    def rollout(self, value: loop.RolloutState) -> None:
        self._everyone.rollout = _put(self._everyone.rollout, value, self._index)

    @property
    def iteration(self) -> int:
        return self._everyone.iteration

    @iteration.setter
    def iteration(self, value: int) -> None:
        self._everyone.iteration = value

    @property
    def learn_from(self) -> int:
        return self._everyone.learn_from

    @learn_from.setter
    def learn_from(self, value: int) -> None:
        self._everyone.learn_from = value

    @property
    def timestep(self) -> types.TimeStep | None:
        everyone = self._everyone.timestep
        if everyone is None:
            return None
        return jax.tree.map(lambda x: x[self._place], everyone)

    @timestep.setter
    def timestep(self, value: types.TimeStep | None) -> None:
        assert value is not None
        self._everyone.take_up(self._place, value)

    def free_replay(self) -> None:
        """Frees nothing: its place is among those of the other seeds."""

    def check_finite(self) -> None:
        """Checks the updates of this seed, and names it in the error."""
        with self.naming():
            super().check_finite()

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Says in what is not finite whose it is."""
        try:
            yield
        except loop.NonFinite as error:
            if error.seed is None:
                error.seed = self.seed
                error.args = (f"Seed {self.seed}: {error}",)
            raise


@dataclasses.dataclass
class SeedsSession(loop.Session):
    """The session of all seeds: its states have a leading axis `[S]`.

    `loop.Session.step` steps it, with steps from `over_seeds`. Agent steps are those of
    one seed.
    """

    seeds: tuple[int, ...] = ()
    draws: tuple[loop.Draw, ...] = ()  # of the updates of each seed
    metrics: tuple[types.Metric, ...] = ()
    _resumed: dict[int, types.TimeStep] = dataclasses.field(default_factory=dict)

    def of_seeds(self) -> list[SeedSession]:
        """Returns each seed's part."""
        return [SeedSession(self, i, draw) for i, draw in enumerate(self.draws)]

    def take_up(self, place: int, timestep: types.TimeStep) -> None:
        """Goes on from a resumed seed's time step, as soon as every seed has one."""
        self._resumed[place] = timestep
        if len(self._resumed) == len(self.seeds):
            parts = [self._resumed[i] for i in range(len(self.seeds))]
            self.timestep = jax.tree.map(lambda *x: np.stack(x), *parts)

    def check_finite(self) -> None:
        """Checks that the updates of all seeds were finite.

        Raises:
          NonFinite: One was not, with its seed.
        """
        for one in self.of_seeds():
            one.check_finite()

    def _check_rewards(self, action: np.ndarray, timestep: types.TimeStep) -> None:
        if np.isfinite(timestep.reward).all():
            return
        for place, one in enumerate(self.of_seeds()):
            with one.naming():
                of_seed = jax.tree.map(lambda x, i=place: x[i], timestep)
                one._check_rewards(action[place], of_seed)


def start_pretraining(
    config: config_lib.Config, seeds: Sequence[int], pool: loop.Pool
) -> tuple[SeedsSession, Callable[..., dict[str, jax.Array]]]:
    """Makes a new session of the pretraining of many seeds.

    Args:
      config: The runs' values; its own seed plays no part.
      seeds: `S` seeds.
      pool: Environments, not yet reset, from `loop.make_pool` with these seeds.

    Returns:
      The session, and the function that embeds states of all seeds (`loop.make_embed`).
    """
    agent = config.make_agent(pool.num_actions, pool.observation)
    plan = loop.pretrain_plan(config, agent)
    policy, learner = plan.phase
    make_draw = functools.partial(loop.make_draw, plan.phase, reward_free=True)
    keys = functools.partial(stream_keys, seeds)
    # Each by the function that a single run calls, so that it is the same.
    states = [loop.init_state(agent, seed) for seed in seeds]
    rollout = loop.init_rollout(
        policy, states[0], num_envs=plan.num_envs, replay_size=plan.replay_size
    )
    sums = devices.device_put(loop.init_sums(loop.names_of(learner.metrics)))
    session = SeedsSession(
        pool=SeedsPool(pool, len(seeds)),
        state=_stack(states),
        rollout=_repeat(rollout, len(seeds)),
        sums=_repeat(sums, len(seeds)),
        act=over_seeds(
            functools.partial(loop.make_act, policy),
            keys(loop.Stream.PRETRAIN_ACT),
            donate_argnums=(1,),
        ),
        learn=over_seeds(
            lambda key: loop.make_learn(learner, make_draw(key), key),
            keys(loop.Stream.PRETRAIN_LEARN),
            donate_argnums=(0, 1),
        ),
        schedule=plan.schedule(),
        calibrate=over_seeds(
            functools.partial(loop.make_calibrate, agent),
            keys(loop.Stream.CALIBRATE),
            donate_argnums=(0,),
        ),
        seeds=tuple(seeds),
        draws=tuple(
            make_draw(loop.stream_key(seed, loop.Stream.PRETRAIN_LEARN))
            for seed in seeds
        ),
        metrics=learner.metrics,
    )
    embed = over_seeds(
        functools.partial(loop.make_embed, agent),
        keys(loop.Stream.EMBED),
        in_axes=(0, 0, None),
    )
    return session, embed
