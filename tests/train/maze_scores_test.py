"""Tests of aps_jax.train.maze_scores against play in the environment itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import config as config_lib
from aps_jax.agents import base
from aps_jax.envs import maze
from aps_jax.ops import tasks
from aps_jax.train import maze_scores

NAME = "comb"


@pytest.fixture(scope="module")
def tables():
    return maze.parse_maze(maze.MAPS[NAME])


@pytest.fixture(scope="module")
def agent():
    config = config_lib.replace_options(
        config_lib.preset_config("smoke"), game=f"maze/{NAME}", encoder="mlp"
    )
    return config.make_agent(maze.NUM_ACTIONS, config.observation)


@pytest.fixture(scope="module")
def state(agent):
    return agent.init(jax.random.key(1))


@pytest.fixture(scope="module")
def tester(agent):
    return maze_scores.Tester(f"maze/{NAME}", agent)


def played(agent, state, policy, reward, key, tables):
    """The return of one episode in the environment, step by step."""
    environment = maze.MazeEnvironment(tables, has_pictures=False)
    params = maze.MazeParams(maze.HORIZONS[NAME])
    frame, place = environment.reset_env(key, params)
    memory, total, act = policy.init(1), 0.0, jax.jit(policy.act)
    for time in range(maze.HORIZONS[NAME]):
        seen = base.Observation(frame[None], jnp.array([time == 0]))
        memory, decision = act(state, memory, seen, jax.random.fold_in(key, time))
        frame, place, *_ = environment.step_env(key, place, decision.action[0], params)
        total += reward[int(place.place)]
    return total


def best_and_random(tables, reward):
    """Values by recursion over steps to go, and over all actions alike."""
    best, random = np.zeros(len(reward)), np.zeros(len(reward))
    for _ in range(maze.HORIZONS[NAME]):
        best = np.array([max(reward[n] + best[n] for n in row) for row in tables[2]])
        random = np.array(
            [np.mean([reward[n] + random[n] for n in row]) for row in tables[2]]
        )
    return best[tables.start], random[tables.start]


def test_rewards_are_two_boxes_of_what_can_be_reached(tables):
    rewards = maze_scores.box_rewards(tables, 20, seed=3)
    assert rewards.shape == (20, 100)
    np.testing.assert_array_equal(rewards, maze_scores.box_rewards(tables, 20, seed=3))
    assert np.any(rewards != maze_scores.box_rewards(tables, 20, seed=4))
    assert set(np.unique(rewards)) <= {0.0, 1.0, 2.0}
    assert not rewards[:, tables.distance < 0].any()
    assert rewards.any(axis=1).all()
    everywhere = maze.parse_maze(maze.MAPS["open"])  # No wall takes anything off.
    np.testing.assert_array_equal(
        maze_scores.box_rewards(everywhere, 20, seed=3).sum(axis=1), 32.0
    )


def test_with_and_without_key_the_reward_is_the_same():
    tables = maze.parse_maze(("S.D..", "K#.#.", ".....", "....."))
    (reward,) = maze_scores.box_rewards(tables, 1, seed=0)
    without, with_key = reward.reshape(2, -1)
    both = (tables.distance >= 0).reshape(2, -1).all(axis=0)
    assert both.any()
    np.testing.assert_array_equal(without[both], with_key[both])


@pytest.mark.parametrize("kind", ["zero_shot", "without_gpi"])
def test_scores_are_those_of_play_in_the_environment(
    agent, state, tester, tables, kind
):
    rewards = maze_scores.box_rewards(tables, 2, seed=0)
    found = getattr(tester.scores(state, rewards, seed=5), kind)
    state = agent.start_finetune(state)
    phi = tester.features(state)[tester.free]
    policy = {"zero_shot": agent.play_adapted, "without_gpi": agent.play}[kind](0.0)
    keys = jax.random.split(jax.random.key(5), 3)
    for score, reward, key in zip(found, rewards, keys, strict=False):
        shown = base.Rollouts(
            np.float32(reward[tester.free]),
            np.zeros(len(phi), bool),
            lambda encode, state: np.float32(phi),
        )
        adapted, _ = agent.adapt(key, state, shown)
        best, random = best_and_random(tables, reward)
        total = played(agent, adapted, policy, reward, key, tables)
        assert score == pytest.approx((total - random) / (best - random))


def test_the_best_policy_of_the_true_reward_scores_one(tester, tables):
    reward = maze_scores.box_rewards(tables, 1, seed=1)[0]
    assert tester.planned_score(3.0 * reward + 1.0, reward) == pytest.approx(1.0)
    assert tester.planned_score(-reward, reward) <= 0.0


def test_few_labels_are_states_of_fresh_play(agent, state, tester, tables):
    """The start's neighbours alone are rewarded; far away there is nothing to see."""
    reward = np.zeros((1, 100))
    reward[0, tables.distance == tables.distance.max()] = 1.0
    of_all = tester.scores(state, reward, seed=0)
    of_none = tester.scores(state, reward, num_labels=1, seed=0)
    assert of_all.r_squared[0] > 0.0
    # One label that is not rewarded: a random task, which is the control.
    assert of_none.r_squared[0] == 0.0
    assert of_none.zero_shot[0] == of_none.random_task[0]


