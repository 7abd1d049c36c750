"""Samples of the features visited over pretraining, kept for pictures.

At every row of metrics a file of states drawn from the replay is written: where on the
sphere they lie, and under which task they were reached. Letters: `N` states, `D` feature
dimension.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aps_jax import types
from aps_jax.agents import aps as agent_lib
from aps_jax.parallel import devices
from aps_jax.replay import buffer
from aps_jax.train import loop

FOLDER_NAME = "features"
_NUM_STATES = 256


class Snapshot(NamedTuple):
    """Visited states of one moment of pretraining."""

    agent_steps: int
    phi: np.ndarray  # [N, D] float32, unit.
    task: np.ndarray  # [N, D] float32, unit, of the behaviour in that state.


Visit = Callable[[types.Params, buffer.ReplayState, jax.Array], jax.Array]


def make_visit(
    agent: agent_lib.Agent,
    ring: buffer.Replay,
    key: types.PRNGKey,
    mesh: devices.Mesh = None,
) -> Visit:
    """Makes the jitted function that draws a snapshot from the replay.

    Args:
      agent: Whose features they are.
      ring: The replay to draw from.
      key: Key of a stream that nothing else uses.
      mesh: The devices that hold the replay.

    Returns:
      `visit(params, replay_state, agent_steps)` returns `[2, N, D]` float16, phi and
      tasks; the parameters are calibrated, and the steps number the draw.
    """
    draw = loop.make_draw(
        ring,
        num_windows=devices.round_up(_NUM_STATES, mesh),
        num_states=1,
        mesh=mesh,
    )

    def visit(
        params: types.Params, replay_state: buffer.ReplayState, agent_steps: jax.Array
    ) -> jax.Array:
        windows = draw(replay_state, jax.random.fold_in(key, agent_steps))
        phi = agent.features(params, windows.observation[:, 0]).phi
        return jnp.stack([phi, windows.task[:, 0]]).astype(jnp.float16)

    return jax.jit(visit, out_shardings=devices.sharding(mesh))


def write_snapshot(
    workdir: pathlib.Path, agent_steps: int, visited: np.ndarray
) -> None:
    """Writes `features/STEPS.npy`.

    Args:
      workdir: Folder of the pretraining, which exists.
      agent_steps: When it was drawn.
      visited: `[2, N, D]` float16, from `make_visit`.

    Raises:
      OSError: It cannot be written.
    """
    folder = workdir / FOLDER_NAME
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{agent_steps:012d}.npy", visited)


def read_snapshots(workdir: pathlib.Path) -> list[Snapshot]:
    """Reads a pretraining's snapshots in the order of training; none if it has none."""
    snapshots = []
    for path in sorted((workdir / FOLDER_NAME).glob("*.npy")):
        phi, task = np.load(path, allow_pickle=False).astype(np.float32)
        snapshots.append(Snapshot(int(path.stem), phi, task))
    return snapshots


def plane_of(phi: np.ndarray) -> np.ndarray:
    """Finds the plane in which features vary most: their first principal directions.

    Points of the unit sphere, projected onto it at right angles, lie in the unit disc;
    its edge is the sphere's outline. With 2 dimensions nothing is lost.

    Args:
      phi: `[N, D]` float, `D` at least 1.

    Returns:
      `[D, 2]` float64, orthonormal columns (the second is 0 where `D` is 1), with their
      largest component positive, so that the same data give the same picture.
    """
    centred = np.float64(phi) - np.mean(phi, axis=0, dtype=np.float64)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    plane = np.zeros((phi.shape[1], 2))
    for index, direction in enumerate(directions[:2]):
        largest = direction[np.argmax(np.abs(direction))]
        plane[:, index] = direction * np.sign(largest)
    return plane
