"""Draws a report: aggregates, games, performance profiles and learning curves.

The runs of the report carry colour; published systems stay grey, so that a picture says
at a glance what is new in it.
"""

import math
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker

from aps_jax.report import aggregates, finished_runs
from aps_jax.scores import estimates, scores

# Okabe and Ito's colours, told apart by every reader; https://jfly.uni-koeln.de/color/.
_COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
_GREY, _LIGHT = "#8a8a8a", "#c9c9c9"
_MARKERS = "ovs^DPX<>ph*"
_TEXT = {"fontsize": 9}
_CURVE_POINTS = 200


def draw_all(
    built: aggregates.Report, folder: pathlib.Path
) -> tuple[pathlib.Path, ...]:
    """Draws every picture for which the report has data.

    Args:
      built: The report.
      folder: An existing folder.

    Returns:
      The PNG files written.
    """
    drawn = {
        "aggregates.png": draw_aggregates(built),
        "games.png": draw_games(built),
        "profiles.png": draw_profiles(built),
        "learning_curves.png": draw_learning_curves(built),
    }
    paths = []
    for name, figure in drawn.items():
        if figure is None:
            continue
        path = folder / name
        figure.savefig(path, dpi=130, facecolor="white")
        paths.append(path)
    return tuple(paths)


