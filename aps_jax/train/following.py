"""Skill following: whether an agent obeys its task vectors in fresh play.

Features are trained to point along the tasks of the replay, so that their cosine there
says little. Here the agent plays new games, in which nothing was fitted: each
environment obeys a random task, greedily. What psi^T w predicts of that play is
compared with what is met. Letters: `T` time steps, `E` environments, `D` dimensions of
features and tasks, `S` seeds.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import config as config_lib
from aps_jax.agents import base
from aps_jax.replay import buffer
from aps_jax.train import loop
from aps_jax.types import Array

# The last age of each group, in agent steps since the task was drawn.
_AGES = (8, 32, 128)


class Following(NamedTuple):
    """How far features point along the own task, beyond the other environments'."""

    mean: float  # over all states of phi^T w_own - phi^T w_other; NaN without any
    by_age: dict[str, float | None]  # the same by steps since the task was drawn
    # phi^T w of a step, the mean with the weights of the discounted sum: what psi^T w
    # predicts, and what is met. NaN where every task led to one state at most.
    predicted: float
    met: float


class Played(NamedTuple):
    """Fresh play, its states in order."""

    phi: Array  # [T, E, D] features of the states, E at least 2
    # [T, E, D] the tasks that were obeyed; they change at reset frames alone.
    task: Array
    value: Array  # [T, E] psi^T w of the action taken: the discounted sum
    is_first: Array  # [T, E] bool, reset frames, which no task has led to
    terminated: Array  # [T, E] bool, game over


def skill_following(played: Played, discount: float) -> Following:
    """Compares features with the task that was obeyed, and with those of the others.

    With every task held from state 0 to state K, psi predicts for these steps

        value_0 - discount^K value_K,    value_K = 0 after a game over,

    and met is the sum over k <= K of `discount^(k - 1) phi_k . w`. Both are divided by
    the sum of the weights `discount^(k - 1)`.

    Args:
      played: By greedy policies of random tasks.
      discount: Of the values.

    Returns:
      `mean` and `by_age` are means over states of `phi_e . w_e - mean over e' != e of
      phi_e . w_e'`: what is left of the product when tasks are permuted over
      environments is taken off.
    """
    phi, task, is_first = played.phi, played.task, played.is_first
    own = np.sum(phi * task, axis=-1)
    others = np.sum(phi * np.sum(task, axis=1, keepdims=True), axis=-1) - own
    gain = own - others / (phi.shape[1] - 1)
    time = np.arange(len(phi))[:, None]
    age = time - np.maximum.accumulate(np.where(is_first, time, 0))
    groups = {
        f"{low + 1}-{high}": (age > low) & (age <= high)
        for low, high in zip((0, *_AGES), _AGES, strict=False)
    }
    weight = np.where(age > 0, float(discount) ** (age - 1), 0.0)
    is_last = np.roll(is_first, -1, axis=0)
    is_last[-1] = True
    later = np.where(is_last & ~played.terminated, weight * discount, 0.0)
    # A task that has led nowhere is left out.
    is_start = (age == 0) & ~is_last
    predicted = np.sum(played.value * (is_start - later))
    total = np.sum(weight) or math.nan
    return Following(
        float(gain[age > 0].mean()) if np.any(age > 0) else math.nan,
        {
            name: float(gain[chosen].mean()) if chosen.any() else None
            for name, chosen in groups.items()
        },
        float(predicted / total),
        float(np.sum(weight * own) / total),
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
          agent: One with skills that can `predict`; its `embed` shows `phi`, `task`.
          plan: Of pretraining.
          seeds: Of the session whose agents are measured.
          constructor: Makes the environments.
        """
        assert agent.play_skills is not None
        assert agent.embed is not None and agent.predict is not None
        shown_by, predicted_by = agent.embed, agent.predict
        self._steps = config.report.skill_steps
        self._discount = config.learner.discount
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

        def embed(state: base.AgentState, replay: buffer.Buffer) -> Played:
            shown, value = buffer.map_all(
                lambda windows: (
                    shown_by(state, windows),
                    predicted_by(state, windows),
                ),
                replay,
                observation=policy.observation,
                num_steps=self._steps,
            )
            first, over = replay.experience.is_first, replay.experience.terminated
            return Played(shown["phi"], shown["task"], value, first.T, over.T)

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
        return [skill_following(part, self._discount) for part in session.parts(found)]

    def close(self) -> None:
        """Ends the environments."""
        if self._session is not None:
            self._session.pool.close()
