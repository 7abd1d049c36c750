"""Draws the maze experiment's pictures from the contents of `maze.json`."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

from aps_jax.scores import estimates

_STYLES = {
    "aps": ("#0b6e99", "APS"),
    "visr": ("#e08e0b", "VISR (skill only)"),
    "entropy": ("#8a5ba6", "entropy only"),
    "random": ("#888888", "random"),
}
_ARROWS = ((0, -1), (1, 0), (0, 1), (-1, 0))  # up, right, down, left: (x, y), y down.
_DOTS_PER_INCH = 100

_Number = Callable[[dict[str, Any]], float]  # Of a run.


def draw_all(result: dict[str, Any], folder: pathlib.Path) -> None:
    """Draws every picture that the result has data for."""
    pictures: dict[str, Callable[[dict[str, Any]], matplotlib.figure.Figure]] = {
        "visits.png": draw_visits,
        "coverage.png": draw_coverage,
    }
    if result["agent_weights"]:
        pictures |= {
            "transfer.png": draw_transfer,
            "samples.png": draw_samples,
            "few_shot.png": draw_few_shot,
            "tasks.png": draw_tasks,
        }
    for name, draw in pictures.items():
        figure = draw(result)
        figure.savefig(folder / name, dpi=_DOTS_PER_INCH)
        plt.close(figure)


def _runs(result: dict[str, Any], name: str, agent: str) -> list[dict[str, Any]]:
    return [r for r in result["runs"] if r["maze"] == name and r["agent"] == agent]


def _interval(scores: Sequence[np.ndarray]) -> list[float]:
    """Returns the interquartile mean and the lengths of its error bar's halves."""
    value, low, high = estimates.bootstrap(
        estimates.interquartile_mean, scores, seed=0, num_resamples=2_000
    )
    return [float(value), *np.nan_to_num([value - low, high - value])]


def _intervals(
    result: dict[str, Any], names: Sequence[str], agent: str, *numbers: _Number
) -> np.ndarray:
    """Returns the interval of each number of an agent's runs, `[N, 3]`."""
    return np.array(
        [
            _interval(
                [
                    np.array([number(run) for run in _runs(result, name, agent)])
                    for name in names
                ]
            )
            for number in numbers
        ]
    )


def _zero_shot(field: str, index: int) -> _Number:
    return lambda run: run["zero_shot"][field][index]


def _axes(**options: Any) -> tuple[matplotlib.figure.Figure, plt.Axes]:
    """Makes a figure of scores, with a line at the optimum."""
    figure, axes = plt.subplots(layout="constrained", **options)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_transfer(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """Draws zero-shot scores as bars, the bound of the inferred reward as a dash."""
    names, agents = list(result["mazes"]), list(result["agent_weights"])
    groups = {"all mazes": names, **{name: [name] for name in names}}
    figure, axes = _axes(figsize=(11, 4))
    width = 0.8 / len(agents)
    numbers = _zero_shot("improved", -1), _zero_shot("bound", -1)
    for index, agent in enumerate(agents):
        x = np.arange(len(groups)) + (index - (len(agents) - 1) / 2) * width
        bars, bounds = np.stack(
            [_intervals(result, group, agent, *numbers) for group in groups.values()],
            axis=1,
        )
        colour, label = _STYLES[agent]
        error: dict[str, Any] = {"yerr": bars[:, 1:].T, "capsize": 2}
        axes.bar(x, bars[:, 0], width, color=colour, label=label, **error)
        name = "planning on the inferred reward" if index == 0 else None
        dash: dict[str, Any] = {"marker": "_", "s": 250 * width, "color": "black"}
        axes.scatter(x, bounds[:, 0], label=name, **dash)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel("zero-shot score\n(0 random play, 1 optimal)")
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.15))
    return figure


