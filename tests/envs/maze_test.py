"""Tests of the gridworld: its maps, its step, and its exact values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.envs import maze

TINY_MAP = ("S..", ".#.", "...")
MOVES = {0: (-1, 0), 1: (0, 1), 2: (1, 0), 3: (0, -1)}


def python_step(rows, position, action):
    """One move on a map of characters."""
    row, column = position[0] + MOVES[action][0], position[1] + MOVES[action][1]
    if not (0 <= row < len(rows) and 0 <= column < len(rows[0])):
        return position
    return position if rows[row][column] == "#" else (row, column)


def python_start(rows):
    return next(
        (r, c)
        for r, row in enumerate(rows)
        for c, char in enumerate(row)
        if char == "S"
    )


def steps_from_start(rows):
    """Breadth-first distances of all reachable cells."""
    distances = {python_start(rows): 0}
    frontier = list(distances)
    while frontier:
        position = frontier.pop(0)
        for action in MOVES:
            reached = python_step(rows, position, action)
            if reached not in distances:
                distances[reached] = distances[position] + 1
                frontier.append(reached)
    return distances


def python_return(rows, reward, actions):
    """The return of a fixed sequence of actions from the start."""
    position, total = python_start(rows), 0.0
    for action in actions:
        position = python_step(rows, position, action)
        total += reward[position]
    return total


@pytest.fixture(name="reward")
def _reward():
    return np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)


@pytest.mark.parametrize("name", maze.MAPS)
def test_maps_are_ten_by_ten_and_every_cell_is_within_reach_of_an_episode(name):
    rows = maze.MAPS[name]
    assert [len(row) for row in rows] == [10] * 10
    distances = steps_from_start(rows)
    assert len(distances) == sum(row.count(".") + row.count("S") for row in rows)
    assert max(distances.values()) <= 35
    world = maze.parse_maze(rows)
    assert int(world.is_free.sum()) == len(distances)
    assert world.start == 10 * python_start(rows)[0] + python_start(rows)[1]


def test_there_are_six_maps_and_five_have_walls():
    assert len(maze.MAPS) == 6
    walls = [sum(row.count("#") for row in rows) for rows in maze.MAPS.values()]
    assert sum(count >= 15 for count in walls) == 5
    assert len(set(maze.MAPS.values())) == 6


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "rows of one length"),
        (["", ""], "rows of one length"),
        (["S.", "."], "rows of one length"),
        (["S?"], "got \\['\\?'\\]"),
        ([".."], "exactly one start 'S', got 0"),
        (["SS"], "exactly one start 'S', got 2"),
        (["S#."], "only 1 of 2 free cells"),
    ],
)
def test_bad_maps_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        maze.parse_maze(rows)


@pytest.mark.parametrize("name", ["open", "spiral"])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_step_matches_a_python_one_on_a_long_walk(name, transform):
    rows = maze.MAPS[name]
    world = maze.parse_maze(rows)
    step = transform(maze.step)
    position, cell = python_start(rows), world.start
    for action in np.random.default_rng(1).integers(4, size=100):
        position = python_step(rows, position, action)
        cell = step(world, cell, jnp.int32(action))
        assert int(cell) == 10 * position[0] + position[1]


@pytest.mark.parametrize("rows", [TINY_MAP, maze.MAPS["comb"], ("S",)])
def test_transition_table_matches_a_python_step_from_every_cell(rows):
    world = maze.parse_maze(rows)
    width = len(rows[0])
    for row, column in itertools.product(range(len(rows)), range(width)):
        assert world.is_free[row * width + column] == (rows[row][column] != "#")
        for action in range(maze.NUM_ACTIONS):
            to_row, to_column = python_step(rows, (row, column), action)
            reached = int(world.next_cell[row * width + column, action])
            assert reached == to_row * width + to_column


def test_observation_is_one_hot():
    world = maze.parse_maze(TINY_MAP)
    expected = np.zeros((2, 9), np.float32)
    expected[0, 2] = expected[1, 7] = 1.0
    observed = maze.observe(world, jnp.array([2, 7]))
    np.testing.assert_array_equal(observed, expected)
    assert observed.dtype == jnp.float32


def test_box_masks_are_all_boxes_once():
    masks = maze.box_masks(5, 6, side=4)
    assert masks.shape == (2 * 3, 30)
    np.testing.assert_array_equal(masks.sum(axis=1), 16)
    assert len({tuple(mask) for mask in masks}) == 6
    corner = np.zeros((5, 6))
    corner[:4, :4] = 1
    np.testing.assert_array_equal(masks[0], corner.reshape(-1))


@pytest.mark.parametrize("side", [0, 4])
def test_box_that_does_not_fit_is_refused(side):
    with pytest.raises(ValueError, match=f"side {side} .* 3x5"):
        maze.box_masks(3, 5, side=side)


def test_sampled_reward_is_a_sum_of_boxes_without_walls():
    world = maze.parse_maze(TINY_MAP)
    boxes = maze.box_masks(3, 3, side=2)
    free = boxes * np.array(world.is_free)
    sums = {tuple(a + b) for a in free for b in free}
    keys = jax.random.split(jax.random.key(0), 200)
    sampled = jax.vmap(lambda key: maze.sample_reward(key, world, boxes))(keys)
    assert {tuple(np.array(reward)) for reward in sampled} == sums
    assert sampled.dtype == jnp.float32


def test_boxes_inside_walls_are_never_drawn():
    world = maze.parse_maze(("S##", "###"))
    boxes = maze.box_masks(2, 3, side=1)
    sample = jax.vmap(lambda key: maze.sample_reward(key, world, boxes, num_boxes=1))
    sampled = sample(jax.random.split(jax.random.key(0), 50))
    np.testing.assert_array_equal(sampled, np.tile(boxes[0], (50, 1)))


@pytest.mark.parametrize("horizon", [1, 2, 6])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_optimal_return_matches_brute_force(reward, horizon, transform):
    world = maze.parse_maze(TINY_MAP)
    expected = max(
        python_return(TINY_MAP, reward, actions)
        for actions in itertools.product(MOVES, repeat=horizon)
    )
    optimal = transform(lambda r: maze.optimal_return(world, r, horizon=horizon))
    np.testing.assert_allclose(optimal(reward.reshape(-1)), expected, rtol=1e-5)


@pytest.mark.parametrize("horizon", [1, 5])
def test_random_return_matches_the_mean_over_all_action_sequences(reward, horizon):
    world = maze.parse_maze(TINY_MAP)
    expected = np.mean(
        [
            python_return(TINY_MAP, reward, actions)
            for actions in itertools.product(MOVES, repeat=horizon)
        ]
    )
    value = maze.random_return(world, reward.reshape(-1), horizon=horizon)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


def test_policy_return_follows_the_policy(reward):
    world = maze.parse_maze(TINY_MAP)
    right = np.tile(np.eye(4, dtype=np.float32)[1], (9, 1))
    # From the corner: right, right, then bumping into the border twice.
    expected = reward[0, 1] + 3 * reward[0, 2]
    value = maze.policy_return(world, right, reward.reshape(-1), horizon=4)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_greedy_in_the_optimal_values_is_optimal(reward):
    world = maze.parse_maze(TINY_MAP)
    reward = reward.reshape(-1)
    values = maze.optimal_action_values(world, reward, horizon=7)
    achieved = maze.greedy_return(world, values, reward)
    optimal = maze.optimal_return(world, reward, horizon=7)
    np.testing.assert_allclose(achieved, optimal, rtol=1e-6)


def test_greedy_return_uses_the_row_of_the_steps_to_go():
    # A corridor with the start in the middle, reward 1 at its left and 3 at its right.
    world = maze.parse_maze((".S.",))
    reward = jnp.array([1.0, 0.0, 3.0])
    left, right = jnp.eye(4)[3], jnp.eye(4)[1]
    # With two steps to go it moves right (3), with one to go left, back to 0.
    values = jnp.stack([jnp.tile(left, (3, 1)), jnp.tile(right, (3, 1))])
    assert maze.greedy_return(world, values, reward) == 3.0
    # The other way round: left (1), then back to 0.
    assert maze.greedy_return(world, values[::-1], reward) == 1.0


def test_discounted_values_worked_by_hand():
    # Two cells in a row, reward 1 for the right one, discount 1/2, three steps to go:
    # staying on the right is worth 1 + 1/2 + 1/4; moving left and back 0 + 1/2 + 1/4;
    # from the left, moving right is worth 1.75, and bumping 0.75.
    world = maze.parse_maze(("S.",))
    values = maze.optimal_action_values(
        world, jnp.array([0.0, 1.0]), horizon=3, discount=0.5
    )
    assert values.shape == (3, 2, 4)
    expected = [[0.75, 1.75, 0.75, 0.75], [1.75, 1.75, 1.75, 0.75]]
    np.testing.assert_allclose(values[-1], expected)


def test_constant_reward_changes_no_optimal_action(reward):
    # Why an intercept of the regression need not be planned for.
    world = maze.parse_maze(TINY_MAP)
    reward = reward.reshape(-1)
    plain = maze.optimal_action_values(world, reward, horizon=6)
    shifted = maze.optimal_action_values(world, reward + 2.0, horizon=6)
    steps_to_go = jnp.arange(1.0, 7.0).reshape(6, 1, 1)
    np.testing.assert_allclose(shifted, plain + 2.0 * steps_to_go, rtol=1e-5)


def test_normalized_return_is_zero_for_random_and_one_for_optimal():
    achieved = jnp.array([2.0, 6.0, 3.0])
    random, optimal = jnp.full(3, 2.0), jnp.full(3, 6.0)
    np.testing.assert_allclose(
        maze.normalized_return(achieved, random, optimal), [0.0, 1.0, 0.25]
    )
