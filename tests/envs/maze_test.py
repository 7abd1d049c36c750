"""Tests of mazes against moves on a map of characters, and of their exact values."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.envs import maze

TINY_MAP = ("S..", ".#.", "...")
LOCKED_MAP = ("S.D.", "K#.#")
MOVES = {0: (-1, 0), 1: (0, 1), 2: (1, 0), 3: (0, -1)}


def python_step(rows, state, action):
    """One move of (row, column, has_key) on a map of characters."""
    row, column, has_key = state
    row, column = row + MOVES[action][0], column + MOVES[action][1]
    if not (0 <= row < len(rows) and 0 <= column < len(rows[0])):
        return state
    if rows[row][column] == "#" or (rows[row][column] == "D" and not has_key):
        return state
    return row, column, has_key or rows[row][column] == "K"


def python_start(rows):
    cells = itertools.product(range(len(rows)), range(len(rows[0])))
    return next((*cell, False) for cell in cells if rows[cell[0]][cell[1]] == "S")


def python_distances(rows):
    """Breadth-first distances of all states that can be reached."""
    distances = {python_start(rows): 0}
    frontier = list(distances)
    while frontier:
        state = frontier.pop(0)
        for action in MOVES:
            reached = python_step(rows, state, action)
            if reached not in distances:
                distances[reached] = distances[state] + 1
                frontier.append(reached)
    return distances


def index_of(rows, state):
    row, column, has_key = state
    return (has_key * len(rows) + row) * len(rows[0]) + column


@pytest.mark.parametrize("name", maze.MAPS)
def test_every_state_is_within_an_episode_and_tables_match_a_python_step(name):
    rows, side = maze.MAPS[name], 10 if name in maze.SMALL else 20
    assert [len(row) for row in rows] == [side] * side
    distances = python_distances(rows)
    assert len({state[:2] for state in distances}) == sum(
        char != "#" for row in rows for char in row
    )
    assert max(distances.values()) + 2 < maze.HORIZONS[name]
    tables = maze.parse_maze(rows)
    assert tables.start == index_of(rows, python_start(rows))
    assert (tables.distance >= 0).sum() == len(distances)
    for state, distance in distances.items():
        assert tables.distance[index_of(rows, state)] == distance
        for action in MOVES:
            reached = python_step(rows, state, action)
            expected = index_of(rows, reached)
            assert tables.next_state[index_of(rows, state), action] == expected


def test_a_door_opens_with_the_key_alone_and_the_goal_lies_behind_it():
    tables = maze.parse_maze(LOCKED_MAP)
    # Cells: S=0 .=1 D=2 .=3 K=4 .=6; with the key 8 more.
    assert tables.next_state[1, 1] == 1  # The door is shut,
    assert tables.next_state[0, 2] == 12  # the key is taken,
    assert tables.next_state[9, 1] == 10  # and the door is open.
    assert tables.distance[[0, 1, 12, 8, 9, 10, 11, 14]].tolist() == [
        *(0, 1, 1, 2, 3, 4, 5, 5)
    ]
    # The first of the farthest is cell 3 with the key; 2 steps from it at most:
    assert np.flatnonzero(tables.reward).tolist() == [9, 10, 11, 14]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "rows of one length"),
        (["", ""], "rows of one length"),
        (["S.", "."], "rows of one length"),
        (["S?"], "got \\['\\?'\\]"),
        ([".."], "exactly one start 'S', got 0"),
        (["SS"], "exactly one start 'S', got 2"),
        (["S#."], "Only 1 of 2 free cells"),
        (["SK"], "one key 'K' and doors 'D', or neither"),
        (["SD"], "one key 'K' and doors 'D', or neither"),
        (["KSKD"], "one key 'K' and doors 'D', or neither"),
        (["SDK"], "Only 1 of 3 free cells"),
    ],
)
def test_bad_maps_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        maze.parse_maze(rows)


@pytest.mark.parametrize("rows", [TINY_MAP, LOCKED_MAP, ("S",)])
@pytest.mark.parametrize("horizon", [1, 5])
def test_returns_match_all_sequences_of_actions(rows, horizon):
    tables = maze.parse_maze(rows)
    returns = []
    for actions in itertools.product(range(4), repeat=horizon):
        state, total = python_start(rows), 0.0
        for action in actions:
            state = python_step(rows, state, action)
            total += tables.reward[index_of(rows, state)]
        returns.append(total)
    assert maze.optimal_return(tables, horizon=horizon) == max(returns)
    found = maze.random_return(tables, horizon=horizon)
    np.testing.assert_allclose(found, np.mean(returns), rtol=1e-12)


def test_action_values_by_hand():
    # A corridor whose three cells are all goals but the first: right, right.
    tables = maze.parse_maze(("S...",))
    assert tables.reward.tolist() == [0, 1, 1, 1]
    values = maze.optimal_action_values(tables, horizon=2)
    # From the start, up stays: 0, then 1 by going right.
    assert values[1, 0].tolist() == [1, 2, 1, 1]
    assert values[0, 1].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("rows", [LOCKED_MAP, maze.MAPS["spiral"]])
@pytest.mark.parametrize("has_pictures", [False, True])
def test_the_environment_walks_like_python_and_shows_where_it_is(rows, has_pictures):
    tables = maze.parse_maze(rows)
    environment = maze.MazeEnvironment(tables, has_pictures=has_pictures)
    params = maze.MazeParams(30)
    key, height, width = jax.random.key(0), len(rows), len(rows[0])
    side = 84 // max(height, width)
    step = jax.jit(environment.step_env)
    seen, state = environment.reset_env(key, params)
    expected = python_start(rows)
    for time, action in enumerate(np.random.default_rng(1).integers(4, size=30)):
        assert seen.shape == environment.observation.frame_shape
        assert seen.dtype == jnp.uint8
        row, column, has_key = expected
        if has_pictures:
            square = np.zeros((84, 84), bool)
            square[
                row * side : (row + 1) * side, column * side : (column + 1) * side
            ] = 1
            np.testing.assert_array_equal(np.asarray(seen) == 255, square)
            corner = np.asarray(seen)[::side, ::side][:height, :width]
            for r, c in np.ndindex(height, width):
                levels = {"#": 64, "D": 0 if has_key else 128, "K": 192 * (not has_key)}
                if (r, c) != (row, column):
                    assert corner[r, c] == levels.get(rows[r][c], 0)
            assert not np.any(np.asarray(seen)[side * height :] != 64)
        else:
            assert np.argwhere(seen).tolist() == [[row, column, int(has_key)]]
        assert int(state.place) == index_of(rows, expected)
        assert not environment.is_truncated(state, params)
        expected = python_step(rows, expected, action)
        seen, state, reward, terminated, info = step(key, state, action, params)
        assert reward == tables.reward[index_of(rows, expected)]
        assert not terminated and info == {}
        assert int(state.time) == time + 1
    assert environment.is_truncated(state, params)


def hit_probabilities(tables, horizon):
    """Of each state that can be reached: that random play meets it in an episode."""
    live = np.flatnonzero(tables.distance >= 0)
    place = {state: index for index, state in enumerate(live)}
    following = np.vectorize(place.get)(tables.next_state[live])
    # [target, state]: met from a state within the steps so far.
    met = np.eye(len(live), dtype=np.float32)
    is_target = met > 0
    for _ in range(horizon):
        met = met[:, following].mean(axis=-1)
        met[is_target] = 1.0
    return met[:, place[tables.start]].astype(float)


def test_hit_probabilities_by_hand():
    # One action of four leads right; two in a row lead to the end.
    tables = maze.parse_maze(("S..",))
    np.testing.assert_allclose(hit_probabilities(tables, 1), [1, 1 / 4, 0])
    np.testing.assert_allclose(hit_probabilities(tables, 2), [1, 7 / 16, 1 / 16])


@pytest.mark.parametrize("name", maze.LARGE)
def test_random_play_reaches_under_40_percent_of_the_large_maps(name):
    """Exactly, in expectation, over a million agent steps; docs/worlds.md has numbers.

    An explorer reaches every state by then: each lies within an episode, and there are
    fewer states than episodes.
    """
    tables, horizon = maze.parse_maze(maze.LARGE[name]), maze.HORIZONS[name]
    episodes = 1_000_000 // horizon
    met = hit_probabilities(tables, horizon)
    assert len(met) < episodes and tables.distance.max() <= horizon
    assert np.mean(1 - (1 - met) ** episodes) < 0.4
