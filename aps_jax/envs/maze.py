"""Mazes: maps, exact values by value iteration, and an environment like gymnax's.

A maze is a table of transitions between states, so that every return in it can be
computed exactly. A state is a cell; in a map with a key it is a cell without the key or
with it. Reward is 1 for each step that reaches a goal state: one at most two steps from
the state that is farthest from the start. Letters: `S` cells (row-major), `K` = 2 in a
map with a key, else 1, `N = K S` states (without the key first), `A` = 4 actions (up,
right, down, left).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.types import ObservationSpec

NUM_ACTIONS = 4
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left: (row, column).
_WALL, _FREE, _START, _KEY, _DOOR = "#", ".", "S", "K", "D"
_PICTURE_SIDE = 84
_GREY = {_WALL: 64, _DOOR: 128, _KEY: 192}
_GOAL_DISTANCE = 2  # steps from the farthest state within which a state is a goal

# Each 10x10, connected, with every free cell within 35 steps of the start.
_SMALL = """
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
# Each 20x20, every state within 208 steps of the start. A door is a wall without key.
_LARGE = """
snake                labyrinth            chambers             locked
S................... S..#...#.....#.....# S........#....#..... S#.......#.#.......#
###################. ##.#.###.#.###.#.### ....#....#.......... .#.#####.#.#.#.#####
.................... .#.#.....#.#...#...# ....#....#....#..... ...#.....#.#.#.....#
.################### .#.#.#####.#.#####.# ....#.........#..... ####.#####.#######.#
.................... .#.#...#...#.#...#.# #################.## ...#.#...#.#.....#.#
###################. .#.###.#.###.#.#.#.# ....#.........#..... .###.#.#.#.#.###.#.#
.................... ...#...#.....#.#.#.# ....#....#....#..... ...#...#.#...#...#.#
.################### .###.#########.#.#.# .........#....#..... ##.#####.#####.###.#
.................... .#.......#...#.#...# ....#....#.......... .......#.D...#...#.#
###################. .#######.#.#.#.###.# #.################## .#####.#.###.###.#.#
.................... .....#.....#.#.#...# ....#.........#..... .#K....#.#.....#...#
.################### ####.#########.#.### ....#....#.......... .#######.#.#######.#
.................... ...#.......#...#...# ....#....#....#..... .....#...#.#.....#.#
###################. .#########.#.####### .........#....#..... .###.#.###.#.#.#.#.#
.................... .......#...#.......# ##################.# .#...#...#.#.#.#.#.#
.################### .#.#####.#########.# ....#....#.......... .#.#.###.#.#.#.###.#
.................... .#.#.....#.....#...# ....#....#....#..... .#.#...#.#.#.#.#...#
###################. .#.#.#######.#.#.#.# ....#.........#..... .#.#####.#.#.#.#.###
.................... .#...........#...#.# .........#....#..... .#.......#...#.....#
#################### #################### ....#....#....#..... ####################
"""


def _read_maps(picture: str) -> dict[str, tuple[str, ...]]:
    columns = zip(*(line.split() for line in picture.split("\n")[1:-1]), strict=True)
    return {name: tuple(rows) for name, *rows in columns}


SMALL, LARGE = _read_maps(_SMALL), _read_maps(_LARGE)
MAPS = {**SMALL, **LARGE}
# Agent steps of an episode: about a seventh more than the farthest state needs, and in
# large maps some more.
HORIZONS = {**dict.fromkeys(SMALL, 40), **dict.fromkeys(LARGE, 300)}


class Maze(NamedTuple):
    """The tables of one maze, on the host; all states have rows, reachable or not."""

    rows: tuple[str, ...]  # the map
    start: int  # the state in which every episode begins
    next_state: np.ndarray  # [N, A] int32, the state reached; bumping stays put
    distance: np.ndarray  # [N] int32, steps from the start, -1 where there is no way
    reward: np.ndarray  # [N] float32, of reaching each state