def test_labels_are_states_that_behaviour_reaches(agent, state, tables):
    """Greedy skills alone stand still in a third of their steps."""
    shown = []

    def adapt(key, state, rollouts):
        shown.append(set(rollouts.reward.astype(int)))
        return agent.adapt(key, state, rollouts)

    tester = maze_scores.Tester(f"maze/{NAME}", agent._replace(adapt=adapt))
    reward = np.arange(100.0) * (tables.distance >= 0)
    tester.scores(state, reward[None], num_labels=20_000, seed=0)
    key = jax.random.split(jax.random.key(0), 2)[-1]
    visits = tester.visits(state, key, num_steps=tester.horizon, num_envs=32)
    assert shown[0] == set(np.flatnonzero(visits))


def test_few_labels_find_a_task_where_features_are_those_of_the_maze(agent):
    """The curve of task inference alone: 40 slow features, exact play for the task.

    A ridge of 0.001 and a random task below 41 labels, as it was once, score 0.07,
    0.05, 0.83 and 0.99.
    """
    ridge = config_lib.preset_config("maze").learner.ridge
    rng, scores = np.random.default_rng(0), []
    for name in ("open", "four_rooms", "spiral"):
        tester = maze_scores.Tester(f"maze/{name}", agent)
        moves = np.zeros((100, 100))
        np.add.at(moves, (np.arange(100)[:, None], tester.tables.next_state), 0.25)
        among = (moves + moves.T)[np.ix_(tester.free, tester.free)]
        phi = np.zeros((100, 40))
        phi[tester.free] = np.linalg.eigh(among)[1][:, ::-1][:, 1:41]
        phi /= np.maximum(np.linalg.norm(phi, axis=1, keepdims=True), 1e-9)
        for reward in maze_scores.box_rewards(tester.tables, 20, seed=1_000):
            of_reward = []
            for num in (10, 30, 100, 300):
                labels = rng.choice(tester.free, num)
                found = tasks.regress_task(
                    phi[labels],
                    reward[labels],
                    np.ones(num, bool),
                    fallback_task=rng.normal(size=40),
                    ridge=ridge,
                )
                of_reward.append(tester.planned_score(phi @ found.task, reward))
            scores.append(of_reward)
    assert np.all(np.mean(scores, axis=0) > [0.65, 0.80, 0.87, 0.91])


def test_visits_count_every_step_of_every_environment(state, tester, tables):
    visits = tester.visits(state, jax.random.key(0), num_steps=90, num_envs=3)
    assert visits.shape == (100,) and visits.sum() == 90 * 3
    assert not visits[tables.distance < 0].any()
    again = tester.visits(state, jax.random.key(0), num_steps=90, num_envs=3)
    np.testing.assert_array_equal(visits, again)


def test_obedience_is_one_for_the_best_play_alone(state, tester):
    found = tester.obedience(state, num_tasks=3)
    assert found.shape == (3,) and np.all(found <= 1.0 + 1e-6)
    assert len(set(found)) == 3
