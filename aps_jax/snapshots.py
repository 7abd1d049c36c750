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

from aps_jax import agent as agent_lib
from aps_jax import devices, hosts, loop, replay, types

FOLDER_NAME = "features"
_NUM_STATES = 256


class Snapshot(NamedTuple):
    """Visited states of one moment of pretraining."""

    agent_steps: int
    phi: np.ndarray  # [N, D] float32, unit.
    task: np.ndarray  # [N, D] float32, unit, of the behaviour in that state.


class SnapshotWriter:
    """Writes `features/STEPS.npy`, `[2, N, D]` float16: phi and tasks."""

    def __init__(
        self,
        workdir: pathlib.Path,
        agent: agent_lib.Agent,
        ring: replay.Replay,
        key: types.PRNGKey,
        warn: Callable[[str], None],
        mesh: devices.Mesh = None,
    ):
        """Writes nothing yet.

        Args:
          workdir: Folder of the pretraining, which exists.
          agent: Whose features they are.
          ring: The replay to draw from.
          key: Key of a stream that nothing else uses.
          warn: Is told of a snapshot that could not be written: pictures are no reason
            to end a run.
          mesh: The devices that hold the replay.
        """
        self._folder = workdir / FOLDER_NAME
        self._warn = warn
        draw = loop.make_draw(
            ring,
            num_windows=devices.round_up(_NUM_STATES, mesh),
            num_states=1,
            mesh=mesh,
        )

        def sample(
            params: types.Params, replay_state: replay.ReplayState, agent_steps: int
        ) -> jax.Array:
            windows = draw(replay_state, jax.random.fold_in(key, agent_steps))
            phi = agent.features(params, windows.observation[:, 0]).phi
            return jnp.stack([phi, windows.task[:, 0]]).astype(jnp.float16)

        self._sample = jax.jit(sample, out_shardings=devices.sharding(mesh))

    def write(self, session: loop.Session, params: types.Params) -> None:
        """Writes the snapshot of a session that has played a few steps.

        Args:
          session: Whose replay holds the states.
          params: Its parameters, calibrated.
        """
        steps = session.agent_steps
        number = devices.put(np.int32(steps), session.mesh)
        sampled = self._sample(params, session.memory.replay, number)
        if not hosts.is_first():
            return
        try:
            self._folder.mkdir(exist_ok=True)
            np.save(self._folder / f"{steps:012d}.npy", jax.device_get(sampled))
        except OSError as error:
            self._warn(f"no feature snapshot at agent step {steps:,}: {error}.")


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