def parse_maze(rows: Sequence[str]) -> Maze:
    """Reads a map of `#` walls, `.` free cells, one `S`, and a key `K` with a door `D`.

    Raises:
      ValueError: The map is not a rectangle, has other characters or several starts, a
        key without a door or the reverse, or a free cell that cannot be reached.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"A map needs rows of one length, got lengths {sorted(lengths)}."
        )
    cells = np.array([list(row) for row in rows])
    unknown = sorted(set("".join(rows)) - {_WALL, _FREE, _START, _KEY, _DOOR})
    if unknown:
        raise ValueError(f"A map is made of '#', '.', 'S', 'K' and 'D', got {unknown}.")
    starts, keys = np.flatnonzero(cells == _START), np.flatnonzero(cells == _KEY)
    if len(starts) != 1:
        raise ValueError(f"A map needs exactly one start 'S', got {len(starts)}.")
    if len(keys) > 1 or bool(len(keys)) != (_DOOR in cells):
        raise ValueError("A map has one key 'K' and doors 'D', or neither.")

    table = np.empty((1 + len(keys), *cells.shape, NUM_ACTIONS), np.int32)
    for has_key, row, column, action in np.ndindex(table.shape):
        to_row, to_column = np.add((row, column), _MOVES[action])
        inside = 0 <= to_row < cells.shape[0] and 0 <= to_column < cells.shape[1]
        closed = (_WALL,) if has_key else (_WALL, _DOOR)
        if not inside or cells[to_row, to_column] in closed:
            to_row, to_column = row, column
        holds_key = has_key or cells[to_row, to_column] == _KEY
        cell = to_row * cells.shape[1] + to_column
        table[has_key, row, column, action] = holds_key * cells.size + cell
    next_state, start = table.reshape(-1, NUM_ACTIONS), int(starts[0])

    distance = _distances(next_state, start)
    is_reached = (distance.reshape(-1, cells.size) >= 0).any(axis=0)
    num_free = int((cells != _WALL).sum())
    if is_reached.sum() < num_free:
        raise ValueError(
            f"Only {is_reached.sum()} of {num_free} free cells are reachable."
        )
    from_goal = _distances(next_state, int(distance.argmax()))
    is_goal = (from_goal >= 0) & (from_goal <= _GOAL_DISTANCE)
    return Maze(tuple(rows), start, next_state, distance, is_goal.astype(np.float32))


def _distances(next_state: np.ndarray, start: int) -> np.ndarray:
    """Returns the steps `[N]` int32 from a state to each, -1 where there is no way."""
    distance = np.full(len(next_state), -1, np.int32)
    frontier, steps = {start}, 0
    while frontier:
        distance[sorted(frontier)] = steps
        reached = {int(state) for state in next_state[sorted(frontier)].ravel()}
        frontier = {state for state in reached if distance[state] < 0}
        steps += 1
    return distance


def optimal_action_values(maze: Maze, *, horizon: int) -> np.ndarray:
    """Computes the optimal action values of every number of steps to go.

        Q_1(s, a) = r(s'),   Q_h(s, a) = r(s') + max_b Q_{h-1}(s', b)

    with s' the state reached: value iteration, exact for episodes of `horizon` steps.

    Returns:
      `[horizon, N, A]` float64, row h being the values with h + 1 steps to go.
    """
    value, rows = np.zeros(len(maze.reward)), []
    for _ in range(horizon):
        rows.append((maze.reward + value)[maze.next_state])
        value = rows[-1].max(axis=1)
    return np.stack(rows)


def optimal_return(maze: Maze, *, horizon: int) -> float:
    """Returns the best return of an episode of `horizon` steps."""
    return float(optimal_action_values(maze, horizon=horizon)[-1, maze.start].max())


def random_return(maze: Maze, *, horizon: int) -> float:
    """Returns the expected return of `horizon` uniformly random actions."""
    value = np.zeros(len(maze.reward))
    for _ in range(horizon):
        value = (maze.reward + value)[maze.next_state].mean(axis=1)
    return float(value[maze.start])


@flax.struct.dataclass
class MazeState:
    """Where one environment stands."""

    place: jax.Array  # [] int32, the state of the maze
    time: jax.Array  # [] int32, steps of the episode


@flax.struct.dataclass
class MazeParams:
    """What gymnax calls parameters."""

    max_steps_in_episode: int


class MazeEnvironment:
    """A maze in gymnax's interface, for one environment; nothing in it is random.

    Observations are one-hot, `[H, W, K]`, or pictures `[84, 84]` of grey squares: walls
    64, the door 128, the key 192, the agent 255. Episodes end by the time limit alone.
    """

    num_actions = NUM_ACTIONS

    def __init__(self, maze: Maze, *, has_pictures: bool):
        """Binds a maze to how it is shown."""
        self._maze = maze
        self._has_pictures = has_pictures
        cells = np.array([list(row) for row in maze.rows])
        self._shape = (len(maze.next_state) // cells.size, *cells.shape)  # K, H, W
        side = _PICTURE_SIDE // max(cells.shape)
        grey = np.select([cells == c for c in _GREY], list(_GREY.values()), 0)
        levels = np.stack([grey, np.where(np.isin(cells, (_KEY, _DOOR)), 0, grey)])
        self._squares = np.arange(_PICTURE_SIDE) // side  # row or column of each pixel
        places = np.minimum(self._squares, max(cells.shape))
        margin = [(0, 0), *((0, max(cells.shape) + 1 - n) for n in cells.shape)]
        padded = np.pad(levels, margin, constant_values=_GREY[_WALL])
        self._pictures = padded[:, places[:, None], places].astype(np.uint8)

    @property
    def observation(self) -> ObservationSpec:
        """What is shown of a state."""
        height, width = self._shape[1:]
        pixels = (_PICTURE_SIDE, _PICTURE_SIDE)
        planes = (height, width, self._shape[0])
        return ObservationSpec(pixels if self._has_pictures else planes, 1, 1)

    def reset_env(
        self, key: jax.Array, params: MazeParams
    ) -> tuple[jax.Array, MazeState]:
        """Begins an episode; returns an observation and the state."""
        del key, params
        state = MazeState(jnp.int32(self._maze.start), jnp.int32(0))
        return self._observe(state.place), state

    def step_env(
        self, key: jax.Array, state: MazeState, action: jax.Array, params: MazeParams
    ) -> tuple[jax.Array, MazeState, jax.Array, jax.Array, dict[str, Any]]:
        """Moves; returns observation, state, reward, whether it is terminal, and {}."""
        del key, params
        place = jnp.asarray(self._maze.next_state)[state.place, action]
        state = MazeState(place, state.time + 1)
        reward = jnp.asarray(self._maze.reward)[place]
        return self._observe(place), state, reward, jnp.bool_(False), {}

    def is_truncated(self, state: MazeState, params: MazeParams) -> jax.Array:
        """Returns whether the time is up."""
        return state.time >= params.max_steps_in_episode

    def observe_all(self) -> jax.Array:
        """Returns what every state of the tables shows, `[N, *frame_shape]` uint8."""
        return jax.vmap(self._observe)(jnp.arange(len(self._maze.next_state)))

    def draw(self, place: jax.Array) -> jax.Array:
        """Draws a state, `[84, 84]` uint8."""
        num_cells = self._shape[1] * self._shape[2]
        row, column = jnp.divmod(place % num_cells, self._shape[2])
        squares = jnp.asarray(self._squares)
        is_agent = (squares == row)[:, None] & (squares == column)[None, :]
        return jnp.where(
            is_agent,
            jnp.uint8(255),
            jnp.asarray(self._pictures)[place // num_cells],
        )

    def _observe(self, place: jax.Array) -> jax.Array:
        if self._has_pictures:
            return self.draw(place)
        hot = jnp.arange(len(self._maze.next_state)) == place
        return jnp.moveaxis(hot.reshape(self._shape), 0, -1).astype(jnp.uint8)