def draw_aggregates(built: aggregates.Report) -> mpl_figure.Figure | None:
    """Draws mean, median, IQM and optimality gap as bars, published systems in grey."""
    colors = _colors(built)
    entries = [
        (label, summary, colors[label], False)
        for label, summary in built.summaries.items()
    ]
    suspects = {
        system
        for row in built.games
        for system, cell in row.published.items()
        if cell.suspect
    }
    for system, summary in built.published.items():
        color = _GREY if system == "APS" else _LIGHT
        entries.append((system, summary, color, system in suspects))
    if not entries:
        return None

    panels = (
        ("Mean", "mean"),
        ("Median", "median"),
        ("Interquartile mean", "interquartile_mean"),
        ("Optimality gap (less is better)", "optimality_gap"),
    )
    figure = mpl_figure.Figure(
        figsize=(12.5, 1.3 + 0.30 * len(entries)), layout="constrained"
    )
    grid = figure.subplots(1, len(panels), sharey=True)
    positions = np.arange(len(entries))[::-1]
    for axes, (title, name) in zip(grid, panels, strict=True):
        for position, (_, summary, color, suspect) in zip(
            positions, entries, strict=True
        ):
            estimate = getattr(summary, name)
            value = 100.0 * float(estimate.value)
            axes.barh(
                position,
                value,
                color=color,
                height=0.72,
                hatch="////" if suspect else None,
                edgecolor="white",
                linewidth=0,
            )
            end = value
            if not np.isnan(estimate.low):
                low, high = 100.0 * float(estimate.low), 100.0 * float(estimate.high)
                axes.plot([low, high], [position] * 2, color="black", linewidth=1.3)
                end = max(value, high)
            axes.annotate(
                f"{value:.1f}",
                (max(end, 0.0), position),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_title(title, fontsize=10)
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set_xmargin(0.17)
        axes.set_xlabel("percent of human", **_TEXT)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        _tidy(axes)
        axes.tick_params(axis="y", length=0)
    grid[0].set_yticks(
        positions,
        [label + (" (?)" if suspect else "") for label, _, _, suspect in entries],
        **_TEXT,
    )
    num_games = len(built.games)
    words = (
        f"Human-normalised score over {num_games} game{'s' * (num_games != 1)}; grey: "
        "published systems, computed from their cells"
    )
    if suspects & set(built.published):
        words += "; hatched: contains cells that cannot be right"
    figure.suptitle(words, fontsize=10)
    return figure


def draw_games(built: aggregates.Report) -> mpl_figure.Figure | None:
    """Draws each game's human-normalised scores: a row per game, a mark per system.

    The axis is linear up to human level and logarithmic beyond it. Published scores
    that cannot be right are left out.
    """
    rows = [row for row in built.games if row.random is not None]
    if not rows:
        return None
    figure = mpl_figure.Figure(
        figsize=(10.5, 1.9 + 0.34 * len(rows)), layout="constrained"
    )
    axes = figure.subplots()
    positions = np.arange(len(rows))[::-1]
    values: list[float] = [0.0, 100.0]
    for index, system in enumerate(built.published):
        x, y = [], []
        for position, row in zip(positions, rows, strict=True):
            cell = row.published.get(system)
            if cell is not None and not cell.suspect:
                x.append(100.0 * scores.human_normalized_score(row.game, cell.score))
                y.append(position)
        is_ours = system == "APS"
        axes.scatter(
            x,
            y,
            marker=_MARKERS[index % len(_MARKERS)],
            s=34 if is_ours else 26,
            facecolors="black" if is_ours else "none",
            edgecolors="black" if is_ours else _GREY,
            linewidths=1.0,
            label=f"{system} (published)",
            zorder=3 if is_ours else 2,
        )
        values += x
    labels = [method.label for method in built.methods]
    spread = 0.22 if len(labels) > 1 else 0.0
    offsets = np.linspace(spread, -spread, len(labels))
    for (label, color), offset in zip(_colors(built).items(), offsets, strict=True):
        x, y, lows, highs = [], [], [], []
        for position, row in zip(positions, rows, strict=True):
            cell = row.cells.get(label)
            if cell is None or cell.normalized is None:
                continue
            x.append(100.0 * float(cell.normalized.value))
            y.append(position + offset)
            lows.append(100.0 * float(cell.normalized.low))
            highs.append(100.0 * float(cell.normalized.high))
        axes.hlines(y, lows, highs, color=color, linewidth=2.2, alpha=0.7, zorder=4)
        axes.scatter(x, y, color=color, s=46, zorder=5, label=label)
        values += x + [end for end in lows + highs if not math.isnan(end)]
    for position in positions[1::2]:
        axes.axhspan(position - 0.5, position + 0.5, color="#f5f5f5", zorder=0)
    axes.axvline(0.0, color="black", linewidth=0.9, zorder=1)
    axes.axvline(100.0, color="black", linewidth=0.9, linestyle="--", zorder=1)
    axes.set_xscale("symlog", linthresh=100.0, linscale=1.6)
    low, high = min(values), max(values)
    axes.set_xlim(min(1.2 * low, -8.0), max(1.25 * high, 125.0))
    marks = [-1000, -300, -100, -50, 0, 25, 50, 75, 100, 200, 500, 1000, 2000, 5000]
    axes.set_xticks(
        [mark for mark in marks if axes.get_xlim()[0] <= mark <= axes.get_xlim()[1]]
    )
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda mark, _: f"{mark:g}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(positions, [scores.camel_case(row.game) for row in rows], **_TEXT)
    axes.set_xlabel(
        "percent of human: 0 is random play, 100 (dashed) is human; logarithmic beyond",
        **_TEXT,
    )
    _tidy(axes)
    axes.tick_params(axis="y", length=0)
    figure.legend(
        loc="outside upper center",
        ncols=min(5, len(labels) + len(built.published)) or 1,
        fontsize=8,
        frameon=False,
    )
    return figure


def draw_profiles(built: aggregates.Report) -> mpl_figure.Figure | None:
    """Draws the share of runs above each score, with pointwise 95 % bands."""
    profiles = built.profiles
    if not profiles.methods and not profiles.published:
        return None
    figure = mpl_figure.Figure(figsize=(8.2, 4.4), layout="constrained")
    axes = figure.subplots()
    x = 100.0 * profiles.thresholds
    dashes = ((0, (1, 1)), (0, (4, 2)), (0, (6, 2, 1, 2)), (0, (8, 3)))
    for index, (system, shares) in enumerate(profiles.published.items()):
        is_ours = system == "APS"
        axes.plot(
            x,
            100.0 * shares,
            color="black" if is_ours else _shade(index, len(profiles.published)),
            linestyle="-" if is_ours else dashes[index % len(dashes)],
            linewidth=1.4 if is_ours else 1.1,
            drawstyle="steps-post",
            label=f"{system} (published means)",
        )
    for label, estimate in profiles.methods.items():
        color = _colors(built)[label]
        axes.plot(
            x,
            100.0 * estimate.value,
            color=color,
            linewidth=2.2,
            drawstyle="steps-post",
            label=label,
        )
        if not np.isnan(estimate.low).any():
            axes.fill_between(
                x,
                100.0 * estimate.low,
                100.0 * estimate.high,
                step="post",
                color=color,
                alpha=0.18,
                linewidth=0,
            )
    axes.axvline(100.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(-2.0, 102.0)
    axes.set_xlabel("human-normalised score in percent (dashed: human)", **_TEXT)
    axes.set_ylabel("runs above that score, percent", **_TEXT)
    num_games = len(built.games)
    axes.set_title(
        f"Performance profile over {num_games} game{'s' * (num_games != 1)}",
        fontsize=10,
    )
    _tidy(axes)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def draw_learning_curves(built: aggregates.Report) -> mpl_figure.Figure | None:
    """Draws returns against agent steps with reward, a panel per game.

    Lines are games played while learning, averaged over seeds, with pointwise 95 %
    bootstrap bands from two seeds on; marks are evaluations. None where no run has
    written `metrics.csv`.
    """
    panels = []
    for row in built.games:
        lines = []
        for method in built.methods:
            curves = [
                finished_runs.read_curves(run) for run in method.runs.get(row.game, ())
            ]
            training = [one.training for one in curves if one.training is not None]
            evaluated = [one.evaluation for one in curves if one.evaluation is not None]
            if training or evaluated:
                color = _colors(built)[method.label]
                lines.append((method.label, color, training, evaluated))
        if lines:
            panels.append((row, lines))
    if not panels:
        return None

    num_columns = len(panels) if len(panels) < 4 else min(5, len(panels) // 2)
    num_rows = math.ceil(len(panels) / num_columns)
    figure = mpl_figure.Figure(
        figsize=(max(4.2 * num_columns, 5.6), 0.7 + 3.0 * num_rows),
        layout="constrained",
    )
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes, (row, lines) in zip(grid, panels, strict=False):
        end = max(
            curve.agent_steps[-1]
            for _, _, training, evaluated in lines
            for curve in training + evaluated
        )
        for index, (label, color, training, evaluated) in enumerate(lines):
            if training:
                x, estimate = average(training, seed=built.seed)
                axes.plot(x, estimate.value, color=color, linewidth=1.6, label=label)
                if not np.isnan(estimate.low).any():
                    axes.fill_between(
                        x,
                        estimate.low,
                        estimate.high,
                        color=color,
                        alpha=0.18,
                        linewidth=0,
                    )
            if evaluated:
                x, estimate = average(evaluated, seed=built.seed)
                # Side by side, so that no method's mark hides another's.
                x = x + 0.012 * end * (index - (len(lines) - 1) / 2)
                axes.plot(
                    x,
                    estimate.value,
                    color=color,
                    marker="D",
                    markersize=5,
                    markeredgecolor="white",
                    linestyle="none",
                    label=None if training else label,
                    zorder=4,
                )
                if not np.isnan(estimate.low).any():
                    axes.vlines(x, estimate.low, estimate.high, color=color)
        _reference_lines(axes, row)
        name = row.game if row.random is None else scores.camel_case(row.game)
        axes.set_title(name, fontsize=10)
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axes.tick_params(labelsize=8)
        axes.set_xlim(left=0.0)
        _tidy(axes)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("agent steps with reward", **_TEXT)
    figure.supylabel("return, points", **_TEXT)
    handles, labels = {}, {}
    for axes in grid[: len(panels)]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
            labels.setdefault(label, label)
    figure.legend(
        handles.values(),
        labels.values(),
        loc="outside upper center",
        ncols=4,
        fontsize=8,
        frameon=False,
        title=textwrap.fill(
            "Lines: games while learning; diamonds: evaluations; bands and bars: 95 % "
            "over seeds; grey: random (dotted), human (dashed)",
            width=int(16 * figure.get_figwidth()),
        ),
        title_fontsize=8,
    )
    return figure


def average(
    curves: Sequence[finished_runs.Curve], *, seed: int, num_resamples: int = 1_000
) -> tuple[np.ndarray, estimates.Estimate]:
    """Averages curves over seeds on the steps that all of them cover.

    Args:
      curves: One per seed; each is interpolated linearly between its points.
      seed: Root of the resampling.
      num_resamples: Resamples behind the band.

    Returns:
      Agent steps `[N]`, and the mean with its pointwise interval, `[N]` each.
    """
    first = max(curve.agent_steps[0] for curve in curves)
    last = min(curve.agent_steps[-1] for curve in curves)
    if first > last:
        # No step is covered by all: the average of what each curve ends with.
        x = np.array([max(curve.agent_steps[-1] for curve in curves)])
    else:
        x = np.unique(np.concatenate([curve.agent_steps for curve in curves]))
        x = x[(x >= first) & (x <= last)]
        if x.size > _CURVE_POINTS:
            x = np.linspace(first, last, _CURVE_POINTS)
    values = np.stack(
        [np.interp(x, curve.agent_steps, curve.returns) for curve in curves]
    )
    value = values.mean(axis=0)
    if len(curves) < 2:
        unknown = np.full_like(value, np.nan)
        return x, estimates.Estimate(value, unknown, unknown)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(curves), size=(num_resamples, len(curves)))
    low, high = np.percentile(values[chosen].mean(axis=1), [2.5, 97.5], axis=0)
    return x, estimates.Estimate(value, low, high)


def _reference_lines(axes: mpl_axes.Axes, row: aggregates.GameRow) -> None:
    """Draws the random score, and the human one where the curves stay readable."""
    if row.random is None or row.human is None:
        return
    axes.axhline(row.random, color=_GREY, linestyle=":", linewidth=1.0, zorder=1)
    low, high = axes.get_ylim()
    if row.human <= high + 1.5 * (high - low):
        axes.axhline(row.human, color=_GREY, linestyle="--", linewidth=1.0, zorder=1)
    else:
        axes.annotate(
            f"human {row.human:,.0f} \u2191",
            (0.98, 0.97),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=7,
            color=_GREY,
        )


def _colors(built: aggregates.Report) -> dict[str, str]:
    """Returns the colour of each method by its label, the same in every picture."""
    return {
        method.label: _COLORS[index % len(_COLORS)]
        for index, method in enumerate(built.methods)
    }


def _shade(index: int, count: int) -> str:
    """Returns one of `count` greys, from dark to light."""
    level = 0.35 + 0.4 * index / max(count - 1, 1)
    return str(round(level, 3))


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
