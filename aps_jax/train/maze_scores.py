"""Exact tests of a pretrained agent in a maze: new reward functions, obedience, visits.

A maze is a table, so every return of a deterministic policy is exact. A score is
`(return - random play's) / (best - random play's)`. Letters: `N` states, `R` reward
functions, `E` environments, `T` steps, `D` dimensions of features and tasks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.agents import base
from aps_jax.envs import maze
from aps_jax.replay import buffer
from aps_jax.types import PRNGKey

_BOX_SIDE = 4


class ZeroShot(NamedTuple):
    """Scores over reward functions, each `[R]` float64."""

    zero_shot: np.ndarray  # of the adapted agent, before it learns from reward
    without_gpi: np.ndarray  # of psi^T w alone
    best_of_task: np.ndarray  # of the best policy for the inferred reward phi^T w
    random_task: np.ndarray  # of the agent for a random task: a control
    r_squared: np.ndarray  # of the regression


def box_rewards(
    tables: maze.Maze, num: int, seed: int, *, side: int = _BOX_SIDE
) -> np.ndarray:
    """Draws reward functions `[num, N]` float64: the sum of two boxes of ones.

    A reward is of reaching a state; with and without key it is the same.
    """
    shape = len(tables.rows), len(tables.rows[0])
    with_keys = len(tables.next_state) // (shape[0] * shape[1])
    rng = np.random.default_rng(seed)
    drawn: list[np.ndarray] = []
    while len(drawn) < num:
        cells = np.zeros(shape)
        for _ in range(2):
            row, column = (int(rng.integers(size - side + 1)) for size in shape)
            cells[row : row + side, column : column + side] += 1.0
        reward = np.tile(cells.ravel(), with_keys) * (tables.distance >= 0)
        if reward.any():
            drawn.append(reward)
    return np.stack(drawn)


class Tester:
    """Plays an agent in the tables of a maze."""

    def __init__(self, name: str, agent: base.Agent):
        """Compiles what is played.

        Args:
          name: Of the world, such as `maze/spiral` or `maze/spiral/pixels`.
          agent: One with skills, whose `embed` shows `phi`.
        """
        name, _, way = name.removeprefix("maze/").partition("/")
        self.tables = maze.parse_maze(maze.MAPS[name])
        self.horizon = maze.HORIZONS[name]
        self.free = np.flatnonzero(self.tables.distance >= 0)
        self._agent = agent
        environment = maze.MazeEnvironment(self.tables, has_pictures=bool(way))
        shown = environment.observe_all()
        shape = environment.observation.shape
        self._shown = shown.reshape(-1, *shape)  # [N, *observation.shape]
        assert agent.pretrain is not None and agent.embed is not None
        self._embed = jax.jit(agent.embed)
        self._start_finetune = jax.jit(agent.start_finetune)
        policies = {
            "adapted": agent.play_adapted(0.0),
            "alone": agent.play(0.0),
            "exploring": agent.pretrain.policy,
        }
        self._play = {
            kind: jax.jit(self._make_play(policy), static_argnums=(2, 3))
            for kind, policy in policies.items()
        }

    def _make_play(self, policy: base.Policy) -> Callable[..., jax.Array]:
        next_state = jnp.asarray(self.tables.next_state)
        start = self.tables.start

        def play(
            state: base.AgentState, key: PRNGKey, num_envs: int, num_steps: int
        ) -> jax.Array:
            """Returns the states reached, `[T, E]` int32."""

            def step(carry: Any, time: jax.Array) -> tuple[Any, jax.Array]:
                memory, place = carry
                is_first = jnp.broadcast_to(time % self.horizon == 0, place.shape)
                place = jnp.where(is_first, start, place)
                memory, decision = policy.act(
                    state,
                    memory,
                    base.Observation(self._shown[place], is_first),
                    jax.random.fold_in(key, time),
                )
                place = next_state[place, decision.action]
                return (memory, place), place

            at_start = jnp.full((num_envs,), start, jnp.int32)
            carry = (policy.init(num_envs), at_start)
            return jax.lax.scan(step, carry, jnp.arange(num_steps))[1]

        return play

    def features(self, state: base.AgentState) -> np.ndarray:
        """Returns phi of all states, `[N, D]` float64."""
        num = len(self._shown)
        false, zero = jnp.zeros((num, 1), bool), jnp.zeros((num, 1), jnp.int32)
        windows = buffer.Window(
            observation=self._shown[:, None],
            action=zero,
            reward=None,
            terminated=false,
            is_first=false,
            life_lost=false,
            id=zero,
            extras={"task": jnp.zeros((num, 1, state.stats.task.size))},
        )
        return np.asarray(self._embed(state, windows)["phi"], np.float64)

    def visits(
        self, state: base.AgentState, key: PRNGKey, *, num_steps: int, num_envs: int
    ) -> np.ndarray:
        """Counts the states `[N]` that behaviour in pretraining reaches."""
        reached = np.asarray(self._play["exploring"](state, key, num_envs, num_steps))
        return np.bincount(reached.ravel(), minlength=len(self._shown))

    def scores(
        self,
        state: base.AgentState,
        rewards: np.ndarray,
        *,
        num_labels: int | None = None,
        seed: int = 0,
    ) -> ZeroShot:
        """Scores the agent on reward functions `[R, N]` that it has never seen.

        Args:
          state: Of the agent, after pretraining.
          rewards: Of reaching each state.
          num_labels: Rewarded states that are shown, drawn from fresh play of the
            behaviour of pretraining, as for inference; None shows every state that
            can be reached once.
          seed: Of tasks, labels and candidates of GPI.
        """
        state = self._start_finetune(state)
        phi = self.features(state)
        keys = jax.random.split(jax.random.key(seed), len(rewards) + 1)
        reached = self.free
        if num_labels is not None:
            played = self._play["exploring"](state, keys[-1], 32, self.horizon)
            reached = np.asarray(played).ravel()
        rng, found = np.random.default_rng(seed), []
        for key, reward in zip(keys[:-1], rewards, strict=True):
            labels = reached
            if num_labels is not None:
                labels = rng.choice(reached, num_labels)
            adapted, facts = self._adapt(key, state, phi[labels], reward[labels])
            # Without a reward the task is a random one.
            other, _ = self._adapt(key, state, phi[labels], 0.0 * reward[labels])
            found.append(
                (
                    self._score("adapted", adapted, key, reward),
                    self._score("alone", adapted, key, reward),
                    self.planned_score(phi @ np.asarray(facts["task"]), reward),
                    self._score("adapted", other, key, reward),
                    facts["r_squared"],
                )
            )
        return ZeroShot(*np.array(found).T)

    def obedience(
        self, state: base.AgentState, *, num_tasks: int = 30, seed: int = 0
    ) -> np.ndarray:
        """Scores greedy play for random tasks by its own features, `[num_tasks]`.

        The reward is `phi^T w` itself: what is lost to 1 is lost by psi.
        """
        key = jax.random.key(seed)
        phi = self.features(state)
        rng = np.random.default_rng(seed)
        drawn = rng.normal(size=(num_tasks, state.stats.task.size))
        found = []
        for task in drawn / np.linalg.norm(drawn, axis=-1, keepdims=True):
            one = state._replace(
                stats=state.stats._replace(task=jnp.asarray(task, jnp.float32))
            )
            found.append(self._score("alone", one, key, phi @ task))
        return np.array(found)

    def _adapt(
        self, key: PRNGKey, state: base.AgentState, phi: np.ndarray, reward: np.ndarray
    ) -> tuple[base.AgentState, dict[str, Any]]:
        shown = base.Rollouts(
            np.asarray(reward, np.float32),
            np.zeros(len(reward), bool),
            lambda encode, state: np.asarray(phi, np.float32),
        )
        return self._agent.adapt(key, state, shown)

    def _score(
        self, kind: str, state: base.AgentState, key: PRNGKey, reward: np.ndarray
    ) -> float:
        path = np.asarray(self._play[kind](state, key, 1, self.horizon))[:, 0]
        return self._normalized(float(reward[path].sum()), reward)

    def planned_score(self, believed: np.ndarray, reward: np.ndarray) -> float:
        """Scores the best policy of a believed reward `[N]` by the true one."""
        values = maze.optimal_action_values(
            self.tables._replace(reward=believed), horizon=self.horizon
        )
        place, total = self.tables.start, 0.0
        for to_go in reversed(values):
            place = self.tables.next_state[place, to_go[place].argmax()]
            total += float(reward[place])
        return self._normalized(total, reward)

    def _normalized(self, total: float, reward: np.ndarray) -> float:
        tables = self.tables._replace(reward=reward)
        low = maze.random_return(tables, horizon=self.horizon)
        high = maze.optimal_return(tables, horizon=self.horizon)
        return (total - low) / (high - low)
