"""Skill following: whether an agent obeys its task vectors in fresh play.

Features are trained to point along the tasks of the replay, so that their cosine there
says little. Here the agent plays new games, in which nothing was fitted: each
environment obeys a random task, greedily. Letters: `T` time steps, `E` environments,
`D` dimensions of features and tasks, `S` seeds.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import config as config_lib
from aps_jax.agents import base
from aps_jax.replay import buffer
from aps_jax.train import loop

# The last age of each group, in agent steps since the task was drawn.
_AGES = (8, 32, 128)


class Following(NamedTuple):
    """How far features point along the own task, beyond the other environments'."""

    mean: float  # over all states of phi^T w_own - phi^T w_other; NaN without any
    by_age: dict[str, float | None]  # the same by steps since the task was drawn


def skill_following(
    phi: np.ndarray, task: np.ndarray, is_first: np.ndarray
) -> Following:
    """Compares features with the task that was obeyed, and with those of the others.

    Args:
      phi: `[T, E, D]` features of the states, `E` at least 2.
      task: `[T, E, D]` the tasks that were obeyed; they change at reset frames alone.
      is_first: `[T, E]` bool, reset frames, which no task has led to.

    Returns:
      Means over states of `phi_e . w_e - mean over e' != e of phi_e . w_e'`: what is
      left of the product when tasks are permuted over environments is taken off.
    """
    own = np.sum(phi * task, axis=-1)
    others = np.sum(phi * np.sum(task, axis=1, keepdims=True), axis=-1) - own
    gain = own - others / (phi.shape[1] - 1)
    time = np.arange(len(phi))[:, None]
    age = time - np.maximum.accumulate(np.where(is_first, time, 0))
    groups = {
        f"{low + 1}-{high}": (age > low) & (age <= high)
        for low, high in zip((0, *_AGES), _AGES, strict=False)
    }
    return Following(
        float(gain[age > 0].mean()) if np.any(age > 0) else math.nan,
        {
            name: float(gain[chosen].mean()) if chosen.any() else None
            for name, chosen in groups.items()
        },
    )


class Follower:
    """Plays and measures, compiled once for a stage."""

    def __init__(
        self,
        config: config_lib.Config,
        agent: base.Agent,
        plan: loop.Plan,
        seeds: tuple[int, ...],
        constructor: loop.MakePool,
    ):
        """Prepares fresh play of a stage's agent.

        Args:
          config: The run's values; `config.report.skill_steps` are played.
          agent: One with skills, whose `embed` shows `phi` and `task`.
          plan: Of pretraining.
          seeds: Of the session whose agents are measured.
          constructor: Makes the environments.
        """
        assert agent.play_skills is not None and agent.embed is not None
        shown_by = agent.embed
        self._steps = config.report.skill_steps
        policy = agent.play_skills(0.0)
        plan = plan._replace(
            phase=base.Phase(policy, plan.phase.learner),
            replay_size=plan.num_envs * self._steps,
            act_stream=loop.Stream.FOLLOW,
        )
        self._session: loop.Session | None = None  # None until something is measured

        def start(state: base.AgentState) -> loop.Session:
            stream = plan.act_stream
            pool = loop.make_pool(
                config, plan.num_envs, stream, constructor, run_seeds=seeds
            )
            return loop.start(config, plan, pool, state, seeds=seeds)

        self._start = start

        def embed(state: base.AgentState, replay: buffer.Buffer) -> Any:
            shown = buffer.map_all(
                functools.partial(shown_by, state),
                replay,
                observation=policy.observation,
                num_steps=self._steps,
            )
            return shown["phi"], shown["task"], replay.experience.is_first.T

        self._embed = jax.jit(jax.vmap(embed) if len(seeds) > 1 else embed)

    def measure(self, state: base.AgentState) -> list[Following]:
        """Measures the agents of a session: its state, of many seeds `[S, ...]`."""
        if self._session is None:
            self._session = self._start(state)
        session = self._session
        # The ring is overwritten from its beginning; in worlds by the same games.
        session.state, session.learn = state, None
        session.timestep, session.iteration = None, 0
        actor = session.rollout.actor  # Its steps number the random stream.
        actor = actor._replace(num_steps=jnp.zeros_like(actor.num_steps))
        session.rollout = session.rollout._replace(actor=actor)
        while session.iteration < self._steps:
            session.step(self._steps - session.iteration)
        found = jax.device_get(self._embed(state, session.rollout.replay))
        return [skill_following(*part) for part in session.parts(found)]

    def close(self) -> None:
        """Ends the environments."""
        if self._session is not None:
            self._session.pool.close()
