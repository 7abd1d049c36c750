"""Draws the maze experiment's pictures from the contents of `maze.json`."""

import os
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

from aps_jax.scores import estimates

_COLOURS = {"aps": "#0b6e99", "visr": "#e08e0b", "apt": "#8a5ba6", "random": "#888888"}
_LABELS = {
    "aps": "APS",
    "visr": "VISR (skill only)",
    "apt": "entropy only",
    "random": "random",
}
_ARROWS = ((0, -1), (1, 0), (0, 1), (-1, 0))  # up, right, down, left: (x, y), y down.
_DOTS_PER_INCH = 100


def draw_all(result: dict[str, Any], folder: str) -> list[str]:
    """Draws every picture that the result has data for; returns the paths."""
    pictures: dict[str, Callable[[dict[str, Any]], matplotlib.figure.Figure]] = {
        "visits.png": draw_visits,
        "coverage.png": draw_coverage,
    }
    if trained_agents(result):
        pictures |= {
            "transfer.png": draw_transfer,
            "samples.png": draw_samples,
            "few_shot.png": draw_few_shot,
            "tasks.png": draw_tasks,
        }
    paths = []
    for name, draw in pictures.items():
        figure = draw(result)
        path = os.path.join(folder, name)
        figure.savefig(path, dpi=_DOTS_PER_INCH)
        plt.close(figure)
        paths.append(path)
    return paths


def trained_agents(result: dict[str, Any]) -> list[str]:
    """Returns the agents that were pretrained, in their order."""
    return [agent for agent in result["agents"] if agent in result["agent_weights"]]


def _runs(result: dict[str, Any], name: str, agent: str) -> list[dict[str, Any]]:
    return [r for r in result["runs"] if r["maze"] == name and r["agent"] == agent]


def _interval(scores: list[np.ndarray]) -> tuple[float, float, float]:
    """Returns the interquartile mean and the lengths of its error bar's halves."""
    value, low, high = estimates.bootstrap(
        estimates.interquartile_mean, scores, seed=0, num_resamples=2_000
    )
    if np.isnan(low):
        return float(value), 0.0, 0.0
    return float(value), float(value - low), float(high - value)


def _scores(
    result: dict[str, Any],
    names: list[str],
    agent: str,
    number: Callable[[dict[str, Any]], float],
) -> list[np.ndarray]:
    return [
        np.array([number(run) for run in _runs(result, name, agent)]) for name in names
    ]


def _finish(axes: plt.Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def draw_transfer(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """Draws zero-shot scores as bars, the bound of the inferred reward as a dash."""
    names, agents = list(result["mazes"]), trained_agents(result)
    groups = [("all mazes", names), *((name, [name]) for name in names)]
    figure, axes = plt.subplots(figsize=(11, 4), layout="constrained")
    width = 0.8 / len(agents)
    for index, agent in enumerate(agents):
        x = np.arange(len(groups)) + (index - (len(agents) - 1) / 2) * width
        bars = np.array(
            [
                _interval(
                    _scores(
                        result, group, agent, lambda r: r["zero_shot"]["improved"][-1]
                    )
                )
                for _, group in groups
            ]
        )
        bounds = [
            _interval(
                _scores(result, group, agent, lambda r: r["zero_shot"]["bound"][-1])
            )[0]
            for _, group in groups
        ]
        axes.bar(
            x,
            bars[:, 0],
            width,
            yerr=bars[:, 1:].T,
            capsize=2,
            color=_COLOURS[agent],
            label=_LABELS[agent],
        )
        axes.scatter(
            x,
            bounds,
            marker="_",
            s=250 * width,
            color="black",
            label="planning on the inferred reward" if index == 0 else None,
        )
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [label for label, _ in groups])
    axes.set_ylabel("zero-shot score\n(0 random play, 1 optimal)")
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.15))
    _finish(axes)
    return figure


