"""Draws a report: aggregates, games, performance profiles and learning curves.

The runs of the report carry colour; published systems stay grey, so that a picture
shows at a glance what is new in it.
"""

import itertools
import math
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker

from aps_jax.report import aggregates, finished_runs, tables
from aps_jax.scores import estimates, scores

# Okabe and Ito's colours, told apart by every reader; https://jfly.uni-koeln.de/color/.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY, _LIGHT = "#8a8a8a", "#c9c9c9"
_MARKERS = "ovs^DPX<>ph*"
_DASHES = ((0, (1, 1)), (0, (4, 2)), (0, (6, 2, 1, 2)), (0, (8, 3)))
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
        "games.png": draw_games(built),
        "profiles.png": draw_profiles(built),
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
    suspects = {
        system
        for row in built.games
        for system, cell in row.published.items()
        if cell.suspect
    }
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
    bars["hatch"] = ["////" if label in suspects else "" for label in summaries]
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
    labels = [label + " (?)" * (label in suspects) for label in summaries]
    grid[0].set_yticks(y, labels, fontsize=9)
    hatched = "; hatched: contains cells that cannot be right" if suspects else ""
    figure.suptitle(
        f"Human-normalised score over {_num_games(built)}; grey: published systems, "
        f"computed from their cells{hatched}"
    )
    return figure


@_styled
def draw_games(built: aggregates.Report) -> mpl_figure.Figure | None:
    """Draws each game's human-normalised scores: a row per game, a mark per system.

    The axis is linear up to human level and logarithmic beyond it. Published scores
    that cannot be right are left out.
    """
    rows = [row for row in built.games if row.random is not None]
    if not rows or not (built.summaries or built.published):
        return None
    figure = mpl_figure.Figure(figsize=(10.5, 1.9 + 0.34 * len(rows)))
    axes = figure.subplots()
    positions = dict(
        zip((row.game for row in rows), reversed(range(len(rows))), strict=True)
    )
    extremes = [0.0, 100.0]
    for marker, system in zip(itertools.cycle(_MARKERS), built.published, strict=False):
        shown = [
            (scores.human_normalized_score(row.game, cell.score), positions[row.game])
            for row in rows
            if (cell := row.published.get(system)) is not None and not cell.suspect
        ]
        x, y = np.array(shown).reshape(-1, 2).T
        style: Any = {"s": 26, "facecolors": "none", "edgecolors": _GREY, "zorder": 2}
        if system == "APS":
            style = {"s": 34, "color": "black", "zorder": 3}
        label = f"{system} (published)"
        axes.scatter(100.0 * x, y, marker=marker, linewidths=1.0, label=label, **style)
        extremes += list(100.0 * x)
    spread = 0.22 if len(built.methods) > 1 else 0.0
    offsets = np.linspace(spread, -spread, len(built.methods))
    for (label, color), offset in zip(_colors(built).items(), offsets, strict=True):
        found = [
            (*_percent(ours.normalized), positions[row.game] + offset)
            for row in rows
            if (ours := row.cells.get(label)) is not None and ours.normalized
        ]
        value, low, high, y = np.array(found).reshape(-1, 4).T
        axes.hlines(y, low, high, color=color, lw=2.2, alpha=0.7, zorder=4)
        axes.scatter(value, y, color=color, s=46, zorder=5, label=label)
        extremes += [end for end in (*value, *low, *high) if np.isfinite(end)]
    for position in list(positions.values())[1::2]:
        axes.axhspan(position - 0.5, position + 0.5, color="#f5f5f5", zorder=0)
    axes.axvline(0.0, color="black", linewidth=0.9, zorder=1)
    axes.axvline(100.0, color="black", linewidth=0.9, linestyle="--", zorder=1)
    axes.set_xscale("symlog", linthresh=100.0, linscale=1.6)
    limits = min(1.2 * min(extremes), -8.0), max(1.25 * max(extremes), 125.0)
    axes.set_xlabel(
        "percent of human: 0 is random play, 100 (dashed) is human; logarithmic beyond"
    )
    axes.set(xlim=limits, ylim=(-0.6, len(rows) - 0.4))
    marks = (-1000, -300, -100, -50, 0, 25, 50, 75, 100, 200, 500, 1000, 2000, 5000)
    axes.set_xticks([mark for mark in marks if limits[0] <= mark <= limits[1]])
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    names = [tables.game_name(game) for game in positions]
    axes.set_yticks(list(positions.values()), names, fontsize=9)
    axes.tick_params(axis="y", length=0)
    num_columns = min(5, len(built.methods) + len(built.published))
    figure.legend(loc="outside upper center", ncols=num_columns)
    return figure


