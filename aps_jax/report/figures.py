"""Draws a report: aggregates and learning curves.

The runs of the report carry colour; published systems stay grey, so that a picture
shows at a glance what is new in it.
"""

import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import figure as mpl_figure
from matplotlib import ticker

from aps_jax.report import aggregates, finished_runs, run_pictures, tables
from aps_jax.scores import estimates, scores

# Okabe and Ito's colours, told apart by every reader; https://jfly.uni-koeln.de/color/.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY, _LIGHT = "#8a8a8a", "#c9c9c9"
_CURVE_POINTS = 200
_STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "figure.constrained_layout.use": True,
    "figure.labelsize": 9,
    "figure.titlesize": 10,
    "font.size": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.title_fontsize": 8,
    "savefig.dpi": 130,
    "savefig.facecolor": "white",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
_styled = mpl.rc_context(_STYLE)


@_styled
def draw_all(built: aggregates.Report, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes to an existing folder every picture for which the report has data."""
    figures = {
        "aggregates.png": draw_aggregates(built),
        "learning_curves.png": draw_learning_curves(built),
    }
    drawn = {folder / name: figure for name, figure in figures.items() if figure}
    for path, figure in drawn.items():
        figure.savefig(path)
    return list(drawn)


@_styled
def draw_aggregates(built: aggregates.Report) -> mpl_figure.Figure | None:
    """Draws mean, median, IQM and optimality gap as bars, published systems in grey."""
    summaries = {**built.summaries, **built.published}
    if not summaries:
        return None
    greys = {one: _GREY if one == "APS" else _LIGHT for one in built.published}
    colors = {**_colors(built), **greys}
    panels = {
        "Mean": "mean",
        "Median": "median",
        "Interquartile mean": "interquartile_mean",
        "Optimality gap (less is better)": "optimality_gap",
    }
    figure = mpl_figure.Figure(figsize=(12.5, 1.3 + 0.30 * len(summaries)))
    grid = figure.subplots(1, len(panels), sharey=True)
    y = np.arange(len(summaries))[::-1]
    beside: Any = {"textcoords": "offset points", "va": "center"}
    bars: Any = {"height": 0.72, "edgecolor": "white", "linewidth": 0}
    bars["color"] = [colors[label] for label in summaries]
    for axes, (title, name) in zip(grid, panels.items(), strict=True):
        found = [getattr(summary, name) for summary in summaries.values()]
        value, low, high = 100.0 * np.array(found).T
        axes.barh(y, value, **bars)
        axes.hlines(y, low, high, color="black", linewidth=1.3)
        ends = np.fmax(np.fmax(value, high), 0.0)
        for end, at, one in zip(ends, y, value, strict=True):
            axes.annotate(f"{one:.1f}", (end, at), (4, 0), **beside)
        axes.set(title=title, xlabel="percent of human", xmargin=0.17)
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.tick_params(axis="y", length=0)
    labels = [*built.summaries, *(tables.marked(built, one) for one in built.published)]
    grid[0].set_yticks(y, labels, fontsize=9)
    figure.suptitle(
        f"Human-normalised score over {_num_games(built)}; grey: published systems, "
        "computed from their cells; ?: some cannot be right"
    )
    return figure


@_styled
def draw_learning_curves(built: aggregates.Report) -> mpl_figure.Figure | None:
    """Draws returns against agent steps with reward, a panel per game.

    Lines are games played while learning, averaged over seeds, with pointwise 95 %
    bootstrap bands from two seeds on; marks are evaluations. None where no run has
    written `metrics.csv`.
    """
    panels = []
    for row in built.games:
        lines = []
        for method, color in zip(built.methods, _colors(built).values(), strict=True):
            runs = method.runs.get(row.game, ())
            curves = [finished_runs.read_curves(run) for run in runs]
            training = [games for games, _ in curves if games is not None]
            evaluated = [games for _, games in curves if games is not None]
            if training or evaluated:
                lines.append((method.label, color, training, evaluated))
        if lines:
            panels.append((row, lines))
    if not panels:
        return None

    num_columns = len(panels) if len(panels) < 4 else min(5, len(panels) // 2)
    num_rows = math.ceil(len(panels) / num_columns)
    size = (max(4.2 * num_columns, 5.6), 0.7 + 3.0 * num_rows)
    figure = mpl_figure.Figure(figsize=size)
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    legend: dict[str, Any] = {}
    for axes, (row, lines) in zip(grid, panels, strict=False):
        end = max(c.agent_steps[-1] for line in lines for c in (*line[2], *line[3]))
        for index, (label, color, training, evaluated) in enumerate(lines):
            if training:
                x, estimate = average(training)
                axes.plot(x, estimate.value, color=color, linewidth=1.6, label=label)
                band: Any = {"color": color, "alpha": 0.18, "linewidth": 0}
                if np.isfinite(estimate.low).all():
                    axes.fill_between(x, estimate.low, estimate.high, **band)
            if evaluated:
                x, estimate = average(evaluated)
                # Side by side, so that no method's mark hides another's.
                x = x + 0.012 * end * (index - (len(lines) - 1) / 2)
                style = {"mec": "white", "ms": 5, "label": None if training else label}
                axes.plot(x, estimate.value, "D", color=color, **style)
                axes.vlines(x, estimate.low, estimate.high, color=color)
        if any(cell.normalized for cell in row.cells.values()):
            run_pictures.draw_reference(axes, scores.reference_scores(row.game))
        axes.set_title(tables.game_name(row.game))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axes.set_xlim(left=0.0)
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("agent steps with reward")
    figure.supylabel("return, points")
    key: Any = {"loc": "outside upper center", "ncols": 4}
    key["title"] = "Lines: games while learning; diamonds: evaluations (95 %)"
    figure.legend(list(legend.values()), list(legend), **key)
    return figure


def average(
    curves: Sequence[finished_runs.Curve],
) -> tuple[np.ndarray, estimates.Estimate]:
    """Averages curves over seeds on the steps that all of them cover.

    Each curve, one per seed, is interpolated linearly between its points.

    Returns:
      Agent steps `[N]`, and the mean with its pointwise interval, `[N]` each.
    """
    first = max(curve.agent_steps[0] for curve in curves)
    last = min(curve.agent_steps[-1] for curve in curves)
    x = np.unique(np.concatenate([curve.agent_steps for curve in curves]))
    x = x[(x >= first) & (x <= last)]
    if x.size > _CURVE_POINTS:
        x = np.linspace(first, last, _CURVE_POINTS)
    values = np.stack([np.interp(x, one.agent_steps, one.returns) for one in curves])
    return x, estimates.bootstrap(
        lambda chosen: values[chosen[0].astype(int)].mean(axis=-2),
        [range(len(curves))],
        seed=0,
        num_resamples=1_000,
    )


def _colors(built: aggregates.Report) -> dict[str, str]:
    """Returns the colour of each method by its label, the same in every picture."""
    labels = (method.label for method in built.methods)
    return dict(zip(labels, itertools.cycle(_COLORS), strict=False))


def _num_games(built: aggregates.Report) -> str:
    """Returns the number of games that have a human-normalised score, in words."""
    summaries = (*built.summaries.values(), *built.published.values())
    number = max(summary.num_games for summary in summaries)
    return f"{number} game{'s' * (number != 1)}"
