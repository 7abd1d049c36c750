"""Gridworlds in pure JAX: maps, step, random reward functions and exact values.

A maze is a table of transitions, so that every return in it can be computed exactly:
the expected return of a policy and the optimal return of a fixed horizon are closed
recursions over at most 100 cells. The setting follows the public notebook of APS's
first author (10x10, one-hot states, episodes of 40 steps); the maps are our own.

Letters: `S` cells (row-major), `A` = 4 actions (up, right, down, left), `T` horizon.
"""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

NUM_ACTIONS = 4
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left: (row, column).
_WALL, _FREE, _START = "#", ".", "S"

# Each 10x10, connected, with every free cell within 35 steps of the start.
_PICTURE = """
open       four_rooms serpentine spiral     comb       rings
S......... S....#.... ....S..... .......... .#.#.#.#.# S.........
.......... .....#.... .......... .######### .#.#.#.#.# .########.
.......... .......... ########.. .#........ .#.#.#.#.# .#......#.
.......... .....#.... .......... .#.######. .#.#.#.#.# .#.####.#.
.......... .....#.... .......... .#.#....#. S......... ...#..#.#.
.......... ##.####.## ..######## .#.#..#.#. .........# .#.#.##.#.
.......... .....#.... .......... .#.####.#. #.#.#.#.#. .#.#....#.
.......... .....#.... .......... .#......#S ..#.#.#.#. .#.######.
.......... .......... ########.. .########. .##.#.#.#. .#........
.......... .....#.... .......... .......... ....#.#... ...#######
"""
MAPS = {
    name: tuple(rows)
    for name, *rows in zip(*(line.split() for line in _PICTURE.split("\n")[1:-1]))
}


class Maze(NamedTuple):
    """The tables of one maze; walls have rows too, which no transition leads to."""

    is_free: jax.Array  # [S] bool, False in a wall.
    start: jax.Array  # [] int32, the cell in which every episode begins.
    next_cell: jax.Array  # [S, A] int32, the cell reached; bumping stays put.


def parse_maze(rows: Sequence[str]) -> Maze:
    """Reads a map of `#` walls, `.` free cells and one `S`, the start.

    Args:
      rows: strings of equal length, the topmost row first.

    Returns:
      The maze's tables, `S` being the number of characters.

    Raises:
      ValueError: if the map is empty or ragged, has another character, has not
        exactly one start, or a free cell cannot be reached from the start.
    """
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(f"a map needs rows of one length, got lengths {lengths}.")
    unknown = sorted(set("".join(rows)) - {_WALL, _FREE, _START})
    if unknown:
        raise ValueError(f"a map is made of '#', '.' and 'S', got {unknown}.")
    cells = np.array([list(row) for row in rows])
    height, width = cells.shape
    starts = np.flatnonzero(cells == _START)
    if len(starts) != 1:
        raise ValueError(f"a map needs exactly one start 'S', got {len(starts)}.")

    is_free = cells != _WALL
    table = np.empty((height, width, NUM_ACTIONS), np.int32)
    for row, column, action in np.ndindex(table.shape):
        to_row = row + _MOVES[action][0]
        to_column = column + _MOVES[action][1]
        inside = 0 <= to_row < height and 0 <= to_column < width
        if not inside or not is_free[to_row, to_column]:
            to_row, to_column = row, column
        table[row, column, action] = to_row * width + to_column
    next_cell = table.reshape(-1, NUM_ACTIONS)

    reached = {int(starts[0])}
    frontier = set(reached)
    while frontier:
        frontier = {int(s) for s in next_cell[sorted(frontier)].ravel()} - reached
        reached |= frontier
    num_free = int(is_free.sum())
    if len(reached) < num_free:
        raise ValueError(f"only {len(reached)} of {num_free} free cells are reachable.")
    return Maze(
        is_free=jnp.asarray(is_free.reshape(-1)),
        start=jnp.asarray(starts[0], jnp.int32),
        next_cell=jnp.asarray(next_cell),
    )


def step(maze: Maze, cell: jax.Array, action: jax.Array) -> jax.Array:
    """Returns the cell `[]` int32 that `action` `[]` reaches from `cell` `[]`."""
    chex.assert_rank([cell, action], 0)
    chex.assert_type([cell, action], int)
    return maze.next_cell[cell, action]


def observe(maze: Maze, cell: jax.Array) -> jax.Array:
    """Returns the observation of a cell: one-hot, `[..., S]` float32."""
    chex.assert_type(cell, int)
    return jax.nn.one_hot(cell, maze.is_free.shape[0], dtype=jnp.float32)


def box_masks(height: int, width: int, *, side: int = 4) -> np.ndarray:
    """Returns every `side` x `side` box inside a grid, `[P, height * width]` float32.

    Raises:
      ValueError: if no box fits.
    """
    if not 1 <= side <= min(height, width):
        raise ValueError(f"a box of side {side} does not fit into {height}x{width}.")
    masks = []
    for top in range(height - side + 1):
        for left in range(width - side + 1):
            mask = np.zeros((height, width), np.float32)
            mask[top : top + side, left : left + side] = 1.0
            masks.append(mask.reshape(-1))
    return np.stack(masks)


