"""Tests of other rewards of the same game, and of an agent that is asked for them."""

import functools

import fakes
import numpy as np
import pytest

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.envs import atari, reward_functions
from aps_jax.train import stages, zero_shot


def step(**changes):
    """A time step of two environments."""
    values = {
        "frame": np.zeros((2, 84, 84), np.uint8),
        "reward": np.float32([7, -2]),
        "terminated": np.array([False, False]),
        "truncated": np.array([False, False]),
        "is_first": np.array([False, False]),
        "lives": np.int32([4, 0]),
        "ram": np.zeros((2, 128), np.uint8),
        **changes,
    }
    return types.TimeStep(**values)


class Tape:
    """A pool that plays given time steps."""

    num_actions, num_envs, observation = 3, 2, atari.OBSERVATION

    def __init__(self, *steps):
        self._steps = list(steps)

    def reset(self):
        return self._steps.pop(0)

    recv = reset

    def send(self, actions):
        pass

    render = close = send


def pool_of(name, *steps):
    return reward_functions.constructor_for(name, Tape, atari.OBSERVATION)(*steps)


FIRST = {"is_first": np.array([True, True])}
OVER = {"terminated": np.array([True, True])}


def test_survival_pays_the_share_of_lives_left():
    # The first environment starts with 4 lives, the second has no such counter.
    pool = pool_of(
        "survival",
        step(**FIRST),
        step(),
        step(lives=np.int32([3, 0])),
        step(lives=np.int32([5, 0])),  # An extra life.
        step(lives=np.int32([0, 0]), **OVER),
        step(lives=np.int32([2, 0]), **FIRST),
        step(lives=np.int32([1, 0])),
    )
    rewards = [pool.reset().reward] + [pool.recv().reward for _ in range(6)]
    expected = [[0, 0], [1, 1], [0.75, 1], [1.25, 1], [0, 0], [0, 0], [0.5, 1]]
    np.testing.assert_array_equal(rewards, expected)


def test_the_games_own_reward_stays_visible():
    pool = pool_of("survival", step(**FIRST), step())
    pool.reset()
    timestep = pool.recv()
    np.testing.assert_array_equal(timestep.reward, [1, 1])
    np.testing.assert_array_equal(reward_functions.game_reward(pool, timestep), [7, -2])
    bare = Tape()
    np.testing.assert_array_equal(reward_functions.game_reward(bare, step()), [7, -2])


def ram_grows(before, after):
    """The user's own function: how far byte 5 has grown."""
    return after.ram[:, 5].astype(int) - before.ram[:, 5]


def test_a_users_function_sees_the_step_before_and_the_step_reached():
    grown = np.zeros((2, 128), np.uint8)
    grown[:, 5] = [3, 9]
    pool = pool_of(
        "reward_functions_test:ram_grows",
        step(**FIRST),
        step(ram=grown),
        step(ram=grown),
        step(**FIRST),
    )
    rewards = [pool.reset().reward] + [pool.recv().reward for _ in range(3)]
    # The reset frame's -3 and -9 belong to no action.
    np.testing.assert_array_equal(rewards, [[0, 0], [3, 9], [0, 0], [0, 0]])


def broken(before, after):
    raise RuntimeError("no such byte")


def one_number(before, after):
    return 1.0


def words(before, after):
    return np.array(["a", "b"])


not_callable = 3