@_styled
def draw_profiles(built: aggregates.Report) -> mpl_figure.Figure | None:
    """Draws the share of runs above each score, with pointwise 95 % bands."""
    profiles = built.profiles
    if not profiles.methods and not profiles.published:
        return None
    figure = mpl_figure.Figure(figsize=(8.2, 4.4))
    axes = figure.subplots()
    x = 100.0 * profiles.thresholds
    greys = np.linspace(0.35, 0.75, max(len(profiles.published), 2)).round(3)
    for index, (system, shares) in enumerate(profiles.published.items()):
        style: Any = {"color": str(greys[index]), "ls": _DASHES[index % 4], "lw": 1.1}
        if system == "APS":
            style = {"color": "black", "lw": 1.4}
        label = f"{system} (published means)"
        axes.plot(x, 100.0 * shares, drawstyle="steps-post", label=label, **style)
    for label, estimate in profiles.methods.items():
        color, style = _colors(built)[label], {"drawstyle": "steps-post", "lw": 2.2}
        percent = _percent(estimate)
        _line_with_band(axes, x, percent, color, step="post", label=label, **style)
    axes.axvline(100.0, color="black", linewidth=0.8, linestyle="--")
    axes.set(
        xlim=(x[0], x[-1]),
        ylim=(-2.0, 102.0),
        xlabel="human-normalised score in percent (dashed: human)",
        ylabel="runs above that score, percent",
        title=f"Performance profile over {_num_games(built)}",
    )
    axes.grid(color="#e6e6e6", linewidth=0.7)
    figure.legend(loc="outside right upper")
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
                x, estimate = average(training, seed=built.seed)
                _line_with_band(axes, x, estimate, color, linewidth=1.6, label=label)
            if evaluated:
                x, estimate = average(evaluated, seed=built.seed)
                # Side by side, so that no method's mark hides another's.
                x = x + 0.012 * end * (index - (len(lines) - 1) / 2)
                style = {"mec": "white", "ms": 5, "label": None if training else label}
                axes.plot(x, estimate.value, "D", color=color, **style)
                axes.vlines(x, estimate.low, estimate.high, color=color)
        if any(cell.normalized for cell in row.cells.values()):
            _reference_lines(axes, row)
        axes.set_title(tables.game_name(row.game))
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axes.set_xlim(left=0.0)
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("agent steps with reward")
    figure.supylabel("return, points")
    key = figure.legend(
        list(legend.values()), list(legend), loc="outside upper center", ncols=4
    )
    title = (
        "Lines: games while learning; diamonds: evaluations; bands and bars: 95 % over "
        "seeds; grey: random (dotted), human (dashed)"
    )
    key.set_title(textwrap.fill(title, width=int(16 * figure.get_figwidth())))
    return figure


def average(
    curves: Sequence[finished_runs.Curve], *, seed: int, num_resamples: int = 1_000
) -> tuple[np.ndarray, estimates.Estimate]:
    """Averages curves over seeds on the steps that all of them cover.

    Each curve, one per seed, is interpolated linearly between its points.

    Returns:
      Agent steps `[N]`, and the mean with its pointwise interval, `[N]` each.
    """
    first = max(curve.agent_steps[0] for curve in curves)
    last = min(curve.agent_steps[-1] for curve in curves)
    x = np.unique(np.concatenate([curve.agent_steps for curve in curves]))
    if first > last:
        x = x[-1:]  # No step is covered by all: the average of what each ends with.
    else:
        x = x[(x >= first) & (x <= last)]
        if x.size > _CURVE_POINTS:
            x = np.linspace(first, last, _CURVE_POINTS)
    values = np.stack([np.interp(x, one.agent_steps, one.returns) for one in curves])
    return x, estimates.bootstrap(
        lambda chosen: values[chosen[0].astype(int)].mean(axis=-2),
        [range(len(curves))],
        seed=seed,
        num_resamples=num_resamples,
    )


def _percent(estimate: estimates.Estimate) -> estimates.Estimate:
    return estimates.Estimate(*(100.0 * part for part in estimate))


def _line_with_band(
    axes: mpl_axes.Axes,
    x: np.ndarray,
    estimate: estimates.Estimate,
    color: str,
    *,
    step: Any = None,
    **style: Any,
) -> None:
    """Draws an estimate `[N]`, with a band where it has an interval."""
    value, low, high = estimate
    axes.plot(x, value, color=color, **style)
    if np.isfinite(low).all():
        axes.fill_between(x, low, high, step=step, color=color, alpha=0.18, linewidth=0)


def _reference_lines(axes: mpl_axes.Axes, row: aggregates.GameRow) -> None:
    """Draws the random score, and the human one where the curves stay readable."""
    random, human = scores.reference_scores(row.game)
    style: dict[str, Any] = {"color": _GREY, "linewidth": 1.0, "zorder": 1}
    axes.axhline(random, linestyle=":", **style)
    low, high = axes.get_ylim()
    if human <= high + 1.5 * (high - low):
        axes.axhline(human, linestyle="--", **style)
    else:
        style = {"fontsize": 7, "color": _GREY, "transform": axes.transAxes}
        axes.text(
            0.98, 0.97, f"human {human:,.0f} \u2191", ha="right", va="top", **style
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