def draw_samples(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """Draws zero-shot scores against the number of rewarded samples."""
    names, sizes = list(result["mazes"]), result["sample_sizes"]
    figure, axes = _axes(figsize=(6, 4))
    numbers = [_zero_shot("improved", index) for index in range(len(sizes))]
    for agent in result["agent_weights"]:
        points = _intervals(result, names, agent, *numbers)
        colour, label = _STYLES[agent]
        error: dict[str, Any] = {"yerr": points[:, 1:].T, "capsize": 3, "marker": "o"}
        axes.errorbar(
            range(len(sizes)), points[:, 0], color=colour, label=label, **error
        )
    axes.set_xticks(
        range(len(sizes)), [str(s).replace("all", "all cells") for s in sizes]
    )
    axes.set_xlabel("visited cells whose reward is shown")
    axes.set_ylabel("zero-shot score, all mazes")
    axes.legend(frameon=False, loc="lower right")
    return figure


def draw_coverage(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """Draws the share of cells reached and the entropy of visits over pretraining."""
    config = result["agent_config"]
    steps_per_iteration = config["num_envs"] * config["episode_length"]
    figure, both = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    fields = {
        "cells_reached": "share of cells reached",
        "visit_entropy": "entropy of visits / uniform",
    }
    for axes, (field, label) in zip(both, fields.items(), strict=True):
        for agent in result["agents"]:
            runs = [run for run in result["runs"] if run["agent"] == agent]
            curves = np.array([run[field] for run in runs])
            x = steps_per_iteration * np.array(runs[0]["coverage_iterations"])
            colour, name = _STYLES[agent]
            axes.plot(x, curves.mean(axis=0), color=colour, label=name)
            low, high = np.percentile(curves, [10, 90], axis=0)
            axes.fill_between(x, low, high, color=colour, alpha=0.12)
        axes.set_xscale("log")
        # Names of the powers of ten alone would be one; those of all steps overlap.
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlabel("agent steps of pretraining")
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.05)
    both[0].set_title("mean, 10th to 90th percentile of runs", fontsize=9)
    both[1].legend(frameon=False, loc="lower right")
    return figure


def draw_few_shot(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """Draws scores against steps of reward seen, pretrained and from scratch."""
    names = list(result["mazes"])
    length = result["agent_config"]["episode_length"]
    figure, axes = _axes(figsize=(6, 4))
    curves = {
        _STYLES[agent]: [
            np.array([run["few_shot"] for run in _runs(result, name, agent)])
            for name in names
        ]
        for agent in result["agent_weights"]
    }
    curves["black", "from scratch"] = [
        np.array(result["mazes"][name]["few_shot_scratch"]) for name in names
    ]
    for (colour, label), by_maze in curves.items():
        episodes = np.arange(by_maze[0].shape[-1])
        points = np.array([_interval([c[:, t] for c in by_maze]) for t in episodes])
        value, low, high = points.T
        axes.plot(length * episodes, value, color=colour, label=label)
        axes.fill_between(
            length * episodes, value - low, value + high, color=colour, alpha=0.2
        )
    inference = result["test_config"]["few_shot_inference_episodes"] * length
    axes.axvline(inference, color="black", linewidth=0.8, linestyle=":")
    axes.text(inference, -0.1, " task inferred", fontsize=8)
    axes.set_xlabel("agent steps with reward")
    axes.set_ylabel("score, all mazes")
    axes.legend(frameon=False, loc="lower right")
    return figure


def _draw_grid(
    axes: plt.Axes, rows: Sequence[str], values: Any, *, low: float, high: float
) -> Any:
    """Draws values `[S]` over the maze, its walls black and its start outlined."""
    walls = np.array([[char == "#" for char in row] for row in rows])
    grid = np.ma.masked_array(np.reshape(values, walls.shape), walls)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#222222")
    image = axes.imshow(grid, cmap=colours, vmin=low, vmax=high)
    row, column = next((r, t.index("S")) for r, t in enumerate(rows) if "S" in t)
    corner = (column - 0.5, row - 0.5)
    axes.add_patch(plt.Rectangle(corner, 1, 1, fill=False, color="red"))
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def draw_visits(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """Draws where each agent went while pretraining, on a logarithmic scale."""
    names, agents = list(result["mazes"]), result["agents"]
    figure, grid = plt.subplots(
        len(agents),
        len(names),
        figsize=(1.7 * len(names) + 0.6, 1.8 * len(agents) + 0.3),
        layout="constrained",
        squeeze=False,
    )
    for row, agent in zip(grid, agents, strict=True):
        for axes, name in zip(row, names, strict=True):
            visits = np.sum([r["visits"] for r in _runs(result, name, agent)], axis=0)
            share = np.log10(np.maximum(visits / visits.sum(), 1e-5))
            rows = result["mazes"][name]["map"]
            image = _draw_grid(axes, rows, share, low=-5, high=-1)
        row[0].set_ylabel(_STYLES[agent][1], fontsize=9)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=9)
    figure.colorbar(image, ax=grid, shrink=0.6, label="log10 share of visits")
    return figure


def draw_tasks(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """Draws a reward, what the first agent inferred of it, and its greedy actions."""
    names, agent = list(result["mazes"]), next(iter(result["agent_weights"]))
    size = (1.9 * len(names), 4.4)
    figure, grid = plt.subplots(
        2, len(names), figsize=size, layout="constrained", squeeze=False
    )
    for (above, below), name in zip(grid.T, names, strict=True):
        rows = result["mazes"][name]["map"]
        example = _runs(result, name, agent)[0]["example"]
        _draw_grid(above, rows, example["reward"], low=-0.3, high=1.5)
        _draw_grid(below, rows, example["inferred"], low=-0.3, high=1.5)
        for cell, action in enumerate(example["policy"]):
            y, x = divmod(cell, len(rows[0]))
            if rows[y][x] != "#":
                dx, dy = _ARROWS[action]
                tail, arrow = (x - 0.25 * dx, y - 0.25 * dy), (0.3 * dx, 0.3 * dy)
                style = {"head_width": 0.25, "linewidth": 0.5, "color": "white"}
                below.arrow(*tail, *arrow, **style)
        above.set_title(name, fontsize=9)
        below.set_title(f"score {example['score']:.2f}", fontsize=9)
    grid[0, 0].set_ylabel("true reward", fontsize=9)
    grid[1, 0].set_ylabel(f"{_STYLES[agent][1]}: inferred, policy", fontsize=9)
    return figure
