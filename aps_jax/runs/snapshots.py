"""States visited over pretraining, as the agent embeds them, kept for pictures.

At every row of metrics a file of states drawn from the replay is written. Letters: `N`
states, `D` dimensions.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

FOLDER_NAME = "features"


class Snapshot(NamedTuple):
    """Visited states of one moment of pretraining."""

    agent_steps: int
    arrays: dict[str, np.ndarray]  # each [N, D] float32, as `Agent.embed` names them


def write_snapshot(
    workdir: pathlib.Path, agent_steps: int, visited: Mapping[str, np.ndarray]
) -> None:
    """Writes `features/STEPS.npz` of arrays `[N, D]` float16, if there are any."""
    if not visited:
        return
    folder = workdir / FOLDER_NAME
    folder.mkdir(exist_ok=True)
    arrays: dict[str, Any] = dict(visited)
    np.savez(folder / f"{agent_steps:012d}.npz", **arrays)


def read_snapshots(workdir: pathlib.Path) -> list[Snapshot]:
    """Reads a pretraining's snapshots in the order of training; none if it has none."""
    snapshots = []
    for path in sorted((workdir / FOLDER_NAME).glob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name].astype(np.float32) for name in arrays}
        snapshots.append(Snapshot(int(path.stem), found))
    return snapshots