def sample_reward(
    key: jax.Array, maze: Maze, boxes: jax.Array, *, num_boxes: int = 2
) -> jax.Array:
    """Samples a reward function: the sum of random boxes of +1.

    A box is drawn uniformly from those that hold a free cell; walls carry no reward.
    The boxes may overlap, and then their rewards add.

    Args:
      key: is consumed.
      maze: the maze.
      boxes: `[P, S]` float, as `box_masks` makes them.
      num_boxes: how many are added.

    Returns:
      `[S]` float32, the reward of reaching each cell.
    """
    chex.assert_rank(boxes, 2)
    chex.assert_equal_shape([boxes[0], maze.is_free])

    free = jnp.where(maze.is_free[None, :], boxes, 0.0)
    logits = jnp.where(jnp.any(free > 0, axis=1), 0.0, -jnp.inf)
    chosen = jax.random.categorical(key, logits, shape=(num_boxes,))
    return jnp.sum(free[chosen], axis=0)


def optimal_action_values(
    maze: Maze, reward: jax.Array, *, horizon: int, discount: float = 1.0
) -> jax.Array:
    """Computes the optimal action values of every number of steps to go.

        Q_1(s, a) = r(s'),   Q_h(s, a) = r(s') + discount * max_b Q_{h-1}(s', b)

    with s' the cell reached. At `discount` 1 the last row is exact for episodes of
    `horizon` steps, whose optimal policy depends on the steps left. With a discount
    and a long horizon it is value iteration's fixed point.

    Args:
      maze: the maze.
      reward: `[S]` float, the reward of reaching each cell.
      horizon: number of steps, at least 1.
      discount: in [0, 1].

    Returns:
      `[horizon, S, A]` float, row h being the values with h + 1 steps to go.
    """
    chex.assert_rank(reward, 1)
    chex.assert_equal_shape([reward, maze.is_free])

    def backup(value: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        action_values = (reward + discount * value)[maze.next_cell]  # [S, A]
        return jnp.max(action_values, axis=1), action_values

    _, values = jax.lax.scan(backup, jnp.zeros_like(reward), None, length=horizon)
    return values


def optimal_return(maze: Maze, reward: jax.Array, *, horizon: int) -> jax.Array:
    """Returns the best undiscounted return `[]` of an episode of `horizon` steps."""
    values = optimal_action_values(maze, reward, horizon=horizon)
    return jnp.max(values[-1, maze.start])


def policy_return(
    maze: Maze, policy: jax.Array, reward: jax.Array, *, horizon: int
) -> jax.Array:
    """Returns the expected undiscounted return `[]` of a stochastic policy, exactly.

    Args:
      maze: the maze.
      policy: `[S, A]` float, the probability of each action in each cell.
      reward: `[S]` float, the reward of reaching each cell.
      horizon: number of steps of an episode.
    """
    chex.assert_rank([policy, reward], [2, 1])
    chex.assert_equal_shape([policy, maze.next_cell])

    def backup(value: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.sum(policy * (reward + value)[maze.next_cell], axis=1), None

    value, _ = jax.lax.scan(backup, jnp.zeros_like(reward), None, length=horizon)
    return value[maze.start]


def random_return(maze: Maze, reward: jax.Array, *, horizon: int) -> jax.Array:
    """Returns the expected return `[]` of uniformly random actions."""
    policy = jnp.full(maze.next_cell.shape, 1.0 / NUM_ACTIONS, jnp.float32)
    return policy_return(maze, policy, reward, horizon=horizon)


def greedy_return(maze: Maze, action_values: jax.Array, reward: jax.Array) -> jax.Array:
    """Returns the return `[]` of acting greedily in a table of action values.

    Args:
      maze: the maze.
      action_values: `[T, S, A]` float, row h used with h + 1 steps to go: of a
        stationary policy the same table `T` times. The lowest action wins a tie.
      reward: `[S]` float, the reward of reaching each cell.
    """
    chex.assert_rank([action_values, reward], [3, 1])
    chex.assert_equal_shape([action_values[0], maze.next_cell])
    reward = jnp.asarray(reward)  # NumPy arrays take no traced index.

    def act(cell: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        cell = step(maze, cell, jnp.argmax(values[cell]))
        return cell, reward[cell]

    _, rewards = jax.lax.scan(act, maze.start, action_values[::-1])
    return jnp.sum(rewards)


def normalized_return(
    achieved: jax.Array, random: jax.Array, optimal: jax.Array
) -> jax.Array:
    """Returns (achieved - random) / (optimal - random), equal shapes; 1 is optimal."""
    chex.assert_equal_shape([achieved, random, optimal])
    return (achieved - random) / (optimal - random)