def draw_samples(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """Draws zero-shot scores against the number of rewarded samples."""
    names, sizes = list(result["mazes"]), result["sample_sizes"]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for agent in trained_agents(result):
        points = np.array(
            [
                _interval(
                    _scores(
                        result,
                        names,
                        agent,
                        lambda r, index=index: r["zero_shot"]["improved"][index],
                    )
                )
                for index in range(len(sizes))
            ]
        )
        axes.errorbar(
            range(len(sizes)),
            points[:, 0],
            yerr=points[:, 1:].T,
            marker="o",
            capsize=3,
            color=_COLOURS[agent],
            label=_LABELS[agent],
        )
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.axhline(0.0, color="black", linewidth=0.8)
    labels = [f"{size}" if size != "all" else "all cells" for size in sizes]
    axes.set_xticks(range(len(sizes)), labels)
    axes.set_xlabel("visited cells whose reward is shown")
    axes.set_ylabel("zero-shot score, all mazes")
    axes.legend(frameon=False, loc="upper left")
    _finish(axes)
    return figure


def draw_coverage(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """Draws the share of cells reached and the entropy of visits over pretraining."""
    steps_per_iteration = (
        result["agent_config"]["num_envs"] * result["agent_config"]["episode_length"]
    )
    figure, both = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axes, field, label in zip(
        both,
        ("cells_reached", "visit_entropy"),
        ("share of cells reached", "entropy of visits / uniform"),
        strict=True,
    ):
        for agent in result["agents"]:
            runs = [run for run in result["runs"] if run["agent"] == agent]
            curves = np.array([run[field] for run in runs])
            x = steps_per_iteration * np.array(runs[0]["coverage_iterations"])
            middle = curves.mean(axis=0)
            low, high = np.percentile(curves, [10, 90], axis=0)
            axes.plot(x, middle, color=_COLOURS[agent], label=_LABELS[agent])
            axes.fill_between(x, low, high, color=_COLOURS[agent], alpha=0.12)
        axes.set_xscale("log")
        # Names of the powers of ten alone would be one; those of all steps overlap.
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlabel("agent steps of pretraining")
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.05)
        _finish(axes)
    both[0].set_title("mean, 10th to 90th percentile of runs", fontsize=9)
    both[1].legend(frameon=False, loc="lower right")
    return figure


def draw_few_shot(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """Draws scores against steps of reward seen, pretrained and from scratch."""
    names = list(result["mazes"])
    length = result["agent_config"]["episode_length"]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")

    def draw(curves: list[np.ndarray], colour: str, label: str) -> None:
        curves = np.stack(curves)  # [G, R, F + 1]
        points = np.array(
            [_interval(list(curves[..., t])) for t in range(curves.shape[-1])]
        )
        x = length * np.arange(len(points))
        axes.plot(x, points[:, 0], color=colour, label=label)
        axes.fill_between(
            x,
            points[:, 0] - points[:, 1],
            points[:, 0] + points[:, 2],
            color=colour,
            alpha=0.2,
        )

    for agent in trained_agents(result):
        draw(
            [
                np.array([run["few_shot"] for run in _runs(result, name, agent)])
                for name in names
            ],
            _COLOURS[agent],
            _LABELS[agent],
        )
    draw(
        [np.array(result["mazes"][name]["few_shot_scratch"]) for name in names],
        "black",
        "from scratch",
    )
    inference = result["test_config"]["few_shot_inference_episodes"] * length
    axes.axvline(inference, color="black", linewidth=0.8, linestyle=":")
    axes.text(inference, -0.1, " task inferred", fontsize=8)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("agent steps with reward")
    axes.set_ylabel("score, all mazes")
    axes.legend(frameon=False, loc="lower right")
    _finish(axes)
    return figure


def _walls(rows: list[str]) -> np.ndarray:
    return np.array([[char == "#" for char in row] for row in rows])


def _draw_grid(axes: plt.Axes, rows: list[str], values: np.ndarray, **options) -> None:
    """Draws values `[S]` over the maze, its walls black and its start outlined."""
    walls = _walls(rows)
    grid = np.ma.masked_array(np.reshape(values, walls.shape), walls)
    colours = matplotlib.colormaps[options.pop("cmap")].with_extremes(bad="#222222")
    axes.imshow(grid, cmap=colours, **options)
    row, column = next((r, t.index("S")) for r, t in enumerate(rows) if "S" in t)
    axes.add_patch(
        plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, color="red")
    )
    axes.set_xticks([])
    axes.set_yticks([])


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
            share = visits / visits.sum()
            _draw_grid(
                axes,
                result["mazes"][name]["map"],
                np.log10(np.maximum(share, 1e-5)),
                cmap="viridis",
                vmin=-5,
                vmax=-1,
            )
        row[0].set_ylabel(_LABELS[agent], fontsize=9)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=9)
    figure.colorbar(
        grid[0, 0].images[0], ax=grid, shrink=0.6, label="log10 share of visits"
    )
    return figure


def draw_tasks(result: dict[str, Any]) -> matplotlib.figure.Figure:
    """Draws a reward, what the first agent inferred of it, and its greedy actions."""
    names, agent = list(result["mazes"]), trained_agents(result)[0]
    figure, grid = plt.subplots(
        2,
        len(names),
        figsize=(1.9 * len(names), 4.4),
        layout="constrained",
        squeeze=False,
    )
    for column, name in zip(grid.T, names, strict=True):
        rows = result["mazes"][name]["map"]
        example = _runs(result, name, agent)[0]["example"]
        options = {"cmap": "magma", "vmin": -0.3, "vmax": 1.5}
        _draw_grid(column[0], rows, np.array(example["reward"]), **options)
        _draw_grid(column[1], rows, np.array(example["inferred"]), **options)
        for cell, action in enumerate(example["policy"]):
            y, x = divmod(cell, len(rows[0]))
            if rows[y][x] != "#":
                dx, dy = _ARROWS[action]
                column[1].arrow(
                    x - 0.25 * dx,
                    y - 0.25 * dy,
                    0.3 * dx,
                    0.3 * dy,
                    head_width=0.25,
                    linewidth=0.5,
                    color="white",
                )
        column[0].set_title(name, fontsize=9)
        column[1].set_title(f"score {example['score']:.2f}", fontsize=9)
    grid[0, 0].set_ylabel("true reward", fontsize=9)
    grid[1, 0].set_ylabel(f"{_LABELS[agent]}: inferred, policy", fontsize=9)
    return figure
