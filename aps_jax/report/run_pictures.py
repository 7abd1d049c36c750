"""Pictures of a run: its learning curves, its games, and the features it visited."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from aps_jax.runs import metrics, snapshots
from aps_jax.scores import scores

_GIF_MILLISECONDS = 70  # An agent step lasts 4/60 s; browsers round to 10 ms.
_LABEL_HEIGHT = 14  # Pixels above each picture of a grid.


def tile(
    videos: Sequence[Sequence[np.ndarray]], labels: Sequence[str]
) -> list[np.ndarray]:
    """Lays videos side by side in a near-square grid, each under its label.

    Args:
      videos: Each a list of pictures `[H, W, 3]` uint8 of one size, at least one; a
        video that ends early keeps its last picture, darkened.
      labels: A line for each, cut where it does not fit.

    Returns:
      As many pictures as the longest video has.
    """
    num_columns = math.ceil(math.sqrt(len(videos)))
    num_rows = math.ceil(len(videos) / num_columns)
    height, width, _ = videos[0][0].shape
    cell = height + _LABEL_HEIGHT
    blank = Image.new("RGB", (num_columns * width, num_rows * cell), "black")
    numbered = [divmod(index, num_columns) for index in range(len(videos))]
    corners = [(column * width, row * cell) for row, column in numbered]
    draw = ImageDraw.Draw(blank)
    for (x, y), label in zip(corners, labels, strict=True):
        while draw.textlength(label) > width - 4:
            label = label[:-1]
        draw.text((x + 1, y + 1), label, fill="white")
    made = []
    for step in range(max(map(len, videos))):
        sheet = np.array(blank)
        for (x, y), video in zip(corners, videos, strict=True):
            picture = video[step] if step < len(video) else video[-1] // 2
            y += _LABEL_HEIGHT
            sheet[y : y + height, x : x + width] = picture
        made.append(sheet)
    return made


def save_gif(path: pathlib.Path, pictures: Sequence[np.ndarray]) -> None:
    """Writes pictures `[H, W, 3]` uint8 as a gif that plays at the game's speed.

    Raises:
      ValueError: There is no picture.
    """
    if not pictures:
        raise ValueError("A gif needs at least one picture.")
    images = [Image.fromarray(picture) for picture in pictures]
    # One palette, of the game's most colourful picture, or colours flicker.
    sample = images[:: max(1, len(images) // 50)]
    num_pixels = images[0].width * images[0].height
    richest = max(sample, key=lambda image: len(image.getcolors(num_pixels) or ()))
    palette = richest.quantize(colors=128)
    plain = Image.Dither.NONE
    first, *rest = (image.quantize(palette=palette, dither=plain) for image in images)
    options: Any = {"duration": _GIF_MILLISECONDS, "loop": 0, "optimize": False}
    first.save(path, save_all=True, append_images=rest, **options)


def save_learning_curves(
    path: pathlib.Path,
    *,
    title: str,
    reference: scores.ReferenceScores | None,
    pretrain_csv: pathlib.Path | None,
    finetune_csvs: Mapping[str, pathlib.Path],
) -> None:
    """Draws how a run went: returns above, what pretraining measured below.

    Args:
      path: The png to write.
      title: Names the agent and the game.
      reference: Random and human scores to draw; None where the returns are no scores
        that may stand beside them.
      pretrain_csv: Metrics of the pretraining, if there was one.
      finetune_csvs: Metrics of each fine-tuning by the name of its arm.
    """
    from matplotlib import figure as mpl_figure

    figure = mpl_figure.Figure(figsize=(10, 6.5), layout="constrained")
    figure.suptitle(title)
    (pretraining, finetuning), (rewards, distances) = figure.subplots(2, 2)
    for axes in (pretraining, finetuning):
        axes.set_ylabel("return (points)")
    pretraining.set_title("pretraining: score, which the agent never sees")
    rewards.set_title("pretraining: the parts of its reward")
    distances.set_title("pretraining: distances to the nearest particles")
    finetuning.set_title("fine-tuning: games while learning, and evaluations")
    for axes in figure.axes:
        axes.set_xlabel(f"frames with{'' if axes is finetuning else 'out'} reward")
    if pretrain_csv is not None:
        columns = metrics.read_metrics(pretrain_csv)
        _line(pretraining, columns, "episode_return", label="games")
        for name in columns:
            if name.startswith("reward"):
                _line(rewards, columns, name, label=name)
            elif "distance" in name:
                _line(distances, columns, name, label=name)
    for index, (arm, csv_path) in enumerate(finetune_csvs.items()):
        columns = metrics.read_metrics(csv_path)
        color = f"C{index}"
        _line(finetuning, columns, "episode_return", color=color, alpha=0.5, label=arm)
        # The later arms' marks are smaller: none hides another of the same score.
        style = {"color": color, "marker": "o", "ls": "", "ms": max(11 - 5 * index, 4)}
        style["label"] = f"{arm}, evaluated"
        _line(finetuning, columns, "eval_return_mean", **style)
    for axes in (pretraining, finetuning):
        if reference is not None and axes.lines:
            draw_reference(axes, reference)
    for axes in figure.axes:
        if axes.lines:
            axes.legend(fontsize="small")
        else:  # An agent may measure no distance, or have no reward.
            axes.set_visible(False)
    figure.savefig(path, dpi=110)


def save_feature_picture(
    path: pathlib.Path, visited: Sequence[snapshots.Snapshot]
) -> None:
    """Draws the visited part of the feature sphere at up to six moments of pretraining.

    The sphere is seen from outside: points are projected onto the plane in which the
    last snapshot's features vary most (`plane_of`), the circle is the
    sphere's outline. The colour is the direction, in that plane, of the task under
    which a state was reached: where features tell the tasks apart, each colour gathers
    on its own side, as in the small wheel.

    Args:
      path: The png to write.
      visited: From `snapshots.read_snapshots`, at least one.

    Raises:
      ValueError: There is none.
    """
    from matplotlib import figure as mpl_figure
    from matplotlib import patches

    if not visited:
        raise ValueError("There are no feature snapshots to draw.")
    moments = {round(i * (len(visited) - 1) / 5) for i in range(6)}
    plane = plane_of(visited[-1].arrays["phi"])
    size = (2.3 * len(moments) + 1.2, 3.0)
    figure = mpl_figure.Figure(figsize=size, layout="constrained")
    *spheres, wheel = figure.subplots(
        1,
        len(moments) + 1,
        width_ratios=[1.0] * len(moments) + [0.5],
        subplot_kw={"aspect": "equal", "xlim": (-1.15, 1.15), "ylim": (-1.15, 1.15)},
    )
    last = visited[-1].arrays["phi"] - visited[-1].arrays["phi"].mean(axis=0)
    share = np.square(last @ plane).sum() / max(np.square(last).sum(), 1e-12)
    figure.suptitle(
        "Visited states on the feature sphere, seen in the plane of their largest "
        f"variation ({100 * share:.0f} % of it at the end)",
        fontsize="medium",
    )
    for axes, moment in zip(spheres, sorted(moments), strict=True):
        snapshot = visited[moment]
        points, w = snapshot.arrays["phi"] @ plane, snapshot.arrays["task"] @ plane
        colors = np.arctan2(w[:, 1], w[:, 0])
        hues: dict[str, Any] = {"cmap": "hsv", "vmin": -math.pi, "vmax": math.pi}
        axes.scatter(*points.T, c=colors, s=9, alpha=0.8, linewidths=0, **hues)
        axes.add_patch(patches.Circle((0, 0), 1.0, fill=False, color="grey", lw=0.8))
        axes.set_title(f"{snapshot.agent_steps:,} agent steps", fontsize="small")
    angles = np.linspace(-math.pi, math.pi, 60, endpoint=False)
    wheel.scatter(np.cos(angles), np.sin(angles), c=angles, cmap="hsv", s=25)
    wheel.set_title("task", fontsize="small")
    for axes in figure.axes:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def draw_reference(axes: Any, reference: scores.ReferenceScores) -> None:
    """Draws the random score, and the human one where the curves stay readable."""
    axes.axhline(reference.random, color="grey", ls=":", label="random")
    low, high = axes.get_ylim()
    if reference.human <= high + 1.5 * (high - low):
        axes.axhline(reference.human, color="grey", ls="--", label="human")


def _line(axes: Any, columns: dict[str, list[float]], name: str, **style: Any) -> None:
    """Draws the known values of a metric over frames."""
    frames, values = np.array([columns["frames"], columns[name]])
    known = np.isfinite(values)
    axes.plot(frames[known], values[known], **style)


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