@pytest.mark.parametrize(
    "name, message",
    [
        ("lives", "score, survival or module:function, got 'lives'"),
        ("score,survival", "score, survival or module:function"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError: No module"),
        (
            "reward_functions_test:gone",
            "module reward_functions_test has no function gone",
        ),
        ("reward_functions_test:not_callable", "has no function not_callable"),
        ("reward_functions_test:broken", "failed: RuntimeError: no such byte"),
        (
            "reward_functions_test:one_number",
            r"must return 2 numbers.*float64 of shape \(\)",
        ),
        ("reward_functions_test:words", r"must return 2 numbers.*<U1 of shape \(2,\)"),
    ],
)
def test_a_function_that_cannot_work_is_one_clear_line_at_once(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        reward_functions.constructor_for(name, Tape, atari.OBSERVATION)
    assert "\n" not in str(caught.value)


def not_finite(before, after):
    return after.lives / np.float32(after.lives.max() or 1) * np.float32(np.inf)


def test_a_reward_that_is_not_finite_stops_the_play():
    with np.errstate(invalid="ignore"):
        pool = pool_of("reward_functions_test:not_finite", step(**FIRST), step())
        pool.reset()
        with pytest.raises(ValueError, match="a number that is not finite"):
            pool.recv()


# One pretrained agent on several reward functions of the chain.


def chain_config(**options):
    options = {
        "game": "Chain",
        "pretrain_frames": 4 * 80,
        "replay_size": 240,
        "warmup_agent_steps": 60,
        "finetune_agent_steps": 120,
        "infer_agent_steps": 60,
        "pretrain_epsilon": 0.5,
        **options,
    }
    return config_lib.replace_options(config_lib.preset_config("smoke"), **options)


def go_left(before, after):
    """1 for each step towards the start of the chain; byte 0 is the state."""
    return after.ram[:, 0] < before.ram[:, 0]


REWARDS = ["score", "survival", "reward_functions_test:go_left"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A pretraining, and the agent's results on three reward functions."""
    folder = tmp_path_factory.mktemp("chain")
    stages.pretrain(chain_config(), folder / "p", constructor=fakes.ChainPool)
    trained = stages.load_pretrained(folder / "p")
    results = zero_shot.evaluate_rewards(
        trained, chain_config(), REWARDS, constructor=fakes.ChainPool
    )
    return folder, results


@pytest.mark.parametrize("index", [0, 2])
def test_many_rewards_at_once_are_what_finetuning_finds_for_each(chain, index):
    """Rollouts, `w`, R^2 and zero-shot games are those of the stage, bit for bit."""
    folder, results = chain
    tuned = stages.finetune(
        chain_config(reward=REWARDS[index]),
        folder / f"f{index}",
        folder / "p",
        constructor=fakes.ChainPool,
    )
    result = results[index]
    adapted = {k: v for k, v in result.adapted.items() if k != "summary"}
    assert (tuned["reward"], tuned["adapted"]) == (REWARDS[index], adapted)
    first, last = tuned["evaluations"]
    assert first["eval_return_mean"] == result.played.returns.mean()
    assert first["eval_score_mean"] == result.played.score_returns.mean()
    # After fine-tuning: the function's own returns, and the game's beside them.
    assert last["eval_return_mean"] == tuned["return_mean"]
    assert last["eval_score_mean"] == np.mean(tuned["score_returns"])


def test_each_reward_has_a_return_of_its_own_and_random_play_beside_it(chain):
    _, results = chain
    score, survival, left = results
    np.testing.assert_array_equal(score.played.returns, score.played.score_returns)
    # The chain shows no lives: one point a step, none for the step of game over.
    over = survival.played.score_returns == fakes.ChainPool.max_arrivals
    np.testing.assert_array_equal(
        survival.played.returns, survival.played.lengths - over
    )
    # The same random games, whatever is counted in them.
    for result in results:
        np.testing.assert_array_equal(result.random.score_returns, score.random.returns)
        # And the same skills of random tasks, which no reward chose.
        skills = result.random_tasks
        np.testing.assert_array_equal(skills.score_returns, score.random_tasks.returns)
        tasks = skills.extras["task"]
        assert len(np.unique(tasks, axis=0)) == len(tasks)
    assert left.adapted["num_nonzero"] > 0
    assert left.random.returns.max() > 0


def test_a_run_of_another_reward_needs_its_function_before_anything_else(tmp_path):
    finetune = functools.partial(stages.finetune, constructor=fakes.ChainPool)
    with pytest.raises(ValueError, match="cannot be imported"):
        finetune(chain_config(reward="gone:f"), tmp_path / "f", None)
    assert not (tmp_path / "f").exists()
