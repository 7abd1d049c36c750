"""Pictures of a study in mazes: where agents went, and how they learned."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure as mpl_figure

from aps_jax.envs import maze

# By the maze and the arm.
Key = tuple[str, str]


def save_heat_maps(path: pathlib.Path, visits: Mapping[Key, np.ndarray]) -> None:
    """Draws a map for each maze (row) and arm (column): the logarithm of visits.

    Walls are grey, what was never visited is black. Visits with and without a key are
    summed.

    Args:
      path: Of the PNG.
      visits: `[N]` counts of the states of a maze.
    """
    mazes = list(dict.fromkeys(name for name, _ in visits))
    arms = list(dict.fromkeys(arm for _, arm in visits))
    figure, axes = _grid(len(mazes), len(arms), 1.6)
    for (name, arm), counts in visits.items():
        own = axes[mazes.index(name)][arms.index(arm)]
        cells = np.array([list(row) for row in maze.MAPS[name]])
        summed = counts.reshape(-1, *cells.shape).sum(axis=0)
        shares = np.log10(1.0 + summed)
        own.imshow(np.where(cells == "#", np.nan, shares), cmap="magma", vmin=0.0)
        own.set_facecolor("grey")
        reached = int((summed > 0).sum())
        num_cells = int((cells != "#").sum())
        own.set_title(f"{name}, {arm}: {reached} of {num_cells}", size=5)
        own.set_xticks([])
        own.set_yticks([])
    figure.savefig(path, dpi=130)


def save_curves(
    path: pathlib.Path, curves: Mapping[Key, Sequence[Mapping[str, Any]]], column: str
) -> None:
    """Draws a column of `metrics.csv` over agent steps: means over seeds, and ranges.

    Args:
      path: Of the PNG.
      curves: Of each seed its columns `agent_steps` and `column`.
      column: What is drawn.
    """
    mazes = list(dict.fromkeys(name for name, _ in curves))
    figure, axes = _grid(1, len(mazes), 3.2)
    for (name, arm), seeds in curves.items():
        own = axes[0][mazes.index(name)]
        steps = np.asarray(seeds[0]["agent_steps"])
        values = np.array([seed[column] for seed in seeds])
        (line,) = own.plot(
            steps, values.mean(axis=0), label=arm, linewidth=1.2, marker="."
        )
        own.fill_between(
            steps,
            values.min(axis=0),
            values.max(axis=0),
            color=line.get_color(),
            alpha=0.15,
        )
        own.set_title(name, size=8)
        own.set_xlabel("agent steps")
    axes[0][0].set_ylabel(column.replace("_", " "))
    axes[0][-1].legend(fontsize=6)
    figure.savefig(path, dpi=130)


def _grid(rows: int, columns: int, inches: float) -> tuple[Any, Any]:
    """Returns a figure and its axes `[rows][columns]`, each of that side."""
    size = (inches * columns, inches * rows)
    figure = mpl_figure.Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
